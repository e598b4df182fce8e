# SPDX-License-Identifier: Apache-2.0
"""Length buckets: batches of prompts with similar lengths.

Few padded lengths and few batch sizes keep the number of compiled shapes small.
Bucketing never changes an answer.
"""

import math
from collections.abc import Sequence

_SHORTEST = 16
_ROWS_MULTIPLE = 8  # Matrix units are efficient at multiples of 8.


def lengths(longest: int) -> list[int]:
  """Returns the padded lengths of prompts: 16, 24, 32, 48, 64, ...

  Args:
    longest: largest number of tokens of all prompts; the last length.
  """
  found = []
  power = _SHORTEST
  while power < longest:
    found += [power, power * 3 // 2]
    power *= 2
  return [*(length for length in found if length < longest), longest]


class Buckets:
  """Packs prompts into batches of a fixed memory budget.

  The budget is that of `batch_size` prompts of `prompt_length` tokens, counting
  one slot for each token of a prompt and of its longest answer. Batches of
  shorter prompts have more rows.
  """

  def __init__(
    self,
    *,
    prompt_length: int,
    answer_length: int,
    batch_size: int,
    num_shards: int,
  ):
    """Sets the budget.

    Args:
      prompt_length: maximum number of prompt tokens.
      answer_length: maximum number of answer tokens per prompt, over all beams.
      batch_size: prompts of `prompt_length` per batch, a multiple of
        `num_shards`.
      num_shards: devices that rows are sharded over.
    """
    self._lengths = lengths(prompt_length)
    self._answer_length = answer_length
    self._num_slots = batch_size * (prompt_length + answer_length)
    self._num_shards = num_shards
    self._multiple = math.gcd(batch_size, _ROWS_MULTIPLE * num_shards)
    self._shapes: set[tuple[int, int]] = set()  # Shapes already used.

  def length(self, num_tokens: int) -> int:
    """Returns the padded length of a prompt with `num_tokens` tokens."""
    return next(length for length in self._lengths if num_tokens <= length)

  def most_rows(self, length: int) -> int:
    """Returns the number of rows of a full batch, given the padded length."""
    rows = self._num_slots // (length + self._answer_length)
    return rows // self._multiple * self._multiple

  def shape(self, num_tokens: Sequence[int]) -> tuple[int, int]:
    """Returns the number of rows and the padded length of a batch.

    A shape already used, and so compiled, is preferred to a smaller new one:
    padded rows cost less than a compilation.

    Args:
      num_tokens: tokens of each prompt in the batch.
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
    """Returns batches of indices into `sizes`; all but the last are full.

    The longest prompts come first. Among prompts of one padded length, those
    with similar `max_decode_len` share a batch, since the longest answer ends
    it.

    Args:
      sizes: for each prompt, its number of tokens and its `max_decode_len`.
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
