# SPDX-License-Identifier: Apache-2.0
"""The format of what the package writes about its own folders, and older ones.

Seven files carry a `format_version`, the same number for all: `model.json` of a
run, `weights.json` of a converted folder, `settings.json` of an inference,
`distilled.json` of answers to train on, `cache.json` of a token cache,
`features.json` beside it (and the plans from which these come) and
`manifest.json` of an export. A file of an
older format is brought up to this one as it is read; nobody else knows of older
formats.

A new field of a config, or of a run's system (`runs._LATER`), needs no new
version: where it is absent it has its default, which must mean what was done
before. Anything else that changes does:
add 1 to `FORMAT_VERSION`, and to `MIGRATIONS` the function that makes a
description of the version before one of the new version. `tests/kept_runs` has
folders of older versions.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import l2s_jax
from l2s_jax.runtime import files, integrity

FORMAT_VERSION = 2
RUN = 'model.json'
CONVERTED = 'weights.json'
ANSWERS = 'settings.json'
DISTILLED = 'distilled.json'
CACHE = 'cache.json'
FEATURES = 'features.json'
EXPORT = 'manifest.json'

Description = dict[str, Any]
# The keys that an object may have; where the value is a mapping, those of the
# object that is its value.
Known = Mapping[str, Any]


def _to_2(kind: str, description: Description) -> Description:
  """Says that it is not known which version wrote a file."""
  del kind
  return description | {'written_by': None}


# From the version to the next; each takes RUN, CONVERTED, ANSWERS, DISTILLED,
# CACHE, FEATURES or EXPORT, and what such a file holds.
MIGRATIONS: dict[int, Callable[[str, Description], Description]] = {1: _to_2}


def stamp() -> Description:
  """Returns what a file says of its format."""
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
  """Returns a description in the format of this version.

  Args:
    kind: RUN, CONVERTED, ANSWERS, DISTILLED, CACHE, FEATURES or EXPORT.
    description: what the file holds.
    path: of the file, for errors.
    remedy: for one that is broken, as `files.read_json` takes it.

  Raises:
    ValueError: if a newer version wrote it, or it does not say its version.
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
  """Returns what a file with a digest holds, in the format of this version.

  Args:
    kind: CACHE, FEATURES or EXPORT.
    path: of the file.
    keys: that it must have, as `files.check_keys` takes them.
    known: from what it holds to what it may hold.
    remedy: for one that is broken, as `files.read_json` takes it.

  Raises:
    ValueError: if it is damaged, a newer version wrote it, or it has what this
      version does not know.
  """
  content = files.read_json(path, remedy=remedy)
  found = migrate(kind, content, path, remedy=remedy)
  files.check_keys(found, path, keys=keys, remedy=remedy)
  if integrity.unseal(content) is None:
    raise ValueError(f'{path} is not as it was written; {remedy}')
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
  """Refuses fields that this version does not know, at any level.

  A field that is passed over would be a setting without effect.

  Args:
    description: in the format of this version.
    known: what it may hold.
    path: of the file, for errors.
    remedy: for one that is broken, as `files.read_json` takes it.

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
  """Returns a description whose objects have defaults for absent fields.

  Args:
    description: in the format of this version.
    defaults: by the key of an object in it, those of its fields; an object that
      `description` lacks as a whole stays absent.
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
    return 'an l2s_jax that does not say its version'
  return f'l2s_jax {" ".join(version.split())[:40]}'


def _unknown(
  description: Mapping[str, Any], known: Known, prefix: str = ''
) -> list[str]:
  """Returns the names of the fields that are not known."""
  names = []
  for key, value in sorted(description.items()):
    if key not in known:
      names.append(' '.join(f'{prefix}{key}'.split())[:80])
    elif isinstance(known[key], Mapping) and isinstance(value, Mapping):
      names += _unknown(value, known[key], f'{prefix}{key}.')
  return names
