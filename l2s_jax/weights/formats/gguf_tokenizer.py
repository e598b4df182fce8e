# SPDX-License-Identifier: Apache-2.0
"""Extraction of the tokenizer in a GGUF file's metadata.

Byte-level BPE becomes tokenizer.json, SentencePiece a model file. The weights
are in `gguf_file.py`.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from l2s_jax.runtime import files

# Regular expression of Qwen2 that splits text before the BPE merges.
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# Supported pre-tokenizers of byte-level BPE, as in `tokenizer.ggml.pre`.
CUTS = ('gpt-2', 'qwen2', 'smollm')
_MODELS: Any = sentencepiece_model_pb2  # has no type stubs
# Types of pieces, numbered as in SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# By `tokenizer.ggml.model`: file name, and SentencePiece's model type.
_SENTENCEPIECE = {'llama': ('tokenizer.model', 2), 't5': ('spiece.model', 1)}
# Metadata name of a special token by its key in tokenizer_config.json.
_SPECIAL = {
  'unk_token': 'unknown',
  'bos_token': 'bos',
  'eos_token': 'eos',
  'pad_token': 'padding',
}


class _Table(NamedTuple):
  """The vocabulary: text, type and score of each id, and the special ids."""

  tokens: list[str]
  kinds: list[int]
  scores: list[float]
  special_ids: dict[str, int]


def save(
  metadata: Mapping[str, Any], folder: pathlib.Path, location: str
) -> bool:
  """Writes the tokenizer files; returns whether the tokenizer is supported.

  Args:
    metadata: the metadata of a GGUF file.
    folder: the output directory.
    location: the GGUF file, for errors.

  Raises:
    ValueError: if a required list is missing or malformed, or differs in length
      from the list of tokens.
  """
  kind = metadata.get('tokenizer.ggml.model')
  if kind == 'gpt2':
    table = _table(metadata, location)
    tokenizer = _byte_pairs(metadata, table, location)
    if tokenizer is None:
      return False
    with files.whole(folder / 'tokenizer.json') as file:
      file.write(tokenizer.to_str())
  elif kind in _SENTENCEPIECE:
    table = _table(metadata, location)
    name, model_type = _SENTENCEPIECE[kind]
    model = _sentencepiece(metadata, table, model_type)
    if model is None:
      return False
    with files.whole(folder / name, 'wb') as file:
      file.write(model)
  else:
    return False
  special = {name: table.tokens[i] for name, i in table.special_ids.items()}
  # Defaults of llama.cpp.
  adds = {'add_bos_token': kind == 'llama', 'add_eos_token': kind == 't5'}
  said = {
    name: bool(metadata.get(f'tokenizer.ggml.{name}', default))
    for name, default in adds.items()
  }
  files.write_json(folder / 'tokenizer_config.json', special | said)
  return True


def _table(metadata: Mapping[str, Any], location: str) -> _Table:
  """Returns the vocabulary; absent types and scores take defaults."""
  tokens = _required(metadata, 'tokenizer.ggml.tokens', location)
  _check_lists(metadata, location)
  ids = {
    ours: metadata.get(f'tokenizer.ggml.{theirs}_token_id', -1)
    for ours, theirs in _SPECIAL.items()
  }
  # Some converters' -1 reads as 2**32 - 1.
  special_ids = {n: i for n, i in ids.items() if 0 <= i < len(tokens)}
  kinds = [_NORMAL] * len(tokens)
  for i in special_ids.values():
    kinds[i] = _CONTROL  # required by SentencePiece
  kinds = metadata.get('tokenizer.ggml.token_type', kinds)
  scores = metadata.get('tokenizer.ggml.scores', [0.0] * len(tokens))
  for name, column in (('token_type', kinds), ('scores', scores)):
    if len(column) != len(tokens):
      raise ValueError(
        f'{location}: tokenizer.ggml.{name} has {len(column)} entries, but '
        f'tokenizer.ggml.tokens has {len(tokens)}. Download or convert the '
        'file again.'
      )
  return _Table(tokens, kinds, scores, special_ids)


# Types of the entries of metadata lists.
_LISTS: Mapping[str, type | tuple[type, ...]] = {
  'tokens': str,
  'token_type': int,
  'scores': (int, float),
  'merges': str,
  'precompiled_charsmap': int,
}


def _check_lists(metadata: Mapping[str, Any], location: str) -> None:
  """Validates the types of metadata lists and special ids."""
  for name, kind in _LISTS.items():
    value = metadata.get(f'tokenizer.ggml.{name}', [])
    if not isinstance(value, list) or not all(
      isinstance(entry, kind) for entry in value
    ):
      raise ValueError(
        f'{location}: tokenizer.ggml.{name} is not a list of '
        f'{"strings" if kind is str else "numbers"}. Download or convert the '
        'file again.'
      )
  for name in _SPECIAL.values():
    value = metadata.get(f'tokenizer.ggml.{name}_token_id', -1)
    if not isinstance(value, int):
      raise ValueError(
        f'{location}: tokenizer.ggml.{name}_token_id is not a number. Download '
        'or convert the file again.'
      )
  if not all(
    0 <= byte < 256
    for byte in metadata.get('tokenizer.ggml.precompiled_charsmap', [])
  ):
    raise ValueError(
      f'{location}: tokenizer.ggml.precompiled_charsmap is not a list of '
      'bytes. Download or convert the file again.'
    )


def _required(metadata: Mapping[str, Any], key: str, location: str) -> Any:
  if key not in metadata:
    raise ValueError(
      f'{location} lacks {key}, which its tokenizer '
      f'({metadata["tokenizer.ggml.model"]}) needs. Make the file again from '
      'the Hugging Face folder, or convert that folder instead.'
    )
  return metadata[key]


def _byte_pairs(
  metadata: Mapping[str, Any], table: _Table, location: str
) -> tokenizers.Tokenizer | None:
  """Returns a byte-level BPE; None if its pre-tokenizer is unsupported."""
  pre_tokenizers = tokenizers.pre_tokenizers
  pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  by_name: dict[str, list[Any]] = {
    'smollm': [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    'gpt-2': [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    'qwen2': [
      pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), 'isolated'),
      pieces,
    ],
  }
  name = metadata.get('tokenizer.ggml.pre')
  if name not in by_name:
    return None
  merges = [
    tuple(merge.split(' ', 1))
    for merge in _required(metadata, 'tokenizer.ggml.merges', location)
  ]
  vocab = {token: i for i, token in enumerate(table.tokens)}
  for merge in merges:
    if len(merge) != 2 or not {*merge, ''.join(merge)} <= vocab.keys():
      raise ValueError(
        f'{location}: tokenizer.ggml.merges has {" ".join(merge)!r}, which '
        'does not merge two tokens into a third. Download or convert the file '
        'again.'
      )
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
  if name == 'qwen2':
    tokenizer.normalizer = tokenizers.normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(by_name[name])
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  for token, kind in zip(table.tokens, table.kinds, strict=True):
    if kind == _CONTROL:
      tokenizer.add_special_tokens([token])
    elif kind == _USER_DEFINED:
      tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False)])
  return tokenizer


def _sentencepiece(
  metadata: Mapping[str, Any], table: _Table, model_type: int
) -> bytes | None:
  """Returns a serialized SentencePiece model.

  Returns None if no piece can serve as the unknown token, which SentencePiece
  requires.
  """
  special = [table.special_ids.get(name, -1) for name in _SPECIAL]
  kinds = list(table.kinds)
  if special[0] < 0:
    if _UNKNOWN in kinds:
      special[0] = kinds.index(_UNKNOWN)
    elif '<unk>' in table.tokens:
      special[0] = table.tokens.index('<unk>')
    else:
      return None
  kinds[special[0]] = _UNKNOWN
  # llama.cpp matches user-defined tokens in the raw text, with real spaces.
  tokens = [
    token.replace(' ', '▁') if kind == _USER_DEFINED else token
    for token, kind in zip(table.tokens, kinds, strict=True)
  ]
  while kinds[-1] == _UNUSED:  # Trailing padding of the embedding table.
    kinds.pop()
  pieces = [
    {'piece': text, 'score': score, 'type': kind}
    for text, score, kind in zip(tokens, table.scores, kinds, strict=False)
  ]
  prefix = 'tokenizer.ggml.'
  charsmap = metadata.get(prefix + 'precompiled_charsmap', [])
  normalizer = {
    'name': 'nmt_nfkc' if len(charsmap) else 'identity',
    'precompiled_charsmap': bytes(charsmap),
    'add_dummy_prefix': bool(metadata.get(prefix + 'add_space_prefix', True)),
    'remove_extra_whitespaces': bool(
      metadata.get(prefix + 'remove_extra_whitespaces', False)
    ),
  }
  trainer: list[dict[str, Any]] = [
    {'model_type': model_type, 'byte_fallback': _BYTE in kinds}
  ]
  for name, token in zip(('unk', 'bos', 'eos', 'pad'), special, strict=True):
    trainer.append({f'{name}_id': token})
    if token >= 0:
      trainer[-1][f'{name}_piece'] = tokens[token]
  return (
    _MODELS.ModelProto(pieces=pieces).SerializeToString()
    + _with_trainer(trainer)
    + _MODELS.ModelProto(normalizer_spec=normalizer).SerializeToString()
  )


def _with_trainer(parts: Iterable[Mapping[str, Any]]) -> bytes:
  """Returns the serialized field 2 (trainer_spec), in the order of `parts`.

  Protobuf itself would sort the fields by number. The fingerprint of a
  tokenizer hashes its bytes, and existing runs were made with this order.
  """
  content = b''.join(
    _MODELS.TrainerSpec(**part).SerializeToString() for part in parts
  )
  size = len(content)
  header = bytearray([2 << 3 | 2])
  while size > 0x7F:
    header.append(size & 0x7F | 0x80)
    size >>= 7
  return bytes([*header, size]) + content
