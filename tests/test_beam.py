# SPDX-License-Identifier: Apache-2.0
"""Laws of beam search: all sequences, transformers, T5X, and no neighbours."""

import dataclasses
import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity
from flax import traverse_util

from l2s_jax.inference import beam, sampling, strategies
from l2s_jax.inference import generate as generate_lib
from l2s_jax.models import encoder_decoder, l2s
from l2s_jax.weights.formats import t5x

START_ID, PAD_ID = 3, 7
MAX_DECODE_LEN = 6
NUM_BEAMS = 3


def n_best(**options):
  return sampling.Decoding(
    num_beams=NUM_BEAMS, num_answers=NUM_BEAMS, log_probs=True, **options
  )


@functools.cache  # a second call compiles nothing
def make_generator(
  module,
  decoding,
  eos_id,
  start_id=START_ID,
  pad_id=PAD_ID,
  max_decode_len=MAX_DECODE_LEN,
):
  return generate_lib.Generator(
    module,
    max_decode_len=max_decode_len,
    ids=strategies.Ids(start_id, eos_id, pad_id),
    decoding=decoding,
  )


def search(generator, params, batch, max_decode_lens=None):
  """Returns the answers that a generator writes."""
  generation = generator.start(
    generator.prepare(params), batch, max_decode_lens=max_decode_lens
  )
  return jax.tree.map(np.asarray, generation.finish())


def log_probs_of(module, params, batch, tokens):
  """Returns teacher-forced log-probabilities of an answer to each prompt."""
  start = np.full((len(tokens), 1), START_ID)
  logits = helpers.logits(
    module,
    params,
    {
      **batch,
      'decoder_input_tokens': jnp.asarray(np.hstack([start, tokens[:, :-1]])),
      'decoder_segment_ids': jnp.ones(tokens.shape, jnp.int32),
    },
  )
  return np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], axis=2
  )[..., 0]


def answer_lengths(tokens, eos_id):
  """Returns how many tokens there are, up to and with EOS."""
  has_eos = (tokens == eos_id).any(-1)
  return np.where(
    has_eos, np.argmax(tokens == eos_id, axis=-1) + 1, tokens.shape[-1]
  )


def penalty(lengths, decoding):
  if decoding.length_penalty_form == 'gnmt':
    lengths = (5 + lengths) / 6
  return np.power(lengths, decoding.length_penalty, dtype=np.float32)


# --- against all there is ---


@pytest.mark.parametrize('form', ['power', 'gnmt'])
@pytest.mark.parametrize('exponent', [0.0, 0.6, 2.0, -1.0])
def test_beams_enough_for_all_sequences_find_all(form, exponent):
  """Each of 40 sequences of four ids, in the order of their scores."""
  eos_id, num_steps = 2, 3
  module = l2s.build(dataclasses.replace(helpers.T5_1_1, vocab_size=4))
  params = helpers.random_params(module)
  batch = helpers.random_batch(4, 4, prompt_lengths=(5,), answer_lengths=(1,))
  everything = np.array(list(itertools.product(range(4), repeat=num_steps)))
  lengths = answer_lengths(everything, eos_id)
  is_written = np.arange(num_steps) < lengths[:, None]
  sums = (
    log_probs_of(
      module,
      params,
      {key: jnp.repeat(value, 64, axis=0) for key, value in batch.items()},
      everything,
    )
    * is_written
  ).sum(1)
  decoding = sampling.Decoding(
    num_beams=40,
    num_answers=40,
    length_penalty=exponent,
    length_penalty_form=form,
    early_stopping='never',
  )
  has_ended = (everything == eos_id).any(1) | (form == 'power')
  # In the other form what has not ended comes last, by its sum alone.
  scores = sums / np.where(has_ended, penalty(lengths, decoding), 1)
  expected = {
    tuple(row): ranks
    for row, *ranks in zip(
      np.where(is_written, everything, PAD_ID).tolist(),
      has_ended.tolist(),
      scores.tolist(),
      strict=True,
    )
  }
  assert len(expected) == 40
  ranked = sorted(expected.items(), key=lambda item: item[1], reverse=True)

  generator = make_generator(module, decoding, eos_id, max_decode_len=num_steps)
  found = search(generator, params, batch)
  assert [tuple(row) for row in found.tokens[0].tolist()] == [
    row for row, _ in ranked
  ]
  helpers.assert_close(
    found.scores[0], np.array([score for _, (_, score) in ranked])
  )


