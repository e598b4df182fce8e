# SPDX-License-Identifier: Apache-2.0
"""Where a run's numbers go: `metrics.jsonl`, and from there TensorBoard.

After a restart both hold each step once: what was logged beyond the restored
checkpoint is dropped, since those steps are done again.
"""

import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from l2s_jax.runtime import distributed, files

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
      for record in read(run_dir, distributed.say)
      if record['step'] < first_step
      or (
        record['step'] == first_step
        and not any(name.startswith(drop) for name in record)
      )
    ]
    with files.whole(path) as file:
      file.writelines(json.dumps(record) + '\n' for record in kept)
    self._jsonl = path.open('a', encoding='utf-8')

    self._tensorboard = EventFile(pathlib.Path(run_dir) / 'tensorboard')
    for record in kept:
      self._add(record)
    self._tensorboard.replace_others()

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
        self._tensorboard.add(name, value, record['step'], record['time'])
    self._tensorboard.flush()

  def close(self) -> None:
    if self._jsonl is not None:
      self._jsonl.close()
      self._tensorboard.close()


class EventFile:
  """A file of TensorBoard's, written by whoever calls.

  tensorboardX's own writer has a thread; on a full disk that dies, and whoever
  writes next waits for it for ever.
  """

  def __init__(self, folder: pathlib.Path):
    """Begins a file in a folder, made if absent."""
    # tensorboardX imports torch where there is one, which takes seconds.
    from tensorboardX import event_file_writer

    folder.mkdir(parents=True, exist_ok=True)
    self._old = list(folder.glob('events.out.tfevents.*'))
    self._writer = event_file_writer.EventsWriter(
      str(folder / 'events'), f'.{time.time_ns()}'
    )

  def add(
    self, name: str, value: int | float, step: int, secs: int | float
  ) -> None:
    """Adds a number; `secs` since the epoch is when it was found."""
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    self._writer.write_event(
      event_pb2.Event(
        summary=summary.scalar(name, float(value)), step=step, wall_time=secs
      )
    )

  def flush(self) -> None:
    self._writer.flush()

  def replace_others(self) -> None:
    """Removes what the folder had before: a file cannot be shortened."""
    self.flush()
    for path in self._old:
      path.unlink()

  def close(self) -> None:
    self._writer.close()


def read(
  run_dir: str | pathlib.Path, say: Callable[[str], object] = lambda _: None
) -> list[dict[str, Any]]:
  """Returns the records of a run, in order.

  Each has its 'step', and its 'time' in seconds since the epoch. Of a log that
  was damaged the whole lines are kept.

  Args:
    run_dir: the run.
    say: gets a sentence for each line that is left out.
  """
  path = pathlib.Path(run_dir) / FILE
  if not path.is_file():
    return []
  records = files.read_records(path, keys={'step': int, 'time': float}, say=say)
  if any(record['step'] < 0 for record in records):
    say(f'{path}: left out the lines of steps below 0.')
    records = [record for record in records if record['step'] >= 0]
  for record in records:
    for name in [*record]:  # Damaged in a way that JSON allows.
      if not isinstance(record[name], int | float):
        say(
          f'{path}, step {record["step"]}: left out {name}, which is '
          f'{files.kind_of(record[name])} and no number.'
        )
        del record[name]
  return records


def by_step(
  run_dir: str | pathlib.Path, *, prefix: str
) -> dict[int, dict[str, float]]:
  """Returns what was logged under a prefix, by step, without the prefix."""
  found: dict[int, dict[str, float]] = {}
  for record in read(run_dir):
    scalars = {
      name.removeprefix(prefix): float(value)
      for name, value in record.items()
      if name.startswith(prefix)
    }
    if scalars:
      found.setdefault(record['step'], {}).update(scalars)
  return found
