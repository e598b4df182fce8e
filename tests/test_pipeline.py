# SPDX-License-Identifier: Apache-2.0
"""Laws of the way from lines to records: order, memory, one for one."""

import itertools
import json

import helpers
import pytest

from l2s_jax.data import text_files
from l2s_jax.inference import answerer, pipeline, prompts
from l2s_jax.runtime import partitioning

BAD = text_files.BadLine('in', 1, 'is empty')


@pytest.fixture(scope='module')
def answers():
  module = helpers.MODULES['t5_1_1']
  with (
    partitioning.use_mesh(
      mesh := partitioning.make_mesh(partitioning.MeshConfig())
    ),
    partitioning.axis_rules(partitioning.DEFAULT_RULES),
  ):
    yield answerer.PromptAnswerer(
      helpers.system(module),
      helpers.random_params(module),
      mesh,
      prompt_length=20,
      max_decode_len=2,
      batch_size=8,
    )


def test_order_is_that_of_the_input_and_memory_for_two_windows(
  answers, monkeypatch
):
  monkeypatch.setattr(pipeline, 'WINDOW_BATCHES', 3)
  window = 3 * 8
  num_read = 0

  def items():
    nonlocal num_read
    for number in itertools.count():
      num_read += 1
      yield BAD if number % 11 == 5 else {'prompt': 'a' * (number * 5 % 19 + 1)}

  num_written = 0
  for records in itertools.islice(pipeline.answer(answers, items()), 20):
    assert num_read - num_written <= 2 * window
    for number, record in enumerate(records, start=num_written):
      if number % 11 == 5:
        assert record == {'line': 1, 'error': 'is empty', 'prediction': None}
      else:
        assert record['prompt'] == 'a' * (number * 5 % 19 + 1)
    num_written += len(records)
  assert num_written >= 10 * window


def test_a_window_without_a_prompt_has_its_records(answers, monkeypatch):
  monkeypatch.setattr(pipeline, 'WINDOW_BATCHES', 1)
  items = [BAD] * 20 + [{'prompt': 'a'}]
  chunks = list(pipeline.answer(answers, iter(items)))
  assert [len(chunk) for chunk in chunks] == [8, 8, 5]


def test_one_by_one_is_as_all_at_once(answers, tmp_path):
  items: list[prompts.Item] = [
    {'prompt': 'a', 'n': 1},
    BAD,
    {'prompt': 'bc'},
  ]
  expected = [
    record for some in pipeline.answer(answers, items) for record in some
  ]
  path = tmp_path / 'out.jsonl'
  with path.open('w') as sink:
    tally = pipeline.answer_each(answers, items, sink)
  assert [json.loads(line) for line in path.open()] == expected
  assert (tally.num_lines, tally.num_bad) == (3, 1)


def test_the_progress_says_how_fast_and_how_much_padding(answers, capsys):
  list(pipeline.answer_all(answers, [{'prompt': 'a' * 15}] * 8, total=8))
  told = capsys.readouterr().err
  assert 'prompts/s without' in told and 'were padding.' in told
