# SPDX-License-Identifier: Apache-2.0
"""Handling of SIGTERM and Ctrl-C: saving the last finished step.

Python runs signal handlers between two bytecode instructions of the main
thread, which may take minutes while XLA compiles, and a KeyboardInterrupt may
get lost in a library's callback. Therefore a separate thread receives the
signal at once. It lets the main thread reach its next step and save. If that
takes too long, the thread saves by itself and ends the process.

With several processes, none may save or end alone. JAX propagates SIGTERM to
all of them, and they agree on a common step at which to leave. Ctrl-C in one
process is passed to JAX as SIGTERM.
"""

import contextlib
import contextvars
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

# EX_TEMPFAIL ("try again") of sysexits.h. It tells a launcher to restart the
# run; 0 means that the run is finished.
EXIT_CODE = 75
# Exit status of shells for SIGINT. Launchers do not restart a run stopped by a
# person.
INTERRUPTED = 128 + signal.SIGINT

# Fraction of the grace period within which the main thread must react.
_REACTION = 0.25
# Fraction of the grace period after which the process ends in any case.
_LAST_MOMENT = 0.9
# Seconds allowed for flushing standard output and error.
_LAST_WORDS = 1.0
# Whether the process belongs to another program, such as a notebook's kernel.
_is_guest = contextvars.ContextVar('is_guest', default=False)
# Marks bytes sent by the Python handler; C code sends the bare number.
_HANDLED = 128


class Preempted(Exception):
  """Raised by `Watcher.check` after a signal, to leave interruptible work."""


