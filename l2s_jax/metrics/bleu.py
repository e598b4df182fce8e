# SPDX-License-Identifier: Apache-2.0
"""BLEU and chrF as sacreBLEU has them, with the tokenizers of all languages.

Where every example has a reference of fewer than four tokens and no answer has
more, sacreBLEU's BLEU is 0 even of equal texts. Then n-grams are counted up to
the longest that there are, and the signature says `eff:yes`; every corpus with
a 4-gram to be found scores the same either way.
"""

import dataclasses
import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from l2s_jax.metrics import corpus

if TYPE_CHECKING:
  import sacrebleu.metrics

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
  """Corpus BLEU: mixed case, exponential smoothing, n-grams up to four.

  An n-gram is found if any reference has it; the brevity penalty takes the
  reference closest in length.

  Attributes:
    tokenizer: one of `TOKENIZERS`. Only `zh`, the two of MeCab, `char` and
      the two of FLORES (spBLEU) find words in scripts without spaces.
    setting: where `tokenizer` comes from, for messages.
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

    # sacreBLEU may fetch a tokenizer's model, and waits for ever.
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
        f'{self.setting}={self.tokenizer!r} cannot be used here: '
        f'{_tokenizer_needs(self.tokenizer)} ({_one_line(error)}). Or choose '
        'another tokenizer, such as char.'
      ) from error
    finally:
      socket.setdefaulttimeout(timeout)

  def _lengths(self, references: corpus.References) -> Iterator[list[int]]:
    """Yields the number of tokens of each reference, example by example."""
    tokenize = self._sacrebleu().tokenizer
    for own in references:
      texts = corpus.texts_of(own)
      yield [len(tokenize(text.rstrip()).split()) for text in texts]

  def _are_short(self, references: corpus.References) -> Iterator[bool]:
    """Yields whether an example has a reference without any 4-gram."""
    for sizes in self._lengths(references):
      yield min(sizes) < _MAX_ORDER

  def warnings(self, references: corpus.References) -> Iterator[str]:
    lengths = list(self._lengths(references))
    texts = corpus.all_texts(references)
    if corpus.finds_no_words(texts, sum(map(sum, lengths))):
      yield (
        f'the tokenizer {self.tokenizer!r} finds no words in these references, '
        'whose script has no spaces between them, so that sentences are '
        f'compared whole. Set {self.setting} to zh, ja-mecab, char or '
        'flores200 (spBLEU).'
      )
    if all(min(sizes) < _MAX_ORDER for sizes in lengths):
      yield (
        'each example has a reference of fewer than four tokens (of the '
        f'tokenizer {self.tokenizer!r}), where sacreBLEU gives 0 even to equal '
        'texts; n-grams are counted up to the longest that there are (eff:yes '
        'in the signature). exact_match or chrf tell more of such texts.'
      )

  def sums(
    self, references: corpus.References, predictions: Sequence[str]
  ) -> corpus.Sums:
    plain, effective = (
      self._sacrebleu(effective_order=effective) for effective in (False, True)
    )
    rows = _sacrebleu_rows(plain, references, predictions)
    # Whether a sample of examples has a 4-gram to be found adds up, too.
    is_long = ~np.array(list(self._are_short(references)))

    def score(sums: Float[np.ndarray, ' statistic']) -> dict[str, float]:
      *counts, num_long = sums.tolist()
      if not any(counts[:2]):
        return {self.name: 100.0}  # Nothing was to be said, nor was said.
      metric = plain if num_long else effective
      return {self.name: metric._compute_score_from_stats(counts).score}

    return corpus.Sums(np.column_stack([rows, is_long]), score)


@dataclasses.dataclass(frozen=True)
class Chrf(corpus.Metric):
  """Corpus chrF2: character 6-grams, beta 2, and perhaps n-grams of words.

  Each example counts against the reference that scores best.

  Attributes:
    word_order: 0 is chrF, 2 is chrF++.
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
        return {self.name: 100.0}  # Nothing was to be said, nor was said.
      return {self.name: metric._compute_score_from_stats(counts).score}

    return corpus.Sums(_sacrebleu_rows(metric, references, predictions), score)


def _sacrebleu_rows(
  metric: 'sacrebleu.metrics.BLEU | sacrebleu.metrics.CHRF',
  references: corpus.References,
  predictions: Sequence[str],
) -> Float[np.ndarray, 'example statistic']:
  # sacreBLEU's interface between its metrics and its significance tests. Its
  # public bootstrap gives half a width only, and builds [sample, example,
  # statistic] in memory; chrF's statistics are not public at all. A test holds
  # that these give the scores of the public functions to the last bit.
  rows = metric._extract_corpus_statistics(predictions, _streams(references))
  return np.array(rows, np.float64)


def _streams(references: corpus.References) -> list[list[Any]]:
  """Returns sacreBLEU's form: the first of each example, the second, ...

  Where an example has no such reference stands None.
  """
  texts = [corpus.texts_of(own) for own in references]
  return [list(stream) for stream in itertools.zip_longest(*texts)]


def _signature(
  metric: 'sacrebleu.metrics.BLEU | sacrebleu.metrics.CHRF',
  references: corpus.References,
) -> str:
  """Returns sacreBLEU's description of a metric of its own."""
  # A metric learns its number of references from its first score.
  sizes = {len(corpus.texts_of(own)) for own in references}
  examples = [[''] * size for size in sizes]
  metric.corpus_score([''] * len(examples), _streams(examples))
  return str(metric.get_signature())


def _tokenizer_needs(tokenizer: str) -> str:
  """Returns what is to be done for a tokenizer of sacreBLEU to be there."""
  if tokenizer.endswith('-mecab'):
    return (
      f"install its packages with `pip install 'sacrebleu[{tokenizer[:2]}]'`"
    )
  from sacrebleu import utils
  from sacrebleu.tokenizers import tokenizer_spm

  url = tokenizer_spm.SPM_MODELS[tokenizer]['url']
  path = os.path.join(utils.SACREBLEU_DIR, 'models', os.path.basename(url))
  return (
    f'its SentencePiece model is fetched once, and could not be: copy {url} '
    f'to {path} from a host with network'
  )


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split()) or type(error).__name__
