# SPDX-License-Identifier: Apache-2.0
"""Laws of a training step: what it sums, what it changes, what it leaves."""

import dataclasses
import functools
import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2s_jax.models import losses
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters
from l2s_jax.training import (
  checkpoint,
  eval_plan,
  microbatches,
  optim,
  resuming,
  train_step,
)
from l2s_jax.training import state as state_lib

SGD = optax.sgd(1.0)  # the update is the gradient


@functools.partial(jax.jit, static_argnames=('module', 'optimizer'))
def step(state, frozen, batch, *, module, optimizer=SGD):
  return train_step.train_step(
    state, frozen, batch, module=module, optimizer=optimizer
  )


def start(module, frozen=('llm',), optimizer=SGD, seed=0):
  """Returns the frozen parameters and the state before the first step."""
  frozen, trainable = parameters.split(helpers.random_params(module), frozen)
  return frozen, state_lib.create(trainable, optimizer, seed)


@pytest.fixture(scope='module')
def plain():
  """Returns LLM-to-SLM without dropout, and a batch."""
  module = helpers.llm_to_slm('gpt2', 'add', 'foreign')
  return module, helpers.batch_for(module)


@pytest.fixture(scope='module')
def dropping():
  """Returns a small model with dropout, and a batch."""
  config = dataclasses.replace(helpers.GPT2, dropout_rate=0.3)
  module = helpers.MODULES['gpt2'].clone(config=config)
  return module, helpers.random_batch()


def assert_trees_close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    helpers.assert_close(x, y)


def test_the_gradient_is_that_of_the_mean_over_target_tokens(plain):
  module, batch = plain
  frozen, state = start(module)

  def mean_nats(trainable):
    logits = helpers.logits(module, frozen | trainable, batch)
    chosen = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch['decoder_target_tokens'][..., None], -1
    )[..., 0]
    # 6 + 2 + 4 + 1 target tokens.
    return -jnp.sum(chosen * batch['decoder_segment_ids']) / 13

  mean, grads = jax.jit(jax.value_and_grad(mean_nats))(state.trainable)
  new_state, sums = step(state, frozen, batch, module=module)
  assert_trees_close(
    jax.tree.map(jnp.subtract, state.trainable, new_state.trainable), grads
  )
  assert new_state.step == 1
  assert sums['loss_weight'] == 13
  np.testing.assert_allclose(sums['loss'] / 13, mean, rtol=1e-5)
  np.testing.assert_allclose(
    sums['grad_norm'],
    np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads))),
    rtol=1e-5,
  )


def test_sums_of_halves_are_the_sums_of_the_batch(plain):
  module, batch = plain
  frozen, state = start(module)
  _, whole = step(state, frozen, batch, module=module)
  halves = [
    step(
      state,
      frozen,
      {key: value[rows] for key, value in batch.items()},
      module=module,
    )[1]
    for rows in (slice(0, 2), slice(2, 4))
  ]
  for name in ('loss', 'loss_weight', 'num_correct'):
    np.testing.assert_allclose(
      halves[0][name] + halves[1][name], whole[name], rtol=1e-5
    )


def test_rows_of_weight_zero_change_nothing(plain):
  module, batch = plain
  frozen, state = start(module)
  expected, _ = step(state, frozen, batch, module=module)
  # What a short batch is filled up with: its last row, at weight 0.
  filled = {
    key: jnp.concatenate([value, value[-1:], value[-1:]])
    for key, value in batch.items()
  }
  weights = filled['decoder_loss_weights'].at[4:].set(0)
  found, sums = step(
    state, frozen, filled | {'decoder_loss_weights': weights}, module=module
  )
  assert sums['loss_weight'] == 13
  assert_trees_close(found.trainable, expected.trainable)

  nothing = {**batch, 'decoder_loss_weights': jnp.zeros((4, 6))}
  found, sums = step(state, frozen, nothing, module=module)
  helpers.assert_trees_equal(found.trainable, state.trainable)
  assert sums['loss_weight'] == sums['loss'] == sums['grad_norm'] == 0


