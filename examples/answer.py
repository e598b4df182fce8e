# SPDX-License-Identifier: Apache-2.0
"""Answers prompts from a file or from standard input, through the Python API.

    python examples/answer.py runs/multi30k prompts.txt
    echo 'A man sleeps.' | python examples/answer.py runs/multi30k --stream

Needs the package: `pip install .`, or PYTHONPATH=. in a clone. A prompt is a
line. Tables, JSON lines, restarts and pods are for the verb
`infer`; this is how a program of one's own calls the model.
"""

import argparse
import sys
from collections.abc import Sequence

import l2s_jax


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description='Answers prompts, a line each.')
  parser.add_argument('model', help='a run, a bundle, or a folder of weights')
  parser.add_argument('prompts', nargs='?', help='a text file; else stdin')
  parser.add_argument('--max_decode_len', type=int, default=128)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--num_beams', type=int, default=1)
  parser.add_argument('--temperature', type=float, default=0.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--stream', action='store_true', help='show each answer as it is written'
  )
  args = parser.parse_args(argv)

  model = l2s_jax.load(
    args.model,
    max_decode_len=args.max_decode_len,
    batch_size=args.batch_size,
    decoding=l2s_jax.Decoding(
      num_beams=args.num_beams, temperature=args.temperature, seed=args.seed
    ),
  )
  if args.prompts is None:
    lines = [line.rstrip('\n') for line in sys.stdin]
  else:
    with open(args.prompts, encoding='utf-8') as file:
      lines = file.read().splitlines()
  if args.stream:
    for prompt in lines:
      for piece in model.stream(prompt):
        print(piece, end='', flush=True)
      print()
  else:
    for answer in model.answer(lines):
      print(answer)


if __name__ == '__main__':
  try:
    main()
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'answer.py: {error}')
