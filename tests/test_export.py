# SPDX-License-Identifier: Apache-2.0
"""Laws of bundles: they answer as their runs do, and nothing else is read.

The runs are those of `kept_runs`.
"""

import json
import pathlib
import shutil
import signal
import time

import damaged_exports
import gin
import helpers
import jax
import numpy as np
import pytest
import tiny_runs

from l2s_jax import __main__ as command_line
from l2s_jax.inference import infer, sampling
from l2s_jax.interop.exports import export_command
from l2s_jax.performance import contenders
from l2s_jax.runtime import partitioning
from l2s_jax.systems import bundle, model_paths, parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import manifest, opening

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'
RUNS = ('l2s', 'gpt', 'llm', 'converted')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns kept runs and a bundle of each, and no LLM where they name it."""
  path = tmp_path_factory.mktemp('export')
  shutil.copytree(KEPT, path / 'kept')
  for name in RUNS:
    given = {'llm_path': f'{path}/kept/llm'} if name in ('l2s', 'gpt') else {}
    export_command.export(
      f'{path}/kept/{name}', f'{path}/bundles/{name}', to='bundle', **given
    )
  return path


def load_params(system, location):
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  with partitioning.use_mesh(mesh):
    layout = parameters.layout(system, mesh, mesh_config)
    return parameters.load_params(system, layout, location)


def answers(location, out, decoding=None, llm_path=None):
  """Returns what `infer` writes for prompts of the runs' task."""
  source = out.with_suffix('.txt')
  lines = (KEPT / 'data' / 'valid.en').read_text().splitlines()[:6]
  source.write_text('\n'.join(lines) + '\n')
  infer.infer(
    str(location),
    str(source),
    str(out),
    prompt_length=40,
    max_decode_len=8,
    batch_size=8,
    llm_path=llm_path,
    decoding=decoding,
  )
  written = (out / 'predictions.jsonl').read_text().splitlines()
  return [json.loads(line)['prediction'] for line in written]


@pytest.mark.parametrize('name', RUNS)
def test_a_bundle_answers_as_its_run(folder, name, tmp_path):
  llm = str(folder / 'kept' / 'llm') if name in ('l2s', 'gpt') else None
  for number, decoding in enumerate((None, sampling.Decoding(num_beams=3))):
    expected = answers(
      folder / 'kept' / name, tmp_path / f'run{number}', decoding, llm
    )
    found = answers(
      folder / 'bundles' / name, tmp_path / f'bundle{number}', decoding
    )
    assert found == expected
    assert any(found)


@pytest.mark.parametrize('name', RUNS)
def test_its_mapped_tensors_are_those_of_the_run(folder, name):
  location = str(folder / 'kept' / name)
  system = model_paths.load(
    location,
    llm_path=str(folder / 'kept' / 'llm') if name in ('l2s', 'gpt') else None,
  )
  expected = load_params(system, location)
  found = bundle.open_bundle(folder / 'bundles' / name).params()
  helpers.assert_trees_equal(found, jax.tree.map(np.asarray, expected))
  for leaf in jax.tree.leaves(found):
    assert isinstance(leaf, np.memmap) or leaf.base is not None


def test_what_it_says_of_its_model_is_what_the_run_says(folder):
  opened = bundle.open_bundle(folder / 'bundles' / 'l2s')
  kept = run_folder.load(folder / 'kept' / 'l2s')
  assert opened.system.module == kept.module
  assert opened.system.llm_fingerprint == kept.llm_fingerprint
  assert opened.step == 400
  # No path of where it was made.
  text = (opened.folder / manifest.FILE).read_text()
  assert str(folder) not in text


