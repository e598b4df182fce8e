# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: Orbax, asynchronous, atomic.

A step's folder holds three items: `params`, the trained parameters alone;
`optimizer`, with the step and the PRNG key; and `data`, the position of the
last batch trained on. The frozen LLM is not among them.
"""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from l2s_jax import state as state_lib

PyTree = Any

FOLDER = 'checkpoints'


class Checkpointer:
  """Saves and restores the state of one run."""

  def __init__(self, run_dir: str | pathlib.Path, *, keep: int | None = None):
    """Opens the checkpoints of a run.

    Args:
      run_dir: the run's folder, made if absent.
      keep: how many of the newest to keep; None keeps all.
    """
    self.folder = pathlib.Path(run_dir).absolute() / FOLDER
    self._manager = ocp.CheckpointManager(
      self.folder,
      item_names=('params', 'optimizer', 'data'),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def save(self, state: state_lib.TrainState, data: dict[str, Any]) -> None:
    """Starts saving; the state may be donated as soon as this returns."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.trainable),
        optimizer=ocp.args.StandardSave(
          {'opt_state': state.opt_state, 'step': state.step, 'key': state.key}
        ),
        data=ocp.args.JsonSave(data),
      ),
    )

  def restore(
    self, shapes: state_lib.TrainState, shardings: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, dict[str, Any]] | None:
    """Returns the newest state and data position; None if there is none.

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
        data=ocp.args.JsonRestore(),
      ),
    )
    optimizer = restored['optimizer']
    state = state_lib.TrainState(
      step=optimizer['step'],
      trainable=restored['params'],
      opt_state=optimizer['opt_state'],
      key=optimizer['key'],
    )
    return state, restored['data']

  def wait(self) -> None:
    """Returns when the last save is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


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


def params_folder(
  run_dir: str | pathlib.Path, step: int | None = None
) -> tuple[pathlib.Path, int]:
  """Returns the folder of a run's parameters at `step` (the newest if None).

  Raises:
    FileNotFoundError: names the run and the steps it has.
  """
  found = steps(run_dir)
  if not found or (step is not None and step not in found):
    wanted = 'a checkpoint' if step is None else f'the checkpoint {step}'
    raise FileNotFoundError(
      f'{run_dir} does not hold {wanted}; it has steps {found}. Name the '
      'folder of a run that was trained (the one with model.json).'
    )
  step = found[-1] if step is None else step
  return pathlib.Path(run_dir).absolute() / FOLDER / str(step) / 'params', step


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
