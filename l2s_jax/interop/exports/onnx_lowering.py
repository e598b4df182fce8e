# SPDX-License-Identifier: Apache-2.0
"""Converts a function of arrays to an ONNX model, using jax2onnx.

jax2onnx 0.17 supports symbolic dimensions in some primitives only. The traced
function is therefore rewritten in these primitives first: calls and custom
derivatives are inlined; split, pad and dynamic_update_slice become slices,
concatenations and selects.

Parameters are external data of the model, in safetensors files beside it.
"""

import collections
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax

from l2s_jax.interop.exports import greedy_programs
from l2s_jax.weights.formats import tensor_files

Shapes = Mapping[str, jax.ShapeDtypeStruct]

# Primitives that return their operands if nothing is differentiated.
_TRANSPARENT = ('name', 'stop_gradient', 'sharding_constraint')
_CALLS = ('jit', 'pjit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call')


def convert(
  function: Callable[..., dict[str, jax.Array]],
  params: Shapes,
  inputs: Shapes,
  folder: pathlib.Path | None,
) -> Any:
  """Returns the `onnx.ModelProto` of a function.

  Args:
    function: function of the dicts `params` and `inputs`. The names of its
      results must differ from those of all inputs.
    params: shapes of the parameters by name.
    inputs: shapes of the inputs by name, with symbolic dimensions.
    folder: folder with the parameters in safetensors files, and of the model;
      None leaves parameters as inputs, for a trial conversion.

  Raises:
    ValueError: if jax2onnx does not support the function.
  """
  # Hides warnings: at import about examples whose packages are missing, later
  # about unknown shapes.
  for name in ('jax2onnx', 'onnx_ir'):
    logging.getLogger(name).setLevel(logging.ERROR)
  import jax2onnx

  names, input_names = list(params), list(inputs)

  def call(*args: jax.Array) -> dict[str, jax.Array]:
    return function(
      dict(zip(names, args, strict=False)),
      dict(zip(input_names, args[len(names) :], strict=True)),
    )

  specs = [*params.values(), *inputs.values()]
  traced = greedy_programs.traced(call)
  closed, outputs = jax.make_jaxpr(traced, return_shape=True)(*specs)
  try:
    model = jax2onnx.to_onnx(
      lambda *args: tuple(_plain(closed.jaxpr, closed.consts, args)),
      specs,
      input_names=[*names, *input_names],
    )
  except (
    NotImplementedError,
    jax.errors.InconclusiveDimensionOperation,
  ) as error:
    said = (str(error).splitlines() or [''])[0]
    raise ValueError(
      f'--to=onnx: jax2onnx cannot convert this model: {said}. Use '
      '--to=stablehlo, which supports every model.'
    ) from error
  _name_outputs(model.graph, outputs)
  if folder is None:
    return model
  _make_external(model.graph, set(names), folder)
  _multiply_matrices(model.graph)
  return model


