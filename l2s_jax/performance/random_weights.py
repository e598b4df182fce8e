# SPDX-License-Identifier: Apache-2.0
"""Weights that nobody trained, drawn as they are read.

For benchmarks: of any size, never in memory whole, and the same numbers
whoever reads them and in which order.
"""

import math
import zlib
from typing import Any

import jax
import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib

# Found by trying: a tied head else repeats the token that it has read.
_MLP_GAIN, _EMBEDDING_STDDEV = 8, 0.3


class RandomWeights:
  """A source of random float32 weights for a config.

  The MLPs speak louder than the embeddings that they answer to, so that what is
  written changes from token to token: equal answers then say something.
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
  """Returns one tensor, or one layer of it; one seed gives the same always."""
  kind = path[-1]
  if kind == 'bias':
    return np.zeros(shape, np.float32)
  if kind == 'scale':
    return np.full(shape, not config.norm_unit_offset, np.float32)
  if kind == 'kernel':
    num_inputs = math.prod(shape[:-1]) if path[-2] == 'out' else shape[0]
    if path[-2] == 'query' and not config.scale_attention:
      num_inputs *= config.head_dim  # T5's logits have no such divisor.
    stddev = num_inputs**-0.5 * (_MLP_GAIN if path[-2] == 'wo' else 1)
  else:
    stddev = _EMBEDDING_STDDEV if kind == 'embedding' else 1.0
  key = [seed, zlib.crc32('/'.join(path).encode()), layer]
  array = np.random.default_rng(key).standard_normal(shape, np.float32)
  array *= stddev
  return array
