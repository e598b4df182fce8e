# SPDX-License-Identifier: Apache-2.0
"""Hooks of the training loop: logging, checkpoints, evaluation, profiling.

A hook is called between two steps and reads the run's state at that time. HOOKS
adds hooks of the user:

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

import jax
import tqdm

from l2s_jax.evaluation import metric_writer, scoring
from l2s_jax.runtime import gin_config, os_errors, preemption, profiling
from l2s_jax.systems import parameters
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint
from l2s_jax.training import progress as progress_lib
from l2s_jax.training import state as state_lib

PyTree = Any


@dataclasses.dataclass
class Loop:
  """State of a training run between two steps, for hooks.

  Attributes:
    run_dir: folder of the run.
    system: the system being trained.
    train_steps: total number of updates.
    state: train state after `step` updates. The next step donates its buffers:
      a hook copies the arrays that it keeps.
    frozen: parameters that are not trained.
    teacher: parameters of the teacher, which checkpoints do not contain; empty
      without a teacher.
    step: number of updates, including those of earlier starts.
    num_rows: number of data rows consumed.
    position: position in a cache; None: the data resume after `num_rows`.
    metrics: values logged at this step, by name.
    kind: settings that determine the order of examples, for the checkpoint.
    progress: sums since the last log.
    log: writer of metrics.
    bar: progress bar.
    checkpointer: checkpointer of the run.
    watcher: watcher of signals. Its lock is held while `state`, `step`,
      `num_rows` and `progress` change.
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
    """Logs scalars by name, at this step."""
    self.metrics |= scalars
    self.log.write(self.step, scalars)

  def say(self, text: str) -> None:
    """Prints a line above the progress bar."""
    self.bar.write(text)

  def save(self) -> None:
    """Starts an asynchronous save of this step, unless it is saved already."""
    try:
      self.log.sync()
    except OSError as error:  # The next save uploads the logs again.
      self.say(f'The logs were not uploaded: {os_errors.first_line(error)}')
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
    """Saves this step and waits until it is on disk."""
    self.save()
    self.checkpointer.wait()


class Hook:
  """Base class: called every `every` steps and after the last step.

  Each process has its own hooks and calls all of them. Output that must be
  written once is written by the first process (`distributed.is_first`). After a
  restart, hooks are called again for repeated steps, and for the restored step
  if its evaluation is missing. An exception in a hook ends the run.

  Attributes:
    every: number of steps between two calls; None: after the last step only.
  """

  every: int | None = 1

  def before(self, loop: Loop) -> None:
    """Called before each step, regardless of `every`."""

  def __call__(self, loop: Loop) -> None:
    """Called after each multiple of `every`, and after the last step."""
    raise NotImplementedError

  def close(self) -> None:
    """Called once, when the run ends or is interrupted."""


class Hooked(NamedTuple):
  """The hooks of a run, in calling order.

  Attributes:
    in_step: hooks that run under the lock, as part of the step.
    ours: hooks of this package, after the step.
    users: hooks of the user, after `ours`.
  """

  in_step: Sequence[Hook]
  ours: Sequence[Hook]
  users: Sequence[Hook]


def check(hooks: Sequence[Any]) -> None:
  """Checks that HOOKS lists instances of `Hook`.

  Raises:
    ValueError: if an element is not a hook, or its `every` is not positive.
  """
  for number, hook in enumerate(hooks):
    name = f'HOOKS[{number}]'
    if not isinstance(hook, Hook):
      hint = '; write @NAME()' if isinstance(hook, type) else ''
      raise ValueError(
        f'{name}={hook!r}: expected an instance of a subclass of '
        f'{Hook.__module__}.Hook, such as @my_module.MyTracker(){hint}.'
      )
    gin_config.check_positive(**{f'{name}.every': hook.every})


def is_due(hook: Hook, loop: Loop) -> bool:
  """Returns whether a hook is called after the current step."""
  return loop.step == loop.train_steps or bool(
    hook.every and loop.step % hook.every == 0
  )


def call(hooks: Iterable[Hook], loop: Loop) -> None:
  """Calls the hooks that are due, in order."""
  for hook in hooks:
    if is_due(hook, loop):
      hook(loop)


class Log(Hook):
  """Logs losses and speeds since the last call, and resets their sums."""

  def __init__(
    self,
    every: int,
    schedule: Callable[[int], Any],
    constants: Mapping[str, float],
  ):
    """Initializes the hook.

    Args:
      every: number of steps between two lines.
      schedule: learning rate by update number, from 0.
      constants: scalars to log in each line.
    """
    self.every = every
    # One program: each of its operations alone would be one.
    self._schedule = jax.jit(schedule)
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
  """Traces a range of steps into `profile/`."""

  def __init__(self, run_dir: pathlib.Path, steps: Sequence[int] | None):
    """Initializes the hook.

    Args:
      run_dir: folder of the run.
      steps: first and last step to trace; None traces nothing.
    """
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
  """Saves a checkpoint."""

  def __init__(self, every: int):
    self.every = every

  def __call__(self, loop: Loop) -> None:
    loop.save()


class Evaluate(Hook):
  """Evaluates the model, once per step even across restarts."""

  def __init__(
    self,
    every: int | None,
    scorer: scoring.Evaluator,
    prefix: str,
    found: Mapping[int, Mapping[str, float]],
    best: str | None = None,
  ):
    """Initializes the hook.

    Args:
      every: number of steps between evaluations; None evaluates at the end.
      scorer: evaluator of parameters.
      prefix: prefix of score names, after 'eval/'.
      found: scores of earlier starts, by step; these steps are not repeated.
      best: score that selects the best step to keep; None keeps no best step.
    """
    self.every = every
    self.found = {step: dict(scores) for step, scores in found.items()}
    self._scorer = scorer
    self.prefix = prefix
    self._best = best

  def __call__(self, loop: Loop) -> None:
    if loop.step in self.found:
      return
    loop.save()  # First: a kill during the evaluation then loses no step.
    with loop.progress.paused():
      scores = self._scorer.evaluate(
        loop.params(),
        step=loop.step,
        output_dir=loop.run_dir,
        stop=loop.watcher.check,
      )
    loop.write({f'eval/{self.prefix}{k}': v for k, v in scores.items()})
    loop.log.sync()
    self.found[loop.step] = scores
    label = f', {self.prefix[:-1]}' if self.prefix else ''
    line = scoring.format_scores(scores, self._scorer.signatures)
    loop.say(f'step {loop.step}{label}: {line}')
    self.keep_best(loop.checkpointer)

  def keep_best(self, checkpointer: checkpoint.Checkpointer) -> None:
    """Keeps the checkpoint of the best step so far.

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
    if self.found and not scores:  # A metric of the user.
      raise ValueError(
        f'BEST_METRIC={metric!r} is not a score of the evaluation; its scores: '
        + ', '.join(
          f'{self.prefix}{name}' for name in self.found[max(self.found)]
        )
        + '.'
      )
    checkpointer.keep_best(metric, scores)
