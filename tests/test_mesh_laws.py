# SPDX-License-Identifier: Apache-2.0
"""Laws of training: how it is spread and computed does not change what comes.

Over 20 steps in float32, many devices, many microbatches, an unrolled loop and
layers that are computed again give the losses, the gradients and the tokens of
one device.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import helpers
import jax
import numpy as np
import optax
import pytest

from l2s_jax.inference import generate, sampling, strategies
from l2s_jax.runtime import partitioning
from l2s_jax.systems import builders, parameters
from l2s_jax.training import checkpoint, optim, train_step
from l2s_jax.training import state as state_lib

NUM_STEPS = 20

# Eight heads: they divide over eight devices.
LLM = dataclasses.replace(helpers.LLM, num_heads=8, head_dim=4)
# With dropout. GPT-2's vocabulary does not divide, nor its two heads of keys;
# its second layer has a window, as in Qwen2.
MODULES = {
  't5': helpers.llm_to_slm(
    't5_1_1', 'add', 'shared', LLM, num_heads=8, dropout_rate=0.1
  ),
  'gpt2': helpers.llm_to_slm(
    'gpt2',
    'add',
    'foreign',
    LLM,
    num_heads=8,
    num_kv_heads=2,
    vocab_size=261,
    sliding_window=3,
    first_window_layer=1,
    dropout_rate=0.1,
  ),
}
DECODINGS = {
  't5': sampling.Decoding(num_beams=3),
  'gpt2': sampling.Decoding(),
}
NUM_ANSWER_IDS = 261

ONE = 'one'
MESHES = {
  ONE: partitioning.MeshConfig(data=1),
  **{
    f'{data}x{fsdp}x{tensor}': partitioning.MeshConfig(data, fsdp, tensor)
    for data, fsdp, tensor in [
      (8, 1, 1),
      (1, 8, 1),
      (1, 1, 8),
      (1, 2, 4),
      (2, 2, 2),
    ]
  },
  # The LLM is split, the SLM is whole on every device.
  'llm_fsdp': partitioning.MeshConfig(
    data=2, fsdp=4, slm_rules={'embed': None, 'llm_embed': None}
  ),
}
OPTIMIZERS = {
  # Of a gradient that is rounding alone, Adam's usual 1e-8 makes a whole step.
  'adamw': optim.adamw(
    1e-3, epsilon=1e-6, weight_decay=0.1, max_grad_norm=None
  ),
  'adafactor': optim.adafactor(1e-2, min_dim_size_to_factor=8),
}


@dataclasses.dataclass
class Run:
  """What training left behind, and its first gradient."""

  losses: list[float]
  gradient: Any
  state: state_lib.TrainState
  tokens: np.ndarray | None


def batch_of_eight(module, seed):
  batch = helpers.batch_for(
    module,
    num_answer_ids=NUM_ANSWER_IDS,
    prompt_lengths=helpers.PROMPT_LENGTHS * 2,
    answer_lengths=helpers.ANSWER_LENGTHS * 2,
    seed=seed,
  )
  return {key: np.asarray(value) for key, value in batch.items()}


def train_on(
  mesh_name: str,
  module: Any,
  optimizer: str = 'adamw',
  *,
  num_microbatches: int = 1,
  decoding: sampling.Decoding | None = None,
) -> Run:
  """Trains as `train.train` does, from parameters that are always the same."""
  mesh_config = MESHES[mesh_name]
  devices = jax.devices()[:1] if mesh_name == ONE else jax.devices()
  mesh = partitioning.make_mesh(mesh_config, devices)
  with contextlib.ExitStack() as stack:
    stack.enter_context(partitioning.use_mesh(mesh))
    stack.enter_context(partitioning.axis_rules(mesh_config.rules('slm')))
    system = builders.with_rules(helpers.system(module), mesh_config)
    layout = parameters.layout(system, mesh, mesh_config)
    _, axes = parameters.split(layout.axes, system.frozen)
    transform = OPTIMIZERS[optimizer].make(axes)
    frozen, trainable = parameters.split(
      jax.device_put(helpers.random_params(module), layout.shardings),
      system.frozen,
    )
    _, shardings = state_lib.shardings(
      parameters.split(layout.shapes, system.frozen)[1],
      parameters.split(layout.shardings, system.frozen)[1],
      transform,
      mesh,
    )
    state = jax.device_put(state_lib.create(trainable, transform, 0), shardings)
    step = jax.jit(
      functools.partial(
        train_step.train_step,
        module=system.module,
        optimizer=transform,
        num_microbatches=num_microbatches,
      ),
      out_shardings=(shardings, None),
    )
    losses, gradient = [], None
    for seed in range(NUM_STEPS):
      batch = partitioning.put_batch(batch_of_eight(module, seed % 3), mesh)
      state, sums = step(state, frozen, batch)
      losses.append(float(sums['loss'] / sums['loss_weight']))
      if seed == 0 and optimizer == 'adamw':
        # After one step the first moment is a tenth of the gradient.
        gradient = optax.tree_utils.tree_get(state.opt_state, 'mu')
    tokens = None
    if decoding is not None:
      generator = generate.Generator(
        system.module,
        max_decode_len=helpers.ANSWER_LENGTH,
        ids=strategies.Ids(0, 1, 0),
        decoding=decoding,
      )
      prepared = generator.prepare(parameters.merge(frozen, state.trainable))
      tokens = np.asarray(generator(prepared, batch))
  return Run(losses, gradient, state, tokens)


@functools.cache
def run(name: str, mesh_name: str) -> Run:
  """Returns what one of the models comes to on a mesh; trained once."""
  return train_on(mesh_name, MODULES[name], decoding=DECODINGS[name])


def assert_same(found: Run, expected: Run) -> None:
  np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
  assert len(set(expected.losses)) == NUM_STEPS
  if expected.gradient is None:
    return
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(found.gradient),
    jax.tree.leaves(expected.gradient),
    strict=True,
  ):
    # A bias on keys has no gradient but rounding.
    if "'key']['bias']" in jax.tree_util.keystr(path):
      continue
    difference = np.linalg.norm(np.asarray(x) - np.asarray(y))
    assert difference <= 1e-5 * np.linalg.norm(y), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
  'name, mesh_name',
  [
    pytest.param('t5', '1x8x1', marks=pytest.mark.long),
    pytest.param('t5', '1x1x8', marks=pytest.mark.long),
    ('t5', '2x2x2'),
    pytest.param('gpt2', '8x1x1', marks=pytest.mark.long),
    ('gpt2', '1x2x4'),
    ('gpt2', 'llm_fsdp'),
  ],
)
def test_eight_devices_compute_what_one_does(name, mesh_name):
  """Dropout included: masks depend on the key and the place alone."""
  found, expected = run(name, mesh_name), run(name, ONE)
  assert_same(found, expected)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  assert expected.tokens is not None and len(np.unique(expected.tokens)) > 2


def test_a_checkpoint_moves_from_mesh_to_mesh(tmp_path):
  """Saved on each, restored on the next, and the same at the end."""
  states = [run('t5', name).state for name in (ONE, '2x2x2')]
  state = states[0]
  for i, target in enumerate([*states[1:], states[0]]):
    checkpointer = checkpoint.Checkpointer(tmp_path / str(i))
    checkpointer.save(state, {'batches': NUM_STEPS})
    checkpointer.wait()
    restored = checkpointer.restore(
      jax.eval_shape(lambda state=target: state),
      jax.tree.map(lambda x: x.sharding, target),
    )
    checkpointer.close()
    assert restored is not None
    for x, y in zip(
      jax.tree.leaves(restored), jax.tree.leaves(target), strict=True
    ):
      assert x.sharding == y.sharding
    helpers.assert_trees_equal(restored, states[0])
    state = restored


# --- computed otherwise ---


def changed(name: str, **slm_changes: Any) -> Any:
  module = MODULES[name]
  return module.clone(
    slm_config=dataclasses.replace(module.slm_config, **slm_changes)
  )


@functools.cache
def plain_run(optimizer: str) -> Run:
  return train_on(ONE, changed('gpt2', dropout_rate=0.0), optimizer)


@pytest.mark.parametrize(
  'optimizer, mesh_name, num_microbatches, scan_layers',
  [
    ('adamw', ONE, 4, True),
    ('adamw', '2x2x2', 2, True),
    ('adamw', ONE, 1, False),
    ('adafactor', '2x2x2', 2, True),
    ('adafactor', ONE, 8, False),
  ],
)
def test_microbatches_and_unrolled_layers_change_no_update(
  optimizer, mesh_name, num_microbatches, scan_layers
):
  module = changed('gpt2', dropout_rate=0.0, scan_layers=scan_layers)
  found = train_on(
    mesh_name, module, optimizer, num_microbatches=num_microbatches
  )
  assert_same(found, plain_run(optimizer))


@pytest.mark.parametrize(
  'remat, scan_layers', [('minimal', True), ('full', True), ('full', False)]
)
def test_layers_computed_again_drop_out_the_same(remat, scan_layers):
  module = changed('gpt2', remat=remat, scan_layers=scan_layers)
  assert_same(train_on(ONE, module), run('gpt2', ONE))
