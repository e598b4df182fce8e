# SPDX-License-Identifier: Apache-2.0
"""Tokenizers behind one interface: text to ids and back, without TensorFlow.

SentencePiece models (T5, mT5, Llama, Mistral), Hugging Face `tokenizer.json`
files and GPT-2's `vocab.json` + `merges.txt`; ByT5's bytes are in
`byte_vocabulary.py`. Not here: batching, truncation and appending EOS, which
belong to the data pipeline, and the wrapper that makes one of these a
`seqio.Vocabulary`, which is in `features.py`.
"""

import abc
import functools
import hashlib
import io
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sentencepiece
import tokenizers

from l2s_jax import files

# In the order in which a folder is searched.
_SENTENCEPIECE_FILES = (
  'spiece.model',
  'tokenizer.model',
  'sentencepiece.model',
)
_TOKENIZER_FILE = 'tokenizer.json'
_GPT2_FILES = ('vocab.json', 'merges.txt')
CONFIG_FILE = 'tokenizer_config.json'
BYTE_TOKENIZER = 'ByT5Tokenizer'  # As that file names it; it has no other.
# Name the special tokens; where both do, the second wins, as in transformers.
_SPECIAL_FILES = ('special_tokens_map.json', CONFIG_FILE)
ALL_FILES = (
  *_SENTENCEPIECE_FILES,
  _TOKENIZER_FILE,
  *_GPT2_FILES,
  *_SPECIAL_FILES,
)

# What to look for among a tokenizer's own special tokens when no file beside
# it names an EOS.
_WELL_KNOWN_TOKENS = {
  'bos': ('<s>', '<bos>', '<|begin_of_text|>'),
  'eos': ('</s>', '<eos>', '<|end_of_text|>', '<|endoftext|>', '<|im_end|>'),
  'pad': ('<pad>', '[PAD]'),
  'unk': ('<unk>', '[UNK]'),
}
_GPT2_EOS = '<|endoftext|>'


