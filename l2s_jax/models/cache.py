# SPDX-License-Identifier: Apache-2.0
"""What a decoder carries from one step to the next, as plain arrays.

Slots are places in the buffers, positions count real tokens: a padded prompt
of a decoder-only model takes slots and no positions.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import config as config_lib


class KeyValues(struct.PyTreeNode):
  """Keys and values, `[batch, heads, slots, kv]` or stacked by `layers`."""

  key: Float[Array, '*layers batch kv_heads slots kv']
  value: Float[Array, '*layers batch kv_heads slots kv']


class Cache(struct.PyTreeNode):
  """The decoder's memory; an argument and a result of every decode step.

  Attributes:
    kv: keys and values of self-attention, written in place step by step.
    valid: the slots that hold real tokens.
    slot: the next slot to write, the same for all rows.
    position: the next position of each row, in real tokens.
    cross_kv: keys and values of the encoded prompt, projected once; None in a
      decoder-only model.
    cross_valid: real tokens of the encoded prompt.
  """

  kv: KeyValues
  valid: Bool[Array, 'batch slots']
  slot: Int[Array, '']
  position: Int[Array, 'batch']
  cross_kv: KeyValues | None = None
  cross_valid: Bool[Array, 'batch kv_length'] | None = None


def empty(
  config: config_lib.TransformerConfig, batch_size: int, num_slots: int
) -> Cache:
  """Returns a cache of `num_slots` slots that holds nothing yet."""
  shape = (
    config.num_decoder_layers,
    batch_size,
    config.kv_heads,
    num_slots,
    config.head_dim,
  )
  return Cache(
    kv=KeyValues(
      jnp.zeros(shape, config.activation_dtype),
      jnp.zeros(shape, config.activation_dtype),
    ),
    valid=jnp.zeros((batch_size, num_slots), bool),
    slot=jnp.zeros((), jnp.int32),
    position=jnp.zeros((batch_size,), jnp.int32),
  )


def advance(cache: Cache, valid: Bool[Array, 'batch length']) -> Cache:
  """Marks the next `length` slots as about to be written.

  Args:
    cache: before the step.
    valid: which of the new slots hold real tokens.

  Returns:
    The cache with `valid` and `position` as attention of this step needs
    them and `slot` already behind it.
  """
  return cache.replace(
    valid=jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.slot)),
    slot=cache.slot + valid.shape[1],
    position=cache.position + valid.sum(1, dtype=jnp.int32),
  )


def write(
  kv: KeyValues,
  new: KeyValues,
  *,
  layer: Int[Array, ''],
  slot: Int[Array, ''],
) -> tuple[KeyValues, KeyValues]:
  """Writes one layer's new keys and values at `slot`.

  Returns:
    The stacked buffers after the write, and all slots of this layer.
  """
  start = (layer, 0, 0, slot, 0)
  kv = jax.tree.map(
    lambda buffer, x: jax.lax.dynamic_update_slice(
      buffer, x[None].astype(buffer.dtype), start
    ),
    kv,
    new,
  )
  read = jax.tree.map(
    lambda buffer: jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False),
    kv,
  )
  return kv, read
