# SPDX-License-Identifier: Apache-2.0
"""Laws of the cache: tokens may come one by one or together, and be unread."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.models import cache as cache_lib
from l2s_jax.models import l2s

LENGTH = 9
NAMES = (
  't5_1_0',
  'umt5',
  't5gemma',
  'gpt2',
  'llama',
  'qwen2',
  'gemma3',
  'llm_to_gpt2-add-foreign',
)


@pytest.fixture(scope='module', params=NAMES)
def model(request):
  """Returns module, parameters, ragged prompts with an answer, its logits."""
  module = helpers.MODULES[request.param]
  params = helpers.random_params(module)
  batch = helpers.batch_for(module, answer_lengths=(LENGTH,) * 4)
  return module, params, batch, helpers.logits(module, params, batch)


def by_row(cache):
  """Returns the cache with a slot for each row."""
  rows = cache.valid.shape[0]
  return cache.replace(slot=jnp.broadcast_to(cache.slot, (rows,)))


@pytest.mark.parametrize('is_by_row', [False, True])
def test_tokens_read_together_are_tokens_read_one_by_one(model, is_by_row):
  module, params, batch, logits = model
  tokens = batch['decoder_input_tokens']
  cache = helpers.prefill(module, params, batch, LENGTH)
  cache = by_row(cache) if is_by_row else cache
  for begin, end in ((0, 2), (2, 3), (3, 7), (7, 9)):
    found, cache = helpers.extend(module, params, tokens[:, begin:end], cache)
    helpers.assert_close(found, logits[:, begin:end])


def test_rows_forget_what_they_should_and_go_on_where_they_were(model):
  """Each row keeps as many of four tokens as it likes, at every call."""
  module, params, batch, logits = model
  tokens = np.asarray(batch['decoder_input_tokens'])
  rows = np.arange(4)
  rng = np.random.default_rng(0)
  cache = by_row(helpers.prefill(module, params, batch, LENGTH + 3))
  first_slot = cache.slot
  num_read = np.zeros(4, int)
  while (num_read < LENGTH).any():
    places = num_read[:, None] + np.arange(4)
    right = places < LENGTH
    # Where the answer is over, anything is read, and forgotten.
    new = np.where(right, tokens[rows[:, None], places % LENGTH], 5)
    kept = np.minimum(rng.integers(0, 5, 4), right.sum(1))
    is_kept = np.arange(4) < kept[:, None]
    new = np.where(is_kept, new, (new + 1) % 200)
    found, cache = helpers.extend(module, params, jnp.asarray(new), cache)
    expected = np.asarray(logits)[rows[:, None], places % LENGTH]
    helpers.assert_close(found[is_kept], expected[is_kept])
    num_read += kept
    cache = cache_lib.rewind(cache, first_slot + num_read)


def test_a_lone_row_may_have_a_slot_of_its_own(model):
  module, params, batch, logits = model
  batch = jax.tree.map(lambda x: x[1:2], batch)
  cache = by_row(helpers.prefill(module, params, batch, LENGTH))
  for t in range(LENGTH):
    found, cache = helpers.extend(
      module, params, batch['decoder_input_tokens'][:, t : t + 1], cache
    )
    helpers.assert_close(found[:, 0], logits[1:2, t])


def test_what_is_read_beyond_the_table_of_positions_poisons_nothing():
  """Drafts run ahead of the answer's end, where GPT-2 has no positions."""
  module = l2s.build(helpers.GPT2)
  params = helpers.random_params(module)
  length = helpers.GPT2.max_positions - helpers.PROMPT_LENGTH
  batch = helpers.batch_for(module, answer_lengths=(length,) * 4)
  tokens = batch['decoder_input_tokens']
  expected = helpers.logits(module, params, batch)[:, -1]
  cache = by_row(helpers.prefill(module, params, batch, length + 3))
  _, cache = helpers.extend(module, params, tokens[:, :-1], cache)
  slot = cache.slot
  _, cache = helpers.extend(module, params, tokens[:, :4], cache)
  found, _ = helpers.extend(
    module, params, tokens[:, -1:], cache_lib.rewind(cache, slot)
  )
  helpers.assert_close(found[:, 0], expected)
