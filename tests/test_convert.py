# SPDX-License-Identifier: Apache-2.0
"""Conversion changes where weights are and never what they are."""

import dataclasses
import json
import shutil
import sys
import tracemalloc

import gin
import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import saved_runs
import tokenizers
from flax import traverse_util

from l2s_jax import __main__ as command_line
from l2s_jax.interop import convert, to_huggingface
from l2s_jax.models import l2s
from l2s_jax.runtime import integrity, os_errors, partitioning
from l2s_jax.systems import builders, parameters
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import loading, sentencepiece
from l2s_jax.weights import converted, opening
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import huggingface

MESH = partitioning.MeshConfig(data=8)
CONFIGS = helpers.SLMS | helpers.FAMILIES


def source_of(config, dtype=np.float32):
  params = helpers.random_params(l2s.build(config))
  return helpers.Arrays(
    config, jax.tree.map(lambda x: np.asarray(x, dtype), params)
  )


def run(*arguments):
  """Runs `convert`; returns what it refused, '' where it did not."""
  status = command_line.main(['convert', *map(str, arguments)])
  gin.clear_config()
  return status


def refusal(capsys, *arguments):
  assert run(*arguments) == 2
  return capsys.readouterr().err


def refused_by_disk(*arguments):
  """Returns what a program says of an error of the operating system."""
  with pytest.raises(OSError) as caught:
    run(*arguments)
  gin.clear_config()
  words = os_errors.describe(caught.value)
  assert words is not None
  return words


def load(source, names=None):
  """Returns parameters, all or of some modules, and fingerprint."""
  shapes = {
    path: shape
    for path, shape in source.shapes().items()
    if names is None or path[0] in names
  }
  shapes = traverse_util.unflatten_dict(shapes)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: device, shapes)
  return source_lib.load(source, shapes, shardings)


@pytest.fixture
def t5(tmp_path):
  """Returns the Hugging Face folder of a T5 v1.1, and its source."""
  source = source_of(helpers.T5_1_1)
  to_huggingface.save(source, tmp_path / 't5', None)
  return tmp_path / 't5', source


@pytest.mark.parametrize('name', CONFIGS)
def test_hugging_face_and_back_is_the_same_to_the_byte(name, tmp_path):
  source = source_of(CONFIGS[name])
  first, ours, last = (tmp_path / name for name in ('hf', 'l2s', 'again'))
  to_huggingface.save(source, first, None)
  assert not run('--from=hf', '--to=l2s', first, ours)
  assert not run('--from=l2s', '--to=hf', ours, last)

  opened = opening.open_source(str(ours))
  assert opened.shapes() == source.shapes()
  for path, array in source.arrays.items():
    np.testing.assert_array_equal(opened.read(path), array)
  for file in first.iterdir():
    assert file.read_bytes() == (last / file.name).read_bytes(), file.name


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
@pytest.mark.parametrize('family', ['qwen2', 'qwen3'])
def test_a_tokenizer_that_transformers_would_read_as_another_is_refused(
  family, kind, tmp_path, capsys
):
  source = source_of(CONFIGS[family])
  converted.save(source, tmp_path / 'ours')
  sentencepiece.train(
    ['the cat sat on the mat'] * 3,
    tmp_path / 'spiece.model',
    model_type=kind,
    vocab_size=15,
  )
  arguments = (
    '--from=l2s',
    '--to=hf',
    f'--vocabulary={tmp_path}/spiece.model',
    tmp_path / 'ours',
    tmp_path / 'out',
  )
  if family == 'qwen3':
    assert not run(*arguments)
    return
  said = refusal(capsys, *arguments)
  assert 'transformers reads any tokenizer beside a qwen2' in said
  assert not (tmp_path / 'out').exists()


