# SPDX-License-Identifier: Apache-2.0
"""Only what T5X can compute goes out to it.

That it reads back what was written is in `test_t5x.py`.
"""

import dataclasses

import helpers
import pytest

from l2s_jax.interop import to_t5x
from l2s_jax.models import l2s

T5 = dataclasses.replace(
  helpers.T5_1_1, relpos_buckets=32, relpos_max_distance=128
)


@pytest.mark.parametrize('name', ['relu', 'gelu', 'silu', 'gelu_exact'])
@pytest.mark.parametrize('is_gated', [True, False])
def test_an_activation_that_t5x_has_not_is_refused(name, is_gated, tmp_path):
  config = dataclasses.replace(
    T5, mlp_activations=(name, 'linear') if is_gated else (name,)
  )
  source = helpers.Arrays(config, helpers.random_params(l2s.build(config)))
  if name != 'gelu_exact':
    to_t5x.save(source, tmp_path)
    return
  with pytest.raises(ValueError, match="T5X has no 'gelu_exact'"):
    to_t5x.save(source, tmp_path)
  assert not any(tmp_path.iterdir())
