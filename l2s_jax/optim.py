# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules, as gin can name them."""

import dataclasses

import gin
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """A gradient transformation and the schedule inside it, for the log."""

  transform: optax.GradientTransformation
  schedule: optax.Schedule


@gin.configurable(module='l2s_jax')
def learning_rate_schedule(
  peak: float = 1e-3,
  warmup_steps: int = 0,
  decay: str = 'constant',
  total_steps: int | None = None,
) -> optax.Schedule:
  """Returns a linear warm-up to `peak`, then a decay.

  Args:
    peak: learning rate at the end of the warm-up.
    warmup_steps: from 0 to `peak`.
    decay: 'constant'; 'rsqrt', T5's peak * sqrt(warmup / step); 'linear' or
      'cosine', to 0 after `total_steps`.
    total_steps: where 'linear' and 'cosine' end.

  Raises:
    ValueError: for an unknown decay, or one without its `total_steps`.
  """
  decays = ('constant', 'rsqrt', 'linear', 'cosine')
  if decay not in decays:
    raise ValueError(
      f'learning_rate_schedule.decay={decay!r} is not one of {decays}.'
    )
  if decay in ('linear', 'cosine') and (
    total_steps is None or total_steps <= warmup_steps
  ):
    raise ValueError(
      f'learning_rate_schedule.decay={decay!r} needs total_steps greater than '
      f'warmup_steps={warmup_steps}; got total_steps={total_steps}.'
    )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32) + 1  # the first step has number 1
    warmup = jnp.minimum(step / max(warmup_steps, 1), 1.0)
    if decay == 'rsqrt':
      warm = max(warmup_steps, 1)
      return peak * warmup * jnp.sqrt(warm / jnp.maximum(step, warm))
    if decay == 'constant':
      return peak * warmup
    assert total_steps is not None
    fraction = jnp.clip(
      (step - 1 - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0
    )
    if decay == 'linear':
      return peak * warmup * (1 - fraction)
    return peak * warmup * 0.5 * (1 + jnp.cos(jnp.pi * fraction))

  return schedule


@gin.configurable(module='l2s_jax')
def adamw(
  learning_rate: float | optax.Schedule = 1e-3,
  b1: float = 0.9,
  b2: float = 0.999,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
  max_grad_norm: float | None = 1.0,
) -> Optimizer:
  """Returns AdamW (Loshchilov and Hutter, arXiv:1711.05101).

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment.
    weight_decay: of kernels and embeddings; not of norms and biases.
    max_grad_norm: the global norm beyond which gradients are scaled down;
      None never does.
  """
  schedule = (
    learning_rate
    if callable(learning_rate)
    else optax.constant_schedule(learning_rate)
  )
  steps = []
  if max_grad_norm is not None:
    steps.append(optax.clip_by_global_norm(max_grad_norm))
  steps.append(
    optax.adamw(
      schedule, b1, b2, epsilon, weight_decay=weight_decay, mask=_is_decayed
    )
  )
  return Optimizer(optax.chain(*steps), schedule)


def _is_decayed(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ('kernel', 'embedding'), params
  )
