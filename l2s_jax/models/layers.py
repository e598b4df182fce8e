# SPDX-License-Identifier: Apache-2.0
"""Norms, projections, embeddings and the MLP.

Einsum letters, the same in every file: b batch, t query position, s key
position, d embed, e LLM embed, n heads, k heads of keys and values, h per-head,
f mlp, v vocab.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from l2s_jax.models import config as config_lib

_ACTIVATIONS = {
  'relu': nn.relu,
  'gelu': functools.partial(nn.gelu, approximate=True),
  'gelu_exact': functools.partial(nn.gelu, approximate=False),
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
  """RMS norm (T5) or layer norm with bias (GPT-2), computed in float32.

  Attributes:
    config: says which.
    axis: logical name of the normed axis.
  """

  config: config_lib.TransformerConfig
  axis: str = 'embed'

  @nn.compact
  def __call__(
    self, inputs: Float[Array, '*batch embed']
  ) -> Float[Array, '*batch embed']:
    config = self.config
    # bfloat16 has 8 bits of mantissa: a mean over `embed` needs float32.
    x = inputs.astype(jnp.float32)
    if config.norm == 'layer':
      x -= x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_epsilon)
    shape = inputs.shape[-1:]
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    scale = self.param(
      'scale',
      nn.with_logical_partitioning(
        zeros if config.norm_unit_offset else ones, (self.axis,)
      ),
      shape,
    )
    x *= 1 + scale if config.norm_unit_offset else scale
    if config.norm == 'layer':
      x += self.param(
        'bias', nn.with_logical_partitioning(zeros, (self.axis,)), shape
      )
    return x.astype(config.activation_dtype)


class Embed(nn.Module):
  """A table of embeddings; `attend` is the tied output head.

  Attributes:
    config: has the width, the initial scale and the dtype.
    num_rows: of the table.
    axes: logical names of its axes.
    multiplier: of what is looked up; `attend` takes the table as it is.
  """

  config: config_lib.TransformerConfig
  num_rows: int
  axes: tuple[str, str] = ('vocab', 'embed')
  multiplier: float = 1.0

  def setup(self):
    self.embedding = self.param(
      'embedding',
      nn.with_logical_partitioning(
        nn.initializers.normal(self.config.embedding_init_stddev), self.axes
      ),
      (self.num_rows, self.config.emb_dim),
    )

  def __call__(self, ids: Int[Array, '*batch']) -> Float[Array, '*batch embed']:
    embeddings = jnp.take(self.embedding, ids, axis=0).astype(
      self.config.activation_dtype
    )
    return embeddings * self.multiplier

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


def token_embed(config: config_lib.TransformerConfig) -> Embed:
  """Returns the embedding table of a vocabulary."""
  return Embed(
    config,
    config.vocab_size,
    multiplier=config.emb_dim**0.5 if config.scale_embeddings else 1.0,
  )


def softcap(logits: Float[Array, '...'], bound: float) -> Float[Array, '...']:
  """Bounds float32 logits smoothly; a bound of 0 is none."""
  return bound * jnp.tanh(logits / bound) if bound else logits


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
    logits = softcap(logits, config.logits_softcap)
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
