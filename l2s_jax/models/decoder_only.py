# SPDX-License-Identifier: Apache-2.0
"""Decoder-only models: the prompt is a prefix, the answer follows.

GPT-2, OPT, Pythia, Llama, Mistral, Qwen and Gemma are configs of this module.
Padding stays between a short prompt and its answer and is masked. Positions
count real tokens, so padding does not shift them.
Source: Radford et al. 2019 (GPT-2), and the papers that
`TransformerConfig` cites at its fields.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import cache as cache_lib
from l2s_jax.models import (
  fused_attention,
  language_model,
  layers,
  positions,
  transformer,
)


class DecoderOnly(language_model.LanguageModel):
  """A decoder-only language model: causal self-attention, prompt first."""

  def setup(self):
    config = self.config
    self.token_embedder = layers.token_embed(config)
    if config.positions == 'learned':
      self.position_embedder = layers.Embed(
        config,
        config.position_offset + config.max_positions,
        ('abspos_buckets', 'embed'),
      )
    self.decoder = transformer.Stack(config, config.num_decoder_layers)
    self.logits_dense = layers.Head(config)

  def embed(self, tokens):
    return self.token_embedder(tokens)

  def first_states(self, tokens, segment_ids):
    return self._add_positions(
      self.embed(tokens), positions.count_tokens(segment_ids > 0)
    )

  def encode(self, embeddings, segment_ids, *, deterministic):
    decoder, embeddings, context = self.prompt_stack(embeddings, segment_ids)
    return decoder(embeddings, context, deterministic=deterministic)

  def prompt_stack(self, embeddings, segment_ids):
    length = embeddings.shape[1]
    self.check_lengths(length, 0)
    return self.decoder, *self._whole(embeddings, segment_ids > 0, length)

  def logits(
    self, prompt_embeddings, prompt_segment_ids, batch, *, deterministic
  ):
    answer = self.embed(batch['decoder_input_tokens'])
    prompt_length = prompt_embeddings.shape[1]
    self.check_lengths(prompt_length, answer.shape[1])
    valid = jnp.concatenate(
      [prompt_segment_ids > 0, batch['decoder_segment_ids'] > 0], axis=1
    )  # [batch, prompt + length]
    embeddings = jnp.concatenate([prompt_embeddings, answer], axis=1)
    embeddings, context = self._whole(embeddings, valid, prompt_length)
    states = self.decoder(embeddings, context, deterministic=deterministic)
    return self.logits_dense(states[:, prompt_length:], self.token_embedder)

  def start(self, prompt_embeddings, prompt_segment_ids, *, num_slots):
    batch_size, prompt_length = prompt_segment_ids.shape
    valid = prompt_segment_ids > 0
    token_positions = positions.count_tokens(valid)
    context = self.decoder.context(
      self._mask(valid, prompt_length), token_positions, token_positions
    )
    states, kv = self.decoder.extend(
      self._add_positions(prompt_embeddings, token_positions), context
    )
    cache = cache_lib.empty(self.config, batch_size, prompt_length + num_slots)
    return cache_lib.append(cache, kv, valid, after=states)

  def extend(self, tokens, cache):
    num_read = cache.valid.sum(1, keepdims=True, dtype=jnp.int32)
    new = num_read + jnp.arange(tokens.shape[1])
    slots = positions.count_tokens(cache.valid)
    context = self.decoder.context(
      cache.mask(tokens.shape[1]), new, jnp.concatenate([slots, new], axis=1)
    )
    states, kv = self.decoder.extend(
      self._add_positions(self.embed(tokens), new), context, cache
    )
    logits = self.logits_dense(states, self.token_embedder)
    valid = jnp.ones(tokens.shape, bool)
    return logits, cache_lib.append(cache, kv, valid, after=states)

  def _whole(
    self,
    embeddings: Float[Array, 'batch length embed'],
    valid: Bool[Array, 'batch length'],
    prefix: int,
  ) -> tuple[Float[Array, 'batch length embed'], transformer.Context]:
    """Returns the embeddings and the context of a sequence without a cache.

    Args:
      embeddings: prompt, then answer if any, without positions.
      valid: true for real tokens.
      prefix: length of the prompt, in slots.
    """
    token_positions = positions.count_tokens(valid)
    context = self.decoder.context(
      self._mask(valid, prefix), token_positions, token_positions
    )
    return self._add_positions(embeddings, token_positions), context

  def _mask(
    self, valid: Bool[Array, 'batch length'], prefix: int
  ) -> fused_attention.Visibility:
    """Returns causal visibility of tokens, without padding.

    With `bidirectional_prefix`, the first `prefix` slots are visible to all.
    """
    return fused_attention.Visibility(
      jnp.ones(valid.shape, jnp.int32),
      valid.astype(jnp.int32),
      causal=True,
      prefix=prefix if self.config.bidirectional_prefix else 0,
    )

  def _add_positions(
    self,
    embeddings: Float[Array, 'batch length embed'],
    token_positions: Int[Array, 'batch length'],
  ) -> Float[Array, 'batch length embed']:
    if self.config.positions != 'learned':
      return embeddings
    # Drafts of speculative decoding may run past the table. These rows are
    # dropped later, but the cache needs finite values in them.
    last = self.config.max_positions - 1
    return embeddings + self.position_embedder(
      jnp.minimum(token_positions, last) + self.config.position_offset
    )

  def check_lengths(self, prompt_length, answer_length):
    rows = self.config.max_positions
    if self.config.positions == 'learned' and (
      prompt_length + answer_length > rows
    ):
      raise ValueError(
        f'A prompt of {prompt_length} tokens and an answer of {answer_length} '
        f'need {prompt_length + answer_length} positions, but the model has '
        f'{rows} (TransformerConfig.max_positions). Shorten '
        'TASK_FEATURE_LENGTHS (in inference PROMPT_LENGTH or MAX_DECODE_LEN).'
      )
