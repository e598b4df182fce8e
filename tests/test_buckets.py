# SPDX-License-Identifier: Apache-2.0
"""Laws of runs, weights and files in buckets, by servers on this machine."""

import collections
import functools
import json
import pathlib
import queue
import signal
import sys
import threading
import time
from concurrent import futures
from typing import Any

import bucket_servers
import forked
import helpers
import jax
import numpy as np
import pytest
import test_checkpoint
import test_preemption
import tiny_runs
import transformers
from etils import epath
from flax import traverse_util

from l2s_jax import api
from l2s_jax.data import text_files
from l2s_jax.evaluation import metric_writer
from l2s_jax.interop import convert
from l2s_jax.runtime import (
  extras,
  files,
  integrity,
  locks,
  os_errors,
  scratch,
  storage,
)
from l2s_jax.training import checkpoint
from l2s_jax.weights import converted, opening, saved_steps, source
from l2s_jax.weights.formats import bucket_array, tensor_files

gcs = bucket_servers.gcs_fixture
s3 = bucket_servers.s3_fixture
folder = bucket_servers.folder_fixture


@pytest.fixture
def bucket(gcs, request):
  """A folder in gs:// of this test's own."""
  return bucket_servers.own_folder('gs', request)


def test_paths_in_buckets_behave_as_local_ones(folder, tmp_path):
  for root in (folder / 'run', tmp_path / 'run'):
    assert not root.exists() and not root.is_dir()
    files.write_json(root / 'a.json', {'a': 1})
    with files.whole(root / 'x' / 'b.bin', 'wb') as file:
      file.write(b'12345')
    assert files.read_json(root / 'a.json', remedy='') == {'a': 1}
    assert [path.name for path in root.iterdir()] == ['a.json', 'x']
    assert [path.name for path in root.glob('*.json')] == ['a.json']
    assert {p.name for p in root.rglob('*') if p.is_file()} == {
      'a.json',
      'b.bin',
    }
    assert root.is_dir() and not root.is_file()
    assert (root / 'a.json').is_file() and not (root / 'a.json').is_dir()
    assert (root / 'x' / 'b.bin').stat().st_size == 5
    with (root / 'x' / 'b.bin').open('rb') as file:
      file.seek(3)
      assert file.read() == b'45'
    files.move_folder(root / 'x', root / 'y' / '1')
    assert not (root / 'x').exists()
    assert (root / 'y' / '1' / 'b.bin').read_bytes() == b'12345'
    (root / 'a.json').unlink()
    (root / 'a.json').unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=str(root / 'a.json')):
      (root / 'a.json').read_bytes()
    files.remove_folder(root)
    assert not root.exists()


def test_names_of_paths_in_buckets():
  path = storage.of('gs://bucket/a/b.json')
  assert isinstance(path, storage.BucketPath)
  assert (path.scheme, path.bucket, path.key) == ('gs', 'bucket', 'a/b.json')
  assert str(path.parent / 'c') == f'{path.parent}/c' == 'gs://bucket/a/c'
  assert str(path.with_name('d')) == 'gs://bucket/a/d'
  assert path.absolute() == path and storage.lasting(str(path)) == str(path)
  assert storage.of('a/b') == tiny_runs.pathlib.Path('a/b')


ARGUMENTS = {
  'glob': ('*',),
  'rglob': ('*',),
  'open': ('rb',),
  'match': ('*',),
  'full_match': ('*',),
  'write_bytes': (b'x',),
  'write_text': ('x',),
  'chmod': (0o600,),
  'lchmod': (0o600,),
}
OF_TWO = (
  'copy',
  'copy_into',
  'from_uri',
  'hardlink_to',
  'link_to',
  'move',
  'move_into',
  'rename',
  'replace',
  'samefile',
  'symlink_to',
)


def local_names():
  methods = set(dir(pathlib.Path)) - set(dir(pathlib.PurePath))
  return sorted(name for name in methods if not name.startswith('_'))


