# SPDX-License-Identifier: Apache-2.0
"""T5X trains, decodes and saves LLM-to-SLM as we do.

Needs T5X; requirements-t5x.txt says which.
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_runs
from flax import traverse_util

from l2s_jax.data.features import tf
from l2s_jax.interop import t5x_state
from l2s_jax.models import losses
from l2s_jax.systems import parameters
from l2s_jax.training import optim
from l2s_jax.weights import saved_steps

for name in ('t5x', 't5x.train'):
  pytest.importorskip(
    name,
    reason='T5X is not importable: see requirements-t5x.txt',
    exc_type=ImportError,
  )

from t5x import (  # noqa: E402
  adafactor,
  checkpoints,
  decoding,
  partitioning,
  train_state,
  trainer,
  utils,
)

from l2s_jax.interop import t5x as l2s_t5x  # noqa: E402

RATE = 1e-2


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Returns a run of ours with its layout and state, and T5X's of it."""
  folder = tmp_path_factory.mktemp('t5x_partner')
  layout, state = t5x_runs.save(
    folder / 'run', t5x_runs.build(dropout_rate=0.0), optim.adafactor()
  )
  t5x_state.write(folder / 'run', folder / 't5x', t5x_runs.STEP)
  return folder, layout, state


@pytest.fixture(scope='module')
def partitioner():
  found = partitioning.PjitPartitioner(
    num_partitions=2,
    logical_axis_rules=partitioning.standard_logical_axis_rules(
      additional_rules=[('kv_heads', None), ('llm_embed', None)]
    ),
  )
  # On CPU T5X puts all devices of a process along `model`.
  devices = np.asarray(jax.devices()).reshape(4, 2)
  found.mesh = jax.sharding.Mesh(devices, ('data', 'model'))
  return found


@pytest.fixture(scope='module')
def batch():
  return helpers.random_batch(
    120, 120, prompt_lengths=(5, 3, 7, 2) * 2, answer_lengths=(6, 2, 4, 1) * 2
  )


def make_model(folder, decode_fn=decoding.beam_search):
  return l2s_t5x.LlmToSlmModel(
    str(folder / 'run'),
    adafactor.Adafactor(logical_factor_rules=l2s_t5x.logical_factor_rules()),
    decode_fn=decode_fn,
    loss_normalizing_factor='NUM_REAL_TARGET_TOKENS',
    dropout_rate=0.0,
  )


@pytest.fixture(scope='module')
def restored(run, partitioner, batch, tmp_path_factory):
  """Returns T5X's model, its state as T5X reads it, and how it is laid out."""
  model = make_model(run[0])
  initializer = utils.TrainStateInitializer(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes={key: x.shape for key, x in batch.items()},
    partitioner=partitioner,
  )
  path = run[0] / 't5x' / f'checkpoint_{t5x_runs.STEP}'
  config = utils.RestoreCheckpointConfig(
    str(path), mode='specific', dtype='float32'
  )
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer,
    partitioner,
    config,
    str(path),
    jax.random.PRNGKey(0),
    model_dir=str(tmp_path_factory.mktemp('model_dir')),
    use_orbax=True,
  )
  return model, state, initializer.train_state_axes


def flat(tree):
  return traverse_util.flatten_dict(
    jax.device_get(jax.tree.map(lambda x: x, dict(tree))), sep='/'
  )


@pytest.fixture(scope='module')
def whole(run):
  """Returns all parameters as our training has them."""
  folder, layout, state = run
  _, frozen = parameters.load_frozen(t5x_runs.build(), layout)
  return frozen, state.trainable


def test_t5x_reads_what_was_written(run, restored, whole):
  _, state, _ = restored
  assert int(state.step) == t5x_runs.STEP
  params = state.state_dict()['target']
  helpers.assert_trees_equal(
    jax.device_get(params), jax.device_get({**whole[0], **whole[1]})
  )


def test_the_llm_has_no_optimizer_state(restored):
  assert set(restored[1].state_dict()['state']['param_states']) == {
    'projector',
    'slm',
  }


def test_the_llm_is_split_as_t5x_splits(restored):
  kernel = restored[1].params['llm']['encoder']['layers']['mlp']['wo']['kernel']
  assert not kernel.sharding.is_fully_replicated


