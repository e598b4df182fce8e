# SPDX-License-Identifier: Apache-2.0
"""What accelerators can do at best, by their makers' figures; slices of TPUs.

For bounds on time: nothing runs faster than this. Bytes are bytes, GB is 10^9
and GiB 2^30, all rates are of one chip and per second.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator.

  Attributes:
    name: as users know it.
    flops_per_sec: dense bfloat16.
    hbm_bytes: that a program can have.
    hbm_bytes_per_sec: read or written.
    link_bytes_per_sec: of one link to a neighbour, one way; of a GPU, all that
      its switch gives it.
    network_bytes_per_sec: its share of its host's network, one way.
    num_axes: of the torus that links make; 0 for a switch.
    torus_size: chips along an axis from which its ends are linked, too.
    type_name: Google's, of an accelerator type, before its number; None: not
      a TPU.
    source: of the figures.
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


# TPUs: a chip's ICI bandwidth in both directions, divided by two and by its
# ports (4, or 6 of v5p); the pod's network divided by its chips. HBM is what
# the compiler grants (libtpu 0.0.42); the rest is the runtime's. GPUs: the SXM
# modules; half of NVLink's two directions, the network as a DGX has it.
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
  """TPU chips with links between them, one or several slices alike.

  Attributes:
    chip: what each of them is.
    shape: chips along each axis of links.
    num_slices: which the network joins.
  """

  chip: Chip
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def name(self) -> str:
    """As the compiler has it, such as 'v5e:16x16'."""
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def accelerator_type(self) -> str:
    """As Google sells a slice, such as 'v5litepod-256'.

    Of v5p it counts the cores, two a chip.
    """
    cores = 2 if self.chip.num_axes == 3 else 1
    return f'{self.chip.type_name}-{cores * math.prod(self.shape)}'

  @property
  def num_chips(self) -> int:
    return math.prod(self.shape) * self.num_slices

  @property
  def wraps(self) -> tuple[bool, ...]:
    """Whether the ends of each axis are linked.

    On v5e and v6e along an axis of a whole pod, 16 chips; on v5p in slices of
    whole cubes of 4 x 4 x 4.
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
    """Returns the least time in which each of some chips gets so many bytes.

    All links of the axes that the chips spread over bring data at once; a chip
    at an open end of an axis has one there, others have two. Between slices
    each chip carries its share over the network.

    Args:
      num_bytes: that a chip gets from the others.
      coords: of the chips: slice, then the place on each axis.
      is_permute: whether a chip gets all from one other.
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
        # What comes from other slices comes once into a slice, to be shared.
        n, s = len(coords), len(slices)
        share = (s - 1) / s * n / (n - 1) / (n / s)
      times.append(share * num_bytes / self.chip.network_bytes_per_sec)
    return max(times)


def find(topology: str, num_slices: int = 1) -> Slice:
  """Returns the slice that a topology names, such as 'v5e:16x16'.

  Raises:
    ValueError: if it names none.
  """
  match = re.fullmatch(r'(v\w+):(\d+(?:x\d+)*)', topology)
  tpus = {name: chip for name, chip in CHIPS.items() if chip.num_axes}
  chip = tpus.get(match[1]) if match else None
  shape = tuple(map(int, match[2].split('x'))) if match else ()
  if chip is None or len(shape) != chip.num_axes or 0 in shape:
    raise ValueError(
      f'TOPOLOGY={topology!r} is not a TPU and how many chips stand along each '
      f'axis of its links, such as v5e:2x4, v6e:16x16 (two axes) or v5p:4x4x4 '
      f'(three). TPUs: {", ".join(tpus)}.'
    )
  if chip.num_axes == 2 and max(shape) > chip.torus_size:
    raise ValueError(
      f'TOPOLOGY={topology!r} is larger than a pod of {chip.name}, '
      f'{chip.torus_size}x{chip.torus_size}; NUM_SLICES joins several.'
    )
  return Slice(chip, shape, num_slices)


# What the runtime calls a device, by a part of it; the first that fits.
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
  """Returns the chip behind JAX's `device_kind`; None if it is not known."""
  for part, name in _DEVICE_KINDS:
    if part in kind:
      return CHIPS[name]
  return None


def gib(num_bytes: int | float) -> str:
  """Returns bytes as people read them."""
  return f'{num_bytes / GIB:.2f} GiB'
