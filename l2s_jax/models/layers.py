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
from jax import ad_checkpoint
from jaxtyping import Array, Float, Int

from l2s_jax.models import config as config_lib
from l2s_jax.models import int8, kernel_first
from l2s_jax.runtime import partitioning

# Checkpoint name of kernel products, which 'minimal' rematerialisation saves.
PRODUCT = 'product with a kernel'

# Names of the two low-rank factors beside a kernel.
LORA = ('lora_down', 'lora_up')

_ACTIVATIONS = {
  'relu': nn.relu,
  'gelu': functools.partial(nn.gelu, approximate=True),
  'gelu_exact': functools.partial(nn.gelu, approximate=False),
  'silu': nn.silu,
  'linear': lambda x: x,
}


class Dense(nn.Module):
  """A linear layer over the last axes; its kernel axes have logical names.

  Attributes:
    inputs: sizes of the contracted axes, the last axes of the input.
    outputs: sizes of the axes that replace them.
    axes: logical names of the kernel's axes, inputs first.
    config: gives the initial scale, the dtype and LoRA's rank.
    use_bias: whether to add a bias.
    fan_in: for the default initial scale; None takes the product of `inputs`.
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
      _kernel_shape(self.inputs, self.outputs, self.config),
    )
    inputs = x.astype(dtype)
    x = contract(inputs, kernel, self.config)
    if self.has_lora:
      x += self._lora(inputs)
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

  @property
  def has_lora(self) -> bool:
    """Whether LoRA matrices are learned beside the kernel."""
    config = self.config
    # In generation LoRA is merged, see `language_model.params_for_generation`.
    return (
      config.lora_rank > 0
      and not config.for_generation
      and self.name in config.lora_kernels
    )

  def _lora(
    self, x: Float[Array, 'batch length ...']
  ) -> Float[Array, 'batch length ...']:
    rank, num_inputs = self.config.lora_rank, len(self.inputs)
    stddev = math.prod(self.inputs) ** -0.5
    down = self.param(
      LORA[0],
      nn.with_logical_partitioning(
        nn.initializers.normal(stddev), (*self.axes[:num_inputs], None)
      ),
      (*self.inputs, rank),
    )
    up = self.param(
      LORA[1],
      nn.with_logical_partitioning(
        nn.initializers.zeros, (None, *self.axes[num_inputs:])
      ),
      (rank, *self.outputs),
    )
    hidden = contract(x, down, self.config)
    return contract(hidden, up, self.config) * (self.config.lora_alpha / rank)


def _kernel_shape(
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  config: config_lib.TransformerConfig,
) -> tuple[int, ...]:
  """Returns the stored shape of a kernel."""
  if config.quantization != 'none':
    return (*outputs, *inputs)  # as `kernel_first.arrange`
  return (*inputs, *outputs)


def contract(
  x: Float[Array, 'batch length ...'],
  kernel: Float[Any, '...'] | int8.Rounded,
  config: config_lib.TransformerConfig,
  dtype: Any = None,
) -> Float[Array, 'batch length ...']:
  """Contracts all axes but batch and length with the first of a kernel.

  Args:
    x: in the dtype of the product.
    kernel: floats, or in int8; by output if the config quantizes.
    config: its `quantization` says how the kernel is stored and multiplied.
    dtype: of the result; None is that of `x`.
  """
  if isinstance(kernel, int8.Rounded):
    return int8.multiply(x, kernel, dtype or x.dtype, config.quantization)
  if config.quantization == 'bfloat16':
    return kernel_first.multiply_bfloat16(x, kernel, dtype or x.dtype)
  # A product of two matrices: XLA:CPU lowers an einsum over heads to one that
  # copies the kernel first, at every token.
  outputs = kernel.shape[x.ndim - 2 :]
  matrix = kernel.reshape(-1, math.prod(outputs)).astype(x.dtype)
  x = multiply(x.reshape(*x.shape[:2], -1), matrix, dtype)
  x = ad_checkpoint.checkpoint_name(x, PRODUCT)
  return x.reshape(*x.shape[:2], *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def multiply(
  x: Float[Array, 'batch length inputs'],
  matrix: Float[Any, 'a b'],
  dtype: Any = None,
  is_transposed: bool = False,
) -> Float[Array, 'batch length outputs']:
  """Returns the product of states and a matrix or its transpose.

  Its gradient of the matrix is one product in the matrix's own layout. JAX's
  rule computes the transposed gradient; XLA:CPU then transposes it in memory
  and uses a slower matrix product, a fifth of a T5-Small train step.

  Args:
    x: states.
    matrix: [inputs, outputs], or if transposed [outputs, inputs].
    dtype: of the result; None is that of `x`.
    is_transposed: whether to multiply by the transpose.
  """
  contracted = ((2,), (1 if is_transposed else 0,))
  return jax.lax.dot_general(
    x, matrix, (contracted, ((), ())), preferred_element_type=dtype
  )


def _multiply_forwards(x, matrix, dtype, is_transposed):
  return multiply(x, matrix, dtype, is_transposed), (x, matrix)


def _multiply_backwards(dtype, is_transposed, residuals, gradient):
  x, matrix = residuals
  of_x = jax.lax.dot_general(
    gradient,
    matrix,
    (((2,), (0 if is_transposed else 1,)), ((), ())),
    preferred_element_type=gradient.dtype,
  )
  both = (gradient, x) if is_transposed else (x, gradient)
  of_matrix = jax.lax.dot_general(
    *both,
    (((0, 1), (0, 1)), ((), ())),
    preferred_element_type=gradient.dtype,
  )
  return of_x.astype(x.dtype), of_matrix.astype(matrix.dtype)


multiply.defvjp(_multiply_forwards, _multiply_backwards)


class Norm(nn.Module):
  """RMS norm (T5) or layer norm with bias (GPT-2), computed in float32.

  Attributes:
    config: its `norm` selects one.
    axes: logical names of the normalised axes, the last ones.
  """

  config: config_lib.TransformerConfig
  axes: tuple[str, ...] = ('embed',)

  @nn.compact
  def __call__(
    self, inputs: Float[Array, '*batch embed']
  ) -> Float[Array, '*batch embed']:
    config = self.config
    axis = tuple(range(-len(self.axes), 0))
    # bfloat16 has 8 bits of mantissa: a mean over `embed` needs float32.
    x = inputs.astype(jnp.float32)
    if config.norm == 'layer':
      x -= x.mean(axis, keepdims=True)
    variance = jnp.mean(x * x, axis, keepdims=True)
    x *= jax.lax.rsqrt(variance + config.norm_epsilon)
    shape = inputs.shape[-len(self.axes) :]
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    scale = self.param(
      'scale',
      nn.with_logical_partitioning(
        zeros if config.norm_unit_offset else ones, self.axes
      ),
      shape,
    )
    x *= 1 + scale if config.norm_unit_offset else scale
    if config.norm == 'layer':
      x += self.param(
        'bias', nn.with_logical_partitioning(zeros, self.axes), shape
      )
    return x.astype(config.activation_dtype)


class Embed(nn.Module):
  """An embedding table; `attend` is the tied output head.

  Attributes:
    config: gives the width, the initial scale and the dtype.
    num_rows: rows of the table.
    axes: logical names of its axes.
    multiplier: factor of looked-up embeddings; `attend` does not apply it.
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
    table = self.embedding
    if isinstance(table, int8.Rounded):
      values = partitioning.look_up(table.values, ids, self.axes)
      scale = partitioning.look_up(table.scale, ids, (self.axes[0], None))
      embeddings = int8.dequantize(values, scale)
    else:
      embeddings = partitioning.look_up(table, ids, self.axes)
      if table.dtype == jnp.uint16:
        embeddings = kernel_first.of_bits(embeddings)
    return embeddings.astype(self.config.activation_dtype) * self.multiplier

  def attend(
    self, states: Float[Array, 'batch length embed']
  ) -> Float[Array, 'batch length vocab']:
    """Returns float32 logits: the product with the transposed table."""
    table = self.embedding.astype(states.dtype)
    return multiply(states, table, jnp.float32, True)


