# SPDX-License-Identifier: Apache-2.0
"""Laws of `export` and `convert` from buckets and into them."""

import json
import shutil
import signal
import subprocess
import sys

import bucket_servers
import forked
import numpy as np
import pytest
import safetensors.torch
import t5x_runs
import test_export
import test_gguf_file
import test_gguf_form
import torch
import transformers
from flax import traverse_util

from l2s_jax.interop import convert, destination
from l2s_jax.interop.exports import export_command
from l2s_jax.runtime import extras, locks, memory, storage
from l2s_jax.systems import model_paths
from l2s_jax.training import optim
from l2s_jax.weights import opening, saved_steps
from l2s_jax.weights import source as source_lib

gcs = bucket_servers.gcs_fixture
s3 = bucket_servers.s3_fixture
folder = bucket_servers.folder_fixture
pretrained = test_gguf_form.pretrained


@pytest.fixture
def root(folder):
  return folder


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  """Runs of an earlier version, and a Hugging Face folder."""
  path = tmp_path_factory.mktemp('kept')
  shutil.copytree(test_export.KEPT, path, dirs_exist_ok=True)
  config = transformers.T5Config(
    vocab_size=64,
    d_model=16,
    d_kv=8,
    num_heads=2,
    d_ff=32,
    num_layers=1,
    feed_forward_proj='gated-gelu',
  )
  model = transformers.T5ForConditionalGeneration(config)
  model.save_pretrained(path / 'hf')
  return path


def contents(folder):
  """Returns the bytes of all files of a folder, by relative path."""
  paths = (path for path in folder.rglob('*') if path.is_file())
  return {
    path.relative_to(folder).as_posix(): path.read_bytes() for path in paths
  }


def put(local, folder):
  """Copies a folder into a bucket; its checkpoints count there."""
  destination.finish(local, folder)
  return str(folder)


@pytest.fixture
def small_memory(monkeypatch):
  """Exports compare tensors, and not answers, which takes long."""
  monkeypatch.setattr(memory, 'free_bytes', lambda: 0)


@pytest.mark.parametrize('folder', ['gs'], indirect=True)
def test_a_run_is_exported_as_its_local_copy(
  root, kept, tmp_path, small_memory
):
  run = put(kept / 'l2s', root / 'l2s')
  llm = put(kept / 'llm', root / 'llm')
  for place, source, of_llm in (
    (str(tmp_path / 'made'), str(kept / 'l2s'), str(kept / 'llm')),
    (str(root / 'made'), run, llm),
  ):
    export_command.export(source, place, to='bundle', llm_path=of_llm)
  local = contents(tmp_path / 'made')
  assert contents(root / 'made') == local and 'manifest.json' in local
  for place in (root, tmp_path):
    export_command.export(
      str(place / 'made'), str(place / 'int8'), to='bundle', quantization='int8'
    )
  assert contents(root / 'int8') == contents(tmp_path / 'int8')


@pytest.mark.long
def test_a_bundle_answers_as_its_local_copy(root, kept, tmp_path, small_memory):
  local = tmp_path / 'made'
  llm = str(kept / 'llm')
  export_command.export(
    str(kept / 'l2s'), str(local), to='bundle', llm_path=llm
  )
  expected = test_export.answers(local, tmp_path / 'expected')
  bundle = put(local, root / 'made')  # Its local copy stays.
  found = test_export.answers(bundle, tmp_path / 'found')
  assert found == expected and any(found)


@bucket_servers.short_in('s3')
def test_a_converted_folder_is_exported_as_its_local_copy(
  root, kept, tmp_path, small_memory
):
  source = put(kept / 'converted', root / 'converted')
  for place, location in (
    (tmp_path, str(kept / 'converted')),
    (root, source),
  ):
    export_command.export(location, str(place / 'made'), to='bundle')
  assert contents(root / 'made') == contents(tmp_path / 'made')
  assert model_paths.load(str(root / 'made')).module is not None
  with pytest.raises(ValueError, match='already exists. Choose'):
    export_command.export(source, str(root / 'made'), to='bundle')


