# SPDX-License-Identifier: Apache-2.0
"""Decoder-only models: the prompt is a prefix, the answer follows.

GPT-2, OPT, Pythia, Llama, Qwen and Gemma are configs of this one module.
Padding stays between a short prompt and its answer and is masked; positions
count real tokens, so it moves nothing.
Source: Radford et al. 2019 (GPT-2), and what the config's fields name.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.models import cache as cache_lib
from l2s_jax.models import language_model, layers, positions, transformer


class DecoderOnly(language_model.LanguageModel):
  """A stack of causal self-attention over prompt and answer."""

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

  def encode(self, embeddings, segment_ids, *, deterministic):
    length = embeddings.shape[1]
    self._check_length(length, 0)
    return self._read(
      embeddings, segment_ids > 0, length, deterministic=deterministic
    )

  def logits(
    self, prompt_embeddings, prompt_segment_ids, batch, *, deterministic
  ):
    answer = self.embed(batch['decoder_input_tokens'])
    prompt_length = prompt_embeddings.shape[1]
    self._check_length(prompt_length, answer.shape[1])
    valid = jnp.concatenate(
      [prompt_segment_ids > 0, batch['decoder_segment_ids'] > 0], axis=1
    )  # [batch, prompt + length]
    embeddings = jnp.concatenate([prompt_embeddings, answer], axis=1)
    states = self._read(
      embeddings, valid, prompt_length, deterministic=deterministic
    )
    return self.logits_dense(states[:, prompt_length:], self.token_embedder)

  def start(self, prompt_embeddings, prompt_segment_ids, *, max_decode_len):
    batch_size, prompt_length = prompt_segment_ids.shape
    self._check_length(prompt_length, max_decode_len)
    cache = cache_lib.empty(
      self.config, batch_size, prompt_length + max_decode_len
    )
    slot = cache.slot
    cache = cache_lib.advance(cache, prompt_segment_ids > 0)
    slot_positions = positions.count_tokens(cache.valid)
    context = self.decoder.context(
      self._mask(cache.valid, prompt_length, prompt_length),
      slot_positions[:, :prompt_length],
      slot_positions,
      slot=slot,
    )
    _, kv = self.decoder(
      self._add_positions(prompt_embeddings, slot_positions[:, :prompt_length]),
      context,
      kv=cache.kv,
      deterministic=True,
    )
    return cache.replace(kv=kv)

  def decode_step(self, token, cache):
    position, slot = cache.position[:, None], cache.slot
    cache = cache_lib.advance(cache, jnp.ones((token.shape[0], 1), bool))
    context = self.decoder.context(
      cache.valid[:, None, None],
      position,
      positions.count_tokens(cache.valid),
      slot=slot,
    )
    states, kv = self.decoder(
      self._add_positions(self.embed(token[:, None]), position),
      context,
      kv=cache.kv,
      deterministic=True,
    )
    logits = self.logits_dense(states, self.token_embedder)
    return logits[:, 0], cache.replace(kv=kv)

  def _read(
    self,
    embeddings: Float[Array, 'batch length embed'],
    valid: Bool[Array, 'batch length'],
    prefix: int,
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch length embed']:
    """Returns the states of a whole sequence, without a cache."""
    length = embeddings.shape[1]
    token_positions = positions.count_tokens(valid)
    context = self.decoder.context(
      self._mask(valid, length, prefix), token_positions, token_positions
    )
    states, _ = self.decoder(
      self._add_positions(embeddings, token_positions),
      context,
      deterministic=deterministic,
    )
    return states

  def _mask(
    self, valid: Bool[Array, 'batch slots'], num_queries: int, prefix: int
  ) -> Bool[Array, 'batch 1 query slots']:
    """Hides padding and what comes after each of the first queries."""
    num_slots = valid.shape[1]
    mask = jnp.tril(jnp.ones((num_queries, num_slots), bool))
    if self.config.bidirectional_prefix:
      mask |= jnp.arange(num_slots) < prefix
    return mask[None, None] & valid[:, None, None]

  def _add_positions(
    self,
    embeddings: Float[Array, 'batch length embed'],
    token_positions: Int[Array, 'batch length'],
  ) -> Float[Array, 'batch length embed']:
    if self.config.positions != 'learned':
      return embeddings
    return embeddings + self.position_embedder(
      token_positions + self.config.position_offset
    )

  def _check_length(self, prompt_length: int, answer_length: int) -> None:
    """Refuses lengths beyond the table of positions."""
    rows = self.config.max_positions
    if self.config.positions == 'learned' and (
      prompt_length + answer_length > rows
    ):
      raise ValueError(
        f'A prompt of {prompt_length} tokens and an answer of {answer_length} '
        f'make {prompt_length + answer_length} positions, but the model has '
        f'{rows} (TransformerConfig.max_positions). Shorten '
        'TASK_FEATURE_LENGTHS (in inference PROMPT_LENGTH or MAX_DECODE_LEN).'
      )
