# SPDX-License-Identifier: Apache-2.0
"""Reads users' text files line by line: plain text, JSONL, TSV, CSV, gzip too.

A line that cannot be used is named and handed on, for the caller to refuse or
to count; the lines after it are read. What breaks a whole file raises. No
TensorFlow, and memory for one record.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

Row = dict[str, Any]

KINDS = ('jsonl', 'tsv', 'csv')
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'
# What a byte that is not UTF-8 becomes under errors='surrogateescape'.
_LONGEST_COLUMN_NAME = 30
_ESCAPED_BYTE = re.compile('[\udc80-\udcff]')


class BadLine(NamedTuple):
  """A line that cannot be used.

  Attributes:
    path: of the file.
    number: of the line, from 1; of a record of several lines, the first.
    reason: a predicate, such as 'is empty'; holds no text of the line.
  """

  path: str
  number: int
  reason: str

  def __str__(self) -> str:
    return f'{self.path}:{self.number} {self.reason}. Correct or remove it.'


def kind(name: str) -> str:
  """Returns 'jsonl', 'tsv', 'csv' or 'text', as the name says."""
  ending = name.removesuffix('.gz').rpartition('.')[2]
  return ending if ending in KINDS else 'text'


def read_rows(
  path: epath.Path,
  *,
  columns: Collection[str] | None = None,
  column_names: Sequence[str] | None = None,
  problem: Callable[[Row], str | None] = lambda row: None,
) -> Iterator[Row | BadLine]:
  r"""Yields what each line holds, in order; a blank line is a bad one.

  The kind of file follows its name, less `.gz`:

      *.jsonl  an object a line, with text in each of `columns`
      *.tsv    fields between tabs, no quotes; the first line names them
      *.csv    RFC 4180, where a quoted field may span lines; likewise
      others   the line, as the one column `source`

  Lines end at \n or \r\n; a byte order mark before the first is dropped.

  Args:
    path: `*.gz` is gzip.
    columns: must be there and hold text that is not blank; all others are kept
      as they are. None asks for nothing; a blank line of plain text is then
      a row.
    column_names: of TSV and CSV without a line that names them, or one name for
      the lines of plain text.
    problem: says what else is wrong with a row, as a `BadLine` does.

  Raises:
    FileNotFoundError: at the first row, if there is no such file.
    ValueError: naming the file, if it is not whole gzip, has no column names
      or not those of `columns`, or ends inside a quoted field.
  """
  required = tuple(columns or ())
  rows: Iterator[tuple[int, Row | str]]
  match kind(path.name):
    case 'jsonl':
      rows = _objects(path)
    case 'tsv':
      rows = _table(path, _tsv_records(path), column_names, required)
    case 'csv':
      rows = _table(path, _csv_records(path), column_names, required)
    case _:
      rows = _plain(path, (column_names or ('source',))[0], required)
  for number, row in rows:
    if isinstance(row, str):
      yield BadLine(str(path), number, row)
    elif reason := _lacking_text(row, required) or problem(row):
      yield BadLine(str(path), number, reason)
    else:
      yield row


def read_lines(path: epath.Path) -> Iterator[str]:
  """Yields the lines of a text file, plain or .gz.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming file and line, if it is not UTF-8 or not gzip.
  """
  for number, line in enumerate(_lines(path), start=1):
    text, reason = _decode(line)
    if reason:
      raise ValueError(str(BadLine(str(path), number, reason)))
    yield text


def _lines(path: epath.Path) -> Iterator[bytes]:
  """Yields lines with what ends them."""
  number = 0
  try:
    with path.open('rb') as raw:
      lines = gzip.open(raw) if path.name.endswith('.gz') else raw
      for line in lines:
        number += 1
        yield line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{path}: no such file.') from error
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(
      f'{path} is not a whole gzip file (after line {number}): {error}. '
      'Fetch it again, or drop .gz from its name.'
    ) from error


def _decode(line: bytes) -> tuple[str, str]:
  """Returns the text without its end, and what is wrong with it, if anything.

  Of bad text there is no text.
  """
  try:
    return line.rstrip(b'\r\n').decode(), ''
  except UnicodeDecodeError as error:
    return '', f'is not UTF-8: {error}'


def _lacking_text(row: Row, required: Sequence[str]) -> str | None:
  """Returns what is wrong with the columns that must hold text, if anything."""
  for column in required:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
      continue
    if column not in row:
      return f'has no column {column!r}; it has {", ".join(row)}'
    if isinstance(value, str):
      return f'has an empty column {column!r}'
    return (
      f'has a JSON {type(value).__name__} in column {column!r}, expected text'
    )
  return None


def _plain(
  path: epath.Path, name: str, required: Sequence[str]
) -> Iterator[tuple[int, Row | str]]:
  _check_columns(path, (name,), required)
  for number, line in enumerate(_lines(path), start=1):
    text, reason = _decode(line)
    if not reason and required and not text.strip():
      reason = 'is empty'
    yield number, reason or {name: text}


def _objects(path: epath.Path) -> Iterator[tuple[int, Row | str]]:
  for number, line in enumerate(_lines(path), start=1):
    text, reason = _decode(line)
    yield number, reason or _parse_object(text)


def _parse_object(text: str) -> Row | str:
  """Returns a line's JSON object, or what is wrong with it."""
  if not text.strip():
    return 'is empty'
  try:
    row = json.loads(text)
    if '\\u' in text:
      json.dumps(row, ensure_ascii=False).encode()
  except json.JSONDecodeError as error:
    return f'is not JSON: {error.msg} at character {error.colno}'
  except UnicodeEncodeError:
    return 'has half a character: one \\uD800-\\uDFFF without the other'
  except (ValueError, RecursionError) as error:
    return f'is not JSON that can be read: {error}'
  if not isinstance(row, dict):
    return f'holds a JSON {type(row).__name__}, expected an object'
  return row


