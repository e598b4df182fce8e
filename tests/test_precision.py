# SPDX-License-Identifier: Apache-2.0
"""bfloat16 is hardly worse than float32; see `faults/precision.py`."""

import math
import pathlib

from faults import precision

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'reliability.md'
SCORES = {'bleu': 99.0, 'exact_match': 98.0, 'loss': 0.02}


def test_scores_that_are_worse_by_more_than_their_band_are_told():
  for name, band in precision.BAND.items():
    worse = band if name == 'loss' else -band
    for value, within in (
      (SCORES[name], True),
      (SCORES[name] - 3 * worse, True),
      (SCORES[name] + 0.9 * worse, True),
      (SCORES[name] + 1.1 * worse, False),
      (math.nan, False),
    ):
      other = {'LLM': SCORES | {name: value}}
      found = precision.table({'float32': {'LLM': SCORES}, 'bfloat16': other})
      assert found.count('| yes |') == len(precision.BAND) - (not within)
      assert found.count('| no |') == (not within)


def test_the_table_of_the_page_is_within_the_band():
  page = PAGE.read_text()
  content = page.split('<!-- precision -->')[1].split('<!-- end of')[0]
  assert '| no |' not in content
