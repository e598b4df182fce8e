# SPDX-License-Identifier: Apache-2.0
"""Scores one system on one split of a task, as often as asked.

The teacher-forced loss and the metrics of decoded answers; `evaluation.py` has
the metrics, `generate.py` the decoding.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
import tqdm

from l2s_jax import (
  data,
  distributed,
  generate,
  gin_utils,
  losses,
  partition,
  report,
  sampling,
  systems,
)

PyTree = Any

# Which Z the SLM gets: that of the prompt, zero, or that of another prompt.
CONTROLS = ('none', 'zero', 'other')

Stop = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One of the evaluations of a training run, as EVALUATIONS lists them.

  What is None is as the run has it.

  Attributes:
    task: SeqIO task or mixture.
    split: of it.
    num_examples: the first so many of each task.
    period: steps between two; the end of the run is always evaluated.
    task_feature_lengths: tokens of 'inputs' and 'targets'.
  """

  task: str | None = None
  split: str | None = None
  num_examples: int | None = None
  period: int | None = None
  task_feature_lengths: Mapping[str, int] | None = None

  def planned(self, run: 'Planned') -> 'Planned':
    """Returns the evaluation with the settings of the run where it has none."""
    given = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if getattr(self, field.name) is not None
    }
    return dataclasses.replace(run, **given)


gin.external_configurable(Evaluation, module='l2s_jax')


@dataclasses.dataclass(frozen=True)
class Planned:
  """An evaluation of a training run with all that it needs; see `Evaluation`.

  A `num_examples` of None takes all, a `period` of None the end of the run.
  """

  task: str
  split: str
  num_examples: int | None
  period: int | None
  task_feature_lengths: Mapping[str, int]


def by_prefix(
  evaluations: Sequence[Evaluation], run: Planned
) -> dict[str, Planned]:
  """Returns a run's evaluations by what comes before the names of their scores.

  That is nothing where EVALUATIONS lists none, and 'TASK-SPLIT/' otherwise.

  Args:
    evaluations: EVALUATIONS.
    run: the settings of the run.

  Raises:
    ValueError: for numbers that mean nothing, or two of one task and split.
  """
  if not evaluations:
    return {'': run}
  found: dict[str, Planned] = {}
  for number, evaluation in enumerate(evaluations):
    if not isinstance(evaluation, Evaluation):
      raise ValueError(
        f'EVALUATIONS[{number}]={evaluation!r}: expected an Evaluation, such '
        'as @NAME/Evaluation() with NAME/Evaluation.task bound beside it.'
      )
    planned = evaluation.planned(run)
    gin_utils.check_positive(
      **{
        f'EVALUATIONS[{number}].num_examples': planned.num_examples,
        f'EVALUATIONS[{number}].period': planned.period,
      }
    )
    gin_utils.check_lengths(planned.task_feature_lengths)
    prefix = f'{planned.task}-{planned.split}/'
    if prefix in found:
      raise ValueError(
        f'EVALUATIONS has two of task {planned.task!r} and split '
        f'{planned.split!r}, whose scores would have the same names. Leave one '
        'out.'
      )
    found[prefix] = planned
  return found


def of_score(
  setting: str, score: str, evaluations: Mapping[str, Planned]
) -> tuple[str, str]:
  """Returns the prefix of the evaluation that gives a score, and the rest.

  Args:
    setting: that names the score, for the error.
    score: as it is logged, without 'eval/'.
    evaluations: from `by_prefix`.

  Raises:
    ValueError: if it is of none of them.
  """
  for prefix in sorted(evaluations, key=len, reverse=True):
    if score.startswith(prefix):
      return prefix, score.removeprefix(prefix)
  raise ValueError(
    f'{setting}={score!r} is of no evaluation of this run; expected a score '
    f'with its task and split, such as {next(iter(evaluations))}loss. '
    f'EVALUATIONS has {", ".join(p[:-1] for p in evaluations)}.'
  )


def check_score(
  name: str, score: str, task: Any, split: str, prefix: str = ''
) -> None:
  """Refuses a score that no evaluation of a task will give.

  Args:
    name: of the setting, for the error.
    score: as evaluations name it.
    task: from `session.bind_task`.
    split: to be evaluated.
    prefix: of the evaluation's scores, for the error.

  Raises:
    ValueError: with those that there are.
  """
  from l2s_jax import evaluation

  known = evaluation.score_names(task, split)
  if known is not None and score not in known:
    raise ValueError(
      f'{name}={prefix + score!r} is not a score of this task; there are '
      f'{", ".join(prefix + other for other in known)}.'
    )


