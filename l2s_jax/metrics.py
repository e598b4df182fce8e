# SPDX-License-Identifier: Apache-2.0
"""Corpus metrics of written answers, in the form of a SeqIO `metric_fn`.

Each takes `(targets, predictions)`, one prediction per example and as target
one reference or a list of several, and returns `{name: score}` on a scale of 0
to 100. Of several references the best counts, as each metric defines it.
`with_intervals` adds confidence intervals. BLEU and chrF are sacreBLEU's and
ROUGE is `rouge_score`'s, so that figures compare with published ones. Losses
and accuracies of tokens are in `losses.py`, not here.
"""

import collections
import dataclasses
import functools
import itertools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sacrebleu.metrics
from jaxtyping import Float

Targets = Sequence[str | Sequence[str]]
MetricFn = Callable[[Targets, Sequence[str]], dict[str, float]]

_ROUGE_TYPES = ('rouge1', 'rouge2', 'rougeLsum')
_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def bleu(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
  """Returns corpus BLEU: 13a tokens, mixed case, exponential smoothing.

  An n-gram is found if any reference has it; the brevity penalty takes the
  reference closest in length.

  Raises:
    ValueError: if there are no pairs, the sizes differ, or an example has no
      reference.
  """
  _check_pairs(targets, predictions)
  return {'bleu': _bleu().corpus_score(predictions, _streams(targets)).score}


def chrf(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
  """Returns corpus chrF2: character 6-grams, no word n-grams, beta 2.

  Each example counts against the reference that scores best.

  Raises:
    ValueError: as `bleu`.
  """
  _check_pairs(targets, predictions)
  return {'chrf': _chrf().corpus_score(predictions, _streams(targets)).score}


def rouge(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
  """Returns ROUGE-1, ROUGE-2 and summary-level ROUGE-L, the mean F-measures.

  Of several references each score takes its best, example by example. Words
  are lower-cased runs of a-z and 0-9, stemmed (Porter): it is made for English.
  For `rougeLsum` a sentence ends at a newline and, since T5's tokenizer loses
  newlines, at ' . ', as in T5's own metric.

  Compares with figures of `rouge_score` with stemming, such as those of Hugging
  Face's summarization examples, which have NLTK end sentences for `rougeLsum`.
  T5's tasks do not stem: theirs are half a point to one and a half lower on
  CNN/DailyMail, and are the median of random resamples, not the mean.

  Raises:
    ValueError: as `bleu`.
  """
  return _rouge_sums(targets, predictions).of_corpus()


def exact_match(
  targets: Targets, predictions: Sequence[str]
) -> dict[str, float]:
  """Returns the percentage of predictions equal to one of their references.

  Raises:
    ValueError: as `bleu`.
  """
  return _exact_match_sums(targets, predictions).of_corpus()


def token_f1(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
  """Returns SQuAD's F1 of words: the mean over examples of the best reference.

  Words are what white space separates once letters are lower-cased and ASCII
  punctuation and the articles a, an, the are gone. As in SQuAD 2.0, two texts
  without words agree.

  Raises:
    ValueError: as `bleu`.
  """
  return _token_f1_sums(targets, predictions).of_corpus()


def with_intervals(
  metric_fn: MetricFn, *, num_samples: int = 1000, seed: int = 0
) -> MetricFn:
  """Returns the metric with a 95 % confidence interval beside each score.

  `bleu` comes with `bleu_low` and `bleu_high`, the 2.5th and 97.5th
  percentiles of BLEU over corpora of as many examples, drawn with replacement
  (Koehn 2004, the bootstrap). The same seed and number of examples give the
  same draws.

  Args:
    metric_fn: one of this module; another comes back as it is, since how its
      score depends on single examples is not known.
    num_samples: corpora to draw.
    seed: of the draws.
  """
  make_sums = _SUMS.get(metric_fn)
  if make_sums is None:
    return metric_fn

  @functools.wraps(metric_fn)
  def metric_with_intervals(
    targets: Targets, predictions: Sequence[str]
  ) -> dict[str, float]:
    sums = make_sums(targets, predictions)
    rng = np.random.default_rng(seed)
    num_examples = len(sums.rows)
    samples = [
      sums.score(sums.rows[rng.integers(num_examples, size=num_examples)])
      for _ in range(num_samples)
    ]
    scores = sums.of_corpus()
    for name in list(scores):
      low, high = np.percentile([s[name] for s in samples], [2.5, 97.5])
      scores |= {f'{name}_low': float(low), f'{name}_high': float(high)}
    return scores

  return metric_with_intervals


def bleu_signature(num_references: int | None = 1) -> str:
  """Returns sacreBLEU's description of what `bleu` computes.

  Args:
    num_references: of each example; None: it varies.
  """
  return _signature(_bleu(), num_references)


def chrf_signature(num_references: int | None = 1) -> str:
  """Returns sacreBLEU's description of what `chrf` computes.

  Args:
    num_references: of each example; None: it varies.
  """
  return _signature(_chrf(), num_references)


@dataclasses.dataclass(frozen=True)
class _Sums:
  """A corpus score taken apart into statistics that add up over examples.

  Attributes:
    rows: a row of statistics for each example.
    score_of_sum: from the sum of as many rows to scores by name.
  """

  rows: Float[np.ndarray, 'example statistic']
  score_of_sum: Callable[[Float[np.ndarray, ' statistic']], dict[str, float]]

  def score(self, rows: Float[np.ndarray, 'example statistic']) -> dict:
    return self.score_of_sum(rows.sum(axis=0))

  def of_corpus(self) -> dict[str, float]:
    return self.score(self.rows)


def _bleu_sums(targets: Targets, predictions: Sequence[str]) -> _Sums:
  return _sacrebleu_sums('bleu', _bleu(), targets, predictions)


def _chrf_sums(targets: Targets, predictions: Sequence[str]) -> _Sums:
  return _sacrebleu_sums('chrf', _chrf(), targets, predictions)


def _sacrebleu_sums(
  name: str,
  metric: sacrebleu.metrics.BLEU | sacrebleu.metrics.CHRF,
  targets: Targets,
  predictions: Sequence[str],
) -> _Sums:
  _check_pairs(targets, predictions)
  # sacreBLEU's interface between its metrics and its significance tests. Its
  # public bootstrap gives half a width only, and builds [sample, example,
  # statistic] in memory; chrF's statistics are not public at all. A test holds
  # that these give the scores of the public functions to the last bit.
  rows = metric._extract_corpus_statistics(predictions, _streams(targets))
  return _Sums(
    np.array(rows, np.float64),
    lambda sums: {name: metric._compute_score_from_stats(sums.tolist()).score},
  )


def _rouge_sums(targets: Targets, predictions: Sequence[str]) -> _Sums:
  # Imported here: it takes half a second, and only ROUGE needs it.
  from rouge_score import rouge_scorer

  _check_pairs(targets, predictions)
  scorer = rouge_scorer.RougeScorer(_ROUGE_TYPES, use_stemmer=True)

  def sentences(text: str) -> str:
    return text.replace(' . ', ' .\n')

  scores = [
    scorer.score_multi(
      [sentences(reference) for reference in _references(target)],
      sentences(prediction),
    )
    for target, prediction in zip(targets, predictions, strict=True)
  ]
  return _mean_sums(
    {name: [score[name].fmeasure for score in scores] for name in _ROUGE_TYPES}
  )


def _exact_match_sums(targets: Targets, predictions: Sequence[str]) -> _Sums:
  _check_pairs(targets, predictions)
  return _mean_sums(
    {
      'exact_match': [
        float(prediction in _references(target))
        for target, prediction in zip(targets, predictions, strict=True)
      ]
    }
  )


def _token_f1_sums(targets: Targets, predictions: Sequence[str]) -> _Sums:
  _check_pairs(targets, predictions)
  return _mean_sums(
    {
      'token_f1': [
        max(
          _f1(_words(reference), _words(prediction))
          for reference in _references(target)
        )
        for target, prediction in zip(targets, predictions, strict=True)
      ]
    }
  )


def _mean_sums(scores: Mapping[str, Sequence[float]]) -> _Sums:
  """Takes means apart, of scores between 0 and 1 for each example."""
  rows = np.array(list(scores.values()), np.float64).T

  def percentages(sums: Float[np.ndarray, ' statistic']) -> dict[str, float]:
    return dict(zip(scores, (100 * sums / len(rows)).tolist(), strict=True))

  return _Sums(rows, percentages)


_SUMS: Mapping[MetricFn, Callable[[Targets, Sequence[str]], _Sums]] = {
  bleu: _bleu_sums,
  chrf: _chrf_sums,
  rouge: _rouge_sums,
  exact_match: _exact_match_sums,
  token_f1: _token_f1_sums,
}

# By the names that configs use.
METRICS: Mapping[str, MetricFn] = {fn.__name__: fn for fn in _SUMS}


def _words(text: str) -> list[str]:
  text = text.lower().translate(_NO_PUNCTUATION)
  return _ARTICLES.sub(' ', text).split()


def _f1(reference: Sequence[str], prediction: Sequence[str]) -> float:
  if not reference or not prediction:
    return float(reference == prediction)
  common = collections.Counter(reference) & collections.Counter(prediction)
  return 2 * common.total() / (len(reference) + len(prediction))


def _references(target: str | Sequence[str]) -> Sequence[str]:
  return [target] if isinstance(target, str) else target


def _streams(targets: Targets) -> list[list[Any]]:
  """Returns sacreBLEU's form: the first of each example, the second, ...

  Where an example has no such reference stands None.
  """
  references = [_references(target) for target in targets]
  return [list(stream) for stream in itertools.zip_longest(*references)]


def _bleu() -> sacrebleu.metrics.BLEU:
  return sacrebleu.metrics.BLEU(
    tokenize='13a', lowercase=False, smooth_method='exp'
  )


def _chrf() -> sacrebleu.metrics.CHRF:
  return sacrebleu.metrics.CHRF(char_order=6, word_order=0, beta=2)


def _signature(
  metric: sacrebleu.metrics.BLEU | sacrebleu.metrics.CHRF,
  num_references: int | None,
) -> str:
  # A metric learns its number of references from its first score.
  sizes = (1, 2) if num_references is None else (num_references,)
  targets = [[''] * size for size in sizes]
  metric.corpus_score([''] * len(targets), _streams(targets))
  return str(metric.get_signature())


def _check_pairs(targets: Targets, predictions: Sequence[str]) -> None:
  if not len(targets) == len(predictions) > 0:
    raise ValueError(
      f'{len(targets)} targets and {len(predictions)} predictions: expected '
      'as many of one as of the other, and at least one.'
    )
  for index, target in enumerate(targets):
    if not len(_references(target)):
      raise ValueError(
        f'example {index} has an empty list of references; expected a text, '
        'or a list of at least one.'
      )
