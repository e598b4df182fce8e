# SPDX-License-Identifier: Apache-2.0
"""One training step: sums, gradients of what is trained, one update.

The frozen LLM goes in as an argument and never comes out. The loop around it is
`train.py`'s.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from l2s_jax.models import losses
from l2s_jax.runtime import gin_config
from l2s_jax.systems import parameters
from l2s_jax.training import distillation, microbatches
from l2s_jax.training import state as state_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """How the gradient of a step is computed.

  Attributes:
    num_microbatches: parts a batch is computed in, one after another.
    label_smoothing: probability given to all tokens in equal parts.
    z_loss: weight of the squared log of the softmax's denominator.
  """

  num_microbatches: int
  label_smoothing: float
  z_loss: float

  def __post_init__(self):
    """Checks them.

    Raises:
      ValueError: names the setting.
    """
    gin_config.check_positive(NUM_MICROBATCHES=self.num_microbatches)
    gin_config.check_between(0, 1, LABEL_SMOOTHING=self.label_smoothing)
    gin_config.check_between(0, math.inf, Z_LOSS=self.z_loss)

  def make(
    self,
    module: Any,
    optimizer: optax.GradientTransformation,
    is_trained: Callable[[str], bool] | None = None,
    lesson: distillation.Lesson | None = None,
  ) -> Callable[..., Any]:
    """Returns the step of a module: `train_step` with all but its arrays."""
    return functools.partial(
      train_step,
      module=module,
      optimizer=optimizer,
      loss=functools.partial(
        losses.token_cross_entropy,
        label_smoothing=self.label_smoothing,
        z_loss=self.z_loss,
      ),
      num_microbatches=self.num_microbatches,
      is_trained=is_trained,
      lesson=lesson,
    )


def train_step(
  state: state_lib.TrainState,
  frozen: PyTree,
  batch: Mapping[str, jax.Array],
  teacher_params: PyTree = None,
  *,
  module: Any,
  optimizer: optax.GradientTransformation,
  loss: Callable[..., Any] = losses.token_cross_entropy,
  num_microbatches: int = 1,
  is_trained: Callable[[str], bool] | None = None,
  lesson: distillation.Lesson | None = None,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and sums to log.

  Args:
    state: before the update; donated.
    frozen: parameters that get no gradient.
    batch: the keys of `data/features.py`.
    teacher_params: of the lesson's teacher.
    module: computes logits from all parameters and the batch.
    optimizer: of the trainable parameters.
    loss: `losses.token_cross_entropy`, perhaps with other weights in it.
    num_microbatches: parts of the batch that are computed one after another,
      in less memory; sums and gradients add up to those of the whole.
    is_trained: by a parameter's path, whether this step trains it; the others
      stay as they are, without a gradient. None trains all of the state's.
    lesson: what is learned of a teacher; None: nothing.
  """
  trained, held = parameters.split_by_path(state.trainable, is_trained)
  dropout_key = jax.random.fold_in(
    jax.random.wrap_key_data(state.key), state.step
  )

  def logits_fn(trained, batch, key):
    return module.apply(
      {'params': parameters.merge(frozen, held, trained)},
      batch,
      deterministic=False,
      rngs={'dropout': key},
    )

  def loss_fn(trained, batch, key):
    logits = logits_fn(trained, batch, key)
    return loss(
      logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
    )

  inputs: PyTree = batch
  if lesson is not None:
    inputs, loss_fn = lesson.begin(
      module,
      parameters.merge(frozen, state.trainable),
      teacher_params,
      batch,
      dropout_key,
      num_microbatches,
      logits_fn=logits_fn,
      loss=loss,
    )

  def gradient_sums(inputs, key):  # no gradient of LLM or teacher
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (_, sums), grads = grad_fn(trained, inputs, key)
    return sums, grads

  sums, grads = microbatches.add_up(
    gradient_sums, inputs, dropout_key, num_microbatches
  )
  weight = jnp.maximum(sums['loss_weight'], 1.0)
  grads = jax.tree.map(lambda g: g / weight, grads)
  nothing = jax.tree.map(jnp.zeros_like, held)
  updates, opt_state = optimizer.update(
    parameters.merge(grads, nothing), state.opt_state, state.trainable
  )
  updates, _ = parameters.split_by_path(updates, is_trained)
  new_state = state.replace(
    step=state.step + 1,
    trainable=parameters.merge(optax.apply_updates(trained, updates), held),
    opt_state=opt_state,
  )
  return new_state, {
    **sums,
    'grad_norm': optax.tree.norm(grads),
    'param_norm': optax.tree.norm(new_state.trainable),
  }
