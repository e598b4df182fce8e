# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as metadata of a GGUF file.

A file names the pre-tokenizer of byte-level BPE (`tokenizer.ggml.pre`) from a
list in `weights/formats/gguf_tokenizer.py`, and contains the pieces and scores
of a SentencePiece model. Other tokenizers are rejected: llama.cpp would
tokenize text differently without an error.
"""

import json
import pathlib
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from l2s_jax.interop.exports import comparing
from l2s_jax.runtime import scratch
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, huggingface, sentencepiece
from l2s_jax.weights.formats import gguf_tokenizer

_MODELS: Any = sentencepiece_model_pb2  # The module has no type stubs.
_PREFIX = 'tokenizer.ggml.'
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# llama.cpp's names of SentencePiece model types (1: unigram, 2: BPE).
_SENTENCEPIECE = {1: 't5', 2: 'llama'}


def metadata(system: system_lib.System, num_rows: int) -> dict[str, Any]:
  """Returns the GGUF metadata of a system's tokenizer.

  Args:
    system: system of a single language model.
    num_rows: number of rows of its embedding table; rows without a token become
      padding tokens.

  Raises:
    ValueError: if llama.cpp has no such tokenizer.
  """
  vocabulary = system.prompt_vocabulary
  if isinstance(vocabulary, huggingface.HuggingFaceVocabulary):
    found = _byte_pairs(vocabulary, num_rows)
  elif isinstance(vocabulary, sentencepiece.SentencePieceVocabulary):
    found = _sentencepiece(vocabulary, num_rows)
  else:
    raise ValueError(
      f'{vocabulary.path} is a byte tokenizer, which llama.cpp does not '
      'support. Use --to=hf.'
    )
  ids = vocabulary.special_ids | {'eos': vocabulary.eos_id}
  names = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  found |= {
    f'{_PREFIX}{names[kind]}_token_id': number for kind, number in ids.items()
  }
  before, _ = comparing.around(system)
  return found | {
    f'{_PREFIX}add_bos_token': bool(before),
    f'{_PREFIX}add_eos_token': False,
  }


def _byte_pairs(
  vocabulary: huggingface.HuggingFaceVocabulary, num_rows: int
) -> dict[str, Any]:
  """Returns the metadata of byte-level BPE.

  Raises:
    ValueError: if it has no merges, or an unknown pre-tokenizer.
  """
  tokenizer = vocabulary.copy_tokenizer()
  content = json.loads(tokenizer.to_str())
  model = content['model']
  by_id = {number: token for token, number in tokenizer.get_vocab().items()}
  added = tokenizer.get_added_tokens_decoder()
  tokens, kinds = [], []
  for number in range(num_rows):
    token = by_id.get(number)
    tokens.append(f'[PAD{number}]' if token is None else token)
    if token is None:
      kinds.append(_UNUSED)
    elif number in added:
      kinds.append(_CONTROL if added[number].special else _USER_DEFINED)
    else:
      kinds.append(_NORMAL)
  merges = [
    merge if isinstance(merge, str) else ' '.join(merge)
    for merge in model.get('merges', [])
  ]
  found: dict[str, Any] = {
    f'{_PREFIX}model': 'gpt2',
    f'{_PREFIX}tokens': tokens,
    f'{_PREFIX}token_type': kinds,
    f'{_PREFIX}merges': merges,
  }
  if not merges:
    raise ValueError(
      f'{vocabulary.path} is a {model["type"]} tokenizer without merges, which '
      'llama.cpp does not support. Use --to=hf.'
    )
  for name in gguf_tokenizer.CUTS:
    named = found | {f'{_PREFIX}pre': name}
    if _cut(content) == _cut(_read(named)):
      return named
  raise ValueError(
    f'{vocabulary.path} has an unsupported pre-tokenizer; --to=gguf supports '
    f'only {", ".join(gguf_tokenizer.CUTS)}. Use --to=hf.'
  )


def _read(named: dict[str, Any]) -> dict[str, Any]:
  """Returns the tokenizer.json that this metadata is read as."""
  with scratch.folder() as name:
    folder = pathlib.Path(name)
    gguf_tokenizer.save(named, folder, 'the file')
    content: dict[str, Any] = json.loads(
      tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json')).to_str()
    )
  return content


def _cut(content: dict[str, Any]) -> Any:
  """Returns the normalizers and pre-tokenizers of a tokenizer.json."""

  def parts(value: Any, key: str) -> list[Any]:
    if value is None:
      return []
    if value['type'] == 'Sequence':
      return [part for inner in value[key] for part in parts(inner, key)]
    # `trim_offsets` changes offsets, not ids.
    return [{k: v for k, v in value.items() if k != 'trim_offsets'}]

  return (
    parts(content['normalizer'], 'normalizers'),
    parts(content['pre_tokenizer'], 'pretokenizers'),
  )


def _sentencepiece(
  vocabulary: sentencepiece.SentencePieceVocabulary, num_rows: int
) -> dict[str, Any]:
  """Returns the metadata of a SentencePiece model.

  Raises:
    ValueError: if llama.cpp does not support one of its settings.
  """
  proto = _MODELS.ModelProto()
  proto.ParseFromString(vocabulary.model)
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  _check_sentencepiece(vocabulary, proto)
  pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
  pieces += [
    (f'[PAD{number}]', 0.0, _UNUSED) for number in range(len(pieces), num_rows)
  ]
  found = {
    f'{_PREFIX}model': _SENTENCEPIECE[trainer.model_type],
    f'{_PREFIX}tokens': [
      # llama.cpp matches user-defined pieces in the raw text.
      text.replace('▁', ' ') if kind == _USER_DEFINED else text
      for text, _, kind in pieces
    ],
    f'{_PREFIX}scores': [float(score) for _, score, _ in pieces],
    f'{_PREFIX}token_type': [int(kind) for _, _, kind in pieces],
    f'{_PREFIX}add_space_prefix': bool(normalizer.add_dummy_prefix),
    f'{_PREFIX}remove_extra_whitespaces': bool(
      normalizer.remove_extra_whitespaces
    ),
  }
  if normalizer.precompiled_charsmap:
    charsmap = normalizer.precompiled_charsmap
    found[f'{_PREFIX}precompiled_charsmap'] = bytes(charsmap)
  return found


def _check_sentencepiece(vocabulary: base.Vocabulary, proto: Any) -> None:
  """Checks that llama.cpp supports the settings of a SentencePiece model.

  Raises:
    ValueError: lists the unsupported settings.
  """
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  problems = []
  if trainer.model_type not in _SENTENCEPIECE:
    problems.append('a model_type other than unigram and bpe')
  if trainer.treat_whitespace_as_suffix:
    problems.append('treat_whitespace_as_suffix')
  if trainer.model_type == 2 and (
    normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
  ):
    problems.append('normalization of text with model_type bpe')
  if problems:
    raise ValueError(
      f'{vocabulary.path}: llama.cpp does not support '
      f'{", ".join(problems)}. Use --to=hf.'
    )
