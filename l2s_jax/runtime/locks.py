# SPDX-License-Identifier: Apache-2.0
"""One writer for a folder: a file that says who, renewed while he lives.

On one host the process that is named tells whether it lives. From another, over
a shared disk, all that is seen is whether the file is renewed: one that is not
for LEASE_SECS is of a process that has died, and is taken over. What is
compared is the content, not the time, since clocks differ.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from l2s_jax.runtime import distributed, files

RENEWAL_SECS = 5.0
LEASE_SECS = 30.0
NAME = '.lock'

_KEYS = {'host': str, 'pid': int, 'start': str, 'birth': str, 'beat': int}


@contextlib.contextmanager
def held(
  folder: pathlib.Path, setting: str, name: str = NAME
) -> Iterator[None]:
  """Holds a folder against other writers until the block ends.

  Args:
    folder: made if absent.
    setting: that named it, for errors.
    name: of the file, where several may write different parts.

  Raises:
    ValueError: if another process writes there; names its host, process and
      start.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / name
  mine = {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'start': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'birth': _birth(os.getpid()),
    'owner': uuid.uuid4().hex,
  }
  _take(path, mine, setting)
  stopped = threading.Event()
  renewal = threading.Thread(
    target=_renew, args=(path, mine, stopped), daemon=True
  )
  renewal.start()
  try:
    yield
  finally:
    stopped.set()
    renewal.join()
    if _owner(path) == mine['owner']:
      path.unlink(missing_ok=True)


def _take(path: pathlib.Path, mine: dict[str, Any], setting: str) -> None:
  """Makes the file, which is atomic, or takes over one of the dead."""
  while not _make(path, mine):
    try:
      content = path.read_bytes()
    except FileNotFoundError:
      continue  # He has just ended.
    who = _parse(content, path)
    if who is None:
      gone = 'it cannot be read'
    elif who['host'] == mine['host']:
      if _birth(who['pid']) == who['birth']:
        raise ValueError(_refusal(path, who, setting))
      gone = 'that process has ended'
    else:
      distributed.say(
        f'{path.parent} is held by {_name(who)}; waiting up to '
        f'{LEASE_SECS:.0f} s for a sign of life.'
      )
      if _changes(path, content):
        raise ValueError(_refusal(path, who, setting))
      gone = f'nothing was heard of it for {LEASE_SECS:.0f} s'
    if _remove(path, content):
      distributed.say(
        f'{path.parent}: the lock of '
        f'{_name(who) if who else "another process"} is taken over; {gone}.'
      )


def _make(path: pathlib.Path, mine: dict[str, Any]) -> bool:
  """Makes the file, whole, if there is none; returns whether it did."""
  temporary = path.with_name(f'{path.name}.{mine["owner"]}')
  try:
    temporary.write_text(json.dumps({**mine, 'beat': 0}))
    os.link(temporary, path)
  except FileExistsError:
    return False
  finally:
    temporary.unlink(missing_ok=True)
  return True


def _remove(path: pathlib.Path, content: bytes) -> bool:
  """Removes a file of the dead; False if it is another's by now."""
  aside = path.with_name(f'{path.name}.{uuid.uuid4().hex}')
  try:
    path.rename(aside)
  except FileNotFoundError:
    return False
  try:
    if aside.read_bytes() == content:
      return True
    with contextlib.suppress(FileExistsError):
      os.link(aside, path)  # It belongs to one who was faster.
    return False
  finally:
    aside.unlink()


def _renew(
  path: pathlib.Path, mine: dict[str, Any], stopped: threading.Event
) -> None:
  beat = 0
  while not stopped.wait(RENEWAL_SECS):
    beat += 1
    # A disk that is full or away for a while ends no training.
    with contextlib.suppress(OSError):
      if _owner(path) == mine['owner']:
        with files.whole(path) as file:
          file.write(json.dumps({**mine, 'beat': beat}))


def _changes(path: pathlib.Path, content: bytes) -> bool:
  """Returns whether a file changes, or goes, within the lease."""
  deadline = time.monotonic() + LEASE_SECS
  while time.monotonic() < deadline:
    time.sleep(min(1.0, LEASE_SECS / 10))
    try:
      if path.read_bytes() != content:
        return True
    except FileNotFoundError:
      return False
  return False


def _parse(content: bytes, path: pathlib.Path) -> dict[str, Any] | None:
  try:
    return files.parse_json(content, path, keys=_KEYS, remedy='remove it')
  except ValueError:
    return None


def _owner(path: pathlib.Path) -> str | None:
  try:
    who = _parse(path.read_bytes(), path)
  except OSError:
    return None
  return None if who is None else who.get('owner')


def _birth(pid: int) -> str:
  """Returns what tells a process from a later one of the same number.

  '' if there is no such process; where the system does not say when it began,
  whether there is one.
  """
  proc = pathlib.Path('/proc')
  try:
    stat = (proc / str(pid) / 'stat').read_text()
    boot = (proc / 'sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {stat.rpartition(")")[2].split()[19]}'
  except (FileNotFoundError, ProcessLookupError):
    if (proc / 'self').exists():
      return ''
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return ''
  except PermissionError:
    pass
  return 'unknown'


def _name(who: dict[str, Any]) -> str:
  return f'process {who["pid"]} on {who["host"]}, started at {who["start"]}'


def _refusal(path: pathlib.Path, who: dict[str, Any], setting: str) -> str:
  return (
    f'{setting}={path.parent} is being written by {_name(who)}. Wait for it or '
    f'stop it, or name another folder; if it does not run any more, remove '
    f'{path}.'
  )
