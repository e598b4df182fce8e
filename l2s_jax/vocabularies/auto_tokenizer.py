# SPDX-License-Identifier: Apache-2.0
"""Resolves a folder like the `AutoTokenizer` of transformers.

Since version 5, transformers does not always read a tokenizer.json unchanged.
It selects a class by `tokenizer_class` and the model family. Some classes read
only the pieces from that file, or from a SentencePiece model, and split text
with their own rules. Then tokens named by other files are added. `resolve` does
the same and returns one complete tokenizer.json for training, runs and exports.
The reference is transformers 5.23; tests compare with it. `loading.py` reads
folders unknown to AutoTokenizer, and single SentencePiece models; `byte.py`
reads ByT5's.
"""

import base64
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers

from l2s_jax.vocabularies import (
  tokenizer_classes,
  tokenizer_files,
  tokenizer_parts,
)

_AddedToken = tokenizers.AddedToken
_Json = dict[str, Any]

AS_IT_IS = 'TokenizersBackend'  # Reads tokenizer.json unchanged.
# Classes with rules of their own that this module does not implement. Classes
# unknown to transformers read tokenizer.json unchanged.
_NOT_FOLLOWED = frozenset(
  f'{name}Tokenizer'
  for name in 'Albert Barthez Bert BigBird CLIP Camembert CodeLlama Cohere '
  'DebertaV2 Deberta Funnel Herbert LayoutLM LayoutXLM Lxmert MBart MBart50 '
  'MPNet Nllb Nougat OpenAIGPT Pegasus Reformer RemBert SeamlessM4T Splinter '
  'Udop Whisper XGLM XLMRoberta XLNet'.split()
)
_ATTRIBUTES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')

# Class by model family (`model_type`). Other families read tokenizer.json
# unchanged.
_FAMILIES = {
  family: name
  for name, families in {
    'T5Tokenizer': 't5 mt5 switch_transformers musicgen musicgen_melody',
    'GPT2Tokenizer': 'gpt2 gpt_neo gptj opt phi codegen starcoder2 dbrx jais2',
    'GPTNeoXTokenizer': 'gpt_neox mpt olmo olmoe mamba mamba2 rwkv xlstm '
    'falcon_mamba',
    'GemmaTokenizer': 'gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text '
    't5gemma recurrent_gemma shieldgemma2 diffusion_gemma zaya',
    'Qwen2Tokenizer': 'qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next',
    'RobertaTokenizer': 'bart roberta longformer',
    AS_IT_IS: 'umt5 mistral mistral3 mixtral ministral ministral3 olmo2 olmo3 '
    'granite granitemoe gpt_bigcode stablelm persimmon glm glm4 pegasus_x '
    'phi3 phimoe jamba nemotron internlm2 internlm3 minicpm3 arctic',
  }.items()
  for family in families.split()
}
# Families whose folders often name a wrong class; the family's class is used.
_MISNAMED = frozenset(
  'phi3 phimoe jamba nemotron internlm2 internlm3 minicpm3 arctic qwen2'.split()
)


@dataclasses.dataclass(frozen=True)
class Resolved:
  """A complete tokenizer.json, resolved from a folder.

  Attributes:
    content: content of the tokenizer.json.
    tokens: special tokens under `bos`, `eos`, `pad` and `unk`.
    is_as_stored: whether the folder's own tokenizer.json, or GPT-2's files,
      encode the same.
    note: a sentence on possible differences from AutoTokenizer, or ''.
  """

  content: bytes
  tokens: dict[str, str]
  is_as_stored: bool
  note: str = ''


def resolve(folder: pathlib.Path) -> Resolved | None:
  """Resolves a folder like AutoTokenizer; returns None if nothing is readable.

  Raises:
    ValueError: if a file is broken or has invalid values.
  """
  source = _read(folder)
  name = source.class_name = _class_name(source)
  note = ''
  if name in _NOT_FOLLOWED:
    note = (
      f'{folder}: AutoTokenizer of transformers tokenizes by its class {name}; '
      'here tokenizer.json is used unchanged.'
    )
  make = tokenizer_classes.CLASSES.get(name, tokenizer_classes.as_it_is)
  _take_special_tokens(source)
  made = make(source)
  if made is None:
    return None
  path = folder / tokenizer_files.TOKENIZER_FILE
  with tokenizer_files.refusing(folder if source.stored is None else path):
    built = tokenizers.Tokenizer.from_str(_dump(made))
  named = _add_tokens(built, source)
  is_t5 = make is tokenizer_classes.t5
  made['added_tokens'] = [
    {'id': number, **_state(token)}
    for number, token in sorted(built.get_added_tokens_decoder().items())
  ]
  if source.stored is None or is_t5:
    made['post_processor'] = _template(source, built, named, is_t5)
  elif make is not tokenizer_classes.as_it_is:
    made['post_processor'] = source.stored.get('post_processor')
  plain = source.stored
  if plain is None and source.pieces is not None:
    plain = tokenizer_parts.gpt2_json(*source.pieces)
  is_as_stored = plain is not None and _encodes_alike(plain, made, path)
  kinds = ('bos', 'eos', 'pad', 'unk')
  tokens = {k: str(named[k]) for k in kinds if named.get(k) is not None}
  with tokenizer_files.refusing(path):
    content = _dump(made).encode()
  return Resolved(content, tokens, is_as_stored, note)


