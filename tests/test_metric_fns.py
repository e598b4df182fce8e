# SPDX-License-Identifier: Apache-2.0
"""Corpus metrics: known scores of real systems, and laws checked by hand."""

import gzip
import inspect
import json

import pytest
import sacrebleu

from l2s_jax.metrics import metric_fns

METRICS = [
  metric_fns.bleu,
  metric_fns.chrf,
  metric_fns.rouge,
  metric_fns.exact_match,
  metric_fns.token_f1,
  metric_fns.ter,
]
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
    assert metric_fns.bleu(targets, predictions)['bleu'] == pytest.approx(
      expected['sacrebleu_13a'], abs=0.01
    ), name
    assert metric_fns.chrf(targets, predictions)['chrf'] == pytest.approx(
      expected['chrf'], abs=0.01
    ), name


@pytest.mark.parametrize('metric', METRICS)
def test_perfect_predictions_score_100_or_no_errors(metric):
  scores = metric(TARGETS[:2], TARGETS[:2])
  best = 0 if metric.lower_is_better else 100
  assert list(scores.values()) == pytest.approx([best] * len(scores))


@pytest.mark.parametrize('metric', METRICS)
def test_disjoint_predictions_score_0_or_all_errors(metric):
  score = metric(['aaa bbb ccc ddd eee'], ['vvv www xxx yyy zzz'])
  assert set(score.values()) == {100 if metric.lower_is_better else 0}


@pytest.mark.parametrize('metric', METRICS)
def test_the_order_of_the_pairs_is_irrelevant(metric):
  assert metric(TARGETS[::-1], PREDICTIONS[::-1]) == pytest.approx(
    metric(TARGETS, PREDICTIONS)
  )


@pytest.mark.parametrize('metric', METRICS)
def test_a_list_of_one_reference_is_that_reference(metric):
  assert metric([[target] for target in TARGETS], PREDICTIONS) == metric(
    TARGETS, PREDICTIONS
  )


@pytest.mark.parametrize('metric', METRICS[:-1])  # TER has its own law.
def test_the_best_of_a_varying_number_of_references_counts(metric):
  references = [
    ['xxx', TARGETS[0]],
    TARGETS[1],
    (TARGETS[2], 'yyy', 'zzz'),
    [TARGETS[3]],
  ]
  assert metric(references, PREDICTIONS) == pytest.approx(
    metric(TARGETS, PREDICTIONS)
  )


def test_bleu_is_of_the_corpus_and_by_hand():
  # 1 to 4-grams found: 7 of 8, 5 of 6, 3 of 4, 1 of 2; lengths are equal.
  bleu = metric_fns.bleu(['a b c d', 'e f g h'], ['a b c d', 'e f g x'])['bleu']
  expected = 100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** (1 / 4)
  assert bleu == pytest.approx(expected)


def test_bleu_tells_letter_case_and_exact_match_tells_space():
  target = ['The cat sat on the mat']
  assert metric_fns.bleu(target, ['the cat sat on the mat'])['bleu'] < 100
  assert metric_fns.exact_match(['yes'], ['yes ']) == {'exact_match': 0}


def test_bleu_finds_an_n_gram_in_any_reference():
  # abc and cde of 3 trigrams; none of 2 4-grams, smoothed to 1 / 2 of one.
  references = [['a b c x y', 'z z c d e']]
  bleu = metric_fns.bleu(references, ['a b c d e'])['bleu']
  assert bleu == pytest.approx(100 * (1 * 1 * 2 / 3 * 1 / 4) ** (1 / 4))


def test_rouge_by_hand():
  # Of 6 words 5 are found, in order; of 5 bigrams 3.
  assert metric_fns.rouge(TARGETS[:1], PREDICTIONS[:1]) == {
    'rouge1': pytest.approx(500 / 6),
    'rouge2': pytest.approx(60),
    'rougeLsum': pytest.approx(500 / 6),
  }
  assert metric_fns.rouge(['The dogs ran.'], ['the DOG ran'])['rouge2'] == 100


