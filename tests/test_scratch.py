# SPDX-License-Identifier: Apache-2.0
"""Laws of temporary folders: none stays after the end of its process."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import tiny_runs

MAKE = """
import pathlib, sys, time
from l2s_jax.runtime import os_errors, scratch
folder = scratch.folder()
(pathlib.Path(folder.name) / 'copy').write_text('x')
with scratch.folder():
  pass
"""


def start(folder, end):
  return subprocess.Popen(
    [sys.executable, '-c', MAKE + 'print("made", flush=True)\n' + end],
    env=os.environ | {'TMPDIR': str(folder), 'PYTHONPATH': str(tiny_runs.ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  ('end', 'status'),
  [
    ('sys.exit(3)', 3),
    ('os_errors.Hooks().install(); open("/none")', 1),
  ],
)
def test_the_end_of_a_process_removes_them(tmp_path, end, status):
  process = start(tmp_path, end)
  _, told = process.communicate(timeout=120)
  assert process.returncode == status, told
  assert list(tmp_path.iterdir()) == []


def test_the_next_process_removes_those_of_a_killed_one(tmp_path):
  # Of a host whose name begins with that of this one.
  host = socket.gethostname()
  other = tmp_path / f'l2s_jax-scratch-{host}-1-abcdefgh'
  other.mkdir()
  killed, lives = (start(tmp_path, 'time.sleep(600)') for _ in range(2))
  assert killed.stdout.readline() == lives.stdout.readline() == 'made\n'
  assert len(list(tmp_path.glob('*/*/copy'))) == 2
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert len(list(tmp_path.glob('*/*/copy'))) == 2
  start(tmp_path, '').communicate(timeout=120)
  assert len(list(tmp_path.glob('*/*/copy'))) == 1
  lives.kill()
  lives.communicate()
  start(tmp_path, '').communicate(timeout=120)
  assert list(tmp_path.iterdir()) == [other]


def test_no_other_module_makes_them():
  """Those of benchmarks are where their user says (`dir=`)."""
  made = [
    path.name
    for path in (tiny_runs.ROOT / 'l2s_jax').rglob('*.py')
    if re.search(
      r'(TemporaryDirectory|TemporaryFile|mkdtemp|mkstemp)\((?!dir=)',
      path.read_text(encoding='utf-8'),
    )
  ]
  assert made == ['scratch.py']
