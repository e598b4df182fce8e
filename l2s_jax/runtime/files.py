# SPDX-License-Identifier: Apache-2.0
"""Atomic file writes and validated reading of JSON.

All JSON files that the package reads are parsed here, so that a damaged file
gives an error of one sentence with the file, the key and the remedy.
"""

import collections
import contextlib
import errno
import json
import os
import pathlib
import shutil
import types
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, Any, NoReturn

from l2s_jax.runtime import os_errors, scratch, storage

# Maximum nesting, far below the depth of Python's stack.
_MOST_LEVELS = 200
# tokenizer_config.json uses 10^30 for "no limit".
_MOST_DIGITS = 300

Keys = Mapping[str, type | tuple[type, ...]]


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], mode: str = 'w') -> Iterator[IO[Any]]:
  """Opens a file for atomic writing.

  The data are written to a temporary file beside `path`, which replaces `path`
  when the block ends without an exception. After an exception, `path` keeps its
  earlier content. For an object of a bucket, the temporary file is local, and
  is uploaded at the end.

  Args:
    path: the file; its folder is created if absent.
    mode: 'w' for UTF-8 text, 'wb' for bytes.
  """
  path = storage.of(path)
  encoding = 'utf-8' if mode == 'w' else None
  if isinstance(path, storage.BucketPath):
    with scratch.folder() as name:
      local = pathlib.Path(name) / 'object'
      with local.open(mode, encoding=encoding) as file:
        yield file
      path.upload(local)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  try:
    with (
      os_errors.naming(path),
      temporary.open(mode, encoding=encoding) as file,
    ):
      yield file
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def is_file_name(text: str) -> bool:
  """Returns whether a text names a file of a folder, and is no path."""
  num_bytes = len(text.encode('utf-8', 'surrogatepass'))
  is_printable = text.isprintable() and 0 < num_bytes <= 255
  is_path = text == '..' or pathlib.PurePath(text).name != text
  return is_printable and not is_path


def in_units(num_bytes: int | float) -> str:
  """Returns a size in the largest unit of which it has one."""
  for unit, size in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if num_bytes >= size:
      return f'{num_bytes / size:,.1f} {unit}'
  return f'{num_bytes:.0f} bytes'


