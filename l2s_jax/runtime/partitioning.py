# SPDX-License-Identifier: Apache-2.0
"""The device mesh, logical axis rules, and shardings.

Modules name the logical axes of their parameters and activations (`batch`,
`embed`, `heads`, ...). The rules map them to mesh axes (`data`, `fsdp`,
`tensor`). The LLM and the SLM use the same logical axes and may have different
rules: the SLM's rules apply everywhere except inside the LLM's call. This is
the only module that unboxes Flax's partitioning metadata.
"""

import contextlib
import dataclasses
import math
import os
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

# Earlier rules take precedence: an activation [batch, length, embed] uses
# `fsdp` for its batch, so its `embed` axis stays unsharded.
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
# Logical axes that stay unsharded if their size does not divide: grouped-query
# attention has few key/value heads, and vocabularies have any size (GPT-2:
# 50257).
MAY_STAY_WHOLE = ('kv_heads', 'vocab')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes, and the axis rules of both models.

  Attributes:
    data: replicas of the parameters; -1 takes the remaining devices. TPU slices
      and GPU nodes are laid out along this axis first.
    fsdp: shards of the parameters along `embed`; the batch is sharded over this
      axis, too.
    tensor: shards along `heads` and `mlp`, and along `kv_heads` and `vocab` if
      these divide.
    llm_rules: overrides of `DEFAULT_RULES` for the LLM, from logical axis to a
      mesh axis, several ones, or None. {'embed': None} replicates the LLM over
      `fsdp`.
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
          "mesh axis, such as {'embed': None}; {} keeps the default rules."
        )
      for name, axes in rules.items():
        if name not in dict(DEFAULT_RULES):
          raise ValueError(
            f'MeshConfig.{field} has {name!r}, which is not one of the logical '
            f'axes {", ".join(dict(DEFAULT_RULES))}.'
          )
        for axis in names_of(axes):
          if axis not in MESH_AXES:
            raise ValueError(
              f'MeshConfig.{field} maps {name!r} to {axis!r}, which is not one '
              f'of the mesh axes {MESH_AXES}.'
            )

  def rules(self, tower: str) -> Rules:
    """Returns the axis rules of the LLM ('llm') or of the rest ('slm')."""
    changed = self.llm_rules if tower == 'llm' else self.slm_rules
    return tuple(
      (name, tuple(axes) if isinstance(axes, list) else axes)
      for name, axes in (dict(DEFAULT_RULES) | dict(changed)).items()
    )


gin.external_configurable(MeshConfig, module='l2s_jax')


