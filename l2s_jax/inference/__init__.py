# SPDX-License-Identifier: Apache-2.0
"""Inference: prompts to answers.

`generate.Generator` prefills a KV cache and runs a decoding strategy.
`answerer` adds tokenization, with text on both sides. The verb `infer` answers
the prompts of a file, a task or standard input, and resumes after a stop. The
verb `distill` answers the prompts of a training set, for sequence-level
distillation.
"""

# Modules that other packages may import.
__all__ = (
  'answerer',
  'distill',
  'generate',
  'infer',
  'length_buckets',
  'sampling',
  'speculative',
  'strategies',
)
