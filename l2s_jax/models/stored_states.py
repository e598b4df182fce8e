# SPDX-License-Identifier: Apache-2.0
"""The LLM's last hidden states in the form of a cache on disk.

They have two keys in a batch: `llm_states` [batch, prompt length, llm_embed],
in bfloat16 or int8, and, for int8 alone, `llm_state_scales` [batch, prompt
length], the float32 scale of each token. The largest rounding error is 1/256
of the value in bfloat16, and 1/254 of the token's largest value in int8.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPES = ('bfloat16', 'int8')

_LARGEST_INT8 = 127


def shapes(
  batch_size: int,
  prompt_length: int,
  width: int,
  dtype: str,
  sharding: jax.sharding.Sharding | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and dtypes of the batch keys for stored states.

  Args:
    batch_size: rows.
    prompt_length: tokens per prompt, padding included.
    width: of the LLM's states.
    dtype: one of `DTYPES`.
    sharding: of every array; None leaves it unspecified.
  """

  def shape(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      (batch_size, prompt_length, *sizes), dtype, sharding=sharding
    )

  found = {'llm_states': shape(width, dtype=jnp.dtype(dtype))}
  if dtype == 'int8':
    found['llm_state_scales'] = shape(dtype=jnp.float32)
  return found


def store(
  states: Float[Array, 'batch length llm_embed'], dtype: str
) -> dict[str, Array]:
  """Returns the LLM's states as batch keys, in the dtype of the cache.

  Args:
    states: the LLM's last hidden states.
    dtype: one of `DTYPES`; 'int8' quantizes each token by its own scale.
  """
  if dtype == 'bfloat16':
    return {'llm_states': states.astype(jnp.bfloat16)}
  states = states.astype(jnp.float32)  # A bfloat16 scale is too coarse.
  scales = jnp.abs(states).max(axis=-1) / _LARGEST_INT8
  steps = states / jnp.where(scales > 0, scales, 1.0)[..., None]
  return {
    'llm_states': jnp.round(steps).astype(jnp.int8),
    'llm_state_scales': scales,
  }


def restore(
  batch: Mapping[str, Array],
) -> Float[Array, 'batch length llm_embed']:
  """Returns the LLM's states from a batch, dequantized if in int8."""
  states = batch['llm_states']
  if 'llm_state_scales' not in batch:
    return states
  return states.astype(jnp.float32) * batch['llm_state_scales'][..., None]
