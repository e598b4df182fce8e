# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights: where they are kept, read one layer at a time.

A source names its tensors as our parameters are named ("canonical names": the
path in the tree, layers stacked), whatever the file calls them. The digest of a
tensor is a hash of its layers as stored, before any cast, stacking or sharding;
the fingerprint of a set of tensors is a hash of their names and digests. So a
file that keeps layers apart has the fingerprint of one that stacks them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import traverse_util

from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import distributed, integrity
from l2s_jax.weights import finite, misfits

PyTree = Any


@runtime_checkable  # for the tests' type checker
class Source(Protocol):
  """Weights of one language model on disk.

  Attributes:
    config: how the model is built.
    location: where the weights are.
    model_type: what transformers calls the family; None where nobody said.
    special_ids: what its config.json says of token ids, by its keys.
  """

  config: config_lib.TransformerConfig
  location: str
  model_type: str | None
  special_ids: dict[str, Any]

  def step(self) -> int | None:
    """Returns the checkpoint's step; None where there is only one."""

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    """Returns shape and dtype, as stored, of every tensor."""

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> np.ndarray:
    """Returns one tensor as stored, without a cast.

    Args:
      path: its canonical name.
      layer: of a stack, the one to read; None reads all.
    """

  def name(self, path: shapes_lib.Path) -> str:
    """Returns what the files call a tensor, there or not, for errors."""

  def digest(self, path: shapes_lib.Path) -> str | None:
    """Returns the tensor's digest where it is kept beside the weights."""


def load(
  source: Source,
  shapes: PyTree,
  shardings: PyTree,
) -> tuple[PyTree, str]:
  """Reads the tensors of a tree into their shards, one at a time.

  Where digests are kept beside the weights, processes share the tensors out
  among them to compare them, and read of the others what their devices hold;
  with `integrity.verification` off they compare none. Without digests each
  process reads all, to take them. All processes must call it.

  Args:
    source: where from.
    shapes: tree of `jax.ShapeDtypeStruct`; its dtypes are cast to.
    shardings: of each array.

  Returns:
    The parameters and their fingerprint.

  Raises:
    ValueError: lists every tensor that is missing or has another shape, is
      not what its digest says, or is read and holds what is not finite.
  """
  wanted = traverse_util.flatten_dict(shapes)
  flat_shardings = traverse_util.flatten_dict(shardings)
  check_shapes(source, wanted)
  loaded, digests = {}, {}
  notes = finite.Notes(source)
  for number, path in enumerate(sorted(wanted)):
    if source.digest(path) is None:
      array, digests[path] = _read(source, path, wanted[path], notes)
    else:
      array = source.read(path)
      is_mine = number % jax.process_count() == jax.process_index()
      if is_mine and integrity.verification():
        notes.look(array, path)
        parts = array if 'layers' in path else [array]
        digests[path] = digest(map(digest_layer, parts))
    loaded[path] = jax.make_array_from_callback(
      array.shape,
      flat_shardings[path],
      functools.partial(_shard, array, wanted[path].dtype),
    )
  check_digests(source, digests)
  notes.check()
  kept_digests = {path: source.digest(path) or digests[path] for path in wanted}
  return traverse_util.unflatten_dict(loaded), fingerprint(kept_digests)


def read_fingerprint(source: Source, shapes: PyTree) -> str:
  """Returns the fingerprint of the tensors of a tree; keeps none of them.

  Read, a layer at a time, are those without digests beside the weights.

  Args:
    source: where from.
    shapes: tree of `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: lists every tensor that is missing or has another shape.
  """
  wanted = traverse_util.flatten_dict(shapes)
  check_shapes(source, wanted)
  return fingerprint(
    {
      path: source.digest(path)
      or digest(
        digest_layer(source.read(path, layer))
        for layer in layers(path, shape.shape)
      )
      for path, shape in wanted.items()
    }
  )


def demanded(
  config: config_lib.TransformerConfig, found: Collection[shapes_lib.Path]
) -> Mapping[shapes_lib.Path, jax.ShapeDtypeStruct]:
  """Returns the tensors that weights must have: of all, or of an encoder.

  An encoder may come without its decoder: an LLM needs no more.

  Args:
    config: how the model is built.
    found: the tensors that are there.
  """
  shapes = shapes_lib.of_model(config)
  if config.is_encoder_decoder and shapes_lib.is_encoder_alone(found):
    return {p: s for p, s in shapes.items() if p[0] not in shapes_lib.DECODER}
  return shapes


