# SPDX-License-Identifier: Apache-2.0
"""Writes token caches, and the frozen LLM's states of their prompts.

`cache_command` is the verb. `token_command` reads the texts of a task
(`cache_texts`), tokenizes them in several processes (`cache_encoding`) or with
Apache Beam (`cache_beam`), and writes them to shards that survive a kill at any
time (`cache_writer`). `cache_key` describes everything that determines the
content. `feature_command` runs the frozen LLM once over the prompts;
`feature_writer` writes its states to the files listed by `feature_files`.
The package `data.cached` reads caches.
"""

# Modules that other packages may import.
__all__ = (
  'cache_command',
  'cache_encoding',
  'cache_key',
  'cache_texts',
  'cache_writer',
)
