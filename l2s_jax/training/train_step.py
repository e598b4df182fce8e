# SPDX-License-Identifier: Apache-2.0
"""One train step: loss sums, gradients of trained parameters, one update.

The frozen LLM is an argument and not a result. `train.py` has the loop.
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
from l2s_jax.training import distillation, microbatches, optim
from l2s_jax.training import state as state_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """Settings of the loss and of microbatches.

  Attributes:
    num_microbatches: sequential parts of a batch.
    label_smoothing: probability mass moved from the target to all other tokens.
    z_loss: weight of the squared log of the softmax's denominator.
  """

  num_microbatches: int
  label_smoothing: float
  z_loss: float

  def __post_init__(self):
    """Validates the settings.

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
    """Returns `train_step` of a module, with only its arrays left to pass.

    Args:
      module: LLM-to-SLM or a language model.
      optimizer: of the trainable parameters.
      is_trained: as in `train_step`.
      lesson: as in `train_step`.
    """
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
    frozen: parameters without gradient.
    batch: see `batch_keys.py`.
    teacher_params: parameters of the lesson's teacher.
    module: computes logits from all parameters and the batch.
    optimizer: of the trainable parameters.
    loss: a function like `losses.token_cross_entropy`.
    num_microbatches: sequential parts of the batch, to save memory; sums and
      gradients equal those of the whole batch.
    is_trained: predicate of a parameter's path; parameters for which it is
      false get neither gradient nor update. None trains all in `state`.
    lesson: distillation of a teacher; None means no distillation.

  Returns:
    The new state (donates the old one), and the sums of `loss`, with the global
    norms 'grad_norm' and 'param_norm', and the values of `optim.skipped`.
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

  def gradient_sums(inputs, key):  # No gradient of LLM or teacher.
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
    **optim.skipped(state.opt_state, opt_state),
    'grad_norm': optax.tree.norm(grads),
    'param_norm': optax.tree.norm(new_state.trainable),
  }
