# SPDX-License-Identifier: Apache-2.0
"""Corpus metrics: known scores of real systems, and laws checked by hand."""

import gzip
import json

import pytest

from l2s_jax import metrics

METRICS = [metrics.bleu, metrics.chrf, metrics.exact_match]
TARGETS = ['the cat sat on the mat', 'a dog ran in the big park', 'yes', 'no']
PREDICTIONS = ['the cat sat on a mat', 'a dog ran in the park', 'yes', 'yes']


def read_lines(path):
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    return file.read().splitlines()


def test_scores_of_translation_systems_are_those_of_sacrebleu(shared_data):
  outputs = shared_data / 'mt_system_outputs'
  published = json.loads((outputs / 'published_bleu.json').read_text())
  assert len(published['scores']) == 9
  for name, expected in published['scores'].items():
    pair, file = name.split('/')
    language = pair.split('-')[1]
    targets = read_lines(shared_data / 'flores' / f'flores-dev.{language}.gz')
    predictions = read_lines(outputs / f'{pair}.{file}.gz')
    assert len(predictions) == expected['lines']
    assert metrics.bleu(targets, predictions)['bleu'] == pytest.approx(
      expected['sacrebleu_13a'], abs=0.01
    ), name
    assert metrics.chrf(targets, predictions)['chrf'] == pytest.approx(
      expected['chrf'], abs=0.01
    ), name


@pytest.mark.parametrize('metric', METRICS)
def test_perfect_predictions_score_100(metric):
  assert metric(TARGETS, TARGETS) == {metric.__name__: pytest.approx(100)}


@pytest.mark.parametrize('metric', METRICS)
def test_disjoint_predictions_score_0(metric):
  score = metric(['aaa bbb ccc ddd eee'], ['vvv www xxx yyy zzz'])
  assert score == {metric.__name__: 0}


@pytest.mark.parametrize('metric', METRICS)
def test_the_order_of_the_pairs_is_irrelevant(metric):
  assert metric(TARGETS[::-1], PREDICTIONS[::-1]) == metric(
    TARGETS, PREDICTIONS
  )


def test_bleu_is_of_the_corpus_and_by_hand():
  # 1 to 4-grams found: 7 of 8, 5 of 6, 3 of 4, 1 of 2; lengths are equal.
  bleu = metrics.bleu(['a b c d', 'e f g h'], ['a b c d', 'e f g x'])['bleu']
  expected = 100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** (1 / 4)
  assert bleu == pytest.approx(expected)


def test_bleu_tells_letter_case_and_exact_match_tells_space():
  target = ['The cat sat on the mat']
  assert metrics.bleu(target, ['the cat sat on the mat'])['bleu'] < 100
  assert metrics.exact_match(['yes'], ['yes ']) == {'exact_match': 0}


def test_exact_match_of_one_in_four_is_25():
  assert metrics.exact_match(TARGETS, PREDICTIONS) == {'exact_match': 25}


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize(
  'targets, predictions', [(['a', 'b'], ['a']), ([], ['a']), ([], [])]
)
def test_pairs_that_do_not_match_are_refused(metric, targets, predictions):
  with pytest.raises(
    ValueError,
    match=(f'{len(targets)} targets and {len(predictions)} predictions'),
  ):
    metric(targets, predictions)


def test_signatures_say_what_is_computed():
  assert metrics.bleu_signature().startswith(
    'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:'
  )
  assert metrics.chrf_signature().startswith(
    'nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:'
  )
