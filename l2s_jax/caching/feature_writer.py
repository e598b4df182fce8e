# SPDX-License-Identifier: Apache-2.0
"""Writes features: the frozen LLM's states of the prompts of a token cache.

Shards are written like those of tokens. The devices of all processes compute
each batch together, sharded over the mesh. A process owns shards of its own;
their prompts fill the batch rows on its devices, and it writes their states.
"""

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
import tqdm
from array_record.python import array_record_module

from l2s_jax.caching import cache_writer, feature_files
from l2s_jax.data import packing
from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.inference import length_buckets
from l2s_jax.models import stored_states
from l2s_jax.runtime import distributed, locks, partitioning, storage
from l2s_jax.systems import session as session_lib

PyTree = Any

# Size of the window in which prompts are sorted by length, in full batches.
_WINDOW_BATCHES = 8


@dataclasses.dataclass
class FeatureTimes:
  """Cost of the features written in this run, over all processes.

  Attributes:
    num_examples: number of examples.
    num_bytes: size of their records.
    secs: total time, without compilation.
    encoding_secs: LLM time in `secs`.
    reading_secs: time to read one example back, with all processes reading.
  """

  num_examples: int = 0
  num_bytes: int = 0
  secs: float = 0.0
  encoding_secs: float = 0.0
  reading_secs: float = 0.0

  def describe(self) -> str:
    """Returns a summary: cost per example, and the break-even in epochs."""
    secs, encoding = (
      total / self.num_examples for total in (self.secs, self.encoding_secs)
    )
    text = (
      f'{self.num_bytes / self.num_examples:,.0f} bytes and {1e3 * secs:.3g} '
      f'ms per example, with {1e3 * encoding:.3g} ms in the LLM; reading takes '
      f'{1e3 * self.reading_secs:.3g} ms per example.'
    )
    saved = encoding - self.reading_secs
    if saved <= 0:
      return f'{text} Features save no time on this machine.'
    return f'{text} Break-even after {secs / saved:.2f} epochs of training.'


def write(
  session: session_lib.Session,
  frozen: PyTree,
  cache: cache_format.TokenCache,
  shards: Sequence[cache_writer.CacheShard],
  plan: Mapping[str, Any],
  *,
  batch_size: int,
  job: int = 0,
  num_jobs: int = 1,
) -> FeatureTimes:
  """Writes the features of shards. All processes must call it.

  Args:
    session: session with the mesh and the system.
    frozen: parameters of the LLM.
    cache: token cache.
    shards: shards from `missing_of`.
    plan: plan from `make_plan`.
    batch_size: number of prompts of maximum length per batch, over all devices.
      A batch of shorter prompts has at most as many tokens.
    job: number of this job, from 0.
    num_jobs: number of jobs that write the features.

  Returns:
    The cost of the features.

  Raises:
    ValueError: if another process runs the same job, or tokens are damaged.
  """
  mark = f'{cache_writer.PART}features-{job}-of-{num_jobs}'
  times = FeatureTimes()
  reader = _Reader(session, frozen, plan, batch_size)
  groups = _Groups(session.mesh)
  processes = groups.all(batch_size)
  streams = [
    _Stream(
      functools.partial(groups.rows, own),
      own,
      shards[number :: len(processes)],
      cache,
      plan['prompt_length'],
      mark=mark,
      window_tokens=reader.window_tokens,
    )
    for number, own in enumerate(processes)
  ]
  with locks.held(
    cache.folder,
    'CACHE_DIR',
    f'.lock-features-{job}-of-{num_jobs}-{jax.process_index()}',
  ):
    is_local = not isinstance(cache.folder, storage.BucketPath)
    if is_local and distributed.is_first():  # Left by an earlier run.
      kept = '' if num_jobs == 1 else f'features-{job}-of-{num_jobs}'
      kind = feature_format.KIND
      for path in cache.folder.rglob(f'.*{kind}.*{cache_writer.PART}{kept}*'):
        path.unlink(missing_ok=True)
    distributed.wait_for_all('features begin')
    own = [stream for stream in streams if stream.is_mine]
    with tqdm.tqdm(
      total=sum(shard.stop - shard.start for s in own for shard in s.shards),
      desc='features',
      unit=' examples',
      file=sys.stderr,
      disable=None if distributed.is_first() else True,
    ) as bar:
      _write_all(reader, streams, bar, times)
    times.secs -= reader.compile_secs
    # Separately timed batches may have been slower on a busy machine.
    times.encoding_secs = min(reader.encoding_secs, times.secs)
    _read_back(cache, own, plan, times)
  distributed.wait_for_all('features')
  counts = np.array(distributed.gather([[times.num_examples, times.num_bytes]]))
  times.num_examples, times.num_bytes = counts.sum(axis=0).tolist()
  return times


