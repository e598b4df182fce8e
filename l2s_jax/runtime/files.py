# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and JSON that is what it should be.

All JSON files that the package reads, its own and others', are read here, so
that a broken one is one sentence with the file, the key and what to do.
"""

import collections
import contextlib
import json
import os
import pathlib
import types
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, Any, NoReturn

# More than any file has a reason for, and far less than Python's stack holds.
_MOST_LEVELS = 200
# tokenizer_config.json has 10^30 where it means that there is no limit.
_MOST_DIGITS = 300

Keys = Mapping[str, type | tuple[type, ...]]


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], mode: str = 'w') -> Iterator[IO[Any]]:
  """Opens a file for writing that appears when the block ends well.

  Until then it is written under another name beside its own; an exception
  leaves what stood there before.

  Args:
    path: its folder is made if absent.
    mode: 'w' for UTF-8 text, 'wb' for bytes.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  try:
    with temporary.open(
      mode, encoding='utf-8' if mode == 'w' else None
    ) as file:
      yield file
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Writes a JSON file, its keys sorted."""
  with whole(path) as file:
    file.write(json.dumps(content, indent=2, sort_keys=True) + '\n')


def read_json(
  path: str | os.PathLike[str],
  *,
  keys: Keys = types.MappingProxyType({}),
  remedy: str,
  finite: bool = True,
) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Args:
    keys: that it must have, and the types of their values. A key whose value
      may be None may be missing; a whole number is a float, too, and True is
      no number.
    remedy: what the user can do, for errors: 'download it again'.
    finite: whether NaN and Infinity are refused, which JSON does not have but
      Python writes: scores can be that.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: one sentence with the file, what is wrong with it, and the
      remedy.
  """
  try:
    content = pathlib.Path(path).read_bytes()
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
  """Returns the object in the content of a JSON file; see `read_json`."""
  if not content.strip():
    raise ValueError(f'{path} is empty, expected JSON; {remedy}')
  try:
    text = content if isinstance(content, str) else content.decode('utf-8')
    value = (_DECODER if finite else _LENIENT_DECODER).decode(text)
    if '\\u' in text:  # Half of a surrogate pair is no text.
      json.dumps(value, ensure_ascii=False).encode('utf-8')
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON ({error}); {remedy}') from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} is not JSON (byte {error.start} is not UTF-8); {remedy}'
    ) from error
  except UnicodeEncodeError as error:
    raise ValueError(
      f'{path} is not JSON (half of a surrogate pair in a text); {remedy}'
    ) from error
  except RecursionError as error:
    raise ValueError(
      f'{path} is not JSON as we read it (too many levels of brackets); '
      f'{remedy}'
    ) from error
  except ValueError as error:  # Of the functions below.
    raise ValueError(
      f'{path} is not JSON as we read it ({error}); {remedy}'
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
) -> list[dict[str, Any]]:
  """Returns the objects of a log, a line each; broken lines are left out.

  Args:
    path: of the log.
    keys: that each record must have; see `read_json`.
    say: gets a sentence for each line that is left out: the last one, which a
      kill may have torn, or one that was damaged.
  """
  records = []
  lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  for number, line in enumerate(lines, start=1):
    place = f'{path}, line {number}'
    if not line.endswith(b'\n'):
      say(f'{place}: left out {len(line)} bytes of a torn last line.')
      continue
    try:
      record = parse_json(
        line, place, keys=keys, remedy='the line is left out.', finite=False
      )
    except ValueError as error:
      say(str(error))
      continue
    records.append(record)
  return records


def check_keys(
  value: Mapping[str, Any],
  place: str | os.PathLike[str],
  *,
  keys: Keys,
  remedy: str,
) -> None:
  """Checks an object within a JSON file as `read_json` checks the whole.

  Args:
    place: the file, and where in it the object is.
    keys: see `read_json`.
    remedy: see `read_json`.
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
  """Returns what a JSON value is, for errors: its value if that is short."""
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
    raise ValueError(f'key {twice[:80]!r} stands there twice')
  return value


def _integer(text: str) -> int:
  if len(text) > _MOST_DIGITS:
    raise ValueError(f'a number of {len(text)} digits')
  return int(text)


def _float(text: str) -> float:
  value = float(text)
  if value - value:  # Infinity less infinity is not a number.
    raise ValueError(f'{text[:40]} is beyond what a number can be')
  return value


def _constant(text: str) -> NoReturn:
  raise ValueError(f'{text} is no number of JSON')


class _Decoder(json.JSONDecoder):
  """Takes what the standard has and nothing else; no key twice."""

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
  """Returns a line for each value that the run and the config have not alike.

  Args:
    found: what JSON has kept of a description: nested dicts and lists.
    wanted: the description now; a tuple equals the list of its items.
    ignored: keys, at any depth, that may differ.
    name: of the whole, in front of its keys.
    have: says where `found` is from.
    want: says where `wanted` is from.
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


def nearest_existing(folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder, or the nearest of those above it that is there."""
  folder = folder.absolute()
  return next(path for path in (folder, *folder.parents) if path.exists())


def local_folder(path: str, name: str) -> pathlib.Path:
  """Returns a folder that the user named, which need not exist yet.

  Args:
    path: as given.
    name: of the setting it came from, for the error.

  Raises:
    ValueError: if it is empty, a bucket's address or a file.
  """
  if not str(path):
    raise ValueError(f'{name} is empty; give a folder.')
  if '://' in str(path):
    raise ValueError(
      f'{name}={path}: only paths of the file system are supported; mount the '
      'bucket (such as with gcsfuse) and give the path there.'
    )
  folder = pathlib.Path(path)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'{name}={path} is a file; give a folder.')
  return folder
