# SPDX-License-Identifier: Apache-2.0
"""Numbers that are none: NaN and infinity in weights, found as they are read.

An overflow in half precision or a bad merge leaves them, and what is computed
from them is garbage without a word.
"""

from typing import Any

import gin
import numpy as np

from l2s_jax.runtime import distributed

# Bits of the exponent, all of them set in what is not finite, by the width.
_EXPONENTS = {
  'float64': (np.uint64, 0x7FF0 << 48),
  'float32': (np.uint32, 0x7F80 << 16),
  'float16': (np.uint16, 0x7C00),
  'bfloat16': (np.uint16, 0x7F80),
}
# So many numbers at once stay in a cache.
_BLOCK = 1 << 18


def is_finite(array: np.ndarray) -> bool:
  """Returns whether all numbers are; of other dtypes than floats, true.

  By their bits: NumPy's `isfinite` takes ten times as long for bfloat16.
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
  """Takes down which tensors of a source are not finite."""

  def __init__(self, source: Any):
    self._source = source
    self._names: list[str] = []

  def look(
    self, array: np.ndarray, path: tuple[str, ...], layer: int | None = None
  ) -> None:
    """Looks at one tensor, or one layer of it, as stored."""
    name = self._source.name(path)
    if not is_finite(array):
      if layer is not None and '{layer}' not in name:
        name += f' (layer {layer})'
      self._names.append(name.replace('{layer}', str(layer)))

  def check(self, **allowed: bool) -> None:
    """Refuses them, by the names in the files, unless they are asked for.

    Args:
      **allowed: `allow_non_finite`, where a flag says it and not gin.
    """
    names = sorted(set(distributed.gather(self._names)))
    _refuse(self._source.location, names, **allowed)


@gin.configurable('weights', module='l2s_jax')
def _refuse(
  location: str, names: list[str], allow_non_finite: bool = False
) -> None:
  """Refuses weights that hold NaN or infinity, or says that they do."""
  if not names:
    return
  shown = ', '.join(names[:10])
  if len(names) > 10:
    shown += f' and {len(names) - 10} more'
  problem = f'{location} holds NaN or infinity in {shown}'
  if not allow_non_finite:
    raise ValueError(
      f'{problem}: what such weights compute is garbage. Get them again, in '
      'bfloat16 or float32 if float16 was too small. They are read all the '
      'same with --gin.weights.allow_non_finite=True (in convert '
      '--allow_non_finite).'
    )
  distributed.say_once(f'{problem}; they are read all the same.')