def _write_all(
  reader: '_Reader',
  streams: 'Sequence[_Stream]',
  bar: tqdm.tqdm,
  times: FeatureTimes,
) -> None:
  """Overlaps the LLM's computation of a batch with writing the previous one."""
  start_secs = time.perf_counter()
  before: Any = None
  for taken, states in reader.read_all(streams):
    if before is not None:
      _keep(*before, bar=bar, times=times)
    before = taken, states
  if before is not None:
    _keep(*before, bar=bar, times=times)
  times.secs = time.perf_counter() - start_secs


def _keep(
  taken: 'Sequence[tuple[_Stream, _Window, list[int]]]',
  states: Mapping[str, jax.Array],
  *,
  bar: tqdm.tqdm,
  times: FeatureTimes,
) -> None:
  """Writes the states of a batch that belong to this process's shards."""
  num_rows = states['llm_states'].shape[0]
  held = {key: _held_here(value) for key, value in states.items()}  # Blocks.
  held_rows, values = held['llm_states']
  _, scales = held.get('llm_state_scales', (None, None))
  for stream, window, places in taken:
    if not stream.is_mine:
      continue
    rows = np.searchsorted(held_rows, stream.rows(num_rows)).tolist()
    records = []
    for row, place in zip(rows, places, strict=False):
      length = int(window.lengths[place])
      own_scales = None if scales is None else scales[row, :length]
      own = feature_format.States(values[row, :length], own_scales)
      records.append(feature_format.encode(own))
    times.num_examples += len(records)
    times.num_bytes += sum(map(len, records))
    stream.add(window, places, records)
    bar.update(len(records))


