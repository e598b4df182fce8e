# SPDX-License-Identifier: Apache-2.0
"""BLEU, chrF and TER by sacreBLEU; BLEU with tokenizers for all languages.

If every example has a reference of fewer than four tokens, and no answer has
more, sacreBLEU's BLEU is 0 even for equal texts. In this case the maximum
n-gram order is that of the longest n-grams present, and the signature says
`eff:yes`. The scores of all other corpora equal sacreBLEU's.
"""

import dataclasses
import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float

from l2s_jax.metrics import corpus

if TYPE_CHECKING:
  import sacrebleu.metrics
  import sacrebleu.metrics.base

TOKENIZERS = (
  '13a',
  'intl',
  'zh',
  'ja-mecab',
  'ko-mecab',
  'char',
  'flores101',
  'flores200',
  'none',
)
_MAX_ORDER = 4
_DOWNLOAD_TIMEOUT_SECS = 30.0


@dataclasses.dataclass(frozen=True)
class Bleu(corpus.Metric):
  """Corpus BLEU: case-sensitive, exponential smoothing, up to 4-grams.

  An n-gram matches if any reference has it. The brevity penalty uses the
  reference closest in length.

  Attributes:
    tokenizer: one of `TOKENIZERS`. Only `zh`, the MeCab tokenizers, `char` and
      the FLORES tokenizers (spBLEU) segment scripts without spaces.
    setting: gin name of `tokenizer`, for messages.
  """

  tokenizer: str = '13a'
  setting: str = 'scores.bleu_tokenizer'

  def signature(self, references: corpus.References) -> str:
    return _signature(
      self._sacrebleu(effective_order=all(self._are_short(references))),
      references,
    )

  def check(self) -> None:
    if self.tokenizer not in TOKENIZERS:
      raise ValueError(
        f'{self.setting}={self.tokenizer!r}: expected one of '
        f'{", ".join(TOKENIZERS)}.'
      )
    self._sacrebleu()

  def _sacrebleu(
    self, *, effective_order: bool = False
  ) -> 'sacrebleu.metrics.BLEU':
    import sacrebleu.metrics

    # sacreBLEU may download a tokenizer model, without a timeout.
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECS)
    try:
      return sacrebleu.metrics.BLEU(
        tokenize=self.tokenizer,
        lowercase=False,
        smooth_method='exp',
        max_ngram_order=_MAX_ORDER,
        effective_order=effective_order,
      )
    except (ImportError, RuntimeError, OSError) as error:
      raise ValueError(
        f'{self.setting}={self.tokenizer!r} is not available: '
        f'{_tokenizer_needs(self.tokenizer)} ({_one_line(error)}). Or choose '
        'another tokenizer, such as char.'
      ) from error
    finally:
      socket.setdefaulttimeout(timeout)

  def _lengths(self, references: corpus.References) -> Iterator[list[int]]:
    """Yields the number of tokens of each reference, by example."""
    tokenize = self._sacrebleu().tokenizer
    for own in references:
      texts = corpus.texts_of(own)
      yield [len(tokenize(text.rstrip()).split()) for text in texts]

  def _are_short(self, references: corpus.References) -> Iterator[bool]:
    """Yields for each example whether a reference is too short for a 4-gram."""
    for sizes in self._lengths(references):
      yield min(sizes) < _MAX_ORDER

  def warnings(self, references: corpus.References) -> Iterator[str]:
    lengths = list(self._lengths(references))
    texts = corpus.all_texts(references)
    if corpus.finds_no_words(texts, sum(map(sum, lengths))):
      yield (
        f'the tokenizer {self.tokenizer!r} finds no words in these references, '
        'because their script has no spaces; whole sentences are compared. Set '
        f'{self.setting} to zh, ja-mecab, char or flores200 (spBLEU).'
      )
    if all(min(sizes) < _MAX_ORDER for sizes in lengths):
      yield (
        'each example has a reference of fewer than four tokens (tokenizer '
        f'{self.tokenizer!r}), for which sacreBLEU gives 0 even to equal '
        'texts; the effective n-gram order is used instead (eff:yes in the '
        'signature). exact_match or chrf suit such texts better.'
      )

  def sums(
    self, references: corpus.References, predictions: Sequence[str]
  ) -> corpus.Sums:
    plain, effective = (
      self._sacrebleu(effective_order=effective) for effective in (False, True)
    )
    rows = _sacrebleu_rows(plain, references, predictions)
    # The number of examples with 4-grams is another additive statistic.
    is_long = ~np.array(list(self._are_short(references)))

    def score(sums: Float[np.ndarray, ' statistic']) -> dict[str, float]:
      *counts, num_long = sums.tolist()
      if not any(counts[:2]):
        return {self.name: 100.0}  # all references and answers are empty
      metric = plain if num_long else effective
      return {self.name: metric._compute_score_from_stats(counts).score}

    return corpus.Sums(np.column_stack([rows, is_long]), score)


