# SPDX-License-Identifier: Apache-2.0
"""Laws of int8 kernels: their error, their scales, rounding twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.models import int8


def kernels(shape, seed=0):
  """Returns a kernel whose outputs have very different sizes."""
  rng = np.random.default_rng(seed)
  sizes = np.exp(rng.uniform(-12, 12, shape[-1:]))
  return (rng.normal(size=shape) * sizes).astype(np.float32)


@pytest.mark.parametrize(
  ('shape', 'axes'), [((64, 33), (0,)), ((4, 16, 33), (0, 1)), ((5, 8), (0,))]
)
def test_the_error_is_half_a_step_of_the_largest_in_an_output(shape, axes):
  kernel = kernels(shape)
  values, scale = int8.quantize(kernel, axes)
  assert values.dtype == np.int8 and scale.dtype == np.float32
  assert values.min() >= -127
  largest = np.abs(kernel).max(axes, keepdims=True)
  np.testing.assert_allclose(scale, largest / 127, rtol=2**-16)
  error = np.abs(int8.dequantize(values, scale) - kernel)
  assert (error <= 0.5001 * largest / 127).all()


def test_rounding_again_changes_nothing():
  kernel = kernels((64, 4096), seed=1)
  values, scale = int8.quantize(kernel, (0,))
  again, same_scale = int8.quantize(int8.dequantize(values, scale), (0,))
  np.testing.assert_array_equal(again, values)
  np.testing.assert_array_equal(same_scale, scale)


def test_jax_and_numpy_round_alike():
  kernel = kernels((64, 512), seed=2)
  quantize = jax.jit(int8.quantize, static_argnums=1)
  for found, expected in zip(
    quantize(jnp.asarray(kernel), (0,)),
    int8.quantize(kernel, (0,)),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)


def test_outputs_of_zeros_stay_zeros():
  values, scale = int8.quantize(np.zeros((3, 2), np.float32), (0,))
  np.testing.assert_array_equal(values, 0)
  np.testing.assert_array_equal(scale, 1)


def test_stacked_layers_have_scales_of_their_own():
  kernel = kernels((3, 4, 6, 5))
  path = ('decoder', 'layers', 'self_attention', 'out', 'kernel')
  axes = int8.contracted_axes(path, is_stacked=True)
  values, scale = int8.quantize(kernel, axes)
  for layer in range(3):
    found = int8.quantize(kernel[layer], int8.contracted_axes(path))
    np.testing.assert_array_equal(found[0], values[layer])
    np.testing.assert_array_equal(found[1], scale[layer])


def test_embeddings_and_norms_are_no_kernels():
  assert int8.contracted_axes(('token_embedder', 'embedding')) == ()
  assert int8.contracted_axes(('decoder', 'final_norm', 'scale')) == ()
