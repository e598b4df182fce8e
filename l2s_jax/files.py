# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
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
