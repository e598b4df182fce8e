# SPDX-License-Identifier: Apache-2.0
"""Laws of the LLM's stored states: they stand for the LLM, to a precision."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.models import stored_states
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters
from l2s_jax.systems import system as system_lib

CASES = (
  'llm_to_t5_1_1-add-shared',
  'llm_to_gpt2-add-foreign',
  'llm_to_gpt2-replace-foreign',
)


def read(module, params, batch):
  """Returns what the LLM makes of the prompts."""
  return module.apply({'params': params}, batch, method='read_prompt')[0]


def cached(system, dtype='bfloat16'):
  return dataclasses.replace(
    system, cached_states=system_lib.CachedStates('there', dtype, 'f' * 64)
  )


def test_what_is_restored_is_as_close_as_is_said():
  """And int8 keeps a token of zeros, and the largest number of each."""
  states = np.random.default_rng(0).standard_normal((2, 3, 50), np.float32)
  states[1, 2] = 0
  states[0] *= 1000
  found = {
    dtype: np.asarray(
      stored_states.restore(stored_states.store(jnp.array(states), dtype)),
      np.float32,
    )
    for dtype in stored_states.DTYPES
  }
  apart = np.abs(found['bfloat16'] - states)
  assert (apart <= np.abs(states) / 256).all() and apart.any()
  largest = np.abs(states).max(axis=-1, keepdims=True)
  apart = np.abs(found['int8'] - states)
  assert (apart <= largest / 254 * 1.0001).all() and apart.any()
  np.testing.assert_allclose(
    np.abs(found['int8']).max(-1, keepdims=True), largest, rtol=1e-6
  )


@pytest.mark.parametrize('name', CASES)
def test_states_stand_for_the_llm(name):
  """With the same logits, and without its parameters."""
  module = helpers.MODULES[name]
  params, batch = helpers.random_params(module), helpers.batch_for(module)
  logits = helpers.logits(module, params, batch)
  states = read(module, params, batch)
  llm = params['llm'] if 'add-foreign' in name else {}
  without = params | {'llm': {k: x for k, x in llm.items() if 'token' in k}}
  found = helpers.logits(module, without, {**batch, 'llm_states': states})
  helpers.assert_close(found, logits)
  for dtype in stored_states.DTYPES:
    rough = helpers.logits(
      module, without, {**batch, **stored_states.store(states, dtype)}
    )
    apart = np.abs(rough - logits)
    assert 0 < apart.max() < 0.1 * np.abs(logits).max()


def test_a_system_begins_as_with_the_llm():
  """With the embeddings that it needs of the LLM, or with nothing of it."""
  system = helpers.system(helpers.MODULES['llm_to_gpt2-add-foreign'])
  whole, found = (
    partitioning.unbox(
      jax.jit(functools.partial(parameters.init, each))(jax.random.key(3))
    )['params']
    for each in (system, cached(system, 'int8'))
  )
  assert set(found.pop('llm')) == {'token_embedder'}
  del whole['llm']
  helpers.assert_trees_equal(found, whole)
  shared = helpers.system(helpers.MODULES['llm_to_t5_1_1-add-shared'])
  shapes, _ = partitioning.abstract_params(
    functools.partial(parameters.init, cached(shared))
  )
  assert set(shapes) == {'projector', 'slm'}
