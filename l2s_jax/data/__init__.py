# SPDX-License-Identifier: Apache-2.0
"""From files and SeqIO tasks to batches of token ids, on the host.

`bound_tasks` is what a verb asks of its data: a task of `tasks`, whose batches
`streams` makes, or a token cache, which the package `cached` reads. `batching`
makes a batch of ids that are there already. TensorFlow and SeqIO are imported
by `features` alone, which others import inside functions.
"""

# The modules that other packages may import.
__all__ = (
  'batching',
  'bound_tasks',
  'cldr',
  'distilled',
  'features',
  'input_files',
  'memory',
  'packing',
  'seqio_internals',
  'sources',
  'streams',
  'tasks',
  'templates',
  'text_files',
)
