# SPDX-License-Identifier: Apache-2.0
"""What a training run does beside its steps, each every so many of them.

A hook is called between two steps and sees the run as it is then. Logging,
checkpoints, evaluation and profiling are hooks, and so is whatever HOOKS adds:

    @gin.configurable
    class MyTracker(hooks.Hook):
      every = 100

      def __call__(self, loop):
        my_service.send(loop.step, loop.metrics)

      def close(self):
        my_service.end()

In a gin file: `import my_module` and `HOOKS = [@my_module.MyTracker()]`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tqdm

from l2s_jax.evaluation import metric_writer, scoring
from l2s_jax.runtime import gin_config, preemption, profiling
from l2s_jax.systems import parameters
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint
from l2s_jax.training import progress as progress_lib
from l2s_jax.training import state as state_lib

PyTree = Any


@dataclasses.dataclass
class Loop:
  """A training run between two steps, as hooks see it.

  Attributes:
    run_dir: the run's folder.
    system: what is trained.
    train_steps: updates in all.
    state: after `step` updates. The next step takes its memory: what a hook
      keeps it must copy.
    frozen: the parameters that are not trained.
    teacher: those of the teacher, which no checkpoint holds; empty: none.
    step: updates done, those of earlier starts included.
    num_rows: rows of the data that were trained on.
    position: where the data go on, of a cache; None: behind `num_rows`.
    metrics: what was logged at this step, by name.
    kind: what the order of examples depends on, for the checkpoint.
    progress: sums since the last log.
    log: where `write` writes.
    bar: the progress bar.
    checkpointer: of the run.
    watcher: of signals; its lock is held while `state`, `step`, `num_rows` and
      `progress` change.
  """

  run_dir: pathlib.Path
  system: system_lib.System
  train_steps: int
  state: state_lib.TrainState
  frozen: PyTree
  step: int
  num_rows: int
  kind: Mapping[str, Any]
  progress: progress_lib.Progress
  log: metric_writer.MetricWriter
  bar: tqdm.tqdm
  checkpointer: checkpoint.Checkpointer
  watcher: preemption.Watcher
  position: Mapping[str, Any] | None = None
  teacher: PyTree = dataclasses.field(default_factory=dict)
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)

  def params(self) -> PyTree:
    """Returns all parameters, frozen and trained."""
    return parameters.merge(self.frozen, self.state.trainable)

  def write(self, scalars: Mapping[str, float]) -> None:
    """Logs numbers by name, under this step."""
    self.metrics |= scalars
    self.log.write(self.step, scalars)

  def say(self, text: str) -> None:
    """Prints a line above the progress bar."""
    self.bar.write(text)

  def save(self) -> None:
    """Starts to save this step, unless that was done."""
    with self.watcher.lock:
      self.progress.settle()
      self.checkpointer.save(
        self.state,
        {
          **self.kind,
          'num_rows': self.num_rows,
          'position': self.position,
          'sums': self.progress.sums,
          'clock': self.progress.clock(),
        },
        self.system.describe(),
      )

  def save_and_wait(self) -> None:
    """Saves this step and returns when it is on disk."""
    self.save()
    self.checkpointer.wait()


class Hook:
  """Called every so many steps, and at the end of the run.

  With several processes each has its own, and all are called; what goes out
  once is the first's (`distributed.is_first`). Steps that are done again after
  a restart are seen again, and so is the step that a run goes on from where an
  evaluation was still to be made. What a hook raises ends the run.

  Attributes:
    every: steps between two calls; None: at the end of the run alone.
  """

  every: int | None = 1

  def before(self, loop: Loop) -> None:
    """Called before each step, whatever `every` is."""

  def __call__(self, loop: Loop) -> None:
    """Called after a step that is a multiple of `every`, and after the last."""
    raise NotImplementedError

  def close(self) -> None:
    """Called once, when the run ends or is left."""


class Hooked(NamedTuple):
  """The hooks of a run, in the order in which they are called.

  Attributes:
    in_step: under the lock: what they change belongs to the step.
    ours: that follow it.
    users: that follow those.
  """

  in_step: Sequence[Hook]
  ours: Sequence[Hook]
  users: Sequence[Hook]


def check(hooks: Sequence[Any]) -> None:
  """Refuses what HOOKS lists and is no hook.

  Raises:
    ValueError: names the first that is none.
  """
  for number, hook in enumerate(hooks):
    name = f'HOOKS[{number}]'
    if not isinstance(hook, Hook):
      hint = '; write @NAME()' if isinstance(hook, type) else ''
      raise ValueError(
        f'{name}={hook!r}: expected an object of a subclass of '
        f'{Hook.__module__}.Hook, such as @my_module.MyTracker(){hint}.'
      )
    gin_config.check_positive(**{f'{name}.every': hook.every})


def is_due(hook: Hook, loop: Loop) -> bool:
  """Whether a hook is called after the step that was done."""
  return loop.step == loop.train_steps or bool(
    hook.every and loop.step % hook.every == 0
  )


def call(hooks: Iterable[Hook], loop: Loop) -> None:
  """Calls those hooks that are due, in order."""
  for hook in hooks:
    if is_due(hook, loop):
      hook(loop)


class Log(Hook):
  """Logs losses and speeds since the last time, and begins to sum up anew."""

  def __init__(
    self,
    every: int,
    schedule: Callable[[int], Any],
    constants: Mapping[str, float],
  ):
    """Prepares.

    Args:
      every: steps between two lines.
      schedule: learning rate by the number of the update, from 0.
      constants: numbers to log in each line.
    """
    self.every = every
    self._schedule = schedule
    self._constants = constants

  def __call__(self, loop: Loop) -> None:
    summary = loop.progress.summary()
    if self.every and loop.step % self.every == 0:
      loop.progress.restart()
    summary['train/learning_rate'] = float(self._schedule(loop.step - 1))
    loop.write({**summary, **self._constants})
    loop.bar.set_postfix_str(
      f'loss {summary["train/loss"]:.3f}, '
      f'{summary["train/target_tokens_per_sec"]:.0f} target tokens/s'
    )


class Profile(Hook):
  """Traces the steps from a first to a last one, into `profile/`."""

  def __init__(self, run_dir: pathlib.Path, steps: Sequence[int] | None):
    """Prepares; `steps` are the first and the last, None traces nothing."""
    self._profiler = profiling.Profiler(run_dir, steps)

  def before(self, loop: Loop) -> None:
    self._profiler.before(loop.step + 1)

  def __call__(self, loop: Loop) -> None:
    if self._profiler.is_last(loop.step):
      loop.progress.settle()
      self._profiler.close()

  def close(self) -> None:
    self._profiler.close()


class SaveCheckpoint(Hook):
  """Saves the run, so that it can go on from here."""

  def __init__(self, every: int):
    self.every = every

  def __call__(self, loop: Loop) -> None:
    loop.save()


class Evaluate(Hook):
  """Scores the model, once a step, whatever was killed in between."""

  def __init__(
    self,
    every: int | None,
    scorer: scoring.Evaluator,
    prefix: str,
    found: Mapping[int, Mapping[str, float]],
    best: str | None = None,
  ):
    """Prepares.

    Args:
      every: steps between evaluations; None evaluates at the end.
      scorer: evaluates parameters.
      prefix: of the names of the scores, behind 'eval/'.
      found: evaluations of earlier starts, by step; not done again.
      best: the score whose best step is kept; None: no step is.
    """
    self.every = every
    self.found = {step: dict(scores) for step, scores in found.items()}
    self._scorer = scorer
    self.prefix = prefix
    self._best = best

  def __call__(self, loop: Loop) -> None:
    if loop.step in self.found:
      return
    loop.save()  # Before: a kill while evaluating costs no step.
    with loop.progress.paused():
      scores = self._scorer.evaluate(
        loop.params(),
        step=loop.step,
        output_dir=loop.run_dir,
        stop=loop.watcher.check,
      )
    loop.write({f'eval/{self.prefix}{k}': v for k, v in scores.items()})
    self.found[loop.step] = scores
    label = f', {self.prefix[:-1]}' if self.prefix else ''
    line = scoring.format_scores(scores, self._scorer.signatures)
    loop.say(f'step {loop.step}{label}: {line}')
    self.keep_best(loop.checkpointer)

  def keep_best(self, checkpointer: checkpoint.Checkpointer) -> None:
    """Keeps the best step of all evaluations so far.

    Raises:
      ValueError: if no evaluation has the score.
    """
    if self._best is None:
      return
    scores = {
      step: row[self._best]
      for step, row in self.found.items()
      if self._best in row
    }
    metric = f'{self.prefix}{self._best}'
    if self.found and not scores:  # Of a metric that is not of metrics.py.
      raise ValueError(
        f'BEST_METRIC={metric!r} is not among the scores of the evaluation: '
        + ', '.join(
          f'{self.prefix}{name}' for name in self.found[max(self.found)]
        )
        + '.'
      )
    checkpointer.keep_best(metric, scores)
