# SPDX-License-Identifier: Apache-2.0
"""Where a run's numbers go: `metrics.jsonl`, and from there TensorBoard.

After a restart both hold each step once: what was logged beyond the restored
checkpoint is dropped, since those steps are done again.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import tensorboardX

from l2s_jax import distributed, files

FILE = 'metrics.jsonl'
_NOT_SCALARS = ('step', 'time')


class MetricWriter:
  """Writes scalars by step; does nothing in processes other than the first."""

  def __init__(
    self,
    run_dir: str | pathlib.Path,
    *,
    first_step: int = 0,
    drop: tuple[str, ...] = (),
  ):
    """Opens the logs.

    Args:
      run_dir: the run's folder.
      first_step: the restored step; later records are dropped.
      drop: prefixes of names whose records of the restored step are dropped
        as well.
    """
    self._jsonl = None
    if not distributed.is_first():
      return
    path = pathlib.Path(run_dir) / FILE
    kept = [
      record
      for record in read(run_dir)
      if record['step'] < first_step
      or (
        record['step'] == first_step
        and not any(name.startswith(drop) for name in record)
      )
    ]
    with files.whole(path) as file:
      file.writelines(json.dumps(record) + '\n' for record in kept)
    self._jsonl = path.open('a', encoding='utf-8')

    # Written anew: an event file that was begun cannot be shortened.
    folder = pathlib.Path(run_dir) / 'tensorboard'
    old = list(folder.glob('events.out.tfevents.*'))
    self._tensorboard = tensorboardX.SummaryWriter(
      str(folder), filename_suffix=f'.{time.time_ns()}'
    )
    for record in kept:
      self._add(record)
    self._tensorboard.flush()
    for event_file in old:
      event_file.unlink()

  def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
    """Logs named numbers; the JSONL line is on disk when this returns."""
    if self._jsonl is None:
      return
    record = {'step': step, 'time': time.time()}
    record |= {name: float(value) for name, value in scalars.items()}
    self._jsonl.write(json.dumps(record) + '\n')
    self._jsonl.flush()
    self._add(record)

  def _add(self, record: Mapping[str, Any]) -> None:
    for name, value in record.items():
      if name not in _NOT_SCALARS:
        self._tensorboard.add_scalar(
          name, value, record['step'], walltime=record['time']
        )

  def close(self) -> None:
    if self._jsonl is not None:
      self._jsonl.close()
      self._tensorboard.close()


def read(run_dir: str | pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of a run, in order; a torn last line is left out.

  Each has its 'step', and its 'time' in seconds since the epoch.
  """
  path = pathlib.Path(run_dir) / FILE
  if not path.is_file():
    return []
  lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith('\n')]


def by_step(
  run_dir: str | pathlib.Path, *, prefix: str
) -> dict[int, dict[str, float]]:
  """Returns what was logged under a prefix, by step, without the prefix."""
  found: dict[int, dict[str, float]] = {}
  for record in read(run_dir):
    scalars = {
      name.removeprefix(prefix): value
      for name, value in record.items()
      if name.startswith(prefix)
    }
    if scalars:
      found[record['step']] = scalars
  return found