def test_a_bundle_is_the_slm_and_the_tokenizer_of_others(folder):
  """As a run is, where it is named as SLM_PATH."""
  for name in ('l2s', 'llm'):
    location, of_run = (
      str(folder / kind / name) for kind in ('bundles', 'kept')
    )
    tower = system_lib.Tower(path=location)
    run = system_lib.Tower(path=of_run)
    assert tower.load_config() == run.load_config()
    assert tower.load_vocabulary() == run.load_vocabulary()
    source = opening.open_source(location)
    expected = opening.open_source(of_run)
    for path in expected.shapes():
      np.testing.assert_array_equal(source.read(path), expected.read(path))


def test_a_bundle_in_bfloat16_has_every_tensor_so(folder):
  path = folder / 'half'
  export_command.export(
    f'{folder}/kept/l2s',
    str(path),
    to='bundle',
    dtype='bfloat16',
    llm_path=f'{folder}/kept/llm',
  )
  opened = bundle.open_bundle(path)
  whole = bundle.open_bundle(folder / 'bundles' / 'l2s').params()
  half = opened.params()
  helpers.assert_trees_equal(
    half, jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), whole)
  )
  assert opened.system.frozen_dtype == 'bfloat16'
  loaded = load_params(opened.system, str(path))
  assert loaded['llm']['token_embedder']['embedding'].dtype == 'bfloat16'
  assert loaded['slm']['token_embedder']['embedding'].dtype == 'float32'


def test_benchmark_times_a_bundle_with_the_llm_that_it_brings(folder):
  tower = system_lib.Tower()
  path = str(folder / 'bundles' / 'l2s')
  models, pair = contenders.find_models(tower, tower, path, 'add', 'float32', 0)
  assert pair is not None and not models['LLM'].writes
  names = [
    c.system for c in contenders.ours(models, pair, 'float32', ['none'], 0)
  ]
  assert names == ['SLM', 'LLM-to-SLM']
  whole = system_lib.Tower(path=str(folder / 'kept' / 'llm'))
  models, pair = contenders.find_models(whole, tower, path, 'add', 'float32', 0)
  assert pair is not None
  assert models['LLM'].writes
  assert models['SLM'].config.emb_dim == pair.module.slm_config.emb_dim


def damaged(folder, tmp_path, change):
  path = tmp_path / 'bundle'
  shutil.copytree(folder / 'bundles' / 'l2s', path)
  change(path)
  return path


@pytest.mark.parametrize(
  'change,message',
  [
    (
      damaged_exports.flipping('llm/model.safetensors'),
      'llm/model.safetensors was changed after',
    ),
    (
      lambda path: (path / 'beside' / 'model.safetensors').write_bytes(b''),
      'beside/model.safetensors has 0 bytes, but .* lists 3040',
    ),
    (
      lambda path: (path / 'slm' / 'weights.json').unlink(),
      'slm/weights.json is missing: .*manifest.json lists it',
    ),
    (
      lambda path: (path / 'slm' / 'more.py').write_text('boom'),
      'slm/more.py is not listed in .*manifest.json. Remove it',
    ),
    (
      damaged_exports.linking('slm/model.safetensors'),
      'slm/model.safetensors is a symbolic link',
    ),
    (damaged_exports.linking('slm'), 'slm is a symbolic link'),
    (
      damaged_exports.listing('../outside'),
      "lists '../outside', which is not a path inside",
    ),
    (
      damaged_exports.listing('/etc/passwd'),
      "lists '/etc/passwd', which is not a path inside",
    ),
    (
      damaged_exports.listing('llm/./x'),
      "lists 'llm/./x', which is not a path inside",
    ),
    (
      lambda path: damaged_exports.reseal(
        path, lambda c: c.update(format_version=99)
      ),
      'has format version 99, .* Update l2s_jax',
    ),
    (
      lambda path: damaged_exports.reseal(
        path, lambda c: c['model'].update(more=1)
      ),
      'does not describe its model',
    ),
    (
      lambda path: damaged_exports.reseal(
        path, lambda c: c['model']['system'].update(injection='other')
      ),
      "INJECTION='other' is not one of",
    ),
    (
      lambda path: (path / manifest.FILE).write_text('{'),
      'manifest.json is not JSON',
    ),
    (
      lambda path: (path / manifest.FILE).write_text(
        (path / manifest.FILE).read_text().replace('"step": 400', '"step": 401')
      ),
      'manifest.json was changed after it',
    ),
  ],
)
def test_a_folder_that_is_not_as_it_was_written_is_refused(
  folder, tmp_path, change, message
):
  path = damaged(folder, tmp_path, change)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    system = model_paths.load(str(path))
    load_params(system, str(path))


