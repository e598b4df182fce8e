# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, a job ends as if it had not been.

A short form of `faults/kills.py`.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from faults import killed, kills

TESTS = pathlib.Path(__file__).parent
UNFINISHED = '/run/checkpoints/3.orbax-checkpoint-tmp'


@pytest.mark.parametrize(
  'verbs, count',
  [
    (('convert',), 2),
    pytest.param(kills.VERBS, 6, marks=pytest.mark.long),
  ],
)
def test_killed_jobs_end_as_unbroken_ones(verbs, count):
  """In a process of its own, which has one device, as a user's has."""
  result = subprocess.run(
    [
      *(sys.executable, '-m', 'faults.kills', f'--count={count}', '--seed=1'),
      *('--processes', '1', '--verbs', *verbs),
    ],
    cwd=TESTS.parent,
    env=os.environ
    | {'PYTHONPATH': f'{TESTS.parent}:{TESTS}', 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=1800,
  )
  assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
  total = [cell.strip() for cell in result.stdout.splitlines()[-1].split('|')]
  assert total[1] == 'all'
  assert total[4] == total[5] and int(total[4]) > 0  # All are equal.


def test_phases_of_a_save_are_told_apart():
  part = f'{UNFINISHED}/params.orbax-checkpoint-tmp'
  for event, paths, phase in (
    ('open', ['/run/metrics.jsonl'], 'other files'),
    ('os.rename', ['/run/..lock.0f', '/run/.lock'], 'other files'),
    ('os.mkdir', [UNFINISHED], 'before the arrays'),
    ('open', [f'{part}/_METADATA'], 'arrays'),
    ('os.rename', [part, f'{UNFINISHED}/params'], 'arrays'),
    ('os.rename', [UNFINISHED, '/run/checkpoints/3'], 'commit'),
    (
      'os.rename',
      ['/run/checkpoints/1', '/run/checkpoints/deleted/1'],
      'deletion',
    ),
    ('os.remove', ['/run/checkpoints/deleted/1/data'], 'deletion'),
  ):
    assert killed.phase(event, paths) == phase, paths


def test_the_table_of_the_page_is_the_drivers_and_has_no_bad_outcome():
  page = (TESTS.parent / 'docs' / 'reliability.md').read_text()
  begin, end = '<!-- kills -->', '<!-- end of kills -->'
  rows = page.split(begin)[1].split(end)[0].strip().splitlines()
  assert rows[:2] == kills.table({}).splitlines()[:2]
  cells = [re.split(r' *\| *', row)[1:-1] for row in rows[2:]]
  assert {row[0] for row in cells} <= {*kills.VERBS, 'all'}
  assert cells[-1][0] == 'all' and int(cells[-1][3]) > 0
  assert all(row[3] == row[4] for row in cells)
