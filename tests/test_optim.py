# SPDX-License-Identifier: Apache-2.0
"""Laws of optimizers and schedules, against values worked by hand."""

import contextlib
import json

import gin
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from l2s_jax.runtime import gin_config
from l2s_jax.training import checkpoint, optim, train
from l2s_jax.training import state as state_lib

WARM = 'constant * linear_warmup'


# By the index of an update, which is its number less one.
@pytest.mark.parametrize(
  'options, expected',
  [
    (dict(factors='constant'), {0: 2.0, 99: 2.0}),
    (dict(), {0: 2.0, 99: 2.0}),
    (dict(warmup_steps=4), {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 99: 2.0}),
    (
      dict(warmup_steps=4, factors=f'{WARM} * rsqrt_decay'),
      {0: 0.25, 3: 1.0, 15: 0.5, 99: 0.2},
    ),
    (
      dict(warmup_steps=4, factors=f'{WARM} * rsqrt_normalized_decay'),
      {0: 0.5, 3: 2.0, 4: 2 * (4 / 5) ** 0.5, 15: 1.0},
    ),
    (
      dict(factors='constant*rsqrt_normalized_decay'),
      {0: 2.0, 3: 1.0, 99: 0.2},
    ),
    (
      dict(factors='constant * decay_every', steps_per_decay=10),
      {0: 2.0, 8: 2.0, 9: 1.0, 18: 1.0, 19: 0.5, 29: 0.25},
    ),
    # After the warm-up from 1 to 0 in 8 updates, then from 1 again.
    (
      dict(warmup_steps=2, factors=f'{WARM} * cosine_decay', steps_per_cycle=8),
      {0: 1.0, 1: 2.0, 3: 1 + 0.5**0.5, 5: 1.0, 7: 1 - 0.5**0.5, 9: 2.0},
    ),
    (
      dict(warmup_steps=2, factors='linear_decay', decay_factor=0.25),
      {0: 1.0, 1: 2.0, 2: 1.5, 4: 0.5, 5: 0.0, 9: 0.0},
    ),
    (
      dict(warmup_steps=2, factors=f'{WARM} * linear_to_end', total_steps=10),
      {0: 1.0, 1: 2.0, 2: 2.0, 3: 1.75, 6: 1.0, 9: 0.25, 10: 0.0, 20: 0.0},
    ),
    (
      dict(warmup_steps=2, factors=f'{WARM} * cosine_to_end', total_steps=10),
      {0: 1.0, 1: 2.0, 4: 1 + 0.5**0.5, 6: 1.0, 10: 0.0, 20: 0.0},
    ),
    (
      dict(factors='linear_decay', decay_factor=0.25, min_learning_rate=0.75),
      {0: 2.0, 1: 1.5, 2: 1.0, 3: 0.75, 99: 0.75},
    ),
  ],
)
def test_schedules_at_steps_worked_by_hand(options, expected):
  schedule = optim.learning_rate_schedule(2.0, **options)
  for step, value in expected.items():
    np.testing.assert_allclose(schedule(step), value, atol=1e-6, err_msg=step)
    np.testing.assert_allclose(schedule(jnp.int32(step)), value, atol=1e-6)


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(factors='constant * step'), "'step' is not one of .*rsqrt_decay"),
    (dict(factors='constant, linear_warmup'), "Join them with '\\*'"),
    (
      dict(factors='linear_to_end'),
      "'linear_to_end' needs total_steps .*total_steps=None",
    ),
    (
      dict(factors='cosine_to_end', warmup_steps=9, total_steps=9),
      'warmup_steps=9; got total_steps=9',
    ),
    (
      dict(factors='constant * linear_decay'),
      "'linear_decay' includes the base rate",
    ),
  ],
)
def test_schedules_that_mean_nothing_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    optim.learning_rate_schedule(**options)


PARAMS = {
  'layer': {'kernel': jnp.array([2.0]), 'bias': jnp.array([2.0])},
  'norm': {'scale': jnp.array([2.0])},
  'embedder': {'embedding': jnp.array([2.0])},
}


AXES = jax.tree.map(lambda _: PartitionSpec('embed'), PARAMS)
OPTIMIZERS = [optim.adamw, optim.adafactor, optim.lion]


