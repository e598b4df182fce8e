# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: LLM-to-SLM drafts, the LLM's own decoder verifies.

A round adds 1 to draft_len + 1 tokens to each row. The SLM drafts draft_len
tokens one by one. The LLM reads the last token and all drafts in one pass. The
accepted drafts stay, followed by one token of the LLM's own. The LLM's encoder
reads the prompt once, for both models.

The output distribution is the LLM's. Greedy answers equal the LLM's greedy
answers. In sampling, a draft x is accepted with probability
min(1, p(x) / q(x)); p is the LLM's and q the SLM's distribution after
temperature, penalties and top-k, top-p and min-p. The first rejected draft is
replaced by a sample from max(0, p - q), normalised, so each token has the
distribution p. Both hold up to rounding: the pass over several tokens may break
a tie between float32 logits differently from a single-token step.

Source: Leviathan et al. 2023 (arXiv:2211.17192); Chen et al. 2023
(arXiv:2302.01318).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from l2s_jax.inference import sampling, strategies
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import l2s

PyTree = Any

# Roles of PRNG keys at each place of an answer.
_DRAFT, _ACCEPT, _REPLACE = range(3)


class SpeculativeState(struct.PyTreeNode):
  """State of speculative decoding between two rounds.

  Rows may have different numbers of tokens.

  Attributes:
    step: largest number of tokens among rows that are not done, or 0.
    num_tokens: number of tokens of each row.
    tokens: decoded tokens, padded.
    log_probs: of each token under the LLM, before penalties and temperature;
      None if not requested.
    unread: tokens that the SLM has not read yet, in order; the second place may
      be unused.
    num_unread: number of unread tokens: the newest one, and, if all drafts were
      accepted, the last draft before it.
    num_rounds: number of rounds of each row.
    num_accepted: number of accepted drafts of each row.
    done: rows with EOS, at their token limit, or without a prompt.
    prompts: keys and limits of the rows.
    cache: KV caches 'llm' (without the newest token) and 'slm'.
  """

  step: Int[Array, '']
  num_tokens: Int[Array, 'batch']
  tokens: Int[Array, 'batch steps']
  log_probs: Float[Array, 'batch steps'] | None
  unread: Int[Array, 'batch 2']
  num_unread: Int[Array, 'batch']
  num_rounds: Int[Array, 'batch']
  num_accepted: Int[Array, 'batch']
  done: Bool[Array, 'batch']
  prompts: strategies.Prompts
  cache: dict[str, cache_lib.Cache]


class Drafts(NamedTuple):
  """Drafts of the SLM for each row.

  Attributes:
    tokens: the drafted tokens.
    logits: the logits of their sampling; None if greedy.
    answer: the row's tokens followed by the drafts.
    cache: KV cache of the SLM, without the last draft.
  """

  tokens: Int[Array, 'batch drafts']
  logits: Float[Array, 'batch drafts vocab'] | None
  answer: Int[Array, 'batch steps']
  cache: cache_lib.Cache


def acceptance(state: SpeculativeState, draft_len: int) -> float:
  """Returns the acceptance rate of all drafts so far; waits for the device."""
  num_rounds = max(int(state.num_rounds.sum()), 1)
  return int(state.num_accepted.sum()) / (num_rounds * draft_len)


def check(decoding: sampling.Decoding) -> None:
  """Checks that the decoding settings allow drafts.

  Raises:
    ValueError: names the setting.
  """
  if decoding.num_beams > 1:
    raise ValueError(
      f'Decoding.draft_len={decoding.draft_len} with '
      f'num_beams={decoding.num_beams}: beam search does not support drafts. '
      'Set one of them to its default.'
    )


