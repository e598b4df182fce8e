# SPDX-License-Identifier: Apache-2.0
"""Folders of runs that were never trained: parameters are given."""

import jax
import jax.numpy as jnp

from l2s_jax.systems import run_folder
from l2s_jax.training import checkpoint, state


def save(folder, system, params, steps=(1,)):
  """Saves a run with the same trained parameters at each step."""
  run_folder.save(system, folder)
  checkpointer = checkpoint.Checkpointer(folder)
  for step in steps:
    trained = state.TrainState(
      step=jnp.int32(step),
      trainable=params,
      opt_state=(),
      key=jax.random.key_data(jax.random.key(0)),
    )
    checkpointer.save(trained, {})
  checkpointer.wait()
  checkpointer.close()
