# SPDX-License-Identifier: Apache-2.0
"""Interface to pretrained weights on disk, read one layer at a time.

A source gives tensors their canonical names, whatever their names in the file:
the path in our parameter tree, with layers stacked. The digest of a tensor is a
hash of its layers as stored, before any cast, stacking or sharding. The
fingerprint of a set of tensors is a hash of their names and digests. A file
with separate layers therefore has the fingerprint of a file with stacked
layers.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import traverse_util

from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import distributed, integrity, partitioning
from l2s_jax.weights import finite, misfits

PyTree = Any


@runtime_checkable  # for jaxtyping's runtime checks in tests
class Source(Protocol):
  """Weights of one language model on disk.

  Attributes:
    config: the model config.
    location: location of the weights.
    model_type: `model_type` in the package transformers; None if unknown.
    special_ids: special token ids by their keys in config.json.
  """

  config: config_lib.TransformerConfig
  location: str
  model_type: str | None
  special_ids: dict[str, Any]

  def step(self) -> int | None:
    """Returns the checkpoint's step; None for weights without steps."""

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    """Returns the shape and stored dtype of every tensor."""

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> np.ndarray:
    """Reads one tensor as stored, without a cast.

    Args:
      path: canonical name.
      layer: index of one layer of a stacked tensor; None reads all layers.
    """

  def name(self, path: shapes_lib.Path) -> str:
    """Returns the tensor's name in the files, for errors.

    The tensor need not exist.
    """

  def digest(self, path: shapes_lib.Path) -> str | None:
    """Returns the digest stored with the weights; None if there is none.

    For weights without digests, `load` computes them while reading.
    """


def load(
  source: Source,
  shapes: PyTree,
  shardings: PyTree,
) -> tuple[PyTree, str]:
  """Reads the tensors of a pytree into sharded arrays, one at a time.

  If digests are stored with the weights, the layers of the tensors are divided
  among the processes for verification, and each process reads of the others
  only the shards of its devices. With `integrity.verification` off nothing is
  verified.
  Without stored digests each process reads all tensors to compute them. All
  processes must call this function.

  Args:
    source: the weights.
    shapes: pytree of `jax.ShapeDtypeStruct`; tensors are cast to its dtypes.
    shardings: pytree of shardings of the same structure.

  Returns:
    The parameters and their fingerprint.

  Raises:
    ValueError: lists every tensor that is missing, has another shape, does not
      match its digest, or holds non-finite values.
  """
  wanted = traverse_util.flatten_dict(shapes)
  flat_shardings = traverse_util.flatten_dict(shardings)
  check_shapes(source, wanted)
  loaded, digests = {}, {}
  notes = finite.Notes(source)
  hashes: list[tuple[str, int, str]] = []
  turns = itertools.cycle(range(jax.process_count()))
  for path in sorted(wanted):
    array: Any
    if source.digest(path) is None:
      array, digests[path] = _read(source, path, wanted[path], notes)
    else:
      array = source.read(path)
      if not isinstance(array, np.ndarray):
        array = array.keeping()  # In a bucket: until all its shards are made.
      if integrity.verification():
        hashes += _hash_share(array, path, turns, notes)
    loaded[path] = _place(array, wanted[path].dtype, flat_shardings[path])
  check_digests(source, digests | _join(distributed.gather(hashes)))
  notes.check()
  kept_digests = {path: source.digest(path) or digests[path] for path in wanted}
  return traverse_util.unflatten_dict(loaded), fingerprint(kept_digests)


def read_fingerprint(source: Source, shapes: PyTree) -> str:
  """Returns the fingerprint of the tensors of a pytree.

  Tensors without stored digests are read layer by layer; none is kept.

  Args:
    source: the weights.
    shapes: pytree of `jax.ShapeDtypeStruct`.

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
  """Returns the required tensors of a model config, with their shapes.

  Encoder-only weights of an encoder-decoder config are accepted, since an LLM
  needs its encoder only.

  Args:
    config: the model config.
    found: canonical names of the stored tensors.
  """
  shapes = shapes_lib.of_model(config)
  if config.is_encoder_decoder and shapes_lib.is_encoder_alone(found):
    return {p: s for p, s in shapes.items() if p[0] not in shapes_lib.DECODER}
  return shapes


def demanded_paths(
  config: config_lib.TransformerConfig, found: Collection[shapes_lib.Path]
) -> Collection[shapes_lib.Path]:
  """Returns the canonical names of `demanded`, for configs of any size.

  The names come from a reduced config, so that a damaged config with huge sizes
  costs nothing.

  Args:
    config: the model config.
    found: canonical names of the stored tensors.
  """
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
  """Validates names and shapes of the stored tensors.

  Args:
    source: the weights.
    wanted: the required tensors.
    allow_others: whether the source may hold other tensors, too.

  Raises:
    ValueError: lists the missing, misshapen and unknown tensors.
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
        'Use the config of these weights',
        problems,
      )
    )


