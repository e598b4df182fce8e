# SPDX-License-Identifier: Apache-2.0
"""The files of features: the frozen LLM's last states beside a cache's tokens.

    features.json   of which LLM and cache they are; written last: without it
                    there are none
    TASK/SPLIT/00000-of-00002.features.array_record
                    one record an example, in the order of the tokens' shard
    TASK/SPLIT/00000-of-00002.features.index.npy
                    [n, 2] uint32: tokens, XXH32 of the record

A record has the states of the real tokens of a prompt, one row a token, as
`models/stored_states.py` has them: bfloat16; or int8, and before the rows a
float32 for each, by which it is multiplied. All is little-endian. Nothing is
compressed: zstd takes a fifth off bfloat16, and a record then three times as
long to read; and so what disk is needed is known before anything is made.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from l2s_jax.data.cached import cache_format
from l2s_jax.runtime import integrity
from l2s_jax.weights import run_format

FILE = run_format.FEATURES
KIND = '.features'
# As the layer of the key: of the encoder as it ends.
LAST = 'last'
WRITER_OPTIONS = 'group_size:1,uncompressed'
# What a shard takes beyond its states: for each record and in all, and of all
# of it once more one in so many bytes. Measured.
RECORD_BYTES = 100
SHARD_BYTES = 128 * 1024
BLOCK_HEADERS = 1000

_DTYPES: dict[str, Any] = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'int8': np.dtype(np.int8),
}
_SCALES = np.dtype('<f4')
# What `features.json` has, beside its tasks, and its plan.
_KEYS: dict[str, Any] = {
  'format_version': int,
  'key': dict,
  'dtype': str,
  'width': int,
  'prompt_length': int,
  integrity.DIGEST: str,
}
_AGAIN = 'run `cache --features` again'


class States(NamedTuple):
  """What the LLM has made of a prompt.

  Attributes:
    rows: [tokens, llm_embed], bfloat16 or int8.
    scales: [tokens] float32, by which rows in int8 are multiplied; else None.
  """

  rows: np.ndarray
  scales: np.ndarray | None

  def cut(self, length: int) -> 'States':
    """Returns those of the first tokens."""
    scales = None if self.scales is None else self.scales[:length]
    return States(self.rows[:length], scales)


def token_bytes(dtype: str, width: int) -> int:
  """Returns the bytes that the states of a token take."""
  return width * _DTYPES[dtype].itemsize + (
    _SCALES.itemsize if dtype == 'int8' else 0
  )


def encode(states: States) -> bytes:
  """Returns the record of a prompt."""
  rows = np.ascontiguousarray(states.rows).view(np.uint8).tobytes()
  if states.scales is None:
    return rows
  return states.scales.astype(_SCALES).tobytes() + rows


def decode(record: bytes, dtype: str, width: int) -> States:
  """Returns the states in a record; they share its memory."""
  num_tokens = len(record) // token_bytes(dtype, width)
  scales = None
  if dtype == 'int8':
    scales = np.frombuffer(record, _SCALES, num_tokens)
  offset = 0 if scales is None else scales.nbytes
  # NumPy reads no buffer as bfloat16.
  rows = np.frombuffer(record, np.uint8, offset=offset).view(_DTYPES[dtype])
  return States(rows.reshape(num_tokens, width), scales)


def lay_out(
  states: Sequence[States],
  segment_ids: np.ndarray,
  rows: Sequence[int] | np.ndarray,
  *,
  like: 'Features | FeatureCache',
) -> dict[str, np.ndarray]:
  """Returns the batch keys that `models/stored_states.py` defines.

  Args:
    states: of each example, as many as its row has tokens of it.
    segment_ids: [rows, length], which number the examples of a row from 1.
    rows: of each example, in the order in which they stand in the row.
    like: has dtype and width.
  """
  batch = {
    'llm_states': np.zeros(
      (*segment_ids.shape, like.width), _DTYPES[like.dtype]
    )
  }
  if like.dtype == 'int8':
    batch['llm_state_scales'] = np.zeros(segment_ids.shape, np.float32)
  starts = np.zeros(len(segment_ids), np.int64)
  for row, each in zip(rows, states, strict=True):
    place = row, slice(starts[row], starts[row] + len(each.rows))
    batch['llm_states'][place] = each.rows
    if each.scales is not None:
      batch['llm_state_scales'][place] = each.scales
    starts[row] += len(each.rows)
  if (starts != (segment_ids > 0).sum(axis=1)).any():
    row = int((starts != (segment_ids > 0).sum(axis=1)).argmax())
    raise ValueError(
      f'row {row} has {int((segment_ids[row] > 0).sum())} prompt tokens and '
      f'the states of {starts[row]}: features and tokens are not of one cache; '
      f'remove {FILE} and {_AGAIN}.'
    )
  return batch


class Features(cache_format.Split):
  """The features of a split by the numbers of its examples.

  Attributes:
    width: of the LLM's states.
  """

  _kind = KIND
  _num_columns = 2
  _file = FILE
  _again = _AGAIN
  _remedy = f'remove {FILE} and {_AGAIN}: the other shards are kept.'

  def __init__(
    self,
    folder: pathlib.Path,
    task: str,
    split: str,
    content: Mapping[str, Any],
    dtype: str,
    width: int,
  ):
    """Keeps where the shards are; see `cache_format.Split`."""
    super().__init__(folder, task, split, content, dtype)
    self.width = width

  def decode(self, record: bytes) -> States:
    """Returns the states in a record."""
    return decode(record, self.dtype, self.width)

  def states(self, numbers: Sequence[int] | np.ndarray) -> list[States]:
    """Returns the states of examples by their numbers.

    Raises:
      IndexError: if there is no such example.
      ValueError: naming shard and place of a record that is not as written.
    """
    return [self.decode(record) for record in self.read(numbers)]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureCache:
  """The features of a whole cache.

  Attributes:
    folder: of the cache.
    content: what `features.json` holds, without its digest.
  """

  folder: pathlib.Path
  content: Mapping[str, Any]
  _splits: dict[tuple[str, str], Features] = dataclasses.field(
    default_factory=dict, init=False, repr=False
  )

  @property
  def dtype(self) -> str:
    """Of the states: 'bfloat16' or 'int8'."""
    return self.content['dtype']

  @property
  def width(self) -> int:
    """Of the LLM's states."""
    return self.content['width']

  @property
  def llm_fingerprint(self) -> str:
    """Of the LLM that has read the prompts."""
    return self.content['key']['llm_fingerprint']

  @property
  def layer(self) -> int | None:
    """After how many of its layers the LLM's states were taken; None: all."""
    layer = self.content['key']['layer']
    return None if layer == LAST else layer

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    """The tokens that the LLM has read in front of every prompt."""
    return tuple(self.content['key'].get('prefix_ids', ()))

  @property
  def bidirectional(self) -> bool:
    """Whether a decoder-only LLM has read prompts so; False of an encoder."""
    return self.content['key'].get('bidirectional', False)

  def split(self, task: str, split: str) -> Features:
    """Returns the features of a task's split, the same object every time."""
    content = self.content['tasks'][task]['splits'][split]
    return self._splits.setdefault(
      (task, split),
      Features(self.folder, task, split, content, self.dtype, self.width),
    )

  def check_length(self, task: str, split: str, prompt_length: int) -> None:
    """Refuses a split whose prompts the LLM has read with another end.

    Args:
      task: its name.
      split: of it.
      prompt_length: tokens to which prompts are to be cut.

    Raises:
      ValueError: with both lengths.
    """
    cut_to = self.content['prompt_length']
    longest = self.content['tasks'][task]['splits'][split]['longest_prompt']
    if prompt_length != cut_to and longest > min(prompt_length, cut_to):
      raise ValueError(
        f"TASK_FEATURE_LENGTHS has 'inputs': {prompt_length}, but the LLM has "
        f'read the prompts of {self.folder / FILE} cut to {cut_to} tokens, and '
        f'the longest of task {task!r}, split {split!r}, has {longest}: what '
        'it makes of one depends on where it is cut. Set them to '
        f'{cut_to}, or make features for {prompt_length} in another CACHE_DIR.'
      )


