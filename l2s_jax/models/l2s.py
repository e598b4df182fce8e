# SPDX-License-Identifier: Apache-2.0
"""LLM-to-SLM: the LLM reads the prompt once, the SLM writes the answer.

    prompt -> LLM encoder (frozen) -> projector -> fuse -> SLM -> answer

Source: arXiv 2402.16844.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib
from l2s_jax.models import (
  decoder_only,
  encoder_decoder,
  language_model,
  layers,
  stored_states,
)
from l2s_jax.runtime import partitioning

PyTree = Any

INJECTIONS = ('add', 'replace')
# Value of `llm_layer` for a learned mix of all layers.
MIX = 'mix'
# The LLM's modules that encode prompts, in an encoder-decoder.
ENCODER = ('token_embedder', 'encoder')


def build(
  config: config_lib.TransformerConfig, name: str | None = None
) -> language_model.LanguageModel:
  """Returns the module of a language model with a decoder.

  Raises:
    ValueError: if the config is that of an encoder alone.
  """
  if not config.has_decoder:
    raise ValueError(
      'TransformerConfig.num_decoder_layers=0: this is an encoder-only model '
      '(also a T5Gemma with a decoder of another size, 9B-2B), which cannot '
      'generate. Use it as the LLM of LLM-to-SLM (LLM_PATH), and another model '
      'as baseline or SLM.'
    )
  return build_reader(config, name)


def build_reader(
  config: config_lib.TransformerConfig, name: str | None = None
) -> language_model.LanguageModel:
  """Returns the module of a language model, or of an encoder alone."""
  if config.is_encoder_decoder:
    return encoder_decoder.EncoderDecoder(config, name=name)
  return decoder_only.DecoderOnly(config, name=name)


def check_layer(
  layer: int | str | None, llm_config: config_lib.TransformerConfig
) -> None:
  """Checks that `layer` is a valid `llm_layer` of the LLM.

  Raises:
    ValueError: with the valid values.
  """
  count = num_reading_layers(llm_config)
  if isinstance(layer, int) and not isinstance(layer, bool):
    is_there = 0 <= layer <= count
  else:
    is_there = layer in (None, MIX)
  if not is_there:
    raise ValueError(
      f'LLM_LAYER={layer!r}: expected a number of layers from 0 (the '
      f"embeddings) to {count} (the LLM's last), {MIX!r}, or None for the last."
    )


def num_reading_layers(config: config_lib.TransformerConfig) -> int:
  """Returns the number of layers in the stack that reads a prompt."""
  return config.num_encoder_layers or config.num_decoder_layers


def fuse(
  projected: Float[Array, 'batch length embed'],
  valid: Bool[Array, 'batch length'],
  prompt_embeddings: Float[Array, 'batch length embed'] | None,
) -> Float[Array, 'batch length embed']:
  """Injects projected LLM states into the SLM's prompt embeddings.

  Args:
    projected: Z, the projector's output.
    valid: true for real tokens; Z is set to zero elsewhere.
    prompt_embeddings: the SLM's own, to which Z is added; None if Z replaces
      them.
  """
  projected = jnp.where(valid[..., None], projected, 0)
  if prompt_embeddings is None:
    return projected
  return prompt_embeddings + projected


def _pin(
  embeddings: Float[Array, 'batch length embed'],
) -> Float[Array, 'batch length embed']:
  """Constrains the sharding of embeddings before they are added.

  Without the constraint, XLA (0.10.2) has added rows of different prompts, on a
  mesh with several devices along each axis and one row per device.
  """
  return partitioning.constrain(embeddings, ('batch', 'length', 'embed'))


class LlmToSlm(nn.Module):
  """A frozen LLM encoder, a projector, and an SLM that generates.

  Attributes:
    llm_config: of the LLM; its decoder, if it has an encoder, has no parameters
      here.
    slm_config: of the SLM.
    injection: 'add' Z to the SLM's prompt embeddings, or 'replace' them.
    shared_vocabulary: whether the prompt's token ids are in the SLM's
      vocabulary, too. If not, 'add' maps the LLM's input embeddings by a
      trained linear layer to the SLM's prompt embeddings.
    llm_rules: logical axis rules of the LLM, active around its calls alone.
    llm_layer: H is the LLM's states after this number of layers, 0 being its
      embeddings; None means all. 'mix' is a learned mix, see `LayerMix`. The
      states of every layer go through the LLM's final norm: their norm grows
      from layer to layer, and the projector needs one scale.
    train_llm: whether gradients flow into the LLM. It never has dropout.
    llm_prefix_ids: tokens in front of every prompt for the LLM alone, such as
      the BOS of a decoder-only one; H leaves their states out.
  """

  llm_config: config_lib.TransformerConfig
  slm_config: config_lib.TransformerConfig
  injection: str = 'add'
  shared_vocabulary: bool = True
  llm_rules: partitioning.Rules = partitioning.DEFAULT_RULES
  llm_layer: int | str | None = None
  train_llm: bool = False
  llm_prefix_ids: Sequence[int] = ()

  def setup(self):
    check_layer(self.llm_layer, self.llm_config)
    if self.injection not in INJECTIONS:
      raise ValueError(
        f'INJECTION={self.injection!r} is not one of {INJECTIONS}.'
      )
    self.llm = build_reader(self.llm_config)
    self.projector = Projector(self.llm_config.emb_dim, self.slm_config)
    self.slm = build(self.slm_config)
    if self.llm_layer == MIX:
      self.layer_mix = LayerMix(num_reading_layers(self.llm_config) + 1)
    if self.injection == 'add' and not self.shared_vocabulary:
      self.prompt_embedder = from_llm(self.llm_config.emb_dim, self.slm_config)

  def encode_prompt(
    self, batch: language_model.Batch
  ) -> tuple[Float[Array, 'batch prompt embed'], Int[Array, 'batch prompt']]:
    """Returns the SLM's prompt embeddings and segment ids.

    Two optional batch keys are for controls: `llm_input_tokens`, with
    `llm_segment_ids`, replaces the LLM's prompt, and `llm_scale` [batch]
    multiplies Z. With the batch key `llm_states` (see `stored_states`) the LLM
    does not run; its only parameters are then the embeddings that 'add' needs
    with a foreign vocabulary.
    """
    return self._project(*self.read_prompt(batch), batch)

  def read_prompt(
    self, batch: language_model.Batch
  ) -> tuple[
    Float[Array, 'batch llm_prompt llm_embed'], Int[Array, 'batch llm_prompt']
  ]:
    """Returns the LLM's states H, and their segment ids."""
    segment_ids = batch.get('llm_segment_ids', batch['encoder_segment_ids'])
    if 'llm_states' in batch:
      return stored_states.restore(batch), segment_ids
    tokens = batch.get('llm_input_tokens', batch['encoder_input_tokens'])
    with partitioning.axis_rules(self.llm_rules):
      llm_states = self._of_llm(
        self._read_layer(
          self.llm.embed(self._prefixed(tokens)),
          self._prefixed_ids(segment_ids),
        )[..., len(self.llm_prefix_ids) :, :]
      )
    if self.llm_layer == MIX:
      llm_states = self.layer_mix(llm_states)
    return llm_states, segment_ids

  def read_first_states(
    self, batch: language_model.Batch
  ) -> Float[Array, 'batch prompt llm_embed']:
    """Returns the states of layer 0, the input of the LLM's first layer."""
    with partitioning.axis_rules(self.llm_rules):
      return self.llm.first_states(
        self._prefixed(batch['encoder_input_tokens']),
        self._prefixed_ids(batch['encoder_segment_ids']),
      )[:, len(self.llm_prefix_ids) :]

  def _prefixed(
    self, tokens: Int[Array, 'batch prompt']
  ) -> Int[Array, 'batch llm_prompt']:
    """Returns the tokens of a prompt behind `llm_prefix_ids`."""
    if not self.llm_prefix_ids:
      return tokens
    prefix = jnp.asarray(self.llm_prefix_ids, tokens.dtype)
    shape = (tokens.shape[0], len(self.llm_prefix_ids))
    return jnp.concatenate([jnp.broadcast_to(prefix, shape), tokens], axis=1)

  def _prefixed_ids(
    self, segment_ids: Int[Array, 'batch prompt']
  ) -> Int[Array, 'batch llm_prompt']:
    """Returns segment ids for `_prefixed`; the prefix is in segment 1."""
    if not self.llm_prefix_ids:
      return segment_ids
    count = len(self.llm_prefix_ids)
    return jnp.pad(segment_ids, ((0, 0), (count, 0)), constant_values=1)

  def _read_layer(
    self,
    embeddings: Float[Array, 'batch llm_prompt llm_embed'],
    segment_ids: Int[Array, 'batch llm_prompt'],
  ) -> Float[Array, '*layers batch llm_prompt llm_embed']:
    """Returns the LLM's states after `llm_layer`, or after each for 'mix'."""
    count = num_reading_layers(self.llm_config)
    if self.is_initializing() or self.llm_layer in (None, count):
      states = self.llm.encode(embeddings, segment_ids, deterministic=True)
      if self.llm_layer == MIX:
        states = jnp.broadcast_to(states, (count + 1, *states.shape))
      return states
    stack, embeddings, context = self.llm.prompt_stack(embeddings, segment_ids)
    if self.llm_layer == MIX:
      return stack.all_states(embeddings, context)
    assert isinstance(self.llm_layer, int)
    return stack.states_after(embeddings, context, self.llm_layer)

  def _of_llm(self, x: Float[Array, '...']) -> Float[Array, '...']:
    """Stops gradients into the LLM, unless `train_llm`."""
    return x if self.train_llm else jax.lax.stop_gradient(x)

  def _project(
    self,
    llm_states: Float[Array, 'batch llm_prompt llm_embed'],
    llm_segment_ids: Int[Array, 'batch llm_prompt'],
    batch: language_model.Batch,
  ) -> tuple[Float[Array, 'batch prompt embed'], Int[Array, 'batch prompt']]:
    """Returns prompt embeddings of the SLM and their segment ids, given H."""
    projected = _pin(self.projector(llm_states))
    if 'llm_scale' in batch:
      projected *= batch['llm_scale'][:, None, None].astype(projected.dtype)
    if self.injection == 'replace':
      embeddings = fuse(projected, llm_segment_ids > 0, None)
      return embeddings, llm_segment_ids
    embeddings = fuse(
      projected,
      llm_segment_ids > 0,
      self._prompt_embeddings(batch['encoder_input_tokens']),
    )
    return embeddings, batch['encoder_segment_ids']

  def _prompt_embeddings(
    self, tokens: Int[Array, 'batch prompt']
  ) -> Float[Array, 'batch prompt embed']:
    """Returns the SLM's prompt embeddings before Z is added."""
    if self.shared_vocabulary:
      return self.slm.embed(tokens)
    with partitioning.axis_rules(self.llm_rules):
      embeddings = self._of_llm(self.llm.embed(tokens))
    return _pin(self.prompt_embedder(embeddings))

  def __call__(
    self, batch: language_model.Batch, *, deterministic: bool
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced float32 logits of the answer."""
    embeddings, segment_ids = self.encode_prompt(batch)
    return self.slm.logits(
      embeddings, segment_ids, batch, deterministic=deterministic
    )

  def prefill(
    self, batch: language_model.Batch, *, num_slots: int
  ) -> cache_lib.Cache | dict[str, cache_lib.Cache]:
    """Prefills the SLM's KV cache; decoding then needs the SLM alone."""
    embeddings, segment_ids = self.encode_prompt(batch)
    return self.slm.start(embeddings, segment_ids, num_slots=num_slots)


class DraftAndVerify(LlmToSlm):
  """LLM-to-SLM as drafter and the LLM's own decoder as verifier.

  The LLM encodes a prompt once, for both. Answers and logits are the LLM's
  (`inference/speculative.py`).
  """

  def __call__(
    self, batch: language_model.Batch, *, deterministic: bool
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced float32 logits of the LLM."""
    # Makes the SLM's parameters at init, and checks its lengths.
    super().__call__(batch, deterministic=deterministic)
    with partitioning.axis_rules(self.llm_rules):
      return self.llm(batch, deterministic=True)

  def prefill(
    self, batch: language_model.Batch, *, num_slots: int
  ) -> dict[str, cache_lib.Cache]:
    """Prefills the KV caches 'llm' and 'slm'; the LLM encodes once."""
    llm_states, llm_segment_ids = self.read_prompt(batch)
    with partitioning.axis_rules(self.llm_rules):
      llm_cache = self.llm.start_answer(
        llm_states, llm_segment_ids, num_slots=num_slots
      )
    embeddings, segment_ids = self._project(llm_states, llm_segment_ids, batch)
    slm_cache = self.slm.start(embeddings, segment_ids, num_slots=num_slots)
    return {'llm': llm_cache, 'slm': slm_cache}

  def draft(
    self, tokens: Int[Array, 'batch length'], cache: cache_lib.Cache
  ) -> tuple[Float[Array, 'batch length vocab'], cache_lib.Cache]:
    """Decodes answer tokens with the SLM; see `LanguageModel.extend`."""
    return self.slm.extend(tokens, cache)

  def verify(
    self, tokens: Int[Array, 'batch length'], cache: cache_lib.Cache
  ) -> tuple[Float[Array, 'batch length vocab'], cache_lib.Cache]:
    """Decodes answer tokens with the LLM; see `LanguageModel.extend`."""
    with partitioning.axis_rules(self.llm_rules):
      return self.llm.extend(tokens, cache)


def with_verifier(module: LlmToSlm) -> DraftAndVerify:
  """Returns the module for speculative decoding with the LLM as verifier."""
  return DraftAndVerify(
    module.llm_config,
    module.slm_config,
    module.injection,
    module.shared_vocabulary,
    module.llm_rules,
    module.llm_layer,
    module.train_llm,
    module.llm_prefix_ids,
  )


def writer(
  module: LlmToSlm | language_model.LanguageModel,
) -> tuple[language_model.LanguageModel, str | None]:
  """Returns the module that decodes, and the key of its parameters.

  The key is None where the module's parameters are the whole tree.
  """
  if isinstance(module, LlmToSlm):
    return build(module.slm_config), 'slm'
  return module, None


def check_lengths(
  module: LlmToSlm | language_model.LanguageModel,
  prompt_length: int,
  answer_length: int,
  *,
  reads_llm: bool = True,
) -> None:
  """Checks that all models of a module have positions, in tokens.

  Args:
    module: to check.
    prompt_length: tokens per prompt, without `llm_prefix_ids`.
    answer_length: tokens per answer.
    reads_llm: false if the LLM's states are cached.

  Raises:
    ValueError: with both lengths and the size of the position table.
  """
  if isinstance(module, LlmToSlm) and reads_llm:
    build_reader(module.llm_config).check_lengths(
      len(module.llm_prefix_ids) + prompt_length, 0
    )
  writer(module)[0].check_lengths(prompt_length, answer_length)


def for_generation(
  module: LlmToSlm | language_model.LanguageModel,
  *,
  unstack_llm: bool = True,
  llm_quantization: str = 'none',
  quantization: str = 'none',
) -> LlmToSlm | language_model.LanguageModel:
  """Returns the module for parameters from `params_for_generation`.

  Args:
    module: as it was trained.
    unstack_llm: whether to convert the frozen LLM, too; a verifier always is.
      It then reads prompts faster on CPU, but takes memory twice while its
      stacked parameters are kept.
    llm_quantization: of the frozen LLM, if it is converted; see
      `TransformerConfig.quantization`.
    quantization: of the decoding model.
  """
  if not isinstance(module, LlmToSlm):
    return module.clone(
      config=language_model.for_generation(module.config, quantization)
    )
  configs = {
    'slm_config': language_model.for_generation(module.slm_config, quantization)
  }
  if unstack_llm or isinstance(module, DraftAndVerify):
    configs['llm_config'] = language_model.for_generation(
      module.llm_config, llm_quantization
    )
  return module.clone(**configs)


def params_for_generation(
  module: LlmToSlm | language_model.LanguageModel,
  params: PyTree,
  *,
  consume: bool = False,
) -> PyTree:
  """Returns a system's parameters in the form for generation.

  Args:
    module: from `for_generation`.
    params: as they were trained, layers stacked.
    consume: deletes each array after its copy is made.
  """
  convert = functools.partial(
    language_model.params_for_generation, consume=consume
  )
  if not isinstance(module, LlmToSlm):
    return convert(module.config, params)
  changed = {'slm': convert(module.slm_config, params['slm'])}
  if module.llm_config.for_generation:
    changed['llm'] = convert(
      module.llm_config,
      params['llm'],
      decodes=isinstance(module, DraftAndVerify),
    )
  return {**params, **changed}


def writer_params(params: PyTree, name: str | None) -> PyTree:
  """Returns the parameters of the module that decodes; see `writer`."""
  return params if name is None else params[name]


def decoder_params(params: PyTree) -> PyTree:
  """Returns the parameters that `DraftAndVerify` decodes with."""
  llm = {name: x for name, x in params['llm'].items() if name != 'encoder'}
  return {'llm': llm, 'slm': params['slm']}


class LayerMix(nn.Module):
  """A learned mix of layers' states: softmax weights and one scale.

  It is initialised to the mean of the layers.
  Source: Peters et al. 2018 (arXiv:1802.05365), section 3.2.
  """

  num_layers: int

  @nn.compact
  def __call__(
    self, states: Float[Array, 'layers batch length llm_embed']
  ) -> Float[Array, 'batch length llm_embed']:
    weights = self.param(
      'weights',
      nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
      (self.num_layers,),
    )
    scale = self.param(
      'scale',
      nn.with_logical_partitioning(nn.initializers.ones, (None,)),
      (1,),
    )
    shares = (scale * nn.softmax(weights)).astype(states.dtype)
    return jnp.tensordot(shares, states, 1)


class Projector(nn.Module):
  """The projector: Linear, ReLU, Linear with biases.

  Widths: llm_embed -> embed -> embed. Source: arXiv 2402.16844, section 3.
  """

  llm_emb_dim: int
  slm_config: config_lib.TransformerConfig

  @nn.compact
  def __call__(
    self, llm_states: Float[Array, 'batch length llm_embed']
  ) -> Float[Array, 'batch length embed']:
    d = self.slm_config.emb_dim
    hidden = from_llm(self.llm_emb_dim, self.slm_config, name='wi')(llm_states)
    return layers.Dense(
      (d,),
      (d,),
      ('mlp', 'embed'),
      _scaled_by_fan_in(self.slm_config),
      use_bias=True,
      name='wo',
    )(nn.relu(hidden))


def from_llm(
  llm_emb_dim: int,
  slm_config: config_lib.TransformerConfig,
  name: str | None = None,
) -> layers.Dense:
  """Returns a linear layer with bias from the LLM's width to the SLM's."""
  return layers.Dense(
    (llm_emb_dim,),
    (slm_config.emb_dim,),
    ('llm_embed', 'mlp'),
    _scaled_by_fan_in(slm_config),
    use_bias=True,
    name=name,
  )


def _scaled_by_fan_in(
  config: config_lib.TransformerConfig,
) -> config_lib.TransformerConfig:
  """Returns a config that initialises kernels by fan-in, without LoRA or int8.

  These layers are new: GPT-2's initial scale, made for its depth, does not fit.
  """
  return dataclasses.replace(
    config, kernel_init_stddev=None, lora_rank=0, quantization='none'
  )
