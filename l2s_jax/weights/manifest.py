# SPDX-License-Identifier: Apache-2.0
"""`manifest.json` of an export: its files with their sizes and SHA-256.

The manifest is written last. Before an exported folder is read, its files are
compared with the manifest: names, sizes and SHA-256 must match, and no other
file may be present. Nothing in the folder is executed.
"""

import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from l2s_jax.runtime import files, integrity, storage
from l2s_jax.weights import run_format

FILE = run_format.EXPORT
BUNDLE = 'bundle'
_REMEDY = 'export again, or copy the whole folder again from the original.'
_KEYS: dict[str, Any] = {
  'format_version': int,
  'form': str,
  'files': dict,
  'model': dict,
  integrity.DIGEST: str,
}
_FILE_KEYS = {'bytes', 'sha256'}


def is_export(folder: str | pathlib.Path, form: str) -> bool:
  """Returns whether a folder holds an export of a form.

  A manifest that cannot be parsed, or has lost its form, counts as an export of
  any form; `read` then reports the error. A `manifest.json` of another program
  does not count.

  Args:
    folder: the folder to check.
    form: the export form, such as 'bundle'.
  """
  path = storage.of(folder) / FILE
  if not path.is_file():
    return False
  try:
    content = files.read_json(path, remedy=_REMEDY)
  except ValueError:
    return True
  if 'form' not in content and integrity.DIGEST not in content:
    return False
  return content.get('form', form) == form


def form_of(folder: str | pathlib.Path) -> str | None:
  """Returns the form of an export; of other folders None.

  Raises:
    ValueError: if there is a manifest that cannot be read.
  """
  path = storage.of(folder) / FILE
  if not path.is_file():
    return None
  content = files.read_json(path, remedy=_REMEDY)
  form = content.get('form')
  is_ours = _KEYS.keys() <= content.keys() and isinstance(form, str)
  return form if is_ours else None


def write(
  folder: pathlib.Path, form: str, model: Mapping[str, Any], **facts: Any
) -> None:
  """Writes the manifest of a folder. All other files must be complete.

  Args:
    folder: the export.
    form: the export form: 'bundle', 'hf', ...
    model: description of the model in this form, JSON-serializable.
    **facts: information for people, such as the license or a usage example.
  """
  files.write_json(
    folder / FILE,
    integrity.seal(
      {
        **run_format.stamp(),
        'form': form,
        'model': model,
        'facts': facts,
        'files': {
          name: {'bytes': path.stat().st_size, 'sha256': _hashed(path)}
          for name, path in _list(folder).items()
        },
      }
    ),
  )


def read(folder: str | pathlib.Path, form: str) -> dict[str, Any]:
  """Reads and validates the manifest of an export.

  Names and sizes are always compared; SHA-256 hashes only if
  `integrity.verification` is on (`VERIFY`), once per
  process.

  Args:
    folder: the export.
    form: the required export form.

  Returns:
    The content of the manifest.

  Raises:
    FileNotFoundError: if the manifest or a listed file is missing.
    ValueError: if the manifest is damaged, is of another form, or was written
      by a newer version; or if a file was changed, is not listed, or lies
      outside the folder.
  """
  folder = storage.of(folder)
  path = folder / FILE
  content = run_format.read_sealed(
    FILE,
    path,
    keys=_KEYS,
    known=lambda found: dict.fromkeys((*_KEYS, 'written_by', 'facts')),
    remedy=_REMEDY,
  )
  if content['form'] != form:
    raise ValueError(
      f'{path} has the form {str(content["form"])[:40]!r}, expected {form!r}. '
      f'Export the model with --to={form}.'
    )
  _check_files(folder, path, content['files'])
  return content


def _check_files(
  folder: pathlib.Path, manifest: pathlib.Path, listed: Mapping[str, Any]
) -> None:
  for name, entry in listed.items():
    if not _is_inside(name):
      raise ValueError(
        f'{manifest} lists {name[:200]!r}, which is not a path inside the '
        f'folder. Do not use the folder; {_REMEDY}'
      )
    if not isinstance(entry, dict) or entry.keys() != _FILE_KEYS:
      raise ValueError(
        f'{manifest} lacks size or hash of {name[:200]!r}. '
        f'{_REMEDY.capitalize()}'
      )
  found = _list(folder)
  missing = sorted(listed.keys() - found.keys())
  if missing:
    raise FileNotFoundError(
      f'{folder / missing[0]} is missing: {manifest} lists it. '
      f'{_REMEDY.capitalize()}'
    )
  others = sorted(found.keys() - listed.keys())
  if others:
    raise ValueError(
      f'{folder / others[0]} is not listed in {manifest}. Remove it, or '
      f'{_REMEDY}'
    )
  for name, path in found.items():
    size = path.stat().st_size
    if size != listed[name]['bytes']:
      raise ValueError(
        f'{path} has {size} bytes, but {manifest} lists '
        f'{str(listed[name]["bytes"])[:20]}. {_REMEDY.capitalize()}'
      )
    if integrity.verification() and _hashed(path) != listed[name]['sha256']:
      raise ValueError(
        f'{path} was changed after it was written: its SHA-256 does not match '
        f'{manifest}. {_REMEDY.capitalize()}'
      )


def _is_inside(name: str) -> bool:
  path = pathlib.PurePosixPath(name)
  return (
    bool(name)
    and '\\' not in name
    and '\0' not in name
    and not path.is_absolute()
    and '..' not in path.parts
    and str(path) == name
  )


def _list(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns all files of a folder except the manifest, by relative path.

  Raises:
    ValueError: if one of them is a symbolic link.
  """
  found = {}
  for path in sorted(folder.rglob('*')):
    if path.is_symlink():
      raise ValueError(
        f'{path} is a symbolic link, which an export must not contain, since '
        f'it may point outside the folder. {_REMEDY.capitalize()}'
      )
    if path.is_file() and path != folder / FILE:
      found[path.relative_to(folder).as_posix()] = path
  return found


def _hashed(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, read once as long as it stays as it is."""
  stat = path.stat()
  return _sha256(
    path.absolute(),
    (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns),
  )


@functools.lru_cache(maxsize=4096)
def _sha256(path: pathlib.Path, version: tuple[int, ...]) -> str:
  del version
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