def test_a_t5gemma_of_two_sizes_comes_in_as_its_encoder(tmp_path, capsys):
  source = source_of(helpers.T5GEMMA)
  folder = tmp_path / 'hf'
  to_huggingface.save(source, folder, helpers.vocabulary())
  helpers.vocabulary().save(folder)
  content = json.loads((folder / 'config.json').read_text())
  content['decoder']['num_key_value_heads'] = 1  # as many do not fit, either
  (folder / 'config.json').write_text(json.dumps(content))

  assert not run('--from=hf', '--to=l2s', folder, tmp_path / 'l2s')
  assert (
    't5gemma, encoder only (the decoder is left out, which differs in '
    'num_kv_heads), '
  ) in capsys.readouterr().out
  for path in (folder, tmp_path / 'l2s'):
    opened = opening.open_source(str(path))
    names = {'token_embedder', 'encoder'}
    assert {found[0] for found in opened.shapes()} == names
    for found in opened.shapes():
      np.testing.assert_array_equal(opened.read(found), source.arrays[found])
    tower = system_lib.Tower(path=str(path))
    slm = system_lib.Tower(config=helpers.GPT2, vocabulary=str(folder))
    pair = builders.llm_to_slm_system(tower, slm)
    layout = parameters.layout(pair, partitioning.make_mesh(MESH), MESH)
    parameters.load_frozen(pair, layout)
    with pytest.raises(ValueError, match='this is an encoder-only model'):
      builders.language_model_system(tower)
    with pytest.raises(ValueError, match='this is an encoder-only model'):
      builders.llm_to_slm_system(tower, tower)


@pytest.mark.parametrize('names', [None, ('token_embedder', 'encoder')])
def test_a_folder_and_its_conversion_have_one_fingerprint(t5, names, tmp_path):
  folder, _ = t5
  run('--from=hf', '--to=l2s', folder, tmp_path / 'l2s')
  params, fingerprint = load(opening.open_source(str(folder)), names)
  ours, its_own = load(opening.open_source(str(tmp_path / 'l2s')), names)
  assert its_own == fingerprint
  jax.tree.map(np.testing.assert_array_equal, ours, params)


def test_a_converted_folder_stands_where_its_source_stood(tmp_path):
  folder, source = tmp_path / 't5', source_of(helpers.T5_1_1)
  to_huggingface.save(source, folder, helpers.vocabulary())
  helpers.vocabulary().save(folder)
  assert not run('--from=hf', '--to=l2s', folder, tmp_path / 'l2s')
  for path in (folder, tmp_path / 'l2s'):
    tower = system_lib.Tower(path=str(path))
    assert tower.load_config() == source.config
    assert tower.load_vocabulary() == helpers.vocabulary()


def test_the_dtype_is_kept_unless_another_is_asked_for(tmp_path):
  source = source_of(helpers.GPT2, ml_dtypes.bfloat16)
  to_huggingface.save(source, tmp_path / 'hf', None)
  for dtype in ('bfloat16', 'float32'):
    flags = [] if dtype == 'bfloat16' else [f'--dtype={dtype}']
    folder = tmp_path / dtype
    assert not run('--from=hf', '--to=l2s', tmp_path / 'hf', folder, *flags)
    opened = opening.open_source(str(folder))
    for path, array in source.arrays.items():
      assert opened.read(path).dtype == dtype
      np.testing.assert_array_equal(opened.read(path), array.astype(dtype))


def test_a_mesh_reads_its_shards_out_of_the_files(t5, tmp_path):
  folder, source = t5
  run('--from=hf', '--to=l2s', folder, tmp_path / 'l2s')
  mesh_config = partitioning.MeshConfig(data=2, fsdp=2, tensor=2)
  mesh = partitioning.make_mesh(mesh_config)
  module = l2s.build(source.config)
  shapes, axes = partitioning.abstract_params(
    lambda key: module.init(key, helpers.random_batch(), deterministic=True),
  )
  shardings = partitioning.param_shardings(shapes, axes, mesh, mesh_config)
  opened = opening.open_source(str(tmp_path / 'l2s'))
  params, _ = source_lib.load(opened, shapes, shardings)
  flat = traverse_util.flatten_dict(params)
  assert any(not array.is_fully_replicated for array in flat.values())
  for path, array in source.arrays.items():
    np.testing.assert_array_equal(flat[path], array)


def test_what_the_digests_stand_for_is_compared(t5, tmp_path, monkeypatch):
  folder, _ = t5
  ours = tmp_path / 'l2s'
  run('--from=hf', '--to=l2s', folder, ours)
  fingerprint = load(opening.open_source(str(ours)))[1]
  file = ours / 'model.safetensors'
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  opened = opening.open_source(str(ours))
  with pytest.raises(ValueError) as error:
    load(opened)
  name = max(json.loads((ours / 'weights.json').read_text())['digests'])
  assert f'{ours} was changed after' in str(error.value)
  assert str(error.value).splitlines()[1:] == [f'  {name}']
  monkeypatch.setattr(integrity, 'verification', lambda: False)
  assert load(opened)[1] == fingerprint


