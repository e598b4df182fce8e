# SPDX-License-Identifier: Apache-2.0
"""Every preset is the model it is named after; the model files bind systems."""

import json
import math
import pathlib
from typing import Any

import gin
import jax
import numpy as np
import pytest
import safetensors.numpy

from l2s_jax import gin_utils, parameters, partition, systems, vocabularies
from l2s_jax.models import l2s
from l2s_jax.weights import huggingface

MODELS = gin_utils.REPO_ROOT / 'gin_configs' / 'models'

# Parameters of the released checkpoints, counted in the modules of transformers
# 5.23 at the published sizes. A tied head is no second table.
NUM_PARAMETERS = {
  't5_small': 60_506_624,
  't5_base': 222_903_552,
  't5_large': 737_668_096,
  't5_3b': 2_851_598_336,
  't5_11b': 11_307_321_344,
  't5_1_1_small': 76_961_152,
  't5_1_1_base': 247_577_856,
  't5_1_1_large': 783_150_080,
  't5_1_1_xl': 2_849_757_184,
  't5_1_1_xxl': 11_135_332_352,
  'mt5_small': 300_176_768,
  'mt5_base': 582_401_280,
  'mt5_large': 1_229_581_312,
  'mt5_xl': 3_742_619_648,
  'mt5_xxl': 12_921_057_280,
  'gpt2': 124_439_808,
  'gpt2_medium': 354_823_168,
  'gpt2_large': 774_030_080,
  'gpt2_xl': 1_557_611_200,
}

# What matters of config.json as it lies on the Hugging Face Hub.
RELEASED: dict[str, dict[str, Any]] = {
  't5_small': {
    'model_type': 't5',
    'd_ff': 2048,
    'd_kv': 64,
    'd_model': 512,
    'dropout_rate': 0.1,
    'layer_norm_epsilon': 1e-6,
    'num_heads': 8,
    'num_layers': 6,
    'relative_attention_num_buckets': 32,
    'vocab_size': 32128,
  },
  't5_1_1_small': {
    'model_type': 't5',
    'd_ff': 1024,
    'd_kv': 64,
    'd_model': 512,
    'dropout_rate': 0.1,
    'feed_forward_proj': 'gated-gelu',
    'layer_norm_epsilon': 1e-6,
    'num_decoder_layers': 8,
    'num_heads': 6,
    'num_layers': 8,
    'relative_attention_num_buckets': 32,
    'tie_word_embeddings': False,
    'vocab_size': 32128,
  },
  'mt5_small': {
    'model_type': 'mt5',
    'd_ff': 1024,
    'd_kv': 64,
    'd_model': 512,
    'dropout_rate': 0.1,
    'feed_forward_proj': 'gated-gelu',
    'layer_norm_epsilon': 1e-6,
    'num_decoder_layers': 8,
    'num_heads': 6,
    'num_layers': 8,
    'relative_attention_num_buckets': 32,
    'tie_word_embeddings': False,
    'vocab_size': 250112,
  },
  'gpt2': {
    'model_type': 'gpt2',
    'activation_function': 'gelu_new',
    'initializer_range': 0.02,
    'layer_norm_epsilon': 1e-5,
    'n_embd': 768,
    'n_head': 12,
    'n_layer': 12,
    'n_positions': 1024,
    'resid_pdrop': 0.1,
    'vocab_size': 50257,
  },
}


@pytest.fixture(autouse=True)
def clear_gin():
  yield
  gin.clear_config()


def parse(*names, bindings=()):
  files = [str(MODELS / f'{name}.gin') for name in names]
  return gin_utils.parse_config(files, bindings)


def test_every_preset_is_tested():
  names = {
    path.stem
    for pattern in ('t5_*.gin', 'mt5_*.gin', 'gpt2*.gin')
    for path in MODELS.glob(pattern)
  }
  assert names == set(NUM_PARAMETERS)


def load_preset(name):
  parse('slm_baseline', name, bindings=[f'SLM=%{name.upper()}'])
  with gin.config_scope('slm'):
    return gin.get_configurable(systems.Tower)().load_config()