class Vocabulary(abc.ABC):
  """A tokenizer read from files, of which it keeps a copy.

  Two vocabularies are equal when their fingerprints are. Copies and pickles
  carry the files, not the processor, which is built again on first use.

  Attributes:
    path: where it was loaded from.
    vocab_size: one more than the largest id, extra ids included.
    start_id: the first token of the decoder's input: BOS where the tokenizer
      has one, else its pad token (T5), else EOS (GPT-2). Models trained
      otherwise (BART starts with EOS) need `load(..., start_id=)`.
    eos_id: ends a prompt and an answer.
    pad_id: fills masked slots and means nothing else: 0 where the tokenizer has
      no pad token, although 0 is `!` in GPT-2 and `<unk>` in Llama.
    unk_id: what unknown text becomes, None where nothing is unknown.
  """

  path: str
  vocab_size: int
  start_id: int
  eos_id: int
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
  ):
    """Keeps the files and settles the special ids.

    Args:
      path: named in errors.
      files: content by the name under which `load` finds it in a folder.
      vocab_size: one more than the largest id.
      special_ids: those of `bos`, `eos`, `pad`, `unk` that the files name, and
        any others that tell this vocabulary from one of the same files.
      start_id: overrides the choice; so do `eos_id` and `pad_id`.

    Raises:
      ValueError: if there is no EOS, or an id is outside the vocabulary.
    """
    if eos_id is None:
      if 'eos' not in special_ids:
        raise ValueError(
          f'{path} names no end-of-sequence token; pass eos_id=.'
        )
      eos_id = special_ids['eos']
    if pad_id is None:
      pad_id = special_ids.get('pad', 0)
    if start_id is None:
      start_id = special_ids.get('bos', special_ids.get('pad', eos_id))
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
    self.start_id = start_id
    self.eos_id = eos_id
    self.pad_id = pad_id
    self.unk_id = special_ids.get('unk')
    self._files = dict(files)
    self._special_ids = dict(special_ids)

  @property
  def has_pad(self) -> bool:
    """Whether the files name a pad token; `pad_id` is 0 where they do not."""
    return 'pad' in self._special_ids

  @property
  def special_ids(self) -> dict[str, int]:
    """The ids of bos, eos, pad and unk, of those that the files name."""
    return {
      kind: self._special_ids[kind]
      for kind in _WELL_KNOWN_TOKENS
      if kind in self._special_ids
    }

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, with neither start token nor EOS added."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids before the first EOS.

    BOS, EOS and pad tokens leave no text; an id outside the vocabulary reads as
    unknown text, or as none where the tokenizer knows no unknown.
    """
    kept: list[int | None] = []
    for token in map(int, ids):
      if token == self.eos_id:
        break
      kept.append(token if 0 <= token < self.vocab_size else self.unk_id)
    return self._decode([token for token in kept if token is not None])

  @abc.abstractmethod
  def _decode(self, ids: list[int]) -> str:
    """Returns the text of ids that are all in the vocabulary."""

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the tokenizer's files, each atomically, for `load(folder)`.

    Extra ids are written into the model; ids passed to `load` are in no file
    and must be passed again.

    Raises:
      ValueError: if the folder holds files of another tokenizer, which `load`
        might read instead.
    """
    folder = pathlib.Path(folder)
    strangers = [
      name
      for name in ALL_FILES
      if name not in self._files and (folder / name).exists()
    ]
    if strangers:
      raise ValueError(
        f'{folder} holds {", ".join(strangers)} of another tokenizer beside '
        f'{", ".join(self._files)}; remove them or save elsewhere.'
      )
    for name, content in self._files.items():
      with files.whole(folder / name, 'wb') as file:
        file.write(content)

  def fingerprint(self) -> str:
    """Returns the SHA-256, in hex, of the tokenizer and its special ids."""
    digest = hashlib.sha256(
      repr(
        (
          self.start_id,
          self.eos_id,
          self.pad_id,
          sorted(self._special_ids.items()),
        )
      ).encode()
    )
    for name, content in self._files.items():
      if name not in _SPECIAL_FILES:  # They act through the ids alone.
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


