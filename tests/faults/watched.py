# SPDX-License-Identifier: Apache-2.0
"""Runs the program, and notes its memory while it works.

    python -m faults.watched LOG PROGRESS VERB ARGUMENTS

runs `python -m l2s_jax VERB ARGUMENTS`. LOG gets a line of JSON every
`_PERIOD_SECS`: the number of lines of the file PROGRESS, resident bytes without
mapped files, programs compiled so far, threads and open files.
"""

import json
import os
import pathlib
import runpy
import sys
import threading
import time
from typing import Any

from l2s_jax.runtime import compilation

_PERIOD_SECS = 0.1
_COMPILED = '/jax/core/compile/backend_compile_duration'


class Lines:
  """Counts the lines of a growing file, and reads each byte once.

  The file may be renamed when it is complete.
  """

  def __init__(self, path: str):
    self._path = path
    self._file: Any = None
    self._count = 0

  def count(self) -> int:
    if self._file is None:
      try:
        self._file = open(self._path, 'rb')
      except OSError:
        return 0
    while part := self._file.read(2**20):
      self._count += part.count(b'\n')
    return self._count


def watch(log: str, progress: str) -> None:
  """Writes the lines of the log from now on."""
  lines = Lines(progress)
  compiled = 0

  def hear(event: str, duration_secs: float, **_: str | int) -> None:
    nonlocal compiled
    del duration_secs
    compiled += event == _COMPILED

  def write() -> None:
    with open(log, 'w') as file:
      while True:
        status = dict(
          line.split(':', 1)
          for line in pathlib.Path('/proc/self/status').read_text().splitlines()
        )
        record = {
          'progress': lines.count(),
          'bytes': int(status['RssAnon'].split()[0]) * 1024,
          'compiled': compiled,
          'threads': int(status['Threads']),
          'open_files': len(os.listdir('/proc/self/fd')),
        }
        print(json.dumps(record), file=file, flush=True)
        time.sleep(_PERIOD_SECS)

  # As the program does, which must be done before JAX is imported.
  compilation.use_cache()
  import jax

  jax.monitoring.register_event_duration_secs_listener(hear)
  threading.Thread(target=write, daemon=True).start()


def main() -> None:
  """Runs the program under watch."""
  _, log, progress, *arguments = sys.argv
  watch(log, progress)
  sys.argv = ['l2s_jax', *arguments]
  runpy.run_module('l2s_jax', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
