# SPDX-License-Identifier: Apache-2.0
"""Profiler traces of selected training steps, for TensorBoard or Perfetto."""

import pathlib
import tempfile
from collections.abc import Sequence

import jax

from l2s_jax.runtime import distributed, files, scratch, storage

FOLDER = 'profile'


def check(steps: Sequence[int] | None) -> None:
  """Validates PROFILE_STEPS.

  Args:
    steps: the first and the last step to trace, or None.

  Raises:
    ValueError: if `steps` is neither a valid pair nor None.
  """
  is_pair = isinstance(steps, tuple | list) and len(steps) == 2
  if steps is not None and not (is_pair and 0 < steps[0] <= steps[1]):
    raise ValueError(
      f'PROFILE_STEPS={steps!r}: expected the first and the last step to '
      'trace, such as (10, 12), or None.'
    )


class Profiler:
  """Traces a range of training steps into `profile/` of the run's folder.

  Only the first process is traced.
  """

  def __init__(self, run_dir: pathlib.Path, steps: Sequence[int] | None):
    """Creates a profiler without starting a trace.

    Args:
      run_dir: the run's folder.
      steps: the first and the last step to trace; None traces nothing.
    """
    self._folder = run_dir / FOLDER
    self._scratch: tempfile.TemporaryDirectory[str] | None = None
    self._first, self._last = steps or (0, 0)
    self._is_on = False

  def before(self, step: int) -> None:
    """Starts the trace before its first step; call it before each step."""
    if step == self._first and distributed.is_first():
      place = str(self._folder)
      if isinstance(self._folder, storage.BucketPath):
        self._scratch = scratch.folder()
        place = self._scratch.name
      jax.profiler.start_trace(place)
      self._is_on = True

  def is_last(self, step: int) -> bool:
    """Returns whether the trace ends with this step.

    The caller must then wait for the step before `close`.
    """
    return self._is_on and step == self._last

  def close(self) -> None:
    """Writes the trace, if one is running."""
    if self._is_on:
      jax.profiler.stop_trace()
      self._is_on = False
    if self._scratch is not None:
      files.upload_folder(self._scratch.name, self._folder)
      self._scratch.cleanup()
      self._scratch = None