def names_of(axes: MeshAxes) -> tuple[str, ...]:
  """Returns the mesh axes of one array dimension."""
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _all_devices() -> list[jax.Device]:
  try:
    return jax.devices()
  # Of an absent platform, JAX 0.10 raises either, the second without words.
  except (RuntimeError, AssertionError) as error:
    raise ValueError(
      f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}: JAX finds no such '
      'devices here. Set JAX_PLATFORMS=cpu to run on CPU; for GPU or TPU, '
      "install JAX's package for it (docs/install.md), and look for its driver "
      'with `nvidia-smi`.'
    ) from error


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Creates the mesh ('data', 'fsdp', 'tensor') over all devices.

  Args:
    config: the axis sizes.
    devices: the devices; None takes all of `jax.devices()`.

  Raises:
    ValueError: if the product of the axis sizes is not the number of devices;
      suggests the nearest sizes. If there are no devices of JAX_PLATFORMS.
  """
  devices = _all_devices() if devices is None else list(devices)
  return jax.sharding.Mesh(
    arrange(fit(config, len(devices)), devices),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
  )


def fit(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
  """Returns the mesh shape for a number of devices, with -1 resolved.

  Raises:
    ValueError: as `make_mesh` does.
  """
  asked = (config.data, config.fsdp, config.tensor)
  if asked.count(-1) > 1 or any(n == 0 or n < -1 for n in asked):
    raise ValueError(
      f'MeshConfig has {_axes_text(asked)}: expected positive axis sizes, and '
      'at most one -1 (all remaining devices).'
    )
  shape = _nearest_shape(asked, num_devices)
  if any(n not in (-1, size) for n, size in zip(asked, shape, strict=True)):
    raise ValueError(
      f'MeshConfig has {_axes_text(asked)}, whose product is not the number of '
      f'devices, {num_devices}. The nearest valid sizes are '
      f'{_axes_text(shape)}.'
    )
  return shape


def _axes_text(shape: Sequence[int]) -> str:
  return ', '.join(f'{a}={n}' for a, n in zip(MESH_AXES, shape, strict=True))


def _nearest_shape(
  asked: tuple[int, ...], num_devices: int
) -> tuple[int, int, int]:
  """Returns the mesh shape for `num_devices` nearest to the requested one.

  The nearest shape changes the fewest axes, by the smallest factors. -1 stands
  for any size.
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
  """Arranges devices in the shape of the mesh by network proximity.

  Neighbours along `tensor` are nearest, then those along `fsdp`. Several TPU
  slices or GPU nodes, which are joined by a slower network, are laid out along
  the outermost axes that they divide. Over `data`, only the sum of gradients
  crosses that network, once per step.

  Args:
    shape: mesh shape.
    devices: devices, or the device descriptions of a topology.

  Returns:
    [data, fsdp, tensor] array of devices.
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
  """Returns a context manager that sets the rules of logical constraints."""
  return nn.logical_axis_rules(rules)


def current_rules() -> Rules:
  """Returns the rules of logical constraints that are set."""
  return tuple(nn.get_logical_axis_rules())


def axes_that_divide(
  axes: Sequence[str | None],
  shape: Sequence[int],
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
  rules: Rules | None = None,
) -> tuple[str | None, ...]:
  """Returns logical axes, with None for optional ones that do not divide.

  Only axes of `MAY_STAY_WHOLE` are replaced; each device then holds the whole
  axis.

  Args:
    axes: logical axes of an array.
    shape: its shape.
    mesh: the mesh; None takes the current one.
    rules: the axis rules; None takes the current ones.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  mesh_axes = nn.logical_to_mesh_axes(tuple(axes), rules)

  def divides(size, axes):
    return size % math.prod(mesh.shape.get(n, 1) for n in names_of(axes)) == 0

  return tuple(
    None if axis in MAY_STAY_WHOLE and not divides(size, onto) else axis
    for axis, size, onto in zip(axes, shape, mesh_axes, strict=True)
  )


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Constrains the sharding of an array in jit, along axes that divide."""
  return nn.with_logical_constraint(x, axes_that_divide(axes, x.shape))


def look_up(
  table: jax.Array | np.ndarray,
  ids: jax.Array | np.ndarray,
  table_axes: Sequence[str | None],
) -> jax.Array:
  """Looks up table rows and returns them with the sharding of the batch.

  Under FSDP, the table's features and the batch are sharded over the same
  devices. Without constraints the partitioner gathers the table, or computes
  the embeddings of the global batch on every device. Here each device looks up
  its features for the rows of its whole FSDP group, and the features are then
  exchanged for the rows of each device.

  Args:
    table: [rows, features].
    ids: [batch, ...] indices of table rows.
    table_axes: logical axes of the table; None for one without a name.

  Returns:
    [batch, ..., features].
  """
  if not nn.get_logical_axis_rules():
    return jnp.take(table, ids, axis=0)
  features = nn.logical_to_mesh_axes(tuple(table_axes))[-1]
  rows = names_of(nn.logical_to_mesh_axes(('batch',))[0])
  left = tuple(name for name in rows if name not in names_of(features))
  if left == rows or jax.sharding.get_abstract_mesh().empty:
    return jnp.take(table, ids, axis=0)

  def pin(x, *axes):
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

  between = (None,) * (ids.ndim - 1)
  found = jnp.take(table, pin(ids, left, *between), axis=0)
  return pin(pin(found, left, *between, features), rows, *between, None)


@contextlib.contextmanager
def use_mesh(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Sets the current mesh, which logical constraints refer to."""
  with jax.set_mesh(mesh):
    yield


