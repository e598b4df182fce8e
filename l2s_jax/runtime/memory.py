# SPDX-License-Identifier: Apache-2.0
"""Memory of this machine."""

import pathlib

_MEMINFO = pathlib.Path('/proc/meminfo')


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
