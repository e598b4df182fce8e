# SPDX-License-Identifier: Apache-2.0
"""Writes a cache shard by shard, in any number of jobs, safe against kills.

`plan.json` is written first: content, sources and shards. A shard is written
under a temporary name, synced and renamed when it is complete, its index last.
The job that finds all shards complete writes `cache.json`.
"""

import collections
import contextlib
import io
import itertools
import os
import pathlib
import sys
import tempfile
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from array_record.python import array_record_module

from l2s_jax.caching import cache_encoding, cache_key, cache_texts
from l2s_jax.data.cached import cache_format
from l2s_jax.runtime import files, integrity, locks, scratch, storage
from l2s_jax.weights import run_format

PLAN = 'plan.json'
# A killed job rewrites its unfinished shard: seconds to minutes of work.
_SMALLEST_SHARD = 16_384  # examples
# Training opens all shards of a split.
_MOST_SHARDS = 1000
# Disk bytes per byte of zlib output: measured for records of 160 to 5,000 bytes
# with their index, in files of many records, up to 5 % below this factor.
_OF_ZLIB = 1.1
_FRAME_BYTES = 80
PART = '.part-'
# Of an object, to count its records. A footer of 16,384 records has 200 kB.
_HEAD_BYTES = 2**16
_FOOTER_BYTES = 2**20
_REMEDY = 'remove the folder, and cache again.'


class CacheShard(NamedTuple):
  """A shard: a range of a split's examples.

  Attributes:
    task: name of the task.
    split: name of the split.
    number: number of the shard, from 0.
    num_shards: number of shards of the split.
    start: number of its first example.
    stop: end of its range, exclusive.
  """

  task: str
  split: str
  number: int
  num_shards: int
  start: int
  stop: int

  def path(self, folder: pathlib.Path, ending: str) -> pathlib.Path:
    """Returns the path of one of its files."""
    split = (
      folder
      / cache_format.folder_name(self.task)
      / cache_format.folder_name(self.split)
    )
    path = cache_format.shard_path(split, self.number, self.num_shards)
    return storage.of(path + ending)

  def is_whole(self, folder: pathlib.Path, kind: str = '') -> bool:
    """Returns whether both of the shard's files have their final names."""
    return all(path.exists() for path in self.files(folder, kind))

  def files(self, folder: pathlib.Path, kind: str = '') -> list[pathlib.Path]:
    """Returns the paths of its records and of their index.

    Args:
      folder: folder of the cache.
      kind: infix before the file ending; empty for tokens.
    """
    return [
      self.path(folder, kind + ending)
      for ending in ('.array_record', '.index.npy')
    ]


