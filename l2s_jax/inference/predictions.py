# SPDX-License-Identifier: Apache-2.0
"""The output folder of `infer` and `distill`, which a stopped job resumes.

    settings.json                      settings that affect the answers
    predictions.jsonl                  complete: one line per input line
    predictions.jsonl.partial          the same, incomplete
    predictions-00001-of-00004.jsonl   one shard; the concatenated shards equal
                                       predictions.jsonl
    scores.json                        scores; scores-00001-of-00004.json of a
                                       shard
    config.gin                         operative config; likewise
                                       config-00001-of-00004.gin
    .predictions.jsonl.digests         digests of the written lines

In a bucket, an incomplete file is a folder of parts; see `output_parts.py`. A
null prediction marks an input line that could not be answered. This module does
not depend on the model.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn

import xxhash

from l2s_jax.data import text_files
from l2s_jax.inference import prompts
from l2s_jax.metrics import metric_fns
from l2s_jax.runtime import distributed, files, os_errors, storage
from l2s_jax.weights import run_format

Record = dict[str, Any]

SETTINGS = run_format.ANSWERS
# Columns of a record besides its input's columns; they replace equal names.
OWN_COLUMNS = (
  'prompt',
  'prediction',
  'predictions',
  'scores',
  'score',
  'token_ids',
  'token_log_probs',
  'ended',
  'prompt_truncated',
)
# Locations may change between starts as long as their content does not.
_PLACES = ('checkpoint_path', 'input')
_OF_THE_FILE = ('format_version', 'written_by')
_NUM_NAMED = 5
_SYNC_PERIOD_SECS = 10.0
_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Shard:
  """One of `count` contiguous parts of the input, numbered from 0."""

  index: int = 0
  count: int = 1

  def check(self) -> None:
    """Validates index and count.

    Raises:
      ValueError: with the valid values.
    """
    if self.count < 1 or not 0 <= self.index < self.count:
      raise ValueError(
        f'shard={self.index} of num_shards={self.count}: expected one of 0 to '
        'num_shards - 1.'
      )

  def lines(self, num_lines: int) -> range:
    """Returns the range of the shard's input lines, from 0."""
    return range(
      self.index * num_lines // self.count,
      (self.index + 1) * num_lines // self.count,
    )

  def name(self, stem: str, suffix: str) -> str:
    """Returns the file name of the shard."""
    if self.count == 1:
      return stem + suffix
    return f'{stem}-{self.index:05}-of-{self.count:05}{suffix}'


class Tally:
  """Counts of records.

  Attributes:
    num_lines: number of records.
    num_bad: records without an answer.
    num_truncated: records with a truncated prompt.
  """

  def __init__(self):
    """Starts all counts at 0."""
    self.num_lines = self.num_bad = self.num_truncated = 0
    self._named: list[str] = []

  def add(self, record: Record) -> None:
    """Counts one record."""
    self.num_lines += 1
    self.num_truncated += record.get('prompt_truncated') is True
    if record['prediction'] is None:
      self.num_bad += 1
      if len(self._named) < _NUM_NAMED:
        self._named.append(f'  line {record["line"]} {record["error"]}')

  def describe(self, prompt_length: int) -> str:
    """Returns a report of truncated prompts and bad lines; '' if none."""
    lines = []
    if self.num_truncated:
      lines.append(
        f'{self.num_truncated} prompts were longer than {prompt_length} tokens '
        'and were cut; their lines have "prompt_truncated": true. A higher '
        'PROMPT_LENGTH keeps them whole.'
      )
    if self.num_bad:
      lines += [
        f'{self.num_bad} of {self.num_lines} lines could not be answered:',
        *self._named,
      ]
      if self.num_bad > len(self._named):
        lines.append(f'  and {self.num_bad - len(self._named)} more')
    return '\n'.join(lines)


