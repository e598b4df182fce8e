# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files for the AutoTokenizer of transformers.

AutoTokenizer selects a class by the model's family. That class does not read
other families' files (or reads an empty vocabulary). Exported folders therefore
name the class that reads any tokenizer.json unchanged, and a SentencePiece
model is converted to a tokenizer.json. `loading.py` reads folders for this
package.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from l2s_jax.runtime import files, storage
from l2s_jax.vocabularies import (
  auto_tokenizer,
  base,
  byte,
  huggingface,
  sentencepiece,
  tokenizer_files,
)

_MODELS: Any = sentencepiece_model_pb2  # It ships no types.
_NUM_SENTINELS = 100  # of T5
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # piece types
_UNIGRAM, _WORD = 1, 3  # model types


def complete(
  folder: pathlib.Path,
  vocabulary: base.Vocabulary,
  *,
  adds_eos: bool = False,
  sentinels_below: int = 0,
) -> None:
  """Writes tokenizer_config.json, and tokenizer.json for SentencePiece.

  A tokenizer_config.json that names a class is kept. A SentencePiece model
  without an equivalent tokenizer.json is left alone, with a message.

  Args:
    folder: folder with the vocabulary's files.
    vocabulary: vocabulary loaded from this folder.
    adds_eos: whether transformers appends EOS to text, unless the folder sets
      add_eos_token. An existing tokenizer.json keeps its own rule.
    sentinels_below: for T5, the number of rows of its embedding table. If a
      SentencePiece model has no sentinels `<extra_id_N>` and they fit into the
      table, they are added. 0 for other models.
  """
  path = folder / tokenizer_files.CONFIG_FILE
  config: dict[str, Any] = {}
  if path.is_file():
    config = tokenizer_files.parse_json(path.read_bytes(), path)
  if 'tokenizer_class' in config:
    return
  adds = {
    'bos': config.get('add_bos_token', False),
    'eos': config.get('add_eos_token', adds_eos),
  }
  source = storage.of(vocabulary.path)
  if isinstance(vocabulary, sentencepiece.SentencePieceVocabulary):
    try:
      tokenizer = from_sentencepiece(source.read_bytes(), sentinels_below)
    except ValueError as error:
      print(
        f'{source.name} is exported without a tokenizer.json, which '
        f'AutoTokenizer of transformers needs: {error}'
      )
      return
    tokenizer.post_processor = _template(vocabulary, tokenizer, adds)
    with files.whole(folder / 'tokenizer.json') as file:
      file.write(tokenizer.to_str())
  if source.is_dir():
    # GPT2Tokenizer reads the two files and these add_*_token settings.
    vocab = tokenizer_files.parse_json(
      (source / 'vocab.json').read_bytes(), source / 'vocab.json'
    )
    config |= {f'add_{kind}_token': value for kind, value in adds.items()}
    config['tokenizer_class'] = 'GPT2Tokenizer'
  else:
    vocab = tokenizers.Tokenizer.from_file(
      str(folder / 'tokenizer.json')
    ).get_vocab()
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'
  tokens = {number: token for token, number in vocab.items()}
  for kind, number in vocabulary.special_ids.items():
    config[f'{kind}_token'] = tokens[number]
  config['clean_up_tokenization_spaces'] = False  # It would change text.
  files.write_json(path, config)


def check(folder: pathlib.Path, family: str) -> None:
  """Refuses a tokenizer that transformers reads as another beside a model.

  For some families (Qwen2) AutoTokenizer takes the family's class, whatever
  class tokenizer_config.json names.

  Args:
    folder: exported folder, with config.json.
    family: its `model_type`, for the error.

  Raises:
    ValueError: if AutoTokenizer does not read the folder's tokenizer.json, or
      GPT-2's files, as they are.
  """
  cause = ''
  try:
    found = auto_tokenizer.resolve(folder)
  except ValueError as error:
    found, cause = None, f'\n{error}'
  if cause or (found is not None and not found.is_as_stored):
    raise ValueError(
      f'transformers reads any tokenizer beside a {family} by the class of '
      f'that family, which makes other ids of this one. Choose --to=l2s.{cause}'
    )


def save(
  folder: pathlib.Path,
  vocabulary: base.Vocabulary,
  *,
  before: Sequence[int] = (),
  after: Sequence[int] = (),
  padding_side: str = 'right',
  sentinels_below: int = 0,
) -> None:
  """Writes a tokenizer for transformers with the model's exact input format.

  If the vocabulary has no pad token, its EOS serves as one: it does not occur
  inside a text.

  Args:
    folder: target folder of tokenizer.json and tokenizer_config.json; created
      if missing.
    vocabulary: any vocabulary.
    before: ids in front of each text.
    after: ids after each text.
    padding_side: 'left' or 'right'.
    sentinels_below: see `complete`.

  Raises:
    ValueError: if no tokenizer of transformers has this format.
  """
  if isinstance(vocabulary, byte.ByteVocabulary):
    if before or list(after) != [vocabulary.eos_id]:
      raise ValueError(
        f'{vocabulary.path} is the tokenizer of ByT5, and transformers appends '
        f'its EOS to each text; this model expects the ids {list(before)} '
        f'before the text and {list(after)} after it. Export it as a bundle.'
      )
    vocabulary.save(folder)
    # generation_config.json belongs to the model's answers.
    (folder / tokenizer_files.GENERATION_FILE).unlink(missing_ok=True)
    return
  if isinstance(vocabulary, huggingface.HuggingFaceVocabulary):
    tokenizer = vocabulary.copy_tokenizer()
  else:
    assert isinstance(vocabulary, sentencepiece.SentencePieceVocabulary)
    tokenizer = from_sentencepiece(vocabulary.model, sentinels_below)
  around = {n: tokenizer.id_to_token(n) for n in (*before, *after)}
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=[*(around[n] for n in before), '$A', *(around[n] for n in after)],
    pair='$A $B:1',
    special_tokens=[(token, number) for number, token in around.items()],
  )
  with files.whole(folder / tokenizer_files.TOKENIZER_FILE) as file:
    file.write(tokenizer.to_str())
  ids = vocabulary.special_ids | {'eos': vocabulary.eos_id}
  ids.setdefault('pad', vocabulary.eos_id)
  files.write_json(
    folder / tokenizer_files.CONFIG_FILE,
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      **{f'{kind}_token': tokenizer.id_to_token(n) for kind, n in ids.items()},
      'padding_side': padding_side,
      'clean_up_tokenization_spaces': False,  # It would change text.
    },
  )


