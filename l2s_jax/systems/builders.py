# SPDX-License-Identifier: Apache-2.0
"""Builds systems from what gin names: LLM-to-SLM and the two baselines."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import gin

from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.runtime import partitioning
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, loading


@gin.configurable(module='l2s_jax')
def language_model_system(
  tower: system_lib.Tower,
  dropout_rate: float | None = None,
  dtype: str | None = None,
  remat: str | None = None,
) -> system_lib.System:
  """Returns a language model alone: the LLM or the SLM baseline.

  Args:
    tower: the model.
    dropout_rate: in training; None keeps the config's.
    dtype: of activations, 'float32' or 'bfloat16'; None keeps the config's.
      Parameters are float32.
    remat: what is computed again backwards, see `TransformerConfig`; None
      keeps the config's.
  """
  config = _with_runtime(tower.load_config(), dropout_rate, dtype, remat)
  return alone(tower, config, 'LLM_VOCABULARY / SLM_VOCABULARY')


def alone(
  tower: system_lib.Tower, config: config_lib.TransformerConfig, setting: str
) -> system_lib.System:
  """Returns a language model as it is named, with its tokenizer.

  Args:
    tower: the model.
    config: how it is computed.
    setting: what else names a tokenizer, for errors.
  """
  vocabulary = tower.load_vocabulary(setting).for_table(config.vocab_size)
  module = l2s.build(config)
  return system_lib.System(
    module=module,
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
    sources={} if tower.path is None else {'': tower.path},
  )


@gin.configurable(module='l2s_jax')
def llm_to_slm_system(
  llm: system_lib.Tower,
  slm: system_lib.Tower,
  injection: str = 'add',
  dropout_rate: float | None = None,
  dtype: str | None = None,
  llm_dtype: str = 'float32',
  remat: str | None = None,
  llm_layer: int | str | None = None,
  train_llm: bool = False,
  llm_bidirectional: bool = False,
  lora_rank: int = 0,
  lora_alpha: float = 16.0,
  lora_kernels: Sequence[str] = ('query', 'value'),
) -> system_lib.System:
  """Returns a frozen LLM's encoder, a projector, and the SLM that writes.

  Args:
    llm: the LLM; must have weights.
    slm: the SLM; the vocabulary counts as shared if both are the same.
    injection: 'add' or 'replace'.
    dropout_rate: of the SLM in training; None keeps the config's.
    dtype: of the SLM's activations, 'float32' or 'bfloat16'; None keeps the
      config's. Trained parameters are float32.
    llm_dtype: in which the LLM is held and run: 'float32' or 'bfloat16'.
    remat: what of the SLM (and of an LLM that is trained) is computed again
      backwards, see `TransformerConfig`; None keeps the config's.
    llm_layer: the SLM is given the LLM's states after so many of its layers,
      see `LlmToSlm`; None is the last, 'mix' a learned mix of all.
    train_llm: whether what of the LLM encodes is trained, too. It is then
      held in float32, and stored in every checkpoint.
    llm_bidirectional: whether the tokens of a prompt see those behind them in a
      decoder-only LLM, too; False reads causally, as it was pretrained.
    lora_rank: above 0, of the SLM LoRA alone is trained, see
      `TransformerConfig`; what is read of the run has it merged.
    lora_alpha: the same.
    lora_kernels: the same.

  Raises:
    ValueError: if the LLM has no weights or not the layer, or a vocabulary
      does not fit.
  """
  if llm.path is None:
    raise ValueError(
      'LLM-to-SLM needs a pretrained LLM: set LLM_PATH to a run of ours, a '
      'Hugging Face folder, a checkpoint of T5X or a GGUF file.'
    )
  if injection not in l2s.INJECTIONS:
    raise ValueError(f'INJECTION={injection!r} is not one of {l2s.INJECTIONS}.')
  llm_config = dataclasses.replace(llm.load_config(), dtype=llm_dtype)
  l2s.check_layer(llm_layer, llm_config)
  if llm_bidirectional:
    if llm_config.is_encoder_decoder:
      raise ValueError(
        'LLM_BIDIRECTIONAL=True is for a decoder-only LLM; the encoder of '
        f'{llm.path} is bidirectional anyway. Leave it unset.'
      )
    llm_config = dataclasses.replace(llm_config, bidirectional_prefix=True)
  if train_llm:
    llm_config = _with_runtime(llm_config, None, None, remat)
  slm_config = _with_runtime(slm.load_config(), dropout_rate, dtype, remat)
  if lora_rank:
    slm_config = dataclasses.replace(
      slm_config,
      lora_rank=lora_rank,
      lora_alpha=lora_alpha,
      lora_kernels=lora_kernels,
    )
  llm_vocabulary, slm_vocabulary = (
    llm.load_vocabulary().for_table(llm_config.vocab_size),
    slm.load_vocabulary().for_table(slm_config.vocab_size),
  )
  return assemble(
    llm_config,
    slm_config,
    llm_vocabulary,
    slm_vocabulary,
    injection=injection,
    shared=loading.share_ids(llm_vocabulary, slm_vocabulary),
    sources={'llm': llm.path} | ({'slm': slm.path} if slm.path else {}),
    llm_dtype=llm_dtype,
    # The same run, however its layer is named.
    llm_layer=None
    if llm_layer == l2s.num_reading_layers(llm_config)
    else llm_layer,
    train_llm=train_llm,
    llm_prefix_ids=()
    if llm_config.is_encoder_decoder
    else llm_vocabulary.prefix_ids,
  )


def assemble(
  llm_config: config_lib.TransformerConfig,
  slm_config: config_lib.TransformerConfig,
  llm_vocabulary: base.Vocabulary,
  slm_vocabulary: base.Vocabulary,
  *,
  injection: str,
  shared: bool,
  sources: dict[str, str],
  llm_dtype: str,
  llm_step: int | None = None,
  llm_fingerprint: str | None = None,
  llm_layer: int | str | None = None,
  train_llm: bool = False,
  llm_prefix_ids: Sequence[int] = (),
) -> system_lib.System:
  l2s.build(slm_config)  # Refuses an SLM that cannot write.
  if shared:  # The SLM looks the prompt up too.
    llm_vocabulary = llm_vocabulary.for_table(slm_config.vocab_size)
  return system_lib.System(
    module=l2s.LlmToSlm(
      llm_config,
      slm_config,
      injection,
      shared,
      llm_layer=llm_layer,
      train_llm=train_llm,
      llm_prefix_ids=tuple(llm_prefix_ids),
    ),
    prompt_vocabulary=llm_vocabulary,
    answer_vocabulary=slm_vocabulary,
    sources=sources,
    frozen=() if train_llm else ('llm',),
    frozen_dtype=llm_dtype,
    llm_step=llm_step,
    llm_fingerprint=llm_fingerprint,
  )


def _with_runtime(
  config: config_lib.TransformerConfig,
  dropout_rate: float | None,
  dtype: str | None,
  remat: str | None,
) -> config_lib.TransformerConfig:
  given: dict[str, Any] = {
    'dropout_rate': dropout_rate,
    'dtype': dtype,
    'remat': remat,
  }
  return dataclasses.replace(
    config, **{name: x for name, x in given.items() if x is not None}
  )


def with_rules(
  system: system_lib.System, mesh_config: partitioning.MeshConfig
) -> system_lib.System:
  """Returns the system with the LLM's axis rules in its module."""
  if not isinstance(system.module, l2s.LlmToSlm):
    return system
  module = system.module.clone(llm_rules=mesh_config.rules('llm'))
  return dataclasses.replace(system, module=module)
