# SPDX-License-Identifier: Apache-2.0
"""A run's state goes to T5X and comes back as it was.

T5X itself reads and writes it in `test_t5x_partner.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import t5x_runs
from flax import traverse_util

from l2s_jax.interop import convert, t5x_state
from l2s_jax.interop.exports import export_command
from l2s_jax.systems import builders
from l2s_jax.training import adafactor, optim, resuming
from l2s_jax.weights import saved_steps
from l2s_jax.weights.formats import t5x


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns a run, its checkpoint for T5X, and the run made of that."""
  path = tmp_path_factory.mktemp('t5x_state')
  t5x_runs.save(path / 'run', t5x_runs.build(), optim.adafactor())
  t5x_state.write(path / 'run', path / 't5x', t5x_runs.STEP)
  t5x_state.read(path / 't5x', path / 'run', path / 'back')
  return path


def contents(run):
  step = run / 'checkpoints' / str(t5x_runs.STEP)
  return saved_steps.read_data(step)


def test_what_comes_back_is_bit_for_bit_what_went(folder):
  before, after = contents(folder / 'run'), contents(folder / 'back')
  assert before['digests'] == after['digests']
  descriptions = [
    (folder / name / 'model.json').read_bytes() for name in ('run', 'back')
  ]
  assert descriptions[0] == descriptions[1]


def test_t5x_gets_no_state_for_the_llm(folder):
  states, step = t5x.open_part(folder / 't5x', None, ('state',))
  targets, _ = t5x.open_part(folder / 't5x', None, ('target',))
  assert step == int(states['step'].read()) == t5x_runs.STEP
  with_state = {name.split('/')[1] for name in states if name != 'step'}
  assert with_state == {'slm', 'projector'}
  assert {name.split('/')[0] for name in targets} == {'llm', *with_state}


def test_training_goes_on_with_any_data_and_no_other_optimizer(folder):
  position = {**contents(folder / 'back')}
  kind = {
    'task': 'local',
    'seed': 5,
    'optimizer': optim.adafactor(learning_rate=0.1).description,
  }
  found = resuming.check_position(position, kind, folder)
  assert found['num_rows'] == 0
  kind['optimizer'] = optim.adamw().description
  with pytest.raises(ValueError, match='adamw'):
    resuming.check_position(position, kind, folder)


def test_the_verbs_carry_a_run_there_and_back(folder, tmp_path, capsys):
  run = str(folder / 'run')
  export_command.export(run, str(tmp_path / 't5x'), to='t5x')
  convert.convert(
    str(tmp_path / 't5x'),
    str(tmp_path / 'back'),
    from_='t5x',
    to='run',
    run=run,
  )
  said = capsys.readouterr().out
  assert f'wrote {tmp_path / "t5x"} (t5x): checkpoint_7, parameters and' in said
  assert f'wrote {tmp_path / "back"} (run): step 7' in said
  assert contents(tmp_path / 'back') | {'begun_elsewhere': ''} == (
    contents(folder / 'back') | {'begun_elsewhere': ''}
  )
  assert {path.name for path in tmp_path.iterdir()} == {'t5x', 'back'}


@pytest.mark.parametrize(
  ('source', 'given', 'message'),
  [
    ('run', {'dtype': 'bfloat16'}, '--dtype=bfloat16: --to=t5x writes the'),
    ('run', {'vocabulary': 'x'}, '--vocabulary=x: --to=t5x writes the'),
    ('run', {'step': '5'}, 'does not have the checkpoint 5; it has steps .7'),
    ('t5x', {}, 't5x is not a run. --to=t5x writes the training state'),
  ],
)
def test_what_export_does_not_take(source, given, message, folder, tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    export_command.export(
      str(folder / source), str(tmp_path / 'new'), to='t5x', **given
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'to': 'run'}, '--from=t5x --to=run: expected .* --run=RUN'),
    ({'to': 'l2s', 'run': 'x'}, '--to=l2s --run=x: expected --from=t5x'),
    (
      {'to': 'run', 'run': 'x', 'verify': True},
      '--verify=True: expected --from',
    ),
  ],
)
def test_what_convert_does_not_take(given, message, folder, tmp_path):
  with pytest.raises(ValueError, match=message):
    convert.convert(
      str(folder / 't5x'), str(tmp_path / 'new'), from_='t5x', **given
    )
  assert not list(tmp_path.iterdir())


def test_a_language_model_comes_back_too(tmp_path):
  system = builders.language_model_system(t5x_runs.SLM)
  t5x_runs.save(tmp_path / 'run', system, optim.adafactor())
  t5x_state.write(tmp_path / 'run', tmp_path / 't5x', t5x_runs.STEP)
  t5x_state.read(tmp_path / 't5x', tmp_path / 'run', tmp_path / 'back')
  before, after = contents(tmp_path / 'run'), contents(tmp_path / 'back')
  assert before['digests'] == after['digests']


def test_it_is_no_t5_to_those_who_read_one(folder):
  with pytest.raises(ValueError, match='--from=t5x --to=run --run=RUN'):
    t5x.Checkpoint(folder / 't5x')