@dataclasses.dataclass(frozen=True)
class Chrf(corpus.Metric):
  """Corpus chrF2: character 6-grams, beta 2, optionally word n-grams.

  Each example uses its best-scoring reference.

  Attributes:
    word_order: maximum order of word n-grams: 0 for chrF, 2 for chrF++.
  """

  word_order: int = 0

  def signature(self, references: corpus.References) -> str:
    return _signature(self._sacrebleu(), references)

  def _sacrebleu(self) -> 'sacrebleu.metrics.CHRF':
    import sacrebleu.metrics

    return sacrebleu.metrics.CHRF(
      char_order=6, word_order=self.word_order, beta=2
    )

  def sums(
    self, references: corpus.References, predictions: Sequence[str]
  ) -> corpus.Sums:
    metric = self._sacrebleu()

    def score(sums: Float[np.ndarray, ' statistic']) -> dict[str, float]:
      counts = sums.tolist()
      if not any(counts):
        return {self.name: 100.0}  # all references and answers are empty
      return {self.name: metric._compute_score_from_stats(counts).score}

    return corpus.Sums(_sacrebleu_rows(metric, references, predictions), score)


@dataclasses.dataclass(frozen=True)
class Ter(corpus.Metric):
  """Corpus translation edit rate (Snover et al. 2006); lower is better.

  The number of edits for each 100 words of the references: insertions,
  deletions, substitutions, and shifts of phrases. It can exceed 100. Words are
  separated by white space, without case, as by default in sacreBLEU. Each
  example uses the reference with the fewest edits, and the mean length of its
  references.
  """

  lower_is_better: ClassVar[bool] = True

  def signature(self, references: corpus.References) -> str:
    return _signature(self._sacrebleu(), references)

  def _sacrebleu(self) -> 'sacrebleu.metrics.TER':
    import sacrebleu.metrics

    return sacrebleu.metrics.TER()

  def warnings(self, references: corpus.References) -> Iterator[str]:
    texts = corpus.all_texts(references)
    if corpus.finds_no_words(texts, sum(len(text.split()) for text in texts)):
      yield (
        'words are separated by white space, but the script of these '
        'references has none between words; whole sentences are compared. Use '
        'chrf for this script.'
      )

  def sums(
    self, references: corpus.References, predictions: Sequence[str]
  ) -> corpus.Sums:
    metric = self._sacrebleu()

    def score(sums: Float[np.ndarray, ' statistic']) -> dict[str, float]:
      return {self.name: metric._compute_score_from_stats(sums.tolist()).score}

    return corpus.Sums(_sacrebleu_rows(metric, references, predictions), score)


def _sacrebleu_rows(
  metric: 'sacrebleu.metrics.base.Metric',
  references: corpus.References,
  predictions: Sequence[str],
) -> Float[np.ndarray, 'example statistic']:
  """Returns sacreBLEU's statistics of each example."""
  # This is sacreBLEU's interface between its metrics and its significance
  # tests. The public bootstrap returns half the interval's width only and
  # allocates [sample, example, statistic]; the statistics of chrF and TER are
  # not public. A test verifies that the scores equal those of the public
  # functions exactly.
  rows = metric._extract_corpus_statistics(predictions, _streams(references))
  return np.array(rows, np.float64)


def _streams(references: corpus.References) -> list[list[Any]]:
  """Returns references in sacreBLEU's form: all first ones, all second, ...

  Missing references are None.
  """
  texts = [corpus.texts_of(own) for own in references]
  return [list(stream) for stream in itertools.zip_longest(*texts)]


def _signature(
  metric: 'sacrebleu.metrics.base.Metric',
  references: corpus.References,
) -> str:
  """Returns sacreBLEU's signature of a metric."""
  # A metric's signature has the number of references of its first score.
  sizes = {len(corpus.texts_of(own)) for own in references}
  examples = [[''] * size for size in sizes]
  metric.corpus_score([''] * len(examples), _streams(examples))
  return str(metric.get_signature())


def _tokenizer_needs(tokenizer: str) -> str:
  """Returns the instruction for installing a sacreBLEU tokenizer."""
  if tokenizer.endswith('-mecab'):
    return (
      f"install its packages with `pip install 'sacrebleu[{tokenizer[:2]}]'`"
    )
  from sacrebleu import utils
  from sacrebleu.tokenizers import tokenizer_spm

  url = tokenizer_spm.SPM_MODELS[tokenizer]['url']
  path = os.path.join(utils.SACREBLEU_DIR, 'models', os.path.basename(url))
  return (
    f'its SentencePiece model could not be downloaded: download {url} on a '
    f'host with network access and copy it to {path}'
  )


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split()) or type(error).__name__
