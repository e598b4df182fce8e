# SPDX-License-Identifier: Apache-2.0
"""Reading and verifying the checkpoints of a run.

The folder of a step holds three items: `params`, the trained parameters only;
`optimizer`, with the optimizer state, the step and the PRNG key; and `data`,
with the position of the input pipeline after the last trained batch, the
digests of all arrays, and a digest of itself. The frozen LLM is not part of a
checkpoint. `training/checkpoint.py` writes checkpoints.

A checkpoint is compared with its digests before it is read. If no step was
requested, the newest undamaged step is read; skipped and selected steps are
logged.
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from l2s_jax.runtime import (
  distributed,
  files,
  integrity,
  os_errors,
  partitioning,
  storage,
)

PyTree = Any

FOLDER = 'checkpoints'
BEST = 'best.json'
# Subfolder to which training moves damaged checkpoints.
DAMAGED = 'damaged'
ITEMS = ('params', 'optimizer')
DIGESTS = 'digests'
MODEL = 'model'
# Exceptions of Orbax and TensorStore for missing, truncated or changed files.
_READING_ERRORS = (
  ValueError,
  KeyError,
  IndexError,
  TypeError,
  AttributeError,
  RuntimeError,
  OSError,
)


class DamagedError(ValueError):
  """A checkpoint is damaged: it differs from the saved one."""


def steps(run_dir: str | pathlib.Path) -> list[int]:
  """Returns the steps of all complete checkpoints of a run, ascending."""
  folder = storage.of(run_dir).absolute() / FOLDER
  if not folder.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in folder.iterdir()
    if path.name.isdigit() and _is_complete(path)
  )


def check_readable(run_dir: str | pathlib.Path) -> None:
  """Refuses a run in a bucket whose arrays Orbax does not open.

  Raises:
    ValueError: names the path.
  """
  if storage.scheme(run_dir) not in (None, 'gs'):
    raise ValueError(
      f'{run_dir}: checkpoints of runs are in local folders or in gs://, since '
      'Orbax opens no other store. Copy the run, or give a converted folder.'
    )


def _is_complete(step_folder: pathlib.Path) -> bool:
  if isinstance(step_folder, storage.BucketPath):
    return (step_folder / storage.COMMIT).exists()
  return ocp.path.step.is_checkpoint_finalized(step_folder)


def best_step(run_dir: str | pathlib.Path) -> int | None:
  """Returns the best step by the evaluations during training, or None.

  None means that training selected no best step yet (`BEST_METRIC`).

  Raises:
    ValueError: if `best.json` is damaged or was changed.
  """
  path = storage.of(run_dir) / BEST
  if not path.exists():
    return None
  remedy = (
    'remove it (training writes it again after its next evaluation), or give a '
    'step.'
  )
  found = files.read_json(path, keys={'step': int}, remedy=remedy)
  if integrity.is_sealed(found):
    found = integrity.unsealed(found, path, remedy)
  return found['step']


def params_folder(
  run_dir: str | pathlib.Path, step: int | Literal['best'] | None = None
) -> tuple[pathlib.Path, int]:
  """Returns the folder of verified parameters, and their step.

  Args:
    run_dir: the run.
    step: a step; None selects the newest undamaged checkpoint, 'best' the best
      checkpoint by the evaluations during training (`BEST_METRIC`).

  Raises:
    FileNotFoundError: if there is no such checkpoint; lists the existing steps.
    DamagedError: if the requested checkpoint, or every checkpoint, is damaged.
  """
  check_readable(run_dir)
  folder = storage.of(run_dir).absolute() / FOLDER
  found = steps(run_dir)
  wanted = 'a checkpoint'
  if step == 'best':
    step = best_step(run_dir)
    if step is None:
      raise FileNotFoundError(
        f'{run_dir} has no best checkpoint: it was trained without '
        f'BEST_METRIC, or is not evaluated yet. It has steps {found}.'
      )
  if step is None and found:
    step, _ = newest_good(run_dir, ITEMS[:1])
  elif step in found:
    if wrong := problem(run_dir, step):
      others = [other for other in found if other != step]
      raise DamagedError(
        f'{wrong}. Choose another step of {others}, or copy this one again '
        'from the original run.'
      )
  elif step is not None:
    wanted = f'the checkpoint {step}'
  if step not in found:
    remedy = (
      'Choose one of these steps.'
      if found
      else 'Give the folder of a trained run (the one with model.json).'
    )
    raise FileNotFoundError(
      f'{run_dir} does not have {wanted}; it has steps {found}. {remedy}'
    )
  assert step is not None
  return folder / str(step) / 'params', step


def newest_good(
  run_dir: str | pathlib.Path, items: Sequence[str]
) -> tuple[int | None, list[int]]:
  """Returns the newest undamaged step and the damaged steps after it.

  Each damaged checkpoint is logged with the step used instead. All processes
  must call it.

  Args:
    run_dir: the run.
    items: items of a checkpoint to verify, see `problem`.

  Returns:
    The step, or None if there are no checkpoints; and the newer, damaged steps,
    newest first.

  Raises:
    DamagedError: if there are checkpoints and all are damaged.
  """
  # All processes use one list: a running training may save at this moment.
  found = distributed.from_first(steps(run_dir))
  bad: dict[int, str] = {}
  for step in reversed(found):
    if wrong := problem(run_dir, step, items):
      bad[step] = wrong
      continue
    for sentence in bad.values():
      distributed.say(f'{sentence}: step {step} is used instead.')
    return step, list(bad)
  if bad:
    raise DamagedError(
      'all checkpoints of this run are damaged: '
      + '; '.join(bad.values())
      + f'. Copy one again into {storage.of(run_dir) / FOLDER}, or remove '
      'that folder to train from the start.'
    )
  return None, []


def problem(
  run_dir: str | pathlib.Path, step: int, items: Sequence[str] = ITEMS[:1]
) -> str | None:
  """Returns a description of the damage of a checkpoint, or None.

  Every array is read and compared with its digest. The arrays are divided among
  the processes, and all processes get the same result, so all must call it. A
  checkpoint of an earlier version has no digests: its arrays must be readable,
  and a message says that they are not verified.

  Args:
    run_dir: the run.
    step: one of `steps(run_dir)`.
    items: items of the checkpoint to verify.
  """
  folder = storage.of(run_dir).absolute() / FOLDER / str(step)
  if not integrity.verification():
    return None
  try:
    return _problem(folder, tuple(items), _state_of_files(folder))
  except FileNotFoundError:
    return f'the checkpoint {folder} was removed during reading'


def _state_of_files(folder: pathlib.Path) -> tuple[Any, ...]:
  """Returns path, size, mtime and inode of each file, as a cache key."""
  if isinstance(folder, storage.BucketPath):
    return tuple((str(path), version) for path, version in folder.objects())
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
  if wrong and isinstance(folder, storage.BucketPath):
    # Orbax may have met an error of the store, and reported something else.
    folder.check_readable()
    wrong = _problem_here(folder, items)
  everywhere = distributed.gather([wrong] if wrong else [])
  return everywhere[0] if everywhere else None


def _problem_here(folder: pathlib.Path, items: Sequence[str]) -> str | None:
  """Returns the damage found in this process's share of a checkpoint."""
  try:
    data = read_data(folder)
    saved_nsecs(folder / items[0])
    names = {
      item: ['/'.join(path) for path in array_shapes(folder / item)]
      for item in items
    }
  except (DamagedError, FileNotFoundError) as error:
    return f'the checkpoint {folder} is damaged: {os_errors.first_line(error)}'
  digests = data.get(DIGESTS)
  if digests is None:
    distributed.say(
      f'{folder} was saved by an earlier version, without digests; it is read '
      'without verification.'
    )
    digests = {item: {name: {} for name in names[item]} for item in items}
  for item in items:
    if sorted(names[item]) != sorted(digests[item]):
      return (
        f'the checkpoint {folder} is damaged: {item} does not list the saved '
        'arrays'
      )
    share = sorted(digests[item])[jax.process_index() :: jax.process_count()]
    bad = integrity.damaged(
      {name: digests[item][name] for name in share},
      functools.partial(_open_array, folder / item),
    )
    if bad:
      return (
        f'the checkpoint {folder} is damaged: {len(bad)} of {len(names[item])} '
        f'arrays of {item} do not match their digests, the first is {bad[0]}'
      )
  return None


