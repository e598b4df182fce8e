# SPDX-License-Identifier: Apache-2.0
"""Laws of batches from a cache: streaming's, in any number of processes."""

import itertools
import json
import shutil
import time
from typing import Any

import cache_files
import jax
import numpy as np
import pytest

from l2s_jax.data import batching, features, streams
from l2s_jax.data.cached import cache_format
from l2s_jax.data.features import tf
from l2s_jax.runtime import partitioning

LENGTHS = {'inputs': 16, 'targets': 8}
BUCKETS = [(8, 4), (12, 6), (16, 8)]
BATCH_SIZE = 8
SIZES = {'one': 3000, 'other': 170}
# What a run sets, by the kind of its rows.
KINDS: dict[str, dict[str, Any]] = {
  'padded': {},
  'packed': {'pack': True},
  'by length': {'length_buckets': BUCKETS[:-1]},
}
COUNTS = ('num_examples', 'num_truncated_prompts', 'num_truncated_answers')
kinds = pytest.mark.parametrize('kind', KINDS)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  tasks = {
    name: {'train': cache_files.random_examples(size, seed=len(name))}
    for name, size in SIZES.items()
  }
  return cache_files.write(
    tmp_path_factory.mktemp('cache') / 'mixture',
    tasks,
    rates={'one': 3.0, 'other': 1.0},
  )


@pytest.fixture(scope='module')
def single(tmp_path_factory):
  return cache_files.write(
    tmp_path_factory.mktemp('cache') / 'single',
    {'one': {'train': cache_files.random_examples(SIZES['one'], seed=3)}},
  )


def batches(folder, vocabulary, kind, **options):
  settings: dict[str, Any] = {
    'task_feature_lengths': LENGTHS,
    'batch_size': BATCH_SIZE,
    'seed': 5,
    **KINDS[kind],
  }
  task = cache_files.task(folder, vocabulary)
  return task.train_batches(**(settings | options))


def take(found, number):
  parts = list(itertools.islice(found, number))
  found.close()
  return parts


def assert_equal(batch, other):
  assert batch.keys() == other.keys()
  for key in batch:
    assert batch[key].dtype == other[key].dtype
    np.testing.assert_array_equal(batch[key], other[key], key)


def streamed(folder, vocabulary, kind, num_examples):
  """Returns batches that TensorFlow makes of the same order of examples."""
  task = cache_files.task(folder, vocabulary)
  followed = task.order('train', seed=5)
  splits = [task.cache.split(name, 'train') for name in followed.names]

  def generate():
    for number, example in zip(*followed.at(0, num_examples), strict=True):
      (record,) = splits[number].read([int(example)])
      ids = cache_format.decode_ids(record, splits[number].dtype)
      yield {
        name: value
        for key, own in zip(('inputs', 'targets'), ids, strict=True)
        for name, value in (
          (key, own[: LENGTHS[key]].astype(np.int32)),
          (f'{key}_length', np.int32(len(own))),
        )
      }

  dataset = tf.data.Dataset.from_generator(
    generate,
    output_signature={
      name: spec
      for key in LENGTHS
      for name, spec in (
        (key, tf.TensorSpec([None], tf.int32)),
        (f'{key}_length', tf.TensorSpec([], tf.int32)),
      )
    },
  )
  wrapped = features.wrap_vocabulary(vocabulary)
  converter = features.L2SFeatureConverter(
    wrapped, wrapped, pack=kind == 'packed'
  )
  rows = converter._convert_features(dataset, LENGTHS)
  if kind == 'by length':
    rows = streams._batch_by_length(rows, BUCKETS, BATCH_SIZE)
  else:
    rows = rows.batch(BATCH_SIZE, drop_remainder=True)
  return streams.TaskBatches(rows.as_numpy_iterator(), BATCH_SIZE)


@kinds
@pytest.mark.parametrize('source', ['single', 'folder'])
def test_rows_are_those_of_streaming(request, vocabulary, kind, source):
  """Of the same order: packed and by length as exactly as one by one."""
  source = request.getfixturevalue(source)
  expected = streamed(source, vocabulary, kind, 4096)
  found = batches(source, vocabulary, kind)
  num_batches = 0
  for part, batch in zip(found, expected, strict=False):
    num_batches += 1
    assert_equal(part.batch, batch)
    whole = batching.whole(batch)
    assert part.num_rows == BATCH_SIZE
    assert part.num_examples == whole.num_examples
    assert part.num_prompt_tokens == whole.num_prompt_tokens
    for count in COUNTS:
      assert getattr(found, count) == getattr(expected, count)
  assert num_batches > 100 and all(getattr(found, count) for count in COUNTS)
  found.close()


