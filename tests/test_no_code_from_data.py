# SPDX-License-Identifier: Apache-2.0
"""No data file makes its reader execute code, or leave its folder.

Files of every kind name paths outside, or hold a pickle; a mark tells whether
it ran, and what is outside stays as it was. Other tests have the same of
PyTorch's files (`test_tensor_files`), of bundles and exports (`test_export`,
`test_hostile_exports`).
"""

import builtins
import dataclasses
import json
import pathlib
import pickle
import shutil
import sys
from typing import Any

import cache_files
import flax.serialization
import helpers
import numpy as np
import pytest
import safetensors.numpy
from array_record.python import array_record_module

from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.evaluation import evaluate
from l2s_jax.interop import to_t5x
from l2s_jax.models import l2s
from l2s_jax.runtime import integrity
from l2s_jax.vocabularies import loading
from l2s_jax.weights import opening, own_tokenizer
from l2s_jax.weights.formats import t5x, tensor_files

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'
# Where a name may lead from `inside/it`.
ESCAPES = ('../outside', '{root}/outside', 'a/../../outside', 'one/../x', '..')


class Bomb:
  """Leaves a mark where it is unpickled."""

  def __init__(self, mark):
    self.mark = str(mark)

  def __reduce__(self):
    return builtins.open, (self.mark, 'w')


@pytest.fixture
def mark(tmp_path):
  """A file that must not appear; the pickle that makes it is a live one."""
  path = tmp_path / 'mark'
  pickle.loads(pickle.dumps(Bomb(path))).close()
  path.unlink()
  yield path
  assert not path.exists()


def refused(read, words):
  """Checks that reading fails with a message of this package."""
  with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
    read()
  assert 'l2s_jax' in str(caught.traceback[-1].path), caught.value


def reseal(path, change):
  """Changes a file as somebody would who knows how it is sealed."""
  found = json.loads(path.read_text())
  found.pop(integrity.DIGEST)
  change(found)
  path.write_text(json.dumps(integrity.seal(found)))


# --- caches -------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
  """A cache; beside it, its shards."""
  folder = tmp_path / 'inside' / 'it'
  tasks = {'one': {'train': cache_files.random_examples(5)}}
  cache_files.write(folder, tasks, num_shards=1)
  shutil.copytree(folder / 'one', tmp_path / 'inside' / 'outside')
  shutil.copytree(folder / 'one', tmp_path / 'outside')
  return folder


@pytest.mark.parametrize('name', ESCAPES)
def test_a_cache_has_no_shards_outside(name, cache, tmp_path):
  name = name.format(root=tmp_path)

  def of_task(found):
    found['tasks'][name] = found['tasks'].pop('one')

  def of_split(found):
    splits = found['tasks']['one']['splits']
    splits[f'{name}/train'] = splits.pop('train')

  kept = cache_format.open_cache(cache)
  kept.split('one', 'train').read([0])
  before = (cache / cache_format.FILE).read_text()
  reseal(cache / cache_format.FILE, of_task)
  refused(lambda: cache_format.open_cache(cache), 'cannot be part of a file')
  (cache / cache_format.FILE).write_text(before)
  reseal(cache / cache_format.FILE, of_split)
  split = cache_format.open_cache(cache).split('one', f'{name}/train')
  refused(lambda: split.read([0]), f'{cache}/one/.*: no such file')


@pytest.mark.parametrize('kind', [cache_format.Split, feature_format.Features])
@pytest.mark.parametrize('shards', [['../outside'], '../outside', [-5], [4]])
def test_shards_are_counted_and_not_named(kind, shards, tmp_path):
  entry = {'num_examples': 5, 'shards': shards, 'index_digests': ['0']}
  more = () if kind is cache_format.Split else (8,)
  refused(
    lambda: kind(tmp_path, 'one', 'train', entry, 'bfloat16', *more),
    f'{kind._file}: the shards of',
  )


def write_features(place, states):
  """Writes a shard of features; returns the digest of its index."""
  place.mkdir(parents=True)
  path = cache_format.shard_path(place, 0, 1) + feature_format.KIND
  writer = array_record_module.ArrayRecordWriter(
    f'{path}.array_record', feature_format.WRITER_OPTIONS
  )
  record = feature_format.encode(states)
  writer.write(record)
  writer.close()
  index = np.array(
    [[len(states.rows), cache_format.checksum(record)]], np.uint32
  )
  np.save(f'{path}.index.npy', index)
  return cache_format.index_digest(index)


