# SPDX-License-Identifier: Apache-2.0
"""The feature format: the frozen LLM's last states beside a cache's tokens.

    features.json   description with the LLM's fingerprint and the tokens'
                    digest; written last, so it marks complete features
    TASK/SPLIT/00000-of-00002.features.array_record
                    one record per example, in the order of the token shard
    TASK/SPLIT/00000-of-00002.features.index.npy
                    [n, 2] uint32: tokens, XXH32 of the record

A record holds the states of a prompt's real tokens, one row per token, as in
`models/stored_states.py`: bfloat16; or int8, after one float32 scale per row.
All numbers are little-endian. Records are not compressed: zstd saves a fifth of
bfloat16 but makes reading three times as slow. The required disk space is thus
known in advance.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from l2s_jax.data.cached import cache_format
from l2s_jax.runtime import console, integrity
from l2s_jax.weights import run_format

FILE = run_format.FEATURES
KIND = '.features'
# Value of `layer` in the key for the last encoder layer.
LAST = 'last'
WRITER_OPTIONS = 'group_size:1,uncompressed'
# Measured overhead of a shard in bytes: per record, per shard, and one byte per
# 1000 of its states.
RECORD_BYTES = 100
SHARD_BYTES = 128 * 1024
BLOCK_HEADERS = 1000

_DTYPES: dict[str, Any] = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'int8': np.dtype(np.int8),
}
_SCALES = np.dtype('<f4')
# Keys of `features.json` beside `tasks`, and of its plan.
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
  """The LLM states of a prompt.

  Attributes:
    rows: [tokens, llm_embed], bfloat16 or int8.
    scales: [tokens] float32 factors of the int8 rows; None for bfloat16.
  """

  rows: np.ndarray
  scales: np.ndarray | None

  def cut(self, length: int) -> 'States':
    """Returns the states of the first `length` tokens."""
    scales = None if self.scales is None else self.scales[:length]
    return States(self.rows[:length], scales)


def token_bytes(dtype: str, width: int) -> int:
  """Returns the size of one token's states, in bytes."""
  return width * _DTYPES[dtype].itemsize + (
    _SCALES.itemsize if dtype == 'int8' else 0
  )


def encode(states: States) -> bytes:
  """Returns the record of a prompt's states."""
  rows = np.ascontiguousarray(states.rows).view(np.uint8).tobytes()
  if states.scales is None:
    return rows
  return states.scales.astype(_SCALES).tobytes() + rows


def decode(record: bytes, dtype: str, width: int) -> States:
  """Returns the states in a record, as views of its memory."""
  num_tokens = len(record) // token_bytes(dtype, width)
  scales = None
  if dtype == 'int8':
    scales = np.frombuffer(record, _SCALES, num_tokens)
  offset = 0 if scales is None else scales.nbytes
  # `frombuffer` does not support bfloat16.
  rows = np.frombuffer(record, np.uint8, offset=offset).view(_DTYPES[dtype])
  return States(rows.reshape(num_tokens, width), scales)


