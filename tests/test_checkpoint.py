# SPDX-License-Identifier: Apache-2.0
"""Laws of checkpoints: whole or absent, bit for bit, any part of them."""

import json
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from l2s_jax.runtime import integrity
from l2s_jax.training import checkpoint, optim
from l2s_jax.training import state as state_lib
from l2s_jax.weights import saved_steps

OPTIMIZER = optim.adamw().make({})


def make_state(step: int = 0, seed: int = 0) -> state_lib.TrainState:
  generator = np.random.default_rng(seed)
  params = {
    'slm': {'layers': {'kernel': generator.normal(size=(2, 3, 4))}},
    'projector': {'bias': generator.normal(size=(4,))},
  }
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  params['projector']['scale'] = jnp.arange(3, dtype=jnp.bfloat16)
  state = state_lib.create(params, OPTIMIZER, seed)
  return state.replace(step=jnp.int32(step))


def restore(run_dir, like):
  """Returns the newest state and what was saved beside it."""
  checkpointer = checkpoint.Checkpointer(run_dir)
  restored = checkpointer.restore(
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like),
    jax.tree.map(lambda x: x.sharding, like),
  )
  data = checkpointer.restore_data()
  checkpointer.close()
  return restored, data


def save(run_dir, *states, keep=None):
  checkpointer = checkpoint.Checkpointer(run_dir, keep=keep)
  for state in states:
    checkpointer.save(state, {'batches': int(state.step)})
  checkpointer.close()


def test_what_is_restored_is_what_was_saved_last(tmp_path):
  states = [make_state(step, seed=step) for step in (3, 11, 7)]
  save(tmp_path, states[0], states[2], states[1])
  restored, position = restore(tmp_path, states[0])
  helpers.assert_trees_equal(restored, states[1])
  assert position == {'batches': 11}
  assert saved_steps.steps(tmp_path) == [3, 7, 11]
  for saved, found in zip(
    jax.tree.leaves(states[1]), jax.tree.leaves(restored), strict=True
  ):
    assert saved.dtype == found.dtype


def test_a_run_without_checkpoints_restores_nothing(tmp_path):
  assert restore(tmp_path, make_state()) == (None, None)
  assert saved_steps.steps(tmp_path) == []
  assert saved_steps.steps(tmp_path / 'absent') == []
  assert not (tmp_path / 'absent').exists()


def test_only_the_newest_are_kept(tmp_path):
  save(tmp_path, *(make_state(step) for step in (1, 2, 3, 4)), keep=2)
  assert saved_steps.steps(tmp_path) == [3, 4]


def test_where_steps_are_deleted_stays_until_none_can_come(tmp_path):
  """Orbax's thread makes the folder, and then moves a step into it."""
  checkpointer = checkpoint.Checkpointer(tmp_path)
  folder = tmp_path / saved_steps.FOLDER / checkpoint._DELETED
  (folder / '5' / 'params').mkdir(parents=True)
  checkpointer.save(make_state(6), {})
  assert list(folder.iterdir()) == []
  checkpointer.close()
  assert not folder.exists()


def test_the_best_is_kept_beside_the_newest(tmp_path):
  checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
  scores = {}
  for step, bleu in ((1, 3.0), (2, 9.0), (3, 9.0), (4, 1.0)):
    checkpointer.save(make_state(step), {})
    scores[step] = bleu  # Evaluated once it is saved.
    checkpointer.keep_best('bleu', scores)
  checkpointer.close()
  assert saved_steps.steps(tmp_path) == [2, 4]  # Of equals the first.
  assert saved_steps.params_folder(tmp_path, 'best')[1] == 2
  best = tmp_path / 'best.json'
  written = best.read_text()
  assert integrity.unseal(json.loads(written)) == {
    'metric': 'bleu',
    'score': 9.0,
    'step': 2,
  }
  best.write_text(written.replace('"step": 2', '"step": 4'))
  with pytest.raises(ValueError, match=r'best\.json was changed after it was'):
    saved_steps.params_folder(tmp_path, 'best')
  best.write_text('{"step": 4}')  # As earlier versions wrote it.
  assert saved_steps.params_folder(tmp_path, 'best')[1] == 4


def test_what_is_best_no_more_goes_at_once_and_the_best_stays(tmp_path):
  """Also under a later start that chooses nothing."""
  checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
  for step, scores in ((2, {2: 1.0}), (4, {2: 1.0, 4: 5.0})):
    checkpointer.save(make_state(step), {})
    checkpointer.keep_best('bleu', scores)
  checkpointer.close()
  assert saved_steps.steps(tmp_path) == [4]
  save(tmp_path, make_state(6), make_state(8), keep=1)
  assert saved_steps.steps(tmp_path) == [4, 8]
  assert saved_steps.params_folder(tmp_path, 'best')[1] == 4
  names = {path.name for path in (tmp_path / saved_steps.FOLDER).iterdir()}
  assert names == {'4', '8'}


