# SPDX-License-Identifier: Apache-2.0
"""The LLM's last states as a cache stores them, in the place of the LLM.

Two keys of a batch: `llm_states` [rows, prompt length, llm_embed], in bfloat16
or int8, and, of int8, `llm_state_scales` [rows, prompt length], float32: what
a token's numbers are multiplied by. A number in bfloat16 is off by 1/256 of
itself at most, one in int8 by 1/254 of the largest of its token.
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
  """Returns the shapes of the keys.

  Args:
    batch_size: rows.
    prompt_length: tokens of a row.
    width: of the LLM's states.
    dtype: one of `DTYPES`.
    sharding: where rows are.
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
  """Returns states in the form in which a cache has them.

  Args:
    states: of the LLM.
    dtype: one of `DTYPES`.
  """
  if dtype == 'bfloat16':
    return {'llm_states': states.astype(jnp.bfloat16)}
  states = states.astype(jnp.float32)  # A scale in bfloat16 would be too rough.
  scales = jnp.abs(states).max(axis=-1) / _LARGEST_INT8
  steps = states / jnp.where(scales > 0, scales, 1.0)[..., None]
  return {
    'llm_states': jnp.round(steps).astype(jnp.int8),
    'llm_state_scales': scales,
  }


def restore(
  batch: Mapping[str, Array],
) -> Float[Array, 'batch length llm_embed']:
  """Returns the states that a batch has, as numbers to compute with."""
  states = batch['llm_states']
  if 'llm_state_scales' not in batch:
    return states
  return states.astype(jnp.float32) * batch['llm_state_scales'][..., None]