def check_digests(
  source: Source, digests: Mapping[shapes_lib.Path, str]
) -> None:
  """Compares computed digests with those stored with the weights.

  All processes must call it; each passes the digests of its share.

  Raises:
    ValueError: lists the tensors that differ.
  """
  changed = distributed.gather(
    [
      '/'.join(path)
      for path, digest in digests.items()
      if source.digest(path) not in (None, digest)
    ]
  )
  if changed:
    raise ValueError(
      f'{source.location} was changed after its digests were computed. Convert '
      'or copy it again; these tensors differ:\n  '
      + '\n  '.join(sorted(set(changed)))
    )


def layers(
  path: shapes_lib.Path, shape: tuple[int, ...]
) -> Iterable[int | None]:
  """Returns the `layer` arguments of `Source.read` for layer-by-layer reading.

  These are the layer indices of a stacked tensor, and (None,) for others.
  """
  return range(shape[0]) if 'layers' in path else (None,)


def digest_layer(array: np.ndarray) -> bytes:
  """Returns the SHA-256 of one layer, or of a tensor that is not stacked."""
  hasher = hashlib.sha256(f'{array.dtype}{array.shape}'.encode())
  # As bytes, since NumPy exports no buffer of bfloat16.
  hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return hasher.digest()


def digest(layer_digests: Iterable[bytes]) -> str:
  """Returns the digest of a tensor from the hashes of its layers, in order."""
  return hashlib.sha256(b''.join(layer_digests)).hexdigest()


def fingerprint(digests: Mapping[shapes_lib.Path, str]) -> str:
  """Returns the fingerprint of a set of tensors.

  It is the SHA-256 of their canonical names and digests.
  """
  lines = [f'{"/".join(path)} {digests[path]}\n' for path in sorted(digests)]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def _hash_share(
  array: Any,
  path: shapes_lib.Path,
  turns: Iterator[int],
  notes: finite.Notes,
) -> Iterator[tuple[str, int, str]]:
  """Yields the hashes of this process's share of a tensor's layers.

  Args:
    array: the tensor, or its `bucket_array.BucketArray`, which is never whole
      in memory.
    path: canonical name.
    turns: for each layer the index of the process that reads it.
    notes: gets the layers with values that are not finite.

  Yields:
    The name of the tensor, the number of the layer, and its SHA-256.
  """
  for number, layer in enumerate(layers(path, array.shape)):
    if next(turns) == jax.process_index():
      part = np.asarray(array if layer is None else array[layer])
      notes.look(part, path, layer)
      yield '/'.join(path), number, digest_layer(part).hex()


def _join(
  hashes: Iterable[Sequence[Any]],
) -> dict[shapes_lib.Path, str]:
  """Returns the digests of tensors from `_hash_share` of all processes."""
  of_layers: dict[str, dict[int, bytes]] = {}
  for name, number, layer_hash in hashes:
    of_layers.setdefault(name, {})[number] = bytes.fromhex(layer_hash)
  return {
    tuple(name.split('/')): digest(found[number] for number in sorted(found))
    for name, found in of_layers.items()
  }


def _place(
  array: Any, dtype: Any, sharding: jax.sharding.Sharding
) -> jax.Array:
  """Puts a tensor on the devices; each process reads its own shards.

  Of an array in a bucket only whole rows can be read. If several processes
  would need parts of the same rows, each reads some of the rows, and the
  devices exchange the parts.
  """
  by_rows = None
  if not isinstance(array, np.ndarray) and jax.process_count() > 1:
    by_rows = _by_rows(sharding, array.shape)
  placed = jax.make_array_from_callback(
    array.shape, by_rows or sharding, functools.partial(_shard, array, dtype)
  )
  if by_rows is None:
    return placed
  # Of one function: tensors of the same shape share a compiled program.
  return jax.jit(_same, out_shardings=sharding)(placed)


def _same(x: jax.Array) -> jax.Array:
  return x


def _by_rows(
  sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> jax.sharding.NamedSharding | None:
  """Returns a sharding that divides rows by all mesh axes of a sharding.

  Rows are those that `bucket_array.BucketArray` reads: of the second axis of a
  stacked kernel, else of the first.

  Returns:
    None if no axis within a row is divided, or the rows cannot be divided so.
  """
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return None
  rows = 1 if len(shape) > 2 else 0
  spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
  names = [partitioning.names_of(axes) for axes in spec[rows:]]
  if not any(names[1:]):
    return None
  divided = tuple(itertools.chain.from_iterable(names))
  if shape[rows] % math.prod(sharding.mesh.shape[name] for name in divided):
    return None
  return jax.sharding.NamedSharding(
    sharding.mesh, jax.sharding.PartitionSpec(*spec[:rows], divided)
  )


def _shard(array: Any, dtype: Any, index: Any) -> np.ndarray:
  return array[index].astype(dtype, copy=False)


def _read(
  source: Source,
  path: shapes_lib.Path,
  wanted: jax.ShapeDtypeStruct,
  notes: finite.Notes,
) -> tuple[np.ndarray, str]:
  """Reads a tensor without stored digest, casting it layer by layer.

  Returns:
    The tensor in the wanted dtype, and the digest of its stored values.
  """
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
