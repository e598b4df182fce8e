# SPDX-License-Identifier: Apache-2.0
"""The device mesh, the tables from logical axes to mesh axes, and shardings.

Modules name the axes of their parameters and activations (`batch`, `embed`,
`heads`, ...); the rules here say onto which mesh axes (`data`, `fsdp`,
`tensor`) they go. The LLM and the SLM use the same names and may have rules
of their own: the SLM's are entered around everything, the LLM's around its own
call. This module is also the only place where Flax's metadata boxes are taken
off parameters.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
PyTree = Any

MESH_AXES = ('data', 'fsdp', 'tensor')

# Earlier rules take a mesh axis first: an activation [batch, length, embed]
# spends `fsdp` on its batch, and its `embed` stays whole.
DEFAULT_RULES: Rules = (
  ('batch', ('data', 'fsdp')),
  ('vocab', 'tensor'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('mlp', 'tensor'),
  ('embed', 'fsdp'),
  ('llm_embed', 'fsdp'),
  ('length', None),
  ('kv', None),
  ('layers', None),
  ('relpos_buckets', None),
  ('abspos_buckets', None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices stand along each mesh axis, and each tower's rules.

  Attributes:
    data: replicas of the parameters; -1 takes all devices that are left.
    fsdp: shards of the parameters along `embed`; the batch is split over it
      too.
    tensor: shards along `heads`, `mlp` and `vocab`, and along `kv_heads`
      where these divide.
    llm_rules: logical axis to mesh axis for the LLM.
    slm_rules: the same for the SLM, the projector and everything else.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  llm_rules: Sequence[Sequence[Any]] = DEFAULT_RULES
  slm_rules: Sequence[Sequence[Any]] = DEFAULT_RULES

  def __post_init__(self):
    for tower in ('llm', 'slm'):
      for name, axes in self.rules(tower):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
          if axis not in MESH_AXES:
            raise ValueError(
              f'MeshConfig.{tower}_rules puts {name!r} onto {axis!r}, which is '
              f'not one of the mesh axes {MESH_AXES}.'
            )

  def rules(self, tower: str) -> Rules:
    return _as_rules(self.llm_rules if tower == 'llm' else self.slm_rules)


gin.external_configurable(MeshConfig, module='l2s_jax')


def _as_rules(rules: Sequence[Sequence[Any]]) -> Rules:
  """Returns hashable rules from the lists that a gin file may hold."""
  return tuple(
    (name, tuple(axes) if isinstance(axes, list) else axes)
    for name, axes in rules
  )


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Makes the mesh ('data', 'fsdp', 'tensor') over all devices.

  Raises:
    ValueError: if the axis sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = [config.data, config.fsdp, config.tensor]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    raise ValueError(
      f'MeshConfig has data={config.data}, fsdp={config.fsdp}, '
      f'tensor={config.tensor}: axis sizes are positive, and at most one of '
      'them is -1 (all devices that are left).'
    )
  if -1 in shape:
    known = math.prod(n for n in shape if n != -1)
    shape[shape.index(-1)] = max(len(devices) // known, 1)
  if math.prod(shape) != len(devices):
    sizes = ' x '.join(
      f'{a}={n}' for a, n in zip(MESH_AXES, shape, strict=True)
    )
    raise ValueError(
      f'The mesh {sizes} takes {math.prod(shape)} devices, but there are '
      f'{len(devices)}. Set MeshConfig.data, .fsdp and .tensor so that they '
      f'multiply to {len(devices)}, or leave data at -1.'
    )
  return jax.make_mesh(
    tuple(shape), MESH_AXES, (AxisType.Auto,) * 3, devices=devices
  )


def axis_rules(rules: Rules) -> contextlib.AbstractContextManager[None]:
  """Enters the rules that logical constraints inside read."""
  return nn.logical_axis_rules(rules)


def axes_that_divide(
  axes: Sequence[str | None],
  shape: Sequence[int],
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
  rules: Rules | None = None,
) -> tuple[str | None, ...]:
  """Returns the axes, without `kv_heads` where it does not divide.

  With grouped queries a model has fewer heads of keys and values than a mesh
  may have devices along `tensor`; each then holds all of them, as is usual.

  Args:
    axes: logical names.
    shape: of the array that has them.
    mesh: None takes the one in use.
    rules: None takes those in use.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  mesh_axes = nn.logical_to_mesh_axes(tuple(axes), rules)

  def divides(size, names):
    names = (names,) if isinstance(names, str) else names or ()
    return size % math.prod(mesh.shape.get(name, 1) for name in names) == 0

  return tuple(
    None if axis == 'kv_heads' and not divides(size, names) else axis
    for axis, size, names in zip(axes, shape, mesh_axes, strict=True)
  )


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Pins an array, in jit, to how its axes are sharded where they divide."""
  return nn.with_logical_constraint(x, axes_that_divide(axes, x.shape))


@contextlib.contextmanager
def use_mesh(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Makes `mesh` the one that logical constraints inside refer to."""
  with jax.set_mesh(mesh):
    yield


