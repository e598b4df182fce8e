# SPDX-License-Identifier: Apache-2.0
"""Weights come in whole, in the right place, or not at all.

Folders are made here by hand; `test_parity.py` has transformers write them.
"""

import json
import zlib
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from l2s_jax.models import batch_keys, l2s
from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import partitioning
from l2s_jax.training import checkpoint, state
from l2s_jax.weights import opening
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.families import name_table
from l2s_jax.weights.formats import huggingface

# No two sizes are equal, so that a transposed tensor has another shape.
T5_JSON: dict[str, Any] = {
  'model_type': 't5',
  'architectures': ['T5ForConditionalGeneration'],
  'vocab_size': 64,
  'd_model': 16,
  'num_heads': 4,
  'd_kv': 6,
  'd_ff': 20,
  'num_layers': 3,
  'num_decoder_layers': 2,
  'relative_attention_num_buckets': 8,
  'relative_attention_max_distance': 20,
  'dropout_rate': 0.2,
}
T5_1_1_JSON = T5_JSON | {
  'feed_forward_proj': 'gated-gelu',
  'tie_word_embeddings': False,
}
GPT2_JSON: dict[str, Any] = {
  'model_type': 'gpt2',
  'architectures': ['GPT2LMHeadModel'],
  'vocab_size': 64,
  'n_embd': 16,
  'n_head': 4,
  'n_inner': 20,
  'n_layer': 2,
  'n_positions': 48,
  'resid_pdrop': 0.2,
}
T5 = config_lib.TransformerConfig(
  vocab_size=64,
  emb_dim=16,
  num_heads=4,
  head_dim=6,
  mlp_dim=20,
  num_encoder_layers=3,
  num_decoder_layers=2,
  relpos_buckets=8,
  relpos_max_distance=20,
  dropout_rate=0.2,
)
T5_1_1 = config_lib.TransformerConfig(
  **T5.to_json()
  | {
    'mlp_activations': ('gelu', 'linear'),
    'logits_via_embedding': False,
    'scale_logits': False,
  }
)
GPT2 = config_lib.TransformerConfig(
  vocab_size=64,
  emb_dim=16,
  num_heads=4,
  head_dim=4,
  mlp_dim=20,
  num_decoder_layers=2,
  mlp_activations=('gelu',),
  norm='layer',
  norm_epsilon=1e-5,
  use_bias=True,
  positions='learned',
  max_positions=48,
  scale_attention=True,
  scale_logits=False,
  dropout_rate=0.2,
  kernel_init_stddev=0.02,
  embedding_init_stddev=0.02,
)
FAMILIES = {
  't5': (T5_JSON, T5),
  't5_1_1': (T5_1_1_JSON, T5_1_1),
  'mt5': (
    T5_1_1_JSON
    | {'model_type': 'mt5', 'architectures': ['MT5ForConditionalGeneration']},
    T5_1_1,
  ),
  'gpt2': (GPT2_JSON, GPT2),
}
FAMILIES |= {
  model_type: (huggingface.config_json(model_type, config), config)
  for model_type, config in {
    'opt': helpers.OPT,
    'gpt_neox': helpers.PYTHIA,
    'mistral': helpers.MISTRAL,
    'olmo2': helpers.OLMO2,
    'smollm3': helpers.SMOLLM3,
    'qwen2': helpers.QWEN2,
    'qwen3': helpers.QWEN3,
    'gemma3_text': helpers.GEMMA3,
    'umt5': helpers.UMT5,
    't5gemma': helpers.T5GEMMA,
  }.items()
}


def model_shapes(config):
  module = l2s.build(config)
  shapes, _ = partitioning.abstract_params(
    lambda key, batch: module.init(key, batch, deterministic=True),
    batch_keys.example_batch(1, 2, 2),
  )
  return shapes


def random_params(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(np.float32), model_shapes(config)
  )


