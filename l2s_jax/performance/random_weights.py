# SPDX-License-Identifier: Apache-2.0
"""Random weights of any size, generated as they are read.

For benchmarks: the model is never in memory as a whole, and values do not
depend on the order of reading.
"""

import math
import zlib
from typing import Any

import jax
import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib

# Found by experiment: otherwise a model with tied head repeats its input.
_MLP_GAIN, _EMBEDDING_STDDEV = 8, 0.3


class RandomWeights:
  """Random float32 weights for a config, as a `source.Source`.

  MLPs dominate over embeddings, so that output tokens vary and equality of
  answers is significant.
  """

  model_type: str | None = None

  def __init__(self, config: config_lib.TransformerConfig, seed: int):
    self.config = config
    self.location = f'random weights (seed {seed})'
    self.special_ids: dict[str, Any] = {}
    self._seed = seed

  def step(self) -> int | None:
    return None

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    return dict(shapes_lib.of_model(self.config))

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> np.ndarray:
    shape = self.shapes()[path].shape
    if 'layers' not in path:
      return draw(self.config, path, shape, self._seed)
    if layer is None:
      return np.stack([self.read(path, i) for i in range(shape[0])])
    return draw(self.config, path, shape[1:], self._seed, layer)

  def name(self, path: shapes_lib.Path) -> str:
    return '/'.join(path)

  def digest(self, path: shapes_lib.Path) -> str | None:
    return None


def draw(
  config: config_lib.TransformerConfig,
  path: shapes_lib.Path,
  shape: tuple[int, ...],
  seed: int,
  layer: int = 0,
) -> np.ndarray:
  """Returns one tensor, or one layer of it, as a function of the seed.

  Args:
    config: config of the model.
    path: canonical name.
    shape: shape of the tensor or layer.
    seed: seed of the weights.
    layer: index of the layer.
  """
  kind = path[-1]
  if kind == 'bias':
    return np.zeros(shape, np.float32)
  if kind == 'scale':
    return np.full(shape, not config.norm_unit_offset, np.float32)
  if kind == 'kernel':
    num_inputs = math.prod(shape[:-1]) if path[-2] == 'out' else shape[0]
    if path[-2] == 'query' and not config.scale_attention:
      num_inputs *= config.head_dim  # T5 does not scale attention logits.
    stddev = num_inputs**-0.5 * (_MLP_GAIN if path[-2] == 'wo' else 1)
  else:
    stddev = _EMBEDDING_STDDEV if kind == 'embedding' else 1.0
  key = [seed, zlib.crc32('/'.join(path).encode()), layer]
  array = np.random.default_rng(key).standard_normal(shape, np.float32)
  array *= stddev
  return array