def test_damaged_weights_are_not_converted_into_good_ones(t5, tmp_path, capsys):
  folder, _ = t5
  ours = tmp_path / 'l2s'
  run('--from=hf', '--to=l2s', folder, ours)
  file = ours / 'model.safetensors'
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  for form in ('l2s', 'hf'):
    out = tmp_path / f'out_{form}'
    words = refusal(capsys, '--from=l2s', f'--to={form}', ours, out)
    assert f'{ours} was changed after' in words
    assert not out.exists()


def test_a_description_changed_by_hand_is_refused(t5, tmp_path):
  folder, _ = t5
  ours = tmp_path / 'l2s'
  run('--from=hf', '--to=l2s', folder, ours)
  path = ours / 'weights.json'
  description = json.loads(path.read_text())
  description['config']['norm_epsilon'] *= 2
  path.write_text(json.dumps(description))
  with pytest.raises(ValueError, match='weights.json was changed after'):
    opening.open_source(str(ours))


def test_a_folder_that_lacks_a_tensor_of_its_description_is_refused(
  t5, tmp_path
):
  folder, _ = t5
  run('--from=hf', '--to=l2s', folder, tmp_path / 'l2s')
  file = tmp_path / 'l2s' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  del tensors['encoder/final_norm/scale']
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match='  encoder/final_norm/scale: missing'):
    opening.open_source(str(tmp_path / 'l2s'))


@pytest.mark.parametrize('to', ['l2s', 'hf', 't5x'])
def test_memory_holds_layers_not_stacks(to, tmp_path):
  config = type(helpers.T5_1_1)(
    **helpers.T5_1_1.to_json()
    | {'emb_dim': 128, 'mlp_dim': 2048, 'num_decoder_layers': 12}
    | {'relpos_buckets': 32, 'relpos_max_distance': 128}
  )
  layer_bytes = 128 * 2048 * 4
  to_huggingface.save(source_of(config), tmp_path / 'hf', None)
  run('--from=hf', '--to=l2s', '--dry_run', tmp_path / 'hf', tmp_path / 'no')
  tracemalloc.start()  # NumPy tells it of every array.
  assert not run('--from=hf', f'--to={to}', tmp_path / 'hf', tmp_path / 'out')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert layer_bytes < peak < 5 * layer_bytes


# --- runs ---------------------------------------------------------------------


def make_pair(injection, vocabulary):
  """Returns an LLM-to-SLM system and its trained parameters."""
  module = helpers.llm_to_slm('gpt2', injection, vocabulary)
  system = dataclasses.replace(
    helpers.system(module), sources={'llm': 'llms/big'}, llm_fingerprint='abc'
  )
  params = helpers.random_params(module)
  return system, {k: v for k, v in params.items() if k != 'llm'}


@pytest.mark.parametrize(
  ('injection', 'vocabulary'), [('add', 'foreign'), ('replace', 'shared')]
)
def test_a_pair_goes_out_as_slm_projector_and_how_they_fit(
  injection, vocabulary, tmp_path
):
  system, params = make_pair(injection, vocabulary)
  saved_runs.save(tmp_path / 'run', system, params, steps=(3,))
  out = tmp_path / 'out'
  assert not run('--from=l2s', '--to=hf', tmp_path / 'run', out)

  slm = huggingface.HuggingFaceFolder(out / 'slm')
  assert slm.config == system.module.slm_config
  for path, array in traverse_util.flatten_dict(params['slm']).items():
    np.testing.assert_array_equal(slm.read(path), array)

  fits = json.loads((out / 'config.json').read_text())
  assert fits['injection'] == injection
  assert fits['llm']['fingerprint'] == 'abc'
  assert loading.share_ids(loading.load(out), system.prompt_vocabulary)
  assert loading.share_ids(loading.load(out / 'slm'), system.answer_vocabulary)
  tensors = safetensors.numpy.load_file(out / fits['projector']['file'])
  # What a torch.nn.Sequential(Linear, ReLU, Linear) of these would compute.
  llm_states = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
  hidden = llm_states @ tensors['projector.0.weight'].T
  hidden = np.maximum(hidden + tensors['projector.0.bias'], 0)
  z = hidden @ tensors['projector.2.weight'].T + tensors['projector.2.bias']
  ours = system.module.bind({'params': params}).projector(
    jnp.asarray(llm_states[None])
  )[0]
  np.testing.assert_allclose(z, ours, rtol=1e-5, atol=1e-5)
  assert ('prompt_embedder.weight' in tensors) == (
    injection == 'add' and vocabulary == 'foreign'
  )