@pytest.mark.parametrize('name', local_names())
def test_no_method_touches_the_local_disk(gcs, tmp_path, monkeypatch, name):
  """A local file lies where the operating system would look."""
  assert name in vars(storage.BucketPath)
  path = storage.BucketPath(f'gs://{bucket_servers.BUCKET}/methods/{name}/a')
  local = tmp_path / 'gs:' / path.bucket / path.key
  local.mkdir(parents=True)
  (local / 'local').write_text('here')
  (local.parent / 'target').write_text('here')
  monkeypatch.chdir(tmp_path)
  before = [
    (p, p.lstat().st_mode, p.lstat().st_mtime_ns) for p in tmp_path.rglob('*')
  ]
  given = ARGUMENTS.get(name, (path.parent / 'target',) * (name in OF_TWO))
  try:
    found = getattr(path, name)(*given)
    if name in ('glob', 'rglob', 'iterdir'):
      assert list(found) == []
    assert found not in (b'here', 'here')
  except FileNotFoundError as error:
    assert str(path) in str(error)
  except OSError as error:
    assert 'is not possible' in str(error)
  after = [
    (p, p.lstat().st_mode, p.lstat().st_mtime_ns) for p in tmp_path.rglob('*')
  ]
  assert after == before


def test_paths_in_buckets_are_taken_apart_as_local_ones():
  path, local = storage.of('gs://b/x/y/z.json'), pathlib.Path('/x/y/z.json')
  for pattern in ('*.json', 'y/*', 'x/*/z.json', '*.txt', 'w/*'):
    assert path.match(pattern) == local.match(pattern)
  assert path.match('gs://b/x/y/*')
  assert [str(p) for p in path.parents] == ['gs://b/x/y', 'gs://b/x', 'gs://b']
  assert path.parents[-1].parent == path.parents[-1]
  assert path.as_uri() == 'gs://b/x/y/z.json'
  assert path.is_relative_to('gs://b/x') and not path.is_relative_to('gs://b/w')
  assert str((path / '..' / '..' / 'w').resolve()) == 'gs://b/x/w'
  assert str((path / '../../../../../w').resolve()) == 'gs://b/w'
  with pytest.raises(ValueError, match='is not a path in a bucket'):
    (path / '/etc/hosts').exists()
  for pattern in ('**/a', '../a'):
    with pytest.raises(OSError, match=r'glob.* is not possible in a bucket'):
      list(path.glob(pattern))


def test_an_interrupted_write_leaves_the_object_as_it_was(folder):
  path = folder / 'model.json'
  path.write_text('before')
  with pytest.raises(KeyboardInterrupt), files.whole(path) as file:
    file.write('after, in p')
    raise KeyboardInterrupt
  assert path.read_text() == 'before'
  assert [p.name for p in folder.iterdir()] == ['model.json']


def test_an_object_is_created_once(folder):
  path = folder / 'lock'
  assert path.create(b'first')
  assert not path.create(b'second')
  assert path.read_bytes() == b'first'


def test_a_name_is_no_error_code():
  path = storage.BucketPath('gs://data/run_412/lock')
  refusal = PermissionError(f'Forbidden: {path}')
  assert not path._is_condition(refusal)
  refusal.code = 412  # type: ignore[attr-defined]
  assert path._is_condition(refusal)


def test_what_a_store_cannot_do_is_refused(folder):
  with pytest.raises(OSError, match=r'rename is not possible in a bucket'):
    (folder / 'a').rename(folder / 'b')
  with pytest.raises(OSError, match=r"open\(mode='a'\) is not possible"):
    (folder / 'a').open('a')


def test_unknown_stores_and_missing_packages_are_named(monkeypatch):
  with pytest.raises(ValueError, match='MODEL_DIR=hdfs://a: hdfs:// is not'):
    files.folder('hdfs://a', 'MODEL_DIR')
  with pytest.raises(ValueError, match='MODEL_DIR=s3://b/a: .*local folders'):
    checkpoint.check_folder('s3://b/a')
  with pytest.raises(ValueError, match='CACHE_DIR=gs://b/a: only paths of'):
    files.local_folder('gs://b/a', 'CACHE_DIR')
  with pytest.raises(ValueError, match='X=gs:// names no bucket; give'):
    storage.check('gs://', 'X')
  monkeypatch.setattr(extras, 'missing', lambda *names: list(names))
  with pytest.raises(ValueError, match=r'X=gs://b needs gcsfs.*l2s_jax\[gcs\]'):
    storage.check('gs://b', 'X')


