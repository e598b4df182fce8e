# SPDX-License-Identifier: Apache-2.0
"""The evaluations of a training run: tasks, splits and periods.

EVALUATIONS lists them; by default there is one, on the training task. With
EVALUATIONS, score names have a prefix 'TASK-SPLIT/'.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import gin

from l2s_jax.data import bound_tasks
from l2s_jax.evaluation import metric_writer, scoring
from l2s_jax.inference import generate
from l2s_jax.runtime import distributed, gin_config
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.training import hooks as hooks_lib


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One entry of EVALUATIONS. None means the run's own setting.

  Attributes:
    task: SeqIO task or mixture.
    split: of the task.
    num_examples: number of examples of each task, from the start of the split.
    period: steps between evaluations; the end of the run is always evaluated.
    task_feature_lengths: tokens of 'inputs' and 'targets'.
  """

  task: str | None = None
  split: str | None = None
  num_examples: int | None = None
  period: int | None = None
  task_feature_lengths: Mapping[str, int] | None = None

  def planned(self, run: 'Planned') -> 'Planned':
    """Returns this evaluation, completed by the run's settings."""
    given = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if getattr(self, field.name) is not None
    }
    return dataclasses.replace(run, **given)


gin.external_configurable(Evaluation, module='l2s_jax')


