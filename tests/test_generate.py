# SPDX-License-Identifier: Apache-2.0
"""Laws of generation: what is written, by whom, and compiled how often."""

import dataclasses
import functools
import itertools
import logging

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.inference import generate as generate_lib
from l2s_jax.inference import sampling, strategies
from l2s_jax.models import l2s, losses
from l2s_jax.runtime import partitioning
from l2s_jax.vocabularies import loading

MAX_DECODE_LEN = 6
START_ID, PAD_ID = 3, 7
PROMPT_KEYS = ('encoder_input_tokens', 'encoder_segment_ids')


def make_generator(module, *, eos_id, max_decode_len=MAX_DECODE_LEN, **options):
  return generate_lib.Generator(
    module,
    max_decode_len=max_decode_len,
    ids=strategies.Ids(START_ID, eos_id, PAD_ID),
    **options,
  )


def generate(generator, params, batch, **options):
  """Returns the tokens of the best answers."""
  prepared = generator.prepare(params)
  return generator.start(prepared, batch, **options).finish().tokens[:, 0]


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


@pytest.fixture
def gpt2():
  """Returns a small model with another LLM's encoder, and its parts."""
  module = helpers.MODULES['llm_to_gpt2-add-foreign']
  return module, helpers.random_params(module), helpers.batch_for(module)


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


@pytest.fixture(scope='module', params=helpers.cases(NAMES))
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
  found = generate(make_generator(module, eos_id=eos_id), params, prompts)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, cut(tokens, eos_id))


def test_the_loop_ends_when_all_rows_have(written):
  """Rows that may write so many tokens write those, and then it is over."""
  module, params, batch, tokens = written
  generator = make_generator(module, eos_id=-1)
  most = [2, 1, 3, 0]
  generation = generator.start(
    generator.prepare(params), batch, max_decode_lens=jnp.array(most)
  )
  found = generation.finish().tokens[:, 0]
  written_by = np.arange(MAX_DECODE_LEN) < np.array(most)[:, None]
  np.testing.assert_array_equal(found, np.where(written_by, tokens, PAD_ID))
  assert generation.state.step == 3


def test_a_cache_that_grows_changes_nothing(written, monkeypatch):
  module, params, batch, tokens = written
  monkeypatch.setattr(generate_lib, 'FIRST_SLOTS', 2)  # then 4, then 6
  generator = make_generator(module, eos_id=-1)
  generation = generator.start(generator.prepare(params), batch)
  assert generation.state.cache.kv[0].key.shape[2] < MAX_DECODE_LEN + 9
  np.testing.assert_array_equal(generation.finish().tokens[:, 0], tokens)


def test_answers_can_be_taken_token_by_token_and_stopped(gpt2):
  module, params, batch = gpt2
  generator = make_generator(module, eos_id=-1)
  expected = generate(generator, params, batch)
  generation = generator.start(generator.prepare(params), batch)
  for step in range(MAX_DECODE_LEN):
    assert not generation.is_over()
    generation.advance(1)
    if step == 2:
      generation.stop(np.array([False, True, False, False]))
  assert generation.is_over()
  found = np.asarray(generation.answers().tokens[:, 0])
  np.testing.assert_array_equal(
    found[[0, 2, 3]], expected[jnp.array([0, 2, 3])]
  )
  np.testing.assert_array_equal(found[1, :3], expected[1, :3])
  assert (found[1, 3:] == PAD_ID).all()


def test_log_probs_are_those_of_teacher_forcing(written):
  module, params, batch, tokens = written
  generator = make_generator(
    module, eos_id=-1, decoding=sampling.Decoding(log_probs=True)
  )
  answers = generator.start(generator.prepare(params), batch).finish()
  rows = tokens.shape[0]
  logits = helpers.logits(
    module,
    params,
    {
      **batch,
      'decoder_input_tokens': jnp.concatenate(
        [jnp.full((rows, 1), START_ID), tokens[:, :-1]], axis=1
      ),
      'decoder_segment_ids': jnp.ones((rows, MAX_DECODE_LEN), jnp.int32),
    },
  )
  expected = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], axis=2
  )[..., 0]
  helpers.assert_close(answers.log_probs[:, 0], expected)
  helpers.assert_close(answers.scores[:, 0], expected.sum(1))


def test_rows_without_a_prompt_write_nothing(gpt2):
  module, params, batch = gpt2
  generator = make_generator(module, eos_id=-1)
  expected = generate(generator, params, batch)
  segment_ids = batch['encoder_segment_ids'].at[1].set(0)
  found = generate(
    generator, params, {**batch, 'encoder_segment_ids': segment_ids}
  )
  assert (found[1] == PAD_ID).all()
  np.testing.assert_array_equal(found[::2], expected[::2])


