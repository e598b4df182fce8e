# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights: where they are kept, read one tensor at a time.

A source names its tensors as our parameters are named ("canonical names": the
path in the tree, layers stacked), whatever the file calls them.
"""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import traverse_util

from l2s_jax.models import config as config_lib

PyTree = Any
Path = tuple[str, ...]


@runtime_checkable  # for the tests' type checker
class Source(Protocol):
  """Weights of one language model on disk."""

  config: config_lib.TransformerConfig
  location: str

  def step(self) -> int | None:
    """Returns the checkpoint's step; None where there is only one."""

  def shapes(self) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every tensor, by canonical name."""

  def read(self, path: Path) -> np.ndarray:
    """Returns one tensor as stored: no cast, layers stacked."""


def open_source(location: str, step: int | None = None) -> Source:
  """Opens a run of ours or a Hugging Face folder.

  Args:
    location: the folder.
    step: the checkpoint of a run; None takes the newest.

  Raises:
    FileNotFoundError: if the folder is neither.
  """
  from l2s_jax.weights import huggingface, runs

  folder = pathlib.Path(location)
  if (folder / 'model.json').is_file():
    return runs.Run(folder, step)
  if (folder / 'config.json').is_file():
    return huggingface.Folder(folder)
  raise FileNotFoundError(
    f'{location} is not a folder of weights: it has neither model.json (a run '
    'of ours) nor config.json (a Hugging Face folder).'
  )


def load(
  source: Source, shapes: PyTree, shardings: PyTree
) -> tuple[PyTree, str]:
  """Reads the tensors of a tree into their shards, one at a time.

  Args:
    source: where from.
    shapes: tree of `jax.ShapeDtypeStruct`; its dtypes are cast to.
    shardings: of each array.

  Returns:
    The parameters and their fingerprint.

  Raises:
    ValueError: lists every tensor that is missing or has another shape.
  """
  wanted = traverse_util.flatten_dict(shapes)
  flat_shardings = traverse_util.flatten_dict(shardings)
  check_shapes(source, wanted)
  loaded = {}
  digest = hashlib.sha256()
  for path in sorted(wanted):
    array = source.read(path)
    _update(digest, path, array)
    array = array.astype(wanted[path].dtype)
    loaded[path] = jax.make_array_from_callback(
      array.shape, flat_shardings[path], array.__getitem__
    )
  return traverse_util.unflatten_dict(loaded), digest.hexdigest()


def check_shapes(
  source: Source, wanted: Mapping[Path, jax.ShapeDtypeStruct]
) -> None:
  """Refuses weights that lack a tensor or have one of another shape."""
  found = source.shapes()
  problems = []
  for path, shape in sorted(wanted.items()):
    name = '/'.join(path)
    if path not in found:
      problems.append(f'  {name} {tuple(shape.shape)}: missing')
    elif tuple(found[path]) != tuple(shape.shape):
      problems.append(
        f'  {name}: the model has {tuple(shape.shape)}, the weights have '
        f'{tuple(found[path])}'
      )
  if problems:
    raise ValueError(
      f'The weights in {source.location} do not fit the model. Use the config '
      'that they came with:\n' + '\n'.join(problems)
    )


def _update(digest: Any, path: Path, array: np.ndarray) -> None:
  """Adds a tensor to a fingerprint, layer by layer.

  Layer by layer, so that a file that keeps layers apart and one that stacks
  them have the same fingerprint.
  """
  slices = enumerate(array) if 'layers' in path else [(0, array)]
  for index, part in slices:
    part = np.ascontiguousarray(part)
    digest.update(f'{"/".join(path)}[{index}]{part.dtype}{part.shape}'.encode())
    digest.update(part.tobytes())
