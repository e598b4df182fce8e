# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder models: T5 and its relatives.

T5 v1.0 and v1.1 (also Flan, mT5, umT5 and ByT5) differ in config fields alone.
So does T5Gemma, an encoder-decoder adapted from Gemma 2.
Source: Raffel et al. 2020 (arXiv:1910.10683); Shazeer 2020 (arXiv:2002.05202)
for the gated MLP; Zhang et al. 2025 (arXiv:2504.06225) for T5Gemma.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2s_jax.models import (
  attention,
  fused_attention,
  language_model,
  layers,
  transformer,
)
from l2s_jax.models import cache as cache_lib


class EncoderDecoder(language_model.LanguageModel):
  """A T5-style language model.

  LLM-to-SLM uses the encoder alone of such an LLM, except to verify drafts.
  """

  def setup(self):
    config = self.config
    self.token_embedder = layers.token_embed(config)
    if config.decoder_embedding:
      self.decoder_token_embedder = layers.token_embed(config)
    self.encoder = transformer.Stack(
      config, config.num_encoder_layers, bidirectional=True
    )
    self.decoder = transformer.Stack(
      config, config.num_decoder_layers, has_cross_attention=True
    )
    self.dropout = layers.Dropout(config.dropout_rate)
    self.logits_dense = layers.Head(config)

  def embed(self, tokens):
    return self.token_embedder(tokens)

  def encode(self, embeddings, segment_ids, *, deterministic):
    encoder, embeddings, context = self.prompt_stack(embeddings, segment_ids)
    states = encoder(embeddings, context, deterministic=deterministic)
    return self.dropout(states, deterministic=deterministic)

  def prompt_stack(self, embeddings, segment_ids):
    positions = _positions(embeddings.shape[1])
    context = self.encoder.context(
      fused_attention.Visibility(segment_ids, segment_ids),
      positions,
      positions,
    )
    return self.encoder, embeddings, context

  def logits(
    self, prompt_embeddings, prompt_segment_ids, batch, *, deterministic
  ):
    encoded = self.encode(
      prompt_embeddings, prompt_segment_ids, deterministic=deterministic
    )
    return self.answer_logits(
      encoded, prompt_segment_ids, batch, deterministic=deterministic
    )

  def answer_logits(
    self,
    encoded: Float[Array, 'batch prompt embed'],
    prompt_segment_ids: Int[Array, 'batch prompt'],
    batch: language_model.Batch,
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced float32 logits, given the encoded prompt.

    Args:
      encoded: last hidden states of the encoder.
      prompt_segment_ids: of the prompt; 0 is padding.
      batch: its `decoder_*` keys are read.
      deterministic: disables dropout.
    """
    tokens = batch['decoder_input_tokens']
    segment_ids = batch['decoder_segment_ids']
    positions = _positions(tokens.shape[1])
    context = self.decoder.context(
      fused_attention.Visibility(segment_ids, segment_ids, causal=True),
      positions,
      positions,
      cross_bias=self.decoder.bias(
        fused_attention.Visibility(segment_ids, prompt_segment_ids)
      ),
      encoded=encoded,
    )
    states = self.decoder(
      self._answer_embedder()(tokens), context, deterministic=deterministic
    )
    return self._head(states, deterministic=deterministic)

  def start(self, prompt_embeddings, prompt_segment_ids, *, num_slots):
    encoded = self.encode(
      prompt_embeddings, prompt_segment_ids, deterministic=True
    )
    return self.start_answer(encoded, prompt_segment_ids, num_slots=num_slots)

  def start_answer(
    self,
    encoded: Float[Array, 'batch prompt embed'],
    prompt_segment_ids: Int[Array, 'batch prompt'],
    *,
    num_slots: int,
  ) -> cache_lib.Cache:
    """Returns an empty cache with cross keys and values of an encoded prompt.

    Args:
      encoded: last hidden states of the encoder.
      prompt_segment_ids: of the prompt; 0 is padding.
      num_slots: room for answer tokens.
    """
    cache = cache_lib.empty(self.config, encoded.shape[0], num_slots)
    return cache.replace(
      cross_kv=self.decoder.project_cross(encoded),
      cross_valid=prompt_segment_ids > 0,
    )

  def extend(self, tokens, cache):
    # The answer has no padding, so slots are positions.
    new = jnp.atleast_1d(cache.slot)[:, None] + _positions(tokens.shape[1])
    slots = jnp.broadcast_to(
      _positions(cache.num_slots), (new.shape[0], cache.num_slots)
    )
    context = self.decoder.context(
      cache.mask(tokens.shape[1]),
      new,
      jnp.concatenate([slots, new], axis=1),
      cross_bias=attention.mask_bias(cache.cross_valid[:, None, None]),
    )
    states, kv = self.decoder.extend(
      self._answer_embedder()(tokens), context, cache
    )
    logits = self._head(states, deterministic=True)
    valid = jnp.ones(tokens.shape, bool)
    return logits, cache_lib.append(cache, kv, valid, after=states)

  def _answer_embedder(self) -> layers.Embed:
    if self.config.decoder_embedding:
      return self.decoder_token_embedder
    return self.token_embedder

  def _head(
    self, states: Float[Array, 'batch length embed'], *, deterministic: bool
  ) -> Float[Array, 'batch length vocab']:
    states = self.dropout(states, deterministic=deterministic)
    return self.logits_dense(states, self._answer_embedder())


def _positions(length: int) -> Int[Array, '1 length']:
  return jnp.arange(length)[None]