def test_a_row_samples_the_same_whatever_its_neighbours(gpt2):
  module, params, batch = gpt2
  generator = make_generator(
    module, eos_id=-1, decoding=sampling.Decoding(temperature=2.0)
  )
  sample = functools.partial(generator, generator.prepare(params))
  row_ids = jnp.array([10, 11, 12, 13])
  expected = sample(batch, row_ids)
  backwards = {key: batch[key][::-1] for key in PROMPT_KEYS}
  found = sample(backwards, row_ids[::-1])
  np.testing.assert_array_equal(found[::-1], expected)
  # One prompt, two row ids: two samples.
  same = {key: batch[key][jnp.zeros(4, int)] for key in PROMPT_KEYS}
  found = sample(same, row_ids)
  assert (found[0] != found[1]).any()
  assert (sample(batch, row_ids + 1) != expected).any()
  # And of another seed.
  generator = make_generator(
    module, eos_id=-1, decoding=sampling.Decoding(temperature=2.0, seed=1)
  )
  found = generator(generator.prepare(params), batch, row_ids)
  assert (found != expected).any()


def test_sampled_answers_are_as_frequent_as_they_are_probable():
  """Whole answers: with one key for all steps each token alone would be."""
  module = l2s.build(dataclasses.replace(helpers.GPT2, vocab_size=5))
  params = helpers.random_params(module)
  prompt = helpers.random_batch(5, 5, prompt_lengths=(3,), answer_lengths=(1,))
  length, num_samples, temperature = 3, 5000, 4.0
  answers = np.array(list(itertools.product(range(5), repeat=length)), np.int32)

  def repeat(times):
    return {key: jnp.repeat(prompt[key], times, 0) for key in PROMPT_KEYS}

  generator = make_generator(
    module,
    eos_id=-1,
    max_decode_len=length,
    decoding=sampling.Decoding(temperature=temperature),
  )
  found = np.asarray(generate(generator, params, repeat(num_samples)))
  logits = helpers.logits(
    module,
    params,
    {
      **repeat(len(answers)),
      'decoder_input_tokens': jnp.pad(
        answers[:, :-1], ((0, 0), (1, 0)), constant_values=START_ID
      ),
      'decoder_segment_ids': jnp.ones_like(answers),
    },
  )
  p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
  p = np.take_along_axis(p, answers[..., None], axis=2)[..., 0].prod(1)
  counts = np.bincount(
    found @ 5 ** np.arange(length)[::-1], minlength=len(answers)
  )
  expected = num_samples * p
  often = expected > 5
  # Chi-square: its mean is the number of its terms, its variance twice that.
  excess = ((counts - expected) ** 2 / expected)[often].sum() - often.sum()
  assert often.sum() > 30 and excess < 6 * (2 * often.sum()) ** 0.5


def test_the_llm_is_not_in_the_loop(gpt2):
  module, params, batch = gpt2
  generator = make_generator(module, eos_id=-1)
  prepared = generator.prepare(params)
  expected = generator(prepared, batch)
  generation = generator.start(prepared, batch)
  arguments = (generator.writer_params(prepared), generation.state, 6)
  program = jax.make_jaxpr(generator.decode)(*arguments)
  # Its inputs are the SLM and the state, and nothing is closed over.
  assert len(program.in_avals) == len(jax.tree.leaves(arguments))
  assert all(np.size(const) <= 1 for const in program.consts)
  llm_shapes = {
    leaf.shape for leaf in jax.tree.leaves(prepared['llm']) if leaf.ndim > 1
  }
  assert llm_shapes.isdisjoint(aval.shape for aval in program.in_avals)
  # With its parameters and the prompt gone, the answer is the same.
  for leaf in [*jax.tree.leaves(prepared['llm']), *batch.values()]:
    leaf.delete()
  np.testing.assert_array_equal(generation.finish().tokens[:, 0], expected)


def test_a_row_that_is_not_a_number_changes_no_other(gpt2):
  module, params, batch = gpt2
  generator = make_generator(module, eos_id=-1)
  prepared = generator.prepare(params)
  expected = generator(prepared, batch)
  scale = jnp.array([jnp.nan, 1.0, 1.0, 1.0])
  found = generator(prepared, {**batch, 'llm_scale': scale})
  np.testing.assert_array_equal(found[1:], expected[1:])


