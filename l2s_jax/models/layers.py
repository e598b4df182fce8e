# SPDX-License-Identifier: Apache-2.0
"""Norms, projections, embeddings and the MLP.

Einsum letters, the same in every file: b batch, t query position, s key
position, d embed, e LLM embed, n heads, k heads of keys and values, h per-head,
f mlp, v vocab.
"""

import functools
import math
from typing import Any

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


class Dense(nn.Module):
  """Contracts the last axes of its input with a kernel whose axes have names.

  Attributes:
    inputs: sizes of the axes that are contracted, the last of the input.
    outputs: sizes of those that take their place.
    axes: logical names of the kernel's axes, inputs first.
    config: has the initial scale and the dtype.
    use_bias: whether to add a bias.
    fan_in: sets the default initial scale; None is what the axes contracted
      have in all.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  axes: tuple[str, ...]
  config: config_lib.TransformerConfig
  use_bias: bool = False
  fan_in: int | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch length ...']
  ) -> Float[Array, 'batch length ...']:
    dtype = self.config.activation_dtype
    fan_in = self.fan_in or math.prod(self.inputs)
    stddev = self.config.kernel_init_stddev or fan_in**-0.5
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(nn.initializers.normal(stddev), self.axes),
      (*self.inputs, *self.outputs),
    )
    x = contract(x.astype(dtype), kernel, self.config)
    if self.use_bias:
      bias = self.param(
        'bias',
        nn.with_logical_partitioning(
          nn.initializers.zeros, self.axes[len(self.inputs) :]
        ),
        self.outputs,
      )
      x += bias.astype(dtype)
    return x


def contract(
  x: Float[Array, 'batch length ...'],
  kernel: Float[Array, '...'] | Any,
  config: config_lib.TransformerConfig,
  dtype: Any = None,
) -> Float[Array, 'batch length ...']:
  """Returns the product of all but batch and length with as many of a kernel.

  Args:
    x: in the dtype in which to multiply.
    kernel: float, or a QArray of Qwix, in int8.
    config: says whether `x` is to be int8, too.
    dtype: of the result; None is that of `x`.
  """
  num_contracted = x.ndim - 2
  if isinstance(kernel, jax.Array):
    # A product of two matrices: of an einsum over heads XLA:CPU makes one that
    # copies the kernel first, at every token.
    outputs = kernel.shape[num_contracted:]
    matrix = kernel.reshape(-1, math.prod(outputs)).astype(x.dtype)
    x = jnp.matmul(
      x.reshape(*x.shape[:2], -1), matrix, preferred_element_type=dtype
    )
    return x.reshape(*x.shape[:2], *outputs)
  import qwix

  axes = tuple(range(num_contracted))
  contracted = tuple(axis + 2 for axis in axes)
  dtype = dtype or x.dtype
  if config.quantization == 'int8_dynamic':
    x = qwix.quantize(x, jnp.int8, channelwise_axes=(0, 1))
  product = qwix.dot_general(
    x, kernel, ((contracted, axes), ((), ())), preferred_element_type=dtype
  )
  return product.astype(dtype)


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
    if config.logits_via_embedding and config.scale_logits:
      states *= config.emb_dim**-0.5
    if config.logits_via_embedding and not config.for_generation:
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
      logits = contract(states, kernel, config, jnp.float32)
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
    use_bias = config.use_bias
    activations = config.mlp_activations
    hidden = None
    for i, activation in enumerate(activations):
      name = 'wi' if len(activations) == 1 else f'wi_{i}'
      branch = Dense((d,), (f,), ('embed', 'mlp'), config, use_bias, name=name)(
        inputs
      )
      branch = _ACTIVATIONS[activation](branch)
      hidden = branch if hidden is None else hidden * branch
    hidden = Dropout(config.dropout_rate)(hidden, deterministic=deterministic)
    hidden = nn.with_logical_constraint(hidden, ('batch', 'length', 'mlp'))
    return Dense((f,), (d,), ('mlp', 'embed'), config, use_bias, name='wo')(
      hidden
    )


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
