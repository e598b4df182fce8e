# SPDX-License-Identifier: Apache-2.0
"""Laws of generation: what is written, by whom, and compiled how often."""

import dataclasses
import functools
import logging

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax import data, decode, losses, sampling, vocabularies
from l2s_jax.models import l2s

MAX_DECODE_LEN = 6
START_ID, PAD_ID = 3, 7
PROMPT_KEYS = ('encoder_input_tokens', 'encoder_segment_ids')


def make_generator(module, *, eos_id, **options):
  writer, name = helpers.writer_of(module)
  return decode.Generator(
    module,
    writer,
    name,
    max_decode_len=MAX_DECODE_LEN,
    start_id=START_ID,
    eos_id=eos_id,
    pad_id=PAD_ID,
    **options,
  )


def cacheless_argmax(module, params, batch):
  """Returns the most likely tokens, the whole answer read again for each."""
  rows = batch['encoder_segment_ids'].shape[0]
  tokens = np.full((rows, MAX_DECODE_LEN + 1), START_ID, np.int32)
  for t in range(MAX_DECODE_LEN):
    logits = helpers.logits(
      module,
      params,
      {
        **batch,
        'decoder_input_tokens': jnp.asarray(tokens[:, :MAX_DECODE_LEN]),
        'decoder_segment_ids': jnp.ones((rows, MAX_DECODE_LEN), jnp.int32),
      },
    )
    tokens[:, t + 1] = np.argmax(logits[:, t], axis=-1)
  return tokens[:, 1:]


def cut(tokens, eos_id):
  """Returns the tokens up to and with each row's first EOS, then padding."""
  ended = np.cumsum(tokens == eos_id, axis=1) - (tokens == eos_id) > 0
  return np.where(ended, PAD_ID, tokens)


# The loop sees a writer and its cache: what filled that is for test_models.py.
NAMES = (
  't5_1_0',
  't5_1_1',
  'gpt2',
  'llm_to_t5_1_0-replace-shared',
  'llm_to_t5_1_1-add-foreign',
  'llm_to_gpt2-add-foreign',
  'llm_to_gpt2-replace-foreign',
)


@pytest.fixture(scope='module', params=NAMES)
def written(request):
  """Returns module, parameters, batch, and its argmax without a cache."""
  module = helpers.MODULES[request.param]
  batch = helpers.batch_for(module)
  candidates = []
  for seed in range(8):
    params = helpers.random_params(module, seed)
    candidates.append((params, cacheless_argmax(module, params, batch)))
  # Random models repeat themselves, above all where input and output
  # embeddings are one: the one that does so least says most.
  params, tokens = max(candidates, key=lambda pair: len(np.unique(pair[1])))
  return module, params, batch, tokens


def test_greedy_equals_cacheless_argmax_up_to_eos(written):
  module, params, batch, tokens = written
  assert len(np.unique(tokens)) > 1
  eos_id = int(tokens[0, 2])
  prompts = {key: batch[key] for key in PROMPT_KEYS}
  found = make_generator(module, eos_id=eos_id)(params, prompts)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, cut(tokens, eos_id))


@pytest.fixture(scope='module')
def gpt2():
  """Returns a small model with another LLM's encoder, and its parts."""
  module = helpers.MODULES['llm_to_gpt2-add-foreign']
  return module, helpers.random_params(module), helpers.batch_for(module)


def test_the_loop_ends_when_all_rows_have(gpt2):
  """An EOS that every row writes at once stops it after one step."""
  module, params, batch = gpt2
  steps = []

  def always_eos(logits, key):
    jax.debug.callback(lambda _: steps.append(1), logits[0])
    return jnp.int32(1)

  found = make_generator(module, eos_id=1, sampler=always_eos)(params, batch)
  np.testing.assert_array_equal(
    found, [[1] + [PAD_ID] * (MAX_DECODE_LEN - 1)] * helpers.BATCH_SIZE
  )
  jax.effects_barrier()
  assert len(steps) == helpers.BATCH_SIZE


def test_rows_without_a_prompt_write_nothing(gpt2):
  module, params, batch = gpt2
  generator = make_generator(module, eos_id=-1)
  expected = generator(params, batch)
  segment_ids = batch['encoder_segment_ids'].at[1].set(0)
  found = generator(params, {**batch, 'encoder_segment_ids': segment_ids})
  assert (found[1] == PAD_ID).all()
  np.testing.assert_array_equal(found[::2], expected[::2])


def test_a_row_samples_the_same_whatever_its_neighbours(gpt2):
  module, params, batch = gpt2
  sampler = functools.partial(sampling.temperature, value=2.0)
  generator = make_generator(module, eos_id=-1, sampler=sampler)
  row_ids = jnp.array([10, 11, 12, 13])
  expected = generator(params, batch, row_ids)
  backwards = {key: batch[key][::-1] for key in PROMPT_KEYS}
  found = generator(params, backwards, row_ids[::-1])
  np.testing.assert_array_equal(found[::-1], expected)
  # One prompt, two row ids: two samples.
  same = {key: batch[key][jnp.zeros(4, int)] for key in PROMPT_KEYS}
  found = generator(params, same, row_ids)
  assert (found[0] != found[1]).any()
  assert (generator(params, batch, row_ids + 1) != expected).any()


