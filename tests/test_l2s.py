# SPDX-License-Identifier: Apache-2.0
"""Laws of the method: the projector, the injection, the controls, the LLM."""

import dataclasses
import functools
import operator
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.models import l2s, language_model
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters

SHORT = helpers.segments((1, 2, 3, 4), helpers.PROMPT_LENGTH)
LONG = helpers.segments((7, 7, 6, 7), helpers.PROMPT_LENGTH)


@functools.partial(jax.jit, static_argnames='module')
def encode_prompt(module, params, batch):
  return module.apply({'params': params}, batch, method='encode_prompt')


@functools.cache
def model(slm, injection, vocabulary):
  """Returns a module, random parameters, and a batch."""
  module = helpers.llm_to_slm(slm, injection, vocabulary)
  return module, helpers.random_params(module), helpers.batch_for(module)


def other_prompt(module, segment_ids):
  """Returns the batch keys that put another prompt before the LLM."""
  tokens = helpers.batch_for(module, seed=9)['encoder_input_tokens']
  return {
    'llm_input_tokens': tokens,
    'llm_segment_ids': jnp.asarray(segment_ids),
  }


def test_lengths_are_those_of_both_models_positions():
  """GPT-2 has 24 rows; as the LLM it reads the prefix too, but no answer."""
  slm = l2s.LlmToSlm(helpers.T5_1_1, helpers.GPT2)
  l2s.check_lengths(slm, 20, 4)
  with pytest.raises(ValueError, match='20 tokens .* 5 need 25 .* has 24'):
    l2s.check_lengths(slm, 20, 5)
  llm = l2s.LlmToSlm(helpers.GPT2, helpers.T5_1_1, llm_prefix_ids=(1,))
  l2s.check_lengths(llm, 23, 50)
  with pytest.raises(ValueError, match='25 positions, .* 24'):
    l2s.check_lengths(llm, 24, 1)
  l2s.check_lengths(llm, 24, 1, reads_llm=False)


def test_projector_against_numpy():
  config = dataclasses.replace(helpers.GPT2, emb_dim=3)
  module = l2s.Projector(2, config)
  params = {
    'wi': {
      'kernel': np.array([[1, 0, -2], [0, 1, 1]], np.float32),
      'bias': np.array([0, -5, 1], np.float32),
    },
    'wo': {
      'kernel': np.array([[1, 2, 0], [0, 1, 0], [3, 0, 1]], np.float32),
      'bias': np.array([10, 20, 30], np.float32),
    },
  }
  states = jnp.array([[[1.0, 2.0], [-1.0, 6.0]]])
  # Hidden, before ReLU: [1, -3, 1] and [-1, 1, 9].
  expected = [[[14, 22, 31], [37, 21, 39]]]
  found = module.apply({'params': params}, states)
  np.testing.assert_allclose(found, expected)


def test_projector_starts_scaled_by_fan_in_with_zero_biases():
  """GPT-2's initial 0.02 would make Z too small to matter."""
  module = l2s.Projector(400, dataclasses.replace(helpers.GPT2, emb_dim=100))
  params = partitioning.unbox(
    module.init(jax.random.key(0), jnp.zeros((1, 1, 400)))['params']
  )
  assert set(params) == {'wi', 'wo'}
  for name, fan_in in (('wi', 400), ('wo', 100)):
    np.testing.assert_allclose(
      np.std(params[name]['kernel']), fan_in**-0.5, rtol=0.05
    )
    np.testing.assert_array_equal(params[name]['bias'], np.zeros(100))


def test_fuse_by_hand():
  projected = jnp.array([[[1.0, 2.0], [np.nan, 3.0]]])
  valid = jnp.array([[True, False]])
  own = jnp.array([[[10.0, 20.0], [30.0, 40.0]]])
  np.testing.assert_array_equal(
    l2s.fuse(projected, valid, own), [[[11, 22], [30, 40]]]
  )
  np.testing.assert_array_equal(
    l2s.fuse(projected, valid, None), [[[1, 2], [0, 0]]]
  )


