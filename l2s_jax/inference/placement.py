# SPDX-License-Identifier: Apache-2.0
"""Placement of the decoding model: whole on every device, if it fits.

Training shards the SLM over `fsdp`, and gathers each kernel for a step of
thousands of tokens. A decode step has one token of each row: gathering its
weights takes longer than reading them from HBM. So the decoding model is
gathered once, before the first batch. Shards along `tensor` stay.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from l2s_jax.runtime import chips, distributed, partitioning

PyTree = Any

# Of a device's free memory. The rest is for the KV cache and activations.
_SHARE = 0.25
_GATHERED = ('data', 'fsdp')


def for_decoding(
  params: PyTree, beside: PyTree, *, consume: bool = False
) -> PyTree:
  """Returns the decoding model's parameters where decoding is fastest.

  All processes make the same choice. All must call it.

  Args:
    params: of the decoding model, in the form for generation; arrays, or shapes
      with shardings.
    beside: other parameters that stay on the devices; for shapes. The memory of
      devices that are there is asked.
    consume: whether to delete the arrays that are gathered.

  Returns:
    `params` without shards along `data` and `fsdp`, if these take at most a
    quarter of the free memory of a device; otherwise `params`.
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
  if _are_there(shards):
    # One program, which all processes run.
    whole = _gathering(tuple(wanted.values()))(shards)
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
  names = partitioning.names_of(axes)
  return tuple(name for name in names if name not in _GATHERED) or None


@functools.lru_cache(maxsize=4)
def _gathering(shardings: tuple[NamedSharding, ...]) -> Any:
  """Returns a compiled copy to shardings; each evaluation makes the same."""
  return jax.jit(lambda x: x, out_shardings=list(shardings))


def _are_there(shards: Sequence[Any]) -> bool:
  """Returns whether these are arrays, not shapes."""
  return all(isinstance(shard, jax.Array) for shard in shards)


def _fits(
  leaves: Sequence[Any], wanted: Mapping[int, NamedSharding], beside: list[Any]
) -> bool:
  """Returns whether whole parameters take a small part of the free memory."""
  whole = sum(
    partitioning.bytes_per_device(leaves[number], sharding)
    for number, sharding in wanted.items()
  )
  if _are_there(leaves):
    return all(distributed.gather([whole <= _SHARE * _free_bytes()]))
  used = sum(
    partitioning.bytes_per_device(leaf, leaf.sharding)
    for leaf in [*leaves, *beside]
    if hasattr(leaf, 'sharding')
  )
  device = next(iter(wanted.values())).mesh.devices.flat[0]
  chip = chips.of_device(device.device_kind)
  return chip is None or whole <= _SHARE * (chip.hbm_bytes - used)


def _free_bytes() -> float:
  """Returns the free memory of this process' fullest device.

  Devices that do not tell, such as CPUs, have no bound.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  return min(
    found.get('bytes_limit', math.inf) - found.get('bytes_in_use', 0)
    for found in stats
  )
