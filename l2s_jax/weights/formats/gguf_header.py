# SPDX-License-Identifier: Apache-2.0
"""Validation of a GGUF header before the package gguf reads it.

The package gguf trusts every count and length: a list of 2**60 entries would
exhaust memory. This module compares each of them with the file size.
"""

import math
import mmap
import pathlib
import struct
from typing import Any

MAGIC = b'GGUF'
# Bytes of a value by its GGUF type; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
_MOST_AXES = 4


class _Cursor:
  """A position in a file that cannot move beyond its end."""

  def __init__(self, content: mmap.mmap, order: str):
    self._content = content
    self._order = order
    self.at = len(MAGIC)

  def skip(self, num_bytes: int) -> int:
    """Advances by `num_bytes`; returns the position before."""
    start = self.at
    if num_bytes > len(self._content) - start:
      raise ValueError(
        f'{num_bytes} bytes should begin at byte {start}, but the file has '
        f'{len(self._content)}'
      )
    self.at += num_bytes
    return start

  def number(self, letter: str) -> int:
    """Reads a number, given its `struct` format letter."""
    layout = self._order + letter
    start = self.skip(struct.calcsize(layout))
    return struct.unpack_from(layout, self._content, start)[0]

  def text(self) -> bytes:
    """Reads a string with its length."""
    length = self.number('Q')
    start = self.skip(length)
    return self._content[start : start + length]

  def value(self, kind: int, depth: int = 0) -> int | None:
    """Skips a value; returns it if it is a uint32, else None."""
    if kind == _TEXT:
      self.skip(self.number('Q'))
    elif kind == _LIST:
      if depth > 3:
        raise ValueError(f'lists are nested too deeply at byte {self.at}')
      inner, count = self.number('I'), self.number('Q')
      if inner in _SIZES:
        self.skip(count * _SIZES[inner])
      else:
        for _ in range(self.count(count, 8)):
          self.value(inner, depth + 1)
    elif kind == 4:
      return self.number('I')
    elif kind in _SIZES:
      self.skip(_SIZES[kind])
    else:
      raise ValueError(
        f'the value at byte {self.at} has the unknown type {kind}'
      )
    return None

  def count(self, count: int, num_bytes: int) -> int:
    """Returns `count` after checking it against the rest of the file.

    Raises:
      ValueError: if `count` entries of `num_bytes` do not fit.
    """
    if count > (len(self._content) - self.at) // num_bytes:
      raise ValueError(
        f'{count} entries should begin at byte {self.at}, but the file has '
        f'{len(self._content)} bytes'
      )
    return count


def check(path: pathlib.Path) -> None:
  """Validates a header against the file size.

  Raises:
    ValueError: states position and cause; the caller adds the file name.
  """
  import gguf

  size = path.stat().st_size
  if size < 24:
    raise ValueError('it is shorter than a header')
  with (
    path.open('rb') as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
  ):
    if content[: len(MAGIC)] != MAGIC:
      raise ValueError('it does not begin with GGUF')
    is_little = struct.unpack_from('<I', content, 4)[0] & 0xFFFF
    cursor = _Cursor(content, '<' if is_little else '>')
    cursor.number('I')  # The version; the package gguf checks it.
    num_tensors = cursor.count(cursor.number('Q'), 24)
    num_values = cursor.count(cursor.number('Q'), 13)
    alignment = 32
    for _ in range(num_values):
      key = cursor.text()
      value = cursor.value(cursor.number('I'))
      if key == b'general.alignment':
        alignment = value or 0
    if alignment < 1 or alignment & (alignment - 1):
      raise ValueError(
        f'general.alignment is {alignment}, which is not a power of two'
      )
    ends = [_tensor(cursor, gguf) for _ in range(num_tensors)]
    start = -(-cursor.at // alignment) * alignment
    for name, end in ends:
      if start + end > size:
        raise ValueError(
          f'{name} should end at byte {start + end}, but the file has {size} '
          'bytes'
        )


def _tensor(cursor: _Cursor, gguf: Any) -> tuple[str, int]:
  """Returns the name of a tensor and its end offset within the data."""
  name = repr(cursor.text().decode('utf-8', 'replace')[:80])
  num_axes = cursor.number('I')
  if not 1 <= num_axes <= _MOST_AXES:
    raise ValueError(f'{name} has {num_axes} axes, expected 1 to {_MOST_AXES}')
  sizes = [cursor.number('Q') for _ in range(num_axes)]
  kind = gguf.GGMLQuantizationType(cursor.number('I'))
  offset = cursor.number('Q')
  block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
  if 0 in sizes or sizes[0] % block:
    raise ValueError(f'{name} has the impossible shape {sizes}')
  return name, offset + math.prod(sizes) // block * num_bytes
