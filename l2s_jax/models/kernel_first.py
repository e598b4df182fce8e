# SPDX-License-Identifier: Apache-2.0
"""Kernels stored by output, and products with the kernel as the left operand.

XLA:CPU rearranges the right operand of a product of int8 or bfloat16 into tiles
for AMX at every call, and reads the left one as it lies. A kernel is large and
the states of a token are not, so the kernel belongs on the left.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def arrange(kernel: Any, axes: tuple[int, ...]) -> Any:
  """Returns a kernel with its contracted axes last: [outputs..., inputs...].

  Args:
    kernel: the kernel, or a table of embeddings.
    axes: the contracted axes, as consecutive numbers.
  """
  return jnp.moveaxis(kernel, axes, tuple(range(-len(axes), 0)))


def multiply(values: Any, x: Any, dtype: Any) -> Any:
  """Returns the product of states and a kernel, the kernel on the left.

  Args:
    values: the kernel, [outputs, inputs].
    x: states of the same dtype, [batch, length, inputs].
    dtype: of the result. Of bfloat16, XLA:CPU converts both operands to float32
      before the product, unless this is float32.

  Returns:
    [batch, length, outputs].
  """
  batch, length, num_inputs = x.shape
  x = pad_lone_row(x).reshape(-1, num_inputs)
  product = jax.lax.dot_general(
    values, x, (((1,), (1,)), ((), ())), preferred_element_type=dtype
  )
  return product[:, : batch * length].T.reshape(batch, length, -1)


def pad_lone_row(x: Any) -> Any:
  """Adds a row of zeros to a single one, [1, 1, inputs].

  XLA:CPU lowers a product of one row of int8 or bfloat16 to a loop without
  vector instructions, 4 to 80 times as slow as its library's product of two.
  """
  return jnp.pad(x, ((0, 0), (0, 1), (0, 0))) if x[..., 0].size == 1 else x


def multiply_bfloat16(
  x: Float[Array, 'batch length ...'], kernel: Float[Any, '...'], dtype: Any
) -> Float[Array, 'batch length ...']:
  """Returns the product of states and a bfloat16 kernel from `arrange`.

  States are rounded to bfloat16; sums are in float32.

  Args:
    x: [batch, length, inputs...].
    kernel: [outputs..., inputs...].
    dtype: of the result.
  """
  outputs = kernel.shape[: 2 - x.ndim]
  x = x.reshape(*x.shape[:2], -1).astype(kernel.dtype)
  values = kernel.reshape(math.prod(outputs), -1)
  product = multiply(values, x, jnp.float32).astype(dtype)
  return product.reshape(*x.shape[:2], *outputs)


def bits(table: Any) -> Any:
  """Returns a bfloat16 table of embeddings as integers.

  Of rows gathered from bfloat16, XLA:CPU converts the whole table to float32
  first.
  """
  return jax.lax.bitcast_convert_type(table, jnp.uint16)


def of_bits(rows: Any) -> Any:
  """Returns the bfloat16 rows of a table from `bits`."""
  return jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
