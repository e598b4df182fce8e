# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a folder of weights is said in a sentence, and at once."""

import json
import pathlib
import time

import gin
import helpers
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from l2s_jax import __main__ as command_line
from l2s_jax.interop import convert, to_huggingface
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.performance import random_weights
from l2s_jax.runtime import gin_config
from l2s_jax.weights import finite, opening, saved_steps
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import huggingface

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'
T5 = helpers.T5_1_1


@pytest.fixture
def folder(tmp_path):
  """Returns a folder of a T5, to be spoilt."""
  source = random_weights.RandomWeights(T5, 0)
  to_huggingface.save(source, tmp_path / 't5', None)
  return tmp_path / 't5'


def edit(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder, change):
  """Gives all tensors other names."""
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(
    {change(name): array for name, array in tensors.items()}, path
  )


def error_of(folder):
  with pytest.raises(ValueError) as error:
    huggingface.HuggingFaceFolder(folder)
  return str(error.value)


@pytest.mark.parametrize(
  ('changes', 'cause'),
  [
    (
      {'num_layers': 1},
      'the files hold 2 encoder layers, but num_layers is 1',
    ),
    (
      {'num_decoder_layers': 3},
      'the files hold 2 decoder layers, but num_decoder_layers is 3',
    ),
    ({'d_ff': 64}, 'd_ff is 64, but the tensors have 32'),
    ({'vocab_size': 263}, 'vocab_size is 263, but the tensors have 264'),
    ({'d_model': 32}, 'd_model is 32, but the tensors have 16'),
    ({'num_heads': 4}, 'num_heads is 4, but the tensors have 2'),
    ({'d_kv': 16}, 'num_heads * d_kv is 2 * 16 = 32, but the tensors have 8'),
  ],
)
def test_the_cause_comes_first_and_ten_lines_at_most(folder, changes, cause):
  edit(folder, **changes)
  first, *lines = error_of(folder).splitlines()
  assert first.endswith(
    f'config.json: {cause}. Use files that were saved together:'
  )
  assert 1 <= len(lines) <= 11
  if len(lines) == 11:
    assert lines[-1].startswith('  and ') and lines[-1].endswith(' more')


@pytest.mark.parametrize(
  'changes',
  [
    {'num_layers': 10**9, 'num_decoder_layers': 10**9},
    {'d_model': 2**31 - 1, 'd_ff': 2**31 - 1, 'vocab_size': 2**31 - 1},
    {'num_heads': 2**31 - 1, 'd_kv': 2**31 - 1},
    {'num_layers': 10**40},
  ],
)
def test_sizes_are_compared_before_anything_is_made_of_them(folder, changes):
  edit(folder, **changes)
  began = time.monotonic()
  assert 'config.json' in error_of(folder)
  assert time.monotonic() - began < 5


@pytest.mark.parametrize(
  ('key', 'value', 'expected'),
  [
    ('d_model', '16', 'a whole number'),
    ('d_model', True, 'a whole number'),
    ('d_ff', 32.5, 'a whole number'),
    ('num_heads', 0, 'a whole number from 1'),
    ('num_layers', -2, 'a whole number from 1'),
    ('vocab_size', None, 'a whole number'),
    ('vocab_size', [264], 'a whole number'),
    ('layer_norm_epsilon', 'tiny', 'a number'),
    ('layer_norm_epsilon', float('nan'), 'a number'),
    ('dropout_rate', float('inf'), 'a number'),
    ('feed_forward_proj', 3, 'a string'),
    ('scale_decoder_outputs', 'no', 'true or false'),
    ('eos_token_id', 'end', 'a token id'),
  ],
)
def test_a_value_of_another_kind_is_named(folder, key, value, expected):
  edit(folder, **{key: value})
  words = error_of(folder)
  assert words.startswith(f'{folder}/config.json: {key} is {value!r}; expected')
  assert expected in words


