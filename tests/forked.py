# SPDX-License-Identifier: Apache-2.0
"""Processes of `python -m MODULE` and `-c PROGRAM` that import nothing twice.

They are forked from a server that has imported the verbs and done nothing else:
each begins with modules, without devices, threads or settings. Signals, exit
codes and streams are those of any process. A test of how a program starts has
`subprocess` instead.
"""

import atexit
import contextlib
import importlib.util
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import types
from collections.abc import Iterator
from multiprocessing import connection, forkserver

ROOT = pathlib.Path(__file__).parent.parent
_PRELOADED = [
  'forked',
  'l2s_jax.training.train',
  'l2s_jax.evaluation.evaluate',
  'l2s_jax.inference.infer',
  'l2s_jax.data.features',
  'l2s_jax.evaluation.seqio_evaluator',
  'without_torch',
]
# Of a process that compiles as the tests' own do, see conftest.py.
COMPILE_FAST = {
  'JAX_PLATFORMS': 'cpu',
  'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
  'XLA_FLAGS': os.environ['L2S_TESTS_XLA_FLAGS'],
}
# Read as JAX is imported: by the server.
_AT_IMPORT = 'JAX_'


def environment() -> dict[str, str]:
  """Returns the variables of a process: one device, the tests' own cache."""
  folder = os.environ['L2S_TESTS_CACHE']
  return (
    os.environ
    | COMPILE_FAST
    | {
      'JAX_ENABLE_COMPILATION_CACHE': 'true',
      'JAX_COMPILATION_CACHE_DIR': folder,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
  )


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
  before = dict(os.environ)
  os.environ.update(variables)
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)


def _run(
  argv: list[str],
  variables: dict[str, str],
  cwd: str,
  streams: dict[int, connection.Connection],
) -> None:
  """Becomes `python -m MODULE ARGUMENTS`, in the process that was forked.

  Or `python -c PROGRAM ARGUMENTS`.
  """
  for number, stream in streams.items():
    os.dup2(stream.fileno(), number)
    stream.close()
  sys.stdin = open(0, closefd=False)
  os.environ.clear()
  os.environ.update(variables)
  os.chdir(cwd)
  flag, module, *arguments = argv
  sys.argv = [flag if flag == '-c' else module, *arguments]
  sys.modules.pop(f'{module}.__main__', None)  # It is run, not imported.
  status = 0
  try:
    if flag == '-c':
      sys.modules['__main__'] = types.ModuleType('__main__')
      exec(compile(module, '<string>', 'exec'), vars(sys.modules['__main__']))
    else:
      runpy.run_module(module, run_name='__main__', alter_sys=True)
  except SystemExit as end:
    status = (
      end.code if isinstance(end.code, int) else int(end.code is not None)
    )
  except BaseException:
    sys.excepthook(*sys.exc_info())
    status = 1
  atexit._run_exitfuncs()
  sys.exit(status)


def start_server() -> None:
  """Starts the server, unless one is there; another would preload less."""
  # It passes over in silence what it cannot import.
  assert all(importlib.util.find_spec(name) for name in _PRELOADED)
  multiprocessing.get_context('forkserver').set_forkserver_preload(_PRELOADED)
  tests = pathlib.Path(__file__).parent
  with _environment(environment() | {'PYTHONPATH': f'{ROOT}:{tests}'}):
    forkserver.ensure_running()


class Popen(subprocess.Popen):
  """Takes the place of `subprocess.Popen` of `[python, '-m', MODULE, ...]`.

  Or of `[python, '-c', PROGRAM, ...]`.
  """

  def _execute_child(
    self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest
  ):
    stdin, _, _, stdout, _, stderr = rest[3:9]
    python, *argv = args
    assert python == sys.executable and argv[0] in ('-m', '-c'), args
    variables = dict(environment() if env is None else env)
    expected = environment()
    for name in {*variables, *expected}:
      if name.startswith(_AT_IMPORT):
        assert variables.get(name) == expected.get(name), name
    start_server()
    context = multiprocessing.get_context('forkserver')
    streams = {}
    for number, fd in enumerate((stdin, stdout, stderr)):
      if fd != -1:
        # Of its own: what is sent to a process is closed here, once.
        streams[number] = connection.Connection(os.dup(fd), writable=False)
    self._process = context.Process(
      target=_run, args=(argv, variables, os.fspath(cwd or ROOT), streams)
    )
    self._process.start()
    for stream in streams.values():
      stream.close()
    self.pid = self._process.pid or 0
    self._child_created = True
    self._close_pipe_fds(*rest[3:9])  # type: ignore[attr-defined]

  def _internal_poll(self, *args, **kwargs):
    if self.returncode is None:
      self.returncode = self._process.exitcode
    return self.returncode

  def _wait(self, timeout):
    self._process.join(timeout)
    if self._internal_poll() is None:
      raise subprocess.TimeoutExpired(self.args, timeout)
    return self.returncode


def run(argv, *, input=None, timeout=None, **options):
  """Runs to the end, as `subprocess.run` with `capture_output`."""
  pipe = subprocess.PIPE
  options |= {'stdout': pipe, 'stderr': pipe}
  if input is not None:
    options['stdin'] = pipe
  with Popen(argv, **options) as process:
    try:
      output, errors = process.communicate(input, timeout)
    except BaseException:
      process.kill()
      raise
  return subprocess.CompletedProcess(argv, process.returncode, output, errors)
