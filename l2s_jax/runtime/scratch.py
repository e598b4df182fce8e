# SPDX-License-Identifier: Apache-2.0
"""Temporary folders, of which none stays after the end of the process.

All are in one folder of the process, TMPDIR/l2s_jax-scratch-*, which it holds
with an advisory lock (`flock`). The end of the process removes it; after a
signal, the next process of the same hostname that needs temporary folders does.
The operating system releases the lock of a process that has ended.
"""

import atexit
import contextlib
import fcntl
import functools
import os
import pathlib
import re
import shutil
import socket
import tempfile

# A lock may not be seen on another host that shares TMPDIR.
_PREFIX = f'l2s_jax-scratch-{socket.gethostname()}-'


def folder() -> tempfile.TemporaryDirectory[str]:
  """Returns a new temporary folder, until `cleanup` or the end."""
  return tempfile.TemporaryDirectory(dir=_root(os.getpid()))


def remove() -> None:
  """Removes all temporary folders of this process, before it ends at once."""
  root = _ROOTS.get(os.getpid())
  if root is not None:
    shutil.rmtree(root, ignore_errors=True)


# By process: a fork has the parent's memory.
_ROOTS: dict[int, str] = {}


@functools.cache
def _root(pid: int) -> str:
  _remove_abandoned()
  while True:
    root = tempfile.mkdtemp(prefix=_PREFIX)
    try:
      # Never closed. Others may have removed the folder before the lock.
      if not _is_locked(os.open(root, os.O_RDONLY)) and os.path.exists(root):
        break
    except FileNotFoundError:
      pass
  _ROOTS[pid] = root
  atexit.register(remove)
  return root


def _is_locked(descriptor: int) -> bool:
  """Locks a folder; returns whether another process holds its lock."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:
    pass  # The file system has no locks.
  return False


def _remove_abandoned() -> None:
  """Removes the folders of processes that were killed."""
  # As `mkdtemp` names them. Other hostnames may begin with this one.
  name = re.compile(re.escape(_PREFIX) + r'[a-z0-9_]{8}')
  for path in pathlib.Path(tempfile.gettempdir()).glob('l2s_jax-scratch-*'):
    if not name.fullmatch(path.name):
      continue
    with contextlib.suppress(OSError):
      descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
      try:
        # Not `_is_locked`: without locks nothing is known to be abandoned.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
      finally:
        os.close(descriptor)
