# SPDX-License-Identifier: Apache-2.0
"""Attention: self and cross, for training and decoding, in all families.

Keys and values are an argument. The caller projects them from the same inputs
or from an encoded prompt, or reads them from a KV cache. Masks are bool until
`mask_bias` turns them into a bias on the logits. Calls of many queries may give
the bias in parts instead, to a kernel (`fused_attention.py`).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib
from l2s_jax.models import fused_attention, layers, positions
from l2s_jax.runtime import partitioning


class Attention(nn.Module):
  """Multi-head (or grouped-query) attention over given keys and values."""

  config: config_lib.TransformerConfig

  def setup(self):
    config = self.config
    d, n, h = config.emb_dim, config.num_heads, config.head_dim
    k = config.kv_heads
    axes, kv_axes = ('embed', 'heads', 'kv'), ('embed', 'kv_heads', 'kv')
    bias = config.use_bias or config.attention_bias != 'none'
    # T5 has no 1/sqrt(h) on logits: its initial query kernels are smaller.
    fan_in = d if config.scale_attention else d * h
    self.query = layers.Dense((d,), (n, h), axes, config, bias, fan_in)
    self.key = layers.Dense((d,), (k, h), kv_axes, config, bias)
    self.value = layers.Dense((d,), (k, h), kv_axes, config, bias)
    self.out = layers.Dense(
      (n, h),
      (d,),
      ('heads', 'kv', 'embed'),
      config,
      config.use_bias or config.attention_bias == 'all',
    )
    if config.qk_norm:
      all_heads = config.qk_norm_all_heads
      self.query_norm = layers.Norm(config, axes[1:] if all_heads else ('kv',))
      self.key_norm = layers.Norm(config, kv_axes[1:] if all_heads else ('kv',))
    self.dropout = layers.Dropout(config.dropout_rate)

  def project_kv(
    self,
    inputs: Float[Array, 'batch length embed'],
    rotation: positions.Rotation | None = None,
  ) -> cache_lib.KeyValues:
    """Projects inputs to keys and values; rotary positions rotate the keys."""
    key = self.key(inputs)  # [batch, length, kv_heads, kv]
    if self.config.qk_norm:
      key = self.key_norm(key)
    key, value = _by_head(key), _by_head(self.value(inputs))
    if rotation is not None:
      key = positions.rotate(key, rotation)
    axes = ('batch', 'kv_heads', 'length', 'kv')
    return cache_lib.KeyValues(
      partitioning.constrain(key, axes), partitioning.constrain(value, axes)
    )

  def __call__(
    self,
    inputs: Float[Array, 'batch query embed'],
    kv: cache_lib.KeyValues,
    bias: Float[Array, '#prompts #heads #query keys']
    | fused_attention.Visibility,
    rotation: positions.Rotation | None = None,
    *,
    past: cache_lib.KeyValues | None = None,
    deterministic: bool,
  ) -> Float[Array, 'batch query embed']:
    """Returns the attention output of the queries.

    Args:
      inputs: states to project queries from.
      kv: keys and values of the tokens of this call.
      bias: added to the logits; keys of `past` come first, those of `kv` after.
        Its parts, for a call of many queries that takes the kernel.
      rotation: rotary angles of the queries.
      past: keys and values of the KV cache as it was before this call. XLA:CPU
        copies buffers that one step both reads and writes, so the new keys and
        values stay apart.
      deterministic: disables dropout.
    """
    config = self.config
    query = self.query(inputs)  # [batch, query, heads, kv]
    if config.qk_norm:
      query = self.query_norm(query)
    query = nn.with_logical_constraint(
      _by_head(query), ('batch', 'heads', 'length', 'kv')
    )
    if rotation is not None:
      query = positions.rotate(query, rotation)
    if config.scale_attention:
      query *= (config.query_pre_attn_scalar or config.head_dim) ** -0.5

    if isinstance(bias, fused_attention.Visibility):
      assert past is None and query.shape[0] == kv.key.shape[0]
      keep = None
      if config.dropout_rate and not deterministic:
        shape = (*query.shape[:2], 1, kv.key.shape[2])
        keep = self.dropout(jnp.ones(shape, inputs.dtype), deterministic=False)
      outputs = fused_attention.attend(
        query, kv.key, kv.value, bias, keep, softcap=config.attention_softcap
      )
      return self.out(_by_head(outputs))

    shape = query.shape
    query = _beams_to_queries(query, shape[0] // kv.key.shape[0])
    # Query heads of a group share keys and values: fold the group into the
    # query axis. Without groups (T5) this reshape changes nothing.
    batch, n, t, h = query.shape
    k = config.kv_heads
    query = query.reshape(batch, k, -1, h)  # [batch, kv_heads, group*query, kv]
    # Softmax in float32: bfloat16 loses many small weights of a long row.
    logits = _compare(query, kv.key)
    if past is not None:
      logits = jnp.concatenate([_compare(query, past.key), logits], axis=-1)
    logits = layers.softcap(logits, config.attention_softcap)
    logits = logits.reshape(batch, n, t, -1)  # [batch, heads, query, slots]
    weights = jax.nn.softmax(logits + bias).astype(inputs.dtype)
    weights = self.dropout(weights, deterministic=deterministic)
    weights = weights.reshape(batch, k, -1, weights.shape[-1])
    if past is None:
      outputs = _collect(weights, kv.value)
    else:
      old, new = jnp.split(weights, [past.key.shape[2]], axis=-1)
      outputs = _collect(old, past.value) + _collect(new, kv.value)
    outputs = outputs.reshape(batch, n, t, h)
    return self.out(_by_head(_queries_to_beams(outputs, shape)))


def _compare(
  query: Float[Array, 'batch kv_heads query kv'],
  key: Float[Array, 'batch kv_heads key kv'],
) -> Float[Array, 'batch kv_heads query key']:
  """Returns attention logits in float32."""
  return jnp.einsum(
    'bkth,bksh->bkts', query, key, preferred_element_type=jnp.float32
  )


def _collect(
  weights: Float[Array, 'batch kv_heads query key'],
  value: Float[Array, 'batch kv_heads key kv'],
) -> Float[Array, 'batch kv_heads query kv']:
  """Returns the weighted sums of values."""
  return jnp.einsum('bkts,bksh->bkth', weights, value)


def _by_head(x: Float[Array, 'batch a b kv']) -> Float[Array, 'batch b a kv']:
  """Swaps the axes of length and heads; free for one token per row."""
  return x.swapaxes(1, 2)


def _beams_to_queries(
  query: Float[Array, 'rows heads query kv'], num_beams: int
) -> Float[Array, 'batch heads queries kv']:
  """Folds the beams of a prompt, which share its keys, into the query axis."""
  if num_beams == 1:
    return query
  rows, n, t, h = query.shape
  query = query.reshape(rows // num_beams, num_beams, n, t, h)
  return query.swapaxes(1, 2).reshape(rows // num_beams, n, -1, h)


def _queries_to_beams(
  outputs: Float[Array, 'batch heads queries kv'], shape: tuple[int, ...]
) -> Float[Array, 'rows heads query kv']:
  """Inverts `_beams_to_queries`."""
  if outputs.shape == shape:
    return outputs
  rows, n, t, h = shape
  outputs = outputs.reshape(outputs.shape[0], n, -1, t, h)
  return outputs.swapaxes(1, 2).reshape(shape)


def segment_mask(
  query_segments: Int[Array, 'batch query'],
  key_segments: Int[Array, 'batch key'],
) -> Bool[Array, 'batch 1 query key']:
  """Returns the mask between real tokens of the same segment."""
  same = query_segments[:, :, None] == key_segments[:, None, :]
  return (same & (key_segments > 0)[:, None, :])[:, None]


def visible_mask(
  visibility: fused_attention.Visibility,
) -> Bool[Array, 'batch 1 query keys']:
  """Returns the mask of the keys that queries see, without windows."""
  query_segments = visibility.query_segments
  mask = segment_mask(query_segments, visibility.key_segments)
  if visibility.causal:
    past = causal_mask(query_segments.shape[1])
    mask &= past | (jnp.arange(mask.shape[-1]) < visibility.prefix)
  return mask


def causal_mask(length: int) -> Bool[Array, '1 1 length length']:
  """Returns the mask of each position's past, itself included."""
  return jnp.tril(jnp.ones((length, length), bool))[None, None]


def mask_bias(mask: Bool[Array, '...']) -> Float[Array, '...']:
  """Returns a float32 bias: 0 where the mask is true, -1e10 elsewhere.

  Not -inf: a row of padding sees no key, and its softmax must stay finite.
  """
  return jnp.where(mask, 0.0, -1e10).astype(jnp.float32)
