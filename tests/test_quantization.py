# SPDX-License-Identifier: Apache-2.0
"""Laws of int8: what is stored, and how far its logits are from float32's."""

import functools
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.inference import quantization
from l2s_jax.models import config as config_lib
from l2s_jax.models import int8, kernel_first, l2s, mixed_product

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


@pytest.mark.parametrize(
  'kind', [k for k in config_lib.QUANTIZATIONS if k != 'none']
)
@pytest.mark.parametrize('name', NAMES)
def test_rounded_logits_are_near_those_of_float32(name, kind):
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
def test_kernels_and_tables_are_int8_with_a_scale_for_each_output(name):
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
  num_rounded = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
    name = jax.tree_util.keystr(path)
    is_table = 'token_embedder' in name
    is_of_pair = 'projector' in name or 'prompt_embedder' in name
    if not is_table and ('kernel' not in name or is_of_pair):
      assert by_path[name].dtype == leaf.dtype  # norms, positions, new layers
      continue
    num_rounded += 1
    value, scale = by_path[f'{name}.values'], by_path[f'{name}.scale']
    # The contracted axes, which are the last of what is stored.
    axes = (1,) if is_table else (0, 1) if "'out'" in name else (0,)
    last = tuple(range(-len(axes), 0))
    leaf = np.moveaxis(np.asarray(leaf), axes, last)
    assert value.dtype == jnp.int8 and value.shape == leaf.shape
    assert all(scale.shape[axis] == 1 for axis in last)
    # Rounded to the nearest: what comes back is off by half a step.
    assert (np.abs(value * scale - leaf) <= 0.501 * scale).all()
  assert num_rounded > 5


@pytest.mark.parametrize('kind', ['int8_dynamic', 'int8_left', 'int8_unsigned'])
def test_states_of_one_row_and_of_many_have_the_same_product(kind):
  """And it is that of the rounded numbers."""
  generator = np.random.default_rng(0)
  x = generator.normal(size=(1, 3, 4, 8)).astype(np.float32)
  x[0, 1] = 0
  kernel = int8.pack(jnp.asarray(generator.normal(size=(4, 8, 5))), (0, 1))
  product = functools.partial(
    int8.multiply, kernel=kernel, dtype=jnp.float32, quantization=kind
  )
  whole = np.asarray(product(x))
  rows = [np.asarray(product(x[:, i : i + 1])) for i in range(3)]
  np.testing.assert_allclose(whole, np.concatenate(rows, axis=1), rtol=1e-6)
  assert whole.shape == (1, 3, 5) and (whole[0, 1] == 0).all()
  step = np.abs(x).max((2, 3), keepdims=True) / 127
  rounded = np.rint(x / np.where(step == 0, 1, step)) * step
  exact = np.einsum('btnk,dnk->btd', rounded, kernel.values * kernel.scale)
  np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-6)


def test_bytes_are_multiplied_exactly_alone_compiled_and_mapped():
  generator = np.random.default_rng(0)
  states = generator.integers(0, 256, (2, 3, 4, 70), np.uint8)
  rows = generator.integers(-128, 128, (9, 70), np.int8)
  exact = states.astype(np.int64) @ rows.T.astype(np.int64)
  x, kernel = jnp.asarray(states), jnp.asarray(rows)
  multiply = mixed_product.multiply
  for found in (
    multiply(x[0], kernel)[None],
    jax.jit(multiply)(x[0], kernel)[None],
    jax.vmap(multiply, (0, None))(x, kernel),
    jax.vmap(multiply, (1, None), 1)(x, kernel),
  ):
    np.testing.assert_array_equal(found, exact[: len(found)])


SLOW = {
  'none': [3.0, 0.4],
  'int8': [8.0, 0.8],
  'int8_dynamic': [9.0, 0.9],
  'int8_left': [9.5, 0.95],
  'int8_unsigned': [40.0, 9.0],
}
VNNI = {**SLOW, 'int8_dynamic': [2.0, 0.2], 'int8_unsigned': [1.0, 0.1]}
AMX = {**VNNI, 'int8_left': [0.3, 0.1]}


