# SPDX-License-Identifier: Apache-2.0
"""Puts faults into the numeric core, one at a time; the tests must see each.

    PYTHONPATH=.:tests python -m faults.numeric [--only=NAME ...] [--jobs=1]

A fault is a snippet that one file of the package has once, and what stands in
its place (`numeric_faults*.py`); the file is found by the snippet. The tree is
copied, the fault put in, and the tests named beside it are run as the short run
has them, up to the first that fails. Shapes are not checked here, which takes
longer and sees no less.

Prints a row for each fault; ends with 1 if one was not seen.
"""

import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import tempfile

from faults import (
  numeric_faults,
  numeric_faults_of_distillation,
  numeric_faults_of_steps,
)

ROOT = pathlib.Path(__file__).parents[2]
FAULTS = (
  *numeric_faults.FAULTS,
  *numeric_faults_of_steps.FAULTS,
  *numeric_faults_of_distillation.FAULTS,
)
COPIED = ('l2s_jax', 'tests', 'gin_configs', 'launch', 'docs', 'pyproject.toml')
TIMEOUT_SECS = 600
# What tests import and faults do not change: imported once, before forking.
_PRELOADED = (
  'beartype',
  'flax.linen',
  'jax',
  'jaxtyping',
  'optax',
  'orbax.checkpoint',
  'pytest',
  'tokenizers',
)


def find(fault: numeric_faults.Fault, root: pathlib.Path) -> pathlib.Path:
  """Returns the one file of the package that has the fault's snippet once.

  Raises:
    ValueError: if no file has it, or more than one place.
  """
  places = [
    path
    for path in sorted((root / 'l2s_jax').rglob('*.py'))
    for _ in range(path.read_text(encoding='utf-8').count(fault.snippet))
  ]
  if len(places) != 1:
    names = ', '.join(str(path.relative_to(root)) for path in places) or 'none'
    raise ValueError(
      f'fault {fault.name}: expected its snippet at one place, found {names}; '
      f'change it in faults/numeric_faults*.py:\n{fault.snippet}'
    )
  return places[0]


def put_in(fault: numeric_faults.Fault, root: pathlib.Path) -> pathlib.Path:
  """Writes the fault into a tree; returns the file that was changed."""
  path = find(fault, root)
  source = path.read_text(encoding='utf-8')
  path.write_text(
    source.replace(fault.snippet, fault.replacement), encoding='utf-8'
  )
  return path


def _copy(root: pathlib.Path) -> None:
  for name in COPIED:
    source = ROOT / name
    if source.is_dir():
      shutil.copytree(source, root / name)
    else:
      shutil.copy2(source, root / name)


def _test(root: pathlib.Path, fault: numeric_faults.Fault, log: str) -> None:
  """Runs the fault's tests in this process, which is forked for it."""
  out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(out, 1)
  os.dup2(out, 2)
  os.chdir(root)
  for name in [n for n in sys.modules if n.split('.')[0] in ('l2s_jax',)]:
    del sys.modules[name]
  mine = {str(ROOT), str(ROOT / 'tests'), ''}
  sys.path[:] = [str(root), *(x for x in sys.path if x not in mine)]
  import jaxtyping
  import pytest

  jaxtyping.install_import_hook = lambda *args, **options: None
  arguments = ['-x', '-q', '-m', 'not long', '-p', 'no:cacheprovider']
  if fault.keyword:
    arguments += ['-k', fault.keyword]
  arguments += [f'tests/{name}' for name in fault.tests]
  os._exit(int(pytest.main(arguments)))


def run(fault: numeric_faults.Fault) -> tuple[str, str]:
  """Puts a fault into a copy; returns 'seen' or 'survived', and by what."""
  with tempfile.TemporaryDirectory(prefix='fault_') as name:
    folder = pathlib.Path(name)
    root = folder / 'tree'
    root.mkdir()
    _copy(root)
    put_in(fault, root)
    log = folder / 'log'
    context = multiprocessing.get_context('fork')
    process = context.Process(target=_test, args=(root, fault, str(log)))
    process.start()
    process.join(TIMEOUT_SECS)
    if process.is_alive():
      process.kill()
      process.join()
      return 'seen', f'{TIMEOUT_SECS} s were not enough'
    text = log.read_text(encoding='utf-8', errors='replace')
  if process.exitcode == 0:
    return 'survived', ''
  failed = re.search(r'^(?:FAILED|ERROR) (\S+)', text, re.MULTILINE)
  if process.exitcode != 1 or not failed:
    raise RuntimeError(
      f'fault {fault.name}: its tests could not be run:\n{text[-3000:]}'
    )
  return 'seen', failed[1].removeprefix('tests/')


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', nargs='*', default=[], help='names of faults')
  parser.add_argument('--jobs', type=int, default=1, help='at the same time')
  arguments = parser.parse_args()
  names = {fault.name for fault in FAULTS}
  if unknown := set(arguments.only) - names:
    parser.error(f'--only: {sorted(unknown)} are not among {sorted(names)}')
  chosen = [
    fault for fault in FAULTS if fault.name in (arguments.only or names)
  ]
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
  os.environ.setdefault('L2S_SHARED_DATA', str(ROOT.parent / 'shared' / 'data'))
  for name in _PRELOADED:
    importlib.import_module(name)
  print('| fault | | by |\n| --- | --- | --- |', flush=True)
  num_survived = 0
  with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
    for fault, (outcome, by) in zip(chosen, pool.map(run, chosen), strict=True):
      print(f'| {fault.name} | {outcome} | {by} |', flush=True)
      num_survived += outcome == 'survived'
  print(f'{len(chosen) - num_survived} of {len(chosen)} were seen.')
  return int(num_survived > 0)


if __name__ == '__main__':
  sys.exit(main())
