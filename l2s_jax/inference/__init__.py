# SPDX-License-Identifier: Apache-2.0
"""From prompts to answers.

`generate.Generator` prefills and runs a decoding strategy; `answerer` has text
on both sides; `infer` is the verb, which answers the prompts of a file, a task
or standard input and can be started again; `distill` is another, which answers
those of a training set, to train on.
"""

# The modules that other packages may import.
__all__ = (
  'answer_settings',
  'answerer',
  'distill',
  'generate',
  'infer',
  'length_buckets',
  'pipeline',
  'predictions',
  'sampling',
  'speculative',
  'strategies',
)
