# SPDX-License-Identifier: Apache-2.0
"""Scores by the length of the reference: where a system loses, it shows.

Lengths are words of any script (`metrics/words.py`), of the first reference of
an example, so that the bins are the same for systems of all vocabularies.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from l2s_jax.metrics import corpus, metric_fns, words

ScoresByBin = dict[str, dict[str, float | int]]


def check(bins: Any) -> None:
  """Refuses what names no bins.

  Raises:
    ValueError: if it is no tuple of positive whole numbers that rise.
  """
  if (
    not isinstance(bins, tuple | list)
    or not all(type(size) is int and size > 0 for size in bins)
    or list(bins) != sorted(set(bins))
  ):
    raise ValueError(
      f'EVAL_LENGTH_BINS={bins!r}: expected a tuple of rising numbers of '
      'words, such as (10, 20, 40), or () for no scores by length.'
    )


def scores(
  metrics: Sequence[Callable[..., Any]],
  targets: Sequence[Any],
  predictions: Sequence[str],
  bins: Sequence[int],
  *,
  num_samples: int = 0,
) -> ScoresByBin:
  """Returns `num_examples` and scores by the name of the bin, in order.

  A bin without examples has its number alone. Metrics that do not add up over
  examples, such as users' own, are left out; without any other, there are no
  bins.

  Args:
    metrics: of a task.
    targets: a reference, or a list of them, for each example.
    predictions: for each example.
    bins: words of the longest reference in each bin but the last.
    num_samples: for confidence intervals; 0 for none.
  """
  added = [
    metric
    for metric in map(inspect.unwrap, metrics)
    if isinstance(metric, metric_fns.Metric) and metric.adds_up
  ]
  if not added:
    return {}
  lengths = [len(words.words(corpus.texts_of(own)[0])) for own in targets]
  bin_ids = np.searchsorted(bins, lengths)
  found: ScoresByBin = {}
  for index, name in enumerate(names(bins)):
    members = np.flatnonzero(bin_ids == index).tolist()
    found[name] = {'num_examples': len(members)}
    if not members:
      continue
    for metric in added:
      sums = metric.sums(
        [targets[i] for i in members], [predictions[i] for i in members]
      )
      found[name] |= (
        corpus.scores_with_intervals(sums, num_samples)
        if num_samples
        else sums.of_corpus()
      )
  return found


def names(bins: Sequence[int]) -> list[str]:
  """Returns the names of bins: '0-10', '11-20', '21+' for (10, 20)."""
  starts = [0, *(size + 1 for size in bins)]
  return [
    *(f'{start}-{end}' for start, end in zip(starts, bins, strict=False)),
    f'{starts[-1]}+',
  ]
