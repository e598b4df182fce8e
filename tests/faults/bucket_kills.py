# SPDX-License-Identifier: Apache-2.0
"""Kills programs that write into a bucket, at random requests.

    PYTHONPATH=.:tests python -m faults.bucket_kills --store=gs --count=20
      [--seed=0] [--verbs train infer cache export] [--most_secs=600]
      [--docs=docs/buckets.md]

`--count` is of jobs; the verbs take turns. There is no `train` with
`--store=s3`, which Orbax does not open. The store is a server on this machine.
A process is killed by SIGKILL in one of its requests that change the store:
before the request reaches the store, or a random time after. Then the same
command starts again, and is killed again, up to three times. The last start is
not killed. What comes of it is one of

    equal     the content of an uninterrupted job in a local folder
    wrong     other content: must never be
    failed    a start that was not killed ended with an error: must never be
    early     a file that makes a folder complete was there after a kill, and
              the content was another: must never be

`--docs` puts the store's table into that page.
"""

import argparse
import atexit
import collections
import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault('L2S_TESTS_XLA_FLAGS', '')
if 'L2S_TESTS_CACHE' not in os.environ:
  os.environ['L2S_TESTS_CACHE'] = tempfile.mkdtemp(prefix='l2s_tests_')
  atexit.register(
    shutil.rmtree, os.environ['L2S_TESTS_CACHE'], ignore_errors=True
  )

import bucket_servers
import forked
import test_buckets_export
import test_cache_writer
import test_distributed
import test_export
import test_preemption
import tiny_runs

from l2s_jax.data.cached import cache_format
from l2s_jax.runtime import storage
from l2s_jax.vocabularies import sentencepiece
from l2s_jax.weights import manifest, saved_steps

STORES = ('gs', 's3')
VERBS = ('train', 'infer', 'cache', 'export')
OUTCOMES = ('equal', 'wrong', 'failed', 'early')
_MOST_KILLS = 3
_LATEST_SECS = 0.1
_LINES = 400
# Numbers of kills and of outcomes, by verb.
Counts = dict[str, collections.Counter[str]]


class Job(NamedTuple):
  """What is killed.

  Attributes:
    argv: command line for a target folder.
    content: what its complete folder has, to be compared.
    last: file without which the folder is not complete; '' for a run, which
      has no such file.
  """

  argv: Callable[[str], list[str]]
  content: Callable[[pathlib.Path], Any]
  last: str


