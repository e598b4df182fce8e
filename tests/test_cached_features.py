# SPDX-License-Identifier: Apache-2.0
"""Laws of runs from cached features, by the command line.

The LLM is the one of `kept_runs`.
"""

import itertools
import json
import pathlib
import shutil
import signal
import subprocess
import time

import forked
import gin
import helpers
import ml_dtypes
import numpy as np
import pytest
import test_distributed
import tiny_runs
from array_record.python import array_record_module

from l2s_jax import __main__ as command_line
from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.evaluation import evaluate, metric_writer
from l2s_jax.models import l2s
from l2s_jax.runtime import integrity
from l2s_jax.weights import converted, opening

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


def test_what_it_will_take_and_has_taken_is_said(folder, capfd, monkeypatch):
  """And without the task: of tokens that are there; not without the room."""
  shutil.copytree(folder / 'cache', folder / 'again')
  for path in (folder / 'again').rglob('*features*'):
    path.unlink()
  arguments = (*cache(folder, 'again'), '--gin.MIXTURE_OR_TASK_NAME=cached')
  run(*arguments, '--dry_run')
  with monkeypatch.context() as full:
    usage = shutil.disk_usage(folder)._replace(free=1000)
    full.setattr(shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(OSError, match='1.0 kB free, but the remaining sha'):
      run(*arguments)
  assert not list((folder / 'again').rglob('*features*'))
  run(*arguments)
  told = capfd.readouterr().err
  assert told.count('Features to compute: 184 examples, about') == 3
  assert ' ms in the LLM; reading takes ' in told
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
  assert 'Features to compute: 184 examples' in told[0][1]
  assert 'Features' not in told[1][1]
  names = content(folder / 'cache').keys()
  assert content(folder / 'together').keys() == names
  one, two = states(folder / 'cache'), states(folder / 'together')
  np.testing.assert_allclose(one, two, rtol=1 / 64, atol=1e-3)


STEPS = 6


def write_another_llm(folder, path):
  """Writes an LLM of the same tokenizer with other weights."""
  source = opening.open_source(str(folder / 'converted'))
  params = helpers.random_params(l2s.build(source.config))
  converted.save(helpers.Arrays(source.config, params), path)
  shutil.copy(folder / 'data' / 'tiny.model', path / 'spiece.model')


def train(folder, name, *arguments, of='l2s', use=True, cached='cache'):
  """Returns the arguments that train a run from the cache."""
  return (
    'train',
    *system(folder, name=of),
    '--gin_file=gin_configs/tasks/cached.gin',
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    f'--gin.CACHE_DIR={folder / cached}',
    f'--gin.USE_FEATURES={use}',
    "--gin.cached.metrics=('chrf',)",
    f'--gin.MODEL_DIR={folder / name}',
    f'--gin.TRAIN_STEPS={STEPS}',
    '--gin.train.log_period=1',
    '--gin.train.num_eval_examples=8',
    *arguments,
  )


def logged(run_dir, name='train/loss'):
  return [r[name] for r in metric_writer.read(run_dir) if name in r]


@pytest.fixture(scope='module')
def trained(folder):
  """Returns a run from features, and one whose LLM reads."""
  run(*train(folder, 'from_features'))
  run(*train(folder, 'with_llm', use=False))
  return folder / 'from_features', folder / 'with_llm'


def test_losses_and_scores_are_those_of_the_llm_to_a_precision(trained):
  """Of the step as of the evaluation, with the same data and dropout."""
  for name in ('train/loss', 'eval/loss', 'eval/token_accuracy'):
    found, expected = (logged(path, name) for path in trained)
    np.testing.assert_allclose(found, expected, rtol=5e-3, err_msg=name)
  assert logged(trained[0]) != logged(trained[1])
  descriptions = [json.loads((p / 'model.json').read_text()) for p in trained]
  assert descriptions[0] == descriptions[1]


def test_a_run_that_goes_on_is_as_one_that_was_unbroken(folder, trained):
  """And it may go on with the LLM: what is trained is the same."""
  for steps in (2, 4):
    run(*train(folder, 'resumed', f'--gin.TRAIN_STEPS={steps}'))
  assert logged(folder / 'resumed') == logged(trained[0])[:4]
  run(*train(folder, 'resumed', use=False))
  np.testing.assert_allclose(
    logged(folder / 'resumed'), logged(trained[1]), rtol=5e-3
  )


def spoil(cache, task, split):
  """Puts NaN into the states of the first shard, and seals them again."""
  features = feature_format.open_features(cache_format.open_cache(cache))
  (size, *_) = features.content['tasks'][task]['splits'][split]['shards']
  records = [
    feature_format.encode(
      states._replace(rows=np.full_like(states.rows, np.nan))
    )
    for states in features.split(task, split).states(range(size))
  ]
  (path,) = (cache / task / split).glob('00000-*.features.array_record')
  writer = array_record_module.ArrayRecordWriter(
    str(path), feature_format.WRITER_OPTIONS
  )
  for record in records:
    writer.write(record)
  writer.close()
  place = path.with_suffix('.index.npy')
  index = np.load(place)
  index[:, 1] = [cache_format.checksum(record) for record in records]
  np.save(place, index)
  content = json.loads((cache / feature_format.FILE).read_text())
  of_split = content['tasks'][task]['splits'][split]
  of_split['index_digests'][0] = cache_format.index_digest(index)
  del content[integrity.DIGEST]
  (cache / feature_format.FILE).write_text(json.dumps(integrity.seal(content)))


def test_states_that_are_not_finite_end_the_step_that_reads_them(
  folder, trained, capsys
):
  """Its batch is kept, and the steps before are as they were."""
  shutil.copytree(folder / 'cache', folder / 'nan_cache')
  spoil(folder / 'nan_cache', 'local', 'train')
  capsys.readouterr()
  run(*train(folder, 'with_nan', cached='nan_cache'), status=1)
  (path,) = (folder / 'with_nan' / 'non_finite').iterdir()
  step = int(path.stem.removeprefix('step-'))
  told = capsys.readouterr().err
  assert f'Step {step} has a loss of nan' in told and str(path) in told
  states = np.load(path)['llm_states'].view(ml_dtypes.bfloat16)
  assert np.isnan(states.astype(np.float32)).any()
  assert logged(folder / 'with_nan') == logged(trained[0])[: step - 1]


def test_controls_are_scored_from_features(folder, trained):
  """Where the LLM is, need not be known."""
  found = []
  for use in (True, False):
    run(
      'evaluate',
      '--gin_file=gin_configs/tasks/cached.gin',
      '--gin_file=gin_configs/runs/evaluate.gin',
      f'--gin.CACHE_DIR={folder / "cache"}',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
      f'--gin.CHECKPOINT_PATH={trained[1]}',
      f'--gin.LLM_PATH={folder / ("nowhere" if use else "llm")}',
      f'--gin.EVAL_OUTPUT_DIR={folder / f"evaluated_{use}"}',
      f'--gin.USE_FEATURES={use}',
      '--gin.BATCH_SIZE=8',
      "--gin.EVAL_CONTROLS=('none', 'zero', 'other')",
      '--gin.EVAL_BOOTSTRAP_SAMPLES=0',
    )
    path = folder / f'evaluated_{use}' / 'eval'
    scores = evaluate.read_scores(path / 'metrics-local-validation.json')
    (by_control,) = scores.values()
    found.append(
      {control: scores['loss'] for control, scores in by_control.items()}
    )
  assert found[0].keys() == {'none', 'zero', 'other'}
  for control, loss in found[0].items():
    np.testing.assert_allclose(loss, found[1][control], rtol=1e-3)
  assert len({round(loss, 3) for loss in found[0].values()}) == 3


@pytest.mark.long
def test_a_foreign_vocabulary_and_int8(folder):
  """Of the LLM the embeddings are there."""
  int8 = '--gin.FEATURES_DTYPE=int8'
  run(*cache(folder, 'gpt_cache', int8, of='gpt'))
  for use in (True, False):
    arguments = {'of': 'gpt', 'use': use, 'cached': 'gpt_cache'}
    run(*train(folder, f'gpt_{use}', '--gin.TRAIN_STEPS=3', **arguments))
  np.testing.assert_allclose(
    logged(folder / 'gpt_True'), logged(folder / 'gpt_False'), rtol=2e-2
  )


@pytest.mark.long
def test_processes_read_their_own_rows(folder, trained):
  arguments = train(folder, 'pair', '--gin.MeshConfig.fsdp=2')
  test_distributed.finish(test_distributed.start(2, *arguments))
  np.testing.assert_allclose(
    logged(folder / 'pair'), logged(trained[0]), rtol=1e-4
  )


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      ("--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 16}",),
      'truncated to 32',
    ),
    (('--gin.LLM_PATH=OTHER',), 'has the states of another LLM than'),
    (('--gin.LLM_LAYER=0',), 'states of the last layer of the LLM, but'),
    (("--gin.LLM_LAYER='mix'",), 'selects a mix of all layers'),
    (('--gin.TRAIN_LLM=True',), 'but TRAIN_LLM=True trains the LLM'),
    (('--gin.CACHE_DIR=TOKENS',), 'has no features: it has no features.json'),
    (
      (
        '--gin.EVALUATIONS=(@Evaluation(),)',
        '--gin.Evaluation.task=local',
        "--gin.Evaluation.task_feature_lengths={'inputs': 32, 'targets': 16}",
      ),
      'but this task has no states',
    ),
  ],
)
def test_what_does_not_fit_is_refused(folder, changes, message, capsys):
  other = folder / 'other_llm'
  if 'OTHER' in changes[0]:
    write_another_llm(folder, other)
  if 'TOKENS' in changes[0]:
    ignore = shutil.ignore_patterns('*features*')
    shutil.copytree(folder / 'cache', folder / 'tokens', ignore=ignore)
  changes = [
    change.replace('OTHER', str(other)).replace(
      'TOKENS', str(folder / 'tokens')
    )
    for change in changes
  ]
  run(*train(folder, 'refused'), *changes, status=2)
  assert message in capsys.readouterr().err
  assert not (folder / 'refused' / 'model.json').exists()


