# SPDX-License-Identifier: Apache-2.0
"""Words and characters of any script, for metrics.

A script is *unspaced* if it has no spaces between words: Chinese, Japanese,
Thai, Lao, Khmer, Burmese and others. In such scripts each letter with its marks
counts as a word, as in Unicode's default word boundaries (UAX 29), since real
words require a dictionary for each language.
"""

from collections.abc import Iterable

import regex

_UNSPACED = (
  r'\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}'
  r'\p{Tibetan}\p{Javanese}\p{Balinese}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}'
)
# The two joiners occur inside words of Persian and Indic languages.
_WORD = regex.compile(
  rf'(?V1)[[{_UNSPACED}]--\p{{M}}]\p{{M}}*'
  rf'|[[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d]--[{_UNSPACED}]]+'
)
_CHARACTER = regex.compile(r'[\p{L}\p{N}]\p{M}*')
_LETTER = regex.compile(r'\p{L}')
_UNSPACED_LETTER = regex.compile(rf'(?V1)[[{_UNSPACED}]&&\p{{L}}]')
_ASCII_LETTER = regex.compile(r'[A-Za-z]')


def words(text: str) -> list[str]:
  """Returns the lower-cased words: runs of letters, marks and digits.

  For ASCII text these are the words of `rouge_score`. Each letter of an
  unspaced script is a word.
  """
  return _WORD.findall(text.lower())


def characters(text: str) -> list[str]:
  """Returns the lower-cased letters and digits, each with its marks."""
  return _CHARACTER.findall(text.lower())


def num_letters(texts: Iterable[str]) -> int:
  """Returns the number of letters of any script."""
  return _count(_LETTER, texts)


def ascii_share(texts: Iterable[str]) -> float:
  """Returns the share of A-Z and a-z among letters; 1 without letters."""
  return _share(_ASCII_LETTER, list(texts), of_nothing=1.0)


def unspaced_share(texts: Iterable[str]) -> float:
  """Returns the share of unspaced scripts among letters; 0 without letters."""
  return _share(_UNSPACED_LETTER, list(texts), of_nothing=0.0)


def _share(
  pattern: regex.Pattern, texts: list[str], *, of_nothing: float
) -> float:
  total = num_letters(texts)
  return _count(pattern, texts) / total if total else of_nothing


def _count(pattern: regex.Pattern, texts: Iterable[str]) -> int:
  return sum(len(pattern.findall(text)) for text in texts)
