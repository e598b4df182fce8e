# SPDX-License-Identifier: Apache-2.0
"""Decoding settings, and token choice from logits.

Functions take one row. The choice depends on the row's own logits, tokens and
PRNG key, not on the rest of the batch. Disabled options cost nothing. No
function sorts the vocabulary: XLA:CPU takes 6 ms to sort 32,000 logits.
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

from l2s_jax.inference import quantization as quantization_lib

# Block size of the two-stage draw in `draw`.
BLOCK_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Decoding:
  """Decoding settings. The default is greedy.

  Attributes:
    temperature: 0 is greedy, whatever `top_k`, `top_p` and `min_p` are;
      otherwise samples are drawn from softmax(logits / temperature).
    top_k: sample among the `top_k` most likely tokens; 0 means all.
    top_p: sample among the fewest most likely tokens with this total
      probability.
    min_p: sample among tokens with at least this fraction of the largest
      probability.
    seed: PRNG seed; the index of a row in the input is folded in.
    repetition_penalty: divides positive logits of tokens already in the answer,
      and multiplies negative ones (Keskar et al. 2019); 1 means none.
    no_repeat_ngram_size: no n-gram of this size occurs twice; 0 means no limit.
    min_decode_len: minimum number of tokens before EOS.
    stop: stop texts. They end an answer and are removed from it, by `infer`.
    num_beams: number of beams; 1 means no beam search.
    num_answers: number of hypotheses to return, the best first.
    length_penalty: exponent of the length in the divisor of beam scores; 0
      means none.
    length_penalty_form: 'power', length ** length_penalty (Hugging Face), or
      'gnmt', ((5 + length) / 6) ** length_penalty (Wu et al. 2016; T5X).
    early_stopping: end of beam search once `num_beams` hypotheses have ended:
      True stops at once, False when no live beam would be better at its current
      length, 'never' when none can be better at any length (as in
      Hugging Face).
    log_probs: whether to return scores and log-probabilities.
    draft_len: number of tokens that LLM-to-SLM drafts for the LLM to verify
      (`speculative.py`), which gives the LLM's answers; 0 means no drafts.
    quantization: of the decoding model's weights: 'none', 'bfloat16', 'int8',
      'int8_dynamic' or 'auto', see `quantization.form`.
    llm_quantization: the same for the frozen LLM.

  Raises:
    ValueError: for a value out of its range, and for incompatible settings.
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
    if isinstance(self.stop, list):  # From gin; a list is not hashable.
      object.__setattr__(self, 'stop', tuple(self.stop))
    for name, (expected, is_in_range) in _RANGES.items():
      value = getattr(self, name)
      if not is_in_range(value):
        raise ValueError(f'Decoding.{name}={value!r}: expected {expected}.')
    if self.num_answers > self.num_beams:
      raise ValueError(
        f'Decoding.num_answers={self.num_answers} is more than '
        f'Decoding.num_beams={self.num_beams}: the answers are the best beams. '
        f'Set Decoding.num_beams to {self.num_answers} or more.'
      )
    if self.num_beams > 1 and self.temperature:
      raise ValueError(
        f'Decoding.num_beams={self.num_beams} and '
        f'Decoding.temperature={self.temperature}: beam search does not '
        'sample. Set Decoding.num_beams to 1 to sample, or '
        'Decoding.temperature to 0.'
      )


gin.external_configurable(Decoding, module='l2s_jax')


