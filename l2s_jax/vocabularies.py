# SPDX-License-Identifier: Apache-2.0
"""Tokenizers behind one interface: text to ids and back, without TensorFlow.

SentencePiece models (T5, mT5, Llama, Mistral), Hugging Face `tokenizer.json`
files and GPT-2's `vocab.json` + `merges.txt`; ByT5's bytes are in
`byte_vocabulary.py`. Not here: batching, truncation and appending EOS, which
belong to the data pipeline, and the wrapper that makes one of these a
`seqio.Vocabulary`, which is in `features.py`.
"""

import abc
import copy
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from l2s_jax import auto_tokenizer, files, tokenizer_files, tokenizer_parts

_SENTENCEPIECE_FILES = tokenizer_files.SENTENCEPIECE_FILES
_TOKENIZER_FILE = tokenizer_files.TOKENIZER_FILE
_GPT2_FILES = tokenizer_files.GPT2_FILES
CONFIG_FILE = tokenizer_files.CONFIG_FILE
# Classes of tokenizers that begin a text with BOS unless told otherwise.
_WITH_BOS = ('Llama', 'Gemma')
BYTE_TOKENIZER = 'ByT5Tokenizer'  # As that file names it; it has no other.
_SPECIAL_FILES = tokenizer_files.SPECIAL_FILES
# They act through the ids alone.
_WITHOUT_PIECES = (*_SPECIAL_FILES, tokenizer_files.GENERATION_FILE)
ALL_FILES = tokenizer_files.ALL_FILES
parse_json = tokenizer_files.parse_json
_read = tokenizer_files.read

# What to look for among a tokenizer's own special tokens when no file beside
# it names an EOS.
_WELL_KNOWN_TOKENS = {
  'bos': ('<s>', '<bos>', '<|begin_of_text|>'),
  'eos': ('</s>', '<eos>', '<|end_of_text|>', '<|endoftext|>', '<|im_end|>'),
  'pad': ('<pad>', '[PAD]'),
  'unk': ('<unk>', '[UNK]'),
}