# --- against greedy decoding ---


@pytest.mark.parametrize('early_stopping', [True, False])
@pytest.mark.parametrize('name', ['t5_1_0', 'llm_to_gpt2-add-foreign'])
def test_one_beam_is_greedy(name, early_stopping):
  module = helpers.MODULES[name]
  params, batch = helpers.random_params(module), helpers.batch_for(module)
  options = {'max_decode_len': MAX_DECODE_LEN, 'start_id': START_ID}
  tokens = helpers.generate(module, params, batch, **options)
  eos_id = int(tokens[0, 2])
  expected = helpers.generate(
    module, params, batch, **options, eos_id=eos_id, pad_id=PAD_ID
  )
  assert (expected == PAD_ID).any()

  prepared = l2s.params_for_generation(module, params)
  writer, name = l2s.writer(l2s.for_generation(module))
  search = beam.BeamSearch(
    writer,
    sampling.Decoding(early_stopping=early_stopping),
    strategies.Ids(START_ID, eos_id, PAD_ID),
  )
  num_rows = len(tokens)
  prompts = strategies.Prompts(
    has_prompt=jnp.ones(num_rows, bool),
    row_keys=jax.random.split(jax.random.key(0), num_rows),
    max_decode_lens=jnp.full(num_rows, MAX_DECODE_LEN),
    first_tokens=jnp.full(num_rows, START_ID),
  )
  cache = helpers.prefill(module, params, batch, MAX_DECODE_LEN)
  state = search.begin(cache, prompts, MAX_DECODE_LEN)
  step = jax.jit(search.step)
  while not state.done.all():
    state = step(l2s.writer_params(prepared, name), state)
  np.testing.assert_array_equal(search.answers(state).tokens[:, 0], expected)


# --- against transformers ---

NUM_TOKENS = 16
REFERENCES = {
  't5': (test_parity.T5, 'AutoModelForSeq2SeqLM'),
  'gpt2': (test_parity.GPT2, 'AutoModelForCausalLM'),
  'llama': (test_parity.LLAMA, 'AutoModelForCausalLM'),
  'mistral': (test_parity.MISTRAL, 'AutoModelForCausalLM'),
  'gemma3': (
    test_parity.GEMMA3 | {'num_hidden_layers': 3},
    'AutoModelForCausalLM',
  ),
}


