# SPDX-License-Identifier: Apache-2.0
"""The decoder's KV cache, a pytree of plain arrays.

A slot is a place in the buffers; a position counts real tokens. A padded
prompt of a decoder-only model takes slots but no positions. Each layer has its
own buffers: XLA updates these in place, but copies slices of a stacked array.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import config as config_lib
from l2s_jax.runtime import partitioning


class KeyValues(struct.PyTreeNode):
  """Keys and values of one attention layer."""

  key: Float[Array, 'batch kv_heads slots kv']
  value: Float[Array, 'batch kv_heads slots kv']


class Cache(struct.PyTreeNode):
  """The KV cache, an argument and a result of every decode step.

  Attributes:
    kv: keys and values of self-attention, one pair per layer, written in place.
    valid: true for slots with real tokens.
    slot: the next slot to write: a scalar for all rows, or one per row.
    cross_kv: keys and values of the encoded prompt, projected once; None in a
      decoder-only model. Its batch size may be the number of prompts: the
      beams of a prompt are consecutive rows and share its keys and values.
    cross_valid: true for real tokens of the encoded prompt.
  """

  kv: tuple[KeyValues, ...]
  valid: Bool[Array, 'batch slots']
  slot: Int[Array, '*batch']
  cross_kv: tuple[KeyValues, ...] | None = None
  cross_valid: Bool[Array, 'prompts kv_length'] | None = None

  @property
  def num_slots(self) -> int:
    return self.valid.shape[1]

  def mask(self, num_tokens: int) -> Bool[Array, 'batch 1 tokens key']:
    """Returns the attention mask of new tokens.

    They see the valid slots of the cache and, causally, one another.
    """
    shape = (self.valid.shape[0], num_tokens, num_tokens)
    new = jnp.broadcast_to(jnp.tril(jnp.ones(shape[1:], bool)), shape)
    past = jnp.broadcast_to(self.valid[:, None], (*shape[:2], self.num_slots))
    return jnp.concatenate([past, new], axis=-1)[:, None]


def empty(
  config: config_lib.TransformerConfig, batch_size: int, num_slots: int
) -> Cache:
  """Returns an empty cache with `num_slots` slots."""
  shape = (batch_size, config.kv_heads, num_slots, config.head_dim)
  # Constrained: XLA would replicate constants on every device.
  zeros = partitioning.constrain(
    jnp.zeros(shape, config.activation_dtype),
    ('batch', 'kv_heads', 'length', 'kv'),
  )
  valid = jnp.zeros((batch_size, num_slots), bool)
  return Cache(
    kv=(KeyValues(zeros, zeros),) * config.num_decoder_layers,
    valid=partitioning.constrain(valid, ('batch', 'length')),
    slot=jnp.zeros((), jnp.int32),
  )


def append(
  cache: Cache,
  new: Sequence[KeyValues],
  valid: Bool[Array, 'batch length'],
  *,
  after: Float[Array, 'batch length embed'],
) -> Cache:
  """Writes the keys and values of one call of all layers, from `slot` on.

  Args:
    cache: the cache that the call read.
    new: keys and values, one pair per layer.
    valid: true for real tokens.
    after: the last hidden states of the call. The write is made to depend on
      them, so that it happens after every layer has read the buffers;
      otherwise XLA:CPU would copy all buffers at every token. The comparison
      with infinity is always false (for NaN, too), but XLA cannot prove it.
  """
  slot = cache.slot + (after[0, 0, 0] > jnp.inf).astype(jnp.int32)
  return cache.replace(
    kv=jax.tree.map(
      lambda buffer, x: _update(buffer, x, slot, axis=2), cache.kv, tuple(new)
    ),
    valid=_update(cache.valid, valid, cache.slot, axis=1),
    slot=cache.slot + valid.shape[1],
  )


def rewind(cache: Cache, slot: Int[Array, 'batch']) -> Cache:
  """Drops the tokens of each row from its own `slot` on."""
  kept = jnp.arange(cache.num_slots) < slot[:, None]
  return cache.replace(valid=cache.valid & kept, slot=slot)


def grow(cache: Cache, num_slots: int) -> Cache:
  """Returns the cache with `num_slots` more slots, all empty."""

  def pad(buffer: jax.Array, axis: int) -> jax.Array:
    widths = [(0, num_slots if i == axis else 0) for i in range(buffer.ndim)]
    return jnp.pad(buffer, widths)

  return cache.replace(
    kv=jax.tree.map(lambda buffer: pad(buffer, 2), cache.kv),
    valid=pad(cache.valid, 1),
  )


def map_rows(function: Callable[[jax.Array], jax.Array], cache: Cache) -> Cache:
  """Applies a function to all arrays with a batch axis of decoded rows.

  The encoded prompt stays as it is: the beams of a prompt share it.
  """
  return cache.replace(
    kv=jax.tree.map(function, cache.kv),
    valid=function(cache.valid),
    slot=function(cache.slot) if cache.slot.ndim else cache.slot,
  )


def _update(
  buffer: Array, x: Array, start: Int[Array, '*batch'], *, axis: int
) -> Array:
  x = x.astype(buffer.dtype)
  if not start.ndim:
    return jax.lax.dynamic_update_slice_in_dim(buffer, x, start, axis)
  return jax.vmap(
    lambda row, new, slot: jax.lax.dynamic_update_slice_in_dim(
      row, new, slot, axis - 1
    )
  )(buffer, x, start)
