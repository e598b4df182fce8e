# SPDX-License-Identifier: Apache-2.0
"""Reads the checkpoints of a run: which steps are there and good, their arrays.

A step's folder holds three items: `params`, the trained parameters alone;
`optimizer`, with the step and the PRNG key; and `data`, the position of the
last batch trained on, with the digests of all arrays and of itself. The frozen
LLM is not among them. `training/checkpoint.py` writes them.

A step is compared with its digests before it is read. Where a step was not
asked for, the newest good one is taken, and both are named.
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
)

PyTree = Any

FOLDER = 'checkpoints'
BEST = 'best.json'
# Where training puts steps that are damaged, out of the way of new ones.
DAMAGED = 'damaged'
ITEMS = ('params', 'optimizer')
DIGESTS = 'digests'
MODEL = 'model'
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
    step, _ = newest_good(run_dir, ITEMS[:1])
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


def newest_good(
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


def read_data(folder: pathlib.Path) -> dict[str, Any]:
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
      if model := read_data(folder).get(MODEL):
        return model
  return None


@contextlib.contextmanager
def reading(folder: pathlib.Path) -> Iterator[None]:
  """Says what could not be read, where a library would say how."""
  try:
    yield
  except DamagedError:
    raise
  except _READING_ERRORS as error:
    raise DamagedError(
      f'{folder} could not be read: {os_errors.first_line(error)}'
    ) from error


def saved_nsecs(params: pathlib.Path) -> int:
  """Returns when a step was saved, which a copy of it keeps.

  Args:
    params: from `params_folder`.
  """
  with reading(params.parent):
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
  target = partitioning.with_shardings(shapes, shardings)
  with reading(folder), ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder, target)


def read_arrays(
  folder: pathlib.Path, paths: list[tuple[str, ...]]
) -> dict[tuple[str, ...], np.ndarray]:
  """Reads single arrays of a checkpoint into host memory."""
  with reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
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
  with reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
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
