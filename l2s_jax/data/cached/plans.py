# SPDX-License-Identifier: Apache-2.0
"""Which examples are in which row of which batch, from their lengths alone.

A plan goes through the endless order of a cache (`order.py`), whose index has
the lengths of all examples, and assigns them as `streams.py` does: one after
another, packed by windows, or with others of like length. Every process makes
the plan of whole batches, which reads nothing else, and then reads its rows.

A position says where a plan goes on, exactly, in as much time wherever it is:

    one after another   {'examples': so many are past}
    packed              {'window': number, 'row': of the window}
    by length           {'examples': so many are past, 'waiting': of these, how
                         many of each bucket are in no batch yet}
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from l2s_jax.data import packing

# Examples looked up at a time: what a call of NumPy costs is shared by them.
_BLOCK = 8192

# Windows planned at a time, likewise.
_WINDOWS = 64

Position = Mapping[str, Any]


class Stretch(NamedTuple):
  """Examples that follow one another in an order.

  Attributes:
    tasks: of each, by number.
    examples: of each, by its number in the task.
    lengths: tokens of prompt and answer, before cutting.
  """

  tasks: Int64[np.ndarray, ' n']
  examples: Int64[np.ndarray, ' n']
  lengths: Int64[np.ndarray, 'n features']

  def take(self, which: Any) -> 'Stretch':
    """Returns some of them, by a slice, a mask or places."""
    return Stretch(*(column[which] for column in self))

  def join(self, other: 'Stretch') -> 'Stretch':
    """Returns these and others behind them."""
    return Stretch(
      *(np.concatenate(pair) for pair in zip(self, other, strict=True))
    )


# From the first place of an order and the one behind the last.
Look = Callable[[int, int], Stretch]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """A batch over all processes.

  Attributes:
    stretch: its examples; those of a row stand in the row in this order.
    rows: of each.
    lengths: of all rows, prompt and answer, in tokens.
    position: where the next batch begins.
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
  """Yields batches with an example in each row.

  Args:
    look: gives the examples of an order.
    lengths: of the rows.
    batch_size: in rows; an incomplete last batch is dropped.
    position: of a plan before; None: the beginning.
    num_examples: where the order ends; None: nowhere.
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
  """Yields batches with as many examples in a row as fit.

  An example goes to the first row that has room for it, of those that are
  filled from the same `packing.WINDOW` examples. The arguments are those of
  `one_by_one`.
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
  """Yields the examples of windows, and their rows, from one window on."""
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
  """Yields batches of examples that fit the same lengths, as they get full.

  Args:
    look: gives the examples of an order.
    buckets: lengths of batches; an example goes to the first that has room for
      it, or to the last, which cuts it.
    batch_size: in rows; incomplete batches at the end are dropped.
    position: of a plan before; None: the beginning.
    num_examples: where the order ends; None: nowhere.
  """
  start = position['examples'] if position else 0
  waiting = _waiting(look, buckets, position)
  for first, block in _blocks(look, start, 1, num_examples):
    of_block = _bucket_of(block.lengths, buckets)
    stretches, places, full = [], [], []
    for number, before in enumerate(waiting):
      own = np.flatnonzero(of_block == number)
      # What waits came before the block, wherever that was.
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
  """Returns the examples of each bucket that are in no batch yet.

  They are the last of their buckets before the position. Of a rare one they are
  far back; their lengths are looked up from there on.
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
  """Returns the first bucket that has room for each example, or the last."""
  cut = np.minimum(lengths, buckets[-1])
  has_room = (cut[:, None] <= np.asarray(buckets)[None]).all(axis=2)
  return has_room.argmax(axis=1)


def _blocks(
  look: Look, start: int, unit: int, num_examples: int | None
) -> Iterator[tuple[int, Stretch]]:
  """Yields first places and stretches of a multiple of `unit` examples."""
  size = -(-_BLOCK // unit) * unit
  while num_examples is None or start < num_examples:
    end = start + size
    if num_examples is not None:
      end = min(end, num_examples)
    yield start, look(start, end)
    start = end