def answered(
  row: Mapping[str, Any], prediction: str, was_cut: bool, **details: Any
) -> Record:
  """Returns the record of an answered line.

  Args:
    row: columns of the input line.
    prediction: the best answer.
    was_cut: whether the prompt was truncated.
    **details: further columns of the answer; see `answerer.Answer`.
  """
  record = {**row, 'prediction': prediction, **details}
  record.pop('prompt_truncated', None)  # From an earlier inference.
  return record | {'prompt_truncated': True} if was_cut else record


def unanswered(bad: text_files.BadLine) -> Record:
  """Returns the record of a bad line."""
  return {'line': bad.number, 'error': bad.reason, 'prediction': None}


def dump(records: Iterable[Record]) -> str:
  """Returns one line of JSON per record."""
  return ''.join(
    json.dumps(record, ensure_ascii=False) + '\n' for record in records
  )


def settle(
  folder: pathlib.Path,
  settings: Mapping[str, Any],
  defaults: Mapping[str, Any] = types.MappingProxyType({}),
  *,
  named_by: str = 'INFER_OUTPUT_DIR',
) -> None:
  """Writes settings.json, or compares the settings with the existing one.

  Args:
    folder: made if absent; the first host writes.
    settings: of the job, the same for all shards.
    defaults: values for fields that an older settings.json lacks; see
      `run_format.with_defaults`.
    named_by: the setting that names the folder, for messages.

  Raises:
    ValueError: if the folder is of another kind; lists the differences if it
      holds another job, or the hosts of this job have different settings.
  """
  settings = {**run_format.stamp(), **settings}
  _check_hosts(settings)
  path = folder / SETTINGS
  if not path.is_file():
    run_format.refuse_other(folder, named_by, run_format.ANSWERS)
    strangers = sorted(path.name for path in folder.glob('predictions*'))
    if strangers:
      raise ValueError(
        f'{named_by}={folder} holds {", ".join(strangers)} without their '
        f'{SETTINGS}. Choose another folder.'
      )
    if distributed.is_first():
      files.write_json(path, settings)
    return
  remedy = (
    f'remove {named_by}={folder} to start again, or choose another folder.'
  )
  found = files.read_json(path, remedy=remedy)
  found = run_format.migrate(SETTINGS, found, path, remedy=remedy)
  found = run_format.with_defaults(found, defaults)
  run_format.refuse_unknown(found, settings, path, remedy=remedy)
  differences = files.differences(
    found, settings, ignored=(*_PLACES, *_OF_THE_FILE)
  )
  if differences:
    raise ValueError(
      f'{named_by}={folder} holds the answers of another job. Choose '
      'another folder, or remove it to start again:\n' + '\n'.join(differences)
    )


def _check_hosts(settings: Mapping[str, Any]) -> None:
  """Compares the settings of all hosts. All hosts must call it.

  Raises:
    ValueError: in all hosts, with the differences of the first that differs.
  """
  first, *others = distributed.gather([settings])
  for number, other in enumerate(others, start=1):
    differences = files.differences(
      first,
      other,
      ignored=(*_PLACES, *_OF_THE_FILE),
      have='host 0 has',
      want=f'host {number} has',
    )
    if differences:
      raise ValueError(
        'the hosts of this job have different settings. Start all with the '
        'same command:\n' + '\n'.join(differences)
      )