def test_another_llm_is_refused(folder, tmp_path):
  target, state = (
    traverse_util.unflatten_dict(
      {
        name: x.read()
        for name, x in t5x.open_part(folder / 't5x', None, (part,))[0].items()
      },
      sep='/',
    )
    for part in ('target', 'state')
  )
  target['llm']['token_embedder']['embedding'][0, 0] += 1
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver:
    item = ocp.args.PyTreeSave({'target': target, 'state': state})
    saver.save(tmp_path / 'checkpoint_7', ocp.args.Composite(state=item))
  with pytest.raises(ValueError, match="is not the run's: llm/token_embedder"):
    t5x_state.read(tmp_path, folder / 'run', tmp_path / 'new')
  assert [path.name for path in tmp_path.iterdir()] == ['checkpoint_7']


def test_another_model_is_refused(folder, tmp_path):
  system = t5x_runs.build(injection='replace', llm_layer='mix')
  t5x_runs.save(tmp_path / 'other', system, optim.adamw())
  with pytest.raises(ValueError, match='layer_mix/scale: T5X has none'):
    t5x_state.read(folder / 't5x', tmp_path / 'other', tmp_path / 'new')


def test_of_another_optimizer_parameters_go_out_alone(tmp_path):
  t5x_runs.save(tmp_path / 'run', t5x_runs.build(), optim.adamw())
  said = t5x_state.write(tmp_path / 'run', tmp_path / 't5x', t5x_runs.STEP)
  assert 'parameters alone' in said
  with pytest.raises(ValueError, match="the state of T5X's Adafactor"):
    t5x_state.read(tmp_path / 't5x', tmp_path / 'run', tmp_path / 'new')


@pytest.mark.parametrize('optimizer', [optim.adamw(), optim.adafactor()])
def test_before_the_first_step_any_run_goes_out(optimizer, tmp_path):
  t5x_runs.save(tmp_path / 'run', t5x_runs.build(), optimizer, step=0)
  t5x_state.write(tmp_path / 'run', tmp_path / 't5x', 0)
  states, _ = t5x.open_part(tmp_path / 't5x', None, ('state',))
  assert not any(x.read().any() for x in states.values())


@pytest.mark.parametrize(
  ('settings', 'name'),
  [
    ({'learning_rate_by_path': {'slm/.*': 0.0}}, 'is_trained_by_path'),
    ({'decay_rate': 0.9}, 'decay_rate: the run has 0.9'),
    ({'min_dim_size_to_factor': 8}, 'min_dim_size_to_factor'),
  ],
)
def test_another_adafactor_is_refused(settings, name, tmp_path):
  optimizer = optim.adafactor(**settings)
  t5x_runs.save(tmp_path / 'run', t5x_runs.build(), optimizer)
  with pytest.raises(ValueError, match=name):
    t5x_state.write(tmp_path / 'run', tmp_path / 't5x', t5x_runs.STEP)
  assert not (tmp_path / 't5x').exists()


def test_lora_is_refused(tmp_path):
  system = t5x_runs.build(lora_rank=2)
  t5x_runs.save(tmp_path / 'run', system, optim.adamw())
  with pytest.raises(ValueError, match='Set LORA_RANK=0'):
    t5x_state.write(tmp_path / 'run', tmp_path / 't5x', t5x_runs.STEP)


SHAPES = {
  'wide': ((130, 200), ('embed', 'mlp')),
  'tall': ((200, 130), ('mlp', 'embed')),
  'square': ((150, 150), ('mlp', 'embed')),
  'small': ((20, 30), ('embed', 'mlp')),
  'bias': ((30,), ('mlp',)),
  'heads': ((8, 2, 4), ('embed', 'heads', 'kv')),
  'stack': ((3, 8, 16), ('layers', 'embed', 'mlp')),
  'stacked_out': ((3, 2, 4, 8), ('layers', 'heads', 'kv', 'embed')),
  'stacked_bias': ((3, 8), ('layers', 'embed')),
}


@pytest.mark.parametrize('name', SHAPES)
def test_slots_come_back(name):
  shape, names = SHAPES[name]
  axes = jax.sharding.PartitionSpec(*names)
  factors = adafactor.factoring(name, shape, axes, 128)
  params, specs = {'x': jnp.zeros(shape)}, {'x': axes}
  transform = adafactor.scale_by_adafactor(specs)
  grads = {'x': jax.random.normal(jax.random.key(0), shape)}
  _, state = transform.update(grads, transform.init(params), params)
  ours = jax.device_get(state.slots['x'])
  theirs = t5x_state.to_slots(ours, factors)
  assert sorted(theirs) == ['m', 'v', 'v_col', 'v_row']
  back = t5x_state.from_slots(theirs, factors, shape, name)
  assert back.keys() == ours.keys()
  for key, x in ours.items():
    np.testing.assert_array_equal(back[key], x)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'m': np.zeros((130, 200))}, 'beta1 = None'),
    ({'v_row': np.zeros((1,)), 'v': np.zeros((130, 200))}, 'same min_dim_size'),
  ],
)
def test_slots_of_another_kind_are_refused(changed, message):
  shape, names = SHAPES['wide']
  axes = jax.sharding.PartitionSpec(*names)
  factors = adafactor.factoring('wide', shape, axes, 128)
  ours = {'v_row': np.zeros((130, 1)), 'v_col': np.zeros((1, 200))}
  theirs = t5x_state.to_slots(ours, factors) | changed
  with pytest.raises(ValueError, match=message):
    t5x_state.from_slots(theirs, factors, shape, 'wide')