@pytest.mark.parametrize(
  ('kind', 'measured', 'expected'),
  [
    ('none', VNNI, 'none'),
    ('int8', VNNI, 'int8_unsigned'),
    ('int8', AMX, 'int8_left'),
    ('int8_dynamic', VNNI, 'int8_unsigned'),
    ('auto', VNNI, 'int8_unsigned'),
    ('auto', AMX, 'int8_left'),
    ('bfloat16', AMX, 'bfloat16'),
    ('int8', SLOW, 'int8'),
    ('int8_dynamic', SLOW, 'int8_dynamic'),
    ('auto', SLOW, 'none'),
    # Faster than weights alone, slower than float32.
    ('int8', {**SLOW, 'int8_dynamic': [4.0, 0.5]}, 'int8_dynamic'),
    ('auto', {**SLOW, 'int8_dynamic': [4.0, 0.5]}, 'none'),
  ],
)
def test_the_form_is_the_fastest_that_was_measured(
  kind, measured, expected, monkeypatch
):
  monkeypatch.setattr(quantization, 'times', lambda: measured)
  assert quantization.form(kind) == expected


def test_measured_forms_with_equal_results_have_one_name(monkeypatch):
  """Answers of a machine with VNNI may be continued on one with AMX."""
  kinds = {'quantization': 'int8', 'llm_quantization': 'auto'}
  found = []
  for measured in (VNNI, AMX, SLOW):
    monkeypatch.setattr(quantization, 'times', lambda m=measured: m)
    found.append(quantization.chosen(kinds))
  assert found[0] == found[1] == dict.fromkeys(kinds, 'int8_dynamic')
  assert found[2] == {'quantization': 'int8', 'llm_quantization': 'none'}
  assert quantization.chosen(dict.fromkeys(kinds, 'int8_dynamic')) == {}


def test_products_are_measured_once_for_a_machine(tmp_path, monkeypatch):
  path = tmp_path / 'l2s_jax_int8.json'
  path.write_text('{"other": {}, "x"')  # Cut off.
  monkeypatch.setattr(quantization, '_path', lambda: path)
  found = quantization.times.__wrapped__()
  assert set(found) == set(config_lib.QUANTIZATIONS)
  assert all(x > 0 for ms in found.values() for x in ms)
  assert quantization.times.__wrapped__() == found
  assert list(json.loads(path.read_text()).values()) == [found]
  # Of another machine: kept, not used.
  path.write_text(json.dumps({'other': found}))
  monkeypatch.setattr(quantization, 'measure', lambda: SLOW)
  assert quantization.times.__wrapped__() == SLOW
  assert json.loads(path.read_text()).keys() > {'other'}


@pytest.mark.parametrize('num_rows', [1, 2, 5])
def test_bfloat16_kernels_have_the_product_of_rounded_numbers(num_rows):
  """With sums in float32, for one row as for many."""
  generator = np.random.default_rng(0)
  x = generator.normal(size=(1, num_rows, 4, 8)).astype(jnp.bfloat16)
  kernel = generator.normal(size=(4, 8, 5)).astype(jnp.bfloat16)
  arranged = kernel_first.arrange(jnp.asarray(kernel), (0, 1))
  assert arranged.shape == (5, 4, 8) and arranged.dtype == jnp.bfloat16
  found = kernel_first.multiply_bfloat16(
    jnp.asarray(x, jnp.float32), arranged, jnp.float32
  )
  exact = np.einsum(
    'btnk,nkd->btd', x.astype(np.float64), kernel.astype(np.float64)
  )
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_halves_the_memory_of_kernels_and_tables():
  module = helpers.MODULES['t5_1_1']
  params = helpers.random_params(module)
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    l2s.params_for_generation(
      l2s.for_generation(module, quantization='bfloat16'), params
    )
  ):
    name = jax.tree_util.keystr(path)
    is_rounded = 'kernel' in name or 'token_embedder' in name
    assert leaf.dtype.itemsize == (2 if is_rounded else 4), name
