# SPDX-License-Identifier: Apache-2.0
"""Typed access to config.json of a Hugging Face folder.

Each value is checked when it is read; an error names its key. Unused keys may
hold anything.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from l2s_jax.models import config as config_lib

_COUNT = 'a whole number from 1 to 2**31 - 1'
_ANY_COUNT = 'a whole number from 0 to 2**31 - 1'
_POSITIVE = 'a number above 0'
_NUMBER = 'a number, 0 or more'
_FLAG = 'true or false'
_TEXT = 'a string'
_OBJECT = 'an object'
_TEXTS = 'a list of strings'
_BITS = 'a list of 0 and 1'
_IDS = 'a token id, or a list of them'
_KEYS = {
  _COUNT: (
    'vocab_size d_model d_kv d_ff num_layers num_heads '
    'relative_attention_num_buckets relative_attention_max_distance n_embd '
    'n_head n_layer n_positions hidden_size num_attention_heads '
    'intermediate_size max_position_embeddings ffn_dim n_inner '
    'num_key_value_heads head_dim word_embed_proj_dim sliding_window_pattern '
    'original_max_position_embeddings'
  ),
  # 0 for an encoder-only T5, and for a T5Gemma without a decoder.
  _ANY_COUNT: (
    'num_decoder_layers num_hidden_layers sliding_window max_window_layers '
    'no_rope_layer_interval'
  ),
  _POSITIVE: (
    'rope_theta rope_local_base_freq rotary_emb_base rotary_pct '
    'partial_rotary_factor query_pre_attn_scalar factor low_freq_factor '
    'high_freq_factor beta_fast beta_slow attention_factor'
  ),
  _NUMBER: (
    'layer_norm_epsilon rms_norm_eps layer_norm_eps dropout_rate resid_pdrop '
    'dropout hidden_dropout attention_dropout initializer_range init_std '
    'attn_logit_softcapping final_logit_softcapping'
  ),
  _FLAG: (
    'is_gated_act scale_decoder_outputs tie_word_embeddings scale_attn_weights '
    'use_parallel_residual attention_bias mlp_bias use_bidirectional_attention '
    'use_sliding_window'
  ),
  _TEXT: (
    'model_type feed_forward_proj dense_act_fn activation_function hidden_act '
    'hidden_activation rope_type type'
  ),
  _OBJECT: (
    'rope_parameters rope_scaling encoder decoder full_attention '
    'sliding_attention'
  ),
  _TEXTS: 'layer_types',
  _BITS: 'no_rope_layers',
  _IDS: 'bos_token_id eos_token_id pad_token_id decoder_start_token_id',
}
_KIND_OF = {key: kind for kind, keys in _KEYS.items() for key in keys.split()}
# Keys for which the parsers accept null.
_NULLABLE = {
  *_KEYS[_IDS].split(),
  'attention_bias',
  'attention_dropout',
  'attention_factor',
  'attn_logit_softcapping',
  'beta_fast',
  'beta_slow',
  'final_logit_softcapping',
  'head_dim',
  'hidden_activation',
  'layer_types',
  'mlp_bias',
  'n_inner',
  'no_rope_layers',
  'num_decoder_layers',
  'num_key_value_heads',
  'original_max_position_embeddings',
  'rope_parameters',
  'rope_scaling',
  'scale_decoder_outputs',
  'sliding_window',
  'tie_word_embeddings',
  'use_bidirectional_attention',
  'word_embed_proj_dim',
}


class Checked(Mapping[str, Any]):
  """A JSON object whose values are type-checked by key on access.

  A value of another type raises ValueError, a missing key `MissingError`. Both
  messages continue 'FILE: ...'.
  """

  def __init__(self, content: Mapping[str, Any], prefix: str = ''):
    self._content = content
    self._prefix = prefix

  def __getitem__(self, key: str) -> Any:
    if key not in self._content:
      raise MissingError(f'{self._prefix}{key}')
    value = self._content[key]
    if value is None and key in _NULLABLE:
      return None
    kind = _KIND_OF.get(key)
    if kind is not None and not _is(value, kind):
      raise ValueError(
        f'{self._prefix}{key} is {config_lib.shorten(repr(value))}; expected '
        f'{kind}'
      )
    if kind == _OBJECT:
      return Checked(value, f'{self._prefix}{key}.')
    # JAX accepts no Python int beyond 32 bits.
    return float(value) if kind in (_POSITIVE, _NUMBER) else value

  def __iter__(self) -> Iterator[str]:
    return iter(self._content)

  def __len__(self) -> int:
    return len(self._content)


class MissingError(KeyError):
  """A key is missing in config.json."""


def _is(value: Any, kind: str) -> bool:
  if kind == _COUNT:
    return config_lib.is_count(value) and value > 0
  if kind == _ANY_COUNT:
    return config_lib.is_count(value) and value >= 0
  if kind == _POSITIVE:
    return config_lib.is_number(value) and value > 0
  if kind == _NUMBER:
    return config_lib.is_number(value) and value >= 0
  if kind == _FLAG:
    return isinstance(value, bool)
  if kind == _TEXT:
    return isinstance(value, str)
  if kind == _OBJECT:
    return isinstance(value, Mapping)
  if kind == _TEXTS:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)
  if kind == _BITS:
    return isinstance(value, list) and all(
      config_lib.is_count(x) and x in (0, 1) for x in value
    )
  ids = value if isinstance(value, list) else [value]
  return all(config_lib.is_count(i) and i >= -1 for i in ids)