@dataclasses.dataclass(frozen=True)
class Planned:
  """A complete evaluation of a training run; see `Evaluation`.

  `num_examples` None means all, `period` None only the end of the run.
  With an empty `split` the run evaluates only EVALUATIONS.
  """

  task: str
  split: str
  num_examples: int | None
  period: int | None
  task_feature_lengths: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Plan:
  """The evaluations of a run.

  Attributes:
    by_prefix: by the prefix of their score names: '' without EVALUATIONS,
      'TASK-SPLIT/' otherwise.
    best: prefix and score that select the best checkpoint; None selects none.
    batch_size: examples per decoding batch; None means the training batch size.
  """

  by_prefix: Mapping[str, Planned]
  best: tuple[str, str] | None
  batch_size: int | None = None

  def longest(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Returns the maximum lengths over training and all evaluations."""
    longest = dict(task_feature_lengths)
    for planned in self.by_prefix.values():
      for name, length in planned.task_feature_lengths.items():
        longest[name] = max(longest[name], length)
    return longest

  def bind(
    self, system: system_lib.System, trained: bound_tasks.BoundTask, name: str
  ) -> dict[str, bound_tasks.BoundTask]:
    """Returns the bound task of each evaluation, by prefix.

    Args:
      system: the system to evaluate.
      trained: the training task.
      name: name of the training task.

    Raises:
      ValueError: if a task cannot be evaluated, two evaluations would write the
        same predictions, or `best` is not among the scores.
    """
    found = {}
    writers: dict[tuple[str, str], str] = {}
    for prefix, planned in self.by_prefix.items():
      task = trained
      if planned.task != name:
        task = session_lib.bind_task(
          system, planned.task, label=f'EVALUATIONS {prefix[:-1]}'
        )
      task.check_evaluable(planned.split, planned.task_feature_lengths)
      for scored in task.metrics_of(planned.split):
        other = writers.setdefault((scored, planned.split), prefix)
        if other != prefix:
          raise ValueError(
            f'EVALUATIONS {other[:-1]} and {prefix[:-1]} would write the '
            f'predictions of task {scored!r} on split {planned.split!r} to one '
            'file. Leave one out: the scores of a mixture include those of '
            'each of its tasks.'
          )
      found[prefix] = task
    if self.best is not None:
      prefix, score = self.best
      split = self.by_prefix[prefix].split
      check_score('BEST_METRIC', score, found[prefix], split, prefix)
    return found

  def hooks(
    self,
    loop: hooks_lib.Loop,
    session: session_lib.Session,
    bound: Mapping[str, bound_tasks.BoundTask],
    batch_size: int,
  ) -> list[hooks_lib.Evaluate]:
    """Returns the hooks of the evaluations; they also keep the best checkpoint.

    Args:
      loop: the run.
      session: has the mesh.
      bound: result of `bind`.
      batch_size: training batch size.
    """
    found = distributed.from_first(
      {prefix: logged(loop.run_dir, prefix) for prefix in self.by_prefix}
    )
    generators: dict[int, generate.Generator] = {}
    made = []
    for prefix, planned in self.by_prefix.items():
      answer_length = planned.task_feature_lengths['targets']
      scorer = scoring.Evaluator(
        loop.system,
        session.mesh,
        bound[prefix],
        planned.task_feature_lengths,
        split=planned.split,
        batch_size=self.batch_size or batch_size,
        num_examples=planned.num_examples,
        generator=generators.get(answer_length),
      )
      generators[answer_length] = scorer.generator
      hook = hooks_lib.Evaluate(
        planned.period,
        scorer,
        prefix,
        {int(step): scores for step, scores in found[prefix].items()},
        self.best[1] if self.best and self.best[0] == prefix else None,
      )
      hook.keep_best(loop.checkpointer)
      made.append(hook)
    return made


def make(
  evaluations: Sequence[Evaluation],
  run: Planned,
  best_metric: str | None,
  batch_size: int | None = None,
) -> Plan:
  """Returns the evaluations of a run, after validating their settings.

  Args:
    evaluations: EVALUATIONS.
    run: the run's settings, for fields that are None.
    best_metric: BEST_METRIC.
    batch_size: examples per decoding batch; None means the training batch size.

  Raises:
    ValueError: for an invalid setting, or two evaluations of one task and
      split.
  """
  gin_config.check_positive(
    EVAL_PERIOD=run.period,
    num_eval_examples=run.num_examples,
    eval_batch_size=batch_size,
  )
  by_prefix = _by_prefix(evaluations, run)
  if best_metric is None:
    return Plan(by_prefix, None, batch_size)
  if not by_prefix:
    raise ValueError(
      f'BEST_METRIC={best_metric!r} with train.eval_split=None: nothing is '
      'evaluated. Set the split, or leave BEST_METRIC unset.'
    )
  prefix, score = _of_score('BEST_METRIC', best_metric, by_prefix)
  split = by_prefix[prefix].split
  if 'test' in split:
    name = f'the split of EVALUATIONS {prefix[:-1]}' if prefix else 'eval_split'
    raise ValueError(
      f'BEST_METRIC={best_metric!r} with {name}={split!r}: select checkpoints '
      "on validation data only. Set train.eval_split to 'validation', and "
      'score the chosen checkpoint on the test split with evaluate and '
      "EVAL_STEPS='best'."
    )
  return Plan(by_prefix, (prefix, score), batch_size)


def _by_prefix(
  evaluations: Sequence[Evaluation], run: Planned
) -> dict[str, Planned]:
  """Returns the evaluations by the prefix of their score names."""
  if not evaluations:
    return {'': run} if run.split else {}
  found: dict[str, Planned] = {}
  for number, evaluation in enumerate(evaluations):
    if not isinstance(evaluation, Evaluation):
      raise ValueError(
        f'EVALUATIONS[{number}]={evaluation!r}: expected an Evaluation, such '
        'as @NAME/Evaluation() with a binding of NAME/Evaluation.task.'
      )
    planned = evaluation.planned(run)
    if not planned.split:
      raise ValueError(
        f'EVALUATIONS[{number}] has no split, and train.eval_split is None. '
        'Set one of the two.'
      )
    gin_config.check_positive(
      **{
        f'EVALUATIONS[{number}].num_examples': planned.num_examples,
        f'EVALUATIONS[{number}].period': planned.period,
      }
    )
    gin_config.check_lengths(planned.task_feature_lengths)
    prefix = f'{planned.task}-{planned.split}/'
    if prefix in found:
      raise ValueError(
        f'EVALUATIONS has two evaluations of task {planned.task!r} and split '
        f'{planned.split!r}, and their scores would have the same names. Leave '
        'one out.'
      )
    found[prefix] = planned
  return found


def _of_score(
  setting: str, score: str, evaluations: Mapping[str, Planned]
) -> tuple[str, str]:
  """Splits a score name into the prefix of its evaluation and the rest.

  Args:
    setting: name of the setting with the score, for the error.
    score: as it is logged, without 'eval/'.
    evaluations: by prefix.

  Raises:
    ValueError: if no evaluation has the score.
  """
  for prefix in sorted(evaluations, key=len, reverse=True):
    if score.startswith(prefix):
      return prefix, score.removeprefix(prefix)
  raise ValueError(
    f'{setting}={score!r} does not name an evaluation of this run; expected a '
    f'score with its task and split, such as {next(iter(evaluations))}loss. '
    f'EVALUATIONS has {", ".join(p[:-1] for p in evaluations)}.'
  )


def check_score(
  name: str,
  score: str,
  task: bound_tasks.BoundTask,
  split: str,
  prefix: str = '',
) -> None:
  """Checks that an evaluation of a task gives a score.

  Args:
    name: name of the setting with the score, for the error.
    score: name of the score, without prefix.
    task: from `session.bind_task`.
    split: split to evaluate.
    prefix: of the evaluation's scores, for the error.

  Raises:
    ValueError: lists the scores of the task.
  """
  known = scoring.score_names(task, split)
  if known is not None and score not in known:
    raise ValueError(
      f'{name}={prefix + score!r} is not a score of this task. Its scores are '
      f'{", ".join(prefix + other for other in known)}.'
    )


def logged(run_dir: pathlib.Path, prefix: str) -> dict[int, dict[str, float]]:
  """Returns the scores logged by earlier starts, by step and name."""
  by_step = metric_writer.by_step(run_dir, prefix=f'eval/{prefix}')
  if prefix:
    return by_step
  # Without a prefix, drop scores of other evaluations: only 'TASK-SPLIT' has a
  # hyphen before the last slash.
  return {
    step: own
    for step, scores in by_step.items()
    if (
      own := {
        name: score
        for name, score in scores.items()
        if '-' not in name.rpartition('/')[0]
      }
    )
  }


def last_scores(evaluates: Sequence[hooks_lib.Evaluate]) -> dict[str, float]:
  """Returns the scores of the last evaluated step, by prefixed name."""
  last = max((step for hook in evaluates for step in hook.found), default=0)
  return {
    f'{hook.prefix}{name}': score
    for hook in evaluates
    for name, score in hook.found.get(last, {}).items()
  }
