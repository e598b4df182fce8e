# SPDX-License-Identifier: Apache-2.0
"""What a decoder carries from one step to the next, as plain arrays.

Slots are places in the buffers, positions count real tokens: a padded prompt
of a decoder-only model takes slots and no positions. Each layer has buffers of
its own: XLA writes those in place, where slices of a stacked array are copied.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import config as config_lib
from l2s_jax.runtime import partitioning


class KeyValues(struct.PyTreeNode):
  """Keys and values of one layer."""

  key: Float[Array, 'batch kv_heads slots kv']
  value: Float[Array, 'batch kv_heads slots kv']


class Cache(struct.PyTreeNode):
  """The decoder's memory; an argument and a result of every decode step.

  Attributes:
    kv: keys and values of self-attention, a pair a layer, written in place.
    valid: the slots that hold real tokens.
    slot: the next slot to write, one for all rows or one a row.
    cross_kv: keys and values of the encoded prompt, projected once; None in a
      decoder-only model. Its batch may be that of prompts, each of which
      several rows (beams) in sequence share.
    cross_valid: real tokens of the encoded prompt.
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
    """Lets new tokens see what is here and, causally, one another."""
    shape = (self.valid.shape[0], num_tokens, num_tokens)
    new = jnp.broadcast_to(jnp.tril(jnp.ones(shape[1:], bool)), shape)
    past = jnp.broadcast_to(self.valid[:, None], (*shape[:2], self.num_slots))
    return jnp.concatenate([past, new], axis=-1)[:, None]


def empty(
  config: config_lib.TransformerConfig, batch_size: int, num_slots: int
) -> Cache:
  """Returns a cache of `num_slots` slots that holds nothing yet."""
  shape = (batch_size, config.kv_heads, num_slots, config.head_dim)
  # Pinned: what is made of constants would be whole on every device.
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
  """Writes what a call of all layers returned, from `slot` on.

  Args:
    cache: as the call read it.
    new: keys and values, a pair a layer.
    valid: which of them are of real tokens.
    after: what the call made of all layers, waited for. If XLA:CPU could write
      before every layer has read, it would keep a copy of all buffers, for
      every token. The comparison, false of all numbers and of NaN, is what it
      cannot prove to be so.
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
  """Forgets what each row has from `slot` on, a number of its own."""
  kept = jnp.arange(cache.num_slots) < slot[:, None]
  return cache.replace(valid=cache.valid & kept, slot=slot)


def grow(cache: Cache, num_slots: int) -> Cache:
  """Returns the cache with so many slots more, which hold nothing yet."""

  def pad(buffer: jax.Array, axis: int) -> jax.Array:
    widths = [(0, num_slots if i == axis else 0) for i in range(buffer.ndim)]
    return jnp.pad(buffer, widths)

  return cache.replace(
    kv=jax.tree.map(lambda buffer: pad(buffer, 2), cache.kv),
    valid=pad(cache.valid, 1),
  )


def map_rows(function: Callable[[jax.Array], jax.Array], cache: Cache) -> Cache:
  """Applies a function to all that has a row of its own in the batch.

  The encoded prompt is not touched: beams of a prompt share it.
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
