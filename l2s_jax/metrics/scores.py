# SPDX-License-Identifier: Apache-2.0
"""Which scores a task has, and with which settings: what gin says of them.

A language that is written without spaces needs another tokenizer than 13a for
BLEU, and ROUGE one that knows its script. All settings may be of one task,
with its name as gin's scope: `wmt16_en_ro/scores.bleu_tokenizer = 'intl'`, and
`news/scores.rouge_tokenizer = 'words'` of the task `news/local`.
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
  """How answers are scored; None leaves a setting to the task.

  Attributes:
    metrics: names, in the place of those of a task from SeqIO's registry, such
      as `('spbleu', 'chrfpp')`. A local task has `local_task.metrics`, and
      inference INFER_METRICS.
    bleu_tokenizer: sacreBLEU's: 13a (of most tasks), intl, zh, ja-mecab,
      ko-mecab, char, flores101, flores200 or none. It is in BLEU's signature.
    spbleu_tokenizer: of the metric `spbleu`: flores200 or flores101.
    rouge_tokenizer: latin (rouge_score's own), words or characters of any
      script; None: latin, or words where most letters are not a-z.
    rouge_stemmer: whether English words lose their endings; ours do by default,
      T5's do not.
    functions: metrics of the user's by name, such as `{'comet': @comet}`: each
      takes the references (each a text, or a list of references) and the
      predictions, and returns one number, the better the higher.
  """

  metrics: Sequence[str] | None = None
  bleu_tokenizer: str | None = None
  spbleu_tokenizer: str | None = None
  rouge_tokenizer: str | None = None
  rouge_stemmer: Any = None
  functions: Any = None

  def named(self, names: Sequence[str], setting: str) -> list[Metric]:
    """Returns the metrics of these names, with these settings.

    Args:
      names: of metrics.
      setting: where they come from, for messages.

    Raises:
      ValueError: if there is no such metric, or it cannot be computed here.
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
        f'scores.functions={functions!r}: expected functions by the name of '
        "their score, such as {'comet': @my_metrics.comet}."
      )
    taken = sorted(metric_fns_lib.METRICS.keys() & functions.keys())
    if taken:
      raise ValueError(
        f'scores.functions has {", ".join(taken)}, which is there already; '
        'choose another name.'
      )
    return dict(metric_fns_lib.METRICS) | {
      name: metric_fns_lib.UserMetric(name, function)
      for name, function in functions.items()
    }

  def _checked(self, metric: Metric) -> Metric:
    """Returns a metric with these settings, which it can be computed with."""
    changes: dict[str, Any] = {}
    if isinstance(metric, bleu.Bleu):
      is_spbleu = metric.setting == metric_fns_lib.spbleu.setting
      tokenizer = self.spbleu_tokenizer if is_spbleu else self.bleu_tokenizer
      changes = {'tokenizer': tokenizer}
    elif isinstance(metric, rouge.Rouge):
      if self.rouge_stemmer not in (None, True, False):
        raise ValueError(
          f'scores.rouge_stemmer={self.rouge_stemmer!r}: expected True or '
          "False, or None for the task's own."
        )
      changes = {
        'tokenizer': self.rouge_tokenizer,
        'stemmer': self.rouge_stemmer,
      }
    given = {key: value for key, value in changes.items() if value is not None}
    metric = dataclasses.replace(metric, **given)
    metric.check()
    return metric
