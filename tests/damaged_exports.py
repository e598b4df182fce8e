# SPDX-License-Identifier: Apache-2.0
"""Ways in which an exported folder is not as it was written."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from l2s_jax.runtime import integrity
from l2s_jax.weights import manifest

Change = Callable[[pathlib.Path], Any]


def reseal(path: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
  """Changes a manifest as somebody would who knows how it is sealed."""
  file = path / manifest.FILE
  content = json.loads(file.read_text())
  content.pop(integrity.DIGEST)
  change(content)
  file.write_text(json.dumps(integrity.seal(content)))


def listing(name: str) -> Change:
  """Lists a file that is not there."""

  def change(path):
    def add(content):
      content['files'][name] = {'bytes': 1, 'sha256': '0' * 64}

    reseal(path, add)

  return change


def linking(name: str) -> Change:
  """Puts a file or a folder elsewhere, and a link in its place."""

  def change(path):
    shutil.move(path / name, path.parent / 'elsewhere')
    (path / name).symlink_to(path.parent / 'elsewhere')

  return change


def flipping(name: str) -> Change:
  """Changes a bit, and not the size."""

  def change(path):
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)

  return change


def cutting(name: str) -> Change:
  """Cuts a file short."""

  def change(path):
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])

  return change


def of(name: str) -> dict[str, tuple[Change, str]]:
  """Returns changes, by their names, with what a refusal has to say.

  Args:
    name: of a file in the folder.
  """
  return {
    'cut short': (
      cutting(name),
      f'{name} has .* bytes, (and|but) .*manifest.json',
    ),
    'altered': (flipping(name), f'{name} was changed after'),
    'missing': (
      lambda path: (path / name).unlink(),
      f'{name} is missing|lists .{name}., which is not a file',
    ),
    'more': (
      lambda path: (path / 'numpy.py').write_text(
        "open('was_run', 'w').write('x')"
      ),
      'numpy.py is not listed in .*manifest.json',
    ),
    'link': (linking(name), f'{name} is a symbolic link'),
    'outside': (listing('../outside'), r"lists '\.\./outside', which is"),
    'absolute': (listing('/etc/passwd'), "lists '/etc/passwd', which is"),
    'newer': (
      lambda path: reseal(path, lambda c: c.update(format_version=99)),
      'has format version 99',
    ),
    'edited': (
      lambda path: (path / manifest.FILE).write_text(
        (path / manifest.FILE).read_text().replace('sha256', 'sha257', 1)
      ),
      'manifest.json (was changed|is no|has no size and hash)',
    ),
    'torn': (
      lambda path: (path / manifest.FILE).write_text('{'),
      'manifest.json (was changed|is no)',
    ),
  }
