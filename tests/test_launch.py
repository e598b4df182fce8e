# SPDX-License-Identifier: Apache-2.0
"""Laws of launching: exit codes, several processes on one machine, GKE."""

import functools
import math
import re
import signal
import subprocess
import sys
import time

import jobset_schema
import jsonschema
import launching
import pytest
import tiny_runs
import yaml

SCRIPTS = sorted(path.name for path in launching.LAUNCH.glob('*.sh'))


@pytest.mark.parametrize('script', SCRIPTS)
def test_shellcheck_finds_nothing(script):
  result = launching.bash(f'shellcheck --external-sources launch/{script}')
  assert result.returncode == 0, result.stdout + result.stderr


# --- exit codes ---


@pytest.mark.parametrize(
  'codes, whole',
  [
    ((0, 0), 0),
    ((75, 75), 75),
    ((0, 75), 75),
    ((75, 1), 1),  # Not all have saved.
    ((134, 75, 1), 134),  # The first is the reason.
  ],
)
def test_the_exit_code_of_a_whole(codes, whole):
  result = launching.bash(
    f'source launch/common.sh; verdict {" ".join(map(str, codes))}'
  )
  assert int(result.stdout) == whole


@pytest.mark.parametrize(
  'codes, starts', [((0,), 1), ((75, 75, 0), 3), ((75, 3, 0), 2), ((137,), 1)]
)
def test_75_alone_starts_again(codes, starts, tmp_path):
  path = tmp_path / 'codes'
  path.write_text('\n'.join(map(str, codes)) + '\n')
  result = launching.bash(
    'source launch/common.sh\n'
    f'command() {{ local code; code=$(head -n 1 {path}); sed -i 1d {path}\n'
    'return "$code"; }\n'
    'until_done command'
  )
  assert result.returncode == codes[starts - 1]
  assert path.read_text().split() == [str(code) for code in codes[starts:]]


# --- local.sh ---

# Ends as its first argument says, which has a word for each process; writes a
# line for each start.
VERB = f"""#!/usr/bin/env bash
[[ $1 == -c ]] && exec {sys.executable} "$@"
echo "$L2S_PROCESS_ID of $L2S_NUM_PROCESSES at $L2S_COORDINATOR_ADDRESS," \
  "$JAX_NUM_CPU_DEVICES devices: ${{*:2}}"
words=(${{5//,/ }})
case ${{words[L2S_PROCESS_ID]}} in
  hang) sleep 1000 ;;
  save) trap 'echo saved; exit 75' TERM; while sleep 0.1; do :; done ;;
  once) [[ -f $6 ]] || {{ touch "$6"; exit 75; }} ;;
  *) exit "${{words[L2S_PROCESS_ID]}}" ;;
esac
"""


