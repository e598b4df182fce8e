# SPDX-License-Identifier: Apache-2.0
"""Laws of clusters: processes find each other, preempted runs go on."""

import functools
import http.server
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import launching
import pytest
import tiny_runs

# --- processes that find each other ---

JOIN = """
import os, sys
import jax
import numpy as np
# JAX has seen that there is no chip here, and would ask nobody about a pod.
os.environ.pop('TPU_SKIP_MDS_QUERY', None)
from l2s_jax.runtime import distributed
distributed.initialize()
from jax.experimental import multihost_utils
found = multihost_utils.process_allgather(np.int32(jax.process_index()))
print(jax.process_index(), found.tolist(), file=sys.__stdout__)
"""


def free_port(first=1024, last=65535):
  for port in range(last, first, -1):
    with socket.socket() as candidate:
      try:
        candidate.bind(('', port))
      except OSError:
        continue
      return port
  raise AssertionError('no port is free')


def check_joined(variables):
  """Starts a process for each dict and checks that they are one cluster."""
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', JOIN],
      cwd=tiny_runs.ROOT,
      env=launching.environment(**given),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for given in variables
  ]
  outputs = [process.communicate(timeout=60) for process in processes]
  # The last lines: Gloo says something, too.
  found = [output.splitlines()[-1:] for output, _ in outputs]
  everyone = list(range(len(variables)))
  assert found == [[f'{index} {everyone}'] for index in everyone], outputs


def test_local_processes_join(tmp_path):
  """The real script, and a real cluster of the processes it starts."""
  verb = launching.write_program(
    tmp_path / 'verb',
    f'#!/usr/bin/env bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\n'
    f"exec {sys.executable} -c '{JOIN.replace(chr(39), chr(34))}'\n",
  )
  result = launching.bash(
    './launch/local.sh --processes=2 -- train', L2S_PYTHON=verb
  )
  assert result.returncode == 0, result.stderr
  for index in range(2):
    assert f'[{index}] {index} [0, 1]' in result.stdout.splitlines()


def test_slurm_tasks_join():
  # JAX takes the port from the job's number.
  job = free_port(first=2**16 - 2**12) - (2**16 - 2**12)
  check_joined(
    [
      {
        'SLURM_JOB_ID': job,
        'SLURM_STEP_NODELIST': 'localhost,elsewhere',
        'SLURM_NTASKS': 2,
        'SLURM_STEP_NUM_TASKS': 2,
        'SLURM_PROCID': index,
        'SLURM_LOCALID': index,
      }
      for index in range(2)
    ]
  )


