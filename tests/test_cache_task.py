# SPDX-License-Identifier: Apache-2.0
"""Laws of runs from a cache: unbroken, resumed, in any number of processes."""

import gzip
import json
import os
import signal
import subprocess

import cache_files
import forked
import gin
import numpy as np
import pytest
import test_distributed
import tiny_runs

from l2s_jax.data import bound_tasks
from l2s_jax.evaluation import metric_writer, scoring
from l2s_jax.metrics import scores
from l2s_jax.runtime import preemption
from l2s_jax.vocabularies import loading
from l2s_jax.weights import saved_steps

STEPS = 12
FSDP = ('--gin.MeshConfig.fsdp=2',)


def read_lines(path):
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'rt', encoding='utf-8') as file:
    return file.read().splitlines()


def write_cache(folder, name, **options):
  """Caches the parallel text of `tiny_runs` with its vocabulary."""
  vocabulary = loading.load(folder / 'tiny.model')
  splits = {}
  for split, file in (('train', 'train.{}.gz'), ('validation', 'valid.{}')):
    pairs = zip(
      *(read_lines(folder / file.format(side)) for side in ('en', 'de')),
      strict=True,
    )
    prompts = ((f'translate English to German: {en}', de) for en, de in pairs)
    splits[split] = [
      (
        [*vocabulary.encode(prompt), vocabulary.eos_id],
        [*vocabulary.encode(answer), vocabulary.eos_id],
        {'inputs_pretokenized': prompt, 'targets_pretokenized': answer},
      )
      for prompt, answer in prompts
    ]
  fingerprint = vocabulary.fingerprint()
  return cache_files.write(
    folder / name,
    {'local': splits},
    key={
      'vocabularies': {'prompt': fingerprint, 'answer': fingerprint},
      **options,
    },
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs')
  tiny_runs.write_experiments(path)
  write_cache(path, 'cache')
  return path


def train(folder, run, *bindings, cache='cache'):
  (folder / 'cached.gin').write_text(
    f"include '{folder / 'llm_baseline.gin'}'\n"
    "include 'gin_configs/tasks/cached.gin'\n"
    "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 32}\n"
    'DATA_FILES = {}\n'
  )
  return (
    'train',
    f'--gin_file={folder / "cached.gin"}',
    f'--gin.CACHE_DIR={folder / cache}',
    f'--gin.LLM_VOCABULARY={folder / "tiny.model"}',
    f'--gin.MODEL_DIR={folder / run}',
    f'--gin.TRAIN_STEPS={STEPS}',
    *bindings,
  )


def losses(run):
  return [r['train/loss'] for r in metric_writer.read(run) if 'train/loss' in r]


KINDS = {
  'padded': (),
  'packed': ('--gin.PACK=True',),
  'by length': ('--gin.LENGTH_BUCKETS=((16, 16), (24, 24))',),
}


@pytest.fixture(scope='module')
def alone(folder):
  tiny_runs.l2s(*train(folder, 'alone'))
  return folder / 'alone'


@pytest.mark.parametrize(
  'kind',
  [
    pytest.param('padded', marks=pytest.mark.long),
    pytest.param('packed', marks=pytest.mark.long),
    'by length',
  ],
)
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(folder, kind):
  """Stopped in the middle of an epoch, and of a window."""
  runs = [f'{kind}-{n}'.replace(' ', '_') for n in range(2)]
  tiny_runs.l2s(*train(folder, runs[0], *KINDS[kind]))
  # The fifth step, which is no multiple of CHECKPOINT_PERIOD.
  tiny_runs.l2s(*train(folder, runs[1], *KINDS[kind], '--gin.TRAIN_STEPS=5'))
  said = tiny_runs.l2s(*train(folder, runs[1], *KINDS[kind]))
  assert 'Resuming from step 5' in said.stdout + said.stderr
  first, second = (losses(folder / run) for run in runs)
  assert len(first) == STEPS and first == second
  digests = [
    saved_steps.read_data(folder / run / 'checkpoints' / str(STEPS))['digests']
    for run in runs
  ]
  assert digests[0] == digests[1]


@pytest.mark.parametrize('number', [1, pytest.param(4, marks=pytest.mark.long)])
def test_processes_train_as_one_does(folder, alone, number):
  """Two begin, SIGTERM comes to one, so many go on; each reads its own rows."""
  flags = forked.COMPILE_FAST['XLA_FLAGS']
  if number == 1:  # A mesh of two devices.
    flags += ' --xla_force_host_platform_device_count=2'
  run = folder / f'together-{number}'
  arguments = train(folder, run.name, *FSDP)
  pair = test_distributed.start(2, *arguments)
  test_distributed.wait_for_steps(pair, run, 3)
  pair[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=300) for process in pair]
  if pair[0].returncode:  # Else it had ended before.
    assert {p.returncode for p in pair} == {preemption.EXIT_CODE}, outputs
    assert saved_steps.steps(run)[-1] < STEPS
  test_distributed.finish(
    test_distributed.start(number, *arguments, XLA_FLAGS=flags)
  )
  np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-4)
  counted = [
    [r['train/prompt_tokens_per_sec'] * r['train/secs_per_step'] for r in rows]
    for rows in (
      [r for r in metric_writer.read(each) if 'train/loss' in r]
      for each in (run, alone)
    )
  ]
  np.testing.assert_allclose(counted[0], counted[1], rtol=1e-3)


