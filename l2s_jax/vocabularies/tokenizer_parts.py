# SPDX-License-Identifier: Apache-2.0
"""Parts of a tokenizer.json, and pieces and merges for one.

Pieces and merges come from SentencePiece models and from GPT-2's `vocab.json`
and `merges.txt`; the order of merges is that of transformers.
`tokenizer_classes.py` assembles the parts.
"""

import base64
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2

from l2s_jax.vocabularies import tokenizer_files

Json = dict[str, Any]

GPT2_EOS = '<|endoftext|>'
_MODELS: Any = sentencepiece_model_pb2  # It ships no types.


def read_sentencepiece(path: pathlib.Path) -> Any:
  """Returns a SentencePiece model as a protocol buffer.

  Raises:
    ValueError: if the file is not a SentencePiece model.
  """
  proto = _MODELS.ModelProto()
  try:
    proto.ParseFromString(tokenizer_files.read(path))
  except message.DecodeError as error:
    raise ValueError(f'{path} is not a SentencePiece model.') from error
  if not proto.pieces:
    raise ValueError(f'{path} is not a SentencePiece model: it has no pieces.')
  return proto


def read_gpt2_files(folder: pathlib.Path) -> tuple[Json, list[Any]]:
  """Returns the pieces and merges of `vocab.json` and `merges.txt`."""
  contents = [
    tokenizer_files.read(folder / name) for name in tokenizer_files.GPT2_FILES
  ]
  return parse_gpt2_files(contents, folder)


def parse_gpt2_files(
  contents: Iterable[bytes], folder: pathlib.Path
) -> tuple[Json, list[Any]]:
  """Parses the pieces and merges of GPT-2's two files.

  Raises:
    ValueError: naming the file and the invalid entry.
  """
  vocab_file, merges_file = (
    folder / name for name in tokenizer_files.GPT2_FILES
  )
  pieces, lines = contents
  vocab = tokenizer_files.parse_json(pieces, vocab_file)
  for token, number in vocab.items():
    if not tokenizer_files.is_id(number):
      tokenizer_files.refuse(vocab_file, token, number, 'an id')
  try:
    text = lines.decode()
  except UnicodeDecodeError as error:
    raise ValueError(f'{merges_file} is not text: {error}.') from error
  merges = [
    line.split(' ')
    for line in text.split('\n')
    if line and not line.startswith('#version')
  ]
  for pair in merges:
    # The package tokenizers panics on some of these.
    if len(pair) != 2 or not {*pair, ''.join(pair)} <= vocab.keys():
      raise ValueError(
        f'{merges_file} merges {pair}: expected two pieces that are in '
        f'{vocab_file}, together with the merged piece.'
      )
  return vocab, merges


def merges_of(vocab: Mapping[str, int]) -> list[Any]:
  """Returns the merges of each piece, in the order of `generate_merges`."""
  merges = []
  for piece, number in vocab.items():
    parts = [
      (piece[:i], piece[i:])
      for i in range(1, len(piece))
      if piece[:i] in vocab and piece[i:] in vocab
    ]
    parts.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    merges += [
      (number, len(left), len(right), left, right) for left, right in parts
    ]
  merges.sort(key=lambda merge: merge[:3])
  return [[left, right] for *_, left, right in merges]


def gpt2_json(vocab: Json, merges: list[Any]) -> Json | None:
  """Returns GPT-2's tokenizer.json, or None if the pieces are not GPT-2's."""
  if GPT2_EOS not in vocab:
    return None
  flags = dict.fromkeys(
    ('single_word', 'lstrip', 'rstrip', 'normalized'), False
  )
  return {
    'added_tokens': [
      {'id': vocab[GPT2_EOS], 'content': GPT2_EOS, 'special': True, **flags}
    ],
    'pre_tokenizer': byte_level(False),
    'decoder': byte_level(False),
    'model': {'type': 'BPE', 'vocab': vocab, 'merges': merges},
  }


def whole(
  model: Json,
  *,
  normalizer: Json | None = None,
  pre_tokenizer: Json | None = None,
  decoder: Json | None = None,
) -> Json:
  """Returns a tokenizer.json made of these parts."""
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [],
    'normalizer': normalizer,
    'pre_tokenizer': pre_tokenizer,
    'post_processor': None,
    'decoder': decoder,
    'model': model,
  }


def unigram(vocab: Iterable[Any], unk_id: int, byte_fallback: bool) -> Json:
  """Returns a Unigram model, from pairs of piece and score."""
  return {
    'type': 'Unigram',
    'unk_id': unk_id,
    'vocab': [[piece, score] for piece, score in vocab],
    'byte_fallback': byte_fallback,
  }


def bpe(vocab: Json, merges: list[Any], **options: Any) -> Json:
  """Returns a BPE model; `options` override the defaults."""
  return {
    'type': 'BPE',
    'dropout': None,
    'unk_token': None,
    'continuing_subword_prefix': None,
    'end_of_word_suffix': None,
    'fuse_unk': False,
    'byte_fallback': False,
    'ignore_merges': False,
    **options,
    'vocab': vocab,
    'merges': merges,
  }


def metaspace(scheme: str, *, split: bool) -> Json:
  """Returns a Metaspace pre-tokenizer or decoder."""
  return {
    'type': 'Metaspace',
    'replacement': '▁',
    'prepend_scheme': scheme,
    'split': split,
  }


def replace(pattern: str, content: str) -> Json:
  """Returns a Replace normalizer or decoder."""
  return {
    'type': 'Replace',
    'pattern': {'String': pattern},
    'content': content,
  }


def precompiled(charsmap: bytes) -> Json:
  """Returns a normalizer with a SentencePiece table."""
  return {
    'type': 'Precompiled',
    'precompiled_charsmap': base64.b64encode(charsmap).decode(),
  }


def byte_level(add_prefix_space: bool, use_regex: bool = True) -> Json:
  """Returns a ByteLevel pre-tokenizer or decoder."""
  return {
    'type': 'ByteLevel',
    'add_prefix_space': add_prefix_space,
    'trim_offsets': True,
    'use_regex': use_regex,
  }
