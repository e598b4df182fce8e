# SPDX-License-Identifier: Apache-2.0
"""Answers prompts with a SavedModel, using TensorFlow only.

`savedmodel_form` runs this program in a separate process. It reads a request as
JSON from standard input and writes a reply as JSON to a file. It imports
neither JAX nor l2s_jax, like a server.

Request: `folder`, `signature` and `inputs`, lists by input name.
Reply: lists by output name.
"""

import json
import sys


def answer(request):
  """Returns the reply to a request."""
  # None makes their import fail.
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
  """Returns an array as lists, with bytes decoded to text."""
  if x.dtype != object:
    return x.tolist()
  return [text.decode('utf-8') for text in x]


if __name__ == '__main__':
  reply = answer(json.load(sys.stdin))
  with open(sys.argv[1], 'w', encoding='utf-8') as file:
    json.dump(reply, file)
