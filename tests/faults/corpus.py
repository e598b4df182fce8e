# SPDX-License-Identifier: Apache-2.0
"""Cases that ended badly once; `tests/test_faults_corpus.py` runs them all.

Each is what the fuzzer found, cut down.
"""

import json
from typing import Any

# What `convert` wrote to a DESTINATION without a name: pathlib's ValueError.
DESTINATIONS = ('.', '/', './')

# The tokenizer fails on a text, as its unknown token is not in the vocabulary.
# 'a' is, with which it is tried when it is read.
TOKENIZER: dict[str, Any] = {
  'version': '1.0',
  'model': {
    'type': 'WordPiece',
    'unk_token': '[UNK]',
    'continuing_subword_prefix': '##',
    'max_input_chars_per_word': 100,
    'vocab': {'<pad>': 0, '</s>': 1, 'a': 2},
  },
  'added_tokens': [
    {
      'id': number,
      'content': content,
      'special': True,
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
    }
    for number, content in enumerate(('<pad>', '</s>'))
  ],
}

# Data files by name, and the rows that they have: None is refused. These are
# right at present, and easily read wrong: only \n ends a line.
DATA: tuple[tuple[str, bytes, tuple[dict[str, Any] | None, ...]], ...] = (
  ('x.txt', b'\xef\xbb\xbf', ({'source': ''},)),
  ('x.txt', b'a\rb\n', ({'source': 'a\rb'},)),
  ('x.txt', 'a\u2028b\x85c\x0b\n'.encode(), ({'source': 'a\u2028b\x85c\x0b'},)),
  ('x.txt', b'a\xed\xa0\x80\nb', (None, {'source': 'b'})),
  ('x.txt', b'\xe9\n\xff\xfe\n', (None, None)),
  ('x.jsonl', b'{"a": "\\ud800"}\n{"a": 1}', (None, {'a': 1})),
  ('x.jsonl', b'[' * 100_000, (None,)),
  ('x.jsonl', b'9' * 5000 + b'\n{}', (None, {})),
  ('x.csv', b'a,b\n"x\ny","z ""q"""\n', ({'a': 'x\ny', 'b': 'z "q"'},)),
  ('x.csv', b'a,b\n"x"y,z\nu,v\n', (None, {'a': 'u', 'b': 'v'})),
  ('x.tsv', b'a\tb\n"x\ty"\n', ({'a': '"x', 'b': 'y"'},)),
  ('x.tsv', b'a\tb\nx\ny\t', (None, {'a': 'y', 'b': ''})),
)


def tokenizer_json() -> bytes:
  """Returns the tokenizer as a file."""
  return json.dumps(TOKENIZER).encode()


# Damage of a checkpoint's metadata by file: bytes, and what replaces them. A
# RecursionError of JSON, and a RuntimeError of TensorStore's bindings.
CHECKPOINT = {
  '_CHECKPOINT_METADATA': (b'{', b'{"x": ' + b'[' * 100_000),
  'params/_METADATA': (b'"key": "projector"', b'"key": "\\ud800"'),
}