def updated(optimizer, grads, num_steps=1, params=PARAMS):
  transform = optimizer.make(AXES)
  state = transform.init(params)
  for _ in range(num_steps):
    updates, state = transform.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def constant_grads(value):
  return {
    name: {leaf: jnp.array([value]) for leaf in leaves}
    for name, leaves in PARAMS.items()
  }


@pytest.mark.parametrize('make', OPTIMIZERS)
def test_kernels_and_embeddings_decay_and_nothing_else(make):
  params = updated(make(0.5, weight_decay=0.1), constant_grads(0.0))
  assert params['layer']['kernel'] == pytest.approx(2 - 0.5 * 0.1 * 2)
  assert params['embedder']['embedding'] == pytest.approx(1.9)
  assert params['layer']['bias'] == 2
  assert params['norm']['scale'] == 2


def test_two_steps_of_adamw_against_numpy():
  b1, b2, epsilon, decay, rate = 0.9, 0.99, 1e-3, 0.1, 0.5
  optimizer = optim.adamw(
    rate, b1, b2, epsilon, weight_decay=decay, max_grad_norm=None
  )
  found = updated(optimizer, constant_grads(3.0), num_steps=2)
  w = mean = variance = 0.0
  w = 2.0
  for step in (1, 2):
    mean = b1 * mean + (1 - b1) * 3.0
    variance = b2 * variance + (1 - b2) * 9.0
    corrected = variance / (1 - b2**step)
    direction = mean / (1 - b1**step) / (corrected**0.5 + epsilon)
    w -= rate * (direction + decay * w)
  np.testing.assert_allclose(found['layer']['kernel'], [w], rtol=1e-5)


def test_two_steps_of_lion_by_hand():
  optimizer = optim.lion(0.5, b1=0.5, b2=0.75, max_grad_norm=None)
  assert updated(optimizer, constant_grads(3.0))['norm']['scale'] == 1.5
  # The momentum is 0.25 * 3 = 0.75; half of it and half of -0.5 is positive.
  transform = optimizer.make(AXES)
  state = transform.init(PARAMS)
  _, state = transform.update(constant_grads(3.0), state, PARAMS)
  updates, _ = transform.update(constant_grads(-0.5), state, PARAMS)
  assert updates['norm']['scale'] == -0.5
  updates, _ = transform.update(constant_grads(-1.0), state, PARAMS)
  assert updates['norm']['scale'] == 0.5


# Four numbers of 3 have the norm 6; the slots see what is left of them.
@pytest.mark.parametrize(
  'make, slot, expected',
  [
    (optim.adamw, 'mu', lambda grad: 0.1 * grad),
    (optim.lion, 'mu', lambda grad: 0.01 * grad),
    (optim.adafactor, 'slots', lambda grad: grad**2),
  ],
)
@pytest.mark.parametrize(
  'max_grad_norm, grad, clipped', [(1.0, 3, 0.5), (None, 3, 3), (1.0, 0.3, 0.3)]
)
def test_the_global_norm_is_clipped_and_small_gradients_are_not(
  make, slot, expected, max_grad_norm, grad, clipped
):
  transform = make(max_grad_norm=max_grad_norm).make(AXES)
  state = transform.init(PARAMS)
  _, state = transform.update(constant_grads(float(grad)), state, PARAMS)
  (found,) = jax.tree.leaves(
    optax.tree_utils.tree_get(state, slot)['norm']['scale']
  )
  np.testing.assert_allclose(found, [expected(clipped)], rtol=1e-5)


def test_the_schedule_is_the_one_inside():
  schedule = optim.learning_rate_schedule(1.0, warmup_steps=4)
  optimizer = optim.adamw(schedule, epsilon=0.0, max_grad_norm=None)
  # With epsilon 0 the first step of Adam is the learning rate itself.
  found = updated(optimizer, constant_grads(5.0))
  np.testing.assert_allclose(found['norm']['scale'], [2 - 0.25], rtol=1e-6)
  assert optimizer.schedule(0) == 0.25
  assert optim.adamw(0.125).schedule(7) == 0.125