def test_a_bucket_that_is_not_there_is_named(folder, tmp_path):
  """Without a traceback, with the path, for the command line."""
  path = storage.BucketPath(f'{folder.scheme}://no-such-bucket/run/model.json')
  local = tmp_path / 'local'
  local.write_text('x')
  for write in (
    lambda: path.write_text('x'),
    lambda: path.create(b'x'),
    lambda: path.upload(local),
  ):
    with pytest.raises(FileNotFoundError, match='there is no bucket') as error:
      write()
    sentence = os_errors.describe(error.value)
    assert sentence and str(path) in sentence and '\n' not in sentence
  for listed in (path.objects, lambda: list(path.glob('*'))):
    try:  # A list of GCS may be empty.
      assert not listed()
    except FileNotFoundError as missing:
      assert 'there is no bucket' in str(missing)
  with pytest.raises(FileNotFoundError) as error:
    (folder / 'a').upload(tmp_path / 'gone')
  assert 'there is no bucket' not in str(error.value)


def test_a_proxy_changes_nothing(s3, request):
  path = bucket_servers.own_folder('s3', request) / 'lines.txt'
  path.write_text('one\ntwo\n')
  program = (
    'import sys\nfrom l2s_jax.runtime import storage\n'
    'path = storage.of(sys.argv[1])\n'
    'print(path.stat().st_size, path.open().read())'
  )
  with bucket_servers.proxy(s3, lambda *_: '') as proxy:
    with bucket_servers.environment(AWS_ENDPOINT_URL=proxy.url):
      result = run_python(program, path)
  assert result.stdout == '8 one\ntwo\n\n', result.stderr
  assert proxy.methods


def test_data_in_buckets_are_read_by_lines(folder):
  (folder / 'train.en').write_text('one\ntwo\n')
  path = epath.Path(str(folder / 'train.en'))
  assert list(text_files.read_lines(path)) == ['one', 'two']


def test_a_version_of_an_object_is_copied_once(folder, monkeypatch):
  path, downloads = folder / 'a.bin', []
  download = storage.BucketPath.download

  def counting(source, file):
    downloads.append(source)
    download(source, file)

  monkeypatch.setattr(storage.BucketPath, 'download', counting)
  for content in (b'first', b'second'):
    path.write_bytes(content)
    with futures.ThreadPoolExecutor(4) as pool:
      found = list(pool.map(storage.local_copy, [str(path)] * 4))
      folders = list(pool.map(storage.local_folder, [folder] * 4))
    assert len({*found}) == 1 and len({*folders}) == 1
    assert pathlib.Path(found[0]).read_bytes() == content
    assert (folders[0] / 'a.bin').read_bytes() == content
  assert len(downloads) == 4


def test_a_copy_that_fails_leaves_nothing(folder, monkeypatch):
  (folder / 'a.bin').write_bytes(b'x')

  def fail(source, file):
    pathlib.Path(file).write_bytes(b'half')
    raise OSError('reset')

  monkeypatch.setattr(storage.BucketPath, 'download', fail)
  root = pathlib.Path(scratch.folder().name).parent
  before = set(root.iterdir())
  for copy in (
    lambda: storage.local_copy(str(folder / 'a.bin')),
    lambda: storage.local_folder(folder),
  ):
    with pytest.raises(OSError, match='reset'):
      copy()
  assert set(root.iterdir()) == before


def hold(folder):
  with locks.held(folder, 'MODEL_DIR'):
    pass


def test_a_second_writer_is_refused_with_owner_and_time(folder):
  with locks.held(folder, 'MODEL_DIR'):
    who = json.loads((folder / locks.NAME).read_text())
    with pytest.raises(ValueError) as error:
      hold(folder)
  for words in (str(folder), who['host'], str(who['pid']), who['start']):
    assert words in str(error.value)
  assert not (folder / locks.NAME).exists()


def test_a_lock_whose_answer_was_lost_is_owned(folder):
  path = folder / locks.NAME
  mine = {'host': 'here', 'pid': 1, 'start': '', 'birth': '', 'owner': 'me'}
  assert path.create(json.dumps({**mine, 'beat': 0}).encode())
  assert locks._make(path, mine)
  assert not locks._make(path, {**mine, 'owner': 'another'})


