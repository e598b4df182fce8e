# SPDX-License-Identifier: Apache-2.0
"""Costs of a compiled program per device, from its optimized HLO text.

XLA's cost analysis counts a loop body once: of 24 scanned layers it counts one.
This module multiplies by the trip count. It counts FLOPs of matrix products,
bytes read from and written to HBM, and bytes received in collectives. Of a
Pallas kernel it takes the FLOPs of its cost estimate, and the bytes of operands
and results. Hardware and time are in `runtime/chips.py`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from l2s_jax.performance.pods import hlo

_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
# Instructions without HBM traffic of their own.
_FREE = frozenset({
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'conditional', 'call', 'after-all', 'partition-id', 'replica-id',
  'opt-barrier', 'add-dependency', 'optimization-barrier',
})  # fmt: skip
_FREE_CALLS = re.compile('AllocateBuffer|AssumeGather|ConcatBitcast|Sharding')
_COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# A kernel is a program of its own, so its author counts the FLOPs.
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation, possibly repeated.

  Attributes:
    kind: such as 'all-gather'.
    devices: one of its groups, by position in the mesh.
    shape: shape of the result.
    num_bytes: bytes a device receives each time, with a ring algorithm: of an
      all-gather the missing shards, of an all-reduce twice that.
    count: number of executions.
    op_name: its origin in the model.
  """

  kind: str
  devices: tuple[int, ...]
  shape: tuple[int, ...]
  num_bytes: float
  count: int | float
  op_name: str

  @property
  def total_bytes(self) -> float:
    """Bytes a device receives in all executions."""
    return self.num_bytes * self.count


@dataclasses.dataclass(frozen=True)
class HloCosts:
  """Costs of one device in one run of a program.

  Attributes:
    flops: FLOPs of matrix products.
    hbm_bytes: bytes read from and written to HBM.
    collectives: collectives with their counts.
    open_loops: costs of one iteration of each loop with data-dependent trip
      count; not included in the above.
  """

  flops: float = 0.0
  hbm_bytes: float = 0.0
  collectives: tuple[Collective, ...] = ()
  open_loops: 'tuple[HloCosts, ...]' = ()

  def __add__(self, other: 'HloCosts') -> 'HloCosts':
    return HloCosts(
      self.flops + other.flops,
      self.hbm_bytes + other.hbm_bytes,
      self.collectives + other.collectives,
      self.open_loops + other.open_loops,
    )

  def times(self, count: int | float) -> 'HloCosts':
    """Returns the costs of `count` executions."""
    return HloCosts(
      count * self.flops,
      count * self.hbm_bytes,
      tuple(
        dataclasses.replace(x, count=count * x.count) for x in self.collectives
      ),
      self.open_loops,
    )

  @property
  def collective_bytes(self) -> float:
    """Bytes a device receives in all collectives."""
    return sum((x.total_bytes for x in self.collectives), 0.0)


def count(text: str) -> HloCosts:
  """Returns the costs of a program per device.

  Args:
    text: `compiled.as_text()`, of any platform.

  Raises:
    ValueError: if the text has no entry computation.
  """
  computations, entry = hlo.parse(text)
  return _Counter(computations, hlo.num_devices(text)).costs(entry)


