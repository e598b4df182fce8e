# SPDX-License-Identifier: Apache-2.0
"""Answers prompts with this folder, by ONNX Runtime and NumPy alone.

    echo '[[37, 12, 1], [8, 1]]' | python run.py 32

reads the token ids of prompts and prints those of their answers. 32 is the
number of tokens that an answer may have; signature.json has the special ids.
"""

import json
import pathlib
import sys

import numpy as np
import onnxruntime

folder = pathlib.Path(__file__).parent
signature = json.loads((folder / 'signature.json').read_text())
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # Errors alone.
prefill, step = (
  onnxruntime.InferenceSession(folder / f'{name}.onnx', options)
  for name in ('prefill', 'decode_step')
)


def run(session, inputs):
  """Returns the outputs of a model by name."""
  names = [output.name for output in session.get_outputs()]
  return dict(zip(names, session.run(None, inputs), strict=True))


prompts, num_tokens = json.load(sys.stdin), int(sys.argv[1])
first = signature['answer']['first_token']
firsts = [prompt.pop() if first is None else first for prompt in prompts]
shape = len(prompts), max(1, *map(len, prompts))
tokens = np.full(shape, signature['prompt']['pad_id'], np.int32)
segment_ids = np.zeros(shape, np.int32)
for row, prompt in enumerate(prompts):
  tokens[row, : len(prompt)] = prompt
  segment_ids[row, : len(prompt)] = 1

cache = run(prefill, {'prompt_tokens': tokens, 'segment_ids': segment_ids})
sizes = {'batch': shape[0], 'slots': 0}
for x in step.get_inputs():
  if x.name not in cache:  # Of an encoder-decoder: nothing is written yet.
    kind = {'tensor(int32)': np.int32, 'tensor(bool)': bool}
    cache[x.name] = np.zeros(
      [sizes.get(n, n) for n in x.shape], kind.get(x.type, np.float32)
    )
del cache['token']
for name, x in cache.items():  # Room for the answer.
  if name.startswith(('key', 'value')):
    cache[name] = np.pad(x, [(0, 0), (0, 0), (0, num_tokens), (0, 0)])
  elif name == 'valid':
    cache[name] = np.pad(x, [(0, 0), (0, num_tokens)])
token, found = np.asarray(firsts, np.int32), []
for _ in range(num_tokens):
  outputs = run(step, {'token': token, **cache})
  token = outputs.pop('logits').argmax(-1).astype(np.int32)
  cache |= {name.removeprefix('new_'): x for name, x in outputs.items()}
  found.append(token)
print(json.dumps(np.stack(found, axis=1).tolist()))
