# SPDX-License-Identifier: Apache-2.0
"""The command line from end to end, as a user has it: real processes.

Trains systems on a tiny parallel text, stops one on the way, resumes it,
evaluates and infers. One module-scoped chain, since every process pays for its
compilation; the first imports and compiles everything itself.
"""

import json

import numpy as np
import pytest
import tiny_runs
from tiny_runs import l2s

from l2s_jax.evaluation import evaluate, metric_writer
from l2s_jax.weights import saved_steps


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('command_line')
  tiny_runs.write_experiments(path)
  return path


def train(folder, kind, run, *bindings, **options):
  arguments = tiny_runs.train_arguments(folder, kind, run, *bindings)
  return l2s(*arguments, **options)


@pytest.fixture(scope='module')
def llm_run(folder):
  train(folder, 'llm_baseline', 'llm', from_nothing=True)
  return folder / 'llm'


@pytest.fixture(scope='module')
def run(folder, llm_run):
  """An LLM-to-SLM run of eight steps, in one piece."""
  train(folder, 'llm_to_slm', 'whole', f'--gin.LLM_PATH={llm_run}')
  return folder / 'whole'


def test_a_resumed_run_equals_an_unbroken_one(folder, llm_run, run):
  llm = f'--gin.LLM_PATH={llm_run}'
  steps = '--gin.TRAIN_STEPS=4'
  # The schedule is of the whole run; only the stop comes early.
  total = '--gin.learning_rate_schedule.total_steps=8'
  train(folder, 'llm_to_slm', 'broken', llm, steps, total)
  assert saved_steps.steps(folder / 'broken') == [4]
  train(folder, 'llm_to_slm', 'broken', llm)

  whole, _ = saved_steps.params_folder(run, 8)
  broken, _ = saved_steps.params_folder(folder / 'broken', 8)
  paths = sorted(saved_steps.array_shapes(whole))
  assert {path[0] for path in paths} == {'projector', 'slm'}  # no LLM
  expected = saved_steps.read_arrays(whole, paths)
  found = saved_steps.read_arrays(broken, paths)
  for path in paths:
    np.testing.assert_array_equal(expected[path], found[path], str(path))

  def losses(folder):
    return [
      (record['step'], record['train/loss'])
      for record in metric_writer.read(folder)
      if 'train/loss' in record
    ]

  assert losses(folder / 'broken') == losses(run)
  assert [step for step, _ in losses(run)] == list(range(1, 9))


def test_a_run_describes_itself(folder, llm_run, run):
  description = json.loads((run / 'model.json').read_text())
  assert description['kind'] == 'llm_to_slm'
  assert description['llm_path'] == str(llm_run)
  assert description['shared_vocabulary'] is True
  assert len(description['llm_fingerprint']) == 64
  assert (run / 'config.gin').read_text()
  assert list((run / 'tensorboard').iterdir())


def test_another_model_in_the_same_folder_is_refused(folder, llm_run, run):
  result = train(
    folder,
    'llm_to_slm',
    run.name,
    f'--gin.LLM_PATH={llm_run}',
    '--gin.INJECTION=replace',
    check=False,
  )
  assert result.returncode == 2
  assert "injection: the run has 'add', the config says 'replace'" in (
    result.stderr
  )


def test_evaluate_all_checkpoints_with_controls(folder, run):
  l2s(
    'evaluate',
    '--gin_file=gin_configs/tasks/parallel_text.gin',
    '--gin_file=gin_configs/runs/evaluate.gin',
    f'--gin.DATA_DIR={folder}',
    "--gin.DATA_FILES={'validation': ('valid.en', 'valid.de')}",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 32}",
    f'--gin.CHECKPOINT_PATH={run}',
    "--gin.EVAL_STEPS='all'",
    "--gin.EVAL_CONTROLS=('none', 'zero', 'other')",
    '--gin.evaluate.num_examples=10',
    '--gin.BATCH_SIZE=4',
  )
  results = evaluate.read_scores(run / 'eval' / 'metrics-local-validation.json')
  assert list(results) == ['4', '8']
  assert list(results['8']) == ['none', 'other', 'zero']
  assert {'bleu', 'chrf', 'exact_match', 'loss'} <= results['8']['none'].keys()
  lines = (run / 'eval' / 'local-validation-8-other.jsonl').read_text()
  records = [json.loads(line) for line in lines.splitlines()]
  assert len(records) == 10
  sources = (folder / 'valid.en').read_text().splitlines()
  targets = (folder / 'valid.de').read_text().splitlines()
  assert [r['target'] for r in records] == targets[:10]
  assert records[0]['prompt'].endswith(sources[0])
  config = (run / 'eval' / 'config-local-validation.gin').read_text()
  assert "CONTROLS = ('none', 'zero', 'other')" in config


def test_infer_from_a_file_and_from_standard_input(folder, run):
  sources = (folder / 'valid.en').read_text().splitlines()[:5]
  prompts = folder / 'prompts.txt'
  prompts.write_text('\n'.join(sources) + '\n')
  arguments = (
    'infer',
    '--gin_file=gin_configs/runs/infer.gin',
    f'--gin.CHECKPOINT_PATH={run}',
    '--gin.PROMPT_LENGTH=48',
    '--gin.MAX_DECODE_LEN=8',
    "--gin.TEMPLATE='translate English to German: {prompt}'",
  )
  l2s(
    *arguments,
    f'--gin.INPUT={prompts}',
    f'--gin.INFER_OUTPUT_DIR={folder / "answers"}',
    '--gin.BATCH_SIZE=4',
  )
  lines = (folder / 'answers' / 'predictions.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [r['prompt'] for r in records] == [
    f'translate English to German: {source}' for source in sources
  ]
  config = (folder / 'answers' / 'config.gin').read_text()
  assert 'MAX_DECODE_LEN = 8' in config

  result = l2s(*arguments, '--gin.INPUT=-', stdin='\n'.join(sources) + '\n')
  streamed = [json.loads(line) for line in result.stdout.splitlines()]
  assert [r['prediction'] for r in streamed] == [
    r['prediction'] for r in records
  ]


def test_dry_run_prints_sizes_and_writes_nothing(folder, llm_run):
  result = train(
    folder,
    'llm_to_slm',
    'never',
    f'--gin.LLM_PATH={llm_run}',
    '--dry_run',
  )
  assert 'trainable parameters: ' in result.stdout
  assert 'frozen parameters: ' in result.stdout
  assert 'llm/token_embedder/embedding: float32[300, 24] frozen' in (
    result.stdout
  )
  assert 'bytes per device' in result.stdout
  assert not (folder / 'never').exists()


def test_files_of_no_split_are_refused(folder):
  result = train(
    folder,
    'llm_baseline',
    'never',
    '--gin.DATA_FILES=train.jsonl',
    '--dry_run',
    check=False,
  )
  assert result.returncode == 2
  assert "DATA_FILES='train.jsonl': expected the files of each split" in (
    result.stderr
  )
