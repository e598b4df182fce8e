# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models (T5, mT5, Llama, Mistral): loading and training."""

import functools
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from l2s_jax.runtime import files as files_lib
from l2s_jax.runtime import storage
from l2s_jax.vocabularies import base, tokenizer_files


class SentencePieceVocabulary(base.Vocabulary):
  """A SentencePiece model; special tokens in the text are ordinary text."""

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
      path: path of the model file.
      extra_ids: number of sentinels `<extra_id_N>`. Missing ones are appended,
        the highest N first, as in SeqIO (T5: 100, `<extra_id_0>` is 32099). A
        sentinel at the start of a word encodes to its id. mT5's model already
        has its 100.
      start_id: overrides the file; so do `eos_id` and `pad_id`.
      said_ids: see `Vocabulary`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a SentencePiece model, or as `Vocabulary`.
    """
    path = storage.of(path)
    content = tokenizer_files.read(path)
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
    name = (
      path.name
      if path.name in tokenizer_files.SENTENCEPIECE_FILES
      else 'spiece.model'
    )
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
    """Content of the model file, with the extra ids."""
    (content,) = (
      content
      for name, content in self._files.items()
      if name in tokenizer_files.SENTENCEPIECE_FILES
    )
    return content

  @functools.cached_property
  def _processor(self) -> sentencepiece.SentencePieceProcessor:
    return _sentencepiece_processor(self.model, self.path)

  def _encode(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    # One thread: callers parallelize over processes.
    return self._processor.encode(list(texts), num_threads=1)

  def _decode(self, ids: list[int]) -> str:
    return self._processor.decode(ids)


def train(
  texts: Iterable[str],
  path: str | os.PathLike[str],
  *,
  vocab_size: int,
  **options: Any,
) -> SentencePieceVocabulary:
  """Trains a T5-like unigram model, writes it to `path` and returns it.

  pad is 0, EOS 1, unknown 2; there is no BOS. The same texts in the same order
  give the same bytes.

  Args:
    texts: training texts, of any number of lines each.
    path: `.model` file to write, atomically.
    vocab_size: number of pieces, including the three special ones.
    **options: SentencePiece trainer options that override ours, such as
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
    'num_threads': 1,  # Fixes the order of float sums.
    'max_sentence_length': 2**20,  # Bytes; longer lines are dropped silently.
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
  with files_lib.whole(path, 'wb') as file:
    file.write(model.getvalue())
  return SentencePieceVocabulary(path)


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

  A model is a protocol buffer; concatenation extends its repeated fields.
  """
  models: Any = sentencepiece_model_pb2  # It ships no types.
  kind = models.ModelProto.SentencePiece.USER_DEFINED
  return models.ModelProto(
    pieces=[{'piece': piece, 'score': 0.0, 'type': kind} for piece in pieces]
  ).SerializeToString()
