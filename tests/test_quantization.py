# SPDX-License-Identifier: Apache-2.0
"""Laws of int8: what is stored, and how far its logits are from float32's."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.models import l2s

pytest.importorskip('qwix', reason='int8 needs Qwix')

NAMES = ('t5_1_0', 't5_1_1', 'gpt2', 'llama', 'llm_to_gpt2-add-foreign')


def read(module, params, batch):
  """Returns logits of the first answer token, read from a cache."""
  cache = module.apply({'params': params}, batch, num_slots=1, method='prefill')
  writer, name = l2s.writer(module)
  return writer.apply(
    {'params': l2s.writer_params(params, name)},
    batch['decoder_input_tokens'][:, :1],
    cache,
    method='extend',
  )[0]


@pytest.mark.parametrize('kind', ['int8', 'int8_dynamic'])
@pytest.mark.parametrize('name', NAMES)
def test_int8_logits_are_near_those_of_float32(name, kind):
  module = helpers.MODULES[name]
  params, batch = helpers.random_params(module), helpers.batch_for(module)

  def logits(**quantization):
    reading = l2s.for_generation(module, **quantization)
    return read(reading, l2s.params_for_generation(reading, params), batch)

  exact = logits()
  found = logits(quantization=kind, llm_quantization=kind)
  error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  # One rounding is within half of 1/127 of the largest of its column.
  assert 1e-5 < error < 0.1


@pytest.mark.parametrize('name', NAMES)
def test_kernels_are_int8_with_a_scale_for_each_output(name):
  module = helpers.MODULES[name]
  params = helpers.random_params(module)
  plain, packed = (
    l2s.params_for_generation(
      l2s.for_generation(module, quantization=kind, llm_quantization=kind),
      params,
    )
    for kind in ('none', 'int8')
  )
  by_path = {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(packed)
  }
  num_kernels = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
    name = jax.tree_util.keystr(path)
    if 'kernel' not in name or 'projector' in name or 'embedder' in name:
      assert by_path[name].dtype == leaf.dtype  # norms, tables, the projector
      continue
    value, scale = by_path[f'{name}.qvalue'], by_path[f'{name}.scale']
    num_kernels += 1
    assert value.dtype == jnp.int8 and value.shape == leaf.shape
    axes = (0, 1) if "'out'" in name else (0,)
    assert all(scale.shape[axis] == 1 for axis in axes)
    # Rounded to the nearest: what comes back is off by half a step.
    assert (np.abs(value * scale - leaf) <= 0.501 * scale).all()
  assert num_kernels > 4