@pytest.mark.parametrize(
  'slm, injection, vocabulary',
  [('t5_1_0', 'add', 'shared'), ('gpt2', 'add', 'foreign')],
)
def test_training_changes_every_trainable_leaf_and_no_frozen_one(
  slm, injection, vocabulary
):
  module = helpers.llm_to_slm(slm, injection, vocabulary)
  optimizer = optim.adamw(0.01).make({})
  frozen, state = start(module, optimizer=optimizer)
  before = jax.tree.map(np.array, (frozen, state.trainable))
  for seed in range(2):
    state, _ = step(
      state,
      frozen,
      helpers.batch_for(module, seed=seed),
      module=module,
      optimizer=optimizer,
    )
  helpers.assert_trees_equal(frozen, before[0])
  assert set(state.trainable) | {'llm'} == set(helpers.random_params(module))
  unchanged = [
    jax.tree_util.keystr(path)
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(before[1]),
      jax.tree.leaves(state.trainable),
      strict=True,
    )
    if np.array_equal(a, b)
  ]
  # A bias on keys moves all logits of a query alike: its gradient is zero but
  # for rounding, which Adam may or may not blow up.
  assert [name for name in unchanged if 'key' not in name] == []


def test_the_optimizer_has_no_slot_for_what_is_frozen(plain):
  module, _ = plain
  frozen, state = start(module, optimizer=optim.adamw().make({}))
  paths = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  ]
  assert not any("'llm'" in path for path in paths)
  assert any("'slm'" in path for path in paths)
  trained = parameters.num_params(state.trainable)
  slots = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  assert slots == 2 * trained  # two moments


def shapes_computed(jaxpr):
  """Returns the shapes of all that a program computes, loops included."""
  shapes = set()
  for equation in jaxpr.eqns:
    shapes |= {v.aval.shape for v in equation.outvars}
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        shapes |= shapes_computed(inner)
  return shapes


def test_no_gradient_of_the_llm_is_computed(plain):
  """Nothing shaped like a stack of its kernels comes out of the step."""
  module, batch = plain
  layers = helpers.random_params(module)['llm']['encoder']['layers']
  kernels = {leaf.shape for leaf in jax.tree.leaves(layers) if leaf.ndim > 2}
  assert (3, 24, 40) in kernels  # its first MLP kernel: layers, embed, mlp

  def program(frozen_names):
    frozen, state = start(module, frozen_names)
    return shapes_computed(
      jax.make_jaxpr(
        functools.partial(train_step.train_step, module=module, optimizer=SGD)
      )(state, frozen, batch).jaxpr
    )

  # Were it trained, all of them would.
  assert kernels <= program(())
  assert kernels.isdisjoint(program(('llm',)))


def test_what_is_not_trained_has_no_gradient_and_keeps_its_bits(plain):
  """The SLM, where its rate is 0 and while the projector is alone."""
  module, batch = plain
  by_rate = optim.adamw(0.1, learning_rate_by_path={'slm/.*': 0.0})
  waiting = optim.adamw(0.1, weight_decay=0.1, projector_steps=2)
  # Gradients of the SLM's MLP and of its embedding table.
  of_slm = {'16,32', '32,16', '264,16'}
  for optimizer, step_number, is_held in (
    (by_rate, 9, True),
    (waiting, 1, True),
    (waiting, 2, False),
  ):
    transform = optimizer.make(axes_of(module))
    frozen, state = start(module, optimizer=transform)
    take = train_step.StepSettings(1, 0.0, 0.0).make(
      module, transform, trained_at(optimizer, step_number)
    )
    compiled = jax.jit(take).lower(state, frozen, batch).compile()
    products = re.findall(
      r'= f32\[([\d,]*)\]\S* dot\(', compiled.as_text() or ''
    )
    assert of_slm.isdisjoint(products) == is_held
    assert is_held or of_slm <= set(products)
    before = jax.tree.map(np.array, state.trainable)
    state, sums = compiled(state, frozen, batch)
    if is_held:
      helpers.assert_trees_equal(state.trainable['slm'], before['slm'])
    for name in ('projector', 'prompt_embedder'):
      for a, b in zip(
        jax.tree.leaves(before[name]),
        jax.tree.leaves(state.trainable[name]),
        strict=True,
      ):
        assert not np.array_equal(a, b)
    assert sums['grad_norm'] > 0


