# SPDX-License-Identifier: Apache-2.0
"""Logit distillation: a student learns its teacher's token distributions.

The loss of a step is

    (1 - weight) * cross-entropy of the gold answers
    + weight * temperature ** 2 * divergence from the teacher

with both terms in nats per token. The divergence is taken on the gold answers
or, on policy, on samples of the student. Logit distillation is off by default.
Sequence-level distillation (`inference/distill.py`) does not use it: there, the
teacher's text is training data.

Source: Hinton et al. 2015 (arXiv:1503.02531) for the temperature and its
square; Agarwal et al. 2024 (arXiv:2306.13649) for divergence and samples.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2s_jax.inference import sampling, strategies
from l2s_jax.models import l2s, language_model, losses
from l2s_jax.runtime import gin_config, partitioning
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.training import microbatches, teachers, train_data

PyTree = Any

# Folded into a step's PRNG key for samples and for dropout on them.
_SAMPLES, _DROPOUT = 2**31 - 1, 2**31 - 2


@dataclasses.dataclass(frozen=True)
class Distillation:
  """Settings of distillation.

  Attributes:
    teacher: a language model with the student's vocabulary: a run of a
      baseline, or a pretrained model.
    weight: weight of the teacher's loss, from 0 (no teacher) to 1; the
      cross-entropy of the gold answers has weight 1 - weight.
    temperature: divides the logits of both, above 0. The loss is multiplied by
      its square, so that gradients keep their scale.
    divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), and
      values between are the generalised Jensen-Shannon divergence, see
      `losses.divergence`.
    on_policy: fraction of steps, from 0 to 1, that compare teacher and student
      on the student's samples instead of the gold answers.
    teacher_step: checkpoint step of a teacher's run; None means the newest.
    teacher_dtype: dtype of the teacher, 'float32' or 'bfloat16'; None means
      that of the student's LLM, or float32.

  Raises:
    ValueError: for a value out of its range.
  """

  teacher: system_lib.Tower
  weight: float = 0.5
  temperature: float = 1.0
  divergence: float = 0.0
  on_policy: float = 0.0
  teacher_step: int | None = None
  teacher_dtype: str | None = None

  def __post_init__(self):
    gin_config.check_between(
      0,
      1,
      DISTILL_WEIGHT=self.weight,
      DISTILL_DIVERGENCE=self.divergence,
      ON_POLICY=self.on_policy,
    )
    if not 0 < self.temperature < math.inf:
      raise ValueError(
        f'DISTILL_TEMPERATURE={self.temperature!r}: expected a number above 0.'
      )
    if self.teacher_dtype not in (None, 'float32', 'bfloat16'):
      raise ValueError(
        f"TEACHER_DTYPE={self.teacher_dtype!r}: expected 'float32', 'bfloat16' "
        "or None (the dtype of the student's LLM)."
      )

  def check_gold(self, **settings: float) -> None:
    """Refuses settings of the gold answers' loss if its weight is 0.

    Args:
      **settings: values by name; 0 means not set.

    Raises:
      ValueError: names the settings.
    """
    given = [f'{name}={value}' for name, value in settings.items() if value]
    if self.weight == 1 and given:
      raise ValueError(
        f'DISTILL_WEIGHT={self.weight} removes the loss on the gold answers, '
        f'and {" and ".join(given)} would change only that loss. Set '
        'DISTILL_WEIGHT below 1, or the others to 0.'
      )

  def is_on_policy(self, step: int) -> bool:
    """Returns whether the step after `step` others uses samples.

    Of the first n steps, floor(n * on_policy) do, evenly spread.
    """
    return math.floor((step + 1) * self.on_policy) > math.floor(
      step * self.on_policy
    )

  def kinds(self) -> Sequence[bool]:
    """Returns the values that `is_on_policy` takes over a run."""
    if self.on_policy in (0, 1):
      return (self.on_policy == 1,)
    return (False, True)

  def bind(
    self, session: session_lib.Session, data: train_data.TrainData
  ) -> 'Lesson | None':
    """Returns the distillation of a session's system, or None at weight 0.

    Args:
      session: has the student.
      data: settings of training batches.

    Raises:
      ValueError: if the teacher does not fit the student, or packing excludes
        it.
    """
    if not self.weight:
      return None
    if data.pack and self.on_policy:
      raise ValueError(
        f'ON_POLICY={self.on_policy} with PACK=True: a row has one sample, but '
        'packed rows have several examples. Set one of them to its default.'
      )
    teacher = teachers.find(
      self.teacher,
      session,
      lengths=data.task_feature_lengths,
      step=self.teacher_step,
      dtype=self.teacher_dtype,
    )
    if data.pack and not teacher.module.config.is_encoder_decoder:
      raise ValueError(
        f'PACK=True, but the teacher {teacher.path} is decoder-only and reads '
        'a row as one text. Set PACK=False; LENGTH_BUCKETS also reduces '
        'padding.'
      )
    vocabulary = session.system.answer_vocabulary
    ids = strategies.Ids(
      vocabulary.start_id, vocabulary.eos_ids, vocabulary.pad_id
    )
    return Lesson(self, teacher, ids)


gin.external_configurable(Distillation, module='l2s_jax')


class Given(NamedTuple):
  """Inputs of a step's loss, beside the parameters.

  Attributes:
    batch: of the step, with `llm_states` where they were computed.
    sampled: decoder keys of the student's samples; empty if not on policy.
  """

  batch: dict[str, Array]
  sampled: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Lesson:
  """Distillation in a train step.

  Attributes:
    settings: from gin.
    teacher: the teacher.
    ids: special token ids of the answer's vocabulary.
    is_on_policy: whether this step uses the student's samples.
  """

  settings: Distillation
  teacher: teachers.Teacher
  ids: strategies.Ids
  is_on_policy: bool = False

  def begin(
    self,
    module: Any,
    params: PyTree,
    teacher_params: PyTree,
    batch: Mapping[str, Array],
    key: Array,
    num_microbatches: int,
    *,
    logits_fn: Callable[..., Array],
    loss: Callable[..., Any],
  ) -> tuple[Given, Callable[..., Any]]:
    """Returns the inputs of a step's loss, and the loss function; see `loss`.

    Args:
      module: the student.
      params: all of its parameters.
      teacher_params: the teacher's.
      batch: of the step.
      key: PRNG key of the step.
      num_microbatches: sequential parts of the batch.
      logits_fn: returns the student's logits, given trained parameters, batch
        and PRNG key.
      loss: of the gold answers, as `losses.token_cross_entropy`.
    """
    given = self.give(module, params, batch, key, num_microbatches)
    return given, functools.partial(
      self.loss,
      logits_fn=logits_fn,
      loss=loss,
      module=module,
      params=params,
      teacher_params=teacher_params,
      scale=_scale(given),
    )

  def give(
    self,
    module: Any,
    params: PyTree,
    batch: Mapping[str, Array],
    key: Array,
    num_microbatches: int,
  ) -> Given:
    """Returns a batch, with the student's samples if on policy.

    Args:
      module: the student.
      params: all of its parameters.
      batch: of the step.
      key: PRNG key of the step; the row index is folded in for its sample.
      num_microbatches: sequential parts for sampling.
    """
    if not self.is_on_policy:
      return Given(dict(batch), {})
    # Global row numbers: samples do not depend on the microbatches.
    rows = jnp.arange(len(batch['encoder_segment_ids']))
    key = jax.random.fold_in(key, _SAMPLES)

    def write(part: tuple[dict[str, Array], Array]) -> Given:
      batch, rows = part
      # The LLM encodes a prompt once, for sampling and for the loss.
      batch = with_states(module, params, batch)
      row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
      return Given(batch, sample(module, params, batch, row_keys, self.ids))

    return microbatches.join(write, (dict(batch), rows), num_microbatches)

  def loss(
    self,
    trained: PyTree,
    given: Given,
    key: Array,
    *,
    logits_fn: Callable[..., Array],
    loss: Callable[..., Any],
    module: Any,
    params: PyTree,
    teacher_params: PyTree,
    scale: Float[Array, ''],
  ) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
    """Returns the summed loss to differentiate, and sums to report.

    Args:
      trained: parameters that get the gradient.
      given: from `give`, or a microbatch of it.
      key: PRNG key for dropout.
      logits_fn: returns the student's logits, given trained parameters, batch
        and PRNG key.
      loss: of the gold answers, as `losses.token_cross_entropy`.
      module: the student.
      params: all of its parameters, for computations without gradient.
      teacher_params: the teacher's.
      scale: factor of the divergence, from `_scale` of the whole batch.

    Returns:
      The loss; and the sums of `loss` with 'distill_loss', the divergence in
      nats, and 'distill_weight', its number of tokens.
    """
    batch = given.batch
    if self.teacher.reads_states:
      batch = with_states(module, params, batch)
    weight = self.settings.weight
    answers = {**batch, **given.sampled}
    of_gold = trained
    if self.is_on_policy and weight == 1:  # Needed for the log alone.
      of_gold = jax.lax.stop_gradient(trained)
    logits = logits_fn(of_gold, batch, key)
    total, sums = loss(
      logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
    )
    if self.is_on_policy:
      key = jax.random.fold_in(key, _DROPOUT)
      logits = logits_fn(trained, answers, key)
    teacher_logits = self.teacher.logits(teacher_params, params, answers)
    nats = losses.divergence(
      logits,
      jax.lax.stop_gradient(teacher_logits),
      answers['decoder_loss_weights'],
      interpolation=self.settings.divergence,
      temperature=self.settings.temperature,
    )
    taught = weight * self.settings.temperature**2 * scale * nats
    return taught if weight == 1 else taught + (1 - weight) * total, {
      **sums,
      'distill_loss': nats,
      'distill_weight': jnp.sum(answers['decoder_loss_weights']),
    }


def _scale(given: Given) -> Float[Array, '']:
  """Returns the ratio of gold tokens to sampled tokens.

  A step divides gradients by the number of gold tokens; the ratio turns the sum
  over samples into a mean over sampled tokens.
  """
  if not given.sampled:
    return jnp.float32(1)
  gold, sampled = (
    jnp.sum(answers['decoder_loss_weights'])
    for answers in (given.batch, given.sampled)
  )
  return gold / jnp.maximum(sampled, 1.0)


def with_states(
  module: Any, params: PyTree, batch: language_model.Batch
) -> dict[str, Array]:
  """Returns a batch with the states of the frozen LLM as `llm_states`.

  The batch stays as it is without a frozen LLM, with a learned mix of layers,
  or if it has the states already.
  """
  has_states = isinstance(module, l2s.LlmToSlm) and not (
    module.train_llm or module.llm_layer == l2s.MIX
  )
  if not has_states or 'llm_states' in batch:
    return dict(batch)
  states, _ = module.apply({'params': params}, batch, method='read_prompt')
  return {**batch, 'llm_states': states}


def sample(
  module: Any,
  params: PyTree,
  batch: language_model.Batch,
  row_keys: Array,
  ids: strategies.Ids,
) -> dict[str, Array]:
  """Samples answers from a model; returns the decoder keys of a batch.

  The temperature is 1, without dropout. Answers end with EOS or at the batch's
  answer length. Rows whose gold answer has no weight get no sample.

      sampled tokens 7, 8, EOS (1); answer length 5; start and padding 0
      -> decoder_target_tokens [7, 8, 1, 0, 0], decoder_input_tokens
      [0, 7, 8, 1, 0], decoder_segment_ids [1, 1, 1, 0, 0]

  Args:
    module: LLM-to-SLM or a language model.
    params: all of its parameters, as they are trained.
    batch: has the prompts.
    row_keys: one PRNG key per row.
    ids: special token ids of the answer's vocabulary.
  """
  module = l2s.for_generation(module, unstack_llm=False)
  params = l2s.params_for_generation(module, params)
  writer, name = l2s.writer(module)
  num_rows, length = batch['decoder_target_tokens'].shape
  cache = module.apply(
    {'params': params}, batch, num_slots=length, method='prefill'
  )
  has_weight = jnp.any(batch['decoder_loss_weights'] > 0, axis=1)
  prompts = strategies.Prompts(
    has_prompt=jnp.any(batch['encoder_segment_ids'] > 0, axis=1),
    row_keys=row_keys,
    max_decode_lens=jnp.where(has_weight, length, 0),
    first_tokens=strategies.full_of_rows(ids.start, (num_rows,)),
  )
  strategy = strategies.OneByOne(
    writer, sampling.Decoding(temperature=1.0), ids
  )
  state = jax.lax.while_loop(
    lambda state: (state.step < length) & ~jnp.all(state.done),
    functools.partial(strategy.step, l2s.writer_params(params, name)),
    strategy.begin(cache, prompts, length),
  )
  return _answers(state.tokens, prompts, ids)


def _answers(
  tokens: Int[Array, 'batch length'],
  prompts: strategies.Prompts,
  ids: strategies.Ids,
) -> dict[str, Array]:
  """Returns the decoder keys for sampled tokens."""
  is_eos = ids.end(tokens)
  is_behind = jnp.cumsum(is_eos, axis=1) > is_eos
  is_token = ~is_behind & ~prompts.have_ended[:, None]
  before = jnp.concatenate(
    [prompts.first_tokens[:, None], tokens[:, :-1]], axis=1
  )
  return {
    key: partitioning.constrain(x, ('batch', 'length'))
    for key, x in {
      'decoder_input_tokens': before,
      'decoder_target_tokens': tokens,
      'decoder_segment_ids': is_token.astype(jnp.int32),
      'decoder_loss_weights': is_token.astype(jnp.float32),
    }.items()
  }
