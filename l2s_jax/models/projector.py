# SPDX-License-Identifier: Apache-2.0
"""The projector: from the LLM's states to the SLM's embedding space."""

import dataclasses

from flax import linen as nn
from jaxtyping import Array, Float

from l2s_jax.models import config as config_lib
from l2s_jax.models import layers


class Projector(nn.Module):
  """Linear, ReLU, Linear with biases: llm_embed -> embed -> embed.

  Source: arXiv 2402.16844, section 3.
  """

  llm_emb_dim: int
  slm_config: config_lib.TransformerConfig

  @nn.compact
  def __call__(
    self, llm_states: Float[Array, 'batch length llm_embed']
  ) -> Float[Array, 'batch length embed']:
    d = self.slm_config.emb_dim
    hidden = from_llm(self.llm_emb_dim, self.slm_config, name='wi')(llm_states)
    return layers.Dense(
      (d,),
      (d,),
      ('mlp', 'embed'),
      _scaled_by_fan_in(self.slm_config),
      use_bias=True,
      name='wo',
    )(nn.relu(hidden))


def from_llm(
  llm_emb_dim: int,
  slm_config: config_lib.TransformerConfig,
  name: str | None = None,
) -> layers.Dense:
  """Returns a linear layer with bias from the LLM's width to the SLM's."""
  return layers.Dense(
    (llm_emb_dim,),
    (slm_config.emb_dim,),
    ('llm_embed', 'mlp'),
    _scaled_by_fan_in(slm_config),
    use_bias=True,
    name=name,
  )


def _scaled_by_fan_in(
  config: config_lib.TransformerConfig,
) -> config_lib.TransformerConfig:
  """These layers are new: an initial scale made for GPT-2's depth misleads."""
  return dataclasses.replace(config, kernel_init_stddev=None)
