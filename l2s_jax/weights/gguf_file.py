# SPDX-License-Identifier: Apache-2.0
"""Weights and tokenizer of a GGUF file, dequantized.

The file is shown to `huggingface.Model` as what it was made from: GGUF's names
become those of transformers, its metadata a config.json, and what llama.cpp did
to the numbers is undone. The package gguf knows the quantizations.
"""

import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from l2s_jax import files
from l2s_jax.weights import huggingface
from l2s_jax.weights.tensor_files import Tensor

_HEADS = '{arch}.attention.head_count'
_KV_HEADS = '{arch}.attention.head_count_kv'

# config.json's keys by those of the metadata; all families here have these.
_CONFIG = {
  'hidden_size': '{arch}.embedding_length',
  'intermediate_size': '{arch}.feed_forward_length',
  'num_hidden_layers': '{arch}.block_count',
  'num_attention_heads': _HEADS,
  'num_key_value_heads': _KV_HEADS,
  'head_dim': '{arch}.attention.key_length',
  'rms_norm_eps': '{arch}.attention.layer_norm_rms_epsilon',
  'rope_theta': '{arch}.rope.freq_base',
  'max_position_embeddings': '{arch}.context_length',
  'sliding_window': '{arch}.attention.sliding_window',
  'bos_token_id': 'tokenizer.ggml.bos_token_id',
  'eos_token_id': 'tokenizer.ggml.eos_token_id',
  'pad_token_id': 'tokenizer.ggml.padding_token_id',
}
_NAMES = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_GEMMA_NAMES = _NAMES | {
  'post_attention_norm': 'post_attention_layernorm',
  'ffn_norm': 'pre_feedforward_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm',
}


class _Architecture(NamedTuple):
  """What sets one `general.architecture` apart.

  Attributes:
    model_type: of transformers.
    config: keys of config.json that the metadata does not have.
    names: of transformers by those of GGUF.
    interleaves: whether llama.cpp put the two halves of each query and key
      between each other, for its way to turn them.
    adds_one: whether it added 1 to the scales of norms.
  """

  model_type: str
  config: Mapping[str, Any]
  names: Mapping[str, str] = _NAMES
  interleaves: bool = False
  adds_one: bool = False


_ARCHITECTURES = {
  'llama': _Architecture('llama', {'hidden_act': 'silu'}, interleaves=True),
  'qwen2': _Architecture('qwen2', {'hidden_act': 'silu'}),
  'qwen3': _Architecture('qwen3', {'hidden_act': 'silu'}),
  'gemma3': _Architecture(
    'gemma3_text',
    {
      'hidden_activation': 'gelu_pytorch_tanh',
      'rope_local_base_freq': 10_000.0,
      'sliding_window_pattern': 6,
    },
    names=_GEMMA_NAMES,
    adds_one=True,
  ),
}


class File(huggingface.Model):
  """The weights in a GGUF file."""

  def __init__(self, path: pathlib.Path):
    """Reads the metadata and the names of the tensors.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is broken, its architecture is not supported, or as
        `huggingface.Model`.
    """
    self._metadata, stored = _open(path)
    name = self._metadata['general.architecture']
    if name not in _ARCHITECTURES:
      raise ValueError(
        f'{path}: its architecture is {name!r}; supported are '
        f'{", ".join(_ARCHITECTURES)}.'
      )
    architecture = _ARCHITECTURES[name]
    tensors = {}
    unknown = []
    for tensor in stored:
      found = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(\w+)', tensor.name)
      if found is None or found[2] not in architecture.names:
        unknown.append(tensor.name)
        continue
      layer, ours, kind = found.groups()
      prefix = f'model.layers.{layer}.' if layer else ''
      tensors[f'{prefix}{architecture.names[ours]}.{kind}'] = _tensor(
        tensor, ours, self._metadata, architecture
      )
    if unknown:
      raise ValueError(
        f'{path} has tensors that no {name} read here has: '
        + ', '.join(sorted(unknown))
      )
    config = _config(self._metadata, architecture, stored)
    super().__init__(str(path), str(path), config, tensors)
    _check_rope(path, self._metadata, self.config.head_dim)

  def save_tokenizer(self, folder: pathlib.Path) -> bool:
    """Writes the tokenizer in the metadata; returns whether it is known."""
    return _save_tokenizer(self._metadata, folder)


def _open(path: pathlib.Path) -> tuple[dict[str, Any], list[Any]]:
  """Returns the metadata and the tensors of a file, not yet read."""
  try:
    import gguf
  except ImportError as error:
    raise ValueError(
      f'{path} is a GGUF file, which the package gguf reads: pip install gguf.'
    ) from error
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing: expected a GGUF file.')
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError) as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is not a whole GGUF file: {error}.'
      ' Download it again.'
    ) from error
  metadata = {name: field.contents() for name, field in reader.fields.items()}
  return metadata, reader.tensors


def _config(
  metadata: Mapping[str, Any],
  architecture: _Architecture,
  stored: list[Any],
) -> dict[str, Any]:
  arch = metadata['general.architecture']
  keys = {ours: key.format(arch=arch) for ours, key in _CONFIG.items()}
  config = {
    ours: metadata[key] for ours, key in keys.items() if key in metadata
  }
  # It is kept as a float32; 1e-5 is meant where 9.999999747378752e-06 is read.
  for name in ('rms_norm_eps', 'rope_theta'):
    if name in config:
      config[name] = float(str(np.float32(config[name])))
  shapes = {tensor.name: tensor.shape for tensor in stored}
  return (
    config
    | {
      'model_type': architecture.model_type,
      'vocab_size': int(shapes['token_embd.weight'][1]),
      'tie_word_embeddings': 'output.weight' not in shapes,
    }
    | dict(architecture.config)
  )


