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
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MeshAxes = str | Sequence[str] | None
Rules = tuple[tuple[str, MeshAxes], ...]
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
# These stay whole where they do not divide: with grouped queries a model has
# few heads of keys and values, and vocabularies have any size (GPT-2: 50257).
MAY_STAY_WHOLE = ('kv_heads', 'vocab')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices stand along each mesh axis, and each tower's rules.

  Attributes:
    data: replicas of the parameters; -1 takes all devices that are left.
      Slices of TPUs and nodes of GPUs are told apart along it first.
    fsdp: shards of the parameters along `embed`; the batch is split over it
      too.
    tensor: shards along `heads` and `mlp`, and along `kv_heads` and `vocab`
      where these divide.
    llm_rules: logical axis to mesh axis, several or None, for the LLM, where
      it is not that of `DEFAULT_RULES`: {'embed': None} shards nothing of it
      over `fsdp`.
    slm_rules: the same for the SLM, the projector and everything else.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  llm_rules: Mapping[str, MeshAxes] = dataclasses.field(default_factory=dict)
  slm_rules: Mapping[str, MeshAxes] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for field in ('llm_rules', 'slm_rules'):
      rules = getattr(self, field)
      if not isinstance(rules, Mapping):
        raise ValueError(
          f'MeshConfig.{field}={rules!r} is not a dict from logical axis to '
          "mesh axis, such as {'embed': None}; {} changes nothing."
        )
      for name, axes in rules.items():
        if name not in dict(DEFAULT_RULES):
          raise ValueError(
            f'MeshConfig.{field} has {name!r}, which is not one of the logical '
            f'axes {", ".join(dict(DEFAULT_RULES))}.'
          )
        for axis in _names(axes):
          if axis not in MESH_AXES:
            raise ValueError(
              f'MeshConfig.{field} puts {name!r} onto {axis!r}, which is not '
              f'one of the mesh axes {MESH_AXES}.'
            )

  def rules(self, tower: str) -> Rules:
    """Returns the rules of the LLM ('llm') or of everything else, in order."""
    changed = self.llm_rules if tower == 'llm' else self.slm_rules
    return tuple(
      (name, tuple(axes) if isinstance(axes, list) else axes)
      for name, axes in (dict(DEFAULT_RULES) | dict(changed)).items()
    )


gin.external_configurable(MeshConfig, module='l2s_jax')