class SentencePieceVocabulary(Vocabulary):
  """A SentencePiece model. Special tokens in the text are plain text to it."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    extra_ids: int = 0,
    start_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
  ):
    """Reads a SentencePiece model.

    Args:
      path: the model file.
      extra_ids: how many sentinels `<extra_id_N>` the vocabulary must have;
        missing ones are appended, the highest N first, as SeqIO does (T5:
        100, `<extra_id_0>` is 32099). Text that starts a word with one encodes
        to its id. mT5's model already has its 100.
      start_id: overrides the file; so do `eos_id` and `pad_id`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a SentencePiece model, or as `Vocabulary`.
    """
    path = pathlib.Path(path)
    content = _read(path)
    processor = _sentencepiece_processor(content, path)
    sentinels = [f'▁<extra_id_{n}>' for n in reversed(range(extra_ids))]
    missing = [
      piece
      for piece in sentinels
      if processor.piece_to_id(piece) == processor.unk_id()
    ]
    content += b''.join(map(_user_defined_piece, missing))
    ids = {
      'bos': processor.bos_id(),
      'eos': processor.eos_id(),
      'pad': processor.pad_id(),
      'unk': processor.unk_id(),
    }
    name = path.name if path.name in _SENTENCEPIECE_FILES else 'spiece.model'
    super().__init__(
      path,
      {name: content},
      vocab_size=len(processor) + len(missing),
      special_ids={k: v for k, v in ids.items() if v >= 0},
      start_id=start_id,
      eos_id=eos_id,
      pad_id=pad_id,
    )

  @functools.cached_property
  def _processor(self) -> sentencepiece.SentencePieceProcessor:
    (content,) = self._files.values()
    return _sentencepiece_processor(content, self.path)

  def encode(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def _decode(self, ids: list[int]) -> str:
    return self._processor.decode(ids)


class HuggingFaceVocabulary(Vocabulary):
  """A `tokenizer.json`, or GPT-2's files, read by the package tokenizers.

  Special tokens written in the text (`</s>`, `<extra_id_0>`) encode to their
  ids, as in transformers; SentencePiece reads the same text letter by letter.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    start_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
  ):
    """Reads a tokenizer and the special tokens named beside it.

    Args:
      path: a `tokenizer.json`, or a folder with `vocab.json` and `merges.txt`.
        The special tokens are those of `tokenizer_config.json` and
        `special_tokens_map.json` in the same folder; where these name no EOS,
        those that the tokenizer marks special and whose names are well known.
      start_id: overrides the files; so do `eos_id` and `pad_id`.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is broken, `vocab.json` is not GPT-2's, a special
        token is not in the vocabulary, or as `Vocabulary`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
      folder = path
      files = {name: _read(path / name) for name in _GPT2_FILES}
    else:
      folder = path.parent
      files = {_TOKENIZER_FILE: _read(path)}
    tokenizer = _hugging_face_tokenizer(files, path)
    side_files = read_special_files(folder)
    super().__init__(
      path,
      {**files, **side_files},
      vocab_size=max(tokenizer.get_vocab().values()) + 1,
      special_ids=_special_ids(tokenizer, side_files, folder),
      start_id=start_id,
      eos_id=eos_id,
      pad_id=pad_id,
    )
    self._silent_ids = {
      self._special_ids[kind]
      for kind in ('bos', 'eos', 'pad')
      if kind in self._special_ids
    }

  @functools.cached_property
  def _processor(self) -> tokenizers.Tokenizer:
    return _hugging_face_tokenizer(self._files, self.path)

  def encode(self, text: str) -> list[int]:
    return self._processor.encode(text, add_special_tokens=False).ids

  def _decode(self, ids: list[int]) -> str:
    # Not skip_special_tokens: it would drop <unk> and the sentinels too, which
    # SentencePiece shows.
    return self._processor.decode(
      [token for token in ids if token not in self._silent_ids],
      skip_special_tokens=False,
    )


def load(
  path: str | os.PathLike[str],
  *,
  extra_ids: int = 0,
  start_id: int | None = None,
  eos_id: int | None = None,
  pad_id: int | None = None,
) -> Vocabulary:
  """Reads a vocabulary from a file or from a folder with a known one.

  Args:
    path: a SentencePiece `.model`, a Hugging Face `.json`, or a folder, where
      `spiece.model`, `tokenizer.model`, `sentencepiece.model`,
      `tokenizer.json`, `vocab.json` with `merges.txt`, and a
      `tokenizer_config.json` of ByT5 are looked for, in this order.
    extra_ids: see `SentencePieceVocabulary`; other kinds bring their own.
    start_id: overrides the files; so do `eos_id` and `pad_id`.

  Raises:
    FileNotFoundError: if the path is missing, or a folder without a known file.
    ValueError: if the file is of no known kind or broken.
  """
  from l2s_jax import byte_vocabulary

  path = _find(pathlib.Path(path))
  overrides = {'start_id': start_id, 'eos_id': eos_id, 'pad_id': pad_id}
  if path.suffix == '.model':
    return SentencePieceVocabulary(path, extra_ids=extra_ids, **overrides)
  if extra_ids:
    raise ValueError(
      f'extra_ids={extra_ids} is for SentencePiece models; {path} has its '
      'own special tokens. Set extra_ids=0.'
    )
  if path.name == CONFIG_FILE:
    return byte_vocabulary.ByteVocabulary(path, **overrides)
  if path.is_dir() or path.suffix == '.json':
    return HuggingFaceVocabulary(path, **overrides)
  raise ValueError(
    f'{path} is not a tokenizer file: expected a SentencePiece model '
    '(*.model), a tokenizer.json, or a folder with one of them.'
  )


def train_sentencepiece(
  texts: Iterable[str],
  path: str | os.PathLike[str],
  *,
  vocab_size: int,
  **options: Any,
) -> SentencePieceVocabulary:
  """Trains a T5-like unigram model, writes it to `path` and returns it.

  pad is 0, EOS 1, unknown 2, and there is no BOS. The same texts in the same
  order give the same bytes.

  Args:
    texts: any number of lines each.
    path: the `.model` file to write, atomically.
    vocab_size: pieces, the three special ones included.
    **options: SentencePiece trainer options that replace ours, such as
      `byte_fallback=True` or `character_coverage=1.0`.

  Raises:
    ValueError: if SentencePiece refuses: no text, a `vocab_size` that does not
      fit the texts, an unknown option.
  """
  model = io.BytesIO()
  settings = {
    'model_type': 'unigram',
    'pad_id': 0,
    'eos_id': 1,
    'unk_id': 2,
    'bos_id': -1,
    'num_threads': 1,  # The order of float sums must not depend on threads.
    'max_sentence_length': 2**20,  # Bytes; longer lines are dropped unsaid.
    'minloglevel': 2,
    **options,
  }
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_lines(texts),
      model_writer=model,
      vocab_size=vocab_size,
      **settings,
    )
  except RuntimeError as error:
    raise ValueError(
      f'cannot train {path} with vocab_size={vocab_size}, '
      f'options {options}: {error}'
    ) from error
  with files.whole(path, 'wb') as file:
    file.write(model.getvalue())
  return SentencePieceVocabulary(path)


def _find(path: pathlib.Path) -> pathlib.Path:
  """Returns the file, or the GPT-2 folder, that `path` stands for.

  A `tokenizer_config.json` stands for ByT5's bytes.
  """
  if not path.exists():
    raise FileNotFoundError(f'{path} is missing: expected a tokenizer there.')
  if not path.is_dir():
    return path
  for name in (*_SENTENCEPIECE_FILES, _TOKENIZER_FILE):
    if (path / name).exists():
      return path / name
  if all((path / name).exists() for name in _GPT2_FILES):
    return path
  config_file = path / CONFIG_FILE
  if config_file.exists():
    config = parse_json(_read(config_file), config_file)
    if config.get('tokenizer_class') == BYTE_TOKENIZER:
      return config_file
  raise FileNotFoundError(
    f'{path} holds no tokenizer: looked for '
    f'{", ".join((*_SENTENCEPIECE_FILES, _TOKENIZER_FILE))}, '
    f'{" with ".join(_GPT2_FILES)} and {CONFIG_FILE} of a {BYTE_TOKENIZER}.'
  )


def read_special_files(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns the files in a folder that name a tokenizer's special tokens."""
  return {
    name: _read(folder / name)
    for name in _SPECIAL_FILES
    if (folder / name).exists()
  }


