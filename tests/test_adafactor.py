# SPDX-License-Identifier: Apache-2.0
"""Laws of Adafactor: a layer of a stack is a parameter of its own.

The reference is optax's Adafactor, which knows no stacks, on each layer alone
and reshaped to the matrix it stands for. Out of reach of continuous
integration, eight updates of parameters of all these kinds were held to those
of t5x/adafactor.py with its standard logical factor rules: they differ by at
most 2e-7 of the largest number of a parameter.
"""

import contextlib
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from l2s_jax.models import batch_keys
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters
from l2s_jax.training import adafactor, optim
from l2s_jax.training import state as state_lib

# By path: shape; logical axes; and the shape of one layer's matrix, or None
# for a layer that is not factored.
PARAMS = {
  'layers/query': ((3, 6, 2, 4), 'layers embed heads kv', (6, 8)),
  'layers/out': ((3, 2, 4, 6), 'layers heads kv embed', (8, 6)),
  'layers/wi': ((3, 6, 10), 'layers embed mlp', (6, 10)),
  'layers/wi_bias': ((3, 10), 'layers mlp', None),
  'layers/key_bias': ((3, 2, 4), 'layers heads kv', None),
  'layers/norm': ((3, 6), 'layers embed', None),
  'query': ((6, 2, 4), 'embed heads kv', (6, 8)),
  'embedding': ((140, 130), 'vocab embed', (140, 130)),
  'narrow': ((127, 130), 'embed vocab', None),
  'projector': ((130, 128), 'llm_embed mlp', (130, 128)),
  'relpos': ((4, 8), 'heads relpos_buckets', None),
  'positions': ((130, 128), 'abspos_buckets embed', (130, 128)),
  'norm': ((6,), 'embed', None),
}
AXES = {
  path: PartitionSpec(*axes.split()) for path, (_, axes, _) in PARAMS.items()
}


def random_like(scale, seed):
  """Draws numbers of another size in every layer."""
  generator = np.random.default_rng(seed)

  def draw(shape):
    sizes = scale * np.exp(generator.normal(size=shape[:1]))
    sizes = sizes.reshape(-1, *[1] * (len(shape) - 1))
    return jnp.asarray(sizes * generator.normal(size=shape), jnp.float32)

  return {path: draw(shape) for path, (shape, _, _) in PARAMS.items()}


def trajectory(transform, params, grads):
  """Returns the parameters after each update."""
  state = transform.init(params)
  update = jax.jit(transform.update)
  found = []
  for grad in grads:
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    found.append(params)
  return found


# Updates of growing and of shrinking size: some are clipped, some are not.
GRADS = [random_like(scale, seed) for seed, scale in enumerate((1, 30, 0.1, 1))]


@pytest.fixture(scope='module')
def found():
  transform = optim.adafactor(0.1).make(AXES)
  return trajectory(transform, random_like(0.1, 9), GRADS)


@pytest.mark.parametrize('path', PARAMS)
def test_each_layer_is_updated_as_if_it_were_alone(path, found):
  shape, axes, matrix = PARAMS[path]
  reference = optax.adafactor(
    0.1,
    min_dim_size_to_factor=1,
    factored=matrix is not None,
    decay_rate=0.8,
    clipping_threshold=1.0,
  )

  def alone(x, layer):
    x = x[path][layer] if 'layers' in axes else x[path]
    return x if matrix is None else x.reshape(matrix)

  for layer in range(3 if 'layers' in axes else 1):
    of_layer = functools.partial(alone, layer=layer)
    expected = trajectory(
      reference, of_layer(random_like(0.1, 9)), map(of_layer, GRADS)
    )
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
      np.testing.assert_allclose(
        of_layer(ours), theirs, rtol=1e-5, atol=1e-7, err_msg=step
      )


def test_a_stack_is_its_layers_bit_by_bit():
  params, grads = random_like(0.1, 9), GRADS
  stacks = {path: axes for path, axes in AXES.items() if 'layers' in axes}
  transform = optim.adafactor(0.1).make(stacks)

  def run(layers):
    def cut(tree):
      return {path: tree[path][layers] for path in stacks}

    return trajectory(transform, cut(params), map(cut, grads))[-1]

  whole = run(slice(0, 3))
  for layer in range(3):
    for path, alone in run(slice(layer, layer + 1)).items():
      np.testing.assert_array_equal(alone[0], whole[path][layer], path)


