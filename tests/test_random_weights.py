# SPDX-License-Identifier: Apache-2.0
"""Laws of random weights: the same however they are read."""

import helpers
import numpy as np
import pytest

from l2s_jax.models import shapes
from l2s_jax.performance import random_weights

CONFIGS = {'t5': helpers.T5_1_0, 'gemma3': helpers.GEMMA3}


@pytest.mark.parametrize('name', CONFIGS)
def test_every_tensor_is_there_and_the_same_layer_by_layer(name):
  source = random_weights.RandomWeights(CONFIGS[name], seed=3)
  again = random_weights.RandomWeights(CONFIGS[name], seed=3)
  for path, shape in shapes.of_model(CONFIGS[name]).items():
    array = source.read(path)
    assert array.shape == shape.shape, path
    assert array.dtype == np.float32, path
    np.testing.assert_array_equal(array, again.read(path))
    if 'layers' in path:
      for layer in range(shape.shape[0]):
        np.testing.assert_array_equal(array[layer], again.read(path, layer))


def test_no_two_tensors_layers_or_seeds_are_alike():
  source = random_weights.RandomWeights(helpers.T5_1_0, seed=3)
  other = random_weights.RandomWeights(helpers.T5_1_0, seed=4)
  mlp = ('decoder', 'layers', 'mlp', 'wi', 'kernel')
  in_encoder = ('encoder', *mlp[1:])
  first, second = source.read(mlp)
  for array in (second, source.read(in_encoder, 0), other.read(mlp, 0)):
    assert not np.any(first == array)


@pytest.mark.parametrize('name', CONFIGS)
def test_norms_begin_as_the_identity(name):
  config = CONFIGS[name]
  source = random_weights.RandomWeights(config, seed=0)
  scale = source.read(('decoder', 'final_norm', 'scale'))
  assert np.all(config.norm_unit_offset + scale == 1)
