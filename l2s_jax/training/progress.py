# SPDX-License-Identifier: Apache-2.0
"""Progress of a training run: sums since the last log, and speeds.

It reads the sums of each step once the devices have finished it, stops the run
at a non-finite loss, and reports when data are late.
`evaluation/metric_writer.py` writes the numbers.
"""

import collections
import contextlib
import math
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from l2s_jax.data import batching
from l2s_jax.runtime import chips, distributed, files

# Seconds without a batch between two messages.
PATIENCE_SECS = 60.0
_LOOK_SECS = 0.2


class Progress:
  """Sums of finished steps since the last log.

  The sums are saved in checkpoints. After a restart the logged values, apart
  from speeds, equal those of an uninterrupted run.

  Attributes:
    sums: by name; includes `num_steps`, `num_prompt_tokens` and `num_examples`.
  """

  def __init__(
    self,
    run_dir: pathlib.Path,
    sums: Mapping[str, float],
    *,
    clock: Mapping[str, float] | None = None,
    example_flops: Callable[[float, float], float] | None = None,
  ):
    """Starts the clock.

    Args:
      run_dir: receives the batch of a non-finite step.
      sums: from the checkpoint, or empty.
      clock: result of `clock`, from the checkpoint; None at the start of a run.
      example_flops: training FLOPs of one example, given its numbers of prompt
        tokens and answer tokens; for the utilisation (MFU). None leaves it out.
    """
    self.sums = dict(sums)
    self._run_dir = run_dir
    self._example_flops = example_flops
    self._began = clock['began'] if clock else time.time()
    self._productive_secs = clock['productive_secs'] if clock else 0.0
    self._underway: collections.deque[tuple[int, Any, batching.Part]] = (
      collections.deque()
    )
    self._start_clock()

  def add(
    self, step: int, sums: Mapping[str, jax.Array], part: batching.Part
  ) -> None:
    """Adds a dispatched step, and waits for the step before it.

    The devices thus always have a step to run, but never a long queue.

    Raises:
      FloatingPointError: as in `settle`.
    """
    self._underway.append((step, sums, part))
    self.settle(leave=1)

  def settle(self, leave: int = 0) -> None:
    """Waits for all steps but the last `leave`, and adds their sums.

    Raises:
      FloatingPointError: if the loss, the gradients or the new parameters are
        not finite; names the step and a file with its batch.
    """
    while len(self._underway) > leave:
      step, device_sums, part = self._underway.popleft()
      sums = {k: float(v) for k, v in jax.device_get(device_sums).items()}
      if not all(
        math.isfinite(sums[name])
        for name in ('loss', 'grad_norm', 'param_norm')
      ):
        raise FloatingPointError(self._describe_failure(step, sums, part))
      limit = sums.pop('grad_norm_limit', math.inf)
      if sums.get('num_skipped'):
        with tqdm.tqdm.external_write_mode(file=sys.stderr):
          distributed.say(
            f'Step {step}: skipped its update, because its gradient norm of '
            f'{sums["grad_norm"]:.4g} is above the limit of SKIP_SPIKES, '
            f'{limit:.4g}.'
          )
      sums['num_steps'] = 1
      sums['num_prompt_tokens'] = part.num_prompt_tokens
      sums['num_examples'] = part.num_examples
      for name, value in sums.items():
        self.sums[name] = self.sums.get(name, 0.0) + value

  def _describe_failure(
    self, step: int, sums: Mapping[str, float], part: batching.Part
  ) -> str:
    """Saves the batch of a non-finite step, and returns the message."""
    path = self._run_dir / 'non_finite' / f'step-{step}.npz'
    if distributed.is_first():
      with files.whole(path, 'wb') as file:
        np.savez(file, **dict[str, Any](part.batch))
    of_teacher = (
      f' a divergence from the teacher of {sums["distill_loss"]},'
      if 'distill_loss' in sums
      else ''
    )
    return (
      f'Step {step} has a loss of {sums["loss"]},{of_teacher} a gradient norm '
      f'of {sums["grad_norm"]}, and a parameter norm of {sums["param_norm"]}. '
      f'{_rows_of(part)} in {path}. No checkpoint has the result of this step. '
      'A lower LEARNING_RATE, or DTYPE=float32, may help.'
    )

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time inside from the speeds; no step may be running."""
    start_secs = time.perf_counter()
    yield
    self._start_secs += time.perf_counter() - start_secs

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Counts the time inside as waiting for data, and reports long waits."""
    start_secs = time.perf_counter()
    with reminding():
      yield
    self._waiting_secs += time.perf_counter() - start_secs

  def clock(self) -> dict[str, float]:
    """Returns the clock for a checkpoint.

    Returns:
      'began', the Unix time of the run's start, and 'productive_secs', the
      training time of all steps that the checkpoint includes.
    """
    return {
      'began': self._began,
      'productive_secs': self._productive_secs + self._secs(),
    }

  def summary(self) -> dict[str, float]:
    """Returns the values to log, after waiting for all steps."""
    self.settle()
    secs = self._secs()
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
      **self._speeds(here, secs),
    }
    if 'num_skipped' in sums:
      summary['train/num_skipped'] = sums['num_skipped']
    if sums.get('distill_weight'):
      summary['train/distill_loss'] = (
        sums['distill_loss'] / sums['distill_weight']
      )
    if sums.get('z_loss'):
      summary['train/z_loss'] = sums['z_loss'] / tokens
    return summary

  def _speeds(self, here: Mapping[str, float], secs: float) -> dict[str, float]:
    """Returns throughput, data wait, goodput, peak memory and MFU."""
    num_devices = jax.device_count()
    num_tokens = here['loss_weight'] + here['num_prompt_tokens']
    clock = self.clock()
    speeds = {
      'train/tokens_per_sec_per_device': num_tokens / secs / num_devices,
      'train/examples_per_sec_per_device': (
        here['num_examples'] / secs / num_devices
      ),
      'train/data_wait': self._waiting_secs / secs,
      'train/goodput': clock['productive_secs']
      / max(time.time() - clock['began'], 1e-9),
    }
    device = jax.local_devices()[0]
    if memory := device.memory_stats():
      speeds['train/device_peak_bytes'] = memory['peak_bytes_in_use']
    chip = chips.of_device(device.device_kind)
    if chip and self._example_flops and here['num_examples']:
      flops = here['num_examples'] * self._example_flops(
        here['num_prompt_tokens'] / here['num_examples'],
        here['loss_weight'] / here['num_examples'],
      )
      speeds['train/mfu'] = flops / secs / num_devices / chip.flops_per_sec
    return speeds

  def restart(self) -> None:
    """Resets the sums and starts the clock again."""
    self.sums = {}
    self._productive_secs += self._secs()
    self._start_clock()

  def _start_clock(self) -> None:
    self._sums_before = dict(self.sums)
    self._start_secs = time.perf_counter()
    self._waiting_secs = 0.0

  def _secs(self) -> float:
    return time.perf_counter() - self._start_secs