@pytest.fixture
def local(tmp_path):
  """Returns what starts local.sh with the verb above."""
  verb = launching.write_program(tmp_path / 'verb', VERB)
  started = []

  def start(words, *arguments, rest=()):
    process = subprocess.Popen(
      [
        # A shell cannot trap what it was started to ignore, as in background.
        *('env', '--default-signal=INT'),
        launching.LAUNCH / 'local.sh',
        f'--processes={words.count(",") + 1}',
        *arguments,
      ]
      + ['--', 'train', words, *rest],
      env=launching.environment(L2S_PYTHON=verb, RESTART_SECS=0),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    while process.poll() is None:  # The second time it kills.
      process.terminate()
      time.sleep(0.2)


def test_local_processes_are_told_who_they_are(local):
  process = local('0,0,0', '--devices_per_process=4')
  output, errors = process.communicate(timeout=30)
  assert process.returncode == 0, errors
  lines = sorted(output.splitlines())
  assert [line[:9] for line in lines] == [f'[{i}] {i} of ' for i in range(3)]
  (address,) = {re.sub('.* at (.*), 4 devices.*', r'\1', x) for x in lines}
  assert re.fullmatch(r'127\.0\.0\.1:\d+', address)
  assert all(line.endswith('-m l2s_jax train 0,0,0') for line in lines)


@pytest.mark.parametrize('words, code', [('75,75', 75), ('0,2', 2)])
def test_local_exit_code(local, words, code):
  process = local(words)
  process.communicate(timeout=30)
  assert process.returncode == code


def test_local_kills_those_that_outlive_a_failure(local):
  start_secs = time.monotonic()
  process = local('hang,3', '--end_secs=1')
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 3
  assert time.monotonic() - start_secs < 20
  assert 'process 1 has ended with exit code 3' in errors
  assert 'killing processes 0' in errors


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_local_hands_on_the_order_to_save(local, signum):
  process = local('save,save', '--restart')
  for _ in range(2):
    process.stdout.readline()
  time.sleep(0.2)  # From its line to its trap.
  process.send_signal(signum)
  output, errors = process.communicate(timeout=30)
  assert process.returncode == launching.AGAIN, errors
  assert sorted(output.splitlines()) == ['[0] saved', '[1] saved']


def test_local_starts_again(local, tmp_path):
  process = local('once', '--restart', rest=[str(tmp_path / 'flag')])
  output, errors = process.communicate(timeout=30)
  assert process.returncode == 0, errors
  assert output.count('[0] 0 of 1') == 2


@pytest.mark.parametrize('arguments', ['', '--processes=0 -- train', '--what'])
def test_local_says_how_it_is_used(arguments):
  result = launching.bash(f'./launch/local.sh {arguments}')
  assert result.returncode == 2
  assert '--processes=N' in result.stderr and '#' not in result.stderr


# --- gke.yaml ---


def jobset():
  return yaml.safe_load((launching.LAUNCH / 'gke.yaml').read_text())


def test_gke_yaml_is_a_jobset():
  jsonschema.validate(
    jobset(), jobset_schema.JOBSET, jsonschema.Draft202012Validator
  )


@pytest.mark.parametrize(
  'path, value',
  [
    (['spec', 'failurePolicy', 'rules', 0, 'action'], 'Restart'),
    (['spec', 'replicatedJobs', 0, 'template', 'spec', 'completion'], 3),
    (['apiVersion'], 'jobset.x-k8s.io/v1'),
  ],
)
def test_the_schema_refuses_what_is_wrong(path, value):
  wrong = jobset()
  functools.reduce(lambda node, key: node[key], path[:-1], wrong)[path[-1]] = (
    value
  )
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(
      wrong, jobset_schema.JOBSET, jsonschema.Draft202012Validator
    )


def outcome(exit_code, conditions=()):
  """Returns what JobSet does when a pod ends, by the rules of its controller.

  Those of the Job first: the first rule that fits fails it, with the reason
  PodFailurePolicy; else more failures than backoffLimit do.
  """
  if exit_code == 0:
    return 'Completed'
  spec = jobset()['spec']
  (replicated,) = spec['replicatedJobs']
  job = replicated['template']['spec']
  assert job['backoffLimit'] == 0
  reason = 'BackoffLimitExceeded'
  for rule in job['podFailurePolicy']['rules']:
    assert rule['action'] == 'FailJob'
    codes = rule.get('onExitCodes', {'values': ()})['values']
    types = {x['type'] for x in rule.get('onPodConditions', ())}
    if exit_code in codes or types & set(conditions):
      reason = 'PodFailurePolicy'
  for rule in spec['failurePolicy']['rules']:
    if reason in rule.get('onJobFailureReasons', [reason]):
      return rule['action']
  return 'RestartJobSet'


def test_gke_restarts_what_was_preempted_alone():
  assert outcome(0) == 'Completed'
  assert outcome(launching.AGAIN) == 'RestartJobSetAndIgnoreMaxRestarts'
  for error in (1, 2, 134, 137):
    assert outcome(error) == 'FailJobSet'
  evicted = outcome(137, conditions=['DisruptionTarget'])
  assert evicted == 'RestartJobSetAndIgnoreMaxRestarts'


def test_gke_asks_for_all_chips_of_its_slice():
  (replicated,) = jobset()['spec']['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  sides = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
  chips = container['resources']['limits']['google.com/tpu']
  assert job['parallelism'] * chips == math.prod(map(int, sides))
  assert job['completions'] == job['parallelism']
  for rule in job['podFailurePolicy']['rules']:
    named = rule.get('onExitCodes', {}).get('containerName', container['name'])
    assert named == container['name']
  for path in re.findall(r'--gin_file=(\S+)', container['args'][0]):
    assert (tiny_runs.ROOT / path).is_file(), path


# --- env.sh ---


def test_xla_knows_every_flag_for_gpus():
  """XLA ends a process at a flag that it does not know."""
  result = launching.bash(
    'source launch/env.sh gpu; echo "$XLA_FLAGS";'
    f" {sys.executable} -c 'import jax; jax.devices()'",
    XLA_FLAGS='--xla_gpu_triton_gemm_any=false',
  )
  assert result.returncode == 0, result.stderr
  flags = result.stdout.split()
  assert flags[-1] == '--xla_gpu_triton_gemm_any=false'  # The caller's wins.
  assert len(flags) > 1
  wrong = launching.bash(
    f"{sys.executable} -c 'import jax; jax.devices()'",
    XLA_FLAGS='--xla_gpu_no_such_flag=true',
  )
  assert wrong.returncode != 0


def test_libtpu_knows_every_flag_for_tpus():
  pytest.importorskip('libtpu', reason='comes with requirements-tpu.txt')
  result = launching.bash(
    'source launch/env.sh tpu; echo "$LIBTPU_INIT_ARGS"\n'
    f'exec {sys.executable} -c "from jax.experimental import topologies as t\n'
    "t.get_topology_desc('v5e:2x2', 'tpu')\"",
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  )
  assert result.returncode == 0, result.stderr
  assert '--xla_tpu' in result.stdout


def test_env_sh_refuses_what_it_does_not_know():
  result = launching.bash('source launch/env.sh npu')
  assert result.returncode == 2
  assert "found 'npu', expected tpu or gpu" in result.stderr


def test_what_the_guide_names_is_there():
  guide = (tiny_runs.ROOT / 'docs' / 'pods.md').read_text()
  paths = set(re.findall(r'(?:gin_configs|launch)/[\w/.]*\w', guide))
  assert len(paths) > 8
  for path in paths:
    assert (tiny_runs.ROOT / path).is_file(), path
