# SPDX-License-Identifier: Apache-2.0
"""What is damaged is found; the long form is `faults/damage.py`."""

import pytest
from faults import damage


@pytest.mark.parametrize('reader', damage.READERS)
def test_no_damaged_file_is_read_as_if_it_were_good(reader):
  # Inference compiles for each trial; the others take a third of a second.
  every = 1 if reader.startswith('infer') and 'again' in reader else 4
  counts, bad = damage.run(1, seed=1, readers=(reader,), every=every)
  assert not bad
  assert counts[reader].total() >= 12
  assert counts[reader]['refused'] + counts[reader]['older'] > 0