class Watcher:
  """Context manager that watches for SIGTERM and SIGINT.

      with Watcher(grace_secs=60) as watcher:
        state = restore()
        watcher.save = lambda: save_and_wait(state)
        while not watcher.requested:
          with watcher.lock:  # the old state is gone, the new not yet there
            state = step(state)

  While `save` is None, a signal ends the process at once. A further SIGTERM
  changes nothing; a second SIGINT ends the process at once. Signal handlers are
  installed in the main thread only, not with `agree`, not within
  `signals_left_alone`, and not for a SIGINT that is ignored, as shells do for
  background jobs.

  Attributes:
    save: saves what is done and returns when it is on disk; None if there is
      nothing to save. The watching thread calls it with `lock` held.
      If it raises, the exception is printed and the exit code is 1.
    lock: to be held while changing data that `save` reads.
    exit_code: exit code of the process after a signal.
  """

  def __init__(
    self,
    grace_secs: int | float,
    agree: Callable[[int], bool] | None = None,
  ):
    """Creates a watcher; handlers are installed on entry.

    Args:
      grace_secs: seconds between SIGTERM and SIGKILL by the platform.
      agree: for several processes, all of which call `check` at the same
        places: function from the number of the call to whether all processes
        leave at this call because one of them received SIGTERM.
    """
    self.save: Callable[[], None] | None = None
    self.lock = threading.RLock()
    self.exit_code = EXIT_CODE
    self._grace_secs = grace_secs
    self._requested = threading.Event()
    self._left = threading.Event()
    self._agree = agree
    self._num_checks = 0

  @property
  def requested(self) -> bool:
    """Whether SIGTERM or SIGINT was received."""
    return self._requested.is_set()

  def check(self) -> None:
    """Raises `Preempted` if SIGTERM or SIGINT was received.

    With `agree`, all processes must call it at the same places.
    """
    self._num_checks += 1
    if self._agree is not None and self._agree(self._num_checks):
      self._requested.set()
    if self.requested:
      raise Preempted

  def exit_if_requested(self) -> None:
    """Exits after a signal, for programs that save as they are left.

    Raises:
      SystemExit: with `exit_code`.
    """
    try:
      self.check()
    except Preempted:
      self.leave()
      raise SystemExit(self.exit_code) from None

  def leave(self) -> None:
    """Tells the watching thread that the main thread saves and exits."""
    self._left.set()

  def __enter__(self) -> 'Watcher':
    global _agreeing
    self._installed = (
      threading.current_thread() is threading.main_thread()
      # Our handler would replace JAX's, which notifies all processes.
      and self._agree is None
      and not _is_guest.get()
    )
    if self._agree is not None:
      _agreeing = self
    if not self._installed:
      return self
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    # C code writes to this descriptor as soon as the signal arrives.
    self._old_fd = signal.set_wakeup_fd(
      self._writer.fileno(), warn_on_full_buffer=False
    )
    self._old_handlers = {
      number: signal.signal(number, self._handle)
      for number in (signal.SIGTERM, signal.SIGINT)
      if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    }
    threading.Thread(target=self._watch, name='preemption', daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    global _agreeing
    if self._agree is not None:
      _agreeing = None
    # After a signal, a further one must not interrupt the remaining work.
    if not self._installed or self.requested:
      return
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_fd)
    self._writer.close()  # ends the waiting thread

  def _handle(self, number: int, _: Any) -> None:
    """Notifies the thread, even if a library replaced the wakeup descriptor."""
    with contextlib.suppress(OSError):
      self._writer.send(bytes([number | _HANDLED]))

  def _watch(self) -> None:
    """Reacts to the first signal and to a second SIGINT."""
    counts = {signal.SIGINT: 0, signal.SIGINT | _HANDLED: 0}
    while news := self._reader.recv(1):
      number = news[0] & ~_HANDLED
      if number not in self._old_handlers:
        continue
      if news[0] in counts:
        counts[news[0]] += 1
        if counts[news[0]] == 2:
          _end(INTERRUPTED, 'SIGINT: exiting immediately.')
      if self.requested:
        continue
      if number == signal.SIGINT:
        self.exit_code = INTERRUPTED
        if _agreeing is not None:
          # JAX propagates SIGTERM to all processes.
          if not _agreeing.requested and _agreeing.exit_code == EXIT_CODE:
            _agreeing.exit_code = INTERRUPTED
            _say('SIGINT: all processes will exit at their next step.')
            os.kill(os.getpid(), signal.SIGTERM)
          continue
      self._requested.set()
      threading.Thread(
        target=self._react, args=(number,), name='saving', daemon=True
      ).start()
    self._reader.close()

  def _react(self, number: int) -> None:
    """Makes the process save and end within the grace period."""
    # Ends the process even if a save or a library thread hangs.
    last_moment = threading.Timer(
      self._grace_secs * _LAST_MOMENT, _end, (self.exit_code,)
    )
    last_moment.daemon = True
    last_moment.start()
    save = self.save
    if save is None:
      _end(self.exit_code, 'Interrupted.' if number == signal.SIGINT else '')
      return
    if number == signal.SIGINT:
      _say(
        'SIGINT: saving what is done, then exiting. A second SIGINT exits '
        'immediately.'
      )
    else:
      _say('SIGTERM: saving what is done, then exiting.')
    if self._left.wait(self._grace_secs * _REACTION):
      return  # the main thread saves
    try:
      with self.lock:
        save()
    except BaseException:
      traceback.print_exc()
      _end(1)
    _end(self.exit_code)


@contextlib.contextmanager
def signals_left_alone() -> Iterator[None]:
  """Installs no signal handlers in this context.

  For a process of another program: Ctrl-C then raises KeyboardInterrupt, and a
  run resumes from its newest checkpoint.
  """
  token = _is_guest.set(True)
  try:
    yield
  finally:
    _is_guest.reset(token)


# The entered watcher with `agree`, if any.
_agreeing: Watcher | None = None


def end_at_once_if_interrupted() -> None:
  """Makes SIGINT end the process at once, unless SIGINT is ignored.

  For phases with nothing to lose: imports at the start, and the end.
  """
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def run(main: Callable[[], int | None]) -> int:
  """Runs a program; returns its exit status, 75 or 130 after a signal."""
  try:
    with Watcher(grace_secs=60):
      return main() or 0
  finally:  # only the common shutdown is left
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_at_once_if_interrupted()


def _say(text: str) -> None:
  """Prints to standard error, below a progress bar if there is one."""
  print(f'\n{text}' if sys.stderr.isatty() else text, file=sys.stderr)


def _end(status: int = EXIT_CODE, text: str = '') -> None:
  """Ends the process at once, without waiting for the main thread.

  It does not wait for a blocked reader of its output either.
  """

  def last_words() -> None:
    if text:
      _say(text)
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()

  speaker = threading.Thread(target=last_words, daemon=True)
  speaker.start()
  speaker.join(_LAST_WORDS)
  os._exit(status)