@bucket_servers.short_in('s3')
def test_conversions_are_those_of_local_copies(root, kept, tmp_path):
  """From Hugging Face to the formats that come from it, and back."""
  for place, source in ((tmp_path, str(kept / 'hf')), (root, None)):
    source = source or put(kept / 'hf', root / 'hf')
    for from_, to in (('hf', 'l2s'), ('l2s', 't5x'), ('t5x', 'hf')):
      goal = str(place / 'made' / to)
      convert.convert(source, goal, from_=from_, to=to)
      source = goal
  for to in ('l2s', 't5x', 'hf'):
    local = contents(tmp_path / 'made' / to)
    assert contents(root / 'made' / to) == local and len(local) > 1


def test_a_pickle_is_copied_and_read(root, kept, tmp_path):
  folder = tmp_path / 'pickle'
  folder.mkdir()
  shutil.copy(kept / 'hf' / 'config.json', folder)
  tensors = safetensors.torch.load_file(kept / 'hf' / 'model.safetensors')
  torch.save(tensors, folder / 'pytorch_model.bin')
  source = put(folder, root / 'pickle')
  found, expected = (
    source_lib.read_fingerprint(
      opened, traverse_util.unflatten_dict(opened.shapes())
    )
    for opened in map(opening.open_source, (source, str(kept / 'hf')))
  )
  assert found == expected


def test_a_gguf_file_is_copied_and_read(root, tmp_path):
  path = tmp_path / 'model.gguf'
  params = test_gguf_file.params_of(test_gguf_file.CONFIGS['llama'])
  test_gguf_file.write(path, 'llama', params)
  (root / path.name).upload(path)
  opened = opening.open_source(str(root / path.name))
  assert opened.location == str(root / path.name)
  for name, array in params.items():
    np.testing.assert_array_equal(opened.read(name), array)


@pytest.mark.parametrize(
  'to',
  [
    'hf',
    'gguf',
    'onnx',
    'stablehlo',
    pytest.param('savedmodel', marks=pytest.mark.long),
  ],
)
@pytest.mark.parametrize('folder', ['gs'], indirect=True)
def test_each_form_has_the_files_of_a_local_folder(
  request, root, kept, tmp_path, small_memory, to
):
  source = str(kept / 'converted')
  if to == 'gguf':  # Of decoder-only models.
    source = str(request.getfixturevalue('pretrained'))
  packages = export_command.FORMS[to].packages
  if extras.missing(*packages):
    with pytest.raises(ValueError, match=f'--to={to} needs'):
      export_command.export(source, str(root / 'made'), to=to)
    assert not (root / 'made').exists()
    return
  for place in (root, tmp_path):
    export_command.export(source, str(place / 'made'), to=to)
  found, local = contents(root / 'made'), contents(tmp_path / 'made')
  assert found.keys() == local.keys() and 'manifest.json' in local
  if to in ('hf', 'gguf'):  # Compiled programs have random names within.
    assert found == local


@pytest.mark.long
def test_a_run_goes_to_t5x_and_back(root, tmp_path):
  run = tmp_path / 'run'
  t5x_runs.save(run, t5x_runs.build(), optim.adafactor())
  if root.scheme == 's3':
    with pytest.raises(ValueError, match='s3://.*local folders'):
      convert.convert(
        str(run), str(root / 'back'), from_='t5x', to='run', run=str(run)
      )
    return
  export_command.export(str(run), str(root / 't5x'), to='t5x')
  convert.convert(
    str(root / 't5x'), str(root / 'back'), from_='t5x', to='run', run=str(run)
  )
  before, after = (
    saved_steps.read_data(place / saved_steps.FOLDER / str(t5x_runs.STEP))
    for place in (run, root / 'back')
  )
  assert before['digests'] == after['digests']


