# SPDX-License-Identifier: Apache-2.0
"""What answers, and how: a model, its batches, its decoding, from settings.

The verbs that answer prompts share it; which prompts is their own affair.
"""

import dataclasses
import os
from typing import Any, Literal

from l2s_jax.inference import answerer, generate, sampling
from l2s_jax.runtime import distributed, gin_config
from l2s_jax.systems import as_it_came, parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings:
  """The lengths and batches of prompts, and the decoding of answers.

  Attributes:
    prompt_length: tokens a prompt at most.
    max_decode_len: tokens an answer at most.
    batch_size: prompts a batch, of `prompt_length`.
    decoding: how answers are written.
    says_ends: whether records say which answers have ended; see
      `PromptAnswerer`.
  """

  prompt_length: int
  max_decode_len: int
  batch_size: int
  decoding: sampling.Decoding
  says_ends: bool = False

  def __post_init__(self):
    """Checks what needs no model.

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
    """Tokens of 'inputs' (prompt) and 'targets' (answer), at most."""
    return {'inputs': self.prompt_length, 'targets': self.max_decode_len}

  def answerer(
    self,
    session: session_lib.Session,
    params: PyTree,
    batch_size: int | None = None,
    *,
    are_prepared: bool = False,
  ) -> answerer.PromptAnswerer:
    """Returns what answers, with all parameters of a system.

    Args:
      session: the system on its mesh.
      params: taken apart, unless they are prepared.
      batch_size: prompts a batch; None: as the settings say.
      are_prepared: whether `params` are `PromptAnswerer.params` of another.
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
  """What answers, and how: a model, its batches, its decoding.

  Attributes:
    checkpoint_path: a run, or a model as it came.
    step: of a run; None takes the newest, 'best' that of BEST_METRIC.
    llm_path: where the LLM's weights are, if not where the run says.
    vocabulary: tokenizer of a model as it came that brings none.
    extra_ids: sentinels that T5 adds behind its SentencePiece model.
  """

  checkpoint_path: str
  step: int | Literal['best'] | None
  llm_path: str | None
  vocabulary: str | None
  extra_ids: int

  def __post_init__(self):
    """Checks what needs no model.

    Raises:
      ValueError: names the setting.
    """
    super().__post_init__()
    as_it_came.check_path(self.checkpoint_path)

  def load_system(self) -> system_lib.System:
    """Returns the system, without its weights."""
    system = as_it_came.load(
      self.checkpoint_path,
      llm_path=self.llm_path,
      vocabulary=self.vocabulary,
      extra_ids=self.extra_ids,
    )
    return generate.for_decoding(system, self.decoding)

  def choose_step(self) -> int:
    """Returns the step, the same in every process.

    The run may go on, and save, at this moment.
    """
    return distributed.from_first(
      as_it_came.choose_step(self.checkpoint_path, self.step, 'INFER_STEP')
    )

  def load(
    self,
    session: session_lib.Session,
    step: int,
    batch_size: int | None = None,
  ) -> answerer.PromptAnswerer:
    """Returns what answers, with the weights of a checkpoint.

    Args:
      session: the system on its mesh.
      step: of the checkpoint.
      batch_size: prompts a batch; None: as the settings say.
    """
    params = parameters.load_params(
      session.system, session.layout, self.checkpoint_path, step
    )
    return self.answerer(session, params, batch_size)

  def settings(self, step: int) -> dict[str, Any]:
    """Returns what answers depend on beside their prompts, as JSON has it."""
    return {
      'checkpoint_path': os.path.abspath(self.checkpoint_path),
      'checkpoint_saved_nsecs': as_it_came.saved_nsecs(
        self.checkpoint_path, step
      ),
      'decoding': dataclasses.asdict(self.decoding),
      'prompt_length': self.prompt_length,
      'step': step,
    }
