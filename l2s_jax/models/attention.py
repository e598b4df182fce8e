# SPDX-License-Identifier: Apache-2.0
"""One attention for self and cross, training and decoding, T5 and GPT-2.

Keys and values come in as an argument: the caller projects them from the same
inputs, from an encoded prompt, or reads them from a cache. Masks are bool
until `mask_bias` adds them to the logits.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from l2s_jax import partition
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib
from l2s_jax.models import layers, positions


class Attention(nn.Module):
  """Multi-head attention over keys and values that the caller provides."""

  config: config_lib.TransformerConfig

  def setup(self):
    config = self.config
    d, n, h = config.emb_dim, config.num_heads, config.head_dim
    k = config.kv_heads
    axes, kv_axes = ('embed', 'heads', 'kv'), ('embed', 'kv_heads', 'kv')
    has_bias = config.use_bias or config.attention_bias != 'none'
    bias = (1, 2) if has_bias else None
    # T5 has no 1/sqrt(h) on logits: its initial query kernels are smaller.
    query_fan_in = d if config.scale_attention else d * h
    self.query = layers.Einsum(
      'btd,dnh->bnth', (d, n, h), axes, query_fan_in, config, bias
    )
    self.key = layers.Einsum(
      'btd,dkh->bkth', (d, k, h), kv_axes, d, config, bias
    )
    self.value = layers.Einsum(
      'btd,dkh->bkth', (d, k, h), kv_axes, d, config, bias
    )
    self.out = layers.Einsum(
      'bnth,nhd->btd',
      (n, h, d),
      ('heads', 'kv', 'embed'),
      n * h,
      config,
      (2,) if config.use_bias or config.attention_bias == 'all' else None,
    )
    if config.qk_norm:
      self.query_norm = layers.Norm(config, 'kv')
      self.key_norm = layers.Norm(config, 'kv')
    self.dropout = layers.Dropout(config.dropout_rate)

  def project_kv(
    self,
    inputs: Float[Array, 'batch length embed'],
    rotation: positions.Rotation | None = None,
  ) -> cache_lib.KeyValues:
    """Returns keys, turned by their positions if these rotate, and values."""
    key, value = self.key(inputs), self.value(inputs)
    if self.config.qk_norm:
      key = self.key_norm(key)
    if rotation is not None:
      key = positions.rotate(key, rotation)
    axes = partition.axes_that_divide(
      ('batch', 'kv_heads', 'length', 'kv'), key.shape
    )
    return cache_lib.KeyValues(
      nn.with_logical_constraint(key, axes),
      nn.with_logical_constraint(value, axes),
    )

  def __call__(
    self,
    inputs: Float[Array, 'batch query embed'],
    kv: cache_lib.KeyValues,
    bias: Float[Array, '#batch #heads query slots'],
    rotation: positions.Rotation | None = None,
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch query embed']:
    config = self.config
    query = self.query(inputs)  # [batch, heads, query, kv]
    query = nn.with_logical_constraint(
      query, ('batch', 'heads', 'length', 'kv')
    )
    if config.qk_norm:
      query = self.query_norm(query)
    if rotation is not None:
      query = positions.rotate(query, rotation)
    if config.scale_attention:
      query *= (config.query_pre_attn_scalar or config.head_dim) ** -0.5

    # The queries of a group, which share keys and values, stand in one row.
    # Without groups (T5) nothing moves.
    batch, n, t, h = query.shape
    k = config.kv_heads
    query = query.reshape(batch, k, -1, h)  # [batch, kv_heads, group*query, kv]
    # Softmax in float32: in bfloat16 a long row of small weights is lost.
    logits = jnp.einsum(
      'bkth,bksh->bkts', query, kv.key, preferred_element_type=jnp.float32
    )
    logits = layers.softcap(logits, config.attention_softcap)
    logits = logits.reshape(batch, n, t, -1)  # [batch, heads, query, slots]
    weights = jax.nn.softmax(logits + bias).astype(inputs.dtype)
    weights = self.dropout(weights, deterministic=deterministic)
    weights = weights.reshape(batch, k, -1, weights.shape[-1])
    outputs = jnp.einsum('bkts,bksh->bkth', weights, kv.value)
    return self.out(outputs.reshape(batch, n, t, h))


def segment_mask(
  query_segments: Int[Array, 'batch query'],
  key_segments: Int[Array, 'batch key'],
) -> Bool[Array, 'batch 1 query key']:
  """Lets real tokens see real tokens of their own segment."""
  same = query_segments[:, :, None] == key_segments[:, None, :]
  return (same & (key_segments > 0)[:, None, :])[:, None]


def causal_mask(length: int) -> Bool[Array, '1 1 length length']:
  """Lets each position see itself and those before it."""
  return jnp.tril(jnp.ones((length, length), bool))[None, None]


def mask_bias(mask: Bool[Array, '...']) -> Float[Array, '...']:
  """Returns 0 where attention may look and a large negative elsewhere.

  Not -inf: a row of padding sees nothing, and its softmax must stay finite.
  """
  return jnp.where(mask, 0.0, -1e10).astype(jnp.float32)
