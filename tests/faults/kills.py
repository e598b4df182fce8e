# SPDX-License-Identifier: Apache-2.0
"""Kills programs at every phase of their work with files, and starts them anew.

    PYTHONPATH=.:tests python -m faults.kills --count=20 --seed=0
      [--verbs train cache ...] [--processes 1 2] [--most_secs=600]
      [--counts=FILE] [--docs=docs/reliability.md]

`--count` is of kills for each verb and number of processes. A process is killed
by SIGKILL just before a change of its folder, or some time later; `killed` has
the phases, which take turns. The same command starts again, and is killed
again, up to three times; then it ends unkilled. What comes of it is one of

    equal     the files or arrays of an unbroken job, bit for bit
    rounded   LLM states of several processes, within the rounding of bfloat16:
              the missing ones were computed in batches of other lengths
    wrong     others: must never be
    torn      after a kill, a path that stands for something complete had
              something else: must never be
    lost      training did not go on from its newest checkpoint: must never be
    failed    the last start ended with an error: must never be

`--counts` keeps the outcomes in a file; another call goes on from them.
`--docs` puts the table into that page.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault('L2S_TESTS_XLA_FLAGS', '')
os.environ.setdefault(
  'L2S_TESTS_CACHE', str(pathlib.Path(tempfile.gettempdir()) / 'l2s_kills')
)

import forked
import numpy as np

from faults import killed
from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.weights import saved_steps

KEPT = pathlib.Path(__file__).parents[1] / 'kept_runs' / '1'
GOOD = ('equal', 'rounded')  # The other outcomes are bad.
VERBS = ('train', 'cache', 'features', 'infer', 'distill', 'convert', 'export')
# Verbs of one process; several would write the same folder.
ALONE = ('convert', 'export')
AFTER_COMMIT = 'after a commit'
# Of the table: what is counted, in the order of a save.
_COLUMNS = (
  *killed.PHASES[1:4],
  AFTER_COMMIT,
  killed.PHASES[4],
  killed.PHASES[0],
)
STEPS = 9
_MOST_KILLS = 3
_LATEST_SECS = 0.1
_TIMEOUT_SECS = 600
_NEVER = (killed.PHASES[0], 0, 0)
# Before a verb: the verb whose output it reads.
_NEEDS = {'train': 'features', 'features': 'cache'}
# Outcomes of kills, by verb, number of processes, and phase.
Counts = dict[tuple[str, int, str], collections.Counter[str]]
# How often each process of an unbroken job changed its folder, by phase.
Changes = list[collections.Counter[str]]


class Job(NamedTuple):
  """What is killed.

  Attributes:
    arguments: of the command line.
    target: the folder that it writes.
    last: the file that makes it complete; '' for the folder itself, None for a
      run, whose checkpoints are complete one by one.
  """

  arguments: tuple[str, ...]
  target: pathlib.Path
  last: str | None


def jobs(folder: pathlib.Path) -> dict[str, Job]:
  """Writes inputs of all verbs into a folder; returns a job of each."""
  shutil.copytree(KEPT, folder, dirs_exist_ok=True)
  lines = (folder / 'data' / 'train.en').read_text().splitlines()[:48]
  (folder / 'in.txt').write_text('\n'.join(lines) + '\n')
  for side in ('en', 'de'):
    path = folder / 'data' / f'train.{side}'
    path.write_text('\n'.join(path.read_text().splitlines()[:64]) + '\n')

  def job(verb: str, last: str | None, *arguments: str) -> Job:
    return Job(arguments, folder / f'of_{verb}', last)

  system = (
    f'--gin_file={folder}/data/l2s.gin',
    f'--gin.SLM_VOCABULARY={folder}/data/tiny.model',
    f'--gin.LLM_PATH={folder}/llm',
    f'--gin.DATA_DIR={folder}/data',
  )
  cache = (
    'cache',
    *system,
    '--gin.CACHE_EXAMPLES_PER_SHARD=8',
    '--gin.CACHE_WORKERS=1',
    '--gin.FEATURES_BATCH_SIZE=8',
  )
  return {
    'train': job(
      'train',
      None,
      'train',
      *system,
      '--gin_file=gin_configs/tasks/cached.gin',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
      f'--gin.CACHE_DIR={folder}/of_features',
      '--gin.USE_FEATURES=True',
      '--gin.TRACKERS=()',
      f'--gin.MODEL_DIR={folder}/of_train',
      f'--gin.TRAIN_STEPS={STEPS}',
      '--gin.CHECKPOINT_PERIOD=2',
      '--gin.train.log_period=1',
      '--gin.train.eval_split=None',
    ),
    'cache': job(
      'cache', 'cache.json', *cache, f'--gin.CACHE_DIR={folder}/of_cache'
    ),
    'features': job(
      'features',
      'features.json',
      *cache,
      '--features',
      '--gin.MIXTURE_OR_TASK_NAME=cached',
      f'--gin.CACHE_DIR={folder}/of_features',
    ),
    'infer': job(
      'infer',
      'predictions.jsonl',
      'infer',
      '--gin_file=gin_configs/runs/infer.gin',
      f'--gin.CHECKPOINT_PATH={folder}/l2s',
      f'--gin.LLM_PATH={folder}/llm',
      f'--gin.INPUT={folder}/in.txt',
      f'--gin.INFER_OUTPUT_DIR={folder}/of_infer',
      '--gin.PROMPT_LENGTH=32',
      '--gin.MAX_DECODE_LEN=8',
      '--gin.BATCH_SIZE=4',
    ),
    'distill': job(
      'distill',
      'distilled.json',
      'distill',
      '--gin_file=gin_configs/tasks/parallel_text.gin',
      '--gin_file=gin_configs/runs/distill.gin',
      f'--gin.DATA_DIR={folder}/data',
      "--gin.DATA_FILES={'train': ('train.en', 'train.de')}",
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}",
      f'--gin.CHECKPOINT_PATH={folder}/llm',
      f'--gin.DISTILL_DIR={folder}/of_distill',
      '--gin.BATCH_SIZE=4',
    ),
    'convert': job(
      'convert',
      '',
      *('convert', f'{folder}/l2s', f'{folder}/of_convert'),
      *('--from=l2s', '--to=hf'),
    ),
    'export': job(
      'export',
      '',
      *('export', f'{folder}/converted', f'{folder}/of_export'),
      '--to=bundle',
    ),
  }


def content(job: Job) -> Any:
  """Returns what a complete job has left, to be compared."""
  if job.last is None:
    folder = job.target / saved_steps.FOLDER
    newest = folder / str(saved_steps.steps(job.target)[-1])
    data = saved_steps.read_data(newest)
    del data['clock']
    log = (job.target / 'metrics.jsonl').read_text().splitlines()
    losses = [(r['step'], r['train/loss']) for r in map(json.loads, log)]
    # The digests of all arrays are compared with the arrays.
    problem = saved_steps.problem(job.target, STEPS, saved_steps.ITEMS)
    config = (job.target / 'config.gin').read_text()
    return saved_steps.steps(job.target), data, losses, problem, config
  return {
    path.relative_to(job.target).as_posix(): path.read_bytes()
    for path in job.target.rglob('*')
    if path.is_file() and not path.name.startswith('.')
  }


def is_torn(job: Job, expected: Any) -> str:
  """Returns what is incomplete in the place of something complete."""
  if job.last is None:
    return ' '.join(
      saved_steps.problem(job.target, step, saved_steps.ITEMS) or ''
      for step in saved_steps.steps(job.target)
    ).strip()
  if not (job.target / job.last).exists():
    return ''
  found = content(job)
  names = [job.last] if job.last else expected.keys()
  different = [n for n in names if found.get(n) != expected[n]]
  return f'{different} in {job.target}' if different else ''


def same_within_rounding(folder: pathlib.Path, other: pathlib.Path) -> bool:
  """Returns whether two caches have the same LLM states in bfloat16."""
  caches = [cache_format.open_cache(path) for path in (folder, other)]
  features = [feature_format.open_features(cache) for cache in caches]
  for task, of_task in caches[0].content['tasks'].items():
    for split in of_task['splits']:
      size = len(caches[0].split(task, split))
      pair = [each.split(task, split).states(range(size)) for each in features]
      for mine, theirs in zip(*pair, strict=True):
        a, b = (np.asarray(x.rows, np.float32) for x in (mine, theirs))
        # 2 ** -7 is the distance of two numbers near 1; sums have a few.
        if a.shape != b.shape or not np.allclose(a, b, rtol=2**-6, atol=2**-6):
          return False
  return True


def start(
  job: Job, num_processes: int, victim: int, moment: Sequence[Any]
) -> list[forked.Popen]:
  """Starts a job; `moment` is when its victim dies, see `killed`."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  several = {
    'L2S_COORDINATOR_ADDRESS': address,
    'L2S_NUM_PROCESSES': str(num_processes),
  }
  pipe = subprocess.PIPE
  processes = []
  for index in range(num_processes):
    log = job.target.parent / f'changes_{index}'
    log.unlink(missing_ok=True)
    dies = moment if index == victim else _NEVER
    arguments = (str(job.target), *map(str, dies), str(log), *job.arguments)
    of_this = several | {'L2S_PROCESS_ID': str(index)}
    processes.append(
      forked.Popen(
        [sys.executable, '-m', 'faults.killed', *arguments],
        env=forked.environment() | (of_this if num_processes > 1 else {}),
        stdout=pipe,
        stderr=pipe,
        text=True,
      )
    )
  return processes


