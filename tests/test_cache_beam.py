# SPDX-License-Identifier: Apache-2.0
"""Laws of caching by Apache Beam: its bytes are those of the local run."""

import json
import sys
import types

import pytest
import test_cache_writer

from l2s_jax.caching import cache_beam, cache_key
from l2s_jax.vocabularies import loading

pytest.importorskip(
  'apache_beam',
  reason='pip install -r requirements-beam.txt, in an environment of its own',
)

NUM_EXAMPLES = 61
# One process, whose threads write; Prism, its default, fetches a program.
THREADS = '--runner=FnApiRunner'
PROCESSES = (
  '--runner=FnApiRunner,--direct_num_workers=2,'
  '--direct_running_mode=multi_processing'
)


@pytest.fixture
def model(vocabulary):
  answers = loading.load(vocabulary.path, start_id=5, pad_id=4, eos_id=3)
  return types.SimpleNamespace(
    prompt_vocabulary=vocabulary, answer_vocabulary=answers
  )


@pytest.fixture
def bindings(tmp_path):
  """Returns a mixture of a table and of parallel text with bad lines."""
  rows = [
    {'source': f'day {n} ' * (1 + n % 7), 'target': f'{n} ü'}
    for n in range(NUM_EXAMPLES)
  ]
  table = '\n'.join(map(json.dumps, rows))
  (tmp_path / 'x.jsonl').write_text(table)
  for column, ending in (('source', 'en'), ('target', 'de')):
    lines = [row[column] for row in rows]
    lines[40:40] = ['\ufeff one\r', '']
    (tmp_path / f'x.{ending}').write_text('\n'.join(lines))
  files = {'table': 'x.jsonl', 'pairs': ('x.en', 'x.de')}
  settings = {
    f'{scope}/{key}': value
    for scope, name in files.items()
    for key, value in test_cache_writer.local(
      tmp_path, data_files={'train': name}, reference_columns=()
    ).items()
    if not key.endswith(('template', 'reference_columns'))
  }
  return settings | {'mixture.tasks': {f'{name}/local': 1.0 for name in files}}


def write(folder, model, bindings, options=None, **settings):
  if options is not None:
    settings |= {'beam_pipeline_options': options, 'num_workers': None}
  test_cache_writer.write(folder, model, bindings, 'mixture', **settings)


def test_two_processes_write_the_bytes_of_the_local_run(
  model, bindings, tmp_path
):
  local, beam = tmp_path / 'local', tmp_path / 'beam'
  write(local, model, bindings)
  write(beam, model, bindings, PROCESSES)
  expected = test_cache_writer.content(local)
  assert test_cache_writer.content(beam) == expected
  assert len(expected) == 2 * 2 * 8 + 2
  hidden = {path.name for path in beam.rglob('.*')}
  assert not any('part' in name or 'job' in name for name in hidden)


def test_it_goes_on_with_what_is_missing_and_names_what_has_changed(
  model, bindings, tmp_path
):
  folder = tmp_path / 'cache'
  write(folder, model, bindings, THREADS)
  before = test_cache_writer.content(folder)
  (folder / 'cache.json').unlink()
  missing = folder / 'pairs' / 'train' / '00003-of-00008.array_record'
  kept = folder / 'pairs' / 'train' / '00002-of-00008.array_record'
  missing.unlink()
  written = kept.stat().st_mtime_ns
  write(folder, model, bindings, THREADS)
  assert test_cache_writer.content(folder) == before
  assert kept.stat().st_mtime_ns == written


def test_what_stops_a_worker_is_its_own_sentence(
  model, bindings, tmp_path, monkeypatch
):
  # Before it begins, the driver looks at the first examples.
  monkeypatch.setattr(cache_key, 'NUM_SAMPLED', 4)
  path = model.prompt_vocabulary.path
  rows = model.prompt_vocabulary.vocab_size
  model.prompt_vocabulary = loading.load(path, extra_ids=3).for_table(rows + 1)
  with (tmp_path / 'x.jsonl').open('a') as file:
    file.write('\n{"source": "a <extra_id_0>", "target": "b"}')
  folder = tmp_path / 'cache'
  with pytest.raises(ValueError) as error:
    write(folder, model, bindings, THREADS)
  told = str(error.value).partition('\n')[0]  # gin says where it was called.
  assert told.startswith("the text 'a <extra_id_0>' contains the token ")
  assert told.endswith('use a model that has it.')
  assert not list(folder.rglob('.*part*')) + list(folder.glob('.*job*'))


@pytest.mark.parametrize(
  'options,settings,message',
  [
    ('runner=DirectRunner', {}, 'expected options separated by commas'),
    (THREADS, {'shard': 1, 'num_shards': 2}, 'remove num_workers'),
  ],
)
def test_wrong_options_are_one_sentence(
  options, settings, message, model, bindings, tmp_path
):
  with pytest.raises(ValueError, match=message):
    write(tmp_path / 'cache', model, bindings, options, **settings)


def test_without_beam_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  with pytest.raises(ValueError, match=r"pip install 'l2s_jax\[beam\]'"):
    cache_beam.check(THREADS)
