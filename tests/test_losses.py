# SPDX-License-Identifier: Apache-2.0
"""Laws of the loss: a sum in nats, its weight, and right answers."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from l2s_jax.models import losses

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


def in_float64(logits, targets, weights, label_smoothing, z_loss):
  """The definition, with the table of soft targets written out."""
  logits = np.asarray(logits, np.float64)
  num_ids = logits.shape[-1]
  log_z = np.log(np.exp(logits).sum(-1))
  soft = np.full(logits.shape, label_smoothing / (num_ids - 1))
  np.put_along_axis(soft, targets[..., None], 1 - label_smoothing, axis=-1)
  log_soft = np.log(soft, where=soft > 0, out=np.zeros_like(soft))
  divergence = (soft * (log_soft - (logits - log_z[..., None]))).sum(-1)
  gradient = np.exp(logits - log_z[..., None])
  gradient *= 1 + 2 * z_loss * log_z[..., None]
  gradient = (gradient - soft) * weights[..., None]
  return (divergence + z_loss * log_z**2) @ weights.T, gradient


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1, 0.6])
@pytest.mark.parametrize('z_loss', [0.0, 1e-4, 0.1])
def test_smoothing_and_z_loss_against_float64(label_smoothing, z_loss):
  generator = np.random.default_rng(0)
  logits = generator.normal(size=(1, 5, 13), scale=3).astype(np.float32)
  targets = generator.integers(13, size=(1, 5))
  weights = np.array([[1, 1, 0, 1, 0.5]], np.float32)
  (total, sums), grads = jax.value_and_grad(
    losses.token_cross_entropy, has_aux=True
  )(
    jnp.asarray(logits),
    jnp.asarray(targets),
    jnp.asarray(weights),
    label_smoothing=label_smoothing,
    z_loss=z_loss,
  )
  expected, gradient = in_float64(
    logits, targets, weights, label_smoothing, z_loss
  )
  np.testing.assert_allclose(total, expected.item(), rtol=1e-5)
  np.testing.assert_allclose(grads, gradient, atol=1e-6)
  # What is logged does not depend on the settings.
  plain, _ = in_float64(logits, targets, weights, 0.0, 0.0)
  z_only, _ = in_float64(logits, targets, weights, 0.0, z_loss)
  np.testing.assert_allclose(sums['loss'], plain.item(), rtol=1e-5)
  np.testing.assert_allclose(
    sums['z_loss'], (z_only - plain).item(), rtol=1e-4, atol=1e-6
  )


def test_a_softmax_equal_to_the_soft_targets_costs_nothing():
  logits = jnp.log(jnp.array([[[0.7, 0.1, 0.1, 0.1]]]))
  (total, sums), grads = jax.value_and_grad(
    losses.token_cross_entropy, has_aux=True
  )(logits, jnp.array([[0]]), jnp.ones((1, 1)), label_smoothing=0.3)
  np.testing.assert_allclose(total, 0, atol=1e-6)
  np.testing.assert_allclose(grads, np.zeros_like(logits), atol=1e-6)
  np.testing.assert_allclose(sums['loss'], -np.log(0.7), rtol=1e-6)


@pytest.mark.parametrize('label_smoothing', [-0.1, 1.0])
def test_smoothing_that_is_no_probability_is_refused(label_smoothing):
  with pytest.raises(ValueError, match=f'label_smoothing={label_smoothing}: '):
    losses.token_cross_entropy(
      LOGITS,
      jnp.array([[0, 1, 1]]),
      jnp.ones((1, 3)),
      label_smoothing=label_smoothing,
    )


def test_sums_of_parts_are_the_sums_of_the_whole():
  generator = np.random.default_rng(0)
  logits = jnp.asarray(generator.normal(size=(6, 4, 9)), jnp.float32)
  targets = jnp.asarray(generator.integers(9, size=(6, 4)), jnp.int32)
  weights = jnp.asarray(generator.integers(2, size=(6, 4)), jnp.float32)

  def sums(rows):
    return losses.token_cross_entropy(
      logits[rows], targets[rows], weights[rows], z_loss=0.1
    )[1]

  whole = sums(slice(0, 6))
  parts = [sums(slice(0, 1)), sums(slice(1, 6))]
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


# --- divergence ---


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def kl(p, q):
  return (p * np.log(p / q)).sum(-1)


def student_and_teacher(seed=0):
  generator = np.random.default_rng(seed)
  logits, teacher = generator.normal(0, 2, (2, 3, 4, 11)).astype(np.float32)
  weights = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], np.float32)
  return logits, teacher, weights


@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize('b', [0.0, 1e-3, 0.3, 0.5, 1 - 1e-3, 1.0])
def test_divergence_goes_from_one_kl_to_the_other(b, temperature):
  logits, teacher, weights = student_and_teacher()
  found = losses.divergence(
    jnp.asarray(logits),
    jnp.asarray(teacher),
    jnp.asarray(weights),
    interpolation=b,
    temperature=temperature,
  )
  p, q = (
    softmax(x.astype(np.float64) / temperature) for x in (teacher, logits)
  )
  ends = {0.0: kl(p, q), 1.0: kl(q, p)}
  if b in ends:
    expected = ends[b]
  else:
    m = b * p + (1 - b) * q
    expected = (b * kl(p, m) + (1 - b) * kl(q, m)) / (b * (1 - b))
  np.testing.assert_allclose(found, (expected * weights).sum(), rtol=1e-3)
  if b < 0.01 or b > 0.99:  # No jump where the ends begin.
    near = ends[round(b)] * weights
    np.testing.assert_allclose(found, near.sum(), rtol=0.05)


def test_divergence_of_padding_is_nothing_and_of_equals_zero():
  logits, teacher, weights = map(jnp.asarray, student_and_teacher())
  padded = teacher.at[1, 2:].set(50.0).at[1, 3, 0].set(-1e4)
  for b in (0.0, 0.4, 1.0):
    of = functools.partial(
      losses.divergence, weights=weights, interpolation=b, temperature=1.5
    )
    assert of(logits, teacher) == of(logits, padded) > 1
    # A constant on all logits is none of it.
    nothing, gradient = jax.value_and_grad(of)(logits, logits + 3)
    np.testing.assert_allclose(nothing, 0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize('b', [1e-6, 1e-5, 1 - 1e-5, 1 - 1e-6])
def test_divergence_and_its_gradient_come_to_those_of_the_ends(b):
  logits, teacher, weights = map(jnp.asarray, student_and_teacher())

  def of(b):
    return jax.value_and_grad(losses.divergence)(
      logits, teacher, weights, interpolation=b
    )

  (found, found_gradient), (end, end_gradient) = of(b), of(float(round(b)))
  np.testing.assert_allclose(found, end, rtol=1e-3)
  np.testing.assert_allclose(found_gradient, end_gradient, atol=1e-2)


def test_divergence_of_two_tables_is_that_of_the_ids_that_both_have():
  logits, teacher, weights = map(jnp.asarray, student_and_teacher())
  expected = losses.divergence(logits[..., :8], teacher[..., :8], weights)
  found = losses.divergence(logits[..., :8], teacher, weights)
  assert found == expected


@pytest.mark.parametrize('b', [0.0, 0.4, 1.0])
def test_divergence_grows_with_what_goes_to_ids_that_the_teacher_lacks(b):
  """Else nothing would keep a student from writing them."""
  logits, teacher, weights = map(jnp.asarray, student_and_teacher())
  q = softmax(np.asarray(logits, np.float64) / 2)
  shared = (-np.log(q[..., :8].sum(-1)) * weights).sum()
  of = functools.partial(
    losses.divergence, weights=weights, interpolation=b, temperature=2.0
  )
  expected = of(logits[..., :8], teacher[..., :8]) + shared
  np.testing.assert_allclose(of(logits, teacher[..., :8]), expected, rtol=1e-5)
  if b == 0:  # The KL of all that the student has.
    p = softmax(np.asarray(teacher[..., :8], np.float64) / 2)
    whole = (kl(p, q[..., :8]) * weights).sum()
    np.testing.assert_allclose(expected, whole, rtol=1e-5)
