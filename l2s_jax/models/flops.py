# SPDX-License-Identifier: Apache-2.0
"""FLOPs, bytes and parameter counts of models.

These are formulas from the config, not measurements. FLOPs are those of matrix
products in projections, attention and output head: a product of [m, k] and
[k, n] has 2mkn. Norms, softmax and activations are left out. Masked keys count:
attention computes them, whether a causal mask or a sliding window hides them.
XLA's own count of the same functions is a few percent higher.
"""

import dataclasses
from collections.abc import Callable

from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s, language_model
from l2s_jax.models import shapes as shapes_lib

Number = int | float
Module = l2s.LlmToSlm | language_model.LanguageModel


@dataclasses.dataclass(frozen=True)
class Costs:
  """Costs of one system at one shape.

  Attributes:
    num_params: number of parameters of all models in the system.
    flops_per_prompt: FLOPs of prefill per prompt.
    flops_per_token: FLOPs of one decode step per row. None for speculative
      decoding, where it depends on the acceptance rate.
    bytes_per_step: bytes that one decode step reads, all rows: the weights once
      and the KV cache of each row. None for speculative decoding.
  """

  num_params: int
  flops_per_prompt: Number
  flops_per_token: Number | None
  bytes_per_step: Number | None


def count(
  module: Module,
  *,
  batch_size: int,
  prompt_length: int,
  num_tokens: int,
  weight_bytes: Number,
  cache_bytes: Number,
) -> Costs:
  """Returns the costs of a system, averaged over the tokens of an answer.

  Args:
    module: LLM-to-SLM or a language model.
    batch_size: rows decoded together.
    prompt_length: tokens per prompt, without padding.
    num_tokens: tokens per answer.
    weight_bytes: bytes per weight.
    cache_bytes: bytes per element of the KV cache.
  """
  reading = Costs(
    num_params(module), prompt_flops(module, prompt_length), None, None
  )
  if isinstance(module, l2s.DraftAndVerify):
    return reading
  writer, _ = l2s.writer(module)
  return dataclasses.replace(
    reading,
    flops_per_token=mean_token_flops(module, prompt_length, num_tokens),
    bytes_per_step=step_bytes(
      writer.config,
      batch_size=batch_size,
      prompt_length=prompt_length,
      num_keys=_mean_keys(num_tokens),
      weight_bytes=weight_bytes,
      cache_bytes=cache_bytes,
    ),
  )


def mean_token_flops(
  module: Module, prompt_length: Number, num_tokens: int
) -> Number:
  """Returns the FLOPs of one decoded token, averaged over an answer.

  Args:
    module: LLM-to-SLM or a language model.
    prompt_length: tokens of the prompt.
    num_tokens: tokens of the answer.
  """
  config = l2s.writer(module)[0].config
  return token_flops(config, prompt_length, _mean_keys(num_tokens))


def _mean_keys(num_tokens: int) -> float:
  """Returns the mean number of answer tokens that a decode step attends to."""
  # Token i attends to i answer tokens, itself included.
  return (num_tokens + 1) / 2


def num_params(module: Module) -> int:
  """Returns the number of parameters of a system."""
  return sum(shape.size for shape in shapes_lib.of_module(module).values())


def prompt_flops(module: Module, length: Number) -> Number:
  """Returns the FLOPs of prefill for one prompt, without logits."""
  if not isinstance(module, l2s.LlmToSlm):
    return _start_flops(module.config, length)
  if isinstance(module, l2s.DraftAndVerify):
    of_llm = _start_flops(module.llm_config, length)
  else:
    of_llm = _llm_flops(module, length)
  return (
    of_llm
    + 2 * length * _between(module)
    + _start_flops(module.slm_config, length)
  )


def train_flops(
  module: Module,
  prompt_length: Number,
  answer_length: Number,
  *,
  llm_reads: bool = True,
) -> Number:
  """Returns the FLOPs of training on one example.

  The backward pass of trained parameters costs twice the forward pass.
  Rematerialised computation and padding are not counted.

  Args:
    module: LLM-to-SLM or a language model.
    prompt_length: tokens of the prompt.
    answer_length: tokens of the answer.
    llm_reads: whether the LLM runs; false if its states come from a cache.
  """
  config = l2s.writer(module)[0].config
  forward = prompt_flops(module, prompt_length) + answer_length * token_flops(
    config, prompt_length, (answer_length + 1) / 2
  )
  if not isinstance(module, l2s.LlmToSlm):
    return 3 * forward
  if module.train_llm:
    return 3 * forward
  reading = _llm_flops(module, prompt_length)
  return 3 * forward - (2 if llm_reads else 3) * reading