class Speculative:
  """Speculative decoding: the LLM's answers, several tokens per round."""

  def __init__(
    self,
    module: l2s.DraftAndVerify,
    decoding: sampling.Decoding,
    ids: strategies.Ids,
  ):
    """Sets up speculative decoding.

    Raises:
      ValueError: if the decoding settings do not allow drafts.
    """
    check(decoding)
    self.num_ahead = decoding.draft_len + 1
    self._module = module
    self._decoding = decoding
    self._ids = ids
    self._vocab_size = module.llm_config.vocab_size

  def begin(
    self,
    cache: dict[str, cache_lib.Cache],
    prompts: strategies.Prompts,
    max_decode_len: int,
  ) -> SpeculativeState:
    shape = (prompts.max_decode_lens.shape[0], max_decode_len)
    zeros = strategies.full_of_rows(0, shape[:1])
    return SpeculativeState(
      step=jnp.zeros((), jnp.int32),
      num_tokens=zeros,
      tokens=strategies.full_of_rows(self._ids.pad, shape),
      log_probs=strategies.full_of_rows(0.0, shape)
      if self._decoding.log_probs
      else None,
      unread=strategies.full_of_rows(self._ids.start, (shape[0], 2)),
      num_unread=zeros + 1,
      num_rounds=zeros,
      num_accepted=zeros,
      done=prompts.have_ended,
      prompts=prompts,
      cache={
        name: cache_lib.rewind(of, zeros + of.slot)
        for name, of in cache.items()
      },
    )

  def step(self, params: PyTree, state: SpeculativeState) -> SpeculativeState:
    """Runs one round: draft, verify, keep the accepted tokens."""
    drafts = self._draft(params, state)
    newest = _take(state.unread, state.num_unread - 1)
    logits, llm_cache = self._module.apply(
      {'params': params},
      jnp.concatenate([newest[:, None], drafts.tokens], axis=1),
      state.cache['llm'],
      method='verify',
    )
    num_accepted, own = self._verify(state, drafts, logits)
    place = jnp.arange(self.num_ahead)
    new = jnp.where(
      place < num_accepted[:, None],
      jnp.pad(drafts.tokens, ((0, 0), (0, 1))),
      own[:, None],
    )  # [batch, draft_len + 1]
    is_eos = self._ids.end(new)
    has_ended = jnp.cumsum(is_eos, axis=1) - is_eos > 0
    last = jnp.minimum(
      num_accepted, state.prompts.max_decode_lens - state.num_tokens - 1
    )
    is_kept = ~has_ended & (place <= last[:, None]) & ~state.done[:, None]
    num_new = is_kept.sum(1, dtype=jnp.int32)
    num_tokens = state.num_tokens + num_new
    done = (
      state.done
      | (is_eos & is_kept).any(1)
      | (num_tokens >= state.prompts.max_decode_lens)
    )

    def write(buffer, values):
      return _write(buffer, values, state.num_tokens, num_new)

    log_probs = state.log_probs
    if log_probs is not None:
      log_probs = write(log_probs, _log_probs(logits, new))
    has_all = num_accepted == self.num_ahead - 1
    before = jnp.where(has_all, drafts.tokens[:, -1], own)
    slm_read = state.num_unread + num_accepted - has_all
    return state.replace(
      step=jnp.max(jnp.where(done, 0, num_tokens)),
      num_tokens=num_tokens,
      tokens=write(state.tokens, new),
      log_probs=log_probs,
      unread=jnp.stack([before, own], axis=1),
      num_unread=1 + has_all.astype(jnp.int32),
      num_rounds=state.num_rounds + ~state.done,
      num_accepted=state.num_accepted + jnp.minimum(num_accepted, num_new),
      done=done,
      cache={
        'llm': cache_lib.rewind(llm_cache, state.cache['llm'].slot + num_new),
        'slm': cache_lib.rewind(
          drafts.cache,
          state.cache['slm'].slot + jnp.where(state.done, 0, slm_read),
        ),
      },
    )

  def answers(self, state: SpeculativeState) -> strategies.Answers:
    return strategies.one_answer(
      state.tokens, state.num_tokens, state.log_probs
    )

  def _draft(self, params: PyTree, state: SpeculativeState) -> Drafts:
    """Reads the SLM's unread tokens and drafts draft_len tokens."""
    batch_size = state.done.shape[0]

    def read(tokens, cache):
      # The two models may have embedding tables of different sizes.
      return self._module.apply(
        {'params': params},
        jnp.minimum(tokens, self._module.slm_config.vocab_size - 1),
        cache,
        method='draft',
      )

    def write(logits, answer, i):
      place = state.num_tokens + i
      logits = self._of_tokens(_resize(logits, self._vocab_size), answer, place)
      if self._decoding.temperature:
        keys = _keys(state.prompts.row_keys, place, _DRAFT)
        token = jax.vmap(sampling.draw)(logits, keys)
      else:
        token, logits = jax.vmap(sampling.greedy)(logits), None
      ones = jnp.ones((batch_size,), jnp.int32)
      return token, logits, _write(answer, token[:, None], place, ones)

    def draft(carry, i):
      token, answer, cache = carry
      logits, cache = read(token[:, None], cache)
      token, logits, answer = write(logits[:, 0], answer, i)
      return (token, answer, cache), (token, logits)

    logits, cache = read(state.unread, state.cache['slm'])
    cache = cache_lib.rewind(cache, state.cache['slm'].slot + state.num_unread)
    logits = _take(logits, state.num_unread - 1)
    token, logits, answer = write(logits, state.tokens, 0)
    first = (token, logits)
    (_, answer, cache), others = jax.lax.scan(
      draft, (token, answer, cache), jnp.arange(1, self.num_ahead - 1)
    )
    tokens, logits = jax.tree.map(
      lambda x, xs: jnp.concatenate([x[None], xs]).swapaxes(0, 1),
      first,
      others,
    )
    return Drafts(tokens, logits, answer, cache)

  def _verify(
    self,
    state: SpeculativeState,
    drafts: Drafts,
    logits: Float[Array, 'batch places vocab'],
  ) -> tuple[Int[Array, 'batch'], Int[Array, 'batch']]:
    """Returns the number of accepted drafts, and the LLM's token after them."""
    places = state.num_tokens[:, None] + jnp.arange(self.num_ahead)
    logits = jax.vmap(self._of_tokens, in_axes=(1, None, 1), out_axes=1)(
      logits, drafts.answer, places
    )
    if drafts.logits is None:
      return jax.vmap(verify_greedy)(drafts.tokens, logits)
    accept_keys, replace_keys = (
      jax.vmap(_keys, in_axes=(None, 1, None), out_axes=1)(
        state.prompts.row_keys, places, role
      )
      for role in (_ACCEPT, _REPLACE)
    )
    return jax.vmap(verify_sampled)(
      drafts.tokens, drafts.logits, logits, accept_keys, replace_keys
    )

  def _of_tokens(
    self,
    logits: Float[Array, 'batch vocab'],
    answer: Int[Array, 'batch steps'],
    place: Int[Array, 'batch'],
  ) -> Float[Array, 'batch vocab']:
    """Returns penalised, restricted logits at a place of each row."""

    def of_row(logits, answer, place):
      logits = sampling.penalize(
        logits,
        answer,
        step=place,
        decoding=self._decoding,
        eos_id=self._ids.eos,
      )
      if not self._decoding.temperature:
        return logits
      return sampling.restrict(logits, self._decoding)

    return jax.vmap(of_row)(logits, answer, place)


