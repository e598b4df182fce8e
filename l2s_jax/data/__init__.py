# SPDX-License-Identifier: Apache-2.0
"""From files and SeqIO tasks to batches of token ids, on the host.

`tasks` registers and binds tasks, `streams` makes their batches, `batching`
makes a batch of ids that are there already. `cache_command` is the verb that
makes files of ids, a cache, which takes the place of a task: `cache_task` binds
it, `cache_batches` reads it. TensorFlow and SeqIO are imported by `features`
alone, which others import inside functions.
"""

# The modules that other packages may import.
__all__ = (
  'batching',
  'cache_batches',
  'cache_command',
  'cache_format',
  'cache_key',
  'cache_task',
  'cldr',
  'features',
  'input_files',
  'packing',
  'streams',
  'tasks',
  'templates',
  'text_files',
)
