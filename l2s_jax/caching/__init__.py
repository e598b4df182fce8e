# SPDX-License-Identifier: Apache-2.0
"""Writes caches: a task's examples as ids in files, and the LLM's states.

`cache_command` is the verb. `token_command` takes the texts of a task
(`cache_texts`), has them tokenized in several processes (`cache_encoding`) or
by Apache Beam (`cache_beam`), and written to shards that survive any kill
(`cache_writer`). `cache_key` describes all that the content depends on.
`feature_command` has the frozen LLM read the prompts once, `feature_writer`
keeps its states in the files that `feature_files` asks for.
Reading a cache is in `data.cached`.
"""

# The modules that other packages may import.
__all__ = (
  'cache_command',
  'cache_encoding',
  'cache_key',
  'cache_texts',
  'cache_writer',
)
