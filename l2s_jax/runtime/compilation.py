# SPDX-License-Identifier: Apache-2.0
"""Compilation progress messages and the persistent compilation cache.

This module must not import JAX, since JAX reads the cache location from the
environment at import.
"""

import contextlib
import io
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import tqdm

_CACHE_DIR = 'JAX_COMPILATION_CACHE_DIR'
_LEAST_SECS = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
# Of the default folder, at the start of a process.
_MOST_BYTES = 4 * 2**30


def use_cache() -> None:
  """Enables JAX's persistent compilation cache in the user's cache folder.

  Environment variables of JAX take precedence;
  `JAX_ENABLE_COMPILATION_CACHE=false` disables the cache. If the folder has
  more than 4 GiB, the programs that were used least recently are removed.
  """
  caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  if caches.startswith('~'):  # The home directory is unknown.
    return
  folder = pathlib.Path(caches) / 'l2s_jax' / 'compiled'
  if _CACHE_DIR not in os.environ:
    os.environ[_CACHE_DIR] = str(folder)
    bound(folder, _MOST_BYTES)
  os.environ.setdefault(_LEAST_SECS, '0.2')  # JAX's default is 1 s.


def bound(folder: pathlib.Path, most_bytes: int) -> None:
  """Removes the files that were used least recently, down to a size.

  JAX's own bound (`jax_compilation_cache_max_size`) fails at every program of a
  cache that was begun without it, or whose writer was killed.

  Args:
    folder: of the cache; it need not exist.
    most_bytes: size of the files that may stay.
  """
  with contextlib.suppress(OSError):
    files = []
    for entry in os.scandir(folder):
      stat = entry.stat()
      # File systems may not update the time of access.
      files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, entry))
    excess = sum(size for _, size, _ in files) - most_bytes
    for _, size, entry in sorted(files, key=lambda file: file[0]):
      if excess <= 0:
        return
      os.unlink(entry.path)
      excess -= size


class Announcer:
  """Prints each compilation and its duration to standard error.

  Attributes:
    total_secs: duration of all compilations so far, including the dispatch of
      the first run of each program.
  """

  def __init__(self, *, is_silent: bool = False):
    """Creates an announcer without known programs.

    Args:
      is_silent: whether to measure only, as in all processes but one.
    """
    self._is_silent = is_silent
    self.total_secs = 0.0
    self._known: set[str] = set()

  @contextlib.contextmanager
  def __call__(self, program: str) -> Iterator[None]:
    """Announces a compiling call, unless the program is already known.

    Args:
      program: description of the program with all shapes it is compiled for.
    """
    if program in self._known:
      yield
      return
    self._known.add(program)
    start = time.perf_counter()
    sink = io.StringIO() if self._is_silent else sys.stderr
    with tqdm.tqdm.external_write_mode(file=sys.stderr):
      print(f'compiling {program} ...', end='', file=sink, flush=True)
      try:
        yield
      finally:
        secs = time.perf_counter() - start
        self.total_secs += secs
        print(f' {secs:.1f} s', file=sink, flush=True)
