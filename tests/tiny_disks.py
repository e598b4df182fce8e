# SPDX-License-Identifier: Apache-2.0
"""Disks of a few hundred kilobytes, which are soon full."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

_FILLER = 'filler'


@contextlib.contextmanager
def mounted(place: pathlib.Path, kib: int = 64) -> Iterator[None]:
  """Mounts a file system in memory; skips where that is not allowed.

  Args:
    place: the folder, which is made.
    kib: its size in KiB.
  """
  place.mkdir()
  options = ['-t', 'tmpfs', '-o', f'size={kib}k', 'tmpfs', str(place)]
  mount = ['mount', *options]
  if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('no file system can be mounted here')
  try:
    yield
  finally:
    subprocess.run(['umount', '--lazy', str(place)], check=True)


def fill(place: pathlib.Path, kib_left: int = 0) -> None:
  """Leaves no room on the disk, or little."""
  filler = place / _FILLER
  with contextlib.suppress(OSError), filler.open('wb') as file:
    while True:
      file.write(bytes(512))
      file.flush()
  os.truncate(filler, max(0, filler.stat().st_size - kib_left * 1024))


def make_room(place: pathlib.Path) -> None:
  """Undoes `fill`."""
  (place / _FILLER).unlink()


@contextlib.contextmanager
def read_only(place: pathlib.Path) -> Iterator[None]:
  """Lets nothing be written to the disk."""
  mount = ['mount', '-o']
  subprocess.run([*mount, 'remount,ro', str(place)], check=True)
  try:
    yield
  finally:
    subprocess.run([*mount, 'remount,rw', str(place)], check=True)
