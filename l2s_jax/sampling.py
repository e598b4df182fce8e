# SPDX-License-Identifier: Apache-2.0
"""Samplers: from one row's logits and key to one token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def greedy(logits: Float[Array, 'vocab'], key: PRNGKeyArray) -> Int[Array, '']:
  """Returns the most likely token, the lowest id of several."""
  del key
  # Two reductions that vectorise; XLA:CPU's argmax does not (10x at 32,000).
  is_highest = logits == jnp.max(logits)
  ids = jnp.arange(logits.shape[0], dtype=jnp.int32)
  return jnp.min(jnp.where(is_highest, ids, logits.shape[0] - 1))


def temperature(
  logits: Float[Array, 'vocab'], key: PRNGKeyArray, *, value: float
) -> Int[Array, '']:
  """Draws a token from softmax(logits / value)."""
  return jax.random.categorical(key, logits / value).astype(jnp.int32)
