# SPDX-License-Identifier: Apache-2.0
"""What changes from one training step to the next, and its shardings."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from l2s_jax import partition

PyTree = Any


class TrainState(struct.PyTreeNode):
  """A training run between two steps. Donated to each step.

  Attributes:
    step: steps done.
    trainable: the parameters that are trained; the frozen LLM is not here.
    opt_state: the optimizer's, for `trainable` alone.
    key: data of the PRNG key that dropout is drawn from; the same all run.
  """

  step: jax.Array
  trainable: PyTree
  opt_state: PyTree
  key: jax.Array


def create(
  trainable: PyTree, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """Returns the state before the first step. To be called inside jit."""
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
  """Returns shapes and shardings of a `TrainState`; slots follow parameters.

  A slot is known by its parameter's path, which is part of its own, and is
  split as its parameter is along the axes where it has the same size.

  Both are a `TrainState` with something else in the place of its arrays.
  """
  shapes = jax.eval_shape(
    lambda params: create(params, optimizer, 0), trainable_shapes
  )
  whole = partition.replicated(mesh)
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
        return partition.slot_sharding(slot.shape, *params[path[start:end]])
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
  """Initialises parameters directly into their shards, one jit."""
  make = jax.jit(
    lambda key: partition.unbox(init(key))['params'],
    out_shardings=param_shardings,
  )
  return make(jax.random.key(seed))
