# SPDX-License-Identifier: Apache-2.0
"""Names and configs of the T5 family, as the package transformers has them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from l2s_jax.models import config as config_lib
from l2s_jax.weights import rows
from l2s_jax.weights.rows import Family, Row

# PyTorch's Linear keeps [out, in].
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
  *rows.under('encoder/', 'encoder.', _T5_RELPOS),
  *rows.under('decoder/', 'decoder.', _T5_RELPOS),
  *rows.under(
    'encoder/layers/',
    'encoder.block.{layer}.layer.',
    (
      Row('pre_self_attention_norm/scale', '0.layer_norm.weight', 'd -> d'),
      *rows.under('self_attention/', '0.SelfAttention.', _T5_ATTENTION),
      Row('pre_mlp_norm/scale', '1.layer_norm.weight', 'd -> d'),
      *rows.under('mlp/', '1.DenseReluDense.', _T5_MLP),
    ),
  ),
  *rows.under(
    'decoder/layers/',
    'decoder.block.{layer}.layer.',
    (
      Row('pre_self_attention_norm/scale', '0.layer_norm.weight', 'd -> d'),
      *rows.under('self_attention/', '0.SelfAttention.', _T5_ATTENTION),
      Row('pre_cross_attention_norm/scale', '1.layer_norm.weight', 'd -> d'),
      *rows.under('cross_attention/', '1.EncDecAttention.', _T5_ATTENTION),
      Row('pre_mlp_norm/scale', '2.layer_norm.weight', 'd -> d'),
      *rows.under('mlp/', '2.DenseReluDense.', _T5_MLP),
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
    # What T5 calls GELU is the tanh approximation; transformers corrects the
    # name in this one case.
    'gelu_new'
    if projection == 'gated-gelu'
    else projection.removeprefix('gated-'),
  )
  # Only T5 v1.0 scales. Its config.json says so in its own words since
  # transformers 5; before, whether the head is tied stood for it.
  scale_logits = config['model_type'] == 't5' and config.get(
    'scale_decoder_outputs', config.get('tie_word_embeddings', True)
  )
  if config['model_type'] == 't5' and is_tied and not scale_logits:
    raise ValueError(
      'a T5 whose head is the embedding table scales its logits; an mT5 '
      'need not'
    )
  if scale_logits and not is_tied:
    raise ValueError(
      'it asks for scaled logits (scale_decoder_outputs, or '
      'tie_word_embeddings, is not false) and lm_head.weight is not the '
      'embedding table. A T5 v1.1 has tie_word_embeddings=false'
    )
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
    mlp_activations=(rows.activation(activation), 'linear')
    if is_gated
    else (rows.activation(activation),),
    norm_epsilon=config.get('layer_norm_epsilon', 1e-6),
    relpos_buckets=config.get('relative_attention_num_buckets', 32),
    relpos_max_distance=config.get('relative_attention_max_distance', 128),
    relpos_per_layer=config['model_type'] == 'umt5',
    logits_via_embedding=is_tied,
    scale_logits=scale_logits,
    dropout_rate=config.get('dropout_rate', 0.1),
  )


def _unparse(config: config_lib.TransformerConfig) -> dict[str, Any]:
  name = rows.activation_of_theirs(config.mlp_activations[0])
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
    'scale_decoder_outputs': config.scale_logits,
    # For transformers' T5 this, too, says whether to scale.
    'tie_word_embeddings': config.logits_via_embedding,
  }


def _may_be_tied(config: Mapping[str, Any]) -> bool:
  """Returns what a T5's config.json says in its own words.

  Since transformers 5 tie_word_embeddings is true in each of them, tied or not.
  """
  if config['model_type'] == 't5' and 'scale_decoder_outputs' in config:
    return config['scale_decoder_outputs']
  return rows.may_be_tied(config)


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
  fixed={'quantization_config': None},
  aliases={
    'shared.weight': (
      'encoder.embed_tokens.weight',
      'decoder.embed_tokens.weight',
    )
  },
  # The first release gave cross-attention a bias that nothing read.
  ignored=r'(en|de)coder\.embed_tokens\.weight'
  r'|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias'
  rf'\.weight|{rows.OTHER_HEADS}',
  may_be_tied=_may_be_tied,
)

# A table of relative positions for each layer.
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