@pytest.mark.parametrize('slm', [*helpers.SLMS, 'gemma3', 't5gemma'])
def test_without_z_the_model_is_the_slm(slm):
  module, params, batch = model(slm, 'add', 'shared')
  alone = helpers.logits(l2s.build(module.slm_config), params['slm'], batch)
  silent = {**batch, 'llm_scale': jnp.zeros(helpers.BATCH_SIZE)}
  np.testing.assert_array_equal(helpers.logits(module, params, silent), alone)
  # One row's scale is that row's alone.
  scale = jnp.array([0.0, 1.0, 0.0, 1.0])
  found = helpers.logits(module, params, {**batch, 'llm_scale': scale})
  full = helpers.logits(module, params, batch)
  helpers.assert_close(found[::2], alone[::2])
  helpers.assert_close(found[1::2], full[1::2])
  assert np.abs(full - alone)[:, 0].max(-1).min() > 1e-2


def test_a_zero_scale_leaves_replace_without_a_prompt():
  module, params, batch = model('t5_1_0', 'replace', 'shared')
  silent = {**batch, 'llm_scale': jnp.zeros(helpers.BATCH_SIZE)}
  embeddings, segment_ids = encode_prompt(module, params, silent)
  np.testing.assert_array_equal(embeddings, np.zeros_like(embeddings))
  np.testing.assert_array_equal(segment_ids, batch['encoder_segment_ids'])


@pytest.mark.parametrize('vocabulary', ['shared', 'foreign'])
@pytest.mark.parametrize('injection', l2s.INJECTIONS)
def test_the_llm_reads_the_prompt_that_the_control_gives_it(
  injection, vocabulary
):
  module, params, batch = model('t5_1_0', injection, vocabulary)
  logits = helpers.logits(module, params, batch)
  # Naming its own prompt changes nothing; naming another's does.
  same = helpers.logits(
    module,
    params,
    {
      **batch,
      'llm_input_tokens': batch['encoder_input_tokens'],
      'llm_segment_ids': batch['encoder_segment_ids'],
    },
  )
  helpers.assert_close(same, logits)
  other = {**batch, **other_prompt(module, LONG)}
  found = helpers.logits(module, params, other)
  assert np.abs(found - logits)[:, 0].max(-1).min() > 1e-3


@pytest.mark.parametrize('segment_ids', [SHORT, LONG], ids=['short', 'long'])
def test_replace_takes_length_and_mask_of_the_other_prompt(segment_ids):
  module, params, batch = model('t5_1_0', 'replace', 'shared')
  other = other_prompt(module, segment_ids)
  controlled = {**batch, **other}
  plain = {
    **batch,
    'encoder_input_tokens': other['llm_input_tokens'],
    'encoder_segment_ids': other['llm_segment_ids'],
  }
  embeddings, found_segments = encode_prompt(module, params, controlled)
  np.testing.assert_array_equal(found_segments, segment_ids)
  assert (embeddings[segment_ids == 0] == 0).all()
  helpers.assert_close(
    helpers.logits(module, params, controlled),
    helpers.logits(module, params, plain),
  )


@pytest.mark.parametrize('segment_ids', [SHORT, LONG], ids=['short', 'long'])
def test_add_cuts_or_fills_the_other_z_to_the_prompts_length(segment_ids):
  module, params, batch = model('t5_1_0', 'add', 'shared')
  other = other_prompt(module, segment_ids)
  found, found_segments = encode_prompt(module, params, {**batch, **other})
  np.testing.assert_array_equal(found_segments, batch['encoder_segment_ids'])

  # Z of the other prompt is what `replace` would put there.
  replace = module.clone(injection='replace')
  z, _ = encode_prompt(replace, params, {**batch, **other})
  table = params['slm']['token_embedder']['embedding']
  own = table[batch['encoder_input_tokens']]
  helpers.assert_close(found, own + z)
  assert (z[segment_ids == 0] == 0).all()
  assert (np.abs(z[segment_ids == 1]).max(-1) > 1e-3).all()


def test_foreign_prompt_embeddings_are_the_llms_through_a_linear_layer():
  module, params, batch = model('gpt2', 'add', 'foreign')
  embeddings, _ = encode_prompt(module, params, batch)
  z, _ = encode_prompt(module.clone(injection='replace'), params, batch)
  llm_table = np.asarray(params['llm']['token_embedder']['embedding'])
  linear = jax.tree.map(np.asarray, params['prompt_embedder'])
  own = (
    llm_table[batch['encoder_input_tokens']] @ linear['kernel'] + linear['bias']
  )
  helpers.assert_close(embeddings, own + z)


