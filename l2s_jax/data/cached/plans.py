# SPDX-License-Identifier: Apache-2.0
"""Batch plans: assign examples to batches and rows, from their lengths alone.

A plan iterates over the endless order of a cache (`order.py`) and looks up
example lengths in its index. It assigns examples like `streams.py`: one per
row, packed by windows, or bucketed by length. Every process plans whole batches
and then reads only its own rows.

A position resumes a plan exactly, in time independent of the position:

    one per row   {'examples': number of examples consumed}
    packed        {'window': window number, 'row': row in the window}
    by length     {'examples': number of examples consumed, 'waiting': number of
                   these in no batch yet, for each bucket}
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from l2s_jax.data import packing

# Number of examples per lookup; amortizes the cost of NumPy calls.
_BLOCK = 8192

# Number of windows planned at a time, for the same reason.
_WINDOWS = 64

Position = Mapping[str, Any]


class Stretch(NamedTuple):
  """Consecutive examples of an order.

  Attributes:
    tasks: task number of each.
    examples: number of each in its task.
    lengths: prompt and answer tokens of each, before cutting.
  """

  tasks: Int64[np.ndarray, ' n']
  examples: Int64[np.ndarray, ' n']
  lengths: Int64[np.ndarray, 'n features']

  def take(self, which: Any) -> 'Stretch':
    """Returns a subset, selected by a slice, a mask or indices."""
    return Stretch(*(column[which] for column in self))

  def join(self, other: 'Stretch') -> 'Stretch':
    """Concatenates another stretch."""
    return Stretch(
      *(np.concatenate(pair) for pair in zip(self, other, strict=True))
    )


# Function that returns the examples at positions [start, stop) of an order.
Look = Callable[[int, int], Stretch]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """The plan of a batch over all processes.

  Attributes:
    stretch: its examples; those of a row are in row order.
    rows: row of each example.
    lengths: row lengths of prompt and answer, in tokens.
    position: start position of the next batch.
  """

  stretch: Stretch
  rows: Int64[np.ndarray, ' n']
  lengths: tuple[int, int]
  position: Position


def one_by_one(
  look: Look,
  lengths: tuple[int, int],
  batch_size: int,
  position: Position | None = None,
  num_examples: int | None = None,
) -> Iterator[BatchPlan]:
  """Yields batches with one example per row.

  Args:
    look: returns the examples in a range of the order.
    lengths: row lengths of prompt and answer, in tokens.
    batch_size: number of rows; an incomplete last batch is dropped.
    position: position to resume from; None: the beginning.
    num_examples: length of the order; None: unlimited.
  """
  start = position['examples'] if position else 0
  for first, block in _blocks(look, start, batch_size, num_examples):
    for row in range(0, len(block.tasks) - batch_size + 1, batch_size):
      yield BatchPlan(
        block.take(slice(row, row + batch_size)),
        np.arange(batch_size, dtype=np.int64),
        lengths,
        {'examples': first + row + batch_size},
      )


def packed(
  look: Look,
  lengths: tuple[int, int],
  batch_size: int,
  position: Position | None = None,
  num_examples: int | None = None,
) -> Iterator[BatchPlan]:
  """Yields batches with as many examples per row as fit.

  Packing is first-fit within windows of `packing.WINDOW` examples. The
  arguments are those of `one_by_one`.
  """
  window, skipped = (
    (position['window'], position['row']) if position else (0, 0)
  )
  left, rows, num_rows = look(0, 0), np.zeros(0, np.int64), 0
  for stretch, own in _windows(look, lengths, window, num_examples):
    own, num_own = own - skipped, int(own.max()) + 1
    is_left = own >= 0
    left = left.join(stretch.take(is_left))
    rows = np.concatenate([rows, own[is_left] + num_rows])
    num_rows += num_own - skipped
    skipped = 0
    while num_rows >= batch_size:
      num_rows -= batch_size
      is_in = rows < batch_size
      yield BatchPlan(
        left.take(is_in),
        rows[is_in],
        lengths,
        {'window': window, 'row': num_own - num_rows}
        if num_rows
        else {'window': window + 1, 'row': 0},
      )
      left, rows = left.take(~is_in), rows[~is_in] - batch_size
    window += 1


def _windows(
  look: Look,
  lengths: tuple[int, int],
  window: int,
  num_examples: int | None,
) -> Iterator[tuple[Stretch, Int64[np.ndarray, ' n']]]:
  """Yields the examples of each window with their rows, from `window` on."""
  size = packing.WINDOW
  start = window * size
  while num_examples is None or start < num_examples:
    end = start + _WINDOWS * size
    if num_examples is not None and end > num_examples:
      whole = num_examples // size * size  # The last window may be shorter.
      end = whole if whole > start else num_examples
    stretch = look(start, end)
    cut = np.minimum(stretch.lengths, lengths)
    if end - start < size:
      yield stretch, packing.first_fit(cut, lengths)
      return
    rows = packing.first_fit_of_windows(cut.reshape(-1, size, 2), lengths)
    for number, own in enumerate(rows):
      yield stretch.take(slice(number * size, (number + 1) * size)), own
    start = end


def by_length(
  look: Look,
  buckets: Sequence[tuple[int, int]],
  batch_size: int,
  position: Position | None = None,
  num_examples: int | None = None,
) -> Iterator[BatchPlan]:
  """Yields batches of examples from one length bucket, as they fill up.

  Args:
    look: returns the examples in a range of the order.
    buckets: row lengths of each bucket, ascending. An example goes to the first
      bucket with room for it, or to the last, where it is cut.
    batch_size: number of rows; incomplete batches at the end are dropped.
    position: position to resume from; None: the beginning.
    num_examples: length of the order; None: unlimited.
  """
  start = position['examples'] if position else 0
  waiting = _waiting(look, buckets, position)
  for first, block in _blocks(look, start, 1, num_examples):
    of_block = _bucket_of(block.lengths, buckets)
    stretches, places, full = [], [], []
    for number, before in enumerate(waiting):
      own = np.flatnonzero(of_block == number)
      # Waiting examples precede the block; -1 stands for their place.
      places.append(
        np.concatenate([np.full(len(before.tasks), -1), own]).astype(np.int64)
      )
      stretches.append(before.join(block.take(own)))
      for end in range(batch_size, len(places[-1]) + 1, batch_size):
        full.append((int(places[-1][end - 1]), number, end))
    taken = [0] * len(buckets)
    for last, number, end in sorted(full):
      taken[number] = end
      past = [np.searchsorted(own, last, side='right') for own in places]
      yield BatchPlan(
        stretches[number].take(slice(end - batch_size, end)),
        np.arange(batch_size, dtype=np.int64),
        buckets[number],
        {
          'examples': first + last + 1,
          'waiting': [
            int(seen) - out for seen, out in zip(past, taken, strict=True)
          ],
        },
      )
    waiting = [
      stretch.take(slice(out, None))
      for stretch, out in zip(stretches, taken, strict=True)
    ]


def _waiting(
  look: Look, buckets: Sequence[tuple[int, int]], position: Position | None
) -> list[Stretch]:
  """Returns each bucket's examples that are not in a batch yet.

  They are the last ones of their buckets before the position. The lookup goes
  backwards from there, further for rare buckets.
  """
  nothing = look(0, 0)
  found = [nothing] * len(buckets)
  if position is None:
    return found
  end = position['examples']
  missing = list(position['waiting'])
  while any(missing) and end:
    start = max(0, end - _BLOCK)
    block = look(start, end)
    of_block = _bucket_of(block.lengths, buckets)
    for number, count in enumerate(missing):
      own = np.flatnonzero(of_block == number)
      own = own[max(0, len(own) - count) :]
      found[number] = block.take(own).join(found[number])
      missing[number] -= len(own)
    end = start
  return found


def _bucket_of(
  lengths: Int64[np.ndarray, 'n features'], buckets: Sequence[tuple[int, int]]
) -> Int64[np.ndarray, ' n']:
  """Returns the first bucket with room for each example, or the last bucket."""
  cut = np.minimum(lengths, buckets[-1])
  has_room = (cut[:, None] <= np.asarray(buckets)[None]).all(axis=2)
  return has_room.argmax(axis=1)


def _blocks(
  look: Look, start: int, unit: int, num_examples: int | None
) -> Iterator[tuple[int, Stretch]]:
  """Yields start positions and blocks of a multiple of `unit` examples."""
  size = -(-_BLOCK // unit) * unit
  while num_examples is None or start < num_examples:
    end = start + size
    if num_examples is not None:
      end = min(end, num_examples)
    yield start, look(start, end)
    start = end
