# SPDX-License-Identifier: Apache-2.0
"""What the operating system refuses is one sentence, in any form it comes."""

import errno
import logging
import os
import subprocess
import sys

import pytest
import tiny_runs

from l2s_jax.runtime import os_errors


class Strange(Exception):
  """Stands for an exception of a library that knows no OSError."""


@pytest.mark.parametrize(
  ('error', 'start'),
  [
    (
      OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/a/b'),
      '/a/b: No space left on device; free some space',
    ),
    (
      PermissionError(errno.EACCES, 'Permission denied', '/a'),
      '/a: Permission denied; choose a folder that you may write to',
    ),
    (
      OSError(errno.EROFS, os.strerror(errno.EROFS), '/a', None, '/b'),
      '/b: Read-only file system; choose another folder',
    ),
    (OSError(errno.ENAMETOOLONG, 'File name too long', b'/a'), '/a: File name'),
    (  # As gin copies it.
      OSError("[Errno 28] 1 kB free of /b: '/a'\n  In call to configurable"),
      '/a: 1 kB free of /b; free some space',
    ),
    (
      Strange(
        'INTERNAL: Error writing "ocdbt" file "/runs/x/d": [OS error 28: '
        'ENOSPC No space left on device]'
      ),
      'No space left on device',
    ),
    (
      Strange("cannot write '/runs/x': No space left on device"),
      '/runs/x: No space left on device; free some space',
    ),
    (
      OSError('Connection to hub.invalid failed\nmore'),
      'Connection to hub.inv',
    ),
    (  # A sentence of `storage`, to which gin adds lines.
      OSError(f'gs://b/x: Forbidden: h/b/b/o; {os_errors.STORE}.\n  In call'),
      'gs://b/x: Forbidden: h/b/b/o; check that the bucket exists',
    ),
    (
      BrokenPipeError(errno.EPIPE, 'Broken pipe'),
      'the reader of standard',
    ),
  ],
)
def test_an_error_of_the_system_is_one_line_with_path_words_and_remedy(
  error, start
):
  sentence = os_errors.describe(error)
  assert sentence is not None and start in sentence
  assert '\n' not in sentence and '[Errno' not in sentence
  if isinstance(error, OSError) and error.filename is not None:
    assert sentence.endswith('the same command resumes from it.')


def test_the_error_may_be_the_cause_or_one_of_a_group():
  full = OSError(errno.ENOSPC, 'No space left on device', '/a')
  try:
    try:
      raise full
    except OSError as error:
      raise Strange('saving failed') from error
  except Strange as error:
    assert (os_errors.describe(error) or '').startswith('/a: No space')
  group = ExceptionGroup('several', [KeyError('x'), full])
  assert (os_errors.describe(group) or '').startswith('/a: No space')


@pytest.mark.parametrize(
  'error', [KeyError('x'), ValueError('no such number'), RuntimeError('')]
)
def test_a_bug_is_none(error):
  assert os_errors.describe(error) is None


PROGRAM = """
import logging, os, sys, threading
from l2s_jax import __main__

def main():
  def fill():
    with open('/dev/full', 'w') as file:
      file.write('x')
  {body}

sys.argv = ['x', *{argv}]
sys.exit(__main__.process(main))
"""


def program(body, *argv):
  return subprocess.run(
    [sys.executable, '-c', PROGRAM.format(body=body, argv=list(argv))],
    cwd=tiny_runs.ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


@pytest.mark.parametrize(
  'body',
  [
    'fill()',
    "open('/proc/none/x', 'w')",
    "os.makedirs('/dev/null/x')",
    "open('/tmp/' + 5000 * 'x')",
    'thread = threading.Thread(target=fill); thread.start(); thread.join()',
    'thread = threading.Thread(target=fill); thread.start(); fill()',
    "sys.stdout = open('/dev/full', 'w'); print('x')",
  ],
)
def test_a_program_ends_with_one_sentence_and_1(body):
  result = program(body)
  assert result.returncode == 1, result.stderr
  assert result.stderr.startswith('l2s_jax: error: ')
  assert len(result.stderr.splitlines()) == 1


def test_verbose_keeps_the_traceback_and_so_does_a_bug():
  result = program('fill()', '--verbose')
  assert result.returncode == 1
  assert 'Traceback' in result.stderr and 'OSError' in result.stderr
  result = program("raise KeyError('x')")
  assert result.returncode == 1
  assert 'Traceback' in result.stderr and 'KeyError' in result.stderr


def test_a_log_that_repeats_the_error_is_left_out():
  def record(level, message, error=None):
    info = (type(error), error, None) if error else None
    return logging.LogRecord('absl', level, 'x.py', 1, message, (), info)

  full = OSError(errno.ENOSPC, 'No space left on device', '/a')
  assert not os_errors._is_news(record(logging.ERROR, 'save failed', full))
  assert not os_errors._is_news(
    record(logging.ERROR, 'RESOURCE: No space left on device')
  )
  assert os_errors._is_news(record(logging.ERROR, 'something else'))
  assert os_errors._is_news(
    record(logging.WARNING, 'No such file or directory; making it')
  )


NO_WAITER = """
import asyncio, sys, threading
import tensorstore
from l2s_jax import __main__

async def leave(future):
  asyncio.ensure_future(wait(future))
  await asyncio.sleep(0)

async def wait(future):
  await future

def main():
  promise, future = tensorstore.Promise.new()
  loop = asyncio.new_event_loop()
  loop.run_until_complete(leave(future))
  loop.close()
  # A task that is left is another message of asyncio's.
  for task in asyncio.all_tasks(loop):
    task._log_destroy_pending = False
  thread = threading.Thread(target=promise.set_result, args=(1,))
  thread.start()
  thread.join()
  open('/dev/null/x')

sys.exit(__main__.process(main))
"""


def test_a_write_that_ends_after_the_error_of_another_is_not_reported():
  result = subprocess.run(
    [sys.executable, '-c', NO_WAITER],
    cwd=tiny_runs.ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.returncode == 1
  assert result.stderr.startswith('l2s_jax: error: /dev/null/x: ')
  assert len(result.stderr.splitlines()) == 1
