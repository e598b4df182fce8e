# SPDX-License-Identifier: Apache-2.0
"""Norms, projections, embeddings, the MLP and relative positions.

Einsum letters, the same in every file: b batch, t query position, s key
position, d embed, e LLM embed, n heads, h per-head, f mlp, v vocab.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from l2s_jax.models import config as config_lib

_ACTIVATIONS = {
  'relu': nn.relu,
  'gelu': functools.partial(nn.gelu, approximate=True),
  'silu': nn.silu,
  'linear': lambda x: x,
}


class Einsum(nn.Module):
  """Contracts its input with a kernel whose axes have names.

  Attributes:
    equation: einsum of input and kernel, such as 'btd,dnh->bnth'.
    shape: of the kernel.
    axes: logical names of the kernel's axes.
    fan_in: inputs summed into one output; sets the default initial scale.
    config: has the initial scale and the dtype.
    bias_axes: indices into `shape` of the bias's axes; None for no bias.
  """

  equation: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  fan_in: int
  config: config_lib.TransformerConfig
  bias_axes: tuple[int, ...] | None = None

  @nn.compact
  def __call__(self, inputs: Float[Array, '...']) -> Float[Array, '...']:
    dtype = self.config.activation_dtype
    stddev = self.config.kernel_init_stddev or self.fan_in**-0.5
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(nn.initializers.normal(stddev), self.axes),
      self.shape,
    )
    outputs = jnp.einsum(
      self.equation, inputs.astype(dtype), kernel.astype(dtype)
    )
    if self.bias_axes is not None:
      bias = self.param(
        'bias',
        nn.with_logical_partitioning(
          nn.initializers.zeros, tuple(self.axes[i] for i in self.bias_axes)
        ),
        tuple(self.shape[i] for i in self.bias_axes),
      )
      if len(self.bias_axes) == 2:
        bias = bias[:, None, :]  # [heads, 1, kv] beside [batch, heads, t, kv]
      outputs += bias.astype(dtype)
    return outputs


class Norm(nn.Module):
  """RMS norm (T5) or layer norm with bias (GPT-2), computed in float32."""

  config: config_lib.TransformerConfig

  @nn.compact
  def __call__(
    self, inputs: Float[Array, '*batch embed']
  ) -> Float[Array, '*batch embed']:
    # bfloat16 has 8 bits of mantissa: a mean over `embed` needs float32.
    x = inputs.astype(jnp.float32)
    if self.config.norm == 'layer':
      x -= x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(
      jnp.mean(x * x, -1, keepdims=True) + self.config.norm_epsilon
    )
    shape = inputs.shape[-1:]
    scale = self.param(
      'scale',
      nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
      shape,
    )
    x *= scale
    if self.config.norm == 'layer':
      x += self.param(
        'bias',
        nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)),
        shape,
      )
    return x.astype(self.config.activation_dtype)


class Embed(nn.Module):
  """A table of embeddings; `attend` is the tied output head."""

  config: config_lib.TransformerConfig
  num_rows: int
  axes: tuple[str, str] = ('vocab', 'embed')

  def setup(self):
    self.embedding = self.param(
      'embedding',
      nn.with_logical_partitioning(
        nn.initializers.normal(self.config.embedding_init_stddev), self.axes
      ),
      (self.num_rows, self.config.emb_dim),
    )

  def __call__(self, ids: Int[Array, '*batch']) -> Float[Array, '*batch embed']:
    return jnp.take(self.embedding, ids, axis=0).astype(
      self.config.activation_dtype
    )

  def attend(
    self, states: Float[Array, 'batch length embed']
  ) -> Float[Array, 'batch length vocab']:
    """Returns float32 logits: a dot product with every row of the table."""
    return jnp.einsum(
      'btd,vd->btv',
      states,
      self.embedding.astype(states.dtype),
      preferred_element_type=jnp.float32,
    )


class Head(nn.Module):
  """From states to float32 logits, by a kernel or by the embedding table."""

  config: config_lib.TransformerConfig

  @nn.compact
  def __call__(
    self, states: Float[Array, 'batch length embed'], embedder: Embed
  ) -> Float[Array, 'batch length vocab']:
    config = self.config
    if config.logits_via_embedding:
      if config.scale_logits:
        states *= config.emb_dim**-0.5
      logits = embedder.attend(states)
    else:
      stddev = config.kernel_init_stddev or config.emb_dim**-0.5
      kernel = self.param(
        'kernel',
        nn.with_logical_partitioning(
          nn.initializers.normal(stddev), ('embed', 'vocab')
        ),
        (config.emb_dim, config.vocab_size),
      )
      logits = jnp.einsum(
        'btd,dv->btv',
        states,
        kernel.astype(states.dtype),
        preferred_element_type=jnp.float32,
      )
    return nn.with_logical_constraint(logits, ('batch', 'length', 'vocab'))


class Mlp(nn.Module):
  """Two projections with an activation, or a product of two, between."""

  config: config_lib.TransformerConfig

  @nn.compact
  def __call__(
    self, inputs: Float[Array, 'batch length embed'], *, deterministic: bool
  ) -> Float[Array, 'batch length embed']:
    config = self.config
    d, f = config.emb_dim, config.mlp_dim
    bias_axes = (1,) if config.use_bias else None
    activations = config.mlp_activations
    hidden = None
    for i, activation in enumerate(activations):
      name = 'wi' if len(activations) == 1 else f'wi_{i}'
      branch = Einsum(
        'btd,df->btf', (d, f), ('embed', 'mlp'), d, config, bias_axes, name=name
      )(inputs)
      branch = _ACTIVATIONS[activation](branch)
      hidden = branch if hidden is None else hidden * branch
    hidden = Dropout(config.dropout_rate)(hidden, deterministic=deterministic)
    hidden = nn.with_logical_constraint(hidden, ('batch', 'length', 'mlp'))
    return Einsum(
      'btf,fd->btd', (f, d), ('mlp', 'embed'), f, config, bias_axes, name='wo'
    )(hidden)


class Dropout(nn.Module):
  """Dropout with one mask for all positions of a row, as T5X has it.

  Drawing a mask per position costs more than the layer's own elementwise
  work; T5X broadcasts along the length for the same reason.
  """

  rate: float

  @nn.compact
  def __call__(
    self, inputs: Float[Array, '... length features'], *, deterministic: bool
  ) -> Float[Array, '... length features']:
    return nn.Dropout(self.rate, broadcast_dims=(-2,))(
      inputs, deterministic=deterministic
    )


def relative_position_bucket(
  offset: Int[Array, 'query key'],
  *,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> Int[Array, 'query key']:
  """Maps offsets between positions to bucket ids in [0, num_buckets).

  Half of the buckets of a direction hold exact offsets; the rest grow
  logarithmically up to `max_distance`, beyond which all share the last.

  Args:
    offset: key position minus query position, in tokens.
    bidirectional: whether keys after the query get buckets of their own
      (encoder) or all fall into bucket 0 (decoder).
    num_buckets: of both directions together.
    max_distance: in tokens.

  Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1. A golden test
  holds encoder and logits to those of T5X.
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
  """A learned bias on attention logits per head and bucket of offsets."""

  config: config_lib.TransformerConfig
  bidirectional: bool

  @nn.compact
  def __call__(
    self, query_positions: Int[Array, 'query'], key_positions: Int[Array, 'key']
  ) -> Float[Array, '1 heads query key']:
    config = self.config
    table = self.param(
      'rel_embedding',
      nn.with_logical_partitioning(
        nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
        ('heads', 'relpos_buckets'),
      ),
      (config.num_heads, config.relpos_buckets),
    )
    buckets = relative_position_bucket(
      key_positions[None, :] - query_positions[:, None],
      bidirectional=self.bidirectional,
      num_buckets=config.relpos_buckets,
      max_distance=config.relpos_max_distance,
    )
    return jnp.take(table, buckets, axis=1)[None]