def test_another_cache_under_a_run_is_refused(folder, alone):
  write_cache(folder, 'other', template='{source}!')
  result = tiny_runs.l2s(
    *train(folder, alone.name, '--gin.TRAIN_STEPS=20', cache='other'),
    check=False,
  )
  assert result.returncode == 2
  assert "data.cache.template: the run has nothing, the config says '{so" in (
    result.stderr
  )


WATCH = """
import pathlib, sys
import gin
from l2s_jax.training import hooks

@gin.configurable
class Watch(hooks.Hook):
  def __call__(self, loop):
    if loop.step == 1:
      names = {name.partition('.')[0] for name in sys.modules}
      pathlib.Path('modules.txt').write_text('\\n'.join(sorted(names)))
"""


def test_training_from_a_cache_imports_no_tensorflow(folder, tmp_path):
  """Nor SeqIO, until it is scored; nor torch, for the log of TensorBoard."""
  (tmp_path / 'watch_imports.py').write_text(WATCH)
  (tmp_path / 'watch.gin').write_text(
    'import watch_imports\nHOOKS = [@watch_imports.Watch()]\n'
  )
  argv, environment = tiny_runs.command(
    *train(
      folder,
      'watched',
      f'--gin_file={tmp_path / "watch.gin"}',
      '--gin.TRAIN_STEPS=2',
      "--gin.BEST_METRIC='exact_match'",
    ),
    from_nothing=True,
  )
  subprocess.run(
    argv,
    cwd=tmp_path,
    env=environment | {'PYTHONPATH': f'{tmp_path}{os.pathsep}{tiny_runs.ROOT}'},
    check=True,
    timeout=300,
    capture_output=True,
  )
  names = (tmp_path / 'modules.txt').read_text().split()
  assert {'array_record', 'tensorboardX'} <= set(names)
  assert not {'tensorflow', 'seqio', 'tensorflow_datasets', 'torch'} & {*names}


def evaluate(folder, run, *arguments):
  return (
    'evaluate',
    *arguments,
    '--gin_file=gin_configs/runs/evaluate.gin',
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 32}",
    '--gin.BATCH_SIZE=8',
    '--gin.evaluate.num_examples=12',
    f'--gin.CHECKPOINT_PATH={run}',
    f'--gin.EVAL_STEPS={STEPS}',
  )


def test_scores_from_a_cache_are_those_of_streaming(folder, alone):
  """By raw references, with the same predictions and the same names."""
  found = []
  for arguments in (
    (
      '--gin_file=gin_configs/tasks/parallel_text.gin',
      f'--gin.DATA_DIR={folder}',
      "--gin.DATA_FILES={'validation': ('valid.en', 'valid.de')}",
    ),
    (
      '--gin_file=gin_configs/tasks/cached.gin',
      f'--gin.CACHE_DIR={folder / "cache"}',
      "--gin.cached.metrics=('bleu', 'chrf', 'exact_match')",
    ),
  ):
    tiny_runs.l2s(*evaluate(folder, alone, *arguments))
    found_scores = json.loads(
      (alone / 'eval' / 'metrics-local-validation.json').read_text()
    )
    predictions = alone / 'eval' / f'local-validation-{STEPS}.jsonl'
    found.append((found_scores[str(STEPS)]['none'], predictions.read_text()))
  assert found[0][0] == found[1][0]
  assert found[0][1] == found[1][1]


