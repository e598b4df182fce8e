# SPDX-License-Identifier: Apache-2.0
"""Placement of the decoding model: whole on every device, if it fits.

Training shards the SLM over `fsdp`, and gathers each kernel for a step of
thousands of tokens. A decode step has one token of each row: gathering its
weights takes longer than reading them from HBM. So the decoding model is
gathered once, before the first batch. Shards along `tensor` stay.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from l2s_jax.runtime import chips, partitioning

PyTree = Any

# Of a device's memory beside the sharded parameters. The rest is for the KV
# cache, activations and, between training steps, the training state.
_SHARE = 0.25
_GATHERED = ('data', 'fsdp')


def for_decoding(
  params: PyTree, beside: PyTree, *, consume: bool = False
) -> PyTree:
  """Returns the decoding model's parameters where decoding is fastest.

  The choice depends on shapes, shardings and the type of device alone, so that
  all processes make the same one.

  Args:
    params: of the decoding model, in the form for generation; arrays, or shapes
      with shardings.
    beside: other parameters that stay on the devices.
    consume: whether to delete the arrays that are gathered.

  Returns:
    `params` without shards along `data` and `fsdp`, if these take at most a
    quarter of the memory beside the sharded parameters; otherwise `params`.
  """
  leaves, structure = jax.tree.flatten(params)
  wanted = {
    number: sharding
    for number, leaf in enumerate(leaves)
    if (sharding := _gathered(leaf)) is not None
  }
  if not wanted or not _fits(leaves, wanted, jax.tree.leaves(beside)):
    return params
  shards = [leaves[number] for number in wanted]
  if all(isinstance(shard, jax.Array) for shard in shards):
    # One program, which all processes run.
    whole = jax.jit(lambda x: x, out_shardings=list(wanted.values()))(shards)
    if consume:
      for shard in shards:
        shard.delete()
  else:
    whole = partitioning.with_shardings(shards, list(wanted.values()))
  for number, leaf in zip(wanted, whole, strict=True):
    leaves[number] = leaf
  return jax.tree.unflatten(structure, leaves)


def is_whole(params: PyTree) -> bool:
  """Returns whether no parameter has shards along `data` or `fsdp`."""
  return all(_gathered(leaf) is None for leaf in jax.tree.leaves(params))


def rules() -> partitioning.Rules:
  """Returns the current axis rules, changed for a whole decoding model.

  The rows of a batch stay where they are. With the rules of sharded parameters,
  each embedding lookup would move them.
  """
  return tuple(
    (name, axes if name == 'batch' else _left(axes))
    for name, axes in partitioning.current_rules()
  )


def _gathered(leaf: Any) -> NamedSharding | None:
  """Returns a parameter's sharding without `data` and `fsdp`, if it has them.

  NumPy arrays and tracers have no shards.
  """
  if isinstance(leaf, jax.core.Tracer):
    return None
  sharding = getattr(leaf, 'sharding', None)
  if not isinstance(sharding, NamedSharding):
    return None
  spec = PartitionSpec(*map(_left, sharding.spec))
  whole = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
  is_whole = whole.is_equivalent_to(sharding, leaf.ndim)
  return None if is_whole else whole


def _left(axes: partitioning.MeshAxes) -> partitioning.MeshAxes:
  """Returns mesh axes without those that are gathered."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return tuple(name for name in names if name not in _GATHERED) or None


def _fits(
  leaves: Sequence[Any], wanted: Mapping[int, NamedSharding], beside: list[Any]
) -> bool:
  """Returns whether whole parameters take a small part of the free memory."""
  mesh = next(iter(wanted.values())).mesh
  limit = chips.memory_bytes(mesh.devices.flat[0])
  if limit is None:
    return True
  placed = [leaf for leaf in [*leaves, *beside] if hasattr(leaf, 'sharding')]
  used = sum(
    partitioning.bytes_per_device(leaf, leaf.sharding) for leaf in placed
  )
  whole = sum(
    partitioning.bytes_per_device(leaves[number], sharding)
    for number, sharding in wanted.items()
  )
  return whole <= _SHARE * (limit - used)
