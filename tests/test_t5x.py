# SPDX-License-Identifier: Apache-2.0
"""T5X's checkpoints come in, and go out as T5X writes them.

What the parameters mean is held to T5X itself in `test_t5x_golden.py`.
"""

import dataclasses
import json
import pathlib

import flax.serialization
import gin
import helpers
import jax
import numpy as np
import pytest

from l2s_jax import __main__ as command_line
from l2s_jax.interop import to_t5x
from l2s_jax.models import l2s
from l2s_jax.weights import opening
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import t5x

T5 = dataclasses.replace(
  helpers.T5_1_1,
  num_heads=3,
  num_encoder_layers=3,
  relpos_buckets=32,
  relpos_max_distance=128,
  dropout_rate=0.1,
)
CONFIGS = {
  't5_1_0': dataclasses.replace(
    T5,
    mlp_activations=('relu',),
    logits_via_embedding=True,
    scale_logits=True,
  ),
  't5_1_1': T5,
  'umt5': dataclasses.replace(T5, relpos_per_layer=True),
}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
  """Returns a folder that T5X would read, and what was put into it."""
  config = CONFIGS[request.param]
  params = helpers.random_params(l2s.build(config))
  source = helpers.Arrays(config, params)
  to_t5x.save(source, tmp_path / 'saved')
  return tmp_path / 'saved', source


@pytest.fixture
def t5(tmp_path):
  params = helpers.random_params(l2s.build(T5))
  to_t5x.save(helpers.Arrays(T5, params), tmp_path / 'saved')
  return tmp_path / 'saved'


def convert(*arguments):
  status = command_line.main(['convert', *map(str, arguments)])
  gin.clear_config()
  return status


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def test_what_is_saved_is_read(saved):
  folder, source = saved
  opened = t5x.Checkpoint(folder)
  assert opened.config == source.config
  assert opened.shapes() == source.shapes()
  for path, array in source.arrays.items():
    np.testing.assert_array_equal(opened.read(path), array)
    for layer in source_lib.layers(path, array.shape):
      np.testing.assert_array_equal(
        opened.read(path, layer), source.read(path, layer)
      )


def test_round_trips_give_the_same_bytes(saved, tmp_path):
  folder, _ = saved
  ours, again = tmp_path / 'l2s', tmp_path / 'again'
  assert not convert('--from=t5x', '--to=l2s', folder, ours)
  assert not convert('--from=l2s', '--to=t5x', ours, again)
  assert contents(again) == contents(folder)


@pytest.mark.parametrize('name', ['t5_1_0_tiny', 't5_1_1_tiny'])
def test_arrays_are_written_as_t5x_wrote_them(name, shared_data, tmp_path):
  golden = shared_data / 't5x_golden' / name
  out = tmp_path / 'out'
  assert not convert('--from=t5x', '--to=t5x', golden, out)
  written = contents(out / 'checkpoint_1234')
  theirs = contents(golden / 'checkpoint_1234')
  target = {k: v for k, v in theirs.items() if k.startswith('target.')}
  assert {k: v for k, v in written.items() if k != 'checkpoint'} == target
  ours, golden_target = (
    flax.serialization.msgpack_restore(content['checkpoint'])['optimizer'][
      'target'
    ]
    for content in (written, theirs)
  )
  assert ours == golden_target


def test_a_checkpoint_of_one_file_is_read(shared_data):
  path = shared_data / 't5x_testdata' / 'test_t5_tiny.checkpoint_0'
  source = t5x.Checkpoint(path)
  config = source.config
  assert (config.emb_dim, config.num_heads, config.head_dim) == (8, 4, 3)
  assert config.mlp_activations == ('gelu', 'linear')
  shape, axes = (
    jax.tree.map(lambda s: s.shape, source.shapes()),
    ('decoder', 'layers', 'cross_attention', 'query', 'kernel'),
  )
  assert shape[axes] == (2, 8, 4, 3)
  assert source.read(axes).shape == (2, 8, 4, 3)


def test_the_shapes_say_what_no_config_says(saved):
  folder, source = saved
  (folder / 'config.json').unlink()
  assert t5x.Checkpoint(folder).config == source.config


GIN = """
from __gin__ import dynamic_registration
from t5x.examples.t5 import network
NUM_LAYERS = 3
DROPOUT_RATE = 0.0
network.Transformer.config = @network.T5Config()
network.T5Config:
  vocab_size = @seqio.vocabularies.size()
  num_encoder_layers = %NUM_LAYERS
  dropout_rate = %DROPOUT_RATE
  dtype = 'bfloat16'
  mlp_activations = ('silu', 'linear')
"""


