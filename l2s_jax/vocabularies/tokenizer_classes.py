# SPDX-License-Identifier: Apache-2.0
"""The tokenizer classes of transformers: convert files to a tokenizer.json.

Each function returns a tokenizer.json, or None if the folder lacks the files of
the class. Only `as_it_is` keeps added tokens. `auto_tokenizer.py` selects the
class and adds tokens.
"""

import base64
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import tokenizers

from l2s_jax.vocabularies import tokenizer_files, tokenizer_parts

Json = dict[str, Any]

_AddedToken = tokenizers.AddedToken
_EOT = tokenizer_parts.GPT2_EOS
_CONTROL, _USER_DEFINED = 3, 4  # SentencePiece piece types
_UNIGRAM = 1  # SentencePiece model type
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@dataclasses.dataclass
class TokenizerSource:
  """The parsed files of a folder, and the constructor arguments from them.

  Attributes:
    folder: path of the folder.
    config: content of tokenizer_config.json.
    family: `model_type` of the model.
    model_class: tokenizer class named by the files.
    stored: content of tokenizer.json; None without one.
    arguments: constructor arguments; the class adds its defaults.
    added: added tokens by id.
    class_name: class selected by AutoTokenizer.
    pieces: pieces and merges of GPT-2's files, if these were read.
  """

  folder: pathlib.Path
  config: Json
  family: str | None
  model_class: str | None
  stored: Json | None
  arguments: Json
  added: dict[int, _AddedToken]
  class_name: str = ''
  pieces: tuple[Json, list[Any]] | None = None


def as_it_is(source: TokenizerSource) -> Json | None:
  """Reads tokenizer.json unchanged, or else converts a SentencePiece model."""
  if source.stored is not None:
    return dict(source.stored)
  path = source.folder / 'tokenizer.model'
  if not path.is_file():
    return None
  proto = tokenizer_parts.read_sentencepiece(path)
  arguments, trainer = source.arguments, proto.trainer_spec
  _take_pieces_kinds(source, proto)
  for kind in ('bos', 'eos', 'unk'):
    if getattr(trainer, f'{kind}_id') >= 0:
      arguments.setdefault(
        f'{kind}_token', getattr(trainer, f'{kind}_piece') or None
      )
  names = [piece.piece for piece in proto.pieces]
  # Replaces placeholder pieces, such as Mistral's [control_8].
  for number, token in source.added.items():
    if number < len(names) and names[number] and str(token) not in names:
      names[number] = str(token)
  fallback = trainer.byte_fallback
  if trainer.model_type == _UNIGRAM:
    scores = [piece.score for piece in proto.pieces]
    model = tokenizer_parts.unigram(
      list(zip(names, scores, strict=True)), trainer.unk_id, fallback
    )
  else:
    vocab = {piece.piece: n for n, piece in enumerate(proto.pieces)}
    merges = tokenizer_parts.merges_of(vocab)
    model = tokenizer_parts.bpe(
      {name: n for n, name in enumerate(names)},
      merges,
      unk_token=trainer.unk_piece,
      fuse_unk=True,
      byte_fallback=fallback,
    )
  steps: list[Json] = [tokenizer_parts.replace(' ', '▁')]
  charsmap = proto.normalizer_spec.precompiled_charsmap
  if charsmap:
    steps.insert(0, tokenizer_parts.precompiled(charsmap))
  decoders = [tokenizer_parts.replace('▁', ' ')]
  if fallback:
    decoders += [{'type': 'ByteFallback'}, {'type': 'Fuse'}]
  return tokenizer_parts.whole(
    model,
    normalizer={'type': 'Sequence', 'normalizers': steps},
    decoder={'type': 'Sequence', 'decoders': decoders},
  )


