# SPDX-License-Identifier: Apache-2.0
"""What training and decoding ask of a model, whatever its architecture.

A language model reads prompt *embeddings*: its own, or those that LLM-to-SLM
puts in their place. The batch keys are those of `data/features.py`.
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
from l2s_jax.models import lora, transformer

Batch = Mapping[str, jax.Array]
PyTree = Any


class LanguageModel(nn.Module):
  """A model that can write an answer to a prompt, alone.

  Subclasses give `embed`, `encode`, `prompt_stack`, `logits`, `start` and
  `extend`; the last two take the parameters that `for_generation` makes.
  """

  config: config_lib.TransformerConfig

  def check_lengths(self, prompt_length: int, answer_length: int) -> None:
    """Refuses lengths, in tokens, that the model has no positions for.

    Raises:
      ValueError: with both lengths and the size of the table.
    """

  def embed(
    self, tokens: Int[Array, 'batch length']
  ) -> Float[Array, 'batch length embed']:
    """Looks tokens up, without positions."""
    raise NotImplementedError

  def first_states(
    self,
    tokens: Int[Array, 'batch length'],
    segment_ids: Int[Array, 'batch length'],
  ) -> Float[Array, 'batch length embed']:
    """Returns the states of layer 0: what the first layer of a prompt reads."""
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
    """Returns the layers that read prompts, and what they are given."""
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
    """Reads the prompt; returns a cache with room for `num_slots` tokens."""
    raise NotImplementedError

  def extend(
    self, tokens: Int[Array, 'batch length'], cache: cache_lib.Cache
  ) -> tuple[Float[Array, 'batch length vocab'], cache_lib.Cache]:
    """Reads tokens of the answer; returns the logits after each of them."""
    raise NotImplementedError

  def __call__(
    self, batch: Batch, *, deterministic: bool
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced logits, the prompt being this model's own."""
    return self.logits(
      self.embed(batch['encoder_input_tokens']),
      batch['encoder_segment_ids'],
      batch,
      deterministic=deterministic,
    )

  def prefill(self, batch: Batch, *, num_slots: int) -> cache_lib.Cache:
    """Reads the prompts of a batch; what `extend` starts from."""
    return self.start(
      self.embed(batch['encoder_input_tokens']),
      batch['encoder_segment_ids'],
      num_slots=num_slots,
    )


def for_generation(
  config: config_lib.TransformerConfig, quantization: str = 'none'
) -> config_lib.TransformerConfig:
  """Returns the config of a model that reads `params_for_generation`."""
  return dataclasses.replace(
    config, for_generation=True, quantization=quantization
  )


def params_for_generation(
  config: config_lib.TransformerConfig,
  params: PyTree,
  *,
  consume: bool = False,
) -> PyTree:
  """Returns a language model's parameters as generation reads them.

  LoRA is merged. Each layer has arrays of its own, and a tied output head a
  transposed copy of its embedding table. On CPU, where every token reads all
  weights, slices of stacked layers would be copied first: 4 GB/s instead of 40.

  Args:
    config: from `for_generation`.
    params: stacked, as training and checkpoints have them. What is not
      changed is not copied; arrays of NumPy give views, but for int8.
    consume: whether to delete each array once it has been copied.
  """
  if config.lora_rank:
    params = lora.merge(params, config.lora_alpha)
  tied = config.logits_via_embedding and 'decoder' in params
  if tied:
    name = 'decoder_token_embedder'
    table = params[name if name in params else 'token_embedder']['embedding']
    is_view = isinstance(table, np.ndarray)
    kernel = table.T if is_view else _transpose(table)
    params = {**params, 'logits_dense': {'kernel': kernel}}

  def convert(path: tuple[Any, ...], x: Any) -> Any:
    names = [entry.key for entry in path]
    is_stacked = names[1] == 'layers'
    num_contracted = 0
    if config.quantization != 'none' and names[-1] == 'kernel':
      # Only the output of attention contracts two axes, [heads, kv].
      num_contracted = 2 if names[-2] == 'out' else 1
    if not (is_stacked or num_contracted):
      return x
    if isinstance(x, np.ndarray) and not num_contracted:
      return tuple(x)  # Views: what is mapped stays on the disk.
    converted = _convert(x, is_stacked, num_contracted)
    if consume and isinstance(x, jax.Array):
      x.delete()
    return converted

  converted: PyTree = jax.tree.map_with_path(convert, params)
  return {
    name: _split_layers(params[name], module)
    for name, module in converted.items()
  }


def _split_layers(stacked: PyTree, module: PyTree) -> PyTree:
  """Returns a module with a tree a layer for its tree of layers' tuples."""
  if 'layers' not in module:
    return module
  treedef: Any = jax.tree.structure(stacked['layers'])
  apart = treedef.flatten_up_to(module['layers'])
  return {key: value for key, value in module.items() if key != 'layers'} | {
    f'layers_{i}': jax.tree.unflatten(treedef, layer)
    for i, layer in enumerate(zip(*apart, strict=True))
  }


@functools.partial(jax.jit, static_argnames=('is_stacked', 'num_contracted'))
def _convert(x: Any, is_stacked: bool, num_contracted: int) -> Any:
  """Returns a kernel, or a tuple of the layers', in int8 if it contracts."""

  def quantize(x: Any) -> Any:
    if not num_contracted:
      return x
    import qwix

    axes = tuple(range(num_contracted, x.ndim))
    return qwix.quantize(x, jnp.int8, channelwise_axes=axes)

  return tuple(map(quantize, x)) if is_stacked else quantize(x)


@jax.jit
def _transpose(table: Any) -> Array:
  return table.T
