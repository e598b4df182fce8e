# SPDX-License-Identifier: Apache-2.0
"""Spoils files of caches, bundles and checkpoints, which have digests.

Each case ends in one sentence, or is read as before. `fuzz` has the command;
`damage` damages every file in turn.
"""

import contextlib
import functools
import io
import json
import pathlib
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from faults import damage, folders, fuzz_files, mutate
from l2s_jax.data.cached import cache_format, feature_format

_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def _read_cache(folder: pathlib.Path) -> dict[str, Any]:
  """Returns all records, texts and states of a cache."""
  cache = cache_format.open_cache(folder / 'cache')
  features = feature_format.open_features(cache)
  found: dict[str, Any] = {}
  for name in cache.tasks:
    tokens = cache.split(name, 'train')
    states = features.split(name, 'train')
    numbers = range(len(tokens))
    records = tokens.read(numbers)
    found[name] = {
      'ids': [cache_format.decode_ids(r, tokens.dtype) for r in records],
      'texts': [cache_format.decode_texts(r, tokens.dtype) for r in records],
      'lengths': tokens.lengths_of(numbers),
      'states': [
        np.asarray(each.rows, np.float32) for each in states.states(numbers)
      ],
    }
  return found


# Files of a family, by patterns, and what reads them.
_FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[pathlib.Path], Any]]] = {
  'cache.json': (('cache/cache.json',), _read_cache),
  'features.json': (('cache/features.json',), _read_cache),
  'indexes of a cache': (('cache/**/*.index.npy',), _read_cache),
  'shards of a cache': (('cache/**/*.array_record',), _read_cache),
  'manifest of a bundle': (('bundle/manifest.json',), folders.read_bundle),
  'files of a bundle': (('bundle/**/*',), folders.read_bundle),
  'metadata of a checkpoint': (
    (
      f'run/checkpoints/{folders.STEPS[-1]}/**/_*',
      f'run/checkpoints/{folders.STEPS[-1]}/**/manifest.ocdbt',
      f'run/checkpoints/{folders.STEPS[-1]}/**/*.json',
      f'run/checkpoints/{folders.STEPS[-1]}/**/d/*',
    ),
    folders.read,
  ),
}


@functools.cache
def _good() -> pathlib.Path:
  _SCRATCH.append(tempfile.TemporaryDirectory())
  folder = pathlib.Path(_SCRATCH[-1].name) / 'good'
  with contextlib.redirect_stdout(io.StringIO()):
    folders.make(folder, ('cache', 'bundle'))
  return folder


@contextlib.contextmanager
def _spoilt(path: pathlib.Path, rng: random.Random) -> Iterator[None]:
  content = path.read_bytes()
  try:
    json.loads(content)
    spoilt = mutate.mutate_json_file(content, rng)
  except ValueError:
    spoilt = mutate.mutate_bytes(content, rng)
  try:
    path.write_bytes(spoilt)
    yield
  finally:
    path.write_bytes(content)


def _older(folder: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> Any:
  """Returns what is read without the newest checkpoint."""
  newest = folder / 'run' / 'checkpoints' / str(folders.STEPS[-1])
  aside = newest.rename(folder / 'aside')
  try:
    return read(folder)
  finally:
    aside.rename(newest)


def _fuzz(name: str, *, seed: int, count: int) -> fuzz_files.Result:
  patterns, read = _FAMILIES[name]
  folder = _good()
  expected = read(folder)
  older = _older(folder, read) if read is folders.read else None
  paths = sorted(
    path for p in patterns for path in folder.glob(p) if path.is_file()
  )

  result = fuzz_files.Result()
  kinds: list[str] = []

  def check(path: pathlib.Path) -> None:
    file = path.relative_to(folder)
    kind, words = damage.outcome(read, folder, file, expected, older)
    assert kind in ('equal', 'older', 'refused', 'unnamed'), f'{kind}: {words}'
    kinds.append(kind)

  for number in range(count):
    rng = random.Random(f'{name} {seed} {number}')
    path = paths[number % len(paths)]
    with _spoilt(path, rng):
      label = f'{name} {seed} {number} ({path.relative_to(folder)})'
      fuzz_files.run(result, label, functools.partial(check, path))
  result.num_refused = kinds.count('refused') + kinds.count('unnamed')
  result.num_read -= result.num_refused
  return result


def families() -> dict[str, Callable[..., fuzz_files.Result]]:
  """Returns what runs the cases of each family, by name."""
  return {name: functools.partial(_fuzz, name) for name in _FAMILIES}