def test_a_run_goes_out_with_a_tokenizer_for_transformers(vocabulary, tmp_path):
  config = dataclasses.replace(helpers.GPT2, num_decoder_layers=1)
  module = l2s.build(config)
  system = dataclasses.replace(
    helpers.system(module),
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
  )
  saved_runs.save(
    tmp_path / 'run', system, helpers.random_params(module), steps=(3,)
  )
  out = tmp_path / 'out'
  assert not run('--from=l2s', '--to=hf', tmp_path / 'run', out)
  # GPT-2's own class would not find its files.
  tokenizer = json.loads((out / 'tokenizer_config.json').read_text())
  assert tokenizer['tokenizer_class'] == 'PreTrainedTokenizerFast'
  theirs = tokenizers.Tokenizer.from_file(str(out / 'tokenizer.json'))
  text = 'a b c 1 2 3'
  assert theirs.encode(text).ids == vocabulary.encode(text)
  # What is from the Hub stays as it is.
  (out / 'tokenizer_config.json').write_text('{}')
  assert not run('--from=hf', '--to=hf', out, tmp_path / 'again')
  for name in ('tokenizer.json', 'spiece.model', 'tokenizer_config.json'):
    assert (tmp_path / 'again' / name).read_bytes() == (out / name).read_bytes()


def test_a_run_goes_out_at_the_step_asked_for(tmp_path):
  module = helpers.MODULES['t5_1_1']
  params = helpers.random_params(module)
  saved_runs.save(tmp_path / 'run', helpers.system(module), params, steps=(3,))
  flags = ('--from=l2s', '--to=l2s', tmp_path / 'run')
  assert not run(*flags, tmp_path / 'out', '--step=3')
  opened = opening.open_source(str(tmp_path / 'out'))
  for path, array in traverse_util.flatten_dict(params).items():
    np.testing.assert_array_equal(opened.read(path), array)
  assert run(*flags, tmp_path / 'other', '--step=4') == 2


# --- refusals -----------------------------------------------------------------


def nothing_written(folder):
  left = [path.name for path in folder.parent.iterdir()]
  return not folder.exists() and not any('unfinished' in x for x in left)


def test_a_destination_that_is_there_is_left_alone(t5, tmp_path, capsys):
  folder, _ = t5
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'precious').write_text('x')
  error = refusal(capsys, '--from=hf', '--to=l2s', folder, tmp_path / 'out')
  assert f'{tmp_path / "out"} already exists' in error
  assert [p.name for p in (tmp_path / 'out').iterdir()] == ['precious']


def test_a_disk_that_is_too_small_is_seen_before(
  t5, tmp_path, capsys, monkeypatch
):
  folder, _ = t5
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  words = refused_by_disk('--from=hf', '--to=l2s', folder, tmp_path / 'out')
  assert words.startswith(f'{tmp_path}: 1.0 kB free, but the weights need ')
  assert 'need 0' not in words and 'half with --dtype=bfloat16' in words
  assert nothing_written(tmp_path / 'out')


def test_what_a_killed_conversion_left_is_replaced(t5, tmp_path, monkeypatch):
  folder, _ = t5
  left = tmp_path / '.out.unfinished'
  left.mkdir()
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(  # It fills the disk.
    shutil,
    'disk_usage',
    lambda path: usage._replace(free=0) if left.exists() else usage,
  )
  (left / 'model-00001-of-00002.safetensors').write_text('torn')
  assert not run('--from=hf', '--to=l2s', folder, tmp_path / 'out')
  assert not left.exists()
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {
    'generation_config.json',
    'model.safetensors',
    'weights.json',
  }


def test_a_conversion_that_fails_leaves_nothing(
  t5, tmp_path, capsys, monkeypatch
):
  folder, _ = t5

  def full(*arguments):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(converted.files, 'write_json', full)
  before = sorted(tmp_path.iterdir())
  for out in (tmp_path / 'out', tmp_path / 'new' / 'folders' / 'out'):
    words = refused_by_disk('--from=hf', '--to=l2s', folder, out)
    assert words.startswith(f'{out}: No space left on device; free some space')
    assert sorted(tmp_path.iterdir()) == before


def test_a_destination_in_a_file_is_refused(t5, tmp_path, capsys):
  (tmp_path / 'file').write_text('x')
  out = tmp_path / 'file' / 'out'
  error = refusal(capsys, '--from=hf', '--to=l2s', t5[0], out)
  assert f'{tmp_path / "file"} is a file' in error


