# SPDX-License-Identifier: Apache-2.0
"""Laws of every model: padding is nothing, a cache changes nothing."""

import dataclasses
import functools
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from l2s_jax.inference import generate, strategies
from l2s_jax.models import attention, batch_keys, l2s, layers, positions
from l2s_jax.models import config as config_lib
from l2s_jax.runtime import partitioning


@pytest.fixture(scope='module', params=helpers.cases(helpers.MODULES))
def model(request):
  """Returns a module, random parameters, a ragged batch and its logits."""
  module = helpers.MODULES[request.param]
  params = helpers.random_params(module)
  batch = helpers.batch_for(module)
  return module, params, batch, helpers.logits(module, params, batch)


def with_padding(batch, prompt, answer, fill):
  """Returns the batch in longer rows, `fill` in the new slots."""
  padded = {}
  for key, value in batch.items():
    width = prompt if key.startswith('encoder') else answer
    is_token = key.endswith('tokens')
    padded[key] = jnp.pad(
      value, ((0, 0), (0, width)), constant_values=fill if is_token else 0
    )
  return padded


def test_more_padding_and_what_it_holds_change_nothing(model):
  module, params, batch, logits = model
  longer = with_padding(batch, 3, 2, fill=5)
  # What the padding of the batch itself holds changes, too.
  for side in ('encoder', 'decoder'):
    real = longer[f'{side}_segment_ids'] > 0
    tokens = longer[f'{side}_input_tokens']
    longer[f'{side}_input_tokens'] = jnp.where(real, tokens, 5)
  padded = helpers.logits(module, params, longer)

  real = np.asarray(batch['decoder_segment_ids'] > 0)
  helpers.assert_close(padded[:, : helpers.ANSWER_LENGTH][real], logits[real])
  assert np.isfinite(padded).all()


def test_other_rows_change_nothing(model):
  module, params, batch, logits = model
  others = helpers.batch_for(module, seed=1)
  mixed = {key: value.at[0].set(batch[key][0]) for key, value in others.items()}
  found = helpers.logits(module, params, mixed)
  helpers.assert_close(found[0], logits[0])
  assert np.abs(found[3] - logits[3]).max() > 1e-2


def test_prompt_and_earlier_answer_matter_and_later_answer_does_not(model):
  module, params, batch, logits = model
  row, step = 0, 2  # six tokens of answer, three of prompt

  def change(key, slot):
    value = batch[key]
    other = (value[row, slot] + 1) % 200
    return helpers.logits(
      module, params, {**batch, key: value.at[row, slot].set(other)}
    )[row]

  later = change('decoder_input_tokens', step)
  helpers.assert_close(later[:step], logits[row, :step])
  assert (np.abs(later[step:] - logits[row, step:]).max(1) > 1e-4).all()
  for slot in range(helpers.PROMPT_LENGTHS[row]):
    found = change('encoder_input_tokens', slot)
    assert (np.abs(found - logits[row]).max(1) > 1e-4).all()


def test_cached_decoding_equals_teacher_forcing(model):
  module, params, batch, logits = model
  cache = helpers.prefill(module, params, batch, helpers.ANSWER_LENGTH)
  for t in range(helpers.ANSWER_LENGTH):
    found, cache = helpers.extend(
      module, params, batch['decoder_input_tokens'][:, t : t + 1], cache
    )
    # Rows whose answer is over by now have no logits to compare with.
    real = np.asarray(batch['decoder_segment_ids'][:, t] > 0)
    helpers.assert_close(found[real, 0], logits[real, t])


@pytest.mark.parametrize(
  'name',
  ['t5_1_1', 'gpt2', 'llm_to_gpt2-add-foreign', *helpers.FAMILIES],
)
def test_scanned_and_unrolled_stacks_are_one_model(name):
  module = helpers.MODULES[name]

  def unrolled(config):
    return dataclasses.replace(config, scan_layers=False)

  if isinstance(module, l2s.LlmToSlm):
    other = module.clone(
      llm_config=unrolled(module.llm_config),
      slm_config=unrolled(module.slm_config),
    )
  else:
    other = module.clone(config=unrolled(module.config))

  params = helpers.random_params(module)
  helpers.assert_trees_equal(params, helpers.random_params(other))
  batch = helpers.batch_for(module)
  helpers.assert_close(
    helpers.logits(other, params, batch), helpers.logits(module, params, batch)
  )


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('slm', helpers.SLMS)
def test_parameters_are_stacked_along_layers(slm, scan_layers):
  config = dataclasses.replace(helpers.SLMS[slm], scan_layers=scan_layers)
  shapes, axes = partitioning.abstract_params(
    lambda key, batch: l2s.build(config).init(key, batch, deterministic=True),
    batch_keys.example_batch(1, 2, 2),
  )
  shapes = traverse_util.flatten_dict(shapes)
  axes = traverse_util.flatten_dict(axes)
  assert any('layers' in path for path in shapes)
  for path, shape in shapes.items():
    assert len(axes[path]) == len(shape.shape), path
    assert (axes[path][0] == 'layers') == ('layers' in path), path
    if 'layers' in path:
      assert shape.shape[0] == 2, path


