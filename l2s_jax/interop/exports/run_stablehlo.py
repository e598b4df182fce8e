# SPDX-License-Identifier: Apache-2.0
"""Answers prompts with this folder, by JAX and NumPy alone.

    echo '[[37, 12, 1], [8, 1]]' | python run.py 32

reads the token ids of prompts and prints those of their answers. 32 is the
number of tokens that an answer may have; signature.json has the special ids.
"""

import json
import pathlib
import sys

import jax.export
import jax.numpy as jnp
import numpy as np

folder = pathlib.Path(__file__).parent
signature = json.loads((folder / 'signature.json').read_text())
program = bytearray((folder / 'generate.bin').read_bytes())
generate = jax.export.deserialize(program)
described = signature['programs']['generate']['inputs']['params']
params = {}
for path in folder.glob('*.safetensors'):
  size = int.from_bytes(path.open('rb').read(8), 'little')
  header = json.loads(path.open('rb').read(8 + size)[8:])
  for name in header.keys() & described.keys():
    dtype, shape = jnp.dtype(described[name]['dtype']), header[name]['shape']
    start = 8 + size + header[name]['data_offsets'][0]
    params[name] = np.asarray(np.memmap(path, dtype, 'r', start, tuple(shape)))

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