def _tsv_records(path: epath.Path) -> Iterator[tuple[int, list[str] | str]]:
  for number, line in enumerate(_lines(path), start=1):
    text, reason = _decode(line)
    if not reason and not text.strip():
      reason = 'is empty'
    yield number, reason or text.split('\t')


def _csv_records(path: epath.Path) -> Iterator[tuple[int, list[str] | str]]:
  # Else a field of more than 128 KiB, a long document, is an error.
  csv.field_size_limit(sys.maxsize)
  has_ended = False

  def lines() -> Iterator[str]:
    nonlocal has_ended
    for line in _lines(path):
      yield line.decode(errors='surrogateescape')
    has_ended = True

  reader = csv.reader(lines(), strict=True)
  while True:
    number = reader.line_num + 1
    try:
      fields = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      if has_ended:
        raise ValueError(
          f'{path}:{number} opens a quote that nothing closes, so that the '
          'rest of the file is one field; close it, or fetch the file again.'
        ) from error
      yield number, f'is not CSV: {error}'
      continue
    if any(map(_ESCAPED_BYTE.search, fields)):
      yield number, 'is not UTF-8'
    else:
      yield number, fields or 'is empty'


def _table(
  path: epath.Path,
  records: Iterator[tuple[int, list[str] | str]],
  names: Sequence[str] | None,
  required: Sequence[str],
) -> Iterator[tuple[int, Row | str]]:
  """Yields rows by the column names given or, without, in the first record."""
  if names is None:
    _, names = next(records, (1, 'is empty'))
    if isinstance(names, str):
      raise ValueError(
        f'{path}:1 {names}; expected a line with the names of the columns. '
        'For a file without one, set their names in COLUMN_NAMES.'
      )
  repeated = {name for name in names if list(names).count(name) > 1}
  if repeated:
    raise ValueError(
      f'{path} has more than one column {", ".join(sorted(repeated))}; the '
      f'columns are {", ".join(names)}.'
    )
  _check_columns(path, names, required)
  for number, fields in records:
    if isinstance(fields, list) and len(fields) != len(names):
      yield (
        number,
        f'has {len(fields)} columns, expected {len(names)}: {", ".join(names)}',
      )
    else:
      yield (
        number,
        fields
        if isinstance(fields, str)
        else dict(zip(names, fields, strict=True)),
      )


def _check_columns(
  path: epath.Path, names: Sequence[str], required: Sequence[str]
) -> None:
  missing = [column for column in required if column not in names]
  if missing:
    # A first line that is no header is data, which no message shows.
    is_header = all(len(name) <= _LONGEST_COLUMN_NAME for name in names)
    found = ', '.join(names) if is_header else f'{len(names)} long texts'
    raise ValueError(
      f'{path} has no column {", ".join(missing)}; its first line has {found}. '
      'Name columns that are there, or, for a TSV or CSV file whose first line '
      'is no header, set COLUMN_NAMES.'
    )
