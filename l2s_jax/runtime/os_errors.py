# SPDX-License-Identifier: Apache-2.0
"""What the operating system refused, in one sentence.

An error of the system reaches us in many forms: as an OSError; as a library's
own exception whose text repeats the system's words; as the cause of either; on
a library's thread, which prints it and goes on or dies. All become one sentence
with the path, the system's words, and what to do.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import threading
import types
from typing import Any

_SPACE = 'make room there, or choose a folder with room'
_RIGHTS = 'choose a folder that you may write to, or change its permissions'
_PATH = 'correct the path'
# What to do about each, and with it what counts as the user's affair.
_REMEDIES = {
  errno.ENOSPC: _SPACE,
  errno.EDQUOT: _SPACE,
  errno.EFBIG: 'raise the limit of file sizes (ulimit -f), or take another '
  'disk',
  errno.EACCES: _RIGHTS,
  errno.EPERM: _RIGHTS,
  errno.EROFS: 'choose another folder',
  errno.ENOTDIR: 'a file stands where a folder should be: remove it, or '
  'correct the path',
  errno.EISDIR: 'a folder stands where a file should be: remove it, or correct '
  'the path',
  errno.EEXIST: 'remove what stands there, or choose another path',
  errno.ENOENT: _PATH,
  errno.ENAMETOOLONG: 'choose a shorter path',
  errno.ELOOP: 'its links go in a circle: correct the path',
  errno.EIO: 'the disk or the file system has failed: see its logs',
  errno.ESTALE: 'the network file system has lost it: mount it again',
  errno.EMFILE: 'raise the limit of open files (ulimit -n)',
  errno.ENFILE: 'close other programs: the machine has too many open files',
  errno.ENOMEM: 'take a machine with more memory, or smaller batches',
  errno.ENODEV: _PATH,
  errno.ENXIO: _PATH,
  errno.ETXTBSY: 'close the program that uses it',
  errno.EBUSY: 'close the program that uses it',
}
_GOES_ON = 'What was saved before is whole; the same command goes on from it.'
_WORDS = {os.strerror(number): number for number in _REMEDIES}
# As tensorstore and absl write it: [OS error 28: ENOSPC No space left ...].
_NUMBER = re.compile(r'\[OS error (\d+)|\[Errno (\d+)\]')
# Which repeat the errors of their threads.
_LOGS = ('absl', 'asyncio', 'concurrent.futures')
# The first path in a library's words, quoted or not.
_QUOTED = re.compile(r"""["'](/[^"'\n]+)["']""")
_BARE = re.compile(r'(/[^\s"\';:,\[\]()]+)')


def describe(error: BaseException) -> str | None:
  """Returns the sentence for an error of the system; None: it is no such one.

  Args:
    error: any exception; what it was raised from counts, too.
  """
  found = _find(error)
  if found is None:
    return None
  number, words, path = found
  if number == errno.EPIPE:
    return 'standard output was closed by whoever read it.'
  if number is None:
    return words
  remedy = _REMEDIES.get(number)
  place = f'{path}: ' if path else ''
  return f'{place}{words}{f"; {remedy}" if remedy else ""}. {_GOES_ON}'


def first_line(error: BaseException) -> str:
  """Returns what a library's error says first, to stand in a sentence."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300].rstrip('.')


def _find(
  error: BaseException,
) -> tuple[int | None, str, str | None] | None:
  """Returns number, the system's words, and path of the first that is known."""
  chain: list[BaseException] = [error]
  for item in chain:  # Grows.
    nested = [*getattr(item, 'exceptions', ()), item.__cause__]
    if not item.__suppress_context__:
      nested.append(item.__context__)
    chain += [x for x in nested if x is not None and x not in chain]
  found = [entry for item in chain if (entry := _read(item)) is not None]
  with_path = [entry for entry in found if entry[2]]
  return next(iter(with_path or found), None)


def _read(
  error: BaseException,
) -> tuple[int | None, str, str | None] | None:
  if isinstance(error, OSError) and error.errno is not None:
    # Two of them in a rename: what cannot be made is the second.
    names = [
      os.fsdecode(name) if isinstance(name, bytes) else str(name)
      for name in (error.filename2, error.filename)
      if name is not None and not isinstance(name, int)
    ]
    words = error.strerror or os.strerror(error.errno)
    if error.errno in _REMEDIES or names or error.errno == errno.EPIPE:
      return error.errno, words, names[0] if names else _path(str(error))
    return error.errno, words, None
  text = str(error)
  if match := _NUMBER.search(text):
    number = int(match[1] or match[2])
    return number, os.strerror(number), _path(text)
  for words, number in _WORDS.items():
    if words in text:
      return number, words, _path(text)
  if isinstance(error, OSError):  # Of a network, say: in a library's words.
    lines = text.strip().splitlines()
    return None, lines[0] if lines else type(error).__name__, None
  return None


def _path(text: str) -> str | None:
  match = _QUOTED.search(text) or _BARE.search(text)
  return match[1] if match else None


class Hooks:
  """Prints one sentence where Python and libraries print tracebacks.

  A library's thread that meets a full disk prints a traceback, and so do the
  log of the library, the thread that waits for it, and Python at the end.

  Attributes:
    of_thread: the sentence of the first thread that ended so; None while none
      has. The program may not have heard of it.
  """

  def __init__(self) -> None:
    self.of_thread: str | None = None

  def install(self) -> None:
    """Takes the place of what prints tracebacks, for good."""
    print_error = sys.excepthook
    print_thread = threading.excepthook
    print_unraisable = sys.unraisablehook

    def excepthook(
      kind: type[BaseException],
      error: BaseException,
      trace: types.TracebackType | None,
    ) -> None:
      sentence = describe(error)
      if sentence is None:
        print_error(kind, error, trace)
        return
      print(f'l2s_jax: error: {sentence}', file=sys.stderr)
      # At once: what libraries have underway would print much while it breaks.
      for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
          stream.flush()
      os._exit(1)

    def thread_excepthook(args: threading.ExceptHookArgs) -> None:
      sentence = args.exc_value and describe(args.exc_value)
      if not sentence:
        print_thread(args)
      elif self.of_thread is None:
        self.of_thread = sentence

    def unraisablehook(args: Any) -> None:
      if args.exc_value is None or describe(args.exc_value) is None:
        print_unraisable(args)

    sys.excepthook = excepthook
    threading.excepthook = thread_excepthook
    sys.unraisablehook = unraisablehook
    for name in _LOGS:
      logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a library's log says something else than the sentence will."""
  error = record.exc_info[1] if record.exc_info else None
  if record.levelno < logging.ERROR and error is None:
    return True
  if error is not None and describe(error) is not None:
    return False
  return describe(RuntimeError(record.getMessage())) is None
