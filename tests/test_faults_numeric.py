# SPDX-License-Identifier: Apache-2.0
"""Faults of the numeric core can be put in; what sees them is a longer run."""

import ast
import pathlib

import pytest
from faults import numeric, numeric_faults

TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize('fault', numeric.FAULTS, ids=lambda x: x.name)
def test_a_fault_changes_one_place_of_the_package(fault):
  path = numeric.find(fault, numeric.ROOT)
  source = path.read_text(encoding='utf-8')
  changed = source.replace(fault.snippet, fault.replacement)
  assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
  assert all((TESTS / name).is_file() for name in fault.tests)


def test_faults_have_names_of_their_own():
  names = [fault.name for fault in numeric.FAULTS]
  assert len(set(names)) == len(names) >= 60


def test_a_snippet_that_is_gone_is_named():
  gone = numeric_faults.Fault('gone', 'no such code', '', ())
  with pytest.raises(ValueError, match='fault gone: .* found none'):
    numeric.find(gone, numeric.ROOT)
