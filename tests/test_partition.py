# SPDX-License-Identifier: Apache-2.0
"""Laws of the mesh: many devices compute what one does, or say why not."""

import contextlib
import dataclasses
import functools
import pathlib
import re
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from l2s_jax import (
  checkpoint,
  optim,
  parameters,
  partition,
  systems,
  train,
)
from l2s_jax import state as state_lib
from l2s_jax.models import l2s

NUM_STEPS = 4

# The LLM's weights over `fsdp` alone; activations over nothing but the batch.
FSDP_ONLY = (
  ('batch', ('data', 'fsdp')),
  ('embed', 'fsdp'),
  *(
    (axis, None)
    for axis in (
      'vocab',
      'heads',
      'kv_heads',
      'mlp',
      'llm_embed',
      'length',
      'kv',
      'layers',
      'relpos_buckets',
      'abspos_buckets',
    )
  ),
)
CUBE = partition.MeshConfig(data=2, fsdp=2, tensor=2, llm_rules=FSDP_ONLY)
ONE = partition.MeshConfig(data=1)


def make_mesh(config):
  devices = jax.devices()
  return partition.make_mesh(config, devices[:1] if config is ONE else devices)


def entered(mesh_config):
  """Returns mesh and the context that `train` enters around its work."""
  mesh = make_mesh(mesh_config)
  stack = contextlib.ExitStack()
  stack.enter_context(partition.use_mesh(mesh))
  stack.enter_context(partition.axis_rules(mesh_config.rules('slm')))
  return mesh, stack


@dataclasses.dataclass
class Run:
  """What a few steps of training left behind."""

  layout: parameters.Layout
  state: state_lib.TrainState
  losses: list[float]
  tokens: np.ndarray


def batch_of_eight(module, seed):
  batch = helpers.batch_for(
    module,
    prompt_lengths=helpers.PROMPT_LENGTHS * 2,
    answer_lengths=helpers.ANSWER_LENGTHS * 2,
    seed=seed,
  )
  return {key: np.asarray(value) for key, value in batch.items()}


def train_on(
  mesh_config: partition.MeshConfig,
  module: l2s.LlmToSlm,
  run_dir: pathlib.Path,
) -> Run:
  """Trains a few steps as `train.train` does, saves, and generates."""
  mesh, context = entered(mesh_config)
  optimizer = optim.adamw(0.01, weight_decay=0.1).make({})
  params = helpers.random_params(module)
  with context:
    system = systems.with_rules(helpers.system(module), mesh_config)
    layout = parameters.layout(system, mesh, mesh_config)
    frozen, trainable = (
      jax.device_put(part, sharding)
      for part, sharding in zip(
        state_lib.split(params, system.frozen),
        state_lib.split(layout.shardings, system.frozen),
        strict=True,
      )
    )
    shapes, shardings = state_lib.shardings(
      state_lib.split(layout.shapes, system.frozen)[1],
      state_lib.split(layout.shardings, system.frozen)[1],
      optimizer,
      mesh,
    )
    state = jax.jit(
      lambda params: state_lib.create(params, optimizer, 0),
      out_shardings=shardings,
    )(trainable)
    step = jax.jit(
      functools.partial(
        train.train_step, module=system.module, optimizer=optimizer
      ),
      donate_argnums=0,
      out_shardings=(shardings, None),
    )
    losses = []
    for seed in range(NUM_STEPS):
      batch = partition.put_batch(batch_of_eight(module, seed % 2), mesh)
      state, sums = step(state, frozen, batch)
      losses.append(float(sums['loss'] / sums['loss_weight']))
    checkpointer = checkpoint.Checkpointer(run_dir)
    checkpointer.save(state, {'batches': NUM_STEPS})
    checkpointer.close()
    tokens = helpers.generate(
      system.module,
      state_lib.merge(frozen, state.trainable),
      partition.put_batch(batch_of_eight(module, 0), mesh),
      max_decode_len=helpers.ANSWER_LENGTH,
      eos_id=1,
    )
  return Run(layout, state, losses, np.asarray(tokens))


