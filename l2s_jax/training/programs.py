# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation of the train steps of a run."""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import optax

from l2s_jax.runtime import partitioning
from l2s_jax.systems import session as session_lib
from l2s_jax.training import (
  distillation,
  optim,
  resuming,
  teachers,
  train_step,
)
from l2s_jax.training import hooks as hooks_lib


@dataclasses.dataclass(frozen=True)
class Steps:
  """The train steps of a run.

  One program is compiled for each phase of training, each pair of batch
  lengths, and for steps with and without the student's samples.

  Attributes:
    settings: of the loss and the microbatches.
    optimizer: has the phases.
    transform: the optimizer's transformation of the system's parameters.
    lesson: distillation of a teacher; None means no distillation.
  """

  settings: train_step.StepSettings
  optimizer: optim.Optimizer
  transform: optax.GradientTransformation
  lesson: distillation.Lesson | None = None

  def __post_init__(self):
    """Checks that no setting of the gold answers' loss is without effect.

    Raises:
      ValueError: names the settings.
    """
    if self.lesson is not None:
      self.lesson.settings.check_gold(
        LABEL_SMOOTHING=self.settings.label_smoothing,
        Z_LOSS=self.settings.z_loss,
      )

  @property
  def teacher(self) -> teachers.Teacher | None:
    """The teacher of distillation, or None."""
    return self.lesson.teacher if self.lesson else None

  def describe(self, session: session_lib.Session) -> str:
    """Returns the report of `--dry_run`."""
    text = session.describe(resuming.optimizer_bytes(session, self.transform))
    return f'{text}\n{self.teacher.describe()}' if self.teacher else text

  def compile(
    self,
    loop: hooks_lib.Loop,
    mesh: jax.sharding.Mesh,
    shapes: Sequence[tuple[int, int, int]],
  ) -> 'Compiled':
    """Compiles the programs that the remaining steps need.

    It runs before the loop, so that compilation holds no lock and is in no
    timing.

    Args:
      loop: the run.
      mesh: the device mesh.
      shapes: batch shapes: rows, prompt length, answer length.
    """
    start_secs = time.perf_counter()
    compiled = Compiled(self)
    for first, is_on_policy in self._needed(loop):
      jitted = jax.jit(
        self._step_fn(loop, first, is_on_policy),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, loop.state), None),
      )
      for shape in shapes:
        example = loop.system.example_batch(
          *shape, sharding=partitioning.batch_sharding(mesh)
        )
        compiled.programs[first, is_on_policy, shape[1:]] = jitted.lower(
          loop.state, loop.frozen, example, loop.teacher
        ).compile()
        loop.watcher.exit_if_requested()
    compiled.secs = time.perf_counter() - start_secs
    if compiled.programs:
      loop.say(f'Compiled the training step in {compiled.secs:.1f} s.')
    return compiled

  def phase(self, step: int) -> int:
    """Returns the first step of the phase that contains `step`."""
    return max(first for first in self.optimizer.phases() if first <= step)

  def is_on_policy(self, step: int) -> bool:
    """Returns whether a step trains on the student's samples."""
    return self.lesson is not None and self.lesson.settings.is_on_policy(step)

  def _needed(self, loop: hooks_lib.Loop) -> Iterable[tuple[int, bool]]:
    """Returns all pairs of a remaining phase and a kind of step."""
    starts = [*self.optimizer.phases(), loop.train_steps]
    phases = [
      first
      for first, end in itertools.pairwise(starts)
      if max(first, loop.step) < min(end, loop.train_steps)
    ]
    kinds = self.lesson.settings.kinds() if self.lesson else (False,)
    return itertools.product(phases, kinds)

  def _step_fn(
    self, loop: hooks_lib.Loop, first: int, is_on_policy: bool
  ) -> Any:
    """Returns the train step of the phase that begins at step `first`."""
    lesson = self.lesson and dataclasses.replace(
      self.lesson, is_on_policy=is_on_policy
    )
    return self.settings.make(
      loop.system.module,
      self.transform,
      lambda path: (
        self.optimizer.is_trained(path, first) and loop.system.is_trained(path)
      ),
      lesson,
    )


@dataclasses.dataclass
class Compiled:
  """Compiled train steps.

  Attributes:
    steps: the steps before compilation.
    programs: compiled steps by the first step of their phase, `is_on_policy`,
      and batch lengths.
    secs: compilation time.
  """

  steps: Steps
  programs: dict[tuple[int, bool, tuple[int, int]], Any] = dataclasses.field(
    default_factory=dict
  )
  secs: float = 0.0

  def step_fn(self, step: int, lengths: tuple[int, int]) -> Any:
    """Returns the compiled step after `step` others.

    Args:
      step: number of steps done.
      lengths: prompt length and answer length of the batch.
    """
    steps = self.steps
    return self.programs[steps.phase(step), steps.is_on_policy(step), lengths]
