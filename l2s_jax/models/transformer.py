# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks and stacks of them, for encoders and decoders."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import attention, fused_attention, layers, positions
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib

# Saved by the forward pass for the backward pass beside a layer's input, by
# `TransformerConfig.remat`. The names are T5X's.
_REMAT_POLICIES = {
  'minimal': jax.checkpoint_policies.save_only_these_names(layers.PRODUCT),
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Context(struct.PyTreeNode):
  """Inputs that all layers of a stack share; made by `Stack.context`.

  Keys of self-attention are the slots of the KV cache, if any, followed by the
  tokens of this call.

  Attributes:
    self_bias: bias on self-attention logits: mask and relative positions; its
      parts where attention takes the kernel of `fused_attention.py`.
    cross_bias: the same of cross-attention; None without it.
    encoded: encoder states, where cross keys are not projected yet.
    buckets: relative position buckets, where each layer has its own bias; of
      all offsets, for a bias in parts.
    offsets: key position minus query position, where layers have windows.
    rotation: rotary angles of this call's tokens, with rotary positions.
  """

  self_bias: (
    Float[Array, '#batch #heads query key'] | fused_attention.Visibility
  )
  cross_bias: (
    Float[Array, '#prompts 1 #query kv_length']
    | fused_attention.Visibility
    | None
  ) = None
  encoded: Float[Array, 'batch kv_length embed'] | None = None
  buckets: Int[Array, '#batch query key'] | None = None
  offsets: Int[Array, '#batch query key'] | None = None
  rotation: positions.Rotation | None = None


class Block(nn.Module):
  """A block: self-attention, optional cross-attention, MLP, with norms."""

  config: config_lib.TransformerConfig
  has_cross_attention: bool = False

  def setup(self):
    config = self.config
    if config.pre_norm:
      self.pre_self_attention_norm = layers.Norm(config)
      if self.has_cross_attention:
        self.pre_cross_attention_norm = layers.Norm(config)
      self.pre_mlp_norm = layers.Norm(config)
    self.self_attention = attention.Attention(config)
    if self.has_cross_attention:
      self.cross_attention = attention.Attention(config)
    self.mlp = layers.Mlp(config)
    self.dropout = layers.Dropout(config.dropout_rate)
    if config.post_norm:
      self.post_self_attention_norm = layers.Norm(config)
      if self.has_cross_attention:
        self.post_cross_attention_norm = layers.Norm(config)
      self.post_mlp_norm = layers.Norm(config)
    if config.relpos_per_layer:
      self.relpos_bias = positions.RelativePositionBias(config)

  def project_cross(
    self, encoded: Float[Array, 'batch kv_length embed']
  ) -> cache_lib.KeyValues:
    return self.cross_attention.project_kv(encoded)

  def __call__(self, x, layer, past, cross_kv, context, deterministic):
    """Applies one layer.

    Args:
      x: states [batch, query, embed].
      layer: index of the layer.
      past: this layer's keys and values in the KV cache, or None.
      cross_kv: this layer's cross keys and values; None projects them from
        `context.encoded`.
      context: shared by all layers.
      deterministic: disables dropout.

    Returns:
      The new states, and with `config.for_generation` the keys and values of
      this call, else None.
    """
    config, inputs = self.config, x  # [batch, query, embed]
    h = self.pre_self_attention_norm(x) if config.pre_norm else x
    self_bias, rotation = self._positions(layer, context)
    kv = self.self_attention.project_kv(h, rotation)
    h = self.self_attention(
      h, kv, self_bias, rotation, past=past, deterministic=deterministic
    )
    if config.post_norm:
      h = self.post_self_attention_norm(h)
    x += self.dropout(h, deterministic=deterministic)

    if self.has_cross_attention:
      h = self.pre_cross_attention_norm(x) if config.pre_norm else x
      if cross_kv is None:
        cross_kv = self.cross_attention.project_kv(context.encoded)
      h = self.cross_attention(
        h, cross_kv, context.cross_bias, deterministic=deterministic
      )
      if config.post_norm:
        h = self.post_cross_attention_norm(h)
      x += self.dropout(h, deterministic=deterministic)

    h = inputs if config.parallel_residual else x
    if config.pre_norm:
      h = self.pre_mlp_norm(h)
    h = self.mlp(h, deterministic=deterministic)
    if config.post_norm:
      h = self.post_mlp_norm(h)
    x += self.dropout(h, deterministic=deterministic)
    x = nn.with_logical_constraint(x, ('batch', 'length', 'embed'))
    return x, kv if config.for_generation else None

  def _positions(self, layer, context):
    """Returns the bias and the rotation of this layer's self-attention.

    Layers differ only by a traced index, so that they can be scanned.
    """
    config, bias, rotation = self.config, context.self_bias, context.rotation
    is_in_parts = isinstance(bias, fused_attention.Visibility)
    if config.relpos_per_layer:
      by_layer = self.relpos_bias(context.buckets)
      if is_in_parts:
        bias = bias.replace(by_offset=by_layer)
      else:
        bias += by_layer
    period = config.global_layer_period
    is_global = jnp.asarray((layer + 1) % period == 0 if period else False)
    if config.first_window_layer:
      is_global |= layer < config.first_window_layer
    if config.sliding_window and is_in_parts:
      everything = jnp.iinfo(jnp.int32).max
      bias = bias.replace(
        window=jnp.where(is_global, everything, config.sliding_window)
      )
    elif config.sliding_window:
      near = positions.window_mask(context.offsets, config.sliding_window)
      bias += attention.mask_bias(near | is_global)[:, None]
    if rotation is not None:
      rotation = rotation.of_layer(is_global)
      if config.no_rope_period:
        number = jnp.asarray(layer + 1)
        rotation = rotation.only_if(number % config.no_rope_period != 0)
    return bias, rotation


class Stack(nn.Module):
  """A stack of blocks and a final norm.

  Attributes:
    config: of every layer.
    num_layers: number of layers.
    has_cross_attention: whether layers attend to an encoded prompt.
    bidirectional: whether relative buckets distinguish keys before the query
      from keys after it (encoder).
  """

  config: config_lib.TransformerConfig
  num_layers: int
  has_cross_attention: bool = False
  bidirectional: bool = False

  def setup(self):
    config = self.config
    if config.for_generation:
      self.layers: Any = [
        Block(config, self.has_cross_attention) for _ in range(self.num_layers)
      ]
    else:
      self.layers = self._scanned_blocks()
    if config.positions == 'relative' and not config.relpos_per_layer:
      self.relpos_bias = positions.RelativePositionBias(config)
    self.final_norm = layers.Norm(config)
    self.dropout = layers.Dropout(config.dropout_rate)

  def _scanned_blocks(self) -> nn.Module:
    """Returns one block with stacked parameters, scanned over layers."""
    config = self.config
    block: type[nn.Module] = Block
    if config.remat != 'none':
      options = dict(
        static_argnums=(5,),
        policy=_REMAT_POLICIES[config.remat],
        # A loop keeps XLA from merging the recomputation with the forward pass.
        # An unrolled stack would be merged, and remat would save no memory.
        prevent_cse=not config.scan_layers,
      )
      block = nn.remat(Block, methods={'__call__': options})
    return nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
      length=self.num_layers,
      unroll=1 if config.scan_layers else self.num_layers,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(config, self.has_cross_attention)

  def context(
    self,
    mask: Bool[Array, '#batch 1 query key'] | fused_attention.Visibility,
    query_positions: Int[Array, '#batch query'],
    key_positions: Int[Array, '#batch key'],
    **fields: Any,
  ) -> Context:
    """Returns the context of a call.

    Args:
      mask: visible keys of each query; sliding windows are added per layer. Of
        a call without a cache, given in parts: attention may take a kernel.
      query_positions: positions of the tokens of this call.
      key_positions: positions of the cache's slots, if any, then of the tokens.
      **fields: other fields of `Context`.
    """
    config = self.config
    bias = self.bias(mask)
    if config.positions == 'rotary':
      fields['rotation'] = positions.rotation(config, query_positions)
    if isinstance(bias, fused_attention.Visibility):
      return self._context_in_parts(
        bias, query_positions, key_positions, **fields
      )
    offsets = positions.offsets(query_positions, key_positions)
    if config.positions == 'relative':
      buckets = self._buckets(offsets)
      if config.relpos_per_layer:
        fields['buckets'] = buckets
      else:
        bias += self.relpos_bias(buckets)
    if config.sliding_window:
      fields['offsets'] = offsets
    return Context(bias, **fields)

  def bias(
    self, mask: Bool[Array, '...'] | fused_attention.Visibility
  ) -> Float[Array, '...'] | fused_attention.Visibility:
    """Returns the bias of a mask; its parts if attention takes the kernel."""
    if not isinstance(mask, fused_attention.Visibility):
      return attention.mask_bias(mask)
    num_rows, num_queries = mask.query_segments.shape
    num_keys = mask.key_segments.shape[1]
    if fused_attention.is_chosen(self.config, num_rows, num_queries, num_keys):
      return mask
    return attention.mask_bias(attention.visible_mask(mask))

  def _buckets(
    self, offsets: Int[Array, '#batch query key']
  ) -> Int[Array, '#batch query key']:
    """Returns the buckets of relative positions."""
    return positions.relative_position_bucket(
      offsets,
      bidirectional=self.bidirectional,
      num_buckets=self.config.relpos_buckets,
      max_distance=self.config.relpos_max_distance,
    )

  def _context_in_parts(
    self,
    bias: fused_attention.Visibility,
    query_positions: Int[Array, '#batch query'],
    key_positions: Int[Array, '#batch key'],
    **fields: Any,
  ) -> Context:
    """Returns the context of a call whose attention takes the kernel."""
    config = self.config
    if config.positions == 'relative':
      # Positions are slots, so all rows share the bias of an offset.
      num_queries, num_keys = query_positions.shape[1], key_positions.shape[1]
      buckets = self._buckets(jnp.arange(1 - num_queries, num_keys)[None, None])
      if config.relpos_per_layer:
        fields['buckets'] = buckets
      else:
        bias = bias.replace(by_offset=self.relpos_bias(buckets))
    if config.sliding_window:
      rows = bias.query_segments.shape[0]
      bias = bias.replace(
        query_positions=_for_rows(query_positions, rows),
        key_positions=_for_rows(key_positions, rows),
      )
    return Context(bias, **fields)

  def project_cross(
    self, encoded: Float[Array, 'batch kv_length embed']
  ) -> tuple[cache_lib.KeyValues, ...]:
    """Projects the encoded prompt to each layer's cross keys and values."""
    return tuple(layer.project_cross(encoded) for layer in self.layers)

  def __call__(
    self,
    embeddings: Float[Array, 'batch query embed'],
    context: Context,
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch query embed']:
    """Returns the states of whole sequences, after the final norm."""
    if self.config.for_generation:
      return self.extend(embeddings, context, deterministic=deterministic)[0]
    x = self._begin(embeddings, deterministic=deterministic)
    index = jnp.arange(self.num_layers)
    x, _ = self.layers(x, index, None, None, context, deterministic)
    return self.final_norm(x)

  def extend(
    self,
    embeddings: Float[Array, 'batch query embed'],
    context: Context,
    cache: cache_lib.Cache | None = None,
    *,
    deterministic: bool = True,
  ) -> tuple[Float[Array, 'batch query embed'], list[cache_lib.KeyValues]]:
    """Returns normed states of new tokens, and their keys and values.

    Args:
      embeddings: of the new tokens.
      context: masks and positions, of the cache's slots and the new tokens.
      cache: KV cache of earlier tokens; None at prefill.
      deterministic: disables dropout.
    """
    nothing = (None,) * self.num_layers
    past = nothing if cache is None else cache.kv
    cross_kv = (cache and cache.cross_kv) or nothing
    x = self._begin(embeddings, deterministic=deterministic)
    new = []
    for i, layer in enumerate(self.layers):
      x, kv = layer(x, i, past[i], cross_kv[i], context, deterministic)
      new.append(kv)
    return self.final_norm(x), new

  def states_after(
    self,
    embeddings: Float[Array, 'batch query embed'],
    context: Context,
    layer: int,
  ) -> Float[Array, 'batch query embed']:
    """Returns the states after the first `layer` layers, after the final norm.

    Later layers are not computed.
    """
    x = self._begin(embeddings, deterministic=True)
    if layer:
      x = self._first_layers(x, context, layer)[-1]
    return self.final_norm(x)

  def all_states(
    self, embeddings: Float[Array, 'batch query embed'], context: Context
  ) -> Float[Array, 'layers batch query embed']:
    """Returns the embeddings and the states after each layer, all normed.

    Every entry goes through the final norm of the stack.
    """
    x = self._begin(embeddings, deterministic=True)
    after = self._first_layers(x, context, self.num_layers)
    return self.final_norm(jnp.concatenate([x[None], after]))

  def _first_layers(self, x, context, num_layers):
    """Returns the states after each of the first layers, without the norm."""
    if self.config.for_generation:
      after = []
      for i, layer in enumerate(self.layers[:num_layers]):
        x, _ = layer(x, i, None, None, context, True)
        after.append(x)
      return jnp.stack(after)
    block = Block(self.config, self.has_cross_attention, parent=None)
    stacked = self.layers.variables['params']

    def read(x, i):
      # Indexed inside the loop: slicing the stack first would copy it.
      params = jax.tree.map(
        lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), stacked
      )
      x, _ = block.apply({'params': params}, x, i, None, None, context, True)
      return x, x

    unroll = 1 if self.config.scan_layers else num_layers
    return jax.lax.scan(read, x, jnp.arange(num_layers), unroll=unroll)[1]

  def _begin(self, embeddings, *, deterministic):
    x = self.dropout(embeddings, deterministic=deterministic)
    return nn.with_logical_constraint(x, ('batch', 'length', 'embed'))


def _for_rows(
  x: Int[Array, '#batch length'], rows: int
) -> Int[Array, 'batch length']:
  return jnp.broadcast_to(x, (rows, x.shape[1]))
