# SPDX-License-Identifier: Apache-2.0
"""Words and characters of any script, as scores count them.

A script is *unspaced* if its words stand side by side: Chinese, Japanese, Thai,
Lao, Khmer, Burmese and a few more. There a letter with its marks is the unit,
as in Unicode's default word boundaries (UAX 29), since true words would take a
dictionary of each language.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import regex

_UNSPACED = (
  r'\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}'
  r'\p{Tibetan}\p{Javanese}\p{Balinese}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}'
)
# The two joiners stand within words of Persian and of India's languages.
_WORD = (
  rf'(?V1)[[{_UNSPACED}]--\p{{M}}]\p{{M}}*'
  rf'|[[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d]--[{_UNSPACED}]]+'
)
_CHARACTER = r'[\p{L}\p{N}]\p{M}*'
_LETTER = r'\p{L}'
_UNSPACED_LETTER = rf'(?V1)[[{_UNSPACED}]&&\p{{L}}]'
_ASCII_LETTER = r'[A-Za-z]'


def words(text: str) -> list[str]:
  """Returns the lower-cased words: runs of letters, marks and digits.

  Of ASCII text these are the words that `rouge_score` counts. A letter of an
  unspaced script is a word of its own.
  """
  return _compiled(_WORD).findall(text.lower())


def characters(text: str) -> list[str]:
  """Returns the lower-cased letters and digits, each with its marks."""
  return _compiled(_CHARACTER).findall(text.lower())


def num_letters(texts: Iterable[str]) -> int:
  """Returns how many letters there are, of whatever script."""
  return _count(_LETTER, texts)


def ascii_share(texts: Iterable[str]) -> float:
  """Returns the share of A-Z and a-z in all letters; 1 if there are none."""
  return _share(_ASCII_LETTER, list(texts), of_nothing=1.0)


def unspaced_share(texts: Iterable[str]) -> float:
  """Returns the share of unspaced scripts in all letters; 0 without any."""
  return _share(_UNSPACED_LETTER, list(texts), of_nothing=0.0)


@functools.cache
def _compiled(pattern: str) -> 'regex.Pattern':
  import regex

  return regex.compile(pattern)


def _share(pattern: str, texts: list[str], *, of_nothing: float) -> float:
  total = num_letters(texts)
  return _count(pattern, texts) / total if total else of_nothing


def _count(pattern: str, texts: Iterable[str]) -> int:
  find = _compiled(pattern).findall
  return sum(len(find(text)) for text in texts)
