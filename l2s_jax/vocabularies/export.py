# SPDX-License-Identifier: Apache-2.0
"""What AutoTokenizer of transformers needs beside a tokenizer's own files.

It picks a class by the model's family, which reads no other family's files (or
reads them as an empty vocabulary). So an exported folder names the class that
reads any tokenizer.json as it is, and a SentencePiece model is said again as
one. Our own reading is in `loading.py`.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from l2s_jax.runtime import files
from l2s_jax.vocabularies import (
  base,
  byte,
  huggingface,
  sentencepiece,
  tokenizer_files,
)

_MODELS: Any = sentencepiece_model_pb2  # It ships no types.
_NUM_SENTINELS = 100  # of T5
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # kinds of pieces
_UNIGRAM, _WORD = 1, 3  # kinds of models


def complete(
  folder: pathlib.Path,
  vocabulary: base.Vocabulary,
  *,
  adds_eos: bool = False,
  sentinels_below: int = 0,
) -> None:
  """Writes tokenizer_config.json, and tokenizer.json for SentencePiece.

  Nothing is written where a tokenizer_config.json names its class, nor, which
  is said, of a SentencePiece model that no tokenizer.json encodes like.

  Args:
    folder: has the vocabulary's files.
    vocabulary: loaded from there.
    adds_eos: whether transformers is to put an EOS behind text, where the
      folder does not say (add_eos_token); a tokenizer.json that is there has
      its own way.
    sentinels_below: of T5, the rows of its embedding table: its sentinels
      `<extra_id_N>` are added where a SentencePiece model has none and they
      fit; 0 for others.
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
  source = pathlib.Path(vocabulary.path)
  if isinstance(vocabulary, sentencepiece.SentencePieceVocabulary):
    try:
      tokenizer = from_sentencepiece(source.read_bytes(), sentinels_below)
    except ValueError as error:
      print(
        f'{source.name} comes without a tokenizer.json, which AutoTokenizer of '
        f'transformers needs: {error}'
      )
      return
    tokenizer.post_processor = _template(vocabulary, tokenizer, adds)
    with files.whole(folder / 'tokenizer.json') as file:
      file.write(tokenizer.to_str())
  if source.is_dir():
    # Its two files, and what it puts around text, are for this class.
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


def save(
  folder: pathlib.Path,
  vocabulary: base.Vocabulary,
  *,
  before: Sequence[int] = (),
  after: Sequence[int] = (),
  padding_side: str = 'right',
  sentinels_below: int = 0,
) -> None:
  """Writes a tokenizer whose `__call__` gives a model all that it reads.

  Where the vocabulary has no pad token its EOS is one, which nobody takes for
  padding inside a text.

  Args:
    folder: gets tokenizer.json and tokenizer_config.json; made if absent.
    vocabulary: any.
    before: ids in front of each text.
    after: ids behind it.
    padding_side: 'left' or 'right'.
    sentinels_below: see `complete`.

  Raises:
    ValueError: if no tokenizer of transformers encodes so.
  """
  if isinstance(vocabulary, byte.ByteVocabulary):
    if before or list(after) != [vocabulary.eos_id]:
      raise ValueError(
        f'{vocabulary.path} is the tokenizer of ByT5, which transformers gives '
        f'an EOS behind each text; this model reads {list(before)} before it '
        f'and {list(after)} behind. Export it as a bundle.'
      )
    vocabulary.save(folder)
    # It is the model's to say, and of the answer.
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
  """Returns what puts BOS in front of text and EOS behind, where it is said."""
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
  """Returns a tokenizer that encodes and decodes as a SentencePiece model.

  Save for special tokens written in the text, which become their ids, as
  everywhere in transformers; what follows them starts like a text.

  Args:
    content: of the model file.
    sentinels_below: see `complete`.

  Raises:
    ValueError: if none encodes as the model does.
  """
  proto = _MODELS.ModelProto()
  proto.ParseFromString(content)
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  if trainer.model_type == _WORD:
    raise ValueError('its model_type is word, for which there is no equal')
  if trainer.treat_whitespace_as_suffix:
    raise ValueError(
      'it has treat_whitespace_as_suffix, for which there is no equal'
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
  # The best piece is made first, whatever it is made of; before all others
  # those that the user defined, such as runs of spaces, the longest first.
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
