# SPDX-License-Identifier: Apache-2.0
"""Tables of names are whole, and a config.json that we cannot be is refused.

That the tables are right is for `test_parity.py` to say.
"""

import dataclasses
import math

import helpers
import numpy as np
import pytest
from flax import traverse_util

from l2s_jax.models import batch_keys, l2s
from l2s_jax.runtime import partitioning
from l2s_jax.weights.families import name_table
from l2s_jax.weights.formats import huggingface

CONFIGS = {
  't5': helpers.T5_1_0,
  'mt5': helpers.T5_1_1,
  'umt5': helpers.UMT5,
  'gpt2': helpers.GPT2,
  'opt': helpers.OPT,
  'gpt_neox': helpers.PYTHIA,
  'llama': dataclasses.replace(helpers.LLAMA, attention_bias='all'),
  'mistral': helpers.MISTRAL,
  'olmo2': helpers.OLMO2,
  'smollm3': helpers.SMOLLM3,
  'qwen2': helpers.QWEN2,
  'qwen3': helpers.QWEN3,
  'gemma2': dataclasses.replace(
    helpers.GEMMA3, qk_norm=False, rope_local_base=None
  ),
  'gemma3_text': helpers.GEMMA3,
  't5gemma': helpers.T5GEMMA,
}


def parse(model_type, **changes):
  config = CONFIGS[model_type]
  config_json = huggingface.config_json(model_type, config) | changes
  family = huggingface.FAMILIES[model_type]
  return family.parse(config_json, config.logits_via_embedding)


def test_every_family_is_tested():
  assert CONFIGS.keys() == huggingface.FAMILIES.keys()


@pytest.mark.parametrize('model_type', CONFIGS)
def test_a_config_comes_back_from_config_json(model_type):
  config = CONFIGS[model_type]
  assert model_type in huggingface.model_types(config)
  found = parse(model_type)
  if config.is_encoder_decoder and model_type != 't5gemma':
    found = dataclasses.replace(  # T5's config.json has no such thing
      found, kernel_init_stddev=None, embedding_init_stddev=1.0
    )
  assert found == config


@pytest.mark.parametrize('model_type', CONFIGS)
def test_a_table_has_a_row_for_every_parameter_and_fills_what_it_names(
  model_type,
):
  config = CONFIGS[model_type]
  module = l2s.build(config)
  shapes, _ = partitioning.abstract_params(
    lambda key, batch: module.init(key, batch, deterministic=True),
    batch_keys.example_batch(1, 2, 2),
  )
  sizes = name_table.axis_sizes(config)
  table = {row.path: row for row in huggingface.FAMILIES[model_type].rows}
  theirs: dict[str, np.ndarray] = {}
  for path, shape in traverse_util.flatten_dict(shapes).items():
    row = table[path]
    layer_shape = tuple(sizes[letter] for letter in row.letters())
    names = row.names(config)
    assert shape.shape == ((len(names),) if row.is_stacked else ()) + (
      layer_shape
    )
    for name in names:
      theirs.setdefault(name, np.zeros(row.shape(sizes), np.int32))
      # Where to_ours looks, to_theirs writes.
      marks = np.arange(theirs[name].size).reshape(theirs[name].shape)
      theirs[name].reshape(-1)[row.to_ours(marks, sizes).reshape(-1)] += 1
  assert all((filled == 1).all() for filled in theirs.values())


SUB_CONFIG = huggingface.config_json('t5gemma', helpers.T5GEMMA)['encoder']