def token_flops(
  config: config_lib.TransformerConfig, prompt_length: Number, num_keys: Number
) -> Number:
  """Returns the FLOPs of one decode step for one row.

  Args:
    config: of the decoding model.
    prompt_length: keys of the prompt, in cross- or self-attention.
    num_keys: keys of the answer, the token's own included.
  """
  read = _size(config, lambda p: p[-1] == 'kernel' and _is_read_by_a_step(p))
  return 2 * (read + config.vocab_size * config.emb_dim) + _attention_flops(
    config, config.num_decoder_layers, prompt_length + num_keys
  )


def step_bytes(
  config: config_lib.TransformerConfig,
  *,
  batch_size: int,
  prompt_length: int,
  num_keys: Number,
  weight_bytes: Number,
  cache_bytes: Number,
) -> Number:
  """Returns the bytes that one decode step reads, for all rows.

  These are the decoder's weights (without cross-attention's key and value
  kernels), the output head, one row of each embedding table for each token, and
  the keys and values of all layers.

  Args:
    config: of the decoding model.
    batch_size: rows.
    prompt_length: keys of the prompt.
    num_keys: keys of the answer.
    weight_bytes: bytes per weight.
    cache_bytes: bytes per element of the KV cache.
  """
  tables = 2 if config.positions == 'learned' else 1
  read = (
    _size(config, _is_read_by_a_step)
    + config.vocab_size * config.emb_dim
    + batch_size * tables * config.emb_dim
  )
  key_values = (
    2
    * config.num_decoder_layers
    * config.kv_heads
    * config.head_dim
    * (prompt_length + num_keys)
  )
  return read * weight_bytes + batch_size * key_values * cache_bytes


def _size(
  config: config_lib.TransformerConfig,
  is_counted: Callable[[shapes_lib.Path], bool],
) -> int:
  shapes = shapes_lib.of_model(config)
  return sum(shape.size for path, shape in shapes.items() if is_counted(path))


def _is_of_cross_kv(path: shapes_lib.Path) -> bool:
  return 'cross_attention' in path and path[-2] in ('key', 'value')


def _is_read_by_a_step(path: shapes_lib.Path) -> bool:
  return path[0] == 'decoder' and not _is_of_cross_kv(path)


def _between(module: l2s.LlmToSlm) -> int:
  """Returns the number of weights in the kernels between LLM and SLM."""
  return sum(
    shape.size
    for path, shape in shapes_lib.of_module(module).items()
    if path[0] not in ('llm', 'slm') and path[-1] == 'kernel'
  )


def reading_flops(
  config: config_lib.TransformerConfig, length: Number
) -> Number:
  """Returns the FLOPs of encoding a prompt of `length` tokens."""
  stack, num_layers = 'encoder', config.num_encoder_layers
  if not config.is_encoder_decoder:
    stack, num_layers = 'decoder', config.num_decoder_layers
  kernels = _size(config, lambda p: p[0] == stack and p[-1] == 'kernel')
  return length * (2 * kernels + _attention_flops(config, num_layers, length))


def _llm_flops(module: l2s.LlmToSlm, length: Number) -> Number:
  """Returns the FLOPs of the LLM's layers up to `llm_layer`, for one prompt."""
  config, layer = module.llm_config, module.llm_layer
  count = l2s.num_reading_layers(config)
  read = layer if isinstance(layer, int) else count
  return reading_flops(config, length) * read / count


def _start_flops(
  config: config_lib.TransformerConfig, length: Number
) -> Number:
  """Returns the FLOPs of encoding a prompt and projecting cross keys/values."""
  cross_kv = _size(config, lambda p: p[-1] == 'kernel' and _is_of_cross_kv(p))
  return reading_flops(config, length) + 2 * length * cross_kv


def _attention_flops(
  config: config_lib.TransformerConfig, num_layers: int, num_keys: Number
) -> Number:
  """Returns the FLOPs of attention for one query: logits and weighted sum."""
  return 4 * num_layers * config.num_heads * config.head_dim * num_keys
