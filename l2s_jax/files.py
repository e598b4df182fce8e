# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and what differs between them."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Collection, Iterator
from typing import IO, Any


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


def differences(
  found: Any, wanted: Any, *, ignored: Collection[str] = (), name: str = ''
) -> list[str]:
  """Returns a line for each value that the run and the config have not alike.

  Args:
    found: what JSON has kept of a description: nested dicts and lists.
    wanted: the description now; a tuple equals the list of its items.
    ignored: keys, at any depth, that may differ.
    name: of the whole, in front of its keys.
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
      )
    ]
  found, wanted = (
    list(x) if isinstance(x, tuple) else x for x in (found, wanted)
  )
  if found == wanted:
    return []
  have, want = ('nothing' if x is None else repr(x) for x in (found, wanted))
  return [f'  {name}: the run has {have}, the config says {want}']