@pytest.mark.parametrize('name', ESCAPES)
def test_features_have_no_shards_outside(name, tmp_path):
  folder = tmp_path / 'inside' / 'it'
  states = feature_format.States(np.ones((3, 4), np.int8), np.ones(3, 'f4'))
  places = (folder / 'one', tmp_path / 'inside' / 'outside')
  digests = {write_features(p / 'train', states) for p in places}
  write_features(tmp_path / 'outside' / 'train', states)
  entry = {'num_examples': 1, 'shards': [1], 'index_digests': list(digests)}

  def read(task):
    of_task = feature_format.Features(folder, task, 'train', entry, 'int8', 4)
    return of_task.states([0])[0]

  np.testing.assert_array_equal(read('one').rows, states.rows)
  refused(
    lambda: read(name.format(root=tmp_path)), f'{folder}/.*: no such file'
  )


def test_the_index_of_a_shard_is_not_unpickled(cache, mark, tmp_path):
  array = np.array([Bomb(mark)], object)
  (path,) = (cache / 'one' / 'train').glob('*.index.npy')
  split = cache_format.open_cache(cache).split('one', 'train')
  for write in (
    lambda: np.save(path, array, allow_pickle=True),
    lambda: path.write_bytes(pickle.dumps(Bomb(mark))),
  ):
    write()
    refused(lambda: split.lengths_of([0]), f'{path} is not the index of a sha')
    refused(lambda: cache_format.load_index(str(path)), 'is not the index of')


# --- weights ------------------------------------------------------------------


@pytest.mark.parametrize('name', ESCAPES)
@pytest.mark.parametrize('ending', ['safetensors', 'bin'])
def test_an_index_of_weights_has_no_files_outside(ending, name, tmp_path):
  folder = tmp_path / 'inside' / 'it'
  folder.mkdir(parents=True)
  for place in (tmp_path, tmp_path / 'inside'):
    safetensors.numpy.save_file({'a': np.ones(2)}, place / 'outside')
  stem = 'model' if ending == 'safetensors' else 'pytorch_model'
  index = {'weight_map': {'a': name.format(root=tmp_path)}}
  (folder / f'{stem}.{ending}.index.json').write_text(json.dumps(index))
  refused(
    lambda: tensor_files.open_folder(folder),
    'expected the name of a file in the same folder',
  )


# --- runs ---------------------------------------------------------------------


@pytest.mark.parametrize(
  'name', ['converted', pytest.param('llm', marks=pytest.mark.long)]
)
def test_a_pickle_in_the_place_of_any_file_is_not_run(name, mark, tmp_path):
  bomb = pickle.dumps(Bomb(mark))
  files = [p for p in (KEPT / name).rglob('*') if p.is_file()]
  for number, path in enumerate(files):
    folder = tmp_path / str(number)
    shutil.copytree(KEPT / name, folder)
    (folder / path.relative_to(KEPT / name)).write_bytes(bomb)
    try:
      opened = opening.open_source(str(folder))
      for tensor in opened.shapes():
        opened.read(tensor)
      own_tokenizer.load(str(folder))
    except (ValueError, FileNotFoundError, OSError) as error:
      assert 'l2s_jax' in str(error) or str(folder) in str(error)
    shutil.rmtree(folder)
    assert not mark.exists(), path


@pytest.mark.parametrize('name', ['../x', '/x', 'a/../../x'])
def test_a_metrics_file_names_no_plot_outside(name, tmp_path):
  path = tmp_path / 'metrics.json'
  scores = {'by_length': {name: {'1-10': {'bleu': 1.0}}}}
  path.write_text(json.dumps({'4': {'none': scores}}))
  refused(lambda: evaluate.read_scores(path), f'{name}.* is not a task')


# --- tokenizers ---------------------------------------------------------------

# Keys of transformers that name files, or code beside them or on the Hub.
CODE = {
  'auto_map': {'AutoTokenizer': ['evil.Tokenizer', None]},
  'vocab_file': '../outside.model',
  'tokenizer_file': '/outside.json',
  'spm_file': '../outside.model',
}


