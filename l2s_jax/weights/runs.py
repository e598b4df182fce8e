# SPDX-License-Identifier: Apache-2.0
"""Weights that a run of ours has trained."""

import functools
import json
import pathlib

import numpy as np

from l2s_jax import checkpoint
from l2s_jax.models import config as config_lib


class Run:
  """A checkpoint of a run; of an LLM-to-SLM run, its SLM."""

  def __init__(self, folder: pathlib.Path, step: int | None = None):
    """Opens a run's folder.

    Args:
      folder: the one with `model.json`.
      step: the checkpoint; None takes the newest.
    """
    self.location = str(folder)
    self._folder = folder
    self._step = step
    description = json.loads((folder / 'model.json').read_text())
    self._prefix: tuple[str, ...] = ()
    if description['kind'] == 'llm_to_slm':
      self._prefix = ('slm',)
      self.config = config_lib.TransformerConfig(**description['slm'])
    else:
      self.config = config_lib.TransformerConfig(**description['config'])

  def step(self) -> int | None:
    return self._found[1]

  @property
  def _params(self) -> pathlib.Path:
    return self._found[0]

  @functools.cached_property
  def _found(self) -> tuple[pathlib.Path, int]:
    return checkpoint.params_folder(self._folder, self._step)

  def shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
    depth = len(self._prefix)
    return {
      path[depth:]: array.shape
      for path, array in checkpoint.array_shapes(self._params).items()
      if path[:depth] == self._prefix
    }

  def read(self, path: tuple[str, ...]) -> np.ndarray:
    full = self._prefix + path
    return checkpoint.read_arrays(self._params, [full])[full]
