# SPDX-License-Identifier: Apache-2.0
"""Tensor names and configs of Llama and related models in transformers.

Mistral, OLMo 2, SmolLM3, Qwen and Gemma use Llama's names for the shared parts.
T5Gemma is a Gemma 2 encoder and a Gemma 2 decoder with cross-attention.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from l2s_jax.models import config as config_lib
from l2s_jax.weights.families import name_table
from l2s_jax.weights.families.name_table import Family, Row

# PyTorch's Linear stores kernels as [out, in]. Each model has the subset of
# these rows that its config enables.
_ATTENTION = (
  Row('query/kernel', 'q_proj.weight', '(n h) d -> d n h'),
  Row('query/bias', 'q_proj.bias', '(n h) -> n h'),
  Row('key/kernel', 'k_proj.weight', '(k h) d -> d k h'),
  Row('key/bias', 'k_proj.bias', '(k h) -> k h'),
  Row('value/kernel', 'v_proj.weight', '(k h) d -> d k h'),
  Row('value/bias', 'v_proj.bias', '(k h) -> k h'),
  Row('out/kernel', 'o_proj.weight', 'd (n h) -> n h d'),
  Row('out/bias', 'o_proj.bias', 'd -> d'),
  Row('query_norm/scale', 'q_norm.weight', 'h -> h'),
  Row('key_norm/scale', 'k_norm.weight', 'h -> h'),
)
_MLP = (
  Row('wi_0/kernel', 'gate_proj.weight', 'f d -> d f'),
  Row('wi_0/bias', 'gate_proj.bias', 'f -> f'),
  Row('wi_1/kernel', 'up_proj.weight', 'f d -> d f'),
  Row('wi_1/bias', 'up_proj.bias', 'f -> f'),
  Row('wo/kernel', 'down_proj.weight', 'd f -> f d'),
  Row('wo/bias', 'down_proj.bias', 'd -> d'),
)
_TABLE_AND_HEAD = (
  Row('token_embedder/embedding', 'embed_tokens.weight', 'v d -> v d'),
  Row('logits_dense/kernel', 'lm_head.weight', 'v d -> d v'),
  Row('decoder/final_norm/scale', 'norm.weight', 'd -> d'),
)


def _norms(names: Mapping[str, str]) -> tuple[Row, ...]:
  return tuple(
    Row(f'{ours}_norm/scale', f'{theirs}_layernorm.weight', 'd -> d')
    for ours, theirs in names.items()
  )


def _block(
  norms: Mapping[str, str], attention: Sequence[Row] = _ATTENTION
) -> tuple[Row, ...]:
  """Returns the rows of a layer, with their names inside the layer."""
  return (
    *_norms(norms),
    *name_table.under('self_attention/', 'self_attn.', attention),
    *name_table.under('mlp/', 'mlp.', _MLP),
  )


def _decoder(block: Sequence[Row]) -> tuple[Row, ...]:
  """Returns the rows of a decoder-only model."""
  return (
    *_TABLE_AND_HEAD,
    *name_table.under('decoder/layers/', 'layers.{layer}.', block),
  )


_LLAMA = _decoder(
  _block({'pre_self_attention': 'input', 'pre_mlp': 'post_attention'})
)
_OLMO2 = _decoder(
  _block(
    {'post_self_attention': 'post_attention', 'post_mlp': 'post_feedforward'},
    (
      *(row for row in _ATTENTION if '_norm/' not in row.ours),
      Row('query_norm/scale', 'q_norm.weight', '(n h) -> n h'),
      Row('key_norm/scale', 'k_norm.weight', '(k h) -> k h'),
    ),
  )
)
_MLP_NORMS = {'pre_mlp': 'pre_feedforward', 'post_mlp': 'post_feedforward'}
_GEMMA = _decoder(
  _block(
    {'pre_self_attention': 'input', 'post_self_attention': 'post_attention'}
    | _MLP_NORMS
  )
)
_T5GEMMA_BLOCK = _block(
  {
    'pre_self_attention': 'pre_self_attn',
    'post_self_attention': 'post_self_attn',
  }
  | _MLP_NORMS
)
_T5GEMMA = (
  Row('token_embedder/embedding', 'encoder.embed_tokens.weight', 'v d -> v d'),
  Row(
    'decoder_token_embedder/embedding',
    'decoder.embed_tokens.weight',
    'v d -> v d',
  ),
  Row('logits_dense/kernel', 'lm_head.out_proj.weight', 'v d -> d v'),
  Row('encoder/final_norm/scale', 'encoder.norm.weight', 'd -> d'),
  Row('decoder/final_norm/scale', 'decoder.norm.weight', 'd -> d'),
  *name_table.under(
    'encoder/layers/', 'encoder.layers.{layer}.', _T5GEMMA_BLOCK
  ),
  *name_table.under(
    'decoder/layers/', 'decoder.layers.{layer}.', _T5GEMMA_BLOCK
  ),
  *name_table.under(
    'decoder/layers/',
    'decoder.layers.{layer}.',
    (
      *_norms(
        {
          'pre_cross_attention': 'pre_cross_attn',
          'post_cross_attention': 'post_cross_attn',
        }
      ),
      *name_table.under('cross_attention/', 'cross_attn.', _ATTENTION),
    ),
  ),
)


def _parse_sizes(config: Mapping[str, Any], is_tied: bool) -> dict[str, Any]:
  """Returns the config fields common to all families of this module."""
  num_heads = config['num_attention_heads']
  num_kv_heads = config.get('num_key_value_heads') or num_heads
  activation = config.get('hidden_activation') or config['hidden_act']
  stddev = config.get('initializer_range', 0.02)
  return {
    'vocab_size': config['vocab_size'],
    'emb_dim': config['hidden_size'],
    'num_heads': num_heads,
    'num_kv_heads': None if num_kv_heads == num_heads else num_kv_heads,
    'head_dim': config.get('head_dim')
    or name_table.divide(config, 'hidden_size', 'num_attention_heads'),
    'mlp_dim': config['intermediate_size'],
    'num_decoder_layers': config['num_hidden_layers'],
    'mlp_activations': (name_table.activation(activation), 'linear'),
    'norm_epsilon': config.get('rms_norm_eps', 1e-6),
    'attention_bias': 'all' if config.get('attention_bias') else 'none',
    'positions': 'rotary',
    'max_positions': config['max_position_embeddings'],
    'scale_attention': True,
    'logits_via_embedding': is_tied,
    'scale_logits': False,
    'dropout_rate': config.get('attention_dropout') or 0.0,
    'kernel_init_stddev': stddev,
    'embedding_init_stddev': stddev,
  }


def _unparse_sizes(config: config_lib.TransformerConfig) -> dict[str, Any]:
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.emb_dim,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.mlp_dim,
    'num_hidden_layers': config.num_decoder_layers,
    'rms_norm_eps': config.norm_epsilon,
    'attention_bias': config.attention_bias == 'all',
    'max_position_embeddings': config.max_positions
    or name_table.ROTARY_CONTEXT,
    'rope_theta': config.rope_base,
    'tie_word_embeddings': config.logits_via_embedding,
    'attention_dropout': config.dropout_rate,
    'initializer_range': config.kernel_init_stddev or 0.02,
  }


def _rope(config: Mapping[str, Any], default: float = 1e4) -> dict[str, Any]:
  """Returns the RoPE parameters, from transformers 5 or earlier keys.

  Args:
    config: content of config.json.
    default: the family's `rope_theta`.
  """
  parameters = config.get('rope_parameters') or config.get('rope_scaling') or {}
  return {'rope_theta': config.get('rope_theta', default), **parameters}


# Of the families whose config.json does not decide on the biases.
_ATTENTION_BIAS = {'mistral': 'none', 'qwen2': 'qkv'}


def _parse_llama(
  config: Mapping[str, Any], is_tied: bool, rope_theta: float = 1e4
) -> config_lib.TransformerConfig:
  fields = _parse_sizes(config, is_tied)
  rope = _rope(config, rope_theta)
  if config['model_type'] in _ATTENTION_BIAS:
    fields['attention_bias'] = _ATTENTION_BIAS[config['model_type']]
  if config.get('mlp_bias'):
    if fields['attention_bias'] != 'all':
      raise ValueError('mlp_bias is true and attention_bias is not')
    fields |= {'attention_bias': 'none', 'use_bias': True}
  return config_lib.TransformerConfig(
    **fields,
    qk_norm=config['model_type'] == 'qwen3',
    rope_base=float(rope['rope_theta']),
    **name_table.rope_scaling(rope),
  )


def _unparse_llama(config: config_lib.TransformerConfig) -> dict[str, Any]:
  return _unparse_sizes(config) | {
    'hidden_act': name_table.activation_of_theirs(config.mlp_activations[0]),
    'attention_bias': config.use_bias or config.attention_bias == 'all',
    'mlp_bias': config.use_bias,
    'rope_scaling': name_table.rope_scaling_of_theirs(config),
  }


def _parse_mistral(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  return dataclasses.replace(
    _parse_llama(config, is_tied), sliding_window=_window(config)
  )


def _unparse_mistral(config: config_lib.TransformerConfig) -> dict[str, Any]:
  return _unparse_llama(config) | {
    'sliding_window': config.sliding_window or None
  }


def _parse_qwen(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  num_layers = config['num_hidden_layers']
  window = _window(config) if config.get('use_sliding_window') else 0
  types = config.get('layer_types')
  first = config.get('max_window_layers', 28) if window else num_layers
  if types is not None:
    first = len(types)
    if 'sliding_attention' in types:
      first = types.index('sliding_attention')
    if len(types) != num_layers or types != _late_windows(first, num_layers):
      raise ValueError(
        f'layer_types is not full_attention in the first {first} layers and '
        f'sliding_attention in the others of {num_layers}'
      )
    if first < num_layers and not window:
      raise ValueError(
        'layer_types has sliding_attention, without use_sliding_window and '
        'sliding_window'
      )
  fields = {'sliding_window': window, 'first_window_layer': first}
  return dataclasses.replace(
    _parse_llama(config, is_tied), **fields if first < num_layers else {}
  )


def _unparse_qwen(config: config_lib.TransformerConfig) -> dict[str, Any]:
  window = config.sliding_window
  num_layers = config.num_decoder_layers
  first = config.first_window_layer if window else num_layers
  return _unparse_llama(config) | {
    'use_sliding_window': window > 0,
    'sliding_window': window or None,
    'max_window_layers': first,
    'layer_types': _late_windows(first, num_layers),
  }


def _parse_olmo2(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  return dataclasses.replace(
    _parse_llama(config, is_tied),
    pre_norm=False,
    post_norm=True,
    qk_norm=True,
    qk_norm_all_heads=True,
  )


def _unparse_olmo2(config: config_lib.TransformerConfig) -> dict[str, Any]:
  # Without the key transformers takes the id of OLMo's own tokenizer.
  return _unparse_llama(config) | {'pad_token_id': None}


def _parse_smollm3(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  num_layers = config['num_hidden_layers']
  types = config.get('layer_types')
  if types is not None and types != ['full_attention'] * len(types):
    raise ValueError('layer_types has others than full_attention')
  period = config.get('no_rope_layer_interval', 4)
  rotates = config.get('no_rope_layers')
  if rotates is not None:
    period = rotates.index(0) + 1 if 0 in rotates else 0
    # Length is compared first: a damaged config.json may ask for more layers
    # than memory holds.
    if len(rotates) != num_layers or rotates != _rotates(period, num_layers):
      raise ValueError(
        f'no_rope_layers is not 0 every {period} layers and 1 between, for '
        f'{num_layers} layers'
      )
  elif not period:
    raise ValueError('no_rope_layer_interval is 0; expected 1 or more')
  return dataclasses.replace(
    _parse_llama(config, is_tied, rope_theta=2e6),
    no_rope_period=period if period <= num_layers else 0,
  )


def _unparse_smollm3(config: config_lib.TransformerConfig) -> dict[str, Any]:
  num_layers = config.num_decoder_layers
  return _unparse_llama(config) | {
    'pad_token_id': None,  # As for OLMo 2.
    'no_rope_layer_interval': config.no_rope_period or num_layers + 1,
    'no_rope_layers': _rotates(config.no_rope_period, num_layers),
  }


def _rotates(period: int, num_layers: int) -> list[int]:
  """Returns SmolLM3's `no_rope_layers`: 1 for layers with rotary positions."""
  return [
    0 if period and (layer + 1) % period == 0 else 1
    for layer in range(num_layers)
  ]


