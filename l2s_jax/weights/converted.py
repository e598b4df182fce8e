# SPDX-License-Identifier: Apache-2.0
"""Converted folders: the weights format written by `convert --to=l2s`.

A converted folder holds `weights.json` (the model config and the digest of
every tensor), safetensors files with canonical tensor names and stacked layers,
and the tokenizer files. Tensors are memory-mapped, so each device reads its own
shard only.

Kernels and tables of an int8 bundle are int8, each beside a tensor NAME_scale.
They are read as float32, and their digests are of these floats.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.models import int8
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import files, integrity
from l2s_jax.weights import misfits, run_format
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import tensor_files

DESCRIPTION = run_format.CONVERTED
# Suffix of the tensor with the scales of an int8 tensor.
SCALE = '_scale'
_INT8 = 'I8'
_REMEDY = 'convert again, or copy the whole folder again.'
_KEYS = {
  'format_version',
  'written_by',
  'model_type',
  'special_ids',
  'config',
  'digests',
}

_KINDS: dict[str, type | tuple[type, ...]] = {
  'model_type': (str, type(None)),
  'special_ids': dict,
  'digests': dict,
}


class ConvertedFolder:
  """The weights of a converted folder, as a `source.Source`."""

  def __init__(self, folder: pathlib.Path):
    """Reads `weights.json` and the headers of the safetensors files.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, or the safetensors files do not hold the
        tensors listed in `weights.json`.
    """
    self.location = str(folder)
    path = folder / DESCRIPTION
    content = files.read_json(path, remedy=_REMEDY)
    description = run_format.migrate(DESCRIPTION, content, path, remedy=_REMEDY)
    missing = sorted(_KEYS - description.keys())
    if missing:
      raise ValueError(
        f'{path} lacks {", ".join(missing)}. {_REMEDY.capitalize()}'
      )
    for key, kind in _KINDS.items():
      value = description[key]
      if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
          f'{path}: {key} is {config_lib.shorten(repr(value))}, which is not '
          f'valid in a converted folder. {_REMEDY.capitalize()}'
        )
    if integrity.is_sealed(content) and integrity.verification():
      if integrity.unseal(content) is None:
        raise ValueError(
          f'{path} was changed after it was written: its digest does not '
          'match. Convert again, or copy the whole folder again from the '
          'original.'
        )
    known = dict.fromkeys((*_KEYS, 'fingerprint', integrity.DIGEST))
    known['config'] = dict.fromkeys(config_lib.field_names())
    run_format.refuse_unknown(description, known, path, remedy=_REMEDY)
    self.model_type = description['model_type']
    self.special_ids = description['special_ids']
    self.config = config_lib.from_json(description['config'], path)
    self._digests = description['digests']
    self._tensors = tensor_files.open_folder(folder)
    differing = list(self._differing())
    if differing:
      raise ValueError(
        misfits.refusal(
          f'The tensors in {folder} do not match the list in {path}',
          'Convert again, or copy the whole folder again',
          differing,
        )
      )

  def _differing(self) -> Iterator[str]:
    """Yields differences between the tensors and the list of digests."""
    wanted = dict.fromkeys(self._digests)
    for name in self._digests.keys() & self._tensors.keys():
      tensor = self._tensors[name]
      if tensor.dtype != _INT8:
        continue
      shape = scale_shape(tuple(name.split('/')), tensor.shape)
      if shape is None:
        yield f'{name}: found int8, which kernels and tables alone may have'
        continue
      wanted[name + SCALE] = None
      scale = self._tensors.get(name + SCALE)
      if scale and (scale.shape, scale.dtype) != (shape, 'F32'):
        yield (
          f'{name + SCALE}: found {scale.dtype}{list(scale.shape)}, expected '
          f'F32{list(shape)}'
        )
    yield from (f'{name}: missing' for name in wanted.keys() - self._tensors)
    others = self._tensors.keys() - wanted
    yield from misfits.unknown(others, self._tensors, {})

  def step(self) -> int | None:
    return None

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    found = {}
    for name in self._digests:
      tensor = self._tensors[name]
      is_int8 = tensor.dtype == _INT8
      dtype = 'float32' if is_int8 else tensor_files.DTYPES[tensor.dtype]
      found[tuple(name.split('/'))] = jax.ShapeDtypeStruct(
        tensor.shape, jnp.dtype(dtype)
      )
    return found

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> Any:
    name = '/'.join(path)
    # In a bucket, all layers are a `bucket_array.BucketArray`.
    array, scale = self._tensors[name].read(), None
    if self._tensors[name].dtype == _INT8:
      scale = self._tensors[name + SCALE].read()
    if layer is not None:
      array, scale = array[layer], None if scale is None else scale[layer]
    if scale is None:
      return array
    return int8.dequantize(np.asarray(array), np.asarray(scale))

  def name(self, path: shapes_lib.Path) -> str:
    return '/'.join(path)

  def digest(self, path: shapes_lib.Path) -> str | None:
    return self._digests['/'.join(path)]


def scale_shape(
  path: shapes_lib.Path, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
  """Returns the shape of an int8 tensor's scales; None if it stays float.

  Args:
    path: canonical name.
    shape: of the kernel, with its stacked layers.
  """
  axes = int8.contracted_axes(path, is_stacked='layers' in path)
  if not axes:
    return None
  return tuple(1 if i in axes else size for i, size in enumerate(shape))


def stored_shapes(
  shapes: Mapping[shapes_lib.Path, jax.ShapeDtypeStruct], *, with_int8: bool
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of the tensors in the files of a folder.

  Args:
    shapes: of the weights.
    with_int8: whether kernels and token embeddings are stored in int8.
  """
  stored = {}
  for path, shape in shapes.items():
    name, scale = '/'.join(path), scale_shape(path, shape.shape)
    stored[name] = shape
    if with_int8 and scale is not None:
      stored[name] = jax.ShapeDtypeStruct(shape.shape, np.dtype(np.int8))
      stored[name + SCALE] = jax.ShapeDtypeStruct(scale, np.dtype(np.float32))
  return stored


def save(
  source: source_lib.Source, folder: pathlib.Path, *, with_int8: bool = False
) -> None:
  """Writes weights as a converted folder, layer by layer.

  Args:
    source: the weights to write. `source.digest` must be known for every tensor
      after the tensor was read.
    folder: the output directory.
    with_int8: whether to store kernels and token embeddings in int8. Those of
      the source must be rounded by `int8.round_kernel`.
  """
  shapes = source.shapes()
  stored = stored_shapes(shapes, with_int8=with_int8)

  def pieces(name: str) -> Iterator[np.ndarray]:
    path = tuple(name.split('/'))
    is_scale = path not in shapes
    if is_scale:
      path = tuple(name.removesuffix(SCALE).split('/'))
    for layer in source_lib.layers(path, shapes[path].shape):
      array = source.read(path, layer)
      if stored[name].dtype == np.int8 or is_scale:
        array = int8.quantize(array, int8.contracted_axes(path))[is_scale]
      yield array

  tensor_files.save_safetensors(folder, stored, pieces)
  digests = {}
  for path in source.shapes():
    digest = source.digest(path)
    assert digest is not None, path  # All tensors were read above.
    digests[path] = digest
  description = integrity.seal(
    {
      **run_format.stamp(),
      'model_type': source.model_type,
      'special_ids': source.special_ids,
      'config': dataclasses.asdict(source.config),
      'digests': {'/'.join(path): value for path, value in digests.items()},
      'fingerprint': source_lib.fingerprint(digests),
    }
  )
  files.write_json(folder / DESCRIPTION, description)