class Evaluator:
  """Evaluates one system on one split, as often as asked.

  Functions are compiled once. Loss is teacher-forced; the decoded metrics are
  those of the task, by SeqIO's Evaluator, which tokenizes the split once.
  """

  def __init__(
    self,
    system: systems.System,
    mesh: jax.sharding.Mesh,
    task: Any,
    task_feature_lengths: Mapping[str, int],
    *,
    split: str,
    batch_size: int,
    num_examples: int | None = None,
    max_decode_len: int | None = None,
    decoding: sampling.Decoding | None = None,
    num_bootstrap_samples: int = 0,
    generator: generate.Generator | None = None,
  ):
    """Prepares the evaluation; nothing compiles and no data are read yet.

    Args:
      system: what to evaluate.
      mesh: the device mesh.
      task: from `session.bind_task`.
      task_feature_lengths: tokens of 'inputs' and 'targets'.
      split: of the task.
      batch_size: examples a batch, over all devices.
      num_examples: the first so many of each task; None takes all.
      max_decode_len: tokens an answer at most; None: that of 'targets'.
      decoding: how answers are written; None is greedy.
      num_bootstrap_samples: for confidence intervals; 0 for none.
      generator: of another evaluator of the same system, settings and longest
        answer, to compile nothing twice; None makes one.
    """
    self.generator = generator or generate.generator(
      system,
      max_decode_len or task_feature_lengths['targets'],
      decoding=decoding,
      unstack_llm=False,  # It may be large, and training goes on beside this.
    )
    self._mesh = mesh
    # Of a system whose answers go on where its prompts end.
    self._prompt_vocabulary = (
      system.prompt_vocabulary if system.continues else None
    )
    self._task = task
    self._reading: dict[str, Any] = {
      'task_feature_lengths': task_feature_lengths,
      'split': split,
      'batch_size': batch_size,
      'num_examples': num_examples,
      'num_bootstrap_samples': num_bootstrap_samples,
    }

    def loss_sums(params, batch):
      logits = system.module.apply(
        {'params': params}, batch, deterministic=True
      )
      return losses.token_cross_entropy(
        logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
      )[1]

    self._loss_sums = jax.jit(loss_sums)

  @property
  def signatures(self) -> dict[str, str]:
    """What gave the last scores, by their names; of ROUGE's, by rougeLsum."""
    by_task = self._by_seqio.signatures
    return {
      name if len(by_task) == 1 else f'{task}/{name}': signature
      for task, signatures in by_task.items()
      for name, signature in signatures.items()
    }

  @functools.cached_property
  def _by_seqio(self) -> Any:
    from l2s_jax import evaluation

    return evaluation.TaskEvaluator(self._task, **self._reading)

  def evaluate(
    self,
    params: PyTree,
    *,
    step: int,
    output_dir: str | pathlib.Path | None = None,
    control: str = 'none',
    stop: Stop | None = None,
  ) -> dict[str, float]:
    """Returns the scores by name; of a mixture by 'task/name'.

    'loss' (nats per target token) and 'token_accuracy', both teacher-forced,
    are among them. A score of `metrics.py` comes with the ends of its
    confidence interval, if that was asked for.

    Args:
      params: all of the system's parameters.
      step: of the checkpoint, for the names of files.
      output_dir: predictions go to `eval/` in it; None writes none.
      control: one of `CONTROLS`.
      stop: called before each batch; raises to leave.
    """

    def put(batch: data.Batch) -> dict[str, jax.Array]:
      if stop:
        stop()
      if self._prompt_vocabulary is not None:
        batch = data.continuing(
          batch,
          self._prompt_vocabulary.prefix_ids,
          self._prompt_vocabulary.eos_ids,
        )
      if control == 'zero':
        rows = batch['encoder_input_tokens'].shape[0]
        batch = batch | {'llm_scale': np.zeros((rows,), np.float32)}
      return partition.put_batch(batch, self._mesh)

    def predict(batch: data.Batch) -> np.ndarray:
      row_ids = batch.pop('row_ids')
      return distributed.fetch(self.generator(prepared, put(batch), row_ids))

    prepared = self.generator.prepare(params)
    folder = None
    if output_dir is not None and distributed.is_first():
      folder = pathlib.Path(output_dir) / 'eval'
    by_task = self._by_seqio.evaluate(
      predict, control=control, step=step, output_dir=folder
    )
    for task in self._by_seqio.tasks:
      batches = self._by_seqio.batches(task, control)
      by_task[task.name] |= self._loss(params, map(put, batches))
    return {
      name if len(by_task) == 1 else f'{task}/{name}': value
      for task, scores in by_task.items()
      for name, value in scores.items()
    }

  def _loss(
    self, params: PyTree, batches: Iterable[dict[str, jax.Array]]
  ) -> dict[str, float]:
    """Returns teacher-forced loss (nats per target token) and accuracy."""
    sums: dict[str, float] = {}
    for batch in tqdm.tqdm(
      batches,
      desc='loss',
      unit='batch',
      leave=False,
      dynamic_ncols=True,
      disable=not distributed.is_first(),
    ):
      for name, value in self._loss_sums(params, batch).items():
        sums[name] = sums.get(name, 0.0) + float(value)
    tokens = max(sums['loss_weight'], 1.0)
    return {
      'loss': sums['loss'] / tokens,
      'token_accuracy': sums['num_correct'] / tokens,
    }


def format_scores(
  scores: Mapping[str, float], signatures: Mapping[str, str]
) -> str:
  """Returns one line; scores with their signatures, for others to repeat them.

  Args:
    scores: by name.
    signatures: by name of a score, see `Evaluator.signatures`.
  """
  parts = []
  for name, value in scores.items():
    if report.is_interval_end(name, scores):
      continue
    text = (
      f'{name} {value}' if isinstance(value, int) else f'{name} {value:.4g}'
    )
    if f'{name}_low' in scores:
      text += f' [{scores[f"{name}_low"]:.4g}, {scores[f"{name}_high"]:.4g}]'
    if name in signatures:
      text += f' ({signatures[name]})'
    parts.append(text)
  return ', '.join(parts)
