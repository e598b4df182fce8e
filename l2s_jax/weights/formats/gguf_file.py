# SPDX-License-Identifier: Apache-2.0
"""Dequantized weights of a GGUF file.

The file is presented to `huggingface.HuggingFaceWeights` as the Hugging Face
model it was made from: GGUF names become names of transformers, metadata
becomes a config.json, and the changes of llama.cpp to the values are undone.
The package gguf implements dequantization; the tokenizer is in
`gguf_tokenizer.py`.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.models import positions
from l2s_jax.runtime import extras, storage
from l2s_jax.weights import misfits
from l2s_jax.weights.formats import gguf_header, gguf_tokenizer, huggingface
from l2s_jax.weights.formats.tensor_files import Tensor

# Metadata key by the key of config.json, without the prefix '{arch}.'.
_LLAMA_CONFIG = {
  'hidden_size': 'embedding_length',
  'intermediate_size': 'feed_forward_length',
  'num_hidden_layers': 'block_count',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'rope_theta': 'rope.freq_base',
  'max_position_embeddings': 'context_length',
}
_GEMMA_CONFIG = _LLAMA_CONFIG | {
  'sliding_window': 'attention.sliding_window',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}
_GPT2_CONFIG = {
  'n_embd': 'embedding_length',
  'n_inner': 'feed_forward_length',
  'n_layer': 'block_count',
  'n_head': 'attention.head_count',
  'n_positions': 'context_length',
  'layer_norm_epsilon': 'attention.layer_norm_epsilon',
}
_NEOX_CONFIG = {
  'hidden_size': 'embedding_length',
  'intermediate_size': 'feed_forward_length',
  'num_hidden_layers': 'block_count',
  'num_attention_heads': 'attention.head_count',
  'layer_norm_eps': 'attention.layer_norm_epsilon',
  'max_position_embeddings': 'context_length',
  'rotary_emb_base': 'rope.freq_base',
  'use_parallel_residual': 'use_parallel_residual',
}
_T5_CONFIG = {
  'd_model': 'embedding_length',
  'd_ff': 'feed_forward_length',
  'd_kv': 'attention.key_length',
  'num_layers': 'block_count',
  'num_decoder_layers': 'decoder_block_count',
  'num_heads': 'attention.head_count',
  'layer_norm_epsilon': 'attention.layer_norm_epsilon',
  'relative_attention_num_buckets': 'attention.relative_buckets_count',
  'decoder_start_token_id': 'decoder_start_token_id',
}
_TOKEN_IDS = {
  'bos_token_id': 'bos_token_id',
  'eos_token_id': 'eos_token_id',
  'pad_token_id': 'padding_token_id',
}

_TABLE = 'token_embd.weight'
# Metadata keys with whole numbers, and those with other numbers.
_COUNTS = (
  *(
    key
    for keys in (_GEMMA_CONFIG, _GPT2_CONFIG, _NEOX_CONFIG, _T5_CONFIG)
    for key in keys.values()
    if key.endswith(('length', 'count', 'head_count_kv', 'sliding_window'))
  ),
  'rope.dimension_count',
  'rope.scaling.original_context_length',
)
_NUMBERS = (
  'attention.layer_norm_rms_epsilon',
  'attention.layer_norm_epsilon',
  'rope.freq_base',
  'rope.scaling.factor',
  'rope.scale_linear',
)

# Names of transformers by names of GGUF; {} is the layer index.
_LLAMA_NAMES = {
  'token_embd': 'embed_tokens',
  'output_norm': 'norm',
  'output': 'lm_head',
  'blk.{}.attn_norm': 'layers.{}.input_layernorm',
  'blk.{}.attn_q': 'layers.{}.self_attn.q_proj',
  'blk.{}.attn_k': 'layers.{}.self_attn.k_proj',
  'blk.{}.attn_v': 'layers.{}.self_attn.v_proj',
  'blk.{}.attn_output': 'layers.{}.self_attn.o_proj',
  'blk.{}.attn_q_norm': 'layers.{}.self_attn.q_norm',
  'blk.{}.attn_k_norm': 'layers.{}.self_attn.k_norm',
  'blk.{}.ffn_norm': 'layers.{}.post_attention_layernorm',
  'blk.{}.ffn_gate': 'layers.{}.mlp.gate_proj',
  'blk.{}.ffn_up': 'layers.{}.mlp.up_proj',
  'blk.{}.ffn_down': 'layers.{}.mlp.down_proj',
}
_GEMMA_NAMES = _LLAMA_NAMES | {
  'blk.{}.post_attention_norm': 'layers.{}.post_attention_layernorm',
  'blk.{}.ffn_norm': 'layers.{}.pre_feedforward_layernorm',
  'blk.{}.post_ffw_norm': 'layers.{}.post_feedforward_layernorm',
}
_GPT2_NAMES = {
  'token_embd': 'wte',
  'position_embd': 'wpe',
  'output_norm': 'ln_f',
  'output': 'lm_head',
  'blk.{}.attn_norm': 'h.{}.ln_1',
  'blk.{}.attn_qkv': 'h.{}.attn.c_attn',
  'blk.{}.attn_output': 'h.{}.attn.c_proj',
  'blk.{}.ffn_norm': 'h.{}.ln_2',
  'blk.{}.ffn_up': 'h.{}.mlp.c_fc',
  'blk.{}.ffn_down': 'h.{}.mlp.c_proj',
}
_NEOX_NAMES = {
  'token_embd': 'embed_in',
  'output_norm': 'final_layer_norm',
  'output': 'embed_out',
  'blk.{}.attn_norm': 'layers.{}.input_layernorm',
  'blk.{}.attn_qkv': 'layers.{}.attention.query_key_value',
  'blk.{}.attn_output': 'layers.{}.attention.dense',
  'blk.{}.ffn_norm': 'layers.{}.post_attention_layernorm',
  'blk.{}.ffn_up': 'layers.{}.mlp.dense_h_to_4h',
  'blk.{}.ffn_down': 'layers.{}.mlp.dense_4h_to_h',
}


def _t5_names(is_gated: bool) -> dict[str, str]:
  """Returns the names of T5. `wi` has another name in a gated MLP."""
  names = {'token_embd': 'shared', 'output': 'lm_head'}
  for short, stack, mlp in (('enc', 'encoder', 1), ('dec', 'decoder', 2)):
    names[f'{short}.output_norm'] = f'{stack}.final_layer_norm'
    ours, theirs = f'{short}.blk.{{}}.', f'{stack}.block.{{}}.layer.'
    attentions = [
      ('', '0', 'SelfAttention'),
      ('cross_', '1', 'EncDecAttention'),
    ]
    for kind, layer, module in attentions[:mlp]:
      names[f'{ours}{kind}attn_norm'] = f'{theirs}{layer}.layer_norm'
      for letter in 'qkvo':
        name = f'{theirs}{layer}.{module}.{letter}'
        names[f'{ours}{kind}attn_{letter}'] = name
      name = f'{theirs}{layer}.{module}.relative_attention_bias'
      names[f'{ours}{kind}attn_rel_b'] = name
    dense = f'{theirs}{mlp}.DenseReluDense.'
    names |= {
      f'{ours}ffn_norm': f'{theirs}{mlp}.layer_norm',
      f'{ours}ffn_gate': f'{dense}wi_0',
      f'{ours}ffn_up': f'{dense}wi_1' if is_gated else f'{dense}wi',
      f'{ours}ffn_down': f'{dense}wo',
    }
  return names


class _Architecture(NamedTuple):
  """The conversion of one `general.architecture` to transformers.

  Attributes:
    config: content of config.json.
    names: names of transformers by names of GGUF.
    undo: function (name, tensor) that reverses llama.cpp's changes to the
      values.
    transposed: names of the tensors whose axes llama.cpp swapped.
  """

  config: dict[str, Any]
  names: Mapping[str, str]
  undo: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array
  transposed: tuple[str, ...] = ()


class _Header:
  """Metadata and tensor names of a file."""

  def __init__(self, metadata: Mapping[str, Any], names: Collection[str]):
    self.arch = metadata.get('general.architecture')
    self.names = names
    self._metadata = metadata

  def get(self, key: str, default: Any = None) -> Any:
    """Returns a metadata value of the architecture; omit '{arch}.'."""
    return _number(self._metadata.get(f'{self.arch}.{key}', default))

  def check(self, path: pathlib.Path) -> None:
    """Validates the sizes and numbers of the metadata.

    Raises:
      ValueError: names the key, its value and the expected type.
    """
    for key in (*_COUNTS, *_NUMBERS):
      value = self.get(key, 1)
      is_count = config_lib.is_count(value) and value > 0
      is_number = config_lib.is_number(value) and value >= 0
      if not (is_count if key in _COUNTS else is_number):
        raise ValueError(
          f'{path}: {self.arch}.{key} is {config_lib.shorten(repr(value))}; '
          'expected a '
          f'{"whole number above 0" if key in _COUNTS else "number"}. Convert '
          'or download the file again.'
        )

  def config(self, keys: Mapping[str, str], **fixed: Any) -> dict[str, Any]:
    """Returns the keys of config.json found in the metadata, and `fixed`."""
    ids = {
      name: self._metadata.get(f'tokenizer.ggml.{key}')
      for name, key in _TOKEN_IDS.items()
    }
    found = {name: self.get(key) for name, key in keys.items()} | ids
    is_tied = 'output.weight' not in self.names
    return {
      name: value for name, value in found.items() if value is not None
    } | {'tie_word_embeddings': is_tied, **fixed}


def _number(value: Any) -> Any:
  # Metadata floats are float32: 1e-5 reads as 9.999999747378752e-06.
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama(header: _Header) -> _Architecture:
  config = header.config(
    _LLAMA_CONFIG, model_type=header.arch, hidden_act='silu', **_rope(header)
  )

  def undo(name: str, array: np.ndarray) -> np.ndarray:
    """De-interleaves the two halves of queries and keys."""
    if re.search(r'attn_[qk]\.', name) is None:
      return array
    heads = config['num_attention_heads']
    if 'attn_k' in name:
      heads = config.get('num_key_value_heads', heads)
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)

  if header.arch == 'llama':
    return _Architecture(config, _LLAMA_NAMES, undo)
  return _Architecture(config, _LLAMA_NAMES)


def _gemma(header: _Header) -> _Architecture:
  config = header.config(
    _GEMMA_CONFIG, hidden_activation='gelu_pytorch_tanh', **_rope(header)
  )
  if header.arch == 'gemma2':
    config['model_type'] = 'gemma2'
  else:
    config |= {
      'model_type': 'gemma3_text',
      'rope_local_base_freq': 10_000.0,
      'sliding_window_pattern': 6,
    }
  # The metadata lacks this value. llama.cpp, too, recognizes the 27B models by
  # their number of layers.
  scalar = config.get('head_dim')
  if (
    config.get('num_hidden_layers')
    == {'gemma2': 46, 'gemma3': 62}[str(header.arch)]
  ):
    scalar = config['hidden_size'] // config['num_attention_heads']

  def undo(name: str, array: np.ndarray) -> np.ndarray:
    """Subtracts 1 from the scales of norms."""
    return array - np.float32(1) if name.endswith('norm.weight') else array

  return _Architecture(
    config | {'query_pre_attn_scalar': scalar}, _GEMMA_NAMES, undo
  )


def _gpt2(header: _Header) -> _Architecture:
  return _Architecture(
    # Older converters stored the table twice, so the tensors decide whether the
    # head is tied.
    header.config(_GPT2_CONFIG, model_type='gpt2', tie_word_embeddings=True),
    _GPT2_NAMES,
    transposed=('attn_qkv', 'attn_output', 'ffn_up', 'ffn_down'),
  )


def _gpt_neox(header: _Header) -> _Architecture:
  config = header.config(_NEOX_CONFIG, model_type='gpt_neox', **_rope(header))
  head_dim = _head_dim(header)
  config['rotary_pct'] = header.get('rope.dimension_count', head_dim) / head_dim

  def undo(name: str, array: np.ndarray) -> np.ndarray:
    """Restores the order of query, key and value within each head."""
    if 'attn_qkv' not in name:
      return array
    heads = config['num_attention_heads']
    parts = array.reshape(3, heads, -1, *array.shape[1:])
    return parts.swapaxes(0, 1).reshape(array.shape)

  return _Architecture(config, _NEOX_NAMES, undo)


def _t5(header: _Header) -> _Architecture:
  is_gated = any('ffn_gate' in name for name in header.names)
  has_all_biases = 'enc.blk.1.attn_rel_b.weight' in header.names
  config = header.config(
    _T5_CONFIG,
    model_type='umt5' if has_all_biases else 't5',
    # The only two variants in llama.cpp.
    feed_forward_proj='gated-gelu' if is_gated else 'relu',
  )
  if header.arch == 't5encoder':
    config |= {'num_decoder_layers': 0, 'tie_word_embeddings': not is_gated}
  return _Architecture(config, _t5_names(is_gated))


_ARCHITECTURES: dict[Any, Callable[[_Header], _Architecture]] = {
  'llama': _llama,
  'qwen2': _llama,
  'qwen3': _llama,
  'gemma2': _gemma,
  'gemma3': _gemma,
  'gpt2': _gpt2,
  'gptneox': _gpt_neox,
  't5': _t5,
  't5encoder': _t5,
}


class File(huggingface.HuggingFaceWeights):
  """The weights of a GGUF file, as a `source.Source`."""

  def __init__(self, path: pathlib.Path):
    """Reads the metadata and the names of the tensors.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or a part of a split model; if its
        architecture, quantization or rotary positions are not supported; or as
        `huggingface.HuggingFaceWeights`.
    """
    self._metadata, stored = _open(path)
    _check_quantizations(path, stored)
    header = _Header(self._metadata, stored)
    if not isinstance(header.arch, str) or header.arch not in _ARCHITECTURES:
      raise ValueError(
        f'{path}: its architecture is {config_lib.shorten(repr(header.arch))}; '
        f'supported are {", ".join(_ARCHITECTURES)}.'
      )
    header.check(path)
    try:
      architecture = _ARCHITECTURES[header.arch](header)
    except ValueError as error:
      raise ValueError(
        f'{path} has unsupported rotary positions. Convert its original '
        f'Hugging Face folder instead:\n{error}'
      ) from error
    config = architecture.config
    if _TABLE in stored and len(stored[_TABLE].shape) == 2:
      config['vocab_size'] = int(stored[_TABLE].shape[1])
    factors = None
    if architecture.names is _LLAMA_NAMES:
      factors = stored.pop('rope_freqs.weight', None)
    if factors is not None:
      config |= _llama3_scaling(factors)
    super().__init__(
      str(path), str(path), config, _tensors(path, architecture, stored)
    )
    if factors is not None:
      self._check_factors(path, _dequantize(factors))

  def save_tokenizer(self, folder: pathlib.Path) -> bool:
    """Writes the tokenizer of the file; returns whether its type is known."""
    return gguf_tokenizer.save(self._metadata, folder, self.location)

  def _check_factors(self, path: pathlib.Path, found: np.ndarray) -> None:
    """Refuses rotary scaling factors that differ from those of the config."""
    plain = dataclasses.replace(self.config, rope_scaling=())
    ours = positions.frequencies(plain) / positions.frequencies(self.config)
    if ours.shape != found.shape or not np.allclose(ours, found, rtol=1e-4):
      raise ValueError(
        f'{path} has rope_freqs.weight={np.round(found, 4).tolist()}; only the '
        'frequency scaling of Llama 3.1 is supported: '
        f'{np.round(ours, 4).tolist()}. Convert its original Hugging Face '
        'folder instead.'
      )


def config_of(
  metadata: Mapping[str, Any], names: Collection[str], vocab_size: int
) -> config_lib.TransformerConfig:
  """Returns the model config for a GGUF file with the given metadata.

  Args:
    metadata: the metadata, with floats rounded to float32 as in a file.
    names: names of the tensors.
    vocab_size: rows of the embedding table.

  Raises:
    ValueError: if the rotary positions are not supported.
  """
  header = _Header(metadata, names)
  config = _ARCHITECTURES[header.arch](header).config
  config['vocab_size'] = vocab_size
  return huggingface.FAMILIES[config['model_type']].parse(
    config, 'output.weight' not in names
  )


def is_file(path: pathlib.Path) -> bool:
  """Returns whether a path is a GGUF file, by its magic bytes or suffix."""
  if not path.is_file():
    return False
  with path.open('rb') as file:
    start = file.read(len(gguf_header.MAGIC))
  return start == gguf_header.MAGIC or path.suffix == '.gguf'


def _open(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Opens a file; returns its metadata and its unread tensors by name."""
  extras.require(f'{path} is a GGUF file, and reading it', 'gguf')
  import gguf

  if not path.is_file():
    wrong = 'is a folder' if path.is_dir() else 'is missing'
    raise FileNotFoundError(f'{path} {wrong}: expected a GGUF file.')
  try:
    file = pathlib.Path(storage.local_copy(path))  # It is mapped.
    gguf_header.check(file)
    reader = gguf.GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
  except (ValueError, IndexError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is not a complete GGUF file: '
      f'{config_lib.shorten(str(error), 200)}. Download it again.'
    ) from error
  num_parts = metadata.get('split.count', 1)
  if num_parts not in (0, 1):
    raise ValueError(
      f'{path} is one of {num_parts} parts (split.count). Merge them: '
      'llama-gguf-split --merge FIRST_PART MERGED.gguf'
    )
  return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _check_quantizations(path: pathlib.Path, stored: Mapping[str, Any]) -> None:
  """Refuses unsupported quantizations before any tensor is read."""
  problems = [
    f'  {name}: {tensor.tensor_type.name}'
    for name, tensor in stored.items()
    if not _can_dequantize(tensor.tensor_type)
  ]
  if problems:
    raise ValueError(
      f'{path} has tensor types that the package gguf cannot dequantize. Use a '
      'file with another quantization, such as Q8_0 or BF16:\n'
      + '\n'.join(problems)
    )


