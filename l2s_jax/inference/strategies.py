# SPDX-License-Identifier: Apache-2.0
"""Decoding strategies: the interface, greedy decoding and sampling.

`OneByOne` decodes one token per row and step. `beam.py` has beam search,
`speculative.py` speculative decoding; `generate.py` runs a strategy.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from l2s_jax.inference import sampling
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import language_model
from l2s_jax.runtime import partitioning

PyTree = Any


class Answers(struct.PyTreeNode):
  """Decoded answers to a batch of prompts, the best first.

  Attributes:
    tokens: token ids, padded after each answer's end.
    num_tokens: tokens decoded for each row, padding after its end included.
    scores: the sum of each answer's token log-probabilities, divided by the
      length penalty in beam search; None if not requested.
    log_probs: of each token under the model, 0 after the end; None if not
      requested.
  """

  tokens: Int[Array, 'batch answers steps']
  num_tokens: Int[Array, 'batch']
  scores: Float[Array, 'batch answers'] | None = None
  log_probs: Float[Array, 'batch answers steps'] | None = None


class Ids(struct.PyTreeNode):
  """Special token ids of the answer's vocabulary.

  Attributes:
    start: the first decoder input token.
    eos: token id that ends a row, or a tuple of several; -1 means none.
    pad: fills a row after its end.
  """

  start: int = struct.field(pytree_node=False)
  eos: int | tuple[int, ...] = struct.field(pytree_node=False)
  pad: int = struct.field(pytree_node=False)

  def end(self, tokens: Int[Array, '*shape']) -> Bool[Array, '*shape']:
    """Returns true for tokens that end a row."""
    return sampling.is_eos(tokens, self.eos)


class Prompts(struct.PyTreeNode):
  """Per-row inputs of decoding, beside the KV cache.

  Attributes:
    has_prompt: false for padded rows, which are done from the start.
    row_keys: one PRNG key per row, so that samples do not depend on other rows.
    max_decode_lens: maximum number of tokens of each row, EOS included.
    first_tokens: the first decoder input of each row: the start token, or the
      last token of a prompt that the answer continues.
  """

  has_prompt: Bool[Array, 'batch']
  row_keys: Key[Array, 'batch']
  max_decode_lens: Int[Array, 'batch']
  first_tokens: Int[Array, 'batch']

  @property
  def have_ended(self) -> Bool[Array, 'batch']:
    """Rows that are done before the first step."""
    return ~self.has_prompt | (self.max_decode_lens < 1)


@runtime_checkable  # For beartype, in tests.
class Strategy(Protocol):
  """A decoding strategy, such as sampling, beam search or speculative decoding.

  A state has `step` (largest number of tokens decoded for a row), `done` (bool,
  one per row) and `cache` (a `Cache`, or a dict of several). `num_ahead` is the
  largest number of tokens that one step adds to a row.
  """

  num_ahead: int

  def begin(self, cache: Any, prompts: Prompts, max_decode_len: int) -> Any:
    """Returns the initial state, given a prefilled cache."""

  def step(self, params: PyTree, state: Any) -> Any:
    """Returns the state after one decode step of every row."""

  def answers(self, state: Any) -> Answers:
    """Returns the answers decoded so far."""


class DecodeState(struct.PyTreeNode):
  """State of greedy decoding and sampling between two steps.

  Attributes:
    step: number of tokens decoded so far.
    token: the last token of each row, the next decoder input.
    tokens: decoded tokens, padded after a row's end.
    log_probs: of each token under the model, before penalties and
      temperature; None if not requested.
    done: rows with EOS, at their token limit, or without a prompt.
    prompts: keys and limits of the rows.
    cache: KV cache of the decoding model.
  """

  step: Int[Array, '']
  token: Int[Array, 'batch']
  tokens: Int[Array, 'batch steps']
  log_probs: Float[Array, 'batch steps'] | None
  done: Bool[Array, 'batch']
  prompts: Prompts
  cache: cache_lib.Cache


def decode_step(
  params: PyTree,
  state: DecodeState,
  *,
  model: language_model.LanguageModel,
  decoding: sampling.Decoding,
  ids: Ids,
) -> DecodeState:
  """Decodes one token of every row."""
  logits, cache = model.apply(
    {'params': params}, state.token[:, None], state.cache, method='extend'
  )
  logits = logits[:, 0]
  keys = jax.vmap(jax.random.fold_in, (0, None))(
    state.prompts.row_keys, state.step
  )
  choose = functools.partial(
    sampling.choose, step=state.step, decoding=decoding, eos_id=ids.eos
  )
  token = jax.vmap(choose)(logits, state.tokens, keys)
  token = jnp.where(state.done, ids.pad, token)
  log_probs = state.log_probs
  if log_probs is not None:
    log_prob = jnp.where(state.done, 0, _log_prob(logits, token))
    log_probs = write_column(log_probs, log_prob, state.step)
  step = state.step + 1
  return state.replace(
    step=step,
    token=token,
    tokens=write_column(state.tokens, token, state.step),
    log_probs=log_probs,
    done=state.done | ids.end(token) | (step >= state.prompts.max_decode_lens),
    cache=cache,
  )


def write_column(
  buffer: Shaped[Array, '*rows steps'],
  column: Shaped[Array, '*rows'],
  step: Int[Array, ''],
) -> Shaped[Array, '*rows steps']:
  """Writes a value for each row into a buffer, at one step."""
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, column[..., None], step, axis=buffer.ndim - 1
  )


def _log_prob(
  logits: Float[Array, 'batch vocab'], token: Int[Array, 'batch']
) -> Float[Array, 'batch']:
  """Returns the log-probability of one token per row."""
  chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=1)


def one_answer(
  tokens: Int[Array, 'batch steps'],
  num_tokens: Int[Array, 'batch'],
  log_probs: Float[Array, 'batch steps'] | None,
) -> Answers:
  """Returns `Answers` with one answer per prompt."""
  answers = Answers(tokens[:, None], num_tokens)
  if log_probs is None:
    return answers
  return answers.replace(
    scores=log_probs.sum(1)[:, None], log_probs=log_probs[:, None]
  )


def full_of_rows(value: float | int, shape: Sequence[int]) -> Array:
  """Returns a constant array with rows sharded like a batch.

  Without the constraint XLA replicates constants on every device, and the
  decode loop compiles again for the sharding of its outputs.
  """
  axes = ('batch', *[None] * (len(shape) - 1))
  dtype = jnp.int32 if isinstance(value, int) else jnp.float32
  return partitioning.constrain(jnp.full(shape, value, dtype), axes)


class OneByOne:
  """Greedy decoding and sampling: one token per row, one answer per prompt."""

  num_ahead = 1

  def __init__(
    self,
    model: language_model.LanguageModel,
    decoding: sampling.Decoding,
    ids: Ids,
  ):
    self._ids = ids
    self._decoding = decoding
    self._step = functools.partial(
      decode_step, model=model, decoding=decoding, ids=ids
    )

  def begin(
    self, cache: cache_lib.Cache, prompts: Prompts, max_decode_len: int
  ) -> DecodeState:
    shape = (prompts.max_decode_lens.shape[0], max_decode_len)
    return DecodeState(
      step=jnp.zeros((), jnp.int32),
      token=prompts.first_tokens,
      tokens=full_of_rows(self._ids.pad, shape),
      log_probs=full_of_rows(0.0, shape) if self._decoding.log_probs else None,
      done=prompts.have_ended,
      prompts=prompts,
      cache=cache,
    )

  def step(self, params: PyTree, state: DecodeState) -> DecodeState:
    return self._step(params, state)

  def answers(self, state: DecodeState) -> Answers:
    num_tokens = jnp.full_like(state.token, state.step)
    return one_answer(state.tokens, num_tokens, state.log_probs)
