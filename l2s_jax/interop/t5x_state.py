# SPDX-License-Identifier: Apache-2.0
"""Converts train states to T5X checkpoints and back.

A state is the parameters, Adafactor's moments and the step. T5X checkpoints
also contain the frozen LLM, which runs do not store; on the way back it must
equal the LLM of the run. The moments are the same numbers in other shapes: T5X
drops averaged axes, `training/adafactor.py` keeps them with size 1. This module
does not require T5X; `t5x.py` is the model that T5X restores such a state into.
"""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import PartitionSpec

from l2s_jax.runtime import files, partitioning, storage
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.training import adafactor, checkpoint, optim
from l2s_jax.training import state as state_lib
from l2s_jax.weights import saved_steps
from l2s_jax.weights.formats import t5x

PyTree = Any
_SLOTS = ('v_row', 'v_col', 'v', 'm')


def to_slots(
  slots: Mapping[str, np.ndarray], factors: adafactor.Factoring
) -> dict[str, np.ndarray]:
  """Converts a parameter's moments to those of T5X's Adafactor.

  Args:
    slots: `v`, or `v_row` and `v_col`, of `AdafactorState`.
    factors: factoring of the parameter.

  Returns:
    `v_row`, `v_col`, `v` and `m`, without averaged axes. Unused ones are zeros
    of the shape [1].
  """
  absent = np.zeros((1,), np.float32)
  theirs = dict.fromkeys(_SLOTS, absent)
  if not factors.rows:
    return theirs | {'v': slots['v']}
  v_row = slots['v_row'].squeeze(factors.columns)
  v_col = slots['v_col'].squeeze(factors.rows)
  if _is_swapped(v_row.shape, v_col.shape, factors):
    v_row, v_col = v_col, v_row
  return theirs | {'v_row': v_row, 'v_col': v_col}


def from_slots(
  slots: Mapping[str, np.ndarray],
  factors: adafactor.Factoring,
  shape: tuple[int, ...],
  path: str,
) -> dict[str, np.ndarray]:
  """Converts a parameter's moments from those of T5X's Adafactor.

  Args:
    slots: `m`, `v`, `v_row` and `v_col` of T5X.
    factors: factoring of the parameter in `training/adafactor.py`.
    shape: shape of the parameter.
    path: path of the parameter, for errors.

  Returns:
    `v`, or `v_row` and `v_col`, of `AdafactorState`, with averaged axes of size
    1.

  Raises:
    ValueError: if T5X's factoring is different, or it has momentum.
  """
  if slots['m'].shape != (1,):
    raise ValueError(
      f'{path}: T5X trained with momentum (Adafactor.beta1), but Adafactor of '
      'l2s_jax has none. Train with beta1 = None.'
    )
  if not factors.rows:
    ours = {'v': slots['v']}
    shapes = {'v': shape}
  else:
    v_row, v_col = slots['v_row'], slots['v_col']
    row, column = (
      tuple(n for i, n in enumerate(shape) if i not in averaged)
      for averaged in (factors.columns, factors.rows)
    )
    if _is_swapped(row, column, factors):
      v_row, v_col = v_col, v_row
    ours = {'v_row': v_row, 'v_col': v_col}
    shapes = {'v_row': row, 'v_col': column}
  for name, found in ours.items():
    if found.shape != shapes[name]:
      raise ValueError(
        f'{path}: {name} of T5X has the shape {found.shape}, expected '
        f'{shapes[name]}. Give both sides the same min_dim_size_to_factor, and '
        'T5X the logical_factor_rules of gin_configs/t5x.'
      )
  if not factors.rows:
    return ours
  return {
    name: np.expand_dims(found, averaged)
    for (name, found), averaged in zip(
      ours.items(), (factors.columns, factors.rows), strict=True
    )
  }


def _is_swapped(
  row: tuple[int, ...], column: tuple[int, ...], factors: adafactor.Factoring
) -> bool:
  """Returns whether T5X's rows are our columns.

  For a matrix outside stacks, T5X's rows are along the shorter axis.
  """
  return factors.layer == (0, 1) and row > column


