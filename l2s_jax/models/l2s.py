# SPDX-License-Identifier: Apache-2.0
"""LLM-to-SLM: the LLM reads the prompt once, the SLM writes the answer.

    prompt -> LLM encoder (frozen) -> projector -> fuse -> SLM -> answer

Source: arXiv 2402.16844.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from l2s_jax import partition
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import config as config_lib
from l2s_jax.models import decoder_only, language_model, projector, t5

INJECTIONS = ('add', 'replace')


def build(
  config: config_lib.TransformerConfig, name: str | None = None
) -> language_model.LanguageModel:
  """Returns the module of a language model's config."""
  if config.is_encoder_decoder:
    return t5.EncoderDecoder(config, name=name)
  return decoder_only.DecoderOnly(config, name=name)


def fuse(
  projected: Float[Array, 'batch length embed'],
  valid: Bool[Array, 'batch length'],
  prompt_embeddings: Float[Array, 'batch length embed'] | None,
) -> Float[Array, 'batch length embed']:
  """Puts the projected LLM states where the SLM's prompt embeddings stand.

  Args:
    projected: Z, the projector's output.
    valid: where Z stands for a real token; it counts as zero elsewhere.
    prompt_embeddings: the SLM's own, to `add` Z to; None to `replace` them.
  """
  projected = jnp.where(valid[..., None], projected, 0)
  if prompt_embeddings is None:
    return projected
  return prompt_embeddings + projected


class LlmToSlm(nn.Module):
  """A frozen LLM encoder, a projector, and the SLM that writes.

  Attributes:
    llm_config: of the LLM; only what encodes has parameters here.
    slm_config: of the SLM.
    injection: 'add' Z to the SLM's prompt embeddings, or 'replace' them.
    shared_vocabulary: whether the prompt's token ids are the SLM's own. If
      not, 'add' takes the LLM's input embeddings through a trained linear
      layer for the SLM's prompt embeddings.
    llm_rules: axis rules of the LLM, entered around its call alone.
  """

  llm_config: config_lib.TransformerConfig
  slm_config: config_lib.TransformerConfig
  injection: str = 'add'
  shared_vocabulary: bool = True
  llm_rules: partition.Rules = partition.DEFAULT_RULES

  def setup(self):
    if self.injection not in INJECTIONS:
      raise ValueError(
        f'INJECTION={self.injection!r} is not one of {INJECTIONS}.'
      )
    self.llm = build(self.llm_config)
    self.projector = projector.Projector(
      self.llm_config.emb_dim, self.slm_config
    )
    self.slm = build(self.slm_config)
    if self.injection == 'add' and not self.shared_vocabulary:
      self.prompt_embedder = projector.from_llm(
        self.llm_config.emb_dim, self.slm_config
      )

  def encode_prompt(
    self, batch: language_model.Batch
  ) -> tuple[Float[Array, 'batch prompt embed'], Int[Array, 'batch prompt']]:
    """Returns the SLM's prompt embeddings and segment ids.

    Two optional batch keys are for controls: `llm_input_tokens`, with
    `llm_segment_ids`, is what the LLM reads in the prompt's place, and
    `llm_scale`, one number a row, multiplies Z.
    """
    tokens = batch['encoder_input_tokens']
    segment_ids = batch['encoder_segment_ids']
    llm_tokens = batch.get('llm_input_tokens', tokens)
    llm_segment_ids = batch.get('llm_segment_ids', segment_ids)

    with partition.axis_rules(self.llm_rules):
      llm_states = self.llm.encode(
        self.llm.embed(llm_tokens), llm_segment_ids, deterministic=True
      )
    projected = self.projector(jax.lax.stop_gradient(llm_states))
    if 'llm_scale' in batch:
      projected *= batch['llm_scale'][:, None, None].astype(projected.dtype)

    if self.injection == 'replace':
      embeddings = fuse(projected, llm_segment_ids > 0, None)
      return embeddings, llm_segment_ids
    embeddings = fuse(
      projected, llm_segment_ids > 0, self._prompt_embeddings(tokens)
    )
    return embeddings, segment_ids

  def _prompt_embeddings(
    self, tokens: Int[Array, 'batch prompt']
  ) -> Float[Array, 'batch prompt embed']:
    if self.shared_vocabulary:
      return self.slm.embed(tokens)
    with partition.axis_rules(self.llm_rules):
      embeddings = jax.lax.stop_gradient(self.llm.embed(tokens))
    return self.prompt_embedder(embeddings)

  def __call__(
    self, batch: language_model.Batch, *, deterministic: bool
  ) -> Float[Array, 'batch length vocab']:
    """Returns teacher-forced float32 logits of the answer."""
    embeddings, segment_ids = self.encode_prompt(batch)
    return self.slm.logits(
      embeddings, segment_ids, batch, deterministic=deterministic
    )

  def prefill(
    self, batch: language_model.Batch, *, max_decode_len: int
  ) -> cache_lib.Cache:
    """Reads the prompts of a batch; from here on the SLM is alone."""
    embeddings, segment_ids = self.encode_prompt(batch)
    return self.slm.start(
      embeddings, segment_ids, max_decode_len=max_decode_len
    )
