# SPDX-License-Identifier: Apache-2.0
"""A system's parameters: shapes, shardings, initialisation and loading."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from l2s_jax.models import l2s, lora
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import distributed, partitioning, storage
from l2s_jax.systems import bundle
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import hub, opening, run_format, saved_steps
from l2s_jax.weights import source as source_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Layout:
  """Shapes, logical axes and shardings of a system's parameters."""

  shapes: dict[str, PyTree]
  axes: dict[str, PyTree]
  shardings: dict[str, PyTree]


def init(
  system: system_lib.System,
  key: jax.Array,
  only: Callable[[str], bool] | None = None,
) -> PyTree:
  """Returns initial boxed parameters, {'params': ...}. Called within jit.

  With one key, the SLM has the same parameters inside LLM-to-SLM as alone, so
  that the two are comparable.

  Args:
    system: the system.
    key: PRNG key.
    only: predicate of a path that selects parameters; XLA removes the
      computation of the others. None returns all.
  """
  batch = {
    name: jnp.ones(shape.shape, shape.dtype)
    for name, shape in system.example_batch(1, 2, 2).items()
  }
  params = system.module.init(key, batch, deterministic=True)['params']
  writer, name = l2s.writer(system.module)
  if name is not None:
    whole = writer.init(key, batch, deterministic=True)
    params = {**params, name: whole['params']}
  return {'params': split_by_path(params, only)[0]}


def _abstract(system: system_lib.System) -> tuple[PyTree, PyTree]:
  """Returns shapes and logical axes of all parameters, as `init` makes them.

  Without `init`'s second pass over the SLM, which changes values alone.
  """
  return partitioning.abstract_params(
    functools.partial(system.module.init, deterministic=True),
    system.example_batch(1, 2, 2),
  )


def layout(
  system: system_lib.System,
  mesh: jax.sharding.Mesh,
  mesh_config: partitioning.MeshConfig,
) -> Layout:
  """Returns the layout of all parameters on a mesh.

  Raises:
    ValueError: if a parameter's axis is not divisible by its mesh axes.
  """
  shapes, axes = _abstract(system)
  shapes = {
    name: jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, system.frozen_dtype), tree
    )
    if name in system.frozen
    else tree
    for name, tree in shapes.items()
  }
  shardings = partitioning.param_shardings(shapes, axes, mesh, mesh_config)
  partitioning.check_divisible(shapes, shardings)
  return Layout(shapes, axes, shardings)


def load_frozen(
  system: system_lib.System, layout: Layout
) -> tuple[system_lib.System, PyTree]:
  """Loads the frozen LLM.

  With cached states it loads only the embeddings that 'add' needs with a
  foreign vocabulary, or nothing.

  Args:
    system: the system.
    layout: of its parameters.

  Returns:
    The system with the LLM's fingerprint and step, and the frozen parameters.

  Raises:
    ValueError: if the weights are not those that the run was trained with, do
      not match their digests, or lack the decoder of a verifier; or if cached
      states are another LLM's.
  """
  if not system.frozen:
    return system, {}
  if system.cached_states is not None:
    return _load_beside_states(system, layout)
  source = open_llm(system.sources['llm'], system.llm_step)
  shapes, shardings = layout.shapes['llm'], layout.shardings['llm']
  decoder: dict[str, PyTree] = {}
  if isinstance(system.module, l2s.DraftAndVerify):
    if shapes_lib.is_encoder_alone(source.shapes()):
      raise ValueError(
        f"The LLM in {source.location} is encoder-only, but the LLM's decoder "
        'verifies drafts. Set LLM_PATH to the complete LLM, or '
        'Decoding.draft_len to 0.'
      )
    # Loaded separately: a run's fingerprint covers the encoding part alone.
    shapes, decoder = split(shapes, l2s.ENCODER)
    shardings, decoder_shardings = split(shardings, l2s.ENCODER)
  params, fingerprint = source_lib.load(source, shapes, shardings)
  system = _with_fingerprint(system, fingerprint, source.step())
  if decoder:
    loaded, _ = source_lib.load(source, decoder, decoder_shardings)
    params = params | loaded
  return system, {'llm': params}


def _with_fingerprint(
  system: system_lib.System, fingerprint: str, step: int | None
) -> system_lib.System:
  """Returns the system with the LLM's fingerprint and step.

  Raises:
    ValueError: if a run has another fingerprint, or another host does.
  """
  if system.llm_fingerprint not in (None, fingerprint):
    raise ValueError(
      f'The LLM in {system.sources["llm"]} is not the LLM of this run: its '
      f'fingerprint is {fingerprint[:16]}, the run expects '
      f'{system.llm_fingerprint[:16]}. Set LLM_PATH to the LLM that the run '
      'was trained with.'
    )
  if distributed.from_first(fingerprint) != fingerprint:
    raise ValueError(
      f'The LLM in {system.sources["llm"]} differs between processes: it is '
      'being changed, or is not on a shared file system. Start again when it '
      'no longer changes.'
    )
  return dataclasses.replace(
    system,
    llm_step=system.llm_step if step is None else step,
    llm_fingerprint=fingerprint,
  )


