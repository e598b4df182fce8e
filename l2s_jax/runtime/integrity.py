# SPDX-License-Identifier: Apache-2.0
"""Digests of arrays: taken as they are saved, compared where they are read.

An array is digested in the blocks in which the processes hold it, each block by
the process that saves it; a block is named by its place, such as `0:4,128:256`.
Whoever reads the array later, on any mesh, compares these blocks. A digest is
XXH3 (128 bits) of dtype, shape and bytes: it finds damage, not malice, at the
speed of memory. The digests of converted weights are in `weights/`.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
import xxhash

from l2s_jax.runtime import distributed

PyTree = Any
# Digests of the blocks of an array, by their places.
Blocks = dict[str, str]
# Those of the arrays of a tree, by their names.
Digests = dict[str, Blocks]

# The key of its own digest in a sealed mapping.
DIGEST = 'digest'


@gin.configurable(module='l2s_jax')
def verification(enabled: bool = True) -> bool:
  """Returns whether what is read is compared with its digests (VERIFY)."""
  return enabled


def name(path: Sequence[Any]) -> str:
  """Returns an array's name from its path in a tree, such as `slm/bias`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def digest(array: np.ndarray) -> str:
  """Returns the digest of an array, in hex."""
  hasher = xxhash.xxh3_128(f'{array.dtype}{array.shape}'.encode())
  # Bytes, since NumPy exports no buffer of bfloat16.
  hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return hasher.hexdigest()


def digests(tree: PyTree) -> Digests:
  """Returns the digests of a tree of arrays, in every process.

  All processes must call it, with the same arrays; each digests the blocks that
  it holds and no other has digested.
  """
  blocks = []
  for path, array in jax.tree_util.tree_leaves_with_path(tree):
    for shard in jax.numpy.asarray(array).addressable_shards:
      if shard.replica_id == 0:
        place = _place(shard.index, array.shape)
        blocks.append((name(path), place, shard.data))
  found = _in_threads(lambda block: digest(np.asarray(block[2])), blocks)
  mine = [
    [array_name, place, value]
    for (array_name, place, _), value in zip(blocks, found, strict=True)
  ]
  result: Digests = {}
  for array_name, place, value in distributed.gather(mine):
    result.setdefault(array_name, {})[place] = value
  return result


def damaged(
  kept: Mapping[str, Blocks], read: Callable[[str], Any]
) -> list[str]:
  """Returns the names of arrays that are not as they were saved.

  Args:
    kept: the digests of the arrays; one without any must be readable.
    read: returns an array by its name, which is indexed with slices: a NumPy
      array, or one that stays in its file. Called from several threads.
  """

  def is_good(array_name: str) -> bool:
    try:
      array = read(array_name)
      if not kept[array_name]:
        np.asarray(array)
      return all(
        digest(np.asarray(array[_slices(place)])) == value
        for place, value in kept[array_name].items()
      )
    except (ValueError, IndexError, TypeError, OSError):
      return False  # It cannot be read, or has another shape.

  names = sorted(kept)
  found = _in_threads(is_good, names)
  return [n for n, good in zip(names, found, strict=True) if not good]


def _in_threads(fn: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
  """Returns the values of a function that leaves Python's lock alone."""
  num_threads = min(8, os.cpu_count() or 1, len(items))
  if num_threads < 2:
    return [fn(item) for item in items]
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    return list(pool.map(fn, items))


def _place(index: Iterable[slice], shape: Sequence[int]) -> str:
  bounds = (part.indices(size)[:2] for part, size in zip(index, shape))  # noqa: B905
  return ','.join(f'{start}:{stop}' for start, stop in bounds)


def _slices(place: str) -> tuple[slice, ...]:
  if not place:
    return ()
  bounds = (part.split(':') for part in place.split(','))
  return tuple(slice(int(start), int(stop)) for start, stop in bounds)


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what JSON keeps of a mapping, with its own digest in it."""
  kept = json.loads(json.dumps(content))
  return kept | {DIGEST: _of_json(kept)}


def unseal(content: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns a mapping without the digest in it; None if it has changed."""
  rest = {key: value for key, value in content.items() if key != DIGEST}
  return rest if content.get(DIGEST) == _of_json(rest) else None


def is_sealed(content: Mapping[str, Any]) -> bool:
  """Returns whether a mapping has a digest in it."""
  return DIGEST in content


def _of_json(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
