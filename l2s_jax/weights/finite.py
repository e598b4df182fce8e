# SPDX-License-Identifier: Apache-2.0
"""Detection of NaN and infinity in weights while they are read.

Overflow in half precision or a failed merge can leave non-finite values in a
checkpoint. A model with such weights computes garbage without an error.
"""

from typing import Any

import gin
import numpy as np

from l2s_jax.runtime import distributed

# Unsigned integer type of the same width and mask of the exponent bits, by
# dtype. All exponent bits are set in NaN and infinity.
_EXPONENTS = {
  'float64': (np.uint64, 0x7FF0 << 48),
  'float32': (np.uint32, 0x7F80 << 16),
  'float16': (np.uint16, 0x7C00),
  'bfloat16': (np.uint16, 0x7F80),
}
# Elements per check, small enough to stay in the CPU cache.
_BLOCK = 1 << 18


def is_finite(array: np.ndarray) -> bool:
  """Returns whether all elements are finite; True for non-float dtypes.

  The check reads exponent bits: `np.isfinite` takes ten times as long for
  bfloat16.
  """
  if array.dtype.name not in _EXPONENTS:
    return True
  kind, exponent = _EXPONENTS[array.dtype.name]
  mask = kind(exponent)
  bits = np.ascontiguousarray(array).reshape(-1).view(kind)
  return not any(
    ((bits[start : start + _BLOCK] & mask) == mask).any()
    for start in range(0, bits.size, _BLOCK)
  )


class Notes:
  """Records the names of the non-finite tensors of a source."""

  def __init__(self, source: Any):
    self._source = source
    self._names: list[str] = []

  def look(
    self, array: np.ndarray, path: tuple[str, ...], layer: int | None = None
  ) -> None:
    """Checks one tensor, or one layer of a stacked tensor, as stored."""
    name = self._source.name(path)
    if not is_finite(array):
      if layer is not None and '{layer}' not in name:
        name += f' (layer {layer})'
      self._names.append(name.replace('{layer}', str(layer)))

  def check(self, **allowed: bool) -> None:
    """Refuses non-finite tensors, listed by their names in the files.

    All processes must call it: names are gathered from all of them.

    Args:
      **allowed: `allow_non_finite`, if a command-line flag sets it instead of
        gin.

    Raises:
      ValueError: if a tensor is not finite and `allow_non_finite` is False.
    """
    names = sorted(set(distributed.gather(self._names)))
    _refuse(self._source.location, names, **allowed)


@gin.configurable('weights', module='l2s_jax')
def _refuse(
  location: str, names: list[str], allow_non_finite: bool = False
) -> None:
  """Raises an error for non-finite tensors, or logs a warning if allowed."""
  if not names:
    return
  shown = ', '.join(names[:10])
  if len(names) > 10:
    shown += f' and {len(names) - 10} more'
  problem = f'{location} holds NaN or infinity in {shown}'
  if not allow_non_finite:
    raise ValueError(
      f'{problem}, so its outputs would be meaningless. Download the weights '
      'again, in bfloat16 or float32 if float16 overflowed. To read them '
      'anyway, set --gin.weights.allow_non_finite=True (in convert '
      '--allow_non_finite).'
    )
  distributed.say_once(f'{problem}; they are read anyway.')