def _plain(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  """Evaluates a jaxpr with primitives that support symbolic dimensions."""
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= dict(zip(jaxpr.invars, args, strict=True))

  def read(x: Any) -> Any:
    if isinstance(x, jax.extend.core.Literal):
      aval: Any = x.aval  # Its type has no dtype for mypy.
      return np.asarray(x.val, aval.dtype)
    return values[x]

  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    operands = [read(x) for x in equation.invars]
    if name in _CALLS:
      inner = params.get('jaxpr') or params['call_jaxpr']
      results = _plain(inner.jaxpr, inner.consts, operands)
    elif name in _TRANSPARENT:
      results = operands
    elif name in _RULES:
      results = _RULES[name](*operands, **params)
    else:
      results = equation.primitive.bind(*operands, **params)
      if not equation.primitive.multiple_results:
        results = [results]
    values |= dict(zip(equation.outvars, results, strict=True))
  return [read(x) for x in jaxpr.outvars]


def _split(x: Any, *, sizes: Sequence[Any], axis: int) -> list[Any]:
  """Splits an array by slices."""
  found, start = [], 0
  for size in sizes:
    found.append(lax.slice_in_dim(x, start, start + size, axis=axis))
    start = start + size
  return found


def _pad(x: Any, value: Any, *, padding_config: Any) -> list[Any]:
  """Pads or crops an array by slices and concatenations."""
  for axis, (low, high, interior) in enumerate(padding_config):
    assert interior == 0, 'no model pads between its elements'

    before, after = x.shape[:axis], x.shape[axis + 1 :]
    end = x.shape[axis] + min(high, 0)
    parts = [
      lax.broadcast(value, (*before, max(low, 0), *after)),
      lax.slice_in_dim(x, max(-low, 0), end, axis=axis),
      lax.broadcast(value, (*before, max(high, 0), *after)),
    ]
    x = lax.concatenate([p for p in parts if p.shape[axis] != 0], axis)
  return [x]


def _update(buffer: Any, x: Any, *starts: Any) -> list[Any]:
  """Implements dynamic_update_slice of one slot, or of all, by a select."""
  axes = [i for i in range(x.ndim) if x.shape[i] != buffer.shape[i]]
  if not axes:
    return [x]
  (axis,) = axes
  assert x.shape[axis] == 1, 'a step writes one token'
  slots = lax.broadcasted_iota(jnp.int32, buffer.shape, axis)
  new = lax.broadcast_in_dim(x, buffer.shape, tuple(range(x.ndim)))
  is_new = lax.eq(slots, lax.broadcast(starts[axis], buffer.shape))
  return _select(is_new, buffer, new)


def _select(which: Any, *cases: Any) -> list[Any]:
  """Implements select_n; for booleans by logical operations."""
  if which.dtype != bool or cases[0].dtype != bool:
    return [lax.select_n(which, *cases)]
  # ONNX Runtime has no select of booleans.
  no, yes = cases
  no = lax.bitwise_and(lax.bitwise_not(which), no)
  return [lax.bitwise_or(lax.bitwise_and(which, yes), no)]


_RULES: dict[str, Callable[..., list[Any]]] = {
  'split': _split,
  'pad': _pad,
  'dynamic_update_slice': _update,
  'select_n': _select,
}


def _name_outputs(graph: Any, outputs: Shapes) -> None:
  """Sets the names of outputs, and their shapes from JAX."""
  import onnx

  found = [x.name for x in graph.output]
  # Inferred shapes are wrong: `prompt` in place of `prompt + answer`.
  del graph.output[:], graph.value_info[:]
  # JAX flattens a dict in the order of its sorted keys.
  for source, name in zip(found, sorted(outputs), strict=True):
    shape = outputs[name]
    graph.node.append(onnx.helper.make_node('Identity', [source], [name]))
    graph.output.append(
      onnx.helper.make_tensor_value_info(
        name,
        onnx.helper.np_dtype_to_tensor_dtype(np.dtype(shape.dtype)),
        [n if isinstance(n, int) else str(n) for n in shape.shape],
      )
    )


def _make_external(graph: Any, names: set[str], folder: pathlib.Path) -> None:
  """Turns inputs that are parameters into external data."""
  import onnx

  tensors = tensor_files.open_folder(folder)
  read = {name for node in graph.node for name in node.input}
  kept = [x for x in graph.input if x.name not in names]
  for value in [x for x in graph.input if x.name in names & read]:
    array = tensors[value.name].read()
    mapped: Any = array.base  # the numpy.memmap
    tensor = onnx.TensorProto(
      name=value.name,
      data_type=value.type.tensor_type.elem_type,
      dims=array.shape,
      data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, text in (
      ('location', pathlib.Path(mapped.filename).name),
      ('offset', str(mapped.offset)),
      ('length', str(array.nbytes)),
    ):
      tensor.external_data.add(key=key, value=text)
    graph.initializer.append(tensor)
  del graph.input[:]
  graph.input.extend(kept)


def _multiply_matrices(graph: Any) -> None:
  """Rewrites products with kernels as MatMul nodes.

  ONNX Runtime's quantizer ignores Einsum nodes, and kernels behind a Reshape
  node. Einsum is also slower.
  """
  import onnx

  shapes = {
    tensor.name: onnx.numpy_helper.to_array(tensor)
    for tensor in graph.initializer
    if not tensor.external_data
  }
  tensors = {x.name: x for x in graph.initializer if x.external_data}
  num_uses = collections.Counter(x for node in graph.node for x in node.input)
  reshaped: dict[str, str] = {}
  nodes = []
  for node in graph.node:
    tensor = tensors.get(node.input[0]) if node.input else None
    if (
      node.op_type == 'Reshape'
      and tensor is not None
      and num_uses[tensor.name] == 1
      and node.input[1] in shapes
      and (shapes[node.input[1]] > 0).all()
    ):
      # The bytes in the file are the same.
      tensor.dims[:] = shapes[node.input[1]].tolist()
      reshaped[node.output[0]] = tensor.name
      continue
    node.input[:] = [reshaped.get(name, name) for name in node.input]
    if node.op_type == 'Einsum' and (
      node.attribute[0].s in (b'abc,cd->abd', b'ab,bc->ac')
    ):
      node.op_type = 'MatMul'
      del node.attribute[:]
    nodes.append(node)
  del graph.node[:]
  graph.node.extend(nodes)