@pytest.mark.parametrize('make', OPTIMIZERS)
def test_learning_rates_by_path(make):
  by_path = {'norm/.*': 0.0, 'layer/bias': 3.0, 'layer/.*': 0.5}
  options = dict(weight_decay=0.1)
  grads = constant_grads(0.1)
  plain = updated(make(0.1, **options), grads, num_steps=1)
  found = updated(
    make(0.1, learning_rate_by_path=by_path, **options), grads, num_steps=1
  )

  def moved(params):
    return jax.tree.map(lambda a, b: float((a - b)[0]), params, PARAMS)

  plain, found = moved(plain), moved(found)
  assert found['norm']['scale'] == 0
  for multiple, names in {
    3.0: ('layer', 'bias'),  # by the first pattern that matches
    0.5: ('layer', 'kernel'),
    1.0: ('embedder', 'embedding'),  # by none
  }.items():
    expected = multiple * plain[names[0]][names[1]]
    assert found[names[0]][names[1]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('make', OPTIMIZERS)
def test_what_has_the_rate_0_keeps_its_bits_and_has_no_part(make):
  frozen = {'(layer|norm)/.*': 0.0}
  optimizer = make(0.1, learning_rate_by_path=frozen, max_grad_norm=1.0)
  # Gradients of what is frozen count neither in the norm nor as numbers.
  grads = constant_grads(0.1) | {'norm': {'scale': jnp.array([jnp.nan])}}
  found = updated(optimizer, grads, num_steps=3)
  for name in ('layer', 'norm'):
    jax.tree.map(np.testing.assert_array_equal, found[name], PARAMS[name])

  def alone(tree):
    return {'embedder': tree['embedder']}

  transform = make(0.1, max_grad_norm=1.0).make(alone(AXES))
  params, state = alone(PARAMS), transform.init(alone(PARAMS))
  for _ in range(3):
    updates, state = transform.update(alone(grads), state, params)
    params = optax.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, alone(found), params)
  # And it has no slots.
  whole = optimizer.make(AXES).init(PARAMS)
  shapes = [[x.shape for x in jax.tree.leaves(s)] for s in (whole, state)]
  assert shapes[0] == shapes[1]


@pytest.mark.parametrize('make', OPTIMIZERS)
def test_what_waits_for_the_projector_begins_as_at_a_first_step(make):
  """And the projector does not notice."""
  params = {
    'projector': {'bias': jnp.full(3, 2.0)},
    'slm': {'kernel': jnp.full(3, 2.0)},
  }
  axes = jax.tree.map(lambda x: PartitionSpec('embed'), params)
  generator = np.random.default_rng(0)
  gradients = [
    jax.tree.map(
      lambda x: jnp.asarray(generator.normal(size=3), jnp.float32), params
    )
    for _ in range(5)
  ]
  schedule = optim.learning_rate_schedule(0.1, 'rsqrt_decay')

  def run(optimizer, gradients, names):
    tree = {name: params[name] for name in names}
    transform = optimizer.make({name: axes[name] for name in names})
    state = transform.init(tree)
    for gradient in gradients:
      updates, state = transform.update(
        {name: gradient[name] for name in names}, state, tree
      )
      tree = optax.apply_updates(tree, updates)
    return tree

  options = dict(max_grad_norm=None)
  found = run(
    make(schedule, projector_steps=2, **options), gradients, params.keys()
  )
  alone = run(make(schedule, **options), gradients, ['projector'])
  later = run(
    make(lambda step: schedule(step + 2), **options), gradients[2:], ['slm']
  )
  jax.tree.map(np.testing.assert_array_equal, found, alone | later)


def test_a_model_without_projector_has_no_projector_steps():
  with pytest.raises(ValueError, match='PROJECTOR_STEPS=3: .* Set it to 0'):
    optim.adamw(projector_steps=3).make(AXES)
  with pytest.raises(ValueError, match='PROJECTOR_STEPS=-1: expected a number'):
    optim.adamw(projector_steps=-1)


@pytest.mark.parametrize(
  'by_path, message',
  [
    # A pattern is of the whole path.
    ({'layer': 2.0}, "'layer' has no effect.*\n  embedder/embedding\n"),
    ({'l.*': 2.0, 'layer/.*': 1.0}, "'layer/.\\*' has no effect"),
    ({'(': 2.0}, r"'\(' is not a regular expression"),
    ({'layer/.*': -1.0}, "'layer/.\\*' has -1.0; expected a factor"),
  ],
)
def test_rates_by_path_that_fit_nothing_are_refused(by_path, message):
  with pytest.raises(ValueError, match=message):
    optim.adamw(learning_rate_by_path=by_path).make(AXES)


