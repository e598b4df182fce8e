# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules, configurable by gin.

An optimizer is made in two steps: gin binds its settings, and `make` builds the
transformation for the parameters, given their paths and logical axes. Update
rules are optax's, except Adafactor's.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from l2s_jax.training import adafactor as adafactor_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optimizer before its parameters are known.

  Attributes:
    make: returns the gradient transformation for a tree of logical axes
      (`PartitionSpec`), one per parameter. Raises a ValueError if
      `learning_rate_by_path` does not fit the paths.
    schedule: maps the number of updates done to the rate of the next update.
    description: JSON-serialisable: the name, and settings that affect the
      optimizer state. A state is unusable under another description.
    is_trained: returns whether the next step trains a parameter, given its path
      and the number of steps done. Untrained parameters need no gradient; any
      value may stand for it, and their updates are 0.
    projector_steps: number of first steps that train the projector alone.
  """

  make: Callable[[PyTree], optax.GradientTransformation]
  schedule: optax.Schedule
  description: dict[str, Any]
  is_trained: Callable[[str, int], bool]
  projector_steps: int = 0

  def phases(self) -> tuple[int, ...]:
    """Returns the first step of each phase of training."""
    return (0, self.projector_steps) if self.projector_steps else (0,)


@gin.configurable(module='l2s_jax')
def learning_rate_schedule(
  base_learning_rate: float = 1e-3,
  factors: str = 'constant * linear_warmup',
  warmup_steps: int = 0,
  total_steps: int | None = None,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20000,
  steps_per_cycle: int = 100000,
  min_learning_rate: float = 0.0,
) -> optax.Schedule:
  """Returns a product of factors, named and defined as in T5X.

  With n the number of the update, from 1, and w = max(warmup_steps, 1):

    constant                base_learning_rate
    linear_warmup           min(n / w, 1)
    linear_decay            alone:
                            base_learning_rate
                            * min(n / w, 1 + decay_factor * (w - n))
    rsqrt_decay             1 / sqrt(max(n, w))
    rsqrt_normalized_decay  sqrt(w / max(n, w))
    decay_every             decay_factor ** floor(n / steps_per_decay)
    cosine_decay            after the warm-up, from 1 to 0 in
                            steps_per_cycle updates, repeated
    linear_to_end           after the warm-up, linearly from 1 to 0 at
                            total_steps
    cosine_to_end           the same along half a cosine

  T5X lacks the last two. T5X numbers updates from 0, so the first update of its
  warm-up has a rate of 0: our n-th update is its (n + 1)-th.

  Args:
    base_learning_rate: value of the factor 'constant'.
    factors: names of factors, separated by '*'.
    warmup_steps: number of updates until the full rate.
    total_steps: for 'linear_to_end' and 'cosine_to_end'.
    decay_factor: for 'decay_every' and 'linear_decay'.
    steps_per_decay: for 'decay_every'.
    steps_per_cycle: for 'cosine_decay'.
    min_learning_rate: lower bound of the rate; T5X has 1e-8.

  Raises:
    ValueError: for an unknown factor, a factor without its `total_steps`,
      'linear_decay' with another factor, or a negative number.
  """
  for name, value in (
    ('LEARNING_RATE', base_learning_rate),
    ('WARMUP_STEPS', warmup_steps),
    ('learning_rate_schedule.min_learning_rate', min_learning_rate),
  ):
    if not value >= 0:
      raise ValueError(f'{name}={value!r}: expected a number, at least 0.')
  warm = max(warmup_steps, 1)

  def to_end(n):
    assert total_steps is not None
    # 1 in the first update after the warm-up; not yet 0 in the last.
    done = (n - 1 - warmup_steps) / (total_steps - warmup_steps)
    return 1 - jnp.clip(done, 0.0, 1.0)

  curves = {
    'constant': lambda n: base_learning_rate,
    'linear_warmup': lambda n: jnp.minimum(n / warm, 1.0),
    'linear_decay': lambda n: (
      base_learning_rate * jnp.minimum(n / warm, 1 + decay_factor * (warm - n))
    ),
    'rsqrt_decay': lambda n: jnp.maximum(n, warm) ** -0.5,
    'rsqrt_normalized_decay': lambda n: (warm / jnp.maximum(n, warm)) ** 0.5,
    'decay_every': lambda n: decay_factor ** (n // steps_per_decay),
    'cosine_decay': lambda n: _half_cosine(
      1 - jnp.maximum(n - warmup_steps, 0.0) / steps_per_cycle % 1.0
    ),
    'linear_to_end': to_end,
    'cosine_to_end': lambda n: _half_cosine(to_end(n)),
  }
  names = _parse_factors(factors, curves, warmup_steps, total_steps)

  def schedule(step):
    n = jnp.asarray(step, jnp.float32) + 1
    rate = jnp.ones((), jnp.float32)
    for name in names:
      rate *= curves[name](n)
    return jnp.maximum(rate, min_learning_rate)

  return schedule


def _half_cosine(left: jax.Array) -> jax.Array:
  return 0.5 - 0.5 * jnp.cos(jnp.pi * left)


def _parse_factors(
  factors: str,
  known: Mapping[str, Any],
  warmup_steps: int,
  total_steps: int | None,
) -> list[str]:
  """Returns the names in `factors`, after validating them.

  Raises:
    ValueError: as in `learning_rate_schedule`.
  """
  names = [name.strip() for name in factors.split('*')]
  setting = f'learning_rate_schedule.factors={factors!r}'
  for name in names:
    if name not in known:
      raise ValueError(
        f'{setting}: {name!r} is not one of {", ".join(known)}. Join them with '
        "'*', as in 'constant * linear_warmup'."
      )
    if name.endswith('_to_end') and (
      total_steps is None or total_steps <= warmup_steps
    ):
      raise ValueError(
        f'{setting} needs total_steps greater than '
        f'warmup_steps={warmup_steps}; got total_steps={total_steps}.'
      )
  if 'linear_decay' in names and len(names) > 1:
    raise ValueError(
      f"{setting}: 'linear_decay' includes the base rate and the warm-up. Use "
      'it as the only factor.'
    )
  return names


@gin.configurable(module='l2s_jax')
def adamw(
  learning_rate: float | optax.Schedule = 1e-3,
  b1: float = 0.9,
  b2: float = 0.999,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
  max_grad_norm: float | None = 1.0,
  learning_rate_by_path: Mapping[str, float] | None = None,
  projector_steps: int = 0,
) -> Optimizer:
  """Returns AdamW (Loshchilov and Hutter, arXiv:1711.05101).

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment.
    weight_decay: of kernels and embeddings, times the learning rate; norms and
      biases have none.
    max_grad_norm: maximum global norm of the gradients; larger gradients are
      scaled down. None means no clipping.
    learning_rate_by_path: learning rate factors by regular expression of a
      parameter's whole path. The first match counts; without a match the factor
      is 1. Parameters with factor 0 are frozen, without slots or gradients:
      {'slm/.*': 0.0} trains the projector alone.
    projector_steps: number of first steps that train only the projector (and
      the layer of prompt embeddings, if any). Later steps train all parameters,
      at the schedule's rate of the step. Until then SLM and LLM have no
      gradients.
  """
  return _optimizer(
    lambda axes: optax.scale_by_adam(b1, b2, epsilon),
    learning_rate,
    learning_rate_by_path,
    projector_steps,
    max_grad_norm,
    weight_decay,
    {'name': 'adamw', 'b1': b1, 'b2': b2},
  )


@gin.configurable(module='l2s_jax')
def adafactor(
  learning_rate: float | optax.Schedule = 1e-3,
  decay_rate: float = 0.8,
  clipping_threshold: float | None = 1.0,
  multiply_by_parameter_scale: bool = True,
  min_dim_size_to_factor: int = 128,
  weight_decay: float = 0.0,
  max_grad_norm: float | None = None,
  learning_rate_by_path: Mapping[str, float] | None = None,
  projector_steps: int = 0,
) -> Optimizer:
  """Returns Adafactor as in T5X, without momentum; see `adafactor.py`.

  The defaults are those of T5's fine-tuning, with a constant rate and no
  warm-up.

  Args:
    learning_rate: a number, or a schedule of the step; relative to the root
      mean square (RMS) of each layer's parameter.
    decay_rate: second moments decay by 1 - n ** -decay_rate in the n-th update
      of the run (T5X needs `step_offset` for that).
    clipping_threshold: maximum RMS of the update of a layer's parameter, before
      the rates; larger updates are scaled down. None means no clipping.
    multiply_by_parameter_scale: False makes `learning_rate` absolute.
    min_dim_size_to_factor: minimum side of a factored matrix outside of stacks;
      smaller ones keep all second moments.
    weight_decay: as in `adamw`. T5X's `weight_decay_rate` applies to all
      parameters, and is not multiplied by the learning rate.
    max_grad_norm: as in `adamw`.
    learning_rate_by_path: as in `adamw`.
    projector_steps: as in `adamw`.
  """
  return _optimizer(
    lambda axes: adafactor_lib.scale_by_adafactor(
      axes,
      decay_rate=decay_rate,
      clipping_threshold=clipping_threshold,
      multiply_by_parameter_scale=multiply_by_parameter_scale,
      min_dim_size_to_factor=min_dim_size_to_factor,
    ),
    learning_rate,
    learning_rate_by_path,
    projector_steps,
    max_grad_norm,
    weight_decay,
    {
      'name': 'adafactor',
      'decay_rate': decay_rate,
      'min_dim_size_to_factor': min_dim_size_to_factor,
    },
  )


@gin.configurable(module='l2s_jax')
def lion(
  learning_rate: float | optax.Schedule = 1e-4,
  b1: float = 0.9,
  b2: float = 0.99,
  weight_decay: float = 0.0,
  max_grad_norm: float | None = 1.0,
  learning_rate_by_path: Mapping[str, float] | None = None,
  projector_steps: int = 0,
) -> Optimizer:
  """Returns Lion (Chen et al., arXiv:2302.06675).

  Its updates are signs: the authors use a third to a tenth of AdamW's learning
  rate, and three to ten times its weight decay.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: weight of the momentum in the update; the gradient has 1 - b1.
    b2: decay of the momentum.
    weight_decay: as in `adamw`.
    max_grad_norm: as in `adamw`.
    learning_rate_by_path: as in `adamw`.
    projector_steps: as in `adamw`.
  """
  return _optimizer(
    lambda axes: optax.scale_by_lion(b1, b2),
    learning_rate,
    learning_rate_by_path,
    projector_steps,
    max_grad_norm,
    weight_decay,
    {'name': 'lion', 'b1': b1, 'b2': b2},
  )


def _check_settings(
  description: Mapping[str, Any],
  projector_steps: int,
  max_grad_norm: float | None,
  weight_decay: float,
) -> None:
  """Validates the settings that all optimizers share.

  Raises:
    ValueError: with the setting and its valid range.
  """
  name = description['name']
  for limits, fits, values in (
    (
      'at least 0 and below 1',
      lambda x: 0 <= x < 1,
      {key: description.get(key, 0) for key in ('b1', 'b2')},
    ),
    ('at least 0', lambda x: x >= 0, {'weight_decay': weight_decay}),
    ('above 0, or None', lambda x: x > 0, {'max_grad_norm': max_grad_norm}),
  ):
    for key, value in values.items():
      if value is not None and not fits(value):
        raise ValueError(f'{name}.{key}={value!r}: expected a number {limits}.')
  if not isinstance(projector_steps, int) or projector_steps < 0:
    raise ValueError(
      f'PROJECTOR_STEPS={projector_steps!r}: expected a number of steps, at '
      'least 0.'
    )


def _optimizer(
  direction: Callable[[PyTree], optax.GradientTransformation],
  learning_rate: float | optax.Schedule,
  learning_rate_by_path: Mapping[str, float] | None,
  projector_steps: int,
  max_grad_norm: float | None,
  weight_decay: float,
  description: dict[str, Any],
) -> Optimizer:
  """Returns an optimizer with the parts that all optimizers share.

  The structure of the optimizer state does not depend on the values of learning
  rate, clipping and weight decay, so these may change within a run.

  Args:
    direction: returns the update rule before the learning rate, given axes.
    learning_rate: a number, or a schedule of the step.
    learning_rate_by_path: as in `adamw`.
    projector_steps: as in `adamw`.
    max_grad_norm: as in `adamw`.
    weight_decay: as in `adamw`.
    description: the name, and settings that affect the optimizer state.
  """
  _check_settings(description, projector_steps, max_grad_norm, weight_decay)
  schedule = (
    learning_rate
    if callable(learning_rate)
    else optax.constant_schedule(learning_rate)
  )
  by_path = dict(learning_rate_by_path or {})
  _check_numbers(by_path)
  is_trained = [
    [pattern, multiple > 0] for pattern, multiple in by_path.items()
  ]
  has_frozen = 0 in by_path.values()
  if has_frozen:  # Frozen parameters have no slots.
    description = description | {'is_trained_by_path': is_trained}
  if projector_steps:
    description = description | {'projector_steps': projector_steps}

  def make(axes):
    leaves = jax.tree_util.tree_leaves_with_path(axes)
    paths = [_join(path) for path, _ in leaves]
    multiples = _multiples(paths, by_path)

    def parts(schedule):
      return (
        direction(axes),
        optax.add_decayed_weights(weight_decay, _is_decayed),
        optax.scale_by_learning_rate(schedule),
        _multiply(multiples) if by_path else optax.identity(),
      )

    clip = (
      optax.identity()
      if max_grad_norm is None
      else optax.clip_by_global_norm(max_grad_norm)
    )
    if projector_steps:
      _check_projector(projector_steps, paths)
      transform = optax.chain(
        clip, _projector_first(projector_steps, schedule, parts)
      )
    else:
      transform = optax.chain(clip, *parts(schedule))
    if not has_frozen:
      return transform
    return optax.partition(
      {'trained': transform, 'frozen': optax.set_to_zero()},
      lambda params: _map_by_path(
        lambda path, _: 'trained' if multiples[path] else 'frozen', params
      ),
    )

  def is_trained_at(path, step):
    return _multiple(path, by_path) > 0 and (
      step >= projector_steps or not _waits(path)
    )

  return Optimizer(make, schedule, description, is_trained_at, projector_steps)


def without(
  transform: optax.GradientTransformation, is_trained: Callable[[str], bool]
) -> optax.GradientTransformation:
  """Holds some parameters constant, without slots.

  Args:
    transform: of the trained parameters.
    is_trained: predicate of a parameter's path.
  """
  return optax.partition(
    {'trained': transform, 'held': optax.set_to_zero()},
    lambda params: _map_by_path(
      lambda path, _: 'trained' if is_trained(path) else 'held', params
    ),
  )


class SpikesState(NamedTuple):
  """State of `skip_spikes`.

  Attributes:
    num_norms: number of gradient norms in the history.
    history: sum of the norms, each step weighted by a decay.
    limit: norm above which the latest update was to be left out; infinite while
      the history is short.
    num_skipped: number of updates left out.
    inner: state of the optimizer.
  """

  num_norms: jax.Array
  history: jax.Array
  limit: jax.Array
  num_skipped: jax.Array
  inner: Any


# The mean of the history is that of about the last 100 steps, and counts once
# it has as many.
_HISTORY_DECAY = 0.99
_SHORTEST_HISTORY = 100


def skip_spikes(optimizer: Optimizer, ratio: int | float | None) -> Optimizer:
  """Leaves out updates whose gradients are far larger than those before.

  An update is left out if the global norm of its gradients is above `ratio`
  times the mean of the norms before, an exponential moving average over about
  100 steps. Parameters and the optimizer's state then stay as they are. The
  first 100 updates are never left out, nor are gradients that are not finite,
  which end training with an error. The norm of a skipped update enters the mean
  as the limit itself, so that lasting growth is accepted after some steps.

  Args:
    optimizer: of all parameters.
    ratio: of the largest accepted norm to the mean. None accepts all, and
      returns `optimizer` itself.

  Raises:
    ValueError: if `ratio` is not above 1.
  """
  if ratio is None:
    return optimizer
  if not ratio > 1:
    raise ValueError(f'SKIP_SPIKES={ratio!r}: expected a number above 1.')

  def make(axes: PyTree) -> optax.GradientTransformation:
    inner = optimizer.make(axes)

    def init(params):
      zero = jnp.zeros((), jnp.float32)
      none = jnp.zeros((), jnp.int32)
      return SpikesState(none, zero, zero, none, inner.init(params))

    def update(grads, state, params=None):
      norm = optax.tree.norm(grads)
      weights = 1 - _HISTORY_DECAY**state.num_norms
      limit = jnp.where(
        state.num_norms < _SHORTEST_HISTORY,
        jnp.inf,
        ratio * (1 - _HISTORY_DECAY) * state.history / weights,
      )
      skipped = jnp.isfinite(norm) & (norm > limit)
      updates, after = inner.update(grads, state.inner, params)

      def kept(new, old):
        return jax.tree.map(lambda x, y: jnp.where(skipped, y, x), new, old)

      return (
        kept(updates, jax.tree.map(jnp.zeros_like, updates)),
        SpikesState(
          state.num_norms + 1,
          _HISTORY_DECAY * state.history + jnp.minimum(norm, limit),
          limit,
          state.num_skipped + skipped,
          kept(after, state.inner),
        ),
      )

    return optax.GradientTransformation(init, update)

  return dataclasses.replace(
    optimizer,
    make=make,
    description=optimizer.description | {'skip_spikes': True},
  )


def skipped(before: PyTree, after: PyTree) -> dict[str, jax.Array]:
  """Returns what `skip_spikes` did in an update, to log.

  Args:
    before: optimizer state before the update.
    after: optimizer state after it.

  Returns:
    'num_skipped', 1 if the update was left out, and its 'grad_norm_limit';
    nothing without `skip_spikes`.
  """

  def is_it(x: Any) -> bool:
    return isinstance(x, SpikesState)

  old, new = (
    [x for x in jax.tree.leaves(tree, is_leaf=is_it) if is_it(x)]
    for tree in (before, after)
  )
  if not new:
    return {}
  return {
    'num_skipped': new[0].num_skipped - old[0].num_skipped,
    'grad_norm_limit': new[0].limit,
  }


def _waits(path: str) -> bool:
  """Returns whether a parameter waits while the projector trains alone."""
  return path.split('/')[0] in ('llm', 'slm')


def _check_projector(projector_steps: int, paths: list[str]) -> None:
  """Checks that there is a projector.

  Raises:
    ValueError: for a single language model.
  """
  if not any(path.startswith('projector/') for path in paths):
    raise ValueError(
      f'PROJECTOR_STEPS={projector_steps}: the first steps train only the '
      'projector, but a single language model has no projector. Set it to 0.'
    )


class _WaitingState(NamedTuple):
  """State of `_from_update`: number of updates, and the inner state."""

  num_updates: jax.Array
  inner: Any


def _projector_first(
  num_steps: int,
  schedule: optax.Schedule,
  parts: Callable[[optax.Schedule], tuple[optax.GradientTransformation, ...]],
) -> optax.GradientTransformation:
  """Updates the projector alone for `num_steps` steps, then all parameters.

  The waiting parameters have their own update count: Adam's bias correction
  needs the number of gradients in its moments, not the number of steps.

  Args:
    num_steps: number of steps that update the projector alone.
    schedule: maps the number of steps done to the rate.
    parts: returns the transformations of an update, given a schedule.
  """
  waiting = optax.chain(*parts(lambda count: schedule(count + num_steps)))
  return optax.partition(
    {
      'first': optax.chain(*parts(schedule)),
      'waiting': _from_update(num_steps, waiting),
    },
    lambda params: _map_by_path(
      lambda path, _: 'waiting' if _waits(path) else 'first', params
    ),
  )


def _from_update(
  first: int, transform: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Delays a transformation: its first `first` updates are 0."""

  def init(params):
    return _WaitingState(jnp.zeros((), jnp.int32), transform.init(params))

  def update(updates, state, params=None):
    begun = state.num_updates >= first
    found, inner = transform.update(updates, state.inner, params)
    found = jax.tree.map(lambda x: jnp.where(begun, x, 0), found)
    inner = jax.tree.map(
      lambda new, old: jnp.where(begun, new, old), inner, state.inner
    )
    return found, _WaitingState(state.num_updates + 1, inner)

  return optax.GradientTransformation(init, update)


