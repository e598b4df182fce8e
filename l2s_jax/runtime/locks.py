# SPDX-License-Identifier: Apache-2.0
"""A lock file that allows one writer per folder, renewed while its owner runs.

On the owner's host, the recorded process tells whether the owner still runs. On
other hosts, over a shared disk, only renewals are visible: a lock that is not
renewed for LEASE_SECS belongs to a dead process and is taken over. The contents
of the file are compared, not its times, since clocks differ.

In a bucket the lock is an object. It is created on the condition that there is
none, which the store decides. A process takes over a stale lock by overwriting
it, on the condition that it is the version that was found stale. Of several
processes one succeeds. Renewals have the same condition. A process whose lock
was taken over ends at once, since two would write.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

from l2s_jax.runtime import distributed, files, os_errors, storage

RENEWAL_SECS = 5.0
LEASE_SECS = 30.0
NAME = '.lock'
# In a bucket. Each renewal is a billed request.
BUCKET_RENEWAL_SECS = 20.0
BUCKET_LEASE_SECS = 90.0
_MOST_TRIES = 50

_KEYS = {'host': str, 'pid': int, 'start': str, 'birth': str, 'beat': int}


@dataclasses.dataclass(frozen=True)
class Held:
  """A lock that this process has taken.

  Attributes:
    path: the lock file.
    owner: the identifier in it.
    is_taken_over: whether it was that of a dead process.
  """

  path: pathlib.Path
  owner: str
  is_taken_over: bool

  def is_mine(self) -> bool:
    """Returns whether no other process has taken the lock over since."""
    return _owner(self.path) == self.owner


@contextlib.contextmanager
def held(
  folder: pathlib.Path,
  setting: str,
  name: str = NAME,
  shown: pathlib.Path | None = None,
) -> Iterator[Held]:
  """Holds the lock of a folder until the block ends, and yields it.

  Args:
    folder: the folder; created if absent.
    setting: name of the setting with the folder, for errors.
    name: name of the lock file; processes that write different parts of a
      folder use different names.
    shown: what the setting names, for errors; default: the folder.

  Raises:
    ValueError: if another process holds the lock; names its host, process id
      and start time.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / name
  mine: dict[str, Any] = {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'start': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'birth': _birth(os.getpid()),
    'owner': uuid.uuid4().hex,
  }
  is_taken_over = _take(path, mine, f'{setting}={shown or folder}')
  stopped = threading.Event()
  renewal = threading.Thread(
    target=_renew, args=(path, mine, stopped), daemon=True
  )
  renewal.start()
  lock = Held(path, mine['owner'], is_taken_over)
  try:
    yield lock
  finally:
    stopped.set()
    renewal.join()
    # A store that fails once may answer the next time.
    tries = 3 if storage.is_bucket(path) else 1
    if any(lock.is_mine() for _ in range(tries)):
      path.unlink(missing_ok=True)


def _take(path: pathlib.Path, mine: dict[str, Any], label: str) -> bool:
  """Creates the lock file atomically, or takes over that of a dead process.

  Returns:
    Whether it was taken over.
  """
  num_tries = 0
  is_left = False
  while not _make(path, mine):
    num_tries += 1
    if num_tries > _MOST_TRIES:
      raise ValueError(
        f'{path} can neither be created nor read. Check the permissions of its '
        'folder or bucket; then start again.'
      )
    version = ''
    try:
      if isinstance(path, storage.BucketPath):
        version = path.version()  # First: the content is this one or newer.
      content = path.read_bytes()
    except FileNotFoundError:
      time.sleep(0.1)
      continue  # The owner has just ended.
    who = _parse(content, path)
    if who is None:
      gone = 'it cannot be read'
    elif who['host'] == mine['host']:
      if _birth(who['pid']) == who['birth']:
        raise ValueError(_refusal(path, who, label))
      gone = 'that process has ended'
    else:
      distributed.say(
        f'{path.parent} is locked by {_name(who)}; waiting up to '
        f'{_lease_secs(path):.0f} s for it to renew the lock.'
      )
      if _changes(path, content):
        raise ValueError(_refusal(path, who, label))
      gone = f'it was not renewed for {_lease_secs(path):.0f} s'
    if isinstance(path, storage.BucketPath):
      is_taken = _overwrite(path, version, mine)
    else:
      is_taken = _remove(path, content)
    if is_taken:
      distributed.say(
        f'{path.parent}: the lock of '
        f'{_name(who) if who else "another process"} is taken over; {gone}.'
      )
      if storage.is_bucket(path):
        return True
      is_left = True
  return is_left


