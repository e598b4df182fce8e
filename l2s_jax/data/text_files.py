# SPDX-License-Identifier: Apache-2.0
"""Reads rows of user files: text, JSONL, TSV, CSV, and `record_files.py` kinds.

An unusable line is yielded as a `BadLine`, which the caller refuses or counts;
reading continues after it. Defects of the whole file raise. No TensorFlow is
needed, and memory for one record at a time (.json files are read whole).
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
# Longer names in a first line suggest data instead of a header.
_LONGEST_COLUMN_NAME = 30
# Bytes that are not UTF-8, decoded with errors='surrogateescape'.
_ESCAPED_BYTE = re.compile('[\udc80-\udcff]')
# Behind what is wrong with a line of JSON Lines that begins a list.
_OF_LIST = '; name a file that is one JSON list *.json'


class BadLine(NamedTuple):
  """An unusable line.

  Attributes:
    path: path of the file.
    number: line number, from 1; the first line of a multi-line record.
    reason: predicate such as 'is empty', without text from the line.
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
  """Yields the row of each line, in order; a blank line is a `BadLine`.

  The kind of file follows from its ending, case-insensitively and without .gz:

      *.jsonl, *.ndjson  one object per line, with text in each of `columns`
      *.json             a list of objects, or of texts: the column `source`
      *.tsv              tab-separated fields without quotes, after a header
                         line
      *.csv              RFC 4180, after a header line; quoted fields may span
                         lines
      *.parquet          rows
      *.tfrecord         `tf.train.Example` records; features are the columns
      others             plain text: each line is the column `source`

  See `decode_line` for line ends, and `value` for nested columns.

  Args:
    path: path of the file; `*.gz` is gzip.
    columns: columns that must have non-blank text; all other columns are kept
      as they are. None: no column is required, and a blank line of plain text
      is a row.
    column_names: column names of TSV and CSV files without a header line, or
      one name for the lines of plain text and the texts of a JSON list.
    problem: further check of a row; returns a `BadLine.reason` or None.

  Raises:
    FileNotFoundError: at the first row, if there is no such file.
    ValueError: naming the file, if it is not of its kind, is damaged, has no
      header, lacks one of `columns`, or ends inside a quoted field.
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
  """Returns whether a text file, plain or .gz, has a byte order mark."""
  with input_files.open_bytes(path) as file:
    return file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK


def decode_line(line: bytes, number: int) -> tuple[str, str]:
  r"""Decodes a line; returns its text, and the reason if it is unusable.

  The text of an unusable line, and the reason of a usable one, are ''.

  The definition of a line for all sources: it ends at \n. One \r before that
  belongs to the line end; any other \r, form feed or separator belongs to the
  text. A byte order mark is dropped at the start of the first line, and is text
  elsewhere.

  Args:
    line: bytes of the line, with its line end.
    number: line number, from 1.
  """
  if number == 1:
    line = line.removeprefix(_BYTE_ORDER_MARK)
  if b'\0' in line:
    return '', f'is not text: it has a NUL at byte {line.index(0)}'
  try:
    return line.removesuffix(b'\n').removesuffix(b'\r').decode(), ''
  except UnicodeDecodeError as error:
    return '', f'is not UTF-8: {error}'


def value(row: Fields, column: str, default: Any = None) -> Any:
  """Returns a row's value in a column or a nested column.

  `translation.en` is the column of this very name, if there is one, else `en`
  of the object in `translation`. A number is a list index from 0, as in
  `turns.0.text`.
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
  """Yields lines with their line ends."""
  with input_files.open_bytes(path) as lines:
    yield from lines


def _lacking_text(row: Fields, required: Sequence[str]) -> str | None:
  """Returns the reason a required column has no text, or None."""
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
  """Parses a line's JSON object, or returns the reason it is invalid."""
  if not text.strip():
    return 'is empty'
  try:
    row = json.loads(text)
    if '\\u' in text and record_files.has_half_characters(row):
      return record_files.HALF_CHARACTER
  except json.JSONDecodeError as error:
    of_list = _OF_LIST if text.startswith('[') else ''
    return f'is not JSON: {error.msg} at character {error.colno}{of_list}'
  except (ValueError, RecursionError) as error:
    return f'is not valid JSON: {error}'
  if not isinstance(row, dict):
    of_list = _OF_LIST if isinstance(row, list) else ''
    return f'is a JSON {type(row).__name__}, expected an object{of_list}'
  return row


def _tsv_records(path: epath.Path) -> Iterator[tuple[int, list[str] | str]]:
  for number, line in enumerate(_lines(path), start=1):
    text, reason = decode_line(line, number)
    if not reason and not text.strip():
      reason = 'is empty'
    yield number, reason or text.split('\t')


def _csv_records(path: epath.Path) -> Iterator[tuple[int, list[str] | str]]:
  # The default limit refuses fields above 128 KiB, such as long documents.
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
          f'{path}:{number} has an unclosed quote, so the rest of the file is '
          'one field. Close the quote, or download the file again.'
        ) from error
      yield number, f'is not CSV: {error}'
      continue
    if any(map(_ESCAPED_BYTE.search, fields)):
      yield number, 'is not UTF-8'
    elif any('\0' in field for field in fields):
      yield number, 'is not text: it has a NUL'
    else:
      yield number, fields or 'is empty'


def _table(
  path: epath.Path,
  records: Iterator[tuple[int, list[str] | str]],
  names: Sequence[str] | None,
  required: Sequence[str],
) -> Iterator[tuple[int, Fields | str]]:
  """Yields rows by the given column names, or by those of the first record."""
  if names is None:
    _, names = next(records, (1, 'is empty'))
    if isinstance(names, str):
      raise ValueError(
        f'{path}:1 {names}; expected a header with the names of the columns. '
        'For a file without a header, set COLUMN_NAMES.'
      )
  repeated = {name for name in names if list(names).count(name) > 1}
  if repeated:
    raise ValueError(
      f'{path} has more than one column named {", ".join(sorted(repeated))}; '
      f'its columns are {", ".join(names)}.'
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
    # Long texts are data instead of a header; messages do not show data.
    is_header = all(len(name) <= _LONGEST_COLUMN_NAME for name in names)
    found = ', '.join(names) if is_header else f'{len(names)} long texts'
    is_one = len(names) == 1 and any(sign in names[0] for sign in ',;|\t')
    way_out = (
      'Columns of CSV are separated by commas, those of TSV by tabs.'
      if is_one
      else 'Use one of its columns, or, for a TSV or CSV file without a '
      'header, set COLUMN_NAMES.'
    )
    raise ValueError(
      f'{path} has no column {", ".join(missing)}; its first line has {found}. '
      f'{way_out}'
    )
