# SPDX-License-Identifier: Apache-2.0
"""Tensor names and configs of GPT-2, OPT and GPT-NeoX in transformers.

These are decoder-only models with LayerNorm and biases. Models of Llama's
architecture are in `llama_names.py`.
"""

from collections.abc import Mapping
from typing import Any

from l2s_jax.models import config as config_lib
from l2s_jax.weights.families import name_table
from l2s_jax.weights.families.name_table import Family, Row

# GPT-2's Conv1D stores kernels as [in, out].
_LAYER_NORM = (
  Row('scale', 'weight', 'd -> d'),
  Row('bias', 'bias', 'd -> d'),
)
_GPT2 = (
  Row('token_embedder/embedding', 'wte.weight', 'v d -> v d'),
  Row('position_embedder/embedding', 'wpe.weight', 'p d -> p d'),
  Row('logits_dense/kernel', 'lm_head.weight', 'v d -> d v'),
  *name_table.under('decoder/final_norm/', 'ln_f.', _LAYER_NORM),
  *name_table.under(
    'decoder/layers/',
    'h.{layer}.',
    (
      *name_table.under('pre_self_attention_norm/', 'ln_1.', _LAYER_NORM),
      *name_table.under(
        'self_attention/',
        'attn.',
        (
          Row('query/kernel', 'c_attn.weight', 'd (c n h) -> d n h', part=0),
          Row('key/kernel', 'c_attn.weight', 'd (c n h) -> d n h', part=1),
          Row('value/kernel', 'c_attn.weight', 'd (c n h) -> d n h', part=2),
          Row('query/bias', 'c_attn.bias', '(c n h) -> n h', part=0),
          Row('key/bias', 'c_attn.bias', '(c n h) -> n h', part=1),
          Row('value/bias', 'c_attn.bias', '(c n h) -> n h', part=2),
          Row('out/kernel', 'c_proj.weight', '(n h) d -> n h d'),
          Row('out/bias', 'c_proj.bias', 'd -> d'),
        ),
      ),
      *name_table.under('pre_mlp_norm/', 'ln_2.', _LAYER_NORM),
      *name_table.under(
        'mlp/',
        'mlp.',
        (
          Row('wi/kernel', 'c_fc.weight', 'd f -> d f'),
          Row('wi/bias', 'c_fc.bias', 'f -> f'),
          Row('wo/kernel', 'c_proj.weight', 'f d -> f d'),
          Row('wo/bias', 'c_proj.bias', 'd -> d'),
        ),
      ),
    ),
  ),
)


# PyTorch's Linear stores kernels as [out, in].
_OPT = (
  Row('token_embedder/embedding', 'decoder.embed_tokens.weight', 'v d -> v d'),
  Row(
    'position_embedder/embedding',
    'decoder.embed_positions.weight',
    'p d -> p d',
  ),
  Row('logits_dense/kernel', 'lm_head.weight', 'v d -> d v'),
  *name_table.under(
    'decoder/final_norm/', 'decoder.final_layer_norm.', _LAYER_NORM
  ),
  *name_table.under(
    'decoder/layers/',
    'decoder.layers.{layer}.',
    (
      *name_table.under(
        'pre_self_attention_norm/', 'self_attn_layer_norm.', _LAYER_NORM
      ),
      *name_table.under(
        'self_attention/',
        'self_attn.',
        (
          Row('query/kernel', 'q_proj.weight', '(n h) d -> d n h'),
          Row('query/bias', 'q_proj.bias', '(n h) -> n h'),
          Row('key/kernel', 'k_proj.weight', '(n h) d -> d n h'),
          Row('key/bias', 'k_proj.bias', '(n h) -> n h'),
          Row('value/kernel', 'v_proj.weight', '(n h) d -> d n h'),
          Row('value/bias', 'v_proj.bias', '(n h) -> n h'),
          Row('out/kernel', 'out_proj.weight', 'd (n h) -> n h d'),
          Row('out/bias', 'out_proj.bias', 'd -> d'),
        ),
      ),
      *name_table.under('pre_mlp_norm/', 'final_layer_norm.', _LAYER_NORM),
      Row('mlp/wi/kernel', 'fc1.weight', 'f d -> d f'),
      Row('mlp/wi/bias', 'fc1.bias', 'f -> f'),
      Row('mlp/wo/kernel', 'fc2.weight', 'd f -> f d'),
      Row('mlp/wo/bias', 'fc2.bias', 'd -> d'),
    ),
  ),
)

