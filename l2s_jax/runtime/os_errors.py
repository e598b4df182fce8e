# SPDX-License-Identifier: Apache-2.0
"""Operating-system errors as one-sentence messages.

Such an error can arrive as an OSError, as a library's exception that quotes the
system's message, as the cause of either, or on a library thread that prints it
and continues or dies. All become one sentence with the path, the system's
message and the remedy.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator
from typing import Any

from l2s_jax.runtime import scratch

_SPACE = 'free some space, or choose a folder on another disk'
_RIGHTS = 'choose a folder that you may write to, or change its permissions'
_PATH = 'correct the path'
# Remedies. Only errors listed here count as caused by the environment.
_REMEDIES = {
  errno.ENOSPC: _SPACE,
  errno.EDQUOT: _SPACE,
  errno.EFBIG: 'raise the limit of file sizes (ulimit -f), or use another disk',
  errno.EACCES: _RIGHTS,
  errno.EPERM: _RIGHTS,
  errno.EROFS: 'choose another folder',
  errno.ENOTDIR: 'a file has the name of a folder: remove it, or correct '
  'the path',
  errno.EISDIR: 'a folder has the name of a file: remove it, or correct the '
  'path',
  errno.EEXIST: 'remove it, or choose another path',
  errno.ENOENT: _PATH,
  errno.ENAMETOOLONG: 'choose a shorter path',
  errno.ELOOP: 'its symbolic links form a loop: correct the path',
  errno.EIO: 'the disk or the file system has failed: see its logs',
  errno.ESTALE: 'the network file system lost it: mount it again',
  errno.EMFILE: 'raise the limit of open files (ulimit -n)',
  errno.ENFILE: 'close other programs: the machine has too many open files',
  errno.ENOMEM: 'use a machine with more memory, or smaller batches',
  errno.ENODEV: _PATH,
  errno.ENXIO: _PATH,
  errno.ETXTBSY: 'close the program that uses it',
  errno.EBUSY: 'close the program that uses it',
}
STORE = (
  'check that the bucket exists, that its credentials are valid and allow it '
  '(gcloud auth application-default login; for s3, AWS_PROFILE), and the '
  'network; then start again'
)
# Errors of a write to an open file, which do not say to which.
_OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_GOES_ON = 'Earlier output is intact; the same command resumes from it.'
_WORDS = {os.strerror(number): number for number in _REMEDIES}
# Formats of tensorstore and absl: [OS error 28: ENOSPC No space left ...].
_NUMBER = re.compile(r'\[OS error (\d+)|\[Errno (\d+)\]')
# Python's format, of which gin's copies of an OSError have the text alone.
_OF_PYTHON = re.compile(r'^\[Errno (\d+)\] ([^\n]+?)(?:: ["\'].*)?$', re.M)
# Loggers that repeat the errors of library threads.
_LOGS = ('absl', 'asyncio', 'concurrent.futures', 'gcsfs')
# Packages of object stores, whose exceptions are not OSErrors.
_STORES = ('gcsfs', 'google.auth', 'aiohttp', 'botocore')
# TensorStore's message about an object, and the names in those of gcsfs.
_OBJECT = re.compile(r'^[A-Z_]+: .*\b(gs|s3)://')
_REFUSED = re.compile(
  r'^(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|'
  r'CANCELLED|RESOURCE_EXHAUSTED|INTERNAL): .*\b(gs|s3)://'
)
_OF_GCSFS = re.compile(
  r'(?:^|[ /])b/([^/\s?]+)/o(?:/([^\s?]*)|\?name=([^\s&]+))?'
)
# asyncio's message.
_LOOP_CLOSED = 'Event loop is closed'
# Patterns of the first path in a message, quoted or bare.
_QUOTED = re.compile(r"""["'](/[^"'\n]+)["']""")
_BARE = re.compile(r'(/[^\s"\';:,\[\]()]+)')


def describe(error: BaseException) -> str | None:
  """Returns a sentence for an operating-system error; None for other errors.

  Args:
    error: any exception; its causes are searched, too.
  """
  found = _find(error)
  if found is None:
    return None
  number, words, path = found
  if number == errno.EPIPE:
    return 'the reader of standard output closed it.'
  if number is None:
    return words
  remedy = _REMEDIES.get(number)
  place = f'{path}: ' if path else ''
  return f'{place}{words}{f"; {remedy}" if remedy else ""}. {_GOES_ON}'


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Gives the path of a file to errors of its writes, which have none."""
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno in _OF_WRITES:
      error.filename = os.fspath(path)
    raise


