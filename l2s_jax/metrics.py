# SPDX-License-Identifier: Apache-2.0
"""Corpus metrics of written answers, in the form of a SeqIO `metric_fn`.

Each takes `(targets, predictions)`, one string per example, and returns
`{name: score}` on a scale of 0 to 100. BLEU and chrF are sacreBLEU's, so that
figures compare with published ones; quote the signature with the score. Losses
and accuracies of tokens are in `losses.py`, not here.
"""

from collections.abc import Sequence

import sacrebleu.metrics


def bleu(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns corpus BLEU: 13a tokens, mixed case, exponential smoothing.

  Raises:
    ValueError: if there are no pairs or the sizes differ.
  """
  _check_pairs(targets, predictions)
  return {'bleu': _bleu().corpus_score(predictions, [targets]).score}


def chrf(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns corpus chrF2: character 6-grams, no word n-grams, beta 2.

  Raises:
    ValueError: if there are no pairs or the sizes differ.
  """
  _check_pairs(targets, predictions)
  return {'chrf': _chrf().corpus_score(predictions, [targets]).score}


def exact_match(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns the percentage of predictions equal to their target.

  Raises:
    ValueError: if there are no pairs or the sizes differ.
  """
  _check_pairs(targets, predictions)
  hits = sum(t == p for t, p in zip(targets, predictions, strict=True))
  return {'exact_match': 100 * hits / len(targets)}


def bleu_signature() -> str:
  """Returns sacreBLEU's description of what `bleu` computes."""
  return _signature(_bleu())


def chrf_signature() -> str:
  """Returns sacreBLEU's description of what `chrf` computes."""
  return _signature(_chrf())


def _bleu() -> sacrebleu.metrics.BLEU:
  return sacrebleu.metrics.BLEU(
    tokenize='13a', lowercase=False, smooth_method='exp'
  )


def _chrf() -> sacrebleu.metrics.CHRF:
  return sacrebleu.metrics.CHRF(char_order=6, word_order=0, beta=2)


def _signature(metric: sacrebleu.metrics.BLEU | sacrebleu.metrics.CHRF) -> str:
  # A metric learns its number of references, 1 here, from its first score.
  metric.corpus_score([''], [['']])
  return str(metric.get_signature())


def _check_pairs(targets: Sequence[str], predictions: Sequence[str]) -> None:
  if not len(targets) == len(predictions) > 0:
    raise ValueError(
      f'{len(targets)} targets and {len(predictions)} predictions: expected '
      'as many of one as of the other, and at least one.'
    )
