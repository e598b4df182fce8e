# SPDX-License-Identifier: Apache-2.0
"""What goes out as a Hugging Face folder is what transformers would save.

Whole conversions, and what is written for a run of two towers, are in
`test_convert.py`; what the models compute is in `test_parity.py`.
"""

import dataclasses
import json
from typing import Any

import helpers
import numpy as np
import pytest
from flax import traverse_util

from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s
from l2s_jax.weights import converted
from l2s_jax.weights.formats import huggingface

COMMON: dict[str, Any] = {'vocab_size': 67, 'hidden_size': 24}
T5: dict[str, Any] = {
  'model_type': 't5',
  'vocab_size': 67,
  'd_model': 16,
  'num_heads': 4,
  'd_kv': 6,
  'd_ff': 20,
  'num_layers': 3,
  'num_decoder_layers': 2,
}
LLAMA: dict[str, Any] = COMMON | {
  'model_type': 'llama',
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'intermediate_size': 28,
  'num_hidden_layers': 3,
}
GEMMA2 = LLAMA | {'model_type': 'gemma2', 'sliding_window': 5}
MODELS: dict[str, dict[str, Any]] = {
  't5': T5,
  'umt5': T5 | {'model_type': 'umt5', 'tie_word_embeddings': False},
  't5gemma': {
    'model_type': 't5gemma',
    'encoder': GEMMA2 | {'model_type': 't5_gemma_module'},
    'decoder': GEMMA2 | {'model_type': 't5_gemma_module'},
  },
  'gpt2': {
    'model_type': 'gpt2',
    'vocab_size': 67,
    'n_embd': 20,
    'n_head': 4,
    'n_layer': 2,
  },
  'opt': COMMON
  | {
    'model_type': 'opt',
    'word_embed_proj_dim': 24,
    'num_attention_heads': 4,
    'ffn_dim': 28,
    'num_hidden_layers': 2,
  },
  'gpt_neox': COMMON
  | {
    'model_type': 'gpt_neox',
    'num_attention_heads': 3,
    'intermediate_size': 28,
    'num_hidden_layers': 2,
  },
  'llama': LLAMA,
  'mistral': LLAMA | {'model_type': 'mistral', 'sliding_window': 5},
  'mistral-without-window': LLAMA
  | {'model_type': 'mistral', 'sliding_window': None},
  'olmo2': LLAMA | {'model_type': 'olmo2'},
  'smollm3': LLAMA
  | {
    'model_type': 'smollm3',
    'no_rope_layer_interval': 2,
    'pad_token_id': 0,  # The default is beyond this vocabulary.
  },
  'qwen2': LLAMA
  | {
    'model_type': 'qwen2',
    'head_dim': 4,
    'use_sliding_window': True,
    'sliding_window': 5,
    'max_window_layers': 1,
  },
  'qwen3': LLAMA | {'model_type': 'qwen3', 'tie_word_embeddings': True},
  'gemma2': GEMMA2,
}
# No tokenizer names these.
SPECIAL_IDS: dict[str, Any] = {
  'bos_token_id': 7,
  'eos_token_id': [9, 11],
  'pad_token_id': 13,
}


def source_of(config):
  return helpers.Arrays(config, helpers.random_params(l2s.build(config)))


def read_config(folder):
  return json.loads((folder / 'config.json').read_text())


def through_ours(first, folder):
  """Converts a Hugging Face folder to ours and back; returns the last."""
  converted.save(
    Digested(huggingface.HuggingFaceFolder(first)), folder / 'ours'
  )
  last = folder / 'last'
  to_huggingface.save(converted.ConvertedFolder(folder / 'ours'), last, None)
  return last


class Digested:
  """A source that knows its digests, as `convert` makes it one."""

  def __init__(self, source):
    self._source = source
    self._arrays = helpers.Arrays(source.config, {})
    self._arrays.arrays = {path: source.read(path) for path in source.shapes()}

  def __getattr__(self, name):
    return getattr(self._source, name)

  def digest(self, path):
    return self._arrays.digest(path)