@pytest.mark.parametrize(
  'model_type, changes, message',
  [
    ('opt', {'word_embed_proj_dim': 8}, 'word_embed_proj_dim=8 .*OPT-350M'),
    ('opt', {'num_attention_heads': 3}, 'hidden_size=16 does not divide'),
    ('gpt_neox', {'rope_scaling': {'type': 'dynamic'}}, "'dynamic'; supported"),
    ('llama', {'rope_scaling': {'rope_type': 'linear'}}, 'without factor'),
    (
      'llama',
      {'rope_scaling': {'rope_type': 'yarn', 'mscale': 2.0}},
      'yarn with mscale=2.0',
    ),
    ('llama', {'hidden_act': 'mish'}, "'mish'; supported"),
    ('qwen2', {'mlp_bias': True}, 'mlp_bias is true and attention_bias is not'),
    (
      'smollm3',
      {'no_rope_layers': [0, 1]},
      'no_rope_layers is not 0 every 1 layers and 1 between, for 2 layers',
    ),
    (
      'smollm3',
      {'no_rope_layers': None, 'no_rope_layer_interval': 0},
      'no_rope_layer_interval is 0; expected 1 or more',
    ),
    (
      'smollm3',
      {'layer_types': ['full_attention', 'sliding_attention']},
      'layer_types has others than full_attention',
    ),
    ('mistral', {'sliding_window': 0}, 'sliding_window is 0; expected null'),
    (
      'qwen2',
      {'layer_types': ['sliding_attention', 'full_attention']},
      'not full_attention in the first 0 layers and sliding_attention in the',
    ),
    (
      'qwen3',
      {'layer_types': ['full_attention', 'sliding_attention']},
      'sliding_attention, without use_sliding_window and sliding_window',
    ),
    (
      'gemma3_text',
      {'layer_types': ['sliding_attention', *['full_attention'] * 4]},
      'not full_attention every 2 layers',
    ),
    (
      'gemma3_text',
      {
        'rope_parameters': {
          'full_attention': {'rope_theta': 1e6},
          'sliding_attention': {
            'rope_theta': 1e4,
            'rope_type': 'linear',
            'factor': 8.0,
          },
        }
      },
      'sliding_attention layers have RoPE',
    ),
    (
      'gemma3_text',
      {'use_bidirectional_attention': True},
      'use_bidirectional_attention',
    ),
    (
      't5gemma',
      {'encoder': {k: v for k, v in SUB_CONFIG.items() if k != 'head_dim'}},
      'encoder lacks head_dim',
    ),
  ],
)
def test_what_we_cannot_be_is_refused_by_its_name(model_type, changes, message):
  with pytest.raises(ValueError, match=message):
    parse(model_type, **changes)


def test_a_t5gemma_of_two_sizes_is_its_encoder():
  config = parse('t5gemma', encoder=SUB_CONFIG | {'hidden_size': 24})
  assert (config.emb_dim, config.num_encoder_layers) == (24, 3)
  assert not config.has_decoder
  assert huggingface.model_types(config) == ['t5gemma']
  family = huggingface.FAMILIES['t5gemma']
  whole = huggingface.config_json('t5gemma', helpers.T5GEMMA)
  assert family.left_out(whole) == ''
  said = family.left_out(whole | {'encoder': SUB_CONFIG | {'hidden_size': 24}})
  assert said == 'the decoder is left out, which differs in emb_dim'
  with pytest.raises(ValueError, match='num_decoder_layers=0: this is an enc'):
    l2s.build(config)


@pytest.mark.parametrize(
  'rope, numbers',
  [
    ({'rope_type': 'linear', 'factor': 8.0}, (8.0,)),
    # What YaRN's authors recommend.
    (
      {
        'type': 'yarn',
        'factor': 4.0,
        'original_max_position_embeddings': 32768,
      },
      (4.0, 32.0, 1.0, 32768.0, 1 + 0.1 * math.log(4)),
    ),
  ],
)
def test_a_stretched_context_is_read_and_said(rope, numbers):
  config = parse('qwen2', rope_scaling=rope)
  assert config.rope_scaling == numbers
  unparsed = huggingface.config_json('qwen2', config)['rope_scaling']
  again = parse('qwen2', rope_scaling=unparsed)
  assert again == config