def t5(source: TokenizerSource) -> Json | None:
  """Converts the files of a T5Tokenizer."""
  arguments = source.arguments
  path = source.folder / tokenizer_files.CONFIG_FILE
  count = arguments.get('extra_ids', 100)
  if type(count) is not int or not 0 <= count < 2**20:
    tokenizer_files.refuse(path, 'extra_ids', count, 'a number of sentinels')
  sentinels = [f'<extra_id_{n}>' for n in range(count)]
  charsmap: bytes | None
  if source.stored is not None:
    vocab = _pieces_of(source, list)
    charsmap = _stored_charsmap(source)
  else:
    proto = _sentencepiece(source, 'spiece.model')
    if proto is None:
      return None
    _take_pieces_kinds(source, proto)
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    vocab += [(name, 0.0) for name in reversed(sentinels)]
    charsmap = proto.normalizer_spec.precompiled_charsmap or None
  extra = arguments.get('additional_special_tokens')
  if extra is None:
    arguments['additional_special_tokens'] = sentinels
  else:
    found = [token for token in extra if '<extra_id_' in str(token)]
    if not found:
      arguments['additional_special_tokens'] = [*extra, *sentinels]
    elif count and count != len(found):
      tokenizer_files.refuse(
        path, 'extra_ids', count, f'{len(found)}, the number of sentinels'
      )
  for kind, token in (('eos', '</s>'), ('unk', '<unk>'), ('pad', '<pad>')):
    arguments.setdefault(f'{kind}_token', token)
  metaspace = tokenizer_parts.metaspace('always', split=True)
  return tokenizer_parts.whole(
    tokenizer_parts.unigram(vocab, 2, False),
    normalizer=tokenizer_parts.precompiled(charsmap) if charsmap else None,
    pre_tokenizer={
      'type': 'Sequence',
      'pretokenizers': [{'type': 'WhitespaceSplit'}, metaspace],
    },
    decoder=metaspace,
  )


def _llama(source: TokenizerSource) -> Json | None:
  """Converts the files of a LlamaTokenizer."""
  pieces = _bpe_pieces(source)
  if pieces is None:
    return None
  arguments = source.arguments
  for kind, token in (('bos', '<s>'), ('eos', '</s>'), ('unk', '<unk>')):
    arguments.setdefault(f'{kind}_token', token)
  has_prefix = arguments.get('add_prefix_space')
  has_prefix = True if has_prefix is None else bool(has_prefix)
  scheme = 'never'
  if has_prefix:
    scheme = 'always' if arguments.get('legacy', False) else 'first'
  decoders = [
    tokenizer_parts.replace('▁', ' '),
    {'type': 'ByteFallback'},
    {'type': 'Fuse'},
  ]
  if has_prefix:
    decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
  return tokenizer_parts.whole(
    tokenizer_parts.bpe(*pieces, fuse_unk=True, byte_fallback=True),
    pre_tokenizer=tokenizer_parts.metaspace(scheme, split=False),
    decoder={'type': 'Sequence', 'decoders': decoders},
  )


def _gemma(source: TokenizerSource) -> Json | None:
  """Converts the files of a GemmaTokenizer."""
  pieces = _bpe_pieces(source)
  if pieces is None:
    return None
  arguments = source.arguments
  for kind in ('unk', 'bos', 'eos', 'pad', 'mask'):
    arguments.setdefault(f'{kind}_token', f'<{kind}>')
  return tokenizer_parts.whole(
    tokenizer_parts.bpe(
      *pieces,
      unk_token=str(arguments['unk_token']),
      fuse_unk=True,
      byte_fallback=True,
    ),
    normalizer=tokenizer_parts.replace(' ', '▁'),
    pre_tokenizer={
      'type': 'Split',
      'pattern': {'String': ' '},
      'behavior': 'MergedWithPrevious',
      'invert': False,
    },
    decoder={
      'type': 'Sequence',
      'decoders': [
        tokenizer_parts.replace('▁', ' '),
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
      ],
    },
  )


def _byte_level(
  normalizer: Json | None, **tokens: str | None
) -> Callable[[TokenizerSource], Json | None]:
  """Returns the converter of a GPT-2-like class with its default tokens."""

  def make(source: TokenizerSource) -> Json | None:
    pieces = _bpe_pieces(source, tokenizer_files.GPT2_FILES)
    if pieces is None:
      return None
    for kind, token in tokens.items():
      source.arguments.setdefault(f'{kind}_token', token)
    prefix = bool(source.arguments.get('add_prefix_space') or False)
    cut = tokenizer_parts.byte_level(prefix)
    if 'Qwen2' in source.class_name:
      split = {
        'type': 'Split',
        'pattern': {'Regex': _QWEN2_SPLIT},
        'behavior': 'Isolated',
        'invert': False,
      }
      cut = {
        'type': 'Sequence',
        'pretokenizers': [
          split,
          tokenizer_parts.byte_level(prefix, use_regex=False),
        ],
      }
    return tokenizer_parts.whole(
      tokenizer_parts.bpe(
        *pieces, continuing_subword_prefix='', end_of_word_suffix=''
      ),
      normalizer=normalizer,
      pre_tokenizer=cut,
      decoder=tokenizer_parts.byte_level(True),
    )

  return make


