# SPDX-License-Identifier: Apache-2.0
"""Compares the quickstart in bfloat16 with the one in float32.

    PYTHONPATH=.:tests python -m faults.precision --docs=docs/reliability.md
      [--output_dir=runs/quickstart] [--train_steps=N]

Both are trained and evaluated, one after the other; complete ones are read, and
interrupted ones resume. Activations and the frozen LLM are in bfloat16;
trained parameters, sums of the loss, and optimizers stay in float32. `BAND` is
how much worse scores may be in bfloat16. `--docs` puts the table into that
page.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

from faults import damage
from l2s_jax import quickstart

# How much worse: BLEU and exact matches in points, the loss in nats per token.
BAND = {'bleu': 1.0, 'exact_match': 2.0, 'loss': 0.02}
DTYPES = ('float32', 'bfloat16')
Scores = Mapping[str, float]


def scores_of(dtype: str, arguments: list[str]) -> dict[str, Scores]:
  """Runs a quickstart, unless it is complete; returns scores by system."""
  arguments = [f'--dtype={dtype}', *arguments]
  folder = quickstart.output_folder(quickstart.parse_args(arguments))
  if not (folder / 'results.json').is_file():
    subprocess.run(
      [sys.executable, '-m', 'l2s_jax.quickstart', *arguments], check=True
    )
  rows = json.loads((folder / 'results.json').read_text())['rows']
  return {
    row['system']: {name: row[name] for name in BAND}
    for row in rows
    if row['system'] in quickstart.NAMES.values()
  }


def is_within(score: str, float32: float, bfloat16: float) -> bool:
  """Returns whether a score in bfloat16 is at most its band worse."""
  lost = float32 - bfloat16
  return (-lost if score == 'loss' else lost) <= BAND[score]  # False for NaN.


def table(of_dtypes: Mapping[str, Mapping[str, Scores]]) -> str:
  """Returns the scores of both as a table in Markdown."""
  lines = [
    f'| system | score | {" | ".join(DTYPES)} | may be worse by | within |',
    '| --- | --- | ---: | ---: | ---: | --- |',
  ]
  for system in of_dtypes[DTYPES[0]]:
    for name, band in BAND.items():
      pair = [of_dtypes[dtype][system][name] for dtype in DTYPES]
      cells = ' | '.join(f'{value:.3f}' for value in pair)
      within = 'yes' if is_within(name, *pair) else 'no'
      lines.append(f'| {system} | {name} | {cells} | {band} | {within} |')
  return '\n'.join(lines)


def main() -> int:
  """Returns 1 if a score is out of its band."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--output_dir', default='runs/quickstart')
  parser.add_argument('--train_steps', type=int)
  parser.add_argument('--docs', type=pathlib.Path)
  args = parser.parse_args()
  arguments = [f'--output_dir={args.output_dir}']
  if args.train_steps is not None:
    arguments.append(f'--train_steps={args.train_steps}')
  found = table({dtype: scores_of(dtype, arguments) for dtype in DTYPES})
  print(found)
  if args.docs:
    damage.write_tables(args.docs, {'precision': found})
  return int('| no |' in found)


if __name__ == '__main__':
  sys.exit(main())
