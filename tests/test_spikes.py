# SPDX-License-Identifier: Apache-2.0
"""Laws of SKIP_SPIKES: what is left out, and what is not."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_teachers
from jax.sharding import PartitionSpec

from l2s_jax.training import optim

AXES = {'slm': {'kernel': PartitionSpec(None), 'scale': PartitionSpec(None)}}
PARAMS = {'slm': {'kernel': jnp.ones(3), 'scale': jnp.ones(2)}}
PLAIN = optim.adamw(learning_rate=0.1, weight_decay=0.1, max_grad_norm=None)
RATIO = 10


def gradients(norm, seed=0):
  """Returns gradients with a global norm."""
  rng = np.random.default_rng(seed)
  grads = jax.tree.map(lambda x: rng.normal(size=x.shape), PARAMS)
  size = math.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(grads)))
  return jax.tree.map(lambda x: jnp.float32(x * norm / size), grads)


def run(optimizer, norms, state=None):
  """Returns the optimizer's state, and the updates of all steps."""
  transform = optimizer.make(AXES)
  state = transform.init(PARAMS) if state is None else state
  step = jax.jit(transform.update)
  updates = []
  for seed, norm in enumerate(norms):
    update, state = step(gradients(norm, seed), state, PARAMS)
    updates.append(update)
  return state, updates


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def skipping(ratio=RATIO):
  return optim.skip_spikes(PLAIN, ratio)


def test_without_spikes_updates_are_those_of_the_optimizer():
  norms = [1 + 0.5 * math.sin(n) for n in range(150)]
  state, updates = run(skipping(), norms)
  inner, expected = run(PLAIN, norms)
  assert_equal(updates, expected)
  assert_equal(state.inner, inner)
  assert state.num_skipped == 0


def test_an_update_that_is_left_out_leaves_no_trace():
  state, _ = run(skipping(), [1.0] * 120)
  after, (update,) = run(skipping(), [10.5], state)
  assert_equal(update, jax.tree.map(jnp.zeros_like, PARAMS))
  assert_equal(after.inner, state.inner)
  assert after.num_skipped == 1
  assert after.limit == pytest.approx(RATIO, rel=1e-4)
  # The next is that of a run which never saw the spike.
  assert_equal(
    run(skipping(), [1.0], after)[1], run(skipping(), [1.0], state)[1]
  )


@pytest.mark.parametrize('norm, is_skipped', [(9.5, False), (10.5, True)])
def test_the_limit_is_a_multiple_of_the_mean(norm, is_skipped):
  # Of norms of 1 and 3 in turn, the later ones with more weight.
  state, _ = run(skipping(RATIO / 2), [1.0, 3.0] * 60)
  after, _ = run(skipping(RATIO / 2), [norm], state)
  assert after.limit == pytest.approx(RATIO, rel=0.01)
  assert after.num_skipped == is_skipped


def test_a_short_history_leaves_nothing_out():
  state, _ = run(skipping(), [1.0] * 99 + [1e6])
  assert state.num_skipped == 0
  state, _ = run(skipping(), [1.0] * 100 + [1e6])
  assert state.num_skipped == 1


def test_lasting_growth_is_accepted():
  state, _ = run(skipping(), [1.0] * 120 + [50.0] * 40)
  assert 0 < state.num_skipped < 30
  after, _ = run(skipping(), [50.0] * 20, state)
  assert after.num_skipped == state.num_skipped


@pytest.mark.parametrize('norm', [math.inf, math.nan])
def test_gradients_that_are_not_finite_reach_the_optimizer(norm):
  state, _ = run(skipping(), [1.0] * 120)
  after, (update,) = run(skipping(), [norm], state)
  assert after.num_skipped == 0
  assert not np.isfinite(jax.tree.leaves(update)[0]).all()


def test_a_state_without_history_fits_no_other_optimizer():
  assert PLAIN.description != skipping().description
  with pytest.raises(ValueError, match=r'^SKIP_SPIKES=1: expected a number ab'):
    optim.skip_spikes(PLAIN, 1)


def test_a_run_that_was_broken_off_skips_what_an_unbroken_one_does(tmp_path):
  settings = [
    'TRAIN_STEPS=110',
    'CHECKPOINT_PERIOD=105',
    'EVAL_PERIOD=110',
    'KEEP_CHECKPOINTS=None',
    'SKIP_SPIKES=1.001',
    f'TEACHER_PATH={test_teachers.KEPT / "llm"}',
  ]
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  first = test_teachers.train(f'MODEL_DIR={whole}', *settings)
  shutil.copytree(whole, broken)
  shutil.rmtree(broken / 'checkpoints' / '110')
  second = test_teachers.train(f'MODEL_DIR={broken}', *settings)
  expected = test_teachers.trained(whole, 110)
  for path, array in test_teachers.trained(broken, 110).items():
    np.testing.assert_array_equal(expected[path], array)
  skipped = {
    line['step']: line['train/num_skipped']
    for line in test_teachers.logged(whole)
  }
  assert skipped == {
    line['step']: line['train/num_skipped']
    for line in test_teachers.logged(broken)
  }
  assert sum(skipped.values()) > 0
  assert not any(skipped[step] for step in range(1, 101))
  for step in range(101, 111):
    said = f'Step {step}: skipped its update'
    assert (said in first.stderr) == (skipped[step] == 1)
    assert (said in second.stderr) == (skipped[step] == 1 and step > 105)