def test_samplers_by_hand():
  key = jax.random.key(0)
  assert sampling.greedy(jnp.array([1.0, 3.0, 3.0, -np.inf]), key) == 1
  logits = jnp.log(jnp.array([0.5, 0.5 - 1e-9, 1e-9]))
  keys = jax.random.split(key, 2000)
  draw = jax.vmap(functools.partial(sampling.temperature, logits, value=1.0))
  counts = np.bincount(draw(keys), minlength=3)
  assert counts[2] == 0
  # Six standard deviations of a fair coin.
  assert abs(counts[0] - 1000) < 6 * (2000 * 0.25) ** 0.5


def test_the_llm_is_not_in_the_loop(gpt2):
  module, params, batch = gpt2
  generator = make_generator(module, eos_id=-1)
  writer_params = generator.writer_params(params)
  assert writer_params is params['slm']
  cache = generator.prefill(params, batch)
  keys = jax.random.split(jax.random.key(0), helpers.BATCH_SIZE)
  arguments = (writer_params, cache, jnp.ones(4, bool), keys)
  program = jax.make_jaxpr(generator.decode)(*arguments)
  # Its inputs are the SLM and the cache, and nothing is closed over.
  assert len(program.in_avals) == len(jax.tree.leaves(arguments))
  assert all(np.size(const) <= 1 for const in program.consts)
  llm_shapes = {
    leaf.shape for leaf in jax.tree.leaves(params['llm']) if leaf.ndim > 1
  }
  assert llm_shapes.isdisjoint(aval.shape for aval in program.in_avals)
  # With its parameters and the prompt gone, the answer is the same.
  expected = generator(params, batch)
  del params, batch
  found = generator.decode(writer_params, cache, jnp.ones(4, bool), keys)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('name', ['t5_1_0', 'llm_to_gpt2-add-foreign'])
def test_a_second_call_compiles_nothing(name, caplog):
  module = helpers.MODULES[name]
  params = helpers.random_params(module)
  generator = make_generator(module, eos_id=0)
  batches = [helpers.batch_for(module, seed=seed) for seed in (0, 1)]

  def compiled(batch):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      generator(params, batch)
    return [r.getMessage() for r in caplog.records if 'ompil' in r.getMessage()]

  assert compiled(batches[0])
  assert compiled(batches[1]) == []


# --- id 0 is `!`, not padding ---


@pytest.fixture(params=['bytes', 'gpt2'])
def gpt2_vocabulary(request):
  """Returns GPT-2's own vocabulary, and its first 256 ids, always at hand."""
  if request.param == 'bytes':
    return helpers.vocabulary()
  folder = request.getfixturevalue('shared_data') / 'tokenizers' / 'gpt2'
  return vocabularies.load(str(folder))


def recite(config, ids, prompt_length):
  """Returns parameters with which a model writes `ids` after any prompt.

  Attention and MLP add nothing, and nor do tokens: the state is the position,
  one-hot, and the head has the id that follows it.
  """
  width, rows = config.emb_dim, config.max_positions
  assert rows <= width
  shapes = jax.eval_shape(lambda: helpers.random_params(l2s.build(config)))
  params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
  params['position_embedder']['embedding'][:] = np.eye(rows, width)
  params['decoder']['final_norm']['scale'][:] = 1
  for step, token in enumerate(ids):
    params['logits_dense']['kernel'][prompt_length + step, token] = 1
  return params


def test_an_answer_with_id_0_is_weighted_generated_and_decoded(
  gpt2_vocabulary,
):
  vocabulary = gpt2_vocabulary
  text = '! Oh! No!! !'
  answer = [*vocabulary.encode(text), vocabulary.eos_id]
  assert 0 in answer and vocabulary.decode([0]) == '!'
  assert vocabulary.pad_id == 0  # GPT-2 has no other
  prompt = vocabulary.encode('!a')
  length = len(answer) + 2
  host_batch = data.pad_and_shift(
    [prompt],
    [answer],
    task_feature_lengths={'inputs': len(prompt), 'targets': length},
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
  )
  batch = {key: jnp.asarray(value) for key, value in host_batch.items()}

  config = dataclasses.replace(
    helpers.GPT2,
    vocab_size=vocabulary.vocab_size,
    emb_dim=32,
    max_positions=32,
    logits_via_embedding=False,
  )
  module = l2s.build(config)
  params = recite(config, answer, len(prompt))

  _, sums = losses.token_cross_entropy(
    helpers.logits(module, params, batch),
    batch['decoder_target_tokens'],
    batch['decoder_loss_weights'],
  )
  assert sums['loss_weight'] == len(answer) == sums['num_correct']

  generator = decode.Generator(
    module,
    module,
    None,
    max_decode_len=length,
    start_id=vocabulary.start_id,
    eos_id=vocabulary.eos_id,
    pad_id=vocabulary.pad_id,
  )
  found = np.asarray(generator(params, batch))[0].tolist()
  assert found == answer + [0, 0]
  assert vocabulary.decode(found) == text