def loss_of(module, frozen, trained, batch):
  logits = module.apply(
    {'params': {**frozen, **trained}}, batch, deterministic=True
  )
  loss, sums = losses.token_cross_entropy(
    logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
  )
  return loss / sums['loss_weight']


@pytest.fixture(scope='module')
def stepped(restored, partitioner, batch):
  """Returns the state of T5X after a step of its own."""
  model, state, axes = restored

  def step(state, batch):
    return trainer.train_with_lr(
      state, batch, jnp.float32(RATE), jax.random.PRNGKey(0), model, None
    )[0]

  compiled = partitioner.partition(
    step,
    in_axis_resources=(axes, partitioner.data_partition_spec),
    out_axis_resources=axes,
  )
  return partitioner.compile(compiled, state, batch)(state, batch)


def test_a_step_of_t5x_is_a_step_of_ours(run, stepped, whole, batch):
  _, layout, state = run
  frozen, trained = whole
  module = t5x_runs.build(dropout_rate=0.0).module
  grads = jax.jit(
    jax.grad(functools.partial(loss_of, module, frozen), argnums=0)
  )(trained, batch)
  axes = parameters.split(layout.axes, ('llm',))[1]
  transform = optim.adafactor(RATE).make(axes)
  updates, _ = transform.update(grads, state.opt_state, trained)
  expected = optax.apply_updates(trained, updates)
  found = stepped.state_dict()['target']
  for name, x in flat(expected).items():
    np.testing.assert_allclose(flat(found)[name], x, 1e-4, 1e-5, err_msg=name)
  assert int(stepped.step) == t5x_runs.STEP + 1
  helpers.assert_trees_equal(
    jax.device_get(found['llm']), jax.device_get(frozen['llm'])
  )


def test_we_go_on_from_what_t5x_saves(run, stepped, partitioner, tmp_path):
  manager = checkpoints.OrbaxCheckpointManagerInterface(
    str(tmp_path / 'saved' / 'checkpoint'), stepped, partitioner
  )
  manager.save(stepped)
  manager.wait_until_finished()
  manager.close()
  step = t5x_state.read(tmp_path / 'saved', run[0] / 'run', tmp_path / 'ours')
  assert step == t5x_runs.STEP + 1
  t5x_state.write(tmp_path / 'ours', tmp_path / 'again', step)
  content = saved_steps.read_data(tmp_path / 'ours' / 'checkpoints' / str(step))
  assert content['num_rows'] == 0
  for part in ('target', 'state'):
    theirs, ours = (
      t5x_state.t5x.open_part(tmp_path / name, None, (part,))[0]
      for name in ('saved', 'again')
    )
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
      np.testing.assert_array_equal(array.read(), ours[name].read(), name)


def test_scores_are_the_log_probabilities_of_answers(restored, whole, batch):
  model, state, _ = restored
  found = model.score_batch(state.params, batch)
  logits = helpers.logits(model.module, {**whole[0], **whole[1]}, batch)
  log_probs = jax.nn.log_softmax(logits)
  rows = jnp.arange(len(found))[:, None]
  columns = jnp.arange(log_probs.shape[1])
  tokens = log_probs[rows, columns, batch['decoder_target_tokens']]
  expected = (tokens * batch['decoder_loss_weights']).sum(-1)
  np.testing.assert_allclose(found, expected, 1e-4, 1e-4)


def test_the_likeliest_tokens_are_those_of_our_generator(run, whole, batch):
  greedy = functools.partial(decoding.temperature_sample, topk=1)
  model = make_model(run[0], greedy)
  params = {**whole[0], **whole[1]}
  found = jax.jit(model.predict_batch)(params, batch)
  vocabulary = model.output_vocabulary
  expected = helpers.generate(
    model.module,
    params,
    batch,
    max_decode_len=found.shape[1],
    start_id=vocabulary.start_id,
    eos_id=vocabulary.eos_id,
    pad_id=0,
  )
  width = expected.shape[1]
  np.testing.assert_array_equal(found[:, :width], expected)
  assert not found[:, width:].any()