@pytest.mark.parametrize(
  'prefix',
  ['_orig_mod.', 'module.', '_orig_mod.module.', 'module._orig_mod.', 'model.'],
)
def test_what_a_wrapper_put_before_names_is_taken_off(folder, prefix, capsys):
  expected = huggingface.HuggingFaceFolder(folder)
  arrays = {path: expected.read(path).copy() for path in expected.shapes()}
  rename(folder, lambda name: prefix + name)
  found = huggingface.HuggingFaceFolder(folder)
  said = capsys.readouterr().err
  assert said.count(f'all tensor names have the prefix {prefix!r}') == 1
  huggingface.HuggingFaceFolder(folder)
  assert not capsys.readouterr().err  # Once.
  assert found.config == expected.config
  for path in expected.shapes():
    np.testing.assert_array_equal(found.read(path), arrays[path])
    assert found.name(path) == prefix + expected.name(path)


def test_a_wrapper_is_seen_where_a_family_has_a_prefix_of_its_own(tmp_path):
  config = helpers.LLAMA
  source = random_weights.RandomWeights(config, 0)
  to_huggingface.save(source, tmp_path / 'hf', None)
  expected = huggingface.HuggingFaceFolder(tmp_path / 'hf')
  assert expected.name(('token_embedder', 'embedding')).startswith('model.')
  arrays = {path: expected.read(path).copy() for path in expected.shapes()}
  rename(tmp_path / 'hf', lambda name: f'model.{name}')
  found = huggingface.HuggingFaceFolder(tmp_path / 'hf')
  for path in expected.shapes():
    np.testing.assert_array_equal(found.read(path), arrays[path])


def test_a_prefix_of_some_tensors_is_not_taken_off(folder):
  rename(folder, lambda n: f'module.{n}' if n.startswith('encoder') else n)
  words = error_of(folder)
  assert 'the files hold no encoder layers' in words
  assert len(words.splitlines()) == 12


def test_one_tensor_under_two_names_is_refused(tmp_path):
  source = random_weights.RandomWeights(helpers.GPT2, 0)
  to_huggingface.save(source, tmp_path / 'hf', None)
  path = tmp_path / 'hf' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors['wte.weight'] = tensors['transformer.wte.weight'] + 1
  safetensors.numpy.save_file(tensors, path)
  words = error_of(tmp_path / 'hf')
  assert 'transformer.wte.weight and wte.weight' in words or (
    'wte.weight and transformer.wte.weight' in words
  )


def test_an_adapter_is_named_with_its_model_and_what_to_do(tmp_path, capsys):
  (tmp_path / 'adapter_config.json').write_text(
    json.dumps(
      {'peft_type': 'LORA', 'base_model_name_or_path': 'google-t5/t5-small'}
    )
  )
  safetensors.numpy.save_file(
    {'lora_A': np.zeros((2, 2), np.float32)},
    tmp_path / 'adapter_model.safetensors',
  )
  with pytest.raises(ValueError) as error:
    opening.open_source(str(tmp_path))
  for words in ('LORA adapter of google-t5/t5-small', 'merge_and_unload'):
    assert words in str(error.value)
  assert (
    command_line.main(
      ['convert', '--from=hf', '--to=l2s', str(tmp_path), str(tmp_path / 'o')]
    )
    == 2
  )
  assert 'adapter of google-t5/t5-small' in capsys.readouterr().err


@pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
  'dtype', ['float64', 'float32', 'float16', ml_dtypes.bfloat16]
)
def test_every_float_that_is_none_is_seen(dtype, value):
  array = np.full((3, 700_000), 65504, np.float64).astype(dtype)
  assert finite.is_finite(array)
  assert finite.is_finite(array[:0])
  for place in ((0, 0), (1, 3), (2, 699_999)):
    spoilt = array.copy()
    spoilt[place] = value
    assert not finite.is_finite(spoilt)
    assert not finite.is_finite(spoilt.T)


@pytest.fixture
def not_finite(folder):
  """Returns the folder with one infinity, and the name of its tensor."""
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  name = 'encoder.block.1.layer.1.DenseReluDense.wo.weight'
  tensors[name][3, 5] = np.inf
  safetensors.numpy.save_file(tensors, path)
  return folder, name


def load(folder):
  import jax

  source = opening.open_source(str(folder))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  module = l2s.build(source.config)
  shapes = jax.eval_shape(lambda: helpers.random_params(module))
  return source_lib.load(source, shapes, jax.tree.map(lambda _: device, shapes))


