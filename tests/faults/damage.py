# SPDX-License-Identifier: Apache-2.0
"""Damages each file that a user keeps, and reads on.

    PYTHONPATH=.:tests python -m faults.damage [--flips=20] [--seed=0]

A file is cut in half, emptied, deleted, or has one bit flipped. Then it is read
as training that goes on, inference, conversion, a restarted `infer` or a report
read it; `folders.READERS` lists them. What comes of it is one of

    equal     the same numbers as without the damage (which may have been said)
    older     those of the older step, and both steps were named
    fewer     those of the undamaged lines of a log, or of other evaluations;
              the file was named
    refused   one sentence that names the file, or the folder of its parts
    unnamed   one sentence that does not: must never be
    wrong     other numbers without a word: must never be
    crashed   any other exception: must never be

`--counts=FILE` adds the outcomes to those of earlier calls, with other readers,
say. `--docs=docs/reliability.md` puts the tables into that page.
"""

import argparse
import collections
import contextlib
import io
import json
import logging
import pathlib
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from faults import folders
from l2s_jax import __main__ as command_line

KINDS = {
  'cut': 'truncated',
  'empty': 'emptied',
  'delete': 'deleted',
  'flip': 'one bit flipped',
}
OUTCOMES = ('equal', 'older', 'fewer', 'refused', 'unnamed', 'wrong', 'crashed')
BAD = ('unnamed', 'wrong', 'crashed')
# Readers that take the older step without being asked to.
_FALL_BACK = (folders.resume, folders.read, folders.to_hf)
# Parts of file names that differ from run to run.
_NUMBERS = re.compile(r'(?<![a-z])([0-9a-f]{32}|\d+)(?![a-z])')
# Outcomes by what is damaged and how, and by what reads it.
Counts = dict[str, dict[str, collections.Counter[str]]]


def damage(path: pathlib.Path, kind: str, rng: random.Random) -> None:
  """Damages one file."""
  content = bytearray(path.read_bytes())
  if kind == 'delete':
    path.unlink()
    return
  if kind == 'cut':
    content = content[: len(content) // 2]
  elif kind == 'empty':
    content = bytearray()
  elif content:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def same(a: Any, b: Any) -> bool:
  """Returns whether two trees hold the same, bit for bit."""
  leaves, structure = jax.tree.flatten(a)
  others, other_structure = jax.tree.flatten(b)
  return str(structure) == str(other_structure) and all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(leaves, others, strict=True)
  )


def outcome(
  reader: Callable[[pathlib.Path], Any],
  folder: pathlib.Path,
  file: pathlib.Path,
  expected: Any,
  older: Any,
) -> tuple[str, str]:
  """Reads a damaged folder; returns what came of it, and what was said.

  Args:
    reader: of `folders.READERS`.
    folder: all folders, with damage.
    file: the damaged file, relative to `folder`.
    expected: what is read without damage.
    older: what is read if there is the older step only; None: the same.
  """
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      found = reader(folder)
  except (ValueError, FileNotFoundError) as error:
    # By the rule that makes a sentence of it on the command line.
    if not command_line._is_deliberate(error):
      return 'crashed', f'{type(error).__name__}: {error}'
    words = str(error)
    return ('refused' if _names(words, file) else 'unnamed'), words
  # What is counted is what nobody foresaw.
  except Exception as error:
    return 'crashed', f'{type(error).__name__}: {error}'
  if same(found, expected):
    return 'equal', said.getvalue()
  if older is not None and same(found, older):
    named = all(
      f'checkpoints/{s}' in said.getvalue() for s in folders.STEPS[1:]
    )
    return ('older' if named else 'wrong'), said.getvalue()
  if reader is folders.read_report and _is_part(found, expected):
    named = file.name in said.getvalue()
    return ('fewer' if named else 'wrong'), said.getvalue()
  return 'wrong', said.getvalue()


def _names(words: str, file: pathlib.Path) -> bool:
  """Returns whether a message names a file, or the folder of its parts."""
  places = [file, *file.parents[:-1]]
  if file.parts[0] == 'run':  # The folder itself says too little.
    places.remove(pathlib.Path('run'))
  return file.name in words or any(str(place) in words for place in places)


def _is_part(found: dict[str, Any], expected: dict[str, Any]) -> bool:
  """Returns whether a report has nothing that it lacks without damage."""
  return all(
    value.items() <= expected['log'].get(step, {}).items()
    for step, value in found['log'].items()
  ) and all(
    expected[part].get(key) == value
    for part in ('evaluations', 'differences')
    for key, value in found[part].items()
  )


def trial(
  good: pathlib.Path,
  place: pathlib.Path,
  file: pathlib.Path,
  kind: str,
  rng: random.Random,
) -> pathlib.Path:
  """Returns a copy of a good folder with one file of it damaged."""
  shutil.rmtree(place, ignore_errors=True)
  shutil.copytree(good, place)
  # The run knows its LLM by its path.
  model = place / 'run' / 'model.json'
  model.write_text(model.read_text().replace(str(good), str(place)))
  damage(place / file, kind, rng)
  return place


