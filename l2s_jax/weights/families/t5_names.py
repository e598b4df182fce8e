# SPDX-License-Identifier: Apache-2.0
"""Tensor names and configs of the T5 family in the package transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from l2s_jax.models import config as config_lib
from l2s_jax.weights.families import name_table
from l2s_jax.weights.families.name_table import Family, Row

# PyTorch's Linear stores kernels as [out, in].
_T5_ATTENTION = (
  Row('query/kernel', 'q.weight', '(n h) d -> d n h'),
  Row('key/kernel', 'k.weight', '(n h) d -> d n h'),
  Row('value/kernel', 'v.weight', '(n h) d -> d n h'),
  Row('out/kernel', 'o.weight', 'd (n h) -> n h d'),
)
_T5_MLP = (
  Row('wi/kernel', 'wi.weight', 'f d -> d f'),
  Row('wi_0/kernel', 'wi_0.weight', 'f d -> d f'),
  Row('wi_1/kernel', 'wi_1.weight', 'f d -> d f'),
  Row('wo/kernel', 'wo.weight', 'd f -> f d'),
)
_T5_RELPOS = (
  Row(
    'relpos_bias/rel_embedding',
    'block.0.layer.0.SelfAttention.relative_attention_bias.weight',
    'r n -> n r',
  ),
  Row('final_norm/scale', 'final_layer_norm.weight', 'd -> d'),
)
_T5 = (
  Row('token_embedder/embedding', 'shared.weight', 'v d -> v d'),
  Row('logits_dense/kernel', 'lm_head.weight', 'v d -> d v'),
  *name_table.under('encoder/', 'encoder.', _T5_RELPOS),
  *name_table.under('decoder/', 'decoder.', _T5_RELPOS),
  *name_table.under(
    'encoder/layers/',
    'encoder.block.{layer}.layer.',
    (
      Row('pre_self_attention_norm/scale', '0.layer_norm.weight', 'd -> d'),
      *name_table.under('self_attention/', '0.SelfAttention.', _T5_ATTENTION),
      Row('pre_mlp_norm/scale', '1.layer_norm.weight', 'd -> d'),
      *name_table.under('mlp/', '1.DenseReluDense.', _T5_MLP),
    ),
  ),
  *name_table.under(
    'decoder/layers/',
    'decoder.block.{layer}.layer.',
    (
      Row('pre_self_attention_norm/scale', '0.layer_norm.weight', 'd -> d'),
      *name_table.under('self_attention/', '0.SelfAttention.', _T5_ATTENTION),
      Row('pre_cross_attention_norm/scale', '1.layer_norm.weight', 'd -> d'),
      *name_table.under(
        'cross_attention/', '1.EncDecAttention.', _T5_ATTENTION
      ),
      Row('pre_mlp_norm/scale', '2.layer_norm.weight', 'd -> d'),
      *name_table.under('mlp/', '2.DenseReluDense.', _T5_MLP),
    ),
  ),
)


def _parse(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  projection = config.get(
    'feed_forward_proj',
    'relu' if config['model_type'] == 't5' else 'gated-gelu',
  )
  is_gated = config.get('is_gated_act', projection.startswith('gated-'))
  activation = config.get(
    'dense_act_fn',
    # T5's GELU is the tanh approximation; transformers corrects the name in
    # this case only.
    'gelu_new'
    if projection == 'gated-gelu'
    else projection.removeprefix('gated-'),
  )
  is_scaled = config['model_type'] == 't5' and _is_scaled(config)
  num_layers = config['num_layers']
  num_decoder_layers = config.get('num_decoder_layers')
  return config_lib.TransformerConfig(
    vocab_size=config['vocab_size'],
    emb_dim=config['d_model'],
    num_heads=config['num_heads'],
    head_dim=config['d_kv'],
    mlp_dim=config['d_ff'],
    num_encoder_layers=num_layers,
    num_decoder_layers=num_layers
    if num_decoder_layers is None
    else num_decoder_layers,
    mlp_activations=(name_table.activation(activation), 'linear')
    if is_gated
    else (name_table.activation(activation),),
    norm_epsilon=config.get('layer_norm_epsilon', 1e-6),
    relpos_buckets=config.get('relative_attention_num_buckets', 32),
    relpos_max_distance=config.get('relative_attention_max_distance', 128),
    relpos_per_layer=config['model_type'] == 'umt5',
    logits_via_embedding=is_tied,
    scale_logits=is_scaled and is_tied,
    scale_untied_logits=is_scaled and not is_tied,
    dropout_rate=config.get('dropout_rate', 0.1),
  )


def _is_scaled(config: Mapping[str, Any]) -> bool:
  """Returns whether a T5 scales its decoder output by 1 / sqrt(d_model).

  T5 1.0 does, T5 1.1 does not. Since transformers 5 config.json says so by
  `scale_decoder_outputs`; before, `tie_word_embeddings` implied it.
  """
  said = config.get('scale_decoder_outputs')
  if said is None:
    said = config.get('tie_word_embeddings')
  return said is not False


def _remark(config: Mapping[str, Any], is_tied: bool) -> str:
  if (
    is_tied
    or config['model_type'] != 't5'
    or config.get('scale_decoder_outputs') is not None
    or not _is_scaled(config)
  ):
    return ''
  return (
    'lm_head.weight differs from the embedding table, although config.json '
    'lacks tie_word_embeddings=false. It is used with scaled logits, as in '
    'transformers 5; transformers 4 would replace it by the table'
  )


def _unparse(config: config_lib.TransformerConfig) -> dict[str, Any]:
  is_scaled = (
    config.scale_logits
    if config.logits_via_embedding
    else config.scale_untied_logits
  )
  name = name_table.activation_of_theirs(config.mlp_activations[0])
  if len(config.mlp_activations) > 1:
    name = 'gated-' + ('gelu' if name == 'gelu_new' else name)
  return {
    'vocab_size': config.vocab_size,
    'd_model': config.emb_dim,
    'd_kv': config.head_dim,
    'd_ff': config.mlp_dim,
    'num_layers': config.num_encoder_layers,
    'num_decoder_layers': config.num_decoder_layers,
    'num_heads': config.num_heads,
    'feed_forward_proj': name,
    'layer_norm_epsilon': config.norm_epsilon,
    'relative_attention_num_buckets': config.relpos_buckets,
    'relative_attention_max_distance': config.relpos_max_distance,
    'dropout_rate': config.dropout_rate,
    'scale_decoder_outputs': is_scaled,
    # In transformers before 5 this key also decides on the scaling. From 5 on,
    # only a stored head is untied, whatever the key says.
    'tie_word_embeddings': config.logits_via_embedding or is_scaled,
  }


_FAMILY = Family(
  rows=_T5,
  architecture='T5ForConditionalGeneration',
  parse=_parse,
  unparse=_unparse,
  required=(
    'vocab_size',
    'd_model',
    'd_kv',
    'd_ff',
    'num_layers',
    'num_heads',
  ),
  remark=_remark,
  sizes={
    'v': 'vocab_size',
    'd': 'd_model',
    'n': 'num_heads',
    'h': 'd_kv',
    'f': 'd_ff',
    'r': 'relative_attention_num_buckets',
    'encoder': 'num_layers',
    'decoder': 'num_decoder_layers',
  },
  fixed={'quantization_config': None},
  aliases={
    'shared.weight': (
      'encoder.embed_tokens.weight',
      'decoder.embed_tokens.weight',
    )
  },
  # The first T5 release has an unused bias in its cross-attention.
  ignored=r'(en|de)coder\.embed_tokens\.weight'
  r'|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias'
  rf'\.weight|{name_table.OTHER_HEADS}',
)

# umT5 has relative position biases in each layer.
_UMT5 = tuple(
  dataclasses.replace(
    row,
    ours=row.ours.replace('/relpos_bias', '/layers/relpos_bias'),
    theirs=row.theirs.replace('block.0.', 'block.{layer}.'),
  )
  for row in _T5
)

FAMILIES = {
  't5': _FAMILY,
  'mt5': dataclasses.replace(
    _FAMILY, architecture='MT5ForConditionalGeneration'
  ),
  'umt5': dataclasses.replace(
    _FAMILY, rows=_UMT5, architecture='UMT5ForConditionalGeneration'
  ),
}
