# SPDX-License-Identifier: Apache-2.0
"""Measurement of the memory bandwidth of this machine."""

import time

import jax
import jax.numpy as jnp

# Larger than the caches of any machine.
BANDWIDTH_BYTES = 2**30
_NUM_STREAMS = 16


class Bandwidth:
  """Measures the read bandwidth of device memory.

  Attributes:
    bytes_per_sec: the highest bandwidth so far.
  """

  def __init__(self):
    """Allocates the array and compiles the reductions over it."""
    self.bytes_per_sec = 0.0
    columns = 2**13
    self._array = jnp.ones((BANDWIDTH_BYTES // 4 // columns, columns))
    # The fastest of these depends on the device and its load.
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
    """Times each reduction once."""
    for way in self._ways:
      start = time.perf_counter()
      jax.block_until_ready(way(self._array))
      secs = time.perf_counter() - start
      self.bytes_per_sec = max(self.bytes_per_sec, self._array.nbytes / secs)
