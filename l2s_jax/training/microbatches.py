# SPDX-License-Identifier: Apache-2.0
"""Microbatches: a batch computed in sequential parts, to save memory."""

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
  """Returns the sum of `fn` over microbatches.

  Args:
    fn: takes a microbatch and its PRNG key.
    batch: pytree of arrays with rows first.
    key: PRNG key; split into one per microbatch, if there are several.
    num_microbatches: must divide the number of rows.
  """
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
  """Returns `fn` of each microbatch, concatenated in the batch's row order.

  Args:
    fn: takes a microbatch; returns a pytree of arrays with rows first.
    batch: pytree of arrays with rows first.
    num_microbatches: must divide the number of rows.
  """
  if num_microbatches == 1:
    return fn(batch)
  made = jax.lax.map(fn, _divide(batch, num_microbatches))
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), made
  )


def _divide(batch: PyTree, num_microbatches: int) -> PyTree:
  def divide(x):  # Strided, so that rows stay on their devices.
    rows = x.reshape(-1, num_microbatches, *x.shape[1:])
    return jnp.moveaxis(rows, 1, 0)

  return jax.tree.map(divide, batch)