def test_a_decoder_only_slm_with_its_own_vocabulary(tmp_path):
  system = t5x_runs.build(t5x_runs.DECODER_ONLY, dropout_rate=0.0)
  layout, state = t5x_runs.save(tmp_path / 'run', system, optim.adafactor())
  t5x_state.write(tmp_path / 'run', tmp_path / 't5x', t5x_runs.STEP)
  greedy = functools.partial(decoding.temperature_sample, topk=1)
  model = make_model(tmp_path, greedy)
  assert model.input_vocabulary != model.output_vocabulary

  def create(key):
    variables = model.get_initial_variables(key, {})
    return train_state.FlaxOptimTrainState.create(
      model.optimizer_def, variables
    )

  wanted = jax.eval_shape(create, jax.random.key(0)).state_dict()
  for part in ('target', 'state'):
    written, _ = t5x_state.t5x.open_part(tmp_path / 't5x', None, (part,))
    assert {name: x.shape for name, x in written.items()} == {
      name: x.shape
      for name, x in traverse_util.flatten_dict(wanted[part], sep='/').items()
    }
  params = {**parameters.load_frozen(system, layout)[1], **state.trainable}
  batch = helpers.random_batch(120, 300)
  found = jax.jit(model.predict_batch)(params, batch)
  expected = helpers.generate(
    model.module,
    params,
    batch,
    max_decode_len=found.shape[1],
    start_id=model.output_vocabulary.start_id,
    eos_id=model.output_vocabulary.eos_id,
    pad_id=0,
  )
  width = expected.shape[1]
  np.testing.assert_array_equal(found[:, :width], expected)
  loss, _ = model.loss_fn(params, batch, None)
  frozen = {'llm': params['llm']}
  ours = loss_of(model.module, frozen, state.trainable, batch)
  np.testing.assert_allclose(loss, ours, 1e-5)


def test_a_beam_has_the_score_of_its_answer(run, whole, batch):
  model = make_model(run[0], functools.partial(decoding.beam_search, alpha=0.0))
  params = {**whole[0], **whole[1]}
  decodes, aux = jax.jit(
    functools.partial(
      model.predict_batch_with_aux, num_decodes=3, return_all_decodes=True
    )
  )(params, batch)
  eos_id = model.output_vocabulary.eos_id
  for beam in range(3):
    ids = np.asarray(decodes[:, beam])
    ended = np.cumsum(ids == eos_id, axis=1) - (ids == eos_id) > 0
    start = np.full_like(ids[:, :1], model.output_vocabulary.start_id)
    answers = {
      'decoder_input_tokens': np.concatenate([start, ids[:, :-1]], axis=1),
      'decoder_target_tokens': ids,
      'decoder_segment_ids': (~ended).astype(np.int32),
      'decoder_loss_weights': (~ended).astype(np.float32),
    }
    scores = model.score_batch(
      params, {**batch, **jax.tree.map(jnp.asarray, answers)}
    )
    np.testing.assert_allclose(aux['scores'][:, beam], scores, 1e-3, 1e-3)


def test_a_prompt_for_the_answer_is_refused(run, whole, batch):
  model = make_model(run[0])
  with pytest.raises(ValueError, match='prompt_with_targets to False'):
    model.predict_batch_with_aux({}, batch, prompt_with_targets=True)
  with pytest.raises(ValueError, match='return_intermediates to False'):
    model.score_batch({}, batch, return_intermediates=True)


def test_an_export_reads_and_writes_texts_as_we_do(run):
  pytest.importorskip(
    'tensorflow_serving.apis',
    reason="T5X's export needs more: see requirements-t5x.txt",
  )
  folder = str(run[0] / 'run')
  found = l2s_t5x.output_features(folder)
  preprocess, _ = l2s_t5x.create_preprocessor(
    1, found, {'inputs': 40, 'targets': 8}
  )
  text = 'the cat sat'
  batch = preprocess(np.array([text]))
  vocabulary = found['inputs'].vocabulary
  ids = [*vocabulary.encode(text), vocabulary.eos_id]
  tokens = batch['encoder_input_tokens'].numpy()
  assert tokens.tolist() == [ids + [0] * (40 - len(ids))]
  segment_ids = batch['encoder_segment_ids'].numpy()
  np.testing.assert_array_equal(segment_ids, tokens != 0)
  answer = found['targets'].vocabulary
  written = answer.decode_tf(tf.constant([answer.encode(text)]))
  assert written.numpy().tolist() == [text.encode()]