def wait(processes: list[forked.Popen], victim: int) -> tuple[bool, str]:
  """Waits for all; if the victim dies, kills the others.

  Returns:
    Whether there was a kill, and what was told.

  Raises:
    RuntimeError: if one ends with an error, or does not end.
  """
  told = ''
  is_late = False
  order = [processes[victim], *processes[:victim], *processes[victim + 1 :]]
  for process in order:
    if is_late or order[0].returncode == -signal.SIGKILL:
      process.kill()
    try:
      told += ''.join(process.communicate(timeout=_TIMEOUT_SECS))
    except subprocess.TimeoutExpired:
      is_late = True
      process.kill()
      told += ''.join(process.communicate())
  if is_late:
    raise RuntimeError(f'no end within {_TIMEOUT_SECS} s\n{told}')
  is_killed = order[0].returncode == -signal.SIGKILL
  if not is_killed and any(process.returncode for process in processes):
    raise RuntimeError(told)
  return is_killed, told


def choose(
  changes: Changes,
  killed_at: Mapping[str, int],
  num_kills: int,
  rng: random.Random,
) -> tuple[int, str, tuple[str, int, float]]:
  """Returns a process, what is counted, and a moment, see `killed`.

  Args:
    changes: of the unbroken job.
    killed_at: kills so far, by what is counted; the rarest comes next.
    num_kills: of this job, which has fewer changes left.
    rng: chooses among equals.
  """
  found = sorted(set().union(*changes))
  kinds = found + [AFTER_COMMIT] * ('commit' in found)
  rng.shuffle(kinds)
  kind = min(kinds, key=lambda kind: killed_at.get(kind, 0))
  phase = 'commit' if kind == AFTER_COMMIT else kind
  victim = rng.choice([i for i, own in enumerate(changes) if own[phase]])
  number = rng.randint(1, max(1, changes[victim][phase] // (1 + num_kills)))
  delay = rng.choice((0.0, rng.random() * _LATEST_SECS))
  if phase == 'commit':
    delay = 0.0 if kind == phase else rng.uniform(0.001, _LATEST_SECS)
  return victim, kind, (phase, number, delay)


def kill_and_finish(
  job: Job,
  num_processes: int,
  unbroken: '_Unbroken',
  killed_at: Mapping[str, int],
  rng: random.Random,
) -> tuple[list[str], str, str]:
  """Returns the phases of the kills, the outcome, and what explains it."""
  phases: list[str] = []
  history: list[Any] = []
  expected, changes = unbroken
  for _ in range(rng.randint(1, _MOST_KILLS)):
    so_far = collections.Counter(killed_at) + collections.Counter(phases)
    victim, kind, moment = choose(changes, so_far, len(phases), rng)
    history.append((victim, kind, *moment))
    try:
      processes = start(job, num_processes, victim, moment)
      is_killed, told = wait(processes, victim)
    except RuntimeError as error:
      if phases and 'already exists' in str(error):
        break  # The killed process had completed it.
      return phases, 'failed', f'{history}\n{error}'
    if not is_killed:
      break
    phases.append(kind)
    if torn := is_torn(job, expected):
      return phases, 'torn', f'{history}\n{torn}\n{told}'
  newest = saved_steps.steps(job.target)[-1:] if job.last is None else []
  try:
    _, told = wait(start(job, num_processes, 0, _NEVER), 0)
  except RuntimeError as error:
    told = str(error)
    if 'already exists' not in told:
      return phases, 'failed', f'{history}\n{told}'
  if newest and newest[0] < STEPS:
    if f'Resuming from step {newest[0]}' not in told:
      return phases, 'lost', f'{history}, saved: {newest}\n{told}'
  found = content(job)
  if found == expected:
    return phases, 'equal', ''
  if job.target.name == 'of_features' and num_processes > 1:
    kept = job.target.with_name('kept')
    if same_within_rounding(job.target, kept):
      return phases, 'rounded', ''
  if isinstance(found, dict):
    names = sorted(found.keys() | expected.keys())
    told += str([n for n in names if found.get(n) != expected.get(n)])
  return phases, 'wrong', f'{history}\n{told}'


class _Unbroken(NamedTuple):
  """What an unbroken job has left, and how often it changed its folder."""

  content: Any
  changes: Changes


def run(
  count: int,
  seed: int,
  verbs: Sequence[str],
  several: Sequence[int],
  most_secs: float = math.inf,
  counts_file: pathlib.Path | None = None,
) -> tuple[Counts, list[str]]:
  """Kills jobs; returns outcomes by verb, processes and phase, and problems.

  Args:
    count: kills for each verb and number of processes.
    seed: of the moments.
    verbs: some of `VERBS`.
    several: numbers of processes; 1 alone for verbs in `ALONE`.
    most_secs: no kill is begun after so many seconds.
    counts_file: has the outcomes of earlier calls, and gets those of this one.
  """
  rng = random.Random(seed)
  counts = _read_counts(counts_file)
  problems: list[str] = []
  began = time.monotonic()
  missing = {
    (verb, number): count - sum(_killed_at(counts, verb, number).values())
    for verb in verbs
    for number in several
    if number == 1 or verb not in ALONE
  }
  missing = {key: left for key, left in missing.items() if left > 0}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    by_verb = jobs(folder)
    found: dict[tuple[str, int], _Unbroken] = {}
    for verb in _with_needed([verb for verb, _ in missing]):
      # Other verbs read the last one.
      numbers = [number for key, number in missing if key == verb] or [1]
      for number in numbers:
        found[verb, number] = _run_unbroken(by_verb[verb], verb, number)
    while missing := {key: left for key, left in missing.items() if left > 0}:
      for verb, number in missing:
        if time.monotonic() - began > most_secs:
          return counts, problems
        phases, outcome, words = _of_copy(
          by_verb,
          verb,
          number,
          found[verb, number],
          _killed_at(counts, verb, number),
          rng,
        )
        missing[verb, number] -= max(1, len(phases))
        for phase in phases:
          key = verb, number, phase
          counts.setdefault(key, collections.Counter())[outcome] += 1
        if outcome not in GOOD:
          problems.append(f'{verb}, {number} processes: {outcome}: {words}')
          print(problems[-1], file=sys.stderr)
        if counts_file:
          _write_counts(counts_file, counts)
        total = sum(counter.total() for counter in counts.values())
        print(
          f'{total} kills, {len(problems)} bad: {verb} {number} {phases}',
          file=sys.stderr,
        )
  return counts, problems


def _killed_at(counts: Counts, verb: str, number: int) -> dict[str, int]:
  return {
    phase: counter.total()
    for (*key, phase), counter in counts.items()
    if key == [verb, number]
  }


def _of_copy(
  by_verb: dict[str, Job],
  verb: str,
  number: int,
  unbroken: _Unbroken,
  killed_at: Mapping[str, int],
  rng: random.Random,
) -> tuple[list[str], str, str]:
  """Kills a job whose target other verbs read: it is put back."""
  job = by_verb[verb]
  kept = job.target.with_name('kept')
  job.target.rename(kept)
  if verb == 'features':
    shutil.copytree(by_verb['cache'].target, job.target)
  result = kill_and_finish(job, number, unbroken, killed_at, rng)
  shutil.rmtree(job.target)
  kept.rename(job.target)
  return result


def _read_counts(path: pathlib.Path | None) -> Counts:
  if not path or not path.exists():
    return {}
  return {
    (verb, number, phase): collections.Counter(outcomes)
    for verb, number, phase, outcomes in json.loads(path.read_text())
  }


def _write_counts(path: pathlib.Path, counts: Counts) -> None:
  rows = [[*key, dict(outcomes)] for key, outcomes in sorted(counts.items())]
  path.write_text(json.dumps(rows, indent=1))


def _run_unbroken(job: Job, verb: str, num_processes: int) -> _Unbroken:
  shutil.rmtree(job.target, ignore_errors=True)
  if verb == 'features':
    shutil.copytree(job.target.with_name('of_cache'), job.target)
  wait(start(job, num_processes, 0, _NEVER), 0)
  changes = []
  for index in range(num_processes):
    log = job.target.with_name(f'changes_{index}')
    lines = log.read_text().splitlines() if log.exists() else []
    changes.append(
      collections.Counter(line.partition('\t')[0] for line in lines)
    )
  return _Unbroken(content(job), changes)


def _with_needed(verbs: Sequence[str]) -> list[str]:
  wanted = set(verbs)
  for verb in VERBS:
    if verb in wanted and verb in _NEEDS:
      wanted.add(_NEEDS[verb])
  if 'features' in wanted:
    wanted.add('cache')
  first = [verb for verb in ('cache', 'features') if verb in wanted]
  return first + [v for v in VERBS if v in wanted and v not in first]


def table(counts: Counts) -> str:
  """Returns kills by phase, and their outcomes, as a table in Markdown."""
  names = ('verb', 'processes', *_COLUMNS, 'kills', *GOOD, 'bad')
  rows: list[Sequence[object]] = [
    names,
    ('---', *['---:'] * (len(names) - 1)),
  ]
  for job in (*dict.fromkeys(key[:2] for key in sorted(counts)), ('all', '')):
    kills: collections.Counter[str] = collections.Counter()
    outcomes: collections.Counter[str] = collections.Counter()
    for (*key, phase), found in counts.items():
      if job[0] in ('all', key[0]) and job[1] in ('', key[1]):
        kills[phase] += found.total()
        outcomes += found
    good = [outcomes[name] for name in GOOD]
    bad = kills.total() - sum(good)
    by_phase = [kills[phase] or '' for phase in _COLUMNS]
    rows.append((*job, *by_phase, kills.total(), *good, bad))
  return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in rows)


def main() -> int:
  """Kills, prints the table, and returns 1 if an outcome must never be."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--verbs', nargs='*', choices=VERBS, default=VERBS)
  parser.add_argument('--processes', nargs='*', type=int, default=(1, 2))
  parser.add_argument('--most_secs', type=float, default=math.inf)
  parser.add_argument('--counts', type=pathlib.Path)
  parser.add_argument('--docs', type=pathlib.Path)
  args = parser.parse_args()
  counts, problems = run(
    args.count,
    args.seed,
    args.verbs,
    args.processes,
    args.most_secs,
    args.counts,
  )
  print('\n'.join(problems))
  print(table(counts))
  if args.docs:
    from faults import damage  # Not in each process that is killed.

    damage.write_tables(args.docs, {'kills': table(counts)})
  return int(bool(problems))


if __name__ == '__main__':
  sys.exit(main())
