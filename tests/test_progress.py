# SPDX-License-Identifier: Apache-2.0
"""Laws of progress: weighted means, the same after a restart, or a stop."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax import progress

PROMPTS = {'encoder_segment_ids': np.array([[1, 1, 1, 0]], np.int32)}


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
  done.add(1, step_sums(6.0, 2.0, grad_norm=2.0), PROMPTS)
  done.add(2, step_sums(1.0, 8.0, grad_norm=8.0), PROMPTS)
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


def test_progress_from_a_checkpoint_logs_what_one_run_would(tmp_path):
  whole = progress.Progress(tmp_path, {})
  for step in (1, 2, 3):
    whole.add(step, step_sums(step / 3, step), PROMPTS)
  first = progress.Progress(tmp_path, {})
  first.add(1, step_sums(1 / 3, 1), PROMPTS)
  first.settle()
  saved = json.loads(json.dumps(first.sums))
  second = progress.Progress(tmp_path, saved)
  for step in (2, 3):
    second.add(step, step_sums(step / 3, step), PROMPTS)
  expected, found = whole.summary(), second.summary()
  for name in ('train/loss', 'train/accuracy', 'train/grad_norm'):
    assert found[name] == expected[name]


@pytest.mark.parametrize(
  'loss,grad_norm',
  [(float('nan'), 1.0), (float('inf'), 1.0), (2.0, float('nan'))],
)
def test_progress_refuses_what_is_not_finite(tmp_path, loss, grad_norm):
  done = progress.Progress(tmp_path, {})
  done.add(6, step_sums(1.0, 1.0), PROMPTS)
  done.add(7, step_sums(loss, 1.0, grad_norm), PROMPTS)
  path = tmp_path / 'non_finite' / 'step-7.npz'
  with pytest.raises(FloatingPointError, match=f'Step 7 .*{path}'):
    done.settle()
  assert done.sums['num_steps'] == 1
  np.testing.assert_array_equal(
    np.load(path)['encoder_segment_ids'], PROMPTS['encoder_segment_ids']
  )
