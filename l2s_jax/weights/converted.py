# SPDX-License-Identifier: Apache-2.0
"""Converted folders: the weights format written by `convert --to=l2s`.

A converted folder holds `weights.json` (the model config and the digest of
every tensor), safetensors files with canonical tensor names and stacked layers,
and the tokenizer files. Tensors are memory-mapped, so each device reads its own
shard only.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import files, integrity
from l2s_jax.weights import misfits, run_format
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import tensor_files

DESCRIPTION = run_format.CONVERTED
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
    differing = [
      *(f'{name}: missing' for name in self._digests.keys() - self._tensors),
      *misfits.unknown(self._tensors.keys() - self._digests, self._tensors, {}),
    ]
    if differing:
      raise ValueError(
        misfits.refusal(
          f'The tensors in {folder} do not match the list in {path}',
          'Convert again, or copy the whole folder again',
          differing,
        )
      )

  def step(self) -> int | None:
    return None

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    return {
      tuple(name.split('/')): jax.ShapeDtypeStruct(
        tensor.shape, jnp.dtype(tensor_files.DTYPES[tensor.dtype])
      )
      for name, tensor in self._tensors.items()
    }

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> Any:
    # In a bucket, all layers are a `storage.BucketArray`.
    array = self._tensors['/'.join(path)].read()
    return array if layer is None else array[layer]

  def name(self, path: shapes_lib.Path) -> str:
    return '/'.join(path)

  def digest(self, path: shapes_lib.Path) -> str | None:
    return self._digests['/'.join(path)]


def save(source: source_lib.Source, folder: pathlib.Path) -> None:
  """Writes weights as a converted folder, layer by layer.

  Args:
    source: the weights to write. `source.digest` must be known for every tensor
      after the tensor was read.
    folder: the output directory.
  """
  shapes = {'/'.join(path): shape for path, shape in source.shapes().items()}

  def pieces(name):
    path = tuple(name.split('/'))
    for layer in source_lib.layers(path, shapes[name].shape):
      yield source.read(path, layer)

  tensor_files.save_safetensors(folder, shapes, pieces)
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
