# SPDX-License-Identifier: Apache-2.0
"""Writes features: what the frozen LLM makes of the prompts of a token cache.

`features_plan.json` comes first: of which LLM and tokens they are. A shard is
written as those of tokens are, and `features.json` when all are whole. The
devices of all processes read each batch together, as the mesh has it; the rows
that a process holds are of shards of its own, which it writes.
"""

import collections
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
import tqdm
from array_record.python import array_record_module

from l2s_jax.caching import cache_writer
from l2s_jax.data import packing
from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.inference import length_buckets
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s, stored_states
from l2s_jax.runtime import distributed, files, integrity, locks, partitioning
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib

PyTree = Any

PLAN = 'features_plan.json'
# Prompts that are sorted by length among one another, in full batches.
_WINDOW_BATCHES = 8
# Of the encoder as it ends, its final norm included.
_LAYER = 'last'
_REMEDY = (
  f'remove {PLAN}, {feature_format.FILE} and all *{feature_format.KIND}.* '
  'files of the cache'
)


def make_plan(
  cache: cache_format.TokenCache,
  system: system_lib.System,
  dtype: str,
  prompt_length: int,
) -> dict[str, Any]:
  """Returns what `features.json` will hold but for what the shards say.

  Args:
    cache: of tokens.
    system: with the fingerprint of its LLM.
    dtype: of the states, one of `stored_states.DTYPES`.
    prompt_length: tokens to which prompts are cut.
  """
  assert isinstance(system.module, l2s.LlmToSlm)
  config = system.module.llm_config
  return {
    'format_version': feature_format.FORMAT_VERSION,
    'key': {
      'llm_fingerprint': system.llm_fingerprint,
      'llm_dtype': system.frozen_dtype,
      'llm': {
        name: value
        for name, value in config.to_json().items()
        if name not in config_lib.RUNTIME_FIELDS
      },
      'layer': _LAYER,
      'tokens': cache.digest,
    },
    'dtype': dtype,
    'width': config.emb_dim,
    'prompt_length': prompt_length,
  }


def settle_plan(folder: pathlib.Path, plan: Mapping[str, Any]) -> None:
  """Begins the plan of a folder, or goes on with the same.

  Raises:
    ValueError: if the one there is of something else, with the difference, or
      is damaged.
  """
  path = folder / PLAN
  if not path.exists() and distributed.is_first():
    files.write_json(path, integrity.seal(plan))
  distributed.wait_for_all('features plan')
  kept = integrity.unseal(
    files.read_json(path, keys={'key': dict}, remedy=f'{_REMEDY}.')
  )
  if kept is None:
    raise ValueError(f'{path} is not as it was written; {_REMEDY}.')
  lines = files.differences(
    kept, plan, have='the features have', want='now it is'
  )
  if lines:
    raise ValueError(
      f'CACHE_DIR={folder} holds features of something else:\n'
      + '\n'.join(lines)
      + f'\nSet these as they were; or, to make them anew, {_REMEDY}; or cache '
      'in another CACHE_DIR.'
    )


def missing_of(
  cache: cache_format.TokenCache, job: int = 0, num_jobs: int = 1
) -> list[cache_writer.CacheShard]:
  """Returns the shards of a job that have no features yet, for all processes.

  Args:
    cache: of tokens.
    job: which of `num_jobs` this is.
    num_jobs: which write the features together.
  """
  shards = cache_writer.share(
    cache_writer.shards_of(cache.content), job, num_jobs
  )
  is_whole = distributed.from_first(
    [shard.is_whole(cache.folder, feature_format.KIND) for shard in shards]
  )
  return [
    shard for shard, done in zip(shards, is_whole, strict=True) if not done
  ]


def num_bytes(
  cache: cache_format.TokenCache,
  shards: Sequence[cache_writer.CacheShard],
  plan: Mapping[str, Any],
) -> float:
  """Returns what disk the features of shards take."""
  token_bytes = feature_format.token_bytes(plan['dtype'], plan['width'])
  total = 0.0
  for shard in shards:
    lengths = _prompt_lengths(cache, shard, plan['prompt_length'])
    states = int(lengths.sum()) * token_bytes
    total += (
      states
      + states // feature_format.BLOCK_HEADERS
      + len(lengths) * feature_format.RECORD_BYTES
      + feature_format.SHARD_BYTES
    )
  return total


def _prompt_lengths(
  cache: cache_format.TokenCache,
  shard: cache_writer.CacheShard,
  prompt_length: int,
) -> np.ndarray:
  """Returns the tokens of the prompts of a shard, cut."""
  split = cache.split(shard.task, shard.split)
  lengths = split.lengths_of(range(shard.start, shard.stop))[:, 0]
  return np.minimum(lengths.astype(np.int64), prompt_length)


