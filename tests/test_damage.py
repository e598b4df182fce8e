# SPDX-License-Identifier: Apache-2.0
"""What is damaged is found; the long form is `faults/damage.py`."""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent
READERS = (
  'resume',
  'infer, evaluate',
  'LLM of a run',
  'convert --to=hf',
  'convert --to=l2s',
)


@pytest.mark.parametrize('every', [24, pytest.param(8, marks=pytest.mark.long)])
def test_no_damaged_file_is_read_as_if_it_were_good(every):
  """In a process of its own, which has one device, as a user's has."""
  result = subprocess.run(
    [
      sys.executable,
      *('-m', 'faults.damage', '--flips=1', f'--every={every}', '--seed=1'),
      *('--readers', *READERS),
    ],
    cwd=TESTS.parent,
    env=os.environ
    | {'PYTHONPATH': f'{TESTS.parent}:{TESTS}', 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
  total = result.stdout.splitlines()[-1].split('|')
  assert total[1].strip() == 'all'
  assert int(total[2]) >= 480 / every
  assert total[-3].strip() == total[-2].strip() == '0'