class Vocabulary(abc.ABC):
  """A tokenizer read from files, of which it keeps a copy.

  Two vocabularies are equal when their fingerprints are. Copies and pickles
  carry the files, not the processor, which is built again on first use.

  Attributes:
    path: where it was loaded from, for people.
    origin: the folder that it was loaded from, if any.
    vocab_size: one more than the largest id, extra ids included.
    num_plain_ids: one more than the largest id that a text may give which names
      no added or special token.
    table_rows: of the embedding table that the ids are for; None: not known.
    start_id: the first token of the decoder's input: what the model's folder
      says (`decoder_start_token_id`), else BOS where the tokenizer has one,
      else its pad token (T5), else EOS (GPT-2).
    eos_id: put behind a prompt and an answer.
    eos_ids: all that end an answer, `eos_id` first; a model's folder may name
      several, as those of Llama 3 and Gemma do.
    bos_id: begins a text where that is the model's way; None without one.
    pad_id: fills masked slots and means nothing else: 0 where neither tokenizer
      nor model has one, although 0 is `!` in GPT-2 and `<unk>` in Llama.
    unk_id: what unknown text becomes, None where nothing is unknown.
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
    """Keeps the files and settles the special ids.

    Args:
      path: named in errors.
      files: content by the name under which `load` finds it in a folder.
      vocab_size: one more than the largest id.
      special_ids: those of `bos`, `eos`, `pad`, `unk` that the files name, and
        any others that tell this vocabulary from one of the same files.
      start_id: overrides the choice; so do `eos_id` and `pad_id`.
      num_plain_ids: see above; None: as many as there are.
      said_ids: what the model's folder says, as `tokenizer_files.said_ids`.

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
        raise ValueError(
          f'{path} names no end-of-sequence token; pass eos_id=.'
        )
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
    """Whether the files name a pad token; `pad_id` is 0 where they do not."""
    return 'pad' in self._special_ids

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    """The ids that go in front of a text that a model is to continue."""
    return () if self.bos_id is None else (self.bos_id,)

  @property
  def special_ids(self) -> dict[str, int]:
    """The ids of bos, eos, pad and unk, of those that the files name."""
    return {
      kind: self._special_ids[kind]
      for kind in _WELL_KNOWN_TOKENS
      if kind in self._special_ids
    }

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, with neither start token nor EOS added.

    Raises:
      ValueError: if it names a token for which the model has no embedding.
    """
    ids = self._encode(text)
    if self.has_rows_for_all or max(ids, default=0) < (self.table_rows or 0):
      return ids
    found = next(token for token in ids if token >= (self.table_rows or 0))
    raise ValueError(
      f'the text {_shortened(text)!r} holds the token '
      f'{self._decode([found])!r}, id {found} of {self.path}, and the '
      f"model's embedding table has {self.table_rows} rows. Take it out of the "
      'text, or use a model that knows it.'
    )

  @property
  def has_rows_for_all(self) -> bool:
    """Whether the embedding table, if it is known, has a row for each id."""
    return self.table_rows is None or self.vocab_size <= self.table_rows

  def for_table(self, num_rows: int) -> 'Vocabulary':
    """Returns the vocabulary of a model whose table has so many rows.

    Ids beyond them are those of tokens that no ordinary text gives, such as
    Gemma 3's for images; a text that names one is refused.

    Raises:
      ValueError: if ordinary text gives such ids, or the answer's start, EOS
        or padding is one.
    """
    needed = max(self.num_plain_ids, self.start_id + 1, self.eos_id + 1)
    if max(needed, self.pad_id + 1) > num_rows:
      raise ValueError(
        f'The tokenizer {self.path} has {self.vocab_size} ids, but the '
        f"model's embedding table has {num_rows} rows "
        '(TransformerConfig.vocab_size). Use the tokenizer that the model was '
        'made with.'
      )
    if self.table_rows is not None:
      num_rows = min(num_rows, self.table_rows)
    bound = copy.copy(self)
    bound.__dict__.update(self.__dict__)  # The processor too.
    bound.table_rows = num_rows
    return bound

  @abc.abstractmethod
  def _encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, whether or not the table has them."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids before the first that ends an answer.

    BOS, EOS and pad tokens leave no text; an id outside the vocabulary reads as
    unknown text, or as none where the tokenizer knows no unknown.
    """
    kept: list[int | None] = []
    for token in map(int, ids):
      if token in self.eos_ids:
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
      if name not in self._files
      and name != tokenizer_files.GENERATION_FILE  # of the model, not of us
      and (folder / name).exists()
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
      if name not in _WITHOUT_PIECES:
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
    said_ids: Mapping[str, Any] | None = None,
  ):
    """Reads a SentencePiece model.

    Args:
      path: the model file.
      extra_ids: how many sentinels `<extra_id_N>` the vocabulary must have;
        missing ones are appended, the highest N first, as SeqIO does (T5:
        100, `<extra_id_0>` is 32099). Text that starts a word with one encodes
        to its id. mT5's model already has its 100.
      start_id: overrides the file; so do `eos_id` and `pad_id`.
      said_ids: see `Vocabulary`.

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
    content += _user_defined_pieces(missing)
    ids = {
      'bos': processor.bos_id(),
      'eos': processor.eos_id(),
      'pad': processor.pad_id(),
      'unk': processor.unk_id(),
    }
    name = path.name if path.name in _SENTENCEPIECE_FILES else 'spiece.model'
    plain = [
      n
      for n in range(len(processor))
      if not (processor.is_control(n) or processor.is_unused(n))
    ]
    super().__init__(
      path,
      {name: content},
      vocab_size=len(processor) + len(missing),
      special_ids={k: v for k, v in ids.items() if v >= 0},
      start_id=start_id,
      eos_id=eos_id,
      pad_id=pad_id,
      num_plain_ids=max(plain, default=0) + 1,
      said_ids=said_ids,
    )

  @property
  def model(self) -> bytes:
    """The model file's content, the extra ids included."""
    (content,) = (
      content
      for name, content in self._files.items()
      if name in _SENTENCEPIECE_FILES
    )
    return content

  @functools.cached_property
  def _processor(self) -> sentencepiece.SentencePieceProcessor:
    return _sentencepiece_processor(self.model, self.path)

  def _encode(self, text: str) -> list[int]:
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
    contents: Mapping[str, bytes] | None = None,
    said_ids: Mapping[str, Any] | None = None,
  ):
    """Reads a tokenizer and the special tokens named beside it.

    Args:
      path: a `tokenizer.json`, or a folder with `vocab.json` and `merges.txt`.
        The special tokens are those of `tokenizer_config.json` and
        `special_tokens_map.json` in the same folder; where these name no EOS,
        those that the tokenizer marks special and whose names are well known.
      start_id: overrides the files; so do `eos_id` and `pad_id`.
      contents: of these files, where they are not those of the disk.
      said_ids: see `Vocabulary`.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is broken, `vocab.json` is not GPT-2's, a special
        token is not in the vocabulary, or as `Vocabulary`.
    """
    path = pathlib.Path(path)
    folder = path if path.is_dir() else path.parent
    if contents is not None:
      files = {n: c for n, c in contents.items() if n not in _SPECIAL_FILES}
      side_files = {n: c for n, c in contents.items() if n in _SPECIAL_FILES}
    else:
      if path.is_dir():
        files = {name: _read(path / name) for name in _GPT2_FILES}
      else:
        files = {_TOKENIZER_FILE: _read(path)}
      side_files = read_special_files(folder)
    tokenizer = _hugging_face_tokenizer(files, path)
    added = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.get_vocab().values()
    super().__init__(
      path,
      {**files, **side_files},
      vocab_size=max(ids) + 1,
      special_ids=_special_ids(tokenizer, side_files, folder),
      start_id=start_id,
      eos_id=eos_id,
      pad_id=pad_id,
      num_plain_ids=max((n for n in ids if n not in added), default=0) + 1,
      said_ids=said_ids,
    )
    # Of a folder, what transformers makes of it; else the file as it is.
    self._is_resolved = contents is not None
    self._says_bos = False
    self._silent_ids = {
      self._special_ids[kind]
      for kind in ('bos', 'eos', 'pad')
      if kind in self._special_ids
    }

  @functools.cached_property
  def _processor(self) -> tokenizers.Tokenizer:
    return _hugging_face_tokenizer(self._files, self.path)

  def save(self, folder: str | os.PathLike[str]) -> None:
    """As `Vocabulary.save`; names the class that reads the file as it is."""
    if self._is_resolved or _TOKENIZER_FILE not in self._files:
      return super().save(folder)
    config = json.loads(self._files.get(CONFIG_FILE, b'{}'))
    for key in ('added_tokens_decoder', 'extra_special_tokens'):
      config.pop(key, None)
    config.pop('additional_special_tokens', None)
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    for kind, number in self.special_ids.items():
      config[f'{kind}_token'] = self._processor.id_to_token(number)
    plain = copy.copy(self)
    plain._is_resolved = True
    plain._files = {
      name: content
      for name, content in self._files.items()
      if name not in _SPECIAL_FILES
    } | {CONFIG_FILE: (json.dumps(config, indent=2) + '\n').encode()}
    return plain.save(folder)

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text: its BOS, or nothing.

    That is for its post-processor to say, then for `add_bos_token`. Where
    neither does, Llama's and Gemma's have always had one, and these models
    compute little of use without.
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
      if not tokenizer_files.is_panic(error):
        raise
      raise ValueError(
        f'{self.path} is a broken tokenizer: it fails on the text '
        f'{_shortened(text)!r}. Copy or download it again.'
      ) from error

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

  A file is that file alone, as SeqIO reads it. A folder is what AutoTokenizer
  of transformers makes of it, `tokenizer.json` before others, with the tokens
  that were added and with what the model's config says of starts and ends. Two
  kinds of folders are not: one of a run of ours, whose files say all, and one
  of which AutoTokenizer knows nothing, such as one with a SentencePiece model
  and no more. There `spiece.model`, `tokenizer.model`, `sentencepiece.model`,
  `tokenizer.json`, `vocab.json` with `merges.txt`, and a
  `tokenizer_config.json` of ByT5 are looked for, in this order.

  Args:
    path: a SentencePiece `.model`, a Hugging Face `.json`, or a folder.
    extra_ids: see `SentencePieceVocabulary`, which a folder then must hold, and
      which is read alone; other kinds bring their own.
    start_id: overrides the files; so do `eos_id` and `pad_id`.

  Raises:
    FileNotFoundError: if the path is missing, or a folder without a known file.
    ValueError: if the file is of no known kind or broken.
  """
  folder = pathlib.Path(path)
  overrides: dict[str, Any] = {
    'start_id': start_id,
    'eos_id': eos_id,
    'pad_id': pad_id,
  }
  if not folder.is_dir():
    return _load_one_file(folder, extra_ids=extra_ids, **overrides)
  said = tokenizer_files.said_ids(folder)
  vocabulary = None
  if not extra_ids and not _is_of_run(folder):
    vocabulary = _load_as_transformers(folder, said, overrides)
  if vocabulary is None:
    vocabulary = _load_one_file(
      folder, extra_ids=extra_ids, said_ids=said, **overrides
    )
  vocabulary.origin = folder
  return vocabulary


def fingerprint_before(vocabulary: Vocabulary) -> str:
  """Returns the fingerprint that earlier versions gave a tokenizer's folder.

  They took one file of a folder, a SentencePiece model before others, and
  neither added tokens nor what the model's folder says of ids.
  """
  if vocabulary.origin is None or not vocabulary.origin.exists():
    return vocabulary.fingerprint()
  try:
    return _load_one_file(vocabulary.origin).fingerprint()
  except (ValueError, FileNotFoundError):  # They read none.
    return vocabulary.fingerprint()


def share_ids(one: Vocabulary, other: Vocabulary) -> bool:
  """Returns whether equal ids of two vocabularies stand for equal pieces.

  That is so of equal ones, and of a folder and the one file of it that it was
  read from before, which differ in special tokens alone.
  """
  if one == other:
    return True
  fingerprints = {one.fingerprint(), fingerprint_before(one)}
  return bool(fingerprints & {other.fingerprint(), fingerprint_before(other)})


def _is_of_run(folder: pathlib.Path) -> bool:
  """Returns whether a folder is one of a run's `vocabularies`.

  Their files are what the run was trained with, read as they are.
  """
  above = folder.absolute().parent
  return above.name == 'vocabularies' and (
    (above.parent / 'model.json').exists()
  )


def _load_as_transformers(
  folder: pathlib.Path,
  said: Mapping[str, Any],
  overrides: Mapping[str, Any],
) -> Vocabulary | None:
  """Returns what AutoTokenizer makes of a folder; None where it does not."""
  from l2s_jax import byte_vocabulary

  path = folder / CONFIG_FILE
  config = tokenizer_files.read_json(path)
  if config.get('tokenizer_class') == BYTE_TOKENIZER:
    in_text = None
    if byte_vocabulary.IN_TEXT not in config:
      arguments = auto_tokenizer.arguments(folder)
      in_text = byte_vocabulary.in_text_of(arguments)
    return byte_vocabulary.ByteVocabulary(
      path, said_ids=said, in_text=in_text, **overrides
    )
  if not _is_of_transformers(folder, config):
    return None
  resolved = auto_tokenizer.resolve(folder)
  if resolved is None:
    return None
  if resolved.note:
    print(resolved.note)
  if resolved.is_as_stored:
    path = folder / _TOKENIZER_FILE
    if not path.is_file():
      path = folder
    stored = HuggingFaceVocabulary(path, said_ids=said, **overrides)
    stored._is_resolved = True
    stored._says_bos = _says_bos(config)
    return stored
  says_bos = _says_bos(config)
  config = {f'{kind}_token': token for kind, token in resolved.tokens.items()}
  if config.get('unk_token') == config.get('eos_token'):
    config.pop('unk_token', None)  # GPT-2's stands for nothing unknown.
  config |= {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
  }
  made = HuggingFaceVocabulary(
    folder / _TOKENIZER_FILE,
    contents={
      _TOKENIZER_FILE: resolved.content,
      CONFIG_FILE: (
        json.dumps(config, indent=2, sort_keys=True) + '\n'
      ).encode(),
    },
    said_ids=said,
    **overrides,
  )
  made._says_bos = says_bos
  return made


def _says_bos(config: Mapping[str, Any]) -> bool:
  """Returns whether a tokenizer_config.json asks for BOS before a text."""
  by_class = str(config.get('tokenizer_class')).startswith(_WITH_BOS)
  return config.get('add_bos_token', by_class) is True


def _is_of_transformers(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> bool:
  """Returns whether a folder says enough to AutoTokenizer: class or family."""
  if 'tokenizer_class' in config or (folder / _TOKENIZER_FILE).is_file():
    return True
  return any(
    tokenizer_files.read_json(folder / name).get('model_type') is not None
    for name in ('config.json', 'weights.json')
  )


def _load_one_file(
  path: pathlib.Path,
  *,
  extra_ids: int = 0,
  said_ids: Mapping[str, Any] | None = None,
  start_id: int | None = None,
  eos_id: int | None = None,
  pad_id: int | None = None,
) -> Vocabulary:
  """Returns the vocabulary of a file, or of the first known in a folder."""
  from l2s_jax import byte_vocabulary

  path = _find(path)
  overrides: dict[str, Any] = {
    'start_id': start_id,
    'eos_id': eos_id,
    'pad_id': pad_id,
    'said_ids': said_ids,
  }
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


def _shortened(text: str) -> str:
  return text if len(text) <= 80 else f'{text[:77]}...'


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


def _user_defined_pieces(pieces: Iterable[str]) -> bytes:
  """Returns bytes that add pieces when appended to a SentencePiece model.

  A model is a protocol buffer, whose repeated fields grow by concatenation.
  """
  models: Any = sentencepiece_model_pb2  # It ships no types.
  kind = models.ModelProto.SentencePiece.USER_DEFINED
  return models.ModelProto(
    pieces=[{'piece': piece, 'score': 0.0, 'type': kind} for piece in pieces]
  ).SerializeToString()


def _hugging_face_tokenizer(
  files: Mapping[str, bytes], path: str | os.PathLike[str]
) -> tokenizers.Tokenizer:
  """Builds a tokenizer that neither truncates nor pads."""
  if _TOKENIZER_FILE in files:
    content = files[_TOKENIZER_FILE]
  else:
    content = _gpt2_json(files, path)
  file = pathlib.Path(path)
  auto_tokenizer.check(tokenizer_files.parse_json(content, file), file)
  with tokenizer_files.refusing(path):
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.decode(tokenizer.encode('a', add_special_tokens=False).ids)
  if not tokenizer.get_vocab():
    raise ValueError(f'{path} is not a Hugging Face tokenizer: it is empty.')
  return tokenizer


def _gpt2_json(
  files: Mapping[str, bytes], path: str | os.PathLike[str]
) -> bytes:
  """Returns the `tokenizer.json` that GPT-2's two files amount to."""
  folder = pathlib.Path(path)
  vocab, merges = tokenizer_parts.parse_gpt2_files(
    [files[name] for name in _GPT2_FILES], folder
  )
  content = tokenizer_parts.gpt2_json(vocab, merges)
  if content is None:
    raise ValueError(
      f'{folder / _GPT2_FILES[0]} has no {tokenizer_parts.GPT2_EOS}, so it is '
      'not of GPT-2, and another model may split text otherwise; give its '
      'tokenizer.json.'
    )
  return json.dumps(content).encode()


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