@pytest.mark.parametrize(
  'reading,message',
  [
    ({'bidirectional': True}, 'an LLM with LLM_BIDIRECTIONAL=True, but this'),
    ({'prefix_ids': [3]}, 'an LLM with the tokens (3,) before each prompt'),
  ],
)
def test_states_of_an_llm_that_read_otherwise_are_refused(
  folder, reading, message, capsys, tmp_path
):
  other = tmp_path / 'cache'
  shutil.copytree(folder / 'cache', other)
  path = other / feature_format.FILE
  content = json.loads(path.read_text())
  content['key'] |= reading
  content.pop(integrity.DIGEST)
  path.write_text(json.dumps(integrity.seal(content)))
  run(*train(folder, 'refused'), f'--gin.CACHE_DIR={other}', status=2)
  assert message in capsys.readouterr().err
  assert not (folder / 'refused' / 'model.json').exists()


def test_features_of_another_layer_are_not_written_beside(folder, capsys):
  before = content(folder / 'cache')
  for change, message in (
    ('--gin.LLM_LAYER=0', 'key.layer: the features have last, now 0'),
    ("--gin.LLM_LAYER='mix'", 'states that change in training cannot be'),
    ('--gin.TRAIN_LLM=True', 'states that change in training cannot be'),
  ):
    run(*cache(folder, 'cache', change), status=2)
    assert message in capsys.readouterr().err.replace("'", '')
  assert content(folder / 'cache') == before


def test_a_model_without_an_llm_is_refused(folder, capsys):
  arguments = [
    argument.replace('/l2s.gin', '/llm.gin').replace('SLM_VOC', 'LLM_VOC')
    for argument in train(folder, 'alone')
    if not argument.startswith('--gin.LLM_PATH')
  ]
  run(*arguments, status=2)
  assert 'the model is a single language model' in capsys.readouterr().err