@pytest.mark.parametrize(
  'arguments,message',
  [
    (['kept/l2s', 'bundles/l2s'], 'already exists'),
    (['kept/none', 'new'], 'is neither a run'),
    (['kept/l2s', 'new'], 'LLM_PATH'),  # It is not where it was.
    (['kept/l2s', 'new', '--step=401'], 'step'),
    (['kept/l2s', 'new', '--step=last'], 'expected a step number, or best'),
    (['bundles/l2s', 'new'], 'is already a bundle'),
    (['kept/llm', 'new', '--prompts=EMPTY'], 'is empty; expected one prompt'),
  ],
)
def test_what_cannot_be_exported_is_refused(
  folder, arguments, message, capsys, tmp_path
):
  (tmp_path / 'empty').write_text('\n')
  argv = [str(folder / a) if '/' in a or a == 'new' else a for a in arguments]
  argv = [a.replace('EMPTY', str(tmp_path / 'empty')) for a in argv]
  gin.clear_config()
  assert command_line.main(['export', *argv, '--to=bundle']) == 2
  assert message in capsys.readouterr().err
  left = {path.name for path in folder.iterdir()}
  assert left <= {'kept', 'bundles', 'half'}


def test_a_form_refuses_a_model_before_anything_is_written(folder, tmp_path):
  pytest.importorskip('gguf', reason='the form gguf needs the package gguf')
  with pytest.raises(ValueError, match='The model is LLM-to-SLM: its SLM'):
    export_command.export(
      f'{folder}/kept/l2s',
      f'{tmp_path}/new',
      to='gguf',
      llm_path=f'{folder}/kept/llm',
      dry_run=True,
    )


def test_a_form_of_floats_refuses_int8(folder, tmp_path):
  with pytest.raises(ValueError, match='int8: --to=stablehlo has floats'):
    export_command.export(
      f'{folder}/kept/l2s',
      f'{tmp_path}/new',
      to='stablehlo',
      quantization='int8',
      llm_path=f'{folder}/kept/llm',
    )
  assert not (tmp_path / 'new').exists()


def test_a_bundle_with_other_tensors_is_not_kept(folder, monkeypatch):
  """A weight that changes between writing and reading is named."""
  save = bundle.save_beside

  def save_others(path, arrays):
    save(path, {name: x + 1 for name, x in arrays.items()})

  monkeypatch.setattr(bundle, 'save_beside', save_others)
  with pytest.raises(
    ValueError, match='of the bundle differ from those of l2s.*\n  projector/'
  ):
    export_command.export(
      f'{folder}/kept/l2s',
      f'{folder}/deep/er/new',
      to='bundle',
      llm_path=f'{folder}/kept/llm',
    )
  assert not (folder / 'deep').exists()


@pytest.mark.parametrize('secs', [0.0, 0.4, 1.5, 4.0])
def test_a_kill_leaves_nothing_at_the_target(folder, tmp_path, secs):
  arguments = (
    'export',
    str(folder / 'kept' / 'llm'),
    str(tmp_path / 'new'),
    '--to=bundle',
  )
  process = tiny_runs.start(*arguments)
  time.sleep(secs)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  if (tmp_path / 'new').exists():  # It was faster.
    bundle.open_bundle(tmp_path / 'new')
    return
  export_command.export(*arguments[1:3], to='bundle')
  assert [path.name for path in tmp_path.iterdir()] == ['new']
