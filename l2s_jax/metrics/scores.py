# SPDX-License-Identifier: Apache-2.0
"""Gin configuration of the metrics of a task.

Languages written without spaces need other tokenizers: for BLEU than the
default 13a, and for ROUGE one that covers the script. Settings can be limited
to a task by a gin scope with its name: `wmt16_en_ro/scores.bleu_tokenizer =
'intl'`, or `news/scores.rouge_tokenizer = 'words'` for the task `news/local`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import gin

from l2s_jax.metrics import bleu, rouge
from l2s_jax.metrics import metric_fns as metric_fns_lib
from l2s_jax.metrics.metric_fns import Metric


@gin.configurable('scores', module='l2s_jax')
@dataclasses.dataclass(frozen=True)
class Scores:
  """Settings of the metrics; None keeps the task's own setting.

  Attributes:
    metrics: names of metrics that replace those of a registered SeqIO task,
      such as `('spbleu', 'chrfpp')`. Local tasks have `local_task.metrics`,
      inference has INFER_METRICS.
    bleu_tokenizer: sacreBLEU tokenizer: 13a (default of most tasks), intl, zh,
      ja-mecab, ko-mecab, char, flores101, flores200 or none. It is part of
      BLEU's signature.
    spbleu_tokenizer: tokenizer of the metric `spbleu`: flores200 or flores101.
    rouge_tokenizer: latin (that of `rouge_score`), words, or characters of any
      script; None selects latin, or words if most letters are not a-z.
    rouge_stemmer: whether ROUGE stems English words; this package's metric does
      by default, T5's does not.
    functions: user-defined metrics by name, such as `{'comet': @comet}`. Each
      takes references (a text, or a list of texts, per example) and
      predictions, and returns one number; higher is better.
  """

  metrics: Sequence[str] | None = None
  bleu_tokenizer: str | None = None
  spbleu_tokenizer: str | None = None
  rouge_tokenizer: str | None = None
  rouge_stemmer: Any = None
  functions: Any = None

  def named(self, names: Sequence[str], setting: str) -> list[Metric]:
    """Returns metrics by name, with these settings.

    Args:
      names: names of metrics.
      setting: gin name with the metrics, for messages.

    Raises:
      ValueError: if a metric is unknown or cannot be computed here.
    """
    known = self._known()
    if isinstance(names, str) or not set(names) <= known.keys():
      raise ValueError(
        f"{setting}={names!r}: expected a tuple, such as ('bleu',), of any of "
        f'{", ".join(known)}; scores.functions adds your own.'
      )
    return [self._checked(known[name]) for name in names]

  def of_task(
    self, metric_fns: Sequence[metric_fns_lib.MetricFn]
  ) -> list[metric_fns_lib.MetricFn]:
    """Returns a task's metrics with these settings, or those of `metrics`.

    Args:
      metric_fns: the task's own metrics.

    Raises:
      ValueError: as `named`.
    """
    if self.metrics is not None:
      return list(self.named(self.metrics, 'scores.metrics'))
    return [
      self._checked(fn) if isinstance(fn, Metric) else fn for fn in metric_fns
    ]

  def _known(self) -> dict[str, Metric]:
    functions = self.functions or {}
    if not isinstance(functions, Mapping):
      raise ValueError(
        f'scores.functions={functions!r}: expected a dict from names of scores '
        "to functions, such as {'comet': @my_metrics.comet}."
      )
    taken = sorted(metric_fns_lib.METRICS.keys() & functions.keys())
    if taken:
      raise ValueError(
        f'scores.functions has {", ".join(taken)}, the name of an existing '
        'score; choose another name.'
      )
    return dict(metric_fns_lib.METRICS) | {
      name: metric_fns_lib.UserMetric(name, function)
      for name, function in functions.items()
    }

  def _checked(self, metric: Metric) -> Metric:
    """Returns a metric with these settings, after `Metric.check`."""
    changes: dict[str, Any] = {}
    if isinstance(metric, bleu.Bleu):
      is_spbleu = metric.setting == metric_fns_lib.spbleu.setting
      tokenizer = self.spbleu_tokenizer if is_spbleu else self.bleu_tokenizer
      changes = {'tokenizer': tokenizer}
    elif isinstance(metric, rouge.Rouge):
      if self.rouge_stemmer not in (None, True, False):
        raise ValueError(
          f'scores.rouge_stemmer={self.rouge_stemmer!r}: expected True or '
          "False, or None for the task's setting."
        )
      changes = {
        'tokenizer': self.rouge_tokenizer,
        'stemmer': self.rouge_stemmer,
      }
    given = {key: value for key, value in changes.items() if value is not None}
    metric = dataclasses.replace(metric, **given)
    metric.check()
    return metric
