# SPDX-License-Identifier: Apache-2.0
"""Laws of speculative decoding: whatever is drafted, the LLM's answer comes."""

import dataclasses
import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.inference import generate as generate_lib
from l2s_jax.inference import sampling, speculative, strategies
from l2s_jax.models import l2s
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters, run_folder
from l2s_jax.weights import converted

MAX_DECODE_LEN = 11
START_ID, PAD_ID = 3, 7


def pair(slm, llm=helpers.LLM):
  """Returns LLM-to-SLM with a verifier."""
  return l2s.with_verifier(l2s.LlmToSlm(llm, slm))


def as_twin(params, noise, seed=1):
  """Returns parameters with an SLM that is the LLM, but for some noise.

  Z is zero: the SLM has its own prompt, as the LLM.
  """
  rng = np.random.default_rng(seed)
  return params | {
    'projector': jax.tree.map(jnp.zeros_like, params['projector']),
    'slm': jax.tree.map(
      lambda x: x + noise * rng.standard_normal(x.shape, np.float32),
      params['llm'],
    ),
  }


@functools.cache
def make_generator(module, draft_len, *, eos_id=-1, **settings):
  """Returns speculative decoding, or the LLM's own with draft_len=0."""
  if not draft_len:
    module = l2s.build(module.llm_config)
  return generate_lib.Generator(
    module,
    max_decode_len=MAX_DECODE_LEN,
    ids=strategies.Ids(START_ID, eos_id, PAD_ID),
    decoding=sampling.Decoding(draft_len=draft_len, **settings),
  )


def write(module, params, batch, draft_len, *, eos_id=-1, options=None, **kw):
  """Returns answers and the last state."""
  generator = make_generator(module, draft_len, eos_id=eos_id, **kw)
  prepared = generator.prepare(params if draft_len else params['llm'])
  generation = generator.start(prepared, batch, **options or {})
  return generation.finish(), generation.state


TWINS = pair(helpers.LLM)
PAIRS = {
  'twins': TWINS,
  't5_1_0': pair(helpers.T5_1_0),
  'gpt2': pair(helpers.GPT2),
  't5gemma-gemma3': pair(
    dataclasses.replace(helpers.GEMMA3, vocab_size=280),
    dataclasses.replace(helpers.T5GEMMA, logits_via_embedding=False),
  ),
  # Of one vocabulary, padded differently; this LLM says what the SLM cannot.
  'fewer ids': pair(dataclasses.replace(helpers.UMT5, vocab_size=100)),
}


@pytest.fixture(scope='module')
def twins():
  """Returns two that nearly agree, a ragged batch, and the LLM's answers."""
  params = as_twin(helpers.random_params(TWINS), 0.01)
  batch = helpers.batch_for(TWINS)
  answers, _ = write(TWINS, params, batch, 0)
  tokens = np.asarray(answers.tokens[:, 0])
  assert len(np.unique(tokens)) > 8
  return params, batch, tokens


@pytest.mark.parametrize(
  'name,draft_len',
  [
    ('t5_1_0', 1),
    ('gpt2', 4),
    ('t5gemma-gemma3', 2),
    ('fewer ids', 3),
  ],
)
def test_greedy_answers_are_the_llms_whoever_drafts(name, draft_len):
  module = PAIRS[name]
  params = helpers.random_params(module)
  batch = helpers.batch_for(module)
  expected, _ = write(module, params, batch, 0)
  found, _ = write(module, params, batch, draft_len)
  assert len(np.unique(expected.tokens)) > 3
  np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize('draft_len', [1, 3])
def test_rows_that_accept_different_numbers_stay_correct(twins, draft_len):
  params, batch, expected = twins
  answers, state = write(TWINS, params, batch, draft_len)
  np.testing.assert_array_equal(answers.tokens[:, 0], expected)
  # That they do differ, and the sums are right.
  assert len(np.unique(state.num_accepted)) > 1
  assert 0.1 < speculative.acceptance(state, draft_len) < 0.9
  num_rounds = np.asarray(state.num_rounds)
  assert state.num_tokens.sum() == expected.size
  # A round writes the drafts that stay and one token, or no token, at the end.
  per_round = expected.shape[1] - np.asarray(state.num_accepted)
  assert ((per_round == num_rounds) | (per_round == num_rounds - 1)).all()


