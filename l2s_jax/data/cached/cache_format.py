# SPDX-License-Identifier: Apache-2.0
"""The cache format: a task's examples as token ids, with random access.

A cache is a folder:

    cache.json      description of content and sources; written last, so it
                    marks a complete cache
    TASK/SPLIT/00000-of-00002.array_record
                    one record per example, in the task's own order
    TASK/SPLIT/00000-of-00002.index.npy
                    [n, 3] uint32: prompt tokens, answer tokens (both with EOS,
                    before cutting), XXH32 of the record

A record is two uint32, the numbers of prompt and answer tokens, then the ids of
both, then its text columns as JSON in UTF-8. Ids are uint16 if both
vocabularies have at most 65,536 ids, else uint32. All numbers are
little-endian.

Of a cache in a bucket, each shard is copied to a local temporary folder at its
first use. The checksums and digests are those of its index and of `cache.json`.

This module imports neither TensorFlow nor SeqIO. `cache_writer.py` writes
caches.
"""

import array
import copy
import dataclasses
import json
import os
import pathlib
import struct
import sys
import threading
import tokenize
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from array_record.python import array_record_module

from l2s_jax.runtime import console, files, integrity, os_errors, storage
from l2s_jax.weights import run_format

FILE = run_format.CACHE
# With one record per group, a read unpacks no neighbours. Records of 300 bytes
# and 4 KiB then take 2 and 9 us to write, and 356 and 2,470 bytes on disk; with
# zstd, as in earlier caches, 7 and 17 us, and 336 and 1,810 bytes.
WRITER_OPTIONS = 'group_size:1,snappy'
# Measured per record of 60 tokens on one core: 5 us one at a time with small
# buffers; 23 us with a list of 32 records per `read`, which uses threads of its
# own; 50 us with buffers of 1 MiB.
READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
_READER_BUFFER_BYTES = 4096
# NumPy parses a header as Python, which two threads at once cannot do safely in
# Python 3.11 (github.com/python/cpython/issues/106905).
_PARSING = threading.Lock()
_HEADER = struct.Struct('<II')
# `array` converts lists three times as fast as NumPy.
_TYPECODES = {'uint16': 'H', 'uint32': 'I'}
_DTYPES: dict[str, Any] = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(',', ':'))
# Keys of `cache.json`, and of each split in it.
_KEYS: dict[str, Any] = {
  'format_version': int,
  'key': dict,
  'dtype': str,
  'tasks': dict,
  'rates': dict,
  integrity.DIGEST: str,
}
_OF_SPLIT = dict.fromkeys(('num_examples', 'shards', 'index_digests'))
_REMEDY = 'the cache is not complete: remove the folder and cache again.'


def id_dtype(*vocab_sizes: int) -> str:
  """Returns the smallest dtype for the ids: 'uint16' or 'uint32'."""
  return 'uint16' if max(vocab_sizes) <= 1 << 16 else 'uint32'


def encode(
  prompt: Sequence[int] | np.ndarray,
  answer: Sequence[int] | np.ndarray,
  texts: Mapping[str, Any],
  dtype: str,
) -> bytes:
  """Returns the record of an example; see `encode_all` for the arguments."""
  columns = {name: [text] for name, text in texts.items()}
  return encode_all([prompt], [answer], columns, dtype)[0]


def encode_all(
  prompts: Sequence[Sequence[int] | np.ndarray],
  answers: Sequence[Sequence[int] | np.ndarray],
  columns: Mapping[str, Sequence[Any]],
  dtype: str,
) -> list[bytes]:
  """Returns the records of examples.

  Args:
    prompts: ids with EOS.
    answers: ids with EOS.
    columns: text columns for inspection and scoring, as JSON values. Bytes that
      are not UTF-8 are kept as Python's surrogate escapes.
    dtype: dtype of the ids, from `id_dtype`.
  """
  typecode = _TYPECODES[dtype]
  texts = _as_json(columns, len(prompts))
  return [
    b''.join(
      (
        _HEADER.pack(len(prompt), len(answer)),
        _little_endian(typecode, prompt),
        _little_endian(typecode, answer),
        text.encode('utf-8', 'surrogatepass'),
      )
    )
    for prompt, answer, text in zip(prompts, answers, texts, strict=True)
  ]