def test_weights_that_are_not_finite_are_refused_unless_asked_for(
  not_finite, capsys
):
  folder, name = not_finite
  with pytest.raises(ValueError, match=f'NaN or infinity in {name}, ') as error:
    load(folder)
  (setting,) = {w for w in str(error.value).split() if w.startswith('--gin.')}
  binding = setting.removeprefix('--gin.')
  gin_config.parse_config([], [binding])
  load(folder)
  assert f'infinity in {name}; they are read anyway' in capsys.readouterr().err


def test_convert_keeps_nothing_that_is_not_finite(not_finite, tmp_path):
  folder, name = not_finite
  out = tmp_path / 'out'
  arguments = {'from_': 'hf', 'to': 'l2s'}
  with pytest.raises(ValueError, match=f'NaN or infinity in {name}, '):
    convert.convert(str(folder), str(out), **arguments)
  assert not out.exists()
  convert.convert(str(folder), str(out), allow_non_finite=True, **arguments)
  assert out.exists()


def test_a_training_does_not_begin_from_weights_that_are_not_finite(
  tmp_path, capsys
):
  out = tmp_path / 'slm'
  convert.convert(str(KEPT / 'converted'), str(out), from_='l2s', to='hf')
  path = out / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  name = 'decoder.block.0.layer.2.DenseReluDense.wo.weight'
  tensors[name][1, 2] = np.nan
  safetensors.numpy.save_file(tensors, path)
  data = KEPT / 'data'
  try:
    status = command_line.main(
      [
        'train',
        '--gin_file=gin_configs/models/slm_baseline.gin',
        '--gin_file=gin_configs/tasks/parallel_text.gin',
        '--gin_file=gin_configs/runs/train.gin',
        f'--gin.DATA_DIR={data}',
        "--gin.DATA_FILES={'train': ('train.en', 'train.de')}",
        f'--gin.SLM_PATH={out}',
        f'--gin.MODEL_DIR={tmp_path / "run"}',
        '--gin.BATCH_SIZE=8',
        '--gin.train.eval_split=None',
      ]
    )
  finally:
    gin.clear_config()
  assert status == 2
  assert f'NaN or infinity in {name}, so' in capsys.readouterr().err
  assert not saved_steps.steps(tmp_path / 'run')


def fields(**changes):
  return T5.to_json() | changes


def test_a_config_of_an_older_version_has_the_defaults_of_newer_fields():
  old = fields()
  del old['scale_untied_logits'], old['quantization']
  assert config_lib.from_json(old, 'model.json') == T5
  again = json.loads(json.dumps(fields()))
  assert config_lib.from_json(again, 'model.json') == T5


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ([1], 'expected an object'),
    (fields(widths=3), 'has widths, which '),
    ({'vocab_size': 3}, 'lacks emb_dim, num_heads'),
    (fields(emb_dim='16'), "emb_dim is '16'; expected a whole number"),
    (fields(emb_dim=True), 'emb_dim is True; expected a whole number'),
    (fields(emb_dim=2**40), 'emb_dim is 1099511627776; expected a whole'),
    (fields(num_heads=-1), 'num_heads is -1; expected 0 or more'),
    (fields(num_heads=0), 'num_heads=0: expected a positive'),
    (fields(norm_epsilon=float('nan')), 'norm_epsilon is nan; expected a fin'),
    (fields(scale_logits=1), 'scale_logits is 1; expected true or false'),
    (fields(mlp_activations='relu'), "mlp_activations is 'relu'; expected a l"),
    (fields(norm=['rms']), "norm is ['rms']; expected a string"),
    (fields(num_kv_heads=0), 'num_kv_heads is 0; expected more than 0'),
    (fields(relpos_max_distance=1), 'relpos_max_distance=1: expected'),
  ],
)
def test_a_config_out_of_a_file_names_file_and_field(content, message):
  with pytest.raises(ValueError) as error:
    config_lib.from_json(content, 'run/model.json', 'slm')
  words = str(error.value)
  assert words.startswith('run/model.json, slm')
  assert message in words
  assert '\n' not in words
