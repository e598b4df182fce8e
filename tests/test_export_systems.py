# SPDX-License-Identifier: Apache-2.0
"""Laws of bundles of every kind of run, and of models as they came."""

import dataclasses
import sys

import bundles
import helpers
import jax
import numpy as np
import pytest
import saved_runs

from l2s_jax.interop import convert, to_huggingface
from l2s_jax.interop.exports import bundling, export_command
from l2s_jax.models import l2s, lora
from l2s_jax.runtime import partitioning
from l2s_jax.systems import bundle, model_paths, parameters
from l2s_jax.weights import converted, opening
from l2s_jax.weights.formats import tensor_files

PLAIN = helpers.llm_to_slm('t5_1_1', 'add', 'shared')
ALPHA = 5.0
MODULES = {
  'replace_foreign': helpers.llm_to_slm('t5_1_1', 'replace', 'foreign'),
  'add_foreign_gpt2': helpers.llm_to_slm('gpt2', 'add', 'foreign'),
  'mix': PLAIN.clone(llm_layer='mix'),
  'layer': PLAIN.clone(llm_layer=1),
  'prefix': PLAIN.clone(llm_prefix_ids=(3,)),
  'trained': PLAIN.clone(
    train_llm=True,
    llm_config=dataclasses.replace(PLAIN.llm_config, dtype='bfloat16'),
  ),
  'lora': PLAIN.clone(
    slm_config=dataclasses.replace(
      PLAIN.slm_config, lora_rank=2, lora_alpha=ALPHA
    )
  ),
}


def load(location):
  system = model_paths.load(str(location))
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  with partitioning.use_mesh(mesh):
    layout = parameters.layout(system, mesh, mesh_config)
    return system, parameters.load_params(system, layout, str(location))


def save_run(module, params, folder):
  """Saves a run of LLM-to-SLM, and the LLM that it names."""
  llm = helpers.Arrays(module.llm_config, params['llm'])
  system = dataclasses.replace(
    helpers.system(module),
    sources={'llm': str(folder / 'llm')},
    frozen=() if module.train_llm else ('llm',),
    frozen_dtype=module.llm_config.dtype,
  )
  _, trained = parameters.split(params, system.frozen)
  saved_runs.save(folder / 'run', system, trained)
  if not module.train_llm:
    convert.converted.save(convert.Reading(llm, None), folder / 'llm')


def make(location, folder, dtype=None, quantization=None):
  """Writes a bundle, as the verb does before it compares answers."""
  folder.mkdir()
  parts = bundling.open_parts(
    str(location), None, dtype, quantization=quantization
  )
  bundling.write(parts, folder, dtype)
  return bundle.open_bundle(folder)


def merged(module, params):
  """Returns a module and its parameters without LoRA."""
  if not module.slm_config.lora_rank:
    return module, params
  slm = dataclasses.replace(module.slm_config, lora_rank=0)
  alpha = module.slm_config.lora_alpha
  params = {**params, 'slm': lora.merge(params['slm'], alpha)}
  return module.clone(slm_config=slm), params


@pytest.mark.parametrize('name', MODULES)
def test_a_bundle_computes_what_its_run_does(name, tmp_path):
  module = MODULES[name]
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  save_run(module, params, tmp_path)
  module, params = merged(module, params)
  opened = make(tmp_path / 'run', tmp_path / 'bundle')
  helpers.assert_trees_equal(opened.params(), params)
  system, loaded = load(tmp_path / 'bundle')
  batch = helpers.batch_for(module)
  np.testing.assert_array_equal(
    helpers.logits(system.module, loaded, batch),
    helpers.logits(module, params, batch),
  )
  shapes = opened.content['facts']['parameters']
  assert shapes == opened.parameters()
  assert shapes['slm/token_embedder/embedding'] == {
    'dtype': 'float32',
    'shape': list(params['slm']['token_embedder']['embedding'].shape),
  }


@pytest.mark.parametrize('name', ['lora', 'trained', 'add_foreign_gpt2'])
def test_each_tensor_is_compared_with_its_source(name, tmp_path):
  """A bit that changes is found, whatever part of the system it is in."""
  module = MODULES[name]
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  save_run(module, params, tmp_path)
  for dtype, quantization in (
    (None, None),
    ('bfloat16', None),
    ('bfloat16', 'int8'),
  ):
    path = tmp_path / f'bundle_{dtype}_{quantization}'
    path.mkdir()
    parts = bundling.open_parts(
      str(tmp_path / 'run'), None, dtype, quantization=quantization
    )
    bundling.write(parts, path, dtype)
    assert 'tensors equal those of run' in bundling.compare(
      parts, bundle.open_bundle(path)
    )
    for part in ('llm', 'slm', 'beside'):
      file = path / part / 'model.safetensors'
      content = bytearray(file.read_bytes())
      content[-1] ^= 1
      file.write_bytes(content)
    opened = bundle.open_bundle(path)  # Its manifest stays: verified before.
    with pytest.raises(ValueError, match='3 of .* differ from those of r') as e:
      bundling.compare(parts, opened)
    found = [line.strip().split('/')[0] for line in str(e.value).split('\n')]
    assert {'llm', 'slm'} < set(found[1:])