@kinds
@pytest.mark.parametrize('num_processes', [2, 4])
def test_processes_have_the_rows_of_one(
  folder, vocabulary, kind, num_processes
):
  """In turns or in blocks, as a mesh has it, and the same beside them."""
  whole = take(batches(folder, vocabulary, kind), 60)
  turns = np.arange(BATCH_SIZE).reshape(-1, num_processes).T
  blocks = np.arange(BATCH_SIZE).reshape(num_processes, -1)
  for rows in (*turns, *blocks):
    parts = take(batches(folder, vocabulary, kind, rows=rows), 60)
    for part, one in zip(parts, whole, strict=True):
      assert_equal(
        part.batch, {key: value[rows] for key, value in one.batch.items()}
      )
      assert part.position == one.position
      assert part.num_prompt_tokens == one.num_prompt_tokens
      assert part.num_examples == one.num_examples


@kinds
@pytest.mark.parametrize('start', [1, 37, 400])
def test_a_position_goes_on_where_it_was_in_other_processes(
  folder, vocabulary, kind, start
):
  """Through JSON, from one process to two."""
  whole = take(batches(folder, vocabulary, kind), start + 30)
  position = json.loads(json.dumps(whole[start - 1].position))
  for rows in np.arange(BATCH_SIZE).reshape(2, -1):
    resumed = batches(folder, vocabulary, kind, position=position, rows=rows)
    for part, one in zip(take(resumed, 30), whole[start:], strict=True):
      assert_equal(
        part.batch, {key: value[rows] for key, value in one.batch.items()}
      )
      assert part.position == one.position


def numbers_of(batch):
  """Returns the numbers that prompts of `random_examples` begin with."""
  tokens, segments = (
    batch[f'encoder_{name}'] for name in ('input_tokens', 'segment_ids')
  )
  found = []
  for row, own in zip(tokens, segments, strict=True):
    for example in range(1, own.max() + 1):
      digits = row[own == example][:5] - 3
      found.append(int(''.join(map(str, digits))))
  return found


@kinds
def test_an_epoch_has_each_example_once(single, vocabulary, kind):
  found = batches(single, vocabulary, kind, batch_size=1, num_epochs=2)
  numbers = [n for part in found for n in numbers_of(part.batch)]
  assert np.bincount(numbers).tolist() == [2] * SIZES['one']
  if kind == 'padded':
    assert sorted(numbers[: SIZES['one']]) == list(range(SIZES['one']))


@kinds
def test_a_billion_examples_are_passed_over_in_less_than_a_second(
  folder, vocabulary, kind
):
  positions = {
    'padded': {'examples': 10**9},
    'packed': {'window': 10**9 // 1024, 'row': 3},
    'by length': {'examples': 10**9, 'waiting': [7, 7, 1]},
  }
  take(batches(folder, vocabulary, kind), 1)  # Compiled, opened, checked.
  start_secs = time.perf_counter()
  take(batches(folder, vocabulary, kind, position=positions[kind]), 1)
  assert time.perf_counter() - start_secs < 1


def test_other_seeds_have_other_orders(single, vocabulary):
  one, other = (
    take(batches(single, vocabulary, 'padded', seed=seed), 1)[0]
    for seed in (0, 1)
  )
  assert numbers_of(one.batch) != numbers_of(other.batch)


def test_a_damaged_record_is_named(single, vocabulary, tmp_path):
  folder = tmp_path / 'damaged'
  shutil.copytree(single, folder)
  path = folder / 'one' / 'train' / '00001-of-00003.array_record'
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  found = batches(folder, vocabulary, 'padded')
  with pytest.raises(ValueError, match=rf'{path} is damaged: record \d+ of'):
    for _ in range(SIZES['one'] // BATCH_SIZE):
      next(found)
  assert next(found, None) is None  # It does not go on behind the damage.


def test_a_missing_split_is_refused(single, vocabulary):
  with pytest.raises(ValueError, match="no split 'test'; it has train"):
    batches(single, vocabulary, 'padded', split='test')


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_own_rows_make_the_array_of_the_whole_batch(shape):
  """Of one process: all of them; and in any order of devices."""
  mesh = partitioning.make_mesh(
    partitioning.MeshConfig(
      **dict(zip(partitioning.MESH_AXES, shape, strict=True))
    )
  )
  batch = {'x': np.arange(48, dtype=np.int32).reshape(16, 3)}
  rows = partitioning.own_rows(16, mesh)
  assert rows.tolist() == list(range(16))
  whole = partitioning.put_batch(batch, mesh)['x']
  parts = partitioning.put_batch(
    {'x': batch['x'][rows]}, mesh, rows, num_rows=16
  )['x']
  assert parts.sharding == whole.sharding
  np.testing.assert_array_equal(jax.device_get(parts), batch['x'])