def test_every_layer_starts_from_values_of_its_own():
  module = helpers.MODULES['t5_1_0']
  init = jax.jit(
    lambda key: module.init(key, helpers.random_batch(), deterministic=True)
  )
  params = partitioning.unbox(init(jax.random.key(0))['params'])
  kernel = params['encoder']['layers']['mlp']['wi']['kernel']
  assert np.abs(kernel[0] - kernel[1]).max() > 0.1
  # Fan-in scaling, and T5's smaller queries in place of 1/sqrt(head_dim).
  attention_params = params['encoder']['layers']['self_attention']
  np.testing.assert_allclose(np.std(kernel), 16**-0.5, rtol=0.1)
  np.testing.assert_allclose(
    np.std(attention_params['query']['kernel']), (16 * 4) ** -0.5, rtol=0.2
  )


@pytest.mark.parametrize('name', ['t5_1_1', 'gpt2', 'gemma3'])
def test_remat_changes_neither_logits_nor_gradients(name):
  module = helpers.MODULES[name]
  remat = module.clone(config=dataclasses.replace(module.config, remat='full'))
  params, batch = helpers.random_params(module), helpers.random_batch()

  def grads(module):
    return jax.jit(
      jax.grad(lambda p: (helpers.logits(module, p, batch) ** 2).mean())
    )(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    grads(module),
    grads(remat),
  )


@pytest.mark.parametrize('norm', ['rms', 'layer'])
def test_norms_against_numpy(norm):
  config = dataclasses.replace(
    helpers.T5_1_0, norm=norm, norm_epsilon=0.5, dtype='bfloat16'
  )
  x = np.array([[1.0, 2.0, 3.0, -4.0]], np.float32)
  scale = np.array([1, 2, 3, 4], np.float32)
  bias = np.array([4, 3, 2, 1], np.float32)
  params = {'scale': scale} | ({'bias': bias} if norm == 'layer' else {})
  if norm == 'rms':  # mean square 30 / 4
    expected = x / np.sqrt(7.5 + 0.5) * scale
  else:  # mean 0.5, variance 7.25
    expected = (x - 0.5) / np.sqrt(7.25 + 0.5) * scale + bias
  found = layers.Norm(config).apply({'params': params}, jnp.asarray(x))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(found), expected, rtol=1e-2)