def _check_numbers(by_path: Mapping[str, float]) -> None:
  """Validates `learning_rate_by_path`.

  Raises:
    ValueError: for an invalid regular expression or factor.
  """
  for pattern, multiple in by_path.items():
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f'learning_rate_by_path: {pattern!r} is not a regular expression: '
        f'{error}.'
      ) from error
    if not 0 <= multiple < math.inf:
      raise ValueError(
        f'learning_rate_by_path: {pattern!r} has {multiple!r}; expected a '
        'factor for the learning rate, at least 0.'
      )


def _multiples(
  paths: list[str], by_path: Mapping[str, float]
) -> dict[str, float]:
  """Returns the learning rate factor of each path.

  Raises:
    ValueError: names the patterns without effect, and all paths.
  """
  patterns = {path: _pattern_of(path, by_path) for path in paths}
  idle = [x for x in by_path if x not in patterns.values()]
  if idle:
    raise ValueError(
      f'learning_rate_by_path: {", ".join(map(repr, idle))} has no effect. A '
      'pattern must match the whole path of a trained parameter that no '
      'earlier pattern matches. The paths are:\n  ' + '\n  '.join(paths)
    )
  return {path: _multiple(path, by_path) for path in paths}


def _multiple(path: str, by_path: Mapping[str, float]) -> float:
  """Returns the learning rate factor of a path."""
  pattern = _pattern_of(path, by_path)
  return 1.0 if pattern is None else by_path[pattern]


def _pattern_of(path: str, by_path: Mapping[str, float]) -> str | None:
  """Returns the first pattern that matches a whole path, or None."""
  return next((x for x in by_path if re.fullmatch(x, path)), None)


def _multiply(
  multiples: Mapping[str, float],
) -> optax.GradientTransformation:
  """Multiplies updates by a factor per path."""
  return optax.stateless(
    lambda updates, params: _map_by_path(
      lambda path, update: update * multiples[path], updates
    )
  )


def _is_decayed(params: PyTree) -> PyTree:
  """Returns a tree of booleans: true for kernels and embeddings."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ('kernel', 'embedding'), params
  )


def _map_by_path(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: fn(_join(path), leaf), tree
  )


def _join(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
