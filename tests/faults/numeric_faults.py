# SPDX-License-Identifier: Apache-2.0
"""Small faults of models and weights, and the tests that should see them."""

from typing import NamedTuple


class Fault(NamedTuple):
  """A snippet of the package and what takes its place.

  Attributes:
    name: of the fault.
    snippet: code that stands once in the whole package.
    replacement: the fault.
    tests: files of tests that should see it.
    keyword: chooses among their tests, as pytest's `-k`; none takes all.
  """

  name: str
  snippet: str
  replacement: str
  tests: tuple[str, ...]
  keyword: str | None = None


FAULTS = (
  Fault(
    'layer-norm-without-mean',
    'x -= x.mean(axis, keepdims=True)',
    'x -= 0',
    ('test_models.py',),
    'norms_against',
  ),
  Fault(
    'norm-without-epsilon',
    'variance + config.norm_epsilon',
    'variance',
    ('test_models.py',),
    'norms_against',
  ),
  Fault(
    'norm-without-unit-offset',
    'x *= 1 + scale if config.norm_unit_offset else scale',
    'x *= scale',
    ('test_parity.py',),
    'gemma',
  ),
  Fault(
    'tied-head-without-scale',
    'states *= config.emb_dim**-0.5',
    'pass',
    ('test_weights.py',),
    'known_weights_give',
  ),
  Fault(
    'gate-is-a-sum',
    'else hidden * branch',
    'else hidden + branch',
    ('test_models.py',),
    'gated_mlp',
  ),
  Fault(
    'dropout-keeps-the-rate',
    '1 - self.rate, shape',
    'self.rate, shape',
    ('test_models.py',),
    'dropout',
  ),
  Fault(
    'dropout-without-scale',
    '(is_kept / (1 - self.rate))',
    '(is_kept * 1.0)',
    ('test_models.py',),
    'dropout',
  ),
  Fault(
    'dropout-by-position',
    'shape = (*inputs.shape[:-2], 1, inputs.shape[-1])',
    'shape = inputs.shape',
    ('test_models.py',),
    'dropout',
  ),
  Fault(
    'softcap-of-one',
    'return bound * jnp.tanh(logits / bound) if bound',
    'return jnp.tanh(logits / bound) if bound',
    ('test_parity.py',),
    'gemma',
  ),
  Fault(
    'embedding-without-multiplier',
    '.astype(self.config.activation_dtype) * self.multiplier',
    '.astype(self.config.activation_dtype)',
    ('test_parity.py',),
    'gemma',
  ),
  Fault(
    'dense-without-bias',
    'x += bias.astype(dtype)',
    'bias.astype(dtype)',
    ('test_l2s.py',),
    'projector_against',
  ),
  Fault(
    'gelu-is-exact',
    "'gelu': functools.partial(nn.gelu, approximate=True)",
    "'gelu': functools.partial(nn.gelu, approximate=False)",
    ('test_weights.py', 'test_models.py'),
    'known_weights_give or gated_mlp',
  ),
  Fault(
    'gradient-of-a-kernel-halved',
    'of_x.astype(x.dtype), of_matrix.astype(matrix.dtype)',
    'of_x.astype(x.dtype), of_matrix.astype(matrix.dtype) / 2',
    ('test_models.py',),
    'products_have',
  ),
  Fault(
    'queries-scaled-by-width',
    'query *= (config.query_pre_attn_scalar or config.head_dim) ** -0.5',
    'query *= config.head_dim**-0.5',
    ('test_parity.py',),
    'gemma',
  ),
  Fault(
    'keys-without-norm',
    'key = self.key_norm(key)',
    'self.key_norm(key)',
    ('test_parity.py',),
    'qwen3',
  ),
  Fault(
    'keys-not-rotated',
    'key = positions.rotate(key, rotation)',
    'pass',
    ('test_parity.py',),
    'llama',
  ),
  Fault(
    'answer-sees-its-future',
    'return jnp.tril(jnp.ones((length, length), bool))[None, None]',
    'return jnp.tril(jnp.ones((length, length), bool), 1)[None, None]',
    ('test_models.py',),
    'later_answer and t5_1_0',
  ),
  Fault(
    'padding-sees-padding',
    'same & (key_segments > 0)[:, None, :]',
    'same',
    ('test_models.py',),
    'segment_mask',
  ),
  Fault(
    'segments-see-earlier-ones',
    'query_segments[:, :, None] == key_segments[:, None, :]',
    'query_segments[:, :, None] >= key_segments[:, None, :]',
    ('test_models.py',),
    'segment_mask',
  ),
  Fault(
    'mask-is-weak',
    'jnp.where(mask, 0.0, -1e10)',
    'jnp.where(mask, 0.0, -10.0)',
    ('test_models.py',),
    'more_padding and t5_1_0',
  ),
  Fault(
    'new-keys-before-old',
    '[_compare(query, past.key), logits], axis=-1',
    '[logits, _compare(query, past.key)], axis=-1',
    ('test_models.py',),
    'cached_decoding and t5_1_0',
  ),
  Fault(
    'positions-from-1',
    'jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1',
    'jnp.cumsum(valid, axis=1, dtype=jnp.int32)',
    ('test_models.py',),
    'positions_count',
  ),
  Fault(
    'bucket-of-offset-0',
    'buckets += (offset > 0) * num_buckets',
    'buckets += (offset >= 0) * num_buckets',
    ('test_models.py',),
    'buckets_against',
  ),
  Fault(
    'bucket-of-the-other-side',
    'distance = jnp.maximum(-offset, 0)',
    'distance = jnp.maximum(offset, 0)',
    ('test_models.py',),
    'buckets_against',
  ),
  Fault(
    'buckets-fewer-exact',
    'num_exact = num_buckets // 2',
    'num_exact = num_buckets // 2 - 1',
    ('test_models.py',),
    'buckets_against',
  ),
  Fault(
    'rotation-sign',
    'first * cos - second * sin',
    'first * cos + second * sin',
    ('test_models.py',),
    'rotary_angles',
  ),
  Fault(
    'window-one-wider',
    'return jnp.abs(offset) < window',
    'return jnp.abs(offset) <= window',
    ('test_models.py',),
    'windows_by_hand',
  ),
  Fault(
    'llama3-ramp',
    '(turns - low) / (high - low)',
    '(turns - high) / (high - low)',
    ('test_models.py',),
    'stretched_angles',
  ),
  Fault(
    'yarn-without-factor',
    'factor = config.rope_scaling[-1]',
    'factor = 1.0',
    ('test_parity.py',),
    'yarn',
  ),
  Fault(
    'slot-by-one',
    'slot=cache.slot + valid.shape[1]',
    'slot=cache.slot + 1',
    ('test_cache.py',),
  ),
  Fault(
    'rewind-keeps-one-more',
    'kept = jnp.arange(cache.num_slots) < slot[:, None]',
    'kept = jnp.arange(cache.num_slots) <= slot[:, None]',
    ('test_cache.py',),
  ),
  Fault(
    'drafts-see-later-ones',
    'jnp.broadcast_to(jnp.tril(jnp.ones(shape[1:], bool)), shape)',
    'jnp.broadcast_to(jnp.ones(shape[1:], bool), shape)',
    ('test_cache.py',),
  ),
  Fault(
    'global-layers-one-off',
    'jnp.asarray((layer + 1) % period == 0',
    'jnp.asarray(layer % period == 0',
    ('test_parity.py',),
    'gemma',
  ),
  Fault(
    'windows-from-the-next-layer',
    'layer < config.first_window_layer',
    'layer <= config.first_window_layer',
    ('test_parity.py',),
    'qwen2',
  ),
  Fault(
    'rotary-positions-everywhere',
    'rotation = rotation.only_if(',
    'rotation.only_if(',
    ('test_parity.py',),
    'smollm3',
  ),
  Fault(
    'norms-of-single-heads',
    "(config, axes[1:] if all_heads else ('kv',))",
    "(config, ('kv',))",
    ('test_parity.py',),
    'olmo2',
  ),
  Fault(
    'windows-everywhere',
    'attention.mask_bias(near | is_global)',
    'attention.mask_bias(near)',
    ('test_parity.py',),
    'gemma',
  ),
  Fault(
    'cross-attention-sees-padding',
    'attention.mask_bias(cache.cross_valid[:, None, None])',
    'attention.mask_bias(cache.cross_valid[:, None, None] | True)',
    ('test_models.py',),
    'cached_decoding and t5_1_0',
  ),
  Fault(
    'prefix-sees-padding',
    'valid.astype(jnp.int32),',
    '(valid | True).astype(jnp.int32),',
    ('test_models.py',),
    'more_padding and gpt2',
  ),
  Fault(
    'prefix-one-longer',
    'jnp.arange(mask.shape[-1]) < visibility.prefix',
    'jnp.arange(mask.shape[-1]) <= visibility.prefix',
    ('test_models.py',),
    'bidirectional_prefix',
  ),
  Fault(
    'positions-without-offset',
    'jnp.minimum(token_positions, last) + self.config.position_offset',
    'jnp.minimum(token_positions, last)',
    ('test_parity.py',),
    'opt',
  ),
  Fault(
    'z-of-padding',
    'projected = jnp.where(valid[..., None], projected, 0)',
    'pass',
    ('test_l2s.py',),
    'fuse_by_hand',
  ),
  Fault(
    'z-subtracted',
    'return prompt_embeddings + projected',
    'return prompt_embeddings - projected',
    ('test_l2s.py',),
    'fuse_by_hand',
  ),
  Fault(
    'projector-without-relu',
    ')(nn.relu(hidden))',
    ')(hidden)',
    ('test_l2s.py',),
    'projector_against',
  ),
  Fault(
    'llm-with-dropout',
    'states = self.llm.encode(embeddings, segment_ids, deterministic=True)',
    'states = self.llm.encode(embeddings, segment_ids, deterministic=False)',
    ('test_l2s.py',),
    'without_dropout',
  ),
  Fault(
    'z-without-scale',
    "projected *= batch['llm_scale'][:, None, None].astype(projected.dtype)",
    'pass',
    ('test_l2s.py',),
    'zero_scale or without_z',
  ),
  Fault(
    'control-prompt-unread',
    "tokens = batch.get('llm_input_tokens', batch['encoder_input_tokens'])",
    "tokens = batch['encoder_input_tokens']",
    ('test_l2s.py',),
    'the_llm_reads_the_prompt',
  ),
  Fault(
    'heads-not-contracted',
    "first + (2 if path[-2:-1] == ('out',) else 1)",
    'first + 1',
    ('test_quantization.py',),
  ),
  Fault(
    'gpt2-keys-are-values',
    "Row('key/kernel', 'c_attn.weight', 'd (c n h) -> d n h', part=1)",
    "Row('key/kernel', 'c_attn.weight', 'd (c n h) -> d n h', part=2)",
    ('test_weights.py',),
    'side_by_side or known_weights_give',
  ),
  Fault(
    'neox-fused-order',
    "Row('query/kernel', _FUSED + 'weight', '(n c h) d -> d n h', part=0)",
    "Row('query/kernel', _FUSED + 'weight', '(c n h) d -> d n h', part=0)",
    ('test_parity.py',),
    'neox or pythia',
  ),
  Fault(
    't5-head-unscaled',
    'scale_logits=is_scaled and is_tied',
    'scale_logits=False',
    ('test_weights.py', 'test_parity.py'),
    'config or computes',
  ),
)