def to_theirs(config_json, config, params):
  """Returns the tensors of a Hugging Face file: the table read backwards."""
  sizes = name_table.axis_sizes(config)
  flat = traverse_util.flatten_dict(params)
  parts: dict[str, list[tuple[name_table.Row, np.ndarray]]] = {}
  for row in huggingface.FAMILIES[config_json['model_type']].rows:
    if row.path not in flat:
      continue
    layers = flat[row.path] if row.is_stacked else [flat[row.path]]
    for name, layer in zip(row.names(config), layers, strict=True):
      parts.setdefault(name, []).append((row, layer))
  return {
    name: name_table.to_theirs(
      [row for row, _ in pairs], [layer for _, layer in pairs], sizes
    )
    for name, pairs in parts.items()
  }


def write_folder(folder, config_json, tensors):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config_json))
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  return folder


def load(folder, shapes):
  """Returns parameters and fingerprint, on one device."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: device, shapes)
  return source_lib.load(opening.open_source(str(folder)), shapes, shardings)


@pytest.fixture(params=FAMILIES)
def family(request):
  """Returns config.json, our config and random parameters of a family."""
  config_json, config = FAMILIES[request.param]
  return config_json, config, random_params(config)


@pytest.fixture
def t5_folder(tmp_path):
  """Returns a whole T5 v1.1 and its tensors, to be spoilt."""
  tensors = to_theirs(T5_1_1_JSON, T5_1_1, random_params(T5_1_1))
  return write_folder(tmp_path / 't5', T5_1_1_JSON, tensors), tensors


def test_a_folder_gives_back_what_was_put_into_it(family, tmp_path):
  config_json, config, params = family
  tensors = to_theirs(config_json, config, params)
  folder = write_folder(tmp_path / 'hf', config_json, tensors)

  source = huggingface.HuggingFaceFolder(folder)
  loaded, _ = load(folder, model_shapes(config))

  assert source.config == config
  assert source.shapes() == {
    path: jax.ShapeDtypeStruct(array.shape, array.dtype)
    for path, array in traverse_util.flatten_dict(params).items()
  }
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_our_config_goes_back_to_the_config_json_it_came_from(family):
  config_json, config, _ = family
  unparsed = huggingface.config_json(config_json['model_type'], config)
  assert unparsed | config_json == unparsed
  assert config_json['model_type'] in huggingface.model_types(config)


def test_a_config_that_no_family_can_say_has_no_model_type():
  other = config_lib.TransformerConfig(**T5.to_json() | {'norm': 'layer'})
  assert huggingface.model_types(other) == []


def test_a_linear_of_pytorch_keeps_outputs_first_heads_outermost(t5_folder):
  folder, tensors = t5_folder
  source = huggingface.HuggingFaceFolder(folder)
  query = source.read(
    ('decoder', 'layers', 'self_attention', 'query', 'kernel')
  )
  out = source.read(('encoder', 'layers', 'self_attention', 'out', 'kernel'))
  bias = source.read(('decoder', 'relpos_bias', 'rel_embedding'))
  layer, d, n, h, bucket = 1, 13, 3, 5, 7
  block = f'block.{layer}.layer.0.SelfAttention'
  row = n * T5_1_1.head_dim + h
  assert query[layer, d, n, h] == tensors[f'decoder.{block}.q.weight'][row, d]
  assert out[layer, n, h, d] == tensors[f'encoder.{block}.o.weight'][d, row]
  assert (
    bias[n, bucket]
    == tensors[
      'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    ][bucket, n]
  )


def test_gpt2_keeps_inputs_first_and_query_key_value_side_by_side(tmp_path):
  tensors = to_theirs(GPT2_JSON, GPT2, random_params(GPT2))
  source = huggingface.HuggingFaceFolder(
    write_folder(tmp_path / 'gpt2', GPT2_JSON, tensors)
  )
  layer, d, n, h = 1, 13, 3, 2
  for part, name in enumerate(('query', 'key', 'value')):
    column = part * GPT2.emb_dim + n * GPT2.head_dim + h
    path = ('decoder', 'layers', 'self_attention', name)
    kernel, bias = source.read((*path, 'kernel')), source.read((*path, 'bias'))
    stored = (
      tensors[f'h.{layer}.attn.c_attn.weight'],
      tensors[f'h.{layer}.attn.c_attn.bias'],
    )
    assert kernel[layer, d, n, h] == stored[0][d, column]
    assert bias[layer, n, h] == stored[1][column]


def test_shards_and_whole_have_the_same_parameters_and_fingerprint(
  family, tmp_path
):
  config_json, config, params = family
  tensors = to_theirs(config_json, config, params)
  whole = write_folder(tmp_path / 'whole', config_json, tensors)
  shards = tmp_path / 'shards'
  shards.mkdir()
  (shards / 'config.json').write_text(json.dumps(config_json))
  names = sorted(tensors)
  weight_map: dict[str, str] = {}
  for i in range(3):
    file = f'model-{i + 1:05}-of-00003.safetensors'
    part = {name: tensors[name] for name in names[i::3]}
    safetensors.numpy.save_file(part, shards / file)
    weight_map |= dict.fromkeys(part, file)
  index = {'metadata': {}, 'weight_map': weight_map}
  (shards / 'model.safetensors.index.json').write_text(json.dumps(index))

  shapes = model_shapes(config)
  loaded, fingerprint = load(shards, shapes)
  assert fingerprint == load(whole, shapes)[1]
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_run_of_ours_has_the_fingerprint_of_the_folder_it_came_from(
  family, tmp_path
):
  config_json, config, params = family
  tensors = to_theirs(config_json, config, params)
  folder = write_folder(tmp_path / 'hf', config_json, tensors)
  run = tmp_path / 'run'
  checkpointer = checkpoint.Checkpointer(run)
  trained = state.TrainState(
    step=jnp.int32(1),
    trainable=jax.tree.map(jnp.asarray, params),
    opt_state=(),
    key=jax.random.key_data(jax.random.key(0)),
  )
  checkpointer.save(trained, {})
  checkpointer.wait()
  checkpointer.close()
  description = {
    'format_version': 1,
    'kind': 'language_model',
    'config': config.to_json(),
    'vocabularies': {},
  }
  (run / 'model.json').write_text(json.dumps(description))

  shapes = model_shapes(config)
  loaded, fingerprint = load(run, shapes)
  assert fingerprint == load(folder, shapes)[1]
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_one_changed_number_changes_the_fingerprint(t5_folder):
  folder, tensors = t5_folder
  shapes = model_shapes(T5_1_1)
  before = load(folder, shapes)[1]
  tensors['encoder.block.2.layer.1.DenseReluDense.wo.weight'][0, 0] += 1
  write_folder(folder, T5_1_1_JSON, tensors)
  assert load(folder, shapes)[1] != before


def test_bfloat16_is_read_as_stored_and_cast_to_what_is_asked(t5_folder):
  folder, tensors = t5_folder
  tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
  write_folder(folder, T5_1_1_JSON, tensors)
  path = ('token_embedder', 'embedding')
  assert (
    huggingface.HuggingFaceFolder(folder).read(path).dtype == ml_dtypes.bfloat16
  )
  loaded, _ = load(folder, model_shapes(T5_1_1))
  np.testing.assert_array_equal(
    loaded['token_embedder']['embedding'],
    tensors['shared.weight'].astype(np.float32),
  )


def test_other_ways_to_save_the_same_model_read_the_same(tmp_path):
  def read(name, config_json, config, tensors):
    folder = write_folder(tmp_path / name, config_json, tensors)
    return load(folder, model_shapes(config))

  # GPT-2: with the prefix of a language model, causal masks and a tied head.
  tensors = to_theirs(GPT2_JSON, GPT2, random_params(GPT2))
  other = {f'transformer.{name}': value for name, value in tensors.items()}
  other['transformer.h.0.attn.bias'] = np.ones((1, 1, 48, 48), np.uint8)
  other['lm_head.weight'] = tensors['wte.weight']
  assert (
    read('gpt2', GPT2_JSON, GPT2, tensors)[1]
    == read('gpt2_lm', GPT2_JSON, GPT2, other)[1]
  )
  # T5: every table that is tied to the embeddings; or one of them alone.
  tensors = to_theirs(T5_JSON, T5, random_params(T5))
  shared = tensors['shared.weight']
  names = ['lm_head.weight', 'decoder.embed_tokens.weight']
  unused = (
    'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
  )
  many = tensors | dict.fromkeys(names, shared)
  many[unused] = np.zeros((8, 4), np.float32)
  one = {k: v for k, v in tensors.items() if k != 'shared.weight'}
  one['encoder.embed_tokens.weight'] = shared
  fingerprint = read('t5', T5_JSON, T5, tensors)[1]
  assert fingerprint == read('many', T5_JSON, T5, many)[1]
  assert fingerprint == read('one', T5_JSON, T5, one)[1]


def test_an_encoder_alone_is_an_llm_and_no_baseline(t5_folder):
  folder, tensors = t5_folder
  tensors = {
    name: value
    for name, value in tensors.items()
    if name.startswith(('shared.', 'encoder.'))
  }
  write_folder(folder, T5_1_1_JSON, tensors)
  source = huggingface.HuggingFaceFolder(folder)
  assert {path[0] for path in source.shapes()} == {'token_embedder', 'encoder'}
  shapes = {
    name: tree
    for name, tree in model_shapes(source.config).items()
    if name in ('token_embedder', 'encoder')
  }
  load(folder, shapes)
  with pytest.raises(ValueError, match='decoder/final_norm/scale .*: missing'):
    load(folder, model_shapes(source.config))


@pytest.mark.parametrize(
  ('model_type', 'fields', 'head', 'tied', 'scaled'),
  [
    ('t5', {}, None, True, True),
    ('t5', {}, 'table', True, True),  # converted from pytorch_model.bin
    ('t5', {'tie_word_embeddings': False}, 'own', False, False),
    ('t5', {'tie_word_embeddings': False}, 'table', False, False),
    # Since transformers 5.
    ('t5', {'scale_decoder_outputs': False}, 'own', False, False),
    ('t5', {'scale_decoder_outputs': False}, 'table', True, False),
    ('t5', {'scale_decoder_outputs': False}, None, True, False),
    ('t5', {'scale_decoder_outputs': True}, None, True, True),
    ('t5', {'tie_word_embeddings': False}, 'table', False, False),
    ('t5', {'tie_word_embeddings': None}, None, True, True),
    ('mt5', {}, 'own', False, False),
    ('mt5', {}, None, True, False),
  ],
)
def test_the_head_is_tied_where_neither_file_nor_config_has_another(
  tmp_path, model_type, fields, head, tied, scaled
):
  config_json = T5_JSON | {'model_type': model_type} | fields
  config_json['feed_forward_proj'] = 'relu'
  tensors = to_theirs(T5_JSON, T5, random_params(T5))
  table = tensors['shared.weight']
  if head is not None:
    tensors['lm_head.weight'] = table if head == 'table' else table + 1
  folder = write_folder(tmp_path / 'hf', config_json, tensors)
  config = huggingface.HuggingFaceFolder(folder).config
  assert (config.logits_via_embedding, config.scale_logits) == (tied, scaled)


@pytest.mark.parametrize(
  ('model_type', 'config', 'fields', 'head'),
  [
    ('t5', T5_1_1, {}, 'lm_head'),
    ('mt5', T5_1_1, {'tie_word_embeddings': False}, 'lm_head'),
    ('gpt2', GPT2, {'tie_word_embeddings': False}, 'lm_head'),
    # Families that are not tied unless they say so.
    ('qwen2', helpers.QWEN2, {'tie_word_embeddings': None}, 'lm_head'),
    ('gpt_neox', helpers.PYTHIA, {'tie_word_embeddings': None}, 'embed_out'),
  ],
)
def test_a_head_that_is_not_the_table_is_missed(
  tmp_path, model_type, config, fields, head
):
  config_json = huggingface.config_json(model_type, config) | fields
  config_json = {k: v for k, v in config_json.items() if v is not None}
  tensors = to_theirs(config_json, config, random_params(config))
  tensors.pop(f'{head}.weight', None)
  folder = write_folder(tmp_path / 'hf', config_json, tensors)
  with pytest.raises(ValueError, match='do not match') as error:
    huggingface.HuggingFaceFolder(folder)
  (line,) = str(error.value).splitlines()[1:]
  assert line.startswith(f'  {head}.weight (logits_dense/kernel)')
  assert line.endswith(': missing')


@pytest.mark.parametrize(
  ('model_type', 'name'),
  [
    ('t5', 'qa_outputs.weight'),
    ('gpt2', 'transformer.h.1.attn.masked_bias'),
    ('gpt2', 'score.weight'),
    ('gpt_neox', 'gpt_neox.layers.0.attention.rotary_emb.inv_freq'),
    ('qwen2', 'model.layers.1.self_attn.rotary_emb.inv_freq'),
    ('gemma3_text', 'model.rotary_emb.inv_freq'),
  ],
)
def test_buffers_and_heads_for_other_uses_are_passed_over(
  tmp_path, model_type, name
):
  config_json, config = FAMILIES[model_type]
  tensors = to_theirs(config_json, config, random_params(config))
  tensors[name] = np.ones(3, np.float32)
  folder = write_folder(tmp_path / 'hf', config_json, tensors)
  assert (
    huggingface.HuggingFaceFolder(folder).shapes().keys()
    == shapes_lib.of_model(config).keys()
  )


@pytest.mark.parametrize(
  ('kept', 'missing'),
  [
    ((), ': the files hold no encoder layers, but num_layers is 3. Use'),
    (('shared.',), ': the files hold no encoder layers, but num_layers is 3. '),
    (('encoder.',), '\n  shared.weight .*: missing'),
    # A head alone makes no decoder, and shows that there was one.
    (
      ('shared.', 'encoder.', 'lm_head.'),
      ': the files hold no decoder layers, but num_decoder_layers is 2. Use',
    ),
  ],
)
def test_a_part_that_is_no_encoder_is_refused(t5_folder, kept, missing):
  folder, tensors = t5_folder
  tensors = {k: v for k, v in tensors.items() if k.startswith(kept)}
  tensors['score.weight'] = np.ones((2, 16), np.float32)
  write_folder(folder, T5_1_1_JSON, tensors)
  with pytest.raises(ValueError, match=missing):
    huggingface.HuggingFaceFolder(folder)


def test_one_precision_per_stack_is_read_and_kept_in_the_fingerprint(
  t5_folder, tmp_path
):
  folder, tensors = t5_folder
  name = 'encoder.block.1.layer.0.layer_norm.weight'
  half = tensors[name].astype(np.float16)
  write_folder(folder, T5_1_1_JSON, tensors | {name: half})
  source = huggingface.HuggingFaceFolder(folder)
  path = ('encoder', 'layers', 'pre_self_attention_norm', 'scale')
  assert source.read(path, 1).dtype == source.shapes()[path].dtype == np.float32
  same = tensors | {name: half.astype(np.float32)}
  other = write_folder(tmp_path / 'other', T5_1_1_JSON, same)
  shapes = model_shapes(T5_1_1)
  assert load(folder, shapes)[1] == load(other, shapes)[1]


def test_special_ids_are_those_that_the_config_has(t5_folder):
  folder, tensors = t5_folder
  ids = {'eos_token_id': [1, 7], 'pad_token_id': None}
  write_folder(folder, T5_1_1_JSON | ids, tensors)
  assert huggingface.HuggingFaceFolder(folder).special_ids == ids


def spoil_tensors(tensors):
  del tensors['encoder.block.1.layer.0.SelfAttention.q.weight']
  name = 'decoder.block.0.layer.2.DenseReluDense.wo.weight'
  tensors[name] = tensors[name].T
  name = 'decoder.block.1.layer.2.DenseReluDense.wo.weight'
  tensors[name] = tensors[name].astype(np.int8)
  tensors['encoder.block.3.layer.0.layer_norm.weight'] = np.ones(16, np.float32)
  for layer in range(2):
    del tensors[f'decoder.block.{layer}.layer.0.layer_norm.weight']
  name = 'encoder.block.0.layer.1.DenseReluDense.wi.weight'
  tensors[name] = np.ones((20, 16), np.float32)
  tensors['adapter.weight'] = np.ones(16, np.float32)
  tensors['classification_head.weight'] = np.ones((2, 16), np.float32)


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(t5_folder):
  folder, tensors = t5_folder
  spoil_tensors(tensors)
  write_folder(folder, T5_1_1_JSON, tensors)
  with pytest.raises(ValueError) as error:
    huggingface.HuggingFaceFolder(folder)
  assert str(error.value) == (
    f'The tensors in {folder} do not match {folder}/config.json. Use files '
    'that were saved together:\n'
    '  adapter.weight (16,): unknown\n'
    '  decoder.block.0.layer.0.layer_norm.weight '
    '(decoder/layers/pre_self_attention_norm/scale) (16,): missing\n'
    '  decoder.block.0.layer.2.DenseReluDense.wo.weight '
    '(decoder/layers/mlp/wo/kernel): expected (16, 20), found (20, 16)\n'
    '  decoder.block.1.layer.0.layer_norm.weight '
    '(decoder/layers/pre_self_attention_norm/scale) (16,): missing\n'
    '  decoder.block.1.layer.2.DenseReluDense.wo.weight: expected one of F64, '
    'F32, F16, BF16, found I8; quantized weights are not supported\n'
    '  encoder.block.0.layer.1.DenseReluDense.wi.weight '
    '(encoder/layers/mlp/wi/kernel) (20, 16): unknown\n'
    '  encoder.block.1.layer.0.SelfAttention.q.weight '
    '(encoder/layers/self_attention/query/kernel) (24, 16): missing\n'
    '  encoder.block.3.layer.0.layer_norm.weight (16,): unknown'
  )


def test_all_that_the_model_lacks_is_said_at_once(t5_folder):
  folder, _ = t5_folder
  other = config_lib.TransformerConfig(**T5.to_json() | {'vocab_size': 65})
  with pytest.raises(ValueError) as error:
    load(folder, model_shapes(other))
  assert str(error.value) == (
    f'The weights in {folder} do not fit the model. Use the config of '
    'these weights:\n'
    '  decoder/layers/mlp/wi/kernel '
    '(decoder.block.{layer}.layer.2.DenseReluDense.wi.weight) (2, 16, 20): '
    'missing\n'
    '  encoder/layers/mlp/wi/kernel '
    '(encoder.block.{layer}.layer.1.DenseReluDense.wi.weight) (3, 16, 20): '
    'missing\n'
    '  token_embedder/embedding (shared.weight): expected (65, 16), found '
    '(64, 16)'
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'model_type': 'bert'}, "model_type is 'bert'; supported are t5, mt5, um"),
    ({'d_kv': None, 'd_ff': None}, 'd_kv: missing\n  d_ff: missing'),
    ({'quantization_config': {}}, 'quantization_config: only None is suppor'),
    (
      {'feed_forward_proj': 'tanh'},
      "its activation is 'tanh'; supported are r",
    ),
  ],
)
def test_a_config_that_is_not_supported_is_refused(t5_folder, fields, message):
  folder, _ = t5_folder
  config_json = {
    key: value
    for key, value in (T5_1_1_JSON | fields).items()
    if value is not None
  }
  (folder / 'config.json').write_text(json.dumps(config_json))
  with pytest.raises(ValueError) as error:
    huggingface.HuggingFaceFolder(folder)
  assert message in str(error.value)
  assert str(folder / 'config.json') in str(error.value)


def test_heads_that_do_not_divide_are_refused(tmp_path):
  tensors = to_theirs(GPT2_JSON, GPT2, random_params(GPT2))
  folder = write_folder(tmp_path / 'hf', GPT2_JSON | {'n_head': 3}, tensors)
  with pytest.raises(ValueError, match='n_embd=16 does not divide over n_head'):
    huggingface.HuggingFaceFolder(folder)


@pytest.mark.parametrize(
  'spoil',
  [
    lambda content: content[:-4],
    lambda content: content[:50],
    lambda content: b'',
    lambda content: b'version https://git-lfs.github.com/spec/v1\noid sha256:',
  ],
)
def test_a_broken_file_is_named_with_its_size(t5_folder, spoil):
  file = t5_folder[0] / 'model.safetensors'
  file.write_bytes(spoil(file.read_bytes()))
  with pytest.raises(ValueError) as error:
    huggingface.HuggingFaceFolder(file.parent)
  assert f'{file} ({file.stat().st_size} bytes) is not a complete safet' in str(
    error.value
  )
  assert 'download it again' in str(error.value)


def test_a_broken_config_is_named(t5_folder):
  path = t5_folder[0] / 'config.json'
  path.write_text('{"model_type": ')
  with pytest.raises(ValueError, match=f'{path} is not JSON'):
    huggingface.HuggingFaceFolder(path.parent)
  path.write_text('[]')
  with pytest.raises(ValueError, match=f'{path} is not a JSON object'):
    huggingface.HuggingFaceFolder(path.parent)


def test_missing_shards_are_named(t5_folder):
  folder, _ = t5_folder
  (folder / 'model.safetensors').rename(folder / 'model-1-of-3.safetensors')
  files = [f'model-{i}-of-3.safetensors' for i in (1, 2, 3)]
  index = {'weight_map': {f'tensor_{file}': file for file in files}}
  path = folder / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError) as error:
    huggingface.HuggingFaceFolder(folder)
  assert str(error.value) == (
    f'{path} lists 3 files; missing: {files[1]}, {files[2]}. Download them '
    f'into {folder}.'
  )


def test_a_folder_of_something_else_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='nor model.json .* nor config'):
    opening.open_source(str(tmp_path))


# The logits of four words after the last real token of two rows, from models of
# transformers 5.23 whose weights are `numbers_by_name`.
EXPECTED_LOGITS = {
  't5': [
    [-0.08114, -0.20394, 0.27543, -0.05844],
    [0.00757, 0.05463, -0.05961, 0.00216],
  ],
  't5_1_1': [
    [0.77775, 0.37317, -1.13325, 0.7064],
    [-0.43065, -0.55089, 0.95545, -0.35931],
  ],
  'gpt2': [
    [-1.82322, 0.52604, 1.32209, -1.78552],
    [-1.92881, 0.59125, 1.36557, -1.89213],
  ],
}
PROMPTS = [[5, 17, 3, 60, 1], [42, 9, 1, 0, 0]]
ANSWERS = [[0, 11, 22], [0, 33, 0]]


def numbers_by_name(tensors):
  """Returns tensors whose content follows from their names and shapes alone."""
  return {
    name: np.float32(
      0.5 * np.sin(zlib.crc32(name.encode()) % 1000 + 1.7 * np.arange(x.size))
    ).reshape(x.shape)
    for name, x in tensors.items()
  }


def write_expected_model(folder, name):
  """Writes the model that EXPECTED_LOGITS are of."""
  config_json, config = FAMILIES[name]
  tensors = to_theirs(config_json, config, random_params(config))
  return write_folder(folder, config_json, numbers_by_name(tensors))


@pytest.mark.parametrize('name', EXPECTED_LOGITS)
def test_known_weights_give_known_logits(tmp_path, name):
  folder = write_expected_model(tmp_path / 'hf', name)
  config = FAMILIES[name][1]
  params, _ = load(folder, model_shapes(config))
  batch = {
    'encoder_input_tokens': jnp.array(PROMPTS),
    'encoder_segment_ids': jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    'decoder_input_tokens': jnp.array(ANSWERS),
    'decoder_segment_ids': jnp.array([[1, 1, 1], [1, 1, 0]]),
  }
  logits = l2s.build(config).apply(
    {'params': params}, batch, deterministic=True
  )
  np.testing.assert_allclose(
    [logits[0, 2, :4], logits[1, 1, :4]], EXPECTED_LOGITS[name], atol=2e-5
  )


@pytest.mark.parametrize('name', EXPECTED_LOGITS)
def test_the_known_logits_are_those_of_transformers(tmp_path, name):
  torch, transformers = helpers.import_reference()
  folder = write_expected_model(tmp_path / 'hf', name)
  (architecture,) = FAMILIES[name][0]['architectures']
  model = getattr(transformers, architecture).from_pretrained(folder).eval()
  for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
    # Alone and unpadded.
    prompt = torch.tensor([prompt if row == 0 else prompt[:3]])
    answer = torch.tensor([answer if row == 0 else answer[:2]])
    with torch.no_grad():
      if name == 'gpt2':
        logits = model(torch.cat([prompt, answer], dim=1)).logits
      else:
        logits = model(prompt, decoder_input_ids=answer).logits
    np.testing.assert_allclose(
      logits[0, -1, :4], EXPECTED_LOGITS[name][row], atol=2e-5
    )
