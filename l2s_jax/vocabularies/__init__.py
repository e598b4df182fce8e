# SPDX-License-Identifier: Apache-2.0
"""Tokenizers behind one interface, without TensorFlow.

`loading.load` reads a file or a folder like the `AutoTokenizer` of transformers
and returns a `base.Vocabulary`. The package `data` appends EOS, cuts and
batches.
"""

# Modules that other packages may import.
__all__ = (
  'base',
  'byte',
  'export',
  'huggingface',
  'loading',
  'sentencepiece',
  'tokenizer_files',
)