@pytest.mark.parametrize(
  'injection, vocabulary, names',
  [
    ('add', 'shared', {'llm', 'projector', 'slm'}),
    ('add', 'foreign', {'llm', 'projector', 'slm', 'prompt_embedder'}),
    ('replace', 'shared', {'llm', 'projector', 'slm'}),
    ('replace', 'foreign', {'llm', 'projector', 'slm'}),
  ],
)
def test_parameters_are_those_that_are_used(injection, vocabulary, names):
  _, params, _ = model('t5_1_1', injection, vocabulary)
  assert set(params) == names
  assert set(params['llm']) == {'token_embedder', 'encoder'}  # no decoder


def test_an_unknown_injection_is_refused():
  module = helpers.llm_to_slm('gpt2', 'multiply', 'shared')
  with pytest.raises(ValueError, match="'multiply' is not one of.*add"):
    helpers.random_params(module)


def test_the_llm_reads_without_dropout_even_in_training():
  module, params, batch = model('t5_1_0', 'add', 'shared')

  def training_logits(llm_rate, slm_rate):
    with_dropout = module.clone(
      llm_config=dataclasses.replace(module.llm_config, dropout_rate=llm_rate),
      slm_config=dataclasses.replace(module.slm_config, dropout_rate=slm_rate),
    )
    return jax.jit(functools.partial(with_dropout.apply, deterministic=False))(
      {'params': params}, batch, rngs={'dropout': jax.random.key(0)}
    )

  logits = helpers.logits(module, params, batch)
  helpers.assert_close(training_logits(0.5, 0.0), logits)
  assert np.abs(training_logits(0.0, 0.5) - logits).max() > 1e-2


def test_a_decoder_only_llm_encodes_too():
  """Padding still changes nothing, and later tokens do not reach back."""
  module = l2s.LlmToSlm(
    dataclasses.replace(helpers.GPT2, emb_dim=24, max_positions=10),
    helpers.T5_1_0,
    'replace',
    shared_vocabulary=False,
  )
  params, batch = helpers.random_params(module), helpers.batch_for(module)
  embeddings, _ = encode_prompt(module, params, batch)
  tokens = batch['encoder_input_tokens']
  longer = {
    **batch,
    'encoder_input_tokens': jnp.pad(tokens.at[0, 2].add(1), ((0, 0), (0, 2))),
    'encoder_segment_ids': jnp.pad(
      batch['encoder_segment_ids'], ((0, 0), (0, 2))
    ),
  }
  found, _ = encode_prompt(module, params, longer)
  helpers.assert_close(found[1:, :7], embeddings[1:])
  helpers.assert_close(found[0, :2], embeddings[0, :2])
  assert np.abs(found[0, 2] - embeddings[0, 2]).max() > 1e-3


@pytest.mark.parametrize('layer', [None, 1, l2s.MIX])
def test_a_prefix_is_read_and_leaves_no_state(layer):
  """H is that of the prompt with BOS in front, but for the state of BOS."""
  module = l2s.LlmToSlm(
    dataclasses.replace(helpers.GPT2, emb_dim=24),
    helpers.T5_1_0,
    'replace',
    shared_vocabulary=False,
    llm_layer=layer,
  )
  params, batch = helpers.random_params(module), helpers.batch_for(module)
  prefixed = module.clone(llm_prefix_ids=(7, 3))
  count, shape = batch['encoder_input_tokens'].shape
  tokens = np.full((count, shape + 2), (7, 3) + (0,) * shape)
  tokens[:, 2:] = batch['encoder_input_tokens']
  longer = {
    **batch,
    'encoder_input_tokens': jnp.asarray(tokens),
    'encoder_segment_ids': jnp.pad(
      batch['encoder_segment_ids'], ((0, 0), (2, 0)), constant_values=1
    ),
  }
  found = read_prompt(prefixed, params, batch)
  helpers.assert_close(found, read_prompt(module, params, longer)[:, 2:])
  assert np.abs(found - read_prompt(module, params, batch)).max() > 1e-3

  def first_states(module, batch):
    return module.apply(
      {'params': params}, batch, method=module.read_first_states
    )

  helpers.assert_close(
    first_states(prefixed, batch), first_states(module, longer)[:, 2:]
  )