def test_layers_with_a_window_are_not_stretched_whatever_their_base():
  stretched = {'rope_type': 'linear', 'factor': 8.0}
  base = {'rope_theta': 1e4, 'rope_local_base_freq': 1e4}
  config = parse('gemma3_text', **base, rope_scaling=stretched)
  assert (config.rope_base, config.rope_local_base) == (1e4, 1e4)
  assert parse('gemma3_text', **base).rope_local_base is None
  # Which no config.json says.
  all_stretched = dataclasses.replace(config, rope_local_base=None)
  assert 'gemma3_text' not in huggingface.model_types(all_stretched)


@pytest.mark.parametrize('model_type', ['qwen2', 'qwen3'])
@pytest.mark.parametrize(
  'said, expected',
  [
    ({'use_sliding_window': False}, (0, 0)),
    ({'sliding_window': None}, (0, 0)),
    ({'max_window_layers': 2}, (0, 0)),
    ({'max_window_layers': None}, (0, 0)),  # the default is 28
    ({'max_window_layers': 1}, (3, 1)),
    ({'max_window_layers': 0}, (3, 0)),
    ({'max_window_layers': 0, 'sliding_window': ...}, (4096, 0)),
    (
      {'max_window_layers': 5, 'layer_types': ['sliding_attention'] * 2},
      (3, 0),
    ),
  ],
)
def test_qwen_has_windows_where_transformers_has_them(
  model_type, said, expected
):
  _, transformers = helpers.import_reference()
  base = {'use_sliding_window': True, 'sliding_window': 3, 'layer_types': None}
  changes = {k: v for k, v in (base | said).items() if v is not ...}
  content = huggingface.config_json(model_type, CONFIGS[model_type])
  absent = base.keys() - changes.keys()
  if said.get('max_window_layers', 0) is None:
    absent |= {'max_window_layers'}
  content = {k: v for k, v in (content | changes).items() if k not in absent}
  found = huggingface.FAMILIES[model_type].parse(content, True)
  assert (found.sliding_window, found.first_window_layer) == expected
  theirs = transformers.AutoConfig.for_model(**content)
  windows = [kind == 'sliding_attention' for kind in theirs.layer_types]
  window, first = expected
  assert windows == [window > 0 and layer >= first for layer in range(2)]
  if window:
    assert theirs.sliding_window == window


def test_a_mistral_may_have_no_window():
  assert parse('mistral', sliding_window=None).sliding_window == 0
  # Which is a Llama, where nobody said what it is.
  plain = dataclasses.replace(helpers.MISTRAL, sliding_window=0)
  assert huggingface.model_types(plain)[:2] == ['llama', 'mistral']
  assert huggingface.model_types(helpers.MISTRAL) == ['mistral']


@pytest.mark.parametrize('model_type, base', [('llama', 1e4), ('smollm3', 2e6)])
def test_a_family_has_its_own_default_of_rope(model_type, base):
  _, transformers = helpers.import_reference()
  content = huggingface.config_json(model_type, CONFIGS[model_type])
  del content['rope_theta']
  assert huggingface.FAMILIES[model_type].parse(content, True).rope_base == base
  theirs = transformers.AutoConfig.for_model(model_type)
  assert theirs.rope_parameters['rope_theta'] == base


def test_both_ways_to_write_rope_are_read():
  """Of transformers 5, and of those before."""
  new = {
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 77.0},
    'rope_scaling': None,
  }
  assert parse('llama', **new).rope_base == 77.0
  assert parse('llama', **new).rope_scaling == ()
  kinds = {
    'full_attention': {'rope_type': 'default', 'rope_theta': 7e5},
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 55.0},
  }
  config = parse('gemma3_text', rope_parameters=kinds)
  assert (config.rope_base, config.rope_local_base) == (7e5, 55.0)
  # A Hub config of Gemma 3 may have a number in place of the list.
  config = parse('gemma3_text', layer_types=None, sliding_window_pattern=3)
  assert config.global_layer_period == 3