def tokenizer(kind, folder):
  """Copies a tokenizer of a kind into a folder; returns its config."""
  folder.mkdir()
  config = folder / 'tokenizer_config.json'
  found = {}
  if kind == 'bytes':
    found = {'tokenizer_class': 'ByT5Tokenizer'}
  elif kind == 'sentencepiece':
    shutil.copy(KEPT / 'data' / 'tiny.model', folder / 'spiece.model')
  else:
    shutil.copytree(KEPT / 'data' / 'bpe', folder, dirs_exist_ok=True)
  if config.exists():
    found = json.loads(config.read_text())
  return config, found


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece', 'bpe'])
def test_a_tokenizer_runs_nothing_and_passes_no_code_on(kind, tmp_path):
  config, found = tokenizer(kind, tmp_path / 'tokenizer')
  if found:
    config.write_text(json.dumps(found))
  plain = loading.load(config.parent)
  config.write_text(json.dumps(found | CODE))
  mark = tmp_path / 'mark'
  (config.parent / 'evil.py').write_text(f'open({str(mark)!r}, "w")')
  read = loading.load(config.parent)
  assert read == plain
  read.save(tmp_path / 'saved')
  assert 'auto_map' not in ''.join(
    path.read_text(errors='ignore') for path in (tmp_path / 'saved').iterdir()
  )
  assert not list((tmp_path / 'saved').glob('*.py')) and not mark.exists()
  assert loading.load(tmp_path / 'saved') == plain


def test_a_link_is_replaced_and_not_written_through(tmp_path):
  outside = tmp_path / 'outside'
  outside.write_text('precious')
  target = tmp_path / 'target'
  target.mkdir()
  (target / 'tokenizer_config.json').symlink_to(outside)
  config, found = tokenizer('bytes', tmp_path / 'tokenizer')
  config.write_text(json.dumps(found))
  loading.load(config.parent).save(target)
  assert outside.read_text() == 'precious'
  assert not (target / 'tokenizer_config.json').is_symlink()


# --- T5X ----------------------------------------------------------------------


def save_t5x(folder):
  """Writes a checkpoint as T5X does."""
  config = dataclasses.replace(
    helpers.T5_1_1, relpos_buckets=32, relpos_max_distance=128
  )
  params = helpers.random_params(l2s.build(config))
  to_t5x.save(helpers.Arrays(config, params), folder)


@pytest.mark.parametrize(
  'place', ['../../outside', '{root}/outside', 'link/array', 'http']
)
def test_a_t5x_checkpoint_has_no_arrays_outside(place, tmp_path):
  save_t5x(tmp_path / 'saved')
  step = tmp_path / 'saved' / 'checkpoint_1'
  file = step / 'checkpoint'
  found = flax.serialization.msgpack_restore(file.read_bytes())
  leaf: dict[str, Any] = {'driver': 'zarr', 'kvstore': {'driver': 'file'}}
  scale = found['optimizer']['target']['decoder']['decoder_norm']
  outside = tmp_path / 'outside'
  (kernel,) = step.glob('target.decoder.layers_0.mlp.wo.kernel')
  shutil.copytree(kernel, outside / 'array')
  (step / 'link').symlink_to(outside)
  if place == 'http':
    leaf['kvstore'] = {'driver': 'http', 'base_url': 'http://localhost:1/'}
  else:
    leaf['kvstore']['path'] = place.format(root=tmp_path)
  scale['scale'] = leaf
  file.write_bytes(flax.serialization.msgpack_serialize(found))
  refused(lambda: t5x.Checkpoint(tmp_path / 'saved'), 'outside the check|says')


def test_the_gin_file_of_a_t5x_checkpoint_is_read_and_not_run(
  tmp_path, monkeypatch
):
  """A gin file of the command line can import and call any code."""
  mark = tmp_path / 'mark'
  (tmp_path / 'evil.py').write_text(
    f'import gin\n@gin.configurable\ndef run():\n  open({str(mark)!r}, "w")\n'
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  save_t5x(tmp_path / 'saved')
  expected = t5x.Checkpoint(tmp_path / 'saved').config
  text = json.loads((tmp_path / 'saved' / 'config.json').read_text())
  (tmp_path / 'saved' / 'config.json').unlink()
  lines = [
    f'network.T5Config.{name} = {value!r}'
    for name, value in text['config'].items()
  ]
  (tmp_path / 'saved' / 'config.gin').write_text(
    "import evil\ninclude 'evil.gin'\nnetwork.T5Config.dtype = @evil.run()\n"
    + '\n'.join(lines)
  )
  assert t5x.Checkpoint(tmp_path / 'saved').config == expected
  assert not mark.exists() and 'evil' not in sys.modules