def test_a_bfloat16_llm_gives_the_slm_its_own_dtype():
  module, params, batch = model('t5_1_0', 'add', 'shared')
  half = module.clone(
    llm_config=dataclasses.replace(module.llm_config, dtype='bfloat16')
  )
  params = params | {
    'llm': jax.tree.map(lambda x: x.astype(jnp.bfloat16), params['llm'])
  }
  embeddings, _ = encode_prompt(half, params, batch)
  expected, _ = encode_prompt(*model('t5_1_0', 'add', 'shared'))
  assert embeddings.dtype == jnp.float32
  real = np.asarray(batch['encoder_segment_ids'] > 0)
  # Eight bits of mantissa through three layers.
  error = np.abs(embeddings - expected)[real]
  assert 0 < error.max() and error.mean() < 0.05


@pytest.mark.parametrize('slm', ['t5_1_0', 'gpt2'])
def test_the_slm_starts_the_same_inside_llm_to_slm_as_alone(slm):
  together = helpers.system(helpers.llm_to_slm(slm, 'add', 'shared'))
  alone = helpers.system(helpers.MODULES[slm])
  init = jax.jit(
    lambda key: [
      partitioning.unbox(parameters.init(system, key)['params'])
      for system in (together, alone)
    ]
  )
  ours, theirs = init(jax.random.key(3))
  helpers.assert_trees_equal(ours['slm'], theirs)
  other, _ = init(jax.random.key(4))
  assert (
    ours['slm']['token_embedder']['embedding']
    != other['slm']['token_embedder']['embedding']
  ).any()


@functools.partial(jax.jit, static_argnames='module')
def read_prompt(module, params, batch):
  return module.apply({'params': params}, batch, method='read_prompt')[0]


DECODER_ONLY = dataclasses.replace(helpers.GEMMA3, vocab_size=280, emb_dim=24)


@pytest.mark.parametrize('llm', [helpers.LLM, DECODER_ONLY])
def test_h_of_a_layer_is_that_of_an_llm_which_ends_there(llm):
  last = helpers.llm_to_slm('t5_1_1', 'replace', 'shared', llm)
  params, batch = helpers.random_params(last), helpers.batch_for(last)
  stack = 'encoder' if llm.is_encoder_decoder else 'decoder'
  count = l2s.num_reading_layers(llm)
  expected = read_prompt(last, params, batch)
  # A program of its own: the law is that of the whole LLM's.
  found = read_prompt(last.clone(llm_layer=count), params, batch)
  np.testing.assert_array_equal(found, expected)

  of_layer = {count: expected}
  for layer in (count - 1, 1):
    module = last.clone(llm_layer=layer)
    found = of_layer[layer] = read_prompt(module, params, batch)
    shorter = dataclasses.replace(llm, **{f'num_{stack}_layers': layer})
    of_stack = dict(params['llm'][stack])
    of_stack['layers'] = jax.tree.map(
      operator.itemgetter(slice(layer)), of_stack['layers']
    )
    ended = {**params, 'llm': {**params['llm'], stack: of_stack}}
    helpers.assert_close(
      found, read_prompt(last.clone(llm_config=shorter), ended, batch)
    )
    generating = l2s.for_generation(module)
    helpers.assert_close(
      read_prompt(
        generating, l2s.params_for_generation(generating, params), batch
      ),
      found,
    )

  # A mix begins as the mean, and can become each layer.
  mixing = last.clone(llm_layer=l2s.MIX)
  of_layer[0] = read_prompt(last.clone(llm_layer=0), params, batch)
  weights = jnp.full(count + 1, -1e9).at[1].set(0.0)
  mix = {'weights': weights, 'scale': jnp.array([2.0])}
  found = read_prompt(mixing, params | {'layer_mix': mix}, batch)
  helpers.assert_close(found, 2 * of_layer[1])
  fresh = parameters.init(helpers.system(mixing), jax.random.key(0))
  mix = partitioning.unbox(fresh)['params']['layer_mix']
  found = read_prompt(mixing, params | {'layer_mix': mix}, batch)
  if count == 3:
    others = read_prompt(last.clone(llm_layer=2), params, batch)
    helpers.assert_close(
      found, (of_layer[0] + of_layer[1] + others + of_layer[3]) / 4
    )