def make_plan(
  texts: cache_key.TextsBySplit,
  key: Mapping[str, Any],
  dtype: str,
  metrics: Mapping[str, Sequence[str]],
  examples_per_shard: int | None = None,
) -> dict[str, Any]:
  """Returns the content of `cache.json`, without the digests of the shards.

  Args:
    texts: texts of all tasks and splits.
    key: key from `cache_key.describe`.
    dtype: dtype of the ids.
    metrics: metric names of each task.
    examples_per_shard: maximum; None: a default that limits both the number of
      shards and the work lost to a kill.
  """

  def split_plan(split: cache_texts.Texts) -> dict[str, Any]:
    total = split.num_examples
    size = examples_per_shard or max(_SMALLEST_SHARD, -(-total // _MOST_SHARDS))
    starts = range(0, total, size)
    return {
      'num_examples': total,
      'shards': [min(size, total - start) for start in starts],
    }

  return {
    **run_format.stamp(),
    'key': dict(key),
    'dtype': dtype,
    'rates': key['rates'],
    'tasks': {
      task: {
        'splits': {name: split_plan(split) for name, split in splits.items()},
        'columns': _text_columns(next(iter(splits.values()))),
        'metrics': list(metrics[task]),
      }
      for task, splits in texts.items()
    },
  }


def _text_columns(texts: cache_texts.Texts) -> dict[str, Any]:
  """Returns dtype and rank of a record's text columns."""
  columns = dict(texts.columns)
  for name in ('inputs', 'targets'):
    column = columns.pop(name)
    if column['dtype'] == 'string':
      columns[f'{name}_pretokenized'] = column
  return columns


def settle_plan(
  folder: pathlib.Path, plan: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the existing plan of a folder, or writes this one.

  Raises:
    ValueError: if the existing plan has another key, with the differences, or
      is damaged.
  """
  path = folder / PLAN
  if not path.exists():
    items = list(folder.iterdir()) if folder.is_dir() else []
    found = [item.name for item in items if not item.name.startswith('.')]
    if found:
      raise ValueError(
        f'CACHE_DIR={folder} has {", ".join(sorted(found)[:3])} and no '
        f'{PLAN}: it is not a cache. Set another folder, or an empty one.'
      )
    files.write_json(path, integrity.seal(plan))
  # Read back even by the writer, so all jobs have the same order of tasks.
  kept = cache_format.read_description(path, _REMEDY)
  cache_key.check(kept['key'], plan['key'], str(folder))
  return kept


def shards_of(plan: Mapping[str, Any]) -> list[CacheShard]:
  """Returns the shards of all tasks and splits."""
  return [
    CacheShard(task, split, number, len(counts), stop - counts[number], stop)
    for task, content in plan['tasks'].items()
    for split, split_content in content['splits'].items()
    for counts in [split_content['shards']]
    for number, stop in enumerate(itertools.accumulate(counts))
  ]


def share(
  shards: Sequence[CacheShard], job: int, num_jobs: int
) -> list[CacheShard]:
  """Returns the consecutive shards of one of several jobs."""
  total = len(shards)
  return list(shards[total * job // num_jobs : total * (job + 1) // num_jobs])


def bytes_per_example(
  texts: cache_texts.Texts, encoder: cache_encoding.Encoder
) -> float:
  """Estimates the disk bytes of an example from the first ones of a split."""
  sample = texts.sample(cache_key.NUM_SAMPLED)
  records = encoder(cache_encoding.Work(texts.label, 0, sample)).records
  # In memory: a dry run writes no file.
  size = sum(len(zlib.compress(record, 1)) for record in records)
  return _FRAME_BYTES + _OF_ZLIB * size / max(1, len(records))


def write(
  folder: pathlib.Path,
  shards: Sequence[CacheShard],
  texts: cache_key.TextsBySplit,
  encoder: cache_encoding.Encoder,
  *,
  num_workers: int,
  job: int = 0,
  num_jobs: int = 1,
) -> None:
  """Writes the shards that are not complete yet.

  Args:
    folder: folder of the cache.
    shards: shards of this job.
    texts: texts of all tasks and splits.
    encoder: encoder with the model's vocabularies.
    num_workers: number of tokenizer processes.
    job: number of this job, from 0.
    num_jobs: number of jobs that write the cache.

  Raises:
    ValueError: if another process runs the same job, the number of examples of
      a split has changed, or a text cannot be encoded.
    OSError, RuntimeError: with the system's message, if a disk is full.
  """
  with held(folder, job, num_jobs) as mark:
    missing = [shard for shard in shards if not shard.is_whole(folder)]
    total = sum(shard.stop - shard.start for shard in shards)
    remaining = sum(shard.stop - shard.start for shard in missing)
    with (
      tqdm.tqdm(
        total=total,
        initial=total - remaining,
        desc='caching',
        unit=' examples',
        file=sys.stderr,
        disable=None,  # No bar without a terminal.
      ) as bar,
      cache_encoding.encoding(encoder, num_workers) as encode,
    ):
      for run in _runs(missing):
        source = texts[run[0].task][run[0].split]
        for number in _write_run(folder, run, source, encode, mark):
          bar.update(number)


@contextlib.contextmanager
def held(
  folder: pathlib.Path, job: int = 0, num_jobs: int = 1
) -> Iterator[str]:
  """Locks a cache's folder, or a job's part of it, against other writers.

  Yields the suffix of temporary file names. Temporary files of an earlier run
  are removed at the start, those of this run at the end.
  """
  mark = f'{PART}{job}-of-{num_jobs}'
  with locks.held(folder, 'CACHE_DIR', f'.lock-{job}-of-{num_jobs}'):
    _remove_parts(folder, mark, num_jobs)
    try:
      yield mark
    finally:
      _remove_parts(folder, mark, num_jobs)


def _remove_parts(folder: pathlib.Path, mark: str, num_jobs: int) -> None:
  if isinstance(folder, storage.BucketPath):
    return  # Temporary files are local.
  # A single job also removes the files of other divisions.
  for path in folder.rglob(f'.*{PART if num_jobs == 1 else mark}*'):
    path.unlink(missing_ok=True)


def write_shard(
  folder: pathlib.Path,
  shard: CacheShard,
  texts: cache_texts.Texts,
  encoder: cache_encoding.Encoder,
) -> None:
  """Writes a shard in this process; concurrent writers of the shard are safe.

  The caller must hold the folder's lock.
  """
  with cache_encoding.encoding(encoder, num_workers=1) as encode:
    mark = f'{PART}{uuid.uuid4().hex}'
    for _ in _write_run(folder, [shard], texts, encode, mark):
      pass


def _runs(shards: Iterable[CacheShard]) -> Iterator[list[CacheShard]]:
  """Yields runs of adjacent shards of one split, for a single read of each."""
  run: list[CacheShard] = []
  for shard in shards:
    if run and (run[-1].task, run[-1].split, run[-1].stop) != (
      shard.task,
      shard.split,
      shard.start,
    ):
      yield run
      run = []
    run.append(shard)
  if run:
    yield run


def _write_run(
  folder: pathlib.Path,
  run: Sequence[CacheShard],
  source: cache_texts.Texts,
  encode: Any,
  mark: str,
) -> Iterator[int]:
  """Writes a run of adjacent shards; yields numbers of written examples."""
  ends: collections.deque[CacheShard] = collections.deque()
  file: ShardFile | None = None

  def works() -> Iterator[cache_encoding.Work]:
    for shard, first, columns in _cut(source, run):
      ends.append(shard)
      yield cache_encoding.Work(source.label, first, columns)

  for encoded in encode(works()):
    shard = ends.popleft()
    if file is None:
      file = ShardFile(folder, shard, mark)
    file.add(encoded.records, encoded.entries)
    yield len(encoded.records)
    if file.is_full:
      file.finish()
      file = None


def _cut(
  source: cache_texts.Texts, run: Sequence[CacheShard]
) -> Iterator[tuple[CacheShard, int, cache_texts.Chunk]]:
  """Yields chunks that do not cross shard boundaries, with shard and position.

  Raises:
    ValueError: if the number of examples has changed.
  """
  first, last = run[0].start, run[-1].stop
  # After the last shard of a split, the source must be exhausted.
  is_last = run[-1].number + 1 == run[-1].num_shards
  place, shards = first, collections.deque(run)
  for chunk in source.chunks(first, None if is_last else last):
    size = len(chunk['inputs'])
    offset = 0
    while offset < size and shards:
      shard = shards[0]
      count = min(size - offset, shard.stop - place)
      part = {
        name: values[offset : offset + count] for name, values in chunk.items()
      }
      yield shard, place, part
      place, offset = place + count, offset + count
      if place == shard.stop:
        shards.popleft()
    if offset < size:
      place += 1
      break
  if place != last:
    raise ValueError(
      f'{source.label} has {"fewer" if place < last else "more"} than {last} '
      f'examples, its number when the cache was started. Has a file changed? '
      'Set another CACHE_DIR, or remove this folder to cache again.'
    )


class ShardFile:
  """A shard under construction, under temporary names.

  For a bucket, the files are local and are uploaded when they are complete.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    shard: CacheShard,
    mark: str,
    kind: str = '',
    options: str = cache_format.WRITER_OPTIONS,
  ):
    """Opens the temporary file.

    Args:
      folder: folder of the cache.
      shard: shard to write.
      mark: suffix of the temporary file names.
      kind: infix before the file ending.
      options: ArrayRecord writer options.
    """
    self._targets = shard.files(folder, kind)
    places: list[pathlib.Path] = self._targets
    self._scratch: tempfile.TemporaryDirectory[str] | None = None
    if isinstance(folder, storage.BucketPath):
      self._scratch = scratch.folder()
      places = [pathlib.Path(self._scratch.name) / p.name for p in places]
    self._parts = [path.with_name(f'.{path.name}{mark}') for path in places]
    places[0].parent.mkdir(parents=True, exist_ok=True)
    self._size = shard.stop - shard.start
    self._indexes: list[np.ndarray] = []
    self._num_examples = 0
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._parts[0]), options
    )

  @property
  def is_full(self) -> bool:
    """Whether all examples of the shard are written."""
    return self._num_examples == self._size

  def add(self, records: Sequence[bytes], entries: np.ndarray) -> None:
    """Writes records and their index entries."""
    for record in records:
      self._writer.write(record)
    self._indexes.append(entries)
    self._num_examples += len(records)

  def finish(self) -> None:
    """Syncs both files to disk, then renames or uploads them, index last."""
    self._writer.close()
    content = io.BytesIO()
    np.save(content, np.concatenate(self._indexes))
    with self._parts[1].open('wb') as file:
      file.write(content.getvalue())
    if self._scratch is not None:
      for part, target in zip(self._parts, self._targets, strict=True):
        assert isinstance(target, storage.BucketPath)
        target.upload(part)
      self._scratch.cleanup()
      return
    for path in self._parts:
      _sync(path)
    for part, target in zip(self._parts, self._targets, strict=True):
      part.replace(target)
    _sync(self._targets[0].parent)


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def num_missing(folder: pathlib.Path, plan: Mapping[str, Any]) -> int:
  """Returns the number of incomplete shards, over all jobs."""
  return sum(not shard.is_whole(folder) for shard in shards_of(plan))