def _rows_of(part: batching.Part) -> str:
  """Returns the start of a message about the rows saved by this host."""
  num_rows = len(part.rows)
  if num_rows == part.num_rows:
    return 'Its batch is'
  return (
    f'{num_rows} of the {part.num_rows} rows of its batch (those of this '
    'process) are'
  )


class _Reminder:
  """Reports repeatedly while a batch is late.

  One thread watches all waits: starting a thread per step would take longer on
  busy cores than a batch that is already there.
  """

  def __init__(self) -> None:
    self._since: float | None = None
    self._thread: threading.Thread | None = None

  @contextlib.contextmanager
  def watching(self) -> Iterator[None]:
    """Watches the time spent inside."""
    if self._thread is None:
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()
    self._since = time.perf_counter()
    try:
      yield
    finally:
      self._since = None

  def _watch(self) -> None:
    seen, due = None, 0.0
    while True:
      time.sleep(_LOOK_SECS)
      since = self._since
      if since is None:
        continue
      if since != seen:
        seen, due = since, PATIENCE_SECS
      waited = time.perf_counter() - since
      if waited >= due:
        due += PATIENCE_SECS
        print(
          f'process {jax.process_index()} has waited {waited:.0f} s for a '
          'batch: the data source is slow, or hangs.',
          file=sys.stderr,
          flush=True,
        )


_REMINDER = _Reminder()


def reminding() -> contextlib.AbstractContextManager[None]:
  """Reports repeatedly while the code inside waits for a batch."""
  return _REMINDER.watching()
