# SPDX-License-Identifier: Apache-2.0
"""A trace of chosen training steps, for TensorBoard's profiler or Perfetto."""

import pathlib
from collections.abc import Sequence

import jax

from l2s_jax.runtime import distributed

FOLDER = 'profile'


def check(steps: Sequence[int] | None) -> None:
  """Refuses what is not a first and a last step.

  Raises:
    ValueError: says what is expected.
  """
  is_pair = isinstance(steps, tuple | list) and len(steps) == 2
  if steps is not None and not (is_pair and 0 < steps[0] <= steps[1]):
    raise ValueError(
      f'PROFILE_STEPS={steps!r}: expected the first and the last step to '
      'trace, such as (10, 12), or None.'
    )


class Profiler:
  """Traces the steps from a first to a last one, into `profile/` of a run.

  Of several processes, those of the first.
  """

  def __init__(self, run_dir: pathlib.Path, steps: Sequence[int] | None):
    """Prepares.

    Args:
      run_dir: the run's folder.
      steps: the first and the last; None traces nothing.
    """
    self._folder = run_dir / FOLDER
    self._first, self._last = steps or (0, 0)
    self._is_on = False

  def before(self, step: int) -> None:
    """Starts at the first step, to be called before each."""
    if step == self._first and distributed.is_first():
      jax.profiler.start_trace(str(self._folder))
      self._is_on = True

  def is_last(self, step: int) -> bool:
    """Whether the trace ends with this step, for which to wait then."""
    return self._is_on and step == self._last

  def close(self) -> None:
    """Writes what was traced, if anything."""
    if self._is_on:
      jax.profiler.stop_trace()
      self._is_on = False
