# SPDX-License-Identifier: Apache-2.0
"""Starts a training run, or resumes it from its newest checkpoint."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
import tqdm
from flax import traverse_util

from l2s_jax.evaluation import metric_writer
from l2s_jax.models import flops
from l2s_jax.runtime import (
  distributed,
  files,
  gin_config,
  locks,
  partitioning,
  profiling,
)
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint, teachers
from l2s_jax.training import hooks as hooks_lib
from l2s_jax.training import progress as progress_lib
from l2s_jax.training import state as state_lib
from l2s_jax.training import trackers as trackers_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """Settings of a training run: its length and the periods of its hooks.

  Attributes:
    run_dir: folder of the run.
    train_steps: total number of updates; 0 saves the initial model.
    log_period: number of steps between log lines.
    checkpoint_period: number of steps between saves.
    keep_checkpoints: number of newest checkpoints to keep; None keeps all.
    preemption_grace_secs: seconds between SIGTERM and the end of the process.
    profile_steps: first and last step to trace; None traces nothing.
    hooks: hooks of the user.
    trackers: names of trackers; see `trackers.py`.
    began: start time of this process, in seconds since the epoch.
  """

  run_dir: pathlib.Path
  train_steps: int
  log_period: int
  checkpoint_period: int
  keep_checkpoints: int | None
  preemption_grace_secs: int
  profile_steps: Sequence[int] | None
  hooks: Sequence[Any]
  trackers: Sequence[str] = (trackers_lib.TENSORBOARD,)
  began: float = dataclasses.field(default_factory=time.time)

  def __post_init__(self):
    """Checks the settings.

    Raises:
      ValueError: if a setting is invalid.
    """
    if self.train_steps != 0:
      gin_config.check_positive(TRAIN_STEPS=self.train_steps)
    gin_config.check_positive(
      CHECKPOINT_PERIOD=self.checkpoint_period,
      KEEP_CHECKPOINTS=self.keep_checkpoints,
      PREEMPTION_GRACE_SECS=self.preemption_grace_secs,
      log_period=self.log_period,
    )
    profiling.check(self.profile_steps)
    hooks_lib.check(self.hooks)
    trackers_lib.check(self.trackers)

  def metric_writer(self, step: int) -> metric_writer.MetricWriter:
    """Returns the metric writer of a run that resumes after `step`."""
    # The run ended at `step` before, which is not the end of a log period.
    is_off = step % self.log_period and step < self.train_steps
    return metric_writer.MetricWriter(
      self.run_dir,
      first_step=step,
      drop=('train/',) if is_off else (),
      tensorboard=trackers_lib.TENSORBOARD in self.trackers,
    )

  def all_hooks(
    self,
    schedule: optax.Schedule,
    compile_secs: float,
    evaluates: Sequence[hooks_lib.Evaluate],
  ) -> hooks_lib.Hooked:
    """Returns the hooks of the run.

    Args:
      schedule: learning rate by update number, from 0.
      compile_secs: compilation time of the step in seconds, for the log.
      evaluates: hooks of the evaluations.
    """
    constants = {'train/compile_secs': compile_secs}
    return hooks_lib.Hooked(
      in_step=[
        hooks_lib.Profile(self.run_dir, self.profile_steps),
        hooks_lib.Log(self.log_period, schedule, constants),
      ],
      ours=[hooks_lib.SaveCheckpoint(self.checkpoint_period), *evaluates],
      users=[*trackers_lib.hooks(self.trackers, self.run_dir), *self.hooks],
    )


def begin(
  opened: contextlib.ExitStack,
  session: session_lib.Session,
  optimizer: optax.GradientTransformation,
  settings: RunSettings,
  kind: Mapping[str, Any],
  teacher: teachers.Teacher | None = None,
) -> hooks_lib.Loop:
  """Returns the run at its newest checkpoint, or at step 0.

  Args:
    opened: receives the locks and files that it opens.
    session: the system and its layout.
    optimizer: optimizer of the trainable parameters.
    settings: settings of the run.
    kind: settings that determine the order of examples and the optimizer state;
      includes 'seed'.
    teacher: teacher of the run.
  """
  run_dir, train_steps = settings.run_dir, settings.train_steps
  watcher = opened.enter_context(
    distributed.watch_preemption(settings.preemption_grace_secs)
  )
  if distributed.is_first():
    opened.enter_context(locks.held(run_dir, 'MODEL_DIR'))
  system, frozen = parameters.load_frozen(session.system, session.layout)
  watcher.exit_if_requested()
  learned_from, kind = _load_teacher(teacher, system, kind)
  watcher.exit_if_requested()
  run_folder.save(system, run_dir)
  checkpointer = opened.enter_context(
    contextlib.closing(
      checkpoint.Checkpointer(run_dir, keep=settings.keep_checkpoints)
    )
  )
  position = check_position(checkpointer.restore_data(), kind, run_dir)
  state = restore_or_create(
    system, session.layout, optimizer, session.mesh, checkpointer, kind['seed']
  )
  watcher.exit_if_requested()
  step = int(state.step)
  if distributed.is_first():
    gin_config.save_operative_config(run_dir / 'config.gin')
  log = settings.metric_writer(step)
  progress = progress_lib.Progress(
    run_dir,
    position['sums'],
    clock=position.get('clock')
    or {'began': settings.began, 'productive_secs': 0.0},
    example_flops=functools.partial(
      flops.train_flops,
      system.module,
      llm_reads=system.cached_states is None,
    ),
  )
  return hooks_lib.Loop(
    run_dir=run_dir,
    system=system,
    train_steps=train_steps,
    state=state,
    frozen=frozen,
    teacher=learned_from,
    step=step,
    num_rows=position['num_rows'],
    position=position.get('position'),
    kind=kind,
    progress=progress,
    log=opened.enter_context(contextlib.closing(log)),
    bar=opened.enter_context(_bar(run_dir, step, train_steps)),
    checkpointer=checkpointer,
    watcher=watcher,
  )


def _load_teacher(
  teacher: teachers.Teacher | None,
  system: system_lib.System,
  kind: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the teacher's parameters, and `kind` with its identity."""
  if teacher is None:
    return {}, {**kind, 'teacher': None}
  params, found = teacher.load(system)
  return params, {**kind, 'teacher': found}