@pytest.mark.parametrize('name', ['replace_foreign', 'add_foreign_gpt2'])
def test_int8_decoding_of_an_int8_bundle_has_the_stored_values(name, tmp_path):
  """And those of its run, which nothing else rounds."""
  module = MODULES[name]
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  save_run(module, params, tmp_path)
  opened = make(tmp_path / 'run', tmp_path / 'bundle', quantization='int8')
  system, loaded = load(tmp_path / 'bundle')

  def packed(module, params):
    generating = l2s.for_generation(
      module, quantization='int8', llm_quantization='int8'
    )
    found = l2s.params_for_generation(generating, params)
    return jax.tree.map(np.asarray, found)

  found = packed(system.module, loaded)
  helpers.assert_trees_equal(found, packed(module, params))
  tensors = tensor_files.open_folder(tmp_path / 'bundle' / 'slm')
  stored = tensors['decoder/layers/mlp/wo/kernel']
  assert stored.dtype == 'I8'
  for i, layer in enumerate(stored.read()):
    kernel = found['slm']['decoder'][f'layers_{i}']['mlp']['wo']['kernel']
    np.testing.assert_array_equal(kernel.values.T, layer)
  table = tensors['token_embedder/embedding'].read()
  embedder = found['slm']['token_embedder']['embedding']
  np.testing.assert_array_equal(embedder.values, table)
  listed = opened.content['facts']['parameters']
  assert listed['slm/decoder/layers/mlp/wo/kernel']['dtype'] == 'int8'
  assert 'slm/decoder/layers/mlp/wo/kernel_scale' in listed


def test_int8_scales_that_do_not_fit_are_refused(tmp_path):
  module = PLAIN
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  save_run(module, params, tmp_path)
  make(tmp_path / 'run', tmp_path / 'bundle', quantization='int8')
  folder = tmp_path / 'bundle' / 'slm'
  tensors = tensor_files.open_folder(folder)
  arrays = {name: np.array(tensor.read()) for name, tensor in tensors.items()}
  kernel = 'decoder/layers/mlp/wo/kernel'
  norm = 'decoder/final_norm/scale'

  def refused(change, message):
    changed = {**arrays, **change}
    changed = {n: x for n, x in changed.items() if x is not None}
    shapes = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype)
      for name, x in changed.items()
    }
    tensor_files.save_safetensors(folder, shapes, lambda name: [changed[name]])
    with pytest.raises(ValueError, match=message):
      converted.ConvertedFolder(folder)

  scale = arrays[f'{kernel}_scale']
  refused({f'{kernel}_scale': None}, f'{kernel}_scale: missing')
  refused({f'{kernel}_scale': scale[:1]}, f'{kernel}_scale: found F32.*expect')
  refused({f'{kernel}_scale': scale.astype(np.float16)}, 'found F16.*expected')
  refused({norm: arrays[norm].astype(np.int8)}, f'{norm}: found int8')
  refused({f'{norm}_scale': scale}, f'{norm}_scale')


def test_sentinels_are_asked_for_as_by_other_verbs(tmp_path):
  params = helpers.random_params(l2s.build(helpers.T5_1_1))
  source = helpers.Arrays(helpers.T5_1_1, params)
  convert.converted.save(convert.Reading(source, None), tmp_path / 't5')
  model = bundles.prompt_vocabulary(tmp_path).path
  parts = bundling.open_parts(
    str(tmp_path / 't5'), None, None, vocabulary=str(model), extra_ids=3
  )
  (tmp_path / 'bundle').mkdir()
  bundling.write(parts, tmp_path / 'bundle', None)
  system = bundle.open_bundle(tmp_path / 'bundle').system
  plain = bundles.prompt_vocabulary(tmp_path)
  assert system.prompt_vocabulary.vocab_size == plain.vocab_size + 3


def test_a_model_model_paths_is_a_bundle_that_goes_on_with_prompts(tmp_path):
  params = helpers.random_params(l2s.build(helpers.GPT2))
  source = helpers.Arrays(helpers.GPT2, params)
  vocabulary = helpers.vocabulary()
  to_huggingface.save(source, tmp_path / 'gpt2', vocabulary)
  vocabulary.save(tmp_path / 'gpt2')
  opened = make(tmp_path / 'gpt2', tmp_path / 'bundle')
  theirs = model_paths.load(str(tmp_path / 'gpt2'))
  assert opened.system.continues and opened.step is None
  assert opened.system.module == theirs.module
  assert opened.system.prompt_vocabulary == theirs.prompt_vocabulary
  helpers.assert_trees_equal(opened.params(), jax.tree.map(np.asarray, params))


