# SPDX-License-Identifier: Apache-2.0
"""The teacher of distillation: a language model with frozen parameters.

The teacher may be any language model with the student's vocabulary: a run of a
baseline, or a pretrained model. It has no gradient and no optimizer slots, and
checkpoints do not contain it. If it is the LLM of LLM-to-SLM, its parameters
are in memory once, and its decoder reads the states that the SLM gets.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from l2s_jax.inference import sampling
from l2s_jax.models import (
  batch_keys,
  l2s,
  language_model,
  shapes,
  stored_states,
)
from l2s_jax.runtime import partitioning, storage
from l2s_jax.systems import parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, loading
from l2s_jax.weights import hub, opening, run_format, runs, source

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A teacher: its model, its weights and its reading of a batch.

  Attributes:
    module: the whole model.
    path: location of its weights.
    step: checkpoint step of a run; None means the newest.
    rules: logical axis rules, those of an LLM.
    shapes: shapes and dtypes of the parameters that are loaded for it.
    shardings: of the same parameters.
    is_llm: whether it is the student's frozen LLM; it then uses the LLM's
      parameters.
    reads_states: whether its decoder reads the LLM's last states, so that a
      prompt is encoded once for both.
    continues: for a pretrained decoder-only model, prefix ids and EOS ids of
      its prompts; see `continue_prompts`. None means that its answers begin
      with the start token.
  """

  module: language_model.LanguageModel
  path: str
  step: int | None
  rules: partitioning.Rules
  shapes: dict[str, PyTree]
  shardings: dict[str, PyTree]
  is_llm: bool = False
  reads_states: bool = False
  continues: tuple[Sequence[int], Sequence[int]] | None = None

  def logits(
    self, params: PyTree, of_student: PyTree, batch: language_model.Batch
  ) -> Float[Array, 'batch length vocab']:
    """Returns the teacher's teacher-forced float32 logits of the answer.

    Args:
      params: the teacher's parameters, from `load`.
      of_student: the student's parameters, those of its LLM included.
      batch: with `llm_states` if `reads_states`.
    """
    if self.is_llm:
      params = parameters.merge(of_student.get('llm', {}), params)
    if self.continues is not None:
      batch = continue_prompts(batch, *self.continues)
    # The student's embedding table may have more rows than the teacher's.
    tokens = jnp.minimum(
      batch['decoder_input_tokens'], self.module.config.vocab_size - 1
    )
    batch = {**batch, 'decoder_input_tokens': tokens}
    apply = functools.partial(
      self.module.apply, {'params': params}, deterministic=True
    )
    with partitioning.axis_rules(self.rules):
      if not self.reads_states:
        return apply(batch)
      return apply(
        stored_states.restore(batch),
        batch['encoder_segment_ids'],
        batch,
        method='answer_logits',
      )

  def load(
    self, system: system_lib.System
  ) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Loads the teacher's parameters.

    Args:
      system: the student, with the checkpoint of its LLM.

    Returns:
      The parameters, and JSON-serialisable facts for the run's record: 'step'
      and 'fingerprint'.

    Raises:
      ValueError: if the weights are an encoder alone or do not fit the model.
    """
    step = system.llm_step if self.is_llm else self.step
    found = opening.open_source(self.path, step, may_lack_steps=self.is_llm)
    if shapes.is_encoder_alone(found.shapes()):
      raise _encoder_alone(self.path)
    reading, writing = (
      source.load(found, *part)
      for part in zip(
        self._parts(self.shapes), self._parts(self.shardings), strict=True
      )
    )
    # The LLM's encoding part is already loaded.
    of_reading = system.llm_fingerprint if self.is_llm else reading[1]
    return reading[0] | writing[0], {
      'step': found.step(),
      'fingerprint': {'reading': of_reading, 'writing': writing[1]},
    }

  def _parts(
    self, tree: dict[str, PyTree]
  ) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Splits a tree into modules that encode prompts and modules that decode.

    Each part has its own fingerprint, also if the teacher is the LLM.
    """
    is_pair = self.module.config.is_encoder_decoder
    of_writing = shapes.DECODER if is_pair else {'logits_dense'}
    writing, reading = parameters.split(tree, tuple(of_writing))
    return reading, writing

  def describe(self) -> str:
    """Returns the teacher's line in the report of `--dry_run`."""
    param_bytes = partitioning.bytes_per_device(self.shapes, self.shardings)
    beside = ' beside those of the LLM' if self.is_llm else ''
    return (
      f'teacher: {self.path}, {parameters.num_params(self.shapes):,} frozen '
      f'parameters{beside}, {param_bytes:,} bytes per device'
    )


