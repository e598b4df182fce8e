# SPDX-License-Identifier: Apache-2.0
"""Record files that are not line-based: JSON lists, Parquet, TFRecord.

Each reader yields pairs: the number of a record, from 1, and its columns, or
the reason it is unusable. Values become JSON values: UTF-8 bytes a string,
other bytes `{'base64': ...}`, times ISO 8601. No TensorFlow is needed: TFRecord
files of `tf.train.Example` are parsed and checked in Python, at a few MB per
second.
"""

import base64
import datetime
import decimal
import functools
import io
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from google.protobuf import (
  descriptor_pb2,
  descriptor_pool,
  message,
  message_factory,
  text_format,
)

from l2s_jax.data import input_files
from l2s_jax.runtime import extras

Fields = dict[str, Any]

_ROWS_AT_ONCE = 1024
_MOST_SHOWN = 80  # characters
_CASTAGNOLI = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
# Schema of tf.train.Example; TensorFlow's classes would import TensorFlow.
_EXAMPLE_SCHEMA = """
name: "l2s_jax/example.proto" package: "l2s_jax" syntax: "proto3"
message_type { name: "Texts"
  field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
message_type { name: "Floats"
  field { name: "value" number: 1 type: TYPE_FLOAT label: LABEL_REPEATED } }
message_type { name: "Integers"
  field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type { name: "Feature"
  field { name: "texts" number: 1 type: TYPE_MESSAGE label: LABEL_OPTIONAL
          type_name: ".l2s_jax.Texts" }
  field { name: "floats" number: 2 type: TYPE_MESSAGE label: LABEL_OPTIONAL
          type_name: ".l2s_jax.Floats" }
  field { name: "integers" number: 3 type: TYPE_MESSAGE label: LABEL_OPTIONAL
          type_name: ".l2s_jax.Integers" } }
message_type { name: "Features"
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type: TYPE_MESSAGE label: LABEL_OPTIONAL
            type_name: ".l2s_jax.Feature" } }
  field { name: "feature" number: 1 type: TYPE_MESSAGE label: LABEL_REPEATED
          type_name: ".l2s_jax.Features.FeatureEntry" } }
message_type { name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE label: LABEL_OPTIONAL
          type_name: ".l2s_jax.Features" } }
"""


def json_list(
  path: epath.Path, name: str
) -> Iterator[tuple[int, Fields | str]]:
  """Yields the elements of a JSON list: objects, or texts as one column.

  Args:
    path: path of a JSON file with one list; read into memory.
    name: column name of texts.

  Raises:
    ValueError: naming file and place, if the file is not a JSON list.
  """
  with input_files.open_bytes(path) as file:
    content = file.read()
  try:
    text = content.decode('utf-8-sig')
    values = json.loads(text)
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} is not UTF-8: {error.reason} at byte {error.start}.'
    ) from error
  except json.JSONDecodeError as error:
    is_lines = error.msg == 'Extra data'
    raise ValueError(
      f'{path} is not a JSON list: {error.msg} at line {error.lineno}, '
      f'character {error.colno}. '
      + (
        'If it has an object on each line, rename it to *.jsonl.'
        if is_lines
        else 'Download it again, or correct it.'
      )
    ) from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not valid JSON: {error}.') from error
  if not isinstance(values, list):
    keys = ', '.join(map(repr, values)) if isinstance(values, dict) else ''
    raise ValueError(
      f'{path} contains one JSON {type(values).__name__}'
      + (f' with the keys {keys[:_MOST_SHOWN]}' if keys else '')
      + '; expected a list of objects, or of strings.'
    )
  has_escapes = '\\u' in text
  for number, value in enumerate(values, start=1):
    if has_escapes and has_half_characters(value):
      yield number, HALF_CHARACTER
    elif isinstance(value, str):
      yield number, {name: value}
    elif isinstance(value, dict):
      yield number, value
    else:
      yield number, f'is a JSON {type(value).__name__}, expected an object'


HALF_CHARACTER = 'has an unpaired surrogate (\\uD800-\\uDFFF)'


def has_half_characters(value: Any) -> bool:
  """Returns whether a JSON value has unpaired surrogates (invalid in UTF-8)."""
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError:
    return True
  return False


