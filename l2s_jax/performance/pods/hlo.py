# SPDX-License-Identifier: Apache-2.0
"""Parser of optimized HLO text: computations, instructions, device groups.

Costs of instructions are in `hlo_costs.py`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_BITS = {'pred': 8, 'bf16': 16, 's4': 4, 'u4': 4, 'c64': 64, 'c128': 128}
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.-]+) = (.*)')
_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_MESH_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


class Array(NamedTuple):
  """An array of a shape: dimensions, bytes, and whether it is in HBM."""

  dims: tuple[int, ...]
  num_bytes: float
  in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One HLO instruction.

  Attributes:
    name: without the percent sign.
    opcode: such as 'dot'.
    arrays: arrays of the result; the members of a tuple in order.
    operands: names of the operands.
    text: the text after the operands.
    literal: the text in parentheses of a constant or parameter.
    is_root: whether it is the root of its computation.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str
  literal: str
  is_root: bool

  @property
  def num_bytes(self) -> float:
    """Bytes of the result."""
    return sum((array.num_bytes for array in self.arrays), 0.0)

  @property
  def hbm_bytes(self) -> float:
    """Bytes of the result in HBM."""
    return sum((x.num_bytes for x in self.arrays if x.in_hbm), 0.0)

  @property
  def op_name(self) -> str:
    """Its origin in the model."""
    match = re.search(r'op_name="([^"]*)"', self.text)
    return match[1] if match else ''

  def attribute(self, name: str) -> str:
    """Returns the text in the braces of `name={...}`; '' if absent."""
    match = re.search(rf'\b{name}=\{{([^}}]*)\}}', self.text)
    return match[1] if match else ''

  def callee(self, kind: str) -> str:
    """Returns the name of the computation in `kind=...`; '' if absent."""
    match = re.search(rf'\b{kind}=%?([\w.-]+)', self.text)
    return match[1] if match else ''


Computation = Mapping[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Parses HLO text; returns computations by name, and the entry's name.

  Raises:
    ValueError: if the text has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry = ''
  current: dict[str, Instruction] = {}
  for line in text.splitlines():
    if line[:1] not in ('', ' ', '}') and line.endswith('{'):
      header = _COMPUTATION.match(line)
      if header:
        current = computations.setdefault(header[1], {})
        entry = header[1] if line.startswith('ENTRY') else entry
      continue
    match = _INSTRUCTION.match(line)
    if match:
      instruction = _parse_instruction(match[2], match[3], bool(match[1]))
      current[instruction.name] = instruction
  if not entry:
    raise ValueError('The HLO text has no ENTRY computation.')
  return dict(computations), entry


def _parse_instruction(name: str, line: str, is_root: bool) -> Instruction:
  """Parses the text after `name =`."""
  line = re.sub(r'/\*index=\d+\*/', '', line)
  end = _closing(line, 0) + 1 if line[0] == '(' else line.index(' ')
  # A layout contains brackets, but no space.
  shape, rest = line[:end], line[end:].lstrip()
  opening = rest.index('(')
  closing = _closing(rest, opening)
  inside = rest[opening + 1 : closing]
  return Instruction(
    name,
    rest[:opening],
    tuple(_arrays(shape)),
    tuple(re.findall(r'%([\w.-]+)', inside)),
    rest[closing + 1 :],
    inside,
    is_root,
  )


def _closing(text: str, opening: int) -> int:
  """Returns the index of the bracket that closes the one at `opening`."""
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  raise ValueError(f'A bracket does not close: {text[opening:80]}')


def _arrays(shape: str) -> Iterator[Array]:
  for dtype, sizes, layout in _ARRAY.findall(shape):
    dims = tuple(int(size) for size in sizes.split(',') if size)
    digits = re.search(r'\d+', dtype)
    bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
    # S(1) and higher are memories on the chip, or of the host.
    yield Array(dims, math.prod(dims) * bits / 8, 'S(' not in layout)


def root(computation: Computation) -> Instruction:
  """Returns the root instruction of a computation."""
  return next(x for x in computation.values() if x.is_root)


def origin(x: Instruction, computation: Computation) -> Instruction:
  """Follows copies, bitcasts and converts back to the original value."""
  while x.opcode in ('copy', 'bitcast', 'convert', 'copy-start', 'copy-done'):
    x = computation[x.operands[0]]
  return x


def index(x: Instruction) -> int:
  """Returns the index of a get-tuple-element."""
  match = re.search(r'index=(\d+)', x.text)
  assert match, x
  return int(match[1])


def num_devices(text: str) -> int:
  """Returns the number of devices of a program."""
  header = text.partition('\n')[0]
  sizes = re.findall(r'(?:num_partitions|replica_count)=(\d+)', header)
  return math.prod(map(int, sizes))


def devices(x: Instruction, num_devices: int) -> tuple[int, ...]:
  """Returns one device group of a collective.

  Args:
    x: the collective.
    num_devices: number of devices of the program.
  """
  pairs = re.search(r'source_target_pairs=\{(\{.*?\})\}', x.text)
  if pairs:
    return _ring(re.findall(r'\{(\d+),(\d+)\}', pairs[1]))
  groups = re.search(r'replica_groups=\{\{([\d,]+)\}', x.text)
  if groups:
    return tuple(int(i) for i in groups[1].split(','))
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=(\S+)', x.text)
  if iota:
    ids = _iota(iota[2].removesuffix(','))
    return tuple(int(i) for i in ids.reshape(_numbers(iota[1]))[0])
  mesh = re.search(r'replica_groups=mesh\[(.*?)\](.*?)\{([^}]*)\}', x.text)
  if mesh:
    return _mesh_group(*mesh.groups())
  # An empty list means all devices.
  return tuple(range(num_devices if 'replica_groups={}' in x.text else 1))


def count_ids(text: str) -> int:
  """Returns the number of ids in '0:7' (inclusive) or '1,2'."""
  count = 0
  for part in text.split(','):
    first, _, last = part.partition(':')
    count += int(last or first) - int(first) + 1
  return count


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(i) for i in text.split(','))


def _ring(pairs: Sequence[tuple[str, str]]) -> tuple[int, ...]:
  """Returns the devices reachable from the first one along the pairs."""
  targets: dict[int, list[int]] = {}
  for source, target in pairs:
    targets.setdefault(int(source), []).append(int(target))
  ring = [int(pairs[0][0])]
  for device in ring:  # grows in the loop
    ring += [i for i in targets.get(device, ()) if i not in ring]
  return tuple(ring)


def _iota(text: str) -> np.ndarray:
  """Returns 0, 1, ... in the order given by '[4,2]T(1,0)'."""
  match = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  assert match, text
  sizes = _numbers(match[1])
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(_numbers(match[2])) if match[2] else ids


def _mesh_group(mesh: str, order: str, axes: str) -> tuple[int, ...]:
  """Returns the first group along axes, or parts of axes, of a mesh.

  Args:
    mesh: mesh axes, as in "'a'=4,'b'=2".
    order: device order, as in ', device_ids=([2,2,2]T(1,0,2))'; may be empty.
    axes: axes of the group, as in "'a'". "'a':(2)2" is the sub-axis of size 2
      after one of size 2.
  """
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values()))
  permuted = re.search(r'device_ids=\((\[.*\S)\)', order)
  if permuted:
    ids = _iota(permuted[1])
  ids = ids.reshape(tuple(sizes.values()))
  chosen = {
    name: (int(before or 1), int(size or sizes[name]))
    for name, before, size in _MESH_AXIS.findall(axes)
  }
  picks = []
  for name, size in sizes.items():
    before, count = chosen.get(name, (1, 1))
    step = size // (before * count)
    picks.append(np.arange(count) * step)
  return tuple(int(i) for i in ids[np.ix_(*picks)].ravel())
