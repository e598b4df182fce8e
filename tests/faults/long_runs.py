# SPDX-License-Identifier: Apache-2.0
"""Trains for many steps and answers many lines: nothing may grow with them.

    PYTHONPATH=.:tests python -m faults.long_runs [--steps=20000]
      [--lines=300000] [--docs=docs/reliability.md]

The compilation cache is filled beforehand above its limit. `--docs` puts the
table into that page.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np

from l2s_jax.weights import saved_steps

ROOT = pathlib.Path(__file__).parents[2]
KEPT = ROOT / 'tests' / 'kept_runs' / '1'
LOG_PERIOD = 20
KEEP_CHECKPOINTS = 3
MOST_CACHE_BYTES = 4 * 2**30
_MIB = 2**20


class Watched(NamedTuple):
  """What a run has taken.

  Attributes:
    total: steps or lines.
    secs: from start to end.
    mib: resident memory at a quarter of the run, and at its end.
    mib_per_1000: its growth between, by least squares.
    compiled: programs compiled in the first quarter, and after it.
    threads: most of them in the first quarter, and after it.
    open_files: same.
  """

  total: int
  secs: float
  mib: tuple[float, float]
  mib_per_1000: float
  compiled: tuple[int, int]
  threads: tuple[int, int]
  open_files: tuple[int, int]


def watch(
  folder: pathlib.Path,
  progress: pathlib.Path,
  total: int,
  *arguments: str,
) -> Watched:
  """Runs the program.

  Args:
    folder: of the log, and of the user's caches.
    progress: the file whose lines tell how far it is.
    total: steps or lines of the whole run.
    *arguments: of the command line.

  Raises:
    RuntimeError: if the program fails.
  """
  log = folder / f'{arguments[0]}.log'
  began = time.monotonic()
  with (folder / f'{arguments[0]}.said').open('w+') as said:
    result = subprocess.run(
      [
        *(sys.executable, '-m', 'faults.watched'),
        *(str(log), str(progress), *arguments),
      ],
      cwd=ROOT,
      env=environment(folder),
      stdout=said,
      stderr=subprocess.STDOUT,
    )
    said.seek(0)
    if result.returncode:
      raise RuntimeError(said.read()[-4000:])
  records = [json.loads(line) for line in log.read_text().splitlines()]
  return summary(records, total, time.monotonic() - began)


def environment(folder: pathlib.Path) -> dict[str, str]:
  """Returns that of a user whose caches are in this folder."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
  return kept | {'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(folder)}


def summary(records: list[dict[str, int]], total: int, secs: float) -> Watched:
  """Returns what the log of `watched` says of the last three quarters."""
  progress = np.array([r['progress'] for r in records])
  done = progress / max(1, progress[-1]) * total
  mib = np.array([r['bytes'] for r in records]) / _MIB
  late = done >= done[-1] / 4
  if np.unique(done[late]).size < 3:
    raise RuntimeError('the run is too short to be measured')
  slope = np.polyfit(done[late] / 1000, mib[late], 1)[0]

  def most(name: str) -> tuple[int, int]:
    values = np.array([r[name] for r in records])
    return int(values[~late].max()), int(values[late].max())

  early, all_of_them = most('compiled')
  return Watched(
    total,
    secs,
    (float(mib[late][0]), float(mib[-1])),
    float(slope),
    (early, max(0, all_of_them - early)),
    most('threads'),
    most('open_files'),
  )


def train(folder: pathlib.Path, steps: int) -> Watched:
  """Trains a tiny LLM-to-SLM model, with evaluations and checkpoints."""
  data = folder / 'data'
  run = folder / 'run'
  return watch(
    folder,
    run / 'metrics.jsonl',
    steps,
    'train',
    f'--gin_file={data}/l2s.gin',
    f'--gin.SLM_VOCABULARY={data}/tiny.model',
    f'--gin.LLM_PATH={folder}/llm',
    f'--gin.DATA_DIR={data}',
    f'--gin.MODEL_DIR={run}',
    f'--gin.TRAIN_STEPS={steps}',
    f'--gin.EVAL_PERIOD={max(1, steps // 20)}',
    f'--gin.CHECKPOINT_PERIOD={max(1, steps // 40)}',
    f'--gin.KEEP_CHECKPOINTS={KEEP_CHECKPOINTS}',
    f'--gin.train.log_period={LOG_PERIOD}',
    '--gin.train.num_eval_examples=16',
  )


def infer(folder: pathlib.Path, lines: int) -> Watched:
  """Answers lines, which come again and again with a number."""
  texts = (folder / 'data' / 'train.en').read_text().splitlines()
  source = folder / 'in.txt'
  with source.open('w') as file:
    for number in range(lines):
      file.write(f'{texts[number % len(texts)]} {number}\n')
  return watch(
    folder,
    folder / 'answers' / 'predictions.jsonl.partial',
    lines,
    'infer',
    '--gin_file=gin_configs/runs/infer.gin',
    f'--gin.CHECKPOINT_PATH={folder}/l2s',
    f'--gin.LLM_PATH={folder}/llm',
    f'--gin.INPUT={source}',
    f'--gin.INFER_OUTPUT_DIR={folder}/answers',
    '--gin.PROMPT_LENGTH=32',
    '--gin.MAX_DECODE_LEN=4',
    '--gin.BATCH_SIZE=128',
  )


def fill_cache(folder: pathlib.Path) -> pathlib.Path:
  """Fills the compilation cache above its limit, with holes on the disk."""
  cache = folder / 'l2s_jax' / 'compiled'
  cache.mkdir(parents=True)
  for number in range(5):
    path = cache / f'old-{number}-cache'
    path.touch()
    os.truncate(path, MOST_CACHE_BYTES // 4)
    os.utime(path, (number, number))
  return cache


def num_bytes(folder: pathlib.Path) -> int:
  """Returns the bytes of all files in a folder."""
  return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())


def run(
  folder: pathlib.Path, steps: int, lines: int
) -> tuple[dict[str, Watched], list[str]]:
  """Returns what both runs have taken, and what was found besides.

  Raises:
    RuntimeError: if a run fails, or leaves more than it should.
  """
  shutil.copytree(KEPT, folder, dirs_exist_ok=True)
  cache = fill_cache(folder)
  found = {'train': train(folder, steps), 'infer': infer(folder, lines)}
  removed = 5 - len(list(cache.glob('old-*')))
  kept = saved_steps.steps(folder / 'run')
  logs = num_bytes(folder / 'run') - num_bytes(folder / 'run' / 'checkpoints')
  answers = folder / 'answers' / 'predictions.jsonl'
  with answers.open('rb') as file:
    num_answers = sum(1 for _ in file)
  if num_answers != lines:
    raise RuntimeError(f'{num_answers} answers of {lines} lines')
  if len(kept) > KEEP_CHECKPOINTS or kept[-1] != steps:
    raise RuntimeError(f'checkpoints {kept} of {steps} steps')
  if not removed or num_bytes(cache) > MOST_CACHE_BYTES + 256 * _MIB:
    raise RuntimeError(f'{num_bytes(cache)} bytes in {cache}')
  return found, [
    f'{len(kept)} checkpoints; all else in the folder of the run: '
    f'{logs / steps:.0f} bytes a step, of which TensorBoard and '
    f'`metrics.jsonl` have a record every {LOG_PERIOD} steps.',
    f'Old programs removed from the compilation cache: {removed} of 5, each '
    'of 1 GiB, when the first run began.',
  ]


def table(found: dict[str, Watched]) -> str:
  """Returns the table of the docs, in Markdown."""
  lines = [
    '| verb | steps or lines | minutes | MiB at a quarter | MiB at the end | '
    'MiB per 1,000 | compiled | threads | open files |',
    '| --- |' + ' ---: |' * 8,
  ]
  for verb, each in found.items():
    pairs = [each.compiled, each.threads, each.open_files]
    lines.append(
      f'| {verb} | {each.total:,} | {each.secs / 60:.1f} | {each.mib[0]:.1f} | '
      f'{each.mib[1]:.1f} | {each.mib_per_1000:.4f} | '
      + ' | '.join(f'{early}, {late}' for early, late in pairs)
      + ' |'
    )
  return '\n'.join(lines)


def main() -> int:
  """Runs, prints the table, and returns 0."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=20_000)
  parser.add_argument('--lines', type=int, default=300_000)
  parser.add_argument('--docs', type=pathlib.Path)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    found, notes = run(pathlib.Path(name), args.steps, args.lines)
  print(table(found))
  print(*notes, sep='\n')
  if args.docs:
    from faults import damage  # Its imports take seconds.

    damage.write_tables(args.docs, {'long runs': table(found)})
  return 0


if __name__ == '__main__':
  sys.exit(main())
