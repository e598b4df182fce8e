# SPDX-License-Identifier: Apache-2.0
"""Base class, bootstrap and helpers of corpus metrics.

A metric is called as SeqIO calls a `metric_fn`, with `(targets, predictions)`.
In this module targets are called references: one text, or a list of texts, per
example. The attributes of a metric are its settings. Its score is a function of
sums of statistics over examples, so that bootstrap samples are cheap. The
metrics are in `metric_fns.py`.
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

# A longer mean token length, in letters, means that an unspaced script was not
# segmented.
_LONGEST_MEAN_WORD = 6


@dataclasses.dataclass(frozen=True)
class Metric:
  """A corpus metric with its settings, callable as a SeqIO `metric_fn`.

  Attributes:
    name: name in configs and, except for ROUGE, of its score.
  """

  name: str
  # Whether the score is a function of sums over examples.
  adds_up: ClassVar[bool] = True
  # Whether a lower score is the better one.
  lower_is_better: ClassVar[bool] = False

  @property
  def score_names(self) -> tuple[str, ...]:
    """Names of the returned scores; the last one represents the metric."""
    return (self.name,)

  @property
  def __name__(self) -> str:
    return self.name

  def __call__(
    self, targets: References, predictions: Sequence[str]
  ) -> dict[str, float]:
    """Returns scores by name, and warns of unsuitable settings.

    Args:
      targets: references of each example.
      predictions: one answer per example.

    Raises:
      ValueError: if there are no examples, the numbers of targets and
        predictions differ, or an example has no reference.
    """
    return self.checked_sums(targets, predictions).of_corpus()

  def signature(self, references: References) -> str | None:
    """Returns the settings that reproduce a score; None if the name suffices.

    Args:
      references: references of each example; a signature may depend on them,
        but not on predictions.
    """
    return None

  def check(self) -> None:
    """Validates that the metric can be computed here.

    Raises:
      ValueError: names the invalid setting or the package to install.
    """

  def sums(self, references: References, predictions: Sequence[str]) -> 'Sums':
    """Returns the statistics of each example."""
    raise NotImplementedError

  def warnings(self, references: References) -> Iterator[str]:
    """Yields warnings about settings unsuitable for the references."""
    yield from ()

  def checked_sums(
    self, references: References, predictions: Sequence[str]
  ) -> 'Sums':
    """Validates the examples, prints warnings, and returns `sums`."""
    check_pairs(references, predictions)
    for warning in self.warnings(references):
      distributed.say(f'{self.name}: {warning}')
    return self.sums(references, predictions)


def with_intervals(
  metric_fn: MetricFn, *, num_samples: int = 1000, seed: int = 0
) -> MetricFn:
  """Wraps a metric to return a 95 % confidence interval for each score.

  `bleu` is accompanied by `bleu_low` and `bleu_high`: the 2.5th and 97.5th
  percentiles of BLEU over bootstrap samples of the examples (Koehn 2004).
  Samples depend on the seed and the number of examples only.

  Args:
    metric_fn: a `Metric`. Other functions are returned unchanged, since their
      dependence on single examples is unknown.
    num_samples: number of bootstrap samples.
    seed: seed of the samples.
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
  """Returns scores with the ends of their intervals; see `with_intervals`."""
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
  """Returns the score difference of two systems and its 95 % interval.

  The paired bootstrap (Koehn 2004): both systems are scored on the same
  bootstrap samples, and the interval ends are the 2.5th and 97.5th percentiles
  of the difference.

  Args:
    one: statistics of the first system.
    other: statistics of the second system on the same examples, in the same
      order.
    name: name of the score.
    num_samples: number of bootstrap samples.
    seed: seed of the samples.

  Returns:
    (difference, low, high), positive if the first system scores higher.
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
  """Returns the signatures of metrics that have one.

  Args:
    metric_fns: any functions, including those of `with_intervals`.
    references: references of each example.

  Returns:
    Signatures by the name of each metric's last score.
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
  """Additive statistics of a corpus score.

  Attributes:
    rows: a row of statistics for each example.
    score_of_sum: function from the sum of rows, as many as `rows` has, to
      scores by name.
  """

  rows: Float[np.ndarray, 'example statistic']
  score_of_sum: Callable[[Float[np.ndarray, ' statistic']], dict[str, float]]

  def score(self, rows: Float[np.ndarray, 'example statistic']) -> dict:
    """Returns the scores of a sample of rows, by name."""
    return self.score_of_sum(rows.sum(axis=0))

  def of_corpus(self) -> dict[str, float]:
    """Returns the scores of the whole corpus, by name."""
    return self.score(self.rows)


def mean_sums(scores: Mapping[str, Sequence[float]]) -> Sums:
  """Returns the statistics of scores that are means over examples.

  Args:
    scores: values in [0, 1] for each example, by name of the score.

  Returns:
    Statistics whose scores are percentages.
  """
  rows = np.array(list(scores.values()), np.float64).T

  def percentages(sums: Float[np.ndarray, ' statistic']) -> dict[str, float]:
    return dict(zip(scores, (100 * sums / len(rows)).tolist(), strict=True))

  return Sums(rows, percentages)


def finds_no_words(texts: Sequence[str], num_tokens: int) -> bool:
  """Returns whether a tokenizer failed to segment an unspaced script.

  Args:
    texts: the texts.
    num_tokens: number of tokens found in them.
  """
  num_letters = words.num_letters(texts)
  return (
    num_letters > _LONGEST_MEAN_WORD * num_tokens
    and words.unspaced_share(texts) > 0.5
  )


def texts_of(reference: str | Sequence[str]) -> Sequence[str]:
  """Returns the references of one example as a list."""
  return [reference] if isinstance(reference, str) else reference


def all_texts(references: References) -> list[str]:
  """Returns the references of all examples in one list."""
  return [text for own in references for text in texts_of(own)]


def check_pairs(references: References, predictions: Sequence[str]) -> None:
  """Validates the number of targets, predictions and references.

  Raises:
    ValueError: if the numbers differ or are 0, or an example has no reference.
  """
  if not len(references) == len(predictions) > 0:
    raise ValueError(
      f'{len(references)} targets and {len(predictions)} predictions: expected '
      'equal numbers, and at least one of each.'
    )
  for index, own in enumerate(references):
    if not len(texts_of(own)):
      raise ValueError(
        f'example {index} has an empty list of references; expected a text, '
        'or a list of at least one text.'
      )