def demanded_paths(
  config: config_lib.TransformerConfig, found: Collection[shapes_lib.Path]
) -> Collection[shapes_lib.Path]:
  """Returns the names of the same: nothing of the config's size is made."""
  small = dataclasses.replace(
    config,
    vocab_size=2,
    emb_dim=2,
    num_heads=1,
    num_kv_heads=None,
    head_dim=2,
    mlp_dim=2,
    num_encoder_layers=min(config.num_encoder_layers, 1),
    num_decoder_layers=min(config.num_decoder_layers, 1),
    max_positions=min(config.max_positions, 4),
    relpos_buckets=4,
    relpos_max_distance=4,
    rope_dim=None,
    dtype='float32',
  )
  return demanded(small, found).keys()


def check_shapes(
  source: Source,
  wanted: Mapping[shapes_lib.Path, jax.ShapeDtypeStruct],
  *,
  allow_others: bool = True,
) -> None:
  """Refuses weights that lack a tensor or have one of another shape.

  Args:
    source: has them.
    wanted: the tensors that there must be.
    allow_others: whether there may be more.

  Raises:
    ValueError: lists the tensors.
  """
  expected = []
  for path, shape in wanted.items():
    name, theirs = '/'.join(path), source.name(path)
    also = theirs if theirs != name else ''
    expected.append(misfits.Expected(name, also, [tuple(shape.shape)]))
  found = {'/'.join(path): shape for path, shape in source.shapes().items()}
  problems = misfits.problems(expected, found)
  if not allow_others:
    others = source.shapes().keys() - wanted.keys()
    named = {'/'.join(path): source.name(path) for path in others}
    titles = {name: theirs for name, theirs in named.items() if theirs != name}
    problems += misfits.unknown(named, found, titles)
  if problems:
    raise ValueError(
      misfits.refusal(
        f'The weights in {source.location} do not fit the model',
        'Use the config that they came with',
        problems,
      )
    )


def check_digests(
  source: Source, digests: Mapping[shapes_lib.Path, str]
) -> None:
  """Refuses weights whose digests are not those that are kept beside them."""
  changed = distributed.gather(
    [
      '/'.join(path)
      for path, digest in sorted(digests.items())
      if source.digest(path) not in (None, digest)
    ]
  )
  if changed:
    raise ValueError(
      f'{source.location} has changed since its digests were taken. Convert or '
      'copy it again; these tensors differ:\n  ' + '\n  '.join(changed)
    )


def layers(
  path: shapes_lib.Path, shape: tuple[int, ...]
) -> Iterable[int | None]:
  """Returns what `Source.read` takes to read a tensor layer by layer."""
  return range(shape[0]) if 'layers' in path else (None,)


def digest_layer(array: np.ndarray) -> bytes:
  """Returns the hash of one layer of a tensor, or of one that has none."""
  hasher = hashlib.sha256(f'{array.dtype}{array.shape}'.encode())
  # Bytes, since NumPy exports no buffer of bfloat16.
  hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return hasher.digest()


def digest(layer_digests: Iterable[bytes]) -> str:
  """Returns the digest of a tensor from those of its layers, in order."""
  return hashlib.sha256(b''.join(layer_digests)).hexdigest()


def fingerprint(digests: Mapping[shapes_lib.Path, str]) -> str:
  """Returns the fingerprint of a set of tensors."""
  lines = [f'{"/".join(path)} {digests[path]}\n' for path in sorted(digests)]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def _shard(array: np.ndarray, dtype: Any, index: Any) -> np.ndarray:
  return array[index].astype(dtype, copy=False)


def _read(
  source: Source,
  path: shapes_lib.Path,
  wanted: jax.ShapeDtypeStruct,
  notes: finite.Notes,
) -> tuple[np.ndarray, str]:
  """Returns a tensor, cast layer by layer, and its digest before that."""
  if 'layers' not in path:
    array = source.read(path)
    notes.look(array, path)
    return array.astype(wanted.dtype, copy=False), digest([digest_layer(array)])
  array = np.empty(wanted.shape, wanted.dtype)
  layer_digests = []
  for layer in layers(path, wanted.shape):
    part = source.read(path, layer)
    layer_digests.append(digest_layer(part))
    notes.look(part, path, layer)
    array[layer] = part
  return array, digest(layer_digests)
