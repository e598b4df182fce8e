# SPDX-License-Identifier: Apache-2.0
"""An exported folder that is not as it was written is refused, file by name.

By whatever opens it here, and by the programs that go along. Bundles have more
of these laws in `test_export`.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import damaged_exports
import helpers
import pytest

from l2s_jax.interop import convert, to_huggingface
from l2s_jax.interop.exports import greedy_programs, verify
from l2s_jax.models import l2s
from l2s_jax.systems import model_paths
from l2s_jax.weights import manifest, opening, run_format

FAULTS = damaged_exports.of('model.safetensors')
PROGRAMS = {
  'onnx': {'run_onnx.py': 'run.py'},
  'stablehlo': {'run_stablehlo.py': 'run.py'},
  'savedmodel': {},
}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """Returns a language model as the form `hf` leaves it."""
  folder = tmp_path_factory.mktemp('hf')
  params = helpers.random_params(l2s.build(helpers.GPT2))
  vocabulary = helpers.vocabulary()
  source = helpers.Arrays(helpers.GPT2, params)
  to_huggingface.save(source, folder, vocabulary)
  vocabulary.save(folder)
  manifest.write(folder, 'hf', {})
  return folder


def with_programs(form, folder):
  """Writes what verify.py looks at: any files, and the programs themselves."""
  folder.mkdir()
  (folder / 'model.safetensors').write_bytes(bytes(100))
  greedy_programs.copy_along(folder, PROGRAMS[form])
  manifest.write(folder, form, {})
  return folder


@pytest.mark.parametrize('fault', FAULTS)
def test_a_changed_model_is_not_opened(fault, model, tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(model, folder)
  model_paths.load(str(folder))
  change, message = FAULTS[fault]
  change(folder)
  for load in (
    lambda: model_paths.load(str(folder)),
    lambda: opening.open_source(str(folder)),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      load()
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    convert.convert(str(folder), str(tmp_path / 'out'), from_='hf', to='l2s')
  assert not (tmp_path / 'out').exists()


def test_a_model_that_was_changed_on_purpose_is_read_without_a_manifest(
  model, tmp_path
):
  folder = tmp_path / 'model'
  shutil.copytree(model, folder)
  (folder / 'README.md').write_text('mine')
  with pytest.raises(ValueError, match='If the change was meant, remove .*man'):
    opening.open_source(str(folder))
  (folder / manifest.FILE).unlink()
  opening.open_source(str(folder))


def test_a_manifest_of_another_program_is_ignored(model, tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(model, folder)
  (folder / manifest.FILE).write_text('{"name": "web app", "files": []}')
  model_paths.load(str(folder))
  opening.open_source(str(folder))


@pytest.mark.parametrize('form', PROGRAMS)
def test_programs_are_not_a_model_that_is_read_here(form, tmp_path):
  folder = with_programs(form, tmp_path / form)
  with pytest.raises(ValueError, match=f'is an export of the form {form}, whi'):
    model_paths.load(str(folder))


@pytest.mark.parametrize('form', PROGRAMS)
def test_the_check_that_goes_along_names_what_differs(form, tmp_path):
  whole = with_programs(form, tmp_path / 'whole')
  assert verify.problem(str(whole)) is None
  for number, (change, message) in enumerate(FAULTS.values()):
    folder = tmp_path / str(number) / 'export'
    shutil.copytree(whole, folder)
    change(folder)
    problem = verify.problem(str(folder))
    assert problem is not None and re.search(message, problem), problem


@pytest.mark.parametrize('form', ['onnx', 'stablehlo'])
@pytest.mark.parametrize('fault', ['altered', 'more'])
def test_a_changed_folder_does_not_run(form, fault, tmp_path):
  """Nor is a file of it imported in the place of a library."""
  folder = with_programs(form, tmp_path / form)
  change, message = FAULTS[fault]
  change(folder)
  done = subprocess.run(
    [sys.executable, 'run.py', '3'],
    input='[[1]]',
    capture_output=True,
    text=True,
    cwd=folder,
  )
  assert done.returncode == 1
  assert re.search(message, done.stderr), done.stderr
  assert 'Traceback' not in done.stderr
  assert not (folder / 'was_run').exists()


def test_the_check_knows_the_version_that_is_written():
  assert verify.FORMAT_VERSION == run_format.FORMAT_VERSION


def test_a_file_is_hashed_once_a_process(model, tmp_path, monkeypatch):
  import hashlib

  folder = tmp_path / 'model'
  shutil.copytree(model, folder)
  digest, hashed = hashlib.file_digest, []

  def counted(file, name):
    hashed.append(pathlib.Path(file.name).name)
    return digest(file, name)

  monkeypatch.setattr(hashlib, 'file_digest', counted)
  for _ in range(3):
    opening.open_source(str(folder))
  assert len(hashed) == len(set(hashed)) > 1
  damaged_exports.flipping('model.safetensors')(folder)
  with pytest.raises(
    ValueError, match='model.safetensors was changed after it was written'
  ):
    opening.open_source(str(folder))
