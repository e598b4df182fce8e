# SPDX-License-Identifier: Apache-2.0
"""A batch computed in parts, one after another, in less memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def add_up(
  fn: Callable[[PyTree, jax.Array], PyTree],
  batch: PyTree,
  key: jax.Array,
  num_microbatches: int,
) -> PyTree:
  """Returns the sum of `fn` over microbatches, each with a key of its own."""
  if num_microbatches == 1:
    return fn(batch, key)
  microbatches = (
    _divide(batch, num_microbatches),
    jax.random.split(key, num_microbatches),
  )
  first = jax.tree.map(lambda x: x[0], microbatches)
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *first)
  )
  total, _ = jax.lax.scan(
    lambda total, inputs: (
      jax.tree.map(jnp.add, total, fn(*inputs)),
      None,
    ),
    zeros,
    microbatches,
  )
  return total


def join(
  fn: Callable[[PyTree], PyTree], batch: PyTree, num_microbatches: int
) -> PyTree:
  """Returns the rows that `fn` makes of those of each microbatch, in order."""
  if num_microbatches == 1:
    return fn(batch)
  made = jax.lax.map(fn, _divide(batch, num_microbatches))
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), made
  )


def _divide(batch: PyTree, num_microbatches: int) -> PyTree:
  def divide(x):  # Every n-th row to each, so that rows stay on their devices.
    rows = x.reshape(-1, num_microbatches, *x.shape[1:])
    return jnp.moveaxis(rows, 1, 0)

  return jax.tree.map(divide, batch)
