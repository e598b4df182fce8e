# SPDX-License-Identifier: Apache-2.0
"""int8 kernels and tables: symmetric rounding, one scale per output or row.

    kernel = values * scale,   values in -127..127

A scale has 16 significant bits. Products of values and scales are therefore
exact in float32, and rounding a rounded kernel again changes nothing: a kernel
that is stored in int8, read as float32 and quantized for decoding has the
stored values.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax.models import kernel_first, mixed_product

_LARGEST = 127
# Ends of the paths of embedding tables, which have one scale per token.
_TABLES = (
  ('token_embedder', 'embedding'),
  ('decoder_token_embedder', 'embedding'),
)
# Added to integers from -127 to make them unsigned.
_OFFSET = 128


class Rounded(NamedTuple):
  """A kernel or an embedding table in int8, in the form for generation.

  The contracted axes are last: XLA:CPU multiplies rows of integers by rows up
  to twice as fast as by columns.

  Attributes:
    values: int8, [outputs..., inputs...]; of a table [rows, features].
    scale: float32 of the same rank, 1 in place of the inputs.
    sums: int32, sums of the values over the inputs, [outputs...].
  """

  values: Any
  scale: Any
  sums: Any


def contracted_axes(
  path: tuple[str, ...], *, is_stacked: bool = False
) -> tuple[int, ...]:
  """Returns the axes with one scale: those that a kernel contracts.

  Args:
    path: of a parameter of a language model.
    is_stacked: whether its first axis is that of layers.

  Returns:
    The axes; of a table of token embeddings, its features. None for other
    parameters, such as norms.
  """
  if path[-2:] in _TABLES:
    return (1,)
  if path[-1] != 'kernel':
    return ()
  first = int(is_stacked)
  # The attention output alone contracts two axes, [heads, kv].
  return tuple(range(first, first + (2 if path[-2:-1] == ('out',) else 1)))


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


def pack(kernel: Any, axes: tuple[int, ...]) -> Rounded:
  """Rounds a kernel and moves its contracted axes to the end.

  Args:
    kernel: see `quantize`.
    axes: the contracted axes, as consecutive numbers.
  """
  last = tuple(range(-len(axes), 0))
  values, scale = (
    kernel_first.arrange(x, axes) for x in quantize(kernel, axes)
  )
  return Rounded(values, scale, values.sum(last, dtype=jnp.int32))


def multiply(x: Any, kernel: Rounded, dtype: Any, quantization: str) -> Any:
  """Returns the product of states and a rounded kernel.

  Args:
    x: floats, [batch, length, inputs...].
    kernel: the kernel.
    dtype: of the result.
    quantization: of `TransformerConfig`. All but 'int8' round the states, too,
      one scale per token, so that the product is one of integers.

  Returns:
    [batch, length, outputs...].
  """
  batch, length = x.shape[:2]
  outputs = kernel.values.shape[: 2 - x.ndim]
  num_inputs = math.prod(x.shape[2:])
  x = x.reshape(batch, length, num_inputs)
  values = kernel.values.reshape(-1, num_inputs)
  scale = kernel.scale.reshape(-1)
  contracted = (((2,), (1,)), ((), ()))
  if quantization != 'int8':
    x = x.astype(jnp.float32)
    step = jnp.abs(x).max(axis=-1, keepdims=True) / _LARGEST
    step = jnp.where(step == 0, 1, step)
    x = jnp.rint(x / step)
    is_unsigned = quantization == 'int8_unsigned'
    x = (x + _OFFSET).astype(jnp.uint8) if is_unsigned else x.astype(jnp.int8)
    if quantization == 'int8_left':
      product = kernel_first.multiply(values, x, jnp.int32)
    elif is_unsigned:
      product = mixed_product.multiply(kernel_first.pad_lone_row(x), values)
      product -= _OFFSET * kernel.sums.reshape(-1)
    else:
      product = jax.lax.dot_general(
        kernel_first.pad_lone_row(x),
        values,
        contracted,
        preferred_element_type=jnp.int32,
      )
    product = product[:, :length]
    product = product.astype(jnp.float32) * (step * scale)
  else:
    product = jax.lax.dot_general(
      x, values.astype(x.dtype), contracted, preferred_element_type=dtype
    )
    product *= scale
  return product.astype(dtype).reshape(batch, length, *outputs)


def dequantize(values: Any, scale: Any) -> Any:
  """Returns the float32 kernel of int8 values and scales."""
  kernel = values.astype(scale.dtype)
  kernel *= scale  # In place for NumPy.
  return kernel


def round_kernel(kernel: Any, axes: tuple[int, ...]) -> Any:
  """Returns a kernel in float32 after rounding to int8; see `quantize`."""
  return dequantize(*quantize(kernel, axes))
