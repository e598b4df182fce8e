# SPDX-License-Identifier: Apache-2.0
"""The interface of all tokenizers: encoding, decoding and special ids.

Batching, truncation and EOS are in `data/`; the `seqio.Vocabulary` adapter is
in `data/features.py`.
"""

import abc
import copy
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from l2s_jax.runtime import files as files_lib
from l2s_jax.runtime import storage
from l2s_jax.vocabularies import (
  tokenizer_files,
)

# Names of special tokens, searched in the tokenizer if no other file names an
# EOS.
WELL_KNOWN_TOKENS = {
  'bos': ('<s>', '<bos>', '<|begin_of_text|>'),
  'eos': ('</s>', '<eos>', '<|end_of_text|>', '<|endoftext|>', '<|im_end|>'),
  'pad': ('<pad>', '[PAD]'),
  'unk': ('<unk>', '[UNK]'),
}


class Vocabulary(abc.ABC):
  """A tokenizer with a copy of its files.

  Two vocabularies are equal if their fingerprints are. Copies and pickles carry
  the files; the tokenizer itself is built again at first use.

  Attributes:
    path: path of the tokenizer, for messages.
    origin: folder of the tokenizer, if any.
    vocab_size: largest id + 1, extra ids included.
    num_plain_ids: largest id of a text without added or special tokens, + 1.
    table_rows: number of rows of the model's embedding table; None: unknown.
    start_id: first decoder input token: `decoder_start_token_id` of the model's
      folder, else BOS if the tokenizer has one, else the pad token (T5), else
      EOS (GPT-2).
    eos_id: id appended to prompts and answers.
    eos_ids: all ids that end an answer, `eos_id` first. A model's folder may
      name several, as for Llama 3 and Gemma.
    bos_id: first id of a text, for models with BOS; None without one.
    pad_id: id in masked slots, without further meaning: 0 if neither tokenizer
      nor model names one, although 0 is `!` in GPT-2 and `<unk>` in Llama.
    unk_id: id of unknown text; None for tokenizers without one.
  """

  path: str
  vocab_size: int
  num_plain_ids: int
  table_rows: int | None
  start_id: int
  eos_id: int
  eos_ids: tuple[int, ...]
  bos_id: int | None
  pad_id: int
  unk_id: int | None

  def __init__(
    self,
    path: pathlib.Path,
    files: Mapping[str, bytes],
    *,
    vocab_size: int,
    special_ids: Mapping[str, int],
    start_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    num_plain_ids: int | None = None,
    said_ids: Mapping[str, Any] | None = None,
  ):
    """Stores the files and determines the special ids.

    Args:
      path: path of the tokenizer, for error messages.
      files: file contents by name, as `load` finds them in a folder.
      vocab_size: largest id + 1.
      special_ids: ids of `bos`, `eos`, `pad`, `unk` in the files, and any
        others that distinguish this vocabulary from one with the same files.
      start_id: overrides the derived id; so do `eos_id` and `pad_id`.
      num_plain_ids: see the class; None: `vocab_size`.
      said_ids: ids in the model's folder, from `tokenizer_files.said_ids`.

    Raises:
      ValueError: if there is no EOS, or an id is outside the vocabulary.
    """
    said = dict(said_ids or {})
    special_ids = dict(special_ids)
    said_eos = said.get('eos_token_id') or []
    for kind, value in (
      ('eos', said_eos[0] if said_eos else None),
      ('pad', said.get('pad_token_id')),
    ):
      if value is not None and value < vocab_size:
        special_ids.setdefault(kind, value)
    if eos_id is None:
      if 'eos' not in special_ids:
        raise ValueError(f'{path} has no end-of-sequence token; pass eos_id=.')
      eos_id = special_ids['eos']
      eos_ids = (eos_id, *said_eos)
    else:
      eos_ids = (eos_id,)
    if pad_id is None:
      pad_id = special_ids.get('pad', 0)
    bos_id = special_ids.get('bos', said.get('bos_token_id'))
    if start_id is None:
      start_id = said.get(
        'decoder_start_token_id',
        bos_id if bos_id is not None else special_ids.get('pad', eos_id),
      )
    for name, value in (
      ('start_id', start_id),
      ('eos_id', eos_id),
      ('pad_id', pad_id),
    ):
      if not 0 <= value < vocab_size:
        raise ValueError(
          f'{name}={value} is not an id of {path}: 0 to {vocab_size - 1}.'
        )
    self.path = str(path)
    self.vocab_size = vocab_size
    self.num_plain_ids = vocab_size if num_plain_ids is None else num_plain_ids
    self.table_rows = None
    self.start_id = start_id
    self.eos_id = eos_id
    self.eos_ids = tuple(dict.fromkeys(eos_ids))
    self.bos_id = bos_id
    self.pad_id = pad_id
    self.unk_id = special_ids.get('unk')
    self._files = dict(files)
    self._special_ids = special_ids
    self.origin: pathlib.Path | None = None
    if said:
      self._files[tokenizer_files.GENERATION_FILE] = (
        json.dumps(said, indent=2, sort_keys=True) + '\n'
      ).encode()

  @property
  def has_pad(self) -> bool:
    """Whether the files name a pad token; if not, `pad_id` is 0."""
    return 'pad' in self._special_ids

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    """Ids in front of a text that a language model continues."""
    return () if self.bos_id is None else (self.bos_id,)

  @property
  def special_ids(self) -> dict[str, int]:
    """Ids of the bos, eos, pad and unk tokens named by the files."""
    return {
      kind: self._special_ids[kind]
      for kind in WELL_KNOWN_TOKENS
      if kind in self._special_ids
    }

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without start token and EOS.

    Raises:
      ValueError: if an id is beyond the embedding table.
    """
    ids = self._encode(text)
    if not self.has_rows_for_all:
      self._check_rows(text, ids)
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, as `encode`, in one call of the library."""
    found = self._encode_batch(texts)
    if self.has_rows_for_all:
      return found
    for text, ids in zip(texts, found, strict=True):
      self._check_rows(text, ids)
    return found

  def _check_rows(self, text: str, ids: list[int]) -> None:
    num_rows = self.table_rows or 0
    if max(ids, default=0) < num_rows:
      return
    found = next(token for token in ids if token >= num_rows)
    raise ValueError(
      f'the text {shortened(text)!r} contains the token '
      f'{self._decode([found])!r}, id {found} of {self.path}, but the '
      f"model's embedding table has {self.table_rows} rows. Remove the token "
      'from the text, or use a model that has it.'
    )

  @property
  def has_rows_for_all(self) -> bool:
    """Whether the embedding table has a row for each id, or is unknown."""
    return self.table_rows is None or self.vocab_size <= self.table_rows

  def for_table(self, num_rows: int) -> 'Vocabulary':
    """Returns a copy bound to an embedding table with `num_rows` rows.

    Ids beyond the table belong to tokens that ordinary text does not contain,
    such as Gemma 3's image tokens. Text with such a token is refused.

    Args:
      num_rows: number of rows of the embedding table.

    Raises:
      ValueError: if ordinary text has ids beyond the table, or the start, EOS
        or pad id is one.
    """
    needed = max(self.num_plain_ids, self.start_id + 1, self.eos_id + 1)
    if max(needed, self.pad_id + 1) > num_rows:
      raise ValueError(
        f'The tokenizer {self.path} has {self.vocab_size} ids, but the '
        f"model's embedding table has {num_rows} rows "
        '(TransformerConfig.vocab_size). Use the tokenizer that the model was '
        'trained with.'
      )
    if self.table_rows is not None:
      num_rows = min(num_rows, self.table_rows)
    bound = copy.copy(self)
    bound.__dict__.update(self.__dict__)  # Shares the built tokenizer.
    bound.table_rows = num_rows
    return bound

  @abc.abstractmethod
  def _encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, including ids beyond the embedding table."""

  def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text; in one call if the library supports it."""
    return [self._encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids before the first EOS.

    BOS, EOS and pad tokens are dropped. An id outside the vocabulary decodes as
    unknown text, or is dropped if the tokenizer has no unknown token.
    """
    kept: list[int | None] = []
    for token in map(int, ids):
      if token in self.eos_ids:
        break
      kept.append(token if 0 <= token < self.vocab_size else self.unk_id)
    return self._decode([token for token in kept if token is not None])

  @abc.abstractmethod
  def _decode(self, ids: list[int]) -> str:
    """Returns the text of ids, all inside the vocabulary."""

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the tokenizer's files for `load(folder)`, each atomically.

    Extra ids are written into the model. Ids passed to `load` are stored in no
    file and must be passed again.

    Args:
      folder: target folder.

    Raises:
      ValueError: if the folder has files of another tokenizer, which `load`
        might read instead.
    """
    folder = storage.of(folder)
    strangers = [
      name
      for name in tokenizer_files.ALL_FILES
      if name not in self._files
      and name != tokenizer_files.GENERATION_FILE  # belongs to the model
      and (folder / name).exists()
    ]
    if strangers:
      raise ValueError(
        f'{folder} has {", ".join(strangers)} of another tokenizer besides '
        f'{", ".join(self._files)}; remove them, or save to another folder.'
      )
    for name, content in self._files.items():
      if name == tokenizer_files.CONFIG_FILE:
        content = tokenizer_files.without_code(content, folder / name)
      with files_lib.whole(folder / name, 'wb') as file:
        file.write(content)

  def fingerprint(self) -> str:
    """Returns the SHA-256, in hex, of the tokenizer files and special ids."""
    ids: tuple[Any, ...] = (
      self.start_id,
      self.eos_id,
      self.pad_id,
      sorted(self._special_ids.items()),
    )
    if len(self.eos_ids) > 1:
      ids += (sorted(self.eos_ids),)
    digest = hashlib.sha256(repr(ids).encode())
    for name, content in self._files.items():
      if name not in tokenizer_files.WITHOUT_PIECES:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Vocabulary):
      return NotImplemented
    return self.fingerprint() == other.fingerprint()

  def __hash__(self) -> int:
    return hash(self.fingerprint())

  def __repr__(self) -> str:
    return (
      f'{type(self).__name__}({self.path!r}, '
      f'vocab_size={self.vocab_size}, start_id={self.start_id}, '
      f'eos_id={self.eos_id}, pad_id={self.pad_id})'
    )

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_processor'}