def _can_dequantize(kind: Any) -> bool:
  import gguf

  _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def _head_dim(header: _Header) -> int:
  heads = header.get('attention.head_count', 1)
  return header.get(
    'attention.key_length', header.get('embedding_length', heads) // heads
  )


def _rope(header: _Header) -> dict[str, Any]:
  """Returns the RoPE scaling of the metadata as keys of config.json.

  Raises:
    ValueError: lists the unsupported settings.
  """
  prefix = 'rope.scaling.'
  # Older converters wrote rope.scale_linear.
  factor = header.get(f'{prefix}factor', header.get('rope.scale_linear', 1.0))
  # The default type is linear.
  kind = header.get(f'{prefix}type', 'linear')
  supported: dict[str, tuple[Any, ...]] = {
    f'{prefix}type': ('none', 'linear', 'yarn'),
    f'{prefix}attn_factor': (1.0,),
    f'{prefix}yarn_ext_factor': (1.0,),
    f'{prefix}yarn_attn_factor': (1.0,),
    f'{prefix}yarn_log_multiplier': (0.0,),
  }
  if header.arch != 'gptneox':
    supported['rope.dimension_count'] = (_head_dim(header),)
  problems = [
    f'  {header.arch}.{key}: only {" or ".join(map(repr, values))} is '
    f'supported, found {header.get(key)!r}'
    for key, values in supported.items()
    if header.get(key, values[0]) not in values
  ]
  if problems:
    raise ValueError('\n'.join(problems))
  if kind == 'none' or factor == 1.0:
    return {}
  scaling = {
    'rope_type': kind,
    'factor': factor,
    'original_max_position_embeddings': header.get(
      f'{prefix}original_context_length'
    ),
    'beta_fast': header.get(f'{prefix}yarn_beta_fast'),
    'beta_slow': header.get(f'{prefix}yarn_beta_slow'),
  }
  return {'rope_scaling': scaling}


