# SPDX-License-Identifier: Apache-2.0
"""Metric logs of a run: `metrics.jsonl` and TensorBoard event files.

A bucket has no append: there, `metrics.jsonl` is written again as a whole, and
the event file uploaded, at save points (`sync`).

After a restart both logs hold each step once: records after the restored
checkpoint are dropped, since their steps are repeated.

Each line of `metrics.jsonl` has its number and a digest of itself, so that a
changed line, and a removed one before others, are noticed. `.metrics.jsonl.end`
has the number of the last line, so that removed last lines are noticed. Earlier
versions wrote neither; their lines are read as they are.
"""

import functools
import importlib
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from l2s_jax.runtime import (
  distributed,
  extras,
  files,
  integrity,
  os_errors,
  scratch,
  storage,
)

FILE = 'metrics.jsonl'
_END = '.metrics.jsonl.end'
# The number of a line, from 1.
_LINE = 'line'
# Marks the lines of logs with an `_END`.
_HAS_END = 'has_end'
_NOT_SCALARS = ('step', 'time')


class MetricWriter:
  """Writes scalars by step, in the first process only."""

  def __init__(
    self,
    run_dir: str | pathlib.Path,
    *,
    first_step: int = 0,
    drop: tuple[str, ...] = (),
    tensorboard: bool = True,
  ):
    """Opens the logs.

    Args:
      run_dir: the run's folder.
      first_step: the restored step; later records are dropped.
      drop: name prefixes; records of the restored step with such names are
        dropped, too.
      tensorboard: whether to write TensorBoard's files.
    """
    self._jsonl: IO[str] | None = None
    self._tensorboard: EventFile | None = None
    # For a run in a bucket: the folder of the local logs, and whether they have
    # records that are not uploaded.
    self._scratch: tempfile.TemporaryDirectory[str] | None = None
    self._is_new = False
    if not distributed.is_first():
      return
    path = storage.of(run_dir) / FILE
    kept = [
      record
      for record in read(run_dir, distributed.say)
      if record['step'] < first_step
      or (
        record['step'] == first_step
        and not any(name.startswith(drop) for name in record)
      )
    ]
    lines = [_dump(number, record) for number, record in enumerate(kept, 1)]
    self._num_lines = len(lines)
    # First: a kill in between leaves more lines than it says, which is no loss.
    self._path = path
    self._write_end()
    with files.whole(path) as file:
      file.writelines(lines)
    if isinstance(path, storage.BucketPath):
      self._scratch = scratch.folder()
      path = pathlib.Path(self._scratch.name) / FILE
      path.write_text(''.join(lines), encoding='utf-8')
    self._local = path
    self._jsonl = path.open('a', encoding='utf-8')

    if not tensorboard:
      return
    self._tensorboard = EventFile(storage.of(run_dir) / 'tensorboard')
    for record in kept:
      self._add(record)
    self._tensorboard.replace_others()

  def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
    """Logs scalars; the JSONL line is flushed before it returns.

    Args:
      step: the training step.
      scalars: values by name.
    """
    if self._jsonl is None:
      return
    record = {'step': step, 'time': time.time()}
    record |= {name: float(value) for name, value in scalars.items()}
    self._num_lines += 1
    with os_errors.naming(self._local):
      self._jsonl.write(_dump(self._num_lines, record))
      self._jsonl.flush()
    if self._scratch is None:
      self._write_end()
    self._is_new = True
    self._add(record)

  def _add(self, record: Mapping[str, Any]) -> None:
    if self._tensorboard is None:
      return
    for name, value in scalars(record).items():
      self._tensorboard.add(name, value, record['step'], record['time'])
    self._tensorboard.flush()

  def sync(self) -> None:
    """Uploads the logs of a run in a bucket; does nothing for a local one."""
    if self._scratch is None or not self._is_new:
      return
    self._upload()
    if self._tensorboard is not None:
      self._tensorboard.sync()
    self._is_new = False

  def _upload(self) -> None:
    assert isinstance(self._path, storage.BucketPath)
    self._path.upload(self._local)
    self._write_end()

  def _write_end(self) -> None:
    content = integrity.seal({_LINE: self._num_lines})
    files.write_json(self._path.with_name(_END), content)

  def close(self) -> None:
    """Uploads new records, and closes the logs."""
    try:
      if self._jsonl is not None:
        with os_errors.naming(self._local):
          self._jsonl.close()
      if self._scratch is not None and self._is_new:
        self._upload()
        self._is_new = False
    finally:
      if self._tensorboard is not None:
        self._tensorboard.close()
      if self._scratch is not None:
        self._scratch.cleanup()
        self._scratch = None


@functools.cache
def _event_file_writer() -> Any:
  with extras.hidden('torch'):  # tensorboardX imports it, but need not.
    return importlib.import_module('tensorboardX.event_file_writer')