def _open_array(folder: pathlib.Path, name: str) -> Any:
  """Opens an array of an item; indexing it reads the values."""
  return tensorstore.open(
    {
      'driver': 'zarr',
      'kvstore': {
        'driver': 'ocdbt',
        'base': storage.kvstore(folder),
        'path': f'{name.replace("/", ".")}/',
      },
    },
    open=True,
    read=True,
  ).result()


def read_data(folder: pathlib.Path) -> dict[str, Any]:
  """Reads and verifies the item `data` of a checkpoint.

  Args:
    folder: the folder of the step.

  Raises:
    DamagedError: if it is missing or differs from the saved one.
  """
  path = folder / 'data' / 'metadata'
  try:
    data = files.read_json(path, remedy='copy the checkpoint again')
  except (ValueError, FileNotFoundError) as error:
    raise DamagedError(str(error)) from error
  if not integrity.is_sealed(data):
    return data
  if (content := integrity.unseal(data)) is None:
    raise DamagedError(f'{path} does not match its digest')
  return content


def description(run_dir: str | pathlib.Path) -> dict[str, Any] | None:
  """Returns the model description in the newest readable checkpoint.

  Returns None if no checkpoint has one.
  """
  for step in reversed(steps(run_dir)):
    folder = storage.of(run_dir).absolute() / FOLDER / str(step)
    with contextlib.suppress(DamagedError):
      if model := read_data(folder).get(MODEL):
        return model
  return None