def write(
  run_dir: str | pathlib.Path,
  folder: pathlib.Path,
  step: int,
  llm_path: str | None = None,
) -> str:
  """Writes a step of a run as T5X's `checkpoint_STEP` and reads it back.

  At step 0 the checkpoint has Adafactor's initial state, whatever the
  optimizer of the run. Later steps of other optimizers have no state.

  Args:
    run_dir: a run of LLM-to-SLM or of a language model.
    folder: folder of T5X checkpoints, created if absent.
    step: step of the run.
    llm_path: new location of the run's LLM, if it has moved.

  Returns:
    A description of the checkpoint.

  Raises:
    ValueError: if T5X cannot hold the state, or the step is damaged.
  """
  system, layout = _open(run_dir, llm_path)
  if wrong := saved_steps.problem(run_dir, step, saved_steps.ITEMS):
    raise ValueError(f'{wrong}. Choose another step with --step.')
  params = parameters.load_params(system, layout, run_dir, step)
  states = _read_states(system, layout, storage.of(run_dir), step)
  state: dict[str, Any] = {'step': np.int32(step)}
  if states is not None:
    state['param_states'] = states
  path = folder.resolve() / f'checkpoint_{step}'
  # In the Orbax format, which T5X writes itself. With JAX 0.10, T5X cannot read
  # scalars in its older format.
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver:
    saver.save(
      path,
      ocp.args.Composite(
        state=ocp.args.PyTreeSave({'target': params, 'state': state})
      ),
    )
  _check_written(path, {'target': params, 'state': state})
  if states is None:
    return f'{path.name}, parameters alone, for eval, infer and export.'
  return f"{path.name}, parameters and Adafactor's state, read back bit by bit."


def _check_written(path: pathlib.Path, parts: Mapping[str, PyTree]) -> None:
  """Compares a written checkpoint with the arrays in memory.

  Raises:
    ValueError: if an array is different, missing or unknown.
  """
  for part, tree in parts.items():
    written, _ = t5x.open_part(path, None, (part,))
    wanted = traverse_util.flatten_dict(tree, sep='/')
    bad = [
      name
      for name in sorted(wanted.keys() | written.keys())
      if name not in wanted
      or name not in written
      or np.asarray(wanted[name]).tobytes() != written[name].read().tobytes()
    ]
    if bad:
      raise ValueError(
        f'{path}: {bad[0]} and {len(bad) - 1} other arrays of {part} read back '
        'with other values than were written. The checkpoint was deleted. The '
        'disk may be failing.'
      )


def read(
  location: str | pathlib.Path,
  run_dir: str | pathlib.Path,
  destination: pathlib.Path,
  step: int | None = None,
) -> int:
  """Writes a run that continues a T5X checkpoint.

  `train` resumes it with `@adafactor()`, from the start of the data and with a
  new dropout key, because T5X has another order of examples.

  Args:
    location: MODEL_DIR of T5X, or one of its checkpoints.
    run_dir: RUN of the T5X model.
    destination: folder of the new run.
    step: checkpoint step in a MODEL_DIR; None takes the newest.

  Returns:
    The step.

  Raises:
    FileNotFoundError: if there is no such checkpoint.
    ValueError: if its parameters, its LLM or its optimizer state do not fit.
  """
  system, layout = _open(run_dir, None)
  target, _ = t5x.open_part(storage.of(location), step, ('target',))
  state, _ = t5x.open_part(storage.of(location), step, ('state',))
  params = _read_params(target, layout.shapes, str(location))
  frozen, trained = parameters.split(params, system.frozen)
  system = _check_frozen(system, layout, frozen, str(location))
  axes = parameters.split(layout.axes, system.frozen)[1]
  slots = _read_slots(state, trained, axes, str(location))
  num_steps = int(state['step'].read())
  trained, slots = jax.device_put((trained, slots))
  optimizer = optim.adafactor()
  fresh = state_lib.create(trained, optimizer.make(axes), seed=0)
  train_state = fresh.replace(
    step=jnp.int32(num_steps),
    opt_state=_put_slots(fresh.opt_state, slots, num_steps),
  )
  run_folder.save(system, destination)
  with contextlib.closing(checkpoint.Checkpointer(destination)) as saver:
    saver.save(
      train_state,
      {
        'num_rows': 0,
        'sums': {},
        'clock': None,
        'optimizer': optimizer.description,
        'begun_elsewhere': str(location),
      },
      system.describe(),
    )
    saver.wait()
  return num_steps