def platform() -> str:
  """Returns the platform of the current mesh: 'cpu', 'gpu' or 'tpu'.

  Without a mesh, that of JAX's default devices. The devices of a mesh need not
  be attached.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return str(device.platform) if device else jax.default_backend()


def unbox(tree: PyTree) -> PyTree:
  """Removes the partitioning metadata of newly initialized parameters."""

  def is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)

  # The shardings of the initializing jit place the parameters. A constraint
  # here would also fail for abstract shapes.
  return jax.tree.map(
    lambda x: x.unbox(apply_constraint=False) if is_box(x) else x,
    tree,
    is_leaf=is_box,
  )


def abstract_params(
  init: Callable[..., PyTree], *args: Any
) -> tuple[PyTree, PyTree]:
  """Returns shapes and logical axes of the parameters created by `init`.

  Args:
    init: a module's `init`, or a similar function of a PRNG key and `args` that
      returns {'params': ...}.
    *args: its other arguments; arrays or shapes.

  Returns:
    A pytree of `jax.ShapeDtypeStruct`, and a pytree of `PartitionSpec` with
    logical axis names.
  """
  # The key is made within: as an array it would cost the compilation of a
  # program.
  boxed = jax.eval_shape(lambda *args: init(jax.random.key(0), *args), *args)[
    'params'
  ]
  return unbox(boxed), nn.get_partition_spec(boxed)


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Returns a pytree of shapes with the shardings of another pytree."""
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
  """Returns the sharding of each parameter by the rules of its model.

  Args:
    shapes: pytree of parameter shapes.
    logical_axes: pytree of logical `PartitionSpec`. The subtree `llm` follows
      the LLM's rules, everything else the SLM's.
    mesh: the device mesh.
    config: the axis rules.
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
  """Returns the sharding of an optimizer slot from that of its parameter.

  Axes on which slot and parameter differ in size, as in factored statistics,
  are not sharded.
  """
  if shape == param_shape:
    return param_sharding
  if len(shape) != len(param_shape):
    return NamedSharding(param_sharding.mesh, PartitionSpec())
  sizes = zip(shape, param_shape, param_sharding.spec, strict=False)
  spec = (axes if size == of_param else None for size, of_param, axes in sizes)
  return NamedSharding(param_sharding.mesh, PartitionSpec(*spec))


def check_divisible(shapes: PyTree, shardings: PyTree) -> None:
  """Validates that all parameter shapes divide evenly over the mesh.

  Args:
    shapes: pytree of shapes.
    shardings: pytree of shardings of the same structure.

  Raises:
    ValueError: lists path, shape and mesh axis of each misfit, and the largest
      size of the axis that would divide.
  """
  problems = []
  sizes: dict[tuple[str, ...], list[int]] = {}  # by mesh axes
  refused = {}  # mesh axes to the mesh

  def check(path, shape, sharding):
    for size, axes in zip(shape.shape, sharding.spec, strict=False):
      names = names_of(axes)
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
    # These sizes, and their divisors, divide all dimensions.
    largest = ', '.join(
      f'{" x ".join(names)}={math.gcd(mesh.size, *sizes[names])}'
      for names, mesh in refused.items()
    )
    raise ValueError(
      'These parameters do not divide over the mesh:\n'
      + '\n'.join(problems)
      + '\nThe largest size that divides all of them, and the devices: '
      f'{largest}. Set MeshConfig to it or a divisor, or change its rules.'
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of a fully replicated array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of a batch: rows over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def check_batch_size(
  batch_size: int,
  mesh: jax.sharding.Mesh,
  name: str = 'BATCH_SIZE',
  num_microbatches: int = 1,
) -> None:
  """Validates that a batch and its microbatches divide over the mesh.

  Args:
    batch_size: global batch size.
    mesh: the device mesh.
    name: name of the setting, for errors.
    num_microbatches: microbatches per batch.

  Raises:
    ValueError: names the batch size, the number of shards and valid sizes.
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
  """Returns the sorted rows of a batch on the devices of this process.

  Args:
    num_rows: global batch size.
    mesh: the device mesh.
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
  """Creates a global array per key from the rows of each process.

  Args:
    batch: the global batch, the same in every process; or some of its rows.
    mesh: the device mesh.
    rows: sorted indices of the given rows, including those of `own_rows`; None
      if all rows are given.
    num_rows: global batch size, if `rows` are given.
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
  """Returns the bytes per device of a sharded pytree."""
  sizes = jax.tree.map(
    lambda s, sharding: (
      math.prod(sharding.shard_shape(s.shape)) * s.dtype.itemsize
    ),
    shapes,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))
