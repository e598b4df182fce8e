# SPDX-License-Identifier: Apache-2.0
"""What the SLM may get in the place of the LLM's states of its prompt.

    none       Z of the prompt: no control
    zero       Z = 0
    other      Z of another prompt
    untrained  Z of the states of an encoder of the same shape, its weights
               random
    layer_0    Z of the LLM's input embeddings, as its first layer reads them

The first three are keys that batches have or have not. Of the last two the
states are made here and stand in the batch as a cache's do
(`models/stored_states.py`); the prompt embeddings that `add` takes stay those
of the prompt.
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
# Those for which the LLM must be there.
READING = ('untrained', 'layer_0')

# No run begins with it by chance: the LLM may be the untrained encoder of its
# own first step.
_UNTRAINED_SEED = 240216844

ReadStates = Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]


class ControlStates:
  """Makes the states of `READING`; a function of each is compiled once."""

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
    """Returns what makes the keys of states for a batch on the devices.

    None if a control has no states of its own.

    Args:
      params: all of the system's.
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
  """Returns random parameters of an LLM, always the same, where its own are.

  Args:
    system: with an LLM.
    trained: its parameters, for shapes, types and shardings.
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