@pytest.mark.parametrize('part', ['token_embedder', 'decoder', 'all'])
def test_what_is_no_model_is_refused_in_any_form(part):
  source = source_of(helpers.T5_1_1)
  source.arrays = {
    path: array for path, array in source.arrays.items() if path[0] == part
  } | {('a_stray',): np.ones(3, np.float32)}
  wanted = source_lib.demanded(source.config, source.shapes())
  with pytest.raises(ValueError) as error:
    source_lib.check_shapes(source, wanted, allow_others=False)
  _, first, second, *_ = str(error.value).splitlines()
  assert first == '  a_stray (3,): unknown'
  assert second.startswith('  ') and second.endswith(': missing')


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    ('truncated', 'is not a complete safetensors file'),
    ('shards', 'lists 2 files; missing: model-00002-of-00002.safetensors'),
    ('missing', 'decoder.final_layer_norm.weight (decoder/final_norm/scale)'),
    ('unknown', 'encoder.block.9.layer.0.layer_norm.weight (16,): unknown'),
    ('family', "model_type is 'bert'; supported are t5"),
    ('form', 'is a Hugging Face folder. Use --from=hf'),
  ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(
  t5, tmp_path, capsys, spoil, message
):
  folder, source = t5
  file = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  if spoil == 'truncated':
    file.write_bytes(file.read_bytes()[:-1])
  elif spoil == 'shards':
    file.unlink()
    to_huggingface.save(source, folder, None, max_file_bytes=70_000)
    (folder / 'model-00002-of-00002.safetensors').unlink()
  elif spoil == 'missing':
    del tensors['decoder.final_layer_norm.weight']
    safetensors.numpy.save_file(tensors, file)
  elif spoil == 'unknown':
    norm = tensors['encoder.final_layer_norm.weight']
    tensors['encoder.block.9.layer.0.layer_norm.weight'] = norm
    safetensors.numpy.save_file(tensors, file)
  elif spoil == 'family':
    content = json.loads((folder / 'config.json').read_text())
    content['model_type'] = 'bert'
    (folder / 'config.json').write_text(json.dumps(content))
  form = 'l2s' if spoil == 'form' else 'hf'
  out = tmp_path / 'out'
  assert message in refusal(capsys, f'--from={form}', '--to=l2s', folder, out)
  assert nothing_written(out)


def test_a_tokenizer_that_does_not_fit_is_refused(t5, tmp_path, capsys):
  folder, _ = t5
  helpers.vocabulary().save(folder)
  ids = json.loads((folder / 'vocab.json').read_text())
  ids['one more'] = 264
  (folder / 'vocab.json').write_text(json.dumps(ids))
  error = refusal(capsys, '--from=hf', '--to=l2s', folder, tmp_path / 'out')
  assert 'has 265 ids' in error and '264 rows' in error
  assert nothing_written(tmp_path / 'out')


def test_a_tokenizer_with_another_end_is_refused(t5, tmp_path, capsys):
  folder, _ = t5
  helpers.vocabulary().save(folder)
  file = folder / 'config.json'
  content = json.loads(file.read_text())
  its_own = helpers.vocabulary().eos_id
  flags = ('--from=hf', '--to=l2s', folder, tmp_path / 'out')
  file.write_text(json.dumps(content | {'eos_token_id': 99}))
  for dry_run in ([], ['--dry_run']):
    error = refusal(capsys, *flags, *dry_run)
    assert f'eos_id={its_own}' in error and 'eos_token_id=99' in error
    assert nothing_written(tmp_path / 'out')
  file.write_text(json.dumps(content | {'eos_token_id': [99, its_own]}))
  assert not run(*flags)


@pytest.mark.parametrize('flags', [[], ['--dry_run']])
def test_a_model_that_a_form_cannot_say_is_refused(tmp_path, capsys, flags):
  to_huggingface.save(source_of(helpers.GPT2), tmp_path / 'gpt2', None)
  error = refusal(
    capsys, '--from=hf', '--to=t5x', tmp_path / 'gpt2', tmp_path / 'out', *flags
  )
  assert 'is decoder-only; --to=t5x supports only T5' in error
  assert nothing_written(tmp_path / 'out')
  odd = type(helpers.T5_1_1)(**helpers.T5_1_1.to_json() | {'norm': 'layer'})
  with pytest.raises(ValueError, match="from T5 v1.0:\n(.*\n)*  norm='l"):
    to_huggingface.save(source_of(odd), tmp_path / 'odd', None)


