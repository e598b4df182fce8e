# SPDX-License-Identifier: Apache-2.0
"""Settings of a model, its batches and its decoding, for verbs that answer.

Settings of the input are in `prompt_source.py`.
"""

import dataclasses
from typing import Any, Literal

from l2s_jax.inference import answerer, generate, quantization, sampling
from l2s_jax.runtime import distributed, gin_config, storage
from l2s_jax.systems import model_paths, parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings:
  """Settings of prompt batches and of decoding.

  Attributes:
    prompt_length: maximum number of prompt tokens.
    max_decode_len: maximum number of answer tokens.
    batch_size: prompts of `prompt_length` tokens per batch.
    decoding: the decoding settings.
    says_ends: whether records have `ended`; see `PromptAnswerer`.
  """

  prompt_length: int
  max_decode_len: int
  batch_size: int
  decoding: sampling.Decoding
  says_ends: bool = False

  def __post_init__(self):
    """Validates the settings before any model is loaded.

    Raises:
      ValueError: names the setting.
    """
    gin_config.check_positive(
      PROMPT_LENGTH=self.prompt_length,
      MAX_DECODE_LEN=self.max_decode_len,
      BATCH_SIZE=self.batch_size,
    )
    generate.check(self.decoding, self.max_decode_len)

  @property
  def lengths(self) -> dict[str, int]:
    """Maximum numbers of tokens of 'inputs' (prompt) and 'targets' (answer)."""
    return {'inputs': self.prompt_length, 'targets': self.max_decode_len}

  def answerer(
    self,
    session: session_lib.Session,
    params: PyTree,
    batch_size: int | None = None,
    *,
    are_prepared: bool = False,
  ) -> answerer.PromptAnswerer:
    """Returns a `PromptAnswerer` of a system with all its parameters.

    Args:
      session: the system on its mesh.
      params: consumed, unless they are prepared.
      batch_size: prompts per batch; None means that of the settings.
      are_prepared: whether `params` are the `params` of another answerer.
    """
    return answerer.PromptAnswerer(
      session.system,
      params,
      session.mesh,
      prompt_length=self.prompt_length,
      max_decode_len=self.max_decode_len,
      batch_size=batch_size or self.batch_size,
      decoding=self.decoding,
      says_ends=self.says_ends,
      consume=not are_prepared,
      are_prepared=are_prepared,
    )


@dataclasses.dataclass(frozen=True)
class Answering(AnswerSettings):
  """Settings of a model, its batches and its decoding.

  Attributes:
    checkpoint_path: a run, or a pretrained model.
    step: checkpoint step of a run; None means the newest, 'best' the best by
      BEST_METRIC.
    llm_path: location of the LLM's weights, if not the one saved in the run.
    vocabulary: tokenizer of a pretrained model without one.
    extra_ids: T5's sentinel ids behind its SentencePiece model.
  """

  checkpoint_path: str
  step: int | Literal['best'] | None
  llm_path: str | None
  vocabulary: str | None
  extra_ids: int

  def __post_init__(self):
    """Checks the settings that do not depend on the model.

    Raises:
      ValueError: names the setting.
    """
    super().__post_init__()
    model_paths.check_path(self.checkpoint_path)

  def load_system(self) -> system_lib.System:
    """Returns the system, without its weights."""
    system = model_paths.load(
      self.checkpoint_path,
      llm_path=self.llm_path,
      vocabulary=self.vocabulary,
      extra_ids=self.extra_ids,
    )
    return generate.for_decoding(system, self.decoding)

  def choose_step(self) -> int:
    """Returns the checkpoint step, the same on every host.

    The run may still be training and saving checkpoints.
    """
    return distributed.from_first(
      model_paths.choose_step(self.checkpoint_path, self.step, 'INFER_STEP')
    )

  def load(
    self,
    session: session_lib.Session,
    step: int,
    batch_size: int | None = None,
  ) -> answerer.PromptAnswerer:
    """Returns an answerer with the parameters of a checkpoint.

    Args:
      session: the system on its mesh.
      step: of the checkpoint.
      batch_size: prompts per batch; None means that of the settings.
    """
    params = parameters.load_params(
      session.system, session.layout, self.checkpoint_path, step
    )
    return self.answerer(session, params, batch_size)

  def settings(self, step: int) -> dict[str, Any]:
    """Returns JSON-serialisable settings that affect the answers.

    `PromptSource.settings` adds those of the input.
    """
    return {
      'checkpoint_path': storage.lasting(self.checkpoint_path),
      'checkpoint_saved_nsecs': model_paths.saved_nsecs(
        self.checkpoint_path, step
      ),
      'decoding': dataclasses.asdict(self.decoding),
      'prompt_length': self.prompt_length,
      'step': step,
    } | self.measured_settings()

  def measured_settings(self) -> dict[str, Any]:
    """Returns the forms of int8 that this machine was measured to run fastest.

    They change answers. Without such a choice there is no setting.
    """
    forms = quantization.chosen(
      {
        name: getattr(self.decoding, name)
        for name in ('quantization', 'llm_quantization')
      }
    )
    return {'int8_forms': distributed.from_first(forms)} if forms else {}
