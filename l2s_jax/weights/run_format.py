# SPDX-License-Identifier: Apache-2.0
"""Versions of the package's own JSON files, and their migrations.

Seven files carry a `format_version`, one number for all: `model.json` of a run,
`weights.json` of a converted folder, `settings.json` of an inference output,
`distilled.json` of a distilled data set, `cache.json` of a token cache,
`features.json` of cached LLM states (and of the plans for them), and
`manifest.json` of an export. A file of an older version is migrated when it is
read; the rest of the package handles the current version only.

A new field of a config, or of a run's system (`runs._LATER`), needs no new
version: an absent field takes its default, which must mean the earlier
behavior. For any other change, increment `FORMAT_VERSION` and add to
`MIGRATIONS` the function from the previous version to the new one.
`tests/kept_runs` holds folders of older versions.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import l2s_jax
from l2s_jax.runtime import files, integrity, storage

FORMAT_VERSION = 2
RUN = 'model.json'
CONVERTED = 'weights.json'
ANSWERS = 'settings.json'
DISTILLED = 'distilled.json'
CACHE = 'cache.json'
FEATURES = 'features.json'
EXPORT = 'manifest.json'
_KINDS = {
  RUN: 'a run',
  CONVERTED: 'a converted folder',
  ANSWERS: 'a folder of answers',
  CACHE: 'a cache',
  EXPORT: 'an export',
  'config.json': 'a Hugging Face folder',
}

Description = dict[str, Any]
# Allowed keys of a JSON object. A mapping as value gives the allowed keys of
# the nested object.
Known = Mapping[str, Any]


def _to_2(kind: str, description: Description) -> Description:
  """Adds `written_by`, unknown for files of version 1."""
  del kind
  return description | {'written_by': None}


# By version: the function that migrates a file to the next version. Arguments
# are the file name (RUN, CONVERTED, ...) and the content.
MIGRATIONS: dict[int, Callable[[str, Description], Description]] = {1: _to_2}


def is_run(location: str | os.PathLike[str]) -> bool:
  """Returns whether a folder is a run's."""
  return (storage.of(location) / RUN).is_file()


def refuse_other(folder: pathlib.Path, name: str, own: str) -> None:
  """Checks that an output folder is not something else.

  Args:
    folder: the folder; it need not exist.
    name: its setting, for errors.
    own: RUN or ANSWERS, the kind of folder that it may be.

  Raises:
    ValueError: if it has the file of another kind, and not its own.
  """
  if (folder / own).is_file():
    return
  for file, kind in _KINDS.items():
    if file != own and (folder / file).is_file():
      raise ValueError(
        f'{name}={folder} is {kind}: it has {file}. Choose another folder.'
      )


def stamp() -> Description:
  """Returns the version fields of a new file."""
  return {
    'format_version': FORMAT_VERSION,
    'written_by': l2s_jax.__version__,
  }


def migrate(
  kind: str,
  description: Mapping[str, Any],
  path: str | os.PathLike[str],
  *,
  remedy: str,
) -> Description:
  """Migrates the content of a file to the current format version.

  Args:
    kind: RUN, CONVERTED, ANSWERS, DISTILLED, CACHE, FEATURES or EXPORT.
    description: the content of the file.
    path: the file, for errors.
    remedy: the fix for a damaged file, as in `files.read_json`.

  Raises:
    ValueError: if the version is missing or invalid, or newer than
      `FORMAT_VERSION`.
  """
  if 'format_version' not in description:
    raise ValueError(f'{path} lacks format_version. {_sentence(remedy)}')
  version = description['format_version']
  if not isinstance(version, int) or isinstance(version, bool) or version < 1:
    raise ValueError(
      f'{path}: format_version is {str(version)[:40]!r}; expected a whole '
      f'number from 1 to {FORMAT_VERSION}. {_sentence(remedy)}'
    )
  if version > FORMAT_VERSION:
    raise ValueError(
      f'{path} has format version {version}, written by '
      f'{_writer(description)}; this l2s_jax ({l2s_jax.__version__}) reads up '
      f'to {FORMAT_VERSION}. Update l2s_jax.'
    )
  result = dict(description)
  for older in range(version, FORMAT_VERSION):
    result = MIGRATIONS[older](kind, result) | {'format_version': older + 1}
  return result


def read_sealed(
  kind: str,
  path: str | os.PathLike[str],
  *,
  keys: files.Keys,
  known: Callable[[Description], Known],
  remedy: str,
) -> Description:
  """Reads, verifies and migrates a file that carries its own digest.

  Args:
    kind: CACHE, FEATURES or EXPORT.
    path: the file.
    keys: required keys, as in `files.check_keys`.
    known: function from the content to its allowed keys.
    remedy: the fix for a damaged file, as in `files.read_json`.

  Returns:
    The content in the current format version, without its digest.

  Raises:
    ValueError: if the file is damaged, was written by a newer version, or has
      unknown keys.
  """
  content = files.read_json(path, remedy=remedy)
  found = migrate(kind, content, path, remedy=remedy)
  files.check_keys(found, path, keys=keys, remedy=remedy)
  if integrity.unseal(content) is None:
    raise ValueError(
      f'{path} was changed after it was written: its digest does not match; '
      f'{remedy}'
    )
  del found[integrity.DIGEST]
  refuse_unknown(found, known(found), path, remedy=remedy)
  return found


def refuse_unknown(
  description: Mapping[str, Any],
  known: Known,
  path: str | os.PathLike[str],
  *,
  remedy: str,
) -> None:
  """Refuses fields unknown to this version, at any depth.

  An ignored field would be a setting without effect.

  Args:
    description: content in the current format version.
    known: its allowed keys.
    path: the file, for errors.
    remedy: the fix for a damaged file, as in `files.read_json`.

  Raises:
    ValueError: names the fields and the version that wrote them.
  """
  unknown = _unknown(description, known)
  if unknown:
    raise ValueError(
      f'{path} has {", ".join(unknown)[:200]}, which this l2s_jax '
      f'({l2s_jax.__version__}) does not know; {_writer(description)} wrote '
      f'it. Update l2s_jax, or {remedy}'
    )


def with_defaults(
  description: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Description:
  """Fills in defaults for absent fields of nested objects.

  Args:
    description: content in the current format version.
    defaults: the default fields by the key of a nested object. An object absent
      from `description` stays absent.

  Returns:
    A new description.
  """
  return dict(description) | {
    key: {**default, **description[key]}
    for key, default in defaults.items()
    if isinstance(description.get(key), dict)
  }


def _sentence(remedy: str) -> str:
  return remedy[:1].upper() + remedy[1:]


def _writer(description: Mapping[str, Any]) -> str:
  version = description.get('written_by')
  if not isinstance(version, str):
    return 'an unknown version of l2s_jax'
  return f'l2s_jax {" ".join(version.split())[:40]}'


def _unknown(
  description: Mapping[str, Any], known: Known, prefix: str = ''
) -> list[str]:
  """Returns the dotted names of the unknown fields."""
  names = []
  for key, value in sorted(description.items()):
    if key not in known:
      names.append(' '.join(f'{prefix}{key}'.split())[:80])
    elif isinstance(known[key], Mapping) and isinstance(value, Mapping):
      names += _unknown(value, known[key], f'{prefix}{key}.')
  return names
