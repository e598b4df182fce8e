# SPDX-License-Identifier: Apache-2.0
"""The interface of a language model to training and decoding.

A language model reads prompt *embeddings*: its own, or those that LLM-to-SLM
puts in their place. `batch_keys.py` lists the keys of a batch.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib
from l2s_jax.models import int8, kernel_first, lora, transformer

Batch = Mapping[str, jax.Array]
PyTree = Any

# A program to divide layers takes 30 ms to trace and load from its cache.
_SMALL_BYTES = 2**22


class LanguageModel(nn.Module):
  """A language model of any architecture.

  Subclasses define `embed`, `encode`, `prompt_stack`, `logits`, `start` and
  `extend`. Decoding (`start`, `extend`) needs a config from `for_generation`
  and parameters from `params_for_generation`.
  """

  config: config_lib.TransformerConfig

  def check_lengths(self, prompt_length: int, answer_length: int) -> None:
    """Checks that the model has positions for prompt and answer, in tokens.

    Raises:
      ValueError: with both lengths and the size of the position table.
    """

  def embed(
    self, tokens: Int[Array, 'batch length']
  ) -> Float[Array, 'batch length embed']:
    """Returns token embeddings, without positions."""
    raise NotImplementedError

  def first_states(
    self,
    tokens: Int[Array, 'batch length'],
    segment_ids: Int[Array, 'batch length'],
  ) -> Float[Array, 'batch length embed']:
    """Returns the input of the first layer for a prompt."""
    return self.embed(tokens)

  def encode(
    self,
    embeddings: Float[Array, 'batch length embed'],
    segment_ids: Int[Array, 'batch length'],
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch length embed']:
    """Returns the last hidden states of the prompt, after the final norm."""
    raise NotImplementedError

  def prompt_stack(
    self,
    embeddings: Float[Array, 'batch length embed'],
    segment_ids: Int[Array, 'batch length'],
  ) -> tuple[
    transformer.Stack, Float[Array, 'batch length embed'], transformer.Context
  ]:
    """Returns the stack that encodes prompts, its embeddings and context."""
    raise NotImplementedError

  def logits(
    self,
    prompt_embeddings: Float[Array, 'batch prompt embed'],
    prompt_segment_ids: Int[Array, 'batch prompt'],
    batch: Batch,
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced float32 logits of the answer."""
    raise NotImplementedError

  def start(
    self,
    prompt_embeddings: Float[Array, 'batch prompt embed'],
    prompt_segment_ids: Int[Array, 'batch prompt'],
    *,
    num_slots: int,
  ) -> cache_lib.Cache:
    """Prefills a KV cache with the prompt and room for `num_slots` tokens."""
    raise NotImplementedError

  def extend(
    self, tokens: Int[Array, 'batch length'], cache: cache_lib.Cache
  ) -> tuple[Float[Array, 'batch length vocab'], cache_lib.Cache]:
    """Decodes answer tokens; returns logits after each, and the new cache."""
    raise NotImplementedError

  def __call__(
    self, batch: Batch, *, deterministic: bool
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced float32 logits with the model's own embeddings."""
    return self.logits(
      self.embed(batch['encoder_input_tokens']),
      batch['encoder_segment_ids'],
      batch,
      deterministic=deterministic,
    )

  def prefill(self, batch: Batch, *, num_slots: int) -> cache_lib.Cache:
    """Prefills a KV cache with a batch of prompts; `extend` continues it."""
    return self.start(
      self.embed(batch['encoder_input_tokens']),
      batch['encoder_segment_ids'],
      num_slots=num_slots,
    )


def for_generation(
  config: config_lib.TransformerConfig, quantization: str = 'none'
) -> config_lib.TransformerConfig:
  """Returns the model's config for `params_for_generation`.

  Args:
    config: of the trained model.
    quantization: as `TransformerConfig.quantization`.
  """
  return dataclasses.replace(
    config, for_generation=True, quantization=quantization
  )


def params_for_generation(
  config: config_lib.TransformerConfig,
  params: PyTree,
  *,
  consume: bool = False,
  decodes: bool = True,
) -> PyTree:
  """Returns a language model's parameters in the form for generation.

  LoRA is merged into the kernels. Each layer gets arrays of its own, a tied
  output head becomes a transposed copy of its embedding table, and kernels and
  token embeddings are quantized if the config says so. Every token reads all
  weights: on CPU, slices of stacked layers are copied first, at 4 GB/s in place
  of 40.

  Args:
    config: from `for_generation`.
    params: layers stacked, as in training and checkpoints. Unchanged arrays are
      not copied; NumPy arrays give views, unless they are quantized.
    consume: deletes each array after its copy is made.
    decodes: whether the model has an output head. False for a decoder-only LLM
      that only reads prompts.
  """
  if config.lora_rank:
    params = lora.merge(params, config.lora_alpha)
  if decodes and config.logits_via_embedding and 'decoder' in params:
    name = 'decoder_token_embedder'
    table = params[name if name in params else 'token_embedder']['embedding']
    is_view = isinstance(table, np.ndarray)
    kernel = table.T if is_view else _transpose(table)
    params = {**params, 'logits_dense': {'kernel': kernel}}

  def convert(path: tuple[Any, ...], x: Any) -> Any:
    names = [entry.key for entry in path]
    is_stacked = names[1] == 'layers'
    axes: tuple[int, ...] = ()
    if config.quantization != 'none':
      axes = int8.contracted_axes(tuple(names))
    if not (is_stacked or axes):
      return x
    if isinstance(x, np.ndarray) and not axes:
      return tuple(x)  # Views: memory-mapped arrays stay on disk.
    if not axes and _is_small(x):
      converted: Any = _copy_layers(x)
    else:
      converted = _convert(
        x,
        is_stacked,
        axes,
        in_bfloat16=config.quantization == 'bfloat16',
        is_table=names[-1] == 'embedding',
      )
    if consume and isinstance(x, jax.Array):
      x.delete()
    return converted

  converted: PyTree = jax.tree.map_with_path(convert, params)
  return {
    name: _split_layers(params[name], module)
    for name, module in converted.items()
  }


def _split_layers(stacked: PyTree, module: PyTree) -> PyTree:
  """Returns a module with layers `layers_0`, ... in place of `layers`.

  Args:
    stacked: the module's parameters before conversion, for the tree structure.
    module: the same with a tuple of per-layer arrays at each leaf of `layers`.
  """
  if 'layers' not in module:
    return module
  treedef: Any = jax.tree.structure(stacked['layers'])
  apart = treedef.flatten_up_to(module['layers'])
  return {key: value for key, value in module.items() if key != 'layers'} | {
    f'layers_{i}': jax.tree.unflatten(treedef, layer)
    for i, layer in enumerate(zip(*apart, strict=True))
  }


def _is_small(x: Any) -> bool:
  """Returns whether NumPy copies faster than a program could be compiled."""
  if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
    return False
  (device, *others) = x.devices()
  return not others and device.platform == 'cpu' and x.nbytes < _SMALL_BYTES


def _copy_layers(x: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the layers of a stacked array that is on one device.

  They may share one copy of it. `jnp.array` would compile a program for each
  shape.
  """
  layers = list(np.array(x))
  if not x.committed:
    (device,) = x.devices()
    with jax.default_device(device):
      return tuple(jax.device_put(layers))
  sharding = x.sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(
      sharding.mesh, jax.sharding.PartitionSpec()
    )
  return tuple(jax.device_put(layers, sharding))


@functools.partial(
  jax.jit, static_argnames=('is_stacked', 'axes', 'in_bfloat16', 'is_table')
)
def _convert(
  x: Any,
  is_stacked: bool,
  axes: tuple[int, ...],
  in_bfloat16: bool,
  is_table: bool,
) -> Any:
  """Returns an array, or a tuple of per-layer arrays if stacked.

  Those with axes are quantized: to bfloat16, or to int8 by `int8.pack`.
  """

  def quantize(x: Any) -> Any:
    if not axes:
      return x
    if in_bfloat16:
      x = kernel_first.arrange(x, axes).astype(jnp.bfloat16)
      return kernel_first.bits(x) if is_table else x
    return int8.pack(x, axes)

  return tuple(map(quantize, x)) if is_stacked else quantize(x)


@jax.jit
def _transpose(table: Any) -> Array:
  return table.T
