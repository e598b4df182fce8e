# SPDX-License-Identifier: Apache-2.0
"""Builds systems from gin's settings: LLM-to-SLM and the two baselines."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import gin

from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.runtime import partitioning, storage
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, loading
from l2s_jax.weights import run_format, runs


@gin.configurable(module='l2s_jax')
def language_model_system(
  tower: system_lib.Tower,
  dropout_rate: float | None = None,
  dtype: str | None = None,
  remat: str | None = None,
  attention: str | None = None,
) -> system_lib.System:
  """Returns a single language model: the LLM or the SLM baseline.

  Args:
    tower: the model.
    dropout_rate: in training; None keeps the config's.
    dtype: of activations, 'float32' or 'bfloat16'; None keeps the config's.
      Parameters are float32.
    remat: rematerialisation, see `TransformerConfig`; None keeps the config's.
    attention: as `TransformerConfig.attention`; None keeps the config's.
  """
  config = _with_runtime(
    tower.load_config(), dropout_rate, dtype, remat, attention
  )
  return alone(tower, config, 'LLM_VOCABULARY / SLM_VOCABULARY')


def alone(
  tower: system_lib.Tower, config: config_lib.TransformerConfig, setting: str
) -> system_lib.System:
  """Returns a single language model with its tokenizer.

  Args:
    tower: the model's settings.
    config: of the model.
    setting: name of the tokenizer's setting, for errors.
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
  attention: str | None = None,
  llm_layer: int | str | None = None,
  train_llm: bool = False,
  llm_bidirectional: bool = False,
  lora_rank: int = 0,
  lora_alpha: float = 16.0,
  lora_kernels: Sequence[str] = ('query', 'value'),
) -> system_lib.System:
  """Returns LLM-to-SLM: the LLM's encoder, a projector, and the SLM.

  Args:
    llm: the LLM; must have weights.
    slm: the SLM. The vocabulary is shared if both tokenizers have the same ids.
    injection: 'add' or 'replace'.
    dropout_rate: of the SLM in training; None keeps the config's.
    dtype: of the SLM's activations, 'float32' or 'bfloat16'; None keeps the
      config's. Trained parameters are float32.
    llm_dtype: of the LLM's parameters and activations, 'float32' or 'bfloat16'.
    remat: rematerialisation of the SLM (and of a trained LLM), see
      `TransformerConfig`; None keeps the config's.
    attention: of both models, as `TransformerConfig.attention`; None keeps the
      configs'.
    llm_layer: the projector reads the LLM's states after this number of layers,
      see `LlmToSlm`; None means all, 'mix' a learned mix of all.
    train_llm: whether to train the LLM's encoding part, too. It is then held in
      float32, and stored in every checkpoint.
    llm_bidirectional: whether a decoder-only LLM attends to the whole prompt in
      both directions; False means causal attention, as in pretraining.
    lora_rank: above 0, LoRA of this rank replaces training of the SLM's other
      parameters, see `TransformerConfig`. Checkpoints are read with LoRA
      merged.
    lora_alpha: as `TransformerConfig.lora_alpha`.
    lora_kernels: as `TransformerConfig.lora_kernels`.

  Raises:
    ValueError: if the LLM has no weights or no such layer, or is an LLM-to-SLM
      run; the SLM has neither weights nor config; or a vocabulary does not fit.
  """
  llm_path = _checked_path(llm, slm)
  if injection not in l2s.INJECTIONS:
    raise ValueError(f'INJECTION={injection!r} is not one of {l2s.INJECTIONS}.')
  llm_config = dataclasses.replace(llm.load_config(), dtype=llm_dtype)
  l2s.check_layer(llm_layer, llm_config)
  if llm_bidirectional:
    if llm_config.is_encoder_decoder:
      raise ValueError(
        'LLM_BIDIRECTIONAL=True is for a decoder-only LLM; the encoder of '
        f'{llm.path} is always bidirectional. Leave it unset.'
      )
    llm_config = dataclasses.replace(llm_config, bidirectional_prefix=True)
  if train_llm:
    llm_config = _with_runtime(llm_config, remat=remat)
  llm_config = _with_runtime(llm_config, attention=attention)
  slm_config = _with_runtime(
    slm.load_config(), dropout_rate, dtype, remat, attention
  )
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
    sources={'llm': llm_path} | ({'slm': slm.path} if slm.path else {}),
    llm_dtype=llm_dtype,
    # One name for the last layer, so that runs compare equal.
    llm_layer=None
    if llm_layer == l2s.num_reading_layers(llm_config)
    else llm_layer,
    train_llm=train_llm,
    llm_prefix_ids=()
    if llm_config.is_encoder_decoder
    else llm_vocabulary.prefix_ids,
  )


def _checked_path(llm: system_lib.Tower, slm: system_lib.Tower) -> str:
  """Returns the LLM's path; both models must be given, and the LLM be one."""
  if llm.path is None:
    raise ValueError(
      'LLM-to-SLM needs a pretrained LLM: set LLM_PATH to a run of l2s_jax, a '
      'Hugging Face folder, a T5X checkpoint or a GGUF file.'
    )
  if run_format.is_run(llm.path):
    description = runs.read_description(storage.of(llm.path))
    if description['kind'] == 'llm_to_slm':
      raise ValueError(
        f'LLM_PATH={llm.path} is an LLM-to-SLM run, whose SLM needs the states '
        f"of its own LLM. Set LLM_PATH to an LLM, such as that run's: "
        f'{description["llm_path"]}.'
      )
  if slm.path is None and slm.config is None:
    raise ValueError(
      'LLM-to-SLM needs an SLM: set SLM_PATH to its weights, or SLM to a '
      'config (such as %T5_1_1_SMALL, with its gin file) for random ones.'
    )
  return llm.path


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
  """Returns LLM-to-SLM from its parts.

  Raises:
    ValueError: if the SLM has no decoder, or a vocabulary does not fit.
  """
  l2s.build(slm_config)  # Raises if the SLM has no decoder.
  if shared:  # The SLM also embeds the prompt.
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
  dropout_rate: float | None = None,
  dtype: str | None = None,
  remat: str | None = None,
  attention: str | None = None,
) -> config_lib.TransformerConfig:
  """Returns the config with the settings that are not None.

  Raises:
    ValueError: for the attention that only tests take.
  """
  if attention == 'fused':
    raise ValueError(
      "ATTENTION='fused' is slow without a TPU, and stays in the run's files. "
      "Use 'auto', which takes the same kernel on a TPU."
    )
  given: dict[str, Any] = {
    'dropout_rate': dropout_rate,
    'dtype': dtype,
    'remat': remat,
    'attention': attention,
  }
  return dataclasses.replace(
    config, **{name: x for name, x in given.items() if x is not None}
  )


def with_rules(
  system: system_lib.System, mesh_config: partitioning.MeshConfig
) -> system_lib.System:
  """Returns the system with the LLM's logical axis rules in its module."""
  if not isinstance(system.module, l2s.LlmToSlm):
    return system
  module = system.module.clone(llm_rules=mesh_config.rules('llm'))
  return dataclasses.replace(system, module=module)