PAIRS = ['t5_1_1-add-shared', 'gpt2-add-foreign', 'gemma3-add-foreign']


@pytest.fixture(scope='module', params=PAIRS)
def runs(request, tmp_path_factory):
  """Returns one run on one device, one on a cube of eight, and folders."""
  module = helpers.llm_to_slm(*request.param.split('-'), dropout_rate=0.1)
  folders = [tmp_path_factory.mktemp(name) for name in ('one', 'cube')]
  return [
    (train_on(config, module, folder), folder)
    for config, folder in zip((ONE, CUBE), folders, strict=True)
  ]


def test_eight_devices_compute_what_one_does(runs):
  (one, _), (cube, _) = runs
  np.testing.assert_allclose(cube.losses, one.losses, rtol=1e-5)
  assert one.losses[2] < one.losses[0]  # the same batch, two updates later
  np.testing.assert_array_equal(cube.tokens, one.tokens)
  assert len(np.unique(one.tokens)) > 2


def test_parameters_and_slots_are_really_spread(runs):
  _, (cube, _) = runs
  mlp = cube.state.trainable['slm']['decoder']['layers']['mlp']
  kernel = mlp.get('wi', mlp.get('wi_0'))['kernel']
  assert kernel.shape[1:] == (16, 32)  # embed, mlp
  shards = kernel.addressable_shards
  assert {shard.data.shape[1:] for shard in shards} == {(8, 16)}
  assert len({str(shard.index) for shard in shards}) == 4
  assert len(shards) == 8

  moments = optax.tree_utils.tree_get(cube.state.opt_state, 'mu')
  for moment, param in zip(
    jax.tree.leaves(moments), jax.tree.leaves(cube.state.trainable), strict=True
  ):
    assert moment.sharding.is_equivalent_to(param.sharding, param.ndim)


def test_the_llm_follows_rules_of_its_own(runs):
  _, (cube, _) = runs
  shardings = cube.layout.shardings
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
        lambda params, batch: systems.with_rules(
          system, mesh_config
        ).module.apply({'params': params}, batch, method='encode_prompt')
      )(layout.shapes, parameters.example_batch(8, 7, 6))
    return re.findall(r'spec=P\(.*\)', str(program))

  default = dataclasses.replace(CUBE, llm_rules=partition.DEFAULT_RULES)
  assert any('tensor' in spec for spec in constraints(default))
  ours = constraints(CUBE)
  assert ours and not any('tensor' in spec for spec in ours)


@pytest.mark.parametrize('saved, restored', [(ONE, CUBE), (CUBE, ONE)])
def test_a_checkpoint_of_one_mesh_restores_on_another(runs, saved, restored):
  (one, one_folder), (cube, cube_folder) = runs
  run, folder = (one, one_folder) if saved is ONE else (cube, cube_folder)
  target = (cube if restored is CUBE else one).state
  checkpointer = checkpoint.Checkpointer(folder)
  state = checkpointer.restore(
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target),
    jax.tree.map(lambda x: x.sharding, target),
  )
  assert checkpointer.restore_data() == {'batches': NUM_STEPS}
  checkpointer.close()
  helpers.assert_trees_equal(state, run.state)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
    assert x.sharding == y.sharding


# --- what is refused ---


@pytest.mark.parametrize(
  'sizes, message',
  [
    (dict(data=3), 'data=3 x fsdp=1 x tensor=1 takes 3 devices.* 8'),
    (dict(tensor=3), 'data=2 x fsdp=1 x tensor=3 takes 6 devices.* 8'),
    (dict(tensor=16), 'tensor=16 takes 16 devices.* 8'),
    (dict(data=-1, fsdp=-1), 'data=-1, fsdp=-1.*at most one'),
    (dict(data=0), 'data=0.*positive'),
    (dict(data=1, tensor=-2), 'tensor=-2.*positive'),
  ],
)
def test_meshes_that_do_not_fit_are_refused_with_the_numbers(sizes, message):
  with pytest.raises(ValueError, match=message):
    partition.make_mesh(partition.MeshConfig(**sizes))


