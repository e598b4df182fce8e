# SPDX-License-Identifier: Apache-2.0
"""Laws of the loss: a sum in nats, its weight, and right answers."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from l2s_jax import losses

# Softmax of log(p) is p.
LOGITS = jnp.log(
  jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]]])
)


def test_cross_entropy_by_hand():
  loss, sums = losses.token_cross_entropy(
    LOGITS, jnp.array([[0, 1, 1]]), jnp.ones((1, 3))
  )
  expected = -np.log(0.5) - np.log(0.1) - np.log(0.7)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(sums['loss'], expected, rtol=1e-6)
  assert sums['loss_weight'] == 3
  assert sums['num_correct'] == 2  # not the second
  # A constant on all logits is not a loss.
  shifted, _ = losses.token_cross_entropy(
    LOGITS + 100, jnp.array([[0, 1, 1]]), jnp.ones((1, 3))
  )
  np.testing.assert_allclose(shifted, expected, rtol=1e-4)


def test_weights_count_tokens_and_padding_counts_nothing():
  # Id 0 is a token like any other; the padding has an id out of range.
  loss, sums = losses.token_cross_entropy(
    LOGITS, jnp.array([[0, 2, -1]]), jnp.array([[1.0, 0.5, 0.0]])
  )
  expected = -np.log(0.5) - 0.5 * np.log(0.8)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert sums['loss_weight'] == 1.5
  assert sums['num_correct'] == 1.5


def test_zero_weights_give_zero_sums_and_no_gradient():
  def loss(logits):
    return losses.token_cross_entropy(
      logits, jnp.array([[0, 1, 1]]), jnp.zeros((1, 3))
    )

  grads, sums = jax.grad(loss, has_aux=True)(LOGITS)
  assert all(value == 0 for value in sums.values())
  np.testing.assert_array_equal(grads, np.zeros_like(LOGITS))


def test_gradient_is_probability_minus_target():
  grads, _ = jax.grad(losses.token_cross_entropy, has_aux=True)(
    LOGITS, jnp.array([[0, 1, 1]]), jnp.array([[1.0, 0.0, 2.0]])
  )
  expected = [[[-0.5, 0.25, 0.25], [0.0, 0.0, 0.0], [0.4, -0.6, 0.2]]]
  np.testing.assert_allclose(grads, expected, atol=1e-6)


def test_sums_of_parts_are_the_sums_of_the_whole():
  generator = np.random.default_rng(0)
  logits = jnp.asarray(generator.normal(size=(6, 4, 9)), jnp.float32)
  targets = jnp.asarray(generator.integers(9, size=(6, 4)), jnp.int32)
  weights = jnp.asarray(generator.integers(2, size=(6, 4)), jnp.float32)
  _, whole = losses.token_cross_entropy(logits, targets, weights)
  parts = [
    losses.token_cross_entropy(logits[rows], targets[rows], weights[rows])[1]
    for rows in (slice(0, 1), slice(1, 6))
  ]
  for name, value in whole.items():
    np.testing.assert_allclose(
      value, sum(part[name] for part in parts), rtol=1e-6
    )


def test_logits_far_apart_stay_finite():
  logits = jnp.array([[[1e4, -1e4]]])
  loss, _ = losses.token_cross_entropy(
    logits, jnp.array([[1]]), jnp.ones((1, 1))
  )
  np.testing.assert_allclose(loss, 2e4)


def test_a_shape_that_is_not_the_annotations_is_refused_in_tests():
  """Else the checker that conftest.py turns on is off."""
  with pytest.raises(jaxtyping.TypeCheckError, match='targets'):
    losses.token_cross_entropy(LOGITS, jnp.array([[0, 1]]), jnp.ones((1, 3)))
