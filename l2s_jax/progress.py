# SPDX-License-Identifier: Apache-2.0
"""What a training run has done since it last said so, and how fast.

Reads the sums of each step once the devices are done with it, and stops the
run at a loss that is not finite. Writing them is `metric_writer.py`'s.
"""

import collections
import contextlib
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from l2s_jax import data, files


class Progress:
  """Sums since the last log, of steps whose loss was seen to be finite.

  The sums are part of a checkpoint: what is logged after a restart is what
  would have been logged without it, save for the speeds.

  Attributes:
    sums: by name; with `num_steps` and `num_prompt_tokens`.
  """

  def __init__(self, run_dir: pathlib.Path, sums: Mapping[str, float]):
    """Starts the clock.

    Args:
      run_dir: gets the batch of a step that went wrong.
      sums: from the checkpoint, or none.
    """
    self.sums = dict(sums)
    self._run_dir = run_dir
    self._underway: collections.deque[tuple[int, Any, data.Batch]] = (
      collections.deque()
    )
    self._start_clock()

  def add(
    self, step: int, sums: Mapping[str, jax.Array], batch: data.Batch
  ) -> None:
    """Adds a step that the devices have yet to finish.

    Waits for the one before it, so that they always have one to do, and never
    many.

    Raises:
      FloatingPointError: as `settle`.
    """
    self._underway.append((step, sums, batch))
    self.settle(leave=1)

  def settle(self, leave: int = 0) -> None:
    """Waits for all steps but the last `leave`.

    Raises:
      FloatingPointError: if the loss, the gradients or the new parameters are
        not finite; names the step and a file with its batch.
    """
    while len(self._underway) > leave:
      step, device_sums, batch = self._underway.popleft()
      sums = {k: float(v) for k, v in jax.device_get(device_sums).items()}
      if not all(
        math.isfinite(sums[name])
        for name in ('loss', 'grad_norm', 'param_norm')
      ):
        raise FloatingPointError(self._describe_failure(step, sums, batch))
      sums['num_steps'] = 1
      sums['num_prompt_tokens'] = int((batch['encoder_segment_ids'] > 0).sum())
      for name, value in sums.items():
        self.sums[name] = self.sums.get(name, 0.0) + value

  def _describe_failure(
    self, step: int, sums: Mapping[str, float], batch: data.Batch
  ) -> str:
    path = self._run_dir / 'non_finite' / f'step-{step}.npz'
    with files.whole(path, 'wb') as file:
      np.savez(file, **dict[str, Any](batch))
    return (
      f'Step {step} has a loss of {sums["loss"]}, a gradient norm of '
      f'{sums["grad_norm"]}, and leaves a parameter norm of '
      f'{sums["param_norm"]}. Its batch is in {path}. No checkpoint holds what '
      'came of it. A lower LEARNING_RATE, or DTYPE=float32, may help.'
    )

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time inside out of the speeds; no step may be underway."""
    start_secs = time.perf_counter()
    yield
    self._start_secs += time.perf_counter() - start_secs

  def summary(self) -> dict[str, float]:
    """Returns what to log, of all steps so far."""
    self.settle()
    secs = time.perf_counter() - self._start_secs
    sums, before = self.sums, self._sums_before
    here = {name: sums[name] - before.get(name, 0.0) for name in sums}
    tokens = max(sums['loss_weight'], 1.0)
    summary = {
      'train/loss': sums['loss'] / tokens,
      'train/accuracy': sums['num_correct'] / tokens,
      'train/grad_norm': sums['grad_norm'] / sums['num_steps'],
      'train/param_norm': sums['param_norm'] / sums['num_steps'],
      'train/target_tokens_per_sec': here['loss_weight'] / secs,
      'train/prompt_tokens_per_sec': here['num_prompt_tokens'] / secs,
      'train/secs_per_step': secs / max(here['num_steps'], 1.0),
    }
    if sums.get('z_loss'):
      summary['train/z_loss'] = sums['z_loss'] / tokens
    return summary

  def restart(self) -> None:
    """Starts again from nothing."""
    self.sums = {}
    self._start_clock()

  def _start_clock(self) -> None:
    self._sums_before = dict(self.sums)
    self._start_secs = time.perf_counter()