CLASSES: dict[str, Callable[[TokenizerSource], Json | None]] = {
  'T5Tokenizer': t5,
  'LlamaTokenizer': _llama,
  'GemmaTokenizer': _gemma,
  'GPT2Tokenizer': _byte_level(None, unk=_EOT, bos=_EOT, eos=_EOT),
  'GPTNeoXTokenizer': _byte_level(
    {'type': 'NFC'}, unk=_EOT, bos=_EOT, eos=_EOT, pad='<|padding|>'
  ),
  'Qwen2Tokenizer': _byte_level({'type': 'NFC'}, unk=_EOT, eos=_EOT, pad=_EOT),
  'RobertaTokenizer': _byte_level(
    None,
    bos='<s>',
    eos='</s>',
    sep='</s>',
    cls='<s>',
    unk='<unk>',
    pad='<pad>',
    mask='<mask>',
  ),
}


def _sentencepiece(source: TokenizerSource, name: str) -> Any | None:
  """Returns the SentencePiece model of a folder, or None."""
  for candidate in ('tokenizer.model', name):
    path = source.folder / candidate
    if path.is_file():
      return tokenizer_parts.read_sentencepiece(path)
  return None


def _take_pieces_kinds(source: TokenizerSource, proto: Any) -> None:
  source.arguments['additional_special_tokens'] = [
    _AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
    for piece in proto.pieces
    if piece.type in (_CONTROL, _USER_DEFINED)
  ]


def _bpe_pieces(
  source: TokenizerSource, names: tuple[str, ...] = ()
) -> tuple[Json, list[Any]] | None:
  """Returns BPE pieces and merges from tokenizer.json or other files, or None.

  Args:
    source: files of the folder.
    names: GPT-2's files, if the class reads them.
  """
  if source.stored is not None:
    merges = source.stored['model'].get('merges') or []
    return _pieces_of(source, dict), [
      merge.split(' ') if isinstance(merge, str) else merge for merge in merges
    ]
  if names and all((source.folder / name).is_file() for name in names):
    source.pieces = tokenizer_parts.read_gpt2_files(source.folder)
    return source.pieces
  proto = _sentencepiece(source, 'tokenizer.model')
  if proto is None:
    return None
  _take_pieces_kinds(source, proto)
  vocab = {piece.piece: n for n, piece in enumerate(proto.pieces)}
  return vocab, tokenizer_parts.merges_of(vocab)


def _pieces_of(source: TokenizerSource, kind: type) -> Any:
  """Returns the pieces of a tokenizer.json; `kind` is the container's type.

  Raises:
    ValueError: if the container has another type.
  """
  assert source.stored is not None
  vocab = source.stored['model']['vocab']
  if not isinstance(vocab, kind):
    raise ValueError(
      f'{source.folder / tokenizer_files.TOKENIZER_FILE} has another type of '
      f'model than {source.class_name}, the class in '
      f'{tokenizer_files.CONFIG_FILE} or config.json. Set tokenizer_class to '
      'PreTrainedTokenizerFast to use tokenizer.json unchanged.'
    )
  return vocab


def _stored_charsmap(source: TokenizerSource) -> bytes | None:
  """Returns the Precompiled normalizer table of tokenizer.json, or None.

  The first table counts if there are several.
  """
  assert source.stored is not None
  path = source.folder / tokenizer_files.TOKENIZER_FILE
  normalizer = source.stored.get('normalizer')
  steps: Any = normalizer if isinstance(normalizer, list) else [normalizer]
  if isinstance(normalizer, dict) and normalizer.get('type') == 'Sequence':
    steps = normalizer.get('normalizers')
    if not isinstance(steps, list):
      tokenizer_files.refuse(path, 'normalizer.normalizers', steps, 'a list')
  for step in steps:
    if step is not None and not isinstance(step, dict):
      tokenizer_files.refuse(path, 'normalizer', step, 'an object')
    if step and step.get('type') == 'Precompiled':
      table: Any = step.get('precompiled_charsmap')
      try:
        return base64.b64decode(table)
      except (TypeError, ValueError):
        tokenizer_files.refuse(path, 'precompiled_charsmap', table, 'base64')
  return None