class _Counter:
  """Sums the costs of computations, multiplied by their trip counts."""

  def __init__(
    self, computations: Mapping[str, hlo.Computation], num_devices: int
  ):
    self._computations = computations
    self._num_devices = num_devices
    self._callers = {
      instruction.callee('body'): (computation, instruction)
      for computation in computations.values()
      for instruction in computation.values()
      if instruction.opcode == 'while'
    }
    self.costs = functools.cache(self._costs)
    self._fused = functools.cache(self._count_fused)

  def _costs(self, name: str) -> HloCosts:
    """Returns the costs of one run of a computation."""
    computation = self._computations[name]
    flops, hbm_bytes = 0.0, 0.0
    collectives: tuple[Collective, ...] = ()
    others: list[HloCosts] = []
    for x in computation.values():
      hbm_bytes += self._hbm_bytes(x, computation)
      if x.opcode == 'while':
        trips = self._trip_count(x, computation)
        body = self.costs(x.callee('body'))
        if trips is None:
          others.append(HloCosts(open_loops=(body,)))
        else:
          others.append(body.times(trips))
      elif x.opcode == 'conditional':  # the most expensive branch
        names = re.findall(r'[\w.-]+', ','.join(_BRANCHES.findall(x.text)))
        names = names or re.findall(
          r'(?:true|false)_computation=%?([\w.-]+)', x.text
        )
        others.append(max(map(self.costs, names), key=lambda c: c.hbm_bytes))
      elif x.opcode == 'call':
        others.append(self.costs(x.callee('to_apply')))
      else:
        own_flops, own_collectives = self._one(x, computation)
        flops += own_flops
        collectives += own_collectives
    return sum(others, HloCosts(flops, hbm_bytes, collectives))

  def _count_fused(self, name: str) -> tuple[float, tuple[Collective, ...]]:
    """Returns FLOPs and collectives of a fused or async computation."""
    computation = self._computations[name]
    flops = 0.0
    collectives: tuple[Collective, ...] = ()
    for x in computation.values():
      own_flops, own_collectives = self._one(x, computation)
      flops += own_flops
      collectives += own_collectives
    # XLA:TPU writes a reduce-scatter as an all-reduce of which each device
    # takes its shard.
    if any(x.opcode == 'partition-id' for x in computation.values()):
      collectives = tuple(
        dataclasses.replace(x, kind='reduce-scatter', num_bytes=x.num_bytes / 2)
        if x.kind == 'all-reduce'
        else x
        for x in collectives
      )
    return flops, collectives

  def _one(
    self, x: hlo.Instruction, computation: hlo.Computation
  ) -> tuple[float, tuple[Collective, ...]]:
    kind = x.opcode.removesuffix('-start')
    if x.opcode == 'custom-call':
      estimate = _KERNEL_FLOPS.search(x.text)
      return float(estimate[1]) if estimate else 0.0, ()
    if x.opcode == 'dot':
      return _dot_flops(x, computation), ()
    if x.opcode == 'convolution':
      return _convolution_flops(x, computation), ()
    if kind in _COLLECTIVES:
      # XLA:TPU splits a collective over several fusions, to overlap it with
      # compute.
      is_part = 'chain_id=' in x.text and not any(
        'AsyncCollectiveStart' in user.text and x.name in user.operands
        for user in computation.values()
      )
      if is_part:
        return 0.0, ()
      devices = hlo.devices(x, self._num_devices)
      return 0.0, (_collective(kind, x, computation, devices),)
    if x.opcode == 'send' and '_xla_megascale_target' in x.text:
      return 0.0, (_between_slices(x, computation),)
    if x.opcode in ('fusion', 'async-start'):
      flops, collectives = self._fused(x.callee('calls'))
      return flops, tuple(
        y if y.op_name else dataclasses.replace(y, op_name=x.op_name)
        for y in collectives
      )
    return 0.0, ()

  def _trip_count(
    self, x: hlo.Instruction, computation: hlo.Computation
  ) -> int | None:
    """Returns the trip count of a loop; None if it depends on data."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', x.text)
    if known:
      return int(known[1])
    condition = self._computations[x.callee('condition')]
    root = hlo.root(condition)
    if root.opcode != 'compare':
      return None
    first, last = (
      hlo.origin(condition[name], condition) for name in root.operands
    )
    if first.opcode != 'get-tuple-element' or last.opcode != 'constant':
      return None
    index = hlo.index(first)
    start = self._value(computation[x.operands[0]], computation, index)
    step = self._step(self._computations[x.callee('body')], index)
    if start is None or not step:
      return None
    end = int(last.literal) + ('direction=LE' in root.text)
    return max(math.ceil((end - start) / step), 0)

  def _step(self, body: hlo.Computation, index: int) -> int | None:
    """Returns the increment of a loop's counter per iteration."""
    operands = hlo.root(body).operands
    if len(operands) <= index:
      return None
    update = hlo.origin(body[operands[index]], body)
    if update.opcode != 'add':
      return None
    first, second = (hlo.origin(body[name], body) for name in update.operands)
    if first.opcode == 'constant':
      first, second = second, first
    is_counter = (
      first.opcode == 'get-tuple-element' and hlo.index(first) == index
    )
    return self._value(second, body) if is_counter else None

  def _value(
    self,
    x: hlo.Instruction,
    computation: hlo.Computation,
    index: int | None = None,
  ) -> int | None:
    """Returns an integer that is constant at compile time, else None.

    Args:
      x: the instruction with the value.
      computation: its computation.
      index: index of the value if `x` is a tuple.
    """
    x = hlo.origin(x, computation)
    if x.opcode == 'constant':
      return int(x.literal) if re.fullmatch(r'-?\d+', x.literal) else None
    if x.opcode == 'tuple' and index is not None:
      return self._value(computation[x.operands[index]], computation)
    if x.opcode == 'get-tuple-element':
      source = computation[x.operands[0]]
      return self._value(source, computation, hlo.index(x))
    if index is None:
      return None
    if x.opcode == 'while':  # a loop-invariant member
      body = self._computations[x.callee('body')]
      if _is_kept(body, index):
        return self._value(computation[x.operands[0]], computation, index)
    if x.opcode == 'parameter' and _is_kept(computation, index):
      name = next(
        name for name, c in self._computations.items() if c is computation
      )
      if name in self._callers:
        outer, loop = self._callers[name]
        return self._value(outer[loop.operands[0]], outer, index)
    return None

  def _hbm_bytes(
    self, x: hlo.Instruction, computation: hlo.Computation
  ) -> float:
    """Returns the HBM bytes read and written by one instruction."""
    if x.opcode in _FREE or x.opcode.endswith('-done'):
      return 0.0
    if x.opcode == 'custom-call' and _FREE_CALLS.search(x.text):
      return 0.0
    operands = [computation[name] for name in x.operands]
    if x.opcode == 'fusion':
      return self._fusion_bytes(x, operands)
    if x.opcode.removesuffix('-start') in _SLICES:
      part = x.arrays[1 if x.opcode.endswith('-start') else 0]
      return part.num_bytes * (operands[0].arrays[0].in_hbm + part.in_hbm)
    if x.opcode in ('dynamic-update-slice', 'scatter'):
      update = operands[1 if x.opcode == 'dynamic-update-slice' else -1]
      return update.hbm_bytes + update.num_bytes * x.arrays[0].in_hbm
    read = sum(operand.hbm_bytes for operand in operands)
    written = x.hbm_bytes
    if x.opcode == 'copy-start':
      written = x.arrays[0].num_bytes * x.arrays[0].in_hbm
    elif x.opcode.endswith('-start') and len(x.arrays) > len(operands):
      # The result tuple includes the operands.
      results = x.arrays[len(operands) : 2 * len(operands)]
      written = sum(array.num_bytes for array in results if array.in_hbm)
    return read + written

  def _fusion_bytes(
    self, x: hlo.Instruction, operands: Sequence[hlo.Instruction]
  ) -> float:
    """Returns the HBM bytes read and written by a fusion.

    An operand that is only sliced counts with its slices; one that is updated
    in place counts with the update.
    """
    inside = self._computations[x.callee('calls')]
    users: dict[str, list[hlo.Instruction]] = {name: [] for name in inside}
    for instruction in inside.values():
      for name in instruction.operands:
        users[name].append(instruction)

    def read(name: str, whole: float) -> float:
      """Returns the bytes read of a value, at most `whole`."""
      total = 0.0
      for user in users[name]:
        if user.opcode in _SLICES and user.operands[0] == name:
          total += user.num_bytes
        elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
          pass
        elif user.opcode == 'bitcast':
          total += read(user.name, whole)
        else:
          return whole
      return min(total, whole)

    moved = 0.0
    for instruction in inside.values():
      if instruction.opcode == 'parameter':
        whole = operands[int(instruction.literal)].hbm_bytes
        moved += read(instruction.name, whole) if whole else 0.0
    root = hlo.root(inside)
    results = [root]
    if root.opcode == 'tuple':
      results = [inside[name] for name in root.operands]
    for result, array in zip(results, x.arrays, strict=False):
      if not array.in_hbm:
        continue
      result = hlo.origin(result, inside)
      if result.opcode == 'dynamic-update-slice':
        moved += inside[result.operands[1]].num_bytes
      elif result.opcode != 'parameter':
        moved += array.num_bytes
    return moved