def _held_here(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Returns the row indices on this process's devices, and their values."""
  blocks = {
    shard.index[0].indices(array.shape[0])[:2]: shard.data
    for shard in array.addressable_shards
  }
  return (
    np.concatenate([np.arange(*block) for block in sorted(blocks)]),
    np.concatenate([np.asarray(blocks[block]) for block in sorted(blocks)]),
  )


@dataclasses.dataclass
class _Window:
  """Consecutive prompts of a shard, while their states are computed.

  Attributes:
    shard: shard of the prompts.
    start: position of the first prompt in the shard.
    lengths: length of each prompt, in tokens.
    waiting: positions of the prompts not yet taken, the longest last.
    records: record of each prompt; None until it is computed.
  """

  shard: cache_writer.CacheShard
  start: int
  lengths: np.ndarray
  waiting: list[int]
  records: list[bytes | None]


class _Stream:
  """Shards whose prompts occupy the same rows of each batch.

  Attributes:
    rows: function from the number of rows of a batch to this stream's rows.
    shards: shards in order.
    is_held: whether this process's devices hold the rows.
    is_mine: whether this process writes the shards.
  """

  def __init__(
    self,
    rows: Callable[[int], np.ndarray],
    processes: Sequence[int],
    shards: Sequence[cache_writer.CacheShard],
    cache: cache_format.TokenCache,
    prompt_length: int,
    *,
    mark: str,
    window_tokens: int,
  ):
    """Starts with the first shard.

    Args:
      rows: function from the number of rows of a batch to this stream's rows.
      processes: processes whose devices hold the rows; the first one writes.
      shards: shards to write.
      cache: token cache.
      prompt_length: maximum prompt length, in tokens; longer prompts are cut.
      mark: suffix of temporary file names.
      window_tokens: approximate size of a window, in tokens.
    """
    self.rows = rows
    self.shards = shards
    self.is_held = jax.process_index() in processes
    self.is_mine = jax.process_index() == processes[0]
    self._cache = cache
    self._prompt_length = prompt_length
    self._mark = mark
    self._windows = self._cut(window_tokens)
    self._file: cache_writer.ShardFile | None = None
    self._unwritten: collections.deque[_Window] = collections.deque()

  def _cut(self, window_tokens: int) -> Iterator[_Window]:
    for shard in self.shards:
      lengths = feature_files.prompt_lengths(
        self._cache, shard, self._prompt_length
      )
      of_window = (np.cumsum(lengths) - lengths) // window_tokens
      for number in np.unique(of_window):
        (places,) = np.nonzero(of_window == number)
        own = lengths[places]
        yield _Window(
          shard,
          int(places[0]),
          own,
          np.argsort(own, kind='stable').tolist(),
          [None] * len(own),
        )

  @functools.cached_property
  def window(self) -> _Window | None:
    """Current window; None at the end."""
    window = next(self._windows, None)
    if window is not None:
      self._unwritten.append(window)
    return window

  def take(self, num_rows: int) -> tuple['_Window', list[int]] | None:
    """Takes the longest remaining prompts of the current window."""
    window = self.window
    if window is None:
      return None
    places = window.waiting[-num_rows:][::-1]
    del window.waiting[-num_rows:]
    if not window.waiting:
      del self.window  # Advances to the next window.
    return window, places

  def prompts(self, window: _Window, places: Sequence[int]) -> list[np.ndarray]:
    """Returns the cut token ids of prompts."""
    split = self._cache.split(window.shard.task, window.shard.split)
    first = window.shard.start + window.start
    return [
      cache_format.decode_ids(record, split.dtype)[0][: self._prompt_length]
      for record in split.read([first + place for place in places])
    ]

  def add(
    self, window: _Window, places: Sequence[int], records: Sequence[bytes]
  ) -> None:
    """Stores records of a window; writes complete windows in order."""
    for place, record in zip(places, records, strict=True):
      window.records[place] = record
    while self._unwritten and None not in self._unwritten[0].records:
      self._write(self._unwritten.popleft())

  def _write(self, window: _Window) -> None:
    if self._file is None:
      self._file = cache_writer.ShardFile(
        self._cache.folder,
        window.shard,
        self._mark,
        feature_format.KIND,
        feature_format.WRITER_OPTIONS,
      )
    records = [record for record in window.records if record is not None]
    checksums = [cache_format.checksum(record) for record in records]
    entries = np.array([window.lengths, checksums], np.uint32).T.copy()
    self._file.add(records, entries)
    if self._file.is_full:
      self._file.finish()
      self._file = None


class _Groups:
  """Groups of processes whose devices hold the same rows of a batch."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self._sharding = partitioning.batch_sharding(mesh)
    self._rows: dict[int, dict[tuple[int, ...], np.ndarray]] = {}

  def all(self, num_rows: int) -> list[tuple[int, ...]]:
    """Returns the groups, the same in every process."""
    return sorted(self._of(num_rows))

  def rows(self, group: tuple[int, ...], num_rows: int) -> np.ndarray:
    """Returns the rows of a group, ascending."""
    return self._of(num_rows)[group]

  def _of(self, num_rows: int) -> dict[tuple[int, ...], np.ndarray]:
    if num_rows not in self._rows:
      holders: list[set[int]] = [set() for _ in range(num_rows)]
      places = self._sharding.devices_indices_map((num_rows,)).items()
      for device, index in cast('Iterable[tuple[jax.Device, Any]]', places):
        for row in range(*index[0].indices(num_rows)):
          holders[row].add(device.process_index)
      found: dict[tuple[int, ...], list[int]] = {}
      for row, processes in enumerate(holders):
        found.setdefault(tuple(sorted(processes)), []).append(row)
      self._rows[num_rows] = {g: np.array(rows) for g, rows in found.items()}
    return self._rows[num_rows]


class _Reader:
  """The LLM, compiled for each prompt length.

  Attributes:
    window_tokens: approximate size of a window, in tokens.
    compile_secs: time of compilation and of two trial runs for each length.
    encoding_secs: estimated LLM time of all batches; for each batch, the time
      of the second trial run of its length.
  """

  def __init__(
    self,
    session: session_lib.Session,
    frozen: PyTree,
    plan: Mapping[str, Any],
    batch_size: int,
  ):
    module = session.system.module
    self._mesh = session.mesh
    self._params = frozen
    self._longest = plan['prompt_length']
    self._batch_size = batch_size
    self._pad_id = session.system.prompt_vocabulary.pad_id
    self._lengths = length_buckets.lengths(self._longest)
    self.window_tokens = _WINDOW_BATCHES * batch_size * self._longest
    self.compile_secs = 0.0
    self.encoding_secs = 0.0
    self._secs: dict[int, float] = {}

    def read(params: PyTree, batch: Mapping[str, jax.Array]) -> Any:
      states, _ = module.apply({'params': params}, batch, method='read_prompt')
      return stored_states.store(states, plan['dtype'])

    self._read = jax.jit(
      read, out_shardings=partitioning.batch_sharding(session.mesh)
    )

  def read_all(
    self, streams: Sequence[_Stream]
  ) -> Iterator[tuple[Any, dict[str, jax.Array]]]:
    """Yields the prompts taken from each stream, and their states, by batch."""
    while windows := [s.window for s in streams if s.window is not None]:
      most = max(int(w.lengths[w.waiting[-1]]) for w in windows)
      length = min(size for size in self._lengths if size >= most)
      num_rows = self._batch_size * (self._longest // length)
      taken, prompts, rows = [], [], []
      for stream in streams:
        own = stream.rows(num_rows)
        found = stream.take(len(own))
        if found is not None:
          taken.append((stream, *found))
        if stream.is_held:
          read = [] if found is None else stream.prompts(*found)
          # Rows without a prompt have one token, because attention needs a key.
          read += [np.zeros(1, np.int32)] * (len(own) - len(read))
          prompts += read
          rows += own.tolist()
      yield taken, self._read_batch(prompts, rows, length, num_rows)

  def _read_batch(
    self,
    prompts: Sequence[np.ndarray],
    rows: Sequence[int],
    length: int,
    num_rows: int,
  ) -> dict[str, jax.Array]:
    """Returns the states of a batch, given this process's rows."""
    held = np.sort(rows)
    tokens, segment_ids = packing.fill(
      prompts, np.searchsorted(held, rows), length=length, pad_id=self._pad_id
    )
    batch = partitioning.put_batch(
      {'encoder_input_tokens': tokens, 'encoder_segment_ids': segment_ids},
      self._mesh,
      held,
      num_rows,
    )
    if length not in self._secs:
      start_secs = time.perf_counter()
      jax.block_until_ready(self._read(self._params, batch))
      middle_secs = time.perf_counter()
      jax.block_until_ready(self._read(self._params, batch))
      end_secs = time.perf_counter()
      self._secs[length] = end_secs - middle_secs
      self.compile_secs += end_secs - start_secs
    self.encoding_secs += self._secs[length]
    return self._read(self._params, batch)


def _read_back(
  cache: cache_format.TokenCache,
  own: Sequence[_Stream],
  plan: Mapping[str, Any],
  times: FeatureTimes,
) -> None:
  """Measures the time to read some features back."""
  shards = [shard for stream in own for shard in stream.shards]
  if not shards:
    return
  shard = shards[0]
  size = min(shard.stop - shard.start, 256)
  path = shard.path(cache.folder, f'{feature_format.KIND}.array_record')
  with storage.fetched(path) as local:
    reader = array_record_module.ArrayRecordReader(
      str(local), cache_format.READER_OPTIONS
    )
    start_secs = time.perf_counter()
    for place in range(size):
      reader.seek(place)
      record = reader.read()
      cache_format.checksum(record)
      rows = feature_format.decode(record, plan['dtype'], plan['width']).rows
      np.array(rows)  # Copies, like the layout of a batch.
    secs = time.perf_counter() - start_secs
    reader.close()
  times.reading_secs = secs / size / jax.process_count()
