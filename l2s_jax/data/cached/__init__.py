# SPDX-License-Identifier: Apache-2.0
"""Reads token caches: examples by number, in a global order; no TensorFlow.

`cache_format` has the files, `feature_format` those of the LLM's states beside
them, `cache_task` binds a cache in the place of a task, `order` shuffles,
`plans` assigns examples to rows, `cache_batches` reads the rows of one process,
and `cache_scoring` makes SeqIO tasks to be scored. Caches are written by the
package `caching`.
"""

# The modules that other packages may import.
__all__ = (
  'cache_batches',
  'cache_format',
  'cache_task',
  'feature_format',
  'order',
  'plans',
)