def _is_kept(body: hlo.Computation, index: int) -> bool:
  """Returns whether a loop body passes a tuple member on unchanged."""
  operands = hlo.root(body).operands
  if len(operands) <= index:
    return False
  x = hlo.origin(body[operands[index]], body)
  return (
    x.opcode == 'get-tuple-element'
    and hlo.index(x) == index
    and body[x.operands[0]].opcode == 'parameter'
  )


def _dot_flops(x: hlo.Instruction, computation: hlo.Computation) -> float:
  left = computation[x.operands[0]].arrays[0].dims
  axes = x.attribute('lhs_contracting_dims')
  contracted = math.prod(left[int(axis)] for axis in axes.split(',') if axis)
  return 2.0 * math.prod(x.arrays[0].dims) * contracted


def _convolution_flops(
  x: hlo.Instruction, computation: hlo.Computation
) -> float:
  """Returns the FLOPs of a convolution, XLA:TPU's form of every dot.

  A batch dimension of a dot becomes a window that covers one element and
  padding; only positions with data count.
  """
  match = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', x.text)
  assert match, x
  left, right = (computation[name].arrays[0].dims for name in x.operands[:2])
  sizes = [
    dict(zip(labels, dims, strict=True))
    for labels, dims in zip(
      match.groups(), (left, right, x.arrays[0].dims), strict=True
    )
  ]
  lhs, rhs, out = sizes
  window = dict(re.findall(r'(\w+)=([\dx_-]+)', x.attribute('window')))
  products = 1.0
  for i, axis in enumerate(sorted(name for name in out if name.isdigit())):

    def of(name: str, default: int, i: int = i) -> int:
      return int(window[name].split('x')[i]) if name in window else default

    pads = window.get('pad', '').split('x')
    low = int(pads[i].split('_')[0]) if pads[0] else 0
    places = (
      np.arange(out[axis])[:, None] * of('stride', 1)
      - low
      + np.arange(rhs[axis]) * of('rhs_dilate', 1)
    )
    dilation = of('lhs_dilate', 1)
    inside = (places >= 0) & (places <= (lhs[axis] - 1) * dilation)
    products *= np.count_nonzero(inside & (places % dilation == 0))
  groups = re.search(r'batch_group_count=(\d+)', x.text)
  batch = lhs['b'] / (int(groups[1]) if groups else 1)
  return float(2 * products * batch * rhs['i'] * rhs['o'])