def _little_endian(
  typecode: str, ids: Sequence[int] | np.ndarray
) -> 'array.array[int]':
  numbers = array.array(typecode, ids)
  if sys.byteorder == 'big':
    numbers.byteswap()
  return numbers


def _as_json(columns: Mapping[str, Sequence[Any]], num_rows: int) -> list[str]:
  """Returns the JSON object of each row.

  Columns are encoded at once: one encoder call per row would be slower.
  """
  if not columns:
    return ['{}'] * num_rows
  values = [
    list(
      map(
        json.encoder.encode_basestring
        if all(isinstance(value, str) for value in column)
        else _JSON.encode,
        column,
      )
    )
    for column in columns.values()
  ]
  fields = [f'{_JSON.encode(name)}:'.replace('%', '%%') for name in columns]
  row = '{' + ','.join(f'{field}%s' for field in fields) + '}'
  return [row % parts for parts in zip(*values, strict=True)]


def decode_ids(record: bytes, dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids of prompt and answer, as views of the record's memory."""
  num_prompt, num_answer = _HEADER.unpack_from(record)
  ids = np.frombuffer(
    record, _DTYPES[dtype], num_prompt + num_answer, _HEADER.size
  )
  return ids[:num_prompt], ids[num_prompt:]


def decode_texts(record: bytes, dtype: str) -> dict[str, Any]:
  """Returns the text columns of a record."""
  num_ids = sum(_HEADER.unpack_from(record))
  text = record[_HEADER.size + num_ids * np.dtype(dtype).itemsize :]
  return json.loads(text.decode('utf-8', 'surrogatepass'))


def checksum(record: bytes) -> int:
  """Returns the checksum of a record, stored in the index."""
  return xxhash.xxh32_intdigest(record)


def index_digest(index: np.ndarray) -> str:
  """Returns the digest of a shard's index, stored in `cache.json`."""
  return integrity.digest(index)


def folder_name(name: str) -> str:
  """Returns the folder name of a task or a split."""
  quoted = urllib.parse.quote(name, safe=' =,+[]')
  return f'%2E{quoted[1:]}' if quoted.startswith('.') else quoted


def shard_path(folder: pathlib.Path, shard: int, num_shards: int) -> str:
  """Returns the path of a shard without its ending.

  Args:
    folder: folder of the split.
    shard: number of the shard, from 0.
    num_shards: number of shards of the split.
  """
  return str(folder / f'{shard:05d}-of-{num_shards:05d}')


class Split:
  """The examples of a split by number, in the task's own order.

  Reading is thread-safe. A pickled split carries its location, not its open
  files. Subclasses read other files about the same examples.

  Attributes:
    task: name of the task.
    split: name of the split.
    num_examples: number of examples in all shards.
    dtype: dtype of the ids.
  """

  # Infix of the file names, and number of columns of the index.
  _kind = ''
  _num_columns = 3
  # For error messages: the file that lists the shards, and the way to remake
  # them.
  _file = FILE
  _again = 'cache again'
  _remedy = _REMEDY

  def __init__(
    self,
    folder: pathlib.Path,
    task: str,
    split: str,
    content: Mapping[str, Any],
    dtype: str,
  ):
    """Stores the locations of the shards; each is opened at first use.

    Args:
      folder: folder of the cache.
      task: name of the task.
      split: name of the split.
      content: the split's entry in `cache.json`.
      dtype: dtype of the ids.
    """
    self.task = task
    self.split = split
    self.num_examples: int = content['num_examples']
    self.dtype = dtype
    self._folder = folder / folder_name(task) / folder_name(split)
    self._counts: list[int] = content['shards']
    self._digests: list[str] = content['index_digests']
    if not _is_counted(self._counts, self._digests, self.num_examples):
      raise ValueError(
        f'{folder / self._file}: the shards of {task!r}, split {split!r}, are '
        f'not the numbers of their examples, with a digest each; {self._remedy}'
      )
    self._starts = np.cumsum([0, *self._counts])
    self._set_closed()

  def reopened(self) -> 'Split':
    """Returns a copy with readers of its own, for use in a thread."""
    other = copy.copy(self)
    other._indexes = self._indexes
    return other

  def _set_closed(self) -> None:
    self._lock = threading.RLock()
    self._readers: dict[int, Any] = {}
    self._indexes: dict[int, np.ndarray] = {}

  def __getstate__(self) -> dict[str, Any]:
    opened = ('_lock', '_readers', '_indexes')
    return {k: v for k, v in self.__dict__.items() if k not in opened}

  def __setstate__(self, state: Mapping[str, Any]) -> None:
    self.__dict__.update(state)
    self._set_closed()

  def __len__(self) -> int:
    return self.num_examples

  def __getitem__(self, number: int) -> bytes:
    return self.read([number])[0]

  def read(self, numbers: Sequence[int] | np.ndarray) -> list[bytes]:
    """Returns records by number, in the requested order.

    Raises:
      IndexError: if there is no such example.
      ValueError: naming shard and place of a damaged record.
    """
    shards, places = self._places(numbers)
    with self._lock:  # A reader has a file position.
      return [
        self._record(shard, place)
        for shard, place in zip(shards.tolist(), places.tolist(), strict=True)
      ]

  def lengths_of(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns prompt and answer lengths of examples, [n, 2] uint32."""
    shards, places = self._places(numbers)
    lengths = np.zeros((len(numbers), 2), np.uint32)
    # Groups examples by shard: there may be many shards.
    order = np.argsort(shards, kind='stable')
    found, firsts = np.unique(shards[order], return_index=True)
    for shard, own in zip(
      found.tolist(), np.split(order, firsts[1:]), strict=False
    ):
      lengths[own] = self._index(shard)[places[own], :2]
    return lengths

  def _places(
    self, numbers: Sequence[int] | np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shard of each example, and its place in the shard, from 0.

    Raises:
      IndexError: if there is no such example.
    """
    wanted = np.asarray(numbers, np.int64)
    outside = wanted[(wanted < 0) | (wanted >= self.num_examples)]
    if len(outside):
      raise IndexError(
        f'example {outside[0]} is out of range: {self.task!r}, split '
        f'{self.split!r}, has {self.num_examples} examples.'
      )
    shards = np.searchsorted(self._starts, wanted, side='right') - 1
    return shards, wanted - self._starts[shards]

  def _path(self, shard: int, ending: str) -> str:
    path = shard_path(self._folder, shard, len(self._counts))
    return path + self._kind + ending

  def _record(self, shard: int, place: int) -> bytes:
    reader = self._readers.get(shard) or self._reader(shard)
    try:
      reader.seek(place)
      record = reader.read()
    except (RuntimeError, IndexError, EOFError) as error:
      raise ValueError(
        self._damage(shard, place, os_errors.first_line(error))
      ) from error
    entry = self._index(shard)[place]
    if checksum(record) != entry[-1]:
      raise ValueError(self._damage(shard, place, 'wrong checksum'))
    self._check_lengths(record, entry, shard, place)
    return record

  def _check_lengths(
    self, record: bytes, entry: np.ndarray, shard: int, place: int
  ) -> None:
    """Compares the lengths of a record with its index entry.

    The index may have been damaged before `cache.json` had its digest.
    """
    if _HEADER.unpack_from(record) != tuple(entry[:2].tolist()):
      reason = 'its lengths are not those of the index'
      raise ValueError(self._damage(shard, place, reason))

  def _damage(self, shard: int, place: int, reason: str) -> str:
    return (
      f'{self._path(shard, ".array_record")} is damaged: record {place} of '
      f'{self._counts[shard]} (shard {shard}, example '
      f'{self._starts[shard] + place} of {self.task!r}, split {self.split!r}), '
      f'{reason}. Remove this file and {self._file}, and {self._again}: the '
      'other shards are kept.'
    )

  def _reader(self, shard: int) -> Any:
    with self._lock:
      if shard not in self._readers:
        path = self._path(shard, '.array_record')
        if not storage.of(path).exists():
          raise FileNotFoundError(
            f'{path}: no such file, but {self._file} lists it. Copy the cache '
            f'again, or remove {self._file} and {self._again}: the other '
            'shards are kept.'
          )
        reader = array_record_module.ArrayRecordReader(
          storage.local_copy(path),
          READER_OPTIONS,
          file_reader_buffer_size=_READER_BUFFER_BYTES,
        )
        if not reader.ok() or reader.num_records() != self._counts[shard]:
          found = reader.num_records() if reader.ok() else 'no'
          raise ValueError(
            f'{path} is damaged: it has {found} records, expected '
            f'{self._counts[shard]}. Remove it and {self._file}, and '
            f'{self._again}: the other shards are kept.'
          )
        self._readers[shard] = reader
      return self._readers[shard]

  def _index(self, shard: int) -> np.ndarray:
    if shard in self._indexes:
      return self._indexes[shard]
    with self._lock:
      if shard not in self._indexes:
        path = self._path(shard, '.index.npy')
        index = load_index(
          path, self._counts[shard], self._num_columns, self._remedy
        )
        if index_digest(index) != self._digests[shard]:
          raise ValueError(
            f'{path} is damaged: its digest does not match {self._file}. '
            f'Remove it and {self._file}, and {self._again}: the other shards '
            'are kept.'
          )
        self._indexes[shard] = np.asarray(index)  # Indexing a memmap is slow.
      return self._indexes[shard]


def load_index(
  path: str,
  num_examples: int | None = None,
  num_columns: int = 3,
  remedy: str = _REMEDY,
) -> np.ndarray:
  """Loads the index of a shard, [n, columns] uint32.

  Args:
    path: path of the file.
    num_examples: expected number of rows; None: any.
    num_columns: expected number of columns.
    remedy: advice for the user, for error messages.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, if it is not such an index.
  """
  try:
    # A map outlives its name.
    with storage.fetched(storage.of(path)) as local, _PARSING:
      index = np.load(local, mmap_mode='r', allow_pickle=False)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{path}: no such file; {remedy}') from error
  except (
    ValueError,
    EOFError,
    OSError,
    # NumPy parses the header as Python.
    SyntaxError,
    tokenize.TokenError,
  ) as error:
    if os_errors.is_of_store(error):
      raise
    reason = os_errors.first_line(error)
    raise ValueError(
      f'{path} is not the index of a shard ({reason}); {remedy}'
    ) from error
  num_rows = index.shape[0] if num_examples is None else num_examples
  expected = (num_rows, num_columns)
  if index.dtype != np.uint32 or index.shape != expected:
    raise ValueError(
      f'{path} has {index.dtype}{list(index.shape)}, expected uint32'
      f'{list(expected)}; {remedy}'
    )
  return index


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCache:
  """A complete cache.

  Attributes:
    folder: folder of the cache.
    content: content of `cache.json`, without its digest.
  """

  folder: pathlib.Path
  content: Mapping[str, Any]
  _splits: dict[tuple[str, str], Split] = dataclasses.field(
    default_factory=dict, init=False, repr=False
  )

  @property
  def key(self) -> Mapping[str, Any]:
    """Everything that determines the examples; see `caching.cache_key`."""
    return self.content['key']

  @property
  def dtype(self) -> str:
    """Dtype of the ids."""
    return self.content['dtype']

  @property
  def digest(self) -> str:
    """Digest of all examples, from the digests of the indexes.

    It does not depend on the format version.
    """
    digests = {
      task: {
        name: split['index_digests']
        for name, split in content['splits'].items()
      }
      for task, content in self.tasks.items()
    }
    return integrity.seal(digests)[integrity.DIGEST]

  @property
  def tasks(self) -> Mapping[str, Any]:
    """Per task: `splits`, `columns` of text, and `metrics`."""
    return self.content['tasks']

  @property
  def rates(self) -> Mapping[str, float]:
    """Mixture rate of each task; unused for a single task."""
    return self.content['rates']

  @property
  def splits(self) -> list[str]:
    """Splits of any of the tasks, sorted."""
    names = {name for task in self.tasks.values() for name in task['splits']}
    return sorted(names)

  def split(self, task: str, split: str) -> Split:
    """Returns the examples of a task's split, the same object every time.

    Raises:
      ValueError: if the cache has no such split.
    """
    splits = self.tasks[task]['splits'] if task in self.tasks else {}
    if split not in splits:
      found = '; '.join(
        f'{name}: {", ".join(content["splits"])}'
        for name, content in self.tasks.items()
      )
      raise ValueError(
        f'{self.folder} has no split {split!r} of task {task!r}; it has '
        f'{found}.'
      )
    return self._splits.setdefault(
      (task, split),
      Split(self.folder, task, split, splits[split], self.dtype),
    )


def open_cache(folder: str | os.PathLike[str]) -> TokenCache:
  """Opens a cache; reads only `cache.json`.

  Raises:
    FileNotFoundError: if the cache is missing or incomplete.
    ValueError: if it is damaged or of another format.
  """
  folder = files.folder(os.fspath(folder), 'CACHE_DIR')
  path = folder / FILE
  remedy = 'copy the cache again, or remove this file and cache again.'
  if not path.exists():
    begun = folder.is_dir() and any(folder.iterdir())
    state = 'is not complete' if begun else 'is not a cache'
    raise FileNotFoundError(
      f'CACHE_DIR={folder} {state}: it has no {FILE}, which is written when '
      f'all shards are complete. Run `{console.name()} cache` with this '
      f'CACHE_DIR{" to resume" if begun else ""}.'
    )
  return TokenCache(folder, read_description(path, remedy))


def read_description(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Reads `cache.json`, or the plan of a cache, in the current format.

  Args:
    path: path of the file.
    remedy: advice for a broken file, as for `files.read_json`.

  Raises:
    ValueError: if the file is damaged, has unknown keys, or was written by a
      newer version.
  """
  description = run_format.read_sealed(
    FILE, path, keys=_KEYS, known=_known, remedy=remedy
  )
  for name in description['tasks']:
    if not files.is_file_name(name):  # Evaluations have files of this name.
      raise ValueError(
        f'{path} has the task {name[:200]!r}, which cannot be part of a file '
        f'name; {remedy}'
      )
  return description


def _is_counted(counts: Any, digests: Any, num_examples: Any) -> bool:
  return (
    isinstance(counts, list)
    and isinstance(digests, list)
    and all(type(count) is int and count >= 0 for count in counts)
    and all(isinstance(digest, str) for digest in digests)
    and len(counts) == len(digests)
    and num_examples == sum(counts)
  )


def _known(description: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the known keys of a description with its tasks and splits."""
  known: dict[str, Any] = dict.fromkeys((*_KEYS, 'written_by'))
  known['tasks'] = {
    task: {
      'splits': dict.fromkeys(of_task.get('splits', ()), _OF_SPLIT),
      'columns': None,
      'metrics': None,
    }
    for task, of_task in description['tasks'].items()
  }
  return known