def is_of_store(error: BaseException) -> bool:
  """Returns whether an object store did not answer, or refused to.

  Such an error does not mean damage. A missing object does.
  """
  text = str(error)
  if isinstance(error, FileNotFoundError):
    return False
  return (
    STORE in text
    or _REFUSED.search(text) is not None
    or type(error).__module__.startswith(_STORES)
    or (isinstance(error, OSError) and _OF_GCSFS.search(text) is not None)
  )


def first_line(error: BaseException) -> str:
  """Returns the first line of an exception's message, without a full stop."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300].rstrip('.')


def _find(
  error: BaseException,
) -> tuple[int | None, str, str | None] | None:
  """Returns error number, message and path of the first known error."""
  chain: list[BaseException] = [error]
  for item in chain:  # grows in the loop
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
    # A rename has two names; the second is the one that fails.
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
  if STORE in text:  # It is a sentence of `storage`.
    return None, text.partition('\n')[0], None  # gin adds lines.
  if _OBJECT.search(text) or type(error).__module__.startswith(_STORES):
    return None, f'{first_line(error)}; {STORE}. {_GOES_ON}', None
  if isinstance(error, OSError) and (match := _OF_GCSFS.search(text)):
    name = urllib.parse.unquote(match[2] or match[3] or '')
    place = f'gs://{match[1]}/{name}'.rstrip('/')
    if isinstance(error, FileNotFoundError):
      return errno.ENOENT, os.strerror(errno.ENOENT), place
    return None, f'{place}: {first_line(error)}; {STORE}. {_GOES_ON}', None
  if isinstance(error, OSError) and (match := _OF_PYTHON.search(text)):
    return int(match[1]), match[2], _path(text)
  if match := _NUMBER.search(text):
    number = int(match[1] or match[2])
    return number, os.strerror(number), _path(text)
  for words, number in _WORDS.items():
    if words in text:
      return number, words, _path(text)
  if isinstance(error, OSError):  # such as network errors of a library
    lines = text.strip().splitlines()
    return None, lines[0] if lines else type(error).__name__, None
  return None


def _path(text: str) -> str | None:
  match = _QUOTED.search(text) or _BARE.search(text)
  return match[1] if match else None


class Hooks:
  """Exception hooks that print one sentence instead of tracebacks.

  When a library thread meets a full disk, a traceback is printed by the thread,
  by the library's logger, by the waiting thread, and by Python at exit.

  Attributes:
    of_thread: the sentence of the first thread ended by such an error, which
      the main program may not have noticed; None if there is none.
  """

  def __init__(self) -> None:
    self.of_thread: str | None = None

  def install(self) -> None:
    """Replaces Python's hooks for uncaught exceptions, permanently."""
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
      # Exits at once, since the teardown of libraries prints more errors.
      for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
          stream.flush()
      scratch.remove()
      os._exit(1)

    def thread_excepthook(args: threading.ExceptHookArgs) -> None:
      sentence = args.exc_value and describe(args.exc_value)
      if not sentence:
        print_thread(args)
      elif self.of_thread is None:
        self.of_thread = sentence

    def unraisablehook(args: Any) -> None:
      error = args.exc_value
      if _has_no_waiter(error) or (error is not None and describe(error)):
        return
      print_unraisable(args)

    sys.excepthook = excepthook
    threading.excepthook = thread_excepthook
    sys.unraisablehook = unraisablehook
    for name in _LOGS:
      logging.getLogger(name).addFilter(_is_news)


def _has_no_waiter(error: BaseException | None) -> bool:
  """Returns whether TensorStore finished what nobody waits for any more.

  When one write of a checkpoint fails, its event loop is closed; the others
  then have no loop to report to.
  """
  return isinstance(error, RuntimeError) and str(error) == _LOOP_CLOSED


def _is_news(record: logging.LogRecord) -> bool:
  """Returns whether a log record is unrelated to operating-system errors."""
  error = record.exc_info[1] if record.exc_info else None
  if record.levelno < logging.ERROR and error is None:
    return True
  if error is not None and describe(error) is not None:
    return False
  return describe(RuntimeError(record.getMessage())) is None
