# SPDX-License-Identifier: Apache-2.0
"""Headers of weights that are spoilt at random end in a sentence of ours.

A short form of `faults/fuzz_weights.py`.
"""

import signal

import pytest
from faults import fuzz_weights


@pytest.fixture(autouse=True)
def alarm():
  before = signal.getsignal(signal.SIGALRM)
  yield
  signal.signal(signal.SIGALRM, before)


def test_no_spoilt_header_ends_in_a_traceback():
  said: list[str] = []
  counts = fuzz_weights.fuzz(seed=0, count=40, say=said.append)
  assert not said, '\n'.join(said)
  assert len(counts) >= 6
  for family, counter in counts.items():
    assert counter.total() == 40
    assert counter[fuzz_weights.REFUSED] > 0, family