def shortened(text: str) -> str:
  """Returns a text cut to 80 characters, for messages."""
  return text if len(text) <= 80 else f'{text[:77]}...'


def special_ids(
  tokenizer: tokenizers.Tokenizer,
  side_files: Mapping[str, bytes],
  folder: pathlib.Path,
) -> dict[str, int]:
  """Returns the ids of the `bos`, `eos`, `pad` and `unk` tokens that exist.

  Args:
    tokenizer: the tokenizer.
    side_files: contents, by name, of the files that name special tokens.
    folder: folder of the files, for messages.

  Raises:
    ValueError: if a named token is not in the vocabulary.
  """
  named: dict[str, str] = {}
  for name, content in side_files.items():
    values = tokenizer_files.parse_json(content, folder / name)
    for kind in WELL_KNOWN_TOKENS:
      key = f'{kind}_token'
      token = tokenizer_files.token_text(values.get(key), folder / name, key)
      if token is not None:
        named[kind] = token
  vocab = tokenizer.get_vocab()
  unknown = [
    f'{kind}_token {token!r}'
    for kind, token in named.items()
    if token not in vocab
  ]
  if unknown:
    raise ValueError(
      f'{", ".join(unknown)}: set in {" or ".join(side_files)} of {folder}, '
      'but not in its vocabulary; correct the name or the tokenizer.'
    )
  if 'eos' not in named:
    special = {
      token.content
      for token in tokenizer.get_added_tokens_decoder().values()
      if token.special
    }
    for kind, names in WELL_KNOWN_TOKENS.items():
      known = [name for name in names if name in special]
      if known:
        named.setdefault(kind, known[0])
  return {kind: vocab[token] for kind, token in named.items()}