def _check_rope(
  path: pathlib.Path, metadata: Mapping[str, Any], head_dim: int
) -> None:
  """Refuses stretched contexts, and heads that are turned in part."""
  rope = metadata['general.architecture'] + '.rope.'
  supported = {
    f'{rope}scaling.type': 'none',
    f'{rope}scaling.factor': 1.0,  # Without a type it is linear.
    f'{rope}dimension_count': head_dim,
  }
  problems = [
    f'{key}: only {value!r} is supported, found {metadata[key]!r}'
    for key, value in supported.items()
    if metadata.get(key, value) != value
  ]
  if problems:
    raise ValueError(
      f'{path} has rotary positions that are not supported. Convert the '
      'Hugging Face folder that it was made from:\n  ' + '\n  '.join(problems)
    )


def _tensor(
  tensor: Any,
  name: str,
  metadata: Mapping[str, Any],
  architecture: _Architecture,
) -> Tensor:
  import gguf

  arch = metadata['general.architecture']
  num_heads = metadata[_HEADS.format(arch=arch)]
  if name == 'attn_k':
    num_heads = metadata.get(_KV_HEADS.format(arch=arch), num_heads)

  def read() -> np.ndarray:
    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if architecture.interleaves and name in ('attn_q', 'attn_k'):
      # [heads, half, 2, ...] -> [heads, 2, half, ...]
      pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
      array = pairs.swapaxes(1, 2).reshape(array.shape)
    if architecture.adds_one and name.endswith('norm'):
      array = array - np.float32(1)
    return array

  # GGUF writes the innermost axis first.
  shape = tuple(int(size) for size in reversed(tensor.shape))
  return Tensor(shape, 'F32', read)


# --- tokenizers ---------------------------------------------------------------

# By `tokenizer.ggml.pre`: what cuts text before the merges, besides bytes.
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # As in SentencePiece.


def _save_tokenizer(metadata: Mapping[str, Any], folder: pathlib.Path) -> bool:
  kind = metadata.get('tokenizer.ggml.model')
  if kind == 'gpt2':
    tokenizer = _byte_pairs(metadata)
    if tokenizer is None:
      return False
    with files.whole(folder / 'tokenizer.json') as file:
      file.write(tokenizer.to_str())
  elif kind == 'llama':
    with files.whole(folder / 'tokenizer.model', 'wb') as file:
      file.write(_sentencepiece(metadata))
  else:
    return False
  tokens = metadata['tokenizer.ggml.tokens']
  names = {
    'bos_token': 'bos',
    'eos_token': 'eos',
    'pad_token': 'padding',
    'unk_token': 'unknown',
  }
  ids = {
    ours: metadata.get(f'tokenizer.ggml.{theirs}_token_id')
    for ours, theirs in names.items()
  }
  special = {name: tokens[i] for name, i in ids.items() if i is not None}
  files.write_json(folder / 'tokenizer_config.json', special)
  return True


def _byte_pairs(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer | None:
  """Returns a byte-level BPE; None if how it cuts text is not known here."""
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
  tokens = metadata['tokenizer.ggml.tokens']
  merges = [
    tuple(merge.split(' ', 1)) for merge in metadata['tokenizer.ggml.merges']
  ]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges)
  )
  if name == 'qwen2':
    tokenizer.normalizer = tokenizers.normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(by_name[name])
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  kinds = metadata['tokenizer.ggml.token_type']
  for token, kind in zip(tokens, kinds, strict=True):
    if kind == _CONTROL:
      tokenizer.add_special_tokens([token])
    elif kind == _USER_DEFINED:
      tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False)])
  return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> bytes:
  """Returns a SentencePiece model: a ModelProto, written by hand.

  Its fields: 1 a piece (1 text, 2 score, 3 type), 2 the trainer's (3 is 2 for
  BPE, 35 byte fallback, from 40 the ids and from 45 the texts of unk, bos, eos
  and pad), 3 the normalizer's (1 name, 3 whether a space is put in front, 4
  whether extra spaces are removed).
  """

  def message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content

  def number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & (1 << 64) - 1)

  tokens = metadata['tokenizer.ggml.tokens']
  special = [
    metadata.get(f'tokenizer.ggml.{name}_token_id', -1)
    for name in ('unknown', 'bos', 'eos', 'padding')
  ]
  kinds = list(metadata['tokenizer.ggml.token_type'])
  kinds[special[0]] = _UNKNOWN
  model = b''.join(
    message(
      1,
      message(1, text.encode())
      + b'\x15'
      + struct.pack('<f', score)
      + number(3, kind),
    )
    for text, score, kind in zip(
      tokens, metadata['tokenizer.ggml.scores'], kinds, strict=True
    )
  )
  trainer = number(3, 2) + number(35, 1)
  for i, token in enumerate(special):
    trainer += number(40 + i, token)
    if token >= 0:
      trainer += message(45 + i, tokens[token].encode())
  normalizer = (
    message(1, b'identity')
    + number(3, int(metadata.get('tokenizer.ggml.add_space_prefix', True)))
    + number(4, 0)
  )
  return model + message(2, trainer) + message(3, normalizer)


def _varint(value: int) -> bytes:
  encoded = bytearray()
  while value > 0x7F:
    encoded.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*encoded, value])
