# SPDX-License-Identifier: Apache-2.0
"""Laws of caches in buckets: their files are those of a local folder."""

import json
import shutil
import signal
import subprocess
import time

import bucket_servers
import cache_files
import forked
import helpers
import numpy as np
import pytest
import test_cache_batches
import test_cache_writer
import test_feature_writer
from array_record.python import array_record_module

from l2s_jax.caching import cache_command, cache_writer
from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.runtime import files, storage

data = test_cache_writer.data
model = test_cache_writer.model


gcs = bucket_servers.gcs_fixture
s3 = bucket_servers.s3_fixture
folder = bucket_servers.folder_fixture


def content(folder):
  """Returns the contents of all objects, by their names in the folder."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path, _ in folder.objects()
  }


@bucket_servers.short_in('s3')
def test_jobs_write_the_files_of_a_local_cache(
  data, model, folder, tmp_path, capsys
):
  bindings = test_cache_writer.local(data)
  local = tmp_path / 'cache'
  test_cache_writer.write(local, model, bindings)
  test_cache_writer.write(folder, model, bindings, shard=1, num_shards=2)
  assert 'shards of other parts are missing' in capsys.readouterr().err
  assert not (folder / cache_format.FILE).exists()
  with pytest.raises(FileNotFoundError, match=f'{folder} is not complete'):
    cache_format.open_cache(folder)
  test_cache_writer.write(folder, model, bindings, shard=0, num_shards=2)
  assert content(folder) == test_cache_writer.content(local)
  test_cache_writer.write(folder, model, bindings)
  assert f'{folder} is complete' in capsys.readouterr().err
  found, expected = map(cache_format.open_cache, (folder, local))
  for task in expected.tasks:
    splits = [cache.split(task, 'train') for cache in (found, expected)]
    numbers = range(len(splits[1]))
    assert splits[0].read(numbers) == splits[1].read(numbers)

  # A kill between the two objects of a shard, which are made anew.
  shard = cache_writer.shards_of(expected.content)[0]
  shard.path(folder, '.index.npy').unlink()
  (folder / cache_format.FILE).unlink()
  test_cache_writer.write(folder, model, bindings)
  assert content(folder) == test_cache_writer.content(local)


def test_records_are_counted_without_a_download(folder, tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  path = tmp_path / 'x.array_record'
  writer = array_record_module.ArrayRecordWriter(
    str(path), cache_format.WRITER_OPTIONS
  )
  for _ in range(3000):
    writer.write(rng.bytes(1000))
  writer.close()
  content = path.read_bytes()
  downloads = []
  download = storage.BucketPath.download

  def counting(source, file):
    downloads.append(source.name)
    download(source, file)

  monkeypatch.setattr(storage.BucketPath, 'download', counting)
  for name, part, number in (
    ('whole', content, 3000),
    ('cut', content[:-70_000], None),
    ('empty', b'', None),
    ('zero', bytes(len(content)), None),
  ):
    (folder / name).write_bytes(part)
    assert cache_writer.num_records(folder / name) == number
  assert 'whole' not in downloads and len(content) > 2e6


def test_too_little_room_for_a_shard_is_refused_before_writing(
  data, model, folder, monkeypatch
):
  usage = shutil.disk_usage('/')._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(
    OSError, match=f'1.0 kB free, but a shard, .* TMPDIR .*{folder}, needs'
  ):
    test_cache_writer.write(folder, model, test_cache_writer.local(data))
  assert {path.name for path, _ in folder.objects()} == {cache_writer.PLAN}


@bucket_servers.short_in('gs')
def test_features_are_those_of_a_local_cache(folder, tmp_path):
  local = tmp_path / 'cache'
  tasks = {'one': {'train': cache_files.random_examples(40, seed=1)}}
  cache_files.write(local, tasks)
  files.upload_folder(local, folder)
  for place in (local, folder):
    test_feature_writer.write(place)
  assert content(folder) == {
    path.relative_to(local).as_posix(): path.read_bytes()
    for path in local.rglob('*')
    if path.is_file()
  }
  states = [
    feature_format.open_features(cache_format.open_cache(place))
    .split('one', 'train')
    .states(range(40))
    for place in (local, folder)
  ]
  for expected, found in zip(*states, strict=True):
    helpers.assert_trees_equal(found, expected)


@pytest.mark.parametrize('ending', ['.array_record', '.index.npy'])
def test_a_damaged_object_is_named(folder, tmp_path, ending):
  tasks = {'one': {'train': cache_files.random_examples(40, seed=1)}}
  cache_files.write(tmp_path, tasks, num_shards=1)
  files.upload_folder(tmp_path, folder)
  (path,) = (p for p, _ in folder.objects() if p.name.endswith(ending))
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  path.write_bytes(damaged)
  split = cache_format.open_cache(folder).split('one', 'train')
  with pytest.raises(ValueError, match=f'{path} is damaged'):
    split.read(np.arange(40))
  path.unlink()
  split = cache_format.open_cache(folder).split('one', 'train')
  if ending == '.index.npy':
    with pytest.raises(FileNotFoundError, match=str(path)):
      split.read(np.arange(40))


@bucket_servers.short_in('s3')
def test_batches_are_those_of_a_local_cache(folder, tmp_path, vocabulary):
  tasks = {'one': {'train': cache_files.random_examples(40, seed=1)}}
  cache_files.write(tmp_path, tasks)
  files.upload_folder(tmp_path, folder)
  found, expected = (
    test_cache_batches.take(
      test_cache_batches.batches(place, vocabulary, 'packed'), 3
    )
    for place in (folder, tmp_path)
  )
  assert len(found) == 3
  for part, other in zip(found, expected, strict=True):
    test_cache_batches.assert_equal(part.batch, other.batch)


def test_workers_of_beam_have_no_buckets():
  with pytest.raises(ValueError, match='CACHE_DIR=gs://b/a: only paths of'):
    cache_command.cache('gs://b/a', beam_pipeline_options='--runner=X')


def start(data, folder, vocabulary):
  return forked.Popen(
    test_cache_writer.command(data, folder, vocabulary),
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture
def rows(tmp_path):
  """A folder of a task of 16 shards."""
  folder = tmp_path / 'rows'
  folder.mkdir()
  rows = [
    {'source': f'prompt {n} ' * 20, 'target': f'{n} ' * 10} for n in range(400)
  ]
  (folder / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return folder


@bucket_servers.short_in('gs')
def test_killed_it_ends_as_if_it_had_not_been(
  rows, folder, tmp_path, vocabulary
):
  process = start(rows, folder, vocabulary)
  while process.poll() is None:
    if len((folder / 'local').objects()) > 6:
      process.kill()
      break
    time.sleep(0.001)
  _, told = process.communicate()
  assert process.returncode == -signal.SIGKILL, told
  assert not (folder / cache_format.FILE).exists()
  for place in (folder, tmp_path / 'unbroken'):
    process = start(rows, place, vocabulary)
    _, told = process.communicate()
    assert process.returncode == 0, told
  assert content(folder) == test_cache_writer.content(tmp_path / 'unbroken')


@pytest.mark.long  # Clients wait before they ask again.
def test_a_flaky_store_gets_the_files_of_a_local_cache(
  request, rows, folder, tmp_path, vocabulary
):
  kinds = ('busy', 'cut')

  def trouble(number, _):
    return '' if number % 7 else kinds[number // 7 % len(kinds)]

  upstream = request.getfixturevalue('gcs' if folder.scheme == 'gs' else 's3')
  with bucket_servers.proxy(upstream, trouble) as proxy:
    variables = {'AWS_ENDPOINT_URL': proxy.url} if folder.scheme == 's3' else {}
    with bucket_servers.environment(**variables):
      process = start(rows, folder, vocabulary)
      _, told = process.communicate(timeout=200)
  assert process.returncode == 0, told
  process = start(rows, tmp_path / 'local', vocabulary)
  _, told = process.communicate()
  assert process.returncode == 0, told
  assert content(folder) == test_cache_writer.content(tmp_path / 'local')