@dataclasses.dataclass
class Times:
  """What the features that were written now, by all processes, have cost.

  Attributes:
    num_examples: of them.
    num_bytes: of their records.
    secs: in all, compilation left out.
    encoding_secs: of these, for the LLM to read the prompts.
    reading_secs: for an example to be read back, all processes reading.
  """

  num_examples: int = 0
  num_bytes: int = 0
  secs: float = 0.0
  encoding_secs: float = 0.0
  reading_secs: float = 0.0

  def describe(self) -> str:
    """Returns a sentence for people: what an example takes, when it pays."""
    secs, encoding = (
      total / self.num_examples for total in (self.secs, self.encoding_secs)
    )
    text = (
      f'{self.num_bytes / self.num_examples:,.0f} bytes and {1e3 * secs:.3g} '
      f'ms an example, of which the LLM took {1e3 * encoding:.3g}; reading one '
      f'back takes {1e3 * self.reading_secs:.3g} ms.'
    )
    saved = encoding - self.reading_secs
    if saved <= 0:
      return f'{text} They save no time on this machine.'
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
) -> Times:
  """Writes the features of shards. All processes must call it.

  Args:
    session: has the mesh, and the system.
    frozen: the LLM's parameters.
    cache: of tokens.
    shards: from `missing_of`.
    plan: from `make_plan`.
    batch_size: prompts of the greatest length that are read at once, over all
      devices; of shorter ones, as many as have no more tokens.
    job: which of `num_jobs` this is.
    num_jobs: which write the features together.

  Raises:
    ValueError: if another process is this job, or tokens are damaged.
  """
  mark = f'{cache_writer.PART}features-{job}-of-{num_jobs}'
  streams = _streams(batch_size, session.mesh, shards)
  times = Times()
  reader = _Reader(session, frozen, plan, batch_size)
  with locks.held(
    cache.folder,
    'CACHE_DIR',
    f'.lock-features-{job}-of-{num_jobs}-{jax.process_index()}',
  ):
    if distributed.is_first():  # Of an earlier start.
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
      for stream in streams:
        stream.open(cache, plan, mark, reader.window_tokens)
      _write_all(reader, streams, bar, times)
    times.secs -= reader.compile_secs
    times.encoding_secs = reader.encoding_secs
    _read_back(cache, own, plan, times)
  distributed.wait_for_all('features')
  counts = np.array(distributed.gather([[times.num_examples, times.num_bytes]]))
  times.num_examples, times.num_bytes = counts.sum(axis=0).tolist()
  return times


def _write_all(
  reader: '_Reader',
  streams: 'Sequence[_Stream]',
  bar: tqdm.tqdm,
  times: Times,
) -> None:
  """Lets the LLM read while what it has made is written."""
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
  times: Times,
) -> None:
  """Writes the states of a batch, those of this process's shards."""
  num_rows = states['llm_states'].shape[0]
  held = {key: _held_here(value) for key, value in states.items()}  # Waits.
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
  """Returns which rows of an array this process's devices hold, and these."""
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
  """Prompts that follow each other in a shard, while the LLM reads them.

  Attributes:
    shard: their shard.
    start: the place of the first there.
    lengths: of each, in tokens.
    waiting: places of those that were not read, the longest last.
    records: of each, when it is there.
  """

  shard: cache_writer.CacheShard
  start: int
  lengths: np.ndarray
  waiting: list[int]
  records: list[bytes | None]


class _Stream:
  """Shards whose prompts take the same rows of each batch.

  Attributes:
    shards: one after another.
    is_held: whether this process's devices hold the rows.
    is_mine: whether this process writes the shards.
  """

  def __init__(
    self,
    rows: Callable[[int], np.ndarray],
    shards: Sequence[cache_writer.CacheShard],
    processes: Sequence[int],
  ):
    """Prepares.

    Args:
      rows: gives the rows, from how many a batch has.
      shards: to be written.
      processes: whose devices hold the rows; the first one writes.
    """
    self.rows = rows
    self.shards = shards
    self.is_held = jax.process_index() in processes
    self.is_mine = jax.process_index() == processes[0]
    self._windows: Iterator[_Window] = iter(())
    self._file: cache_writer.ShardFile | None = None
    self._unwritten: collections.deque[_Window] = collections.deque()

  def open(
    self,
    cache: cache_format.TokenCache,
    plan: Mapping[str, Any],
    mark: str,
    window_tokens: int,
  ) -> None:
    """Begins with the first shard.

    Args:
      cache: of tokens.
      plan: of the features.
      mark: in the names of files until they are whole.
      window_tokens: of a window, about.
    """
    self._cache = cache
    self._mark = mark
    self._prompt_length = plan['prompt_length']
    self._windows = self._cut(window_tokens)

  def _cut(self, window_tokens: int) -> Iterator[_Window]:
    for shard in self.shards:
      lengths = _prompt_lengths(self._cache, shard, self._prompt_length)
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
    """The one that is read now; None at the end."""
    window = next(self._windows, None)
    if window is not None:
      self._unwritten.append(window)
    return window

  def take(self, num_rows: int) -> tuple['_Window', list[int]] | None:
    """Takes the longest prompts that were not read, of one window."""
    window = self.window
    if window is None:
      return None
    places = window.waiting[-num_rows:][::-1]
    del window.waiting[-num_rows:]
    if not window.waiting:
      del self.window  # The next.
    return window, places

  def prompts(self, window: _Window, places: Sequence[int]) -> list[np.ndarray]:
    """Returns the ids of prompts, cut."""
    split = self._cache.split(window.shard.task, window.shard.split)
    first = window.shard.start + window.start
    return [
      cache_format.decode_ids(record, split.dtype)[0][: self._prompt_length]
      for record in split.read([first + place for place in places])
    ]

  def add(
    self, window: _Window, places: Sequence[int], records: Sequence[bytes]
  ) -> None:
    """Takes records of a window; writes windows that are whole, in order."""
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


