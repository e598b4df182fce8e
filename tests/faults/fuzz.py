# SPDX-License-Identifier: Apache-2.0
"""Spoils headers, files, settings and command lines; all by one command.

    PYTHONPATH=.:tests python -m faults.fuzz --count=50000 [--seed=0]
      [--only=data] [--most_secs=3600]

`--count` is of all cases together, which `fuzz_weights`, `fuzz_files`,
`fuzz_data` and `fuzz_folders` have; slow families have fewer. `--only` is a
pattern of families' names. A case that takes more than 20 s, or more than 4 GiB
of memory beside what the program has at its start, counts as a traceback. The
exit status is 1 if there was one.
"""

import argparse
import collections
import contextlib
import functools
import io
import pathlib
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable

import gin

from faults import fuzz_data, fuzz_files, fuzz_folders, fuzz_weights
from l2s_jax import __main__ as command_line

COMMANDS = 'command line'
_MOST_BYTES = 4 * 2**30
# Takes 0.02 to 0.3 s a case, where the others take about 1 ms.
_SLOW = re.compile('^training|of a checkpoint')
_MOST_SLOW = 500
_COMMANDS = (
  'train --gin_file=gin_configs/runs/train.gin --gin.MODEL_DIR=x',
  'infer --gin_file=gin_configs/runs/infer.gin --gin.CHECKPOINT_PATH=x '
  '--gin.INPUT=y --gin.INFER_OUTPUT_DIR=z --shard=0 --num_shards=4',
  'convert x y --from=hf --to=l2s --dtype=bfloat16',
  'export x y --to=bundle --step=best',
  'report x y --output=z',
)
_WORDS = (
  '', ' ', '-', '--', '--x', '--x=', '=', '--gin_file', '--gin_file=',
  '--gin_file=/', '--gin.', '--gin.=', '--gin.x', '--gin.MODEL_DIR',
  '--gin.MODEL_DIR=', '--shard=-1', '--shard=x', '--num_shards=0', '--step=-1',
  '--from=x', '--to=', '--help=1', '-x', '/', '.', '..', '/dev/null', '~',
  'ș', '\u05d0\u05d1', '\ud800', 'a' * 5000, '*', '$(x)', 'gs://', 's3://',
  'hf://', 'file:///x', 'http://x', '\n', '%s', '{}', '@x()', '%X',
)  # fmt: skip


def fuzz_commands(*, seed: int, count: int) -> fuzz_files.Result:
  """Runs spoilt command lines, which name no file that there is.

  They end with a status and a sentence; '--help' and such are left out.
  """
  result = fuzz_files.Result()
  for number in range(count):
    rng = random.Random(f'{COMMANDS} {seed} {number}')
    argv = rng.choice(_COMMANDS).split()
    for _ in range(rng.choice((1, 1, 2, 3))):
      place = rng.randrange(len(argv) + 1)
      word = rng.choice(_WORDS)
      if rng.random() < 0.5:
        argv.insert(place, word)
      elif rng.random() < 0.5:
        argv[place : place + 1] = [word]
      else:
        del argv[place : place + 1]
    label = f'{argv}'[:200]
    statuses: list[int] = []
    fuzz_files.run(
      result,
      label,
      lambda: statuses.append(_run_command(argv)),  # noqa: B023
    )
    if any(statuses):
      result.num_read -= 1
      result.num_refused += 1
  return result


def _run_command(argv: list[str]) -> int:
  """Returns the exit status; raises if nothing, or too much, was said."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      status = command_line.main(argv)
  except SystemExit as end:  # argparse
    status = end.code if isinstance(end.code, int) else 2
  finally:
    with gin.unlock_config():
      gin.clear_config()
  words = said.getvalue()
  assert status == 0 or (words.strip() and 'Traceback' not in words), words
  return status


def _families(
  seed: int, say: Callable[[str], None]
) -> dict[str, Callable[[int], collections.Counter[str]]]:
  """Returns what spoils so many cases of each family, and counts them."""
  families: dict[str, Callable[[int], collections.Counter[str]]] = {}

  def of_weights(name: str) -> Callable[[int], collections.Counter[str]]:
    pattern = f'^{name}$'
    return lambda n: fuzz_weights.fuzz(seed, n, say, only=pattern)[name]

  def of_files(
    fuzz: Callable[..., fuzz_files.Result],
  ) -> Callable[[int], collections.Counter[str]]:
    def found(number: int) -> collections.Counter[str]:
      result = fuzz(seed=seed, count=number)
      for words in result.tracebacks:
        say(words)
      return collections.Counter(
        read=result.num_read,
        refused=result.num_refused,
        traceback=len(result.tracebacks),
      )

    return found

  for name in (
    'config.json', 'safetensors', 'safetensors index', 'weights.json',
    'T5X metadata', 'model.json', 'GGUF header',
  ):  # fmt: skip
    families[name] = of_weights(name)
  for name, kind in fuzz_files.kinds().items():
    families[name] = of_files(functools.partial(fuzz_files.fuzz, name, kind))
  for name, fuzz in (fuzz_data.families() | fuzz_folders.families()).items():
    families[name] = of_files(fuzz)
  families['gin'] = of_files(fuzz_files.fuzz_gin)
  families[COMMANDS] = of_files(fuzz_commands)
  return families


def run(
  count: int, seed: int, only: str = '', most_secs: float = float('inf')
) -> tuple[dict[str, collections.Counter[str]], list[str]]:
  """Spoils cases of all families; returns counts, and the bad ones."""
  bad: list[str] = []
  families = {
    name: fn
    for name, fn in _families(seed, bad.append).items()
    if re.search(only, name)
  }
  _bound_cases()
  counts: dict[str, collections.Counter[str]] = {}
  began = time.monotonic()
  for name, fn in families.items():
    if time.monotonic() - began > most_secs:
      break
    number = -(-count // len(families))
    counts[name] = fn(min(number, _MOST_SLOW) if _SLOW.search(name) else number)
    print(f'{name}: {dict(counts[name])}', file=sys.stderr, flush=True)
  return counts, bad


def _bound_cases() -> None:
  """Bounds the time and memory of each case from now on."""
  # Of what can be written: threads reserve address space that they do not use.
  status = pathlib.Path('/proc/self/status').read_text()
  used = int(status.partition('VmData:')[2].split()[0]) * 1024
  _, hard = resource.getrlimit(resource.RLIMIT_DATA)
  resource.setrlimit(resource.RLIMIT_DATA, (used + _MOST_BYTES, hard))
  signal.signal(signal.SIGALRM, fuzz_weights._raise)


def main() -> int:
  """Spoils cases, prints their number, and returns 1 if one ended badly."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=50_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='', help='pattern of families')
  parser.add_argument('--most_secs', type=float, default=float('inf'))
  args = parser.parse_args()
  counts, bad = run(args.count, args.seed, args.only, args.most_secs)
  print('\n'.join(bad[:50]))
  total = sum(counter.total() for counter in counts.values())
  print(f'{total} cases of {len(counts)} families, {len(bad)} ended badly.')
  return int(bool(bad))


if __name__ == '__main__':
  sys.exit(main())
