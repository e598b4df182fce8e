# SPDX-License-Identifier: Apache-2.0
"""Samplers: from one row's logits and key to one token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def greedy(
  logits: Float[Array, 'vocab'], key: PRNGKeyArray
) -> Int[Array, '']:
  """Returns the most likely token, the lowest id of several."""
  del key
  return jnp.argmax(logits).astype(jnp.int32)


def temperature(
  logits: Float[Array, 'vocab'], key: PRNGKeyArray, *, value: float
) -> Int[Array, '']:
  """Draws a token from softmax(logits / value)."""
  return jax.random.categorical(key, logits / value).astype(jnp.int32)
