# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, a job ends as if it had not been.

A short form of `faults/kills.py`.
"""

import collections
import os
import pathlib
import random
import subprocess
import sys

import pytest
from faults import killed, kills

TESTS = pathlib.Path(__file__).parent
UNFINISHED = '/run/checkpoints/3.orbax-checkpoint-tmp'


@pytest.mark.parametrize(
  'verbs, count, processes',
  [
    (('convert',), 2, '1'),
    pytest.param(kills.VERBS, 6, '1', marks=pytest.mark.long),
    pytest.param(('train',), 6, '2', marks=pytest.mark.long),
  ],
)
def test_killed_jobs_end_as_unbroken_ones(verbs, count, processes):
  """In a process of its own, which has one device, as a user's has."""
  result = subprocess.run(
    [
      *(sys.executable, '-m', 'faults.kills', f'--count={count}', '--seed=1'),
      *('--processes', processes, '--verbs', *verbs),
    ],
    cwd=TESTS.parent,
    env=os.environ
    | {'PYTHONPATH': f'{TESTS.parent}:{TESTS}', 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=1800,
  )
  assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
  verb, *_, number, equal, _, _ = _cells(result.stdout.splitlines()[-1])
  assert verb == 'all'
  assert number == equal and int(number) > 0


def _cells(row):
  return [cell.strip() for cell in row.strip('|').split('|')]


def test_phases_of_a_save_are_told_apart():
  part = f'{UNFINISHED}/params.orbax-checkpoint-tmp'
  for event, paths, phase in (
    ('open', ['/run/metrics.jsonl'], 'other files'),
    ('os.rename', ['/run/..lock.0f', '/run/.lock'], 'other files'),
    ('os.rename', ['/run/..log.end.0f', '/run/.log.end'], 'other files'),
    ('os.rename', ['/run/.log.0f', '/run/log'], 'commit'),
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


def test_phases_take_turns_and_a_victim_reaches_its_own():
  rng = random.Random(0)
  changes = [
    collections.Counter({'arrays': 20, 'commit': 3}),
    collections.Counter({'arrays': 2}),
  ]
  killed_at = collections.Counter[str]()
  victims = set()
  for _ in range(30):
    victim, kind, (phase, number, delay) = kills.choose(
      changes, killed_at, 0, rng
    )
    assert 1 <= number <= changes[victim][phase]
    assert (kind == kills.AFTER_COMMIT) == (phase == 'commit' and delay > 0)
    killed_at[kind] += 1
    victims.add(victim)
  assert killed_at == {'arrays': 10, 'commit': 10, kills.AFTER_COMMIT: 10}
  assert victims == {0, 1}


def test_the_table_of_the_page_is_the_drivers_and_has_no_bad_outcome():
  page = (TESTS.parent / 'docs' / 'reliability.md').read_text()
  begin, end = '<!-- kills -->', '<!-- end of kills -->'
  rows = page.split(begin)[1].split(end)[0].strip().splitlines()
  assert rows[:2] == kills.table({}).splitlines()[:2]
  names, _, *jobs = map(_cells, rows)
  phases = names[2:-4]
  assert {*phases} == {*killed.PHASES, kills.AFTER_COMMIT}
  of_jobs = {}
  for verb, processes, *kills_at, number, equal, rounded, bad in jobs:
    numbers = [int(cell or 0) for cell in kills_at]
    assert sum(numbers) == int(number) == int(equal) + int(rounded)
    assert bad == '0'
    if (verb, processes) not in {('features', '2'), ('features', '4')}:
      assert rounded == '0' or verb == 'all'
    of_jobs[verb, processes] = numbers
  *each, (_, total) = of_jobs.items()
  assert {verb for (verb, _), _ in each} == {*kills.VERBS}
  assert total == [
    sum(column) for column in zip(*dict(each).values(), strict=True)
  ]
  assert sum(total) >= 200
  for processes in '124':
    assert all(of_jobs['train', processes])  # Killed at every phase.
