# SPDX-License-Identifier: Apache-2.0
"""Every preset is the model it is named after; the model files bind systems."""

import json
import math
import pathlib
from typing import Any

import gin
import helpers
import pytest

from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import gin_config
from l2s_jax.systems import builders
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import sentencepiece
from l2s_jax.weights.formats import huggingface

MODELS = gin_config.REPO_ROOT / 'gin_configs' / 'models'

# Files that bind systems, not models.
SYSTEMS = {
  'llm_baseline',
  'llm_to_slm',
  'multi30k',
  'quickstart',
  'slm_baseline',
}

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
  'byt5_small': 299_637_760,
  'byt5_base': 581_653_248,
  'byt5_large': 1_228_183_552,
  'byt5_xl': 3_737_801_728,
  'byt5_xxl': 12_906_899_328,
  'umt5_small': 306_601_984,
  'umt5_base': 592_043_520,
  'umt5_xl': 3_768_356_864,
  'umt5_xxl': 12_972_531_712,
  'ul2': 19_459_613_696,
  't5gemma_s_s': 312_517_632,
  't5gemma_b_b': 591_490_560,
  't5gemma_l_l': 1_241_761_792,
  't5gemma_ml_ml': 2_200_345_344,
  't5gemma_xl_xl': 3_766_980_608,
  't5gemma_2b_2b': 5_596_853_760,
  't5gemma_9b_9b': 20_333_401_088,
  't5gemma_9b_2b': 9_241_705_984,  # of T5GemmaEncoderModel
  'opt_125m': 125_239_296,
  'opt_1_3b': 1_315_758_080,
  'pythia_70m': 70_426_624,
  'pythia_160m': 162_322_944,
  'pythia_410m': 405_334_016,
  'pythia_1b': 1_011_781_632,
  'pythia_1_4b': 1_414_647_808,
  'smollm2_135m': 134_515_008,
  'smollm2_360m': 361_821_120,
  'tinyllama_1_1b': 1_100_048_384,
  'llama_3_2_1b': 1_235_814_400,
  'mistral_7b_v0_1': 7_241_732_096,
  'olmo_2_1b': 1_484_916_736,
  'smollm3_3b': 3_075_098_624,
  'qwen2_5_0_5b': 494_032_768,
  'qwen3_0_6b': 596_049_920,
  'gemma3_270m': 268_098_176,
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
  'ul2': {
    'model_type': 't5',
    'd_ff': 16384,
    'd_kv': 256,
    'd_model': 4096,
    'dense_act_fn': 'silu',
    'dropout_rate': 0.1,
    'feed_forward_proj': 'gated-silu',
    'is_gated_act': True,
    'layer_norm_epsilon': 1e-6,
    'num_decoder_layers': 32,
    'num_heads': 16,
    'num_layers': 32,
    'relative_attention_num_buckets': 32,
    'vocab_size': 32128,
  },
  'umt5_xl': {
    'model_type': 'umt5',
    'd_ff': 5120,
    'd_kv': 64,
    'd_model': 2048,
    'dense_act_fn': 'gelu_new',
    'dropout_rate': 0.1,
    'feed_forward_proj': 'gated-gelu',
    'is_gated_act': True,
    'layer_norm_epsilon': 1e-6,
    'num_decoder_layers': 24,
    'num_heads': 32,
    'num_layers': 24,
    'relative_attention_num_buckets': 32,
    'tie_word_embeddings': False,
    'vocab_size': 256384,
  },
  'opt_1_3b': {
    'model_type': 'opt',
    'activation_function': 'relu',
    'do_layer_norm_before': True,
    'dropout': 0.1,
    'ffn_dim': 8192,
    'hidden_size': 2048,
    'init_std': 0.02,
    'max_position_embeddings': 2048,
    'num_attention_heads': 32,
    'num_hidden_layers': 24,
    'vocab_size': 50272,
    'word_embed_proj_dim': 2048,
  },
  'pythia_70m': {
    'model_type': 'gpt_neox',
    'hidden_act': 'gelu',
    'hidden_size': 512,
    'initializer_range': 0.02,
    'intermediate_size': 2048,
    'layer_norm_eps': 1e-5,
    'max_position_embeddings': 2048,
    'num_attention_heads': 8,
    'num_hidden_layers': 6,
    'rotary_emb_base': 10000,
    'rotary_pct': 0.25,
    'tie_word_embeddings': False,
    'use_parallel_residual': True,
    'vocab_size': 50304,
  },
  'smollm2_135m': {
    'model_type': 'llama',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'head_dim': 64,
    'hidden_act': 'silu',
    'hidden_size': 576,
    'initializer_range': 0.041666666666666664,
    'intermediate_size': 1536,
    'max_position_embeddings': 8192,
    'mlp_bias': False,
    'num_attention_heads': 9,
    'num_hidden_layers': 30,
    'num_key_value_heads': 3,
    'rms_norm_eps': 1e-5,
    'rope_scaling': None,
    'rope_theta': 100000,
    'tie_word_embeddings': True,
    'vocab_size': 49152,
  },
  'tinyllama_1_1b': {
    'model_type': 'llama',
    'hidden_act': 'silu',
    'hidden_size': 2048,
    'initializer_range': 0.02,
    'intermediate_size': 5632,
    'max_position_embeddings': 2048,
    'num_attention_heads': 32,
    'num_hidden_layers': 22,
    'num_key_value_heads': 4,
    'rms_norm_eps': 1e-5,
    'rope_scaling': None,
    'tie_word_embeddings': False,
    'vocab_size': 32000,
  },
  'llama_3_2_1b': {
    'model_type': 'llama',
    'attention_bias': False,
    'head_dim': 64,
    'hidden_act': 'silu',
    'hidden_size': 2048,
    'initializer_range': 0.02,
    'intermediate_size': 8192,
    'max_position_embeddings': 131072,
    'mlp_bias': False,
    'num_attention_heads': 32,
    'num_hidden_layers': 16,
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-5,
    'rope_scaling': {
      'factor': 32.0,
      'high_freq_factor': 4.0,
      'low_freq_factor': 1.0,
      'original_max_position_embeddings': 8192,
      'rope_type': 'llama3',
    },
    'rope_theta': 500000.0,
    'tie_word_embeddings': True,
    'vocab_size': 128256,
  },
  'mistral_7b_v0_1': {
    'model_type': 'mistral',
    'hidden_act': 'silu',
    'hidden_size': 4096,
    'initializer_range': 0.02,
    'intermediate_size': 14336,
    'max_position_embeddings': 32768,
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'sliding_window': 4096,
    'tie_word_embeddings': False,
    'vocab_size': 32000,
  },
  'olmo_2_1b': {
    'model_type': 'olmo2',
    'attention_bias': False,
    'hidden_act': 'silu',
    'hidden_size': 2048,
    'initializer_range': 0.02,
    'intermediate_size': 8192,
    'max_position_embeddings': 4096,
    'num_attention_heads': 16,
    'num_hidden_layers': 16,
    'num_key_value_heads': 16,
    'rms_norm_eps': 1e-6,
    'rope_scaling': None,
    'rope_theta': 500000,
    'tie_word_embeddings': False,
    'vocab_size': 100352,
  },
  'smollm3_3b': {
    'model_type': 'smollm3',
    'attention_bias': False,
    'hidden_act': 'silu',
    'hidden_size': 2048,
    'initializer_range': 0.02,
    'intermediate_size': 11008,
    'layer_types': ['full_attention'] * 36,
    'max_position_embeddings': 65536,
    'mlp_bias': False,
    'no_rope_layer_interval': 4,
    'no_rope_layers': [1, 1, 1, 0] * 9,
    'num_attention_heads': 16,
    'num_hidden_layers': 36,
    'num_key_value_heads': 4,
    'rms_norm_eps': 1e-6,
    'rope_scaling': None,
    'rope_theta': 5000000.0,
    'sliding_window': None,
    'tie_word_embeddings': True,
    'use_sliding_window': False,
    'vocab_size': 128256,
  },
  'qwen2_5_0_5b': {
    'model_type': 'qwen2',
    'attention_dropout': 0.0,
    'hidden_act': 'silu',
    'hidden_size': 896,
    'initializer_range': 0.02,
    'intermediate_size': 4864,
    'max_position_embeddings': 32768,
    'num_attention_heads': 14,
    'num_hidden_layers': 24,
    'num_key_value_heads': 2,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    'sliding_window': 32768,
    'tie_word_embeddings': True,
    'use_sliding_window': False,
    'vocab_size': 151936,
  },
  'qwen3_0_6b': {
    'model_type': 'qwen3',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'head_dim': 128,
    'hidden_act': 'silu',
    'hidden_size': 1024,
    'initializer_range': 0.02,
    'intermediate_size': 3072,
    'max_position_embeddings': 40960,
    'num_attention_heads': 16,
    'num_hidden_layers': 28,
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-6,
    'rope_scaling': None,
    'rope_theta': 1000000,
    'tie_word_embeddings': True,
    'use_sliding_window': False,
    'vocab_size': 151936,
  },
}


