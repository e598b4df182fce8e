# SPDX-License-Identifier: Apache-2.0
"""Reads strange data files, and compares each row with a plain reader's.

Each case ends in one sentence, or with the rows that `json`, `csv` and
`str.split` find in the same bytes: those that are whole text, at their places,
and no others. `fuzz` has the command.
"""

import contextlib
import csv
import gzip
import importlib
import io
import json
import pathlib
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from faults import fuzz_files, mutate
from l2s_jax.data import record_files, sources, text_files
from l2s_jax.inference import prompt_source, prompts

# A row's columns, or None for one that must not be used.
Rows = list[dict[str, Any] | None]
COLUMNS = ('prompt', 'answer')
_MARK = b'\xef\xbb\xbf'
_CELLS: tuple[bytes, ...] = (
  b'', b' ', b'\xc2\xa0', b'\t', b'a', b'ten fives', b'"', b'""', b'"a', b'a"b',
  b'"a ""b"" c"', b'"a\nb"', b'"a"b', b',', b"'", b'\\', b'\\"', b'\x00',
  b'a\x00b', b'\r', b'a\rb', b'\x0b\x0c', b'\x1c\x85', b'\x1a', b'\x7f',
  'ș 🙂'.encode(), '\u2028\u2029\x85'.encode(), '\u05d0\u05d1 \u202e'.encode(),
  '\u0627\u0644'.encode(), '\ufeff'.encode(), '\ufffd'.encode(),
  'ș'.encode('utf-16'), 'é'.encode('latin-1'), b'\xed\xa0\x80', b'\xff\xfe',
  b'\xc0\x80', b'\xf4\x90\x80\x80', b'\\ud800', b'\\u0000', b'{"a": 1}',
  b'NaN', b'1e999', b'null', b'-', b'=1+1', b'<pad>', b'</s>', b'<pad> ' * 50,
  b'a' * 9000, b'a ' * 70_000, b'%s', b'{prompt}',
)  # fmt: skip
_LINE_ENDS = (b'\n', b'\n', b'\n', b'\r\n', b'\r', b'\n\n', b' \n')


def _strange_table(rng: random.Random, kind: str) -> bytes:
  """Returns a table whose cells nobody has quoted, or somebody has."""
  mark = {'csv': b',', 'tsv': b'\t'}[kind]
  rows: list[list[bytes]] = [[name.encode() for name in COLUMNS]]
  for _ in range(rng.randrange(5)):
    rows.append(
      [rng.choice(_CELLS) for _ in rng.choice(((1, 2),) * 4 + ((1,),))]
    )
  if kind == 'csv' and rng.random() < 0.5:
    rows = [
      [b'"' + cell.replace(b'"', b'""') + b'"' for cell in row] for row in rows
    ]
  return _joined([mark.join(row) for row in rows], rng)


def _joined(lines: Sequence[bytes], rng: random.Random) -> bytes:
  end = rng.choice(_LINE_ENDS)
  content = end.join(lines) + rng.choice((b'', end))
  return rng.choice((b'', b'', b'', _MARK)) + content


def _strange_json(rng: random.Random) -> bytes:
  """Returns an object, or what is nearly one."""
  texts = [
    cell.decode(*rng.choice((('utf-8', 'replace'), ('latin-1',))))
    for cell in rng.choices(_CELLS, k=2)
  ]
  row = dict(zip(COLUMNS, texts, strict=True))
  if rng.random() < 0.5:
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode()
  whole = json.dumps(row).encode()
  return mutate.mutate_json_file(whole, rng).replace(b'\n', b' ')


def strange(kind: str, rng: random.Random) -> bytes:
  """Returns the content of a file of a kind, without gzip."""
  if kind in ('csv', 'tsv'):
    content = _strange_table(rng, kind)
  elif kind == 'jsonl':
    lines = [_strange_json(rng) for _ in range(rng.randrange(4))]
    content = _joined(lines, rng)
  elif kind == 'json':
    lines = [_strange_json(rng) for _ in range(rng.randrange(4))]
    content = b'[' + b',\n'.join(lines) + b']'
  else:
    lines = [rng.choice(_CELLS) for _ in range(rng.randrange(6))]
    content = _joined(lines, rng)
  return mutate.mutate_bytes(content, rng) if rng.random() < 0.3 else content


def _lines(content: bytes) -> list[bytes]:
  lines = content.split(b'\n')
  if not lines[-1]:
    del lines[-1]
  if lines:
    lines[0] = lines[0].removeprefix(_MARK)
  return lines


def _text(line: bytes) -> str | None:
  if b'\0' in line:
    return None
  try:
    return line.removesuffix(b'\r').decode()
  except UnicodeDecodeError:
    return None


