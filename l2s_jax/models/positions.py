# SPDX-License-Identifier: Apache-2.0
"""Positions in attention: relative buckets, rotary angles, sliding windows.

Relative positions (T5) are a learned bias on attention logits. Rotary
positions (Llama, Pythia) rotate queries and keys. Sliding windows (Gemma) mask
distant tokens. All of them take positions that count real tokens. Learned
position tables, added to embeddings, are in the models' modules.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import config as config_lib


def count_tokens(
  valid: Bool[Array, 'batch slots'],
) -> Int[Array, 'batch slots']:
  """Returns the position of each token among the real tokens, from 0.

  A padded slot repeats the position before it (0 at the start of a row).
  """
  return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)


def offsets(
  query_positions: Int[Array, '#batch query'],
  key_positions: Int[Array, '#batch key'],
) -> Int[Array, '#batch query key']:
  """Returns key position minus query position, in tokens."""
  return key_positions[:, None, :] - query_positions[:, :, None]


def relative_position_bucket(
  offset: Int[Array, '*batch query key'],
  *,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> Int[Array, '*batch query key']:
  """Maps offsets between positions to bucket ids in [0, num_buckets).

  Half of the buckets of a direction hold exact offsets; the rest grow
  logarithmically up to `max_distance`, beyond which all share the last.

  Args:
    offset: key position minus query position, in tokens.
    bidirectional: whether keys after the query get buckets of their own
      (encoder) or all fall into bucket 0 (decoder).
    num_buckets: buckets of both directions together.
    max_distance: in tokens.

  Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1. A golden test
  compares encoder states and logits with T5X's.
  """
  buckets = jnp.zeros_like(offset)
  if bidirectional:
    num_buckets //= 2
    buckets += (offset > 0) * num_buckets
    distance = jnp.abs(offset)
  else:
    distance = jnp.maximum(-offset, 0)
  num_exact = num_buckets // 2
  growth = jnp.log(jnp.maximum(distance, 1) / num_exact) / math.log(
    max_distance / num_exact
  )
  far = num_exact + (growth * (num_buckets - num_exact)).astype(offset.dtype)
  far = jnp.minimum(far, num_buckets - 1)
  return buckets + jnp.where(distance < num_exact, distance, far)


class RelativePositionBias(nn.Module):
  """T5's learned bias on attention logits, per head and offset bucket."""

  config: config_lib.TransformerConfig

  @nn.compact
  def __call__(
    self, buckets: Int[Array, '#batch query key']
  ) -> Float[Array, '#batch heads query key']:
    config = self.config
    table = self.param(
      'rel_embedding',
      nn.with_logical_partitioning(
        nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
        ('heads', 'relpos_buckets'),
      ),
      (config.num_heads, config.relpos_buckets),
    )
    return jnp.moveaxis(jnp.take(table, buckets, axis=1), 0, 1)


class Rotation(struct.PyTreeNode):
  """Cosine and sine of rotary angles, by position and feature pair.

  The axis `kinds` has length 1, or 2 where sliding-window layers have a base of
  their own: global layers first, sliding-window layers second.
  """

  cos: Float[Array, '*kinds #batch length pairs']
  sin: Float[Array, '*kinds #batch length pairs']

  def of_layer(self, is_global: Bool[Array, '']) -> 'Rotation':
    """Returns the angles for one layer, without the axis `kinds`."""
    kind = jnp.where(is_global, 0, self.cos.shape[0] - 1)
    return Rotation(self.cos[kind], self.sin[kind])

  def only_if(self, rotates: Bool[Array, '']) -> 'Rotation':
    """Returns these angles if `rotates`, else angles of zero."""
    return Rotation(
      jnp.where(rotates, self.cos, 1.0), jnp.where(rotates, self.sin, 0.0)
    )


def rotation(
  config: config_lib.TransformerConfig,
  positions: Int[Array, '#batch length'],
) -> Rotation:
  """Returns the rotary angles at some positions, for all kinds of layers."""
  kinds = [frequencies(config)]
  if config.rope_local_base is not None:
    kinds.append(_frequencies(config, config.rope_local_base))
  angles = positions[None, :, :, None] * np.stack(kinds)[:, None, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if config.rope_scaling and config.rope_scaling_type == 'yarn':
    # YaRN also scales the length of queries and keys.
    factor = config.rope_scaling[-1]
    cos, sin = cos.at[0].multiply(factor), sin.at[0].multiply(factor)
  return Rotation(cos, sin)


def frequencies(config: config_lib.TransformerConfig) -> np.ndarray:
  """Returns the angular frequency of each feature pair in global layers.

  In radians per token, after context extension.
  """
  return _stretched(config, _frequencies(config, config.rope_base))


def _frequencies(
  config: config_lib.TransformerConfig, base: float
) -> np.ndarray:
  """Returns angular frequencies before context extension."""
  exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32)
  return (1.0 / base ** (exponents / config.rotary_dim)).astype(np.float32)


def _stretched(
  config: config_lib.TransformerConfig, frequencies: np.ndarray
) -> np.ndarray:
  """Lowers frequencies to extend the context (`rope_scaling`).

  'linear' divides all frequencies by `factor`. 'llama3' and 'yarn' keep high
  frequencies, divide low ones by `factor`, and interpolate between: 'llama3' by
  the number of turns within the pretraining context, 'yarn' by the index of the
  feature pair.
  """
  if not config.rope_scaling:
    return frequencies
  factor, *rest = config.rope_scaling
  if config.rope_scaling_type == 'linear':
    return frequencies / np.float32(factor)
  if config.rope_scaling_type == 'llama3':
    low, high, context = rest
    turns = context * frequencies / (2 * math.pi)  # in pretraining context
    keep = np.clip((turns - low) / (high - low), 0, 1)
  else:
    fast, slow, context, _ = rest
    # The feature pairs with this many turns in the pretraining context.
    first, last = (
      config.rotary_dim
      * math.log(context / (turns * 2 * math.pi))
      / (2 * math.log(config.rope_base))
      for turns in (fast, slow)
    )
    first = max(math.floor(first), 0)
    last = min(math.ceil(last), config.rotary_dim - 1)
    pairs = np.arange(len(frequencies), dtype=np.float32)
    keep = 1 - np.clip((pairs - first) / max(last - first, 1e-3), 0, 1)
  return ((keep + (1 - keep) / factor) * frequencies).astype(np.float32)


def rotate(
  x: Float[Array, 'batch heads length kv'], by: Rotation
) -> Float[Array, 'batch heads length kv']:
  """Rotates feature pairs (i, i + pairs); further features stay.

  In float32: bfloat16 is too coarse for the angles of distant positions.
  """
  cos, sin = by.cos[:, None], by.sin[:, None]
  num_pairs = cos.shape[-1]
  first, second, rest = jnp.split(x, [num_pairs, 2 * num_pairs], axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(
    [part.astype(x.dtype) for part in (*turned, rest)], axis=-1
  )


def window_mask(
  offset: Int[Array, '#batch query key'], window: int
) -> Bool[Array, '#batch query key']:
  """Returns the mask of keys less than `window` tokens away, on both sides."""
  return jnp.abs(offset) < window
