# SPDX-License-Identifier: Apache-2.0
"""Data pipeline: from files and SeqIO tasks to batches of token ids.

`bound_tasks` is the interface of all verbs: a task of `tasks`, batched by
`streams`, or a token cache, read by the package `cached`. `batching` makes
batches from ids in memory. All arrays are on the host. Only `features` imports
TensorFlow and SeqIO; other modules import `features` inside functions.
"""

# Modules that other packages may import.
__all__ = (
  'batching',
  'bound_tasks',
  'cldr',
  'distilled',
  'features',
  'input_files',
  'packing',
  'seqio_internals',
  'sources',
  'streams',
  'tasks',
  'templates',
  'text_files',
)