@pytest.mark.parametrize('name', ['t5_1_0', 'llm_to_gpt2-add-foreign'])
def test_a_loop_that_is_left_and_entered_again_compiles_once(name, caplog):
  """On a mesh, too: what it returns is sharded as what it takes."""
  module = helpers.MODULES[name]
  generator = make_generator(module, eos_id=-1)
  mesh_config = partitioning.MeshConfig(data=4, fsdp=1, tensor=2)
  mesh = partitioning.make_mesh(mesh_config)
  with (
    partitioning.use_mesh(mesh),
    partitioning.axis_rules(mesh_config.rules('slm')),
  ):
    batch = partitioning.put_batch(
      jax.device_get(helpers.batch_for(module)), mesh
    )
    params = jax.device_put(
      helpers.random_params(module), partitioning.replicated(mesh)
    )
    generation = generator.start(generator.prepare(params), batch)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      for _ in range(3):
        generation.advance(2)
        generation.stop(np.array([True, False, False, False]))
  assert generation.is_over()
  compiled = [r.getMessage() for r in caplog.records if 'Compiling' in r.msg]
  assert sum('_decode' in message for message in compiled) == 1
  for buffer in jax.tree.leaves(generation.state.cache.kv):
    assert buffer.sharding.spec[0] is not None  # not whole on every device


def test_parameters_can_be_taken_apart_one_by_one(gpt2):
  module, params, batch = gpt2
  generator = make_generator(module, eos_id=-1)
  expected = generator(generator.prepare(params), batch)
  params = jax.tree.map(jnp.copy, params)
  prepared = generator.prepare(params, consume=True)
  np.testing.assert_array_equal(generator(prepared, batch), expected)
  deleted = {
    jax.tree_util.keystr(path[1:2])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params['slm'])
    if leaf.is_deleted()
  }
  assert deleted == {"['layers']"}


def test_more_tokens_at_least_than_at_most_are_refused(gpt2):
  with pytest.raises(ValueError, match='min_decode_len=9 .* MAX_DECODE_LEN=6'):
    make_generator(
      gpt2[0], eos_id=1, decoding=sampling.Decoding(min_decode_len=9)
    )


def test_int8_is_asked_for_by_name_and_writes_nearly_the_same(gpt2):
  module, params, batch = gpt2
  answers = []
  for kind in ('none', 'int8'):
    decoding = sampling.Decoding(
      quantization=kind, llm_quantization=kind, log_probs=True
    )
    generator = make_generator(module, eos_id=-1, decoding=decoding)
    prepared = generator.prepare(params)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(prepared['slm'])}
    assert ('int8' in dtypes) == (kind == 'int8')
    answers.append(generator.start(prepared, batch).finish())
  exact, found = (each.log_probs[:, 0, 0] for each in answers)
  np.testing.assert_allclose(found, exact, atol=0.05)


@pytest.mark.parametrize('name', ['t5_1_0', 'llm_to_gpt2-add-foreign'])
def test_a_second_call_compiles_nothing(name, caplog):
  module = helpers.MODULES[name]
  params = helpers.random_params(module)
  generator = make_generator(module, eos_id=0)
  params = generator.prepare(params)
  batches = [helpers.batch_for(module, seed=seed) for seed in (0, 1)]

  def compiled(batch):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      generator(params, batch)
    return [r.getMessage() for r in caplog.records if 'ompil' in r.getMessage()]

  assert compiled(batches[0])
  assert compiled(batches[1]) == []


@pytest.mark.parametrize('seed', [1, 2**31, 2**32 - 1])
def test_another_seed_compiles_nothing_and_draws_as_its_setting(seed, caplog):
  module = helpers.MODULES['gpt2']
  params = helpers.random_params(module)
  batch = helpers.batch_for(module)

  def make(seed):
    return make_generator(
      module,
      eos_id=-1,
      decoding=sampling.Decoding(temperature=2.0, seed=seed),
    )

  generator = make(0)
  params = generator.prepare(params)
  first = generator(params, batch)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    found = generator.start(params, batch, seed=seed).finish().tokens[:, 0]
  assert not [r for r in caplog.records if 'ompil' in r.getMessage()]
  assert (found != first).any()
  np.testing.assert_array_equal(found, make(seed)(params, batch))
  # The key is that of the Python number, as in JAX's own examples.
  np.testing.assert_array_equal(
    jax.random.key_data(jax.jit(jax.random.key)(np.uint32(seed))),
    jax.random.key_data(jax.random.key(seed)),
  )


# --- id 0 is `!`, not padding ---


@pytest.fixture(params=['bytes', 'gpt2'])
def gpt2_vocabulary(request):
  """Returns GPT-2's own vocabulary, and its first 256 ids, always at hand."""
  if request.param == 'bytes':
    return helpers.vocabulary()
  folder = request.getfixturevalue('shared_data') / 'tokenizers' / 'gpt2'
  return loading.load(str(folder))


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
  host_batch = helpers.pad_and_shift(
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

  found = helpers.generate(
    module,
    params,
    batch,
    max_decode_len=length,
    start_id=vocabulary.start_id,
    eos_id=vocabulary.eos_id,
    pad_id=vocabulary.pad_id,
  )
  found = np.asarray(found)[0].tolist()
  assert found == answer + [0, 0]
  assert vocabulary.decode(found) == text
