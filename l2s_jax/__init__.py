# SPDX-License-Identifier: Apache-2.0
"""LLM-to-SLM generation (arXiv 2402.16844) in JAX and Flax.

The packages, lowest first: `runtime`, `models`, `metrics`, `vocabularies`,
`weights`, `data`, `systems`, `inference`, `evaluation`, `training`, `interop`,
`performance`. `docs/design.md` shows how they hang together.
"""

import importlib
import types

__version__ = '0.1.0'


def __getattr__(name: str) -> types.ModuleType:
  # `from l2s_jax import tasks` is what a user's module for seqio_cache_tasks
  # says.
  if name == 'tasks':
    return importlib.import_module('l2s_jax.data.tasks')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