def check_room(
  folder: str | os.PathLike[str],
  num_bytes: int | float,
  needed: str,
  hint: str = '',
) -> None:
  """Checks that a disk has room, before anything is written to it.

  Args:
    folder: a folder on the disk, which need not exist.
    num_bytes: size of what will be written.
    needed: what needs the room, and its verb: 'the weights need'.
    hint: how to need less.

  Raises:
    OSError: like that of a full disk, with the free and the required space.
  """
  free = shutil.disk_usage(nearest_existing(pathlib.Path(folder))).free
  if free < num_bytes:
    raise OSError(
      errno.ENOSPC,
      f'{in_units(free)} free, but {needed} {in_units(num_bytes)}'
      + (f' ({hint})' if hint else ''),
      os.fspath(folder),
    )


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Writes a JSON file atomically, with sorted keys."""
  with whole(path) as file:
    file.write(json.dumps(content, indent=2, sort_keys=True) + '\n')


def read_json(
  path: str | os.PathLike[str],
  *,
  keys: Keys = types.MappingProxyType({}),
  remedy: str,
  finite: bool = True,
) -> dict[str, Any]:
  """Reads a JSON object from a file and validates it.

  Args:
    path: the file.
    keys: required keys with the types of their values. A key whose types
      include None may be absent; an integer counts as float; a bool does not
      count as a number.
    remedy: instruction for the user, for errors, such as 'download it again'.
    finite: whether to refuse NaN and Infinity, which Python writes though they
      are not JSON. Files with scores may hold them.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: in one sentence, with the file, the problem and the remedy.
  """
  try:
    content = storage.of(path).read_bytes()
  except IsADirectoryError as error:
    raise ValueError(
      f'{path} is a folder, expected a JSON file; {remedy}'
    ) from error
  return parse_json(content, path, keys=keys, remedy=remedy, finite=finite)


def parse_json(
  content: bytes | str,
  path: str | os.PathLike[str],
  *,
  keys: Keys = types.MappingProxyType({}),
  remedy: str,
  finite: bool = True,
) -> dict[str, Any]:
  """Parses and validates a JSON object; see `read_json`.

  Args:
    content: the content of the file.
    path: the file, for errors.
    keys: see `read_json`.
    remedy: see `read_json`.
    finite: see `read_json`.
  """
  if not content.strip():
    raise ValueError(f'{path} is empty, expected JSON; {remedy}')
  try:
    text = content if isinstance(content, str) else content.decode('utf-8')
    value = (_DECODER if finite else _LENIENT_DECODER).decode(text)
    if '\\u' in text:  # refuses lone surrogates
      json.dumps(value, ensure_ascii=False).encode('utf-8')
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON ({error}); {remedy}') from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} is not JSON (byte {error.start} is not UTF-8); {remedy}'
    ) from error
  except UnicodeEncodeError as error:
    raise ValueError(
      f'{path} is not JSON (half of a surrogate pair in a string); {remedy}'
    ) from error
  except RecursionError as error:
    raise ValueError(
      f'{path} is not supported JSON (too many nested brackets); {remedy}'
    ) from error
  except ValueError as error:  # raised by the parsing functions below
    raise ValueError(
      f'{path} is not supported JSON ({error}); {remedy}'
    ) from error
  if not isinstance(value, dict):
    raise ValueError(
      f'{path} holds {kind_of(value)}, expected a JSON object; {remedy}'
    )
  check_keys(value, path, keys=keys, remedy=remedy)
  return value


def read_records(
  path: str | os.PathLike[str],
  *,
  keys: Keys = types.MappingProxyType({}),
  say: Callable[[str], object] = lambda _: None,
) -> list[tuple[int, dict[str, Any]]]:
  """Reads a JSONL log, without its damaged lines.

  Args:
    path: the log.
    keys: required keys of each record; see `read_json`.
    say: receives a message for each skipped line: a last line without newline,
      as a killed process leaves it, or a damaged line.

  Returns:
    The records in order, each with the number of its line, from 1.
  """
  records = []
  lines = storage.of(path).read_bytes().splitlines(keepends=True)
  for number, line in enumerate(lines, start=1):
    place = f'{path}, line {number}'
    if not line.endswith(b'\n'):
      say(f'{place}: skipped an incomplete last line of {len(line)} bytes.')
      continue
    try:
      record = parse_json(
        line, place, keys=keys, remedy='the line is skipped.', finite=False
      )
    except ValueError as error:
      say(str(error))
      continue
    records.append((number, record))
  return records


def check_keys(
  value: Mapping[str, Any],
  place: str | os.PathLike[str],
  *,
  keys: Keys,
  remedy: str,
) -> None:
  """Validates the keys of an object within a JSON file.

  Args:
    value: the object.
    place: the file and the position of the object, for errors.
    keys: see `read_json`.
    remedy: see `read_json`.

  Raises:
    ValueError: names the place, the key, and the expected type.
  """
  for key, expected in keys.items():
    expected = expected if isinstance(expected, tuple) else (expected,)
    if key not in value and types.NoneType not in expected:
      found = 'is missing'
    elif not _has_type(value.get(key), expected):
      found = f'is {kind_of(value[key])}'
    else:
      continue
    wanted = ' or '.join(
      'null' if kind is types.NoneType else kind.__name__ for kind in expected
    )
    raise ValueError(
      f'{place}: key {key!r} {found}, expected {wanted}; {remedy}'
    )


def kind_of(value: Any) -> str:
  """Returns type and, if short, value of a JSON value, for errors."""
  if value is None:
    return 'null'
  name = type(value).__name__
  text = '' if isinstance(value, dict | list) else f' {value!r}'
  return f'{name}{text}' if len(text) <= 40 else name


def _has_type(value: Any, expected: tuple[type, ...]) -> bool:
  if isinstance(value, bool):
    return bool in expected
  if isinstance(value, int) and float in expected:
    return True
  return isinstance(value, expected)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    ((twice, _),) = counts.most_common(1)
    raise ValueError(f'duplicate key {twice[:80]!r}')
  return value


def _integer(text: str) -> int:
  if len(text) > _MOST_DIGITS:
    raise ValueError(f'a number of {len(text)} digits')
  return int(text)


def _float(text: str) -> float:
  value = float(text)
  if value - value:  # inf - inf is NaN.
    raise ValueError(f'{text[:40]} is outside the range of a number')
  return value


def _constant(text: str) -> NoReturn:
  raise ValueError(f'{text} is not a JSON number')


class _Decoder(json.JSONDecoder):
  """A strict JSON decoder: no extensions, no duplicate keys."""

  def __init__(self, constant: Callable[[str], float] = _constant) -> None:
    super().__init__(
      object_pairs_hook=_object,
      parse_int=_integer,
      parse_float=_float,
      parse_constant=constant,
    )

  def decode(self, text: str, *args: Any) -> Any:
    if text.startswith('\ufeff'):
      raise json.JSONDecodeError('a byte order mark', text, 0)
    value = super().decode(text, *args)
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_LEVELS):
      level = [
        item
        for parent in level
        for item in (parent.values() if isinstance(parent, dict) else parent)
        if isinstance(item, dict | list)
      ]
      if not level:
        return value
    raise RecursionError


_DECODER = _Decoder()
_LENIENT_DECODER = _Decoder(float)


def differences(
  found: Any,
  wanted: Any,
  *,
  ignored: Collection[str] = (),
  name: str = '',
  have: str = 'the run has',
  want: str = 'the config says',
) -> list[str]:
  """Returns a line for each leaf in which two nested descriptions differ.

  Args:
    found: a stored description: nested dicts and lists, as read from JSON.
    wanted: the current description; a tuple equals a list of the same items.
    ignored: keys, at any depth, that may differ.
    name: prefix of the key names.
    have: introduces the value of `found` in a line.
    want: introduces the value of `wanted` in a line.
  """
  if isinstance(found, dict) and isinstance(wanted, dict):
    return [
      line
      for key in sorted(found.keys() | wanted.keys())
      if key not in ignored
      for line in differences(
        found.get(key),
        wanted.get(key),
        ignored=ignored,
        name=f'{name}.{key}' if name else key,
        have=have,
        want=want,
      )
    ]
  found, wanted = (
    list(x) if isinstance(x, tuple) else x for x in (found, wanted)
  )
  if found == wanted:
    return []
  left, right = ('nothing' if x is None else repr(x) for x in (found, wanted))
  return [f'  {name}: {have} {left}, {want} {right}']


def upload_folder(
  source: str | os.PathLike[str],
  target: pathlib.Path,
  order: Callable[[str], int] = lambda _: 0,
  before: Callable[[str], None] = lambda _: None,
) -> None:
  """Copies all files of a local folder into a bucket, one after the other.

  Args:
    source: the local folder.
    target: the folder in the bucket.
    order: function from a file's relative path; files with greater values are
      copied later.
    before: called with the relative path of each file before it is copied.
  """
  assert isinstance(target, storage.BucketPath), target
  names = sorted(
    path.relative_to(source).as_posix()
    for path in pathlib.Path(source).rglob('*')
    if path.is_file()
  )
  for name in sorted(names, key=order):
    before(name)
    place = target / name
    place.upload(pathlib.Path(source) / name)


def move_folder(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a folder; `target` must not exist."""
  if isinstance(folder, storage.BucketPath):
    assert isinstance(target, storage.BucketPath), target
    folder.move_to(target)
    return
  target.parent.mkdir(exist_ok=True)
  folder.rename(target)