def _streams(
  batch_size: int,
  mesh: jax.sharding.Mesh,
  shards: Sequence[cache_writer.CacheShard],
) -> list[_Stream]:
  """Returns the shards by rows, the same in every process.

  Rows that are held by the same processes are one stream.
  """
  sharding = partitioning.batch_sharding(mesh)

  @functools.cache
  def holders(num_rows: int) -> dict[tuple[int, ...], np.ndarray]:
    processes: list[set[int]] = [set() for _ in range(num_rows)]
    places = sharding.devices_indices_map((num_rows,)).items()
    for device, index in cast('Iterable[tuple[jax.Device, Any]]', places):
      for row in range(*index[0].indices(num_rows)):
        processes[row].add(device.process_index)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, group in enumerate(processes):
      groups.setdefault(tuple(sorted(group)), []).append(row)
    return {group: np.array(rows) for group, rows in groups.items()}

  def rows_of(group: tuple[int, ...], num_rows: int) -> np.ndarray:
    return holders(num_rows)[group]

  groups = sorted(holders(batch_size))
  return [
    _Stream(functools.partial(rows_of, group), shards[n :: len(groups)], group)
    for n, group in enumerate(groups)
  ]


class _Reader:
  """The LLM, compiled for each length of prompts.

  Attributes:
    window_tokens: of a window, about.
    compile_secs: spent before a first batch of each length was read.
    encoding_secs: for the batches that were read, by a second reading of the
      first of each length.
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
    """Yields what was taken of each stream, and the states of the batch."""
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
          # Rows without a prompt read one token: attention needs something.
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
    """Returns the states of prompts, of which this process has some rows."""
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
  times: Times,
) -> None:
  """Measures how long it takes to read some of the features."""
  shards = [shard for stream in own for shard in stream.shards]
  if not shards:
    return
  shard = shards[0]
  size = min(shard.stop - shard.start, 256)
  path = shard.path(cache.folder, f'{feature_format.KIND}.array_record')
  reader = array_record_module.ArrayRecordReader(
    str(path), cache_format.READER_OPTIONS
  )
  start_secs = time.perf_counter()
  for place in range(size):
    reader.seek(place)
    record = reader.read()
    cache_format.checksum(record)
    rows = feature_format.decode(record, plan['dtype'], plan['width']).rows
    np.array(rows)  # As it is laid out in a batch.
  secs = time.perf_counter() - start_secs
  times.reading_secs = secs / size / jax.process_count()
  reader.close()


def finish(cache: cache_format.TokenCache, plan: Mapping[str, Any]) -> None:
  """Writes `features.json` over a cache whose shards all have features.

  Raises:
    ValueError: naming a shard that is not as it must be.
  """
  digests: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
  for shard in cache_writer.shards_of(cache.content):
    path, index_path = shard.files(cache.folder, feature_format.KIND)
    again = 'Remove it, and run `cache --features` again: the others are kept.'
    size = shard.stop - shard.start
    index = cache_format.load_index(str(index_path), size, 2, remedy=again)
    lengths = _prompt_lengths(cache, shard, plan['prompt_length'])
    if (index[:, 0] != lengths).any():
      raise ValueError(f'{index_path} is of other prompts. {again}')
    reader = array_record_module.ArrayRecordReader(str(path), '')
    if not reader.ok() or reader.num_records() != size:
      raise ValueError(f'{path} is damaged: expected {size} records. {again}')
    reader.close()
    digests[shard.task, shard.split].append(cache_format.index_digest(index))
  content = dict(plan) | {
    'tasks': {
      task: {
        'splits': {
          name: {
            'num_examples': split['num_examples'],
            'shards': split['shards'],
            'index_digests': digests[task, name],
            'longest_prompt': _longest_prompt(cache, task, name),
          }
          for name, split in of_task['splits'].items()
        }
      }
      for task, of_task in cache.tasks.items()
    }
  }
  files.write_json(cache.folder / feature_format.FILE, integrity.seal(content))


def _longest_prompt(
  cache: cache_format.TokenCache, task: str, split: str
) -> int:
  """Returns its tokens, before cutting."""
  examples = cache.split(task, split)
  return max(
    (
      int(examples.lengths_of(range(start, stop))[:, 0].max())
      for start, stop in _blocks(examples.num_examples)
    ),
    default=0,
  )


def _blocks(total: int, size: int = 1 << 16) -> Iterator[tuple[int, int]]:
  return ((start, min(start + size, total)) for start in range(0, total, size))