def find(
  tower: system_lib.Tower,
  session: session_lib.Session,
  *,
  lengths: Mapping[str, int],
  step: int | None = None,
  dtype: str | None = None,
) -> Teacher:
  """Returns the teacher of a session's system; weights are not loaded yet.

  Args:
    tower: the teacher's settings.
    session: has the student.
    lengths: tokens of 'inputs' (prompt) and 'targets' (answer).
    step: checkpoint step of a run; None means the newest.
    dtype: of its parameters and activations; None means that of the student's
      LLM.

  Raises:
    ValueError: if it has no decoder, its vocabulary is not the student's, or it
      lacks positions for the lengths.
  """
  if tower.path is None:
    raise ValueError(
      'A teacher needs weights: set TEACHER_PATH to a run of a baseline, a '
      'Hugging Face or converted folder, a T5X checkpoint or a GGUF file.'
    )
  system = session.system
  is_llm = step is None and _is_llm(tower, system, dtype)
  student = system.module
  _check_kind(tower.path)
  config = tower.load_config()
  if is_llm:
    assert isinstance(student, l2s.LlmToSlm)
    # The teacher decodes as it was pretrained, even if LLM_BIDIRECTIONAL
    # changes its attention as the SLM's encoder.
    config = dataclasses.replace(
      student.llm_config, bidirectional_prefix=config.bidirectional_prefix
    )
  else:
    config = dataclasses.replace(config, dtype=dtype or system.frozen_dtype)
  if not config.has_decoder:
    raise _encoder_alone(tower.path)
  if is_llm and tower.vocabulary is None and not tower.extra_ids:
    vocabulary = system.prompt_vocabulary
  else:
    vocabulary = tower.load_vocabulary('TEACHER_VOCABULARY').for_table(
      config.vocab_size
    )
  module = l2s.build(config)
  continues = None
  if not (config.is_encoder_decoder or run_format.is_run(tower.path)):
    continues = vocabulary.prefix_ids, vocabulary.eos_ids
  _check_vocabularies(tower.path, vocabulary, system, continues is None)
  try:
    module.check_lengths(lengths['inputs'], lengths['targets'])
  except ValueError as error:
    raise ValueError(f'TEACHER_PATH={tower.path}: {error}') from error
  reads_states = (
    is_llm
    and config.is_encoder_decoder
    and isinstance(student, l2s.LlmToSlm)
    and student.llm_layer is None
  )
  held = set(session.layout.shapes.get('llm', {})) if is_llm else set()
  return Teacher(
    module,
    tower.path,
    step,
    session.mesh_config.rules('llm'),
    # With the LLM's states the encoder is not needed.
    *_layout(module, session, held | ({'encoder'} if reads_states else set())),
    is_llm=is_llm,
    reads_states=reads_states,
    continues=continues,
  )


def continue_prompts(
  batch: language_model.Batch, prefix_ids: Sequence[int], eos_ids: Sequence[int]
) -> language_model.Batch:
  """Returns a batch with answers that continue their prompts.

  The device version of `data.batching.continuing`, which has an example.
  """
  tokens, segment_ids = (
    batch['encoder_input_tokens'],
    batch['encoder_segment_ids'],
  )
  num_rows, length = tokens.shape
  size = jnp.sum(segment_ids > 0, axis=1)
  rows = jnp.arange(num_rows)
  has_eos = sampling.is_eos(tokens[rows, size - 1], tuple(eos_ids))
  prefix = jnp.broadcast_to(
    jnp.asarray(prefix_ids, tokens.dtype), (num_rows, len(prefix_ids))
  )
  tokens = jnp.concatenate([prefix, tokens], axis=1)
  # The last prompt token becomes the answer's first input.
  num_tokens = jnp.maximum(len(prefix_ids) + size - has_eos, 1)
  first = tokens[rows, num_tokens - 1]
  is_prompt = jnp.arange(length) < (num_tokens - 1)[:, None]
  return {
    **batch,
    'encoder_input_tokens': tokens[:, :length],
    'encoder_segment_ids': is_prompt.astype(segment_ids.dtype),
    'decoder_input_tokens': batch['decoder_input_tokens'].at[:, 0].set(first),
  }


