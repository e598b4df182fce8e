# SPDX-License-Identifier: Apache-2.0
"""Laws of several processes: real ones, joined on this machine."""

import json
import socket
import subprocess
import sys

import forked
import tiny_runs

# Prints the rows that this process has put on its devices, three batches of
# them, from an example on.
FEED = """
import itertools, json, sys
import jax
address, num_processes, index, vocabulary, start = sys.argv[1:]
if int(num_processes) > 1:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, int(num_processes), int(index))
from l2s_jax.data import cldr, streams, tasks
from l2s_jax.runtime import partitioning
from l2s_jax.vocabularies import loading
cldr.SIZES['train'] = 330  # A process that reads all takes 13 seconds.
vocabulary = loading.load(vocabulary)
mesh = partitioning.make_mesh(partitioning.MeshConfig())
batches = streams.train_batches(
  tasks.bind('cldr', vocabulary, vocabulary),
  task_feature_lengths={'inputs': 16, 'targets': 16},
  batch_size=8,
  seed=3,
  start_row=int(start),
)
for host_batch in itertools.islice(batches, 3):
  batch = partitioning.put_batch(host_batch, mesh)
  assert all(x.shape[0] == 8 for x in batch.values())
  shards = batch['encoder_input_tokens'].addressable_shards
  print(json.dumps({s.index[0].start or 0: s.data.tolist() for s in shards}))
batches.close()
"""


# Says whether a job's settings are refused, which differ between hosts.
SETTLE = """
import pathlib, sys
import jax
address, num_processes, index, folder = sys.argv[1:]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, int(num_processes), int(index))
from l2s_jax.inference import predictions
predictions.settle(
  pathlib.Path(folder), {'lengths': (1, 2), 'input': f'/disk{index}/a'}
)
try:
  predictions.settle(
    pathlib.Path(folder) / 'other', {'batch_size': 8 + int(index)}
  )
except ValueError as error:
  print(error)
"""


def run(program, num_processes, *arguments):
  """Runs a program in several processes; returns what each prints."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  processes = [
    forked.Popen(
      [sys.executable, '-c', program, address, str(num_processes), str(index)]
      + [*arguments],
      cwd=tiny_runs.ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(num_processes)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [0] * num_processes
  return outputs


def feed(vocabulary, *, num_processes, start):
  """Returns three batches of prompts, put together from all processes."""
  outputs = run(FEED, num_processes, vocabulary.path, str(start))
  batches = []
  for lines in zip(*(output.splitlines() for output in outputs), strict=True):
    rows: dict[int, list] = {}
    for line in lines:
      rows |= {int(k): v for k, v in json.loads(line).items()}
    batches.append([row for first in sorted(rows) for row in rows[first]])
  return batches


def test_any_number_of_processes_goes_on_in_the_same_order(vocabulary):
  """The position in a checkpoint counts examples of all processes."""
  alone = feed(vocabulary, num_processes=1, start=0)
  assert len(alone) == 3 and all(len(batch) == 8 for batch in alone)
  together = feed(vocabulary, num_processes=2, start=8)
  assert together[:2] == alone[1:]


def test_other_settings_of_a_host_are_refused_at_the_first_start(tmp_path):
  for said in run(SETTLE, 2, str(tmp_path)):
    assert said.endswith(  # After what Gloo says.
      'the hosts of this job have different settings. Start all with the same '
      'command:\n  batch_size: host 0 has 8, host 1 has 9\n'
    )
  assert (tmp_path / 'settings.json').is_file()
  assert not (tmp_path / 'other').exists()