def jobs(folder: pathlib.Path) -> dict[str, Job]:
  """Returns a job of each verb, with its input in a local folder."""
  tiny_runs.write_experiments(folder)
  rows = [{'source': f'{n} ' * 20, 'target': f'{n} ' * 9} for n in range(200)]
  (folder / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (folder / 'in.txt').write_text(
    ''.join(f'prompt {n}\n' for n in range(_LINES))
  )
  rng = random.Random(0)
  vocabulary = sentencepiece.train(
    (' '.join(rng.choices(string.ascii_letters, k=20)) for _ in range(200)),
    folder / 'letters.model',
    vocab_size=100,
  )

  def l2s(*arguments: str) -> list[str]:
    return tiny_runs.command(*arguments)[0]

  def train(target: str) -> list[str]:
    return l2s(
      *tiny_runs.train_arguments(
        folder,
        'llm_baseline',
        target,
        '--gin.CHECKPOINT_PERIOD=2',
        '--gin.TRAIN_STEPS=6',
      )
    )

  def infer(target: str) -> list[str]:
    arguments = test_distributed.infer(
      folder,
      'local-train',
      target,
      f'--gin.INPUT={folder / "in.txt"}',
      f'--gin.INFER_OUTPUT_DIR={target}',
    )
    return [sys.executable, '-m', 'frequent_parts', *arguments]

  def export(target: str) -> list[str]:
    source = str(test_export.KEPT / 'converted')
    return l2s('export', source, target, '--to=bundle')

  def cache(target: str) -> list[str]:
    return test_cache_writer.command(folder, target, vocabulary)

  def of_run(run: pathlib.Path) -> Any:
    newest = run / saved_steps.FOLDER / str(saved_steps.steps(run)[-1])
    return (
      saved_steps.steps(run),
      saved_steps.read_data(newest)['digests'],
      test_preemption.losses(run),
    )

  def of_answers(answers: pathlib.Path) -> Any:
    return {
      path.name: path.read_bytes() if path.suffix == '.jsonl' else b''
      for path in answers.iterdir()
    }

  files = test_buckets_export.contents
  return {
    'train': Job(train, of_run, ''),
    'infer': Job(infer, of_answers, 'predictions.jsonl'),
    'cache': Job(cache, files, cache_format.FILE),
    'export': Job(export, files, manifest.FILE),
  }


def run(
  store: str,
  count: int,
  seed: int,
  verbs: Sequence[str] = VERBS,
  most_secs: float = math.inf,
) -> tuple[Counts, list[str]]:
  """Kills jobs of all verbs in turn; returns their outcomes, and problems.

  Args:
    store: one of `STORES`.
    count: of jobs.
    seed: of the moments.
    verbs: some of `VERBS`.
    most_secs: no job is begun after so many seconds.
  """
  rng = random.Random(seed)
  began = time.monotonic()
  counts: Counts = {verb: collections.Counter() for verb in verbs}
  problems: list[str] = []
  with (
    tempfile.TemporaryDirectory() as name,
    _server(store) as upstream,
  ):
    folder = pathlib.Path(name)
    by_verb = jobs(folder)
    expected: dict[str, Any] = {}
    num_writes: dict[str, int] = {}
    for verb in dict.fromkeys(('train', *verbs) if 'infer' in verbs else verbs):
      local = folder / f'local-{verb}'
      _finish(by_verb[verb].argv(str(local)))
      expected[verb] = by_verb[verb].content(local)
      if verb in verbs:
        target = f'{store}://{bucket_servers.BUCKET}/{verb}-counted'
        with bucket_servers.killing(upstream, store, sys.maxsize) as killing:
          _finish(by_verb[verb].argv(target))
        num_writes[verb] = killing.num_writes
    for number in range(count):
      if time.monotonic() - began > most_secs:
        break
      verb = verbs[number % len(verbs)]
      target = f'{store}://{bucket_servers.BUCKET}/{verb}-{number}'
      outcome, told = _kill_and_finish(
        by_verb[verb],
        target,
        expected[verb],
        num_writes[verb],
        upstream,
        rng,
        counts[verb],
      )
      counts[verb][outcome] += 1
      print(f'{target}: {outcome}', file=sys.stderr)
      if outcome != 'equal':
        problems.append(f'{target}: {outcome}: {told}')
  return counts, problems


def _kill_and_finish(
  job: Job,
  target: str,
  expected: Any,
  num_writes: int,
  upstream: str,
  rng: random.Random,
  counts: collections.Counter[str],
) -> tuple[str, str]:
  """Returns the outcome of a job, and what its processes told."""
  place = storage.of(target)
  history = []
  for _ in range(rng.randint(1, _MOST_KILLS)):
    write = rng.randrange(num_writes)
    delay = rng.choice([None, rng.random() * _LATEST_SECS])
    history.append((write, delay))
    with bucket_servers.killing(
      upstream, place.parts[0].rstrip(':'), write, delay
    ) as killing:
      process = _start(job.argv(target))
      told = killing.wait(process)
    if process.returncode not in (0, -signal.SIGKILL):
      if 'already exists' in told:
        break  # The killed process had completed it.
      return 'failed', f'{history}\n{told}'
    counts['kills'] += process.returncode != 0
    if job.last and (place / job.last).is_file():
      last = (place / job.last).relative_to(place)
      if job.content(place).get(str(last)) != expected[str(last)]:
        return 'early', f'{history}\n{told}'
  process = _start(job.argv(target))
  output, errors = process.communicate(timeout=300)
  told = (output or '') + (errors or '')
  if process.returncode and 'already exists' not in told:
    return 'failed', f'{history}\n{told}'
  is_equal = job.content(place) == expected
  return 'equal' if is_equal else 'wrong', f'{history}\n{told}'


def _start(argv: list[str]) -> forked.Popen:
  pipe = forked.subprocess.PIPE
  return forked.Popen(argv, stdout=pipe, stderr=pipe, text=True)


def _finish(argv: list[str]) -> None:
  process = _start(argv)
  told = process.communicate(timeout=300)
  if process.returncode:
    raise RuntimeError(''.join(told))


@contextlib.contextmanager
def _server(store: str) -> Iterator[str]:
  with bucket_servers.gcs() if store == 'gs' else bucket_servers.s3() as url:
    yield url


def table(counts: Counts) -> str:
  """Returns the outcomes in a store as a table in Markdown."""
  lines = [
    f'| verb | kills | jobs | {" | ".join(OUTCOMES)} |',
    '| --- |' + ' ---: |' * (len(OUTCOMES) + 2),
  ]
  total: collections.Counter[str] = sum(counts.values(), collections.Counter())
  for verb, found in (counts | {'all': total}).items():
    numbers = [found[name] for name in OUTCOMES]
    cells = ' | '.join(map(str, (found['kills'], sum(numbers), *numbers)))
    lines.append(f'| {verb} | {cells} |')
  return '\n'.join(lines)


def main() -> int:
  """Kills, prints the table, and returns 1 if an outcome must never be."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--store', choices=STORES, default='gs')
  parser.add_argument('--count', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--verbs', nargs='*', choices=VERBS, default=VERBS)
  parser.add_argument('--most_secs', type=float, default=math.inf)
  parser.add_argument('--docs', type=pathlib.Path)
  args = parser.parse_args()
  verbs = [v for v in args.verbs if args.store == 'gs' or v != 'train']
  counts, problems = run(
    args.store, args.count, args.seed, verbs, args.most_secs
  )
  print('\n'.join(problems))
  print(table(counts))
  if args.docs:
    from faults import damage  # Not in each process that is killed.

    damage.write_tables(args.docs, {f'kills in {args.store}://': table(counts)})
  return int(bool(problems))


if __name__ == '__main__':
  sys.exit(main())
