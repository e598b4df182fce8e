# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: Orbax, asynchronous and atomic.

`weights/saved_steps.py` describes the files of a step, and reads them without a
run.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from l2s_jax.metrics import metric_fns
from l2s_jax.runtime import (
  distributed,
  files,
  integrity,
  os_errors,
  partitioning,
  storage,
)
from l2s_jax.training import state as state_lib
from l2s_jax.weights import run_format, saved_steps

PyTree = Any
_DELETED = 'deleted'


@dataclasses.dataclass
class _KeepNewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the newest `num_newest` checkpoints (None: all) and the best one."""

  num_newest: int | None
  best_step: int | None = None

  def should_preserve(self, checkpoints, *, context):
    newest = ocp.checkpoint_managers.LatestN(self.num_newest)
    return [
      is_new or checkpoint.step == self.best_step
      for checkpoint, is_new in zip(
        checkpoints,
        newest.should_preserve(checkpoints, context=context),
        strict=True,
      )
    ]


class _Manager(ocp.CheckpointManager):
  """An Orbax manager that does not handle SIGTERM.

  `runtime/preemption.py` does. JAX counts the calls of its preemption check:
  calls from both places would be mixed up, and a SIGTERM could be lost.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


def check_folder(model_dir: str) -> pathlib.Path:
  """Validates MODEL_DIR, the folder of a run; it need not exist.

  Raises:
    ValueError: if it is not of a run, or checkpoints cannot be there.
  """
  folder = files.folder(model_dir, 'MODEL_DIR')
  run_format.refuse_other(folder, 'MODEL_DIR', run_format.RUN)
  if storage.scheme(folder) not in (None, 'gs'):
    raise ValueError(
      f'MODEL_DIR={model_dir}: checkpoints are saved in local folders or in '
      'gs://, since Orbax opens no other store; give one of these.'
    )
  return folder


