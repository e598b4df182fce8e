# SPDX-License-Identifier: Apache-2.0
"""Laws of answers as text: whatever the batch, cut, streamed or scored."""

import logging
import re
from typing import Any

import helpers
import jax
import pytest

from l2s_jax.inference import answerer, sampling
from l2s_jax.runtime import partitioning

MAX_DECODE_LEN = 20
TEXTS = [chr(97 + n % 26) * (n * 7 % 20 + 1) for n in range(21)]


@pytest.fixture(scope='module')
def mesh():
  with (
    partitioning.use_mesh(
      mesh := partitioning.make_mesh(partitioning.MeshConfig())
    ),
    partitioning.axis_rules(partitioning.DEFAULT_RULES),
  ):
    yield mesh


def make(mesh, decoding=None, **changes):
  """Returns answers from a tiny model, which writes any bytes."""
  module = helpers.MODULES['t5_1_1']
  options: dict[str, Any] = {
    'prompt_length': 18,
    'max_decode_len': MAX_DECODE_LEN,
    'batch_size': 8,
    'decoding': decoding and sampling.Decoding(**decoding),
  }
  return answerer.PromptAnswerer(
    helpers.system(module),
    helpers.random_params(module, seed=2),
    mesh,
    **options | changes,
  )


def encode(answers, **options):
  return [
    answers.encode(text, row_id=row, **options)
    for row, text in enumerate(TEXTS)
  ]


def finish(answers, prompts):
  """Returns the answers to prompts, batch by batch."""
  found: dict[int, answerer.Answer] = {}
  for batch in answers.pack(prompts):
    writing = answers.start([prompts[row] for row in batch])
    found.update(zip(batch, answers.finish(writing), strict=True))
  return [found[row] for row in range(len(prompts))]


SAMPLED = {'temperature': 1.0, 'log_probs': True}


@pytest.fixture(scope='module')
def sampled(mesh):
  """Returns what samples its answers, and these."""
  answers = make(mesh, SAMPLED)
  return answers, finish(answers, encode(answers))


def test_neighbours_batch_size_and_bucket_change_nothing(mesh, sampled):
  answers, expected = sampled
  assert len({found.text for found in expected}) == len(TEXTS)
  others = make(mesh, SAMPLED, batch_size=24, prompt_length=30)
  prompts, cut_prompts = encode(others), encode(answers)
  assert len(others.pack(prompts)) < len(answers.pack(cut_prompts))
  is_cut = [prompt.was_cut for prompt in cut_prompts]
  assert any(is_cut) and not any(prompt.was_cut for prompt in prompts)
  for row, found in enumerate(finish(others, prompts)):
    if is_cut[row]:
      continue
    assert prompts[row] == cut_prompts[row]
    assert found.text == expected[row].text
    assert found.details['token_ids'] == expected[row].details['token_ids']
    helpers.assert_close(
      found.details['token_log_probs'], expected[row].details['token_log_probs']
    )
  for row in (2, 5):
    prompt = answers.encode(TEXTS[row], row_id=row)
    (alone,) = answers.finish(answers.start([prompt]))
    assert alone.text == expected[row].text


def test_an_answer_that_may_be_shorter_is_the_beginning(sampled):
  answers, expected = sampled
  prompts = [
    prompt._replace(max_decode_len=row % MAX_DECODE_LEN + 1)
    for row, prompt in enumerate(encode(answers))
  ]
  for prompt, found, whole in zip(
    prompts, finish(answers, prompts), expected, strict=True
  ):
    ids = whole.details['token_ids'][: prompt.max_decode_len]
    assert found.details['token_ids'] == ids
    assert found.text == helpers.vocabulary().decode(ids)


def test_lengths_inside_a_bucket_compile_once(mesh, caplog):
  answers = make(mesh, prompt_length=40)
  prompts = [answers.encode('a' * n, row_id=0) for n in (26, 31, 27)]
  for prompt in prompts:
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      answers.finish(answers.start([prompt]))
    compiled = [r for r in caplog.records if 'ompil' in r.getMessage()]
    assert bool(compiled) == (prompt is prompts[0])
  assert (answers.num_tokens, answers.num_slots) == (87, 3 * 8 * 32)


