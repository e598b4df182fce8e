# SPDX-License-Identifier: Apache-2.0
"""Several processes that run one program: joining, agreeing, one that writes.

Each process reads the same input and makes the same decisions; devices are
shared through the mesh. Files, standard output and progress bars are the first
process's.
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from l2s_jax.runtime import preemption

PyTree = Any

# Seconds after which a process that gives no sign of life is taken for dead,
# and the others end. JAX's own 100 are long for chips that wait.
HEARTBEAT_SECS = 60
# Seconds that a process which has finished waits for the others.
SHUTDOWN_SECS = 60
# Seconds that one may take for what it does alone, such as to score answers.
_LONGEST_WAIT_SECS = 3600

_OURS = ('L2S_COORDINATOR_ADDRESS', 'L2S_NUM_PROCESSES', 'L2S_PROCESS_ID')
# Variables that say how many processes a cluster's launcher has started, where
# JAX finds the rest by itself: Slurm (of srun; a batch script alone has
# SLURM_NTASKS too) and Open MPI.
_COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
# Variables that hold something only where several TPU hosts or slices belong
# together: a list of hosts, or the slices' meeting point.
_TPU_HOSTS = 'TPU_WORKER_HOSTNAMES'
_TPU_SLICES = 'MEGASCALE_COORDINATOR_ADDRESS'


def initialize(environment: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes, if the environment says that there are any.

  L2S_COORDINATOR_ADDRESS (HOST:PORT of process 0), L2S_NUM_PROCESSES and
  L2S_PROCESS_ID, all three, come first; `launch/local.sh` sets them. Then
  Slurm, Open MPI, TPU pods and several TPU slices are known by their own
  variables, or L2S_DISTRIBUTED=auto leaves it to JAX. Without any of these the
  process is alone. To be called before JAX is used.

  Raises:
    ValueError: if a variable of ours is missing or wrong.
  """
  arguments = _arguments(environment)
  if arguments is None:
    return
  # The others end with an error, not after a wait, when one has died.
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
  """Returns what to call `jax.distributed.initialize` with; None: do not."""
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
        'expected a number from 0 to one less than that of the processes.'
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
  """Ends this process at once where a computation fails that others share.

  They would wait for it, and it for them: mostly one of them has died, which
  the others notice in the middle of a collective.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    print(
      f'Process {jax.process_index()} of {jax.process_count()} ends: a '
      'computation that it shares with the others has failed. If another one '
      'has ended before, its output says why. Started again, the job goes on '
      'from its newest checkpoint.',
      file=sys.stderr,
      flush=True,
    )
    sys.stdout.flush()
    os._exit(1)


def place() -> tuple[int, int]:
  """Returns which process this is, and of how many.

  Where it is alone no device is asked, or taken: for what needs none.
  """
  if not jax.distributed.is_initialized():
    return 0, 1
  return jax.process_index(), jax.process_count()


def is_first() -> bool:
  """Whether this process writes files and speaks for all."""
  return jax.process_index() == 0


def fetch(tree: PyTree) -> PyTree:
  """Returns global arrays whole, as NumPy arrays, in every process.

  All processes must call it, with the same arrays.
  """

  def one(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return x
    if x.is_fully_replicated:
      return x.addressable_data(0)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.device_get(jax.tree.map(one, tree))


def from_first(value: Any) -> Any:
  """Returns what the first process has found, in every process.

  For what is read from files that the first process changes at the same time.

  Args:
    value: that JSON can hold; what the others give does not count.
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
  """Returns the lists of all processes, one after another, in every process.

  Args:
    values: that JSON can hold.
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


def watch_preemption(grace_secs: int | float) -> preemption.Watcher:
  """Returns what watches for signals, to this process or to any of several.

  Args:
    grace_secs: between SIGTERM and the end that the platform puts to it.
  """
  if jax.process_count() == 1:
    return preemption.Watcher(grace_secs)
  return preemption.Watcher(
    grace_secs, multihost_utils.reached_preemption_sync_point
  )


@contextlib.contextmanager
def preemptible(grace_secs: int = 60) -> Iterator[Callable[[], None]]:
  """Yields what to call where the program may end, having nothing to save.

  Args:
    grace_secs: between SIGTERM and the end that the platform puts to it.

  Raises:
    SystemExit: after SIGTERM, with the status that means to start again, or
      after SIGINT.
  """
  with watch_preemption(grace_secs) as watcher:
    yield watcher.exit_if_requested


def num_cores() -> int:
  """Returns the cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def say(text: str) -> None:
  """Prints to standard error, once for all processes."""
  if is_first():
    print(text, file=sys.stderr)


@functools.cache
def say_once(text: str) -> None:
  """Says what is true as long as this process runs."""
  say(text)


def wait_for_all(name: str) -> None:
  """Returns once every process has come to the place of this name.

  Through the coordinator, which waits longer than a collective on CPU does.
  """
  if jax.process_count() > 1:
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(name, timeout=_LONGEST_WAIT_SECS)
