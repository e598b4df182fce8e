# SPDX-License-Identifier: Apache-2.0
"""ByT5's tokenizer, which has no model file: every byte of UTF-8 is an id.

Found by `loading.load` in a folder whose `tokenizer_config.json` names
ByT5Tokenizer; `{"tokenizer_class": "ByT5Tokenizer"}` is enough of one. A folder
is read as transformers reads it, that file named alone as SeqIO does.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from l2s_jax.vocabularies import base, tokenizer_files

_FIRST_BYTE = 3  # After pad, EOS and unknown.
_FIRST_SENTINEL = _FIRST_BYTE + 256
_NUM_SENTINELS = 125
_SPECIALS = ('pad', 'eos', 'unk')  # by id
IN_TEXT = 'special_tokens_in_text'  # Our key: how they are found there.


class ByteVocabulary(base.Vocabulary):
  """Ids are bytes + 3; pad is 0, EOS 1, unknown 2, sentinels from 259 on.

  A sentinel in the text, `<extra_id_0>`, encodes to its id, 259, as in
  transformers. All else is bytes, so that every text comes back as it was; in a
  folder of transformers all but `</s>`, `<pad>` and `<unk>`, which become their
  ids there and swallow the spaces beside them. Bytes that are not UTF-8, which
  only a model writes, leave no text.
  """

  def __init__(
    self,
    path: str | os.PathLike[str] | None = None,
    *,
    start_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    said_ids: Mapping[str, Any] | None = None,
    in_text: Mapping[str, tokenizers.AddedToken] | None = None,
  ):
    """Reads which sentinels there are.

    Args:
      path: a `tokenizer_config.json`; None stands for ByT5's own, with 125.
      start_id: replaces the pad token; `eos_id` and `pad_id` replace theirs.
      said_ids: see `Vocabulary`.
      in_text: how `pad`, `eos` and `unk` are found in text; None: as the file
        says if we have written it, else not at all.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not of a ByT5Tokenizer, its sentinels have gaps, or
        as `Vocabulary`.
    """
    if path is None:
      path = pathlib.Path(tokenizer_files.CONFIG_FILE)
      config: dict[str, Any] = {
        'tokenizer_class': tokenizer_files.BYTE_TOKENIZER
      }
      files = {path.name: json.dumps(config).encode()}
    else:
      path = pathlib.Path(path)
      files = tokenizer_files.read_special_files(path.parent)
      if path.name not in files:
        raise FileNotFoundError(f'{path} is missing: expected a tokenizer.')
      config = tokenizer_files.parse_json(files[path.name], path)
    name = config.get('tokenizer_class')
    if name != tokenizer_files.BYTE_TOKENIZER:
      raise ValueError(
        f'{path} says tokenizer_class={name!r}, expected '
        f"{tokenizer_files.BYTE_TOKENIZER!r}; give that tokenizer's own file."
      )
    sentinels = _sentinels(config, path)
    self._sentinel_ids = {
      name: _FIRST_SENTINEL + n for n, name in enumerate(sentinels)
    }
    if in_text is None:
      in_text = _in_text(config, path)
    self._specials = {
      str(in_text[kind]): (number, in_text[kind].lstrip, in_text[kind].rstrip)
      for number, kind in enumerate(_SPECIALS)
      if kind in in_text
    }
    config[IN_TEXT] = {
      kind: {
        'content': str(token),
        'lstrip': token.lstrip,
        'rstrip': token.rstrip,
      }
      for kind, token in in_text.items()
    }
    files[path.name] = (json.dumps(config, indent=2) + '\n').encode()
    # They tell it from one of the same sentinels that reads bytes.
    told_by = {f'in text {n}': t for n, (t, *_) in self._specials.items()}
    super().__init__(
      path,
      files,
      vocab_size=_FIRST_SENTINEL + len(sentinels),
      # Sentinels too: they are all that tells two such vocabularies apart.
      special_ids={'pad': 0, 'eos': 1, 'unk': 2, **self._sentinel_ids}
      | told_by,
      start_id=start_id,
      eos_id=eos_id,
      pad_id=pad_id,
      num_plain_ids=_FIRST_SENTINEL,
      said_ids=said_ids,
    )

  @functools.cached_property
  def _processor(self) -> re.Pattern[str]:
    # Longest first, where one begins like another.
    names = [*self._sentinel_ids, *self._specials]
    names.sort(key=len, reverse=True)
    return re.compile(f'({"|".join(map(re.escape, names)) or "(?!)"})')

  def _encode(self, text: str) -> list[int]:
    ids: list[int] = []
    parts = [part for part in self._processor.split(text) if part]
    for n, part in enumerate(parts):
      _, strips_left, strips_right = self._specials.get(part, (0, False, False))
      if strips_right and n + 1 < len(parts):
        parts[n + 1] = parts[n + 1].lstrip()
      if strips_left and n:
        parts[n - 1] = parts[n - 1].rstrip()
    for part in parts:
      if part in self._specials:
        ids.append(self._specials[part][0])
      elif part in self._sentinel_ids:
        ids.append(self._sentinel_ids[part])
      else:
        ids += (_FIRST_BYTE + byte for byte in part.encode())
    return ids

  def _decode(self, ids: list[int]) -> str:
    pieces = [b'', b'', b'<unk>', *(bytes([byte]) for byte in range(256))]
    pieces += (name.encode() for name in self._sentinel_ids)
    return b''.join(pieces[token] for token in ids).decode(errors='ignore')


def in_text_of(
  arguments: Mapping[str, Any],
) -> dict[str, tokenizers.AddedToken]:
  """Returns how transformers finds the special tokens in text.

  Args:
    arguments: of its class, as `auto_tokenizer.arguments` has them.
  """
  found = {}
  for kind, default in zip(_SPECIALS, ('<pad>', '</s>', '<unk>'), strict=True):
    token = arguments.get(f'{kind}_token') or default
    if isinstance(token, str):
      token = tokenizers.AddedToken(token, lstrip=True, rstrip=True)
    found[kind] = token
  return found


def _in_text(
  config: dict[str, Any], path: pathlib.Path
) -> dict[str, tokenizers.AddedToken]:
  values = config.get(IN_TEXT, {})
  if not isinstance(values, dict) or not values.keys() <= set(_SPECIALS):
    tokenizer_files.refuse(path, IN_TEXT, values, 'pad, eos and unk')
  return {
    kind: tokenizer_files.added_token(value, path, f'{IN_TEXT}.{kind}')
    for kind, value in values.items()
  }


def _sentinels(config: dict[str, Any], path: pathlib.Path) -> list[str]:
  """Returns the tokens behind the bytes, in the order of their ids.

  What transformers has saved lists them all in `added_tokens_decoder`; what
  Google released only counts them, in `extra_ids`.
  """
  if 'added_tokens_decoder' not in config:
    count = config.get('extra_ids', _NUM_SENTINELS)
    if type(count) is not int or not 0 <= count < 2**20:
      raise ValueError(
        f'{path} says extra_ids={count!r}, expected a number; ByT5 has '
        f'{_NUM_SENTINELS}.'
      )
    return [f'<extra_id_{n}>' for n in range(count)]
  added = {
    number: str(token)
    for number, token in tokenizer_files.added_tokens(
      config['added_tokens_decoder'], path, 'added_tokens_decoder'
    ).items()
    if number >= _FIRST_BYTE
  }
  expected = range(_FIRST_SENTINEL, _FIRST_SENTINEL + len(added))
  if sorted(added) != list(expected):
    raise ValueError(
      f'added_tokens_decoder in {path} has the ids {sorted(added)} behind the '
      f'special ones, expected {expected[0]} to {expected[-1]} without a gap.'
    )
  return [added[token] for token in expected]
