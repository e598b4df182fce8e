# SPDX-License-Identifier: Apache-2.0
"""Laws of timing: turns are taken, and the parts are the whole."""

import helpers
import jax
import numpy as np
import pytest

from l2s_jax.inference import generate, sampling, strategies
from l2s_jax.models import l2s
from l2s_jax.performance import timing

NUM_TOKENS = 5


def our_run(module, **decoding):
  generator = generate.Generator(
    module,
    max_decode_len=NUM_TOKENS,
    ids=strategies.Ids(start=0, eos=-1, pad=0),
    decoding=sampling.Decoding(**decoding),
  )
  params = helpers.random_params(module)
  batch = {
    key: np.asarray(value)
    for key, value in helpers.batch_for(module).items()
    if key.startswith('encoder')
  }
  return timing.OurRun(generator, generator.prepare(params), batch), params


def test_all_take_turns_and_the_first_calls_do_not_count():
  calls = []

  def contender(name):
    def run(num_tokens):
      calls.append((name, num_tokens))
      return np.zeros((2, num_tokens), np.int32)

    return run

  found = timing.measure(
    {name: contender(name) for name in 'ab'}, num_tokens=3, rounds=2
  )
  first = [('a', 1), ('a', 3), ('b', 1), ('b', 3)]
  turns = [('a', 1), ('a', 1), ('a', 3), ('b', 1), ('b', 1), ('b', 3)]
  assert calls == first + 2 * turns
  for times in found.values():
    assert len(times.one) == len(times.all) == 2
    assert times.tokens.shape == (2, 3)


def test_prefill_and_tokens_are_all_of_the_time():
  times = timing.Times(9.0, [0.5, 0.2], [0.9, 1.0], np.zeros((1, 5), np.int32))
  rounds = times.rounds()
  for prefill, step, total in zip(
    rounds['prefill_ms'],
    rounds['ms_per_token'],
    rounds['total_ms'],
    strict=True,
  ):
    assert prefill + 5 * step == pytest.approx(total)
  assert rounds['first_token_ms'] == [500, 200]
  assert rounds['ms_per_token'] == pytest.approx([100, 200])


def test_of_answers_that_end_the_time_is_that_of_their_tokens():
  tokens = np.array([[5, 1, 0, 0], [5, 6, 1, 0], [5, 6, 7, 8], [1, 1, 1, 1]])
  times = timing.Times(9.0, [0.5], [1.0], tokens)
  assert times.lengths(1).tolist() == [2, 3, 4, 1]
  assert times.lengths(-1).tolist() == [4, 4, 4, 4]
  rounds = times.rounds_to_eos(1)
  assert rounds['ms_per_token'] == pytest.approx([1000 / 2.5])
  assert rounds['total_ms'] == [1000]


def test_fewer_tokens_are_the_first_of_all():
  run, params = our_run(helpers.MODULES['t5_1_0'])
  tokens = run(NUM_TOKENS)
  assert tokens.shape == (len(helpers.PROMPT_LENGTHS), NUM_TOKENS)
  np.testing.assert_array_equal(run(1), tokens[:, :1])
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  assert num_bytes < run.memory_bytes() < 10 * num_bytes
  assert run.acceptance() is None


def test_drafts_are_counted():
  module = l2s.with_verifier(helpers.llm_to_slm('t5_1_1', 'add', 'shared'))
  run, _ = our_run(module, draft_len=2)
  assert run(NUM_TOKENS).shape[1] == NUM_TOKENS
  assert 0 <= run.acceptance() <= 1