class GrowingFile:
  """A JSON lines file that survives stops and is renamed once complete.

      with GrowingFile(folder / 'predictions.jsonl') as file:
        for records in answers(start=file.tally.num_lines):
          file.append(records)
        file.finish()

  Attributes:
    path: of the complete file.
    tally: counts of all its lines, those of earlier starts included.
  """

  def __init__(
    self, path: pathlib.Path, items: Iterable[prompts.Item] | None = None
  ):
    """Sets the path; nothing is read or written yet.

    Args:
      path: of the complete file.
      items: the input items, in the order of the lines; None skips the
        comparison.
    """
    self.path = path
    self.tally = Tally()
    self._items = items
    self._partial = path.with_name(f'{path.name}.partial')
    self._shown: pathlib.Path = self._partial  # In messages.
    self._last_sync = time.monotonic()

  def __enter__(self) -> 'GrowingFile':
    """Opens the file, truncates torn or damaged lines, and counts the rest.

    Raises:
      ValueError: if another process is writing the file, or a line does not
        answer its input line.
    """
    # After an error the files are closed, which writes again what could not be
    # written, and unlocked.
    with (
      os_errors.naming(notes_of(self.path)),
      contextlib.ExitStack() as opened,
    ):
      self._open(opened)
      opened.pop_all()
    return self

  def _open(self, opened: contextlib.ExitStack) -> None:
    self._file: IO[bytes] = opened.enter_context(self._partial.open('ab+'))
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f'another process is writing {self._partial}. Wait for it, or give '
        'each its own shard.'
      ) from error
    except OSError:
      pass  # The file system has no locks; the user ensures one writer.
    size = self._file.seek(0, os.SEEK_END)
    if size:
      _say_if_unverified(self.path)
    self._file.seek(0)
    good, notes = _good_size(self._file, notes_of(self.path))
    end = 0
    matching = _Matching(self._shown, self._items)
    self._hasher = xxhash.xxh3_128()
    self._file.seek(0)
    for line in self._file:
      record = _parse(line)
      if record is None or end + len(line) > good:
        break
      matching.check(record)
      self.tally.add(record)
      self._hasher.update(line)
      end += len(line)
    if end < size:
      why = 'do not match their digest' if good < size else 'are incomplete'
      print(
        f'{self._partial}: removed the last {size - end} bytes, which {why}.',
        file=sys.stderr,
      )
      self._file.truncate(end)
    self._notes: IO[bytes] = opened.enter_context(
      notes_of(self.path).open('wb')
    )
    self._notes.write(b''.join(note for offset, note in notes if offset <= end))
    self._note(end)

  def __exit__(self, *_: object) -> None:
    with os_errors.naming(self._partial), self._file, self._notes:
      pass  # Closing writes again what could not be written.

  def append(self, records: Sequence[Record]) -> None:
    """Writes and flushes records; a killed process does not lose them."""
    content = dump(records).encode()
    with os_errors.naming(self._partial):
      self._file.write(content)
      self._file.flush()
      self._hasher.update(content)
      self._note(self._file.tell())
    # A crash of the machine could still lose flushed lines; sync now and then.
    if time.monotonic() - self._last_sync > _SYNC_PERIOD_SECS:
      self._sync()
    for record in records:
      self.tally.add(record)

  def finish(self) -> None:
    """Renames the complete file to its final name."""
    self._sync()
    self._partial.replace(self.path)

  def _note(self, size: int) -> None:
    with os_errors.naming(notes_of(self.path)):
      self._notes.write(f'{size} {self._hasher.hexdigest()}\n'.encode())
      self._notes.flush()

  def _sync(self) -> None:
    with os_errors.naming(self._partial):
      os.fsync(self._file.fileno())
      os.fsync(self._notes.fileno())
    self._last_sync = time.monotonic()