def _object(text: str | None) -> dict[str, Any] | None:
  try:
    found = json.loads(text or '')
    json.dumps(found, ensure_ascii=False).encode()
  except (ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def plain_rows(kind: str, content: bytes) -> Rows:
  """Returns the rows of a file as its plain reader finds them.

  Rows end where that reader gives up.
  """
  if kind == 'jsonl':
    return [_object(_text(line)) for line in _lines(content)]
  if kind == 'json':
    found = []
    for value in json.loads(content.decode('utf-8-sig')):
      row = {'source': value} if isinstance(value, str) else value
      found.append(_object(json.dumps(row)))
    return found
  if kind == 'txt':
    texts = [_text(line) for line in _lines(content)]
    return [None if text is None else {'source': text} for text in texts]
  records: list[list[str] | None] = []
  if kind == 'tsv':
    for line in _lines(content):
      text = _text(line)
      records.append(text.split('\t') if text and text.strip() else None)
  else:
    text = content.removeprefix(_MARK).decode(errors='surrogateescape')
    lines = text.split('\n')
    ended = [f'{line}\n' for line in lines[:-1]] + lines[-1:]
    csv.field_size_limit(sys.maxsize)
    with contextlib.suppress(csv.Error):
      for fields in csv.reader(ended if lines[-1] else ended[:-1], strict=True):
        whole = ''.join(fields)
        is_text = whole.isascii() or not any(
          0xDC80 <= ord(letter) <= 0xDCFF for letter in whole
        )
        is_good = fields and is_text and '\0' not in whole
        records.append(fields if is_good else None)
  names = records[0] if records else None
  if names is None:
    return []
  return [
    dict(zip(names, fields, strict=True))
    if fields and len(fields) == len(names)
    else None
    for fields in records[1:]
  ]


def _compare(found: Sequence[Any], plain: Rows, *, gave_up: bool) -> None:
  if gave_up:
    found = found[: len(plain)]
  rows = [None if isinstance(row, text_files.BadLine) else row for row in found]
  # As text: NaN differs from itself.
  assert repr(rows) == repr(plain), f'{rows!r:.300} is not {plain!r:.300}'


def read_rows(path: pathlib.Path, kind: str, content: bytes) -> None:
  """Reads a file, and compares its rows with those of its plain reader."""
  found = list(text_files.read_rows(epath.Path(path)))
  plain = plain_rows(kind, content)
  _compare(found, plain, gave_up=kind == 'csv')


def _is_used(row: dict[str, Any] | None, names: Sequence[str]) -> bool:
  values = [(row or {}).get(name) for name in names]
  return all(isinstance(value, str) and value.strip() for value in values)


def _examples(files: Any, names: Sequence[str]) -> list[tuple[bytes, ...]]:
  """Returns the examples of training."""
  source = sources.local_source(
    {'train': files},
    data_dir=None,
    columns=sources.Columns(required=names),
    pair=COLUMNS,
    bad_lines='skip',
    name='x',
  )
  dataset = source.get_dataset('train', shuffle=False)
  return [
    tuple(example[name] for name in names)
    for example in dataset.as_numpy_iterator()
  ]


def read_table(path: pathlib.Path, kind: str, content: bytes) -> None:
  """Reads a file as training does; an empty target is no example."""
  found = _examples(str(path), COLUMNS)
  rows = [r for r in plain_rows(kind, content) if _is_used(r, COLUMNS)]
  plain = [tuple(row[name].encode() for name in COLUMNS) for row in rows if row]
  if kind == 'csv':
    found = found[: len(plain)]
  assert found == plain, f'{found!r:.300} is not {plain!r:.300}'


def _read_pair(
  paths: Sequence[pathlib.Path], contents: Sequence[bytes]
) -> None:
  """Reads parallel text as training does, by TensorFlow."""
  found = _examples(tuple(map(str, paths)), COLUMNS)
  plain = [
    tuple(text.encode() for text in texts if text)
    for texts in zip(
      *([_text(line) for line in _lines(content)] for content in contents),
      strict=True,
    )
    if all(text and text.strip() for text in texts)
  ]
  assert found == plain, f'{found!r:.300} is not {plain!r:.300}'


def _read_stdin(content: bytes, bad_lines: str) -> None:
  """Reads standard input as `infer` does."""
  source = prompt_source.PromptSource(
    input=prompt_source.STDIN,
    split='',
    prompt_column='prompt',
    template='{prompt}',
    fallback_template=None,
    column_names=None,
    bad_lines=bad_lines,
    target_column='',
    max_decode_len=8,
    max_decode_len_column=None,
  )
  before = sys.stdin
  sys.stdin = io.TextIOWrapper(io.BytesIO(content))
  try:
    found = list(source.reader(None, {})())  # type: ignore[arg-type]
  finally:
    sys.stdin = before
  prompts.survey(found, '')
  texts = [_text(line) for line in _lines(content)]
  plain = [{'prompt': t} if t and t.strip() else None for t in texts]
  _compare(found, plain, gave_up=False)


def _fuzz(
  name: str,
  seed: int,
  count: int,
  case: Callable[[random.Random, pathlib.Path], Callable[[], object]],
) -> fuzz_files.Result:
  result = fuzz_files.Result()
  if name.startswith('training'):  # No case is to take the time of an import.
    importlib.import_module('l2s_jax.data.features')
  with tempfile.TemporaryDirectory() as scratch:
    for number in range(count):
      rng = random.Random(f'{name} {seed} {number}')
      read = case(rng, pathlib.Path(scratch))
      fuzz_files.run(result, f'{name} {seed} {number}', read)
  return result


def _of_kind(
  kind: str, read: Callable[[pathlib.Path, str, bytes], None]
) -> Callable[[random.Random, pathlib.Path], Callable[[], object]]:
  def case(rng: random.Random, folder: pathlib.Path) -> Callable[[], object]:
    content = strange(kind, rng)
    path = folder / f'x.{kind}'
    if rng.random() < 0.2:
      path = folder / f'x.{kind}.gz'
      path.write_bytes(gzip.compress(content, 1))
    else:
      path.write_bytes(content)
    return lambda: read(path, kind, content)

  return case


def _pair(rng: random.Random, folder: pathlib.Path) -> Callable[[], object]:
  ends = rng.choice(_LINE_ENDS[:4]), rng.choice(_LINE_ENDS[:4])
  number = rng.randrange(1, 6)
  contents, paths = [], []
  for side, end in enumerate(ends):
    cells = [c.replace(b'\n', b' ') for c in rng.choices(_CELLS, k=number)]
    content = rng.choice((b'', b'', _MARK)) + end.join(cells) + end
    if rng.random() < 0.2:
      content = mutate.mutate_bytes(content, rng)
    ending = rng.choice(('txt', 'txt', 'txt.gz'))
    paths.append(folder / f'{side}.{ending}')
    packed = gzip.compress(content, 1) if ending.endswith('gz') else content
    paths[-1].write_bytes(packed)
    contents.append(content)
  return lambda: _read_pair(paths, contents)


def _stdin(rng: random.Random, folder: pathlib.Path) -> Callable[[], object]:
  del folder
  content = strange('txt', rng)
  bad_lines = rng.choice(prompt_source.BAD_LINES)
  return lambda: _read_stdin(content, bad_lines)


def _tfrecord(rng: random.Random, folder: pathlib.Path) -> Callable[[], object]:
  rows, content = [], b''
  for _ in range(rng.randrange(1, 4)):
    example = record_files._example_class()()
    for name in COLUMNS:
      cell = rng.choice(_CELLS[:-5])
      example.features.feature[name].texts.value.append(cell)
    payload = example.SerializeToString()
    length = struct.pack('<Q', len(payload))
    for part in (length, payload):
      content += part
      content += struct.pack('<I', record_files._masked_crc32c(part))
    rows.append(
      {
        name: record_files._plain(example.features.feature[name].texts.value[0])
        for name in sorted(COLUMNS)
      }
    )
  content = mutate.mutate_bytes(content, rng)
  path = folder / 'x.tfrecord'
  path.write_bytes(content)

  def read() -> None:
    found = list(text_files.read_rows(epath.Path(path)))
    # A file may have lost whole records, or have them twice.
    assert all(row in rows for row in found), f'{found!r:.300}: {rows!r:.300}'

  return read


def _parquet(rng: random.Random, folder: pathlib.Path) -> Callable[[], object]:
  import pyarrow
  from pyarrow import parquet

  table = pyarrow.table(
    {name: [f'{name} {n} ș' for n in range(4)] for name in COLUMNS}
  )
  stream = io.BytesIO()
  parquet.write_table(table, stream, write_page_checksum=True)
  path = folder / 'x.parquet'
  path.write_bytes(mutate.mutate_bytes(stream.getvalue(), rng))
  return lambda: list(text_files.read_rows(epath.Path(path)))


def families() -> dict[str, Callable[..., fuzz_files.Result]]:
  """Returns what runs the cases of each family, by name."""
  cases = {
    f'rows of {kind}': _of_kind(kind, read_rows)
    for kind in ('txt', 'jsonl', 'json', 'csv', 'tsv')
  } | {
    f'training on {kind}': _of_kind(kind, read_table)
    for kind in ('jsonl', 'csv', 'tsv')
  }
  cases |= {
    'training on parallel text': _pair,
    'standard input': _stdin,
    'rows of tfrecord': _tfrecord,
    'rows of parquet': _parquet,
  }
  return {
    name: lambda name=name, case=case, **options: _fuzz(
      name, case=case, **options
    )
    for name, case in cases.items()
  }
