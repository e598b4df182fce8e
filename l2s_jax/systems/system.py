# SPDX-License-Identifier: Apache-2.0
"""Systems: a module, its vocabularies, and the sources of its weights.

A comparison has three systems: the LLM baseline and the SLM baseline, which are
single language models, and LLM-to-SLM.
"""

import dataclasses
from typing import Any

import gin
import jax

from l2s_jax.models import (
  batch_keys,
  l2s,
  language_model,
  lora,
  stored_states,
)
from l2s_jax.models import config as config_lib
from l2s_jax.runtime import distributed, storage
from l2s_jax.vocabularies import base, loading
from l2s_jax.weights import hub, opening, own_tokenizer, run_format

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Tower:
  """Settings of one language model: pretrained, fresh, or between.

  Attributes:
    path: its weights, see `opening.open_source`; None initialises randomly.
    config: of the model; None takes that of `path`. A string is a config name
      without its percent sign, and refused.
    vocabulary: tokenizer file or folder; None takes that of `path`.
    extra_ids: T5's sentinel ids behind its SentencePiece model.
  """

  path: str | None = None
  config: config_lib.TransformerConfig | str | None = None
  vocabulary: str | None = None
  extra_ids: int = 0

  def load_config(self) -> config_lib.TransformerConfig:
    """Returns the config: the given one, or that of the weights.

    Raises:
      ValueError: if there is neither, or the config is a string.
    """
    if isinstance(self.config, str):
      raise ValueError(
        f'LLM / SLM is the string {self.config!r}, expected a reference to a '
        f'config: write %{self.config} and add its gin file.'
      )
    if self.config is not None:
      return self.config
    if self.path is None:
      raise ValueError(
        'A model needs a config or weights: set LLM / SLM to a config (such '
        'as %T5_1_1_SMALL, with its gin file) or LLM_PATH / SLM_PATH to '
        'weights.'
      )
    return opening.open_source(self.path).config

  def load_vocabulary(
    self, setting: str = 'LLM_VOCABULARY / SLM_VOCABULARY'
  ) -> base.Vocabulary:
    """Returns the tokenizer: the given one, or that of the weights.

    Args:
      setting: name of the tokenizer's setting, for errors.

    Raises:
      ValueError: if there is neither.
    """
    if self.vocabulary is not None:
      given = loading.load(self.vocabulary, extra_ids=self.extra_ids)
      self._compare_ends(given)
      return given
    if self.path is None:
      raise ValueError(
        f'A model without weights needs a tokenizer: set {setting} to a '
        'SentencePiece model or a tokenizer.json.'
      )
    return own_tokenizer.load(
      self.path, extra_ids=self.extra_ids, setting=setting
    )

  def _compare_ends(self, given: base.Vocabulary) -> None:
    """Says if a tokenizer ends texts otherwise than the weights' config."""
    if (
      self.path is None
      or self.config is not None  # The path may have weights alone.
      or run_format.is_run(self.path)  # It has no such.
    ):
      return
    of_model = opening.open_source(self.path, may_lack_steps=True).special_ids
    ends = of_model.get('eos_token_id')
    ends = ends if isinstance(ends, list) else [ends]
    if ends != [None] and not {*ends} & {*given.eos_ids}:
      distributed.say_once(
        f'The tokenizer {self.vocabulary} ends texts with the ids '
        f'{list(given.eos_ids)}, the model {self.path} with {ends}. Use the '
        'tokenizer that the model was trained with.'
      )


def _special_ids(vocabulary: base.Vocabulary) -> dict[str, Any]:
  """Returns the special ids in a readable form; the fingerprint covers them."""
  return {
    'start': vocabulary.start_id,
    'eos': list(vocabulary.eos_ids),
    'pad': vocabulary.pad_id,
    'bos': vocabulary.bos_id,
  }


gin.external_configurable(Tower, module='l2s_jax')


def _lasting(path: str) -> str:
  """Returns a path that is valid in any working directory."""
  return path if hub.is_name(path) else storage.lasting(path)


