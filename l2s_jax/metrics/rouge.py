# SPDX-License-Identifier: Apache-2.0
"""ROUGE by `rouge_score`, for words of any script.

If every example has a reference of one word, and no answer has more, ROUGE-2 is
0 even for equal texts. In this case two texts without bigrams match if their
words do, and the signature says `eff:yes`.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence

from l2s_jax.metrics import corpus, words

TOKENIZERS = ('latin', 'words', 'characters')
_TYPES = ('rouge1', 'rouge2', 'rougeLsum')


@dataclasses.dataclass(frozen=True)
class Rouge(corpus.Metric):
  """ROUGE-1, ROUGE-2 and summary-level ROUGE-L: mean F-measures.

  Each score uses the best reference of each example. For `rougeLsum`, sentences
  end at newlines and, since T5's tokenizer drops newlines, at ' . ', as in T5's
  own metric.

  The defaults are comparable with results of `rouge_score` with stemming, such
  as those of Hugging Face's summarization examples, which use NLTK's sentence
  splitter for `rougeLsum`. T5's tasks do not stem: their results are 0.5 to 1.5
  points lower on CNN/DailyMail, and are the median of random resamples instead
  of the mean.

  Attributes:
    tokenizer: `latin`, the tokenizer of `rouge_score`, which keeps a-z and 0-9
      only; `words` of any script; or `characters`; see `words.py`. None selects
      `latin`, or `words` if most letters of the references are not a-z.
    stemmer: whether to stem English words (Porter).
  """

  tokenizer: str | None = None
  stemmer: bool = True

  @property
  def score_names(self) -> tuple[str, ...]:
    return _TYPES

  def signature(self, references: corpus.References) -> str:
    tokenizer = self._tokenizer(references)
    stems = self.stemmer and tokenizer != 'characters'
    return _join_signature(
      nrefs=_num_references(references),
      tok=tokenizer,
      stem='yes' if stems else 'no',
      eff='yes' if self._undefined(references) else 'no',
      version=f'rouge_score-{importlib.metadata.version("rouge-score")}',
    )

  def check(self) -> None:
    if self.tokenizer is not None and self.tokenizer not in TOKENIZERS:
      raise ValueError(
        f'scores.rouge_tokenizer={self.tokenizer!r}: expected one of '
        f'{", ".join(TOKENIZERS)}, or None.'
      )

  def _tokenizer(self, references: corpus.References) -> str:
    if self.tokenizer is not None:
      return self.tokenizer
    is_latin = words.ascii_share(corpus.all_texts(references)) >= 0.5
    return 'latin' if is_latin else 'words'

  def _tokenize(
    self, references: corpus.References
  ) -> Callable[[str], list[str]]:
    # Imported here: it takes half a second, and only ROUGE needs it.
    from rouge_score import tokenizers

    tokenizer = self._tokenizer(references)
    latin = tokenizers.DefaultTokenizer(self.stemmer)
    if tokenizer == 'latin':
      return latin.tokenize
    if tokenizer == 'characters':
      return words.characters

    def tokenize(text: str) -> list[str]:
      return [
        token
        for word in words.words(text)
        for token in (latin.tokenize(word) if word.isascii() else [word])
      ]

    return tokenize

  def _undefined(self, references: corpus.References) -> set[str]:
    """Returns the scores that are 0 even for equal texts.

    Each example has a reference too short for an n-gram of that score.
    """
    tokenize = dataclasses.replace(self, stemmer=False)._tokenize(references)

    def are_short(length: int) -> bool:
      return all(
        any(len(tokenize(text)) < length for text in corpus.texts_of(own))
        for own in references
      )

    return {name for name in _TYPES if are_short(2 if name == 'rouge2' else 1)}

  def warnings(self, references: corpus.References) -> Iterator[str]:
    texts = corpus.all_texts(references)
    share = 1 - words.ascii_share(texts)
    if share <= 0.5:
      return
    if self.tokenizer == 'latin':
      yield (
        f"the tokenizer 'latin' keeps only a-z and 0-9: {share:.0%} of the "
        "references' letters are dropped. Set scores.rouge_tokenizer to words "
        'or characters.'
      )
    elif self.tokenizer is None:
      yield (
        f"rouge_score's own tokenizer would drop {share:.0%} of the "
        "references' letters, which are not a-z; words of any script are "
        'counted instead (tok:words in the signature). Set '
        "scores.rouge_tokenizer='words' to disable this warning."
      )

  def sums(
    self, references: corpus.References, predictions: Sequence[str]
  ) -> corpus.Sums:
    from rouge_score import rouge_scorer, tokenizers

    tokenize = self._tokenize(references)

    class Tokenizer(tokenizers.Tokenizer):
      def tokenize(self, text: str) -> list[str]:
        return tokenize(text)

    scorer = rouge_scorer.RougeScorer(_TYPES, tokenizer=Tokenizer())

    def sentences(text: str) -> str:
      return text.replace(' . ', ' .\n')

    scores = [
      scorer.score_multi(
        [sentences(reference) for reference in corpus.texts_of(own)],
        sentences(prediction),
      )
      for own, prediction in zip(references, predictions, strict=True)
    ]
    by_name = {
      name: [score[name].fmeasure for score in scores] for name in _TYPES
    }
    for name in self._undefined(references):
      by_name[name] = [
        max(score, float(_agree(own, prediction, tokenize)))
        for score, own, prediction in zip(
          by_name[name], references, predictions, strict=True
        )
      ]
    return corpus.mean_sums(by_name)


def _agree(
  reference: str | Sequence[str],
  prediction: str,
  tokenize: Callable[[str], list[str]],
) -> bool:
  """Returns whether a prediction has the same tokens as a reference."""
  tokens = tokenize(prediction)
  return any(
    tokens == tokenize(text) and (tokens or text.split() == prediction.split())
    for text in corpus.texts_of(reference)
  )


def _num_references(references: corpus.References) -> str:
  sizes = {len(corpus.texts_of(own)) for own in references}
  return str(sizes.pop()) if len(sizes) == 1 else 'var'


def _join_signature(**parts: str) -> str:
  return '|'.join(f'{name}:{value}' for name, value in parts.items())
