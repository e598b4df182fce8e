# SPDX-License-Identifier: Apache-2.0
"""Answers prompts with this folder, using JAX and NumPy only.

    echo '[[37, 12, 1], [8, 1]]' | python run.py 32

Reads token ids of prompts from standard input and prints the token ids of the
answers. 32 is the maximum number of answer tokens. signature.json lists the
special ids. The files are compared with manifest.json first.
"""

import os
import sys

folder = os.path.dirname(os.path.abspath(__file__))
# No file in this folder may shadow a library.
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != folder]


def main():
  """Reads prompts, runs `generate`, and prints the answers."""
  import json
  import pathlib
  import runpy

  verify = runpy.run_path(os.path.join(folder, 'verify.py'))
  if problem := verify['problem'](folder):
    sys.exit(problem)

  import jax.export
  import jax.numpy as jnp
  import numpy as np

  files = pathlib.Path(folder)
  signature = json.loads((files / 'signature.json').read_text())
  program = bytearray((files / 'generate.bin').read_bytes())
  generate = jax.export.deserialize(program)
  described = signature['programs']['generate']['inputs']['params']
  params = {}
  for path in files.glob('*.safetensors'):
    with path.open('rb') as file:
      size = int.from_bytes(file.read(8), 'little')
      header = json.loads(file.read(size))
    for name in header.keys() & described.keys():
      dtype, shape = jnp.dtype(described[name]['dtype']), header[name]['shape']
      start = 8 + size + header[name]['data_offsets'][0]
      mapped = np.memmap(path, dtype, 'r', start, tuple(shape))
      params[name] = np.asarray(mapped)

  prompts, first = json.load(sys.stdin), signature['answer']['first_token']
  firsts = [prompt.pop() if first is None else first for prompt in prompts]
  shape = len(prompts), max(1, *map(len, prompts))
  tokens = np.full(shape, signature['prompt']['pad_id'], np.int32)
  segment_ids = np.zeros(shape, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    segment_ids[row, : len(prompt)] = 1
  answer = np.zeros(int(sys.argv[1]), np.int32)
  found = generate.call(
    params, tokens, segment_ids, np.asarray(firsts, np.int32), answer
  )
  print(json.dumps(found['tokens'].tolist()))


if __name__ == '__main__':
  main()