def _load_beside_states(
  system: system_lib.System, layout: Layout
) -> tuple[system_lib.System, PyTree]:
  """Loads the LLM's parameters that are needed beside its cached states.

  A system without a fingerprint takes that of the weights at LLM_PATH. Weights
  without digests are read once for it, and not held in memory.
  """
  states = system.cached_states
  assert states is not None
  params: dict[str, PyTree] = {}
  if system.llm_fingerprint is None or 'llm' in layout.shapes:
    source = open_llm(system.sources['llm'], system.llm_step)
    shapes, _ = _abstract(dataclasses.replace(system, cached_states=None))
    fingerprint = source_lib.read_fingerprint(source, shapes['llm'])
    system = _with_fingerprint(system, fingerprint, source.step())
    if 'llm' in layout.shapes:
      loaded, _ = source_lib.load(
        source, layout.shapes['llm'], layout.shardings['llm']
      )
      params['llm'] = loaded
  assert system.llm_fingerprint is not None
  if system.llm_fingerprint != states.llm_fingerprint:
    raise ValueError(
      f'{states.location} has the states of another LLM than '
      f'{system.sources["llm"]}: the states have the LLM fingerprint '
      f'{states.llm_fingerprint[:16]}, LLM_PATH has '
      f'{system.llm_fingerprint[:16]}. Set LLM_PATH to the LLM of the cache, '
      'cache the features of this LLM in another CACHE_DIR, or set '
      'USE_FEATURES=False.'
    )
  return system, params


def open_llm(path: str, step: int | None) -> source_lib.Source:
  """Opens the weights of a frozen LLM.

  Args:
    path: LLM_PATH.
    step: checkpoint step, if it is a run.

  Raises:
    FileNotFoundError: if it does not exist.
  """
  if not storage.of(path).exists() and not hub.is_name(path):
    raise FileNotFoundError(
      f"The LLM's weights are not at {path}. Set LLM_PATH to their new "
      'location.'
    )
  # A converted run has no steps; its fingerprint identifies the model.
  return opening.open_source(path, step, may_lack_steps=True)


def load_pretrained(
  system: system_lib.System, layout: Layout
) -> dict[str, PyTree]:
  """Returns pretrained values of trainable parameters, by name."""
  loaded: dict[str, PyTree] = {}
  for name, path in system.sources.items():
    if name in system.frozen:
      continue
    source = opening.open_source(path)
    # The weights have LoRA merged; new LoRA parameters are initialised.
    shapes, shardings = (
      split_by_path(tree[name] if name else tree, _is_of_weights)[0]
      for tree in (layout.shapes, layout.shardings)
    )
    params, _ = source_lib.load(source, shapes, shardings)
    loaded |= {name: params} if name else params
  return loaded


def _is_of_weights(path: str) -> bool:
  """Returns whether pretrained weights have a parameter (LoRA's are new)."""
  return not lora.is_learned(path)


def load_params(
  system: system_lib.System,
  layout: Layout,
  run_dir: str | pathlib.Path,
  step: int | None = None,
) -> dict[str, PyTree]:
  """Returns all parameters of a checkpoint, frozen and trained.

  Args:
    system: the system.
    layout: of its parameters.
    run_dir: the run's folder, a bundle, or a pretrained model.
    step: checkpoint step; None means the newest.
  """
  _, frozen = load_frozen(system, layout)
  return merge(frozen, load_trained(system, layout, run_dir, step))


def load_trained(
  system: system_lib.System,
  layout: Layout,
  run_dir: str | pathlib.Path,
  step: int | None = None,
) -> dict[str, PyTree]:
  """Returns the trained parameters of a checkpoint.

  All parameters of a pretrained model count as trained.
  """
  if bundle.is_bundle(run_dir):
    return _of_bundle(system, layout, bundle.open_bundle(run_dir))
  if not run_format.is_run(run_dir):
    source = opening.open_source(str(run_dir), step or None)
    params, _ = source_lib.load(source, layout.shapes, layout.shardings)
    return params
  _, step = saved_steps.params_folder(run_dir, step)
  return saved_steps.restore_params(
    run_dir,
    step,
    split(layout.shapes, system.frozen)[1],
    split(layout.shardings, system.frozen)[1],
  )


