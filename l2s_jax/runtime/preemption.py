# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: the last finished step is saved, whatever is going on.

Python runs a signal's handler between two instructions of the main thread,
which may be minutes away while XLA compiles; and a KeyboardInterrupt raised
there may be lost in a library's callback. A thread of its own hears of the
signal at once. It lets the main thread come to its next step and save; if that
takes too long, it saves by itself and ends the process.

Of several processes none may save, or end, by itself: JAX hears of SIGTERM in
any of them, and they agree on where in the program all of them leave. Ctrl-C in
one of them is handed to JAX as SIGTERM.
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

# "Try again", EX_TEMPFAIL of sysexits.h. Tells a launcher that the run has more
# to do; 0 tells that it has finished.
EXIT_CODE = 75
# What shells say of a process that SIGINT has ended. No launcher starts again
# what a person has stopped.
INTERRUPTED = 128 + signal.SIGINT

# The part of the grace period that the main thread has to react in.
_REACTION = 0.25
# The part after which the process is ended in any case.
_LAST_MOMENT = 0.9
# Seconds that standard output and error have to take the last words.
_LAST_WORDS = 1.0
# Whether the process belongs to another program, such as a notebook's kernel.
_is_guest = contextvars.ContextVar('is_guest', default=False)
# Told from a signal's number, which the C code writes: the handler has run.
_HANDLED = 128


class Preempted(Exception):
  """Leaves what can be left at once, such as an evaluation."""


class Watcher:
  """Watches for SIGTERM and SIGINT for as long as it is entered.

      with Watcher(grace_secs=60) as watcher:
        state = restore()
        watcher.save = lambda: save_and_wait(state)
        while not watcher.requested:
          with watcher.lock:  # the old state is gone, the new not yet there
            state = step(state)

  As long as there is nothing to save, either ends the process at once. A
  further SIGTERM changes nothing, a second SIGINT ends the process at once.
  Only the main thread may handle signals: entered in another, it leaves them as
  they are; and so it does with `agree`, within `signals_left_alone`, and with a
  SIGINT that is ignored, as shells have it for what runs in the background.

  Attributes:
    save: saves the last finished step and returns when that is on disk; None
      while there is none. Called by the watching thread, with `lock`; what it
      raises is printed, and the exit code is 1.
    lock: held by whoever changes what `save` reads.
    exit_code: of the process, once `requested`.
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
    self.exit_code = EXIT_CODE
    self._grace_secs = grace_secs
    self._requested = threading.Event()
    self._left = threading.Event()
    self._agree = agree
    self._num_checks = 0

  @property
  def requested(self) -> bool:
    """Whether SIGTERM or SIGINT has come."""
    return self._requested.is_set()

  def check(self) -> None:
    """Raises `Preempted` if SIGTERM or SIGINT has come."""
    self._num_checks += 1
    if self._agree is not None and self._agree(self._num_checks):
      self._requested.set()
    if self.requested:
      raise Preempted

  def exit_if_requested(self) -> None:
    """Ends the process where it has nothing to save, if a signal has come.

    Raises:
      SystemExit: with `exit_code`.
    """
    try:
      self.check()
    except Preempted:
      raise SystemExit(self.exit_code) from None

  def leave(self) -> None:
    """Says that the main thread has reacted: it saves, and ends."""
    self._left.set()

  def __enter__(self) -> 'Watcher':
    global _agreeing
    self._installed = (
      threading.current_thread() is threading.main_thread()
      # A handler of ours would displace the one that tells all processes.
      and self._agree is None
      and not _is_guest.get()
    )
    if self._agree is not None:
      _agreeing = self
    if not self._installed:
      return self
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    # Written to by C code, in the very moment that the signal comes.
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
    # Once it has come, a further one must not end what is left to do.
    if not self._installed or self.requested:
      return
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_fd)
    self._writer.close()  # Ends the thread, which still waits.

  def _handle(self, number: int, _: Any) -> None:
    """Tells the thread again, lest another library has taken the wakeup fd."""
    with contextlib.suppress(OSError):
      self._writer.send(bytes([number | _HANDLED]))

  def _watch(self) -> None:
    """Reacts to the first signal, and to the second SIGINT."""
    counts = {signal.SIGINT: 0, signal.SIGINT | _HANDLED: 0}
    while news := self._reader.recv(1):
      number = news[0] & ~_HANDLED
      if number not in self._old_handlers:
        continue
      if news[0] in counts:
        counts[news[0]] += 1
        if counts[news[0]] == 2:
          _end(INTERRUPTED, 'SIGINT: ends at once.')
      if self.requested:
        continue
      if number == signal.SIGINT:
        self.exit_code = INTERRUPTED
        if _agreeing is not None:
          # Of several processes: JAX, which hears of SIGTERM, tells all.
          if not _agreeing.requested and _agreeing.exit_code == EXIT_CODE:
            _agreeing.exit_code = INTERRUPTED
            _say('SIGINT: all processes end at their next step.')
            os.kill(os.getpid(), signal.SIGTERM)
          continue
      self._requested.set()
      threading.Thread(
        target=self._react, args=(number,), name='saving', daemon=True
      ).start()
    self._reader.close()

  def _react(self, number: int) -> None:
    """Sees to it that the process saves and ends."""
    # Whatever hangs, a save or a library's thread: the platform would be worse.
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
        'SIGINT: saving the last step and ending; a second one ends at once.'
      )
    else:
      _say('SIGTERM: saving the last step and ending.')
    if self._left.wait(self._grace_secs * _REACTION):
      return  # The main thread saves.
    try:
      with self.lock:
        save()
    except BaseException:
      traceback.print_exc()
      _end(1)
    _end(self.exit_code)


@contextlib.contextmanager
def signals_left_alone() -> Iterator[None]:
  """Lets signals do within what they do without this package.

  For a process of another program. Ctrl-C then raises KeyboardInterrupt, and a
  run goes on from its newest checkpoint.
  """
  token = _is_guest.set(True)
  try:
    yield
  finally:
    _is_guest.reset(token)


# The one that is entered and agrees with other processes.
_agreeing: Watcher | None = None


def end_at_once_if_interrupted() -> None:
  """Makes SIGINT end the process, where nothing is lost by it.

  For the start of a program, while it imports, and for its end. An ignored
  SIGINT stays so.
  """
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def run(main: Callable[[], int | None]) -> int:
  """Runs a program; returns its exit status, 75 or 130 after a signal."""
  try:
    with Watcher(grace_secs=60):
      return main() or 0
  finally:  # Nothing is left to do but, of several processes, to end together.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_at_once_if_interrupted()


def _say(text: str) -> None:
  """Prints to standard error, below a progress bar that may be there."""
  print(f'\n{text}' if sys.stderr.isatty() else text, file=sys.stderr)


def _end(status: int = EXIT_CODE, text: str = '') -> None:
  """Ends the process at once, without waiting for the main thread.

  Nor for whoever reads what it prints, and may have stopped.
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
