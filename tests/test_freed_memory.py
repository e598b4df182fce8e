# SPDX-License-Identifier: Apache-2.0
"""Laws of memory that a process frees and allocates again."""

import ctypes
import os
import subprocess
import sys

import pytest

from l2s_jax.runtime import memory

pytestmark = pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), 'mallopt'),
  reason='malloc is not from glibc',
)

# Pages that the kernel clears while a thread and the main thread allocate and
# fill 64 MiB four times, after having done so once.
_FAULTS = """
import resource, sys, threading
from l2s_jax import __main__
from l2s_jax.runtime import memory

def fill():
  for _ in range(4):
    b'1' * 2**26

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  fill()
  thread = threading.Thread(target=fill)
  thread.start()
  thread.join()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1:]:
  __main__.main(sys.argv[1:])
faults()
print(faults())
"""
_ALL = 8 * 2**26 // os.sysconf('SC_PAGE_SIZE')


def _faults(*command: str, **environment: str) -> int:
  """Runs a command of l2s_jax, then counts page faults in that process."""
  clean = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('MALLOC_', 'GLIBC_'))
  }
  done = subprocess.run(
    [sys.executable, '-c', _FAULTS, *command],
    env=clean | {'JAX_PLATFORMS': 'cpu'} | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return int(done.stdout.split()[-1])


@pytest.mark.parametrize('verb', ['train', 'benchmark --train'])
def test_training_keeps_freed_memory_also_for_threads(verb):
  # The command is refused for its missing gin file, after its memory is set.
  assert _faults(*verb.split(), '--gin_file=none.gin') < _ALL / 50


@pytest.mark.parametrize(
  ('command', 'environment'),
  [
    ('', {}),
    ('infer --gin_file=none.gin', {}),
    ('train --gin_file=none.gin', {'MALLOC_TOP_PAD_': '0'}),
    (
      'train --gin_file=none.gin',
      {'GLIBC_TUNABLES': 'glibc.malloc.tcache_count=7'},
    ),
  ],
)
def test_other_programs_and_configured_ones_keep_their_malloc(
  command, environment
):
  assert _faults(*command.split(), **environment) > _ALL / 2


@pytest.mark.parametrize('device', ['accel0', 'vfio/0', 'nvidia0', 'kfd'])
def test_a_host_with_accelerators_keeps_its_malloc(
  monkeypatch, tmp_path, device
):
  (tmp_path / device).parent.mkdir(exist_ok=True)
  (tmp_path / device).touch()
  monkeypatch.setattr(memory, '_DEVICES', tmp_path)
  monkeypatch.setenv('JAX_PLATFORMS', '')
  assert not memory.keep_freed()
