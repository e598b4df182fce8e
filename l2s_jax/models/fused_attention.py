# SPDX-License-Identifier: Apache-2.0
"""Attention whose logits stay on the chip: a Pallas kernel for TPUs.

The plain form in `attention.py` writes float32 logits [batch, heads, query,
keys] to HBM and reads them back. The kernel holds the logits of a block of
queries and of all keys in VMEM. The bias comes in parts, as a `Visibility`, so
that no array of that size is an input either. The backward pass computes the
logits again.

The kernel works on transposed logits [keys, query]: softmax reduces over
sublanes, and products write [kv, length], whose minor axis fills the lanes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from l2s_jax.models import config as config_lib
from l2s_jax.runtime import partitioning

# Added to masked logits, as in the plain form: a query that sees no key gets
# the mean of the values.
MASKED = -1e10
# Lower than twice MASKED: keys that pad a block have weight 0.
_PADDING = -1e30
_LANES, _SUBLANES = 128, 8
_MIN_QUERIES = 64
_MAX_KEYS = 8192  # Logits of one block of queries must fit in VMEM.
_MAX_ELEMENTS = 2**20  # Of the keys of a head; more do not fit on a v5p.
_BLOCK_ELEMENTS = 2**18
_VMEM_BYTES = 96 * 2**20

_Arrays = dict[str, Array]


class Visibility(struct.PyTreeNode):
  """The keys that each query sees, and the bias by offset; not yet an array.

  `attention.visible_mask` is the same as a mask, for the plain form.

  Attributes:
    query_segments: segment of each query.
    key_segments: segment of each key; 0 is padding, which no query sees.
    by_offset: bias for each offset, key slot minus query slot, from 1 - query
      to keys - 1; None without relative positions.
    query_positions: in tokens, for windows.
    key_positions: the same of the keys.
    window: keys this many tokens away, or more, are not seen; None: all are.
    causal: whether a query sees no later slot, outside the prefix.
    prefix: number of the first slots that all queries see.
  """

  query_segments: Int[Array, 'batch query']
  key_segments: Int[Array, 'batch keys']
  by_offset: Float[Array, '1 heads 1 offsets'] | None = None
  query_positions: Int[Array, 'batch query'] | None = None
  key_positions: Int[Array, 'batch keys'] | None = None
  window: Int[Array, ''] | None = None
  causal: bool = struct.field(pytree_node=False, default=False)
  prefix: int = struct.field(pytree_node=False, default=0)


def is_chosen(
  config: config_lib.TransformerConfig,
  num_rows: int,
  num_queries: int,
  num_keys: int,
) -> bool:
  """Returns whether a call takes the kernel, by `config.attention`.

  Args:
    config: of the model.
    num_rows: of the call. Rows and heads must divide over the mesh: XLA cannot
      partition the kernel.
    num_queries: of the call. With few of them the logits are small.
    num_keys: of the call. All keys of a head must fit in VMEM.
  """
  if config.attention == 'plain':
    return False
  is_forced = config.attention == 'fused'
  if not is_forced and partitioning.platform() != 'tpu':
    return False
  mesh = jax.sharding.get_abstract_mesh()
  for axes, size in zip(
    nn.logical_to_mesh_axes(('batch', 'heads')),
    (num_rows, config.num_heads),
    strict=True,
  ):
    names = partitioning.names_of(axes)
    if size % math.prod(mesh.shape.get(name, 1) for name in names):
      return False
  fits = num_keys <= _MAX_KEYS and num_keys * config.head_dim <= _MAX_ELEMENTS
  return fits and (is_forced or num_queries >= _MIN_QUERIES)


def attend(
  query: Float[Array, 'batch heads query kv'],
  key: Float[Array, 'batch kv_heads keys kv'],
  value: Float[Array, 'batch kv_heads keys kv'],
  visibility: Visibility,
  keep: Float[Array, 'batch heads 1 keys'] | None = None,
  *,
  softcap: float = 0.0,
) -> Float[Array, 'batch heads query kv']:
  """Returns softmax(query key^T + bias) value, with gradients.

  Under a mesh each device computes its rows and heads; nothing is exchanged.

  Args:
    query: scaled and rotated queries.
    key: rotated keys; groups of query heads share a head of keys.
    value: values.
    visibility: masks and relative bias.
    keep: factors on the weights of each key, the same for all queries: the mask
      of dropout divided by its rate of kept weights. Has no gradient.
    softcap: bound of the logits, by tanh; 0 means none.
  """
  rows, heads = nn.logical_to_mesh_axes(('batch', 'heads'))
  of_keys = partitioning.axes_that_divide(('batch', 'kv_heads'), key.shape[:2])
  if key.shape[1] < query.shape[1] and (
    visibility.by_offset is not None
    or nn.logical_to_mesh_axes(of_keys)[1] != heads
  ):
    groups = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(x, groups, axis=1) for x in (key, value))

  num_queries, num_keys = query.shape[2], key.shape[2]
  block = _block(num_queries, num_keys)
  form = _Form(
    num_keys=num_keys,
    block=block,
    softcap=softcap,
    causal=visibility.causal,
    prefix=visibility.prefix,
    interpret=partitioning.platform() != 'tpu',
  )
  to_queries, to_keys = -num_queries % block, -num_keys % _LANES
  arrays: _Arrays = {
    'query': _pad(query.swapaxes(2, 3), to_queries),
    'key': _pad(key.swapaxes(2, 3), to_keys),
    'value': _pad(value.swapaxes(2, 3), to_keys),
    **_bias_arrays(visibility, to_queries, to_keys),
  }
  if keep is not None:
    arrays['keep'] = _pad(keep.astype(query.dtype), to_keys)
  specs = {name: PartitionSpec(rows) for name in arrays}
  by_head = PartitionSpec(rows, heads)
  specs |= dict.fromkeys(('query', 'key', 'value', 'keep'), by_head)
  specs |= {'by_offset': PartitionSpec(heads), 'window': PartitionSpec()}

  local = functools.partial(_attend, form)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    # XLA cannot partition a kernel. The sum of the bias' gradients over rows on
    # other devices is the transpose of its replication.
    local = jax.shard_map(
      local,
      in_specs=({name: specs[name] for name in arrays},),
      out_specs=by_head,
      check_vma=False,
    )
  return local(arrays)[..., :num_queries].swapaxes(2, 3)


def _pad(x: Array, extra: int) -> Array:
  """Returns an array with `extra` zeros at the end of its last axis."""
  return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, extra)]) if extra else x


def _bias_arrays(
  visibility: Visibility, to_queries: int, to_keys: int
) -> _Arrays:
  """Returns the kernel's arrays of masks and bias, by name.

  Args:
    visibility: see `attend`.
    to_queries: queries that fill the last block.
    to_keys: keys that fill the last lanes.
  """
  arrays: _Arrays = {
    'query_segments': _pad(visibility.query_segments[:, None], to_queries),
    'key_segments': _pad(visibility.key_segments[:, None], to_keys),
  }
  if visibility.by_offset is not None:
    # Queries minus keys, from 1 - keys: offset 0 is at the index of the padded
    # number of keys.
    flipped = visibility.by_offset[0, :, :, ::-1].astype(jnp.float32)
    padding = [(0, 0), (0, 0), (to_keys + 1, to_queries)]
    arrays['by_offset'] = jnp.pad(flipped, padding)
  if visibility.window is not None:
    assert visibility.query_positions is not None
    assert visibility.key_positions is not None
    arrays |= {
      'query_positions': _pad(visibility.query_positions[:, None], to_queries),
      'key_positions': _pad(visibility.key_positions[:, None], to_keys),
      'window': visibility.window.astype(jnp.int32).reshape(1, 1),
    }
  return arrays


def _block(num_queries: int, num_keys: int) -> int:
  """Returns the number of queries whose logits are in VMEM at a time."""
  lanes = max(_BLOCK_ELEMENTS // num_keys // _LANES, 1)
  return _LANES * min(lanes, pl.cdiv(num_queries, _LANES), 4)


@dataclasses.dataclass(frozen=True)
class _Form:
  """What is fixed when the kernel is compiled.

  Attributes:
    num_keys: without those that pad a block.
    block: queries per block.
    softcap: bound of the logits; 0 means none.
    causal: as in `Visibility`.
    prefix: as in `Visibility`.
    interpret: whether to run in Pallas' interpreter.
  """

  num_keys: int
  block: int
  softcap: float
  causal: bool
  prefix: int
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, arrays: _Arrays) -> Array:
  """Returns the outputs [batch, heads, kv, query] of whole blocks."""
  query = arrays['query']
  return _call(
    form,
    _forward,
    arrays,
    {'output': jax.ShapeDtypeStruct(query.shape, query.dtype)},
    num_products=2,
  )['output']


def _attend_forward(form: _Form, arrays: _Arrays) -> tuple[Array, _Arrays]:
  return _attend(form, arrays), arrays


def _attend_backward(
  form: _Form, arrays: _Arrays, cotangent: Array
) -> tuple[dict[str, Array | None]]:
  names = ('query', 'key', 'value', 'by_offset')
  results = {
    name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
    for name in names
    if name in arrays
  }
  key = arrays['key']
  sums = pltpu.VMEM(key.shape[2:], jnp.float32)
  grads = _call(
    form,
    _backward,
    arrays | {'cotangent': cotangent},
    results,
    num_products=5,
    scratch={'key_sums': sums, 'value_sums': sums},
  )
  return ({name: grads.get(name) for name in arrays},)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(
  form: _Form,
  kernel: Any,
  arrays: _Arrays,
  results: dict[str, jax.ShapeDtypeStruct],
  *,
  num_products: int,
  scratch: dict[str, Any] | None = None,
) -> _Arrays:
  """Runs a kernel for each block of queries of each row and head.

  Heads are outermost: the gradient of a head's bias is summed over rows in
  VMEM. Query heads of a group follow each other, since they share keys.
  """
  batch, num_heads, kv, num_queries = arrays['query'].shape
  _, key_heads, _, num_keys = arrays['key'].shape
  groups = num_heads // key_heads
  grid = (key_heads, batch, groups, num_queries // form.block)

  def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    if name == 'window':
      return pl.BlockSpec(memory_space=pltpu.SMEM)
    if name in ('query', 'cotangent', 'output'):
      return pl.BlockSpec(
        (1, 1, kv, form.block), lambda k, b, g, i: (b, k * groups + g, 0, i)
      )
    if name in ('query_segments', 'query_positions'):
      return pl.BlockSpec((1, 1, form.block), lambda k, b, g, i: (b, 0, i))
    if name in ('key_segments', 'key_positions'):
      return pl.BlockSpec((1, *shape[1:]), lambda k, b, g, i: (b, 0, 0))
    if name == 'by_offset':
      return pl.BlockSpec(
        (1, *shape[1:]), lambda k, b, g, i: (k * groups + g, 0, 0)
      )
    if name == 'keep':
      return pl.BlockSpec(
        (1, 1, *shape[2:]), lambda k, b, g, i: (b, k * groups + g, 0, 0)
      )
    assert name in ('key', 'value')
    return pl.BlockSpec((1, 1, *shape[2:]), lambda k, b, g, i: (b, k, 0, 0))

  names, out_names = tuple(arrays), tuple(results)
  scratch = scratch or {}

  def run(*refs):
    inputs = dict(zip(names, refs, strict=False))
    rest = refs[len(names) :]
    outputs = dict(zip(out_names, rest, strict=False))
    spaces = dict(zip(scratch, rest[len(out_names) :], strict=True))
    kernel(form, inputs, outputs | spaces)

  elements = batch * num_heads * num_queries * num_keys
  in_hbm: list[Any] = [*arrays.values(), *results.values()]
  moved = sum(x.size * x.dtype.itemsize for x in in_hbm)
  found = pl.pallas_call(
    run,
    grid=grid,
    in_specs=[spec(name, x.shape) for name, x in arrays.items()],
    out_specs=[spec(name, x.shape) for name, x in results.items()],
    out_shape=list(results.values()),
    scratch_shapes=list(scratch.values()),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=_VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * num_products * elements * kv,
      transcendentals=elements,
      bytes_accessed=moved,
    ),
    interpret=form.interpret,
    name=f'fused_attention{kernel.__name__}',
  )(*arrays.values())
  return dict(zip(out_names, found, strict=True))


def _forward(
  form: _Form, inputs: dict[str, Any], outputs: dict[str, Any]
) -> None:
  """Writes the outputs of a block of queries."""
  weights, total, _ = _weights(form, inputs)
  value = _kept(inputs)
  output = _product(value, weights.astype(value.dtype), ((1,), (0,)))
  output_ref = outputs['output']
  output_ref[0, 0] = (output / total).astype(output_ref.dtype)


def _backward(
  form: _Form, inputs: dict[str, Any], outputs: dict[str, Any]
) -> None:
  """Writes the gradient of a block of queries, and adds to those of the keys.

  The letters: p weights, and d before a name for the gradient of the loss.
  """
  row, group, step = (pl.program_id(axis) for axis in (1, 2, 3))
  key_sums, value_sums = outputs['key_sums'], outputs['value_sums']

  @pl.when((group == 0) & (step == 0))
  def _():
    key_sums[...] = jnp.zeros_like(key_sums)
    value_sums[...] = jnp.zeros_like(value_sums)

  query, key = inputs['query'][0, 0], inputs['key'][0, 0]  # [kv, length]
  d_output = inputs['cotangent'][0, 0]  # [kv, block]
  weights, total, capped = _weights(form, inputs)
  p = weights / total  # [keys, block]
  d_p = _product(_kept(inputs), d_output, ((0,), (0,)))
  d_logits = p * (d_p - jnp.sum(p * d_p, axis=0, keepdims=True))

  d_value = _product(d_output, p.astype(d_output.dtype), ((1,), (1,)))
  if 'keep' in inputs:
    d_value *= inputs['keep'][0, 0].astype(jnp.float32)
  value_sums[...] += d_value
  if 'by_offset' in inputs:
    _add_to_offsets(outputs['by_offset'], d_logits, (row == 0) & (step == 0))
  if form.softcap:
    d_logits *= 1 - jnp.square(capped / form.softcap)
  d_logits = d_logits.astype(query.dtype)
  outputs['query'][0, 0] = _product(key, d_logits, ((1,), (0,))).astype(
    query.dtype
  )
  key_sums[...] += _product(query, d_logits, ((1,), (1,)))

  is_last = (group == pl.num_programs(2) - 1) & (step == pl.num_programs(3) - 1)

  @pl.when(is_last)
  def _():
    outputs['key'][0, 0] = key_sums[...].astype(key.dtype)
    outputs['value'][0, 0] = value_sums[...].astype(key.dtype)


def _weights(form: _Form, inputs: dict[str, Any]) -> tuple[Array, Array, Array]:
  """Returns weights, their sums, and logits without bias.

  Weights [keys, block] are not divided by their sums [1, block] yet.
  """
  query, key = inputs['query'][0, 0], inputs['key'][0, 0]  # [kv, length]
  capped = _product(key, query, ((0,), (0,)))  # [keys, block]
  if form.softcap:
    capped = form.softcap * jnp.tanh(capped / form.softcap)
  logits = capped
  if 'by_offset' in inputs:
    logits += _bias_of_offsets(inputs['by_offset'], *logits.shape)

  keys = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
  of_key = _column(inputs['key_segments'][0])  # [keys, 1]
  is_seen = (of_key == inputs['query_segments'][0]) & (of_key > 0)
  if form.causal:
    queries = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    queries += pl.program_id(3) * form.block
    is_seen &= (keys <= queries) | (keys < form.prefix)
  logits += jnp.where(is_seen, 0.0, MASKED)
  if 'window' in inputs:
    offsets = _column(inputs['key_positions'][0]) - inputs['query_positions'][0]
    is_near = jnp.abs(offsets) < inputs['window'][0, 0]
    logits += jnp.where(is_near, 0.0, MASKED)
  if form.num_keys < logits.shape[0]:
    logits = jnp.where(keys < form.num_keys, logits, _PADDING)
  weights = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
  return weights, jnp.sum(weights, axis=0, keepdims=True), capped


def _kept(inputs: dict[str, Any]) -> Array:
  """Returns the values [kv, keys], times the factors of dropout.

  The factors are the same for all queries, so that those on weights are those
  on values.
  """
  value = inputs['value'][0, 0]
  return value * inputs['keep'][0, 0] if 'keep' in inputs else value


def _product(a: Array, b: Array, axes: tuple[tuple[int], tuple[int]]) -> Array:
  """Returns the float32 product over an axis of each."""
  return jax.lax.dot_general(
    a, b, (axes, ((), ())), preferred_element_type=jnp.float32
  )


def _column(row: Array) -> Array:
  """Returns [1, n] as [n, 1]."""
  return jnp.broadcast_to(row, (_LANES, row.shape[1])).T[:, :1]


def _rows(num_keys: int) -> int:
  """Returns the number of keys that share one slice of the bias by offset."""
  return 2 * _LANES if num_keys % (2 * _LANES) == 0 else _LANES


def _slice(num_keys: int, first: int, width: int) -> Any:
  """Returns the offsets of `_rows` keys and the queries of this block.

  Key `first + r` and query c of the block meet at index c - r + rows.
  """
  rows = _rows(num_keys)
  start = pl.program_id(3) * width + (num_keys - first - rows)
  return pl.ds(pl.multiple_of(start, _LANES), rows + width)


def _bias_of_offsets(ref: Any, num_keys: int, width: int) -> Array:
  """Returns the bias [keys, block]: row by row, the same vector moved on."""
  parts = []
  rows = _rows(num_keys)
  size = rows + width
  row = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, size), 0)
  for first in range(0, num_keys, rows):
    vector = ref[0, :, _slice(num_keys, first, width)]
    moved = jnp.broadcast_to(vector, (_SUBLANES, size))
    # Row r of eight moves by r: a roll for each bit of r.
    for bit in (1, 2, 4):
      moved = jnp.where(row & bit, pltpu.roll(moved, bit, 1), moved)
    parts += [
      pltpu.roll(moved, (start + width) % size, 1)[:, :width]
      for start in range(0, rows, _SUBLANES)
    ]
  return jnp.concatenate(parts, axis=0)


def _add_to_offsets(ref: Any, d_logits: Array, is_first: Array) -> None:
  """Adds the sums of the diagonals: the transpose of `_bias_of_offsets`."""

  @pl.when(is_first)
  def _():
    ref[...] = jnp.zeros_like(ref)

  num_keys, width = d_logits.shape
  rows = _rows(num_keys)
  size = rows + width
  row = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, size), 0)
  for first in range(0, num_keys, rows):
    sums = jnp.zeros((_SUBLANES, size), jnp.float32)
    for start in range(0, rows, _SUBLANES):
      part = d_logits[first + start : first + start + _SUBLANES]
      part = jnp.concatenate(
        [part, jnp.zeros((_SUBLANES, rows), jnp.float32)], axis=1
      )
      sums += pltpu.roll(part, rows - start, 1)
    for bit in (1, 2, 4):
      sums = jnp.where(row & bit, pltpu.roll(sums, size - bit, 1), sums)
    place = _slice(num_keys, first, width)
    ref[0, :, place] += jnp.sum(sums, axis=0, keepdims=True)
