# SPDX-License-Identifier: Apache-2.0
"""The model config that all families share.

A difference between families is a field. `from_json` reads and checks a config
from an untrusted file.
"""

import dataclasses
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jax.numpy as jnp

# Number of values in `rope_scaling`, by `rope_scaling_type`.
ROPE_SCALINGS = {'linear': 1, 'llama3': 4, 'yarn': 5}
QUANTIZATIONS = (
  'none',
  'bfloat16',
  'int8',
  'int8_dynamic',
  'int8_left',
  'int8_unsigned',
)
ATTENTIONS = ('auto', 'plain', 'fused')
ACTIVATIONS = ('relu', 'gelu', 'gelu_exact', 'silu', 'linear')
# Fields that may change between two starts of a run: they set how the model is
# computed, not the meaning of its parameters.
RUNTIME_FIELDS = (
  'dropout_rate',
  'dtype',
  'scan_layers',
  'remat',
  'attention',
  'for_generation',
  'quantization',
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Config of a transformer. Defaults are those of T5 v1.0.

  Attributes:
    vocab_size: rows of the embedding table, at least the tokenizer's size;
      released T5 tables are padded to a multiple of 128.
    emb_dim: width of the residual stream.
    num_heads: attention heads.
    num_kv_heads: heads of keys and values; None means num_heads. Fewer are
      shared by groups of query heads, for a smaller KV cache (grouped-query
      attention, Ainslie et al. 2023; Llama, Mistral, Qwen, Gemma).
    head_dim: width of a head; num_heads * head_dim may differ from emb_dim.
    mlp_dim: width of the MLP's hidden layer.
    num_decoder_layers: layers of the decoder, or of a decoder-only model; 0
      means an encoder alone, which can be the LLM of LLM-to-SLM.
    num_encoder_layers: layers of the encoder; 0 means decoder-only.
    mlp_activations: one activation for each input projection of the MLP, whose
      outputs are multiplied: ('relu',) in T5 v1.0; ('gelu', 'linear') in T5
      v1.1, Flan, mT5 and Gemma; ('silu', 'linear') in Llama and Qwen; ('gelu',)
      in GPT-2. `gelu` is the tanh approximation, with which all of these were
      trained; `gelu_exact` uses the error function (Pythia).
    norm: 'rms' (T5, Llama: no mean, no bias) or 'layer' (GPT-2, Pythia).
    norm_epsilon: added to the variance.
    norm_unit_offset: multiply by 1 + scale, so that weight decay pulls the
      factor to 1 and not to 0 (Gemma).
    pre_norm: norm the input of attention and MLP; off, only their output
      (OLMo 2, with post_norm).
    post_norm: also norm the output of attention and MLP before the residual
      sum (Gemma: steadier training).
    parallel_residual: attention and MLP read the same input, and both outputs
      are added at once: one all-reduce less (Pythia, after GPT-J).
    use_bias: biases in all projections and the MLP (GPT-2, OPT, Pythia).
    attention_bias: attention biases where use_bias is off: 'none', 'qkv' for
      query, key and value (Qwen2), or 'all' for the output, too.
    qk_norm: norm each query and key, which bounds attention logits (Qwen3,
      Gemma 3).
    qk_norm_all_heads: with qk_norm, norm queries and keys over all heads
      together, with a scale for each feature of each head (OLMo 2).
    positions: 'relative' (T5: a bias per bucket of offsets, shared by all
      layers of a stack), 'learned' (GPT-2: a table added to embeddings) or
      'rotary' (queries and keys rotated by an angle proportional to the
      position, Su et al. 2021).
    relpos_buckets: number of buckets of relative offsets.
    relpos_max_distance: offset in tokens from which all share a bucket.
    relpos_per_layer: relative position bias of its own in each layer (umT5).
    max_positions: rows of the learned position table. With rotary positions,
      the longest pretraining context, which is not enforced.
    position_offset: row of the table for position 0 (2 in OPT, whose padding
      used to take the first rows).
    rope_base: base of the rotary angular frequencies.
    rope_local_base: the same in sliding-window layers; None means rope_base.
      Gemma 3 keeps a small one there, as its rope_base grew with the context.
    rope_dim: number of rotated features per head; None means all. Pythia
      rotates a quarter.
    no_rope_period: each layer whose number (from 1) is a multiple of this has
      no rotary positions (SmolLM3: 4); 0 means that all layers have them.
    rope_scaling: parameters of the context extension after pretraining; empty
      without one.
    rope_scaling_type: kind of the extension, named as in transformers, with its
      parameters: 'linear' (factor; Gemma 3 from 4B), 'llama3' (factor,
      low_freq_factor, high_freq_factor, original_max_position_embeddings) or
      'yarn' (factor, beta_fast, beta_slow, original_max_position_embeddings,
      attention_factor; Peng et al. 2023). Sliding-window layers with a
      rope_local_base are not extended.
    sliding_window: tokens that a layer attends to backwards, the query
      included (and forwards in an encoder); 0 means all (Mistral: all layers).
    global_layer_period: with a sliding window, each layer whose number (from 1)
      is a multiple of this is global, that is without the window (Gemma 2: 2,
      Gemma 3: 6); 0 means no global layers.
    first_window_layer: with a sliding window, the layers before this one
      (numbered from 0) are global, too (Qwen2's max_window_layers).
    scale_attention: divide attention logits by sqrt(head_dim) (GPT-2, Llama).
      T5 does not: its query initialisation has that factor.
    query_pre_attn_scalar: divide by the square root of this instead (Gemma).
    attention_softcap: bound of attention logits, by tanh (Gemma 2); 0 means
      none.
    logits_softcap: the same for the logits of the output head.
    scale_embeddings: multiply embeddings by sqrt(emb_dim) (Gemma).
    decoder_embedding: the decoder has an embedding table of its own (T5Gemma,
      whose encoder and decoder come from two models).
    logits_via_embedding: the output head is the (decoder's) embedding table
      (tied).
    scale_logits: divide tied logits by sqrt(emb_dim) (T5 v1.0).
    scale_untied_logits: the same for an untied head, as in some T5 of
      transformers from version 5. A field of its own, since scale_logits is
      true by default and ignored with an untied head.
    bidirectional_prefix: prefix-LM: in a decoder-only model prompt tokens
      attend to the whole prompt. Off by default, since released models were
      pretrained causally.
    dropout_rate: of embeddings, attention weights, MLP and residual branches.
    kernel_init_stddev: of projection kernels; None scales each by its fan-in,
      as T5 does.
    embedding_init_stddev: of the embedding table.
    dtype: of activations; norms, softmax and logits are always float32.
    scan_layers: compile one layer and loop over it. Off unrolls the loop:
      longer to compile, faster to run on CPU. Parameters are stacked along the
      axis `layers` either way.
    remat: rematerialisation in the backward pass, named as in T5X: 'none';
      'minimal' recomputes attention, norms, activations and dropout, and saves
      products with kernels; 'full' recomputes the whole layer.
    attention: of calls with many queries (training, prefill): 'plain' writes
      float32 logits to memory; 'fused' keeps them on the chip, by a kernel for
      TPUs (elsewhere in Pallas' interpreter, for tests alone); 'auto' is
      'fused' on TPU, for at least 64 queries, and 'plain' elsewhere. Both are
      'plain' for more than 8,192 keys, or 2**20 / `head_dim`, and where rows or
      heads do not divide over the mesh. Off by default: the kernel was compiled
      for TPUs, but has not run on one yet.
    lora_rank: rank of the two matrices whose product is added to each of some
      frozen kernels (LoRA, Hu et al. 2021, arXiv:2106.09685); 0 means no LoRA.
      The second matrix is initialised to 0.
    lora_alpha: the product is multiplied by lora_alpha / lora_rank.
    lora_kernels: names of the projections with LoRA, out of 'query', 'key',
      'value', 'out' (attention, cross-attention too), 'wi', 'wi_0', 'wi_1' and
      'wo' (MLP).
    for_generation: parameters have the form of
      `language_model.params_for_generation`: each layer apart (`layers_0`,
      ...), a tied head transposed.
    quantization: of kernels and token embeddings in that form: 'none';
      'bfloat16' for products of bfloat16 with sums in float32; 'int8' for
      weights alone, one scale per output; 'int8_dynamic' for activations, too,
      one scale per token, so that products are of integers. The same numbers
      in the form that some CPUs multiply fastest: 'int8_left' with the kernel
      as the left operand (AMX), 'int8_unsigned' with unsigned activations
      (VNNI).
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_decoder_layers: int
  num_encoder_layers: int = 0
  num_kv_heads: int | None = None
  mlp_activations: Sequence[str] = ('relu',)
  norm: str = 'rms'
  norm_epsilon: float = 1e-6
  norm_unit_offset: bool = False
  pre_norm: bool = True
  post_norm: bool = False
  parallel_residual: bool = False
  use_bias: bool = False
  attention_bias: str = 'none'
  qk_norm: bool = False
  qk_norm_all_heads: bool = False
  positions: str = 'relative'
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  relpos_per_layer: bool = False
  max_positions: int = 0
  position_offset: int = 0
  rope_base: float = 10_000.0
  rope_local_base: float | None = None
  rope_dim: int | None = None
  no_rope_period: int = 0
  rope_scaling: Sequence[float] = ()
  rope_scaling_type: str = 'llama3'
  sliding_window: int = 0
  global_layer_period: int = 0
  first_window_layer: int = 0
  scale_attention: bool = False
  query_pre_attn_scalar: float | None = None
  attention_softcap: float = 0.0
  logits_softcap: float = 0.0
  scale_embeddings: bool = False
  decoder_embedding: bool = False
  logits_via_embedding: bool = True
  scale_logits: bool = True
  scale_untied_logits: bool = False
  bidirectional_prefix: bool = False
  dropout_rate: float = 0.0
  kernel_init_stddev: float | None = None
  embedding_init_stddev: float = 1.0
  dtype: str = 'float32'
  scan_layers: bool = True
  remat: str = 'none'
  attention: str = 'plain'
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_kernels: Sequence[str] = ('query', 'value')
  for_generation: bool = False
  quantization: str = 'none'

  def __post_init__(self):
    # Gin and JSON give lists, but a module field must be hashable.
    for field in ('mlp_activations', 'rope_scaling', 'lora_kernels'):
      object.__setattr__(self, field, tuple(getattr(self, field)))
    for activation in self.mlp_activations:
      if activation not in ACTIVATIONS:
        raise ValueError(
          f'TransformerConfig.mlp_activations has {activation!r}, which is '
          f'not one of {ACTIVATIONS}.'
        )
    for field in ('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'TransformerConfig.{field}={getattr(self, field)}: expected a '
          'positive number.'
        )
    projections = ('query', 'key', 'value', 'out', 'wo', *self.mlp_inputs)
    if self.lora_rank < 0 or (
      self.lora_rank
      and (not self.lora_kernels or set(self.lora_kernels) - set(projections))
    ):
      raise ValueError(
        f'TransformerConfig.lora_rank={self.lora_rank} with '
        f'lora_kernels={self.lora_kernels}: expected a rank of at least 0, and '
        f'some of {projections}, the projections of this model.'
      )
    if not 0 <= self.dropout_rate < 1:
      raise ValueError(
        f'TransformerConfig.dropout_rate={self.dropout_rate}: expected a '
        'probability below 1.'
      )
    if self.dtype == 'float16' and self.is_encoder_decoder:
      raise ValueError(
        "TransformerConfig.dtype='float16': the residual stream of T5, which "
        'was trained in bfloat16, exceeds the largest float16, 65504, and the '
        "loss becomes NaN. Use 'bfloat16', which has the exponent range of "
        'float32.'
      )
    choices = {
      'norm': ('rms', 'layer'),
      'attention_bias': ('none', 'qkv', 'all'),
      'positions': ('relative', 'learned', 'rotary'),
      'rope_scaling_type': tuple(ROPE_SCALINGS),
      'remat': ('none', 'minimal', 'full'),
      'attention': ATTENTIONS,
      'quantization': QUANTIZATIONS,
      'dtype': ('float32', 'bfloat16'),
    }
    for field, allowed in choices.items():
      value = getattr(self, field)
      if value not in allowed:
        raise ValueError(
          f'TransformerConfig.{field}={value!r} is not one of {allowed}.'
        )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f'TransformerConfig.num_heads={self.num_heads} does not divide over '
        f'num_kv_heads={self.num_kv_heads}.'
      )
    self._check_norms()
    self._check_positions()

  def _check_norms(self):
    if not self.pre_norm and not self.post_norm:
      raise ValueError(
        'TransformerConfig.pre_norm=False needs post_norm: a layer without '
        'norms does not train.'
      )
    if self.qk_norm_all_heads and not self.qk_norm:
      raise ValueError('TransformerConfig.qk_norm_all_heads needs qk_norm.')

  def _check_positions(self):
    expected = 'relative' if self.is_encoder_decoder else 'learned'
    if self.positions not in (expected, 'rotary'):
      raise ValueError(
        f'TransformerConfig.positions={self.positions!r} with '
        f'num_encoder_layers={self.num_encoder_layers}: an encoder-decoder '
        "needs 'relative' or 'rotary' positions, a decoder-only model "
        "'learned' or 'rotary' ones."
      )
    if self.positions == 'relative' and (
      self.relpos_buckets < 4
      or self.relpos_max_distance <= self.relpos_buckets // 2
    ):
      raise ValueError(
        f'TransformerConfig.relpos_buckets={self.relpos_buckets} with '
        f'relpos_max_distance={self.relpos_max_distance}: expected at least 4 '
        'buckets, and a distance above half of their number: that half has one '
        'offset per bucket.'
      )
    if self.positions == 'learned' and self.max_positions < 1:
      raise ValueError(
        "TransformerConfig.positions='learned' needs max_positions > 0, the "
        f'number of rows of the table; got {self.max_positions}.'
      )
    if self.relpos_per_layer and self.positions != 'relative':
      raise ValueError(
        "TransformerConfig.relpos_per_layer needs positions='relative', got "
        f'positions={self.positions!r}.'
      )
    if not self.sliding_window and (
      self.global_layer_period
      or self.first_window_layer
      or self.rope_local_base is not None
    ):
      raise ValueError(
        'TransformerConfig.global_layer_period, first_window_layer and '
        'rope_local_base need sliding_window: without it all layers attend to '
        'all tokens.'
      )
    if self.no_rope_period and self.positions != 'rotary':
      raise ValueError(
        "TransformerConfig.no_rope_period needs positions='rotary', got "
        f'positions={self.positions!r}.'
      )
    self._check_rope()

  def _check_rope(self):
    if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
      raise ValueError(
        f'TransformerConfig.rope_dim={self.rope_dim} with '
        f'head_dim={self.head_dim}: RoPE rotates pairs of features, so '
        'expected an even number, at most head_dim.'
      )
    expected_count = ROPE_SCALINGS[self.rope_scaling_type]
    if len(self.rope_scaling) not in (0, expected_count):
      raise ValueError(
        f'TransformerConfig.rope_scaling={self.rope_scaling}: expected an '
        f'empty tuple or, with rope_scaling_type={self.rope_scaling_type!r}, '
        f'{expected_count} numbers.'
      )
    is_yarn = self.rope_scaling_type == 'yarn'
    if self.rope_scaling and is_yarn and self.rope_base <= 1:
      raise ValueError(
        f'TransformerConfig.rope_base={self.rope_base} with '
        "rope_scaling_type='yarn': expected a base above 1, as features have "
        'other frequencies than their neighbours.'
      )

  @property
  def mlp_inputs(self) -> tuple[str, ...]:
    """Names of the projections into the MLP's hidden layer."""
    count = len(self.mlp_activations)
    return ('wi',) if count == 1 else tuple(f'wi_{i}' for i in range(count))

  @property
  def kv_heads(self) -> int:
    """Number of heads of keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def rotary_dim(self) -> int:
    """Number of rotated features per head; 0 without rotary positions."""
    if self.positions != 'rotary':
      return 0
    return self.head_dim if self.rope_dim is None else self.rope_dim

  @property
  def is_encoder_decoder(self) -> bool:
    return self.num_encoder_layers > 0

  @property
  def has_decoder(self) -> bool:
    return self.num_decoder_layers > 0

  @property
  def activation_dtype(self) -> Any:
    return jnp.dtype(self.dtype)

  def to_json(self) -> dict[str, Any]:
    """Returns the fields as a JSON-serialisable dict."""
    return dataclasses.asdict(self)


gin.external_configurable(TransformerConfig, module='l2s_jax')


def field_names() -> tuple[str, ...]:
  """Returns the names of all fields of `TransformerConfig`."""
  return tuple(field.name for field in dataclasses.fields(TransformerConfig))


# Largest size or count accepted from a file: indices have 32 bits.
_MAX_INT = 2**31 - 1
# Fields that must be greater than 0.
_POSITIVE = {
  'num_kv_heads',
  'relpos_buckets',
  'relpos_max_distance',
  'rope_base',
  'rope_local_base',
  'rope_dim',
  'query_pre_attn_scalar',
  'rope_scaling',
}
_WORDS = {
  bool: 'true or false',
  int: f'a whole number of at most {_MAX_INT}',
  float: 'a finite number',
  str: 'a string',
}


def from_json(
  content: Any, path: str | pathlib.Path, key: str = 'config'
) -> TransformerConfig:
  """Returns the config in a parsed JSON file, each field checked.

  Fields missing from an older file take their defaults.

  Args:
    content: value under `key` in the file.
    path: path of the file, for errors.
    key: location in the file, for errors.

  Raises:
    ValueError: names the file, the field and the expected value.
  """
  where = f'{path}, {key}'
  if not isinstance(content, Mapping):
    raise ValueError(
      f'{where}: expected an object with the fields of a TransformerConfig, '
      f'found {shorten(repr(content))}. Copy the file again.'
    )
  fields = {
    field.name: field for field in dataclasses.fields(TransformerConfig)
  }
  unknown = sorted(set(content) - fields.keys())
  if unknown:
    raise ValueError(
      f'{where} has {shorten(", ".join(map(str, unknown)))}, which '
      'TransformerConfig does not have. Update l2s_jax, or copy the file again.'
    )
  missing = [
    name
    for name, field in fields.items()
    if field.default is dataclasses.MISSING and name not in content
  ]
  if missing:
    raise ValueError(
      f'{where} lacks {", ".join(missing)}. Copy the file again.'
    )
  kinds = typing.get_type_hints(TransformerConfig)
  for name, value in content.items():
    expected = _expected(kinds[name])
    allowed = typing.get_args(kinds[name]) or (kinds[name],)
    if not _fits(value, kinds[name]):
      raise ValueError(
        f'{where}: {name} is {shorten(repr(value))}; expected {expected}'
        f'{" or null" if types.NoneType in allowed else ""}. Copy the file '
        'again.'
      )
    numbers = value if isinstance(value, list | tuple) else [value]
    low = 0 if name not in _POSITIVE else math.ulp(0.0)
    if any(
      isinstance(number, int | float) and number < low for number in numbers
    ):
      raise ValueError(
        f'{where}: {name} is {shorten(repr(value))}; expected '
        f'{"more than 0" if low else "0 or more"}. Copy the file again.'
      )
  # JAX refuses Python ints beyond 32 bits, so float fields become floats.
  floats = {
    name: float(value)
    for name, value in content.items()
    if float in (kinds[name], *typing.get_args(kinds[name])[:1])
    and is_number(value)
  }
  try:
    return TransformerConfig(**{**content, **floats})
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error


def shorten(value: Any, most: int = 80) -> str:
  """Returns a value from a file as one line of at most `most` characters."""
  text = value if isinstance(value, str) else repr(value)
  text = ' '.join(text[: 2 * most].split())
  return text if len(text) <= most else text[: most - 3] + '...'


def is_number(value: Any) -> bool:
  """Returns whether a JSON value is a finite number (booleans are not)."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and abs(value) <= 1e300  # An int may be beyond every float.
  )


def is_count(value: Any) -> bool:
  """Returns whether a JSON value is an integer of at most 31 bits."""
  return (
    isinstance(value, int)
    and not isinstance(value, bool)
    and -_MAX_INT <= value <= _MAX_INT
  )


def _expected(kind: Any) -> str:
  """Returns the description of a field's type, for errors."""
  plain = [k for k in typing.get_args(kind) if k is not types.NoneType]
  if typing.get_origin(kind) is Sequence:
    return f'a list, each {_WORDS[plain[0]]}'
  return _WORDS[plain[0] if plain else kind]


def _fits(value: Any, kind: Any) -> bool:
  """Returns whether a JSON value matches a field's type."""
  arguments = typing.get_args(kind)
  if typing.get_origin(kind) is Sequence:
    return isinstance(value, list | tuple) and all(
      _fits(item, arguments[0]) for item in value
    )
  if arguments:  # X | None
    return any(_fits(value, argument) for argument in arguments)
  if kind is types.NoneType:
    return value is None
  if kind is int:
    return is_count(value)
  if kind is float:
    return is_number(value)
  return isinstance(value, kind)
