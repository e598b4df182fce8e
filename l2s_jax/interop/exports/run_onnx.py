# SPDX-License-Identifier: Apache-2.0
"""Answers prompts with this folder, using ONNX Runtime and NumPy only.

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
  """Reads prompts, runs prefill and the decode loop, and prints the answers."""
  import json
  import runpy

  verify = runpy.run_path(os.path.join(folder, 'verify.py'))
  if problem := verify['problem'](folder):
    sys.exit(problem)

  import numpy as np
  import onnxruntime

  with open(os.path.join(folder, 'signature.json')) as file:
    signature = json.load(file)
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # Errors only.
  prefill, decode_step = (
    onnxruntime.InferenceSession(os.path.join(folder, f'{name}.onnx'), options)
    for name in ('prefill', 'decode_step')
  )

  def run(session, arrays):
    """Runs a model; returns its outputs, `present.` renamed to `past.`."""
    inputs = {x.name: arrays[x.name] for x in session.get_inputs()}
    names = [x.name.replace('present.', 'past.') for x in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))

  prompts, first = json.load(sys.stdin), signature['answer']['first_token']
  firsts = [prompt.pop() if first is None else first for prompt in prompts]
  shape = len(prompts), max(1, *map(len, prompts))
  tokens = np.full(shape, signature['prompt']['pad_id'], np.int32)
  segment_ids = np.zeros(shape, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    segment_ids[row, : len(prompt)] = 1
  answer = np.zeros(int(sys.argv[1]), np.int32)
  arrays = {
    'prompt_tokens': tokens,
    'segment_ids': segment_ids,
    'answer': answer,
  }
  arrays = run(prefill, arrays)
  token = np.asarray(firsts, np.int32)
  done = np.zeros(len(tokens), bool)
  found = []
  while len(found) < len(answer) and not done.all():
    arrays |= run(decode_step, {**arrays, 'token': token})
    token = arrays['logits'].argmax(-1).astype(np.int32)
    token[done] = signature['answer']['pad_id']
    done |= np.isin(token, signature['answer']['eos_ids'])
    found.append(token)
  print(json.dumps(np.stack(found, axis=1).tolist()))


if __name__ == '__main__':
  main()
