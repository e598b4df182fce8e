# SPDX-License-Identifier: Apache-2.0
"""How fast this machine reads."""

import time

import jax
import jax.numpy as jnp

# Larger than the caches of any machine.
BANDWIDTH_BYTES = 2**30
_NUM_STREAMS = 16


class Bandwidth:
  """Measures how fast this machine reads.

  Attributes:
    bytes_per_sec: the best so far.
  """

  def __init__(self):
    """Makes the array that will be read."""
    self.bytes_per_sec = 0.0
    columns = 2**13
    self._array = jnp.ones((BANDWIDTH_BYTES // 4 // columns, columns))
    # Which is fastest depends on the device, and on who else uses it.
    self._ways = [
      jax.jit(way)
      for way in (
        jnp.sum,
        lambda x: x.reshape(_NUM_STREAMS, -1).sum(1),
        lambda x: x @ jnp.ones(columns),
      )
    ]
    for way in self._ways:
      jax.block_until_ready(way(self._array))

  def measure(self) -> None:
    """Reads the array again, in each way."""
    for way in self._ways:
      start = time.perf_counter()
      jax.block_until_ready(way(self._array))
      secs = time.perf_counter() - start
      self.bytes_per_sec = max(self.bytes_per_sec, self._array.nbytes / secs)