def check_position(
  position: Mapping[str, Any] | None,
  kind: Mapping[str, Any],
  run_dir: pathlib.Path,
) -> Mapping[str, Any]:
  """Returns the position at which training resumes.

  Args:
    position: position of the checkpoint; None without a checkpoint.
    kind: settings that determine the order of examples and the optimizer state.
    run_dir: folder of the run, for the error message.

  Returns:
    `position`, with at least 'num_rows', 'sums' and 'clock'.

  Raises:
    ValueError: if `kind` differs from the checkpoint's; lists the differences.
  """
  if position is None:
    return {'num_rows': 0, 'sums': {}, 'clock': None}
  if 'begun_elsewhere' in position:  # Another program ordered the examples.
    kind = {'optimizer': kind['optimizer']}
  differences = files.differences(
    {name: position.get(name) for name in kind}, kind
  )
  if differences:
    raise ValueError(
      f'{run_dir} contains a run that was trained with other settings: its '
      'position in the data, its optimizer state or its teacher does not fit '
      'the present ones. Restore these settings, or choose another MODEL_DIR:\n'
      + '\n'.join(differences)
    )
  return position


def restore_or_create(
  system: system_lib.System,
  layout: parameters.Layout,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  checkpointer: checkpoint.Checkpointer,
  seed: int,
) -> state_lib.TrainState:
  """Returns the newest train state of the run, or the initial one.

  Pretrained parameters are read and the others initialized, so that no
  parameter is in memory twice.
  """
  shapes, shardings = _state_shapes(system, layout, optimizer, mesh)
  restored = checkpointer.restore(shapes, shardings)
  if restored is not None:
    return restored
  create = jax.jit(
    lambda trainable: state_lib.create(trainable, optimizer, seed),
    out_shardings=shardings,
  )
  return create(first_params(system, layout, seed))


def first_params(
  system: system_lib.System, layout: parameters.Layout, seed: int
) -> PyTree:
  """Returns the trainable parameters at step 0.

  Args:
    system: the system.
    layout: layout of its parameters.
    seed: seed of the parameters that are not pretrained.
  """
  params = parameters.load_pretrained(system, layout)
  known = traverse_util.flatten_dict(params, sep='/')
  _, shardings = parameters.split(layout.shardings, system.frozen)
  fresh, _ = parameters.split_by_path(shardings, lambda path: path not in known)
  if fresh:
    init = functools.partial(
      parameters.init,
      system,
      only=traverse_util.flatten_dict(fresh, sep='/').__contains__,
    )
    params = parameters.merge(params, state_lib.init_params(init, seed, fresh))
  return params


def _state_shapes(
  system: system_lib.System,
  layout: parameters.Layout,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[state_lib.TrainState, state_lib.TrainState]:
  """Returns the shapes and shardings of the train state."""
  _, shapes = parameters.split(layout.shapes, system.frozen)
  _, shardings = parameters.split(layout.shardings, system.frozen)
  return state_lib.shardings(shapes, shardings, optimizer, mesh)


def optimizer_bytes(
  session: session_lib.Session, optimizer: optax.GradientTransformation
) -> int:
  """Returns the size of the optimizer state on a device, in bytes."""
  shapes, shardings = _state_shapes(
    session.system, session.layout, optimizer, session.mesh
  )
  return partitioning.bytes_per_device(shapes.opt_state, shardings.opt_state)


def _bar(run_dir: pathlib.Path, step: int, train_steps: int) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=train_steps,
    initial=step,
    desc=run_dir.name,
    unit='step',
    dynamic_ncols=True,
    disable=not distributed.is_first(),
  )
