# SPDX-License-Identifier: Apache-2.0
"""Blocks and stacks: what every encoder and decoder here is made of."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import attention, layers, positions
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib


class Context(struct.PyTreeNode):
  """What all layers of a stack share; `Stack.context` makes it.

  Attributes:
    self_bias: added to the logits of self-attention: mask and positions.
    cross_bias: the same for cross-attention; None without one.
    encoded: states to attend to, where cross keys are not projected yet.
    slot: where this call's keys and values go in the cache.
    buckets: of relative positions, where each layer has a bias of its own.
    offsets: of keys from queries, where some layers have a window.
    rotation: of this call's queries and keys, where positions are rotary.
  """

  self_bias: Float[Array, '#batch #heads query slots']
  cross_bias: Float[Array, '#batch 1 query kv_length'] | None = None
  encoded: Float[Array, 'batch kv_length embed'] | None = None
  slot: Int[Array, ''] | None = None
  buckets: Int[Array, '1 query slots'] | None = None
  offsets: Int[Array, '#batch query slots'] | None = None
  rotation: positions.Rotation | None = None


class Block(nn.Module):
  """Self-attention, cross-attention if any, MLP; each normed first."""

  config: config_lib.TransformerConfig
  has_cross_attention: bool = False

  def setup(self):
    config = self.config
    self.pre_self_attention_norm = layers.Norm(config)
    self.self_attention = attention.Attention(config)
    if self.has_cross_attention:
      self.pre_cross_attention_norm = layers.Norm(config)
      self.cross_attention = attention.Attention(config)
    self.pre_mlp_norm = layers.Norm(config)
    self.mlp = layers.Mlp(config)
    self.dropout = layers.Dropout(config.dropout_rate)
    if config.post_norm:
      self.post_self_attention_norm = layers.Norm(config)
      if self.has_cross_attention:
        self.post_cross_attention_norm = layers.Norm(config)
      self.post_mlp_norm = layers.Norm(config)
    if config.relpos_per_layer:
      self.relpos_bias = positions.RelativePositionBias(config)

  def project_cross(self, carry, encoded):
    return carry, self.cross_attention.project_kv(encoded)

  def __call__(self, carry, layer, cross_kv, context, deterministic):
    config = self.config
    x, kv = carry  # [batch, query, embed] and the stacked cache, or None

    inputs = x
    h = self.pre_self_attention_norm(x)
    self_bias, rotation = self._positions(layer, context)
    new_kv = self.self_attention.project_kv(h, rotation)
    if kv is not None:
      kv, new_kv = cache_lib.write(kv, new_kv, layer=layer, slot=context.slot)
    h = self.self_attention(
      h, new_kv, self_bias, rotation, deterministic=deterministic
    )
    if config.post_norm:
      h = self.post_self_attention_norm(h)
    x += self.dropout(h, deterministic=deterministic)

    if self.has_cross_attention:
      h = self.pre_cross_attention_norm(x)
      if cross_kv is None:
        cross_kv = self.cross_attention.project_kv(context.encoded)
      h = self.cross_attention(
        h, cross_kv, context.cross_bias, deterministic=deterministic
      )
      if config.post_norm:
        h = self.post_cross_attention_norm(h)
      x += self.dropout(h, deterministic=deterministic)

    h = self.pre_mlp_norm(inputs if config.parallel_residual else x)
    h = self.mlp(h, deterministic=deterministic)
    if config.post_norm:
      h = self.post_mlp_norm(h)
    x += self.dropout(h, deterministic=deterministic)
    x = nn.with_logical_constraint(x, ('batch', 'length', 'embed'))
    return (x, kv), None

  def _positions(self, layer, context):
    """Returns bias and rotation of self-attention, as this layer has them.

    Layers differ by their index alone, so that they can be scanned.
    """
    config, bias, rotation = self.config, context.self_bias, context.rotation
    if config.relpos_per_layer:
      bias += self.relpos_bias(context.buckets)
    period = config.global_layer_period
    is_global = (layer + 1) % period == 0 if period else jnp.array(False)
    if config.sliding_window:
      near = positions.window_mask(context.offsets, config.sliding_window)
      bias += attention.mask_bias(near | is_global)[:, None]
    if rotation is not None:
      rotation = rotation.of_layer(is_global)
    return bias, rotation


class Stack(nn.Module):
  """Layers with one set of stacked parameters, and the norm behind them.

  Attributes:
    config: of every layer.
    num_layers: how many.
    has_cross_attention: whether layers look at an encoded prompt.
    bidirectional: whether relative offsets tell before from after (encoder).
  """

  config: config_lib.TransformerConfig
  num_layers: int
  has_cross_attention: bool = False
  bidirectional: bool = False

  def setup(self):
    config = self.config
    block: type[nn.Module] = Block
    if config.remat == 'full':
      block = nn.remat(
        Block,
        methods={'__call__': dict(static_argnums=(4,), prevent_cse=False)},
      )
    over_layers = dict(
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      length=self.num_layers,
      unroll=1 if config.scan_layers else self.num_layers,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    methods = {
      '__call__': dict(over_layers, in_axes=(0, 0, nn.broadcast, nn.broadcast))
    }
    if self.has_cross_attention:
      methods['project_cross'] = dict(over_layers, in_axes=(nn.broadcast,))
    self.layers = nn.scan(block, methods=methods)(
      config, self.has_cross_attention
    )
    if config.positions == 'relative' and not config.relpos_per_layer:
      self.relpos_bias = positions.RelativePositionBias(config)
    self.final_norm = layers.Norm(config)
    self.dropout = layers.Dropout(config.dropout_rate)

  def context(
    self,
    mask: Bool[Array, '#batch 1 query slots'],
    query_positions: Int[Array, '#batch query'],
    key_positions: Int[Array, '#batch slots'],
    **fields: Any,
  ) -> Context:
    """Returns what layers are told of masks and positions.

    Args:
      mask: which slots each query may see, windows apart.
      query_positions: of the tokens that are read now.
      key_positions: of all slots.
      **fields: the rest of the context.
    """
    config = self.config
    bias = attention.mask_bias(mask)
    offsets = positions.offsets(query_positions, key_positions)
    if config.positions == 'relative':
      buckets = positions.relative_position_bucket(
        offsets,
        bidirectional=self.bidirectional,
        num_buckets=config.relpos_buckets,
        max_distance=config.relpos_max_distance,
      )
      if config.relpos_per_layer:
        fields['buckets'] = buckets
      else:
        bias += self.relpos_bias(buckets)
    if config.positions == 'rotary':
      fields['rotation'] = positions.rotation(config, query_positions)
    if config.sliding_window:
      fields['offsets'] = offsets
    return Context(bias, **fields)

  def project_cross(
    self, encoded: Float[Array, 'batch kv_length embed']
  ) -> cache_lib.KeyValues:
    """Projects the encoded prompt to every layer's keys and values, once."""
    return self.layers.project_cross(None, encoded)[1]

  def __call__(
    self,
    embeddings: Float[Array, 'batch query embed'],
    context: Context,
    *,
    kv: cache_lib.KeyValues | None = None,
    cross_kv: cache_lib.KeyValues | None = None,
    deterministic: bool,
  ) -> tuple[Float[Array, 'batch query embed'], cache_lib.KeyValues | None]:
    """Returns the normed states and the cache after this call."""
    x = self.dropout(embeddings, deterministic=deterministic)
    x = nn.with_logical_constraint(x, ('batch', 'length', 'embed'))
    (x, kv), _ = self.layers(
      (x, kv), jnp.arange(self.num_layers), cross_kv, context, deterministic
    )
    return self.final_norm(x), kv