def parquet(path: epath.Path) -> Iterator[tuple[int, Fields | str]]:
  """Yields the rows of a Parquet file; nested columns become dicts.

  Raises:
    ValueError: naming the file, if it is damaged or pyarrow is not installed.
  """
  extras.require(
    f'{path} is a Parquet file, and reading it',
    'pyarrow',
    instead='Or convert the file to JSONL.',
  )
  import pyarrow
  from pyarrow import parquet as reader

  number = 0
  try:
    with input_files.open_bytes(path) as raw:
      # Parquet's reader seeks; gzip streams cannot.
      is_gzip = input_files.is_gzip(path.name)
      file = io.BytesIO(raw.read()) if is_gzip else raw
      table = reader.ParquetFile(file, page_checksum_verification=True)
      for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
        for row in _rows(batch):
          number += 1
          yield number, row
  # Names of columns that are not UTF-8 fail in pyarrow's own code.
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    if isinstance(error, FileNotFoundError):
      raise
    said = ' '.join(str(error).split())
    raise ValueError(
      f'{path} is not a complete Parquet file (after row {number}): {said}. '
      'Download it again.'
    ) from error


def _rows(batch: Any) -> Iterator[Fields | str]:
  try:
    rows: list[Any] = batch.to_pylist()
  except UnicodeDecodeError:
    rows = []
    for index in range(len(batch)):
      try:
        rows += batch.slice(index, 1).to_pylist()
      except UnicodeDecodeError as error:
        rows.append(f'is not UTF-8: {error.reason}')
  for row in rows:
    yield row if isinstance(row, str) else _plain(row)


def tfrecord(path: epath.Path) -> Iterator[tuple[int, Fields | str]]:
  """Yields the features of each `tf.train.Example` in a TFRecord file.

  A feature with one value is a scalar, one with several a list.

  Raises:
    ValueError: naming the record, if the file is damaged.
  """
  with input_files.open_bytes(path) as file:
    for number, record in enumerate(_records(file, path), start=1):
      try:
        example = _example_class().FromString(record)
        features = example.features.feature
        yield (
          number,
          {name: _feature(features[name]) for name in sorted(features)},
        )
      except message.DecodeError:
        yield number, 'is not a tf.train.Example'


def _records(file: io.BufferedIOBase, path: epath.Path) -> Iterator[bytes]:
  """Yields the record payloads, with lengths and checksums verified."""
  start = number = 0

  def read(size: int, what: str) -> bytes:
    found = file.read(size)
    if len(found) < size:
      raise ValueError(
        f'{path} is truncated: record {number}, at byte {start}, ends inside '
        f'its {what}. Download it again.'
      )
    return found

  def check(content: bytes, checksum: bytes, what: str) -> None:
    if _masked_crc32c(content) != struct.unpack('<I', checksum)[0]:
      raise ValueError(
        f'{path} is not a TFRecord file, or is damaged: the {what} of record '
        f'{number}, at byte {start}, does not match its checksum. Download it '
        'again.'
      )

  while first := file.read(1):
    number += 1
    length = first + read(7, 'length')
    check(length, read(4, 'length'), 'length')
    content = read(struct.unpack('<Q', length)[0], 'content')
    check(content, read(4, 'checksum'), 'content')
    yield content
    start += len(content) + 16


@functools.cache
def _crc_table() -> list[int]:
  table = []
  for byte in range(256):
    for _ in range(8):
      byte = (byte >> 1) ^ (_CASTAGNOLI if byte & 1 else 0)
    table.append(byte)
  return table


def _masked_crc32c(content: bytes) -> int:
  """Returns the masked CRC-32C of TFRecord files.

  Source: tensorflow/core/lib/hash/crc32c.h, `Mask`.
  """
  table = _crc_table()
  crc = 0xFFFFFFFF
  for byte in content:
    crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
  crc ^= 0xFFFFFFFF
  return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


@functools.cache
def _example_class() -> Any:
  file = text_format.Parse(
    _EXAMPLE_SCHEMA, descriptor_pb2.FileDescriptorProto()
  )
  pool = descriptor_pool.DescriptorPool()
  pool.AddSerializedFile(file.SerializeToString())
  return message_factory.GetMessageClass(
    pool.FindMessageTypeByName('l2s_jax.Example')
  )


def _feature(feature: Any) -> Any:
  for name in ('texts', 'floats', 'integers'):
    if feature.HasField(name):
      values = [_plain(value) for value in getattr(feature, name).value]
      return values[0] if len(values) == 1 else values
  return None


def _plain(value: Any) -> Any:
  """Converts a value to a JSON-serializable one."""
  match value:
    case bytes():
      try:
        return value.decode()
      except UnicodeDecodeError:
        return {'base64': base64.b64encode(value).decode()}
    case Mapping():
      return {str(name): _plain(part) for name, part in value.items()}
    case list() | tuple():
      return [_plain(part) for part in value]
    case datetime.date() | datetime.time():
      return value.isoformat()
    case decimal.Decimal() | datetime.timedelta():
      return str(value)
    case None | str() | bool() | int() | float():
      return value
  return str(value)
