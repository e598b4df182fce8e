# SPDX-License-Identifier: Apache-2.0
"""Verifies the files of this folder, using Python only.

    python verify.py

Compares all files with the sizes and SHA-256 hashes in manifest.json, and
executes none of them. Prints the first problem and exits with code 1.
"""

import os
import sys

FORMAT_VERSION = 2
_REMEDY = 'Export again, or copy the whole folder again from the original.'


def problem(folder):
  """Returns a description of the first problem of a folder, or None."""
  import hashlib
  import json

  path = os.path.join(folder, 'manifest.json')
  if os.path.islink(path):
    return f'{path} is a symbolic link. {_REMEDY}'
  try:
    with open(path, encoding='utf-8') as file:
      content = json.load(file)
    version, listed = content['format_version'], content['files']
    digest = content.pop('digest')
    entries = {name: (x['bytes'], x['sha256']) for name, x in listed.items()}
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    return f'{path} is not a valid manifest: {error!r}. {_REMEDY}'
  if version != FORMAT_VERSION:
    return (
      f'{path} has format version {version}, but this program supports '
      f'{FORMAT_VERSION}. Use the verify.py and run.py of that version.'
    )
  text = json.dumps(content, sort_keys=True)
  if hashlib.sha256(text.encode()).hexdigest() != digest:
    return f'{path} was changed after it was written. {_REMEDY}'
  found = {}
  for parent, folders, names in os.walk(folder):
    for name in (*folders, *names):
      file = os.path.join(parent, name)
      if os.path.islink(file):
        return f'{file} is a symbolic link. {_REMEDY}'
      if name in names and file != path:
        found[os.path.relpath(file, folder).replace(os.sep, '/')] = file
  for name in sorted(entries.keys() | found.keys()):
    if name not in found:
      return (
        f'{path} lists {name!r}, which is not a file in this folder. {_REMEDY}'
      )
    if name not in entries:
      return f'{found[name]} is not listed in {path}. Remove it.'
    size = os.path.getsize(found[name])
    if size != entries[name][0]:
      return (
        f'{found[name]} has {size} bytes, but {path} lists {entries[name][0]}. '
        f'{_REMEDY}'
      )
    with open(found[name], 'rb') as file:
      hasher = hashlib.file_digest(file, 'sha256')
    if hasher.hexdigest() != entries[name][1]:
      return f'{found[name]} was changed after it was written. {_REMEDY}'
  return None


if __name__ == '__main__':
  sys.exit(problem(os.path.dirname(os.path.abspath(__file__))))