def test_h_of_layer_0_is_the_normed_embeddings():
  module, params, batch = model('gpt2', 'replace', 'foreign')
  found = read_prompt(module.clone(llm_layer=0), params, batch)
  x = params['llm']['token_embedder']['embedding'][
    batch['encoder_input_tokens']
  ]
  norm = params['llm']['encoder']['final_norm']['scale']
  mean = np.mean(np.square(x), axis=-1, keepdims=True)
  helpers.assert_close(found, x / np.sqrt(mean + 1e-6) * norm)


@pytest.mark.parametrize('llm', [helpers.LLM, DECODER_ONLY])
def test_generation_has_no_llm_parameter_that_no_prompt_reads(llm):
  """A tied head would be a second copy of the LLM's embedding table."""
  generating = l2s.for_generation(
    l2s.LlmToSlm(llm, helpers.T5_1_0, 'replace', shared_vocabulary=False)
  )
  params = l2s.params_for_generation(
    generating, helpers.random_params(generating)
  )['llm']
  read = functools.partial(generating.apply, method='read_prompt')
  batch = helpers.batch_for(generating)
  program = jax.jit(lambda llm: read({'params': {'llm': llm}}, batch))
  # Tracing drops the arguments that nothing reads.
  (signature,) = re.findall(r'@main\((.*)\)', program.lower(params).as_text())
  assert signature.count('%arg') == len(jax.tree.leaves(params))


@pytest.mark.parametrize('layer', [-1, 4, True, 'last'])
def test_a_layer_that_is_not_there_is_refused(layer):
  with pytest.raises(ValueError, match='LLM_LAYER=.* 0 .* to 3 .* or None'):
    l2s.check_layer(layer, helpers.LLM)


@pytest.mark.parametrize('layer', [None, 2, l2s.MIX])
def test_the_llm_has_a_gradient_where_it_is_trained_and_else_none(layer):
  module = helpers.llm_to_slm('gpt2', 'add', 'foreign').clone(llm_layer=layer)
  params, batch = helpers.random_params(module), helpers.batch_for(module)

  @functools.partial(jax.jit, static_argnames='module')
  def gradient(module, params):
    def loss(params):
      embeddings, _ = module.apply(
        {'params': params}, batch, method='encode_prompt'
      )
      return jnp.square(embeddings).sum()

    return jax.grad(loss)(params)

  held = gradient(module, params)
  trained = gradient(module.clone(train_llm=True), params)
  for leaf in jax.tree.leaves(held['llm']):
    assert not np.any(leaf)
  for path, leaf in jax.tree_util.tree_leaves_with_path(trained['llm']):
    # Layers behind the one that is read have no part; all others have one.
    parts = leaf[:layer] if layer == 2 and path[1].key == 'layers' else leaf
    assert np.all(
      np.any(np.asarray(parts).reshape(len(parts), -1), axis=-1)
    ) or (path[0].key == 'token_embedder' or path[1].key != 'layers'), path
    assert np.any(leaf), path
  for name in set(params) - {'llm', 'slm'}:
    helpers.assert_trees_equal(
      jax.tree.map(np.shape, held[name]), jax.tree.map(np.shape, trained[name])
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(held[name]))


@pytest.mark.parametrize('has_mesh', [False, True])
def test_small_and_large_stacks_are_divided_into_the_same_layers(
  has_mesh, monkeypatch
):
  """NumPy divides small ones, and a program those that take it long."""
  module = helpers.MODULES['llm_to_t5_1_0-add-shared']
  params = helpers.random_params(module)
  if has_mesh:
    mesh = partitioning.make_mesh(
      partitioning.MeshConfig(data=1), jax.devices()[:1]
    )
    params = jax.device_put(
      params, jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
  generating = l2s.for_generation(module)
  found = []
  for num_bytes in (2**30, 0):
    monkeypatch.setattr(language_model, '_SMALL_BYTES', num_bytes)
    found.append(l2s.params_for_generation(generating, params))
  small, large = found
  helpers.assert_trees_equal(small, large)
  for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert a.committed == b.committed
