# SPDX-License-Identifier: Apache-2.0
"""Adafactor that factors each layer of a stack separately, as in T5X.

Adafactor (Shazeer and Stern, arXiv:1804.04235) keeps row means and column means
of a matrix's second moments, clips the root mean square (RMS) of the update,
and scales steps by the RMS of the parameter. Scanned layers share one array
with an axis `layers`; nothing here is averaged over that axis. Optax's
Adafactor treats such an array as one parameter. Logical axis names select the
row axes and the column axes. Updates equal those of t5x/adafactor.py with its
standard logical factor rules.
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
  """State of Adafactor.

  Attributes:
    step: number of updates done.
    slots: for each parameter `v`, the second moments; or `v_row` and `v_col`,
      their means over columns and over rows. Averaged axes have size 1.
  """

  step: Array
  slots: PyTree


@dataclasses.dataclass(frozen=True)
class Factoring:
  """Roles of a parameter's axes.

  Attributes:
    layer: axes of one layer: all but those of stacks.
    rows: row axes; empty if not factored.
    columns: column axes; empty if not factored.
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
  """Returns the factoring of a parameter, as in T5X.

  Stacked parameters and those with three or more axes are factored into
  `ROW_AXES` and `COLUMN_AXES`, whatever their size. A matrix outside of stacks
  is factored along its two axes, whatever their names, if both are long enough.
  Other parameters keep all second moments.

  Args:
    path: the parameter's path, for errors.
    shape: the parameter's shape.
    axes: logical name of each axis.
    min_dim_size_to_factor: minimum side of a matrix outside of stacks.

  Raises:
    ValueError: for an axis without a name, or with an unknown one.
  """
  names = tuple(axes)
  known = (*STACK_AXES, *ROW_AXES, *COLUMN_AXES, *OTHER_AXES)
  if len(names) != len(shape) or not set(names) <= set(known):
    raise ValueError(
      f'adafactor: {path} {shape} has the logical axes {names}; expected one '
      f'of {known} for each axis. Add the other axes to adafactor.py.'
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
    decay_rate: second moments decay by 1 - n ** -decay_rate in update n, from
      1.
    clipping_threshold: maximum RMS of a layer's update; larger updates are
      scaled down. None means no clipping.
    multiply_by_parameter_scale: scales steps by the RMS of a layer's parameter.
    min_dim_size_to_factor: minimum side of a factored matrix outside of stacks.
    epsilon1: added to squared gradients.
    epsilon2: minimum RMS of a parameter, so that zeros can be trained.
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
  """The update of one parameter; a pytree leaf, unlike a tuple."""

  direction: Array
  slots: Slots


def _first_slots(param: Array, factors: Factoring) -> Slots:
  """Returns zero slots for a parameter."""

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
  """Returns the gradient over the root of its second moments, and new slots."""
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
  """Returns the RMS over some axes, which are kept with size 1."""
  return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True))
