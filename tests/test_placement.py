# SPDX-License-Identifier: Apache-2.0
"""The decoding model is whole on every device, if it fits."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from l2s_jax.inference import generate, placement
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters

CONFIG = partitioning.MeshConfig(data=1, fsdp=4, tensor=2)


def names(tree):
  """Returns the mesh axes of each parameter."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): [
      name
      for axes in leaf.sharding.spec
      for name in ((axes,) if isinstance(axes, str) else axes or ())
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@functools.cache
def sharded(name):
  """Returns a system, and its parameters on a mesh of eight devices."""
  system = helpers.system(helpers.MODULES[name])
  mesh = partitioning.make_mesh(CONFIG)
  layout = parameters.layout(system, mesh, CONFIG)
  params = helpers.random_params(system.module)
  return system, lambda: jax.device_put(params, layout.shardings)


@pytest.mark.parametrize('consume', [False, True])
@pytest.mark.parametrize('name', ['llm_to_t5_1_1-add-shared', 't5_1_1'])
def test_what_decodes_is_whole_and_what_reads_stays_sharded(name, consume):
  system, make = sharded(name)
  params = make()
  generator = generate.generator(system, 4)
  prepared = generator.prepare(params, consume=consume)
  for path, axes in names(generator.writer_params(prepared)).items():
    assert 'fsdp' not in axes or path.startswith('encoder/'), path
    if path.endswith('mlp/wi_0/kernel'):
      reads = path.startswith('encoder/')
      assert axes == (['fsdp', 'tensor'] if reads else ['tensor'])
  if 'llm' in prepared:
    assert ['fsdp', 'tensor'] in names(prepared['llm']).values()
  expected = generator.prepare(helpers.random_params(system.module))
  jax.tree.map(np.testing.assert_array_equal, prepared, expected)
  leaves = jax.tree.leaves(params)
  assert any(leaf.is_deleted() for leaf in leaves) == consume


def test_a_model_of_one_device_is_not_copied():
  params = {'x': jnp.ones(3), 'y': np.ones(3)}
  assert placement.for_decoding(params, ()) is params


@pytest.mark.parametrize(('gib', 'is_whole'), [(3, True), (5, False)])
def test_a_model_that_takes_more_than_a_quarter_of_a_chip_stays(gib, is_whole):
  """A v5e has 15.75 GiB."""
  try:
    topology = topologies.get_topology_desc('v5e:2x4', 'tpu')
  except RuntimeError as error:
    pytest.skip(f'no TPU compiler: {error}')
  mesh = partitioning.make_mesh(
    partitioning.MeshConfig(fsdp=8), topology.devices
  )
  model = jax.ShapeDtypeStruct(
    (8, gib * 2**27),
    jnp.uint8,
    sharding=NamedSharding(mesh, PartitionSpec('fsdp')),
  )
  (found,) = placement.for_decoding([model], ())
  assert (found.sharding.spec == PartitionSpec(None)) == is_whole
  assert is_whole or found is model
