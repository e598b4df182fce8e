# SPDX-License-Identifier: Apache-2.0
"""LLM-to-SLM generation (arXiv 2402.16844) in JAX and Flax.

The Python API, whose names are imported at first use:

    model = l2s_jax.load('runs/multi30k')
    model.answer(['translate English to German: A man sleeps.'])

The packages, lowest first: `runtime`, `models`, `metrics`, `vocabularies`,
`weights`, `data`, `systems`, `inference`, `evaluation`, `training`, `interop`,
`performance`. `docs/python_api.md` explains the API, `docs/design.md` the
packages.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from l2s_jax.api import (
    Decoding,
    MeshConfig,
    Model,
    System,
    Tower,
    TransformerConfig,
    evaluate,
    language_model,
    llm_to_slm,
    load,
    train,
  )

__version__ = '0.1.0'

__all__ = (
  'Decoding',
  'MeshConfig',
  'Model',
  'System',
  'Tower',
  'TransformerConfig',
  'evaluate',
  'language_model',
  'llm_to_slm',
  'load',
  'train',
)


def __getattr__(name: str) -> Any:
  if name in __all__:
    return getattr(importlib.import_module('l2s_jax.api'), name)
  # `from l2s_jax import tasks` is what a user's module for seqio_cache_tasks
  # says.
  if name == 'tasks':
    return importlib.import_module('l2s_jax.data.tasks')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
