# SPDX-License-Identifier: Apache-2.0
"""Packing: assigns examples to rows and lays out packed rows.

Packing is for training alone; evaluation and generation have one prompt per
row. The model separates the examples of a row by their segment ids.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer

TokenIds = Sequence[int] | Integer[np.ndarray, '_']  # any length
Rows = Sequence[int] | Int[np.ndarray, ' examples']

# Number of examples packed together. Multi30K captions in rows of 64 + 64
# tokens fill 84 % of the slots with windows of 64 examples, 87 % with 1024, and
# no more with 4096.
WINDOW = 1024


def first_fit(
  sizes: Int[np.ndarray, 'examples features'], room: Sequence[int]
) -> Int[np.ndarray, ' examples']:
  """Assigns each example to the first row with room for it.

  With rows of (5, 6) tokens, examples of [3, 2], [3, 4], [2, 1] and [1, 1] go
  to rows [0, 1, 0, 1].

  Args:
    sizes: tokens of each example's features, such as prompt and answer.
    room: row length of each feature, in tokens.

  Raises:
    ValueError: for an example longer than a row.
  """
  too_long = sizes[(sizes > room).any(axis=1)]
  if len(too_long):
    raise ValueError(
      f'an example of {too_long[0].tolist()} tokens does not fit into a row of '
      f'{list(room)}; truncate examples before packing.'
    )
  free = np.tile(room, (len(sizes), 1))
  rows = np.zeros(len(sizes), np.int64)
  num_rows = 0
  for example, size in enumerate(sizes):
    # Includes one more row, an empty one.
    row = int((free[: num_rows + 1] >= size).all(axis=1).argmax())
    free[row] -= size
    rows[example] = row
    num_rows = max(num_rows, row + 1)
  return rows


def first_fit_of_windows(
  sizes: Int[np.ndarray, 'windows examples features'], room: Sequence[int]
) -> Int[np.ndarray, 'windows examples']:
  """Computes `first_fit` for each of several windows.

  All windows are filled in parallel, because a NumPy step takes little longer
  for many windows than for one: for captions in rows of 64 + 64, a core plans
  95,000 examples per second one window at a time, and 1,000,000 with 64
  windows.

  Args:
    sizes: tokens of each example's features, none larger than `room`.
    room: row length of each feature, in tokens.
  """
  num_windows, num_examples, _ = sizes.shape
  sizes = np.ascontiguousarray(sizes.transpose(1, 2, 0), np.int32)[..., None]
  free = [
    np.full((num_windows, num_examples), length, np.int32) for length in room
  ]
  rows = np.zeros((num_examples, num_windows), np.int64)
  windows = np.arange(num_windows)
  num_rows = 0
  for example, size in enumerate(sizes):
    has_room = np.ones((num_windows, num_rows + 1), bool)
    # Includes one more row, an empty one.
    for feature, length in zip(free, size, strict=True):
      has_room &= feature[:, : num_rows + 1] >= length
    row = has_room.argmax(axis=1)
    for feature, length in zip(free, size, strict=True):
      feature[windows, row] -= length[:, 0]
    rows[example] = row
    num_rows = max(num_rows, int(row.max()) + 1)
  return rows.T


def fill(
  sequences: Sequence[TokenIds],
  rows: Rows,
  *,
  length: int,
  pad_id: int,
) -> tuple[Int32[np.ndarray, 'rows length'], Int32[np.ndarray, 'rows length']]:
  """Returns packed tokens, and segment ids that number a row's examples from 1.

  Sequences [5, 1], [6, 7, 1] and [8, 1] in rows 0, 1 and 0 of 5 tokens, with
  pad 0, make

      [[5, 1, 8, 1, 0],  and  [[1, 1, 2, 2, 0],
       [6, 7, 1, 0, 0]]        [1, 1, 1, 0, 0]]

  Args:
    sequences: token ids of each example.
    rows: row of each example, as from `first_fit`.
    length: row length, in tokens.
    pad_id: pad id of the vocabulary.

  Raises:
    ValueError: if the examples of a row exceed its length.
  """
  places = np.asarray(rows, np.int64)
  sizes = np.fromiter(map(len, sequences), np.int64, len(places))
  # Sorts examples by row; computes each one's offset and number in its row.
  order = np.argsort(places, kind='stable')
  places, sizes = places[order], sizes[order]
  ends = np.cumsum(sizes)
  is_first = np.diff(places, prepend=-1) > 0
  firsts = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
  starts = ends - sizes - (ends - sizes)[firsts]
  numbers = np.arange(len(places)) - firsts + 1
  if (starts + sizes > length).any():
    row = int(places[(starts + sizes > length).argmax()])
    raise ValueError(
      f'row {row} has {int(sizes[places == row].sum())} tokens, but the row '
      f'length is {length}; truncate examples before packing.'
    )
  tokens = np.full((int(places[-1]) + 1, length), pad_id, np.int32)
  segment_ids = np.zeros_like(tokens)
  slots = np.arange(ends[-1]) + np.repeat(
    places * length + starts - (ends - sizes), sizes
  )
  tokens.reshape(-1)[slots] = np.concatenate(
    [sequences[example] for example in order], dtype=np.int32, casting='unsafe'
  )
  segment_ids.reshape(-1)[slots] = np.repeat(numbers, sizes)
  return tokens, segment_ids


def lay_out(
  prompts: Sequence[TokenIds],
  answers: Sequence[TokenIds],
  rows: Rows,
  *,
  task_feature_lengths: Mapping[str, int],
  prompt_pad_id: int,
  answer_pad_id: int,
  start_id: int,
) -> dict[
  str, Int32[np.ndarray, 'rows length'] | Float32[np.ndarray, 'rows length']
]:
  """Builds a batch from examples and their rows.

  Args:
    prompts: token ids with EOS, none longer than its row.
    answers: the same for the answers, one per prompt.
    rows: row of each example.
    task_feature_lengths: row lengths of `inputs` and `targets`, in tokens.
    prompt_pad_id: pad id of the prompt vocabulary.
    answer_pad_id: pad id of the answer vocabulary.
    start_id: start token of each answer.
  """
  prompt_tokens, prompt_segment_ids = fill(
    prompts,
    rows,
    length=task_feature_lengths['inputs'],
    pad_id=prompt_pad_id,
  )
  answer_tokens, segment_ids = fill(
    answers,
    rows,
    length=task_feature_lengths['targets'],
    pad_id=answer_pad_id,
  )
  # Shifts right by one within each example.
  tokens_before, ids_before = (
    np.pad(x[:, :-1], ((0, 0), (1, 0))) for x in (answer_tokens, segment_ids)
  )
  input_tokens = np.where(segment_ids == ids_before, tokens_before, start_id)
  input_tokens = np.where(segment_ids > 0, input_tokens, answer_pad_id)
  return {
    'encoder_input_tokens': prompt_tokens,
    'encoder_segment_ids': prompt_segment_ids,
    'decoder_input_tokens': input_tokens,
    'decoder_target_tokens': answer_tokens,
    'decoder_segment_ids': segment_ids,
    'decoder_loss_weights': (segment_ids > 0).astype(np.float32),
  }