class _Matching:
  """Compares records, in order, with their input items."""

  def __init__(self, path: pathlib.Path, items: Iterable[prompts.Item] | None):
    self._path = path
    self._items = None if items is None else iter(items)
    self._count = 0

  def check(self, record: Record) -> None:
    """Checks that a record answers the next item.

    Raises:
      ValueError: names file and line.
    """
    if self._items is None:
      return
    item = next(self._items, None)
    if item is None:
      self._refuse(f'the input has {self._count} lines only')
    self._count += 1
    if isinstance(item, text_files.BadLine):
      if record['prediction'] is not None or record.get('line') != item.number:
        self._refuse(f'line {item.number} of the input has no prompt')
    elif record['prediction'] is None:
      self._refuse('it has no answer, but the line of the input has a prompt')
    elif record.get('prompt') != item['prompt']:
      self._refuse('its prompt differs from that line of the input')

  def check_end(self) -> None:
    """Checks that every input item had a record.

    Raises:
      ValueError: with both numbers of lines.
    """
    num_missing = sum(1 for _ in self._items or ())
    if num_missing:
      raise ValueError(
        f'{self._path} holds {self._count} lines, but its input has '
        f'{self._count + num_missing}: it was changed after it was written. '
        'Remove it to answer again.'
      )

  def _refuse(self, why: str) -> NoReturn:
    raise ValueError(
      f'{self._path}, line {self._count}, does not match the input: {why}. '
      'Remove the file to answer again.'
    )


def notes_of(path: pathlib.Path) -> pathlib.Path:
  """Returns the path of the digests of a file's lines."""
  return path.with_name(f'.{path.name}.digests')


def _say_if_unverified(path: pathlib.Path) -> None:
  """Says that a file of answers has lost its digests.

  Jobs of format version 1 may have been written without digests.
  """
  settings = path.with_name(SETTINGS)
  if notes_of(path).is_file() or not settings.is_file():
    return
  remedy = 'remove its folder to answer again.'
  if files.read_json(settings, remedy=remedy).get('written_by'):
    distributed.say(unverified(path))


def unverified(path: pathlib.Path) -> str:
  """Returns the message for a file that has lost its digests."""
  return (
    f'{path} is read without verification: its digests, '
    f'{notes_of(path).name} beside it, are missing.'
  )


def _good_size(
  file: IO[bytes], notes: pathlib.Path
) -> tuple[int | float, list[tuple[int, bytes]]]:
  """Returns the size of a file's undamaged start, and its valid digests.

  The size is infinity without a digests file, which earlier versions did not
  write.

  Args:
    file: at its start.
    notes: path of the digests; a line has an offset and the digest of all bytes
      before it.
  """
  try:
    lines = notes.read_bytes().split(b'\n')[:-1]
  except FileNotFoundError:
    return math.inf, []
  hasher = xxhash.xxh3_128()
  position, good = 0, 0
  kept: list[tuple[int, bytes]] = []
  for line in lines:
    offset, _, value = line.partition(b' ')
    if not offset.isdigit() or len(offset) > 18 or int(offset) < position:
      continue  # The digest line itself is damaged.
    while position < int(offset):
      chunk = file.read(min(_CHUNK_BYTES, int(offset) - position))
      if not chunk:
        return good, kept
      hasher.update(chunk)
      position += len(chunk)
    if hasher.hexdigest().encode() == value:
      good = position
      kept.append((position, line + b'\n'))
  return good, kept


def _parse(line: bytes) -> Record | None:
  """Returns a line's record, or None if the line is torn."""
  if not line.endswith(b'\n'):
    return None
  try:
    record = files.parse_json(line, 'the line', remedy='', finite=False)
  except ValueError:
    return None
  is_answer = isinstance(record.get('prediction', 0), str)
  is_refusal = {'line', 'error', 'prediction'} <= record.keys()
  return record if is_answer or is_refusal else None


def _last_offset(notes: pathlib.Path) -> int:
  """Returns the size of the file at its last written digest."""
  offset = notes.read_bytes().rpartition(b' ')[0].rpartition(b'\n')[2]
  return int(offset) if offset.isdigit() and len(offset) <= 18 else 0


def write(path: pathlib.Path, records: Iterable[Record]) -> None:
  """Writes a complete file of records that all exist, and its digest."""
  content = dump(records).encode()
  notes = notes_of(path)
  # A kill in between leaves no digest, rather than one of other records.
  notes.unlink(missing_ok=True)
  with files.whole(path, 'wb') as file:
    file.write(content)
  with files.whole(notes) as file:
    file.write(f'{len(content)} {xxhash.xxh3_128_hexdigest(content)}\n')