def _names(axes: MeshAxes) -> tuple[str, ...]:
  """Returns the mesh axes of one dimension."""
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Makes the mesh ('data', 'fsdp', 'tensor') over all devices.

  Raises:
    ValueError: if the axis sizes do not multiply to the number of devices;
      says which would.
  """
  devices = jax.devices() if devices is None else list(devices)
  return jax.sharding.Mesh(
    arrange(fit(config, len(devices)), devices),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
  )


def fit(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
  """Returns the shape of the mesh over so many devices.

  Raises:
    ValueError: as `make_mesh` does.
  """
  asked = (config.data, config.fsdp, config.tensor)
  if asked.count(-1) > 1 or any(n == 0 or n < -1 for n in asked):
    raise ValueError(
      f'MeshConfig has {_axes_text(asked)}: axis sizes are positive, and at '
      'most one of them is -1 (all devices that are left).'
    )
  shape = _nearest_shape(asked, num_devices)
  if any(n not in (-1, size) for n, size in zip(asked, shape, strict=True)):
    raise ValueError(
      f'MeshConfig has {_axes_text(asked)}, which do not multiply to the '
      f'number of devices, {num_devices}. The nearest that do are '
      f'{_axes_text(shape)}.'
    )
  return shape


def _axes_text(shape: Sequence[int]) -> str:
  return ', '.join(f'{a}={n}' for a, n in zip(MESH_AXES, shape, strict=True))


def _nearest_shape(
  asked: tuple[int, ...], num_devices: int
) -> tuple[int, int, int]:
  """Returns the mesh over so many devices that is nearest to what was asked.

  That is one that changes fewest axes, and those by the least factors. A -1
  stands for any size.
  """

  def distance(shape):
    pairs = [(n, m) for n, m in zip(asked, shape, strict=True) if n != -1]
    num_changed = sum(n != m for n, m in pairs)
    return num_changed, math.prod(max(n / m, m / n) for n, m in pairs)

  divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  return min(
    (
      (num_devices // (fsdp * tensor), fsdp, tensor)
      for fsdp in divisors
      for tensor in divisors
      if num_devices % (fsdp * tensor) == 0
    ),
    key=distance,
  )


def arrange(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
  """Returns the devices in the shape of the mesh, as their networks have it.

  Neighbours along `tensor` are the nearest, then those along `fsdp`. Several
  slices (of TPUs, or nodes of GPUs), which a slower network connects, split
  the outermost axis that they can: over `data`, what goes between them is the
  sum of gradients, once a step.

  Args:
    shape: of the mesh.
    devices: as many, or what a topology has in their place.
  """
  num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if num_slices == 1:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  outer: list[int] = []
  for size in shape:
    outer.append(math.gcd(size, num_slices // math.prod(outer)))
  return mesh_utils.create_hybrid_device_mesh(
    [size // part for size, part in zip(shape, outer, strict=True)],
    outer,
    devices,
    allow_split_physical_axes=True,
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
  """Returns the axes, without those `MAY_STAY_WHOLE` that do not divide.

  Each device then holds all of them.

  Args:
    axes: logical names.
    shape: of the array that has them.
    mesh: None takes the one in use.
    rules: None takes those in use.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  mesh_axes = nn.logical_to_mesh_axes(tuple(axes), rules)

  def divides(size, axes):
    return size % math.prod(mesh.shape.get(n, 1) for n in _names(axes)) == 0

  return tuple(
    None if axis in MAY_STAY_WHOLE and not divides(size, onto) else axis
    for axis, size, onto in zip(axes, shape, mesh_axes, strict=True)
  )


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Pins an array, in jit, to how its axes are sharded where they divide."""
  return nn.with_logical_constraint(x, axes_that_divide(axes, x.shape))


def look_up(
  table: jax.Array | np.ndarray,
  ids: jax.Array | np.ndarray,
  table_axes: Sequence[str],
) -> jax.Array:
  """Returns rows of a table, laid out as the batch is.

  Under FSDP features and rows are split over the same devices. Left alone, the
  partitioner gathers the table, or makes the whole batch's embeddings on every
  device. Here each device looks up its features, for the rows of all that it
  shares a replica with, and gives them their rows for its own.

  Args:
    table: [rows, features].
    ids: [batch, ...] rows of the table.
    table_axes: logical axes of the table.

  Returns:
    [batch, ..., features].
  """
  if not nn.get_logical_axis_rules():
    return jnp.take(table, ids, axis=0)
  features = nn.logical_to_mesh_axes(tuple(table_axes))[-1]
  rows = _names(nn.logical_to_mesh_axes(('batch',))[0])
  left = tuple(name for name in rows if name not in _names(features))
  if left == rows or jax.sharding.get_abstract_mesh().empty:
    return jnp.take(table, ids, axis=0)

  def pin(x, *axes):
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

  between = (None,) * (ids.ndim - 1)
  found = jnp.take(table, pin(ids, left, *between), axis=0)
  return pin(pin(found, left, *between, features), rows, *between, None)


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


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Returns a tree of shapes with the shardings of another."""
  return jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(
      shape.shape, shape.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )


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
    ValueError: lists path, shape and the mesh axis that does not divide, and
      says how large that axis may be.
  """
  problems = []
  sizes: dict[tuple[str, ...], list[int]] = {}  # by the mesh axes they divide
  refused = {}  # mesh axes to the mesh

  def check(path, shape, sharding):
    for size, axes in zip(shape.shape, sharding.spec, strict=False):
      names = _names(axes)
      ways = math.prod(sharding.mesh.shape[name] for name in names)
      sizes.setdefault(names, []).append(size)
      if size % ways:
        refused[names] = sharding.mesh
        problems.append(
          f'  {jax.tree_util.keystr(path, simple=True, separator="/")} '
          f'{tuple(shape.shape)}: {size} does not divide over {ways} '
          f"devices of mesh axis '{'+'.join(names)}'"
        )

  jax.tree_util.tree_map_with_path(check, shapes, shardings)
  if problems:
    # Of the sizes in use, these and their divisors divide all.
    largest = ', '.join(
      f'{" x ".join(names)}={math.gcd(mesh.size, *sizes[names])}'
      for names, mesh in refused.items()
    )
    raise ValueError(
      'These parameters do not divide over the mesh:\n'
      + '\n'.join(problems)
      + f'\nThe largest that divides all of them, and the devices: {largest}. '
      'Set MeshConfig to it or a divisor, or change its rules.'
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of batches: rows over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def check_batch_size(
  batch_size: int,
  mesh: jax.sharding.Mesh,
  name: str = 'BATCH_SIZE',
  num_microbatches: int = 1,
) -> None:
  """Refuses a batch of which some part does not divide over the mesh.

  Raises:
    ValueError: with the batch size, the number of shards, and what would do.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  unit = shards * num_microbatches
  if batch_size < 1 or batch_size % unit:
    parts = (
      f' in NUM_MICROBATCHES={num_microbatches} parts'
      if num_microbatches > 1
      else ''
    )
    below = batch_size // unit * unit
    nearest = f'{below} or {below + unit}' if below > 0 else f'{unit}'
    raise ValueError(
      f'{name}={batch_size}{parts} does not divide over the {shards} devices '
      f"of mesh axes 'data' and 'fsdp'; set it to a multiple of {unit}, such "
      f'as {nearest}.'
    )


def own_rows(num_rows: int, mesh: jax.sharding.Mesh) -> np.ndarray:
  """Returns the rows of a batch that this process's devices hold, growing.

  Args:
    num_rows: of the whole batch.
    mesh: the device mesh, over which they divide.
  """
  places = batch_sharding(mesh).addressable_devices_indices_map((num_rows,))
  is_own = np.zeros(num_rows, bool)
  for (rows,) in filter(None, places.values()):
    is_own[rows] = True
  return np.flatnonzero(is_own)


def put_batch(
  batch: Mapping[str, np.ndarray],
  mesh: jax.sharding.Mesh,
  rows: np.ndarray | None = None,
  num_rows: int | None = None,
) -> dict[str, jax.Array]:
  """Makes one global array per key; each process puts the rows it owns.

  Args:
    batch: the whole batch, the same in every process; or some of its rows.
    mesh: the device mesh.
    rows: which these are, in growing order, with those of `own_rows` among
      them; None: all.
    num_rows: of the whole batch, if `rows` are given.
  """
  sharding = batch_sharding(mesh)

  def put(value: np.ndarray) -> jax.Array:
    if rows is None or num_rows is None:
      return jax.make_array_from_callback(
        value.shape, sharding, value.__getitem__
      )

    def take(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(num_rows)
      first = int(np.searchsorted(rows, start))
      return value[first : first + stop - start]

    return jax.make_array_from_callback(
      (num_rows, *value.shape[1:]), sharding, take
    )

  return {key: put(np.asarray(value)) for key, value in batch.items()}


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