def test_prompts_of_a_cache_are_answered_as_those_of_its_task(folder, alone):
  """With its references, for scores."""
  found = []
  for name, arguments in (
    (
      'local',
      (
        '--gin_file=gin_configs/tasks/parallel_text.gin',
        f'--gin.DATA_DIR={folder}',
        "--gin.DATA_FILES={'validation': ('valid.en', 'valid.de')}",
      ),
    ),
    (
      'cached',
      (
        '--gin_file=gin_configs/tasks/cached.gin',
        f'--gin.CACHE_DIR={folder / "cache"}',
      ),
    ),
  ):
    out = folder / f'answers-{name}'
    tiny_runs.l2s(
      'infer',
      '--gin_file=gin_configs/runs/infer.gin',
      *arguments,
      f'--gin.CHECKPOINT_PATH={alone}',
      f'--gin.INPUT=task:{name}',
      '--gin.INFER_SPLIT=validation',
      f'--gin.INFER_OUTPUT_DIR={out}',
      '--gin.MAX_DECODE_LEN=8',
    )
    found.append((out / 'predictions.jsonl').read_text())
  assert found[0] == found[1]
  assert '"target": "' in found[0]


# --- without a run ---


def bind(folder, vocabulary, **settings):
  with gin.unlock_config():
    gin.clear_config()
    for name, value in {'cache_dir': str(folder), **settings}.items():
      gin.bind_parameter(f'cached.{name}', value)
    try:
      return bound_tasks.bind('cached', vocabulary, vocabulary)
    finally:
      gin.clear_config()


def test_a_cached_mixture_has_no_order_of_lines(tmp_path, vocabulary):
  mixture = cache_files.write(
    tmp_path / 'mixture',
    {name: {'train': cache_files.random_examples(3)} for name in 'ab'},
  )
  with pytest.raises(ValueError, match='INPUT=task:cached: .* mixture of a, b'):
    cache_files.task(mixture, vocabulary).task_in_order('INPUT=task:cached')


def test_a_cache_of_other_tokenizers_is_refused(folder, vocabulary):
  with pytest.raises(ValueError, match='ids of its prompts are not those of'):
    bind(folder / 'cache', vocabulary)


def test_a_cache_that_is_not_there_is_refused(tmp_path, vocabulary):
  with pytest.raises(FileNotFoundError, match=f'CACHE_DIR={tmp_path}'):
    bind(tmp_path / 'none', vocabulary)
  with pytest.raises(ValueError, match='cached.cache_dir is not set'):
    bound_tasks.bind('cached', vocabulary, vocabulary)


def test_metrics_are_those_that_were_cached_or_are_asked_for(folder):
  vocabulary = loading.load(folder / 'tiny.model')
  cached = bind(folder / 'cache', vocabulary)
  assert scoring.score_names(cached, 'validation') == [
    'loss',
    'token_accuracy',
    'exact_match',
  ]
  asked = bind(folder / 'cache', vocabulary, metrics=('chrf',))
  assert 'chrf' in (scoring.score_names(asked, 'validation') or ())
  with pytest.raises(ValueError, match='cached.metrics=.*bluu'):
    bind(folder / 'cache', vocabulary, metrics=('bluu',))
  none = bind(folder / 'cache', vocabulary, metrics=())
  with pytest.raises(ValueError, match='set cached.metrics'):
    none.metrics_of('validation')


def test_references_come_back_beside_the_target(vocabulary, tmp_path):
  texts = {
    'inputs_pretokenized': 'a',
    'targets_pretokenized': 'b',
    'references': ['c', 'd'],
  }
  folder = cache_files.write(
    tmp_path / 'cache', {'local': {'test': [([3, 1], [4, 5, 1], texts)] * 3}}
  )
  (exact_match,) = scores.Scores().named(('exact_match',), 'metrics')
  task = cache_files.task(folder, vocabulary, metrics=(exact_match,))
  (scored,) = task.scored_tasks('test')
  lengths = {'inputs': 8, 'targets': 2}
  examples = list(
    scored.get_dataset(lengths, 'test', shuffle=False).as_numpy_iterator()
  )
  assert len(examples) == 3
  assert examples[0]['targets'].tolist() == [4, 5]
  assert examples[0]['targets_length'] == 3
  target = scored.postprocess_fn('b', example=examples[0], is_target=True)
  assert target == ['b', 'c', 'd']