@pytest.mark.parametrize('metric', ['task/loss', 'ter', 'task/ter'])
def test_the_least_loss_or_error_rate_is_the_best(metric, tmp_path):
  save(tmp_path, make_state(1), make_state(2), make_state(3))
  checkpointer = checkpoint.Checkpointer(tmp_path)
  # Step 9 was evaluated, and is not there any more.
  checkpointer.keep_best(metric, {1: 2.5, 2: 1.5, 3: 4.0, 9: 0.1})
  checkpointer.close()
  assert saved_steps.params_folder(tmp_path, 'best')[1] == 2


def test_no_best_without_an_evaluation(tmp_path):
  save(tmp_path, make_state(1))
  with pytest.raises(FileNotFoundError, match=r'BEST_METRIC.*steps \[1\]'):
    saved_steps.params_folder(tmp_path, 'best')


def test_a_step_saved_twice_is_the_first(tmp_path):
  save(tmp_path, make_state(5, seed=0), make_state(5, seed=1))
  restored, _ = restore(tmp_path, make_state())
  helpers.assert_trees_equal(restored, make_state(5, seed=0))


def test_a_state_may_be_donated_once_save_has_returned(tmp_path):
  # Large enough to be written for longer than the updates take.
  table = np.ones((1000, 1000), np.float32)
  state = make_state(1)
  state = state.replace(trainable={**state.trainable, 'table': table})
  state = state.replace(opt_state=OPTIMIZER.init(state.trainable))
  update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  expected = jax.tree.map(lambda x: np.array(x) + 1, state)

  checkpointer = checkpoint.Checkpointer(tmp_path)
  state = update(state)
  data = {'sums': {'loss': 2.0}}
  checkpointer.save(state, data)
  new = update(state)
  data['sums']['loss'] = 3.0
  for _ in range(3):
    new = update(new)
  checkpointer.close()
  restored, restored_data = restore(tmp_path, new)
  helpers.assert_trees_equal(restored, expected)
  assert restored_data == {'sums': {'loss': 2.0}}


@pytest.mark.parametrize(
  'name', ['9.orbax-checkpoint-tmp-1234', '9.orbax-checkpoint-tmp', 'nine']
)
def test_unfinished_checkpoints_are_not_read(tmp_path, name):
  save(tmp_path, make_state(4))
  folder = tmp_path / saved_steps.FOLDER
  shutil.copytree(folder / '4', folder / name)
  assert saved_steps.steps(tmp_path) == [4]
  assert saved_steps.params_folder(tmp_path)[1] == 4
  restored, _ = restore(tmp_path, make_state())
  assert restored.step == 4


def test_the_folder_of_the_parameters(tmp_path):
  save(tmp_path, make_state(2), make_state(10))
  folder, step = saved_steps.params_folder(tmp_path)
  assert step == 10 and folder.is_dir()
  assert folder == tmp_path / 'checkpoints' / '10' / 'params'
  assert saved_steps.params_folder(tmp_path, 2)[1] == 2
  with pytest.raises(FileNotFoundError, match=r'checkpoint 3; .*\[2, 10\]'):
    saved_steps.params_folder(tmp_path, 3)
  with pytest.raises(FileNotFoundError, match=r'a checkpoint; .*\[\]'):
    saved_steps.params_folder(tmp_path / 'absent')


def test_parameters_alone_are_restored_at_any_step(tmp_path):
  states = [make_state(step, seed=step) for step in (1, 2)]
  save(tmp_path, *states)
  for state in states:
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.trainable
    )
    shardings = jax.tree.map(lambda x: x.sharding, state.trainable)
    params = saved_steps.restore_params(
      tmp_path, int(state.step), shapes, shardings
    )
    helpers.assert_trees_equal(params, state.trainable)
  # The optimizer's state is not needed for it.
  shutil.rmtree(tmp_path / 'checkpoints' / '2' / 'optimizer')
  params = saved_steps.restore_params(tmp_path, 2, shapes, shardings)
  helpers.assert_trees_equal(params, states[1].trainable)


def test_single_arrays_are_read_into_host_memory(tmp_path):
  state = make_state(1)
  save(tmp_path, state)
  folder, _ = saved_steps.params_folder(tmp_path)
  assert saved_steps.array_shapes(folder) == {
    ('slm', 'layers', 'kernel'): jax.ShapeDtypeStruct((2, 3, 4), jnp.float32),
    ('projector', 'bias'): jax.ShapeDtypeStruct((4,), jnp.float32),
    ('projector', 'scale'): jax.ShapeDtypeStruct((3,), jnp.bfloat16),
  }
  paths = [('slm', 'layers', 'kernel'), ('projector', 'scale')]
  arrays = saved_steps.read_arrays(folder, paths)
  assert set(arrays) == set(paths)
  for path, array in arrays.items():
    assert isinstance(array, np.ndarray)
    expected = state.trainable
    for name in path:
      expected = expected[name]
    np.testing.assert_array_equal(array, expected)
    assert array.dtype == expected.dtype


