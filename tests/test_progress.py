# SPDX-License-Identifier: Apache-2.0
"""Laws of progress: weighted means, the same after a restart, or a stop."""

import json
import re
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.data import batching
from l2s_jax.training import progress

BATCH = {
  'encoder_segment_ids': np.array([[1, 1, 1, 0]], np.int32),
  'decoder_segment_ids': np.array([[1, 1, 2]], np.int32),  # two examples
}
PART = batching.whole(BATCH)


def step_sums(loss, weight, grad_norm=1.0):
  return {
    'loss': jnp.float32(loss),
    'loss_weight': jnp.float32(weight),
    'num_correct': jnp.float32(1),
    'grad_norm': jnp.float32(grad_norm),
    'param_norm': jnp.float32(1),
  }


def test_progress_divides_sums_by_their_weight(tmp_path):
  done = progress.Progress(tmp_path, {})
  done.add(1, step_sums(6.0, 2.0, grad_norm=2.0), PART)
  done.add(2, step_sums(1.0, 8.0, grad_norm=8.0), PART)
  summary = done.summary()
  assert summary['train/loss'] == pytest.approx(0.7)  # not (3 + 1/8) / 2
  assert summary['train/accuracy'] == pytest.approx(0.2)
  assert summary['train/grad_norm'] == pytest.approx(5.0)
  ratio = (
    summary['train/prompt_tokens_per_sec']
    / summary['train/target_tokens_per_sec']
  )
  assert ratio == pytest.approx(6 / 10)
  done.restart()
  assert done.sums == {}


def test_what_is_learned_of_a_teacher_is_a_mean_over_its_own_tokens(tmp_path):
  """Of samples there are not as many as of gold answers."""
  done = progress.Progress(tmp_path, {})
  for step, nats, weight in ((1, 6.0, 3.0), (2, 2.0, 13.0)):
    of_teacher = {
      'distill_loss': jnp.float32(nats),
      'distill_weight': jnp.float32(weight),
    }
    done.add(step, step_sums(1.0, 5.0) | of_teacher, PART)
  assert done.summary()['train/distill_loss'] == pytest.approx(0.5)
  of_teacher = {
    'distill_loss': jnp.float32(jnp.inf),
    'distill_weight': jnp.float32(1.0),
  }
  done.add(3, step_sums(1.0, 5.0, grad_norm=jnp.nan) | of_teacher, PART)
  with pytest.raises(FloatingPointError, match='from the teacher of inf'):
    done.settle()


def test_progress_from_a_checkpoint_logs_what_one_run_would(tmp_path):
  whole = progress.Progress(tmp_path, {})
  for step in (1, 2, 3):
    whole.add(step, step_sums(step / 3, step), PART)
  first = progress.Progress(tmp_path, {})
  first.add(1, step_sums(1 / 3, 1), PART)
  first.settle()
  saved = json.loads(json.dumps(first.sums))
  second = progress.Progress(tmp_path, saved)
  for step in (2, 3):
    second.add(step, step_sums(step / 3, step), PART)
  expected, found = whole.summary(), second.summary()
  for name in ('train/loss', 'train/accuracy', 'train/grad_norm'):
    assert found[name] == expected[name]


@pytest.mark.parametrize(
  'loss,grad_norm',
  [(float('nan'), 1.0), (float('inf'), 1.0), (2.0, float('nan'))],
)
def test_progress_refuses_what_is_not_finite(tmp_path, loss, grad_norm):
  done = progress.Progress(tmp_path, {})
  done.add(6, step_sums(1.0, 1.0), PART)
  done.add(7, step_sums(loss, 1.0, grad_norm), PART)
  path = tmp_path / 'non_finite' / 'step-7.npz'
  with pytest.raises(FloatingPointError, match=f'Step 7 .*{path}'):
    done.settle()
  assert done.sums['num_steps'] == 1
  np.testing.assert_array_equal(
    np.load(path)['encoder_segment_ids'], BATCH['encoder_segment_ids']
  )


def test_speeds_count_tokens_and_examples_a_device(tmp_path):
  done = progress.Progress(tmp_path, {})
  done.add(1, step_sums(1.0, 4.0), PART)
  speeds = done.summary()
  ratio = (
    speeds['train/tokens_per_sec_per_device']
    / speeds['train/examples_per_sec_per_device']
  )
  assert ratio == pytest.approx((3 + 4) / 2)
  in_all = (
    speeds['train/target_tokens_per_sec']
    + speeds['train/prompt_tokens_per_sec']
  )
  assert speeds['train/tokens_per_sec_per_device'] == pytest.approx(in_all / 8)


def test_waiting_for_data_is_measured_and_reported(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(progress, 'PATIENCE_SECS', 0.05)
  done = progress.Progress(tmp_path, {})
  with done.waiting_for_data():
    pass
  assert capsys.readouterr().err == ''
  with done.waiting_for_data():
    time.sleep(0.5)
  warning = capsys.readouterr().err
  assert re.search('process 0 has waited .* s for a batch', warning)
  done.add(1, step_sums(1.0, 1.0), PART)
  assert 0.5 < done.summary()['train/data_wait'] <= 1


def test_waiting_starts_no_thread_a_step(tmp_path):
  done = progress.Progress(tmp_path, {})
  with done.waiting_for_data():
    pass
  before = threading.active_count()
  with done.waiting_for_data(), done.waiting_for_data():
    assert threading.active_count() == before


def test_goodput_is_of_the_whole_run(tmp_path):
  """Time that led to nothing, between two starts, counts against it."""
  clock = {'began': time.time() - 100, 'productive_secs': 50.0}
  done = progress.Progress(tmp_path, {}, clock=clock)
  done.add(1, step_sums(1.0, 1.0), PART)
  assert done.summary()['train/goodput'] == pytest.approx(0.5, abs=0.05)
  done.restart()
  assert done.clock()['began'] == clock['began']
  assert done.clock()['productive_secs'] > 50
