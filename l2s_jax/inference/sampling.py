# SPDX-License-Identifier: Apache-2.0
"""How an answer's tokens are chosen: the settings, and from logits to a token.

Every function is of one row: a row's choice depends on its own logits, tokens
and key alone, whatever stands beside it in the batch. What is off is not
computed. Nothing here sorts a vocabulary: XLA:CPU takes 6 ms for 32,000.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from l2s_jax.models import config as config_lib

# Tokens that `draw` chooses among in its second step.
BLOCK_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How answers are written. The default is greedy.

  Attributes:
    temperature: 0 takes the most likely token, whatever `top_k`, `top_p` and
      `min_p` are; otherwise tokens are drawn from softmax(logits /
      temperature).
    top_k: draw among so many most likely tokens; 0: among all.
    top_p: draw among the fewest tokens that have this probability together.
    min_p: draw among tokens at least so probable, as a part of the most
      probable's probability.
    seed: of the draws, with each row's index in the input.
    repetition_penalty: divides positive logits, and multiplies negative ones,
      of tokens that the answer has (Keskar et al. 2019); 1 is none.
    no_repeat_ngram_size: no sequence of so many tokens twice; 0: any.
    min_decode_len: tokens before EOS may come.
    stop: texts that end an answer and are cut off it, by `infer`.
    num_beams: hypotheses of beam search; 1 is none.
    num_answers: of these, how many are returned, the best first.
    length_penalty: the exponent of the length by which beams' scores are
      divided; 0 is none.
    length_penalty_form: 'power', length ** length_penalty (Hugging Face), or
      'gnmt', ((5 + length) / 6) ** length_penalty (Wu et al. 2016; T5X).
    early_stopping: of beam search, when `num_beams` hypotheses have ended:
      True ends there, False when no beam of this length would be better,
      'never' when none of any length can (Hugging Face's three).
    log_probs: whether answers come with scores and log-probabilities.
    draft_len: tokens that LLM-to-SLM drafts for the LLM to verify at once
      (`speculative.py`): answers are then the LLM's; 0: LLM-to-SLM's own.
    quantization: of the weights of the model that writes: 'none', 'int8' or
      'int8_dynamic', see `TransformerConfig.quantization`.
    llm_quantization: of the frozen LLM, likewise.

  Raises:
    ValueError: for a value out of its field's range, and for two that cannot
      be together.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0
  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0
  min_decode_len: int = 0
  stop: Sequence[str] = ()
  num_beams: int = 1
  num_answers: int = 1
  length_penalty: float = 1.0
  length_penalty_form: str = 'power'
  early_stopping: bool | str = False
  log_probs: bool = False
  draft_len: int = 0
  quantization: str = 'none'
  llm_quantization: str = 'none'

  def __post_init__(self):
    if isinstance(self.stop, list):  # as gin has it, which has no hash
      object.__setattr__(self, 'stop', tuple(self.stop))
    for name, (expected, is_in_range) in _RANGES.items():
      value = getattr(self, name)
      if not is_in_range(value):
        raise ValueError(f'Decoding.{name}={value!r}: expected {expected}.')
    if self.num_answers > self.num_beams:
      raise ValueError(
        f'Decoding.num_answers={self.num_answers} is more than '
        f'Decoding.num_beams={self.num_beams}: the answers are the best of '
        f'the beams; set Decoding.num_beams to {self.num_answers} or more.'
      )
    if self.num_beams > 1 and self.temperature:
      raise ValueError(
        f'Decoding.num_beams={self.num_beams} and '
        f'Decoding.temperature={self.temperature}: beam search draws nothing; '
        'set Decoding.num_beams to 1 to sample, or Decoding.temperature to 0.'
      )


gin.external_configurable(Decoding, module='l2s_jax')


def _is_whole(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_whole_from(least: int) -> Callable[[Any], bool]:
  return lambda value: _is_whole(value) and value >= least


def _is_number(value: Any) -> bool:
  is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return is_real and math.isfinite(value)


# Of each field, what is expected and whether a value is that.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
  # Float32 divides by nothing much smaller.
  'temperature': (
    'a number, 0 (the most likely token) or at least 1e-6',
    lambda x: _is_number(x) and (x == 0 or x >= 1e-6),
  ),
  'top_k': (
    'a whole number, at least 0 (all tokens)',
    _is_whole_from(0),
  ),
  'top_p': (
    'a number above 0, at most 1 (all tokens)',
    lambda x: _is_number(x) and 0 < x <= 1,
  ),
  'min_p': (
    'a number from 0 (all tokens) to 1',
    lambda x: _is_number(x) and 0 <= x <= 1,
  ),
  # Of a longer one, JAX's keys take the last 32 bits without a word.
  'seed': (
    'a whole number from 0 to 2**32 - 1',
    lambda x: _is_whole(x) and 0 <= x < 2**32,
  ),
  'repetition_penalty': (
    'a number above 0; 1 is none',
    lambda x: _is_number(x) and x > 0,
  ),
  'no_repeat_ngram_size': (
    'a whole number, at least 0 (any may repeat)',
    _is_whole_from(0),
  ),
  'min_decode_len': (
    'a whole number of tokens, at least 0',
    _is_whole_from(0),
  ),
  'stop': (
    'a list of texts, none of them empty',
    lambda x: isinstance(x, tuple) and all(isinstance(s, str) and s for s in x),
  ),
  'num_beams': (
    'a whole number, at least 1 (no beam search)',
    _is_whole_from(1),
  ),
  'num_answers': (
    'a whole number, at least 1',
    _is_whole_from(1),
  ),
  'length_penalty': ('a number; 0 is none', _is_number),
  'length_penalty_form': (
    "'power' or 'gnmt'",
    lambda x: x in ('power', 'gnmt'),
  ),
  'early_stopping': (
    "True, False or 'never'",
    lambda x: isinstance(x, bool) or x == 'never',
  ),
  'log_probs': ('True or False', lambda x: isinstance(x, bool)),
  'draft_len': (
    'a whole number of tokens, at least 0 (no drafts)',
    _is_whole_from(0),
  ),
  **{
    name: (
      f'one of {config_lib.QUANTIZATIONS}',
      lambda x: x in config_lib.QUANTIZATIONS,
    )
    for name in ('quantization', 'llm_quantization')
  },
}


def choose(
  logits: Float[Array, 'vocab'],
  tokens: Int[Array, 'steps'],
  key: PRNGKeyArray,
  *,
  step: Int[Array, ''],
  decoding: Decoding,
  eos_id: int | tuple[int, ...],
) -> Int[Array, '']:
  """Returns a row's next token; 0 where all are excluded.

  Args:
    logits: of the next token.
    tokens: what the row has written, the first `step` of them.
    key: for this row and step.
    step: how many tokens have been written.
    decoding: the settings.
    eos_id: the token that ends an answer, or a tuple of all that do.
  """
  logits = penalize(logits, tokens, step=step, decoding=decoding, eos_id=eos_id)
  if not decoding.temperature:
    return greedy(logits)
  return draw(restrict(logits, decoding), key)


def penalize(
  logits: Float[Array, 'vocab'],
  tokens: Int[Array, 'steps'],
  *,
  step: Int[Array, ''],
  decoding: Decoding,
  eos_id: int | tuple[int, ...],
) -> Float[Array, 'vocab']:
  """Returns logits, or log-probabilities, with regard to what is written.

  That is repetition penalty, no repeated n-gram, least length, in the order of
  transformers; excluded tokens get -inf. Only the answer's tokens count.
  Transformers counts what its model has been fed: a decoder-only model's prompt
  too (ours may have another vocabulary), and an encoder-decoder's start token.

  Args:
    logits: of the next token.
    tokens: what the row has written, the first `step` of them.
    step: how many tokens have been written.
    decoding: the settings.
    eos_id: the token that ends an answer, or a tuple of all that do; -1:
      nothing does.
  """
  if decoding.repetition_penalty != 1:
    logits = _penalize_repetition(
      logits, tokens, step, decoding.repetition_penalty
    )
  if decoding.no_repeat_ngram_size:
    logits = _exclude_ngrams(
      logits, tokens, step, decoding.no_repeat_ngram_size
    )
  if decoding.min_decode_len:
    ends = is_eos(jnp.arange(logits.shape[0]), eos_id)
    is_early = step < decoding.min_decode_len
    logits = jnp.where(ends & is_early, -jnp.inf, logits)
  return logits


def is_eos(
  tokens: Int[Array, '*shape'], eos_id: int | tuple[int, ...]
) -> Bool[Array, '*shape']:
  """Returns which tokens are EOS, or one of several."""
  ids = eos_id if isinstance(eos_id, tuple) else (eos_id,)
  return functools.reduce(jnp.logical_or, [tokens == number for number in ids])


def _penalize_repetition(
  logits: Float[Array, 'vocab'],
  tokens: Int[Array, 'steps'],
  step: Int[Array, ''],
  penalty: float,
) -> Float[Array, 'vocab']:
  # A scatter, which drops ids beyond the vocabulary; equal ids write equals.
  # Comparing all ids with all tokens takes ten times as long and more.
  vocab_size = logits.shape[0]
  ids = jnp.where(jnp.arange(tokens.shape[0]) < step, tokens, vocab_size)
  found = logits.at[ids].get(mode='clip')
  found = jnp.where(found < 0, found * penalty, found / penalty)
  return logits.at[ids].set(found, mode='drop')


def _exclude_ngrams(
  logits: Float[Array, 'vocab'],
  tokens: Int[Array, 'steps'],
  step: Int[Array, ''],
  size: int,
) -> Float[Array, 'vocab']:
  """Returns logits without tokens that would end an n-gram a second time."""
  # Where an n-gram ends whose other tokens are those written last.
  places = jnp.arange(tokens.shape[0])
  is_end = (places >= size - 1) & (places < step)
  for back in range(1, size):
    is_end &= jnp.roll(tokens, back) == tokens[step - back]
  ids = jnp.where(is_end, tokens, logits.shape[0])
  return logits.at[ids].set(-jnp.inf, mode='drop')


def restrict(
  logits: Float[Array, 'vocab'], decoding: Decoding
) -> Float[Array, 'vocab']:
  """Returns the logits of the distribution that is drawn from.

  Temperature, top-k, top-p, min-p, each of what the one before has left, as in
  transformers. Excluded tokens have -inf, the most likely 0. Tokens that are
  equally likely are kept or excluded together, so that `top_k` and `top_p` may
  keep more than the fewest, and order says nothing.

  Args:
    logits: of the next token.
    decoding: the settings; `temperature` is not 0.
  """
  if 0 < decoding.top_k < logits.shape[0]:
    logits = _keep_top_k(logits, decoding.top_k)
  # At the lowest temperatures the quotient of the logits would be infinite.
  logits = (logits - jnp.max(logits)) / decoding.temperature
  if decoding.top_p < 1:
    logits = _keep_top_p(logits, decoding.top_p)
  if decoding.min_p:
    logits = jnp.where(logits >= math.log(decoding.min_p), logits, -jnp.inf)
  return logits


def _keep_top_k(
  logits: Float[Array, 'vocab'], top_k: int
) -> Float[Array, 'vocab']:
  threshold = _threshold(
    lambda value: jnp.sum(logits >= value),
    top_k,
    lambda _: 1,
    low=jnp.float32(-jnp.inf),
    high=jnp.max(logits),
  )
  return jnp.where(logits >= threshold, logits, -jnp.inf)


def _keep_top_p(
  logits: Float[Array, 'vocab'], top_p: float
) -> Float[Array, 'vocab']:
  """Returns logits whose others are -inf; the highest must be 0."""
  weights = jnp.exp(logits)
  threshold = _threshold(
    lambda value: jnp.sum(jnp.where(logits >= value, weights, 0)),
    top_p * jnp.sum(weights),
    jnp.exp,
    # All below weigh less than 1 - top_p together, the highest alone 1.
    low=jnp.float32(math.log((1 - top_p) / logits.shape[0])),
    high=jnp.float32(0),
  )
  return jnp.where(logits >= threshold, logits, -jnp.inf)


def _threshold(
  weigh_from: Callable[[Array], Any],
  target: Any,
  weigh_one: Callable[[Array], Any],
  *,
  low: Float[Array, ''],
  high: Float[Array, ''],
) -> Float[Array, '']:
  """Returns a value from which on tokens weigh the target and none is spare.

  A bisection, in which each pass over the vocabulary is one sum: about a dozen
  passes, some 50 at most. The idea is that of t5x/binary_search.py, which
  takes 32; this one stops once the tokens are known.

  Args:
    weigh_from: from a value to the weight of all tokens from there on.
    target: what they are to weigh.
    weigh_one: from a value to the least weight of a token from there on.
    low: a value that is low enough, or to be taken if none is.
    high: the highest of all values.
  """

  def halve(bounds):
    low, high = bounds
    middle = _middle(low, high)
    value = _to_float(middle)
    weight = weigh_from(value)
    is_enough = weight >= target
    none_is_spare = is_enough & (weight < target + weigh_one(value))
    low = jnp.where(is_enough, middle, low)
    high = jnp.where(is_enough, high, middle)
    return low, jnp.where(none_is_spare, low + 1, high)

  bounds = _to_int(low), _to_int(high) + 1
  low_int, _ = jax.lax.while_loop(lambda b: b[1] - 1 > b[0], halve, bounds)
  return _to_float(low_int)


def _middle(low: Int[Array, ''], high: Int[Array, '']) -> Int[Array, '']:
  """Returns a number between two of which it is neither; see `_to_int`."""
  # Halving bits ends after 32 passes, whatever the values, but spends many on
  # the exponents of numbers near 0. Logits are not there: halve values first.
  low_value, high_value = _to_float(low), _to_float(high)
  width = high_value - low_value
  by_value = _to_int(low_value + width / 2)
  by_bits = (low & high) + ((low ^ high) >> 1)
  middle = jnp.where((width > 2**-10) & (width < 2**7), by_value, by_bits)
  return jnp.clip(middle, low + 1, high - 1)


def _to_int(value: Float[Array, '']) -> Int[Array, '']:
  """Numbers float32 in their order; infinities are the outermost."""
  return _flip_negative(jax.lax.bitcast_convert_type(value, jnp.int32))


def _to_float(number: Int[Array, '']) -> Float[Array, '']:
  return jax.lax.bitcast_convert_type(_flip_negative(number), jnp.float32)


def _flip_negative(bits: Int[Array, '']) -> Int[Array, '']:
  # Negative floats are numbered away from 0, int32 towards it.
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def draw(logits: Float[Array, 'vocab'], key: PRNGKeyArray) -> Int[Array, '']:
  """Returns a token drawn from softmax(logits).

  First its block, then the token in it, so that a vocabulary of 32,000 takes
  not as many random numbers but 379: a thirtieth of the time on a CPU.
  """
  num_blocks = -(-logits.shape[0] // BLOCK_SIZE)
  padding = num_blocks * BLOCK_SIZE - logits.shape[0]
  blocks = jnp.pad(logits, (0, padding), constant_values=-jnp.inf)
  blocks = blocks.reshape(num_blocks, BLOCK_SIZE)
  block_key, token_key = jax.random.split(key)
  block = jax.random.categorical(block_key, jax.nn.logsumexp(blocks, axis=1))
  token = jax.random.categorical(token_key, blocks[block])
  return (block * BLOCK_SIZE + token).astype(jnp.int32)


def greedy(logits: Float[Array, 'vocab']) -> Int[Array, '']:
  """Returns the most likely token, the lowest id of several."""
  # Two reductions that vectorise; XLA:CPU's argmax does not (10x at 32,000).
  is_highest = logits == jnp.max(logits)
  ids = jnp.arange(logits.shape[0], dtype=jnp.int32)
  return jnp.min(jnp.where(is_highest, ids, logits.shape[0] - 1))
