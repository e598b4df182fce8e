# SPDX-License-Identifier: Apache-2.0
"""What writes an answer is a strategy; here is the plain one.

It writes one token to every row at a step, greedily or by sampling. `beam.py`
and `speculative.py` have others; `generate.py` runs them.
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
  """What was written to each prompt, the best answer first.

  Attributes:
    tokens: padding after an answer's end.
    num_tokens: how far each row has been written, its padding behind an end
      included.
    scores: of each answer: the sum of its tokens' log-probabilities, in beam
      search divided by the length penalty; None where nobody asked.
    log_probs: of each token under the model, 0 after the end; None where
      nobody asked.
  """

  tokens: Int[Array, 'batch answers steps']
  num_tokens: Int[Array, 'batch']
  scores: Float[Array, 'batch answers'] | None = None
  log_probs: Float[Array, 'batch answers steps'] | None = None


class Ids(struct.PyTreeNode):
  """The token ids that generation has to know.

  Attributes:
    start: the first token read.
    eos: ends a row, or a tuple of all that do; -1: nothing does.
    pad: fills a row after its end.
  """

  start: int = struct.field(pytree_node=False)
  eos: int | tuple[int, ...] = struct.field(pytree_node=False)
  pad: int = struct.field(pytree_node=False)

  def end(self, tokens: Int[Array, '*shape']) -> Bool[Array, '*shape']:
    """Returns which tokens end a row."""
    return sampling.is_eos(tokens, self.eos)


class Prompts(struct.PyTreeNode):
  """What generation needs of a batch beside the cache.

  Attributes:
    has_prompt: rows without one have ended from the start.
    row_keys: one PRNG key a row, so that neighbours change nothing.
    max_decode_lens: tokens that each may write, EOS included.
    first_tokens: what each row reads before it writes: the start token, or,
      where a prompt is continued, its last token.
  """

  has_prompt: Bool[Array, 'batch']
  row_keys: Key[Array, 'batch']
  max_decode_lens: Int[Array, 'batch']
  first_tokens: Int[Array, 'batch']

  @property
  def have_ended(self) -> Bool[Array, 'batch']:
    """Rows to which nothing is written."""
    return ~self.has_prompt | (self.max_decode_lens < 1)


@runtime_checkable  # which beartype, in tests, has to ask
class Strategy(Protocol):
  """A way of writing: one token a row, beams, or drafts that are verified.

  States have `step` (tokens written by the row that is ahead), `done`, a bool
  for each row, and `cache`, one or a dict of several. `num_ahead` is how far
  one step may go.
  """

  num_ahead: int

  def begin(self, cache: Any, prompts: Prompts, max_decode_len: int) -> Any:
    """Returns the state before the first token."""

  def step(self, params: PyTree, state: Any) -> Any:
    """Returns the state after one more step of every row."""

  def answers(self, state: Any) -> Answers:
    """Returns what has been written."""


class DecodeState(struct.PyTreeNode):
  """Generation between two tokens.

  Attributes:
    step: tokens written so far.
    token: the last token of each row, the next to be read.
    tokens: what has been written; padding after a row's end.
    log_probs: of each token under the model, before penalties and
      temperature; None where nobody asked.
    done: rows that have written EOS or all they may, or never had a prompt.
    prompts: keys and limits of the rows.
    cache: the writing model's memory.
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
  """Writes one token to every row."""
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
  """Returns the buffer with a value for each row at one step."""
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, column[..., None], step, axis=buffer.ndim - 1
  )


def _log_prob(
  logits: Float[Array, 'batch vocab'], token: Int[Array, 'batch']
) -> Float[Array, 'batch']:
  chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=1)


def one_answer(
  tokens: Int[Array, 'batch steps'],
  num_tokens: Int[Array, 'batch'],
  log_probs: Float[Array, 'batch steps'] | None,
) -> Answers:
  """Returns what was written where each prompt has one answer."""
  answers = Answers(tokens[:, None], num_tokens)
  if log_probs is None:
    return answers
  return answers.replace(
    scores=log_probs.sum(1)[:, None], log_probs=log_probs[:, None]
  )


def full_of_rows(value: float | int, shape: Sequence[int]) -> Array:
  """Returns one value everywhere, rows over the mesh as a batch has them.

  What is made of constants would else be whole on every device, and the loop
  be compiled again for what it returns.
  """
  axes = ('batch', *[None] * (len(shape) - 1))
  dtype = jnp.int32 if isinstance(value, int) else jnp.float32
  return partitioning.constrain(jnp.full(shape, value, dtype), axes)


class OneByOne:
  """Greedy decoding and sampling: one token a row, one answer a prompt."""

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
