# SPDX-License-Identifier: Apache-2.0
"""A short series of kills in a bucket; `faults/bucket_kills.py` has more."""

import pathlib
import re

import pytest
from faults import bucket_kills

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'buckets.md'


@pytest.mark.parametrize(
  ('store', 'verbs', 'count'),
  [
    ('gs', ['export'], 1),
    pytest.param('gs', ['train', 'infer', 'cache'], 3, marks=pytest.mark.long),
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


@pytest.mark.parametrize('store', bucket_kills.STORES)
def test_the_table_of_the_page_is_the_drivers_and_has_no_bad_outcome(store):
  begin, end = (
    f'<!-- kills in {store}:// -->',
    f'<!-- end of kills in {store}:// -->',
  )
  rows = PAGE.read_text().split(begin)[1].split(end)[0].strip().splitlines()
  assert rows[:2] == bucket_kills.table({}).splitlines()[:2]
  cells = [re.split(r' *\| *', row)[1:-1] for row in rows[2:]]
  verbs = [v for v in bucket_kills.VERBS if store == 'gs' or v != 'train']
  assert [row[0] for row in cells] == [*verbs, 'all']
  numbers = [list(map(int, row[1:])) for row in cells]
  assert numbers[-1] == [
    sum(column) for column in zip(*numbers[:-1], strict=True)
  ]
  for kills, num_jobs, num_equal, *bad in numbers:
    assert kills > 0 and num_equal == num_jobs > 0 and not any(bad)