def arguments(folder: pathlib.Path) -> _Json:
  """Returns the constructor arguments of a folder's tokenizer class.

  Special tokens are texts, or objects with matching flags.
  """
  source = _read(folder)
  _take_special_tokens(source)
  return source.arguments


def _read(folder: pathlib.Path) -> tokenizer_classes.TokenizerSource:
  """Reads the JSON files of a folder."""
  config_path = folder / tokenizer_files.CONFIG_FILE
  config = tokenizer_files.read_json(config_path)
  model = tokenizer_files.read_json(folder / 'config.json')
  if not model:  # Converted folders have the family there.
    model = tokenizer_files.read_json(folder / 'weights.json')
  stored_path = folder / tokenizer_files.TOKENIZER_FILE
  stored = None
  if stored_path.is_file():
    stored = tokenizer_files.parse_json(
      tokenizer_files.read(stored_path), stored_path
    )
    check(stored, stored_path)
  names = {}
  for path, values, key in (
    (config_path, config, 'tokenizer_class'),
    (folder / 'config.json', model, 'tokenizer_class'),
    (folder / 'config.json', model, 'model_type'),
  ):
    value = values.get(key)
    if value is not None and not isinstance(value, str):
      tokenizer_files.refuse(path, key, value, 'a name')
    names[path.name, key] = value
  return tokenizer_classes.TokenizerSource(
    folder=folder,
    config=config,
    family=names['config.json', 'model_type'],
    model_class=names[config_path.name, 'tokenizer_class']
    or names['config.json', 'tokenizer_class'],
    stored=stored,
    arguments={},
    added={},
  )


def check(stored: _Json, path: pathlib.Path) -> None:
  """Refuses a tokenizer.json that makes the package tokenizers panic.

  Raises:
    ValueError: naming the file and the invalid value.
  """
  model = stored.get('model')
  if not isinstance(model, dict):
    tokenizer_files.refuse(path, 'model', model, 'an object')
  vocab = model.get('vocab')
  if isinstance(vocab, dict):
    for token, number in vocab.items():
      if not tokenizer_files.is_id(number):
        tokenizer_files.refuse(path, f'model.vocab.{token}', number, 'an id')
    if vocab and max(vocab.values()) > 2 * len(vocab) + 2**16:
      tokenizer_files.refuse(
        path,
        'the largest id of model.vocab',
        max(vocab.values()),
        f'an id for {len(vocab)} tokens',
      )
  elif isinstance(vocab, list):
    for n, entry in enumerate(vocab):
      if not (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], int | float)
        and not isinstance(entry[1], bool)
      ):
        tokenizer_files.refuse(
          path, f'model.vocab[{n}]', entry, 'a piece and its score'
        )
  else:
    tokenizer_files.refuse(path, 'model.vocab', vocab, 'an object or a list')
  merges = model.get('merges')
  if merges is not None:
    if not isinstance(merges, list):
      tokenizer_files.refuse(path, 'model.merges', merges, 'a list')
    for n, merge in enumerate(merges):
      pair = merge.split(' ') if isinstance(merge, str) else merge
      if not (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(part, str) for part in pair)
      ):
        tokenizer_files.refuse(path, f'model.merges[{n}]', merge, 'two pieces')
  _check_charsmaps(stored.get('normalizer'), path)
  added = stored.get('added_tokens')
  if added is not None and not isinstance(added, list):
    tokenizer_files.refuse(path, 'added_tokens', added, 'a list')
  for n, token in enumerate(added or ()):
    key = f'added_tokens[{n}]'
    if not isinstance(token, dict) or not tokenizer_files.is_id(
      token.get('id')
    ):
      tokenizer_files.refuse(path, key, token, 'an object with an id')
    tokenizer_files.added_token(token, path, key)