def test_stop_texts_cut_what_would_have_been_written(mesh, sampled):
  """Tokens and log-probabilities are those up to the stop text's last."""
  _, unrestricted = sampled
  texts = [found.text for found in unrestricted]
  vocabulary = helpers.vocabulary()
  # Any bytes are in these texts, and not all are characters.
  pairs = [re.findall('[ -~]{2}', text)[-1] for text in texts[:2]]
  stops = (*pairs, re.findall('[ -~]', texts[3])[0])
  answers = make(mesh, SAMPLED | {'stop': stops})
  num_stopped = 0
  for found, whole in zip(
    finish(answers, encode(answers)), unrestricted, strict=True
  ):
    assert found.text == answerer.cut(whole.text, stops)
    ids = found.details['token_ids']
    assert ids == whole.details['token_ids'][: len(ids)]
    log_probs = found.details['token_log_probs']
    helpers.assert_close(
      log_probs, whole.details['token_log_probs'][: len(ids)]
    )
    assert found.details['score'] == pytest.approx(sum(log_probs), abs=1e-3)
    if found.text != whole.text:
      num_stopped += 1
      assert any(stop in vocabulary.decode(ids) for stop in stops)
      assert not any(stop in vocabulary.decode(ids[:-1]) for stop in stops)
  assert 3 <= num_stopped < len(TEXTS)


def test_a_batch_that_has_stopped_is_not_written_to_the_end(mesh, sampled):
  _, unrestricted = sampled
  stop = unrestricted[0].text[1]
  answers = make(mesh, SAMPLED | {'stop': [stop]}, max_decode_len=500)
  writing = answers.start(encode(answers)[:1])
  assert answers.finish(writing)[0].text == unrestricted[0].text.split(stop)[0]
  assert writing.generation.step < 40


@pytest.mark.parametrize('stop', [(), ('x', 'yz')])
def test_pieces_are_final_and_together_the_answer(mesh, sampled, stop):
  if stop:
    text = sampled[1][3].text
    stop = (text[6:9], text[7:9] + '!')
  answers = make(mesh, SAMPLED | {'stop': stop})
  for row in (0, 3):
    pieces: list[str] = []
    prompt = answers.encode(TEXTS[row], row_id=row)
    found = answers.stream(prompt, pieces.append)
    (expected,) = answers.finish(answers.start([prompt]))
    assert found == expected
    assert ''.join(pieces) == found.text
    assert len(pieces) > 2 and all(pieces)


def test_what_is_settled_stays(vocabulary):
  text = ' Grüße  an\n日本, ș 👋🏽 ab yes no'
  for kind in (helpers.vocabulary(), vocabulary):
    ids = kind.encode(text)
    whole = kind.decode(ids)
    longest = ''
    for size in range(len(ids) + 1):
      found = answerer.settled(kind.decode(ids[:size]), ('yes!', 'es no!'))
      assert whole.startswith(found) and found.startswith(longest)
      longest = found
    assert longest == whole.removesuffix('es no')


@pytest.mark.parametrize(
  'text,stops,expected',
  [
    ('a b c', (), 'a b c'),
    ('a b c', ('c', 'b'), 'a '),
    ('abcdef', ('abcdef', 'cd'), 'ab'),  # `cd` is the first to be complete
    ('abcd', ('d', 'bcd'), 'a'),
    ('abcd', ('x', 'ab'), ''),
  ],
)
def test_where_a_text_is_cut(text, stops, expected):
  assert answerer.cut(text, stops) == expected


def test_several_answers_come_best_first_with_scores(mesh):
  answers = make(mesh, {'num_beams': 3, 'num_answers': 2})
  for found in finish(answers, encode(answers)[:5]):
    assert found.details.keys() == {'predictions', 'scores'}
    assert found.details['predictions'][0] == found.text
    best, second = found.details['scores']
    assert 0 > best >= second
  assert answers(TEXTS[:3]) == [
    found.text for found in finish(answers, encode(answers)[:3])
  ]


def test_beams_are_cut_at_stop_texts_in_the_end(mesh):
  beams = {'num_beams': 2, 'num_answers': 2, 'log_probs': True}
  free = make(mesh, beams)
  (whole,) = finish(free, encode(free)[:1])
  stop = whole.text[2]
  answers = make(mesh, beams | {'stop': (stop,)})
  (found,) = finish(answers, encode(answers)[:1])
  assert found.details['predictions'] == [
    text.split(stop)[0] for text in whole.details['predictions']
  ]
  assert found.details['scores'] == whole.details['scores']
