# SPDX-License-Identifier: Apache-2.0
"""What training and decoding ask of a model, whatever its architecture.

A language model reads prompt *embeddings*: its own, or those that LLM-to-SLM
puts in their place. The batch keys are those of `features.py`.
"""

from collections.abc import Mapping

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib

Batch = Mapping[str, jax.Array]


class LanguageModel(nn.Module):
  """A model that can write an answer to a prompt, alone.

  Subclasses give `embed`, `encode`, `logits`, `start` and `decode_step`.
  """

  config: config_lib.TransformerConfig

  def embed(
    self, tokens: Int[Array, 'batch length']
  ) -> Float[Array, 'batch length embed']:
    """Looks tokens up, without positions."""
    raise NotImplementedError

  def encode(
    self,
    embeddings: Float[Array, 'batch length embed'],
    segment_ids: Int[Array, 'batch length'],
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch length embed']:
    """Returns the last hidden states of the prompt, after the final norm."""
    raise NotImplementedError

  def logits(
    self,
    prompt_embeddings: Float[Array, 'batch prompt embed'],
    prompt_segment_ids: Int[Array, 'batch prompt'],
    batch: Batch,
    *,
    deterministic: bool,
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced float32 logits of the answer."""
    raise NotImplementedError

  def start(
    self,
    prompt_embeddings: Float[Array, 'batch prompt embed'],
    prompt_segment_ids: Int[Array, 'batch prompt'],
    *,
    max_decode_len: int,
  ) -> cache_lib.Cache:
    """Reads the prompt and returns the cache that decoding starts from."""
    raise NotImplementedError

  def decode_step(
    self, token: Int[Array, 'batch'], cache: cache_lib.Cache
  ) -> tuple[Float[Array, 'batch vocab'], cache_lib.Cache]:
    """Feeds one token a row; returns the next token's logits."""
    raise NotImplementedError

  def __call__(
    self, batch: Batch, *, deterministic: bool
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced logits, the prompt being this model's own."""
    return self.logits(
      self.embed(batch['encoder_input_tokens']),
      batch['encoder_segment_ids'],
      batch,
      deterministic=deterministic,
    )

  def prefill(self, batch: Batch, *, max_decode_len: int) -> cache_lib.Cache:
    """Reads the prompts of a batch; what `decode_step` starts from."""
    return self.start(
      self.embed(batch['encoder_input_tokens']),
      batch['encoder_segment_ids'],
      max_decode_len=max_decode_len,
    )