def open_features(cache: cache_format.TokenCache) -> FeatureCache:
  """Opens the features of a cache; reads nothing but `features.json`.

  Raises:
    FileNotFoundError: if there are none, or not all.
    ValueError: if they are of another cache, damaged, or of another format.
  """
  path = cache.folder / FILE
  if not path.exists():
    raise FileNotFoundError(
      f'CACHE_DIR={cache.folder} has no features: there is no {FILE}, which is '
      'written when all of them are there. Run `python -m l2s_jax cache '
      '--features` with the same CACHE_DIR, which goes on where it was '
      'stopped; or set USE_FEATURES=False.'
    )
  kept = read_description(path, f'remove it and {_AGAIN}.')
  if kept['key'].get('tokens') != cache.digest:
    raise ValueError(
      f'{path} has the features of other tokens than {cache_format.FILE} '
      f'names: their digest is {kept["key"].get("tokens")}, that of '
      f'{cache_format.FILE} is {cache.digest}. Remove it and all '
      f'*{KIND}.* files beside it, and {_AGAIN}.'
    )
  return FeatureCache(cache.folder, kept)


def read_description(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Returns what `features.json` holds, or the plan of it, in today's format.

  Args:
    path: of the file.
    remedy: for one that is broken, as `files.read_json` takes it.

  Raises:
    ValueError: if it is damaged, a newer version wrote it, or it has what this
      version does not know.
  """
  known = dict.fromkeys((*_KEYS, 'written_by', 'tasks'))
  return run_format.read_sealed(
    FILE, path, keys=_KEYS, known=lambda found: known, remedy=remedy
  )