@pytest.mark.parametrize('make', OPTIMIZERS)
def test_rate_clipping_and_decay_may_change_within_a_run(make):
  """The state is built alike, and the description is the same."""
  plain = make()
  other = make(
    optim.learning_rate_schedule(warmup_steps=5),
    weight_decay=0.1,
    max_grad_norm=None if make is not optim.adafactor else 1.0,
    learning_rate_by_path={'layer/.*': 3.0},
  )
  assert plain.description == other.description
  helpers.assert_trees_equal(
    plain.make(AXES).init(PARAMS), other.make(AXES).init(PARAMS)
  )


def test_descriptions_tell_optimizers_apart():
  descriptions = [
    optim.adamw().description,
    optim.adamw(b2=0.99).description,
    optim.adamw(learning_rate_by_path={'norm/.*': 0.0}).description,
    optim.adamw(
      learning_rate_by_path={'norm/scale': 1.0, 'norm/.*': 0.0}
    ).description,
    optim.adamw(projector_steps=5).description,
    optim.adafactor().description,
    optim.adafactor(min_dim_size_to_factor=1).description,
    optim.lion().description,
  ]
  assert len({json.dumps(d, sort_keys=True) for d in descriptions}) == 8


@pytest.fixture
def clear_gin():
  yield
  gin.clear_config()


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion'])
def test_a_run_names_its_optimizer_and_its_rates(name, clear_gin):
  gin_config.parse_config(
    ['gin_configs/runs/train.gin'],
    [
      f'OPTIMIZER=@{name}()',
      'LEARNING_RATE=0.1',
      'LEARNING_RATE_FACTORS=constant * linear_warmup',
      'WARMUP_STEPS=4',
      "LEARNING_RATE_BY_PATH={'norm/.*': 0.5}",
      # What the run's model and task would bind.
      'MODEL=@language_model_system()',
      'MODEL_DIR=any',
      'MIXTURE_OR_TASK_NAME=any',
      'TASK_FEATURE_LENGTHS={}',
    ],
  )
  bound = gin.get_bindings(train.train, resolve_references=False)
  optimizer = bound['optimizer'].scoped_configurable_fn()
  assert optimizer.description['name'] == name
  assert optimizer.schedule(0) == pytest.approx(0.025)
  found = updated(optimizer, constant_grads(0.1))
  moved = PARAMS['norm']['scale'] - found['norm']['scale']
  full = PARAMS['embedder']['embedding'] - found['embedder']['embedding']
  np.testing.assert_allclose(moved, 0.5 * full, rtol=1e-4)


@pytest.mark.parametrize('make', OPTIMIZERS)
def test_updates_after_a_restart_are_those_without_it(make, tmp_path):
  """Slots that are missing, or means, are saved like any other."""
  optimizer = make(0.1, learning_rate_by_path={'w1': 0.0, 'w2': 2.0})
  generator = np.random.default_rng(0)
  axes = PartitionSpec('layers', 'embed', 'mlp')
  params, *grads = (
    {
      name: jnp.asarray(generator.normal(size=(2, 3, 4)), jnp.float32)
      for name in ('w1', 'w2', 'w3')
    }
    for _ in range(4)
  )
  transform = optimizer.make(dict.fromkeys(params, axes))

  def after(state, grads):
    for grad in grads:
      updates, opt_state = transform.update(
        grad, state.opt_state, state.trainable
      )
      state = state.replace(
        step=state.step + 1,
        trainable=optax.apply_updates(state.trainable, updates),
        opt_state=opt_state,
      )
    return state

  state = after(state_lib.create(params, transform, 0), grads[:1])
  with contextlib.closing(checkpoint.Checkpointer(tmp_path)) as checkpointer:
    checkpointer.save(state, {})
    checkpointer.wait()
    restored = checkpointer.restore(
      jax.eval_shape(lambda: state), jax.tree.map(lambda x: x.sharding, state)
    )
  assert restored is not None
  helpers.assert_trees_equal(
    after(restored, grads[1:]), after(state, grads[1:])
  )
  np.testing.assert_array_equal(restored.trainable['w1'], params['w1'])
