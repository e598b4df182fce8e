# SPDX-License-Identifier: Apache-2.0
"""Where a run's numbers go: `metrics.jsonl` and TensorBoard.

After a restart both hold each step once: what was logged beyond the restored
checkpoint is dropped, since those steps are done again.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX

from l2s_jax import files


class MetricWriter:
  """Writes scalars by step; does nothing in processes other than the first."""

  def __init__(self, run_dir: str | pathlib.Path, *, first_step: int = 0):
    """Opens the logs.

    Args:
      run_dir: the run's folder.
      first_step: the restored step; later records are dropped.
    """
    self._jsonl = None
    if jax.process_index():
      return
    folder = pathlib.Path(run_dir)
    path = folder / 'metrics.jsonl'
    _drop_after(path, first_step)
    self._jsonl = path.open('a', encoding='utf-8')
    self._tensorboard = tensorboardX.SummaryWriter(
      str(folder / 'tensorboard'), purge_step=first_step + 1
    )

  def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
    """Logs named numbers; the JSONL line is on disk when this returns."""
    if self._jsonl is None:
      return
    record = {'step': step} | {k: float(v) for k, v in scalars.items()}
    self._jsonl.write(json.dumps(record) + '\n')
    self._jsonl.flush()
    for name, value in scalars.items():
      self._tensorboard.add_scalar(name, float(value), step)

  def close(self) -> None:
    if self._jsonl is not None:
      self._jsonl.close()
      self._tensorboard.close()


def read(run_dir: str | pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of a run, in order; a torn last line is left out."""
  path = pathlib.Path(run_dir) / 'metrics.jsonl'
  if not path.is_file():
    return []
  lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith('\n')]


def last(run_dir: str | pathlib.Path, *, prefix: str) -> dict[str, float]:
  """Returns the newest record whose names begin so, without the prefix."""
  for record in reversed(read(run_dir)):
    found = {
      name.removeprefix(prefix): value
      for name, value in record.items()
      if name.startswith(prefix)
    }
    if found:
      return found
  return {}


def _drop_after(path: pathlib.Path, step: int) -> None:
  records = [r for r in read(path.parent) if r['step'] <= step]
  with files.whole(path) as file:
    file.writelines(json.dumps(record) + '\n' for record in records)
