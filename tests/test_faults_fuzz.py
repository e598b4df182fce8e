# SPDX-License-Identifier: Apache-2.0
"""Broken files and settings end in one sentence: a short form of the fuzzer."""

import pathlib
import random
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / 'faults'))

import fuzz_files
import mutate

COUNT = 60


@pytest.fixture(scope='module')
def kinds():
  return fuzz_files.kinds()


@pytest.mark.parametrize(
  'name', ['best', 'log', 'scores', 'settings', 'answers']
)
def test_broken_files_end_in_one_sentence_or_read_well(name, kinds):
  result = fuzz_files.fuzz(name, kinds[name], seed=1, count=COUNT)
  assert not result.tracebacks, '\n'.join(result.tracebacks)
  assert result.num_read + result.num_refused == COUNT
  assert result.num_read


def test_broken_settings_end_in_one_sentence_or_read_well():
  result = fuzz_files.fuzz_gin(seed=1, count=COUNT)
  assert not result.tracebacks, '\n'.join(result.tracebacks)
  assert result.num_refused > COUNT / 4


def test_good_files_are_read(kinds):
  for name, kind in kinds.items():
    whole = fuzz_files.dataclasses.replace(
      kind, mutate=lambda content, _: content
    )
    result = fuzz_files.fuzz(name, whole, seed=0, count=1)
    assert result.num_read == 1, name


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
