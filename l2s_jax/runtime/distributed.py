# SPDX-License-Identifier: Apache-2.0
"""Multi-process execution: initialization, communication and output.

All processes run the same program, read the same input and make the same
decisions; devices are shared through the mesh. Only the first process writes
files, standard output and progress bars.
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from l2s_jax.runtime import preemption, scratch

PyTree = Any

# Seconds without a heartbeat after which a process counts as dead and the
# others end. JAX's default of 100 s leaves chips idle for long.
HEARTBEAT_SECS = 60
# Seconds for which a finished process waits for the others.
SHUTDOWN_SECS = 60
# Seconds for which the others wait for work of one process, such as scoring.
_LONGEST_WAIT_SECS = 3600

_OURS = ('L2S_COORDINATOR_ADDRESS', 'L2S_NUM_PROCESSES', 'L2S_PROCESS_ID')
# Variables with the number of processes started by a cluster launcher; JAX
# detects the rest. Slurm's `srun` (SLURM_NTASKS is set in a batch script, too)
# and Open MPI.
_COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
# Variables of TPU pods, set to a list of hosts or to the coordinator of several
# slices if there is more than one host or slice.
_TPU_HOSTS = 'TPU_WORKER_HOSTNAMES'
_TPU_SLICES = 'MEGASCALE_COORDINATOR_ADDRESS'


def initialize(environment: Mapping[str, str] = os.environ) -> None:
  """Initializes JAX's distributed runtime, if there are several processes.

  The environment decides, in this order: L2S_COORDINATOR_ADDRESS (HOST:PORT of
  process 0), L2S_NUM_PROCESSES and L2S_PROCESS_ID, all three, as set by
  `launch/local.sh`; the variables of Slurm, Open MPI, TPU pods and multislice
  TPUs, or L2S_DISTRIBUTED=auto, both of which use JAX's own detection.
  Otherwise the process is alone. Call it before any use of JAX.

  Args:
    environment: environment variables.

  Raises:
    ValueError: if an L2S_* variable is missing or invalid.
  """
  arguments = _arguments(environment)
  if arguments is None:
    return
  # A dead process ends the others with an error, not after a long wait.
  heartbeat_secs = environment.get('L2S_HEARTBEAT_SECS') or str(HEARTBEAT_SECS)
  if not heartbeat_secs.isdigit() or not int(heartbeat_secs):
    raise ValueError(
      f'L2S_HEARTBEAT_SECS={heartbeat_secs}: expected a whole number of '
      'seconds.'
    )
  jax.distributed.initialize(
    **arguments,
    heartbeat_timeout_seconds=int(heartbeat_secs),
    shutdown_timeout_seconds=SHUTDOWN_SECS,
  )
  if not is_first():
    sys.stdout = open(os.devnull, 'w', encoding='utf-8')


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns arguments of `jax.distributed.initialize`; None for one process."""
  given = {name: environment[name] for name in _OURS if name in environment}
  if given:
    if len(given) < len(_OURS):
      raise ValueError(
        f'{", ".join(given)} is set, but '
        f'{", ".join(name for name in _OURS if name not in given)} is not; set '
        'all three, or none for one process.'
      )
    address, num_processes, index = given.values()
    if not (num_processes.isdigit() and index.isdigit()) or (
      int(index) >= int(num_processes)
    ):
      raise ValueError(
        f'L2S_PROCESS_ID={index} of L2S_NUM_PROCESSES={num_processes}: '
        'expected a number from 0 to L2S_NUM_PROCESSES - 1.'
      )
    if int(num_processes) == 1:
      return None
    return {
      'coordinator_address': address,
      'num_processes': int(num_processes),
      'process_id': int(index),
    }
  is_cluster = (
    environment.get('L2S_DISTRIBUTED') == 'auto'
    or any(int(environment.get(name) or 1) > 1 for name in _COUNTS)
    or ',' in environment.get(_TPU_HOSTS, '')
    or bool(environment.get(_TPU_SLICES))
  )
  return {} if is_cluster else None


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends this process at once if a computation shared by processes fails.

  Otherwise the processes would wait for one another. The usual cause is the
  death of one process, which the others see as a failed collective.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    print(
      f'Process {jax.process_index()} of {jax.process_count()} exits: a '
      'computation shared with other processes failed. If another process '
      'exited first, its output has the reason. Start the job again to resume '
      'from its newest checkpoint.',
      file=sys.stderr,
      flush=True,
    )
    sys.stdout.flush()
    scratch.remove()
    os._exit(1)


def place() -> tuple[int, int]:
  """Returns the index of this process and the number of processes.

  A single process initializes no device for this.
  """
  if not jax.distributed.is_initialized():
    return 0, 1
  return jax.process_index(), jax.process_count()


def is_first() -> bool:
  """Returns whether this process writes files and messages."""
  return jax.process_index() == 0


def fetch(tree: PyTree) -> PyTree:
  """Returns global arrays as NumPy arrays in every process.

  All processes must call it with the same arrays.

  Args:
    tree: pytree of arrays; other leaves are returned unchanged.
  """

  def one(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return x
    if x.is_fully_replicated:
      return x.addressable_data(0)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.device_get(jax.tree.map(one, tree))


def from_first(value: Any) -> Any:
  """Broadcasts a value of the first process to all processes.

  Use it for values read from files that the first process may be changing. All
  processes must call it.

  Args:
    value: JSON-serializable value; only that of the first process counts.
  """
  if jax.process_count() == 1:
    return value
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
  padded = np.zeros(size, np.uint8)
  if is_first():
    padded[:] = content
  return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def gather(values: list[Any]) -> list[Any]:
  """Returns the concatenated lists of all processes, in every process.

  All processes must call it.

  Args:
    values: JSON-serializable list of this process.
  """
  if jax.process_count() == 1:
    return values
  content = np.frombuffer(json.dumps(values).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(content.size))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: content.size] = content
  rows = multihost_utils.process_allgather(padded)
  return [
    value
    for row, size in zip(rows, sizes, strict=True)
    for value in json.loads(row[:size].tobytes())
  ]


def watch_preemption(grace_secs: int | float = 60) -> preemption.Watcher:
  """Returns a watcher of SIGTERM and SIGINT to any of the processes.

  Args:
    grace_secs: seconds between SIGTERM and SIGKILL by the platform.
  """
  if jax.process_count() == 1:
    return preemption.Watcher(grace_secs)
  return preemption.Watcher(
    grace_secs, multihost_utils.reached_preemption_sync_point
  )


def num_cores() -> int:
  """Returns the number of CPU cores available to this process."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def say(text: str) -> None:
  """Prints a message to standard error, in the first process only."""
  if is_first():
    print(text, file=sys.stderr)


@functools.cache
def say_once(text: str) -> None:
  """Prints a message as `say` does, once in the life of this process."""
  say(text)


def wait_for_all(name: str) -> None:
  """Blocks until all processes have reached the barrier `name`.

  The barrier uses the coordinator, which waits longer than a CPU collective.
  """
  if jax.process_count() > 1:
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(name, timeout=_LONGEST_WAIT_SECS)