def lay_out(
  states: Sequence[States],
  segment_ids: np.ndarray,
  rows: Sequence[int] | np.ndarray,
  *,
  like: 'Features | FeatureCache',
) -> dict[str, np.ndarray]:
  """Builds the batch arrays of LLM states (`models/stored_states.py`).

  Args:
    states: states of each example, one row per prompt token.
    segment_ids: [rows, length] ids that number the examples of a row from 1.
    rows: row of each example. The examples of a row are in row order.
    like: object with the dtype and width of the states.

  Raises:
    ValueError: if a row has more or fewer states than prompt tokens.
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
      f'row {row} has {int((segment_ids[row] > 0).sum())} prompt tokens, but '
      f'its features are of {starts[row]}: they do not belong to the tokens of '
      f'this cache; remove {FILE} and {_AGAIN}.'
    )
  return batch


class Features(cache_format.Split):
  """The features of a split by example number.

  Attributes:
    width: width of the LLM's states.
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
    """Stores the locations of the shards; see `cache_format.Split`."""
    super().__init__(folder, task, split, content, dtype)
    self.width = width

  def _check_lengths(
    self, record: bytes, entry: np.ndarray, shard: int, place: int
  ) -> None:
    """Does nothing: `lay_out` compares the lengths with the tokens'."""

  def decode(self, record: bytes) -> States:
    """Returns the states in a record."""
    return decode(record, self.dtype, self.width)

  def states(self, numbers: Sequence[int] | np.ndarray) -> list[States]:
    """Returns the states of examples by number.

    Raises:
      IndexError: if there is no such example.
      ValueError: naming shard and place of a damaged record.
    """
    return [self.decode(record) for record in self.read(numbers)]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureCache:
  """The features of a complete cache.

  Attributes:
    folder: folder of the cache.
    content: content of `features.json`, without its digest.
  """

  folder: pathlib.Path
  content: Mapping[str, Any]
  _splits: dict[tuple[str, str], Features] = dataclasses.field(
    default_factory=dict, init=False, repr=False
  )

  @property
  def dtype(self) -> str:
    """Dtype of the states: 'bfloat16' or 'int8'."""
    return self.content['dtype']

  @property
  def width(self) -> int:
    """Width of the LLM's states."""
    return self.content['width']

  @property
  def llm_fingerprint(self) -> str:
    """Fingerprint of the LLM that computed the states."""
    return self.content['key']['llm_fingerprint']

  @property
  def layer(self) -> int | None:
    """Number of LLM layers below the states; None: all."""
    layer = self.content['key']['layer']
    return None if layer == LAST else layer

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    """Tokens in front of every prompt, in the LLM's input."""
    return tuple(self.content['key'].get('prefix_ids', ()))

  @property
  def bidirectional(self) -> bool:
    """Whether a decoder-only LLM used bidirectional attention on prompts.

    False for encoders.
    """
    return self.content['key'].get('bidirectional', False)

  def split(self, task: str, split: str) -> Features:
    """Returns the features of a task's split, the same object every time."""
    content = self.content['tasks'][task]['splits'][split]
    return self._splits.setdefault(
      (task, split),
      Features(self.folder, task, split, content, self.dtype, self.width),
    )

  def check_length(self, task: str, split: str, prompt_length: int) -> None:
    """Refuses a maximum prompt length other than that of the cached states.

    The states of a prompt depend on the place of the cut. Another length is
    accepted if neither length cuts a prompt of the split.

    Args:
      task: name of the task.
      split: name of its split.
      prompt_length: maximum prompt length of the run, in tokens.

    Raises:
      ValueError: with both lengths.
    """
    cut_to = self.content['prompt_length']
    longest = self.content['tasks'][task]['splits'][split]['longest_prompt']
    if prompt_length != cut_to and longest > min(prompt_length, cut_to):
      raise ValueError(
        f"TASK_FEATURE_LENGTHS has 'inputs': {prompt_length}, but the features "
        f'of {self.folder / FILE} are of prompts truncated to {cut_to} tokens, '
        f'and the longest prompt of task {task!r}, split {split!r}, has '
        f"{longest}. Features depend on the truncation. Set 'inputs' to "
        f'{cut_to}, or make features for {prompt_length} in another CACHE_DIR.'
      )


def open_features(cache: cache_format.TokenCache) -> FeatureCache:
  """Opens the features of a cache; reads only `features.json`.

  Raises:
    FileNotFoundError: if the features are missing or incomplete.
    ValueError: if they belong to another cache, are damaged, or of another
      format.
  """
  path = cache.folder / FILE
  if not path.exists():
    raise FileNotFoundError(
      f'CACHE_DIR={cache.folder} has no features: it has no {FILE}, which is '
      f'written when all features are complete. Run `{console.name()} cache '
      '--features` with this CACHE_DIR (an interrupted command resumes), or '
      'set USE_FEATURES=False.'
    )
  kept = read_description(path, f'remove it and {_AGAIN}.')
  if kept['key'].get('tokens') != cache.digest:
    raise ValueError(
      f'{path} has the features of other tokens than {cache_format.FILE}: the '
      f'digest of the tokens is {kept["key"].get("tokens")}, expected '
      f'{cache.digest}. Remove it and all *{KIND}.* files in its folder, and '
      f'{_AGAIN}.'
    )
  return FeatureCache(cache.folder, kept)


def read_description(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Reads `features.json`, or the plan of features, in the current format.

  Args:
    path: path of the file.
    remedy: advice for a broken file, as for `files.read_json`.

  Raises:
    ValueError: if the file is damaged, has unknown keys, or was written by a
      newer version.
  """
  known = dict.fromkeys((*_KEYS, 'written_by', 'tasks'))
  return run_format.read_sealed(
    FILE, path, keys=_KEYS, known=lambda found: known, remedy=remedy
  )
