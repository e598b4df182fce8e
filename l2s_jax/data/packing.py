# SPDX-License-Identifier: Apache-2.0
"""Which examples share a row, and the rows that come of it.

For training alone: evaluation and generation have one prompt a row. A model
keeps the examples of a row apart by their segment ids.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer

TokenIds = Sequence[int] | Integer[np.ndarray, '_']  # of any length
Rows = Sequence[int] | Int[np.ndarray, ' examples']

# Examples that are packed together. Of Multi30K's captions in rows of 64 + 64
# tokens, 84 % of the slots are filled from windows of 64 examples, 87 % from
# 1024, and no more from 4096.
WINDOW = 1024


def first_fit(
  sizes: Int[np.ndarray, 'examples features'], room: Sequence[int]
) -> Int[np.ndarray, ' examples']:
  """Returns for each example the first row that still has room for it.

  With rows of (5, 6) tokens, examples of [3, 2], [3, 4], [2, 1] and [1, 1] go
  to rows [0, 1, 0, 1].

  Args:
    sizes: tokens of each example's features, such as prompt and answer.
    room: of a row, in tokens of each feature.

  Raises:
    ValueError: for an example that no row has room for.
  """
  too_long = sizes[(sizes > room).any(axis=1)]
  if len(too_long):
    raise ValueError(
      f'an example of {too_long[0].tolist()} tokens does not go into a row of '
      f'{list(room)}; cut examples before they are packed.'
    )
  free = np.tile(room, (len(sizes), 1))
  rows = np.zeros(len(sizes), np.int64)
  num_rows = 0
  for example, size in enumerate(sizes):
    # One row more than there are: an empty one.
    row = int((free[: num_rows + 1] >= size).all(axis=1).argmax())
    free[row] -= size
    rows[example] = row
    num_rows = max(num_rows, row + 1)
  return rows


def first_fit_of_windows(
  sizes: Int[np.ndarray, 'windows examples features'], room: Sequence[int]
) -> Int[np.ndarray, 'windows examples']:
  """Returns what `first_fit` does for each of several windows.

  They are filled side by side, as a step of NumPy takes little longer for many
  than for one: of captions in rows of 64 + 64, a core plans 95,000 examples a
  second one window after another, and 1,000,000 with 64 at a time.

  Args:
    sizes: none larger than the room.
    room: of a row, in tokens of each feature.
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
    # One row more than there are: an empty one.
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
  """Returns tokens, and segment ids that number the examples of a row from 1.

  Sequences [5, 1], [6, 7, 1] and [8, 1] in rows 0, 1 and 0 of 5 tokens, with
  pad 0, make

      [[5, 1, 8, 1, 0],  and  [[1, 1, 2, 2, 0],
       [6, 7, 1, 0, 0]]        [1, 1, 1, 0, 0]]

  Args:
    sequences: token ids of each example.
    rows: where each goes, as `first_fit` has it.
    length: of a row, in tokens.
    pad_id: of their vocabulary.

  Raises:
    ValueError: if a row has no room for its examples.
  """
  places = np.asarray(rows, np.int64)
  sizes = np.fromiter(map(len, sequences), np.int64, len(places))
  # Those of a row one after another: where each begins, and its number.
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
      f'row {row} of {length} tokens has no room for its '
      f'{int(sizes[places == row].sum())}; cut examples before they are laid '
      'out.'
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
  """Returns the batch keys of examples whose rows are known.

  Args:
    prompts: token ids, EOS included, none longer than its row.
    answers: likewise, one for each prompt.
    rows: of each example.
    task_feature_lengths: of a row: `inputs` and `targets`, in tokens.
    prompt_pad_id: of the prompts' vocabulary.
    answer_pad_id: of the answers' vocabulary.
    start_id: stands before each answer.
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
  # One place to the right, within each example.
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