@pytest.fixture(autouse=True)
def clear_gin():
  yield
  gin.clear_config()


def parse(*names, bindings=()):
  files = [str(MODELS / f'{name}.gin') for name in names]
  return gin_config.parse_config(files, bindings)


def test_every_preset_is_tested():
  names = {path.stem for path in MODELS.glob('*.gin')} - SYSTEMS
  assert names == set(NUM_PARAMETERS)


def load_preset(name):
  parse('slm_baseline', name, bindings=[f'SLM=%{name.upper()}'])
  with gin.config_scope('slm'):
    return gin.get_configurable(system_lib.Tower)().load_config()


@pytest.mark.parametrize('name', NUM_PARAMETERS)
def test_a_preset_has_as_many_parameters_as_the_released_model(name):
  shapes = shapes_lib.of_model(load_preset(name)).values()
  assert sum(math.prod(x.shape) for x in shapes) == NUM_PARAMETERS[name]


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
  sentencepiece.train(text, path, vocab_size=40)
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
  config = huggingface.FAMILIES['t5'].parse(config_json, False)
  params = helpers.random_params(l2s.build(config))
  to_huggingface.save(helpers.Arrays(config, params), folder, None)
  (folder / 'config.json').write_text(json.dumps(config_json))
  parse('llm_to_slm', bindings=[f'LLM_PATH={folder}', f'SLM_PATH={folder}'])
  system = make_model()
  assert system.module.llm_config.emb_dim == 16
  # With the 100 sentinels that AutoTokenizer adds to a T5's folder.
  assert system.prompt_vocabulary.vocab_size == 140
  assert system.module.shared_vocabulary
  assert system.sources == {'llm': str(folder), 'slm': str(folder)}


def test_llm_to_slm_must_be_told_where_its_llm_is():
  required = parse('llm_to_slm').required
  with pytest.raises(ValueError, match='add --gin.LLM_PATH=VALUE'):
    gin_config.check_required(builders.llm_to_slm_system, (), required)


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
  gin_config.parse_config([str(experiment)], ['DROPOUT_RATE=0.5'])
  assert make_model().module.config.dropout_rate == 0.5