def trained_at(optimizer, step_number):
  return lambda path: optimizer.is_trained(path, step_number)


def axes_of(module):
  """Returns axes of what is trained, as optimizers take them."""
  _, trainable = parameters.split(helpers.param_shapes(module), ('llm',))
  return jax.tree.map(lambda _: jax.sharding.PartitionSpec(), trainable)


def test_dropout_differs_by_step_and_key_and_by_nothing_else(dropping):
  module, batch = dropping
  frozen, state = start(module)

  def loss(state):
    return float(step(state, frozen, batch, module=module)[1]['loss'])

  assert loss(state) == loss(state)
  later = state.replace(step=state.step + 1)
  other = state.replace(key=jax.random.key_data(jax.random.key(1)))
  assert len({loss(state), loss(later), loss(other)}) == 3
  # Off, it is the plain loss.
  logits = helpers.logits(module, state.trainable, batch)
  plain, _ = losses.token_cross_entropy(
    logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
  )
  assert abs(loss(state) - float(plain)) > 1e-2


def test_two_steps_from_a_restored_state_are_those_of_an_uninterrupted_run(
  dropping, tmp_path
):
  module, _ = dropping
  schedule = optim.learning_rate_schedule(0.01, warmup_steps=3)
  optimizer = optim.adamw(schedule, weight_decay=0.1).make({})
  frozen, state = start(module, optimizer=optimizer)

  def advance(state, seeds):
    sums = {}
    for seed in seeds:
      state, sums = step(
        state,
        frozen,
        helpers.random_batch(seed=seed),
        module=module,
        optimizer=optimizer,
      )
    return state, sums

  checkpointer = checkpoint.Checkpointer(tmp_path)
  state, _ = advance(state, range(2))
  checkpointer.save(state, {'batches': 2})
  expected, expected_sums = advance(state, range(2, 4))
  checkpointer.close()

  checkpointer = checkpoint.Checkpointer(tmp_path)
  restored = checkpointer.restore(
    jax.eval_shape(lambda: state), jax.tree.map(lambda x: x.sharding, state)
  )
  assert checkpointer.restore_data() == {'batches': 2}
  checkpointer.close()
  assert restored is not None
  helpers.assert_trees_equal(restored, state)
  found, sums = advance(restored, range(2, 4))
  helpers.assert_trees_equal(found, expected)
  helpers.assert_trees_equal(sums, expected_sums)


def test_a_run_that_has_no_checkpoint_starts_from_its_seed(tmp_path):
  """`restore_or_create`: fresh, then what was saved, on any seed."""
  module = helpers.MODULES['gpt2']
  system = helpers.system(module)
  config = partitioning.MeshConfig()
  mesh = partitioning.make_mesh(config, jax.devices()[:1])
  optimizer = optim.adamw().make({})
  with partitioning.use_mesh(mesh):
    layout = parameters.layout(system, mesh, config)
    checkpointer = checkpoint.Checkpointer(tmp_path)

    def state_of(seed):
      return resuming.restore_or_create(
        system, layout, optimizer, mesh, checkpointer, seed
      )

    state = state_of(0)
    assert state.step == 0
    helpers.assert_trees_equal(state, state_of(0))
    other = state_of(1)
    table = ('token_embedder', 'embedding')
    assert (
      state.trainable[table[0]][table[1]] != other.trainable[table[0]][table[1]]
    ).any()
    assert (state.key != other.key).any()

    state = state.replace(step=state.step + 5)
    checkpointer.save(state, {'batches': 5})
    checkpointer.wait()
    restored = state_of(1)
    helpers.assert_trees_equal(restored, state)
    checkpointer.close()