@pytest.fixture(scope='module')
def reference(request, tmp_path_factory):
  """Returns a model of transformers, ours of the same weights, and prompts."""
  config_json, architecture = REFERENCES[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  torch, theirs = test_parity.save_pretrained(folder, config_json, architecture)
  model, params = test_parity.load_model(folder)
  batch = test_parity.make_batch()
  tokens, segments = (
    torch.tensor(batch[f'encoder_{name}']).long()
    for name in ('input_tokens', 'segment_ids')
  )
  if not theirs.config.is_encoder_decoder:  # padding first, start token last
    order = torch.argsort(segments, dim=1, stable=True)
    start = torch.full((len(tokens), 1), test_parity.START_ID)
    tokens = torch.cat([tokens.gather(1, order), start], 1)
    segments = torch.cat([segments.gather(1, order), torch.ones_like(start)], 1)

  def generate(eos_id, **options):
    with torch.no_grad():
      output = theirs.generate(
        input_ids=tokens,
        attention_mask=segments,
        num_beams=NUM_BEAMS,
        num_return_sequences=NUM_BEAMS,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=PAD_ID,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
      )
    is_decoder = not theirs.config.is_encoder_decoder
    answers = output.sequences[:, tokens.shape[1] if is_decoder else 1 :]
    answers = np.pad(
      answers,
      ((0, 0), (0, NUM_TOKENS - answers.shape[1])),
      constant_values=PAD_ID,
    )
    shape = (len(tokens), NUM_BEAMS)
    return answers.reshape(*shape, -1), output.sequences_scores.reshape(shape)

  # A token that beams without EOS write in their midst.
  eos_id = int(generate(None)[0][0, 0, NUM_TOKENS // 3])
  return generate, model, params, jax.tree.map(jnp.asarray, batch), eos_id


def assert_equals_transformers(reference, decoding, **options):
  """Compares the n best and their scores; returns how long they are."""
  generate, model, params, batch, eos_id = reference
  tokens, scores = generate(
    eos_id,
    length_penalty=decoding.length_penalty,
    early_stopping=decoding.early_stopping,
    **options,
  )
  generator = make_generator(
    model,
    decoding,
    eos_id,
    test_parity.START_ID,
    max_decode_len=NUM_TOKENS,
  )
  found = search(generator, params, batch)
  np.testing.assert_array_equal(found.tokens, tokens)
  np.testing.assert_allclose(found.scores, scores, rtol=2e-5)
  return answer_lengths(tokens, eos_id)


# Each penalty and each kind of stopping; with each other in the long run.
SHORT = ((True, 0.6), (True, -1.0), (False, 1.0), (False, 0.0), ('never', 2.0))
STOPPING = [
  (stopping, penalty)
  if (stopping, penalty) in SHORT
  else pytest.param(stopping, penalty, marks=pytest.mark.long)
  for stopping in (True, False, 'never')
  for penalty in (0.0, 0.6, 1.0, 2.0, -1.0)
]


@pytest.mark.parametrize('reference', ['t5'], indirect=True)
@pytest.mark.parametrize('early_stopping, length_penalty', STOPPING)
def test_beams_are_those_of_transformers(
  reference, early_stopping, length_penalty
):
  lengths = assert_equals_transformers(
    reference,
    n_best(early_stopping=early_stopping, length_penalty=length_penalty),
  )
  # Reading on for what is longer and may be better, 'never' finds it.
  assert early_stopping == 'never' or lengths.min() < NUM_TOKENS


@pytest.mark.parametrize(
  'reference', ['gpt2', 'llama', 'mistral', 'gemma3'], indirect=True
)
@pytest.mark.parametrize(
  'early_stopping, length_penalty', [(True, 1.0), (False, -1.0), ('never', 0.6)]
)
def test_a_decoder_s_beams_are_those_of_transformers(
  reference, early_stopping, length_penalty
):
  lengths = assert_equals_transformers(
    reference,
    n_best(early_stopping=early_stopping, length_penalty=length_penalty),
  )
  assert early_stopping == 'never' or lengths.min() < NUM_TOKENS


@pytest.mark.parametrize('reference', ['t5'], indirect=True)
def test_beams_are_penalized_as_in_transformers(reference):
  lengths = assert_equals_transformers(
    reference,
    n_best(min_decode_len=6, no_repeat_ngram_size=2),
    min_new_tokens=6,
    no_repeat_ngram_size=2,
  )
  assert lengths.min() > 6


# --- against T5X ---


@pytest.mark.parametrize('name', ['t5_1_0_tiny', 't5_1_1_tiny'])
def test_beams_are_those_of_t5x(shared_data, name):
  """Theirs come best last; where none has ended, live ones by their sums."""
  folder = shared_data / 't5x_golden' / name
  source = t5x.Checkpoint(folder)
  expected = dict(np.load(folder / 'expected.npz'))
  params = traverse_util.unflatten_dict(
    {path: source.read(path) for path in source.shapes()}
  )
  prompts = expected['encoder_input_tokens']
  generator = make_generator(
    encoder_decoder.EncoderDecoder(source.config),
    sampling.Decoding(
      num_beams=4,
      num_answers=4,
      length_penalty=0.6,
      length_penalty_form='gnmt',
    ),
    eos_id=1,
    start_id=0,
    pad_id=0,
    max_decode_len=16,
  )
  batch = {
    'encoder_input_tokens': jnp.asarray(prompts),
    'encoder_segment_ids': jnp.asarray(np.int32(prompts != 0)),
  }
  found = search(generator, params, batch)
  np.testing.assert_array_equal(found.tokens, expected['beam_tokens'][:, ::-1])
  np.testing.assert_allclose(
    found.scores, expected['beam_scores'][:, ::-1], rtol=1e-5
  )


# --- rows alone ---

# An encoder's prompt is shared by its beams, a decoder's is copied.
NAMES = ('t5_1_0', 't5gemma', 'gpt2', 'gemma3', 'llm_to_gpt2-add-foreign')


@pytest.fixture(scope='module', params=NAMES)
def searched(request):
  """Returns module, parameters, batch, decoding, EOS and the answers."""
  module = helpers.MODULES[request.param]
  params, batch = helpers.random_params(module), helpers.batch_for(module)
  decoding = n_best(length_penalty=0.5)
  without = search(make_generator(module, decoding, -1), params, batch)
  eos_id = int(without.tokens[0, 0, 2])
  found = search(make_generator(module, decoding, eos_id), params, batch)
  assert len(np.unique(answer_lengths(found.tokens, eos_id))) > 1
  return module, params, batch, decoding, eos_id, found


def test_scores_are_those_of_teacher_forcing(searched):
  module, params, batch, decoding, eos_id, found = searched
  for tokens, log_probs, scores in zip(
    *(np.moveaxis(x, 1, 0) for x in (found.tokens, found.log_probs)),
    found.scores.T,
    strict=True,
  ):
    lengths = answer_lengths(tokens, eos_id)
    is_written = np.arange(MAX_DECODE_LEN) < lengths[:, None]
    expected = log_probs_of(module, params, batch, tokens) * is_written
    helpers.assert_close(log_probs, expected)
    helpers.assert_close(scores, expected.sum(1) / penalty(lengths, decoding))
    assert (tokens[~is_written] == PAD_ID).all()


def test_the_n_best_are_distinct_and_sorted(searched):
  *_, decoding, _, found = searched
  for tokens, scores in zip(found.tokens, found.scores, strict=True):
    assert len(np.unique(tokens, axis=0)) == decoding.num_answers
    assert (np.diff(scores) <= 0).all()


def take(answers, rows):
  return jax.tree.map(lambda x: x[rows], answers)


def assert_same(found, expected):
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  helpers.assert_close(found.scores, expected.scores)
  helpers.assert_close(found.log_probs, expected.log_probs)


def test_a_cache_that_grows_changes_nothing(searched, monkeypatch):
  module, params, batch, decoding, eos_id, expected = searched
  monkeypatch.setattr(generate_lib, 'FIRST_SLOTS', 2)  # then 4, then 6
  generator = make_generator.__wrapped__(module, decoding, eos_id)
  assert_same(search(generator, params, batch), expected)


def test_padding_and_neighbours_change_nothing(searched):
  module, params, batch, decoding, eos_id, expected = searched
  padded = {
    key: jnp.pad(batch[key], ((0, 0), (0, 4)))[2:3]
    for key in ('encoder_input_tokens', 'encoder_segment_ids')
  }
  found = search(make_generator(module, decoding, eos_id), params, padded)
  assert_same(found, take(expected, slice(2, 3)))


def test_rows_have_longest_lengths_of_their_own(searched):
  module, params, batch, decoding, eos_id, _ = searched
  generator = make_generator(module, decoding, eos_id)
  most = [2, 6, 0, 4]
  found = search(generator, params, batch, jnp.array(most))
  for row in (0, 1, 3):
    expected = search(generator, params, batch, jnp.full(4, most[row]))
    assert_same(take(found, row), take(expected, row))
  assert (found.tokens[2] == PAD_ID).all()


# --- parts ---


@pytest.mark.parametrize('width', [5, 700, 1024, 5003])
def test_top_k_is_that_of_lax_with_many_ties(width):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(0, 9, (3, width)), jnp.float32)
  x = x.at[1].set(-jnp.inf)
  for found, expected in zip(
    beam.top_k(x, 4, block_size=32), jax.lax.top_k(x, 4), strict=True
  ):
    np.testing.assert_array_equal(found, expected)
