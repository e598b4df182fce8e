# SPDX-License-Identifier: Apache-2.0
"""Laws of compilation: announced once, and done by one process alone."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from l2s_jax.runtime import compilation

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = """
from l2s_jax.runtime import compilation
compilation.use_cache()
import jax
print(jax.jit(lambda x: x @ x + x.sum())(jax.numpy.ones((8, 8))).sum())
"""


def test_a_program_is_announced_when_it_is_new(capsys):
  announce = compilation.Announcer()
  for program in ('a', 'b', 'a'):
    with announce(program):
      if program == 'b':
        assert capsys.readouterr().err.endswith('compiling b ...')
  assert re.fullmatch(r' \d+\.\d s\n', capsys.readouterr().err)
  assert announce.total_secs >= 0
  with pytest.raises(KeyboardInterrupt), announce('c'):
    raise KeyboardInterrupt
  assert capsys.readouterr().err.endswith(' s\n')


@pytest.mark.parametrize('most_bytes, left', [(40, 4), (25, 2), (0, 0)])
def test_what_was_used_least_recently_makes_room(tmp_path, most_bytes, left):
  for number in range(4):
    path = tmp_path / f'{number}-cache'
    path.write_bytes(bytes(10))
    # Used again, or written: the later of both counts.
    os.utime(path, (number, 0) if number % 2 else (0, number))
  compilation.bound(tmp_path, most_bytes)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == [f'{number}-cache' for number in range(4 - left, 4)]
  compilation.bound(tmp_path / 'absent', 0)


def test_a_second_process_finds_what_the_first_has_compiled(tmp_path):
  def run(**changes):
    environment = os.environ | {
      'XDG_CACHE_HOME': str(tmp_path),
      'JAX_ENABLE_COMPILATION_CACHE': 'true',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    result = subprocess.run(
      [sys.executable, '-c', SCRIPT],
      cwd=ROOT,
      env=environment | changes,
      capture_output=True,
      text=True,
    )
    assert (result.returncode, result.stderr) == (0, '')
    # The times of use, which JAX keeps beside them, change.
    return result.stdout, sorted(tmp_path.rglob('*-cache'))

  switched_off = run(JAX_ENABLE_COMPILATION_CACHE='false')
  assert switched_off[1] == []
  first = run()
  assert first[1][0].is_relative_to(tmp_path / 'l2s_jax' / 'compiled')
  assert run() == first
  assert first[0] == switched_off[0]
