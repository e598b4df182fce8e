# SPDX-License-Identifier: Apache-2.0
"""The files of a cache: a task's examples as token ids, with random access.

A cache is a folder:

    cache.json      what was cached, of what; written last: without it there is
                    no cache
    TASK/SPLIT/00000-of-00002.array_record
                    one record an example, in the task's own order
    TASK/SPLIT/00000-of-00002.index.npy
                    [n, 3] uint32: tokens of the prompt, tokens of the answer
                    (both with EOS, before cutting), XXH32 of the record

A record is two uint32, the numbers of tokens of prompt and answer, then the ids
of both, then its columns of text as JSON in UTF-8. Ids are uint16 where both
vocabularies have at most 65,536, else uint32; all is little-endian.

Neither TensorFlow nor SeqIO is imported. What makes a cache is in
`cache_writer.py`.
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
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from array_record.python import array_record_module

from l2s_jax.runtime import files, integrity, os_errors
from l2s_jax.weights import run_format

FILE = run_format.CACHE
# A group of one record is the unit of reading: no neighbour is unpacked. So
# records of 300 bytes and of 4 KiB take 2 and 9 us to write, and 356 and 2,470
# bytes; by zstd, which earlier caches have, 7 and 17 us, and 336 and 1,810.
WRITER_OPTIONS = 'group_size:1,snappy'
# One record after another, with small buffers, a core reads 60 tokens in 5 us;
# with `read` of a list of 32, which has threads of its own, in 23 us, and with
# buffers of 1 MiB in 50 us.
READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
_READER_BUFFER_BYTES = 4096
_HEADER = struct.Struct('<II')
# From lists, `array` is three times as fast as NumPy.
_TYPECODES = {'uint16': 'H', 'uint32': 'I'}
_DTYPES: dict[str, Any] = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(',', ':'))
# What `cache.json` has, and of it each split.
_KEYS: dict[str, Any] = {
  'format_version': int,
  'key': dict,
  'dtype': str,
  'tasks': dict,
  'rates': dict,
  integrity.DIGEST: str,
}
_OF_SPLIT = dict.fromkeys(('num_examples', 'shards', 'index_digests'))
_REMEDY = 'it is part of no whole cache: remove the folder and cache again.'


def id_dtype(*vocab_sizes: int) -> str:
  """Returns the type of the ids of vocabularies: 'uint16' or 'uint32'."""
  return 'uint16' if max(vocab_sizes) <= 1 << 16 else 'uint32'


def encode(
  prompt: Sequence[int] | np.ndarray,
  answer: Sequence[int] | np.ndarray,
  texts: Mapping[str, Any],
  dtype: str,
) -> bytes:
  """Returns the record of an example; the arguments are `encode_all`'s."""
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
    columns: for people and for scores, as JSON has them. Bytes that are no
      UTF-8 are kept as Python's surrogate escapes.
    dtype: of ids, from `id_dtype`.
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
  """Returns the object of each row; an encoder for each would take longer."""
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
  """Returns the ids of prompt and answer; they share the record's memory."""
  num_prompt, num_answer = _HEADER.unpack_from(record)
  ids = np.frombuffer(
    record, _DTYPES[dtype], num_prompt + num_answer, _HEADER.size
  )
  return ids[:num_prompt], ids[num_prompt:]


def decode_texts(record: bytes, dtype: str) -> dict[str, Any]:
  """Returns the columns of text of a record."""
  num_ids = sum(_HEADER.unpack_from(record))
  text = record[_HEADER.size + num_ids * np.dtype(dtype).itemsize :]
  return json.loads(text.decode('utf-8', 'surrogatepass'))


def checksum(record: bytes) -> int:
  """Returns the checksum that the index has of a record."""
  return xxhash.xxh32_intdigest(record)


def index_digest(index: np.ndarray) -> str:
  """Returns the digest that `cache.json` has of a shard's index."""
  return integrity.digest(index)


def folder_name(name: str) -> str:
  """Returns the name of the folder of a task or a split."""
  quoted = urllib.parse.quote(name, safe=' =,+[]')
  return f'%2E{quoted[1:]}' if quoted.startswith('.') else quoted


def shard_path(folder: pathlib.Path, shard: int, num_shards: int) -> str:
  """Returns the path of a shard without its ending.

  Args:
    folder: of the split.
    shard: from 0.
    num_shards: of the split.
  """
  return str(folder / f'{shard:05d}-of-{num_shards:05d}')


