# SPDX-License-Identifier: Apache-2.0
"""Laws of ends that nobody chose: nothing is lost, repeated or half-written.

Real processes get real signals, at moments that the run's own files show.
"""

import json
import random
import signal
import subprocess
import sys
import threading
import time

import helpers
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_runs

from l2s_jax.evaluation import metric_writer
from l2s_jax.runtime import preemption
from l2s_jax.training import checkpoint
from l2s_jax.weights import saved_steps

STEPS = 240


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('preemption')
  tiny_runs.write_experiments(path)
  return path


def start(folder, run, *bindings, **options):
  """Starts the training of an SLM baseline that saves every 20 steps."""
  return tiny_runs.start(
    *tiny_runs.train_arguments(
      folder,
      'slm_baseline',
      run,
      f'--gin.TRAIN_STEPS={STEPS}',
      '--gin.CHECKPOINT_PERIOD=20',
      '--gin.EVAL_PERIOD=120',
      '--gin.train.log_period=3',
      "--gin.BEST_METRIC='loss'",
      *bindings,
    ),
    **options,
  )


def wait_for(process, condition):
  """Returns when the condition holds; fails if the process ends before."""
  while not condition():
    if process.poll() is not None:
      raise AssertionError(process.stdout.read())
    time.sleep(0.01)


def wait_for_records(process, run, number):
  wait_for(process, lambda: len(metric_writer.read(run)) >= number)


def finish(process, status):
  output, _ = process.communicate(timeout=120)
  assert process.returncode == status, output
  return output


def losses(run_dir):
  return [
    (record['step'], record['train/loss'], record['train/grad_norm'])
    for record in metric_writer.read(run_dir)
    if 'train/loss' in record
  ]


def evaluations(run_dir):
  return metric_writer.by_step(run_dir, prefix='eval/')


def assert_same_run(found, expected):
  """Parameters, optimizer, data position, losses, scores: all bits."""
  assert losses(found) == losses(expected)
  assert evaluations(found) == evaluations(expected)
  assert json.loads((found / saved_steps.BEST).read_text()) == json.loads(
    (expected / saved_steps.BEST).read_text()
  )
  for item in ('params', 'optimizer'):
    with ocp.StandardCheckpointer() as checkpointer:
      trees = [
        checkpointer.restore(run / saved_steps.FOLDER / str(STEPS) / item)
        for run in (found, expected)
      ]
    helpers.assert_trees_equal(*trees)
  data = [
    checkpoint.Checkpointer(run).restore_data() for run in (found, expected)
  ]
  for position in data:
    assert position is not None
    assert position.pop('clock')['began'] < time.time()
  assert data[0] == data[1]
  assert data[0] is not None and data[0]['num_rows'] == 8 * STEPS


@pytest.fixture(scope='module')
def unbroken(folder):
  finish(start(folder, 'unbroken'), 0)
  assert [step for step, *_ in losses(folder / 'unbroken')] == list(
    range(3, STEPS + 1, 3)
  )
  assert list(evaluations(folder / 'unbroken')) == [120, 240]
  return folder / 'unbroken'


