# SPDX-License-Identifier: Apache-2.0
"""Adafactor that treats each layer of a stack by itself, as T5X's does.

Adafactor (Shazeer and Stern, arXiv:1804.04235) keeps of a matrix's second
moments the means of its rows and of its columns alone, clips the update's
root mean square, and takes steps relative to the parameter's. Scanned layers
share one array with an axis `layers`, over which nothing here is averaged;
optax's Adafactor takes such an array for one parameter. Which axes make up
the rows and which the columns is told by their logical names. Updates equal
those of t5x/adafactor.py with its standard logical factor rules.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

PyTree = Any
Slots = dict[str, Array]

STACK_AXES = ('layers',)
ROW_AXES = ('embed', 'llm_embed')
COLUMN_AXES = ('vocab', 'mlp', 'heads', 'kv_heads', 'kv')
OTHER_AXES = ('relpos_buckets', 'abspos_buckets')


class AdafactorState(NamedTuple):
  """What Adafactor remembers.

  Attributes:
    step: updates done.
    slots: for each parameter `v`, the second moments; or `v_row` and `v_col`,
      their means over columns and over rows. Axes averaged over have size 1.
  """

  step: Array
  slots: PyTree


@dataclasses.dataclass(frozen=True)
class Factoring:
  """The parts that a parameter's axes play.

  Attributes:
    layer: axes of one layer: all but those of stacks.
    rows: axes that the rows are numbered by; empty if not factored.
    columns: the same for columns.
  """

  layer: tuple[int, ...]
  rows: tuple[int, ...] = ()
  columns: tuple[int, ...] = ()


def factoring(
  path: str,
  shape: tuple[int, ...],
  axes: PartitionSpec,
  min_dim_size_to_factor: int,
) -> Factoring:
  """Returns how T5X would factor a parameter.

  Stacks, and parameters of three axes or more, are factored into `ROW_AXES`
  and `COLUMN_AXES`, whatever their size. A matrix that is not in a stack is
  factored along its two axes, whatever their names, if both are long enough.
  All others keep every second moment.

  Args:
    path: the parameter's, for errors.
    shape: the parameter's.
    axes: the logical name of each axis.
    min_dim_size_to_factor: of a matrix outside of stacks.

  Raises:
    ValueError: for an axis without name or with a name that has no part here.
  """
  names = tuple(axes)
  known = (*STACK_AXES, *ROW_AXES, *COLUMN_AXES, *OTHER_AXES)
  if len(names) != len(shape) or not set(names) <= set(known):
    raise ValueError(
      f'adafactor: {path} {shape} has the logical axes {names}; expected one '
      f'of {known} for each axis. Say in adafactor.py what the others are.'
    )

  def having(part):
    return tuple(i for i, name in enumerate(names) if name in part)

  layer = tuple(i for i, name in enumerate(names) if name not in STACK_AXES)
  if len(layer) == len(names) <= 2:
    is_long = len(names) == 2 and min(shape) >= min_dim_size_to_factor
    return Factoring(layer, (0,), (1,)) if is_long else Factoring(layer)
  rows, columns = having(ROW_AXES), having(COLUMN_AXES)
  if not rows or not columns:
    return Factoring(layer)
  return Factoring(layer, rows, columns)


def scale_by_adafactor(
  axes: PyTree,
  *,
  decay_rate: float = 0.8,
  clipping_threshold: float | None = 1.0,
  multiply_by_parameter_scale: bool = True,
  min_dim_size_to_factor: int = 128,
  epsilon1: float = 1e-30,
  epsilon2: float = 1e-3,
) -> optax.GradientTransformation:
  """Returns Adafactor's direction, before the learning rate.

  Args:
    axes: tree of logical `PartitionSpec`, one for each parameter.
    decay_rate: second moments are remembered by 1 - n ** -decay_rate in the
      update with the number n, from 1.
    clipping_threshold: the root mean square of a layer's update beyond which
      it is scaled down; None never does.
    multiply_by_parameter_scale: makes steps relative to the root mean square
      of a layer's parameter.
    min_dim_size_to_factor: of a matrix that is not in a stack.
    epsilon1: added to squared gradients.
    epsilon2: the least scale of a parameter, so that zeros can leave it.
  """
  axes_by_path = dict(jax.tree_util.tree_leaves_with_path(axes))

  def factoring_of(path, param):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return factoring(
      name, param.shape, axes_by_path[path], min_dim_size_to_factor
    )

  def init(params):
    slots = jax.tree_util.tree_map_with_path(
      lambda path, param: _first_slots(param, factoring_of(path, param)), params
    )
    return AdafactorState(jnp.zeros((), jnp.int32), slots)

  def update_one(path, param, grad, slots, memory):
    factors = factoring_of(path, param)
    direction, slots = _normalise(grad, slots, factors, memory, epsilon1)
    if clipping_threshold is not None:
      rms = _root_mean_square(direction, factors.layer)
      direction /= jnp.maximum(1.0, rms / clipping_threshold)
    if multiply_by_parameter_scale:
      rms = _root_mean_square(param, factors.layer)
      direction *= jnp.maximum(rms, epsilon2)
    return _Updated(direction, slots)

  def update(grads, state, params=None):
    memory = 1 - (state.step + 1.0) ** -decay_rate
    updated = jax.tree_util.tree_map_with_path(
      functools.partial(update_one, memory=memory), params, grads, state.slots
    )
    directions = jax.tree.map(lambda x: x.direction, updated)
    slots = jax.tree.map(lambda x: x.slots, updated)
    return directions, AdafactorState(state.step + 1, slots)

  return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class _Updated:
  """Of one parameter: a leaf, where a tuple would be a branch."""

  direction: Array
  slots: Slots


def _first_slots(param: Array, factors: Factoring) -> Slots:
  def zeros(averaged):
    shape = (1 if i in averaged else n for i, n in enumerate(param.shape))
    return jnp.zeros(tuple(shape), jnp.float32)

  if not factors.rows:
    return {'v': zeros(())}
  return {'v_row': zeros(factors.columns), 'v_col': zeros(factors.rows)}


def _normalise(
  grad: Float[Array, '...'],
  slots: Slots,
  factors: Factoring,
  memory: Float[Array, ''],
  epsilon1: float,
) -> tuple[Float[Array, '...'], Slots]:
  """Returns the gradient over the root of its second moments, and those."""
  squares = jnp.square(grad.astype(jnp.float32)) + epsilon1

  def remember(name, averaged):
    mean = jnp.mean(squares, averaged, keepdims=True) if averaged else squares
    return memory * slots[name] + (1 - memory) * mean

  if not factors.rows:
    v = remember('v', ())
    return grad * v**-0.5, {'v': v}
  v_row = remember('v_row', factors.columns)
  v_col = remember('v_col', factors.rows)
  row_factor = (v_row / jnp.mean(v_row, factors.rows, keepdims=True)) ** -0.5
  return grad * row_factor * v_col**-0.5, {'v_row': v_row, 'v_col': v_col}


def _root_mean_square(x: Array, axes: tuple[int, ...]) -> Array:
  return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True))
