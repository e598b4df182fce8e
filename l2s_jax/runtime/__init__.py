# SPDX-License-Identifier: Apache-2.0
"""Services for all programs: files, processes, the device mesh, gin configs.

Atomic file writes, locks and digests; initialization, coordination and shutdown
of several processes; the device mesh and the axis rules; validation of gin
configs. Nothing here depends on models or tasks.
"""

# The modules that other packages may import.
__all__ = (
  'chips',
  'compilation',
  'console',
  'distributed',
  'extras',
  'files',
  'gin_config',
  'gin_internals',
  'integrity',
  'locks',
  'memory',
  'os_errors',
  'partitioning',
  'preemption',
  'profiling',
  'scratch',
  'storage',
  't5x_names',
)
