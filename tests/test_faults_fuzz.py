# SPDX-License-Identifier: Apache-2.0
"""Broken files and settings end in one sentence: a short form of the fuzzer."""

import dataclasses
import os
import pathlib
import random
import subprocess
import sys

import pytest
from faults import fuzz_files, mutate

TESTS = pathlib.Path(__file__).parent
COUNT = 60
LONG = pytest.mark.long
KINDS = [*fuzz_files.kinds(), 'gin']


def test_broken_files_and_settings_end_in_one_sentence_or_are_read():
  """In a process of its own: annotations are not checked there, as in use."""
  result = subprocess.run(
    [
      sys.executable,
      *('-m', 'faults.fuzz_files', '--seed=1', f'--count={COUNT}'),
      f'--kinds={",".join(KINDS)}',
    ],
    env=os.environ | {'PYTHONPATH': f'{TESTS.parent}:{TESTS}'},
    capture_output=True,
    text=True,
    errors='replace',
    timeout=300,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  rows = [line.split('|')[1:-1] for line in result.stdout.splitlines()[2:]]
  assert [row[0].strip() for row in rows] == KINDS
  for _, broken, read, refused, tracebacks in rows:
    assert int(read) + int(refused) == int(broken) == COUNT
    assert int(read) > 0 and int(tracebacks) == 0


@pytest.mark.parametrize(
  'families, number',
  [
    ('^command line$', 1),
    ('^rows|^standard', 8),
    ('^training', 4),
    pytest.param('cache$|cache.json|^features|bundle$', 6, marks=LONG),
  ],
)
def test_spoilt_families_end_in_a_sentence_or_with_the_right_rows(
  families, number
):
  """By the driver of all families, which bounds time and memory."""
  count = 20 * number if families == '^training' else 300 * number
  result = subprocess.run(
    [
      *(sys.executable, '-m', 'faults.fuzz'),
      *(f'--count={count}', '--seed=1', f'--only={families}'),
    ],
    cwd=TESTS.parent,
    env=os.environ | {'PYTHONPATH': f'{TESTS.parent}:{TESTS}'},
    capture_output=True,
    text=True,
    errors='replace',
    timeout=300,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  total = f'{count} cases of {number} families, 0 ended badly'
  assert total in result.stdout
  assert "'refused': 0" not in result.stderr


def test_good_files_are_read():
  for name, kind in fuzz_files.kinds().items():
    whole = dataclasses.replace(kind, mutate=lambda content, _: content)
    result = fuzz_files.fuzz(name, whole, seed=0, count=1)
    assert result.num_read == 1, (name, result.tracebacks)


def test_the_fuzzer_sees_a_traceback():
  def read(folder):
    raise KeyError('x')

  kind = fuzz_files.Kind('x.json', b'{}', read)
  result = fuzz_files.fuzz('x', kind, seed=0, count=3)
  assert len(result.tracebacks) == 3 and 'KeyError' in result.tracebacks[0]


def test_faults_are_drawn_from_the_seed_and_change_something():
  content = b'{"a": [1, 2, {"b": "text"}], "c": 0.5}'
  broken = [
    mutate.mutate_json_file(content, random.Random(seed)) for seed in range(200)
  ]
  again = [
    mutate.mutate_json_file(content, random.Random(seed)) for seed in range(200)
  ]
  assert broken == again
  assert len(set(broken)) > 100
