# SPDX-License-Identifier: Apache-2.0
"""The train state: its arrays, its shardings and its initialisation."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from l2s_jax.runtime import partitioning

PyTree = Any


class TrainState(struct.PyTreeNode):
  """The train state. Donated to each train step.

  Attributes:
    step: number of steps done.
    trainable: the trained parameters, without the frozen LLM.
    opt_state: optimizer state of `trainable`.
    key: data of the PRNG key for dropout, constant over a run.
  """

  step: jax.Array
  trainable: PyTree
  opt_state: PyTree
  key: jax.Array


def create(
  trainable: PyTree, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """Returns the state before the first step. Called within jit."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    opt_state=optimizer.init(trainable),
    key=jax.random.key_data(jax.random.key(seed)),
  )


def shardings(
  trainable_shapes: PyTree,
  trainable_shardings: PyTree,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[PyTree, PyTree]:
  """Returns the shapes and the shardings of a `TrainState`.

  Optimizer slots follow their parameters. A slot's path contains the path of
  its parameter, and the slot is sharded like the parameter along axes of equal
  size.

  Returns:
    Two `TrainState`s: one with `jax.ShapeDtypeStruct`s and one with shardings
    in place of arrays.
  """
  shapes = jax.eval_shape(
    lambda params: create(params, optimizer, 0), trainable_shapes
  )
  whole = partitioning.replicated(mesh)
  params = {
    path: (shape.shape, sharding)
    for (path, shape), sharding in zip(
      jax.tree_util.tree_leaves_with_path(trainable_shapes),
      jax.tree.leaves(trainable_shardings),
      strict=True,
    )
  }

  def slot_sharding(path, slot):
    for start, end in itertools.combinations(range(len(path) + 1), 2):
      if path[start:end] in params:
        return partitioning.slot_sharding(slot.shape, *params[path[start:end]])
    return whole

  return shapes, shapes.replace(
    step=whole,
    trainable=trainable_shardings,
    opt_state=jax.tree_util.tree_map_with_path(slot_sharding, shapes.opt_state),
    key=whole,
  )


def init_params(
  init: Callable[[jax.Array], PyTree], seed: int, param_shardings: PyTree
) -> PyTree:
  """Initialises parameters directly into their shards, in one jit.

  Args:
    init: takes a PRNG key; returns the variables of a module.
    seed: PRNG seed.
    param_shardings: tree of shardings.
  """
  make = jax.jit(
    lambda key: partitioning.unbox(init(key))['params'],
    out_shardings=param_shardings,
  )
  return make(jax.random.key(seed))
