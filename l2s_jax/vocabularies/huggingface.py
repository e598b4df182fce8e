# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the package `tokenizers`: `tokenizer.json`, GPT-2's files."""

import copy
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from l2s_jax.runtime import storage
from l2s_jax.vocabularies import (
  auto_tokenizer,
  base,
  tokenizer_files,
  tokenizer_parts,
)


class HuggingFaceVocabulary(base.Vocabulary):
  """A `tokenizer.json` or GPT-2's two files, read by the package tokenizers.

  Special tokens in the text (`</s>`, `<extra_id_0>`) encode to their ids, as in
  transformers. SentencePiece encodes the same text as ordinary characters.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    start_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    contents: Mapping[str, bytes] | None = None,
    said_ids: Mapping[str, Any] | None = None,
  ):
    """Reads a tokenizer and its special tokens.

    Args:
      path: a `tokenizer.json`, or a folder with `vocab.json` and `merges.txt`.
        The special tokens are named by `tokenizer_config.json` and
        `special_tokens_map.json` in the same folder. If these name no EOS, the
        tokenizer's special tokens with well-known names are used.
      start_id: overrides the files; so do `eos_id` and `pad_id`.
      contents: contents of these files; None: read from disk.
      said_ids: see `Vocabulary`.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is broken, `vocab.json` is not GPT-2's, a special
        token is not in the vocabulary, or as `Vocabulary`.
    """
    path = storage.of(path)
    folder = path if path.is_dir() else path.parent
    if contents is not None:
      files = {
        n: c
        for n, c in contents.items()
        if n not in tokenizer_files.SPECIAL_FILES
      }
      side_files = {
        n: c for n, c in contents.items() if n in tokenizer_files.SPECIAL_FILES
      }
    else:
      if path.is_dir():
        files = {
          name: tokenizer_files.read(path / name)
          for name in tokenizer_files.GPT2_FILES
        }
      else:
        files = {tokenizer_files.TOKENIZER_FILE: tokenizer_files.read(path)}
      side_files = tokenizer_files.read_special_files(folder)
    tokenizer = _hugging_face_tokenizer(files, path)
    added = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.get_vocab().values()
    super().__init__(
      path,
      {**files, **side_files},
      vocab_size=max(ids) + 1,
      special_ids=base.special_ids(tokenizer, side_files, folder),
      start_id=start_id,
      eos_id=eos_id,
      pad_id=pad_id,
      num_plain_ids=max((n for n in ids if n not in added), default=0) + 1,
      said_ids=said_ids,
    )
    # True for a folder resolved like in transformers, False for a single file.
    self.is_resolved = contents is not None
    self._says_bos = False
    self._silent_ids = {
      self._special_ids[kind]
      for kind in ('bos', 'eos', 'pad')
      if kind in self._special_ids
    }

  @functools.cached_property
  def _processor(self) -> tokenizers.Tokenizer:
    return _hugging_face_tokenizer(self._files, self.path)

  def copy_tokenizer(self) -> tokenizers.Tokenizer:
    """Returns an independent `tokenizers.Tokenizer` with equal results."""
    return tokenizers.Tokenizer.from_str(self._processor.to_str())

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Saves the files, with a class that reads tokenizer.json unchanged.

    See `Vocabulary.save`.
    """
    if self.is_resolved or tokenizer_files.TOKENIZER_FILE not in self._files:
      return super().save(folder)
    config = json.loads(self._files.get(tokenizer_files.CONFIG_FILE, b'{}'))
    for key in ('added_tokens_decoder', 'extra_special_tokens'):
      config.pop(key, None)
    config.pop('additional_special_tokens', None)
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    for kind, number in self.special_ids.items():
      config[f'{kind}_token'] = self._processor.id_to_token(number)
    plain = copy.copy(self)
    plain.is_resolved = True
    plain._files = {
      name: content
      for name, content in self._files.items()
      if name not in tokenizer_files.SPECIAL_FILES
    } | {
      tokenizer_files.CONFIG_FILE: (
        json.dumps(config, indent=2) + '\n'
      ).encode()
    }
    return plain.save(folder)

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    """Ids the tokenizer prepends to a text: BOS, or none.

    The post-processor decides, then `add_bos_token`. Without either, Llama and
    Gemma tokenizers prepend BOS; these models give poor results without it.
    """
    text = 'a'
    ids = self._processor.encode(text, add_special_tokens=True).ids
    (first, *_) = self._processor.encode(text, add_special_tokens=False).ids
    prefix = tuple(ids[: ids.index(first)])
    if prefix or self.bos_id is None or not self._says_bos:
      return prefix
    return (self.bos_id,)

  def _encode(self, text: str) -> list[int]:
    try:
      return self._processor.encode(text, add_special_tokens=False).ids
    except BaseException as error:
      if not tokenizer_files.is_of_package(error):
        raise
      raise ValueError(
        f'{self.path} is a broken tokenizer: it fails on the text '
        f'{base.shortened(text)!r}. Copy or download it again.'
      ) from error

  def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    try:
      # The fast variant omits the offsets of tokens.
      found = self._processor.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    except BaseException as error:
      if not tokenizer_files.is_of_package(error):
        raise
      return [self._encode(text) for text in texts]  # The error names the text.
    return [encoding.ids for encoding in found]

  def _decode(self, ids: list[int]) -> str:
    # skip_special_tokens would also drop <unk> and the sentinels; SentencePiece
    # keeps both.
    return self._processor.decode(
      [token for token in ids if token not in self._silent_ids],
      skip_special_tokens=False,
    )


def _hugging_face_tokenizer(
  files: Mapping[str, bytes], path: str | os.PathLike[str]
) -> tokenizers.Tokenizer:
  """Builds a tokenizer without truncation and padding."""
  if tokenizer_files.TOKENIZER_FILE in files:
    content = files[tokenizer_files.TOKENIZER_FILE]
  else:
    content = gpt2_json(files, path)
  file = storage.of(path)
  auto_tokenizer.check(tokenizer_files.parse_json(content, file), file)
  with tokenizer_files.refusing(path):
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.decode(tokenizer.encode('a', add_special_tokens=False).ids)
  if not tokenizer.get_vocab():
    raise ValueError(f'{path} is not a Hugging Face tokenizer: it is empty.')
  return tokenizer


def gpt2_json(
  files: Mapping[str, bytes], path: str | os.PathLike[str]
) -> bytes:
  """Converts GPT-2's two files to an equivalent `tokenizer.json`.

  Raises:
    ValueError: if `vocab.json` is not GPT-2's.
  """
  folder = storage.of(path)
  vocab, merges = tokenizer_parts.parse_gpt2_files(
    [files[name] for name in tokenizer_files.GPT2_FILES], folder
  )
  content = tokenizer_parts.gpt2_json(vocab, merges)
  if content is None:
    raise ValueError(
      f'{folder / tokenizer_files.GPT2_FILES[0]} has no '
      f'{tokenizer_parts.GPT2_EOS}, so it is not a tokenizer of GPT-2, and '
      'other tokenizers may split text differently; add its tokenizer.json.'
    )
  return json.dumps(content).encode()