# Orbax drops what it had begun to read, and TensorStore says so.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_parameters_of_another_shape_are_not_restored(tmp_path):
  """Never cut or padded in silence to fit the model."""
  save(tmp_path, make_state(1))
  trainable = make_state().trainable
  for rows in (2, 6):
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable
    )
    shapes['projector']['bias'] = jax.ShapeDtypeStruct((rows,), jnp.float32)
    with pytest.raises(ValueError, match='shape'):
      saved_steps.restore_params(
        tmp_path, 1, shapes, jax.tree.map(lambda x: x.sharding, trainable)
      )


def test_saving_does_not_ask_for_sigterm(tmp_path, monkeypatch):
  """Who asks is counted: what asks beside `preemption.py` would lose one."""

  def ask(step):
    raise AssertionError(f'asked at step {step}')

  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', ask)
  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(make_state(), {})
  checkpointer.close()
  assert saved_steps.steps(tmp_path)


def damage(run_dir, step, item):
  """Flips a bit in all files of arrays, some of which nobody reads."""
  folder = run_dir / saved_steps.FOLDER / str(step) / item
  for file in folder.glob('**/d/*'):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize('item', saved_steps.ITEMS)
def test_training_goes_on_from_the_newest_good_step(tmp_path, capsys, item):
  states = [make_state(step, seed=step) for step in (2, 4)]
  save(tmp_path, *states)
  damage(tmp_path, 4, item)
  restored, position = restore(tmp_path, states[0])
  helpers.assert_trees_equal(restored, states[0])
  assert position == {'batches': 2}
  said = capsys.readouterr().err
  assert 'checkpoints/4 is damaged' in said
  assert 'step 2 is used instead' in said
  # The damaged one is kept, where it does not stand in the way of a new one.
  assert saved_steps.steps(tmp_path) == [2]
  assert (tmp_path / saved_steps.FOLDER / saved_steps.DAMAGED / '4').is_dir()
  save(tmp_path, states[1])
  restored, position = restore(tmp_path, states[0])
  helpers.assert_trees_equal(restored, states[1])
  assert position == {'batches': 4}


def test_a_reader_takes_the_newest_good_step_and_moves_nothing(
  tmp_path, capsys
):
  save(tmp_path, make_state(2), make_state(4))
  damage(tmp_path, 4, 'params')
  assert saved_steps.params_folder(tmp_path)[1] == 2
  assert 'step 2 is used instead' in capsys.readouterr().err
  assert saved_steps.steps(tmp_path) == [2, 4]
  with pytest.raises(saved_steps.DamagedError) as error:
    saved_steps.params_folder(tmp_path, 4)
  for words in ('checkpoints/4 is damaged', 'Choose another step of [2]'):
    assert words in str(error.value)


def test_a_damaged_best_step_is_refused(tmp_path):
  checkpointer = checkpoint.Checkpointer(tmp_path)
  for step in (2, 4):
    checkpointer.save(make_state(step), {})
  checkpointer.keep_best('loss', {2: 2.0, 4: 1.0})
  checkpointer.close()
  damage(tmp_path, 4, 'params')
  with pytest.raises(
    saved_steps.DamagedError, match='checkpoints/4 is damaged'
  ):
    saved_steps.params_folder(tmp_path, 'best')


def test_a_run_without_a_good_step_is_refused(tmp_path):
  save(tmp_path, make_state(2), make_state(4))
  for step in (2, 4):
    damage(tmp_path, step, 'params')
  with pytest.raises(saved_steps.DamagedError, match='all check') as error:
    checkpoint.Checkpointer(tmp_path)
  assert '/2 is damaged' in str(error.value)
  assert '/4 is damaged' in str(error.value)
  assert saved_steps.steps(tmp_path) == [2, 4]


def test_a_step_of_an_earlier_version_is_read_with_a_word(tmp_path, capsys):
  state = make_state(2)
  save(tmp_path, state)
  path = tmp_path / saved_steps.FOLDER / '2' / 'data' / 'metadata'
  path.write_text(json.dumps({'batches': 2}))  # As versions before wrote it.
  restored, position = restore(tmp_path, state)
  helpers.assert_trees_equal(restored, state)
  assert position == {'batches': 2}
  said = capsys.readouterr().err
  assert '2 was saved by an earlier version, without digests' in said
  save(tmp_path, make_state(4))
  capsys.readouterr()
  assert saved_steps.params_folder(tmp_path)[1] == 4
  assert not capsys.readouterr().err


def test_without_verification_nothing_is_compared(tmp_path, monkeypatch):
  save(tmp_path, make_state(2), make_state(4))
  damage(tmp_path, 4, 'params')
  monkeypatch.setattr(integrity, 'verification', lambda: False)
  assert saved_steps.params_folder(tmp_path)[1] == 4
