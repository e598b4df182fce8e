# SPDX-License-Identifier: Apache-2.0
"""Laws of runs from cached features, by the command line."""

import signal
import subprocess
import time

import forked
import numpy as np
import pytest
import test_distributed
import tiny_runs

from l2s_jax.data.cached import cache_format, feature_format


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns a folder with data, an LLM, and a cache with features."""
  path = tmp_path_factory.mktemp('features')
  tiny_runs.write_experiments(path)
  tiny_runs.l2s(
    *tiny_runs.train_arguments(
      path, 'llm_baseline', 'llm', '--gin.TRAIN_STEPS=2'
    )
  )
  told = tiny_runs.l2s(*cache(path, 'cache')).stderr
  assert 'Features of 399 examples are to be made here, which take' in told
  assert ' ms an example, of which the LLM took ' in told
  return path


def system(folder, *arguments):
  return (
    f'--gin.SLM_VOCABULARY={folder / "tiny.model"}',
    f'--gin.LLM_PATH={folder / "llm"}',
    *arguments,
  )


def cache(folder, name, *arguments):
  """Returns the arguments that cache the parallel text, with features."""
  return (
    'cache',
    f'--gin_file={folder / "llm_to_slm.gin"}',
    f'--gin.DATA_DIR={folder}',
    '--gin.CACHE_EXAMPLES_PER_SHARD=40',
    '--gin.CACHE_WORKERS=1',
    '--gin.FEATURES_BATCH_SIZE=4',
    '--gin.MeshConfig.data=-1',
    f'--gin.CACHE_DIR={folder / name}',
    '--features',
    *system(folder, *arguments),
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


def test_killed_at_several_moments_it_ends_as_if_it_had_not_been(folder):
  """The tokens are there first; what was read of a shard is read again."""
  path = folder / 'killed'
  for number in range(5):
    process = forked.Popen(
      tiny_runs.command(*cache(folder, 'killed'))[0],
      stderr=subprocess.PIPE,
      text=True,
    )
    while process.poll() is None:
      done = list(path.glob('local/*/0*.features.index.npy'))
      begun = list(path.glob('local/*/.*.features.*part*'))
      if len(done) > 2 * number or (number == 4 and begun):
        process.kill()
        break
      time.sleep(0.001 * number)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert not (path / feature_format.FILE).exists()
  tiny_runs.l2s(*cache(folder, 'killed'))
  assert content(path) == content(folder / 'cache')
  assert not list(path.rglob('.*part-*'))


def test_processes_share_a_mesh_and_the_work(folder):
  """Each writes shards of its own, of what all have read together."""
  arguments = cache(folder, 'together', '--gin.MeshConfig.fsdp=2')
  told = test_distributed.finish(test_distributed.start(2, *arguments))
  assert 'Features of 399 examples' in told[0][1]
  assert 'Features' not in told[1][1]
  names = content(folder / 'cache').keys()
  assert content(folder / 'together').keys() == names
  one, two = states(folder / 'cache'), states(folder / 'together')
  np.testing.assert_allclose(one, two, rtol=1 / 64, atol=1e-3)
