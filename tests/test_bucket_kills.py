# SPDX-License-Identifier: Apache-2.0
"""A short series of kills in a bucket; `faults/bucket_kills.py` has more."""

import pytest
from faults import bucket_kills


@pytest.mark.parametrize(
  ('store', 'verbs', 'count'),
  [
    ('gs', ['infer', 'cache', 'export'], 3),
    pytest.param('gs', ['train'], 2, marks=pytest.mark.long),
    pytest.param('s3', ['infer', 'cache', 'export'], 6, marks=pytest.mark.long),
  ],
)
def test_killed_at_random_requests_a_job_ends_as_a_local_one(
  store, verbs, count
):
  counts, problems = bucket_kills.run(store, count, 1, verbs)
  assert not problems
  assert sum(found['equal'] for found in counts.values()) == count
  assert all(found['kills'] for found in counts.values())
