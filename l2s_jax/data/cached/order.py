# SPDX-License-Identifier: Apache-2.0
"""Shuffle orders: stateless functions of a seed and a position.

An order is endless. The example at any position is computed in constant time
and memory: a run resumes anywhere, and each process computes the positions of
its own rows alone. An epoch of a task is a permutation of its examples,
evaluated pointwise by a Feistel network. A mixture interleaves such orders in
exact proportions.

The implementation is integer arithmetic in NumPy, with equal results on all
machines and NumPy versions.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64, UInt64

Places = Int64[np.ndarray, ' places']
Keys = UInt64[np.ndarray, ' places']

# Number of Feistel rounds. With six or more, the statistics of `test_order.py`
# do not distinguish it from random permutations.
_NUM_ROUNDS = 8
# Rates are rounded to multiples of 2**-30, so products of a position and a rate
# are exact in 64 bits.
_RATE_BITS = 30
# Block size, in rows, of a mixture's local shuffle. Each block has every task's
# share of rows, within one or two.
_BLOCK = 1024
_MASK = np.uint64(0xFFFFFFFF)


def key(*numbers: int) -> np.uint64:
  """Returns the key of a permutation, from numbers such as seed and epoch."""
  return _keys(0, *(np.array([number]) for number in numbers))[0]


def permute(indices: Places, size: int, keys: Keys | np.uint64) -> Places:
  """Maps indices by a pseudorandom permutation of [0, size).

  A Feistel network permutes the next power of two. Results beyond `size` are
  permuted again until they are inside, less than once on average.

  Args:
    indices: indices in [0, size).
    size: size of the permutation.
    keys: one key for all indices, or one for each; see `key`.
  """
  bits = max(2, int(size - 1).bit_length())
  keys = np.broadcast_to(np.asarray(keys, np.uint64), indices.shape)
  result = _network(indices.astype(np.uint64), bits, keys)
  beyond = np.flatnonzero(result >= size)
  while len(beyond):
    result[beyond] = _network(result[beyond], bits, keys[beyond])
    beyond = beyond[result[beyond] >= size]
  return result.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Order:
  """The endless shuffle order of a task or a mixture.

  A single task has each example once per epoch; each epoch has a permutation of
  its own.

  In a mixture the examples of a task follow its own order as well: each example
  occurs once before any occurs twice, up to the shuffle within a block. The
  task of a row follows from exact shares: after any number of whole blocks a
  task's number of rows is its rate times all rows, rounded down, or up once for
  each task before it.

  Attributes:
    sizes: number of examples by task name.
    rates: mixture rate by task name; None for a single task.
    seed: seed of the order.

  Raises:
    ValueError: if a task has no examples, or several tasks have no rates.
  """

  sizes: Mapping[str, int]
  rates: Mapping[str, float] | None
  seed: int

  def __post_init__(self) -> None:
    empty = [name for name, size in self.sizes.items() if size < 1]
    if empty or not self.sizes:
      raise ValueError(
        f'task {(empty or ["?"])[0]!r} has no examples; expected at least one.'
      )
    if self.rates is None and len(self.sizes) > 1:
      raise ValueError(
        f'the tasks {", ".join(sorted(self.sizes))} have no rates; give each '
        'task a rate.'
      )

  @property
  def names(self) -> list[str]:
    """Task names, in the numbering of `at`."""
    return sorted(self.sizes)

  def at(self, start: int, stop: int) -> tuple[Places, Places]:
    """Returns task numbers and example numbers for a range of positions.

    Args:
      start: first position.
      stop: end of the range, exclusive.
    """
    places = np.arange(start, stop, dtype=np.int64)
    if self.rates is None:
      tasks, within = np.zeros_like(places), places
    else:
      tasks, within = interleave(
        places, [self.rates[name] for name in self.names], self.seed
      )
    examples = np.empty_like(places)
    for number, name in enumerate(self.names):
      own = np.flatnonzero(tasks == number)
      epochs, indices = np.divmod(within[own], self.sizes[name])
      keys = _keys(self.seed, np.full_like(epochs, number), epochs)
      examples[own] = permute(indices, self.sizes[name], keys)
    return tasks, examples


def interleave(
  places: Places, rates: Sequence[float], seed: int
) -> tuple[Places, Places]:
  """Returns the task of each row of a mixture, and the row's rank in its task.

  A task with share p of all rows gets floor(n p) of the first n rows: row n is
  its row if floor(n p) grows there. The remaining rows are divided among the
  other tasks in the same way. First, rows are permuted within blocks, which
  breaks regular patterns.

  Args:
    places: positions of the rows in the whole order.
    rates: positive rates of the tasks.
    seed: seed of the permutations within blocks.
  """
  blocks, within = np.divmod(places, _BLOCK)
  keys = _keys(seed, np.full_like(blocks, -1), blocks)
  left = blocks * _BLOCK + permute(within, _BLOCK, keys)
  tasks = np.full_like(places, len(rates) - 1)
  found = np.empty_like(places)
  rows = np.arange(len(places))
  for number in range(len(rates) - 1):
    share = rates[number] / sum(rates[number:])
    numerator = min(max(1, round(share * 2**_RATE_BITS)), 2**_RATE_BITS - 1)
    before = _times(left, numerator)
    is_own = _times(left + 1, numerator) > before
    tasks[rows[is_own]] = number
    found[rows[is_own]] = before[is_own]
    rows, left = rows[~is_own], (left - before)[~is_own]
  found[rows] = left
  return tasks, found


def _times(places: Places, numerator: int) -> Places:
  """Returns floor(place * numerator / 2**_RATE_BITS), exactly."""
  high, low = np.divmod(places, 1 << _RATE_BITS)
  return high * numerator + ((low * numerator) >> _RATE_BITS)


def _keys(seed: int, *numbers: Int64[np.ndarray, ' places']) -> Keys:
  """Returns a key for each position, from a seed and columns of numbers."""
  state = _mix(np.uint64(seed % 2**64) + np.zeros(1, np.uint64))
  for column in numbers:
    state = _mix(state ^ _mix(column.astype(np.int64).view(np.uint64)))
  return state


def _network(
  values: UInt64[np.ndarray, ' places'], bits: int, keys: Keys
) -> UInt64[np.ndarray, ' places']:
  """Applies a Feistel network over [0, 2**bits) to the values.

  The halves may differ by one bit; they swap sizes in each round.
  """
  top, bottom = bits // 2, bits - bits // 2
  for number in range(_NUM_ROUNDS):
    left, right = values >> np.uint64(bottom), values & _ones(bottom)
    mixed = _mix(right ^ _mix(keys + np.uint64(number)))
    values = (right << np.uint64(top)) | (left ^ (mixed >> np.uint64(64 - top)))
    top, bottom = bottom, top
  return values


def _ones(bits: int) -> np.uint64:
  return np.uint64((1 << bits) - 1)


def _mix(values: UInt64[np.ndarray, ' places']) -> Keys:
  """Returns a hash of each value: the finalizer of SplitMix64.

  Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
  generators".
  """
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))
