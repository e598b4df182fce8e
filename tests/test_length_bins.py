# SPDX-License-Identifier: Apache-2.0
"""Laws of scores by length: bins divide the examples, and score as a whole."""

import pytest

from l2s_jax.metrics import length_bins, metric_fns

TARGETS = ['a b', ['a b c', 'd'], 'a', '東京都', 'a b c d e f']
ANSWERS = ['a b', 'd', 'b', '東京', 'a b c d e g']
METRICS = (metric_fns.chrf, metric_fns.exact_match)


def test_each_example_is_in_the_bin_of_its_first_reference():
  found = length_bins.scores(METRICS, TARGETS, ANSWERS, (1, 2, 3))
  assert list(found) == length_bins.names((1, 2, 3))
  assert list(found) == ['0-1', '2-2', '3-3', '4+']
  # Each letter of Chinese is a word.
  assert [scores['num_examples'] for scores in found.values()] == [1, 1, 2, 1]
  assert found['3-3']['exact_match'] == 50.0
  assert found['3-3']['chrf'] == metric_fns.chrf(
    [TARGETS[1], TARGETS[3]], [ANSWERS[1], ANSWERS[3]]
  ).pop('chrf')


def test_a_bin_of_all_has_the_scores_and_intervals_of_all():
  metrics = [metric_fns.with_intervals(m, num_samples=20) for m in METRICS]
  found = length_bins.scores(metrics, TARGETS, ANSWERS, (9,), num_samples=20)
  expected: dict[str, float] = {'num_examples': len(TARGETS)}
  for metric in metrics:
    expected |= metric(TARGETS, ANSWERS)
  assert found == {'0-9': expected, '10+': {'num_examples': 0}}


def test_without_a_score_of_ours_there_are_no_bins():
  assert length_bins.scores([lambda t, p: {'x': 1}], [{}], [''], (9,)) == {}


@pytest.mark.parametrize('bins', [(0, 2), (2, 2), (3, 1), 10, (True,), 'ab'])
def test_what_names_no_bins_is_refused(bins):
  with pytest.raises(ValueError, match='EVAL_LENGTH_BINS=.*expected a tuple'):
    length_bins.check(bins)
