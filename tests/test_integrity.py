# SPDX-License-Identifier: Apache-2.0
"""Digests change with every bit, and with nothing else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from l2s_jax.runtime import integrity


def tree(shape=(16, 4), spec=('data', 'tensor')):
  devices = np.array(jax.devices()).reshape(4, 2)
  mesh = jax.sharding.Mesh(devices, ('data', 'tensor'))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  return {
    'a': {'kernel': jax.device_put(values, sharding)},
    'step': jnp.int32(7),
    'half': jnp.arange(3, dtype=jnp.bfloat16),
    'empty': jnp.zeros((0, 2)),
  }


@pytest.mark.parametrize(
  'spec', [('data', 'tensor'), (None, 'data'), (None, None)]
)
def test_what_was_saved_on_a_mesh_is_known_again_whole(spec):
  arrays = tree(spec=spec)
  kept = integrity.digests(arrays)
  flat = {
    integrity.name(path): np.asarray(array)
    for path, array in jax.tree_util.tree_leaves_with_path(arrays)
  }
  assert kept.keys() == flat.keys()
  assert integrity.damaged(kept, flat.__getitem__) == []
  blocks = {(None, None): 1, (None, 'data'): 4, ('data', 'tensor'): 8}
  assert len(kept['a/kernel']) == blocks[spec]


def test_every_flipped_bit_is_found():
  for array in (
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(3).astype(ml_dtypes.bfloat16),
    np.int32(5),
  ):
    array = np.asarray(array)
    kept = integrity.digests({'x': jnp.asarray(array)})
    for bit in range(array.nbytes * 8):
      content = bytearray(array.tobytes())
      content[bit // 8] ^= 1 << bit % 8
      changed = np.frombuffer(bytes(content), array.dtype).reshape(array.shape)
      assert integrity.damaged(kept, {'x': changed}.__getitem__) == ['x']


def test_another_shape_or_dtype_of_the_same_bytes_is_found():
  array = np.zeros((2, 3), np.float32)
  kept = integrity.digests({'x': jnp.asarray(array)})
  for other in (array.reshape(3, 2), array.reshape(6), array.view(np.int32)):
    assert integrity.damaged(kept, {'x': other}.__getitem__) == ['x']


def test_a_seal_is_of_all_that_is_in_it():
  content = {'a': [1, 2.5, None], 'b': {'c': 'text'}}
  sealed = integrity.seal(content)
  assert integrity.unseal(sealed) == content
  assert not integrity.is_sealed(content)
  for key, value in (('a', [1, 2.5]), ('b', {'c': 'texT'}), ('d', 0)):
    assert integrity.unseal({**sealed, key: value}) is None