def _between_slices(
  x: hlo.Instruction, computation: hlo.Computation
) -> Collective:
  """Returns a collective between slices, which XLA:TPU leaves to the hosts.

  Each device sends its part, and receives it summed over slices (all-reduce) or
  receives the missing parts of other slices.
  """
  match = re.search(r'_xla_megascale_target="\{(.*?)\}x\{(.*?)\}"', x.text)
  assert match, x
  num_slices, num_devices = (hlo.count_ids(ids) for ids in match.groups())
  sent = computation[x.operands[0]]
  ring = 2 if 'transfer_type="ALL_REDUCE"' in x.text else 1
  return Collective(
    'between slices',
    tuple(range(0, num_slices * num_devices, num_devices)),
    sent.arrays[0].dims,
    ring * sent.num_bytes * (num_slices - 1) / num_slices,
    1,
    x.op_name,
  )


def _collective(
  kind: str,
  x: hlo.Instruction,
  computation: hlo.Computation,
  devices: tuple[int, ...],
) -> Collective:
  operands = [computation[name] for name in x.operands]
  given = sum(operand.num_bytes for operand in operands)
  others = len(devices) - 1
  received = {
    'all-gather': given * others,
    'all-reduce': 2 * given * others / len(devices),
    'reduce-scatter': given * others / len(devices),
    'all-to-all': given * others / len(devices),
    'ragged-all-to-all': given * others / len(devices),
  }.get(kind, given if others else 0.0)
  is_tuple = len(x.arrays) > 1 and x.opcode.endswith('-start')
  result = x.arrays[1 if is_tuple else 0]
  return Collective(kind, devices, result.dims, received, 1, x.op_name)
