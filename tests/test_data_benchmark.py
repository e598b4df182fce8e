# SPDX-License-Identifier: Apache-2.0
"""Laws of `benchmark --data`: what is timed, and what it is compared with."""

import dataclasses
import importlib
import json

import gin
import helpers
import numpy as np
import pytest
import speed_goals

from l2s_jax.models import l2s
from l2s_jax.performance import (
  benchmark,
  data_benchmark,
  data_input,
  data_peers,
  data_reading,
  peers,
  timing,
)

LENGTHS = (7, 5)
NUM_EXAMPLES = 24


@pytest.fixture
def given(tmp_path):
  """A task of a few lines, more than are asked for."""
  (tmp_path / 'en').write_text('two dogs run\n' * 30, encoding='utf-8')
  (tmp_path / 'de').write_text('zwei Hunde\n' * 30, encoding='utf-8')
  with gin.unlock_config():
    gin.clear_config()
    gin.bind_parameter('local_task.data_files', {'train': ('en', 'de')})
    gin.bind_parameter('local_task.data_dir', str(tmp_path))
  yield data_input.DataInput(
    helpers.system(l2s.build(helpers.T5_1_0)),
    'local',
    {'inputs': 8, 'targets': 8},
    num_examples=NUM_EXAMPLES,
    batch_size=4,
    lengths=(LENGTHS,),
    process_counts=(1, 2),
  )
  gin.clear_config()


@pytest.fixture
def cached(given, tmp_path):
  vocabularies = given.model.prompt_vocabulary, given.model.answer_vocabulary
  ids = np.arange(3, 200)
  return data_reading.make_cache(
    tmp_path / 'cache', vocabularies, [ids, ids], LENGTHS, NUM_EXAMPLES
  )


def test_all_that_is_there_takes_part(given, tmp_path, monkeypatch, capsys):
  absent = peers.Peer('absent', '', ('no_such_package',))
  present = {'seqio': data_peers.PEERS['seqio'], 'absent': absent}
  monkeypatch.setattr(data_peers, 'PEERS', present)
  monkeypatch.setattr(data_benchmark, 'IMPORTS', ('json',))
  # On one core no processes are started.
  monkeypatch.setattr('os.sched_getaffinity', lambda process: {0})
  folder = tmp_path / 'report'
  benchmark.benchmark(
    str(folder), data_input=given, data=True, peers=True, rounds=1
  )
  printed = capsys.readouterr().out
  assert 'absent is left out: the package no_such_package' in printed
  assert (folder / 'data.md').read_text() in printed
  assert sorted(path.name for path in folder.iterdir()) == [
    'data.json',
    'data.md',
  ]
  content = json.loads((folder / 'data.json').read_text())
  found = [(row['part'], row['engine']) for row in content['rows']]
  assert {engine for part, engine in found if part == 'tokenizing'} >= {
    'l2s_jax', 'seqio', data_peers.library(given.model.prompt_vocabulary),
  }  # fmt: skip
  for row in content['rows']:
    ((_, values),) = row['rounds'].items()
    assert len(values) == 1 and values[0] > 0
  steps = [row for row in content['rows'] if row['part'] == 'parts']
  assert [row['processes'] for row in steps] == [1, 2]
  judged = speed_goals.judge_data(content['rows'])
  assert [goal['ours'] for goal in judged] == ['text -> records']


def test_starting_is_left_out():
  """A rate is that of the examples between few and all."""
  spent = [0.0]

  def call(number):
    spent[0] += 100.0 + 0.5 * number

  size = timing.Size(few=8, all=64)
  (secs,) = timing.seconds_between(
    [call], size, rounds=2, clock=lambda: spent[0]
  )
  assert secs == [0.5 * 56] * 2


def test_a_cache_to_read_has_the_lengths_asked_for(cached):
  batches = [
    part.batch
    for part in cached.train_batches(
      task_feature_lengths={'inputs': 9, 'targets': 9},
      batch_size=4,
      seed=0,
      num_epochs=1,
    )
  ]
  assert len(batches) == NUM_EXAMPLES // 4
  for batch in batches:
    assert (batch['encoder_segment_ids'].sum(1) == LENGTHS[0]).all()
    assert (batch['decoder_segment_ids'].sum(1) == LENGTHS[1]).all()


def test_datasets_maps_the_lines_asked_for(given, tmp_path):
  pytest.importorskip('datasets', reason='datasets is not installed')
  path = tmp_path / 'texts.jsonl'
  path.write_text('{"inputs": "a!", "targets": "b"}\n' * 5, encoding='utf-8')
  vocabulary = given.model.prompt_vocabulary
  num_tokens = data_peers.map_datasets(path, (vocabulary, vocabulary), 3, 1)
  assert num_tokens == 3 * (3 + 2)  # A token is a byte, and EOS.


def test_grain_reads_what_we_read(cached, monkeypatch):
  """The same examples, each once, in the same form; of the order its own."""
  pytest.importorskip('grain', reason='grain is not installed')
  lay_out, laid_out = data_peers.packing.lay_out, []

  def noting(*args, **options):
    laid_out.append(lay_out(*args, **options))
    return laid_out[-1]

  monkeypatch.setattr(data_peers.packing, 'lay_out', noting)
  data_peers.grain_reader(cached, LENGTHS, 4)(NUM_EXAMPLES)
  theirs = list(laid_out)
  laid_out.clear()
  data_reading.read(cached, LENGTHS, 4, np.arange(4), NUM_EXAMPLES)
  for key in theirs[0]:
    rows = [
      sorted(np.concatenate([batch[key] for batch in batches]).tolist())
      for batches in (theirs, laid_out)
    ]
    assert rows[0] == rows[1], key


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'mixture_or_task_name': 'cached'}, 'Use the gin file of the cached task'),
    ({'mixture_or_task_name': 'mixture'}, 'one of its tasks: local\\.'),
    ({'batch_size': 16}, 'timing needs two batches: set BATCH_SIZE=16 lower'),
    ({'process_counts': (8,)}, 'DATA_PROCESSES=8: each needs a row'),
    ({'lengths': ((3, 1),)}, 'expected pairs of lengths'),
  ],
)
def test_what_cannot_be_timed_is_refused(given, tmp_path, changes, message):
  with gin.unlock_config():
    gin.bind_parameter('mixture.tasks', {'local': 1.0})
  with pytest.raises(ValueError, match=message):
    data_benchmark.run(
      tmp_path / 'report',
      dataclasses.replace(given, **changes),
      rounds=1,
      has_peers=False,
    )
  assert not (tmp_path / 'report').exists()


def test_data_need_their_gin_file(tmp_path):
  with pytest.raises(ValueError, match='benchmark_data.gin'):
    benchmark.benchmark(str(tmp_path), data=True)


def test_processes_of_datasets_import_no_tensorflow():
  """They import this module."""
  module = importlib.import_module('l2s_jax.performance.data_peers')
  assert not {'tf', 'seqio', 'datasets', 'grain'} & vars(module).keys()
