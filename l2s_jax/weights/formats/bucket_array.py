# SPDX-License-Identifier: Apache-2.0
"""Arrays in a bucket, of which only the indexed rows are read."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from l2s_jax.runtime import storage

# What an array keeps; further ranges are read again when they are needed.
_MOST_KEPT_BYTES = 4 * 2**30


class BucketArray:
  """An array stored as consecutive bytes of an object, read on demand.

  Indexing behaves as NumPy's. Integers and slices of step 1 read only ranges of
  rows: along the first axis, or, of an array of three axes and more, along the
  second axis, by a request for each index of the first (the layer of a stacked
  kernel). Other indices read the whole array.

  Attributes:
    shape: its shape.
    dtype: its NumPy dtype.
  """

  def __init__(
    self,
    path: storage.BucketPath,
    dtype: np.dtype,
    shape: tuple[int, ...],
    offset: int,
    *,
    keeps: bool = False,
  ):
    """Reads nothing.

    Args:
      path: the object.
      dtype: of the elements.
      shape: of the array.
      offset: of the first element, in bytes.
      keeps: whether to keep what was read, so that no range is read twice, up
        to `_MOST_KEPT_BYTES`.
    """
    self.shape = shape
    self.dtype = dtype
    self._path = path
    self._offset = offset
    self._kept: dict[tuple[int, int], bytes] | None = {} if keeps else None

  def keeping(self) -> 'BucketArray':
    """Returns an array of the same object that keeps what it has read."""
    return BucketArray(
      self._path, self.dtype, self.shape, self._offset, keeps=True
    )

  def __len__(self) -> int:
    return self.shape[0]

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    if copy is False:
      raise ValueError('An array in a bucket has no view in memory.')
    whole = self._box([(0, size) for size in self.shape[: self._num_axes]])
    return whole.astype(dtype or self.dtype, copy=bool(copy))

  def __getitem__(self, index: Any) -> Any:
    indices = index if isinstance(index, tuple) else (index,)
    spans: list[tuple[int, int]] = []
    local: list[int | slice] = []
    for axis, size in enumerate(self.shape[: self._num_axes]):
      item = indices[axis] if axis < len(indices) else slice(None)
      item = int(item) if isinstance(item, np.integer) else item
      if isinstance(item, int) and not isinstance(item, bool):
        start = item + size if item < 0 else item
        if not 0 <= start < size:
          raise IndexError(
            f'index {item} is out of bounds for axis {axis} with size {size}'
          )
        spans.append((start, start + 1))
        local.append(0)
      elif isinstance(item, slice) and item.step in (None, 1):
        start, stop, _ = item.indices(size)
        spans.append((start, max(start, stop)))
        local.append(slice(None))
      else:
        return np.asarray(self)[index]
    if not spans:
      return np.asarray(self)[index]
    return self._box(spans)[(*local, *indices[self._num_axes :])]

  def __iter__(self) -> Iterator[np.ndarray]:
    return (self[index] for index in range(len(self)))

  @property
  def _num_axes(self) -> int:
    """The number of axes along which parts are read."""
    return 2 if len(self.shape) > 2 else min(1, len(self.shape))

  def _box(self, spans: list[tuple[int, int]]) -> np.ndarray:
    """Returns the part within [start, stop) of the first axes."""
    shape = (
      *(stop - start for start, stop in spans),
      *self.shape[len(spans) :],
    )
    row_bytes = math.prod(self.shape[len(spans) :]) * self.dtype.itemsize
    start, stop = spans[-1] if spans else (0, 1)
    outer = range(*spans[0]) if len(spans) == 2 else (0,)
    rows_of_outer = self.shape[len(spans) - 1] if spans else 1
    parts = [
      self._bytes(
        (i * rows_of_outer + start) * row_bytes,
        (i * rows_of_outer + stop) * row_bytes,
      )
      for i in outer
    ]
    content = parts[0] if len(parts) == 1 else b''.join(parts)
    return np.frombuffer(content, self.dtype).reshape(shape)

  def _bytes(self, start: int, stop: int) -> bytes:
    """Returns a range of the array's bytes, read if it is not kept."""
    for (first, last), content in (self._kept or {}).items():
      if first <= start and stop <= last:
        return content[start - first : stop - first]
    found = self._path.read_range(self._offset + start, self._offset + stop)
    if self._kept is not None:
      num_bytes = sum(map(len, self._kept.values())) + len(found)
      if num_bytes <= _MOST_KEPT_BYTES:
        self._kept[start, stop] = found
    return found
