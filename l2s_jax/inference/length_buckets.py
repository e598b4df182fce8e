# SPDX-License-Identifier: Apache-2.0
"""Which prompts share a batch: those of like length, as many as fit.

Few lengths and few numbers of rows, so that few shapes are compiled. Nothing
of it may change an answer.
"""

import math
from collections.abc import Sequence

_SHORTEST = 16
_ROWS_MULTIPLE = 8  # As matrix units like it.


def lengths(longest: int) -> list[int]:
  """Returns the lengths that prompts are padded to: 16, 24, 32, 48, 64, ...

  Args:
    longest: of all prompts, in tokens; the last length.
  """
  found = []
  power = _SHORTEST
  while power < longest:
    found += [power, power * 3 // 2]
    power *= 2
  return [*(length for length in found if length < longest), longest]


class Buckets:
  """Batches with the memory of `batch_size` prompts of the greatest length.

  A slot of memory is a token of a prompt or one that its answer may have; where
  prompts are shorter, a batch has more of them.
  """

  def __init__(
    self,
    *,
    prompt_length: int,
    answer_length: int,
    batch_size: int,
    num_shards: int,
  ):
    """Prepares packing.

    Args:
      prompt_length: tokens a prompt at most.
      answer_length: tokens that are kept of an answer at most, those of all its
        beams together.
      batch_size: prompts of `prompt_length` a batch, a multiple of the shards.
      num_shards: devices over which rows are divided.
    """
    self._lengths = lengths(prompt_length)
    self._answer_length = answer_length
    self._num_slots = batch_size * (prompt_length + answer_length)
    self._num_shards = num_shards
    self._multiple = math.gcd(batch_size, _ROWS_MULTIPLE * num_shards)
    self._shapes: set[tuple[int, int]] = set()  # that have been used

  def length(self, num_tokens: int) -> int:
    """Returns what a prompt of so many tokens is padded to."""
    return next(length for length in self._lengths if num_tokens <= length)

  def most_rows(self, length: int) -> int:
    """Returns the rows of a full batch."""
    rows = self._num_slots // (length + self._answer_length)
    return rows // self._multiple * self._multiple

  def shape(self, num_tokens: Sequence[int]) -> tuple[int, int]:
    """Returns the rows and the length that prompts are padded to.

    A shape that was used before, and is compiled, goes over one that fits more
    closely: rows that fill up cost less than a compilation.

    Args:
      num_tokens: of each prompt of one batch.
    """
    length = self.length(max(num_tokens))
    used = [
      shape
      for shape in self._shapes
      if shape[1] == length and shape[0] >= len(num_tokens)
    ]
    if used:
      return min(used)
    rows = self._num_shards
    while rows < len(num_tokens):
      rows *= 2
    shape = min(rows, self.most_rows(length)), length
    self._shapes.add(shape)
    return shape

  def pack(self, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Returns batches of indices; none but the last has room for more.

    The longest come first. Of a like length, those whose answers may be as long
    as one another share a batch, since it ends with its longest answer.

    Args:
      sizes: tokens of each prompt, and tokens that its answer may have.
    """

    def size(index: int) -> tuple[int, int, int]:
      num_tokens, max_decode_len = sizes[index]
      return self.length(num_tokens), max_decode_len, num_tokens

    order = sorted(range(len(sizes)), key=size, reverse=True)
    batches = []
    start = 0
    while start < len(order):
      end = start + self.most_rows(size(order[start])[0])
      batches.append(order[start:end])
      start = end
    return batches