@pytest.mark.parametrize('end, score', [('\n', 100), (' . ', 100), (', ', 50)])
def test_rouge_lsum_is_blind_to_the_order_of_sentences(end, score):
  scores = metric_fns.rouge([f'a b c{end}d e f'], [f'd e f{end}a b c'])
  assert scores['rougeLsum'] == pytest.approx(score)


def test_each_rouge_takes_its_own_best_reference():
  # All 4 words of the first; 3 of 3 bigrams, of the 4 of the second.
  scores = metric_fns.rouge([['a b c d', 'b a d c x']], ['b a d c'])
  assert scores['rouge1'] == pytest.approx(100)
  assert scores['rouge2'] == pytest.approx(200 * 3 / (3 + 4))


def test_token_f1_by_hand():
  # `red dog` of `big red dog` and of `red dog barks`.
  scores = metric_fns.token_f1(['The big, red dog!'], ['a RED dog barks'])
  assert scores == {'token_f1': pytest.approx(200 * 2 / (3 + 3))}
  # Neither has words: SQuAD 2.0 calls that equal, 1.1 does not.
  assert metric_fns.token_f1(['A.', 'A.'], ['a', 'b']) == {'token_f1': 50}


def test_human_subject_lines_against_three_others(shared_data):
  # Numbers alone are compared: the texts are not to be printed.
  rows = [
    json.loads(line)
    for line in read_lines(shared_data / 'aeslc' / 'dev.jsonl.gz')[:200]
  ]
  predictions = [row['summary'] for row in rows]
  references = [row['annotations'] for row in rows]
  for metric in (metric_fns.rouge, metric_fns.token_f1):
    scores = metric(references, predictions)
    for name, score in scores.items():
      best = [
        max(metric([text], [prediction])[name] for text in texts)
        for texts, prediction in zip(references, predictions, strict=True)
      ]
      assert score == pytest.approx(sum(best) / len(best))
      assert 10 < score < 50
  for by_sacrebleu in (metric_fns.bleu, metric_fns.chrf):
    (score,) = by_sacrebleu(references, predictions).values()
    alone = [
      by_sacrebleu(list(stream), predictions)[by_sacrebleu.name]
      for stream in zip(*references, strict=True)
    ]
    assert len(alone) == 3 and score > max(alone)


def test_ter_by_hand():
  # A shift of a phrase, a substitution and an insertion; case does not count.
  references = ['a b c d', 'e f g h', 'x y']
  answers = ['c d a b', 'E f g x', 'x z y']
  assert metric_fns.ter(references, answers) == {'ter': 100 * 3 / 10}
  assert metric_fns.ter(['x'], ['a b c']) == {'ter': 300}


def test_ter_counts_the_fewest_edits_and_the_mean_length():
  # 1 edit of the first reference, 4 of the second; 2 and 6 words.
  ter = metric_fns.ter([['a b', 'c d e f g h']], ['a x'])['ter']
  assert ter == 100 * 1 / 4


@pytest.mark.parametrize('pair', ['en-ro', 'en-de'])
def test_ter_of_a_translation_system_is_that_of_sacrebleu(pair, shared_data):
  outputs = shared_data / 'mt_system_outputs'
  (*_, path) = sorted(outputs.glob(f'{pair}.flores-dev.*.gz'))
  name = f'flores-dev.{pair[-2:]}.gz'
  references = read_lines(shared_data / 'flores' / name)[:300]
  answers = read_lines(path)[:300]
  expected = sacrebleu.metrics.TER()
  score = expected.corpus_score(answers, [references]).score
  assert 20 < score < 80
  assert metric_fns.ter(references, answers) == {'ter': score}
  assert metric_fns.ter.signature(references) == str(expected.get_signature())
  both = [
    [one, other] for one, other in zip(references, answers[::-1], strict=True)
  ]
  streams = [references, answers[::-1]]
  score = expected.corpus_score(answers, streams).score
  assert metric_fns.ter(both, answers) == {'ter': score}


