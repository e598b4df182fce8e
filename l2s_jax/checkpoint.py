# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: Orbax, asynchronous, atomic.

A step's folder holds three items: `params`, the trained parameters alone;
`optimizer`, with the step and the PRNG key; and `data`, the position of the
last batch trained on, with the digests of all arrays and of itself. The frozen
LLM is not among them.

A step is compared with its digests before it is read. Where a step was not
asked for, the newest good one is taken, and both are named.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from l2s_jax import distributed, files, integrity, partition
from l2s_jax import state as state_lib

PyTree = Any

FOLDER = 'checkpoints'
BEST = 'best.json'
_DELETED = 'deleted'
# Where training puts steps that are damaged, out of the way of new ones.
DAMAGED = 'damaged'
ITEMS = ('params', 'optimizer')
_DIGESTS = 'digests'
_MODEL = 'model'
# What Orbax and TensorStore raise where files are missing, cut or changed.
_READING_ERRORS = (
  ValueError,
  KeyError,
  IndexError,
  TypeError,
  AttributeError,
  OSError,
)


class DamagedError(ValueError):
  """A checkpoint is not as it was saved."""


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
    """Opens the checkpoints of a run; those that are damaged are set apart.

    Args:
      run_dir: the run's folder, made if absent.
      keep: how many of the newest to keep, beside the best; None keeps all.

    Raises:
      DamagedError: if there are checkpoints and none is good.
    """
    self.folder = pathlib.Path(run_dir).absolute() / FOLDER
    _, bad = _newest_good(run_dir, ITEMS)
    if distributed.is_first():
      for step in bad:
        _set_apart(self.folder, step)
    distributed.wait_for_all('damaged checkpoints')
    self._policy = _KeepNewestAndBest(keep, best_step(run_dir))
    self._manager = _Manager(
      self.folder,
      item_names=(*ITEMS, 'data'),
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
      for item, tree in zip(ITEMS, (state.trainable, optimizer), strict=True)
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.trainable),
        optimizer=ocp.args.StandardSave(optimizer),
        # A copy: Orbax writes it later, when training has changed it.
        data=ocp.args.JsonSave(
          integrity.seal({**data, _DIGESTS: digests, _MODEL: model})
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
    """Returns what `save` got as `data` at the newest good step, if any."""
    step = self._manager.latest_step()
    if step is None:
      return None
    data = _read_data(self.folder / str(step))
    return {
      key: value for key, value in data.items() if key not in (_DIGESTS, _MODEL)
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
    target = partition.with_shardings(shapes, shardings)
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
    with _reading(self.folder / str(step)):
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
  """Returns the best step by the evaluations of the training, if it chose.

  Raises:
    ValueError: if the file that says so is broken.
  """
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
  """Returns the folder of a run's good parameters at a step, and the step.

  Args:
    run_dir: the run.
    step: None takes the newest that is as it was saved, 'best' the best in the
      evaluations of the training (BEST_METRIC).

  Raises:
    FileNotFoundError: names the run and the steps it has.
    DamagedError: if the step that was asked for, or every step, is damaged.
  """
  folder = pathlib.Path(run_dir).absolute() / FOLDER
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
    step, _ = _newest_good(run_dir, ITEMS[:1])
  elif step in found:
    if wrong := problem(run_dir, step):
      others = [other for other in found if other != step]
      raise DamagedError(
        f'{wrong}. Name another step of {others}, or copy this one again from '
        'where it was made.'
      )
  elif step is not None:
    wanted = f'the checkpoint {step}'
  if step not in found:
    raise FileNotFoundError(
      f'{run_dir} does not hold {wanted}; it has steps {found}. Name the '
      'folder of a run that was trained (the one with model.json).'
    )
  assert step is not None
  return folder / str(step) / 'params', step


def _newest_good(
  run_dir: str | pathlib.Path, items: Sequence[str]
) -> tuple[int | None, list[int]]:
  """Returns the newest step that is as it was saved, and the bad ones after it.

  What is passed over is said, with the step that is taken instead.

  Raises:
    DamagedError: if there are steps and none is good.
  """
  # In all processes the same: the run may go on, and save, at this moment.
  found = distributed.from_first(steps(run_dir))
  bad: dict[int, str] = {}
  for step in reversed(found):
    if wrong := problem(run_dir, step, items):
      bad[step] = wrong
      continue
    for sentence in bad.values():
      distributed.say(f'{sentence}: step {step} is taken in its place.')
    return step, list(bad)
  if bad:
    raise DamagedError(
      'no checkpoint of this run is as it was saved: '
      + '; '.join(bad.values())
      + f'. Copy one again into {pathlib.Path(run_dir) / FOLDER}, or remove '
      'that folder to train from the start.'
    )
  return None, []


def problem(
  run_dir: str | pathlib.Path, step: int, items: Sequence[str] = ITEMS[:1]
) -> str | None:
  """Returns a sentence on what is wrong with a step; None if it is good.

  Every array is read and compared with its digest; processes share the arrays
  out among them, and all get the same answer. A step of an earlier version has
  no digests: it must be readable, and that it is unchecked is said.

  Args:
    run_dir: the run.
    step: one of `steps`.
    items: what of the step is to be read.
  """
  folder = pathlib.Path(run_dir).absolute() / FOLDER / str(step)
  if not integrity.verification():
    return None
  try:
    return _problem(folder, tuple(items), _state_of_files(folder))
  except FileNotFoundError:
    return f'the checkpoint {folder} was removed while it was read'


def _state_of_files(folder: pathlib.Path) -> tuple[Any, ...]:
  """Returns what changes when a file of a folder does."""
  stats = ((path, path.stat()) for path in sorted(folder.rglob('*')))
  return tuple(
    (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    for path, stat in stats
  )


@functools.lru_cache(maxsize=64)
def _problem(
  folder: pathlib.Path, items: tuple[str, ...], _: tuple[Any, ...]
) -> str | None:
  wrong = _problem_here(folder, items)
  everywhere = distributed.gather([wrong] if wrong else [])
  return everywhere[0] if everywhere else None


def _problem_here(folder: pathlib.Path, items: Sequence[str]) -> str | None:
  """Returns what this process finds wrong with its part of a step."""
  try:
    data = _read_data(folder)
    saved_nsecs(folder / items[0])
    names = {
      item: ['/'.join(path) for path in array_shapes(folder / item)]
      for item in items
    }
  except (DamagedError, FileNotFoundError) as error:
    return f'the checkpoint {folder} is damaged: {_first_line(error)}'
  digests = data.get(_DIGESTS)
  if digests is None:
    distributed.say(
      f'{folder} was saved by an earlier version, without digests; it is read '
      'unchecked.'
    )
    digests = {item: {name: {} for name in names[item]} for item in items}
  for item in items:
    if sorted(names[item]) != sorted(digests[item]):
      return (
        f'the checkpoint {folder} is damaged: {item} does not list the arrays '
        'that were saved'
      )
    share = sorted(digests[item])[jax.process_index() :: jax.process_count()]
    bad = integrity.damaged(
      {name: digests[item][name] for name in share},
      functools.partial(_open_array, folder / item),
    )
    if bad:
      return (
        f'the checkpoint {folder} is damaged: {len(bad)} of '
        f'{len(names[item])} arrays of {item} are not as they were saved, '
        f'the first {bad[0]}'
      )
  return None


def _open_array(folder: pathlib.Path, name: str) -> Any:
  """Returns an array of an item that is read where it is indexed."""
  return tensorstore.open(
    {
      'driver': 'zarr',
      'kvstore': {
        'driver': 'ocdbt',
        'base': f'file://{folder}/',
        'path': f'{name.replace("/", ".")}/',
      },
    },
    open=True,
    read=True,
  ).result()


def _read_data(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the item `data` of a step as it was saved.

  Raises:
    DamagedError: if it is not.
  """
  path = folder / 'data' / 'metadata'
  try:
    data = files.read_json(path, remedy='copy the checkpoint again')
  except (ValueError, FileNotFoundError) as error:
    raise DamagedError(str(error)) from error
  if not integrity.is_sealed(data):
    return data
  if (content := integrity.unseal(data)) is None:
    raise DamagedError(f'{path} is not as it was saved')
  return content


def description(run_dir: str | pathlib.Path) -> dict[str, Any] | None:
  """Returns the model's description as the newest readable step keeps it."""
  for step in reversed(steps(run_dir)):
    folder = pathlib.Path(run_dir).absolute() / FOLDER / str(step)
    with contextlib.suppress(DamagedError):
      if model := _read_data(folder).get(_MODEL):
        return model
  return None


def _set_apart(folder: pathlib.Path, step: int) -> None:
  """Moves a damaged step to where no new one will meet it."""
  place = folder / DAMAGED / str(step)
  count = 1
  while place.exists():
    count += 1
    place = place.with_name(f'{step}-{count}')
  place.parent.mkdir(exist_ok=True)
  (folder / str(step)).rename(place)
  distributed.say(f'{folder / str(step)} was moved to {place}.')


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
  """Says what could not be read, where a library would say how."""
  try:
    yield
  except DamagedError:
    raise
  except _READING_ERRORS as error:
    raise DamagedError(
      f'{folder} could not be read: {_first_line(error)}'
    ) from error


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300].rstrip('.')


def saved_nsecs(params: pathlib.Path) -> int:
  """Returns when a step was saved, which a copy of it keeps.

  Args:
    params: from `params_folder`.
  """
  with _reading(params.parent):
    found = ocp.metadata.get_step_metadata(params.parent).init_timestamp_nsecs
    if found is None:
      raise DamagedError(
        f'{params.parent} lacks what Orbax notes of a step: when it was saved'
      )
    return found


def restore_params(
  run_dir: str | pathlib.Path, step: int, shapes: PyTree, shardings: PyTree
) -> PyTree:
  """Returns the trained parameters of one step, sharded as asked."""
  folder, _ = params_folder(run_dir, step)
  target = partition.with_shardings(shapes, shardings)
  with _reading(folder), ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder, target)


def read_arrays(
  folder: pathlib.Path, paths: list[tuple[str, ...]]
) -> dict[tuple[str, ...], np.ndarray]:
  """Reads single arrays of a checkpoint into host memory."""
  with _reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
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
  with _reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(folder).item_metadata.tree
    leaves = jax.tree_util.tree_leaves_with_path(metadata)
    return {
      tuple(integrity.name(path).split('/')): jax.ShapeDtypeStruct(
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