@contextlib.contextmanager
def reading(folder: pathlib.Path) -> Iterator[None]:
  """Turns read errors of Orbax and TensorStore into `DamagedError`.

  Args:
    folder: the folder being read, named in the error.
  """
  try:
    yield
  except DamagedError:
    raise
  except _READING_ERRORS as error:
    if os_errors.is_of_store(error) or isinstance(
      error, jax.errors.JaxRuntimeError
    ):  # Such as a device without room for the arrays.
      raise
    raise DamagedError(
      f'{folder} could not be read: {os_errors.first_line(error)}'
    ) from error


def saved_nsecs(params: pathlib.Path) -> int:
  """Returns the save time of a checkpoint, in ns since the epoch.

  The time is stored in the checkpoint, so copies keep it.

  Args:
    params: folder of parameters, from `params_folder`.

  Raises:
    DamagedError: if the time is missing or unreadable.
  """
  with reading(params.parent):
    found = ocp.metadata.get_step_metadata(
      storage.for_library(params.parent)
    ).init_timestamp_nsecs
    if found is None:
      raise DamagedError(
        f"{params.parent} lacks Orbax's metadata of the step, the time of the "
        'save'
      )
    return found


def restore_params(
  run_dir: str | pathlib.Path, step: int, shapes: PyTree, shardings: PyTree
) -> PyTree:
  """Restores the trained parameters of a step with the given shardings.

  Args:
    run_dir: the run.
    step: the step to restore.
    shapes: pytree of `jax.ShapeDtypeStruct`.
    shardings: pytree of shardings of the same structure.
  """
  folder, _ = params_folder(run_dir, step)
  target = partitioning.with_shardings(shapes, shardings)
  with reading(folder), ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(storage.for_library(folder), target)


def read_arrays(
  folder: pathlib.Path, paths: list[tuple[str, ...]]
) -> dict[tuple[str, ...], np.ndarray]:
  """Reads selected arrays of a checkpoint item into host memory.

  Args:
    folder: folder of the item, such as `params`.
    paths: paths of the arrays in the item's pytree.
  """
  with reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
    item = _nest({path: 0 for path in paths})
    restored = checkpointer.restore(
      storage.for_library(folder),
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
  """Returns the shape and dtype of every array of a checkpoint item.

  Args:
    folder: folder of the item, such as `params`.
  """
  with reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(
      storage.for_library(folder)
    ).item_metadata.tree
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
