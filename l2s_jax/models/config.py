# SPDX-License-Identifier: Apache-2.0
"""The one configuration that T5 and the decoder-only families share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import gin
import jax.numpy as jnp

ACTIVATIONS = ('relu', 'gelu', 'silu', 'linear')
# Fields that may change between two starts of a run: how it is computed, not
# what its parameters mean.
RUNTIME_FIELDS = ('dropout_rate', 'dtype', 'scan_layers', 'remat')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Says how a transformer is built. Defaults are those of T5 v1.0.

  Attributes:
    vocab_size: rows of the embedding table, at least the tokenizer's size;
      released T5 tables are padded to a multiple of 128.
    emb_dim: width of the residual stream.
    num_heads: attention heads.
    head_dim: width of a head; num_heads * head_dim need not be emb_dim.
    mlp_dim: width of the MLP's hidden layer.
    num_decoder_layers: layers of the decoder, or of a decoder-only model.
    num_encoder_layers: layers of the encoder; 0 means decoder-only.
    mlp_activations: ('relu',) in T5 v1.0; ('gelu', 'linear') multiplies a
      gate in (T5 v1.1, Flan, mT5); ('gelu',) in GPT-2. `gelu` is the tanh
      approximation, which is what all of these were trained with.
    norm: 'rms' (T5: no mean, no bias) or 'layer' (GPT-2).
    norm_epsilon: added to the variance.
    use_bias: biases in projections and MLP (GPT-2).
    positions: 'relative' (T5: a bias per bucket of offsets, shared by all
      layers of a stack) or 'learned' (GPT-2: a table added to embeddings).
    relpos_buckets: number of buckets of relative offsets.
    relpos_max_distance: offset in tokens from which all share a bucket.
    max_positions: rows of the learned position table; unused otherwise.
    scale_attention: divide attention logits by sqrt(head_dim) (GPT-2). T5
      does not: its query initialisation has that factor.
    logits_via_embedding: the output head is the embedding table (tied).
    scale_logits: divide tied logits by sqrt(emb_dim) (T5 v1.0).
    bidirectional_prefix: decoder-only: prompt tokens see the whole prompt.
      Off, since released models were pretrained causally.
    dropout_rate: of embeddings, attention weights, MLP and residual branches.
    kernel_init_stddev: of projection kernels; None scales each by its fan-in,
      as T5 does.
    embedding_init_stddev: of the embedding table.
    dtype: of activations; norms, softmax and logits are float32 throughout.
    scan_layers: compile one layer and loop over it; off, unroll the loop
      (longer to compile, faster to run on CPU). Parameters are stacked along
      the axis `layers` either way.
    remat: 'none', or 'full' to recompute each layer in the backward pass.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_decoder_layers: int
  num_encoder_layers: int = 0
  mlp_activations: Sequence[str] = ('relu',)
  norm: str = 'rms'
  norm_epsilon: float = 1e-6
  use_bias: bool = False
  positions: str = 'relative'
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  max_positions: int = 0
  scale_attention: bool = False
  logits_via_embedding: bool = True
  scale_logits: bool = True
  bidirectional_prefix: bool = False
  dropout_rate: float = 0.0
  kernel_init_stddev: float | None = None
  embedding_init_stddev: float = 1.0
  dtype: str = 'float32'
  scan_layers: bool = True
  remat: str = 'none'

  def __post_init__(self):
    # Gin and JSON give lists; the config is a hashable module field.
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    for activation in self.mlp_activations:
      if activation not in ACTIVATIONS:
        raise ValueError(
          f'TransformerConfig.mlp_activations has {activation!r}, which is '
          f'not one of {ACTIVATIONS}.'
        )
    for field in ('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'TransformerConfig.{field}={getattr(self, field)}: it must be '
          'positive.'
        )
    if self.dtype == 'float16' and self.is_encoder_decoder:
      raise ValueError(
        "TransformerConfig.dtype='float16': T5's residual stream, trained in "
        'bfloat16, goes beyond the largest float16, 65504, and the loss '
        "becomes NaN. Take 'bfloat16', with the exponents of float32."
      )
    choices = {
      'norm': ('rms', 'layer'),
      'positions': ('relative', 'learned'),
      'remat': ('none', 'full'),
      'dtype': ('float32', 'bfloat16'),
    }
    for field, allowed in choices.items():
      value = getattr(self, field)
      if value not in allowed:
        raise ValueError(
          f'TransformerConfig.{field}={value!r} is not one of {allowed}.'
        )
    expected = 'relative' if self.is_encoder_decoder else 'learned'
    if self.positions != expected:
      raise ValueError(
        f'TransformerConfig.positions={self.positions!r} with '
        f'num_encoder_layers={self.num_encoder_layers}: an encoder-decoder has '
        "'relative' positions, a decoder-only model 'learned' ones."
      )
    if self.positions == 'learned' and self.max_positions < 1:
      raise ValueError(
        "TransformerConfig.positions='learned' needs max_positions > 0, the "
        f'rows of the table; got {self.max_positions}.'
      )

  @property
  def is_encoder_decoder(self) -> bool:
    return self.num_encoder_layers > 0

  @property
  def activation_dtype(self) -> Any:
    return jnp.dtype(self.dtype)

  def to_json(self) -> dict[str, Any]:
    """Returns the fields as a dict that JSON can hold."""
    return dataclasses.asdict(self)


gin.external_configurable(TransformerConfig, module='l2s_jax')