# GPT-NeoX's fused projection stores query, key and value side by side within
# each head.
_FUSED = 'query_key_value.'
_GPT_NEOX = (
  Row('token_embedder/embedding', 'embed_in.weight', 'v d -> v d'),
  Row('logits_dense/kernel', 'embed_out.weight', 'v d -> d v'),
  *name_table.under('decoder/final_norm/', 'final_layer_norm.', _LAYER_NORM),
  *name_table.under(
    'decoder/layers/',
    'layers.{layer}.',
    (
      *name_table.under(
        'pre_self_attention_norm/', 'input_layernorm.', _LAYER_NORM
      ),
      *name_table.under(
        'self_attention/',
        'attention.',
        (
          Row('query/kernel', _FUSED + 'weight', '(n c h) d -> d n h', part=0),
          Row('key/kernel', _FUSED + 'weight', '(n c h) d -> d n h', part=1),
          Row('value/kernel', _FUSED + 'weight', '(n c h) d -> d n h', part=2),
          Row('query/bias', _FUSED + 'bias', '(n c h) -> n h', part=0),
          Row('key/bias', _FUSED + 'bias', '(n c h) -> n h', part=1),
          Row('value/bias', _FUSED + 'bias', '(n c h) -> n h', part=2),
          Row('out/kernel', 'dense.weight', 'd (n h) -> n h d'),
          Row('out/bias', 'dense.bias', 'd -> d'),
        ),
      ),
      *name_table.under(
        'pre_mlp_norm/', 'post_attention_layernorm.', _LAYER_NORM
      ),
      *name_table.under(
        'mlp/',
        'mlp.',
        (
          Row('wi/kernel', 'dense_h_to_4h.weight', 'f d -> d f'),
          Row('wi/bias', 'dense_h_to_4h.bias', 'f -> f'),
          Row('wo/kernel', 'dense_4h_to_h.weight', 'd f -> f d'),
          Row('wo/bias', 'dense_4h_to_h.bias', 'd -> d'),
        ),
      ),
    ),
  ),
)


