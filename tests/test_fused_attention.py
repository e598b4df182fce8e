# SPDX-License-Identifier: Apache-2.0
"""Laws of the attention kernel: it computes what the plain form computes.

On CPU, in Pallas' interpreter. Outputs and all gradients are compared.
"""

import dataclasses
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.models import attention, fused_attention, positions
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters

FAMILIES = helpers.FAMILIES | helpers.SLMS
ROWS, HEADS, KV = 2, 4, 8
WINDOW = 3


@dataclasses.dataclass(frozen=True)
class Case:
  """A call; lengths in tokens."""

  queries: int = 9
  keys: int = 9
  kv_heads: int = HEADS
  is_relative: bool = False
  window: int | None = None
  causal: bool = False
  prefix: int = 0
  is_packed: bool = False
  softcap: float = 0.0
  has_dropout: bool = False
  rows: int = ROWS


CASES = {
  'cross': Case(queries=5, keys=12),
  'relative': Case(is_relative=True),
  'relative, packed': Case(is_relative=True, is_packed=True, causal=True),
  'relative, grouped': Case(is_relative=True, kv_heads=2),
  'relative, several blocks': Case(520, 130, is_relative=True, rows=1),
  'relative, many keys': Case(140, 300, is_relative=True),
  'causal': Case(causal=True),
  'prefix': Case(causal=True, prefix=4),
  'windowed': Case(causal=True, window=WINDOW),
  'soft-capped': Case(softcap=2.0),
  'grouped': Case(causal=True, kv_heads=2),
  'one head of keys': Case(520, 520, causal=True, kv_heads=1, rows=1),
  'dropout': Case(is_relative=True, has_dropout=True),
  'dropout, grouped': Case(causal=True, kv_heads=2, has_dropout=True),
  'everything': Case(
    140,
    140,
    2,
    is_relative=True,
    window=30,
    causal=True,
    prefix=20,
    is_packed=True,
    softcap=3.0,
    has_dropout=True,
  ),
}


def draw(case: Case, dtype: str = 'float32') -> tuple[dict[str, Any], Any]:
  """Returns the differentiable arrays, and visibility and dropout."""
  keys = iter(jax.random.split(jax.random.key(0), 8))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  arrays = {
    'query': normal(case.rows, HEADS, case.queries, KV).astype(dtype),
    'key': normal(case.rows, case.kv_heads, case.keys, KV).astype(dtype),
    'value': normal(case.rows, case.kv_heads, case.keys, KV).astype(dtype),
  }
  if case.is_relative:
    arrays['by_offset'] = normal(1, HEADS, 1, case.queries + case.keys - 1)

  def segments(length):
    ids = np.ones((case.rows, length), np.int32)
    if case.is_packed:
      ids[:, length // 2 :] = 2
    ids[0, -2:] = 0
    return jnp.asarray(ids)

  query_segments, key_segments = segments(case.queries), segments(case.keys)
  visibility = fused_attention.Visibility(
    query_segments, key_segments, causal=case.causal, prefix=case.prefix
  )
  if case.window:
    visibility = visibility.replace(
      query_positions=positions.count_tokens(query_segments > 0),
      key_positions=positions.count_tokens(key_segments > 0),
      window=jnp.int32(case.window),
    )
  keep = None
  if case.has_dropout:
    shape = (case.rows, HEADS, 1, case.keys)
    keep = (jax.random.bernoulli(next(keys), 0.5, shape) / 0.5).astype(dtype)
  return arrays, (visibility, keep)


def fused(arrays, visibility, keep, softcap):
  visibility = visibility.replace(by_offset=arrays.get('by_offset'))
  return fused_attention.attend(
    arrays['query'],
    arrays['key'],
    arrays['value'],
    visibility,
    keep,
    softcap=softcap,
  )


def plain(arrays, visibility, keep, softcap):
  """Computes what the kernel does, from whole arrays in float32."""
  query, key, value = (
    arrays[name].astype(jnp.float32) for name in ('query', 'key', 'value')
  )
  groups = query.shape[1] // key.shape[1]
  key, value = (jnp.repeat(x, groups, axis=1) for x in (key, value))
  logits = jnp.einsum('bnth,bnsh->bnts', query, key)
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)
  if 'by_offset' in arrays:
    num_queries, num_keys = logits.shape[2:]
    offset = np.arange(num_keys) - np.arange(num_queries)[:, None]
    logits += arrays['by_offset'][:, :, 0, offset + num_queries - 1]
  logits += attention.mask_bias(attention.visible_mask(visibility))
  if visibility.window is not None:
    away = positions.offsets(
      visibility.query_positions, visibility.key_positions
    )
    near = jnp.abs(away) < visibility.window
    logits += attention.mask_bias(near)[:, None]
  weights = jax.nn.softmax(logits)
  if keep is not None:
    weights *= keep
  return jnp.einsum('bnts,bnsh->bnth', weights, value)


def with_gradients(form, case, arrays, visibility, keep):
  """Returns outputs, and gradients of a sum with random factors."""
  shape = arrays['query'].shape
  factors = jax.random.normal(jax.random.key(1), shape)

  @jax.jit
  def run(arrays):
    def loss(arrays):
      outputs = form(arrays, visibility, keep, case.softcap)
      return jnp.sum(outputs * factors), outputs

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return {'outputs': outputs} | gradients

  return run(arrays)


def assert_same(found, expected, tolerance):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    y = np.asarray(found[name], np.float32)
    x = np.asarray(x, np.float32)
    assert np.linalg.norm(x) > 0, name
    np.testing.assert_allclose(
      y, x, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=name
    )


