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

from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib
from l2s_jax.models import layers


class Attention(nn.Module):
  """Multi-head attention over keys and values that the caller provides."""

  config: config_lib.TransformerConfig

  def setup(self):
    config = self.config
    d, n, h = config.emb_dim, config.num_heads, config.head_dim
    axes = ('embed', 'heads', 'kv')
    bias = (1, 2) if config.use_bias else None
    # T5 has no 1/sqrt(h) on logits: its initial query kernels are smaller.
    query_fan_in = d if config.scale_attention else d * h
    into_heads = 'btd,dnh->bnth'
    self.query = layers.Einsum(
      into_heads, (d, n, h), axes, query_fan_in, config, bias
    )
    self.key = layers.Einsum(into_heads, (d, n, h), axes, d, config, bias)
    self.value = layers.Einsum(into_heads, (d, n, h), axes, d, config, bias)
    self.out = layers.Einsum(
      'bnth,nhd->btd',
      (n, h, d),
      ('heads', 'kv', 'embed'),
      n * h,
      config,
      (2,) if config.use_bias else None,
    )
    self.dropout = layers.Dropout(config.dropout_rate)

  def project_kv(
    self, inputs: Float[Array, 'batch length embed']
  ) -> cache_lib.KeyValues:
    axes = ('batch', 'heads', 'length', 'kv')
    return cache_lib.KeyValues(
      nn.with_logical_constraint(self.key(inputs), axes),
      nn.with_logical_constraint(self.value(inputs), axes),
    )

  def __call__(
    self,
    inputs: Float[Array, 'batch query embed'],
    kv: cache_lib.KeyValues,
    bias: Float[Array, '#batch #heads query slots'],
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch query embed']:
    query = self.query(inputs)  # [batch, heads, query, kv]
    query = nn.with_logical_constraint(
      query, ('batch', 'heads', 'length', 'kv')
    )
    if self.config.scale_attention:
      query *= self.config.head_dim**-0.5
    # Softmax in float32: in bfloat16 a long row of small weights is lost.
    logits = jnp.einsum(
      'bnth,bnsh->bnts', query, kv.key, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(logits + bias).astype(inputs.dtype)
    weights = self.dropout(weights, deterministic=deterministic)
    return self.out(jnp.einsum('bnts,bnsh->bnth', weights, kv.value))


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
