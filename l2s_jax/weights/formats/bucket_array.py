# SPDX-License-Identifier: Apache-2.0
"""Arrays in a bucket, of which only the indexed rows are read."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from l2s_jax.runtime import storage


class BucketArray:
  """An array stored as consecutive bytes of an object, read on demand.

  Indexing reads only the range of rows that it needs.

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
  ):
    """Reads nothing.

    Args:
      path: the object.
      dtype: of the elements.
      shape: of the array.
      offset: of the first element, in bytes.
    """
    self.shape = shape
    self.dtype = dtype
    self._path = path
    self._offset = offset

  def __len__(self) -> int:
    return self.shape[0]

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy
    return self._rows(0, self.shape[0] if self.shape else 1).astype(
      dtype or self.dtype, copy=False
    )

  def __getitem__(self, index: Any) -> np.ndarray:
    indices = index if isinstance(index, tuple) else (index,)
    if not self.shape or not indices:
      return np.asarray(self)[index]
    first, *others = indices
    if isinstance(first, int | np.integer):
      first = int(first)
      rows = self._rows(first, first + 1)
      return rows[(0, *others)]
    start, stop, step = first.indices(self.shape[0])
    assert step == 1, first
    return self._rows(start, max(start, stop))[(slice(None), *others)]

  def __iter__(self) -> Iterator[np.ndarray]:
    return (self[index] for index in range(len(self)))

  def _rows(self, start: int, stop: int) -> np.ndarray:
    row_shape = self.shape[1:]
    row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
    begin = self._offset + start * row_bytes
    content = self._path.read_range(begin, begin + (stop - start) * row_bytes)
    shape = (stop - start, *row_shape) if self.shape else ()
    return np.frombuffer(content, self.dtype).reshape(shape)