@dataclasses.dataclass(frozen=True)
class CachedStates:
  """The LLM's last states from a cache, in place of the LLM.

  Attributes:
    location: of the cache, for errors.
    dtype: one of `stored_states.DTYPES`.
    llm_fingerprint: of the LLM that computed them.
    layer: of the LLM, as `LlmToSlm.llm_layer`; None means the last.
  """

  location: str
  dtype: str
  llm_fingerprint: str
  layer: int | None = None


@dataclasses.dataclass(frozen=True)
class System:
  """A module with its vocabularies and the sources of its parameters.

  Attributes:
    module: computes logits and prefills; see `models/language_model.py`.
    prompt_vocabulary: vocabulary of prompts.
    answer_vocabulary: vocabulary of answers.
    sources: path of weights by top-level parameter name; '' means all.
    frozen: top-level names of frozen parameters.
    frozen_dtype: dtype of frozen parameters.
    llm_step: checkpoint step of the LLM's run; None means the newest, or no
      run.
    llm_fingerprint: of the frozen weights; None until they were read.
    continues: whether answers continue their prompts, as with a pretrained
      decoder-only model; see `batching.continuing`.
    cached_states: the cache of LLM states in every batch. The LLM's parameters
      are then absent, except for the embeddings that 'add' needs with a foreign
      vocabulary. None means that the LLM reads the prompts.
  """

  module: l2s.LlmToSlm | language_model.LanguageModel
  prompt_vocabulary: base.Vocabulary
  answer_vocabulary: base.Vocabulary
  sources: dict[str, str] = dataclasses.field(default_factory=dict)
  frozen: tuple[str, ...] = ()
  frozen_dtype: str = 'float32'
  llm_step: int | None = None
  llm_fingerprint: str | None = None
  continues: bool = False
  cached_states: CachedStates | None = None

  def example_batch(
    self,
    batch_size: int,
    prompt_length: int,
    answer_length: int,
    sharding: jax.sharding.Sharding | None = None,
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a batch, cached states included.

    Args:
      batch_size: rows.
      prompt_length: tokens per prompt, padding included.
      answer_length: tokens per answer, padding included.
      sharding: of every array; None leaves it unspecified.
    """
    shapes = batch_keys.example_batch(
      batch_size, prompt_length, answer_length, sharding
    )
    if self.cached_states is not None:
      assert isinstance(self.module, l2s.LlmToSlm)
      shapes |= stored_states.shapes(
        batch_size,
        prompt_length,
        self.module.llm_config.emb_dim,
        self.cached_states.dtype,
        sharding,
      )
    return shapes

  @property
  def has_lora(self) -> bool:
    """Whether the decoding model is trained by LoRA alone."""
    return l2s.writer(self.module)[0].config.lora_rank > 0

  def is_trained(self, path: str) -> bool:
    """Returns whether a trainable parameter is trained.

    With LoRA, the decoding model's other parameters are held constant.

    Args:
      path: with '/' between its keys.
    """
    name = l2s.writer(self.module)[1]
    is_writers = name is None or path.startswith(f'{name}/')
    return not (self.has_lora and is_writers) or lora.is_learned(path)

  def describe(self) -> dict[str, Any]:
    """Returns the content of `model.json`."""
    description = run_format.stamp()
    if isinstance(self.module, l2s.LlmToSlm):
      description |= {
        'kind': 'llm_to_slm',
        'llm': self.module.llm_config.to_json(),
        'slm': self.module.slm_config.to_json(),
        'injection': self.module.injection,
        'shared_vocabulary': self.module.shared_vocabulary,
        'llm_path': _lasting(self.sources['llm']),
        'llm_step': self.llm_step,
        'llm_fingerprint': self.llm_fingerprint,
        'frozen_dtype': self.frozen_dtype,
        'llm_layer': self.module.llm_layer,
        'train_llm': self.module.train_llm,
        'llm_prefix_ids': list(self.module.llm_prefix_ids),
      }
    else:
      description |= {
        'kind': 'language_model',
        'config': self.module.config.to_json(),
      }
    description['vocabularies'] = {
      'prompt': self.prompt_vocabulary.fingerprint(),
      'answer': self.answer_vocabulary.fingerprint(),
    }
    description['special_ids'] = {
      'prompt': _special_ids(self.prompt_vocabulary),
      'answer': _special_ids(self.answer_vocabulary),
    }
    return description