def _llama3_scaling(factors: Any) -> dict[str, Any]:
  """Returns the Llama 3.1 RoPE scaling inferred from stored factors."""
  factor = float(_dequantize(factors).max())
  if factor == 1.0:
    return {}
  return {
    'rope_scaling': {
      'rope_type': 'llama3',
      'factor': factor,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
    }
  }


def _tensors(
  path: pathlib.Path, architecture: _Architecture, stored: Mapping[str, Any]
) -> dict[str, Tensor]:
  """Returns the tensors by their names in transformers.

  Raises:
    ValueError: lists the tensors unknown to the architecture.
  """
  tensors = {}
  stored = dict(stored)
  unknown = []
  for name, tensor in stored.items():
    stem, _, kind = name.rpartition('.')
    layer = re.search(r'(?<=blk\.)\d+', stem)
    theirs = architecture.names.get(re.sub(r'(?<=blk\.)\d+', '{}', stem))
    if theirs is None:
      unknown.append(name)
      continue
    theirs = theirs.format(layer[0].lstrip('0') or '0' if layer else '')
    tensors[f'{theirs}.{kind}'] = _tensor(name, tensor, architecture)
  if unknown:
    raise ValueError(
      f'{path} has tensors that are unknown for '
      f'{architecture.config["model_type"]}:\n{misfits.listed(unknown)}'
    )
  return tensors


def _tensor(name: str, tensor: Any, architecture: _Architecture) -> Tensor:
  # GGUF stores the innermost axis first.
  shape = tuple(int(size) for size in reversed(tensor.shape))
  stem = name.split('.')[-2]
  if stem not in architecture.transposed or len(shape) == 1:
    return Tensor(
      shape, 'F32', lambda: architecture.undo(name, _dequantize(tensor))
    )
  return Tensor(shape[::-1], 'F32', lambda: _dequantize(tensor).T)


def _dequantize(tensor: Any) -> np.ndarray:
  import gguf

  return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
