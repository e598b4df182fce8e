# SPDX-License-Identifier: Apache-2.0
"""Memory of this machine."""

import contextlib
import ctypes
import gc
import os
import pathlib
from collections.abc import Iterator

_MEMINFO = pathlib.Path('/proc/meminfo')
_DEVICES = pathlib.Path('/dev')

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ('MALLOC_', 'GLIBC_TUNABLES')  # Of malloc, in the environment.


def free_bytes() -> int | None:
  """Returns the available memory in bytes, with evictable caches; or None."""
  try:
    text = _MEMINFO.read_text()
  except OSError:  # Not Linux.
    return None
  for line in text.splitlines():
    if line.startswith('MemAvailable:'):
      return int(line.split()[1]) * 1024
  return None


def keep_freed() -> bool:
  """Keeps freed memory in this process, for its later allocations.

  XLA:CPU allocates a program's temporaries at every call. By default glibc maps
  each large allocation anew and unmaps it when it is freed, and the kernel
  clears all its pages: half of the time of a training step of a small model.
  Call it before any thread starts: a thread that has allocated keeps its own
  pool of memory.

  Returns:
    Whether it was done. It is not done where the environment configures malloc
    (`MALLOC_*`, `GLIBC_TUNABLES`), without glibc, and on a host with
    accelerators, which have the temporaries in their own memory, unless
    `JAX_PLATFORMS=cpu`.
  """
  is_configured = any(name.startswith(_SETTINGS) for name in os.environ)
  if is_configured or (
    os.environ.get('JAX_PLATFORMS') != 'cpu' and _has_accelerators()
  ):
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  return mallopt is not None and all(
    mallopt(parameter, value)
    for parameter, value in (
      (_MMAP_MAX, 0),
      (_TRIM_THRESHOLD, -1),  # Never.
      (_TOP_PAD, 64 * 2**20),
      # Pools of threads map large allocations whatever is set.
      (_ARENA_MAX, 1),
    )
  )


def _has_accelerators() -> bool:
  """Returns whether this host has device files of TPUs or GPUs."""
  return any(
    next(_DEVICES.glob(pattern), None)
    for pattern in ('accel*', 'vfio/[0-9]*', 'nvidia[0-9]*', 'kfd')
  )


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
  """Pauses the garbage collector, for imports.

  It finds nothing in modules, and looking costs a tenth of their import.
  """
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()