def test_a_config_gin_of_t5x_says_what_shapes_cannot(t5):
  (t5 / 'config.json').unlink()
  (t5 / 'config.gin').write_text(GIN)
  config = t5x.Checkpoint(t5).config
  assert config == dataclasses.replace(
    T5, mlp_activations=('silu', 'linear'), dropout_rate=0.0
  )


def test_a_preset_stands_for_the_config(t5, tmp_path, capsys):
  preset = tmp_path / 'mine.gin'
  fields = T5.to_json() | {'mlp_activations': ('silu', 'linear')}
  preset.write_text(
    'MINE = @mine/TransformerConfig()\nmine/TransformerConfig:\n'
    + ''.join(f'  {name} = {value!r}\n' for name, value in fields.items())
  )
  out = tmp_path / 'out'
  assert not convert('--from=t5x', '--to=l2s', f'--config={preset}', t5, out)
  config = opening.open_source(str(out)).config
  assert config.mlp_activations == ('silu', 'linear')

  flags = ('--from=t5x', '--to=l2s', t5, tmp_path / 'other')
  assert convert(*flags, '--config=t5_1_1_small') == 2
  error = capsys.readouterr().err
  assert 'Name the one that they were trained with by --config' in error
  assert 'vocab_size is 32128, but the tensors have 264' in error


def test_the_newest_step_is_taken_or_the_one_asked_for(t5):
  (t5 / 'checkpoint_1').rename(t5 / 'checkpoint_90')
  source = t5x.Checkpoint(t5)
  to_t5x.save(source, t5 / 'other')
  (t5 / 'other' / 'checkpoint_90').rename(t5 / 'checkpoint_100')
  assert t5x.Checkpoint(t5).step() == 100
  assert t5x.Checkpoint(t5, step=90).step() == 90
  assert t5x.Checkpoint(t5 / 'checkpoint_90').step() == 90
  with pytest.raises(FileNotFoundError, match=r'of step 7; .* \[90, 100\]'):
    t5x.Checkpoint(t5, step=7)


def array_of(folder):
  return folder / 'checkpoint_1' / 'target.decoder.layers_0.mlp.wo.kernel'


def cut_msgpack(folder):
  file = folder / 'checkpoint_1' / 'checkpoint'
  file.write_bytes(file.read_bytes()[:-9])


def cut_chunk(folder):
  (chunk,) = array_of(folder).glob('0*')
  chunk.write_bytes(chunk.read_bytes()[:-20])


def lose_chunk(folder):
  (chunk,) = array_of(folder).glob('0*')
  chunk.unlink()


def lose_array(folder):
  for file in array_of(folder).iterdir():
    file.unlink()


def other_model(folder):
  content = json.loads((folder / 'config.json').read_text())
  content['config']['num_heads'] = 4
  (folder / 'config.json').write_text(json.dumps(content))


def other_file(folder):
  file = folder / 'checkpoint_1' / 'checkpoint'
  file.write_bytes(flax.serialization.msgpack_serialize({'params': {}}))


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (cut_msgpack, 'is not a whole msgpack file'),
    (cut_chunk, 'the parameter decoder/layers_0/mlp/wo/kernel is not whole'),
    (lose_chunk, 'the parameter decoder/layers_0/mlp/wo/kernel is not whole'),
    (lose_array, 'the parameter decoder/layers_0/mlp/wo/kernel is not whole'),
    (
      other_model,
      'cross_attention/query/kernel): expected (16, 16), found (16, 12)',
    ),
    (other_file, 'is not a checkpoint of T5X: it has no target'),
  ],
)
def test_what_is_broken_is_named_and_nothing_is_written(
  t5, tmp_path, capsys, spoil, message
):
  spoil(t5)
  out = tmp_path / 'out'
  assert convert('--from=t5x', '--to=l2s', t5, out) == 2
  assert message in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.iterdir()) == ['saved']


def test_all_that_is_wrong_with_the_parameters_is_said_at_once(t5):
  file = t5 / 'checkpoint_1' / 'checkpoint'
  content = flax.serialization.msgpack_restore(file.read_bytes())
  target = content['optimizer']['target']
  del target['encoder']['encoder_norm']
  del target['decoder']['layers_0']['mlp']['wo']
  target['extra'] = target['decoder']['decoder_norm']
  file.write_bytes(flax.serialization.msgpack_serialize(content))
  with pytest.raises(ValueError) as error:
    t5x.Checkpoint(t5)
  assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
    'decoder/layers_0/mlp/wo/kernel (decoder/layers/mlp/wo/kernel) (32, 16): '
    'missing',
    'encoder/encoder_norm/scale (encoder/final_norm/scale) (16,): missing',
    'extra/scale (16,): unknown',
  ]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='holds no checkpoint of T5X'):
    t5x.Checkpoint(pathlib.Path(tmp_path))
