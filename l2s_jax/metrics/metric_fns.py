# SPDX-License-Identifier: Apache-2.0
"""Corpus metrics of generated text, as SeqIO `metric_fn`s.

A metric takes `(targets, predictions)`: one prediction per example, and as
target one reference or a list of them. It returns `{name: score}` on a scale
from 0 to 100, higher is better; TER is an error rate, lower is better. With
several references the best one counts, as defined by each metric.
`with_intervals` adds confidence intervals. BLEU, chrF and TER are those of
sacreBLEU and ROUGE is that of `rouge_score`, for comparison with published
results; the `signature` of a metric states its settings. `scores.py` configures
the metrics of a task. Token losses and accuracies are in `models/losses.py`.
"""

import collections
import dataclasses
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from l2s_jax.metrics import bleu as bleu_lib
from l2s_jax.metrics import corpus
from l2s_jax.metrics import rouge as rouge_lib

MetricFn = corpus.MetricFn
Metric = corpus.Metric
References = corpus.References
signatures = corpus.signatures
with_intervals = corpus.with_intervals
paired_difference = corpus.paired_difference

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


@dataclasses.dataclass(frozen=True)
class ExactMatch(Metric):
  """The percentage of predictions that equal one of their references."""

  def sums(
    self, references: References, predictions: Sequence[str]
  ) -> corpus.Sums:
    return corpus.mean_sums(
      {
        self.name: [
          float(prediction in corpus.texts_of(own))
          for own, prediction in zip(references, predictions, strict=True)
        ]
      }
    )


@dataclasses.dataclass(frozen=True)
class TokenF1(Metric):
  """SQuAD's token F1: the mean over examples, with the best reference.

  Texts are lower-cased, stripped of ASCII punctuation and of the articles a,
  an, the, and split at white space. As in SQuAD 2.0, two empty texts match.
  """

  def warnings(self, references: References) -> Iterator[str]:
    texts = corpus.all_texts(references)
    if corpus.finds_no_words(texts, sum(len(_words(text)) for text in texts)):
      yield (
        'words are separated by white space, but the script of these '
        'references has none between words; whole sentences are compared. Use '
        'chrf or rouge for this script.'
      )

  def sums(
    self, references: References, predictions: Sequence[str]
  ) -> corpus.Sums:
    return corpus.mean_sums(
      {
        self.name: [
          max(
            _f1(_words(reference), _words(prediction))
            for reference in corpus.texts_of(own)
          )
          for own, prediction in zip(references, predictions, strict=True)
        ]
      }
    )


@dataclasses.dataclass(frozen=True)
class UserMetric(Metric):
  """A user-defined corpus metric.

  Attributes:
    function: takes references (a text, or a list of texts, per example) and
      predictions, and returns a number.
  """

  adds_up: ClassVar[bool] = False
  function: Any = None

  def __call__(
    self, targets: References, predictions: Sequence[str]
  ) -> dict[str, float]:
    corpus.check_pairs(targets, predictions)
    score = self.function(targets, predictions)
    try:
      return {self.name: float(score)}
    except (TypeError, ValueError) as error:
      raise ValueError(
        f'scores.functions[{self.name!r}] returned a {type(score).__name__}; '
        'expected one number for all targets and predictions.'
      ) from error

  def check(self) -> None:
    if not callable(self.function):
      raise ValueError(
        f'scores.functions[{self.name!r}] is {self.function!r}; expected a '
        'function of (targets, predictions), such as @my_metrics.comet without '
        'parentheses.'
      )


bleu = bleu_lib.Bleu('bleu')
chrf = bleu_lib.Chrf('chrf')
rouge = rouge_lib.Rouge('rouge')
exact_match = ExactMatch('exact_match')
token_f1 = TokenF1('token_f1')
spbleu = bleu_lib.Bleu('spbleu', 'flores200', 'scores.spbleu_tokenizer')
chrfpp = bleu_lib.Chrf('chrfpp', word_order=2)
ter = bleu_lib.Ter('ter')

# Metrics by their names in configs, with default settings.
METRICS: Mapping[str, Metric] = {
  metric.name: metric
  for metric in (bleu, chrf, rouge, exact_match, token_f1, spbleu, chrfpp, ter)
}

_LOWER_IS_BETTER = frozenset(
  score
  for metric in METRICS.values()
  if metric.lower_is_better
  for score in metric.score_names
)


def lower_is_better(score: str) -> bool:
  """Returns whether a lower value of a score is the better one.

  True of losses and error rates. User-defined metrics are higher-is-better,
  unless their name ends in 'loss'.

  Args:
    score: name of a score, in a mixture with its task: 'ter', 'task/loss'.
  """
  name = score.rpartition('/')[2]
  return name.endswith('loss') or name in _LOWER_IS_BETTER


def bleu_signature(num_references: int | None = 1) -> str:
  """Returns sacreBLEU's signature of the default `bleu`.

  Args:
    num_references: references per example; None if the number varies.
  """
  return bleu.signature(_example_references(num_references))


def chrf_signature(num_references: int | None = 1) -> str:
  """Returns sacreBLEU's signature of the default `chrf`.

  Args:
    num_references: references per example; None if the number varies.
  """
  return chrf.signature(_example_references(num_references))


def _example_references(num_references: int | None) -> References:
  sizes = (1, 2) if num_references is None else (num_references,)
  return [['four words or more'] * size for size in sizes]


def _words(text: str) -> list[str]:
  text = text.lower().translate(_NO_PUNCTUATION)
  return _ARTICLES.sub(' ', text).split()


def _f1(reference: Sequence[str], prediction: Sequence[str]) -> float:
  if not reference or not prediction:
    return float(reference == prediction)
  common = collections.Counter(reference) & collections.Counter(prediction)
  return 2 * common.total() / (len(reference) + len(prediction))