def _read(path: pathlib.Path) -> bytes:
  if not path.is_file():
    raise FileNotFoundError(
      f'{path} is missing: expected a tokenizer file there.'
    )
  return path.read_bytes()


def _lines(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    yield from text.splitlines()


def _sentencepiece_processor(
  content: bytes, path: str | os.PathLike[str]
) -> sentencepiece.SentencePieceProcessor:
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(content)
  except RuntimeError as error:
    raise ValueError(f'{path} is not a SentencePiece model: {error}') from error
  return processor


def _user_defined_piece(piece: str) -> bytes:
  """Returns bytes that add a piece when appended to a SentencePiece model.

  A model is a protocol buffer, whose repeated fields grow by concatenation:
  field 1 of ModelProto is a piece, with 1 its text, 2 its score (float) and
  3 its type (4, USER_DEFINED). Written by hand, this needs no protobuf package.
  """
  text = piece.encode()
  message = (
    bytes([0x0A, len(text)])
    + text
    + b'\x15'
    + struct.pack('<f', 0.0)
    + b'\x18\x04'
  )
  return bytes([0x0A, len(message)]) + message


def _hugging_face_tokenizer(
  files: Mapping[str, bytes], path: str | os.PathLike[str]
) -> tokenizers.Tokenizer:
  """Builds a tokenizer that neither truncates nor pads."""
  if _TOKENIZER_FILE in files:
    content = files[_TOKENIZER_FILE]
  else:
    content = _gpt2_json(files, path)
  try:
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
  except ValueError as error:
    raise ValueError(
      f'{path} is not a Hugging Face tokenizer: {error}'
    ) from error
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _gpt2_json(
  files: Mapping[str, bytes], path: str | os.PathLike[str]
) -> bytes:
  """Returns the `tokenizer.json` that GPT-2's two files amount to."""
  vocab_file, merges_file = (pathlib.Path(path, name) for name in _GPT2_FILES)
  vocab = parse_json(files['vocab.json'], vocab_file)
  if _GPT2_EOS not in vocab:
    raise ValueError(
      f'{vocab_file} has no {_GPT2_EOS}, so it is not of GPT-2, and another '
      'model may split text otherwise; give its tokenizer.json.'
    )
  merges = [
    line.split(' ')
    for line in files['merges.txt'].decode().split('\n')
    if line and not line.startswith('#version')
  ]
  for pair in merges:
    # The tokenizers package panics on some of these, past any `except`.
    if len(pair) != 2 or not {*pair, ''.join(pair)} <= vocab.keys():
      raise ValueError(
        f'{merges_file} merges {pair}: expected two pieces that are, like '
        f'what they make, in {vocab_file}.'
      )
  byte_level = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': True,
  }
  flags = dict.fromkeys(
    ('single_word', 'lstrip', 'rstrip', 'normalized'), False
  )
  return json.dumps(
    {
      'added_tokens': [
        {'id': vocab[_GPT2_EOS], 'content': _GPT2_EOS, 'special': True, **flags}
      ],
      'pre_tokenizer': byte_level,
      'decoder': byte_level,
      'model': {'type': 'BPE', 'vocab': vocab, 'merges': merges},
    }
  ).encode()