@pytest.mark.parametrize('folder', ['gs'], indirect=True)
@pytest.mark.parametrize('made', ['hf', 'converted', 'bundle', 't5x', 'llm'])
def test_no_reader_accepts_a_part_of_a_folder(
  root, kept, tmp_path, small_memory, monkeypatch, made
):
  """A process may be killed after any object."""
  local = tmp_path / made
  if made == 'bundle':
    export_command.export(str(kept / 'converted'), str(local), to=made)
  elif made == 't5x':
    convert.convert(str(kept / 'hf'), str(local), from_='hf', to=made)
  else:
    shutil.copytree(kept / made, local)
  accepted = []
  upload = storage.BucketPath.upload

  def accepts():
    try:
      opening.open_source(str(root / made)).shapes()
    except (ValueError, FileNotFoundError):
      return False
    return True

  def uploading(path, file):
    accepted.append(accepts())
    upload(path, file)

  monkeypatch.setattr(storage.BucketPath, 'upload', uploading)
  destination.finish(local, root / made)
  assert len(accepted) > 1 and not any(accepted) and accepts()


def test_an_upload_that_fails_leaves_nothing(root, kept, monkeypatch):
  upload = storage.BucketPath.upload
  monkeypatch.setattr(
    storage.BucketPath,
    'upload',
    lambda path, file: upload(path, file if path.name != 'config.json' else ''),
  )
  with pytest.raises(OSError, match='hf'):
    destination.finish(kept / 'hf', root / 'hf')
  assert not (root / 'hf').exists()


@bucket_servers.short_in('gs')
def test_killed_in_an_upload_the_same_command_ends_with_the_same_bytes(
  request, root, kept, tmp_path
):
  upstream = request.getfixturevalue('gcs' if root.scheme == 'gs' else 's3')

  def start(place):
    return forked.Popen(
      [
        sys.executable,
        '-m',
        'l2s_jax',
        'export',
        str(kept / 'converted'),
        str(place / 'made'),
        '--to=bundle',
      ],
      stderr=subprocess.PIPE,
      text=True,
    )

  # The first write makes the lock. The next process takes that over by two; it
  # deletes what is there.
  for number, num_left in ((2, 2), (4, 2)):
    with bucket_servers.killing(upstream, root.scheme, number) as killing:
      process = start(root)
      told = killing.wait(process)
    assert process.returncode == -signal.SIGKILL, told
    assert len((root / 'made').objects()) == num_left
    with pytest.raises((ValueError, FileNotFoundError)):
      opening.open_source(str(root / 'made')).shapes()
  for place in (root, tmp_path):
    process = start(place)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
  assert contents(root / 'made') == contents(tmp_path / 'made')


def test_a_second_writer_is_refused_at_the_end(root, kept):
  """Both may have begun when there was nothing."""
  (root / 'hf' / 'config.json').write_text('theirs')
  with pytest.raises(ValueError, match='already exists'):
    destination.finish(kept / 'hf', root / 'hf')
  assert contents(root / 'hf') == {'config.json': b'theirs'}


def leave_lock(folder):
  """Leaves the lock of a process that has ended."""
  with locks.held(folder, 'DESTINATION', destination._LOCK) as lock:
    content = json.loads(lock.path.read_text())
  lock.path.write_text(json.dumps(content | {'birth': 'another'}))


def test_a_complete_folder_is_not_overwritten_for_a_lock_that_was_left(
  root, kept
):
  """A kill may come after the last file, and a failing store keep the lock."""
  destination.finish(kept / 'hf', root / 'hf')
  before = contents(root / 'hf')
  leave_lock(root / 'hf')
  with pytest.raises(ValueError, match='already exists'):
    destination.finish(kept / 'hf', root / 'hf')
  assert contents(root / 'hf') == before


def test_a_process_that_lost_its_lock_leaves_the_files_of_the_next(
  root, kept, monkeypatch
):
  upload = storage.BucketPath.upload

  def uploading(path, file):
    upload(path, file)
    lock = root / 'hf' / destination._LOCK
    content = json.loads(lock.read_text())
    lock.write_text(json.dumps(content | {'owner': 'the next'}))

  monkeypatch.setattr(storage.BucketPath, 'upload', uploading)
  with pytest.raises(ValueError, match='taken over its lock'):
    destination.finish(kept / 'hf', root / 'hf')
  left = contents(root / 'hf')
  assert len(left) > 1 and 'config.json' not in left