class Checkpointer:
  """Saves and restores checkpoints of one run."""

  def __init__(self, run_dir: str | pathlib.Path, *, keep: int | None = None):
    """Opens the checkpoints of a run, and moves damaged ones away.

    Args:
      run_dir: the run's folder, made if absent.
      keep: number of newest checkpoints to keep, beside the best; None keeps
        all.

    Raises:
      DamagedError: if all existing checkpoints are damaged.
    """
    self.folder = storage.of(run_dir).absolute() / saved_steps.FOLDER
    _, bad = saved_steps.newest_good(run_dir, saved_steps.ITEMS)
    if distributed.is_first():
      for step in bad:
        _set_apart(self.folder, step)
    distributed.wait_for_all('damaged checkpoints')
    self._policy = _KeepNewestAndBest(keep, saved_steps.best_step(run_dir))
    # Deletion from a bucket begins with the commit file, so that a checkpoint
    # that is partly deleted does not count. Orbax deletes in any order.
    self._deletes = isinstance(self.folder, storage.BucketPath)
    self._manager = _Manager(
      storage.for_library(self.folder),
      item_names=(*saved_steps.ITEMS, 'data'),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(None)
        if self._deletes
        else self._policy,
        create=True,
        # Orbax then renames before it deletes: a killed process leaves no
        # checkpoint with missing files.
        todelete_subdir=_DELETED,
      ),
    )
    # A start that is refused deletes nothing.
    self._has_saved = False
    self._empty_deleted()

  def _empty_deleted(self) -> None:
    """Deletes the content of the folder of deleted checkpoints."""
    # The folder itself stays: Orbax's thread may be moving a step into it.
    if distributed.is_first() and not self._deletes:
      for path in (self.folder / _DELETED).glob('*'):
        shutil.rmtree(path, ignore_errors=True)

  def _delete_old(self) -> None:
    """Deletes from a bucket all checkpoints that are not kept.

    An incomplete one, as a killed process leaves it, is overwritten by the save
    of its step.
    """
    if not self._deletes:
      return
    distributed.wait_for_all('old checkpoints')
    if distributed.is_first():
      steps = saved_steps.steps(self.folder.parent)
      newest = (
        steps
        if self._policy.num_newest is None
        else steps[-self._policy.num_newest :]
      )
      for step in sorted(set(steps) - {*newest, self._policy.best_step}):
        files.remove_folder(self.folder / str(step))
    distributed.wait_for_all('deleted checkpoints')

  def save(
    self,
    state: state_lib.TrainState,
    data: dict[str, Any],
    model: dict[str, Any] | None = None,
  ) -> None:
    """Starts an asynchronous save; afterwards all arguments may be changed.

    Args:
      state: the train state; its arrays may be donated.
      data: JSON-serialisable; returned by `restore_data`.
      model: the system's description, for readers of the checkpoint.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._empty_deleted()
    self._has_saved = True
    if self._deletes:
      self.wait()  # The save before is complete now, and others not kept.
      self._delete_old()
    optimizer = {
      'opt_state': state.opt_state,
      'step': state.step,
      'key': state.key,
    }
    digests = {
      item: integrity.digests(tree)
      for item, tree in zip(
        saved_steps.ITEMS, (state.trainable, optimizer), strict=True
      )
    }
    with os_errors.naming(self.folder):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.trainable),
          optimizer=ocp.args.StandardSave(optimizer),
          # A copy: Orbax writes it later, while training changes `data`.
          data=ocp.args.JsonSave(
            integrity.seal(
              {**data, saved_steps.DIGESTS: digests, saved_steps.MODEL: model}
            )
          ),
        ),
      )

  def keep_best(self, metric: str, scores: Mapping[int, float]) -> None:
    """Keeps the best checkpoint from now on, and records it on disk.

    Args:
      metric: its name; `metric_fns.lower_is_better` gives its direction.
      scores: by step; steps without a checkpoint are ignored.
    """
    sign = -1 if metric_fns.lower_is_better(metric) else 1
    saved = scores.keys() & set(self._manager.all_steps())
    if not saved:
      return
    best = max(saved, key=lambda step: (sign * scores[step], -step))
    self._policy.best_step = best
    if distributed.is_first():
      files.write_json(
        self.folder.parent / saved_steps.BEST,
        integrity.seal({'metric': metric, 'score': scores[best], 'step': best}),
      )
    # Delete checkpoints that are not kept any more; Orbax does so only on save.
    self.wait()
    if self._deletes:
      self._delete_old()
      return
    steps = self._manager.all_steps()
    newest = (
      steps
      if self._policy.num_newest is None
      else steps[-self._policy.num_newest :]
    )
    for step in set(steps) - {*newest, best}:
      self._manager.delete(step)
    self._empty_deleted()

  def restore_data(self) -> dict[str, Any] | None:
    """Returns the `data` of the newest good checkpoint, or None."""
    step = self._manager.latest_step()
    if step is None:
      return None
    data = saved_steps.read_data(self.folder / str(step))
    return {
      key: value
      for key, value in data.items()
      if key not in (saved_steps.DIGESTS, saved_steps.MODEL)
    }

  def restore(
    self, shapes: state_lib.TrainState, shardings: state_lib.TrainState
  ) -> state_lib.TrainState | None:
    """Restores the newest good train state, or returns None.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`.
      shardings: sharding of each array; the mesh may differ from the saved one.

    Raises:
      DamagedError: if the checkpoint was damaged after it was opened.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    target = partitioning.with_shardings(shapes, shardings)
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(target.trainable),
      optimizer=ocp.args.StandardRestore(
        {
          'opt_state': target.opt_state,
          'step': target.step,
          'key': target.key,
        }
      ),
    )
    with saved_steps.reading(self.folder / str(step)):
      restored = self._manager.restore(step, args=args)
    return state_lib.TrainState(
      step=restored['optimizer']['step'],
      trainable=restored['params'],
      opt_state=restored['optimizer']['opt_state'],
      key=restored['optimizer']['key'],
    )

  def wait(self) -> None:
    """Waits until the last save is on disk."""
    with os_errors.naming(self.folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for saves and closes Orbax's manager."""
    try:
      self.wait()
      # After an exception in one process, others may not arrive here.
      if self._has_saved and sys.exc_info()[0] is None:
        self._delete_old()
    finally:
      self._manager.close()
    if distributed.is_first() and not self._deletes:
      shutil.rmtree(self.folder / _DELETED, ignore_errors=True)


def _set_apart(folder: pathlib.Path, step: int) -> None:
  """Moves a damaged checkpoint to the folder of damaged ones."""
  place = folder / saved_steps.DAMAGED / str(step)
  count = 1
  while place.exists():
    count += 1
    place = place.with_name(f'{step}-{count}')
  files.move_folder(folder / str(step), place)
  distributed.say(f'{folder / str(step)} was moved to {place}.')