def _of_bundle(
  system: system_lib.System, layout: Layout, opened: bundle.Bundle
) -> dict[str, PyTree]:
  """Returns the parameters of a bundle without the frozen LLM.

  Raises:
    ValueError: if tensors are missing, unknown or of another shape.
  """
  if bundle.MODEL in opened.towers:
    tower = opened.towers[bundle.MODEL]
    params, _ = source_lib.load(tower, layout.shapes, layout.shardings)
    return params
  loaded = {}
  shapes = split(layout.shapes, system.frozen)[1]
  for name in shapes.keys() & opened.towers.keys():
    loaded[name], _ = source_lib.load(
      opened.towers[name], layout.shapes[name], layout.shardings[name]
    )
  wanted, shardings = (
    traverse_util.flatten_dict({n: tree[n] for n in shapes.keys() - loaded})
    for tree in (shapes, layout.shardings)
  )
  found = opened.beside()
  misfits = [
    '/'.join(path)
    for path in sorted(wanted.keys() | found.keys())
    if path not in wanted
    or path not in found
    or found[path].shape != wanted[path].shape
  ]
  if misfits:
    raise ValueError(
      f'{opened.folder / bundle.BESIDE} does not match the tensors of its '
      f'model: {", ".join(misfits)[:300]}. Export again.'
    )
  beside = {
    path: jax.device_put(found[path].astype(shape.dtype), shardings[path])
    for path, shape in wanted.items()
  }
  return loaded | traverse_util.unflatten_dict(beside)


def fingerprint(layout: Layout, location: str, step: int) -> str:
  """Returns the fingerprint of a language model's weights.

  Weights without digests are read, one layer at a time.

  Args:
    layout: of its parameters.
    location: CHECKPOINT_PATH, a language model's run or a pretrained model.
    step: from `model_paths.choose_step`.
  """
  source = opening.open_source(location, step or None)
  return source_lib.read_fingerprint(source, layout.shapes)


def split(
  params: Mapping[str, PyTree], frozen: tuple[str, ...]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Splits parameters by their top-level name into frozen and trainable."""
  return (
    {name: tree for name, tree in params.items() if name in frozen},
    {name: tree for name, tree in params.items() if name not in frozen},
  )


def split_by_path(
  params: Mapping[str, PyTree], is_first: Callable[[str], bool] | None
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Splits parameters by path into two trees; `merge` joins them again.

  Args:
    params: nested dicts.
    is_first: predicate of a path, joined by '/', that selects the first part;
      None selects all.
  """
  if is_first is None:
    return dict(params), {}
  flat = traverse_util.flatten_dict(params)
  parts: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
  for path, leaf in flat.items():
    parts[0 if is_first('/'.join(path)) else 1][path] = leaf
  first, second = map(traverse_util.unflatten_dict, parts)
  return first, second


def merge(*trees: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Joins parameter trees by path.

  Raises:
    ValueError: names a path that two trees have.
  """
  merged: dict[str, PyTree] = {}
  for tree in trees:
    for name, value in tree.items():
      if name not in merged:
        merged[name] = value
      elif isinstance(value, Mapping) and isinstance(merged[name], Mapping):
        merged[name] = merge(merged[name], value)
      else:
        raise ValueError(f'Two parameter trees contain {name!r}.')
  return merged


def num_params(tree: PyTree) -> int:
  """Returns the number of parameters in a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def summary(
  system: system_lib.System,
  layout: Layout,
  mesh: jax.sharding.Mesh,
  optimizer_bytes: int | None = None,
) -> str:
  """Returns the report of `--dry_run`: sizes, shardings, bytes per device.

  Args:
    system: the system.
    layout: of its parameters.
    mesh: the device mesh.
    optimizer_bytes: optimizer state per device; None without an optimizer.
  """
  num_frozen = num_trainable = 0
  axes = ', '.join(f'{name}={size}' for name, size in mesh.shape.items())
  prompt, answer = system.prompt_vocabulary, system.answer_vocabulary
  lines = [
    f'mesh: {axes} ({mesh.devices.flat[0].platform})',
    f'prompt vocabulary: {prompt.path}, {prompt.vocab_size} ids',
    f'answer vocabulary: {answer.path}, {answer.vocab_size} ids, '
    + ('the same' if prompt == answer else 'another'),
    'parameters:',
  ]
  leaves = jax.tree_util.tree_leaves_with_path(layout.shapes)
  shardings = jax.tree.leaves(layout.shardings)
  for (path, shape), sharding in zip(leaves, shardings, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if path[0].key in system.frozen or not system.is_trained(name):
      state, num_frozen = 'frozen', num_frozen + shape.size
    else:
      state, num_trainable = 'trainable', num_trainable + shape.size
    lines.append(
      f'  {name}: {shape.dtype}{list(shape.shape)} {state} {sharding.spec}'
    )
  param_bytes = partitioning.bytes_per_device(layout.shapes, layout.shardings)
  lines += [
    f'frozen parameters: {num_frozen:,}',
    f'trainable parameters: {num_trainable:,}',
    f'bytes per device: parameters {param_bytes:,}',
  ]
  if optimizer_bytes is not None:
    lines[-1] += f', optimizer {optimizer_bytes:,}'
  return '\n'.join(lines)