def verify_greedy(
  drafts: Int[Array, 'drafts'], logits: Float[Array, 'places vocab']
) -> tuple[Int[Array, ''], Int[Array, '']]:
  """Returns the number of accepted drafts of a row, and the LLM's next token.

  Args:
    drafts: the SLM's tokens.
    logits: of the LLM, at the drafts' places and the next one.
  """
  own = jax.vmap(sampling.greedy)(logits)
  num_accepted = _num_leading(drafts == own[:-1])
  return num_accepted, own[num_accepted]


def verify_sampled(
  drafts: Int[Array, 'drafts'],
  draft_logits: Float[Array, 'drafts vocab'],
  logits: Float[Array, 'places vocab'],
  accept_keys: Key[Array, 'places'],
  replace_keys: Key[Array, 'places'],
) -> tuple[Int[Array, ''], Int[Array, '']]:
  """Returns the number of accepted drafts of a row, and the token after them.

  Args:
    drafts: the SLM's tokens.
    draft_logits: of the SLM, after penalties and restriction.
    logits: of the LLM, at the drafts' places and the next one.
    accept_keys: PRNG keys of acceptance, one per place.
    replace_keys: PRNG keys of the token after the drafts, one per place.
  """
  p = jax.nn.softmax(logits)
  # The last place has no draft, so q = 0 there and the token is drawn from p.
  q = jnp.pad(jax.nn.softmax(draft_logits), ((0, 1), (0, 0)))
  chance = jax.vmap(jax.random.uniform)(accept_keys)[:-1]
  place = jnp.arange(len(drafts))
  num_accepted = _num_leading(chance * q[place, drafts] < p[place, drafts])
  residual = jnp.maximum(p[num_accepted] - q[num_accepted], 0)
  # The residual is zero if p = q and rounding rejects a draft, and NaN if the
  # SLM's logits are NaN. Draw from p then.
  residual = jnp.where(residual.sum() > 0, residual, p[num_accepted])
  token = sampling.draw(jnp.log(residual), replace_keys[num_accepted])
  return num_accepted, token


def _num_leading(is_true: Bool[Array, 'places']) -> Int[Array, '']:
  return jnp.cumprod(is_true, dtype=jnp.int32).sum(dtype=jnp.int32)


def _keys(
  row_keys: Key[Array, 'batch'], place: Int[Array, 'batch'], role: int
) -> Key[Array, 'batch']:
  """Returns a PRNG key per row, unique to its place and role."""
  fold = jax.vmap(jax.random.fold_in)
  return fold(row_keys, 3 * place + role)


def _take(x: Array, place: Int[Array, 'batch']) -> Array:
  """Returns the element of each row at the row's own place."""
  return jax.vmap(lambda row, i: row[i])(x, place)


def _write(
  buffer: Array,
  values: Array,
  start: Int[Array, 'batch'],
  length: Int[Array, 'batch'],
) -> Array:
  """Writes `length` values of each row into the buffer from its `start`."""
  place = jnp.arange(buffer.shape[1]) - start[:, None]
  spread = jnp.take_along_axis(
    values, jnp.clip(place, 0, values.shape[1] - 1), axis=1
  )
  is_new = (place >= 0) & (place < length[:, None])
  return jnp.where(is_new, spread, buffer)


def _log_probs(
  logits: Float[Array, 'batch places vocab'], tokens: Int[Array, 'batch places']
) -> Float[Array, 'batch places']:
  """Returns the log-probabilities of tokens under unmodified logits."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=2)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=2)


def _resize(
  logits: Float[Array, 'batch old'], vocab_size: int
) -> Float[Array, 'batch vocab']:
  """Returns logits of size `vocab_size`; added ids get -inf."""
  missing = max(vocab_size - logits.shape[1], 0)
  return jnp.pad(
    logits[:, :vocab_size], ((0, 0), (0, missing)), constant_values=-jnp.inf
  )
