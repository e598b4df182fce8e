# SPDX-License-Identifier: Apache-2.0
"""Users' files of text and records: their kinds, opened, and what is neither.

The kind follows the name, in small letters or capitals, less `.gz`. What a
file's first bytes say against its name is refused, never read as text.
"""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator

from etils import epath

# Beside 'text', which is all else that is not refused.
KINDS = ('jsonl', 'json', 'tsv', 'csv', 'parquet', 'tfrecord')
ENDINGS = '.jsonl, .ndjson, .json, .tsv, .csv, .parquet or .tfrecord'
_OTHER_ENDINGS = {'ndjson': 'jsonl', 'pq': 'parquet', 'tfrecords': 'tfrecord'}
# As TFDS and SeqIO name the pieces of one file.
_SHARD = re.compile(r'-\d+-of-\d+$')
_NO_TEXT = frozenset(
  '7z arrow array_record arrayrecord avro bin bz2 ckpt db doc docx exe feather '
  'gguf gif h5 hdf5 jpeg jpg mdb model mp3 mp4 msgpack npy npz odt onnx orc pb '
  'pdf pickle pkl png ppt pptx pt pth rar riegeli safetensors so sqlite '
  'sqlite3 tar tgz wav webp xls xlsx xz zip zst'.split()
)
_SNIFFED_BYTES = 4096
_MAGIC = {
  b'PAR1': 'Parquet; name it *.parquet',
  b'\x1f\x8b': 'gzip; name it *.gz',
  b'PK\x03\x04': 'a zip archive (or an office document); unpack it, or save '
  'it as CSV',
  b'\xff\xfe': 'UTF-16; make it UTF-8 with `iconv -f UTF-16 -t UTF-8`',
  b'\xfe\xff': 'UTF-16; make it UTF-8 with `iconv -f UTF-16 -t UTF-8`',
  b'\x28\xb5\x2f\xfd': 'compressed by zstd; unpack it with `unzstd`',
  b'\xfd7zXZ\x00': 'compressed by xz; unpack it with `unxz`',
  b'BZh': 'compressed by bzip2; unpack it with `bunzip2`',
  b'7z\xbc\xaf\x27\x1c': 'a 7z archive; unpack it',
  b'ARROW1': 'Arrow; write it as Parquet',
  b'ORC': 'ORC; write it as Parquet',
  b'Obj\x01': 'Avro; write it as Parquet',
  b'%PDF-': 'a PDF; extract its text',
  b'SQLite format 3': 'a database of SQLite; export a CSV',
  b'\x89PNG': 'an image',
  b'\xff\xd8\xff': 'an image',
}
# Those that a text may begin with, too; a NUL then tells.
_AMBIGUOUS = (b'BZh', b'ORC', b'ARROW1', b'PAR1', b'Obj\x01')


def kind(name: str) -> str:
  """Returns one of `KINDS` or 'text', as the name says."""
  name = _SHARD.sub('', _without_gz(name))
  ending = name.rpartition('.')[2]
  ending = _OTHER_ENDINGS.get(ending, ending)
  return ending if ending in KINDS else 'text'


def is_gzip(name: str) -> bool:
  """Returns whether a name says that a file is compressed."""
  return name.lower().endswith('.gz')


@contextlib.contextmanager
def open_bytes(path: epath.Path) -> Iterator[io.BufferedIOBase]:
  """Opens a file to be read, through gzip if its name says so.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, if its ending or its first bytes are not those
      of its kind; and from inside the block, if it is not whole gzip.
  """
  check_ending(path.name, str(path))
  try:
    with _unpacked(path) as file:
      _check_start(path, file.read(_SNIFFED_BYTES))
    with _unpacked(path) as file:
      yield file
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{path}: no such file.') from error
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(
      f'{path} is not a whole gzip file: {error}. Fetch it again, or drop .gz '
      'from its name.'
    ) from error


def check_ending(name: str, path: str) -> None:
  """Refuses the name of a file that cannot be text or records.

  Raises:
    ValueError: says what is read.
  """
  ending = _without_gz(name).rpartition('.')[2]
  if ending in _NO_TEXT:
    raise ValueError(
      f'{path}: a file *.{ending} is not text; expected lines of text, or '
      f'{ENDINGS}, each of them plain or .gz.'
    )


@contextlib.contextmanager
def _unpacked(path: epath.Path) -> Iterator[io.BufferedIOBase]:
  with path.open('rb') as raw:
    if not is_gzip(path.name):
      yield raw
      return
    with gzip.open(raw) as file:
      yield file


def _check_start(path: epath.Path, start: bytes) -> None:
  if kind(path.name) in ('parquet', 'tfrecord'):
    return  # They have checks of their own.
  place = start.find(b'\0')
  for magic, what in _MAGIC.items():
    if start.startswith(magic) and (magic not in _AMBIGUOUS or place >= 0):
      raise ValueError(
        f'{path} is no text: its first bytes are those of {what}.'
      )
  if place >= 0:
    raise ValueError(
      f'{path} is no text: there is a NUL at byte {place}. Expected UTF-8 '
      '(text in UTF-16 is made so with `iconv -f UTF-16 -t UTF-8`), or '
      f'{ENDINGS}.'
    )


def _without_gz(name: str) -> str:
  return name.lower().removesuffix('.gz')