def run(
  num_flips: int,
  seed: int,
  readers: Iterable[str] = tuple(folders.READERS),
  kinds: Iterable[str] = tuple(KINDS),
  every: int = 1,
  only: str = '*',
) -> tuple[Counts, list[str]]:
  """Returns counts of outcomes, and a line for each bad one.

  Args:
    num_flips: places to flip a bit at, for each file.
    seed: of these.
    readers: some of `folders.READERS`.
    kinds: some of `KINDS`.
    every: damages every so many files only.
    only: damages files only whose path matches this pattern.
  """
  rng = random.Random(seed)
  counts: Counts = {}
  bad: list[str] = []
  with tempfile.TemporaryDirectory() as scratch:
    good, place = pathlib.Path(scratch, 'good'), pathlib.Path(scratch, 'bad')
    folders.make(good, {folders.READERS[name][0] for name in readers})
    for name in readers:
      damaged, reader = folders.READERS[name]
      expected, older = _expected(good, place, reader)
      files = sorted(
        path.relative_to(good)
        for path in (good / damaged).rglob('*')
        if path.is_file() and path.match(only)
      )
      for file in files[::every]:
        for kind in kinds:
          for _ in range(num_flips if kind == 'flip' else 1):
            folder = trial(good, place, file, kind, rng)
            result, words = outcome(reader, folder, file, expected, older)
            key = f'{label(file)}|{kind}'
            of_reader = counts.setdefault(key, {})
            of_reader.setdefault(name, collections.Counter())[result] += 1
            if result in BAD:
              bad.append(f'{name}: {file} {kind}: {result} {words[:300]!r}')
              print(bad[-1], file=sys.stderr)
      print(f'{name}: {len(files[::every])} files', file=sys.stderr)
  return counts, bad


def label(file: pathlib.Path) -> str:
  """Returns the name of a file with its numbers and hashes left out."""
  parts = [_NUMBERS.sub('*', part) for part in file.parts]
  return '/'.join(parts).replace('*-of-*', '*')


def _expected(
  good: pathlib.Path,
  place: pathlib.Path,
  reader: Callable[[pathlib.Path], Any],
) -> tuple[Any, Any]:
  """Returns what is read of a good folder, and of its older step."""
  results: list[Any] = []
  for steps in (folders.STEPS, folders.STEPS[:1]):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good, place)
    model = place / 'run' / 'model.json'
    model.write_text(model.read_text().replace(str(good), str(place)))
    for step in set(folders.STEPS) - set(steps):
      shutil.rmtree(place / 'run' / 'checkpoints' / str(step))
      (place / 'run' / 'best.json').unlink()
    if steps != folders.STEPS and reader not in _FALL_BACK:
      results.append(None)
    else:
      results.append(reader(place))
  return results[0], results[1]


def by_reader(counts: Counts) -> str:
  """Returns the outcomes by what read, as a table in Markdown."""
  found: dict[str, collections.Counter[str]] = {}
  for of_reader in counts.values():
    for name, counter in of_reader.items():
      found.setdefault(name, collections.Counter()).update(counter)
  found['all'] = sum(found.values(), collections.Counter())
  lines = [
    f'| read as | trials | {" | ".join(OUTCOMES)} |',
    '| --- |' + ' ---: |' * (len(OUTCOMES) + 1),
  ]
  for name, counter in found.items():
    cells = ' | '.join(str(counter[n]) for n in OUTCOMES)
    lines.append(f'| {name} | {counter.total()} | {cells} |')
  return '\n'.join(lines)


def by_file(counts: Counts) -> str:
  """Returns the outcomes by file and damage, as a table in Markdown."""
  found: dict[tuple[str, str], collections.Counter[str]] = {}
  for key, of_reader in counts.items():
    file, _, kind = key.partition('|')
    counter = found.setdefault((file, kind), collections.Counter())
    counter.update(sum(of_reader.values(), collections.Counter()))
  files = sorted({file for file, _ in found})
  lines = [
    f'| file | {" | ".join(KINDS.values())} |',
    '| --- |' + ' --- |' * len(KINDS),
  ]
  for file in files:
    cells = [
      ', '.join(
        f'{found[file, kind][name]} {name}'
        for name in OUTCOMES
        if (file, kind) in found and found[file, kind][name]
      )
      for kind in KINDS
    ]
    lines.append(f'| `{file}` | {" | ".join(cells)} |')
  return '\n'.join(lines)


def add_counts(path: pathlib.Path, counts: Counts) -> Counts:
  """Adds outcomes to those in a file; returns the sum."""
  found = json.loads(path.read_text()) if path.exists() else {}
  for key, of_reader in counts.items():
    old = found.setdefault(key, {})
    for name, counter in of_reader.items():
      old[name] = counter + collections.Counter(old.get(name, {}))
  path.write_text(json.dumps(found, indent=1))
  return {
    key: {name: collections.Counter(x) for name, x in of_reader.items()}
    for key, of_reader in found.items()
  }


def write_tables(page: pathlib.Path, tables: dict[str, str]) -> None:
  """Puts tables into a page, each between the comments with its name."""
  text = page.read_text()
  for name, content in tables.items():
    begin, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    assert rest and after, f'{page} has no {begin} ... {end}'
    text = f'{before}{begin}\n\n{content}\n\n{end}{after}'
  page.write_text(text)


def main() -> int:
  """Damages all, prints tables, and returns 1 if a damage was not found."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--flips', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--readers', nargs='*', default=tuple(folders.READERS))
  parser.add_argument('--every', type=int, default=1)
  parser.add_argument('--only', default='*')
  parser.add_argument('--counts', type=pathlib.Path)
  parser.add_argument('--docs', type=pathlib.Path)
  args = parser.parse_args()
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  counts, problems = run(
    args.flips, args.seed, args.readers, every=args.every, only=args.only
  )
  if args.counts:
    counts = add_counts(args.counts, counts)
  print('\n'.join(problems))
  print(by_file(counts), by_reader(counts), sep='\n\n')
  if args.docs:
    tables = {
      'damage by file': by_file(counts),
      'damage by reader': by_reader(counts),
    }
    write_tables(args.docs, tables)
  return int(bool(problems))


if __name__ == '__main__':
  sys.exit(main())