@pytest.mark.parametrize('name', MODELS)
def test_what_save_pretrained_left_comes_back_to_the_byte(name, tmp_path):
  torch, transformers = helpers.import_reference()
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**MODELS[name])
  kind = 'Seq2SeqLM' if config.is_encoder_decoder else 'CausalLM'
  model = getattr(transformers, f'AutoModelFor{kind}').from_config(config)
  model.save_pretrained(tmp_path / 'first')
  last = through_ours(tmp_path / 'first', tmp_path)
  file = 'model.safetensors'
  assert (last / file).read_bytes() == (tmp_path / 'first' / file).read_bytes()


@pytest.mark.parametrize('config', [helpers.T5_1_1, helpers.GPT2])
def test_special_ids_stay_as_config_json_had_them(config, tmp_path):
  first = tmp_path / 'first'
  to_huggingface.save(source_of(config), first, helpers.vocabulary())
  content = read_config(first)
  written = {key for key in content if key.endswith('token_id')}
  ids = SPECIAL_IDS | {'decoder_start_token_id': None}
  rest = {k: v for k, v in content.items() if k not in written}
  for expected in (ids, {}):
    (first / 'config.json').write_text(json.dumps(rest | expected))
    last = tmp_path / f'{len(expected)} ids'
    # A tokenizer has no say where the source was transformers'.
    source = huggingface.HuggingFaceFolder(first)
    to_huggingface.save(source, last, helpers.vocabulary())
    for folder in (last, through_ours(first, last)):
      found = read_config(folder)
      assert {k: v for k, v in found.items() if 'token_id' in k} == expected


def test_special_ids_of_t5gemma_stay_on_the_level_where_they_were(tmp_path):
  first = tmp_path / 'first'
  to_huggingface.save(source_of(helpers.T5GEMMA), first, helpers.vocabulary())
  content = read_config(first)
  # Of a model that is not transformers', its sides are told as it is.
  eos_id = helpers.vocabulary().eos_id
  for part in (content, content['encoder'], content['decoder']):
    assert part['eos_token_id'] == eos_id
    for key in [key for key in part if key.endswith('token_id')]:
      del part[key]
  content['decoder'] |= SPECIAL_IDS
  content['encoder'] |= {'pad_token_id': 3}
  (first / 'config.json').write_text(json.dumps(content))
  assert read_config(through_ours(first, tmp_path)) == content


def test_only_a_pad_token_that_the_tokenizer_names_is_written(tmp_path):
  source = source_of(helpers.GPT2)
  vocabulary = helpers.vocabulary()
  to_huggingface.save(source, tmp_path / 'without', vocabulary)
  found = read_config(tmp_path / 'without')
  assert not vocabulary.has_pad
  assert 'pad_token_id' not in found
  assert found['eos_token_id'] == vocabulary.eos_id


@pytest.mark.parametrize('num_decoder_layers', [3, 0])
def test_an_encoder_of_t5gemma_is_one_of_transformers(
  num_decoder_layers, tmp_path
):
  torch, transformers = helpers.import_reference()
  config = huggingface.FAMILIES['t5gemma'].parse(
    transformers.AutoConfig.for_model(**MODELS['t5gemma']).to_dict(), True
  )
  config = dataclasses.replace(config, dropout_rate=0.0)
  params = helpers.random_params(l2s.build(config))
  encoder = {k: params[k] for k in ('token_embedder', 'encoder')}
  config = dataclasses.replace(config, num_decoder_layers=num_decoder_layers)
  source = helpers.Arrays(config, encoder)
  to_huggingface.save(source, tmp_path, None)

  again = huggingface.HuggingFaceFolder(tmp_path)
  assert again.config == config
  for path, array in traverse_util.flatten_dict(encoder).items():
    np.testing.assert_array_equal(again.read(path), array)
  model, report = transformers.T5GemmaEncoderModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report.values()), report
  theirs = model.get_input_embeddings().weight.detach().numpy()
  np.testing.assert_array_equal(
    theirs, source.read(('token_embedder', 'embedding'))
  )