class Metadata(http.server.BaseHTTPRequestHandler):
  """What a TPU host is told of itself: attributes by name."""

  def __init__(self, attributes, *args):
    self.attributes = attributes
    super().__init__(*args)

  def do_GET(self):
    value = self.attributes.get(self.path.rpartition('/')[2])
    self.send_response(404 if value is None else 200)
    self.end_headers()
    self.wfile.write((value or '').encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def tpu_host():
  """Returns what gives the variables of a TPU host with such attributes."""
  servers = []
  port = free_port()

  def variables(**attributes):
    handler = functools.partial(
      Metadata, {k.replace('_', '-'): v for k, v in attributes.items()}
    )
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    servers.append(server)
    return {
      'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}',
      'JAX_COORDINATOR_PORT': port,
      'JAX_FORCE_TPU_INIT': 1,  # As if there were chips.
    }

  yield variables
  for server in servers:
    server.shutdown()
    server.server_close()


TPU_ENV = "ACCELERATOR_TYPE: 'v5litepod-16'\nZONE: 'us-west4-a'\n"


def test_hosts_of_a_tpu_pod_join(tpu_host):
  """As `worker.sh` starts them: their metadata say what belongs together."""
  endpoints = ','.join(f'unknown:{name}:127.0.0.1' for name in ('w0', 'w1'))
  check_joined(
    [
      {'L2S_DISTRIBUTED': 'auto'}
      | tpu_host(
        agent_worker_number=str(index),
        worker_network_endpoints=endpoints,
        tpu_env=TPU_ENV,
      )
      for index in range(2)
    ]
  )
  worker = (launching.LAUNCH / 'worker.sh').read_text()
  assert 'export L2S_DISTRIBUTED=auto' in worker


@pytest.mark.parametrize('num_slices', [1, 2])
def test_pods_of_gke_join(tpu_host, num_slices):
  """By the variables that GKE gives, for one slice and for several."""
  variables = []
  for index in range(2):
    given = tpu_host(tpu_env=TPU_ENV)
    if num_slices == 1:
      given |= {
        'TPU_WORKER_HOSTNAMES': '127.0.0.1,localhost',
        'TPU_WORKER_ID': index,
      }
    else:
      given |= {
        'TPU_WORKER_HOSTNAMES': '127.0.0.1',
        'TPU_WORKER_ID': 0,
        'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.1',
        'MEGASCALE_NUM_SLICES': 2,
        'MEGASCALE_SLICE_ID': index,
      }
    variables.append(given)
  check_joined(variables)


# --- gpu_slurm.sh ---

# Two tasks, whose highest code is the step's, as srun has it; scancel signals
# them; scontrol notes what it was asked for.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  SLURM_PROCID=$task "$@" &
  pids+=("$!")
done
echo "${pids[@]}" > "$TASKS"
highest=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  ((code > highest)) && highest=$code
done
exit "$highest"
"""
TASK = """#!/usr/bin/env bash
echo "$SLURM_PROCID: $XLA_PYTHON_CLIENT_MEM_FRACTION ${*:2}"
words=(${5//,/ })
word=${words[SLURM_PROCID]}
[[ $word != save ]] || { trap 'exit 75' TERM; while sleep 0.1; do :; done; }
exit "$word"
"""


@pytest.fixture
def slurm(tmp_path):
  """Returns what starts gpu_slurm.sh, and the file that scontrol writes."""
  programs = tmp_path / 'bin'
  launching.write_program(programs / 'srun', SRUN)
  launching.write_program(
    programs / 'scancel',
    '#!/bin/sh\n[ "$1" = --signal=TERM ] || exit 1\n'
    # A signal goes to all processes of a task.
    'for pid in $(cat "$TASKS"); do pkill -TERM -P "$pid"; kill "$pid"; done\n',
  )
  log = tmp_path / 'log'
  launching.write_program(
    programs / 'scontrol', f'#!/bin/sh\necho "$@" >> {log}\n'
  )
  launching.write_program(
    programs / 'squeue', '#!/bin/sh\necho "${JOB_STATE:-RUNNING}"\n'
  )
  task = launching.write_program(programs / 'task', TASK)
  copy = launching.write_program(
    tmp_path / 'spool' / 'script',
    (launching.LAUNCH / 'gpu_slurm.sh').read_text(),
  )

  def start(words, **variables):
    return subprocess.Popen(
      [copy, 'train', words],
      cwd=tmp_path,
      env=launching.environment(
        PATH=f'{programs}:{os.environ["PATH"]}',
        SLURM_SUBMIT_DIR=tiny_runs.ROOT,
        SLURM_JOB_ID=17,
        L2S_PYTHON=task,
        TASKS=tmp_path / 'tasks',
        **variables,
      ),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start, log


@pytest.mark.parametrize(
  'words, code, requeues',
  [
    ('0,0', 0, False),
    ('75,75', 75, True),
    ('75,1', 129, False),  # srun's code is the highest: an error's is, then.
    ('2,0', 130, False),
    ('134,75', 134, False),
  ],
)
def test_slurm_queues_again_after_75_alone(slurm, words, code, requeues):
  start, log = slurm
  process = start(words)
  output, errors = process.communicate(timeout=30)
  assert process.returncode == code, errors
  assert sorted(output.splitlines()) == [
    f'{task}: 0.9 -m l2s_jax train {words}' for task in range(2)
  ]
  assert log.exists() == requeues
  if requeues:
    assert log.read_text() == 'requeue 17\n'


def test_slurm_hands_on_the_order_to_save(slurm, tmp_path):
  start, log = slurm
  process = start('save,save')
  for _ in range(2):
    process.stdout.readline()
  time.sleep(0.2)  # From its line to its trap.
  process.terminate()
  _, errors = process.communicate(timeout=30)
  assert process.returncode == launching.AGAIN, errors
  assert log.read_text() == 'requeue 17\n'


def test_a_job_that_was_cancelled_is_not_queued_again(slurm):
  """Its tasks have got SIGTERM, and have saved."""
  start, log = slurm
  process = start('75,75', JOB_STATE='COMPLETING')
  process.communicate(timeout=30)
  assert process.returncode == launching.AGAIN
  assert not log.exists()


def test_slurm_starts_a_task_for_each_gpu():
  """JAX gives a task of Slurm the one GPU of its rank."""
  options = dict(
    re.findall(r'^#SBATCH --([\w-]+)=?(.*)$', slurm_script(), re.MULTILINE)
  )
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert not {'gpus-per-task', 'gpu-bind'} & options.keys()
  assert 'requeue' in options and options['open-mode'] == 'append'
  assert options['signal'].startswith('B:TERM@')


def slurm_script():
  return (launching.LAUNCH / 'gpu_slurm.sh').read_text()


# --- tpu_pod.sh ---

POD = (
  '--name=pod --zone=us-west4-a --type=v5litepod-16 '
  '--runtime=v2-alpha-tpuv5-lite'
)


def commands(arguments):
  """Returns what a dry run would do: gcloud's verb and the rest."""
  result = launching.bash(f'./launch/tpu_pod.sh --dry_run {arguments}')
  assert result.returncode == 0, result.stderr
  return [
    line.removeprefix('+ gcloud compute tpus ')
    for line in result.stdout.splitlines()
    if line.startswith('+ ')
  ]


def test_a_dry_run_prints_every_command_in_order():
  found = commands(
    f'{POD} --project=mine --spot --bucket=data --delete -- train --gin_file=a'
  )
  where = 'pod --zone=us-west4-a --quiet --project=mine'
  everywhere = f'queued-resources ssh {where} --node=all --worker=all '
  beginnings = [
    f'queued-resources describe {where}',
    f'queued-resources create {where} --node-id=pod '
    '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite '
    '--spot',
    everywhere,
    '+ bash -o pipefail -c',
    'queued-resources scp ',
    everywhere,
    everywhere,
    everywhere,
    everywhere,
    f'queued-resources ssh {where} --node=0 --worker=0 ',
    everywhere,
    f'queued-resources delete {where} --force',
    f'queued-resources delete {where} --force',
  ]
  assert len(found) == len(beginnings), found
  for command, beginning in zip(found, beginnings, strict=True):
    assert command.startswith(beginning), command
  wanted = [
    (2, 'worker.sh status'),
    (3, 'git ls-files'),
    (4, 'pod:l2s_jax.tar.gz --node=all --worker=all'),
    (5, 'tar -xzvf ../l2s_jax.tar.gz'),
    (6, 'worker.sh install'),
    (7, 'worker.sh mount'),
    (8, "worker.sh start '\\''train'\\'' '\\''--gin_file=a'\\''"),
    (9, 'worker.sh follow'),
    (10, 'worker.sh status'),
  ]
  for index, part in wanted:
    assert part in found[index], found[index]


def test_several_slices_are_nodes_of_one_queued_resource():
  found = commands(f'{POD} --slices=4 --create_flag=--reserved -- train')
  assert '--node-count=4 --node-prefix=pod ' in found[1]
  assert found[1].endswith(' --reserved')


def test_a_pod_that_is_there_is_used_and_not_made():
  found = commands('--name=mine --zone=us-west4-a -- train')
  assert not any('queued-resources' in x for x in found)
  assert found[0].startswith('tpu-vm describe mine ')
  assert not any(' create ' in x or ' delete ' in x for x in found)


@pytest.mark.parametrize('arguments', ['', '--name=a -- train', f'{POD} --'])
def test_the_pod_script_says_how_it_is_used(arguments):
  result = launching.bash(f'./launch/tpu_pod.sh {arguments}')
  assert result.returncode == 2 and '--dry_run' in result.stderr


# A cloud in a folder: `state` is the queued resource's, w0 and w1 the homes of
# two hosts, which answer while it is active.
GCLOUD = """
import json, os, pathlib, re, shutil, subprocess, sys
cloud = pathlib.Path(os.environ['CLOUD'])
state = cloud / 'state'
_, tpus, kind, verb, *rest = sys.argv[1:]
with (cloud / 'log').open('a') as log:
  print(verb, file=log)
now = state.read_text() if state.exists() else 'ABSENT'
if verb == 'describe':
  print('WARNING: This command is impersonating.', file=sys.stderr)
  if now == 'ABSENT':
    sys.exit('ERROR: NOT_FOUND: Resource was not found')
  if now == 'UNANSWERED':
    state.write_text('PROVISIONING')
    sys.exit('ERROR: UNAVAILABLE: Try again later')
  print(now)
  if now in ('PROVISIONING', 'REPAIRING'):
    state.write_text('ACTIVE')
elif verb == 'create':
  assert now == 'ABSENT'
  for name in ('w0', 'w1'):
    shutil.rmtree(cloud / name, ignore_errors=True)
    (cloud / name).mkdir()
  state.write_text('PROVISIONING')
elif verb == 'delete':
  state.unlink()
elif now != 'ACTIVE':
  sys.exit(255)
elif verb == 'scp':
  for name in ('w0', 'w1'):
    shutil.copy(rest[0], cloud / name / rest[1].partition(':')[2])
elif verb == 'ssh':
  (command,) = (x.partition('=')[2] for x in rest if x.startswith('--command='))
  if command.endswith('worker.sh install'):
    sys.exit()
  workers = ('w0', 'w1') if '--worker=all' in rest else ('w0',)
  for name in workers:
    home = cloud / name
    code = subprocess.call(
      ['bash', '-c', command], cwd=home, env=os.environ | {'HOME': str(home)}
    )
    if code:
      sys.exit(code)
"""
# Ends with the next code of the cloud's list, or is preempted with its host.
HOST_VERB = """#!/usr/bin/env bash
host=${HOME##*/}
echo "$host runs ${*:2}, $L2S_DISTRIBUTED"
mkdir -p runs && echo step >> runs/steps
echo "$host has $(wc -l < runs/steps) in runs"
word=$(head -n 1 "$CLOUD/$host.words")
sed -i 1d "$CLOUD/$host.words"
if [[ $word == wiped ]]; then
  rm -r "$HOME/l2s_jax_run"
  exit 143
elif [[ $word == preempted ]]; then
  echo -n SUSPENDED > "$CLOUD/state"
  exit 143
fi
exit "$word"
"""


@pytest.fixture
def pod(tmp_path):
  """Returns what runs tpu_pod.sh in a cloud where runs end as told."""
  program = launching.write_program(
    tmp_path / 'bin' / 'gcloud', f'#!{sys.executable}\n{GCLOUD}'
  )
  verb = launching.write_program(tmp_path / 'bin' / 'verb', HOST_VERB)
  cloud = tmp_path / 'cloud'
  cloud.mkdir()

  def run(words, arguments='', state=None):
    for name in ('w0', 'w1'):
      (cloud / f'{name}.words').write_text('\n'.join(words.split()) + '\n')
    if state:
      (cloud / 'state').write_text(state)
    result = launching.bash(
      f'./launch/tpu_pod.sh {POD} {arguments} -- train "--gin.X=it\'s"',
      PATH=f'{pathlib.Path(program).parent}:{os.environ["PATH"]}',
      CLOUD=str(cloud),
      L2S_PYTHON=verb,
    )
    log = (cloud / 'log').read_text().split()
    return result, [x for x in log if x in ('create', 'scp', 'delete')]

  return run


def test_the_pod_is_made_and_deleted_and_the_run_goes_on(pod):
  result, log = pod('75 0', '--delete')
  assert result.returncode == 0, result.stderr
  assert log == ['create', 'scp', 'scp', 'delete']
  assert "w0 runs -m l2s_jax train --gin.X=it's, auto" in result.stdout
  assert 'w1' not in result.stdout
  # What a run has written into the clone is there when it goes on.
  assert 'w0 has 2 in runs' in result.stdout


def test_a_host_that_has_lost_its_disk_has_not_finished(pod):
  result, log = pod('wiped 0')
  assert result.returncode == 0, result.stderr
  assert log == ['create', 'scp', 'scp']


@pytest.mark.parametrize('state', ['UNANSWERED', 'REPAIRING'])
def test_a_pod_that_is_not_ready_is_waited_for(pod, tmp_path, state):
  for name in ('w0', 'w1'):
    (tmp_path / 'cloud' / name).mkdir()
  result, log = pod('0', state=state)
  assert result.returncode == 0, result.stderr
  assert log == ['scp']


def test_a_pod_in_a_state_of_no_meaning_is_left_alone(pod):
  result, log = pod('0', state='HAUNTED')
  assert result.returncode == 1 and 'pod is HAUNTED' in result.stderr
  assert not log


def test_a_preempted_pod_is_made_again(pod):
  result, log = pod('preempted 0')
  assert result.returncode == 0, result.stderr
  assert log == ['create', 'scp', 'delete', 'create', 'scp']


def test_what_is_left_of_an_old_pod_makes_room(pod):
  result, log = pod('0', state='SUSPENDED')
  assert result.returncode == 0, result.stderr
  assert log == ['delete', 'create', 'scp']


def test_an_error_ends_the_script_and_leaves_the_pod(pod):
  result, log = pod('2 0', '--delete')
  assert result.returncode == 2
  assert log == ['create', 'scp']