@pytest.mark.long
@pytest.mark.parametrize(
  ('dtype', 'quantization'),
  [('bfloat16', None), (None, 'int8'), ('bfloat16', 'int8')],
)
def test_rounding_and_lora_explain_other_answers_and_nothing_else_does(
  tmp_path, monkeypatch, capsys, dtype, quantization
):
  module = MODULES['lora']
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  save_run(module, params, tmp_path)
  run = str(tmp_path / 'run')
  monkeypatch.setattr(export_command, '_ANSWER_LENGTH', 8)
  export_command.export(
    run,
    str(tmp_path / 'rounded'),
    to='bundle',
    dtype=dtype,
    quantization=quantization,
    license='MIT',
  )
  said = capsys.readouterr().out
  assert '3 of 3 greedy' in said or 'after its tensors are rounded' in said
  opened = bundle.open_bundle(tmp_path / 'rounded')
  assert opened.license == 'MIT'

  # What the source is held against is exactly what the bundle has.
  parts = bundling.open_parts(run, None, dtype, quantization=quantization)
  frozen_dtype = opened.system.frozen_dtype
  assert frozen_dtype == (dtype or 'float32')
  folded = export_command._folded(parts, run, 1, dtype, frozen_dtype)
  found = opened.params()
  found['llm'] = jax.tree.map(lambda x: x.astype(frozen_dtype), found['llm'])
  helpers.assert_trees_equal(folded, found)

  save = bundle.save_beside

  def save_others(path, arrays):
    save(path, {name: x + 1 for name, x in arrays.items()})

  monkeypatch.setattr(bundle, 'save_beside', save_others)
  other = make(run, tmp_path / 'other', dtype, quantization)
  with pytest.raises(
    ValueError, match='The bundle answers .* output was deleted'
  ):
    export_command._compare(
      run, parts, None, other, export_command.PROMPTS, dtype
    )


def test_convert_takes_the_slm_of_a_bundle_with_its_tokenizer(tmp_path, capsys):
  module = MODULES['add_foreign_gpt2']
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  save_run(module, params, tmp_path)
  opened = make(tmp_path / 'run', tmp_path / 'bundle')
  convert.convert(
    str(tmp_path / 'bundle'), str(tmp_path / 'hf'), from_='l2s', to='hf'
  )
  assert 'only its SLM is converted' in capsys.readouterr().out
  found = model_paths.load(str(tmp_path / 'hf'))
  assert found.prompt_vocabulary == opened.system.answer_vocabulary
  source = opening.open_source(str(tmp_path / 'hf'))
  embedding = ('token_embedder', 'embedding')
  np.testing.assert_array_equal(
    source.read(embedding), params['slm']['token_embedder']['embedding']
  )
  with pytest.raises(ValueError, match='has step 1 only, but step 2'):
    opening.open_source(str(tmp_path / 'bundle'), 2)


def test_what_a_bundle_has_is_not_given_beside_it(tmp_path):
  path = str(tmp_path / 'bundle')
  for name in ('step', 'llm_path', 'vocabulary'):
    with pytest.raises(ValueError, match=f'--{name}=x: .* is a bundle with'):
      export_command._check_further(path, 'hf', {name: 'x'}, {'dtype': None})
  with pytest.raises(ValueError, match='--dtype=x: .* with a fixed dtype'):
    export_command._check_further(path, 'hf', {}, {'dtype': 'x'})


@pytest.mark.parametrize('name', ['replace_foreign', 'lora'])
def test_a_bundle_becomes_the_rounded_bundle_of_its_run(name, tmp_path, capsys):
  """On a machine that has neither the run nor the LLM."""
  module = MODULES[name]
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  save_run(module, params, tmp_path)
  make(tmp_path / 'run', tmp_path / 'bundle')
  expected = make(tmp_path / 'run', tmp_path / 'int8', quantization='int8')
  for folder in ('run', 'llm'):
    (tmp_path / folder).rename(tmp_path / f'{folder}_elsewhere')
  export_command.export(
    str(tmp_path / 'bundle'),
    str(tmp_path / 'again'),
    to='bundle',
    quantization='int8',
  )
  assert 'rounded to int8, bit by bit' in capsys.readouterr().out
  found = bundle.open_bundle(tmp_path / 'again')
  helpers.assert_trees_equal(found.params(), expected.params())
  assert found.system.llm_fingerprint == expected.system.llm_fingerprint


def test_a_form_that_is_not_there_is_refused_by_name(tmp_path, monkeypatch):
  forms = {
    'none': export_command.Form('no_such_form', (), ''),
    'poor': export_command.Form('bundling', ('gguf',), ''),
  }
  monkeypatch.setattr(export_command, 'FORMS', forms)
  monkeypatch.setitem(sys.modules, 'gguf', None)
  for to, message in (
    ('none', '--to=none: this version of l2s_jax has no .*no_such_form'),
    ('poor', '--to=poor needs gguf, which is not installed: pip install'),
  ):
    with pytest.raises(ValueError, match=message):
      export_command.export('run', str(tmp_path / 'out'), to=to)
  assert not list(tmp_path.iterdir())
