# SPDX-License-Identifier: Apache-2.0
"""Digests of saved arrays and JSON, and their verification.

Each process digests the blocks (shards) of an array that it saves. A block is
identified by its index range, such as `0:4,128:256`, so that the array can be
verified later on any mesh. A digest is XXH3 (128 bits) over dtype, shape and
bytes: it detects damage, not tampering, at memory speed. Digests of converted
weights are in `weights/`.
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

from l2s_jax.runtime import distributed, os_errors

PyTree = Any
# Digests of the blocks of an array, by index range.
Blocks = dict[str, str]
# Digests of the arrays of a pytree, by name.
Digests = dict[str, Blocks]

# Key under which a sealed mapping keeps its own digest.
DIGEST = 'digest'


@gin.configurable(module='l2s_jax')
def verification(enabled: bool = True) -> bool:
  """Returns whether data are verified against digests when read (VERIFY)."""
  return enabled


def name(path: Sequence[Any]) -> str:
  """Returns the name of an array in a pytree, such as `slm/bias`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def digest(array: np.ndarray) -> str:
  """Returns the digest of an array as hexadecimal text."""
  hasher = xxhash.xxh3_128(f'{array.dtype}{array.shape}'.encode())
  # As bytes, since NumPy exports no buffer of bfloat16.
  hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return hasher.hexdigest()


def digests(tree: PyTree) -> Digests:
  """Returns the digests of a pytree of arrays, in every process.

  All processes must call it with the same arrays. Each process digests its own
  blocks; a replicated block is digested once.
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
  """Returns the names of arrays that do not match their digests.

  Args:
    kept: digests by array name. An array without digests must only be readable.
    read: opens an array by name: a NumPy array, or an array indexed lazily with
      slices. It is called from several threads.
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
    except (ValueError, IndexError, TypeError, OSError) as error:
      if os_errors.is_of_store(error):
        raise
      return False  # unreadable, or of another shape

  names = sorted(kept)
  found = _in_threads(is_good, names)
  return [n for n, good in zip(names, found, strict=True) if not good]


def _in_threads(fn: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
  """Maps a function that releases the GIL over items, in threads."""
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
  """Returns a mapping as JSON keeps it, with its own digest added."""
  kept = json.loads(json.dumps(content))
  return kept | {DIGEST: _of_json(kept)}


def unseal(content: Mapping[str, Any]) -> dict[str, Any] | None:
  """Verifies and removes the digest of a sealed mapping.

  Returns:
    The mapping without its digest; None if the digest does not match.
  """
  rest = {key: value for key, value in content.items() if key != DIGEST}
  return rest if content.get(DIGEST) == _of_json(rest) else None


def unsealed(
  content: Mapping[str, Any], path: str | os.PathLike[str], remedy: str
) -> dict[str, Any]:
  """Verifies and removes the digest of a file that a user may have edited.

  Args:
    content: of the file; sealed.
    path: the file, for the error.
    remedy: instruction for the user, for the error.

  Raises:
    ValueError: if the digest does not match.
  """
  found = unseal(content)
  if found is None:
    raise ValueError(
      f'{path} was changed after it was written: its digest does not match. '
      f'To read it as it is, remove its key "{DIGEST}"; else {remedy}'
    )
  return found


def is_sealed(content: Mapping[str, Any]) -> bool:
  """Returns whether a mapping carries its own digest."""
  return DIGEST in content


def _of_json(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
