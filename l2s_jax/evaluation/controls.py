# SPDX-License-Identifier: Apache-2.0
"""Control experiments: replacing the LLM's states of the prompt.

    none       Z of the prompt: no control
    zero       Z = 0
    other      Z of another prompt
    untrained  Z from a randomly initialized encoder of the LLM's shape
    layer_0    Z from the LLM's input embeddings

Z is the projector's output. The first three controls are batch keys. For the
last two, this module computes the states and adds them to the batch under the
keys of cached states (`models/stored_states.py`). The prompt embeddings used by
injection `add` stay those of the prompt.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from l2s_jax.evaluation import report
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters
from l2s_jax.systems import system as system_lib

PyTree = Any

CONTROLS = tuple(report.CONTROLS)
# Controls that run the LLM.
READING = ('untrained', 'layer_0')

# A seed that no run uses by chance; with a run's own seed, the untrained
# encoder could be the initial LLM of that run.
_UNTRAINED_SEED = 240216844

ReadStates = Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]


class ControlStates:
  """Computes the states of the controls `READING`, each compiled once."""

  def __init__(self, system: system_lib.System):
    self._system = system

    def read_all(params, batch):
      module = system.module
      return module.apply({'params': params}, batch, method='read_prompt')[0]

    def read_none(params, batch):
      return system.module.apply(
        {'params': params}, batch, method='read_first_states'
      )

    self._read = {
      'untrained': jax.jit(read_all),
      'layer_0': jax.jit(read_none),
    }

  def reader(self, params: PyTree, control: str) -> ReadStates | None:
    """Returns a function that computes the LLM states for a control.

    It maps a batch on device to the batch keys of the states. Returns None for
    a control without states of its own.

    Args:
      params: all parameters of the system.
      control: one of `CONTROLS`.
    """
    if control not in READING:
      return None
    llm = params['llm']
    if control == 'untrained':
      llm = untrained_llm(self._system, llm)
    read = functools.partial(self._read[control], {**params, 'llm': llm})
    return lambda batch: {'llm_states': read(batch)}


def _is_of_llm(path: str) -> bool:
  return path.startswith('llm/')


def untrained_llm(system: system_lib.System, trained: PyTree) -> PyTree:
  """Returns randomly initialized LLM parameters, from a fixed seed.

  Args:
    system: a system with an LLM.
    trained: the trained LLM parameters, for shapes, dtypes and shardings.
  """

  def make(key: jax.Array) -> PyTree:
    boxed = parameters.init(system, key, only=_is_of_llm)
    return jax.tree.map(
      lambda x, like: x.astype(like.dtype),
      partitioning.unbox(boxed)['params']['llm'],
      trained,
    )

  shardings = jax.tree.map(lambda x: x.sharding, trained)
  return jax.jit(make, out_shardings=shardings)(jax.random.key(_UNTRAINED_SEED))