def _make(path: pathlib.Path, mine: dict[str, Any]) -> bool:
  """Creates the complete lock file if there is none; returns whether it did."""
  content = json.dumps({**mine, 'beat': 0})
  if isinstance(path, storage.BucketPath):
    # The store's answer may be lost; the repeated request then finds the lock.
    return path.create(content.encode()) or _owner(path) == mine['owner']
  temporary = path.with_name(f'{path.name}.{mine["owner"]}')
  try:
    with os_errors.naming(path):
      temporary.write_text(content)
    os.link(temporary, path)
  except FileExistsError:
    return False
  finally:
    temporary.unlink(missing_ok=True)
  return True


def _overwrite(
  path: storage.BucketPath, version: str, mine: dict[str, Any]
) -> bool:
  """Replaces a stale lock in a bucket; False if another process was first."""
  content = json.dumps({**mine, 'beat': 0}).encode()
  is_done = path.replace_version(version, content) is not None
  # As in `_make`, the answer may be lost.
  return is_done or _owner(path) == mine['owner']


def _lease_secs(path: pathlib.Path) -> float:
  return BUCKET_LEASE_SECS if storage.is_bucket(path) else LEASE_SECS


def _remove(path: pathlib.Path, content: bytes) -> bool:
  """Removes the lock of a dead process; False if another process took it."""
  aside = path.with_name(f'{path.name}.{uuid.uuid4().hex}')
  try:
    path.rename(aside)
  except FileNotFoundError:
    return False
  try:
    if aside.read_bytes() == content:
      return True
    with contextlib.suppress(FileExistsError):
      os.link(aside, path)  # another process was faster
    return False
  finally:
    aside.unlink()


def _renew(
  path: pathlib.Path, mine: dict[str, Any], stopped: threading.Event
) -> None:
  if isinstance(path, storage.BucketPath):
    _renew_object(path, mine, stopped)
    return
  beat = 0
  while not stopped.wait(RENEWAL_SECS):
    beat += 1
    # Training goes on while the disk is full or unreachable.
    with contextlib.suppress(OSError):
      if _owner(path) == mine['owner']:
        with files.whole(path) as file:
          file.write(json.dumps({**mine, 'beat': beat}))


def _renew_object(
  path: storage.BucketPath, mine: dict[str, Any], stopped: threading.Event
) -> None:
  """Renews a lock in a bucket; ends the process if it was taken over."""
  beat, version = 0, None
  while not stopped.wait(BUCKET_RENEWAL_SECS):
    beat += 1
    with contextlib.suppress(OSError):  # As for a local lock.
      if version is None:
        version = path.version()
        if (owner := _owner(path)) != mine['owner']:
          version = None
          if owner is not None and not stopped.is_set():
            _end(path)
          continue
      content = json.dumps({**mine, 'beat': beat}).encode()
      version = path.replace_version(version, content)
      if version is None:
        # The answer of a write was lost, or the lock was taken over.
        if _owner(path) not in (None, mine['owner']) and not stopped.is_set():
          _end(path)


def _end(path: pathlib.Path) -> NoReturn:
  print(
    f'l2s_jax: error: the lock {path} was taken over by another process, since '
    'it was not renewed in time; this process ends.',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def _changes(path: pathlib.Path, content: bytes) -> bool:
  """Returns whether a lock file changes within the lease."""
  lease_secs = _lease_secs(path)
  deadline = time.monotonic() + lease_secs
  while time.monotonic() < deadline:
    time.sleep(min(3.0 if storage.is_bucket(path) else 1.0, lease_secs / 10))
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
  """Returns a string unique to a process, even if its pid is reused later.

  The string is '' if there is no such process, and 'unknown' for a running
  process on systems without a known start time.
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


def _refusal(path: pathlib.Path, who: dict[str, Any], label: str) -> str:
  return (
    f'{label} is being written by {_name(who)}. Wait for it, stop it, or '
    f'choose another folder. If it is no longer running, remove {path}.'
  )