def remove_folder(folder: pathlib.Path) -> None:
  """Removes a folder with its content, if it exists."""
  if isinstance(folder, storage.BucketPath):
    folder.rmtree()
  else:
    shutil.rmtree(folder, ignore_errors=True)


def nearest_existing(folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder, or its nearest existing ancestor."""
  folder = folder.absolute()
  return next(path for path in (folder, *folder.parents) if path.exists())


def folder(path: str, name: str) -> pathlib.Path:
  """Validates a folder given by the user; it need not exist.

  Args:
    path: the folder, local or in a bucket.
    name: name of the setting, for errors.

  Raises:
    ValueError: if `path` is empty or a file, or its bucket cannot be opened.
  """
  if storage.scheme(path) is None:
    return local_folder(path, name)
  storage.check(path, name)
  return storage.of(path)


def local_folder(path: str, name: str) -> pathlib.Path:
  """Validates a folder that must be local; it need not exist.

  Args:
    path: the folder.
    name: name of the setting, for errors.

  Raises:
    ValueError: if `path` is empty, in a bucket, or a file.
  """
  if not str(path):
    raise ValueError(f'{name} is empty; give a folder.')
  storage.check_local(**{name: path})
  found = pathlib.Path(path)
  for each in (found, *found.parents):
    if each.exists() and not each.is_dir():
      raise ValueError(f'{name}={path}: {each} is a file; give a folder.')
  return found