def _parse_gpt2(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  stddev = config.get('initializer_range', 0.02)
  return config_lib.TransformerConfig(
    vocab_size=config['vocab_size'],
    emb_dim=config['n_embd'],
    num_heads=config['n_head'],
    head_dim=name_table.divide(config, 'n_embd', 'n_head'),
    mlp_dim=config.get('n_inner') or 4 * config['n_embd'],
    num_decoder_layers=config['n_layer'],
    mlp_activations=(
      name_table.activation(config.get('activation_function', 'gelu_new')),
    ),
    norm='layer',
    norm_epsilon=config.get('layer_norm_epsilon', 1e-5),
    use_bias=True,
    positions='learned',
    max_positions=config['n_positions'],
    scale_attention=config.get('scale_attn_weights', True),
    logits_via_embedding=is_tied,
    scale_logits=False,
    dropout_rate=config.get('resid_pdrop', 0.1),
    kernel_init_stddev=stddev,
    embedding_init_stddev=stddev,
  )


def _unparse_gpt2(config: config_lib.TransformerConfig) -> dict[str, Any]:
  return {
    'vocab_size': config.vocab_size,
    'n_embd': config.emb_dim,
    'n_head': config.num_heads,
    'n_inner': config.mlp_dim,
    'n_layer': config.num_decoder_layers,
    'n_positions': config.max_positions,
    'activation_function': name_table.activation_of_theirs(
      config.mlp_activations[0]
    ),
    'layer_norm_epsilon': config.norm_epsilon,
    'scale_attn_weights': config.scale_attention,
    'tie_word_embeddings': config.logits_via_embedding,
    'resid_pdrop': config.dropout_rate,
    'embd_pdrop': config.dropout_rate,
    'attn_pdrop': config.dropout_rate,
    'initializer_range': config.kernel_init_stddev or 0.02,
  }


def _parse_opt(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  d = config['hidden_size']
  if config.get('word_embed_proj_dim') not in (None, d):
    raise ValueError(
      f'word_embed_proj_dim={config["word_embed_proj_dim"]} is not '
      f'hidden_size={d}: projected embeddings (OPT-350M) are not supported'
    )
  stddev = config.get('init_std', 0.02)
  return config_lib.TransformerConfig(
    vocab_size=config['vocab_size'],
    emb_dim=d,
    num_heads=config['num_attention_heads'],
    head_dim=name_table.divide(config, 'hidden_size', 'num_attention_heads'),
    mlp_dim=config['ffn_dim'],
    num_decoder_layers=config['num_hidden_layers'],
    mlp_activations=(
      name_table.activation(config.get('activation_function', 'relu')),
    ),
    norm='layer',
    norm_epsilon=1e-5,  # default of torch.nn.LayerNorm
    use_bias=True,
    positions='learned',
    max_positions=config['max_position_embeddings'],
    position_offset=2,
    scale_attention=True,
    logits_via_embedding=is_tied,
    scale_logits=False,
    dropout_rate=config.get('dropout', 0.1),
    kernel_init_stddev=stddev,
    embedding_init_stddev=stddev,
  )


def _unparse_opt(config: config_lib.TransformerConfig) -> dict[str, Any]:
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.emb_dim,
    'word_embed_proj_dim': config.emb_dim,
    'num_attention_heads': config.num_heads,
    'ffn_dim': config.mlp_dim,
    'num_hidden_layers': config.num_decoder_layers,
    'activation_function': name_table.activation_of_theirs(
      config.mlp_activations[0]
    ),
    'max_position_embeddings': config.max_positions,
    'do_layer_norm_before': True,
    'tie_word_embeddings': config.logits_via_embedding,
    'dropout': config.dropout_rate,
    'attention_dropout': config.dropout_rate,
    'init_std': config.kernel_init_stddev or 0.02,
  }


def _parse_gpt_neox(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  head_dim = name_table.divide(config, 'hidden_size', 'num_attention_heads')
  rope = {
    'rope_theta': config.get('rotary_emb_base', 10_000),
    'partial_rotary_factor': config.get('rotary_pct', 0.25),
    **(config.get('rope_parameters') or config.get('rope_scaling') or {}),
  }
  rope_dim = int(head_dim * rope['partial_rotary_factor'])
  stddev = config.get('initializer_range', 0.02)
  return config_lib.TransformerConfig(
    vocab_size=config['vocab_size'],
    emb_dim=config['hidden_size'],
    num_heads=config['num_attention_heads'],
    head_dim=head_dim,
    mlp_dim=config['intermediate_size'],
    num_decoder_layers=config['num_hidden_layers'],
    mlp_activations=(name_table.activation(config.get('hidden_act', 'gelu')),),
    norm='layer',
    norm_epsilon=config.get('layer_norm_eps', 1e-5),
    parallel_residual=config.get('use_parallel_residual', True),
    use_bias=True,
    positions='rotary',
    max_positions=config.get('max_position_embeddings', 2048),
    rope_base=float(rope['rope_theta']),
    rope_dim=None if rope_dim == head_dim else rope_dim,
    **name_table.rope_scaling(rope),
    scale_attention=True,
    logits_via_embedding=is_tied,
    scale_logits=False,
    dropout_rate=config.get('hidden_dropout', 0.0),
    kernel_init_stddev=stddev,
    embedding_init_stddev=stddev,
  )


def _unparse_gpt_neox(config: config_lib.TransformerConfig) -> dict[str, Any]:
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.emb_dim,
    'num_attention_heads': config.num_heads,
    'intermediate_size': config.mlp_dim,
    'num_hidden_layers': config.num_decoder_layers,
    'hidden_act': name_table.activation_of_theirs(config.mlp_activations[0]),
    'layer_norm_eps': config.norm_epsilon,
    'use_parallel_residual': config.parallel_residual,
    'max_position_embeddings': config.max_positions
    or name_table.ROTARY_CONTEXT,
    'rotary_emb_base': config.rope_base,
    'rotary_pct': config.rotary_dim / config.head_dim,
    'rope_scaling': name_table.rope_scaling_of_theirs(config),
    'tie_word_embeddings': config.logits_via_embedding,
    'hidden_dropout': config.dropout_rate,
    'attention_dropout': config.dropout_rate,
    'initializer_range': config.kernel_init_stddev or 0.02,
  }


FAMILIES = {
  'gpt2': Family(
    rows=_GPT2,
    architecture='GPT2LMHeadModel',
    parse=_parse_gpt2,
    unparse=_unparse_gpt2,
    required=('vocab_size', 'n_embd', 'n_layer', 'n_head', 'n_positions'),
    sizes={
      'v': 'vocab_size',
      'd': 'n_embd',
      'n': 'n_head',
      'h': '(n_embd / n_head)',
      'f': 'n_inner',
      'p': 'n_positions',
      'decoder': 'n_layer',
    },
    fixed={
      'quantization_config': None,
      'scale_attn_by_inverse_layer_idx': False,
      'add_cross_attention': False,
    },
    prefix='transformer.',
    # Buffers: causal masks.
    ignored=rf'h\.\d+\.attn\.(bias|masked_bias)|{name_table.OTHER_HEADS}',
  ),
  'opt': Family(
    rows=_OPT,
    architecture='OPTForCausalLM',
    parse=_parse_opt,
    unparse=_unparse_opt,
    required=(
      'vocab_size',
      'hidden_size',
      'num_attention_heads',
      'ffn_dim',
      'num_hidden_layers',
      'max_position_embeddings',
    ),
    sizes={
      'v': 'vocab_size',
      'd': 'hidden_size',
      'n': 'num_attention_heads',
      'h': '(hidden_size / num_attention_heads)',
      'f': 'ffn_dim',
      'p': '2 + max_position_embeddings',
      'decoder': 'num_hidden_layers',
    },
    fixed={
      'quantization_config': None,
      'do_layer_norm_before': True,
      '_remove_final_layer_norm': False,
      'layer_norm_elementwise_affine': True,
      'enable_bias': True,
    },
    prefix='model.',
    ignored=rf'decoder\.version|{name_table.OTHER_HEADS}',  # from fairseq
  ),
  'gpt_neox': Family(
    rows=_GPT_NEOX,
    architecture='GPTNeoXForCausalLM',
    parse=_parse_gpt_neox,
    unparse=_unparse_gpt_neox,
    required=(
      'vocab_size',
      'hidden_size',
      'num_attention_heads',
      'intermediate_size',
      'num_hidden_layers',
    ),
    sizes={
      'v': 'vocab_size',
      'd': 'hidden_size',
      'n': 'num_attention_heads',
      'h': '(hidden_size / num_attention_heads)',
      'f': 'intermediate_size',
      'decoder': 'num_hidden_layers',
    },
    fixed={'quantization_config': None, 'attention_bias': True},
    prefix='gpt_neox.',
    aliases={'embed_out.weight': ('lm_head.weight',)},
    # Buffers: causal masks and rotary frequencies.
    ignored=r'layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)'
    rf'|rotary_emb\.inv_freq|{name_table.OTHER_HEADS}',
    may_be_tied=name_table.is_said_to_be_tied,
  ),
}