def _check_charsmaps(normalizer: Any, path: pathlib.Path) -> None:
  """Refuses unreadable tables of SentencePiece's normalizer.

  A table is the size of a trie (uint32), the trie, then text.
  """
  if isinstance(normalizer, list):
    for step in normalizer:
      _check_charsmaps(step, path)
  if not isinstance(normalizer, dict):
    return
  _check_charsmaps(normalizer.get('normalizers'), path)
  if normalizer.get('type') != 'Precompiled':
    return
  table: Any = normalizer.get('precompiled_charsmap')
  try:
    content = base64.b64decode(table, validate=True)
    size = 4 + int.from_bytes(content[:4], 'little')
    if not 4 < size <= len(content) or size % 4:
      raise ValueError('it has no trie')
    content[size:].decode()
  except (TypeError, ValueError):
    tokenizer_files.refuse(
      path, 'precompiled_charsmap', table, "a SentencePiece normalizer's table"
    )


def _class_name(source: tokenizer_classes.TokenizerSource) -> str:
  """Returns the class selected by AutoTokenizer."""
  family = source.family
  registered = _FAMILIES.get(family or '')
  named = (source.model_class or '').removesuffix('Fast') or None
  if (
    named == 'LlamaTokenizer'
    and family not in _MISNAMED
    and _has_byte_level(source.stored)
  ):
    return AS_IT_IS
  if named is None:
    return registered or AS_IT_IS
  named = {
    'BartTokenizer': 'RobertaTokenizer',
    'PreTrainedTokenizer': AS_IT_IS,
  }.get(named, named)
  if registered is not None and registered != named:
    if registered == AS_IT_IS:
      return AS_IT_IS
    return registered if family in _MISNAMED else named
  return named


def _has_byte_level(stored: _Json | None) -> bool:
  """Returns whether a tokenizer.json is byte-level."""
  return stored is not None and '"ByteLevel"' in json.dumps(
    [stored.get('pre_tokenizer'), stored.get('decoder')]
  )


def _take_special_tokens(source: tokenizer_classes.TokenizerSource) -> None:
  """Collects special and added tokens, like `_from_pretrained`."""
  path = source.folder / tokenizer_files.CONFIG_FILE
  arguments = source.arguments = dict(source.config)
  if 'additional_special_tokens' in arguments and not arguments.get(
    'extra_special_tokens'
  ):
    arguments['extra_special_tokens'] = arguments.pop(
      'additional_special_tokens'
    )
  if 'added_tokens_decoder' in arguments:
    source.added = tokenizer_files.added_tokens(
      arguments['added_tokens_decoder'], path, 'added_tokens_decoder'
    )
  else:
    _take_older_files(source)
  known = {str(token): token for token in source.added.values()}
  for kind in _ATTRIBUTES:
    key = f'{kind}_token'
    value = arguments.get(key)
    if value is None:
      continue
    if not isinstance(value, _AddedToken):
      value = _token(value, path, key)
    arguments[key] = known.get(str(value), value)
  for key in ('extra_special_tokens', 'additional_special_tokens'):
    values = arguments.get(key)
    if values is None:
      arguments.pop(key, None)
      continue
    if isinstance(values, dict):  # By name, in file order.
      values = list(values.values())
    if not isinstance(values, list):
      tokenizer_files.refuse(path, key, values, 'a list of tokens')
    arguments[key] = [
      value if isinstance(value, _AddedToken) else _token(value, path, key)
      for value in values
    ]


def _token(value: Any, path: pathlib.Path, key: str) -> str | _AddedToken:
  if isinstance(value, str):
    return str(tokenizer_files.token_text(value, path, key))
  return tokenizer_files.added_token(value, path, key)


def _take_older_files(source: tokenizer_classes.TokenizerSource) -> None:
  """Reads the files that preceded `added_tokens_decoder`."""
  arguments = source.arguments
  path = source.folder / 'special_tokens_map.json'
  for key, value in tokenizer_files.read_json(path).items():
    if isinstance(value, dict) and key != 'extra_special_tokens':
      value = tokenizer_files.added_token({**value, 'special': True}, path, key)
    elif isinstance(value, list):
      value = [
        tokenizer_files.added_token({**v, 'special': True}, path, key)
        if isinstance(v, dict)
        else v
        for v in value
      ]
    arguments[key] = value
  path = source.folder / tokenizer_files.ADDED_FILE
  special = {
    str(arguments[f'{kind}_token'])
    for kind in _ATTRIBUTES
    if arguments.get(f'{kind}_token')
  }
  extra = arguments.get('extra_special_tokens')
  special.update(map(str, extra if isinstance(extra, list) else ()))
  ids = tokenizer_files.added_ids(tokenizer_files.read_json(path), path)
  for text, number in ids.items():
    source.added[number] = _AddedToken(
      text, normalized=text not in special, special=text in special
    )
  if source.stored is not None:
    path = source.folder / tokenizer_files.TOKENIZER_FILE
    for n, value in enumerate(source.stored.get('added_tokens') or ()):
      key = f'added_tokens[{n}]'
      source.added[value['id']] = tokenizer_files.added_token(value, path, key)


