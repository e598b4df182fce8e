# SPDX-License-Identifier: Apache-2.0
"""Laws of the mesh: who is where, what is whole, and what is refused.

That many devices compute what one does is in `test_mesh_laws.py`.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re

import gin
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from l2s_jax.models import batch_keys, l2s, layers
from l2s_jax.runtime import gin_config, partitioning
from l2s_jax.systems import builders, parameters
from l2s_jax.training import optim
from l2s_jax.training import state as state_lib

MESHES = pathlib.Path(__file__).parent.parent / 'gin_configs' / 'meshes'

# The LLM's weights over `fsdp` alone.
FSDP_ONLY = dict.fromkeys(['vocab', 'heads', 'kv_heads', 'mlp'])
CUBE = partitioning.MeshConfig(data=2, fsdp=2, tensor=2, llm_rules=FSDP_ONLY)


def entered(mesh_config):
  """Returns mesh and the context that `train` enters around its work."""
  mesh = partitioning.make_mesh(mesh_config)
  stack = contextlib.ExitStack()
  stack.enter_context(partitioning.use_mesh(mesh))
  stack.enter_context(partitioning.axis_rules(mesh_config.rules('slm')))
  return mesh, stack


# --- devices in a mesh ---


@dataclasses.dataclass(frozen=True)
class Device:
  """What placement asks of a device."""

  id: int
  slice_index: int
  coords: tuple[int, int, int] = (0, 0, 0)
  platform: str = 'gpu'
  device_kind: str = 'NVIDIA H100'
  core_on_chip: int = 0


def gpu_nodes(num_nodes, num_gpus):
  gpus = [
    Device(node * num_gpus + i, slice_index=node)
    for node in range(num_nodes)
    for i in range(num_gpus)
  ]
  return gpus[::-1]  # in no order that would do by itself


def tpu_slices(num_slices, kind, *bounds):
  coords = list(np.ndindex(*bounds[::-1]))
  return [
    Device(
      i * len(coords) + j,
      slice_index=i,
      coords=(*xyz[::-1], 0)[:3],
      platform='tpu',
      device_kind=kind,
    )
    for i in range(num_slices)
    for j, xyz in enumerate(coords)
  ]


@pytest.mark.parametrize(
  'shape, slices',
  [
    ((4, 2, 1), [[[0], [0]], [[0], [0]], [[1], [1]], [[1], [1]]]),
    ((2, 1, 4), [[[0, 0, 0, 0]], [[1, 1, 1, 1]]]),
    ((1, 8, 1), [[[0], [0], [0], [0], [1], [1], [1], [1]]]),
    ((1, 2, 4), [[[0, 0, 0, 0], [1, 1, 1, 1]]]),
  ],
)
def test_the_outermost_axis_goes_over_the_slow_network(shape, slices):
  devices = partitioning.arrange(shape, gpu_nodes(2, 4))
  found = np.vectorize(lambda device: device.slice_index)(devices)
  np.testing.assert_array_equal(found, slices)
  assert len({device.id for device in devices.flat}) == 8


def test_several_axes_share_the_slices_that_one_does_not_divide():
  devices = partitioning.arrange((2, 6, 1), gpu_nodes(6, 2))
  slices = np.vectorize(lambda device: device.slice_index)(devices)[..., 0]
  # `data` splits the six in two; `fsdp` has three of them, two GPUs of each.
  assert slices.tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]


PRESETS = {
  'eight_gpus': (gpu_nodes(1, 8), (1, 8, 1)),
  'h100_64': (gpu_nodes(8, 8), (8, 8, 1)),
  'v5e_8': (tpu_slices(1, 'TPU v5 lite', 2, 4), (1, 8, 1)),
  'v5e_256': (tpu_slices(1, 'TPU v5 lite', 16, 16), (16, 16, 1)),
  'v5p_128': (tpu_slices(1, 'TPU v5', 4, 4, 4), (4, 16, 1)),
  'v6e_256': (tpu_slices(1, 'TPU v6 lite', 16, 16), (16, 16, 1)),
  'two of v5e_256': (tpu_slices(2, 'TPU v5 lite', 16, 16), (32, 16, 1)),
}


@pytest.mark.parametrize('name', PRESETS)
def test_presets_lie_in_their_networks(name):
  devices, shape = PRESETS[name]
  path = MESHES / f'{name.split()[-1]}.gin'
  gin_config.parse_config([str(path)], [])
  config = gin.get_configurable('MeshConfig')()
  assert partitioning.fit(config, len(devices)) == shape
  multiple = re.search(r'BATCH_SIZE: multiples of (\d+)', path.read_text())
  assert multiple and shape[0] * shape[1] % int(multiple[1]) == 0
  arranged = partitioning.arrange(shape, devices)
  for group in arranged[:, :, 0]:  # Layers are gathered within.
    assert len({device.slice_index for device in group}) == 1
    coords = np.array([device.coords for device in group])
    extent = coords.max(0) - coords.min(0) + 1
    assert extent.prod() in (1, len(group))  # GPUs have none; no holes


# --- parameters and activations on a mesh ---


def test_parameters_and_slots_are_really_spread():
  system = helpers.system(helpers.llm_to_slm('t5_1_1', 'add', 'shared'))
  mesh = partitioning.make_mesh(CUBE)
  layout = parameters.layout(system, mesh, CUBE)
  _, shapes = parameters.split(layout.shapes, system.frozen)
  _, shardings = parameters.split(layout.shardings, system.frozen)
  adam = optim.adamw().make({})
  _, shardings = state_lib.shardings(shapes, shardings, adam, mesh)
  _, trainable = parameters.split(
    helpers.random_params(system.module), system.frozen
  )
  state = jax.device_put(state_lib.create(trainable, adam, 0), shardings)

  kernel = state.trainable['slm']['decoder']['layers']['mlp']['wi_0']['kernel']
  assert kernel.shape[1:] == (16, 32)  # embed, mlp
  shards = kernel.addressable_shards
  assert {shard.data.shape[1:] for shard in shards} == {(8, 16)}
  assert len({str(shard.index) for shard in shards}) == 4
  assert len(shards) == 8

  for name in ('mu', 'nu'):
    moments = optax.tree_utils.tree_get(state.opt_state, name)
    for moment, param in zip(
      jax.tree.leaves(moments), jax.tree.leaves(state.trainable), strict=True
    ):
      assert moment.sharding == param.sharding


def test_the_llm_follows_rules_of_its_own():
  module = helpers.llm_to_slm('t5_1_1', 'add', 'shared')
  shardings = parameters.layout(
    helpers.system(module), partitioning.make_mesh(CUBE), CUBE
  ).shardings
  llm = shardings['llm']['encoder']['layers']['mlp']['wi_0']['kernel'].spec
  assert llm == PartitionSpec(None, 'fsdp', None)
  assert shardings['llm']['token_embedder']['embedding'].spec == PartitionSpec(
    None, 'fsdp'
  )
  slm = shardings['slm']['token_embedder']['embedding'].spec
  assert slm == PartitionSpec('tensor', 'fsdp')
  assert shardings['projector']['wi']['kernel'].spec == PartitionSpec(
    'fsdp', 'tensor'
  )


def test_the_llms_activations_follow_its_rules_too():
  module = helpers.llm_to_slm('t5_1_1', 'replace', 'shared')
  system = helpers.system(module)

  def constraints(mesh_config):
    mesh, context = entered(mesh_config)
    with context:
      layout = parameters.layout(system, mesh, mesh_config)
      program = jax.make_jaxpr(
        lambda params, batch: builders.with_rules(
          system, mesh_config
        ).module.apply({'params': params}, batch, method='encode_prompt')
      )(layout.shapes, batch_keys.example_batch(8, 7, 6))
    return re.findall(r'spec=P\(.*\)', str(program))

  default = dataclasses.replace(CUBE, llm_rules={})
  assert any('tensor' in spec for spec in constraints(default))
  ours = constraints(CUBE)
  assert ours and not any('tensor' in spec for spec in ours)


@pytest.mark.parametrize('data, fsdp, tensor', [(2, 4, 1), (2, 2, 2)])
def test_no_device_looks_up_the_embeddings_of_the_whole_batch(
  data, fsdp, tensor
):
  """Though features and rows are split over the same devices."""
  mesh, context = entered(partitioning.MeshConfig(data, fsdp, tensor))
  config = dataclasses.replace(helpers.T5_1_0, emb_dim=64)
  embed = layers.token_embed(config)
  table = partitioning.param_shardings(
    {'slm': jax.ShapeDtypeStruct((264, 64), jnp.float32)},
    {'slm': PartitionSpec('vocab', 'embed')},
    mesh,
    partitioning.MeshConfig(),
  )['slm']

  def loss(table, ids):
    x = embed.apply({'params': {'embedding': table}}, ids)
    x = partitioning.constrain(x, ('batch', 'length', 'embed'))
    return jnp.sum(jnp.tanh(x))

  with context:
    text = (
      jax.jit(jax.value_and_grad(loss), out_shardings=(None, table))
      .lower(
        jax.ShapeDtypeStruct((264, 64), jnp.float32, sharding=table),
        jax.ShapeDtypeStruct(
          (32, 16), jnp.int32, sharding=partitioning.batch_sharding(mesh)
        ),
      )
      .compile()
      .as_text()
    )
  made = re.findall(r'= f32\[([\d,]+)\]', text or '')
  sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in made]
  # Its features of the rows of one replica are the most.
  assert max(sizes) <= max(32 // data * 16 * 64 // fsdp, 264 * 64 // fsdp)


@pytest.mark.parametrize('vocab_size, axis', [(264, 'tensor'), (261, None)])
def test_a_vocabulary_that_does_not_divide_stays_whole(vocab_size, axis):
  config = dataclasses.replace(helpers.GPT2, vocab_size=vocab_size)
  layout = parameters.layout(
    helpers.system(l2s.build(config)), partitioning.make_mesh(CUBE), CUBE
  )
  table = layout.shardings['token_embedder']['embedding']
  assert table.spec == PartitionSpec(axis, 'fsdp')


# --- what is refused ---


@pytest.mark.parametrize(
  'sizes, nearest',
  [
    (dict(data=3), 'data=8, fsdp=1, tensor=1'),
    (dict(tensor=3), 'data=2, fsdp=1, tensor=4'),
    (dict(tensor=16), 'data=1, fsdp=1, tensor=8'),
    (dict(data=2, fsdp=2, tensor=3), 'data=2, fsdp=2, tensor=2'),
    (dict(data=1, fsdp=16, tensor=3), 'data=1, fsdp=4, tensor=2'),
  ],
)
def test_meshes_that_do_not_fit_are_refused_with_the_nearest(sizes, nearest):
  asked = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
  asked = asked if len(sizes) == 3 else asked.split(', ')[-1]
  message = f'MeshConfig has .*{asked}.*devices, 8. The nearest .* {nearest}\\.'
  with pytest.raises(ValueError, match=message):
    partitioning.make_mesh(partitioning.MeshConfig(**sizes))


@pytest.mark.parametrize(
  'sizes, message',
  [
    (dict(data=-1, fsdp=-1), 'data=-1, fsdp=-1.*at most one'),
    (dict(data=0), 'data=0.*positive'),
    (dict(data=1, tensor=-2), 'tensor=-2.*positive'),
  ],
)
def test_sizes_that_mean_nothing_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    partitioning.make_mesh(partitioning.MeshConfig(**sizes))


def test_minus_one_takes_the_devices_that_are_left():
  mesh = partitioning.make_mesh(partitioning.MeshConfig(fsdp=2))
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 2, 'tensor': 1}
  mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, tensor=-1))
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 1, 'tensor': 4}


@pytest.mark.parametrize(
  'batch_size, num_microbatches, nearest',
  [
    (0, 1, '4'),
    (1, 1, '4'),
    (6, 1, '4 or 8'),
    (33, 1, '32 or 36'),
    (4, 3, '12'),
    (28, 3, '24 or 36'),
  ],
)
def test_batches_that_do_not_divide_are_refused(
  batch_size, num_microbatches, nearest
):
  mesh = partitioning.make_mesh(CUBE)
  parts = f' in NUM_MICROBATCHES={num_microbatches} parts'
  message = (
    f'BATCH_SIZE={batch_size}{parts if num_microbatches > 1 else ""} does not '
    f'divide over the 4 devices .* multiple of {4 * num_microbatches}, such as '
    f'{nearest}\\.'
  )
  with pytest.raises(ValueError, match=message):
    partitioning.check_batch_size(
      batch_size, mesh, num_microbatches=num_microbatches
    )
  for size in nearest.split(' or '):
    partitioning.check_batch_size(
      int(size), mesh, num_microbatches=num_microbatches
    )


def test_parameters_that_do_not_divide_are_all_listed():
  config = dataclasses.replace(
    helpers.T5_1_0, vocab_size=257, mlp_dim=34, num_heads=6
  )
  module = helpers.MODULES['t5_1_0'].clone(config=config)
  mesh_config = partitioning.MeshConfig(data=2, tensor=4)
  with pytest.raises(ValueError) as error:
    parameters.layout(
      helpers.system(module), partitioning.make_mesh(mesh_config), mesh_config
    )
  message = str(error.value)
  assert 'decoder/layers/mlp/wi/kernel (2, 16, 34): 34 does not' in message
  line = 'query/kernel (2, 16, 6, 4): 6 does not divide over 4 devices'
  assert line in message and "'tensor'" in message
  # Keys stay whole, and so does the vocabulary.
  assert 'key/kernel' not in message and '257' not in message
  assert 'all of them, and the devices: tensor=2. Set MeshConfig' in message
  smaller = partitioning.MeshConfig(data=4, tensor=2)
  parameters.layout(
    helpers.system(module), partitioning.make_mesh(smaller), smaller
  )


@pytest.mark.parametrize(
  'rules, message',
  [
    ({'emb': None}, "llm_rules has 'emb', .* logical axes batch, vocab"),
    ({'embed': 'model'}, "llm_rules maps 'embed' to 'model', .* mesh axes"),
    ({'embed': ('data', 'x')}, "maps 'embed' to 'x'"),
  ],
)
def test_rules_of_unknown_axes_are_refused(rules, message):
  with pytest.raises(ValueError, match=message):
    partitioning.MeshConfig(llm_rules=rules)


@pytest.mark.parametrize('num_kv_heads, axis', [(2, 'tensor'), (1, None)])
def test_few_heads_of_keys_and_values_stay_whole(num_kv_heads, axis):
  config = dataclasses.replace(
    helpers.LLAMA, num_heads=6, num_kv_heads=num_kv_heads
  )
  layout = parameters.layout(
    helpers.system(l2s.build(config)), partitioning.make_mesh(CUBE), CUBE
  )
  attention = layout.shardings['decoder']['layers']['self_attention']
  assert attention['query']['kernel'].spec == PartitionSpec(
    None, 'fsdp', 'tensor', None
  )
  assert attention['key']['kernel'].spec == PartitionSpec(
    None, 'fsdp', axis, None
  )
  assert attention['value']['bias'].spec == PartitionSpec(None, axis, None)


def test_put_batch_splits_rows_over_data_and_fsdp():
  mesh = partitioning.make_mesh(CUBE)
  rows = np.arange(16, dtype=np.int32).reshape(8, 2)
  batch = partitioning.put_batch({'x': rows}, mesh)
  np.testing.assert_array_equal(batch['x'], rows)
  assert {s.data.shape for s in batch['x'].addressable_shards} == {(2, 2)}


def test_bytes_per_device_counts_one_shard():
  mesh = partitioning.make_mesh(CUBE)
  shapes = {
    'split': jax.ShapeDtypeStruct((8, 6), jnp.float32),
    'whole': jax.ShapeDtypeStruct((5,), jnp.bfloat16),
  }
  shardings = {
    'split': jax.NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), 'tensor')),
    'whole': partitioning.replicated(mesh),
  }
  assert partitioning.bytes_per_device(shapes, shardings) == 2 * 3 * 4 + 5 * 2


@pytest.mark.parametrize('name', helpers.cases(helpers.MODULES))
def test_every_axis_of_a_parameter_has_a_rule(name):
  _, axes = partitioning.abstract_params(
    functools.partial(helpers.MODULES[name].init, deterministic=True),
    batch_keys.example_batch(1, 2, 2),
  )
  used = set()
  for spec in jax.tree.leaves(
    axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
  ):
    assert None not in spec
    used |= set(spec)
  assert used <= {axis for axis, _ in partitioning.DEFAULT_RULES}
  assert {'embed', 'vocab', 'heads', 'kv', 'mlp', 'layers'} <= used


def test_rules_replace_those_of_their_axis():
  config = partitioning.MeshConfig(
    llm_rules={'mlp': None, 'embed': ['data', 'fsdp']}
  )
  rules = config.rules('llm')
  assert [name for name, _ in rules] == [
    name for name, _ in partitioning.DEFAULT_RULES
  ]
  assert dict(rules) == dict(partitioning.DEFAULT_RULES) | {
    'mlp': None,
    'embed': ('data', 'fsdp'),
  }
  assert config.rules('slm') == partitioning.DEFAULT_RULES
  assert config.rules('projector') == partitioning.DEFAULT_RULES