def _window(config: Mapping[str, Any]) -> int:
  """Returns `sliding_window` of Mistral and Qwen; 0 for null."""
  window: int | None = config.get('sliding_window', 4096)
  if window == 0:
    raise ValueError('sliding_window is 0; expected null, or 1 or more')
  return window or 0


def _late_windows(first: int, num_layers: int) -> list[str]:
  """Returns the `layer_types` of Qwen, with windows from a layer on."""
  return [
    'full_attention' if layer < first else 'sliding_attention'
    for layer in range(num_layers)
  ]


def _parse_gemma(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  if config.get('use_bidirectional_attention'):
    raise ValueError(
      'use_bidirectional_attention is true: it is not a causal language model'
    )
  fields = _parse_sizes(config, is_tied)
  is_gemma3 = config['model_type'] == 'gemma3_text'
  window, period = _windows(config, default_period=6 if is_gemma3 else 2)
  rope, local = _ropes_of_gemma3(config) if is_gemma3 else (_rope(config), None)
  scalar = config.get('query_pre_attn_scalar', 256)
  return config_lib.TransformerConfig(
    **fields,
    norm_unit_offset=True,
    post_norm=True,
    qk_norm=is_gemma3,
    rope_base=float(rope['rope_theta']),
    rope_local_base=local if window else None,
    **name_table.rope_scaling(rope),
    sliding_window=window,
    global_layer_period=period,
    query_pre_attn_scalar=(
      None if scalar == fields['head_dim'] else float(scalar)
    ),
    attention_softcap=config.get('attn_logit_softcapping') or 0.0,
    logits_softcap=config.get('final_logit_softcapping') or 0.0,
    scale_embeddings=True,
  )


def _windows(config: Mapping[str, Any], default_period: int) -> tuple[int, int]:
  """Returns `sliding_window` and `global_layer_period`."""
  num_layers = config['num_hidden_layers']
  window = config.get('sliding_window') or 0
  types = config.get('layer_types')
  period = config.get('sliding_window_pattern', default_period)
  if types is not None:
    period = 0
    if 'full_attention' in types:
      period = types.index('full_attention') + 1
    # Length is compared first: a damaged config.json may ask for more layers
    # than memory holds.
    if len(types) != num_layers or types != _layer_types(period, num_layers):
      raise ValueError(
        f'layer_types is not full_attention every {period} layers and '
        'sliding_attention between'
      )
  return (0, 0) if not window or period == 1 else (window, period)


def _layer_types(period: int, num_layers: int) -> list[str]:
  return [
    'full_attention'
    if period and (layer + 1) % period == 0
    else 'sliding_attention'
    for layer in range(num_layers)
  ]


def _ropes_of_gemma3(
  config: Mapping[str, Any],
) -> tuple[Mapping[str, Any], float | None]:
  """Returns the RoPE parameters of global layers, and the local base.

  The local base, for layers with a sliding window, is None if their RoPE equals
  that of the global layers. Local layers have no context scaling, so with
  scaled global layers the two differ even for equal bases.
  """
  kinds = config.get('rope_parameters') or {
    'full_attention': {
      'rope_theta': config.get('rope_theta', 1e6),
      **(config.get('rope_scaling') or {}),
    },
    'sliding_attention': {
      'rope_theta': config.get('rope_local_base_freq', 1e4)
    },
  }
  full, local = (
    {'rope_theta': 1e4, **kinds[name]}
    for name in ('full_attention', 'sliding_attention')
  )
  if name_table.rope_scaling(local):
    raise ValueError(
      'its sliding_attention layers have RoPE scaling, which is not supported'
    )
  if local['rope_theta'] == full['rope_theta'] and not name_table.rope_scaling(
    full
  ):
    return full, None
  return full, float(local['rope_theta'])


def _unparse_gemma(config: config_lib.TransformerConfig) -> dict[str, Any]:
  has_window = config.sliding_window > 0
  return _unparse_sizes(config) | {
    'hidden_activation': 'gelu_pytorch_tanh'
    if config.mlp_activations[0] == 'gelu'
    else name_table.activation_of_theirs(config.mlp_activations[0]),
    'query_pre_attn_scalar': int(
      config.query_pre_attn_scalar or config.head_dim
    ),
    'sliding_window': config.sliding_window if has_window else 4096,
    'layer_types': _layer_types(
      config.global_layer_period if has_window else 1,
      config.num_decoder_layers,
    ),
    'attn_logit_softcapping': config.attention_softcap or None,
    'final_logit_softcapping': config.logits_softcap or None,
  }


def _unparse_gemma3(config: config_lib.TransformerConfig) -> dict[str, Any]:
  return _unparse_gemma(config) | {
    'rope_local_base_freq': config.rope_local_base or config.rope_base,
    'rope_scaling': name_table.rope_scaling_of_theirs(config),
  }


def _parse_t5gemma(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  for name in ('encoder', 'decoder'):
    missing = [key for key in _GEMMA2_KEYS if key not in config[name]]
    if missing:
      raise ValueError(f'{name} lacks {", ".join(missing)}')
  encoder = _parse_side(config, 'encoder', is_tied)
  return dataclasses.replace(
    encoder,
    num_encoder_layers=encoder.num_decoder_layers,
    # A config has one width. For unequal sides (9B-2B) only the encoder is
    # read, which is all that an LLM needs.
    num_decoder_layers=(
      0 if _differing(config) else config['decoder']['num_hidden_layers']
    ),
    decoder_embedding=True,
    dropout_rate=config.get('dropout_rate', 0.0),
  )


def _parse_side(
  config: Mapping[str, Any], name: str, is_tied: bool
) -> config_lib.TransformerConfig:
  return _parse_gemma({**config[name], 'model_type': 'gemma2'}, is_tied)


def _differing(config: Mapping[str, Any]) -> list[str]:
  """Returns the config fields in which a T5Gemma's two sides differ."""
  if not config['decoder']['num_hidden_layers']:
    return []
  encoder, decoder = (
    _parse_side(config, name, is_tied=True).to_json()
    for name in ('encoder', 'decoder')
  )
  return [
    name
    for name in encoder
    if name != 'num_decoder_layers' and encoder[name] != decoder[name]
  ]


def _left_out_of_t5gemma(config: Mapping[str, Any]) -> str:
  fields = ', '.join(_differing(config))
  return f'the decoder is left out, which differs in {fields}' if fields else ''


def _unparse_t5gemma(config: config_lib.TransformerConfig) -> dict[str, Any]:
  encoder = dataclasses.replace(
    config, num_decoder_layers=config.num_encoder_layers
  )
  module = {'model_type': 't5_gemma_module'}
  return {
    'encoder': _unparse_gemma(encoder) | module,
    'decoder': _unparse_gemma(config) | module | {'is_decoder': True},
    'is_encoder_decoder': True,
    'vocab_size': config.vocab_size,
    'tie_word_embeddings': config.logits_via_embedding,
    'dropout_rate': config.dropout_rate,
    'attention_dropout': config.dropout_rate,
  }


_KEYS = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'max_position_embeddings',
)
_GEMMA_KEYS = (
  *_KEYS,
  'num_key_value_heads',
  'head_dim',
  'hidden_activation',
  'sliding_window',
)
# Gemma 3 has no soft caps, so its configs may lack these keys.
_GEMMA2_KEYS = (
  *_GEMMA_KEYS,
  'attn_logit_softcapping',
  'final_logit_softcapping',
)
_IGNORED = (
  r'((en|de)coder\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq'
  rf'|{name_table.OTHER_HEADS}'
)


_SIZES = {
  'v': 'vocab_size',
  'd': 'hidden_size',
  'f': 'intermediate_size',
  'n': 'num_attention_heads',
  'k': 'num_key_value_heads',
  'h': 'head_dim',
  'decoder': 'num_hidden_layers',
}


def _llama(
  architecture: str,
  *keys: str,
  parse: Callable[..., config_lib.TransformerConfig] = _parse_llama,
  unparse: Callable[..., dict[str, Any]] = _unparse_llama,
  rows: tuple[Row, ...] = _LLAMA,
  may_be_tied: Callable[..., bool] = name_table.is_said_to_be_tied,
  **fixed: Any,
) -> Family:
  return Family(
    rows=rows,
    architecture=architecture,
    parse=parse,
    unparse=unparse,
    required=(*_KEYS, 'hidden_act', *keys),
    fixed={'quantization_config': None, **fixed},
    prefix='model.',
    ignored=_IGNORED,
    sizes=_SIZES,
    may_be_tied=may_be_tied,
  )


FAMILIES = {
  'llama': _llama('LlamaForCausalLM'),
  'mistral': _llama(
    'MistralForCausalLM',
    'num_key_value_heads',
    'sliding_window',
    parse=_parse_mistral,
    unparse=_unparse_mistral,
    layer_types=None,  # MistralForCausalLM gives all layers the window
    attention_bias=False,
    mlp_bias=False,
  ),
  'olmo2': _llama(
    'Olmo2ForCausalLM',
    'rms_norm_eps',
    parse=_parse_olmo2,
    unparse=_unparse_olmo2,
    rows=_OLMO2,
    mlp_bias=False,
  ),
  'smollm3': _llama(
    'SmolLM3ForCausalLM',
    'num_key_value_heads',
    parse=_parse_smollm3,
    unparse=_unparse_smollm3,
    may_be_tied=name_table.may_be_tied,
    use_sliding_window=False,
  ),
  'qwen2': _llama(
    'Qwen2ForCausalLM',
    'num_key_value_heads',
    parse=_parse_qwen,
    unparse=_unparse_qwen,
  ),
  'qwen3': _llama(
    'Qwen3ForCausalLM',
    'num_key_value_heads',
    'head_dim',
    parse=_parse_qwen,
    unparse=_unparse_qwen,
  ),
  'gemma2': Family(
    rows=_GEMMA,
    architecture='Gemma2ForCausalLM',
    parse=_parse_gemma,
    unparse=_unparse_gemma,
    required=_GEMMA2_KEYS,
    fixed={'quantization_config': None},
    prefix='model.',
    ignored=_IGNORED,
    sizes=_SIZES,
  ),
  'gemma3_text': Family(
    rows=_GEMMA,
    architecture='Gemma3ForCausalLM',
    parse=_parse_gemma,
    unparse=_unparse_gemma3,
    required=_GEMMA_KEYS,
    fixed={'quantization_config': None},
    prefix='model.',
    ignored=_IGNORED,
    sizes=_SIZES,
  ),
  't5gemma': Family(
    rows=_T5GEMMA,
    architecture='T5GemmaForConditionalGeneration',
    parse=_parse_t5gemma,
    unparse=_unparse_t5gemma,
    required=('encoder', 'decoder'),
    fixed={'quantization_config': None},
    prefix='model.',
    ignored=_IGNORED,
    sizes={key: f'encoder.{name}' for key, name in _SIZES.items()}
    | {
      'encoder': 'encoder.num_hidden_layers',
      'decoder': 'decoder.num_hidden_layers',
    },
    left_out=_left_out_of_t5gemma,
  ),
}
