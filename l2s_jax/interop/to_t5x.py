# SPDX-License-Identifier: Apache-2.0
"""Writes weights as a T5X checkpoint.

The checkpoint has parameters and a step, as T5X's InferenceState: a msgpack
file that refers to one zarr array per parameter. The name table and the reader
are in `weights/formats/t5x.py`.
"""

import json
import pathlib
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
import tensorstore

from l2s_jax.models import config as config_lib
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.families import name_table
from l2s_jax.weights.formats import t5x

# Activations that T5X looks up in flax.linen, with the same meaning as here.
_ACTIVATIONS = ('gelu', 'linear', 'relu', 'silu')


def save(source: source_lib.Source, folder: pathlib.Path) -> None:
  """Writes `checkpoint_STEP` in T5X's format, and a config.json beside it.

  Args:
    source: a T5 model.
    folder: destination, MODEL_DIR in T5X.

  Raises:
    ValueError: if T5X cannot build the model; lists the differences.
  """
  config = source.config
  check(source)
  folder = folder.resolve()  # tensorstore rejects paths with `..`.
  step = source.step() or 1  # T5X ignores checkpoint_0.
  path = folder / f'checkpoint_{step}'
  path.mkdir(parents=True)
  is_scanned = config.relpos_per_layer
  sizes = name_table.axis_sizes(config)
  target: dict[str, Any] = {}
  shapes = source.shapes()
  for row in t5x.ROWS:
    if row.path not in shapes:
      continue
    shape = t5x.unmerged(row, sizes) if is_scanned else row.shape(sizes)
    dtype = shapes[row.path].dtype
    count = len(row.names(config))
    arrays = (
      name_table.to_theirs([row], [source.read(row.path, layer)], sizes)
      for layer in source_lib.layers(row.path, shapes[row.path].shape)
    )
    if row.is_stacked and is_scanned:
      spec, store = _create(
        path,
        t5x.scanned(row.theirs),
        (shape[0], count, *shape[1:]),
        (shape[0], 1, *shape[1:]),  # One chunk per layer.
        dtype,
      )
      _insert(target, t5x.scanned(row.theirs), spec)
      for layer, array in enumerate(arrays):
        store[:, layer].write(array.reshape(shape)).result()
      continue
    for name, array in zip(row.names(config), arrays, strict=True):
      spec, store = _create(path, name, shape, shape, dtype)
      _insert(target, name, spec)
      store.write(array.reshape(shape)).result()
  state = {'step': np.int32(step)}  # As of T5X's InferenceState.
  (path / t5x.FILE).write_bytes(
    flax.serialization.msgpack_serialize(
      {'version': 3, 'optimizer': {'state': state, 'target': target}}
    )
  )
  content = {
    'config': {name: getattr(config, name) for name in t5x.FIELDS},
    'format': 't5x',
    'layout': 'scanned' if is_scanned else 'unscanned',
    'step': step,
  }
  (folder / t5x.CONFIG).write_text(json.dumps(content, indent=1) + '\n')


def check(source: source_lib.Source) -> None:
  """Checks that T5X can build the model.

  Raises:
    ValueError: if the model is decoder-only, has no decoder, or has config
      values without a field in T5Config; lists the differences.
  """
  config = source.config
  if not config.is_encoder_decoder:
    raise ValueError(
      f'{source.location} is decoder-only; --to=t5x supports only T5. Use '
      '--to=hf or --to=l2s.'
    )
  said = config_lib.TransformerConfig(
    **{name: getattr(config, name) for name in t5x.FIELDS},
    relpos_per_layer=config.relpos_per_layer,
    scale_logits=config.logits_via_embedding,
  )
  free = (
    *config_lib.RUNTIME_FIELDS,
    'kernel_init_stddev',
    'embedding_init_stddev',
  )
  problems = [
    f'{name}: T5X has {value!r}, the model {getattr(config, name)!r}'
    for name, value in said.to_json().items()
    if name not in free and getattr(config, name) != value
  ]
  problems += [
    f'mlp_activations: T5X has no {name!r}'
    for name in config.mlp_activations
    if name not in _ACTIVATIONS
  ]
  if ('decoder', 'final_norm', 'scale') not in source.shapes():
    problems.append('the model has no decoder')
  if problems:
    raise ValueError(
      f'T5X cannot build the model in {source.location}. Use --to=hf or '
      '--to=l2s. Differences:\n  ' + '\n  '.join(problems)
    )


def _create(
  folder: pathlib.Path,
  name: str,
  shape: tuple[int, ...],
  chunks: tuple[int, ...],
  dtype: Any,
) -> tuple[dict[str, Any], tensorstore.TensorStore]:
  """Creates a zarr array; returns it with its spec for the msgpack file."""
  place = 'target.' + name.replace('/', '.') + '/'
  spec = {
    'driver': 'zarr',
    'dtype': jnp.dtype(dtype).name,
    'kvstore': {'driver': 'file', 'path': place},
    'metadata': {
      'chunks': list(chunks),
      'compressor': {'id': 'gzip', 'level': 1},
      'shape': list(shape),
    },
  }
  there = spec | {'kvstore': {'driver': 'file', 'path': str(folder / place)}}
  return spec, tensorstore.open(there, create=True).result()


def _insert(tree: dict[str, Any], name: str, value: Any) -> None:
  """Inserts a value into nested dicts at a path with '/' between keys."""
  *parents, last = name.split('/')
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = value