class EventFile:
  """A TensorBoard event file, written synchronously.

  tensorboardX's own writer uses a thread. If that thread dies on a full disk,
  later writes block for ever.
  """

  def __init__(self, folder: pathlib.Path):
    """Creates an event file in a folder; creates the folder if absent."""
    event_file_writer = _event_file_writer()

    self._remote: storage.BucketPath | None = None
    if isinstance(folder, storage.BucketPath):
      self._scratch = scratch.folder()
      self._remote = folder
      local = pathlib.Path(self._scratch.name)
    else:
      local = folder
    folder.mkdir(parents=True, exist_ok=True)
    self._local = local
    self._old = list(folder.glob('events.out.tfevents.*'))
    self._writer = event_file_writer.EventsWriter(
      str(local / 'events'), f'.{time.time_ns()}'
    )

  def add(
    self, name: str, value: int | float, step: int, secs: int | float
  ) -> None:
    """Adds a scalar.

    Args:
      name: tag of the scalar.
      value: its value.
      step: the training step.
      secs: wall time in seconds since the epoch.
    """
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    self._writer.write_event(
      event_pb2.Event(
        summary=summary.scalar(name, float(value)), step=step, wall_time=secs
      )
    )

  def flush(self) -> None:
    with os_errors.naming(self._local):
      self._writer.flush()

  def replace_others(self) -> None:
    """Removes earlier event files of the folder, which cannot be truncated."""
    self.flush()
    self.sync()
    for path in self._old:
      path.unlink()

  def sync(self) -> None:
    """Uploads the file into its folder, if that is in a bucket."""
    if self._remote is not None:
      files.upload_folder(self._scratch.name, self._remote)

  def close(self) -> None:
    with os_errors.naming(self._local):
      self._writer.close()
    self.sync()


def read(
  run_dir: str | pathlib.Path, say: Callable[[str], object] = lambda _: None
) -> list[dict[str, Any]]:
  """Reads the records of a run's `metrics.jsonl`, in order.

  Each record has 'step', and 'time' in seconds since the epoch. Lines that are
  damaged, or were changed after they were written, are skipped.

  Args:
    run_dir: the run.
    say: receives a message for each skipped line, and for removed lines.
  """
  path = storage.of(run_dir) / FILE
  if not path.is_file():
    return []
  num_skipped = 0

  def skip(words: str) -> None:
    nonlocal num_skipped
    num_skipped += 1
    say(words)

  found = files.read_records(path, keys={'step': int, 'time': float}, say=skip)
  _check_end(path, found, len(found) + num_skipped, say)
  if any(integrity.is_sealed(record) for _, record in found):
    found = _verified(path, found, say)
  records = [record for _, record in found]
  if any(record['step'] < 0 for record in records):
    say(f'{path}: skipped the lines of negative steps.')
    records = [record for record in records if record['step'] >= 0]
  for record in records:
    for name in [*record]:  # damaged, but valid JSON
      if not isinstance(record[name], int | float):
        say(
          f'{path}, step {record["step"]}: skipped {name}, which is '
          f'{files.kind_of(record[name])}, not a number.'
        )
        del record[name]
  return records


def _dump(number: int, record: Mapping[str, Any]) -> str:
  """Returns the line of a record, with its number and digest."""
  numbered = {**record, _LINE: number, _HAS_END: True}
  return json.dumps(integrity.seal(numbered)) + '\n'


def _check_end(
  path: pathlib.Path,
  found: list[tuple[int, dict[str, Any]]],
  num_lines: int,
  say: Callable[[str], object],
) -> None:
  """Says if the last lines of a log were removed, or if nobody can know.

  Args:
    path: the log.
    found: its readable lines, with their places.
    num_lines: number of all lines, damaged ones included.
    say: receives the message.
  """
  place = path.with_name(_END)
  end = None
  if place.is_file():
    try:
      end = integrity.unseal(files.read_json(place, remedy=''))
    except ValueError:  # The message below says so.
      pass
  elif not any(_HAS_END in record for _, record in found):
    return
  if end is None or not isinstance(end.get(_LINE), int):
    say(
      f'{place} is missing or damaged: lines that were removed at the end of '
      f'{path.name} are not noticed.'
    )
    return
  # Lines that are missing before others have a message of their own.
  numbers = (
    record[_LINE] + num_lines - position
    for position, record in found
    if isinstance(record.get(_LINE), int)
  )
  num_removed = end[_LINE] - max(num_lines, *numbers, 0)
  if num_removed > 0:
    say(
      f'{path}: {num_removed} lines at its end were removed after they were '
      'written.'
    )


def _verified(
  path: pathlib.Path,
  found: list[tuple[int, dict[str, Any]]],
  say: Callable[[str], object],
) -> list[tuple[int, dict[str, Any]]]:
  """Returns the unchanged records, without their numbers and digests."""
  kept = []
  last, num_removed = 0, 0
  for number, sealed in found:
    record = integrity.unseal(sealed)
    if record is not None:
      record.pop(_HAS_END, None)
    if record is None or record.pop(_LINE, 0) <= last:
      say(
        f'{path}, line {number}: skipped it, because it was changed or added '
        'after the log was written (its digest does not match); to read the '
        f'log as it is, remove "{integrity.DIGEST}" and "{_LINE}" from all '
        'lines.'
      )
      continue
    last = sealed[_LINE]
    if last - number > num_removed:
      say(
        f'{path}: {last - number - num_removed} lines before line {number} '
        'were removed after they were written.'
      )
      num_removed = last - number
    kept.append((number, record))
  return kept


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numbers of a record by name, without its step and time."""
  return {
    name: value for name, value in record.items() if name not in _NOT_SCALARS
  }


def by_step(
  run_dir: str | pathlib.Path, *, prefix: str
) -> dict[int, dict[str, float]]:
  """Returns logged scalars with a name prefix, by step.

  Args:
    run_dir: the run.
    prefix: the prefix, which is removed from the names.
  """
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
