# SPDX-License-Identifier: Apache-2.0
"""Metrics by reference length, which show where a system fails.

Length is counted in words of any script (`metrics/words.py`) of an example's
first reference, so that bins are the same for all vocabularies.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from l2s_jax.metrics import corpus, metric_fns, words

ScoresByBin = dict[str, dict[str, float | int]]


def check(bins: Any) -> None:
  """Validates EVAL_LENGTH_BINS.

  Raises:
    ValueError: if `bins` is not a tuple of ascending positive integers.
  """
  if (
    not isinstance(bins, tuple | list)
    or not all(type(size) is int and size > 0 for size in bins)
    or list(bins) != sorted(set(bins))
  ):
    raise ValueError(
      f'EVAL_LENGTH_BINS={bins!r}: expected a tuple of increasing numbers of '
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
  """Returns metrics and `num_examples` by name of the length bin, in order.

  An empty bin has `num_examples` only. Metrics that are not sums over examples,
  such as user metrics, are left out; if no other metric remains, the result is
  empty.

  Args:
    metrics: metric functions of a task.
    targets: a reference, or a list of them, for each example.
    predictions: an answer for each example.
    bins: upper bounds, in words of the reference, of all bins but the last.
    num_samples: bootstrap samples for confidence intervals; 0 for none.
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
