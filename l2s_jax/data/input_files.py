# SPDX-License-Identifier: Apache-2.0
"""User files of text and records: kinds, opening, and refusal of other formats.

The kind follows from the name's ending, case-insensitively and without `.gz`.
A file whose first bytes contradict its name is refused, never read as text.
"""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator

from etils import epath

# All other endings that are not refused have the kind 'text'.
KINDS = ('jsonl', 'json', 'tsv', 'csv', 'parquet', 'tfrecord')
ENDINGS = '.jsonl, .ndjson, .json, .tsv, .csv, .parquet or .tfrecord'
_OTHER_ENDINGS = {'ndjson': 'jsonl', 'pq': 'parquet', 'tfrecords': 'tfrecord'}
# Shard suffix of TFDS and SeqIO.
_SHARD = re.compile(r'-\d+-of-\d+$')
_NO_TEXT = frozenset(
  '7z arrow array_record arrayrecord avro bin bz2 ckpt db doc docx exe feather '
  'gguf gif h5 hdf5 jpeg jpg mdb model mp3 mp4 msgpack npy npz odt onnx orc pb '
  'pdf pickle pkl png ppt pptx pt pth rar riegeli safetensors so sqlite '
  'sqlite3 tar tgz wav webp xls xlsx xz zip zst'.split()
)
_SNIFFED_BYTES = 4096
_MAGIC = {
  b'PAR1': 'a Parquet file; rename it to *.parquet',
  b'\x1f\x8b': 'a gzip file; rename it to *.gz',
  b'PK\x03\x04': 'a zip archive (or an office document); unpack it, or save '
  'it as CSV',
  b'\xff\xfe': 'UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`',
  b'\xfe\xff': 'UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`',
  b'\x28\xb5\x2f\xfd': 'a zstd file; decompress it with `unzstd`',
  b'\xfd7zXZ\x00': 'an xz file; decompress it with `unxz`',
  b'BZh': 'a bzip2 file; decompress it with `bunzip2`',
  b'7z\xbc\xaf\x27\x1c': 'a 7z archive; unpack it',
  b'ARROW1': 'an Arrow file; convert it to Parquet',
  b'ORC': 'an ORC file; convert it to Parquet',
  b'Obj\x01': 'an Avro file; convert it to Parquet',
  b'%PDF-': 'a PDF; extract its text',
  b'SQLite format 3': 'an SQLite database; export it as CSV',
  b'\x89PNG': 'an image',
  b'\xff\xd8\xff': 'an image',
}
# Text may begin with these; then a NUL byte decides.
_AMBIGUOUS = (b'BZh', b'ORC', b'ARROW1', b'PAR1', b'Obj\x01')


def kind(name: str) -> str:
  """Returns the kind of a file by its name: one of `KINDS`, or 'text'."""
  name = _SHARD.sub('', _without_gz(name))
  ending = name.rpartition('.')[2]
  ending = _OTHER_ENDINGS.get(ending, ending)
  return ending if ending in KINDS else 'text'


def is_gzip(name: str) -> bool:
  """Returns whether a file name ends in .gz."""
  return name.lower().endswith('.gz')


@contextlib.contextmanager
def open_bytes(path: epath.Path) -> Iterator[io.BufferedIOBase]:
  """Opens a file for reading, through gzip if its name ends in .gz.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, if its ending or its first bytes are not those
      of its kind; inside the block, if the gzip stream is damaged.
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
      f'{path} is not a complete gzip file: {error}. Download it again, or '
      'remove .gz from its name.'
    ) from error


def check_ending(name: str, path: str) -> None:
  """Refuses a file name with the ending of another format.

  Raises:
    ValueError: with the supported endings.
  """
  ending = _without_gz(name).rpartition('.')[2]
  if ending in _NO_TEXT:
    raise ValueError(
      f'{path}: *.{ending} files are not text; expected a text file, or '
      f'{ENDINGS}, plain or compressed (.gz).'
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
    return  # Their readers check them.
  place = start.find(b'\0')
  for magic, what in _MAGIC.items():
    if start.startswith(magic) and (magic not in _AMBIGUOUS or place >= 0):
      raise ValueError(
        f'{path} is not text: its first bytes are those of {what}.'
      )
  if place >= 0:
    raise ValueError(
      f'{path} is not text: it has a NUL at byte {place}. Expected UTF-8 '
      '(convert UTF-16 with `iconv -f UTF-16 -t UTF-8`), or '
      f'{ENDINGS}.'
    )


def _without_gz(name: str) -> str:
  return name.lower().removesuffix('.gz')
