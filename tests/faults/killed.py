# SPDX-License-Identifier: Apache-2.0
"""Runs the program, and kills it at a moment of its work with files.

    python -m faults.killed FOLDER PHASE NUMBER DELAY_SECS LOG VERB ARGUMENTS

runs `python -m l2s_jax VERB ARGUMENTS` up to just before its NUMBER-th change
of FOLDER in the PHASE, and DELAY_SECS longer; a NUMBER of 0 kills nothing. LOG
gets a line for each change: its phase. Python's audit events are the changes;
libraries in C++ write between them, which is what the delay is for.
"""

import os
import runpy
import signal
import sys
import threading
import time

# What a change of a folder is part of, in the order of a save.
PHASES = (
  'other files',
  'before the arrays',
  'arrays',
  'commit',
  'deletion',
)
_CHANGES = {
  'os.mkdir': 1,
  'os.rename': 2,
  'os.remove': 1,
  'os.rmdir': 1,
  'os.truncate': 1,
}
_UNFINISHED = '.orbax-checkpoint-tmp'
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def phase(event: str, paths: list[str]) -> str:
  """Returns the phase of a change.

  Args:
    event: name of the audit event.
    paths: what it changes; of a renaming, what it was and what it will be.
  """
  path = paths[0]
  if '.lock' in path:
    return 'other files'
  is_hidden = path.startswith('.', path.rfind(os.sep) + 1)
  if is_hidden and event != 'os.rename' and '.unfinished' not in path:
    return 'other files'  # A temporary file, which will be renamed.
  is_deleted = any(f'{os.sep}deleted' in each for each in paths)
  is_removed = event in ('os.remove', 'os.rmdir')
  # Orbax also removes what it is about to write.
  if is_deleted or (is_removed and _UNFINISHED not in path):
    return 'deletion'
  if event == 'os.rename':
    # Of arrays: the whole folder of a step. All else is renamed when complete.
    if os.path.basename(paths[1]).startswith('.'):
      return 'other files'
    is_part = _UNFINISHED in paths[1]
    return 'arrays' if is_part else 'commit'
  if _UNFINISHED not in path and '.unfinished' not in path:
    return 'other files'
  is_new = event == 'os.mkdir' and path.count(_UNFINISHED) == 1
  is_top = path.endswith((_UNFINISHED, '.unfinished'))
  return 'before the arrays' if is_new and is_top else 'arrays'


def watch(folder: str, which: str, number: int, delay: float, log: str) -> None:
  """Lets this process die at a change; see the module."""
  reached = threading.Event()
  counts = dict.fromkeys(PHASES, 0)
  lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  lock = threading.Lock()
  above, name = os.path.split(folder)
  places = (folder, f'{above}{os.sep}.{name}.')  # And what it will be.

  def die() -> None:
    reached.wait()
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

  def hook(event: str, args: tuple) -> None:
    if event == 'open':
      if not args[2] & _WRITES:
        return
      names, descriptor = args[:1], -1
    elif event in _CHANGES:
      names, descriptor = args[: _CHANGES[event]], args[-1]
    else:
      return
    if not all(isinstance(name, str | bytes | os.PathLike) for name in names):
      return
    paths = [os.fsdecode(name) for name in names]
    if isinstance(descriptor, int) and descriptor > 0 and event != 'os.mkdir':
      paths[0] = f'{os.readlink(f"/proc/self/fd/{descriptor}")}/{paths[0]}'
    if not any(path.startswith(places) for path in paths):
      return
    found = phase(event, paths)
    with lock:
      counts[found] += 1
      is_it = found == which and counts[found] == number
    os.write(lines, f'{found}\t{event}\t{paths}\n'.encode())
    if is_it:
      if not delay:
        os.kill(os.getpid(), signal.SIGKILL)
      reached.set()

  threading.Thread(target=die, daemon=True).start()
  sys.addaudithook(hook)


def main() -> None:
  """Runs the program under watch."""
  _, folder, which, number, delay, log, *arguments = sys.argv
  watch(folder, which, int(number), float(delay), log)
  sys.argv = ['l2s_jax', *arguments]
  sys.modules.pop('l2s_jax.__main__', None)
  runpy.run_module('l2s_jax', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
