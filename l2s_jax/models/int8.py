# SPDX-License-Identifier: Apache-2.0
"""int8 kernels: symmetric rounding with one scale per output.

    kernel = values * scale,   values in -127..127

A scale has 16 significant bits. Products of values and scales are therefore
exact in float32, and rounding a rounded kernel again changes nothing: a kernel
that is stored in int8, read as float32 and quantized for decoding has the
stored values.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

_LARGEST = 127


def contracted_axes(
  path: tuple[str, ...], *, is_stacked: bool = False
) -> tuple[int, ...]:
  """Returns the axes that a kernel contracts.

  Args:
    path: of a parameter of a language model.
    is_stacked: whether its first axis is that of layers.

  Returns:
    The axes; none for parameters that are not kernels of products, such as
    embeddings and norms.
  """
  if path[-1] != 'kernel':
    return ()
  first = int(is_stacked)
  # The attention output alone contracts two axes, [heads, kv].
  return tuple(range(first, first + (2 if path[-2] == 'out' else 1)))


def quantize(kernel: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
  """Rounds a kernel to int8.

  Args:
    kernel: finite floats, of NumPy or JAX.
    axes: the contracted axes.

  Returns:
    The values in int8, and float32 scales of the same rank, whose contracted
    axes have size 1. Outputs with zeros alone have scale 1.
  """
  xp: Any = np if isinstance(kernel, np.ndarray) else jnp
  kernel = kernel.astype(xp.float32)
  largest = xp.abs(kernel).max(axis=axes, keepdims=True)
  bits = (largest / _LARGEST).astype(xp.float32).view(xp.uint32)
  scale = ((bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(xp.float32)
  scale = xp.where(scale == 0, xp.float32(1), scale)
  values = xp.clip(xp.rint(kernel / scale), -_LARGEST, _LARGEST)
  return values.astype(xp.int8), scale


def dequantize(values: Any, scale: Any) -> Any:
  """Returns the float32 kernel of int8 values and scales."""
  return values.astype(scale.dtype) * scale


def round_kernel(kernel: Any, axes: tuple[int, ...]) -> Any:
  """Returns a kernel in float32 after rounding to int8; see `quantize`."""
  return dequantize(*quantize(kernel, axes))