# --- splitting and merging parameters ---


def test_split_and_merge_are_inverse():
  params = {'llm': {'a': 1}, 'slm': {'b': {'c': 2}}, 'projector': {'d': 3}}
  frozen, trainable = parameters.split(params, ('llm',))
  assert frozen == {'llm': {'a': 1}} and 'llm' not in trainable
  assert parameters.merge(frozen, trainable) == params
  assert parameters.split(params, ()) == ({}, params)


def test_merge_joins_by_path_and_refuses_a_path_twice():
  merged = parameters.merge({'slm': {'a': 1}}, {'slm': {'b': 2}})
  assert merged == {'slm': {'a': 1, 'b': 2}}
  with pytest.raises(ValueError, match="'a'"):
    parameters.merge({'slm': {'a': 1}}, {'slm': {'a': 2}})
  with pytest.raises(ValueError, match="'slm'"):
    parameters.merge({'slm': 1}, {'slm': {'a': 2}})


# --- microbatches ---


@pytest.mark.parametrize('num_microbatches', [2, 4])
def test_microbatches_add_up_to_the_whole_batch(plain, num_microbatches):
  """Weights differ between rows, so that means of means would not do."""
  module, batch = plain
  assert len(set(batch['decoder_loss_weights'].sum(1).tolist())) > 1
  optimizer = optax.sgd(0.1)

  def step(num_microbatches):
    frozen, state = start(module, optimizer=optimizer)
    return jax.jit(
      functools.partial(
        train_step.train_step,
        module=module,
        optimizer=optimizer,
        num_microbatches=num_microbatches,
      )
    )(state, frozen, batch)

  whole, whole_sums = step(1)
  parts, parts_sums = step(num_microbatches)
  for name, value in whole_sums.items():
    np.testing.assert_allclose(parts_sums[name], value, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(whole.trainable),
    jax.tree.leaves(parts.trainable),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_each_microbatch_has_its_own_key():
  key = jax.random.key(0)
  rows = {'x': jnp.ones((4, 3))}
  total = microbatches.add_up(
    lambda batch, key: {
      'drawn': jax.random.uniform(key),
      'rows': batch['x'].sum(),
    },
    rows,
    key,
    2,
  )
  assert total['rows'] == 12
  one, two = (jax.random.uniform(k) for k in jax.random.split(key, 2))
  assert one != two
  np.testing.assert_allclose(total['drawn'], one + two, rtol=1e-6)


# --- settings that do not fit ---


RUN = pathlib.Path('runs/mine')


def test_another_order_of_the_data_is_refused_with_the_differences():
  order = {'task': 'cldr', 'seed': 0, 'task_feature_lengths': {'inputs': 8}}
  position = order | {'num_rows': 32, 'sums': {'loss': 1.0}}
  assert resuming.check_position(position, order, RUN) == position
  assert resuming.check_position(None, order, RUN) == {
    'num_rows': 0,
    'sums': {},
    'clock': None,
  }
  with pytest.raises(ValueError) as error:
    resuming.check_position(
      position,
      order | {'task': 'wmt16_en_de', 'task_feature_lengths': {'inputs': 16}},
      RUN,
    )
  assert str(error.value).startswith('runs/mine contains a run')
  assert str(error.value).splitlines()[1:] == [
    "  task: the run has 'cldr', the config says 'wmt16_en_de'",
    '  task_feature_lengths.inputs: the run has 8, the config says 16',
  ]


def test_the_best_is_chosen_on_validation_data_only():
  def find(best_metric, split):
    run = eval_plan.Planned('cldr', split, None, None, {})
    return eval_plan.make([], run, best_metric).best

  assert find('bleu', 'validation') == ('', 'bleu')
  assert find(None, 'test') is None
  with pytest.raises(ValueError, match="BEST_METRIC='bleu'.*EVAL_STEPS='best'"):
    find('bleu', 'test')