def _open(
  run_dir: str | pathlib.Path, llm_path: str | None
) -> tuple[system_lib.System, parameters.Layout]:
  """Returns a run's system and its parameter layout on one device."""
  system = run_folder.load(run_dir, llm_path=llm_path)
  if system.has_lora:
    raise ValueError(
      f'{run_dir} trains LoRA, which is not supported in T5X. Set LORA_RANK=0.'
    )
  config = partitioning.MeshConfig()
  mesh = partitioning.make_mesh(config, jax.devices()[:1])
  return system, parameters.layout(system, mesh, config)


def _read_states(
  system: system_lib.System,
  layout: parameters.Layout,
  run_dir: pathlib.Path,
  step: int,
) -> dict[str, PyTree] | None:
  """Returns a run's moments in T5X's form, or None without Adafactor.

  Raises:
    ValueError: if Adafactor has other settings, or trained only a part.
  """
  axes = parameters.split(layout.axes, system.frozen)[1]
  shapes = parameters.split(layout.shapes, system.frozen)[1]
  folder = run_dir / saved_steps.FOLDER / str(step)
  found = saved_steps.read_data(folder)['optimizer']
  optimizer = optim.adafactor()
  if step > 0 and found['name'] != 'adafactor':
    return None
  differences = files.differences(found, optimizer.description)
  if step > 0 and differences:
    raise ValueError(
      f'{run_dir} was trained with other Adafactor settings than those of '
      'gin_configs/t5x, or only in part (LEARNING_RATE_BY_PATH, '
      'PROJECTOR_STEPS). T5X cannot resume its state:\n'
      + '\n'.join(differences)
    )
  _, shardings = parameters.split(layout.shardings, system.frozen)
  mesh = jax.tree.leaves(shardings)[0].mesh
  of_state, places = state_lib.shardings(
    shapes, shardings, optimizer.make(axes), mesh
  )
  if step == 0:
    slots = jax.tree.map(
      lambda s: np.zeros(s.shape, s.dtype), _adafactor(of_state.opt_state).slots
    )
  else:
    slots = _adafactor(_restore(run_dir, step, of_state, places)).slots
  flat = traverse_util.flatten_dict(jax.device_get(slots), sep='/')
  factors = _factors(shapes, axes)
  converted = {
    path: to_slots(
      {
        name: flat[f'{path}/{name}']
        for name in _SLOTS
        if f'{path}/{name}' in flat
      },
      found,
    )
    for path, found in factors.items()
  }
  return traverse_util.unflatten_dict(converted, sep='/')


def _restore(
  run_dir: pathlib.Path, step: int, shapes: Any, places: Any
) -> PyTree:
  """Returns a run's optimizer state."""
  target = partitioning.with_shardings(shapes, places)
  folder = run_dir.absolute() / saved_steps.FOLDER / str(step)
  with saved_steps.reading(folder), ocp.StandardCheckpointer() as reader:
    return reader.restore(
      storage.for_library(folder / 'optimizer'),
      {
        'opt_state': target.opt_state,
        'step': target.step,
        'key': target.key,
      },
    )['opt_state']


def _is_adafactor(x: Any) -> bool:
  return isinstance(x, adafactor.AdafactorState)