def test_gated_mlp_against_numpy():
  config = helpers.T5_1_1
  module = layers.Mlp(config)
  generator = np.random.default_rng(0)
  wi_0, wi_1 = generator.normal(size=(2, 16, 32)).astype(np.float32)
  wo = generator.normal(size=(32, 16)).astype(np.float32)
  x = generator.normal(size=(1, 2, 16)).astype(np.float32)
  params = {
    'wi_0': {'kernel': wi_0},
    'wi_1': {'kernel': wi_1},
    'wo': {'kernel': wo},
  }
  h = x @ wi_0
  gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  found = module.apply({'params': params}, jnp.asarray(x), deterministic=True)
  np.testing.assert_allclose(
    found, (gelu * (x @ wi_1)) @ wo, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('is_transposed', [False, True])
def test_products_have_the_gradients_of_jax(dtype, is_transposed):
  """Ours are formed otherwise, for speed; see `layers.multiply`."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 5, 6), dtype)
  matrix = jax.random.normal(keys[1], (6, 7), dtype)
  matrix = matrix.T if is_transposed else matrix
  direction = jax.random.normal(keys[2], (2, 5, 7))

  def ours(x, matrix):
    y = layers.multiply(x, matrix, jnp.float32, is_transposed)
    return jnp.sum(y * direction)

  def plain(x, matrix):
    matrix = matrix.T if is_transposed else matrix
    return jnp.sum((x @ matrix).astype(jnp.float32) * direction)

  found = jax.value_and_grad(ours, argnums=(0, 1))(x, matrix)
  expected = jax.value_and_grad(plain, argnums=(0, 1))(x, matrix)
  dtypes = [[x.dtype for x in jax.tree.leaves(y)] for y in (found, expected)]
  assert dtypes[0] == dtypes[1]
  tolerance = 1e-5 if dtype == 'float32' else 5e-2  # 8 bits of mantissa
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
    ),
    found,
    expected,
  )


def test_dropout_keeps_what_it_expects_and_its_gradient():
  dropout = layers.Dropout(0.25)
  x = jnp.ones((40, 3, 50))

  def apply(x):
    return dropout.apply(
      {}, x, deterministic=False, rngs={'dropout': jax.random.key(0)}
    )

  dropped = apply(x)
  np.testing.assert_allclose(jnp.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
  assert abs(float(dropped.mean()) - 1) < 0.05
  gradient = jax.grad(lambda x: apply(x).sum())(x)
  np.testing.assert_array_equal(gradient, dropped)


def test_dropout_draws_one_mask_for_all_positions_of_a_row():
  dropout = layers.Dropout(0.5)
  x = jnp.ones((3, 5, 64))
  found = dropout.apply(
    {}, x, deterministic=False, rngs={'dropout': jax.random.key(0)}
  )
  np.testing.assert_array_equal(found, found[:, :1] * np.ones((1, 5, 1)))
  assert set(np.unique(found)) == {0.0, 2.0}
  assert (found[0] != found[1]).any()
  np.testing.assert_array_equal(dropout.apply({}, x, deterministic=True), x)


def test_relative_position_buckets_against_a_table_made_by_hand():
  # 8 buckets up to distance 16. One direction: 0..3 exact, then
  # 4 + floor(log(d / 4) / log(16 / 4) * 4): d=5 -> 4.6, d=6 -> 5.2,
  # d=8 -> 6 (2 to the half), d=12 -> 7.2.
  offset = -jnp.array([[0, 1, 2, 3, 4, 5, 6, 9, 12, 16, 99, -1, -9]])
  found = positions.relative_position_bucket(
    offset, bidirectional=False, num_buckets=8, max_distance=16
  )
  expected = [[0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 7, 0, 0]]
  np.testing.assert_array_equal(found, expected)

  # Half for each direction: 0, 1 exact, then 2 + floor(log(d/2)/log(8) * 2):
  # d=5 -> 2.9, d=6 -> 3.06. Keys after the query start at 4.
  offset = jnp.array([[0, -1, -2, -5, -6, -99, 1, 2, 5, 6, 99]])
  found = positions.relative_position_bucket(
    offset, bidirectional=True, num_buckets=8, max_distance=16
  )
  expected = [[0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7]]
  np.testing.assert_array_equal(found, expected)


def test_rotary_angles_against_a_table_made_by_hand():
  # Two pairs: a radian a token, and base**-0.5 = 1/2 radian.
  config = dataclasses.replace(
    helpers.PYTHIA, head_dim=6, rope_dim=4, rope_base=4.0
  )
  by = positions.rotation(config, jnp.array([[0, 3]])).of_layer(jnp.array(True))
  helpers.assert_close(by.cos[0], np.cos([[0.0, 0.0], [3.0, 1.5]]))
  x = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) * jnp.ones((1, 1, 2, 1))
  found = positions.rotate(x, by)[0, 0]
  np.testing.assert_array_equal(found[0], x[0, 0, 0])
  # Feature i and i + 2 are a pair; the last two stay.
  turned = np.array([1 + 3j, 2 + 4j]) * np.exp([3j, 1.5j])
  helpers.assert_close(found[1], [*turned.real, *turned.imag, 5.0, 6.0])


def test_stretched_angles_against_a_table_made_by_hand():
  # Turns in a context of 2 pi * 8: 8, 2 and 1/2. Above 4 they stay, below 1
  # they are a tenth; 2 is a third of the way from 1 to 4.
  config = dataclasses.replace(
    helpers.LLAMA,
    head_dim=6,
    rope_base=64.0,
    rope_scaling=(10.0, 1.0, 4.0, 16 * np.pi),
  )
  by = positions.rotation(config, jnp.array([[1]])).of_layer(jnp.array(True))
  angles = [1, (1 / 3 + 2 / 3 / 10) / 4, 1 / 16 / 10]
  helpers.assert_close(by.sin[0, 0], np.sin(angles))


def test_windows_by_hand():
  offset = positions.offsets(jnp.array([[3, 4]]), jnp.arange(7)[None])
  np.testing.assert_array_equal(
    positions.window_mask(offset, 2)[0],
    np.array([[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0]], bool),
  )


def test_grouped_queries_are_heads_with_keys_and_values_repeated():
  grouped = helpers.MODULES['llama']  # 6 heads, 2 of keys and values
  module = l2s.build(dataclasses.replace(grouped.config, num_kv_heads=None))
  params, batch = helpers.random_params(grouped), helpers.random_batch()
  flat = traverse_util.flatten_dict(params)
  repeated = {
    path: jnp.repeat(x, 3, axis=-2) if 'key' in path or 'value' in path else x
    for path, x in flat.items()
  }
  helpers.assert_close(
    helpers.logits(grouped, params, batch),
    helpers.logits(module, traverse_util.unflatten_dict(repeated), batch),
  )
  cache = helpers.prefill(grouped, params, batch, 2)
  assert cache.kv[0].key.shape == (4, 2, 9, 8)  # kv_heads, not heads


def test_segment_mask_by_hand():
  mask = attention.segment_mask(
    jnp.array([[1, 2, 0]]), jnp.array([[1, 1, 2, 0]])
  )
  np.testing.assert_array_equal(
    mask[0, 0],
    np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool),
  )
  bias = attention.mask_bias(mask)
  assert bias.dtype == jnp.float32
  # A query that sees nothing still has a softmax.
  assert np.isfinite(jax.nn.softmax(bias)).all()


# --- GPT-2 ---


@functools.partial(jax.jit, static_argnames='module')
def states_of_prompt(module, params, batch):
  def encode(module, batch):
    return module.encode(
      module.embed(batch['encoder_input_tokens']),
      batch['encoder_segment_ids'],
      deterministic=True,
    )

  return module.apply({'params': params}, batch, method=encode)


def test_a_bidirectional_prefix_sees_its_end_and_nothing_else_changes():
  causal = helpers.MODULES['gpt2']
  module = causal.clone(
    config=dataclasses.replace(causal.config, bidirectional_prefix=True)
  )
  params, batch = helpers.random_params(causal), helpers.random_batch()
  row, length = 3, helpers.PROMPT_LENGTHS[3]
  changed = dict(batch)
  changed['encoder_input_tokens'] = (
    batch['encoder_input_tokens'].at[row, length - 1].add(1)
  )

  def difference(module, other):
    a, b = (states_of_prompt(module, params, x) for x in (batch, other))
    return np.abs(a - b).max(-1)[row]

  # The last token of the prompt: seen by those before it, or by itself alone.
  assert (difference(causal, changed)[: length - 1] < 1e-6).all()
  assert (difference(module, changed)[: length - 1] > 1e-3).all()
  # Padding behind it is seen by neither.
  padded = dict(batch)
  padded['encoder_input_tokens'] = (
    batch['encoder_input_tokens'].at[row, length:].add(1)
  )
  assert (difference(module, padded)[:length] < 1e-6).all()

  # The answer stays causal.
  logits = helpers.logits(module, params, batch)
  later = dict(batch)
  later['decoder_input_tokens'] = batch['decoder_input_tokens'].at[0, 3].add(1)
  found = helpers.logits(module, params, later)
  helpers.assert_close(found[0, :3], logits[0, :3])
  assert np.abs(found[0, 3:] - logits[0, 3:]).max() > 1e-3

  # A prompt of one token is the same either way, and longer ones are not.
  expected = helpers.logits(causal, params, batch)
  helpers.assert_close(logits[2, :4], expected[2, :4])
  assert np.abs(logits[1, 0] - expected[1, 0]).max() > 1e-3

  # Its prefill reads the prompt the same way.
  cache = helpers.prefill(module, params, batch, helpers.ANSWER_LENGTH)
  for t in range(2):
    step_logits, cache = helpers.extend(
      module, params, batch['decoder_input_tokens'][:, t : t + 1], cache
    )
    real = np.asarray(batch['decoder_segment_ids'][:, t] > 0)
    helpers.assert_close(step_logits[real, 0], logits[real, t])


def test_positions_count_real_tokens():
  """Three tokens of prompt: the answer reads rows 3, 4, ... of the table."""
  module = helpers.MODULES['gpt2']
  params, batch = helpers.random_params(module), helpers.random_batch()
  logits = helpers.logits(module, params, batch)
  length, steps = helpers.PROMPT_LENGTHS[0], helpers.ANSWER_LENGTHS[0]
  table = params['position_embedder']['embedding']

  def change(rows):
    # By one number alone: a layer norm would take a constant back out.
    other = {'embedding': table.at[rows, 0].add(1.0)}
    found = helpers.logits(module, params | {'position_embedder': other}, batch)
    return np.abs(found - logits)[0].max(-1)

  assert (change(slice(length + steps, None)) == 0).all()
  last = change(length + steps - 1)
  assert (last[:-1] == 0).all() and last[-1] > 1e-3
  assert (change(length) > 1e-4).all()  # the answer's first


def test_lengths_beyond_the_position_table_are_refused_with_both_numbers():
  module = helpers.MODULES['gpt2']  # 24 positions
  params = jax.eval_shape(lambda: helpers.random_params(module))
  batch = helpers.random_batch(prompt_lengths=(20,), answer_lengths=(5,))
  with pytest.raises(ValueError, match='20 tokens .* 5 need 25 .* has 24'):
    jax.eval_shape(
      lambda p, b: module.apply({'params': p}, b, deterministic=True),
      params,
      batch,
    )
  generator = generate.Generator(
    module, max_decode_len=5, ids=strategies.Ids(0, 1, 0)
  )
  with pytest.raises(ValueError, match='20 tokens .* 5 need 25 .* has 24'):
    generator.start(params, batch)


def test_a_prompt_alone_beyond_the_position_table_is_refused():
  """A decoder-only LLM reads a prompt and writes no answer."""
  module = helpers.MODULES['gpt2']
  params = jax.eval_shape(lambda: helpers.random_params(module))
  batch = jax.eval_shape(lambda: helpers.random_batch(prompt_lengths=(25,) * 4))
  with pytest.raises(ValueError, match='25 .* 24'):
    jax.eval_shape(lambda p, b: states_of_prompt(module, p, b), params, batch)


@pytest.mark.parametrize(
  'slm, changes, message',
  [
    ('t5_1_0', dict(norm='batch'), "norm='batch'.*rms"),
    ('t5_1_0', dict(positions='absolute'), "positions='absolute'.*learned"),
    ('t5_1_0', dict(remat='some'), "remat='some'.*full"),
    ('t5_1_0', dict(dtype='float16'), "dtype='float16'.*bfloat16"),
    ('t5_1_0', dict(mlp_activations=['tanh']), "'tanh'.*relu"),
    ('t5_1_0', dict(mlp_activations='relu'), "'r'.*relu"),
    ('t5_1_0', dict(mlp_dim=0), 'mlp_dim=0.*positive'),
    ('t5_1_0', dict(dropout_rate=1.0), 'dropout_rate=1.0.*probability'),
    ('t5_1_0', dict(num_kv_heads=3), 'num_heads=2 .*num_kv_heads=3'),
    ('gpt2', dict(attention_bias='some'), "attention_bias='some'.*qkv"),
    ('gpt2', dict(max_positions=0), 'max_positions > 0.*got 0'),
    ('gpt2', dict(positions='rotary', rope_dim=3), 'rope_dim=3 .*pairs'),
    ('gpt2', dict(positions='rotary', rope_dim=10), 'rope_dim=10 .*at most'),
    ('gpt2', dict(rope_scaling=[8.0]), r'rope_scaling=\(8.0,\).*empty tuple'),
    (
      'gpt2',
      dict(positions='rotary', relpos_per_layer=True),
      "relpos_per_layer needs positions='relative'",
    ),
    (
      'gpt2',
      dict(positions='rotary', rope_local_base=5.0, global_layer_period=2),
      'global_layer_period, first_window_layer and rope_local_base need',
    ),
    (
      'gpt2',
      dict(first_window_layer=1),
      'first_window_layer and rope_local_base need sliding_window',
    ),
    ('gpt2', dict(pre_norm=False), 'pre_norm=False needs post_norm'),
    ('gpt2', dict(qk_norm_all_heads=True), 'needs qk_norm'),
    ('gpt2', dict(no_rope_period=2), "no_rope_period needs positions='rotary'"),
    # Either would build a model that cannot tell the order of its tokens.
    ('gpt2', dict(positions='relative'), "'relative'.*decoder-only.*'learned'"),
    (
      't5_1_0',
      dict(positions='learned', max_positions=24),
      "'learned'.*encoder-decoder.*'relative'",
    ),
  ],
)
def test_configs_that_mean_nothing_are_refused(slm, changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(helpers.SLMS[slm], **changes)


def test_a_config_survives_json():
  for config in (helpers.SLMS | helpers.FAMILIES).values():
    fields = json.loads(json.dumps(config.to_json()))
    assert config_lib.TransformerConfig(**fields) == config
    assert hash(config_lib.TransformerConfig(**fields)) == hash(config)