def test_minus_one_takes_the_devices_that_are_left():
  mesh = partition.make_mesh(partition.MeshConfig(fsdp=2))
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 2, 'tensor': 1}
  mesh = partition.make_mesh(partition.MeshConfig(data=2, tensor=-1))
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 1, 'tensor': 4}


@pytest.mark.parametrize(
  'batch_size, nearest', [(0, 4), (1, 4), (6, 8), (30, 32), (33, 32)]
)
def test_batches_that_do_not_divide_are_refused(batch_size, nearest):
  mesh = make_mesh(CUBE)
  message = f'BATCH_SIZE={batch_size} .* 4 devices .* such as {nearest}'
  with pytest.raises(ValueError, match=message):
    partition.check_batch_size(batch_size, mesh)
  partition.check_batch_size(nearest, mesh)


def test_parameters_that_do_not_divide_are_all_listed():
  config = dataclasses.replace(
    helpers.T5_1_0, vocab_size=257, mlp_dim=33, num_heads=4
  )
  module = helpers.MODULES['t5_1_0'].clone(config=config)
  mesh_config = partition.MeshConfig(data=2, tensor=4)
  with pytest.raises(ValueError) as error:
    parameters.layout(
      helpers.system(module), make_mesh(mesh_config), mesh_config
    )
  message = str(error.value)
  line = 'token_embedder/embedding (257, 16): 257 does not divide over 4'
  assert line in message
  assert 'decoder/layers/mlp/wi/kernel (2, 16, 33): 33 does not' in message
  assert "'tensor'" in message and 'attention' not in message


@pytest.mark.parametrize('num_kv_heads, axis', [(2, 'tensor'), (1, None)])
def test_few_heads_of_keys_and_values_stay_whole(num_kv_heads, axis):
  config = dataclasses.replace(
    helpers.LLAMA, num_heads=6, num_kv_heads=num_kv_heads
  )
  layout = parameters.layout(
    helpers.system(l2s.build(config)), make_mesh(CUBE), CUBE
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
  mesh = make_mesh(CUBE)
  rows = np.arange(16, dtype=np.int32).reshape(8, 2)
  batch = partition.put_batch({'x': rows}, mesh)
  np.testing.assert_array_equal(batch['x'], rows)
  assert {s.data.shape for s in batch['x'].addressable_shards} == {(2, 2)}


def test_bytes_per_device_counts_one_shard():
  mesh = make_mesh(CUBE)
  shapes = {
    'split': jax.ShapeDtypeStruct((8, 6), jnp.float32),
    'whole': jax.ShapeDtypeStruct((5,), jnp.bfloat16),
  }
  shardings = {
    'split': jax.NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), 'tensor')),
    'whole': partition.replicated(mesh),
  }
  assert partition.bytes_per_device(shapes, shardings) == 2 * 3 * 4 + 5 * 2


@pytest.mark.parametrize('name', helpers.MODULES)
def test_every_axis_of_a_parameter_has_a_rule(name):
  _, axes = partition.abstract_params(
    functools.partial(helpers.MODULES[name].init, deterministic=True),
    jax.random.key(0),
    parameters.example_batch(1, 2, 2),
  )
  used = set()
  for spec in jax.tree.leaves(
    axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
  ):
    assert None not in spec
    used |= set(spec)
  assert used <= {axis for axis, _ in partition.DEFAULT_RULES}
  assert {'embed', 'vocab', 'heads', 'kv', 'mlp', 'layers'} <= used


def test_rules_may_come_from_gin_as_lists():
  lists: list[list[Any]] = [
    ['batch', ['data', 'fsdp']],
    ['embed', None],
    ['mlp', 'tensor'],
  ]
  config = partition.MeshConfig(llm_rules=lists)
  assert config.rules('llm') == (
    ('batch', ('data', 'fsdp')),
    ('embed', None),
    ('mlp', 'tensor'),
  )
  assert config.rules('slm') == partition.DEFAULT_RULES
  assert config.rules('projector') == partition.DEFAULT_RULES
