# SPDX-License-Identifier: Apache-2.0
"""Beam search: several hypotheses per prompt, extended and ranked together.

`length_penalty_form` selects one of two searches. Both keep the 2 * num_beams
best continuations of the live beams at each step, so that num_beams stay live
even if as many end. Both score a hypothesis that ended with EOS by the sum of
its token log-probabilities, divided by the penalty of its length (EOS included,
prompt excluded), and keep the num_beams best of these. They differ as follows:

  'power', as in transformers: an ended hypothesis counts only if it is among
    the num_beams best continuations. At a row's `max_decode_len` all live beams
    end and are scored. `early_stopping` has three values.
  'gnmt', as in T5X: every ended hypothesis counts. Beams live at
    `max_decode_len` rank after all ended ones, by their sum without penalty.
    The search goes on until no live beam could end with a better score at any
    length. With early_stopping=True, an option that T5X lacks, it stops once
    num_beams have ended.

Each row is searched independently. T5X does the same except with a negative
length penalty. T5X also counts a decoder-only model's prompt in the length;
this module does not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from l2s_jax.inference import sampling, strategies
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import language_model

PyTree = Any


class Hypotheses(struct.PyTreeNode):
  """Hypotheses for each prompt, the best first.

  Attributes:
    tokens: token ids, padded after an answer's end.
    scores: -inf marks an unused place.
    log_probs: of each token under the model; None if not requested.
  """

  tokens: Int[Array, 'batch answers steps']
  scores: Float[Array, 'batch answers']
  log_probs: Float[Array, 'batch answers steps'] | None

  def take(self, index: Int[Array, 'batch taken']) -> 'Hypotheses':
    """Returns the hypotheses at the given places."""
    return jax.tree.map(lambda x: _take(x, index), self)


class BeamState(struct.PyTreeNode):
  """State of beam search between two steps.

  Attributes:
    step: number of tokens decoded so far.
    live: live beams, scored by the sum of their log-probabilities.
    ended: best ended hypotheses, scored with the length penalty.
    done: prompts with final answers.
    prompts: limits of the rows.
    cache: KV cache of the decoding model. The beams of a prompt are consecutive
      rows and share its encoded prompt.
  """

  step: Int[Array, '']
  live: Hypotheses
  ended: Hypotheses
  done: Bool[Array, 'batch']
  prompts: strategies.Prompts
  cache: cache_lib.Cache


class BeamSearch:
  """Beam search; returns the `num_answers` best of `num_beams` hypotheses."""

  num_ahead = 1

  def __init__(
    self,
    model: language_model.LanguageModel,
    decoding: sampling.Decoding,
    ids: strategies.Ids,
  ):
    self._model = model
    self._decoding = decoding
    self._ids = ids

  def begin(
    self,
    cache: cache_lib.Cache,
    prompts: strategies.Prompts,
    max_decode_len: int,
  ) -> BeamState:
    num_beams = self._decoding.num_beams
    shape = (prompts.max_decode_lens.shape[0], num_beams, max_decode_len)
    nothing = Hypotheses(
      tokens=strategies.full_of_rows(self._ids.pad, shape),
      scores=strategies.full_of_rows(-jnp.inf, shape[:2]),
      log_probs=strategies.full_of_rows(0.0, shape)
      if self._decoding.log_probs
      else None,
    )
    return BeamState(
      step=jnp.zeros((), jnp.int32),
      # One live beam; equal beams would all decode the same tokens.
      live=nothing.replace(scores=nothing.scores.at[:, 0].set(0.0)),
      ended=nothing,
      done=prompts.have_ended,
      prompts=prompts,
      cache=cache_lib.map_rows(
        lambda rows: jnp.repeat(rows, num_beams, axis=0), cache
      ),
    )

  def step(self, params: PyTree, state: BeamState) -> BeamState:
    decoding, step = self._decoding, state.step
    logits, cache = self._model.apply(
      {'params': params}, self._last_tokens(state), state.cache, method='extend'
    )
    candidates, parents = self._extend(state, logits[:, 0])
    length = step + 1
    ends = self._ids.end(candidates.tokens[:, :, step])
    counts = jnp.ones(ends.shape[1], bool)
    if decoding.length_penalty_form == 'power':
      ends |= (length >= state.prompts.max_decode_lens)[:, None]
      counts = jnp.arange(ends.shape[1]) < decoding.num_beams

    scores, order = jax.lax.top_k(
      jnp.where(ends, -jnp.inf, candidates.scores), decoding.num_beams
    )
    live = candidates.take(order).replace(scores=scores)
    parents = jnp.take_along_axis(parents, order, axis=1)

    scores = candidates.scores / length_penalty(length, decoding)
    candidates = candidates.replace(
      scores=jnp.where(ends & counts, scores, -jnp.inf)
    )
    both = _concatenate(state.ended, candidates)
    ended = both.take(jax.lax.top_k(both.scores, decoding.num_beams)[1])

    live = _where(state.done, state.live, live)
    ended = _where(state.done, state.ended, ended)
    return state.replace(
      step=length,
      live=live,
      ended=ended,
      done=state.done | self._is_done(live, ended, length, state.prompts),
      cache=cache_lib.map_rows(
        functools.partial(_take_beams, parents=parents), cache
      ),
    )

  def answers(self, state: BeamState) -> strategies.Answers:
    """Returns the best ended hypotheses, then live beams if too few ended."""
    num_ended = (state.ended.scores > -jnp.inf).sum(1, keepdims=True)
    place = jnp.arange(self._decoding.num_answers)
    best = _concatenate(state.ended, state.live).take(
      jnp.where(
        place < num_ended,
        place,
        place - num_ended + self._decoding.num_beams,
      )
    )
    return strategies.Answers(
      best.tokens,
      jnp.full(state.done.shape, state.step),
      best.scores,
      best.log_probs,
    )

  def _last_tokens(self, state: BeamState) -> Int[Array, 'rows 1']:
    tokens = state.live.tokens
    last = jax.lax.dynamic_index_in_dim(
      tokens, jnp.maximum(state.step - 1, 0), axis=2, keepdims=False
    )
    first = state.prompts.first_tokens[:, None]
    last = jnp.where(state.step > 0, last, first)
    return last.reshape(-1, 1)

  def _extend(
    self, state: BeamState, logits: Float[Array, 'rows vocab']
  ) -> tuple[Hypotheses, Int[Array, 'batch candidates']]:
    """Returns the best continuations by log-probability, and their parents.

    Args:
      state: before this step.
      logits: of the next token; rows are [batch * beams].

    Returns:
      2 * num_beams hypotheses per prompt, and the index of each one's beam.
    """
    batch_size, num_beams, num_steps = state.live.tokens.shape
    log_probs = jax.nn.log_softmax(logits)
    penalize = functools.partial(
      sampling.penalize,
      step=state.step,
      decoding=self._decoding,
      eos_id=self._ids.eos,
    )
    sums = state.live.scores.reshape(-1, 1) + jax.vmap(penalize)(
      log_probs, state.live.tokens.reshape(-1, num_steps)
    )
    scores, index = top_k(sums.reshape(batch_size, -1), 2 * num_beams)
    parents, tokens = jnp.divmod(index, logits.shape[1])
    candidates = state.live.take(parents)
    candidates = candidates.replace(
      tokens=strategies.write_column(candidates.tokens, tokens, state.step),
      scores=scores,
    )
    if candidates.log_probs is not None:
      chosen = jnp.take_along_axis(
        log_probs.reshape(batch_size, -1), index, axis=1
      )
      candidates = candidates.replace(
        log_probs=strategies.write_column(
          candidates.log_probs, chosen, state.step
        )
      )
    return candidates, parents

  def _is_done(
    self,
    live: Hypotheses,
    ended: Hypotheses,
    length: Int[Array, ''],
    prompts: strategies.Prompts,
  ) -> Bool[Array, 'batch']:
    """Returns true for prompts whose best answers cannot change any more."""
    decoding = self._decoding
    best_length: Array = length
    # A positive penalty favours the longest answer, a negative one the next
    # step.
    if decoding.length_penalty > 0 and (
      decoding.early_stopping == 'never'
      or decoding.length_penalty_form == 'gnmt'
    ):
      best_length = prompts.max_decode_lens
    worst = ended.scores.min(1)  # -inf until num_beams have ended.
    best = live.scores[:, 0] / length_penalty(best_length, decoding)
    done = (best <= worst) | (length >= prompts.max_decode_lens)
    if decoding.early_stopping is True:
      done |= worst > -jnp.inf
    return done


def length_penalty(
  length: Int[Array, '*batch'], decoding: sampling.Decoding
) -> Float[Array, '*batch']:
  """Returns the divisor of the score for a length, EOS included."""
  base = length.astype(jnp.float32)
  if decoding.length_penalty_form == 'gnmt':
    base = (5 + base) / 6
  return base**decoding.length_penalty


def top_k(
  x: Float[Array, 'batch n'], k: int, block_size: int = 128
) -> tuple[Float[Array, 'batch k'], Int[Array, 'batch k']]:
  """Returns the k largest values and their indices, as `lax.top_k` does.

  The k largest are in the k blocks with the largest maxima, the first ones
  among equals. Maxima vectorise on XLA:CPU; its top_k does not.
  """
  if x.shape[1] < 2 * k * block_size:
    values, places = jax.lax.top_k(x, k)
    return values, places
  padding = -x.shape[1] % block_size
  x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=-jnp.inf)
  blocks = x.reshape(x.shape[0], -1, block_size)
  chosen = jnp.sort(jax.lax.top_k(blocks.max(2), k)[1], axis=1)
  few = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1)
  values, places = jax.lax.top_k(few.reshape(x.shape[0], -1), k)
  block, place = jnp.divmod(places, block_size)
  return values, (
    jnp.take_along_axis(chosen, block, axis=1) * block_size + place
  )


def _concatenate(a: Hypotheses, b: Hypotheses) -> Hypotheses:
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), a, b)


def _where(
  rows: Bool[Array, 'batch'], a: Hypotheses, b: Hypotheses
) -> Hypotheses:
  return jax.tree.map(
    lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), a, b
  )


def _take_beams(rows: Array, parents: Int[Array, 'batch beams']) -> Array:
  """Reorders the rows of each prompt's beams by their parents."""
  beams = rows.reshape(*parents.shape, *rows.shape[1:])
  return _take(beams, parents).reshape(rows.shape)


def _take(x: Array, index: Int[Array, 'batch taken']) -> Array:
  """Returns the elements of each row at the row's own indices."""
  return jax.vmap(lambda row, places: row[places])(x, index)
