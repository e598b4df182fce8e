# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: save the last finished step and end, whatever is going on.

Python runs a signal's handler between two instructions of the main thread,
which may be minutes away while XLA compiles. A thread of its own hears of the
signal at once. It lets the main thread come to its next step and save; if that
takes too long, it saves by itself and ends the process.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

# "Try again", EX_TEMPFAIL of sysexits.h. Tells a launcher that the run has more
# to do; 0 tells that it has finished.
EXIT_CODE = 75

# The part of the grace period that the main thread has to react in.
_REACTION = 0.25
# The part after which a process that has saved but does not end is ended.
_LAST_MOMENT = 0.9


class Preempted(Exception):
  """Leaves what can be left at once, such as an evaluation."""


class Watcher:
  """Watches for SIGTERM for as long as it is entered.

      with Watcher(grace_secs=60) as watcher:
        state = restore()
        watcher.save = lambda: save_and_wait(state)
        while not watcher.requested:
          with watcher.lock:  # the old state is gone, the new not yet there
            state = step(state)

  A further SIGTERM changes nothing. Signals reach the main thread's program
  alone: entered elsewhere, it leaves SIGTERM as it is.

  Attributes:
    save: saves the last finished step and returns when that is on disk; None
      while there is none. Called by the watching thread, with `lock`.
    lock: held by whoever changes what `save` reads.
  """

  def __init__(self, grace_secs: int | float):
    """Prepares.

    Args:
      grace_secs: between SIGTERM and the end that the platform puts to it.
    """
    self.save: Callable[[], None] | None = None
    self.lock = threading.RLock()
    self._grace_secs = grace_secs
    self._requested = threading.Event()
    self._left = threading.Event()

  @property
  def requested(self) -> bool:
    """Whether SIGTERM has come."""
    return self._requested.is_set()

  def check(self) -> None:
    """Raises `Preempted` if SIGTERM has come."""
    if self.requested:
      raise Preempted

  def leave(self) -> None:
    """Says that the main thread has reacted: it saves, and ends."""
    self._left.set()

  def __enter__(self) -> 'Watcher':
    self._installed = threading.current_thread() is threading.main_thread()
    if not self._installed:
      return self
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    # Written to by C code, in the very moment that the signal comes.
    self._old_fd = signal.set_wakeup_fd(
      self._writer.fileno(), warn_on_full_buffer=False
    )
    self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=self._watch, name='preemption', daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    # Once it has come, a further one must not end what is left to do.
    if not self._installed or self.requested:
      return
    signal.signal(signal.SIGTERM, self._old_handler)
    signal.set_wakeup_fd(self._old_fd)
    self._writer.close()  # Ends the thread, if it still waits.

  def _watch(self) -> None:
    with self._reader:
      while True:
        numbers = self._reader.recv(1)
        if not numbers:
          return
        if numbers[0] == signal.SIGTERM:
          break
    start = time.monotonic()
    self._requested.set()
    print('SIGTERM: saving the last step and ending.', file=sys.stderr)
    if not self._left.wait(self._grace_secs * _REACTION):
      self._save_and_end()
    # The main thread saves. Threads of libraries may keep it from ending.
    time.sleep(
      max(0.0, start + self._grace_secs * _LAST_MOMENT - time.monotonic())
    )
    _end()

  def _save_and_end(self) -> None:
    try:
      with self.lock:
        if self.save is not None:
          self.save()
    finally:
      _end()


def _end() -> None:
  """Ends the process at once, without waiting for the main thread."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(EXIT_CODE)