def _special_ids(
  tokenizer: tokenizers.Tokenizer,
  side_files: Mapping[str, bytes],
  folder: pathlib.Path,
) -> dict[str, int]:
  """Returns the ids of `bos`, `eos`, `pad` and `unk`, where they exist."""
  named: dict[str, str] = {}
  for name, content in side_files.items():
    values = parse_json(content, folder / name)
    for kind in _WELL_KNOWN_TOKENS:
      token = values.get(f'{kind}_token')
      if token is not None:
        named[kind] = token['content'] if isinstance(token, dict) else token
  vocab = tokenizer.get_vocab()
  unknown = [
    f'{kind}_token {token!r}'
    for kind, token in named.items()
    if token not in vocab
  ]
  if unknown:
    raise ValueError(
      f'{", ".join(unknown)}: named by {" or ".join(side_files)} in {folder} '
      'but not in the vocabulary there; correct the name or the tokenizer.'
    )
  if 'eos' not in named:
    special = {
      token.content
      for token in tokenizer.get_added_tokens_decoder().values()
      if token.special
    }
    for kind, names in _WELL_KNOWN_TOKENS.items():
      known = [name for name in names if name in special]
      if known:
        named.setdefault(kind, known[0])
  return {kind: vocab[token] for kind, token in named.items()}


def parse_json(content: bytes, path: pathlib.Path) -> dict[str, Any]:
  """Returns the object that a JSON file holds, or names the file."""
  try:
    value = json.loads(content)
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(
      f'{path} holds a JSON {type(value).__name__}, expected an object.'
    )
  return value
