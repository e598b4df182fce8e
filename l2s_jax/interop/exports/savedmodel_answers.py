# SPDX-License-Identifier: Apache-2.0
"""Answers prompts with a SavedModel, by TensorFlow alone.

A program that `savedmodel_form` starts in a process of its own: it reads a
request as JSON from the standard input and writes a reply as JSON to a file.
It imports neither JAX nor l2s_jax, as a server does not.

Request: `folder`, `signature` and `inputs`, a list by the name of an input.
Reply: a list by the name of an output.
"""

import json
import sys


def answer(request):
  """Returns the reply to a request."""
  # None: not to be imported.
  sys.modules.update({'jax': None, 'l2s_jax': None})  # type: ignore[dict-item]
  import tensorflow as tf
  import tensorflow_text

  assert tensorflow_text.SentencepieceTokenizer  # It registers operations.
  model = tf.saved_model.load(request['folder'])
  run = model.signatures[request['signature']]
  _, described = run.structured_input_signature
  found = run(
    **{
      name: tf.constant(x, described[name].dtype)
      for name, x in request['inputs'].items()
    }
  )
  return {name: _plain(x.numpy()) for name, x in found.items()}


def _plain(x):
  if x.dtype != object:
    return x.tolist()
  return [text.decode('utf-8') for text in x]


if __name__ == '__main__':
  reply = answer(json.load(sys.stdin))
  with open(sys.argv[1], 'w', encoding='utf-8') as file:
    json.dump(reply, file)