@pytest.mark.parametrize('name', CASES)
def test_the_kernel_equals_the_plain_form(name):
  case = CASES[name]
  arrays, rest = draw(case)
  found, expected = (
    with_gradients(form, case, arrays, *rest) for form in (fused, plain)
  )
  assert_same(found, expected, 1e-5)


@pytest.mark.parametrize('name', ['relative, packed', 'everything'])
def test_bfloat16_stays_in_its_band(name):
  case = CASES[name]
  arrays, rest = draw(case, 'bfloat16')
  found, expected = (
    with_gradients(form, case, arrays, *rest) for form in (fused, plain)
  )
  assert found['outputs'].dtype == found['query'].dtype == jnp.bfloat16
  # Gradients of few logits are sums of rounded products.
  assert_same(found, expected, 2e-2)


def test_a_query_that_sees_no_key_gets_the_mean_of_the_values():
  arrays, (visibility, _) = draw(Case())
  blind = visibility.replace(key_segments=jnp.zeros((ROWS, 9), jnp.int32))
  outputs = fused(arrays, blind, None, 0.0)
  mean = arrays['value'].mean(2, keepdims=True)
  helpers.assert_close(outputs, jnp.broadcast_to(mean, outputs.shape))


@pytest.mark.parametrize(
  'name, shape',
  [
    ('relative, packed', (8, 1, 1)),
    ('everything', (2, 2, 2)),
    ('grouped', (1, 2, 4)),  # Two heads of keys on four devices.
  ],
)
def test_a_mesh_computes_what_one_device_does(name, shape):
  case = dataclasses.replace(CASES[name], rows=8)
  arrays, rest = draw(case)
  expected = with_gradients(fused, case, arrays, *rest)
  config = partitioning.MeshConfig(*shape)
  mesh = partitioning.make_mesh(config)
  with (
    partitioning.use_mesh(mesh),
    partitioning.axis_rules(config.rules('slm')),
  ):
    found = with_gradients(fused, case, arrays, *rest)
  assert_same(found, expected, 1e-5)


@pytest.mark.parametrize(
  'family',
  [
    pytest.param('t5_1_1', marks=pytest.mark.long),
    'umt5',
    pytest.param('gpt2', marks=pytest.mark.long),
    pytest.param('mistral', marks=pytest.mark.long),
    'gemma3',
    pytest.param('t5gemma', marks=pytest.mark.long),
  ],
)
def test_models_compute_the_same_in_both_forms(family):
  """Loss and gradients in training, dropout included."""
  config = dataclasses.replace(FAMILIES[family], dropout_rate=0.3)
  runs = []
  for form in ('plain', 'fused'):
    module = helpers.l2s.build(dataclasses.replace(config, attention=form))
    params = helpers.random_params(module)
    batch = helpers.batch_for(module)

    @jax.jit
    def run(params, batch, module=module):
      def loss(params):
        logits = module.apply(
          {'params': params},
          batch,
          deterministic=False,
          rngs={'dropout': jax.random.key(3)},
        )
        # Of real tokens: those of padding see no key but padding.
        return jnp.sum(
          jax.nn.log_softmax(logits)[..., 5] * batch['decoder_loss_weights']
        )

      return jax.value_and_grad(loss)(params)

    runs.append(run(params, batch))
  (loss, gradients), (other_loss, others) = runs
  np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(gradients),
    jax.tree.leaves(others),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    if "'key']['bias']" in name:  # Rounding alone.
      continue
    assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x) + 1e-6, name


def test_prefill_takes_the_kernel_and_decoding_does_not():
  texts = {}
  for form in ('plain', 'fused'):
    config = dataclasses.replace(helpers.T5_1_1, attention=form)
    module = helpers.l2s.build(config)
    tokens = helpers.generate(
      module,
      helpers.random_params(module),
      helpers.batch_for(module),
      max_decode_len=helpers.ANSWER_LENGTH,
    )
    texts[form] = np.asarray(tokens)
  np.testing.assert_array_equal(texts['plain'], texts['fused'])


def test_auto_is_the_kernel_on_tpu_alone():
  auto = dataclasses.replace(helpers.T5_1_1, attention='auto')
  assert not fused_attention.is_chosen(auto, 4, 512, 512)  # on CPU
  fused = dataclasses.replace(auto, attention='fused')
  assert fused_attention.is_chosen(fused, 4, 7, 7)
  assert not fused_attention.is_chosen(fused, 4, 7, 10**6)
  wide = dataclasses.replace(fused, head_dim=256)
  assert fused_attention.is_chosen(wide, 4, 7, 4096)
  assert not fused_attention.is_chosen(wide, 4, 7, 8192)


def test_rows_that_do_not_divide_over_a_mesh_take_the_plain_form():
  """Such as the one row that parameters are initialized with."""
  config = partitioning.MeshConfig(data=8)
  mesh = partitioning.make_mesh(config)
  fused = dataclasses.replace(helpers.T5_1_1, attention='fused')
  system = helpers.system(helpers.l2s.build(fused))
  with (
    partitioning.use_mesh(mesh),
    partitioning.axis_rules(config.rules('slm')),
  ):
    assert fused_attention.is_chosen(fused, 8, 7, 7)
    assert not fused_attention.is_chosen(fused, 4, 7, 7)
    parameters.layout(system, mesh, config)


def test_an_unknown_form_is_refused():
  with pytest.raises(ValueError, match=r"attention='flash' is not one of"):
    dataclasses.replace(helpers.T5_1_1, attention='flash')