def _add_tokens(
  built: tokenizers.Tokenizer, source: tokenizer_classes.TokenizerSource
) -> dict[str, str | _AddedToken | None]:
  """Adds named tokens to a tokenizer; returns the special tokens.

  The order, and thus the ids, are those of `TokenizersBackend.__init__`.
  """
  arguments = source.arguments
  path = source.folder / tokenizer_files.CONFIG_FILE
  named: dict[str, str | _AddedToken | None] = {
    kind: arguments.get(f'{kind}_token') for kind in _ATTRIBUTES
  }
  wanted: list[Any] = [token for _, token in sorted(source.added.items())]
  present = {
    str(token) for token in built.get_added_tokens_decoder().values()
  } | set(map(str, wanted))
  # Model-specific names, such as image_token, come after the standard ones.
  others = [
    _token(value, path, key)
    for key, value in source.config.items()
    if key.endswith('_token')
    and key.removesuffix('_token') not in _ATTRIBUTES
    and isinstance(value, str)
  ]
  extra = arguments.get('extra_special_tokens')
  if extra is None:
    extra = arguments.get('additional_special_tokens') or []
  for token in (*named.values(), *others, *extra):
    if token is not None and str(token) not in present:
      wanted.append(token)
      present.add(str(token))
  names = {str(token) for token in named.values() if token is not None}
  for n, token in enumerate(wanted):
    if isinstance(token, str):
      wanted[n] = _AddedToken(token, special=True)
    elif not token.special and str(token) in names:
      token.special = True
  with tokenizer_files.refusing(source.folder):
    built.add_tokens(wanted)
  return named


def _template(
  source: tokenizer_classes.TokenizerSource,
  built: tokenizers.Tokenizer,
  named: Mapping[str, str | _AddedToken | None],
  adds_eos: bool,
) -> _Json:
  """Returns the post-processor of transformers.

  This package adds BOS and EOS itself.
  """
  ids = {}
  for kind, default in (('bos', False), ('eos', adds_eos)):
    number = built.token_to_id(str(named.get(kind)))
    if source.config.get(f'add_{kind}_token', default) and number is not None:
      ids[kind] = (str(named[kind]), number)

  def around(name: str, type_id: int) -> list[_Json]:
    parts = [{'Sequence': {'id': name, 'type_id': type_id}}]
    if 'bos' in ids:
      token = {'id': ids['bos'][0], 'type_id': type_id}
      parts.insert(0, {'SpecialToken': token})
    if 'eos' in ids:
      token = {'id': ids['eos'][0], 'type_id': type_id}
      parts.append({'SpecialToken': token})
    return parts

  return {
    'type': 'TemplateProcessing',
    'single': around('A', 0),
    'pair': around('A', 0) + around('B', 1),
    'special_tokens': {
      token: {'id': token, 'ids': [number], 'tokens': [token]}
      for token, number in ids.values()
    },
  }


def _encodes_alike(stored: _Json, made: _Json, path: pathlib.Path) -> bool:
  """Returns whether two tokenizer.json contents encode all texts equally."""

  def model(content: _Json) -> _Json:
    fields = dict(content['model'])
    merges = fields.pop('merges', None) or []
    fields['merges'] = [
      tuple(merge.split(' ') if isinstance(merge, str) else merge)
      for merge in merges
    ]
    if isinstance(fields['vocab'], list):
      fields['vocab'] = [tuple(entry) for entry in fields['vocab']]
      fields.setdefault('type', 'Unigram')
    return {k: v for k, v in fields.items() if v not in (None, False, '')}

  if model(stored) != model(made):
    return False
  built = []
  for content in (stored, made):
    small: _Json = {
      **content,
      'model': {'type': 'BPE', 'vocab': {}, 'merges': []},
    }
    small |= {'added_tokens': [], 'post_processor': None, 'decoder': None}
    with tokenizer_files.refusing(path):
      built.append(tokenizers.Tokenizer.from_str(_dump(small)).to_str())

  def tokens(content: _Json) -> list[_Json]:
    values = content.get('added_tokens') or []
    return sorted(
      (
        {'id': value['id']}
        | _state(tokenizer_files.added_token(value, path, ''))
        for value in values
      ),
      key=lambda token: token['id'],
    )

  return built[0] == built[1] and tokens(stored) == tokens(made)


def _dump(content: _Json) -> str:
  return json.dumps(content, ensure_ascii=False, separators=(',', ':'))


def _state(token: _AddedToken) -> _Json:
  return {
    'content': token.content,
    'single_word': token.single_word,
    'lstrip': token.lstrip,
    'rstrip': token.rstrip,
    'normalized': token.normalized,
    'special': token.special,
  }