@pytest.mark.parametrize('times', [1, pytest.param(5, marks=pytest.mark.long)])
def test_a_killed_run_equals_its_unbroken_twin(folder, unbroken, times):
  """After any step, saving or evaluating; several times, SIGTERM in turn."""
  run = folder / f'killed-{times}'
  moments = random.Random()
  for number in range(times):
    process = start(folder, run.name)
    wait_for_records(process, run, len(metric_writer.read(run)) + 1)
    time.sleep(moments.uniform(0, 0.5))
    process.send_signal(signal.SIGTERM if number % 2 else signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode in (
      (preemption.EXIT_CODE, 0) if number % 2 else (-signal.SIGKILL, 0)
    )
  output = finish(start(folder, run.name), 0)
  assert 'Resuming from step' in output or losses(run)[-1][0] == STEPS
  assert_same_run(run, unbroken)


def test_sigterm_between_steps_saves_the_last_one(folder):
  run = folder / 'between'
  process = start(folder, 'between', '--gin.CHECKPOINT_PERIOD=1000000')
  wait_for_records(process, run, 5)
  process.terminate()
  process.terminate()  # A second one harms nothing.
  output = finish(process, preemption.EXIT_CODE)
  assert 'Exception' not in output and 'Traceback' not in output
  (step,) = saved_steps.steps(run)
  assert step >= losses(run)[-1][0] >= 15
  assert f'Saved step {step}.' in output
  assert evaluations(run) == {}


def test_ctrl_c_between_steps_saves_the_last_one_and_is_no_preemption(
  folder, unbroken
):
  run = folder / 'interrupted'
  process = start(folder, 'interrupted', '--gin.CHECKPOINT_PERIOD=1000000')
  wait_for_records(process, run, 5)
  process.send_signal(signal.SIGINT)
  output = finish(process, preemption.INTERRUPTED)
  assert 'Exception' not in output and 'Traceback' not in output
  (step,) = saved_steps.steps(run)
  assert step >= losses(run)[-1][0] >= 15
  assert f'Saved step {step}. Start again to resume from it.' in output
  finish(start(folder, 'interrupted'), 0)
  assert_same_run(run, unbroken)


@pytest.mark.parametrize('secs', [0.3, 1.0, 2.5])
def test_ctrl_c_while_the_program_starts_ends_it_at_once(folder, secs):
  process = start(folder, f'early-{secs}', from_nothing=True)
  time.sleep(secs)  # Python itself takes a tenth of a second.
  process.send_signal(signal.SIGINT)
  output = finish(process, preemption.INTERRUPTED)
  assert 'Traceback' not in output and 'KeyboardInterrupt' not in output


@pytest.mark.parametrize(
  'grace_secs', [1, pytest.param(60, marks=pytest.mark.long)]
)
def test_sigterm_while_compiling_ends_the_run(folder, grace_secs):
  """By the thread that watches, if the main one cannot listen in time."""
  name = f'compiling-{grace_secs}'
  process = start(
    folder,
    name,
    f'--gin.PREEMPTION_GRACE_SECS={grace_secs}',
    from_nothing=True,
  )
  wait_for(process, (folder / name / 'config.gin').exists)
  start_secs = time.monotonic()
  process.terminate()
  finish(process, preemption.EXIT_CODE)
  assert time.monotonic() - start_secs < grace_secs
  assert not list((folder / name / 'checkpoints').glob('*tmp*'))


def test_sigterm_while_evaluating_keeps_the_step_and_evaluates_it_again(
  folder, unbroken
):
  run = folder / 'evaluating'
  process = start(folder, 'evaluating')
  wait_for(process, lambda: 120 in saved_steps.steps(run))
  process.terminate()
  process.communicate(timeout=120)
  assert process.returncode == preemption.EXIT_CODE
  finish(start(folder, 'evaluating'), 0)
  assert_same_run(run, unbroken)


@pytest.mark.parametrize('learning_rate', ['1e15', '1e39'])
def test_what_is_not_finite_stops_the_run(folder, learning_rate):
  """With the step, its batch in a file, and the last good checkpoint.

  1e15 makes the next gradients infinite, 1e39 the parameters of this step.
  """
  run = folder / f'diverged-{learning_rate}'
  process = start(
    folder,
    run.name,
    f'--gin.LEARNING_RATE={learning_rate}',
    '--gin.CHECKPOINT_PERIOD=1',
  )
  output = finish(process, 1)
  (path,) = (run / 'non_finite').iterdir()
  step = int(path.stem.removeprefix('step-'))
  assert f'Step {step} has a loss of ' in output
  assert ('nan' in output or 'inf' in output) and str(path) in output
  assert 'Traceback' not in output and 'configurable' not in output
  batch = np.load(path)
  assert batch['decoder_target_tokens'].shape == (8, 32)
  assert saved_steps.steps(run) == list(range(1, step))[-3:]
  for saved in saved_steps.steps(run):
    params, _ = saved_steps.params_folder(run, saved)
    arrays = saved_steps.read_arrays(
      params, list(saved_steps.array_shapes(params))
    )
    assert all(np.isfinite(array).all() for array in arrays.values())


# --- the watcher alone ---


def run_python(source):
  return subprocess.run(
    [sys.executable, '-c', source],
    cwd=tiny_runs.ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_the_watcher_saves_where_the_main_thread_cannot_listen(tmp_path):
  result = run_python(f"""
import os, pathlib, signal, time
from l2s_jax.runtime import preemption
with preemption.Watcher(grace_secs=2) as watcher:
  watcher.save = pathlib.Path({str(tmp_path / 'saved')!r}).touch
  os.kill(os.getpid(), signal.SIGTERM)
  while True:
    time.sleep(100)  # Interrupted sleeps go on: nobody asks `requested`.
""")
  assert result.returncode == preemption.EXIT_CODE, result.stderr
  assert (tmp_path / 'saved').exists()


def test_the_watcher_waits_for_the_lock(tmp_path):
  result = run_python(f"""
import os, pathlib, signal, threading, time
from l2s_jax.runtime import preemption
path = pathlib.Path({str(tmp_path / 'saved')!r})
with preemption.Watcher(grace_secs=2) as watcher:
  watcher.save = lambda: path.write_text(str(steps))
  with watcher.lock:
    steps = None  # The old state is gone, the new one not yet there.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    steps = 7
  time.sleep(100)
""")
  assert result.returncode == preemption.EXIT_CODE, result.stderr
  assert (tmp_path / 'saved').read_text() == '7'


def test_ctrl_c_saves_where_the_main_thread_cannot_listen(tmp_path):
  """Nor is it lost in a callback that prints and forgets exceptions."""
  result = run_python(f"""
import os, pathlib, signal, time
from l2s_jax.runtime import preemption
with preemption.Watcher(grace_secs=2) as watcher:
  watcher.save = pathlib.Path({str(tmp_path / 'saved')!r}).touch
  os.kill(os.getpid(), signal.SIGINT)
  while True:
    try:
      time.sleep(100)
    except BaseException:
      pass
""")
  assert result.returncode == preemption.INTERRUPTED, result.stderr
  assert (tmp_path / 'saved').exists()
  assert 'SIGINT: saving what is done, then exiting' in result.stderr


def test_a_second_ctrl_c_ends_at_once_and_one_that_comes_twice_does_not():
  """The C code and Python's handler both tell of one signal."""
  program = """
import os, signal, time
from l2s_jax.runtime import preemption
with preemption.Watcher(grace_secs=20) as watcher:
  watcher.save = lambda: time.sleep(100)
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(1)  # Python's handler runs.
  print('still here', flush=True)
  {second}
  time.sleep(2)
  print('at the end', flush=True)
  os._exit(0)
"""
  once = run_python(program.format(second=''))
  assert (once.returncode, once.stdout) == (0, 'still here\nat the end\n')
  twice = run_python(
    program.format(second='os.kill(os.getpid(), signal.SIGINT)')
  )
  assert twice.returncode == preemption.INTERRUPTED
  assert twice.stdout == 'still here\n'


@pytest.mark.parametrize(
  ('before', 'status'), [('', 130), ('signal.SIG_IGN', 0)]
)
def test_ctrl_c_with_nothing_to_save_ends_at_once_unless_ignored(
  before, status
):
  result = run_python(f"""
import os, signal, sys, time
from l2s_jax.runtime import preemption
if {before!r}:
  signal.signal(signal.SIGINT, {before or None})
def main():
  print('written before', end='')
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(3)
sys.exit(preemption.run(main))
""")
  assert result.returncode == status, result.stderr
  assert result.stdout == 'written before'
  assert 'Traceback' not in result.stderr


def test_ctrl_c_to_one_of_several_processes_is_sigterm_to_jax():
  result = run_python("""
import os, signal, sys, time
from l2s_jax.runtime import preemption
def main():
  heard = []
  signal.signal(signal.SIGTERM, lambda *_: heard.append(1))  # JAX's place.
  with preemption.Watcher(60, agree=lambda _: bool(heard)) as watcher:
    watcher.check()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    watcher.exit_if_requested()
sys.exit(preemption.run(main))
""")
  assert result.returncode == preemption.INTERRUPTED, result.stderr
  assert 'all processes will exit at their next step' in result.stderr


@pytest.mark.parametrize('hanging', ['watcher.lock.acquire()', 'None'])
def test_the_process_ends_in_time_though_nothing_can_be_saved(hanging):
  start_secs = time.monotonic()
  result = run_python(f"""
import os, signal, time
from l2s_jax.runtime import preemption
with preemption.Watcher(grace_secs=2) as watcher:
  watcher.save = lambda: time.sleep(100)
  {hanging}
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(100)
""")
  assert result.returncode == preemption.EXIT_CODE, result.stderr
  assert time.monotonic() - start_secs < 10


def test_a_save_that_fails_is_no_preemption():
  """A launcher that starts again at 75 would do so for ever."""
  result = run_python("""
import os, signal, time
from l2s_jax.runtime import preemption
def save():
  raise OSError('No space left on device')
with preemption.Watcher(grace_secs=1) as watcher:
  watcher.save = save
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(100)
""")
  assert result.returncode == 1
  assert 'OSError: No space left on device' in result.stderr


def test_sigterm_before_there_is_anything_to_save_means_to_start_again(folder):
  process = start(folder, 'early', from_nothing=True)
  time.sleep(1.5)  # Imports.
  process.terminate()
  finish(process, preemption.EXIT_CODE)
  assert not (folder / 'early').exists()


def test_a_watcher_leaves_sigterm_as_it_found_it():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.Watcher(grace_secs=1) as watcher:
    assert signal.getsignal(signal.SIGTERM) != before
    assert not watcher.requested
    watcher.check()
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_watcher_in_another_thread_changes_nothing():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def enter():
    with preemption.Watcher(grace_secs=1):
      seen.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert seen == [before]