def test_drafts_of_the_llms_twin_all_stay(twins):
  params, batch, expected = twins
  params = as_twin(params, 0)
  answers, state = write(TWINS, params, batch, 3)
  np.testing.assert_array_equal(answers.tokens[:, 0], expected)
  assert (state.num_rounds == -(-MAX_DECODE_LEN // 4)).all()
  assert (state.num_accepted == MAX_DECODE_LEN - MAX_DECODE_LEN // 4).all()


def test_drafts_that_are_always_wrong_change_nothing(twins):
  params, batch, expected = twins
  wrong = int(np.setdiff1d(np.arange(264), expected)[0])
  slm = jax.tree.map(jnp.zeros_like, params['slm'])
  slm['decoder']['final_norm']['scale'] += 1
  slm['token_embedder']['embedding'] += 1
  slm['logits_dense']['kernel'] = (
    slm['logits_dense']['kernel'].at[:, wrong].set(1)
  )
  answers, state = write(TWINS, params | {'slm': slm}, batch, 3)
  np.testing.assert_array_equal(answers.tokens[:, 0], expected)
  assert (state.num_accepted == 0).all()
  assert (state.num_rounds == MAX_DECODE_LEN).all()


@pytest.mark.parametrize('noise', [0, 0.01])
def test_answers_end_inside_drafts(twins, noise):
  """By EOS, by a row's own limit; a row without a prompt never begins."""
  params, batch, expected = twins
  params = as_twin(params, noise)
  eos_id = int(expected[0, 2])
  batch = batch | {
    'encoder_segment_ids': batch['encoder_segment_ids'].at[2].set(0)
  }
  options = {'max_decode_lens': jnp.array([11, 6, 11, 1])}
  expected, _ = write(
    TWINS, params, batch, 0, eos_id=eos_id, options=options, log_probs=True
  )
  found, state = write(
    TWINS, params, batch, 4, eos_id=eos_id, options=options, log_probs=True
  )
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  helpers.assert_close(found.log_probs, expected.log_probs)
  helpers.assert_close(found.scores, expected.scores)
  assert state.num_tokens.tolist() == [3, 6, 0, 1]


def test_a_cache_that_grows_changes_nothing(twins, monkeypatch):
  params, batch, expected = twins
  monkeypatch.setattr(generate_lib, 'FIRST_SLOTS', 4)  # then 8, then 11
  generator = make_generator.__wrapped__(TWINS, 3)
  generation = generator.start(generator.prepare(params), batch)
  assert generation.state.cache['slm'].num_slots == 4 + 3
  found = generation.finish().tokens[:, 0]
  np.testing.assert_array_equal(found, expected)
  assert generation.state.cache['llm'].num_slots == MAX_DECODE_LEN + 3


def test_neither_order_nor_neighbours_matter(twins):
  params, batch, expected = twins
  backwards = {key: value[::-1] for key, value in batch.items()}
  answers, _ = write(TWINS, params, backwards, 3)
  np.testing.assert_array_equal(answers.tokens[::-1, 0], expected)
  alone = {key: value[1:2] for key, value in batch.items()}
  answers, _ = write(TWINS, params, alone, 3)
  np.testing.assert_array_equal(answers.tokens[:, 0], expected[1:2])


def test_answers_can_be_taken_as_they_come(twins):
  params, batch, expected = twins
  generator = make_generator(TWINS, 3)
  generation = generator.start(generator.prepare(params), batch)
  while not generation.is_over():
    generation.advance(1)
    tokens = np.asarray(generation.answers().tokens[:, 0])
    num_tokens = np.asarray(generation.state.num_tokens)
    assert num_tokens.max() >= generation.step or generation.is_over()
    is_written = np.arange(MAX_DECODE_LEN) < num_tokens[:, None]
    np.testing.assert_array_equal(tokens[is_written], expected[is_written])
    assert (tokens[~is_written] == PAD_ID).all()
  np.testing.assert_array_equal(tokens, expected)


def test_penalties_are_those_of_the_llm_alone(twins):
  params, batch, plain = twins
  settings = dict(
    repetition_penalty=1.5, no_repeat_ngram_size=2, min_decode_len=9
  )
  eos_id = int(plain[1, 1])
  expected, _ = write(TWINS, params, batch, 0, eos_id=eos_id, **settings)
  found, _ = write(TWINS, params, batch, 3, eos_id=eos_id, **settings)
  assert (expected.tokens[:, 0] != plain).any()
  np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_the_loop_has_no_encoder(twins):
  params, batch, expected = twins
  generator = make_generator(TWINS, 3)
  prepared = generator.prepare(params)
  generation = generator.start(prepared, batch)
  writers = generator.writer_params(prepared)
  assert writers.keys() == {'llm', 'slm'} and 'encoder' not in writers['llm']
  jax.block_until_ready(generation.state)
  used = {id(leaf) for leaf in jax.tree.leaves(writers)}
  for leaf in jax.tree.leaves(prepared):
    if id(leaf) not in used and id(leaf) not in map(
      id, jax.tree.leaves(params)
    ):
      leaf.delete()
  np.testing.assert_array_equal(generation.finish().tokens[:, 0], expected)


@pytest.mark.parametrize('sizes', [(4, 1, 2), (2, 2, 2)])
def test_a_mesh_changes_nothing(twins, sizes):
  params, batch, expected = twins
  config = partitioning.MeshConfig(*sizes)
  mesh = partitioning.make_mesh(config)
  system = dataclasses.replace(helpers.system(TWINS), frozen=('llm',))
  with (
    partitioning.use_mesh(mesh),
    partitioning.axis_rules(config.rules('slm')),
  ):
    layout = parameters.layout(system, mesh, config)
    params = jax.device_put(params, layout.shardings)
    batch = partitioning.put_batch(jax.tree.map(np.asarray, batch), mesh)
    answers, _ = write(TWINS, params, batch, 3)
  np.testing.assert_array_equal(answers.tokens[:, 0], expected)


# --- samples ---

NUM_SAMPLES = 5000


def assert_drawn_from(counts, probabilities):
  """Asserts by chi-square that counts are of a multinomial distribution."""
  expected = counts.sum() * probabilities
  assert (counts[probabilities == 0] == 0).all()
  rare = expected < 5
  counts, expected = (
    np.append(x[~rare], x[rare].sum()) for x in (counts, expected)
  )
  possible = expected > 0
  counts, expected = counts[possible], expected[possible]
  num_free = len(counts) - 1
  excess = ((counts - expected) ** 2 / expected).sum() - num_free
  assert num_free > 2 and excess < 6 * (2 * num_free) ** 0.5


@pytest.mark.parametrize('num_drafts', [1, 3])
def test_what_stays_and_what_replaces_it_follow_the_llm(num_drafts):
  """Both distributions given, the first tokens of many rounds are counted."""
  rng = np.random.default_rng(num_drafts)
  logits = jnp.asarray(rng.normal(0, 0.8, (num_drafts + 1, 6)), jnp.float32)
  draft_logits = jnp.asarray(rng.normal(0, 0.8, (num_drafts, 6)), jnp.float32)
  # What one of them excludes, the other may like.
  logits = logits.at[0, 2].set(-jnp.inf)
  draft_logits = draft_logits.at[0, 4].set(-jnp.inf)

  @jax.vmap
  def run(key):
    draft_key, *keys = jax.random.split(key, 3)
    drafts = jax.random.categorical(draft_key, draft_logits).astype(jnp.int32)
    keys = [jax.random.split(key, num_drafts + 1) for key in keys]
    num_accepted, own = speculative.verify_sampled(
      drafts, draft_logits, logits, *keys
    )
    written = jnp.append(drafts, 0).at[num_accepted].set(own)
    return num_accepted, written

  num_accepted, written = run(jax.random.split(jax.random.key(0), NUM_SAMPLES))
  p, q = jax.nn.softmax(logits), jax.nn.softmax(draft_logits)
  for place in range(num_drafts + 1):
    reached = written[num_accepted >= place, place]
    counts = np.bincount(reached, minlength=6)
    assert_drawn_from(counts, np.asarray(p[place]))
  # As many drafts stay as can: the probability that both have in common.
  overlap = float(jnp.minimum(p[0], q[0]).sum())
  assert abs((num_accepted > 0).mean() - overlap) < 6 * 0.5 / NUM_SAMPLES**0.5


def test_each_draw_of_each_row_has_a_key_of_its_own():
  row_keys = jax.random.split(jax.random.key(0), 2)
  roles = (speculative._DRAFT, speculative._ACCEPT, speculative._REPLACE)
  found = [
    jax.random.key_data(speculative._keys(row_keys, jnp.full(2, place), role))
    for place, role in itertools.product(range(5), roles)
  ]
  assert len(np.unique(np.concatenate(found), axis=0)) == 2 * 5 * len(roles)


def test_drafts_that_are_not_numbers_never_stay():
  logits = jnp.asarray([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
  keys = jax.random.split(jax.random.key(0), (2, 1000, 2))
  num_accepted, own = jax.vmap(
    speculative.verify_sampled, in_axes=(None, None, None, 0, 0)
  )(jnp.array([0]), jnp.full((1, 3), jnp.nan), logits, *keys)
  assert (num_accepted == 0).all()
  counts, p = np.bincount(own, minlength=3), jax.nn.softmax(logits[0])
  assert (abs(counts / 1000 - p) < 6 * 0.5 / 1000**0.5).all()


SMALL = dataclasses.replace(helpers.LLM, vocab_size=5)


@pytest.fixture(scope='module')
def small():
  """Returns a pair of five tokens, its parameters and a prompt."""
  module = pair(SMALL, SMALL)
  params = as_twin(helpers.random_params(module), 0.1)
  batch = helpers.random_batch(5, 5, prompt_lengths=(3,), answer_lengths=(1,))
  return module, params, batch


@pytest.mark.parametrize(
  'settings',
  [
    {'temperature': 4.0},
    {'temperature': 4.0, 'top_p': 0.8},
    {'temperature': 6.0, 'top_k': 3, 'min_decode_len': 2, 'min_p': 0.1},
  ],
  ids=str,
)
def test_samples_have_the_llms_distribution(small, settings):
  """Of all answers of at most four tokens, EOS among the five."""
  module, params, prompt = small
  eos_id, start_id, length = 1, 3, 4
  decoding = sampling.Decoding(draft_len=2, **settings)

  sequences = np.array(list(itertools.product(range(5), repeat=length)))
  tokens = jnp.asarray(sequences, jnp.int32)
  num_sequences = len(sequences)
  logits = helpers.logits(
    l2s.build(SMALL),
    params['llm'],
    {key: jnp.repeat(x, num_sequences, 0) for key, x in prompt.items()}
    | {
      'decoder_input_tokens': jnp.pad(
        tokens[:, :-1], ((0, 0), (1, 0)), constant_values=start_id
      ),
      'decoder_segment_ids': jnp.ones_like(tokens),
    },
  )
  is_early = np.arange(length) < decoding.min_decode_len
  logits = jnp.where(
    is_early[:, None] & (np.arange(5) == eos_id), -jnp.inf, logits
  )
  restrict = jax.vmap(jax.vmap(lambda x: sampling.restrict(x, decoding)))
  p = np.asarray(jax.nn.softmax(restrict(logits)), np.float64)
  p = np.take_along_axis(p, sequences[..., None], axis=2)[..., 0]
  ended = np.cumsum(sequences == eos_id, axis=1) - (sequences == eos_id) > 0
  # Those that differ after EOS alone are one: that with padding.
  p = np.where(ended, sequences == 0, p).prod(1)
  assert abs(p.sum() - 1) < 1e-4

  generator = generate_lib.Generator(
    module,
    max_decode_len=length,
    ids=strategies.Ids(start_id, eos_id, 0),
    decoding=decoding,
  )
  generation = generator.start(
    generator.prepare(params),
    {key: jnp.repeat(x, NUM_SAMPLES, 0) for key, x in prompt.items()},
  )
  found = np.asarray(generation.finish().tokens[:, 0])
  counts = np.bincount(
    found @ 5 ** np.arange(length)[::-1], minlength=5**length
  )
  assert_drawn_from(counts, p)
  # Neither all drafts stay nor none.
  assert 0.3 < speculative.acceptance(generation.state, 2) < 0.95


def test_a_row_samples_the_same_whatever_its_neighbours(twins):
  params, batch, _ = twins
  row_ids = jnp.array([10, 11, 12, 13])

  def sample(batch, row_ids):
    answers, _ = write(
      TWINS, params, batch, 3, options={'row_ids': row_ids}, temperature=5.0
    )
    return np.asarray(answers.tokens[:, 0])

  expected = sample(batch, row_ids)
  backwards = {key: value[::-1] for key, value in batch.items()}
  np.testing.assert_array_equal(
    sample(backwards, row_ids[::-1])[::-1], expected
  )
  two = {key: value[1:3] for key, value in batch.items()}
  np.testing.assert_array_equal(sample(two, row_ids[1:3]), expected[1:3])
  assert (sample(batch, row_ids + 1) != expected).any()


# --- what is loaded and what is refused ---


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Returns an LLM, its encoder alone, and a run begun with the first."""
  folder = tmp_path_factory.mktemp('speculative')
  params = helpers.random_params(l2s.build(helpers.LLM), 1)
  encoder = {name: params[name] for name in l2s.ENCODER}
  for name, tensors in (('whole', params), ('encoder', encoder)):
    (folder / name).mkdir()
    converted.save(helpers.Arrays(helpers.LLM, tensors), folder / name)
  system = helpers.system(l2s.LlmToSlm(helpers.LLM, helpers.T5_1_0))
  system = dataclasses.replace(system, sources={'llm': str(folder / 'whole')})
  system, _ = load_frozen(system)
  run_folder.save(system, folder / 'run')
  return folder, params


def load_frozen(system):
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, mesh_config)
  return parameters.load_frozen(system, layout)


DRAFTS = sampling.Decoding(draft_len=4)


def test_the_decoder_of_a_runs_llm_is_loaded_with_it(folders):
  folder, params = folders
  system = run_folder.load(folder / 'run')
  assert generate_lib.for_decoding(system, sampling.Decoding()) is system
  again, frozen = load_frozen(generate_lib.for_decoding(system, DRAFTS))
  assert again.llm_fingerprint == system.llm_fingerprint
  helpers.assert_trees_equal(frozen, {'llm': params})


def test_an_llm_without_its_decoder_is_refused(folders):
  folder, _ = folders
  system = run_folder.load(folder / 'run', llm_path=str(folder / 'encoder'))
  load_frozen(system)
  with pytest.raises(ValueError, match='encoder is encoder-only.*LLM_PATH'):
    load_frozen(generate_lib.for_decoding(system, DRAFTS))


def test_systems_that_cannot_verify_are_refused_by_name(vocabulary):
  def refuse(module, match, decoding=DRAFTS, **changes):
    system = dataclasses.replace(helpers.system(module), **changes)
    with pytest.raises(ValueError, match=match):
      generate_lib.for_decoding(system, decoding)

  module = l2s.LlmToSlm(helpers.LLM, helpers.T5_1_0)
  refuse(l2s.build(helpers.LLM), 'draft_len=4.*a single language model')
  refuse(
    l2s.LlmToSlm(helpers.LLAMA, helpers.T5_1_0),
    'draft_len=4.*decoder-only .num_encoder_layers=0',
  )
  alone = dataclasses.replace(helpers.LLM, num_decoder_layers=0)
  refuse(l2s.LlmToSlm(alone, helpers.T5_1_0), 'is encoder-only')
  refuse(
    module,
    r'257 ids.*spiece.model \(\d+ ids\).*with the vocabulary of',
    answer_vocabulary=vocabulary,
  )
  refuse(
    module,
    'draft_len=4 with num_beams=2',
    sampling.Decoding(draft_len=4, num_beams=2),
  )


@pytest.mark.parametrize(
  'module,draft_len', [(l2s.build(helpers.T5_1_0), 4), (TWINS, 0)]
)
def test_drafts_and_a_verifier_belong_together(module, draft_len):
  with pytest.raises(ValueError, match='generate.for_decoding'):
    generate_lib.Generator(
      module,
      max_decode_len=4,
      ids=strategies.Ids(0, 1, 0),
      decoding=sampling.Decoding(draft_len=draft_len),
    )
