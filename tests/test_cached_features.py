# SPDX-License-Identifier: Apache-2.0
"""Laws of runs from cached features, by the command line.

The LLM is the one of `kept_runs`.
"""

import itertools
import pathlib
import shutil
import signal
import subprocess
import time

import forked
import gin
import numpy as np
import pytest
import test_distributed
import tiny_runs

from l2s_jax import __main__ as command_line
from l2s_jax.data.cached import cache_format, feature_format

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'
SIZES = {'train': 160, 'valid': 24}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns a folder with data, an LLM, and a cache with features."""
  path = tmp_path_factory.mktemp('features') / 'kept'
  shutil.copytree(KEPT, path)
  for split, size in SIZES.items():
    for side in ('en', 'de'):
      lines = (path / 'data' / f'{split}.{side}').read_text().splitlines()
      pairs = itertools.islice(itertools.product(lines, lines), size)
      text = ''.join(f'{one} {other}\n' for one, other in pairs)
      (path / 'data' / f'{split}.{side}').write_text(text)
  run(*cache(path, 'cache'))
  return path


def run(*arguments, status=0):
  """Runs a verb in this process."""
  try:
    assert command_line.main(list(map(str, arguments))) == status
  finally:
    gin.clear_config()


def system(folder, *arguments, name='l2s'):
  vocabulary = 'bpe' if name == 'gpt' else 'tiny.model'
  return (
    f'--gin_file={folder / "data" / name}.gin',
    f'--gin.SLM_VOCABULARY={folder / "data" / vocabulary}',
    f'--gin.LLM_PATH={folder / "llm"}',
    *arguments,
  )


def cache(folder, name, *arguments, of='l2s'):
  """Returns the arguments that cache the parallel text, with features."""
  return (
    'cache',
    *system(folder, *arguments, name=of),
    f'--gin.DATA_DIR={folder / "data"}',
    '--gin.CACHE_EXAMPLES_PER_SHARD=8',
    '--gin.CACHE_WORKERS=1',
    '--gin.FEATURES_BATCH_SIZE=8',
    f'--gin.CACHE_DIR={folder / name}',
    '--features',
  )


def content(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file() and not path.name.startswith('.')
  }


def states(folder):
  """Returns all states of a cache, one token after another."""
  found = cache_format.open_cache(folder)
  features = feature_format.open_features(found)
  splits = [
    features.split(task, name)
    for task, of_task in found.tasks.items()
    for name in of_task['splits']
  ]
  return np.concatenate(
    [
      each.rows.astype(np.float32)
      for split in splits
      for each in split.states(range(len(split)))
    ]
  )


def test_what_it_will_take_and_has_taken_is_said(folder, capfd):
  """And without the task: of tokens that are there."""
  shutil.copytree(folder / 'cache', folder / 'again')
  for path in (folder / 'again').rglob('*features*'):
    path.unlink()
  arguments = (*cache(folder, 'again'), '--gin.MIXTURE_OR_TASK_NAME=cached')
  run(*arguments, '--dry_run')
  assert not list((folder / 'again').rglob('*features*'))
  run(*arguments)
  told = capfd.readouterr().err
  assert told.count('Features of 184 examples are to be made here, which') == 2
  assert ' ms an example, of which the LLM took ' in told
  assert 'The features of' in told
  assert content(folder / 'again') == content(folder / 'cache')


def test_killed_at_several_moments_it_ends_as_if_it_had_not_been(folder):
  """What was read of a shard is read again."""
  for name in ('killed', 'unbroken'):
    shutil.copytree(
      folder / 'cache',
      folder / name,
      ignore=shutil.ignore_patterns('*features*'),
    )
  path = folder / 'killed'

  def begin(name):
    arguments = cache(folder, name, '--gin.MIXTURE_OR_TASK_NAME=cached')
    argv, environment = tiny_runs.command(*arguments)
    return forked.Popen(
      argv, env=environment, stderr=subprocess.PIPE, text=True
    )

  for number in range(4):
    process = begin('killed')
    while process.poll() is None:
      done = list(path.glob('local/*/0*.features.index.npy'))
      if len(done) > 5 * number:
        process.kill()
        break
      time.sleep(0.0005 * number)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert not (path / feature_format.FILE).exists()
  for name in ('killed', 'unbroken'):
    process = begin(name)
    _, told = process.communicate()
    assert process.returncode == 0, told
  assert content(path) == content(folder / 'unbroken')
  assert not list(path.rglob('.*part-*'))


def test_processes_share_a_mesh_and_the_work(folder):
  """Each writes shards of its own, of what all have read together."""
  arguments = cache(folder, 'together', '--gin.MeshConfig.fsdp=2')
  told = test_distributed.finish(test_distributed.start(2, *arguments))
  assert 'Features of 184 examples' in told[0][1]
  assert 'Features' not in told[1][1]
  names = content(folder / 'cache').keys()
  assert content(folder / 'together').keys() == names
  one, two = states(folder / 'cache'), states(folder / 'together')
  np.testing.assert_allclose(one, two, rtol=1 / 64, atol=1e-3)
