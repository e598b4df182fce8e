# SPDX-License-Identifier: Apache-2.0
"""Laws of optimizers and schedules, against values worked by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2s_jax import optim


@pytest.mark.parametrize(
  'options, expected',
  [
    (dict(), {0: 2.0, 99: 2.0}),
    (dict(warmup_steps=4), {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 99: 2.0}),
    # The step with number n has index n - 1: sqrt(4 / 16) is one half.
    (
      dict(warmup_steps=4, decay='rsqrt'),
      {0: 0.5, 3: 2.0, 4: 2 * (4 / 5) ** 0.5, 15: 1.0},
    ),
    (dict(decay='rsqrt'), {0: 2.0, 3: 1.0, 99: 0.2}),
    (
      dict(warmup_steps=2, decay='linear', total_steps=10),
      {0: 1.0, 1: 2.0, 2: 2.0, 3: 1.75, 6: 1.0, 9: 0.25, 10: 0.0, 20: 0.0},
    ),
    (
      dict(warmup_steps=2, decay='cosine', total_steps=10),
      {0: 1.0, 1: 2.0, 4: 1 + 0.5**0.5, 6: 1.0, 10: 0.0, 20: 0.0},
    ),
  ],
)
def test_schedules_at_steps_worked_by_hand(options, expected):
  schedule = optim.learning_rate_schedule(2.0, **options)
  for step, value in expected.items():
    np.testing.assert_allclose(schedule(step), value, atol=1e-6, err_msg=step)
    np.testing.assert_allclose(schedule(jnp.int32(step)), value, atol=1e-6)


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(decay='step'), "decay='step' is not one of .*rsqrt"),
    (dict(decay='linear'), "'linear' needs total_steps .*total_steps=None"),
    (
      dict(decay='cosine', warmup_steps=9, total_steps=9),
      'warmup_steps=9; got total_steps=9',
    ),
  ],
)
def test_schedules_that_mean_nothing_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    optim.learning_rate_schedule(**options)


PARAMS = {
  'layer': {'kernel': jnp.array([2.0]), 'bias': jnp.array([2.0])},
  'norm': {'scale': jnp.array([2.0])},
  'embedder': {'embedding': jnp.array([2.0])},
}


def updated(optimizer, grads, num_steps=1, params=PARAMS):
  state = optimizer.transform.init(params)
  for _ in range(num_steps):
    updates, state = optimizer.transform.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def constant_grads(value):
  return {
    name: {leaf: jnp.array([value]) for leaf in leaves}
    for name, leaves in PARAMS.items()
  }


def test_kernels_and_embeddings_decay_and_nothing_else():
  params = updated(optim.adamw(0.5, weight_decay=0.1), constant_grads(0.0))
  assert params['layer']['kernel'] == pytest.approx(2 - 0.5 * 0.1 * 2)
  assert params['embedder']['embedding'] == pytest.approx(1.9)
  assert params['layer']['bias'] == 2
  assert params['norm']['scale'] == 2


def test_two_steps_of_adamw_against_numpy():
  b1, b2, epsilon, decay, rate = 0.9, 0.99, 1e-3, 0.1, 0.5
  optimizer = optim.adamw(
    rate, b1, b2, epsilon, weight_decay=decay, max_grad_norm=None
  )
  found = updated(optimizer, constant_grads(3.0), num_steps=2)
  w = mean = variance = 0.0
  w = 2.0
  for step in (1, 2):
    mean = b1 * mean + (1 - b1) * 3.0
    variance = b2 * variance + (1 - b2) * 9.0
    corrected = variance / (1 - b2**step)
    direction = mean / (1 - b1**step) / (corrected**0.5 + epsilon)
    w -= rate * (direction + decay * w)
  np.testing.assert_allclose(found['layer']['kernel'], [w], rtol=1e-5)


def test_the_global_norm_is_clipped_and_small_gradients_are_not():
  # Four numbers of 3 have the norm 6; Adam sees what is left of them.
  def moment(max_grad_norm, grad):
    optimizer = optim.adamw(max_grad_norm=max_grad_norm)
    state = optimizer.transform.init(PARAMS)
    _, state = optimizer.transform.update(constant_grads(grad), state, PARAMS)
    return float(optax.tree_utils.tree_get(state, 'mu')['norm']['scale'][0])

  assert moment(1.0, 3.0) == pytest.approx(0.1 * 3 / 6)
  assert moment(None, 3.0) == pytest.approx(0.1 * 3)
  assert moment(1.0, 0.3) == pytest.approx(0.1 * 0.3)


def test_the_schedule_is_the_one_inside():
  schedule = optim.learning_rate_schedule(1.0, warmup_steps=4)
  optimizer = optim.adamw(schedule, epsilon=0.0, max_grad_norm=None)
  # With epsilon 0 the first step of Adam is the learning rate itself.
  found = updated(optimizer, constant_grads(5.0))
  np.testing.assert_allclose(found['norm']['scale'], [2 - 0.25], rtol=1e-6)
  assert optimizer.schedule(0) == 0.25
  assert optim.adamw(0.125).schedule(7) == 0.125
