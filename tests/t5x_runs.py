# SPDX-License-Identifier: Apache-2.0
"""Runs for T5X, never trained: all numbers of their states are random."""

import dataclasses
import pathlib

import helpers
import jax
import jax.numpy as jnp

from l2s_jax.runtime import partitioning
from l2s_jax.systems import builders, parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint
from l2s_jax.training import state as state_lib

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'
LLM = KEPT / 'llm'
STEP = 7

SLM = system_lib.Tower(
  config=helpers.T5_1_1,
  vocabulary=str(LLM / 'vocabularies' / 'answer' / 'spiece.model'),
)
# With another vocabulary than the LLM's.
DECODER_ONLY = system_lib.Tower(
  config=dataclasses.replace(helpers.GPT2, vocab_size=320),
  vocabulary=str(KEPT / 'data' / 'bpe'),
)


def build(slm=SLM, **options):
  return builders.llm_to_slm_system(system_lib.Tower(str(LLM)), slm, **options)


def random_state(system, optimizer, step, seed):
  """Returns a layout and a state in which all numbers are random."""
  config = partitioning.MeshConfig()
  mesh = partitioning.make_mesh(config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, config)
  shapes, axes = (
    parameters.split(tree, system.frozen)[1]
    for tree in (layout.shapes, layout.axes)
  )
  keys = iter(jax.random.split(jax.random.key(seed), 1000))
  trained = jax.tree.map(
    lambda s: 0.2 * jax.random.normal(next(keys), s.shape, s.dtype), shapes
  )
  state = state_lib.create(trained, optimizer.make(axes), seed=0)
  opt_state = jax.tree.map(
    lambda x: (
      jax.random.uniform(next(keys), x.shape) if x.ndim else jnp.int32(step)
    ),
    state.opt_state,
  )
  return layout, state.replace(step=jnp.int32(step), opt_state=opt_state)


def save(folder, system, optimizer, step=STEP):
  """Returns the layout and the state of a run that is saved to a folder."""
  layout, state = random_state(system, optimizer, step, 1)
  system, _ = parameters.load_frozen(system, layout)
  run_folder.save(system, folder)
  saver = checkpoint.Checkpointer(folder)
  saver.save(state, {'optimizer': optimizer.description})
  saver.wait()
  saver.close()
  return layout, state