def _is_llm(
  tower: system_lib.Tower, system: system_lib.System, dtype: str | None
) -> bool:
  """Returns whether the teacher is the frozen LLM of the student."""
  if 'llm' not in system.frozen or tower.config is not None:
    return False
  paths = {
    path
    if path is None or hub.is_name(path) or storage.is_bucket(path)
    else os.path.realpath(path)
    for path in (tower.path, system.sources['llm'])
  }
  return len(paths) == 1 and dtype in (None, system.frozen_dtype)


def _encoder_alone(path: str) -> ValueError:
  """Returns the error for a teacher without a decoder."""
  return ValueError(
    f'TEACHER_PATH={path} has the weights of an encoder only, but a teacher '
    'needs a decoder. Set it to the complete model.'
  )


def _check_kind(path: str) -> None:
  """Refuses an LLM-to-SLM run as a teacher.

  Raises:
    ValueError: if `path` is such a run.
  """
  found = opening.open_source(path)
  if isinstance(found, runs.Run) and found.description['kind'] != (
    'language_model'
  ):
    raise ValueError(
      f'TEACHER_PATH={path} is an LLM-to-SLM run, which is a student. The '
      'teacher is a single language model: give a run of a baseline, or a '
      'pretrained model.'
    )


def _check_vocabularies(
  path: str,
  teacher: base.Vocabulary,
  system: system_lib.System,
  begins_answers: bool,
) -> None:
  """Checks that the teacher has the student's vocabularies.

  Args:
    path: of the teacher.
    teacher: its vocabulary.
    system: the student.
    begins_answers: whether its answers begin with its start token.

  Raises:
    ValueError: with both tokenizers, or both start tokens.
  """
  for what, vocabulary in (
    ('answers', system.answer_vocabulary),
    ('prompts', system.prompt_vocabulary),
  ):
    if not loading.share_ids(teacher, vocabulary):
      raise ValueError(
        f'TEACHER_PATH={path}: the teacher has the tokenizer {teacher.path} '
        f'({teacher.vocab_size} ids), but the {what} of the student have '
        f'{vocabulary.path} ({vocabulary.vocab_size} ids). Token probabilities '
        'can be compared only in one vocabulary. Set TEACHER_PATH to a model '
        'with that tokenizer, or train on answers from the verb distill, which '
        'accepts any tokenizer.'
      )
  start_id = system.answer_vocabulary.start_id
  if begins_answers and teacher.start_id != start_id:
    raise ValueError(
      f"TEACHER_PATH={path}: the teacher's answers begin with the token "
      f"{teacher.start_id}, the student's with {start_id}, although the "
      'tokenizers are equal. Set TEACHER_VOCABULARY to a tokenizer with the '
      'right start token.'
    )


def _layout(
  module: language_model.LanguageModel,
  session: session_lib.Session,
  held: set[str],
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Returns shapes and shardings, as of an LLM, without the `held` modules."""
  with session.entered():
    whole, whole_axes = partitioning.abstract_params(
      functools.partial(module.init, deterministic=True),
      batch_keys.example_batch(1, 2, 2),
    )
    found, axes = (
      {'llm': {name: x for name, x in tree.items() if name not in held}}
      for tree in (whole, whole_axes)
    )
    found = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, module.config.dtype), found
    )
    shardings = partitioning.param_shardings(
      found, axes, session.mesh, session.mesh_config
    )
    partitioning.check_divisible(found, shardings)
  return found['llm'], shardings['llm']
