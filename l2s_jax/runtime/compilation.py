# SPDX-License-Identifier: Apache-2.0
"""Compilation: what is being compiled is said, and what was is kept on disk.

Nothing here imports JAX, which reads where its cache is as it is imported.
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


def use_cache() -> None:
  """Keeps compiled programs in the user's cache folder, for later processes.

  What the environment says of JAX's persistent cache goes over this;
  JAX_ENABLE_COMPILATION_CACHE=false switches it off.
  """
  caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  if caches.startswith('~'):  # A user whom the machine does not know.
    return
  folder = pathlib.Path(caches) / 'l2s_jax' / 'compiled'
  os.environ.setdefault(_CACHE_DIR, str(folder))
  os.environ.setdefault(_LEAST_SECS, '0.2')  # JAX's 1 leaves small models out.


class Announcer:
  """Says on standard error what is being compiled, and how long it took.

  Attributes:
    total_secs: of all programs so far, with the time to start their first run.
  """

  def __init__(self, *, is_silent: bool = False):
    """Knows of no program yet.

    Args:
      is_silent: whether to measure alone, as in all processes but one.
    """
    self._is_silent = is_silent
    self.total_secs = 0.0
    self._known: set[str] = set()

  @contextlib.contextmanager
  def __call__(self, program: str) -> Iterator[None]:
    """Announces a call that compiles, if it is the first of this program.

    Args:
      program: what it does, with all shapes that it is compiled for.
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
