# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: save the last finished step and end, whatever is going on.

Python runs a signal's handler between two instructions of the main thread,
which may be minutes away while XLA compiles. A thread of its own hears of the
signal at once. It lets the main thread come to its next step and save; if that
takes too long, it saves by itself and ends the process.

Of several processes none may save, or end, by itself: JAX hears of the signal
in any of them, and they agree on where in the program all of them leave.
"""

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable

# "Try again", EX_TEMPFAIL of sysexits.h. Tells a launcher that the run has more
# to do; 0 tells that it has finished.
EXIT_CODE = 75

# The part of the grace period that the main thread has to react in.
_REACTION = 0.25
# The part after which the process is ended in any case.
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

  As long as there is nothing to save, SIGTERM ends the process at once. A
  further one changes nothing. Only the main thread may handle signals: entered
  in another, it leaves SIGTERM as it is; and so it does with `agree`.

  Attributes:
    save: saves the last finished step and returns when that is on disk; None
      while there is none. Called by the watching thread, with `lock`; what it
      raises is printed, and the exit code is 1.
    lock: held by whoever changes what `save` reads.
  """

  def __init__(
    self,
    grace_secs: int | float,
    agree: Callable[[int], bool] | None = None,
  ):
    """Prepares.

    Args:
      grace_secs: between SIGTERM and the end that the platform puts to it.
      agree: of several processes, which call `check` at the same places: takes
        the number of the call, and tells whether SIGTERM has come to one of
        them and this is where all of them leave.
    """
    self.save: Callable[[], None] | None = None
    self.lock = threading.RLock()
    self._grace_secs = grace_secs
    self._requested = threading.Event()
    self._left = threading.Event()
    self._agree = agree
    self._num_checks = 0

  @property
  def requested(self) -> bool:
    """Whether SIGTERM has come."""
    return self._requested.is_set()

  def check(self) -> None:
    """Raises `Preempted` if SIGTERM has come."""
    self._num_checks += 1
    if self._agree is not None and self._agree(self._num_checks):
      self._requested.set()
    if self.requested:
      raise Preempted

  def exit_if_requested(self) -> None:
    """Ends the process where it has nothing to save, if SIGTERM has come.

    Raises:
      SystemExit: with the status that means to start again.
    """
    try:
      self.check()
    except Preempted:
      raise SystemExit(EXIT_CODE) from None

  def leave(self) -> None:
    """Says that the main thread has reacted: it saves, and ends."""
    self._left.set()

  def __enter__(self) -> 'Watcher':
    self._installed = (
      threading.current_thread() is threading.main_thread()
      # A handler of ours would displace the one that tells all processes.
      and self._agree is None
    )
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
    self._writer.close()  # Ends the thread, which still waits.

  def _watch(self) -> None:
    while (numbers := self._reader.recv(1)) != bytes([signal.SIGTERM]):
      if not numbers:
        self._reader.close()
        return
    self._requested.set()
    # Whatever hangs, a save or a library's thread: the platform would be worse.
    last_moment = threading.Timer(self._grace_secs * _LAST_MOMENT, _end)
    last_moment.daemon = True
    last_moment.start()
    save = self.save
    if save is None:
      _end()
      return
    print('SIGTERM: saving the last step and ending.', file=sys.stderr)
    if self._left.wait(self._grace_secs * _REACTION):
      return  # The main thread saves.
    try:
      with self.lock:
        save()
    except BaseException:
      traceback.print_exc()
      _end(1)
    _end()


def _end(status: int = EXIT_CODE) -> None:
  """Ends the process at once, without waiting for the main thread."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
