# SPDX-License-Identifier: Apache-2.0
"""From files and SeqIO tasks to batches of token ids, on the host.

`tasks` registers and binds tasks, `streams` makes their batches, `batching`
makes a batch of ids that are there already. The package `cached` reads token
caches, which take the place of a task. TensorFlow and SeqIO are imported by
`features` alone, which others import inside functions.
"""

# The modules that other packages may import.
__all__ = (
  'batching',
  'cldr',
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