@pytest.mark.parametrize('name', NUM_PARAMETERS)
def test_a_preset_has_as_many_parameters_as_the_released_model(name):
  module = l2s.build(load_preset(name))
  shapes, _ = partition.abstract_params(
    lambda key, batch: module.init(key, batch, deterministic=True),
    jax.random.key(0),
    parameters.example_batch(1, 2, 2),
  )
  sizes = [math.prod(x.shape) for x in jax.tree.leaves(shapes)]
  assert sum(sizes) == NUM_PARAMETERS[name]


@pytest.mark.parametrize('name', RELEASED)
def test_a_preset_is_what_the_released_config_json_says(name):
  released = RELEASED[name]
  parse_released = huggingface.FAMILIES[released['model_type']].parse
  is_tied = released.get('tie_word_embeddings', True)
  assert load_preset(name) == parse_released(released, is_tied)


@pytest.fixture
def vocabulary(tmp_path):
  path = tmp_path / 'spiece.model'
  text = [f'the {n} small cats sat on a mat' for n in range(100, 400)]
  vocabularies.train_sentencepiece(text, path, vocab_size=40)
  return str(path)


def make_model():
  """Returns what the macro MODEL stands for."""
  return gin.query_parameter('MODEL/gin.macro.value').scoped_configurable_fn()


def test_two_presets_meet_in_one_llm_to_slm(tmp_path, vocabulary):
  parse(
    'llm_to_slm',
    't5_1_1_xl',
    'gpt2',
    bindings=[
      f'LLM_PATH={tmp_path}',
      'LLM=%T5_1_1_XL',
      f'LLM_VOCABULARY={vocabulary}',
      'LLM_EXTRA_IDS=100',
      'LLM_DTYPE=bfloat16',
      'SLM=%GPT2',
      f'SLM_VOCABULARY={vocabulary}',
      'INJECTION=replace',
      'DROPOUT_RATE=0.3',
    ],
  )
  system = make_model()
  assert system.module.llm_config.emb_dim == 2048
  assert system.module.llm_config.dtype == 'bfloat16'
  assert system.module.slm_config.emb_dim == 768
  assert system.module.slm_config.dropout_rate == 0.3
  assert system.module.injection == 'replace'
  assert not system.module.shared_vocabulary
  assert system.prompt_vocabulary.vocab_size == 140
  assert system.answer_vocabulary.vocab_size == 40
  assert system.sources == {'llm': str(tmp_path)}


def test_a_hugging_face_folder_brings_config_and_tokenizer(vocabulary):
  folder = pathlib.Path(vocabulary).parent  # where spiece.model is
  config_json = RELEASED['t5_1_1_small'] | {'d_model': 16, 'vocab_size': 128}
  (folder / 'config.json').write_text(json.dumps(config_json))
  tensors = {'shared.weight': np.zeros((128, 16), np.float32)}
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  parse('llm_to_slm', bindings=[f'LLM_PATH={folder}', f'SLM_PATH={folder}'])
  system = make_model()
  assert system.module.llm_config.emb_dim == 16
  assert system.prompt_vocabulary.vocab_size == 40
  assert system.module.shared_vocabulary
  assert system.sources == {'llm': str(folder), 'slm': str(folder)}


def test_llm_to_slm_must_be_told_where_its_llm_is():
  required = parse('llm_to_slm').required
  with pytest.raises(ValueError, match='add --gin.LLM_PATH=VALUE'):
    gin_utils.check_required(systems.llm_to_slm_system, (), required)


@pytest.mark.parametrize('tower', ['LLM', 'SLM'])
def test_a_baseline_is_its_tower_alone(tower, vocabulary):
  parse(
    f'{tower.lower()}_baseline',
    't5_small',
    bindings=[f'{tower}=%T5_SMALL', f'{tower}_VOCABULARY={vocabulary}'],
  )
  system = make_model()
  assert system.module.config.emb_dim == 512
  assert system.module.config.dropout_rate == 0.1
  assert system.sources == {}


def test_a_later_file_sets_what_an_earlier_one_left_open(tmp_path, vocabulary):
  experiment = tmp_path / 'experiment.gin'
  experiment.write_text(
    f"include '{MODELS}/t5_small.gin'\n"
    f"include '{MODELS}/slm_baseline.gin'\n"
    f"SLM = %T5_SMALL\nSLM_VOCABULARY = '{vocabulary}'\nDROPOUT_RATE = 0.2\n"
  )
  gin_utils.parse_config([str(experiment)], ['DROPOUT_RATE=0.5'])
  assert make_model().module.config.dropout_rate == 0.5
