# SPDX-License-Identifier: Apache-2.0
"""Laws of several processes: they do what one does, and end together.

Real ones, joined over loopback, by the command line; what launchers make of
their environment is in `test_launch.py`.
"""

import json
import os
import signal
import socket
import subprocess
import time

import forked
import numpy as np
import pytest
import tiny_runs

from l2s_jax.evaluation import metric_writer
from l2s_jax.runtime import distributed, preemption
from l2s_jax.weights import saved_steps

STEPS = 24
# Every second device holds the other half of each layer.
FSDP = ('--gin.MeshConfig.fsdp=2',)


def start(num_processes, *arguments, **environment):
  """Starts a verb in several processes that belong together."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  argv, env = tiny_runs.command(*arguments)
  return [
    forked.Popen(
      argv,
      cwd=tiny_runs.ROOT,
      env=env
      | environment
      | {
        'L2S_COORDINATOR_ADDRESS': address,
        'L2S_NUM_PROCESSES': str(num_processes),
        'L2S_PROCESS_ID': str(index),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(num_processes)
  ]


def finish(processes, status=0):
  """Waits for all; returns standard output and standard error of each."""
  outputs = [process.communicate(timeout=300) for process in processes]
  codes = [process.returncode for process in processes]
  assert codes == [status] * len(processes), outputs
  return outputs


def wait_for_steps(processes, run, number):
  while len(metric_writer.read(run)) < number:
    for process in processes:
      assert process.poll() is None, process.communicate()
    time.sleep(0.05)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('distributed')
  tiny_runs.write_experiments(path)
  tiny_runs.l2s(
    *tiny_runs.train_arguments(
      path, 'llm_baseline', 'llm', '--gin.TRAIN_STEPS=2'
    )
  )
  return path


def train(folder, run, *bindings):
  return tiny_runs.train_arguments(
    folder,
    'llm_to_slm',
    run,
    f'--gin.LLM_PATH={folder / "llm"}',
    f'--gin.TRAIN_STEPS={STEPS}',
    '--gin.CHECKPOINT_PERIOD=8',
    '--gin.tiny_SLM/TransformerConfig.dropout_rate=0.0',
    "--gin.BEST_METRIC='loss'",
    *bindings,
  )


def evaluate(folder, run, *bindings):
  return (
    'evaluate',
    '--gin_file=gin_configs/tasks/parallel_text.gin',
    '--gin_file=gin_configs/runs/evaluate.gin',
    f'--gin.DATA_DIR={folder}',
    "--gin.DATA_FILES={'validation': ('valid.en', 'valid.de')}",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 32}",
    '--gin.evaluate.num_examples=10',
    '--gin.BATCH_SIZE=8',
    "--gin.EVAL_CONTROLS=('none', 'other')",
    f'--gin.CHECKPOINT_PATH={folder / run}',
    *bindings,
  )


def infer(folder, run, output, *bindings):
  return (
    'infer',
    '--gin_file=gin_configs/runs/infer.gin',
    f'--gin.CHECKPOINT_PATH={folder / run}',
    f'--gin.INPUT={folder / "valid.en"}',
    f'--gin.INFER_OUTPUT_DIR={folder / output}',
    '--gin.MAX_DECODE_LEN=12',
    '--gin.PROMPT_LENGTH=48',
    *bindings,
  )


@pytest.fixture(scope='module')
def alone(folder):
  tiny_runs.l2s(*train(folder, 'alone'))
  return folder / 'alone'


@pytest.fixture(scope='module')
def together(folder):
  """Two processes begin, SIGTERM comes to one of them, four go on."""
  run = folder / 'together'
  pair = start(2, *train(folder, 'together', *FSDP))
  wait_for_steps(pair, run, 3)
  pair[1].send_signal(signal.SIGTERM)
  outputs = finish(pair, preemption.EXIT_CODE)
  step = saved_steps.steps(run)[-1]
  assert step < STEPS and f'Saved step {step}' in outputs[0][0]
  assert 'Saved step' not in outputs[1][0]  # The first speaks for all.
  # Streaming is more work for each of several; so says the first, once.
  notes = [said.count('With a cache the task is') for _, said in outputs]
  assert notes == [1, 0]
  finish(start(4, *train(folder, 'together', *FSDP)))
  return run


def assert_close(found, expected, names, rtol=1e-5):
  for name in names:
    np.testing.assert_allclose(found[name], expected[name], rtol=rtol)


def test_processes_train_as_one_does(alone, together):
  """Mesh and processes change, twice, and so does nothing else."""
  found, expected = (
    [r for r in metric_writer.read(run) if 'train/loss' in r]
    for run in (together, alone)
  )
  assert [r['step'] for r in found] == list(range(1, STEPS + 1))
  for one, other in zip(found, expected, strict=True):
    # Rounding grows: sums over devices have another order.
    rtol = 1e-5 if one['step'] <= 8 else 1e-4
    assert_close(one, other, ('train/loss', 'train/grad_norm'), rtol)
  scores, alike = (
    metric_writer.by_step(run, prefix='eval/')[STEPS]
    for run in (together, alone)
  )
  assert scores['num_examples'] == 10  # Two batches of 8, not 16 examples.
  assert_close(scores, alike, ('loss',), 1e-4)
  assert saved_steps.best_step(together) == saved_steps.best_step(alone)


def test_processes_evaluate_as_one_does(folder, alone, together):
  """What four processes have saved, two read and one reads."""
  arguments = evaluate(folder, 'together', f'--gin.EVAL_STEPS={STEPS}')
  finish(start(2, *arguments, *FSDP))
  (path,) = (together / 'eval').glob('metrics-*.json')
  of_two = json.loads(path.read_text())
  tiny_runs.l2s(*arguments)
  of_one = json.loads(path.read_text())
  for control in ('none', 'other'):
    assert_close(
      of_two[str(STEPS)][control],
      of_one[str(STEPS)][control],
      ('loss', 'chrf', 'num_examples'),
    )


def test_processes_answer_as_one_does(folder, together):
  """The first writes."""
  finish(start(2, *infer(folder, 'together', 'of_two', *FSDP)))
  tiny_runs.l2s(*infer(folder, 'together', 'of_one'))
  of_two, of_one = (
    (folder / name / 'predictions.jsonl').read_text()
    for name in ('of_two', 'of_one')
  )
  assert of_two == of_one
  assert len(of_one.splitlines()) > 50


@pytest.mark.parametrize('victim', [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_dead_process_ends_the_other(folder, victim):
  """In bounded time, with a reason; started again, the run goes on."""
  run = folder / f'killed-{victim}'
  arguments = train(
    folder, run.name, '--gin.TRAIN_STEPS=100000', '--gin.CHECKPOINT_PERIOD=5'
  )
  pair = start(2, *arguments, *FSDP, L2S_HEARTBEAT_SECS='10')
  wait_for_steps(pair, run, 12)
  pair[victim].kill()
  start_secs = time.monotonic()
  _, said = pair[1 - victim].communicate(timeout=60)
  assert time.monotonic() - start_secs < 45
  assert pair[1 - victim].returncode not in (0, preemption.EXIT_CODE)
  assert 'another' in said or 'coordinat' in said
  pair[victim].communicate()
  saved = saved_steps.steps(run)
  assert saved and saved[-1] >= 5
  result = tiny_runs.l2s(
    *train(folder, run.name, f'--gin.TRAIN_STEPS={saved[-1] + 2}')
  )
  assert f'Resuming from step {saved[-1]}' in result.stdout + result.stderr


def test_standard_input_is_of_one_process(folder, together):
  arguments = infer(folder, 'together', 'none', '--gin.INPUT=-')
  for _, said in finish(start(2, *arguments), 2):
    assert 'INPUT=- with 2 processes' in said


ALL = {
  'L2S_COORDINATOR_ADDRESS': 'host:1',
  'L2S_NUM_PROCESSES': '2',
  'L2S_PROCESS_ID': '0',
}


@pytest.mark.parametrize(
  'changed,said',
  [
    ({'L2S_PROCESS_ID': None}, 'L2S_PROCESS_ID is not'),
    ({'L2S_PROCESS_ID': '2'}, 'L2S_PROCESS_ID=2 of L2S_NUM_PROCESSES=2'),
    ({'L2S_NUM_PROCESSES': 'two'}, 'L2S_NUM_PROCESSES=two'),
    ({'L2S_HEARTBEAT_SECS': '1m'}, 'L2S_HEARTBEAT_SECS=1m'),
  ],
)
def test_a_wrong_environment_is_refused(changed, said):
  environment = {k: v for k, v in (ALL | changed).items() if v is not None}
  with pytest.raises(ValueError, match=said):
    distributed.initialize(environment)


def test_without_a_cluster_nothing_is_joined():
  # A batch script of Slurm without srun, and a TPU of one host.
  distributed.initialize({'SLURM_NTASKS': '8', 'TPU_WORKER_HOSTNAMES': 'a'})
  distributed.initialize(ALL | {'L2S_NUM_PROCESSES': '1'})
  assert distributed.from_first({'a': [1, None]}) == {'a': [1, None]}
  assert os.getpid() and distributed.is_first()