def _template(
  vocabulary: base.Vocabulary,
  tokenizer: tokenizers.Tokenizer,
  adds: Mapping[str, bool],
) -> tokenizers.processors.PostProcessor:
  """Returns a post-processor that adds BOS and EOS as configured."""
  tokens = {
    kind: tokenizer.id_to_token(number)
    for kind, number in vocabulary.special_ids.items()
    if adds.get(kind)
  }

  def around(name: str, type_id: int) -> list[str]:
    parts = [tokens.get('bos'), f'${name}', tokens.get('eos')]
    return [f'{part}:{type_id}' for part in parts if part is not None]

  return tokenizers.processors.TemplateProcessing(
    single=around('A', 0),
    pair=around('A', 0) + around('B', 1),
    special_tokens=[
      (token, vocabulary.special_ids[kind]) for kind, token in tokens.items()
    ],
  )


def from_sentencepiece(
  content: bytes, sentinels_below: int = 0
) -> tokenizers.Tokenizer:
  """Converts a SentencePiece model to an equivalent `tokenizers.Tokenizer`.

  One difference: special tokens in the text become their ids, as everywhere in
  transformers, and the text after them is encoded like the start of a text.

  Args:
    content: content of the model file.
    sentinels_below: see `complete`.

  Raises:
    ValueError: if there is no equivalent.
  """
  proto = _MODELS.ModelProto()
  proto.ParseFromString(content)
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  if trainer.model_type == _WORD:
    raise ValueError('its model_type is word, which tokenizers does not have')
  if trainer.treat_whitespace_as_suffix:
    raise ValueError(
      'it has treat_whitespace_as_suffix, which tokenizers does not have'
    )
  tokenizer = tokenizers.Tokenizer(_model(proto))
  tokenizer.normalizer = _normalizer(normalizer)
  decoders = tokenizers.decoders
  steps: list[Any] = [decoders.Replace('▁', ' ')]
  if trainer.byte_fallback:
    steps.append(decoders.ByteFallback())
  steps.append(decoders.Fuse())
  if normalizer.add_dummy_prefix:
    steps.append(decoders.Strip(' ', 1, 0))
  tokenizer.decoder = decoders.Sequence(steps)
  for piece in proto.pieces:
    token = tokenizers.AddedToken(piece.piece, normalized=False)
    if piece.type in (_CONTROL, _UNKNOWN):
      tokenizer.add_special_tokens([token])
    elif piece.type == _USER_DEFINED and not piece.piece.startswith('▁'):
      tokenizer.add_tokens([token])
  has_sentinels = any('<extra_id_0>' in piece.piece for piece in proto.pieces)
  room = sentinels_below - len(proto.pieces)
  if not has_sentinels and room >= _NUM_SENTINELS:
    tokenizer.add_special_tokens(
      [f'<extra_id_{n}>' for n in reversed(range(_NUM_SENTINELS))]
    )
  return tokenizer


def _model(proto: Any) -> tokenizers.models.Model:
  trainer, pieces = proto.trainer_spec, proto.pieces
  (unk_id,) = [i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN]
  if trainer.model_type == _UNIGRAM:
    return tokenizers.models.Unigram(
      [(piece.piece, piece.score) for piece in pieces],
      unk_id,
      trainer.byte_fallback,
    )
  vocab = {piece.piece: i for i, piece in enumerate(pieces)}
  merged = [p for p in pieces if p.type not in (_UNKNOWN, _CONTROL, _UNUSED)]
  # Merge order: pieces of higher score first, in all their splits. User-defined
  # pieces, such as runs of spaces, precede all others, the longest first.
  merged.sort(
    key=lambda piece: (
      (0, -len(piece.piece))
      if piece.type == _USER_DEFINED
      else (1, -piece.score, vocab[piece.piece])
    )
  )
  merges = [
    (piece.piece[:i], piece.piece[i:])
    for piece in merged
    for i in range(1, len(piece.piece))
    if piece.piece[:i] in vocab and piece.piece[i:] in vocab
  ]
  return tokenizers.models.BPE(
    vocab,
    merges,
    unk_token=pieces[unk_id].piece,
    fuse_unk=True,
    byte_fallback=trainer.byte_fallback,
  )


def _normalizer(spec: Any) -> tokenizers.normalizers.Normalizer:
  normalizers = tokenizers.normalizers
  steps: list[Any] = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps += [
      normalizers.Strip(),
      normalizers.Replace(tokenizers.Regex(' {2,}'), ' '),
    ]
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend('▁'))
  steps.append(normalizers.Replace(' ', '▁'))
  return normalizers.Sequence(steps)
