# SPDX-License-Identifier: Apache-2.0
"""Generation: prefill once, then one decode step a token.

Two compiled functions. Prefill reads the prompts with whatever the system has
(LLM, projector, SLM encoder or prefix) and returns a cache; the loop sees the
writing model and that cache alone, never the LLM.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, Key

from l2s_jax import sampling
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import language_model

PyTree = Any
Sampler = Callable[..., Int[Array, '']]


class DecodeState(struct.PyTreeNode):
  """Generation between two tokens.

  Attributes:
    step: tokens written so far.
    token: the last token of each row, the next to be read.
    tokens: what has been written; padding after a row's EOS.
    done: rows that have written EOS, or never had a prompt.
    row_keys: one PRNG key a row, so that neighbours change nothing.
    cache: the writing model's memory.
  """

  step: Int[Array, '']
  token: Int[Array, 'batch']
  tokens: Int[Array, 'batch steps']
  done: Bool[Array, 'batch']
  row_keys: Key[Array, 'batch']
  cache: cache_lib.Cache


def decode_step(
  state: DecodeState,
  params: PyTree,
  *,
  model: language_model.LanguageModel,
  sampler: Sampler,
  eos_id: int,
  pad_id: int,
) -> DecodeState:
  """Writes one token to every row."""
  logits, cache = model.apply(
    {'params': params}, state.token, state.cache, method='decode_step'
  )
  keys = jax.vmap(jax.random.fold_in, (0, None))(state.row_keys, state.step)
  token = jnp.where(state.done, pad_id, jax.vmap(sampler)(logits, keys))
  return state.replace(
    step=state.step + 1,
    token=token,
    tokens=jax.lax.dynamic_update_slice(
      state.tokens, token[:, None], (0, state.step)
    ),
    done=state.done | (token == eos_id),
    cache=cache,
  )


def decode_loop(
  params: PyTree,
  cache: cache_lib.Cache,
  has_prompt: Bool[Array, 'batch'],
  row_keys: Key[Array, 'batch'],
  *,
  model: language_model.LanguageModel,
  sampler: Sampler,
  max_decode_len: int,
  start_id: int,
  eos_id: int,
  pad_id: int,
) -> Int[Array, 'batch steps']:
  """Writes until every row has ended or `max_decode_len` tokens are out.

  Args:
    params: of the writing model.
    cache: from prefill.
    has_prompt: rows without one count as ended from the start.
    row_keys: one a row.
    model: the writing model.
    sampler: from logits and key of one row to a token.
    max_decode_len: tokens a row at most, EOS included.
    start_id: the first token read.
    eos_id: ends a row.
    pad_id: fills a row after its end.
  """
  batch_size = has_prompt.shape[0]
  state = DecodeState(
    step=jnp.zeros((), jnp.int32),
    token=jnp.full((batch_size,), start_id, jnp.int32),
    tokens=jnp.full((batch_size, max_decode_len), pad_id, jnp.int32),
    done=~has_prompt,
    row_keys=row_keys,
    cache=cache,
  )
  step = functools.partial(
    decode_step,
    params=params,
    model=model,
    sampler=sampler,
    eos_id=eos_id,
    pad_id=pad_id,
  )
  return jax.lax.while_loop(
    lambda s: (s.step < max_decode_len) & ~jnp.all(s.done), step, state
  ).tokens


class Generator:
  """Compiled generation for one system and one decoding length.

  Prefill compiles once for each prompt shape, the loop once for each cache
  shape; a second call with the same shapes compiles nothing.
  """

  def __init__(
    self,
    module: Any,
    writer: language_model.LanguageModel,
    writer_name: str | None,
    *,
    max_decode_len: int,
    start_id: int,
    eos_id: int,
    pad_id: int,
    sampler: Sampler = sampling.greedy,
    seed: int = 0,
  ):
    """Prepares generation; nothing compiles yet.

    Args:
      module: the system's module; has `prefill`.
      writer: the module that writes: the SLM, or `module` itself.
      writer_name: where its parameters are in the system's; None for all.
      max_decode_len: tokens a row at most, EOS included.
      start_id: first input of the answer.
      eos_id: ends a row.
      pad_id: fills a row after its end.
      sampler: from logits and key of one row to a token.
      seed: of the row keys.
    """
    self.writer_name = writer_name
    self.seed = seed
    self.prefill = jax.jit(
      lambda params, batch: module.apply(
        {'params': params},
        batch,
        max_decode_len=max_decode_len,
        method='prefill',
      )
    )
    self.decode = jax.jit(
      functools.partial(
        decode_loop,
        model=writer,
        sampler=sampler,
        max_decode_len=max_decode_len,
        start_id=start_id,
        eos_id=eos_id,
        pad_id=pad_id,
      )
    )

  def writer_params(self, params: PyTree) -> PyTree:
    return params if self.writer_name is None else params[self.writer_name]

  def __call__(
    self,
    params: PyTree,
    batch: language_model.Batch,
    row_ids: Int[Array, 'batch'] | None = None,
  ) -> Int[Array, 'batch steps']:
    """Writes the answers to a batch of prompts.

    Args:
      params: all of the system's parameters.
      batch: the encoder keys.
      row_ids: each row's index in the input, from which its samples are
        drawn; by default its place in the batch.
    """
    segment_ids = batch['encoder_segment_ids']
    if row_ids is None:
      row_ids = jnp.arange(segment_ids.shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(self.seed), row_ids
    )
    cache = self.prefill(params, batch)
    return self.decode(
      self.writer_params(params), cache, (segment_ids > 0).any(1), keys
    )