def read(
  paths: Iterable[pathlib.Path],
  *,
  keys: files.Keys = types.MappingProxyType({}),
  remedy: str = 'Remove it to answer again.',
) -> Iterator[Record]:
  """Yields the records of complete files.

  Args:
    paths: the files.
    keys: further keys of each record, with the types of their values.
    remedy: instruction for the user, for errors.

  Raises:
    ValueError: names a file that changed since it was written.
  """
  for path in paths:
    with storage.fetched(path) as local, local.open('rb') as file:
      notes = notes_of(path)
      _say_if_unverified(path)
      good, _ = _good_size(file, notes)
      size = file.seek(0, os.SEEK_END)
      file.seek(0)
      if good != math.inf and not good == size == _last_offset(notes):
        raise ValueError(
          f'{path} was changed after it was written: its digest does not '
          f'match. {remedy} To read it as it is, remove {notes.name} beside it.'
        )
      for number, line in enumerate(file, start=1):
        yield files.parse_json(
          line,
          f'{path}, line {number}',
          keys={'prediction': (str, type(None)), **keys},
          remedy=f'the file was changed after it was written. {remedy}',
          finite=False,
        )


def read_whole(path: pathlib.Path, items: Iterable[prompts.Item]) -> Tally:
  """Returns the counts of a complete file, after comparing it with its input.

  Args:
    path: of the file.
    items: the input items, in the order of the lines.

  Raises:
    ValueError: if a line was changed or answers another item, or the number of
      lines is wrong.
  """
  matching, tally = _Matching(path, items), Tally()
  for record in read([path]):
    matching.check(record)
    tally.add(record)
  matching.check_end()
  return tally


def score(
  records: Iterable[Record],
  scored_by: Sequence[metric_fns.Metric],
  target_column: str,
) -> dict[str, Any]:
  """Returns the content of `scores.json`: scores, signatures and counts.

  Only answered lines with a target are scored.
  """
  tally = Tally()
  pairs = []
  for record in records:
    tally.add(record)
    target = prompts.reference(record, target_column)
    if target is not None and record['prediction'] is not None:
      pairs.append((target, record['prediction']))
  results: dict[str, Any] = {
    'num_lines': tally.num_lines,
    'num_bad': tally.num_bad,
    'num_scored': len(pairs),
    'num_truncated_prompts': tally.num_truncated,
    'scores': {},
    'signatures': {},
  }
  if not pairs:
    return results
  targets, answers = zip(*pairs, strict=True)
  for metric in scored_by:
    results['scores'] |= metric(targets, answers)
  results['signatures'] = metric_fns.signatures(scored_by, targets)
  return results


def write_scores(
  folder: pathlib.Path,
  part: Shard,
  scored_by: Sequence[metric_fns.Metric],
  target_column: str,
) -> dict[pathlib.Path, dict[str, Any]]:
  """Scores a shard and, if all shards are complete, the whole input.

  Returns:
    The content of each scores file, by path.
  """
  scored = {}
  every = [Shard(index, part.count) for index in range(part.count)]
  for name, parts in {part: [part], Shard(): every}.items():
    paths = [folder / shard.name('predictions', '.jsonl') for shard in parts]
    if all(path.is_file() for path in paths):
      path = folder / name.name('scores', '.json')
      scored[path] = score(read(paths), scored_by, target_column)
      files.write_json(path, scored[path])
  return scored


def describe_scores(results: Mapping[str, Any]) -> str:
  """Returns a one-line summary of `score`'s result."""
  values = [f'{name} {value:.4g}' for name, value in results['scores'].items()]
  return (
    f'{", ".join(values) or "no scores"}; {results["num_scored"]} of '
    f'{results["num_lines"]} lines scored, {results["num_bad"]} bad'
  )
