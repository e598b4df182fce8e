# SPDX-License-Identifier: Apache-2.0
"""Peak rates of accelerators by vendor specifications, and TPU slices.

The rates give lower bounds on run time. Units: GB is 10^9 bytes, GiB 2^30
bytes; all rates are per chip and per second.
"""

import dataclasses
import math
import pathlib
import platform
import re
from collections.abc import Sequence

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Specifications of one accelerator.

  Attributes:
    name: the usual name, such as 'v5e'.
    flops_per_sec: dense bfloat16 FLOP/s.
    hbm_bytes: HBM available to a program.
    hbm_bytes_per_sec: HBM bandwidth, reads and writes together.
    link_bytes_per_sec: one-way bandwidth of one link to a neighbour; of a GPU,
      the one-way bandwidth to its switch.
    network_bytes_per_sec: one-way share of its host's network.
    num_axes: dimensions of the torus; 0 for a switch.
    torus_size: an axis wraps around if its size is a multiple of this number of
      chips.
    type_name: prefix of Google's accelerator type; None for GPUs.
    source: URL of the specification.
  """

  name: str
  flops_per_sec: float
  hbm_bytes: float
  hbm_bytes_per_sec: float
  link_bytes_per_sec: float
  network_bytes_per_sec: float
  num_axes: int
  torus_size: int
  type_name: str | None
  source: str


# TPUs: ICI bandwidth of a chip in both directions, divided by two and by its
# ports (4, or 6 of v5p); the pod's network bandwidth divided by its chips. HBM
# is the limit of the compiler (libtpu 0.0.42); the runtime uses the rest. GPUs:
# SXM modules; half of NVLink's bidirectional bandwidth, and the network of a
# DGX.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      'v5e', 197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, 2, 16, 'v5litepod',
      'https://docs.cloud.google.com/tpu/docs/v5e',
    ),
    Chip(
      'v5p', 459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9, 3, 4, 'v5p',
      'https://docs.cloud.google.com/tpu/docs/v5p',
    ),
    Chip(
      'v6e', 918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9, 2, 16, 'v6e',
      'https://docs.cloud.google.com/tpu/docs/v6e',
    ),
    Chip(
      'a100', 312e12, 80e9, 2039e9, 300e9, 25e9, 0, 0, None,
      'https://www.nvidia.com/en-us/data-center/a100/',
    ),
    Chip(
      'h100', 989e12, 80e9, 3350e9, 450e9, 50e9, 0, 0, None,
      'https://www.nvidia.com/en-us/data-center/h100/',
    ),
    Chip(
      'h200', 989e12, 141e9, 4800e9, 450e9, 50e9, 0, 0, None,
      'https://www.nvidia.com/en-us/data-center/h200/',
    ),
  )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
  """One or several equal TPU slices.

  Attributes:
    chip: the type of chip.
    shape: chips along each axis of the torus.
    num_slices: number of slices, joined by the data-center network.
  """

  chip: Chip
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def name(self) -> str:
    """The compiler's name of the topology, such as 'v5e:16x16'."""
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def accelerator_type(self) -> str:
    """Google Cloud's name of the slice, such as 'v5litepod-256'.

    The number counts cores on v5p, two per chip.
    """
    cores = 2 if self.chip.num_axes == 3 else 1
    return f'{self.chip.type_name}-{cores * math.prod(self.shape)}'

  @property
  def num_chips(self) -> int:
    """Number of chips in all slices."""
    return math.prod(self.shape) * self.num_slices

  @property
  def wraps(self) -> tuple[bool, ...]:
    """Whether each axis wraps around.

    On v5e and v6e an axis of a whole pod (16 chips) wraps around; on v5p all
    axes of a slice made of 4 x 4 x 4 cubes do.
    """
    size = self.chip.torus_size
    wraps = tuple(n % size == 0 for n in self.shape)
    return (all(wraps),) * len(wraps) if self.chip.num_axes == 3 else wraps

  def seconds(
    self,
    num_bytes: float,
    coords: Sequence[tuple[int, ...]],
    *,
    is_permute: bool = False,
  ) -> float:
    """Returns a lower bound on the time of a collective.

    All axes that the group spans transfer at once. An axis contributes two
    links if it wraps around and the group spans all of it, else one, since a
    chip at an open end has one link. Between slices, each chip sends its share
    over the network.

    Args:
      num_bytes: bytes that each chip receives from the others.
      coords: coordinates of the chips in the group: slice, then position along
        each axis.
      is_permute: whether each chip receives from one other chip only.
    """
    slices = {coord[0] for coord in coords}
    links = 0
    for axis, (size, wraps) in enumerate(
      zip(self.shape, self.wraps, strict=True), start=1
    ):
      span = len({coord[axis] for coord in coords})
      if span > 1:
        links += 2 if wraps and span == size > 2 else 1
    times = [0.0]
    if links:
      times.append(num_bytes / (links * self.chip.link_bytes_per_sec))
    if len(slices) > 1:
      share = 1.0
      if not is_permute:
        # Data from other slices enters a slice once and is shared inside it.
        n, s = len(coords), len(slices)
        share = (s - 1) / s * n / (n - 1) / (n / s)
      times.append(share * num_bytes / self.chip.network_bytes_per_sec)
    return max(times)


def find(topology: str, num_slices: int = 1) -> Slice:
  """Returns the slice of a topology name, such as 'v5e:16x16'.

  Args:
    topology: TPU type and chips along each axis.
    num_slices: number of such slices.

  Raises:
    ValueError: if there is no such topology.
  """
  match = re.fullmatch(r'(v\w+):(\d+(?:x\d+)*)', topology)
  tpus = {name: chip for name, chip in CHIPS.items() if chip.num_axes}
  chip = tpus.get(match[1]) if match else None
  shape = tuple(map(int, match[2].split('x'))) if match else ()
  if chip is None or len(shape) != chip.num_axes or 0 in shape:
    raise ValueError(
      f'TOPOLOGY={topology!r}: expected a TPU and the number of chips along '
      'each axis of its interconnect, such as v5e:2x4, v6e:16x16 (two axes) or '
      f'v5p:4x4x4 (three). TPUs: {", ".join(tpus)}.'
    )
  if chip.num_axes == 2 and max(shape) > chip.torus_size:
    raise ValueError(
      f'TOPOLOGY={topology!r} is larger than a pod of {chip.name}, '
      f'{chip.torus_size}x{chip.torus_size}; use several slices with '
      'NUM_SLICES.'
    )
  return Slice(chip, shape, num_slices)


# Our chip name by a part of JAX's `device_kind`; the first match counts.
_DEVICE_KINDS = (
  ('v5 lite', 'v5e'),
  ('v5e', 'v5e'),
  ('TPU v5', 'v5p'),
  ('v6 lite', 'v6e'),
  ('v6e', 'v6e'),
  ('A100', 'a100'),
  ('H100', 'h100'),
  ('H200', 'h200'),
)


def of_device(kind: str) -> Chip | None:
  """Returns the chip for JAX's `device_kind`; None if unknown."""
  for part, name in _DEVICE_KINDS:
    if part in kind:
      return CHIPS[name]
  return None


def gib(num_bytes: int | float) -> str:
  """Formats a number of bytes in GiB."""
  return f'{num_bytes / GIB:.2f} GiB'


def cpu() -> str:
  """Returns the model name of this machine's processor."""
  path = pathlib.Path('/proc/cpuinfo')
  if path.is_file():
    for line in path.read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()