def finish(folder: pathlib.Path, plan: Mapping[str, Any]) -> None:
  """Validates all shards of a complete cache and writes `cache.json`.

  Raises:
    ValueError: naming a shard that does not match the plan.
  """
  digests: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
  for shard in shards_of(plan):
    path = shard.path(folder, '.array_record')
    size = shard.stop - shard.start
    index = cache_format.load_index(str(shard.path(folder, '.index.npy')), size)
    if num_records(path) != size:
      raise ValueError(
        f'{path} is damaged: expected {size} records. Remove it, and cache '
        'again: the other shards are kept.'
      )
    digests[shard.task, shard.split].append(cache_format.index_digest(index))
  # An older version may have written the plan.
  content = dict(plan) | run_format.stamp()
  content |= {
    'tasks': {
      task: task_content
      | {
        'splits': {
          split: split_content | {'index_digests': digests[task, split]}
          for split, split_content in task_content['splits'].items()
        }
      }
      for task, task_content in plan['tasks'].items()
    }
  }
  files.write_json(folder / cache_format.FILE, integrity.seal(content))


def num_records(path: pathlib.Path) -> int | None:
  """Returns the number of records of a file; None if it is damaged."""
  if isinstance(path, storage.BucketPath):
    with _ends(path) as local:
      number = _num_records(local)
    if number is not None:
      return number
  with storage.fetched(path) as local:
    return _num_records(local)