def token_embed(config: config_lib.TransformerConfig) -> Embed:
  """Returns the token embedding table of a model."""
  return Embed(
    config,
    config.vocab_size,
    multiplier=config.emb_dim**0.5 if config.scale_embeddings else 1.0,
  )


def softcap(logits: Float[Array, '...'], bound: float) -> Float[Array, '...']:
  """Bounds logits smoothly by tanh; 0 means no bound."""
  return bound * jnp.tanh(logits / bound) if bound else logits


class Head(nn.Module):
  """The output head: float32 logits from states, tied or with a kernel."""

  config: config_lib.TransformerConfig

  @nn.compact
  def __call__(
    self, states: Float[Array, 'batch length embed'], embedder: Embed
  ) -> Float[Array, 'batch length vocab']:
    config = self.config
    is_scaled = (
      config.scale_logits
      if config.logits_via_embedding
      else config.scale_untied_logits
    )
    if is_scaled:
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
        _kernel_shape((config.emb_dim,), (config.vocab_size,), config),
      )
      logits = contract(states, kernel, config, jnp.float32)
    logits = softcap(logits, config.logits_softcap)
    return nn.with_logical_constraint(logits, ('batch', 'length', 'vocab'))


class Mlp(nn.Module):
  """The MLP, plain or gated: activated projections, their product, 'wo'."""

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
  """Dropout with one mask for all positions of a row, as in T5X.

  A mask per position costs more to draw than the layer's own elementwise work;
  T5X broadcasts along the length for the same reason.
  """

  rate: float

  @nn.compact
  def __call__(
    self, inputs: Float[Array, '... length features'], *, deterministic: bool
  ) -> Float[Array, '... length features']:
    if deterministic or not self.rate:
      return inputs
    shape = (*inputs.shape[:-2], 1, inputs.shape[-1])
    is_kept = jax.random.bernoulli(
      self.make_rng('dropout'), 1 - self.rate, shape
    )
    # A product, not a `where`: the backward pass then keeps the small mask;
    # of a `where`, XLA:CPU keeps one with all positions.
    return inputs * (is_kept / (1 - self.rate)).astype(inputs.dtype)
