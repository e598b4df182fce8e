# SPDX-License-Identifier: Apache-2.0
"""What every program needs of the machine and of its processes.

Files that are whole or not there, locks, digests; processes that start, agree
and stop together; the device mesh and its axis rules; gin configs, read and
checked. Nothing here knows what a model or a task is.
"""

# The modules that other packages may import.
__all__ = (
  'chips',
  'compilation',
  'distributed',
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
)