def _num_records(path: pathlib.Path) -> int | None:
  reader = array_record_module.ArrayRecordReader(str(path), '')
  if not reader.ok():
    return None  # Its `close` would raise the library's error.
  number: int = reader.num_records()
  reader.close()
  return number


@contextlib.contextmanager
def _ends(path: storage.BucketPath) -> Iterator[pathlib.Path]:
  """Yields a local file with the first and last bytes of an object.

  The others are zero. ArrayRecord's header and footer are in them, which have
  the number of records.
  """
  size = path.stat().st_size
  with scratch.folder() as name:
    local = pathlib.Path(name) / path.name
    with local.open('wb') as file:
      file.truncate(size)
      for start, stop in (
        (0, min(_HEAD_BYTES, size)),
        (max(0, size - _FOOTER_BYTES), size),
      ):
        file.seek(start)
        file.write(path.read_range(start, stop))
    yield local


def check_room(
  folder: pathlib.Path, num_bytes: int | float, shard_bytes: int | float
) -> None:
  """Refuses to start without enough free disk space.

  Args:
    folder: folder of the cache.
    num_bytes: size of all shards to write.
    shard_bytes: size of the shards that are written at a time. Those of a cache
      in a bucket are in the temporary folder until they are uploaded.

  Raises:
    OSError: like that of a full disk, with the free and the required space.
  """
  if isinstance(folder, storage.BucketPath):
    files.check_room(
      tempfile.gettempdir(),
      shard_bytes,
      'a shard, which is written to TMPDIR before it is uploaded to CACHE_DIR='
      f'{folder}, needs about',
      'less with fewer CACHE_EXAMPLES_PER_SHARD',
    )
  else:
    files.check_room(folder, num_bytes, 'the remaining shards need about')
