# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: Orbax, asynchronous, atomic.

A step's folder holds three items: `params`, the trained parameters alone;
`optimizer`, with the step and the PRNG key; and `data`, the position of the
last batch trained on. The frozen LLM is not among them.
"""

import copy
import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from l2s_jax import distributed, files
from l2s_jax import state as state_lib

PyTree = Any

FOLDER = 'checkpoints'
BEST = 'best.json'
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
  """Orbax's, which leaves it to `preemption.py` to ask for SIGTERM.

  JAX counts who asks: steps here and the checks there would be mixed up, and a
  SIGTERM between them would be lost.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpointer:
  """Saves and restores the state of one run."""

  def __init__(self, run_dir: str | pathlib.Path, *, keep: int | None = None):
    """Opens the checkpoints of a run.

    Args:
      run_dir: the run's folder, made if absent.
      keep: how many of the newest to keep, beside the best; None keeps all.
    """
    self.folder = pathlib.Path(run_dir).absolute() / FOLDER
    self._policy = _KeepNewestAndBest(keep, best_step(run_dir))
    self._manager = _Manager(
      self.folder,
      item_names=('params', 'optimizer', 'data'),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        create=True,
        # By a rename: a kill must not leave a step with files missing.
        todelete_subdir=_DELETED,
      ),
    )
    self._empty_deleted()

  def _empty_deleted(self) -> None:
    if distributed.is_first():
      shutil.rmtree(self.folder / _DELETED, ignore_errors=True)

  def save(self, state: state_lib.TrainState, data: dict[str, Any]) -> None:
    """Starts saving; once this returns, both may be changed or donated."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._empty_deleted()
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.trainable),
        optimizer=ocp.args.StandardSave(
          {'opt_state': state.opt_state, 'step': state.step, 'key': state.key}
        ),
        # Orbax writes it later, when training has changed it.
        data=ocp.args.JsonSave(copy.deepcopy(data)),
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
        self.folder.parent / BEST,
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
    """Returns what `save` got as `data` at the newest step, if any."""
    step = self._manager.latest_step()
    if step is None:
      return None
    args = ocp.args.Composite(data=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)['data']

  def restore(
    self, shapes: state_lib.TrainState, shardings: state_lib.TrainState
  ) -> state_lib.TrainState | None:
    """Returns the newest state; None if there is none.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`.
      shardings: where to put each array; any mesh, not only that of the save.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    target = jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=sharding
      ),
      shapes,
      shardings,
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(target.trainable),
        optimizer=ocp.args.StandardRestore(
          {
            'opt_state': target.opt_state,
            'step': target.step,
            'key': target.key,
          }
        ),
      ),
    )
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
    self._empty_deleted()


def steps(run_dir: str | pathlib.Path) -> list[int]:
  """Returns the steps of a run that were saved whole, ascending."""
  folder = pathlib.Path(run_dir).absolute() / FOLDER
  if not folder.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in folder.iterdir()
    if path.name.isdigit() and ocp.path.step.is_checkpoint_finalized(path)
  )


def best_step(run_dir: str | pathlib.Path) -> int | None:
  """Returns the best step by the evaluations of the training, if it chose."""
  path = pathlib.Path(run_dir) / BEST
  if not path.exists():
    return None
  found = files.read_json(
    path,
    keys={'step': int},
    remedy='remove it (training writes it anew after its next evaluation), '
    'or name a step.',
  )
  return found['step']


def params_folder(
  run_dir: str | pathlib.Path, step: int | Literal['best'] | None = None
) -> tuple[pathlib.Path, int]:
  """Returns the folder of a run's parameters at a step, and the step.

  Args:
    run_dir: the run.
    step: None takes the newest, 'best' the best in the evaluations of the
      training (BEST_METRIC).

  Raises:
    FileNotFoundError: names the run and the steps it has.
  """
  found = steps(run_dir)
  wanted = 'a checkpoint'
  if step == 'best':
    step = best_step(run_dir)
    if step is None:
      raise FileNotFoundError(
        f'{run_dir} has no best checkpoint: it was trained without '
        f'BEST_METRIC, or not evaluated yet. It has steps {found}.'
      )
  if step is None and found:
    step = found[-1]
  elif step is not None:
    wanted = f'the checkpoint {step}'
  if step not in found:
    raise FileNotFoundError(
      f'{run_dir} does not hold {wanted}; it has steps {found}. Name the '
      'folder of a run that was trained (the one with model.json).'
    )
  assert step is not None
  return pathlib.Path(run_dir).absolute() / FOLDER / str(step) / 'params', step


def saved_nsecs(params: pathlib.Path) -> int:
  """Returns when a step was saved, which a copy of it keeps.

  Args:
    params: from `params_folder`.
  """
  return ocp.metadata.get_step_metadata(params.parent).init_timestamp_nsecs


def restore_params(
  run_dir: str | pathlib.Path, step: int, shapes: PyTree, shardings: PyTree
) -> PyTree:
  """Returns the trained parameters of one step, sharded as asked."""
  folder, _ = params_folder(run_dir, step)
  target = jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(
      s.shape, s.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder, target)


def read_arrays(
  folder: pathlib.Path, paths: list[tuple[str, ...]]
) -> dict[tuple[str, ...], np.ndarray]:
  """Reads single arrays of a checkpoint into host memory."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    item = _nest({path: 0 for path in paths})
    restored = checkpointer.restore(
      folder,
      args=ocp.args.PyTreeRestore(
        item=item,
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item
        ),
        partial_restore=True,
      ),
    )
  return {path: _at(restored, path) for path in paths}


def array_shapes(
  folder: pathlib.Path,
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  """Returns path, shape and dtype of every array of a checkpoint."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(folder).item_metadata.tree
  leaves = jax.tree_util.tree_leaves_with_path(metadata)
  return {
    tuple(str(key.key) for key in path): jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype
    )
    for path, leaf in leaves
  }


def _nest(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = value
  return tree


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  for name in path:
    tree = tree[name]
  return tree
