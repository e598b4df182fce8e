# SPDX-License-Identifier: Apache-2.0
"""Tokenizers behind one interface, without TensorFlow.

`loading.load` reads a file or a folder as `AutoTokenizer` of transformers does
and returns a `base.Vocabulary`. Appending EOS, cutting and batching are in
`data/`.
"""

# The modules that other packages may import.
__all__ = (
  'base',
  'byte',
  'export',
  'huggingface',
  'loading',
  'sentencepiece',
  'tokenizer_files',
)