def test_an_update_worked_by_hand():
  axes = {'w': PartitionSpec('layers', 'embed', 'mlp')}
  transform = adafactor.scale_by_adafactor(axes, clipping_threshold=None)
  # Layers with the root mean squares 3 and 0; the second is raised to 1e-3.
  params = {'w': jnp.array([[[3.0, -3.0], [3.0, 3.0]], [[0.0] * 2] * 2])}
  # Squares that are the product of a row and a column are known exactly from
  # their means: what is left of the gradients is their signs.
  grads = {
    'w': jnp.array([[[1.0, 2.0], [-2.0, 4.0]], [[1.0, 1.0], [1.0, -1.0]]])
  }
  updates, state = transform.update(grads, transform.init(params), params)
  slots = state.slots['w']
  np.testing.assert_allclose(
    slots['v_row'], np.array([[[2.5], [10]], [[1], [1]]])
  )
  np.testing.assert_allclose(slots['v_col'], np.array([[[2.5, 10]], [[1, 1]]]))
  np.testing.assert_allclose(
    updates['w'] / jnp.array([3.0, 1e-3])[:, None, None],
    np.array([[[1, 1], [-1, 1]], [[1, 1], [1, -1]]]),
    rtol=1e-6,
  )
  # The second update remembers 1 - 2 ** -0.8 of the first.
  zeros = jax.tree.map(jnp.zeros_like, grads)
  _, state = transform.update(zeros, state, params)
  np.testing.assert_allclose(
    state.slots['w']['v_row'][0], (1 - 2**-0.8) * np.array([[2.5], [10]])
  )


def test_each_layer_is_clipped_and_scaled_by_itself():
  axes = {'w': PartitionSpec('layers', 'embed')}
  params = {'w': jnp.array([[2.0, 2.0], [2.0, 2.0]])}
  grads = [
    jnp.array([[1.0, -1.0], [1.0, 1.0]]),
    jnp.array([[9.0, 9.0], [1, 1]]),
  ]

  def second(**options):
    transform = adafactor.scale_by_adafactor(axes, **options)
    state = transform.init(params)
    for grad in grads:
      updates, state = transform.update({'w': grad}, state, params)
    return updates['w']

  # 81 enters the mean of squares with 2 ** -0.8.
  raw = 9 / (1 + 80 * 2**-0.8) ** 0.5
  np.testing.assert_allclose(
    second(clipping_threshold=None), [[2 * raw] * 2, [2, 2]], rtol=1e-6
  )
  np.testing.assert_allclose(second(), [[2, 2], [2, 2]], rtol=1e-6)
  np.testing.assert_allclose(
    second(clipping_threshold=0.5, multiply_by_parameter_scale=False),
    [[0.5, 0.5], [0.5, 0.5]],
    rtol=1e-6,
  )


def test_slots_are_rows_and_columns():
  slots = optim.adafactor().make(AXES).init(random_like(1, 0))[1].slots
  for path, (shape, _, matrix) in PARAMS.items():
    layers = 3 if path.startswith('layers') else 1
    size = sum(leaf.size for leaf in jax.tree.leaves(slots[path]))
    expected = np.prod(shape) if matrix is None else layers * sum(matrix)
    assert size == expected, path


@pytest.mark.parametrize('axes', [(), ('embed',), ('embed', 'experts')])
def test_axes_that_play_no_part_are_refused(axes):
  transform = optim.adafactor().make({'a': {'w': PartitionSpec(*axes)}})
  with pytest.raises(ValueError, match=r'a/w \(2, 3\) has .*layers.*embed'):
    transform.init({'a': {'w': jnp.ones((2, 3))}})


def test_a_sharded_update_is_the_unsharded_one():
  module = helpers.MODULES['t5_1_1']
  config = partitioning.MeshConfig(data=2, fsdp=2, tensor=2)
  mesh = partitioning.make_mesh(config)
  with contextlib.ExitStack() as stack:
    stack.enter_context(partitioning.use_mesh(mesh))
    stack.enter_context(partitioning.axis_rules(config.rules('slm')))
    layout = parameters.layout(helpers.system(module), mesh, config)
  transform = optim.adafactor(0.1).make(layout.axes)
  params, grads = (helpers.random_params(module, seed) for seed in (0, 1))
  shapes, shardings = state_lib.shardings(
    layout.shapes, layout.shardings, transform, mesh
  )
  kernel = ('encoder', 'layers', 'self_attention', 'query', 'kernel')
  slots = functools.reduce(dict.get, kernel, shardings.opt_state[1].slots)
  assert slots['v_row'].spec == PartitionSpec(None, 'fsdp', None, None)
  assert slots['v_col'].spec == PartitionSpec(None, None, 'tensor', None)

  def start_and_update(params, grads):
    state = state_lib.create(params, transform, 0)
    for _ in range(2):
      updates, opt_state = transform.update(
        grads, state.opt_state, state.trainable
      )
      state = state.replace(
        trainable=optax.apply_updates(state.trainable, updates),
        opt_state=opt_state,
      )
    return state

  expected = jax.jit(start_and_update)(params, grads)
  found = jax.jit(start_and_update, out_shardings=shardings)(
    *jax.device_put((params, grads), (layout.shardings, layout.shardings))
  )
  assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(
    lambda s: s.shape, shapes
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    found,
    expected,
  )


@pytest.mark.parametrize('name', helpers.cases(helpers.MODULES))
def test_every_family_can_be_trained_with_it(name):
  """Each axis that a model names plays a part."""
  shapes, axes = partitioning.abstract_params(
    functools.partial(helpers.MODULES[name].init, deterministic=True),
    batch_keys.example_batch(1, 2, 2),
  )
  optimizer = optim.adafactor().make(axes)
  slots = jax.eval_shape(optimizer.init, shapes)
  num_slots = sum(slot.size for slot in jax.tree.leaves(slots))
  assert num_slots < sum(shape.size for shape in jax.tree.leaves(shapes))