def _adafactor(opt_state: PyTree) -> adafactor.AdafactorState:
  """Returns Adafactor's part of an optimizer state."""
  leaves = jax.tree.leaves(opt_state, is_leaf=_is_adafactor)
  return next(filter(_is_adafactor, leaves))


def _put_slots(opt_state: PyTree, slots: PyTree, num_updates: int) -> PyTree:
  """Returns an optimizer state with the given moments and update count."""

  def put(leaf: Any) -> Any:
    if _is_adafactor(leaf):
      return adafactor.AdafactorState(jnp.int32(num_updates), slots)
    return jnp.full_like(leaf, num_updates)  # The schedule's count.

  return jax.tree.map(put, opt_state, is_leaf=_is_adafactor)


def _factors(shapes: PyTree, axes: PyTree) -> dict[str, adafactor.Factoring]:
  """Returns the factoring of each parameter by path."""
  flat = traverse_util.flatten_dict(shapes, sep='/')
  names: dict[str, PartitionSpec] = traverse_util.flatten_dict(axes, sep='/')
  min_size = optim.adafactor().description['min_dim_size_to_factor']
  return {
    path: adafactor.factoring(path, x.shape, names[path], min_size)
    for path, x in flat.items()
  }


def _read_params(
  target: Mapping[str, Any], shapes: PyTree, location: str
) -> dict[str, PyTree]:
  """Reads T5X's parameters, cast to the dtypes of a system.

  Raises:
    ValueError: lists missing and unknown parameters and other shapes.
  """
  wanted = traverse_util.flatten_dict(shapes, sep='/')
  problems = [
    f'{name}: T5X has '
    f'{target[name].shape if name in target else "none"}, the run '
    f'{wanted[name].shape if name in wanted else "none"}'
    for name in sorted(wanted.keys() | target.keys())
    if name not in wanted
    or name not in target
    or wanted[name].shape != target[name].shape
  ]
  if problems:
    raise ValueError(
      f'{location} does not have the parameters of the run. Pass the run that '
      'T5X had as RUN. Differences:\n  ' + '\n  '.join(problems[:20])
    )
  return traverse_util.unflatten_dict(
    {
      name: target[name].read().astype(shape.dtype)
      for name, shape in wanted.items()
    },
    sep='/',
  )


def _check_frozen(
  system: system_lib.System,
  layout: parameters.Layout,
  frozen: PyTree,
  location: str,
) -> system_lib.System:
  """Checks that the LLM equals that of the run, which reads its own.

  Raises:
    ValueError: if it does not.
  """
  system, loaded = parameters.load_frozen(system, layout)
  flat = traverse_util.flatten_dict(jax.device_get(loaded), sep='/')
  theirs = traverse_util.flatten_dict(frozen, sep='/')
  changed = [
    name for name, x in flat.items() if not np.array_equal(x, theirs[name])
  ]
  if changed:
    raise ValueError(
      f"The frozen LLM in {location} is not the run's: {changed[0]} and "
      f'{len(changed) - 1} other arrays differ. In T5X, set '
      'INITIAL_CHECKPOINT_PATH to a checkpoint from export --to=t5x.'
    )
  return system


def _read_slots(
  state: Mapping[str, Any], trained: PyTree, axes: PyTree, location: str
) -> PyTree:
  """Reads T5X's moments.

  Raises:
    ValueError: if there are none of Adafactor.
  """
  slots = {}
  flat = traverse_util.flatten_dict(trained, sep='/')
  for path, factors in _factors(trained, axes).items():
    names = {name: f'param_states/{path}/{name}' for name in _SLOTS}
    missing = [name for name in ('step', *names.values()) if name not in state]
    if missing:
      raise ValueError(
        f"{location} has no {missing[0]}: expected the state of T5X's "
        'Adafactor. Use a checkpoint that t5x.train wrote with Adafactor.'
      )
    theirs = {name: state[full].read() for name, full in names.items()}
    slots[path] = from_slots(theirs, factors, flat[path].shape, path)
  return traverse_util.unflatten_dict(slots, sep='/')
