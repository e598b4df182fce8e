# SPDX-License-Identifier: Apache-2.0
"""Reads token caches: random access in a global shuffle order, no TensorFlow.

`cache_format` defines the files, `feature_format` those of the cached LLM
states. `cache_task` binds a cache as a task, `order` shuffles, `plans` assigns
examples to rows, `cache_batches` reads the rows of one process, and
`cache_scoring` makes SeqIO tasks for evaluation. The package `caching` writes
caches.
"""

# Modules that other packages may import.
__all__ = (
  'cache_batches',
  'cache_format',
  'cache_task',
  'feature_format',
  'order',
  'plans',
)