def _is_whole(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_whole_from(least: int) -> Callable[[Any], bool]:
  return lambda value: _is_whole(value) and value >= least


def _is_number(value: Any) -> bool:
  is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return is_real and math.isfinite(value)


# For each field, the description and the check of valid values.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
  # Float32 cannot divide logits by much less.
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
  # JAX silently truncates longer seeds to 32 bits.
  'seed': (
    'a whole number from 0 to 2**32 - 1',
    lambda x: _is_whole(x) and 0 <= x < 2**32,
  ),
  'repetition_penalty': (
    'a number above 0; 1 means no penalty',
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
    'a list of non-empty strings',
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
  'length_penalty': ('a number; 0 means no penalty', _is_number),
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
      f'one of {quantization_lib.KINDS}',
      lambda x: x in quantization_lib.KINDS,
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
  """Returns the next token of a row; 0 if all tokens are excluded.

  Args:
    logits: of the next token.
    tokens: buffer of the row's tokens; the first `step` are valid.
    key: PRNG key of this row and step.
    step: number of tokens decoded so far.
    decoding: the decoding settings.
    eos_id: EOS id, or a tuple of several.
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
  """Applies repetition penalty, n-gram exclusion and minimum length to logits.

  The order is that of transformers. Excluded tokens get -inf. The penalties
  count the answer's tokens only. Transformers counts all tokens that its model
  has read: also the prompt of a decoder-only model (here, it may have another
  vocabulary), and the start token of an encoder-decoder.

  Args:
    logits: of the next token; or log-probabilities.
    tokens: buffer of the row's tokens; the first `step` are valid.
    step: number of tokens decoded so far.
    decoding: the decoding settings.
    eos_id: EOS id, or a tuple of several; -1 means none.
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
  """Returns true for tokens equal to EOS, or to one of several EOS ids."""
  ids = eos_id if isinstance(eos_id, tuple) else (eos_id,)
  return functools.reduce(jnp.logical_or, [tokens == number for number in ids])


def _penalize_repetition(
  logits: Float[Array, 'vocab'],
  tokens: Int[Array, 'steps'],
  step: Int[Array, ''],
  penalty: float,
) -> Float[Array, 'vocab']:
  # A scatter, ten times faster than comparing all ids with all tokens. It drops
  # ids outside the vocabulary; equal ids write equal values.
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
  """Excludes tokens that would repeat an n-gram of `size` tokens."""
  # True where an n-gram ends whose first tokens equal the last decoded ones.
  places = jnp.arange(tokens.shape[0])
  is_end = (places >= size - 1) & (places < step)
  for back in range(1, size):
    is_end &= jnp.roll(tokens, back) == tokens[step - back]
  ids = jnp.where(is_end, tokens, logits.shape[0])
  return logits.at[ids].set(-jnp.inf, mode='drop')


def restrict(
  logits: Float[Array, 'vocab'], decoding: Decoding
) -> Float[Array, 'vocab']:
  """Applies temperature, top-k, top-p and min-p to logits.

  Each restriction applies to the tokens that the one before has left, as in
  transformers. Excluded tokens get -inf, and the most likely token 0. Equally
  likely tokens are kept or excluded together, so that `top_k` and `top_p` may
  keep more tokens than the minimum, independent of their order.

  Args:
    logits: of the next token.
    decoding: the decoding settings; `temperature` is not 0.
  """
  if 0 < decoding.top_k < logits.shape[0]:
    logits = _keep_top_k(logits, decoding.top_k)
  # Subtract first: at the lowest temperatures the quotient may be infinite.
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
  """Excludes tokens outside the top-p set; the largest logit must be 0."""
  weights = jnp.exp(logits)
  threshold = _threshold(
    lambda value: jnp.sum(jnp.where(logits >= value, weights, 0)),
    top_p * jnp.sum(weights),
    jnp.exp,
    # All logits below have a total weight below 1 - top_p; the largest has 1.
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
  """Returns the largest threshold at which the kept tokens reach the target.

  It bisects the threshold, with one sum over the vocabulary per pass: about a
  dozen passes, at most about 50. The idea is that of t5x/binary_search.py,
  which takes 32 passes; this one stops once the kept tokens are known.

  Args:
    weigh_from: returns the total weight of tokens at or above a threshold.
    target: minimum total weight.
    weigh_one: returns a lower bound for the weight of one token at or above a
      threshold.
    low: a threshold that reaches the target, and the result if no other does.
    high: the largest logit.
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
  """Returns a number strictly between two numbers; see `_to_int`."""
  # Bisecting bits ends after 32 passes for any values, but spends many on the
  # exponents of numbers near 0, where logits are rare. Bisect values first.
  low_value, high_value = _to_float(low), _to_float(high)
  width = high_value - low_value
  by_value = _to_int(low_value + width / 2)
  by_bits = (low & high) + ((low ^ high) >> 1)
  middle = jnp.where((width > 2**-10) & (width < 2**7), by_value, by_bits)
  return jnp.clip(middle, low + 1, high - 1)


def _to_int(value: Float[Array, '']) -> Int[Array, '']:
  """Maps float32 to int32 in the same order; infinities are the extremes."""
  return _flip_negative(jax.lax.bitcast_convert_type(value, jnp.int32))


def _to_float(number: Int[Array, '']) -> Float[Array, '']:
  """Inverts `_to_int`."""
  return jax.lax.bitcast_convert_type(_flip_negative(number), jnp.float32)


def _flip_negative(bits: Int[Array, '']) -> Int[Array, '']:
  # The bits of negative floats grow away from 0, int32 towards 0.
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def draw(logits: Float[Array, 'vocab'], key: PRNGKeyArray) -> Int[Array, '']:
  """Samples a token from softmax(logits).

  It first samples a block, then a token in the block. A vocabulary of 32,000
  then needs 379 random numbers, and a thirtieth of the time on a CPU.
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
  """Returns the most likely token, the lowest id among equals."""
  # Two reductions that vectorise; XLA:CPU's argmax does not (10x at 32,000).
  is_highest = logits == jnp.max(logits)
  ids = jnp.arange(logits.shape[0], dtype=jnp.int32)
  return jnp.min(jnp.where(is_highest, ids, logits.shape[0] - 1))
