# SPDX-License-Identifier: Apache-2.0
"""Reads rows of users' files: text, JSONL, TSV, CSV, and `record_files.py`'s.

A line that cannot be used is named and handed on, for the caller to refuse or
to count; the lines after it are read. What breaks a whole file raises. No
TensorFlow, and memory for one record (but a .json file is held whole).
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from l2s_jax.data import input_files, record_files
from l2s_jax.data.record_files import Fields

kind = input_files.kind
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


def read_rows(
  path: epath.Path,
  *,
  columns: Collection[str] | None = None,
  column_names: Sequence[str] | None = None,
  problem: Callable[[Fields], str | None] = lambda row: None,
) -> Iterator[Fields | BadLine]:
  r"""Yields what each line holds, in order; a blank line is a bad one.

  The kind of file follows its name, in small letters or capitals, less `.gz`:

      *.jsonl, *.ndjson  an object a line, with text in each of `columns`
      *.json             a list of objects, or of texts: the column `source`
      *.tsv              fields between tabs, no quotes; the first line names
                         them
      *.csv              RFC 4180, where a quoted field may span lines; likewise
      *.parquet          rows
      *.tfrecord         examples, of which features are the columns
      others             the line, as the one column `source`

  What a line is, `decode_line` says; a column may be within another, as
  `value` says.

  Args:
    path: `*.gz` is gzip.
    columns: must be there and hold text that is not blank; all others are kept
      as they are. None asks for nothing; a blank line of plain text is then
      a row.
    column_names: of TSV and CSV without a line that names them, or one name for
      the lines of plain text and the texts of a JSON list.
    problem: says what else is wrong with a row, as a `BadLine` does.

  Raises:
    FileNotFoundError: at the first row, if there is no such file.
    ValueError: naming the file, if it is not of its kind, not whole, has no
      column names or not those of `columns`, or ends inside a quoted field.
  """
  required = tuple(columns or ())
  rows: Iterator[tuple[int, Fields | str]]
  name_of_text = (column_names or ('source',))[0]
  match kind(path.name):
    case 'jsonl':
      rows = _objects(path)
    case 'json':
      rows = record_files.json_list(path, name_of_text)
    case 'parquet':
      rows = record_files.parquet(path)
    case 'tfrecord':
      rows = record_files.tfrecord(path)
    case 'tsv':
      rows = _table(path, _tsv_records(path), column_names, required)
    case 'csv':
      rows = _table(path, _csv_records(path), column_names, required)
    case _:
      rows = _plain(path, name_of_text, required)
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
    text, reason = decode_line(line, number)
    if reason:
      raise ValueError(str(BadLine(str(path), number, reason)))
    yield text


def has_byte_order_mark(path: epath.Path) -> bool:
  """Returns whether a text file, plain or .gz, begins with one."""
  with input_files.open_bytes(path) as file:
    return file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK


def decode_line(line: bytes, number: int) -> tuple[str, str]:
  r"""Returns the text of a line, and what is wrong with it, if anything.

  This is what a line is, wherever it comes from: it ends at \n, one \r before
  that belongs to its end, and any other \r, form feed or separator to its text;
  a byte order mark before the first line is dropped, one elsewhere is text. Of
  a bad line there is no text.

  Args:
    line: its bytes, with what ends it.
    number: from 1.
  """
  if number == 1:
    line = line.removeprefix(_BYTE_ORDER_MARK)
  if b'\0' in line:
    return '', f'is not text: there is a NUL at its byte {line.index(0)}'
  try:
    return line.removesuffix(b'\n').removesuffix(b'\r').decode(), ''
  except UnicodeDecodeError as error:
    return '', f'is not UTF-8: {error}'


def value(row: Fields, column: str, default: Any = None) -> Any:
  """Returns what a row has in a column, or in a column within columns.

  Of `translation.en` that is the column of this very name, if there is one,
  else `en` of the object in `translation`; a number is a place in a list, from
  0, as in `turns.0.text`.
  """
  found = _find(row, column)
  return default if found is _MISSING else found


_MISSING = object()


def _find(node: Any, name: str) -> Any:
  if isinstance(node, dict):
    if name in node:
      return node[name]
    for place in range(len(name) - 1, 0, -1):
      if name[place] == '.' and name[:place] in node:
        found = _find(node[name[:place]], name[place + 1 :])
        if found is not _MISSING:
          return found
  elif isinstance(node, list):
    head, dot, rest = name.partition('.')
    if head.isascii() and head.isdigit() and int(head) < len(node):
      return _find(node[int(head)], rest) if dot else node[int(head)]
  return _MISSING


def _lines(path: epath.Path) -> Iterator[bytes]:
  """Yields lines with what ends them."""
  with input_files.open_bytes(path) as lines:
    yield from lines


def _lacking_text(row: Fields, required: Sequence[str]) -> str | None:
  """Returns what is wrong with the columns that must hold text, if anything."""
  for column in required:
    found = value(row, column, _MISSING)
    if isinstance(found, str) and found.strip():
      continue
    if found is _MISSING:
      return f'has no column {column!r}; it has {", ".join(row)}'
    if isinstance(found, str):
      return f'has an empty column {column!r}'
    return (
      f'has a JSON {type(found).__name__} in column {column!r}, expected text'
    )
  return None


def _plain(
  path: epath.Path, name: str, required: Sequence[str]
) -> Iterator[tuple[int, Fields | str]]:
  _check_columns(path, (name,), required)
  for number, line in enumerate(_lines(path), start=1):
    text, reason = decode_line(line, number)
    if not reason and required and not text.strip():
      reason = 'is empty'
    yield number, reason or {name: text}


def _objects(path: epath.Path) -> Iterator[tuple[int, Fields | str]]:
  for number, line in enumerate(_lines(path), start=1):
    text, reason = decode_line(line, number)
    yield number, reason or _parse_object(text)


def _parse_object(text: str) -> Fields | str:
  """Returns a line's JSON object, or what is wrong with it."""
  if not text.strip():
    return 'is empty'
  try:
    row = json.loads(text)
    if '\\u' in text and record_files.has_half_characters(row):
      return record_files.HALF_CHARACTER
  except json.JSONDecodeError as error:
    return f'is not JSON: {error.msg} at character {error.colno}'
  except (ValueError, RecursionError) as error:
    return f'is not JSON that can be read: {error}'
  if not isinstance(row, dict):
    return f'holds a JSON {type(row).__name__}, expected an object'
  return row


def _tsv_records(path: epath.Path) -> Iterator[tuple[int, list[str] | str]]:
  for number, line in enumerate(_lines(path), start=1):
    text, reason = decode_line(line, number)
    if not reason and not text.strip():
      reason = 'is empty'
    yield number, reason or text.split('\t')


def _csv_records(path: epath.Path) -> Iterator[tuple[int, list[str] | str]]:
  # Else a field of more than 128 KiB, a long document, is an error.
  csv.field_size_limit(sys.maxsize)
  has_ended = False

  def lines() -> Iterator[str]:
    nonlocal has_ended
    for number, line in enumerate(_lines(path), start=1):
      if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
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
    elif any('\0' in field for field in fields):
      yield number, 'is not text: there is a NUL in it'
    else:
      yield number, fields or 'is empty'


def _table(
  path: epath.Path,
  records: Iterator[tuple[int, list[str] | str]],
  names: Sequence[str] | None,
  required: Sequence[str],
) -> Iterator[tuple[int, Fields | str]]:
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