def unbox(tree: PyTree) -> PyTree:
  """Takes the axis names off freshly made parameters."""

  def is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)

  # Where parameters live is said once, by the shardings of the jit that makes
  # them; a constraint here would also fail on mere shapes.
  return jax.tree.map(
    lambda x: x.unbox(apply_constraint=False) if is_box(x) else x,
    tree,
    is_leaf=is_box,
  )


def abstract_params(
  init: Callable[..., PyTree], *args: Any
) -> tuple[PyTree, PyTree]:
  """Returns shapes and logical axes of the parameters that `init` makes.

  Args:
    init: a module's `init`, or a function like it, returning {'params': ...}.
    *args: its arguments; arrays or shapes.

  Returns:
    A tree of `jax.ShapeDtypeStruct` and a tree of `PartitionSpec` that hold
    logical axis names.
  """
  boxed = jax.eval_shape(init, *args)['params']
  return unbox(boxed), nn.get_partition_spec(boxed)


def param_shardings(
  shapes: Mapping[str, PyTree],
  logical_axes: Mapping[str, PyTree],
  mesh: jax.sharding.Mesh,
  config: MeshConfig,
) -> dict[str, PyTree]:
  """Returns the sharding of each parameter, each tower by its own rules.

  Args:
    shapes: of the parameters.
    logical_axes: tree of logical `PartitionSpec`; the subtree `llm` follows
      the LLM's rules, everything else the SLM's.
    mesh: the mesh they refer to.
    config: has the rules.
  """

  def place(tower):
    rules = config.rules(tower)
    axes = jax.tree.map(
      lambda shape, spec: PartitionSpec(
        *axes_that_divide(tuple(spec), shape.shape, mesh, rules)
      ),
      shapes[tower],
      logical_axes[tower],
    )
    return nn.logical_to_mesh_sharding(axes, mesh, rules)

  return {tower: place(tower) for tower in logical_axes}


def slot_sharding(
  shape: tuple[int, ...],
  param_shape: tuple[int, ...],
  param_sharding: NamedSharding,
) -> NamedSharding:
  """Returns the sharding of an optimizer's slot, given its parameter's.

  Axes along which the slot has another size, such as means, are not split.
  """
  if shape == param_shape:
    return param_sharding
  if len(shape) != len(param_shape):
    return NamedSharding(param_sharding.mesh, PartitionSpec())
  sizes = zip(shape, param_shape, param_sharding.spec, strict=False)
  spec = (axes if size == of_param else None for size, of_param, axes in sizes)
  return NamedSharding(param_sharding.mesh, PartitionSpec(*spec))


def check_divisible(shapes: PyTree, shardings: PyTree) -> None:
  """Refuses shapes that do not divide over the mesh, all at once.

  Raises:
    ValueError: lists path, shape and the axis that does not divide.
  """
  problems = []

  def check(path, shape, sharding):
    for size, axes in zip(shape.shape, sharding.spec, strict=False):
      if axes is None:
        continue
      names = (axes,) if isinstance(axes, str) else axes
      ways = math.prod(sharding.mesh.shape[name] for name in names)
      if size % ways:
        problems.append(
          f'  {jax.tree_util.keystr(path, simple=True, separator="/")} '
          f'{tuple(shape.shape)}: {size} does not divide over {ways} '
          f"devices of mesh axis '{'+'.join(names)}'"
        )

  jax.tree_util.tree_map_with_path(check, shapes, shardings)
  if problems:
    raise ValueError(
      'These parameters do not divide over the mesh; change MeshConfig or its '
      'rules:\n' + '\n'.join(problems)
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of batches: rows over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def check_batch_size(
  batch_size: int, mesh: jax.sharding.Mesh, name: str = 'BATCH_SIZE'
) -> None:
  """Refuses a batch whose rows do not divide over the mesh.

  Raises:
    ValueError: with the batch size, the number of shards, and what would do.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size < 1 or batch_size % shards:
    nearest = max(round(batch_size / shards), 1) * shards
    raise ValueError(
      f'{name}={batch_size} does not divide over the {shards} devices of '
      f"mesh axes 'data' and 'fsdp'; set it to a multiple of {shards}, such "
      f'as {nearest}.'
    )


def put_batch(
  batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Makes one global array per key; each process puts the rows it owns.

  Args:
    batch: the whole batch, the same in every process.
    mesh: the device mesh.
  """
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_callback(
      value.shape, sharding, np.asarray(value).__getitem__
    )
    for key, value in batch.items()
  }


def bytes_per_device(shapes: PyTree, shardings: PyTree) -> int:
  """Returns the bytes that one device holds of a sharded tree."""
  sizes = jax.tree.map(
    lambda s, sharding: (
      math.prod(sharding.shard_shape(s.shape)) * s.dtype.itemsize
    ),
    shapes,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))