@pytest.mark.parametrize('head_dim', [4, 6])
def test_the_scale_of_attention_goes_into_query_kernels(
  head_dim, tmp_path, capsys
):
  """Which makes a T5 of ours one of transformers."""
  helpers.import_reference()
  config = dataclasses.replace(
    helpers.T5_1_1,
    scale_attention=True,
    head_dim=head_dim,
    scale_logits=True,  # which means nothing where the head is not tied
  )
  source = source_of(config)
  converted.save(source, tmp_path / 'ours')
  flags = ('--from=l2s', '--to=hf', tmp_path / 'ours')
  assert not run(*flags, tmp_path / 'out')
  assert 'is folded into the query kernels' in capsys.readouterr().out
  assert 'logits equal those of' in convert._compare(tmp_path / 'out', source)
  # Of kernels in bfloat16 a power of two alone leaves the digits as they were.
  halves = source_of(config, jnp.bfloat16)
  converted.save(halves, tmp_path / 'halves')
  for dtype in ('bfloat16', 'float32'):
    flags = ('--from=l2s', '--to=hf', tmp_path / 'halves')
    is_refused = dtype == 'bfloat16' and head_dim == 6
    assert run(*flags, tmp_path / dtype, f'--dtype={dtype}') == (
      2 if is_refused else 0
    )
    if is_refused:
      assert '--dtype=float32' in capsys.readouterr().err
      assert nothing_written(tmp_path / dtype)
    else:
      convert._compare(tmp_path / dtype, halves)


def test_a_dry_run_says_what_would_be_written(t5, tmp_path, capsys):
  folder, source = t5
  run('--from=hf', '--to=l2s', '--dry_run', folder, tmp_path / 'out')
  count = sum(array.size for array in source.arrays.values())
  assert f't5, {count:,} parameters in 29 tensors' in capsys.readouterr().out
  assert nothing_written(tmp_path / 'out')


def test_verifying_compares_with_transformers(t5, tmp_path, capsys):
  reason = 'parity with Hugging Face needs torch and transformers'
  pytest.importorskip('torch', reason=reason)
  pytest.importorskip('transformers', reason=reason)
  folder, _ = t5
  assert not run('--from=hf', '--to=l2s', '--verify', folder, tmp_path / 'out')
  assert 'logits equal those of transformers to' in capsys.readouterr().out
  other = dataclasses.replace(
    helpers.T5_1_1, mlp_activations=('silu', 'linear')
  )
  with pytest.raises(ValueError, match='differ from those of transformers'):
    convert._compare(folder, source_of(other))


def test_what_transformers_computes_otherwise_is_not_kept(
  t5, tmp_path, capsys, monkeypatch
):
  helpers.import_reference()
  monkeypatch.setattr(convert.parity, 'compare', lambda *unused: 2e-5)
  flags = ('--from=hf', '--to=hf', '--verify', t5[0], tmp_path / 'out')
  assert 'differ from those of transformers' in refusal(capsys, *flags)
  assert nothing_written(tmp_path / 'out')


def test_an_encoder_alone_has_no_logits_to_verify(t5, tmp_path, capsys):
  helpers.import_reference()
  file = t5[0] / 'model.safetensors'
  tensors = {
    name: tensor
    for name, tensor in safetensors.numpy.load_file(file).items()
    if name.startswith(('shared.', 'encoder.'))
  }
  safetensors.numpy.save_file(tensors, file)
  flags = ('--from=hf', '--to=l2s', t5[0], tmp_path / 'out')
  assert 'is an encoder without a decoder' in refusal(
    capsys, *flags, '--verify'
  )
  assert nothing_written(tmp_path / 'out')
  assert not run(*flags)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--step=3', '--step=3 applies only to runs and T5X'),
    ('--config=t5_small', '--config=t5_small applies only to --from=t5x'),
  ],
)
def test_a_flag_that_would_mean_nothing_is_refused(
  t5, tmp_path, capsys, flag, message
):
  out = tmp_path / 'out'
  assert message in refusal(capsys, '--from=hf', '--to=l2s', flag, t5[0], out)


def test_without_transformers_nothing_is_verified(
  t5, tmp_path, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'transformers', None)
  flags = ('--from=hf', '--to=l2s', '--verify')
  error = refusal(capsys, *flags, t5[0], tmp_path / 'out')
  assert '--verify needs transformers, which is not installed' in error
  assert nothing_written(tmp_path / 'out')