def test_losses_and_error_rates_are_lower_is_better():
  lower = ('ter', 'newstest/ter', 'loss', 'news/loss')
  assert all(map(metric_fns.lower_is_better, lower))
  higher = ('bleu', 'ter/bleu', 'rougeLsum', 'token_accuracy', 'comet')
  assert not any(map(metric_fns.lower_is_better, higher))


def test_exact_match_of_one_in_four_is_25():
  assert metric_fns.exact_match(TARGETS, PREDICTIONS) == {'exact_match': 25}


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


@pytest.mark.parametrize('metric', METRICS)
def test_an_example_without_references_is_refused(metric):
  with pytest.raises(ValueError, match='example 1 has an empty list'):
    metric(['a', []], ['a', 'b'])


@pytest.mark.parametrize('metric', METRICS)
def test_intervals_leave_the_scores_as_they_are(metric, shared_data):
  name = 'flores-dev.ro.gz'
  targets = read_lines(shared_data / 'flores' / name)[:100]
  outputs = shared_data / 'mt_system_outputs' / 'en-ro.flores-dev.opusmt.ro.gz'
  predictions = read_lines(outputs)[:100]
  # Some have the system's own output as a second reference.
  references = [
    [target, prediction] if index % 3 == 0 else target
    for index, (target, prediction) in enumerate(
      zip(targets, predictions, strict=True)
    )
  ]
  with_intervals = metric_fns.with_intervals(metric, num_samples=100)
  scores = metric(references, predictions)
  found = with_intervals(references, predictions)
  assert found.keys() == {
    f'{name}{end}' for name in scores for end in ('', '_low', '_high')
  }
  for name, score in scores.items():
    assert found[name] == score  # to the last bit
    assert found[f'{name}_low'] < score < found[f'{name}_high']
  assert with_intervals(references, predictions) == found
  other_seed = metric_fns.with_intervals(metric, num_samples=100, seed=1)
  assert other_seed(references, predictions) != found


def test_an_interval_is_that_of_the_binomial_distribution():
  # 500 of 1,000: standard deviation 1.58 points, 1.96 of them either way.
  scores = metric_fns.with_intervals(metric_fns.exact_match)(
    ['x'] * 1000, ['x', 'y'] * 500
  )
  assert scores['exact_match_low'] == pytest.approx(46.9, abs=0.3)
  assert scores['exact_match_high'] == pytest.approx(53.1, abs=0.3)


def test_one_example_leaves_nothing_to_draw():
  scores = metric_fns.with_intervals(metric_fns.bleu)(
    TARGETS[:1], PREDICTIONS[:1]
  )
  assert scores['bleu_low'] == scores['bleu'] == scores['bleu_high'] > 0


def test_seqio_sees_the_arguments_through_the_intervals():
  with_intervals = metric_fns.with_intervals(metric_fns.bleu)
  assert list(inspect.signature(with_intervals).parameters) == [
    'targets',
    'predictions',
  ]


def test_a_metric_of_unknown_make_comes_back_as_it_is():
  def accuracy(targets, predictions):
    return {'accuracy': targets == predictions}

  assert metric_fns.with_intervals(accuracy) is accuracy


def test_signatures_say_what_is_computed():
  assert metric_fns.bleu_signature().startswith(
    'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:'
  )
  assert metric_fns.chrf_signature().startswith(
    'nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:'
  )
  assert metric_fns.ter.signature(['a']).startswith(
    'nrefs:1|case:lc|tok:tercom|norm:no|punct:yes|asian:no|version:'
  )
  assert metric_fns.bleu_signature(3).startswith('nrefs:3|')
  assert metric_fns.chrf_signature(None).startswith('nrefs:var|')
