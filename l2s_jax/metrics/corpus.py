# SPDX-License-Identifier: Apache-2.0
"""What all metrics of a corpus have in common: `metric_fns.py` has the metrics.

A metric is called with `(targets, predictions)`, by whose names SeqIO knows a
`metric_fn`; in here the targets are references, of each example one text or a
list. It has its settings in its attributes. Its score is taken apart into sums
over examples, of which `with_intervals` draws samples.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from l2s_jax.metrics import words
from l2s_jax.runtime import distributed

References = Sequence[str | Sequence[str]]
MetricFn = Callable[[References, Sequence[str]], dict[str, float]]

# Of text without spaces, tokens of more letters than this are no words.
_LONGEST_MEAN_WORD = 6


@dataclasses.dataclass(frozen=True)
class Metric:
  """A score of a corpus, with its settings; called as SeqIO calls a metric.

  Attributes:
    name: that configs use and, but for ROUGE's, that of the score.
  """

  name: str
  # Whether it is made of sums over examples.
  adds_up: ClassVar[bool] = True

  @property
  def score_names(self) -> tuple[str, ...]:
    """Of the scores that it returns; the last stands for all of them."""
    return (self.name,)

  @property
  def __name__(self) -> str:
    return self.name

  def __call__(
    self, targets: References, predictions: Sequence[str]
  ) -> dict[str, float]:
    """Returns scores by name, and warns of settings that do not fit.

    Raises:
      ValueError: if there are no pairs, the sizes differ, or an example has no
        reference.
    """
    return self.checked_sums(targets, predictions).of_corpus()

  def signature(self, references: References) -> str | None:
    """Returns what others need to repeat the score; None: its name says all.

    Args:
      references: that are scored; of predictions it is independent.
    """
    return None

  def check(self) -> None:
    """Refuses settings that cannot be computed here.

    Raises:
      ValueError: with what is wrong, or what is to be installed.
    """

  def sums(self, references: References, predictions: Sequence[str]) -> 'Sums':
    raise NotImplementedError

  def warnings(self, references: References) -> Iterator[str]:
    yield from ()

  def checked_sums(
    self, references: References, predictions: Sequence[str]
  ) -> 'Sums':
    check_pairs(references, predictions)
    for warning in self.warnings(references):
      distributed.say(f'{self.name}: {warning}')
    return self.sums(references, predictions)


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
  if not isinstance(metric_fn, Metric) or not metric_fn.adds_up:
    return metric_fn

  @functools.wraps(metric_fn)
  def metric_with_intervals(
    targets: References, predictions: Sequence[str]
  ) -> dict[str, float]:
    sums = metric_fn.checked_sums(targets, predictions)
    return scores_with_intervals(sums, num_samples, seed)

  return metric_with_intervals


def scores_with_intervals(
  sums: 'Sums', num_samples: int, seed: int = 0
) -> dict[str, float]:
  """Returns scores, and the ends of their intervals; see `with_intervals`."""
  samples = [
    sums.score(sums.rows[drawn])
    for drawn in _draws(len(sums.rows), num_samples, seed)
  ]
  scores = sums.of_corpus()
  for name in list(scores):
    low, high = np.percentile([s[name] for s in samples], [2.5, 97.5])
    scores |= {f'{name}_low': float(low), f'{name}_high': float(high)}
  return scores


def paired_difference(
  one: 'Sums', other: 'Sums', name: str, num_samples: int, seed: int = 0
) -> tuple[float, float, float]:
  """Returns how much more one system scores than another, and the interval.

  The paired bootstrap: both are scored on the same drawn corpora (Koehn 2004),
  and the ends are the 2.5th and 97.5th percentiles of the difference.

  Args:
    one: of the answers of one system.
    other: of those of the other to the same examples, in the same order.
    name: of the score.
    num_samples: corpora to draw.
    seed: of the draws.
  """
  differences = [
    one.score(one.rows[drawn])[name] - other.score(other.rows[drawn])[name]
    for drawn in _draws(len(one.rows), num_samples, seed)
  ]
  low, high = np.percentile(differences, [2.5, 97.5])
  difference = one.of_corpus()[name] - other.of_corpus()[name]
  return difference, float(low), float(high)


def _draws(
  num_examples: int, num_samples: int, seed: int
) -> Iterator[Int[np.ndarray, ' example']]:
  rng = np.random.default_rng(seed)
  for _ in range(num_samples):
    yield rng.integers(num_examples, size=num_examples)


def signatures(
  metric_fns: Sequence[MetricFn], references: References
) -> dict[str, str]:
  """Returns the signatures of those of our metrics that have one.

  Args:
    metric_fns: any functions, such as those of `with_intervals`.
    references: that they score.

  Returns:
    By the name of each metric's last score.
  """
  found = [inspect.unwrap(metric_fn) for metric_fn in metric_fns]
  signed = {
    metric.score_names[-1]: metric.signature(references)
    for metric in found
    if isinstance(metric, Metric)
  }
  return {name: text for name, text in signed.items() if text is not None}


@dataclasses.dataclass(frozen=True)
class Sums:
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


def mean_sums(scores: Mapping[str, Sequence[float]]) -> Sums:
  """Takes means apart, of scores between 0 and 1 for each example."""
  rows = np.array(list(scores.values()), np.float64).T

  def percentages(sums: Float[np.ndarray, ' statistic']) -> dict[str, float]:
    return dict(zip(scores, (100 * sums / len(rows)).tolist(), strict=True))

  return Sums(rows, percentages)


def finds_no_words(texts: Sequence[str], num_tokens: int) -> bool:
  """Returns whether texts are of an unspaced script, and tokens too long."""
  num_letters = words.num_letters(texts)
  return (
    num_letters > _LONGEST_MEAN_WORD * num_tokens
    and words.unspaced_share(texts) > 0.5
  )


def texts_of(reference: str | Sequence[str]) -> Sequence[str]:
  """Returns the references of one example, of which there may be several."""
  return [reference] if isinstance(reference, str) else reference


def all_texts(references: References) -> list[str]:
  return [text for own in references for text in texts_of(own)]


def check_pairs(references: References, predictions: Sequence[str]) -> None:
  if not len(references) == len(predictions) > 0:
    raise ValueError(
      f'{len(references)} targets and {len(predictions)} predictions: expected '
      'as many of one as of the other, and at least one.'
    )
  for index, own in enumerate(references):
    if not len(texts_of(own)):
      raise ValueError(
        f'example {index} has an empty list of references; expected a text, '
        'or a list of at least one.'
      )