def test_a_lock_that_can_be_neither_made_nor_read_is_an_error(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(locks, '_MOST_TRIES', 3)
  monkeypatch.setattr(locks, '_make', lambda path, mine: False)
  with pytest.raises(ValueError, match='can neither be created nor read'):
    hold(tmp_path)


def test_a_stale_lock_of_another_host_is_taken_over_with_a_message(
  folder, monkeypatch, capsys
):
  monkeypatch.setattr(locks, 'BUCKET_LEASE_SECS', 0.5)
  who = {
    'host': 'elsewhere',
    'pid': 7,
    'start': 'Monday',
    'birth': 'x',
    'beat': 3,
    'owner': 'them',
  }
  (folder / locks.NAME).write_text(json.dumps(who))
  hold(folder)
  said = capsys.readouterr()
  assert 'the lock of process 7 on elsewhere' in said.out + said.err
  assert 'is taken over' in said.out + said.err
  # A living one renews it.
  (folder / locks.NAME).write_text(json.dumps(who))
  monkeypatch.setattr(locks, 'BUCKET_LEASE_SECS', 20.0)
  renewal = threading.Timer(
    1.5,
    lambda: (folder / locks.NAME).write_text(json.dumps({**who, 'beat': 4})),
  )
  renewal.start()
  with pytest.raises(ValueError, match='process 7 on elsewhere'):
    hold(folder)


def test_of_two_that_find_a_lock_stale_one_takes_it_over(folder, monkeypatch):
  """Both have seen the same version when they overwrite it."""
  monkeypatch.setattr(locks, 'BUCKET_LEASE_SECS', 0.5)
  who = {'host': 'elsewhere', 'pid': 7, 'start': '', 'birth': 'x', 'beat': 3}
  (folder / locks.NAME).write_text(json.dumps(who))
  both = threading.Barrier(2)
  overwrite = locks._overwrite

  def at_once(path, version, mine):
    both.wait(10)
    return overwrite(path, version, mine)

  monkeypatch.setattr(locks, '_overwrite', at_once)
  release = threading.Event()
  ended: queue.Queue[str] = queue.Queue()

  def take():
    try:
      with locks.held(folder, 'MODEL_DIR'):
        ended.put('held')
        release.wait(10)
    except ValueError as error:
      ended.put(str(error))

  threads = [threading.Thread(target=take) for _ in range(2)]
  for thread in threads:
    thread.start()
  found = sorted(ended.get(timeout=20) for _ in range(2))
  release.set()
  for thread in threads:
    thread.join()
  assert found[1] == 'held' and 'is being written by process' in found[0]
  assert not (folder / locks.NAME).exists()


def test_a_version_is_overwritten_once(folder):
  path = folder / 'd'  # A name that is a part of the store's error.
  assert path.create(b'first')
  version = path.version()
  second = path.replace_version(version, b'second')
  assert second == path.version() != version
  assert path.replace_version(version, b'third') is None
  assert path.read_bytes() == b'second'
  path.unlink()
  assert path.replace_version(second, b'fourth') is None


def test_a_lock_whose_renewal_lost_its_answer_stays(folder, monkeypatch):
  monkeypatch.setattr(locks, 'BUCKET_RENEWAL_SECS', 0.1)
  replace = storage.BucketPath.replace_version

  def losing(path, version, content):
    replace(path, version, content)
    return replace(path, version, content)  # As a client that asks again.

  monkeypatch.setattr(storage.BucketPath, 'replace_version', losing)
  with locks.held(folder, 'MODEL_DIR'):
    deadline = time.monotonic() + 20
    while json.loads((folder / locks.NAME).read_text())['beat'] < 3:
      assert time.monotonic() < deadline
      time.sleep(0.05)
  assert not (folder / locks.NAME).exists()


def test_a_process_whose_lock_was_taken_over_ends(folder):
  holder = (
    'import sys\nfrom l2s_jax.runtime import locks, storage\n'
    'locks.BUCKET_RENEWAL_SECS = 0.2\n'
    'with locks.held(storage.of(sys.argv[1]), "MODEL_DIR"):\n'
    '  who = (storage.of(sys.argv[1]) / locks.NAME).read_text()\n'
    '  who = who.replace("owner", "before")[:-1] + \', "owner": "them"}\'\n'
    '  (storage.of(sys.argv[1]) / locks.NAME).write_text(who)\n'
    '  __import__("time").sleep(60)\n'
  )
  result = run_python(holder, folder)
  assert result.returncode == 1
  assert 'was taken over by another process' in result.stderr
  assert json.loads((folder / locks.NAME).read_text())['owner'] == 'them'


def test_logs_are_whole_at_save_points_and_hold_each_step_once(bucket):
  writer = metric_writer.MetricWriter(bucket)
  for step in (1, 2, 3):
    writer.write(step, {'loss': step})
    if step == 2:
      writer.sync()
  assert [r['step'] for r in metric_writer.read(bucket)] == [1, 2]
  writer.close()
  writer = metric_writer.MetricWriter(bucket, first_step=2)
  writer.write(3, {'loss': 30})
  writer.close()
  assert [r['loss'] for r in metric_writer.read(bucket)] == [1, 2, 30]
  (events,) = (bucket / 'tensorboard').iterdir()
  assert events.stat().st_size > 0


def test_checkpoints_are_restored_kept_and_deleted(bucket):
  states = [test_checkpoint.make_state(n, seed=n) for n in (1, 2, 3, 4)]
  checkpointer = checkpoint.Checkpointer(bucket, keep=1)
  scores = {}
  for state in states:
    checkpointer.save(state, {'batches': int(state.step)})
    scores[int(state.step)] = 9.0 if state.step == 2 else 1.0
    checkpointer.keep_best('bleu', scores)
  checkpointer.close()
  assert saved_steps.steps(bucket) == [2, 4]
  names = [p.name for p in (bucket / saved_steps.FOLDER).iterdir()]
  assert names == ['2', '4']
  restored, data = test_checkpoint.restore(bucket, states[0])
  helpers.assert_trees_equal(restored, states[-1])
  assert data == {'batches': 4}
  assert saved_steps.params_folder(bucket, 'best')[1] == 2


def test_a_start_that_saves_nothing_deletes_nothing(bucket):
  states = [test_checkpoint.make_state(step) for step in (1, 2, 3)]
  test_checkpoint.save(bucket, *states)
  checkpoint.Checkpointer(bucket, keep=1).close()
  assert saved_steps.steps(bucket) == [1, 2, 3]
  checkpointer = checkpoint.Checkpointer(bucket, keep=1)
  checkpointer.save(test_checkpoint.make_state(4), {'batches': 4})
  checkpointer.close()
  assert saved_steps.steps(bucket) == [4]


def test_an_incomplete_checkpoint_does_not_count_and_is_overwritten(bucket):
  states = [test_checkpoint.make_state(step) for step in (1, 2)]
  test_checkpoint.save(bucket, *states)
  newest = bucket / saved_steps.FOLDER / '2'
  (newest / storage.COMMIT).unlink()  # A kill before the last request.
  assert saved_steps.steps(bucket) == [1]
  test_checkpoint.save(bucket, test_checkpoint.make_state(2, seed=5))
  restored, _ = test_checkpoint.restore(bucket, states[0])
  helpers.assert_trees_equal(restored, test_checkpoint.make_state(2, seed=5))


def test_a_damaged_checkpoint_is_set_apart(bucket, capsys):
  states = [test_checkpoint.make_state(step, seed=step) for step in (1, 2)]
  test_checkpoint.save(bucket, *states)
  folder = bucket / saved_steps.FOLDER
  params = folder / '2' / 'params'
  largest = max(
    (path for path, _ in params.objects() if '/d/' in str(path)),
    key=lambda path: path.stat().st_size,
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  restored, _ = test_checkpoint.restore(bucket, states[0])
  helpers.assert_trees_equal(restored, states[0])
  assert saved_steps.steps(bucket) == [1]
  assert (folder / saved_steps.DAMAGED / '2' / 'params').is_dir()
  assert 'step 1 is used instead' in capsys.readouterr().err


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_of_a_tensor_only_the_requested_rows_are_read(
  folder, tmp_path, dtype, monkeypatch
):
  array = np.arange(4 * 6 * 2).reshape(4, 6, 2).astype(jax.numpy.dtype(dtype))
  shapes = {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name in ('a', 'b')
  }
  tensor_files.save_safetensors(tmp_path, shapes, lambda name: [array])
  (folder / tensor_files.WEIGHTS).upload(tmp_path / tensor_files.WEIGHTS)
  ranges = []
  read_range = storage.BucketPath.read_range

  def counting(path, start, stop):
    ranges.append(stop - start)
    return read_range(path, start, stop)

  monkeypatch.setattr(storage.BucketPath, 'read_range', counting)
  found = tensor_files.open_folder(folder)['b'].read()
  row_bytes = array[0].nbytes
  for index in (1, -1, slice(1, 3), (slice(2, 4), slice(None), 1), (0, 3)):
    ranges.clear()
    np.testing.assert_array_equal(found[index], array[index])
    assert sum(ranges) <= 2 * row_bytes
  np.testing.assert_array_equal(np.asarray(found), array)
  for part, expected in zip(found, array, strict=True):
    np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize('shape', [(), (5,), (4, 6), (3, 4, 5), (2, 3, 4, 2)])
def test_indices_of_arrays_are_those_of_numpy(gcs, bucket, shape):
  array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
  (bucket / 'a').write_bytes(b'head' + array.tobytes())
  found = bucket_array.BucketArray(bucket / 'a', array.dtype, shape, 4)
  parts: tuple[Any, ...] = (
    0,
    -1,
    9,
    -9,
    slice(1, None),
    slice(-2, None),
    slice(3, 1),
    True,
  )
  parts = (*parts, slice(None, None, 2), slice(None, None, -1), [1, 0], None)
  indices: list[Any] = [
    *parts,
    (),
    ...,
    (..., 0),
    *((a, b) for a in parts for b in parts),
  ]
  for index in (*indices, (0, 0, 0, 0, 0), (0, slice(1, 3), 1)):
    try:
      expected = array[index]
    except IndexError:
      with pytest.raises(IndexError):
        found[index]
    else:
      np.testing.assert_array_equal(found[index], expected, strict=True)
  with pytest.raises(ValueError, match='no view'):
    np.array(found, copy=False)
  assert np.array(found).flags.writeable


def test_what_an_array_keeps_is_bounded(gcs, bucket, monkeypatch):
  array = np.arange(40, dtype=np.int32).reshape(10, 4)
  (bucket / 'a').write_bytes(array.tobytes())
  monkeypatch.setattr(bucket_array, '_MOST_KEPT_BYTES', 3 * array[0].nbytes)
  found = bucket_array.BucketArray(bucket / 'a', array.dtype, array.shape, 0)
  found = found.keeping()
  for row in (*range(10), *range(10)):
    np.testing.assert_array_equal(found[row], array[row])
  kept = found._kept or {}
  assert sum(len(content) for content in kept.values()) == 3 * array[0].nbytes


def test_a_host_reads_no_byte_of_a_kernel_twice(
  gcs, bucket, tmp_path, monkeypatch
):
  """Requests are counted between client and server."""
  kernel = ('encoder', 'layers', 'mlp', 'wi', 'kernel')
  array = np.random.default_rng(0).normal(size=(3, 16, 32)).astype(np.float32)
  params = traverse_util.unflatten_dict({kernel: array})
  weights = helpers.Arrays(helpers.T5_1_1, params)
  converted.save(convert.Reading(weights, None), tmp_path)
  files.upload_folder(tmp_path, bucket)
  shapes = traverse_util.unflatten_dict(
    {kernel: jax.ShapeDtypeStruct(array.shape, array.dtype)}
  )
  mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'))
  for axes, verifies, num_reads in (
    ((None, 'fsdp', 'tensor'), False, 3 * 2),
    ((None, None, 'tensor'), False, 3),
    ((None, 'fsdp', 'tensor'), True, 3),
    ((None, None, None), True, 3),
  ):
    spec = jax.sharding.PartitionSpec(*axes)
    shardings = traverse_util.unflatten_dict(
      {kernel: jax.sharding.NamedSharding(mesh, spec)}
    )
    ranges: list[str] = []

    def trouble(_, path, ranges=ranges):
      if 'alt=media' in path or '/download/' in path:
        ranges.append(path)
      return ''

    opened = opening.open_source(str(bucket))
    monkeypatch.setattr(
      integrity, 'verification', lambda verifies=verifies: verifies
    )
    with bucket_servers.proxy(gcs, trouble):
      loaded, _ = source.load(opened, shapes, shardings)
    found = traverse_util.flatten_dict(loaded)[kernel]
    np.testing.assert_array_equal(found, array)
    assert len(ranges) == num_reads, (axes, ranges)


def test_weights_in_buckets_are_those_of_their_local_copy(folder, tmp_path):
  """A Hugging Face folder, and its conversion, verified and by shards."""
  torch_config = transformers.T5Config(
    vocab_size=64,
    d_model=16,
    d_kv=8,
    num_heads=2,
    d_ff=32,
    num_layers=2,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,  # type: ignore[call-arg]
  )
  theirs = tmp_path / 'hf'
  transformers.T5ForConditionalGeneration(torch_config).save_pretrained(theirs)
  convert.convert(
    str(theirs), str(tmp_path / 'l2s'), from_='hf', to='l2s', verify=False
  )
  mesh = jax.make_mesh((2,), ('fsdp',), devices=jax.devices()[:2])
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(None, 'fsdp')
  )
  for name in ('hf', 'l2s'):
    files.upload_folder(tmp_path / name, folder / name)
    loaded = []
    for place in (tmp_path / name, folder / name):
      opened = opening.open_source(str(place))
      shapes = traverse_util.unflatten_dict(opened.shapes())
      shardings = jax.tree.map(
        lambda shape: (
          sharding
          if len(shape.shape) > 1
          else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        shapes,
      )
      loaded.append(source.load(opened, shapes, shardings))
    helpers.assert_trees_equal(loaded[0][0], loaded[1][0])
    assert loaded[0][1] == loaded[1][1]


def test_a_truncated_safetensors_object_is_refused(folder, tmp_path):
  shape = jax.ShapeDtypeStruct((3,), np.dtype('float32'))
  tensor_files.save_safetensors(
    tmp_path, {'a': shape}, lambda name: [np.ones(3, np.float32)]
  )
  content = (tmp_path / tensor_files.WEIGHTS).read_bytes()
  for size in (4, 20, len(content) - 1):
    (folder / tensor_files.WEIGHTS).write_bytes(content[:size])
    with pytest.raises(ValueError, match='not a complete safetensors file'):
      tensor_files.open_folder(folder)


SAVE_AND_RESTORE = """
import sys
import jax, numpy as np
import test_checkpoint
from l2s_jax.runtime import files, storage
root = storage.of(sys.argv[1])
files.write_json(root / 'a.json', {'a': 1})
assert files.read_json(root / 'a.json', remedy='') == {'a': 1}
states = [test_checkpoint.make_state(step, seed=step) for step in (1, 2, 3)]
test_checkpoint.save(root, *states, keep=2)
restored, data = test_checkpoint.restore(root, states[0])
for found, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(states[2])):
  np.testing.assert_array_equal(found, saved)
assert data == {'batches': 3}, data
print('restored')
"""


def run_python(program, *arguments):
  """Runs a program, which reads the variables of the store anew."""
  return forked.run(
    [sys.executable, '-c', program, *map(str, arguments)],
    text=True,
    timeout=200,
  )


@pytest.mark.parametrize(
  ('trouble', 'first', 'words'),
  [
    ('expired', 0, 'HttpError: expired, 401'),
    ('vanished', 200, 'No such file or directory'),
    ('forbidden', 0, 'Forbidden'),
    ('forbidden', 200, 'orbidden'),
  ],
)
def test_what_ends_a_save_is_one_sentence(gcs, bucket, trouble, first, words):
  hooks = 'from l2s_jax.runtime import os_errors\nos_errors.Hooks().install()\n'
  program = hooks + SAVE_AND_RESTORE
  with bucket_servers.proxy(gcs, lambda n, _: trouble if n >= first else ''):
    result = run_python(program, bucket)
  assert result.returncode == 1, result.stdout
  *_, last = result.stderr.strip().splitlines()
  assert last.startswith('l2s_jax: error: '), result.stderr
  assert 'gs://' in last and words in last
  assert last.count('gs://') == 1 or trouble == 'vanished'
  assert last.count(os_errors.STORE) == (trouble != 'vanished'), last
  assert 'Earlier output is intact' in last
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('part', ['%2Fd%2F', 'metadata'])
def test_what_cannot_be_read_is_not_set_apart(gcs, bucket, part):
  test_checkpoint.save(bucket, test_checkpoint.make_state(1))
  restore = (
    'import sys, test_checkpoint\nfrom l2s_jax.runtime import storage\n'
    'test_checkpoint.restore(storage.of(sys.argv[1]), '
    'test_checkpoint.make_state())'
  )

  def trouble(_, path):
    return 'forbidden' if part in path else ''

  with bucket_servers.proxy(gcs, trouble):
    result = run_python(restore, bucket)
  assert result.returncode == 1 and 'is damaged' not in result.stderr
  assert saved_steps.steps(bucket) == [1]
  assert run_python(restore, bucket).returncode == 0


@pytest.mark.long  # Clients wait before they ask again.
def test_a_slow_and_flaky_store_loses_nothing(gcs, bucket):
  """Every seventh request is answered by 503, cut off, or late."""
  kinds = ('busy', 'cut', 'slow')

  def trouble(number, _):
    return '' if number % 7 else kinds[number // 7 % len(kinds)]

  with bucket_servers.proxy(gcs, trouble) as proxy:
    result = run_python(SAVE_AND_RESTORE, bucket)
  assert result.stdout.endswith('restored\n'), result.stdout + result.stderr
  assert len(proxy.methods) > 50
  assert saved_steps.steps(bucket) == [2, 3]


# Saves the arrays of T5-XXL to T5-Base, each cut to a few values, and the logs.
SAVE_THREE = """
import sys
import jax, jax.numpy as jnp
import helpers, test_checkpoint, test_presets
from l2s_jax.evaluation import metric_writer
from l2s_jax.models import l2s
from l2s_jax.runtime import storage
from l2s_jax.systems import parameters
from l2s_jax.training import checkpoint
from l2s_jax.training import state as state_lib
llm, slm = (test_presets.load_preset(f't5_1_1_{x}') for x in ('xxl', 'base'))
shapes = helpers.param_shapes(l2s.LlmToSlm(llm, slm, 'add', True))
_, trained = parameters.split(shapes, ('llm',))
params = jax.tree.map(lambda x: jnp.ones([min(n, 2) for n in x.shape]), trained)
state = state_lib.create(params, test_checkpoint.OPTIMIZER, 0)
root = storage.of(sys.argv[1])
log = metric_writer.MetricWriter(root)
checkpointer = checkpoint.Checkpointer(root, keep=1)
for step in (1, 2, 3):
  (root / f'mark-{step}').exists()
  log.write(step, {'loss': 1.0})
  log.sync()
  checkpointer.save(state.replace(step=jnp.int32(step)), {'batches': step}, {})
  checkpointer.wait()
"""


def test_a_save_of_t5_base_costs_fewer_than_100_operations(gcs, bucket):
  """Of class A, beside the arrays' objects, in a save that deletes another."""
  with bucket_servers.proxy(gcs, lambda *_: '') as proxy:
    result = run_python(SAVE_THREE, bucket)
  assert result.returncode == 0, result.stderr
  last = max(n for n, x in enumerate(proxy.methods) if 'mark-3' in x[1])
  made = collections.Counter(
    {'GET': 'list' if '/o?' in path else 'read', 'DELETE': 'delete'}.get(
      method, 'array' if '%2Fd%2F' in path else 'write'
    )
    for method, path in proxy.methods[last + 1 :]
  )
  assert made['array'] > 0 and made['delete'] > 20, made
  assert 50 < made['write'] + made['list'] < 100, made


@pytest.fixture(scope='module')
def experiments(tmp_path_factory):
  path = tmp_path_factory.mktemp('experiments')
  tiny_runs.write_experiments(path)
  return path


def test_a_killed_run_in_a_bucket_equals_its_local_twin(gcs, experiments):
  """Its answers are those of the twin, too."""
  root = f'gs://{bucket_servers.BUCKET}/runs'
  llm = functools.partial(
    tiny_runs.train_arguments, experiments, 'llm_baseline'
  )
  period = ('--gin.CHECKPOINT_PERIOD=2', '--gin.TRAIN_STEPS=6')
  process = tiny_runs.start(*llm(f'{root}/llm', *period))
  in_bucket = storage.of(f'{root}/llm')
  deadline = time.monotonic() + 120
  while not saved_steps.steps(in_bucket) and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGSTOP)  # It holds its lock.
  who = json.loads((in_bucket / locks.NAME).read_text())
  second = tiny_runs.l2s(*llm(f'{root}/llm', *period), check=False)
  assert second.returncode and (
    f'MODEL_DIR={in_bucket} is being written by process {process.pid} on '
    f'{who["host"]}, started at {who["start"]}.'
  ) in ' '.join(second.stderr.split())
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=60)
  tiny_runs.l2s(*llm(f'{root}/llm', *period))
  tiny_runs.l2s(*llm('llm', *period))
  local = experiments / 'llm'
  assert test_preemption.losses(in_bucket) == test_preemption.losses(local)
  assert test_preemption.evaluations(in_bucket) == (
    test_preemption.evaluations(local)
  )
  assert not (in_bucket / locks.NAME).exists()

  answers = [
    api.load(str(model), prompt_length=16, max_decode_len=4).answer(
      ['one', 'two']
    )
    for model in (in_bucket, local)
  ]
  assert answers[0] == answers[1]
