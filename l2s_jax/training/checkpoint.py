# SPDX-License-Identifier: Apache-2.0
"""Saves and restores the state of a run: Orbax, asynchronous, atomic.

What a step's folder holds, and how it is read without a run: see
`weights/saved_steps.py`.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from l2s_jax.runtime import distributed, files, integrity, partitioning
from l2s_jax.training import state as state_lib
from l2s_jax.weights import saved_steps

PyTree = Any
_DELETED = 'deleted'


@dataclasses.dataclass
class _KeepNewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the newest so many steps (None: all), and one more."""

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
  """Orbax's, which leaves it to `runtime/preemption.py` to ask for SIGTERM.

  JAX counts who asks: steps here and the checks there would be mixed up, and a
  SIGTERM between them would be lost.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpointer:
  """Saves and restores the state of one run."""

  def __init__(self, run_dir: str | pathlib.Path, *, keep: int | None = None):
    """Opens the checkpoints of a run; those that are damaged are set apart.

    Args:
      run_dir: the run's folder, made if absent.
      keep: how many of the newest to keep, beside the best; None keeps all.

    Raises:
      DamagedError: if there are checkpoints and none is good.
    """
    self.folder = pathlib.Path(run_dir).absolute() / saved_steps.FOLDER
    _, bad = saved_steps.newest_good(run_dir, saved_steps.ITEMS)
    if distributed.is_first():
      for step in bad:
        _set_apart(self.folder, step)
    distributed.wait_for_all('damaged checkpoints')
    self._policy = _KeepNewestAndBest(keep, saved_steps.best_step(run_dir))
    self._manager = _Manager(
      self.folder,
      item_names=(*saved_steps.ITEMS, 'data'),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        create=True,
        # By a rename: a kill must not leave a step with files missing.
        todelete_subdir=_DELETED,
      ),
    )
    self._empty_deleted()

  def _empty_deleted(self) -> None:
    # The folder stays: Orbax's thread may be about to move a step into it.
    if distributed.is_first():
      for path in (self.folder / _DELETED).glob('*'):
        shutil.rmtree(path, ignore_errors=True)

  def save(
    self,
    state: state_lib.TrainState,
    data: dict[str, Any],
    model: dict[str, Any] | None = None,
  ) -> None:
    """Starts saving; once this returns, all may be changed or donated.

    Args:
      state: to be saved.
      data: for `restore_data`; that JSON can hold.
      model: the system's description, for `description`.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._empty_deleted()
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
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.trainable),
        optimizer=ocp.args.StandardSave(optimizer),
        # A copy: Orbax writes it later, when training has changed it.
        data=ocp.args.JsonSave(
          integrity.seal(
            {**data, saved_steps.DIGESTS: digests, saved_steps.MODEL: model}
          )
        ),
      ),
    )

  def keep_best(self, metric: str, scores: Mapping[int, float]) -> None:
    """Keeps the best step from now on, and notes it for those who ask.

    Args:
      metric: its name; less is better if it ends in 'loss', more otherwise.
      scores: by step; those of steps that are not there any more are passed
        over.
    """
    sign = -1 if metric.endswith('loss') else 1
    saved = scores.keys() & set(self._manager.all_steps())
    if not saved:
      return
    best = max(saved, key=lambda step: (sign * scores[step], -step))
    self._policy.best_step = best
    if distributed.is_first():
      files.write_json(
        self.folder.parent / saved_steps.BEST,
        {'metric': metric, 'score': scores[best], 'step': best},
      )
    # What it was kept for until now may go; Orbax looks when it saves alone.
    self.wait()
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
    """Returns what `save` got as `data` at the newest good step, if any."""
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
    """Returns the newest good state; None if there is none.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`.
      shardings: where to put each array; any mesh, not only that of the save.

    Raises:
      DamagedError: if what was good at the start cannot be read any more.
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
    """Returns when the last save is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()
    if distributed.is_first():
      shutil.rmtree(self.folder / _DELETED, ignore_errors=True)


def _set_apart(folder: pathlib.Path, step: int) -> None:
  """Moves a damaged step to where no new one will meet it."""
  place = folder / saved_steps.DAMAGED / str(step)
  count = 1
  while place.exists():
    count += 1
    place = place.with_name(f'{step}-{count}')
  place.parent.mkdir(exist_ok=True)
  (folder / str(step)).rename(place)
  distributed.say(f'{folder / str(step)} was moved to {place}.')
