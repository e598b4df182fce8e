# SPDX-License-Identifier: Apache-2.0
"""Laws of the states that stand in the place of the LLM's."""

import helpers
import jax
import numpy as np
import pytest

from l2s_jax.evaluation import controls
from l2s_jax.models import l2s


@pytest.mark.parametrize('layer', [None, 1, l2s.MIX])
def test_they_are_others_than_those_of_the_prompt_whatever_its_layer(layer):
  module = helpers.MODULES['llm_to_t5_1_1-add-shared'].clone(llm_layer=layer)
  params, batch = helpers.random_params(module), helpers.batch_for(module)
  states = controls.ControlStates(helpers.system(module))
  own = module.apply({'params': params}, batch, method='read_prompt')[0]
  found = [own]
  for control in controls.READING:
    read = states.reader(params, control)
    assert read is not None
    found.append(read(batch)['llm_states'])
  real = np.asarray(batch['encoder_segment_ids'] > 0)
  rows = [np.asarray(x, np.float32)[real] for x in jax.device_get(found)]
  assert len({x.shape for x in rows}) == 1
  for one, other in ((0, 1), (0, 2), (1, 2)):
    assert np.abs(rows[one] - rows[other]).max() > 1e-2