class Split:
  """The examples of a split by their numbers, in the task's own order.

  Reading is safe from several threads. Pickles carry the place, not what is
  open. A subclass has other files of the same examples.

  Attributes:
    task: its name.
    split: its name.
    num_examples: in all shards.
    dtype: of ids.
  """

  # Before the endings of its files, and in its index.
  _kind = ''
  _num_columns = 3
  # What names its shards, and makes them.
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
    """Keeps where the shards are; each is opened when first read.

    Args:
      folder: of the cache.
      content: what `cache.json` has of the split.
    """
    self.task = task
    self.split = split
    self.num_examples: int = content['num_examples']
    self.dtype = dtype
    self._folder = folder / folder_name(task) / folder_name(split)
    self._counts: list[int] = content['shards']
    self._digests: list[str] = content['index_digests']
    self._starts = np.cumsum([0, *self._counts])
    self._set_closed()

  def reopened(self) -> 'Split':
    """Returns the same examples with readers of their own, for a thread."""
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
    """Returns records by their numbers, in the order asked for.

    Raises:
      IndexError: if there is no such example.
      ValueError: naming shard and place of a record that is not as written.
    """
    shards, places = self._places(numbers)
    with self._lock:  # A reader has one place in its file.
      return [
        self._record(shard, place)
        for shard, place in zip(shards.tolist(), places.tolist(), strict=True)
      ]

  def lengths_of(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns [n, 2] uint32, the lengths of examples by their numbers."""
    shards, places = self._places(numbers)
    lengths = np.zeros((len(numbers), 2), np.uint32)
    # Those of a shard stand together: there may be many shards.
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
    """Returns the shards of examples, and their places there, from 0.

    Raises:
      IndexError: if there is no such example.
    """
    wanted = np.asarray(numbers, np.int64)
    outside = wanted[(wanted < 0) | (wanted >= self.num_examples)]
    if len(outside):
      raise IndexError(
        f'example {outside[0]} of {self.task!r}, split {self.split!r}, which '
        f'has {self.num_examples}.'
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
    if checksum(record) != self._index(shard)[place, -1]:
      raise ValueError(self._damage(shard, place, 'its checksum differs'))
    return record

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
        if not os.path.exists(path):
          raise FileNotFoundError(
            f'{path}: no such file, but {self._file} names it. Copy the cache '
            f'again, or remove {self._file} and {self._again}: the other '
            'shards are kept.'
          )
        reader = array_record_module.ArrayRecordReader(
          path, READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
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
            f'{path} is damaged: its digest is not that of {self._file}. '
            f'Remove it and {self._file}, and {self._again}: the other shards '
            'are kept.'
          )
        self._indexes[shard] = np.asarray(index)  # A memmap is slow to index.
      return self._indexes[shard]


def load_index(
  path: str,
  num_examples: int | None = None,
  num_columns: int = 3,
  remedy: str = _REMEDY,
) -> np.ndarray:
  """Returns the index of a shard, [n, columns] uint32.

  Args:
    path: of the file.
    num_examples: that it must have; None: any number.
    num_columns: that it must have.
    remedy: what the user can do, for errors.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, if it is not such an index.
  """
  try:
    index = np.load(path, mmap_mode='r', allow_pickle=False)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{path}: no such file; {remedy}') from error
  except (ValueError, EOFError, OSError) as error:
    reason = os_errors.first_line(error)
    raise ValueError(
      f'{path} is no index of a shard ({reason}); {remedy}'
    ) from error
  num_rows = index.shape[0] if num_examples is None else num_examples
  expected = (num_rows, num_columns)
  if index.dtype != np.uint32 or index.shape != expected:
    raise ValueError(
      f'{path} holds {index.dtype}{list(index.shape)}, expected uint32'
      f'{list(expected)}; {remedy}'
    )
  return index


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCache:
  """A whole cache.

  Attributes:
    folder: where it is.
    content: what `cache.json` holds, without its digest.
  """

  folder: pathlib.Path
  content: Mapping[str, Any]
  _splits: dict[tuple[str, str], Split] = dataclasses.field(
    default_factory=dict, init=False, repr=False
  )

  @property
  def key(self) -> Mapping[str, Any]:
    """All that the examples were made from."""
    return self.content['key']

  @property
  def dtype(self) -> str:
    """The type of ids."""
    return self.content['dtype']

  @property
  def digest(self) -> str:
    """Of its examples, by the digests of their indexes; in any format."""
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
    """What there is of each task: `splits`, `columns` of texts, `metrics`."""
    return self.content['tasks']

  @property
  def rates(self) -> Mapping[str, float]:
    """The rate of each task; of a single one it means nothing."""
    return self.content['rates']

  @property
  def splits(self) -> list[str]:
    """Those that any of the tasks has."""
    names = {name for task in self.tasks.values() for name in task['splits']}
    return sorted(names)

  def split(self, task: str, split: str) -> Split:
    """Returns the examples of a task's split, the same object every time.

    Raises:
      ValueError: if the cache has none of that name.
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
  """Opens a cache; reads nothing but `cache.json`.

  Raises:
    FileNotFoundError: if there is none, or none that is complete.
    ValueError: if it is damaged or of another format.
  """
  folder = files.local_folder(os.fspath(folder), 'CACHE_DIR')
  path = folder / FILE
  remedy = 'copy the cache again, or remove this file and cache again.'
  if not path.exists():
    begun = folder.is_dir() and any(folder.iterdir())
    state = 'is not complete' if begun else 'is no cache'
    raise FileNotFoundError(
      f'CACHE_DIR={folder} {state}: there is no {FILE}, which is written when '
      'all shards are there. Run `python -m l2s_jax cache` with the same '
      f'CACHE_DIR{" again: it goes on" if begun else ""}.'
    )
  return TokenCache(folder, read_description(path, remedy))


def read_description(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Returns what `cache.json` holds, or the plan of one, in today's format.

  Args:
    path: of the file.
    remedy: for one that is broken, as `files.read_json` takes it.

  Raises:
    ValueError: if it is damaged, a newer version wrote it, or it has what this
      version does not know.
  """
  return run_format.read_sealed(
    FILE, path, keys=_KEYS, known=_known, remedy=remedy
  )


def _known(description: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a description may hold, by the tasks and splits it has."""
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
