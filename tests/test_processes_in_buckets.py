# SPDX-License-Identifier: Apache-2.0
"""Laws of several processes whose files are in a bucket: all is as for one."""

import dataclasses
import functools
import signal
import time

import bucket_servers
import helpers
import pytest
import saved_runs
import test_checkpoint
import test_distributed
import test_processes
import tiny_runs

from l2s_jax.evaluation import metric_writer
from l2s_jax.inference import predictions
from l2s_jax.interop import convert
from l2s_jax.models import l2s
from l2s_jax.runtime import files, locks, preemption
from l2s_jax.weights import converted, saved_steps

gcs = bucket_servers.gcs_fixture
s3 = bucket_servers.s3_fixture
folder = bucket_servers.folder_fixture

# Restores the step before, if there is one, and saves a step.
SAVE = """
import sys
import jax, numpy as np
address, num_processes, index, root, step = sys.argv[1:]
if int(num_processes) > 1:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, int(num_processes), int(index))
sys.path.append('tests')
import helpers, test_checkpoint
from l2s_jax.runtime import distributed, storage
mesh = jax.make_mesh((jax.device_count(),), ('fsdp',))
def place(x):
  spec = ('fsdp',) if x.ndim == 3 else ()
  sharding = jax.NamedSharding(mesh, jax.P(*spec))
  return jax.make_array_from_callback(
    x.shape, sharding, lambda index: np.asarray(x)[index]
  )
def state(step):
  return jax.tree.map(place, test_checkpoint.make_state(step, seed=step))
root, step = storage.of(root), int(step)
if step > 1:
  found, data = test_checkpoint.restore(root, state(step))
  helpers.assert_trees_equal(
    *map(distributed.fetch, (found, state(step - 1)))
  )
  assert data == {'batches': step - 1}, data
test_checkpoint.save(root, state(step))
"""


@pytest.mark.parametrize(
  'numbers', [(2, 1), pytest.param((1, 2, 2), marks=pytest.mark.long)]
)
def test_any_number_of_processes_goes_on_from_a_checkpoint(
  gcs, request, numbers
):
  folder = bucket_servers.own_folder('gs', request)
  for step, number in enumerate(numbers, start=1):
    test_processes.run(SAVE, number, str(folder), str(step))
  steps = saved_steps.steps(folder)
  assert steps == list(range(1, 1 + len(numbers)))
  for step in steps:
    assert saved_steps.problem(folder, step, saved_steps.ITEMS) is None
  state = test_checkpoint.make_state(steps[-1], seed=steps[-1])
  restored, _ = test_checkpoint.restore(folder, state)
  helpers.assert_trees_equal(restored, state)


# Loads converted weights, sharded over all processes, without and with their
# verification, and says how many bytes of objects this process has read.
LOAD = """
import functools, os, sys
import jax, numpy as np
address, num_processes, index, folder, local = sys.argv[1:]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, int(num_processes), int(index))
sys.path.append('tests')
import bucket_servers
from l2s_jax.models import batch_keys, l2s
from l2s_jax.runtime import integrity, partitioning
from l2s_jax.weights import opening, source
config = partitioning.MeshConfig(fsdp=int(num_processes))
mesh = partitioning.make_mesh(config)
expected = opening.open_source(local)
shapes, axes = partitioning.abstract_params(
  functools.partial(l2s.build(expected.config).init, deterministic=True),
  batch_keys.example_batch(1, 2, 2),
)
shardings = partitioning.param_shardings(
  {'llm': shapes}, {'llm': axes}, mesh, config
)['llm']
store = os.environ['STORAGE_EMULATOR_HOST']
for verifies in (False, True):
  integrity.verification = lambda: verifies
  with bucket_servers.proxy(store, lambda *_: '') as proxy:
    params, _ = source.load(opening.open_source(folder), shapes, shardings)
  print(proxy.num_bytes_read)
  for path, array in jax.tree_util.tree_leaves_with_path(params):
    whole = expected.read(tuple(key.key for key in path))
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[shard.index])
"""


@pytest.mark.parametrize('number', [2, pytest.param(4, marks=pytest.mark.long)])
def test_each_reads_its_part_of_converted_weights(
  gcs, request, tmp_path, number
):
  """And of the layers that it verifies, the others' part."""
  folder = bucket_servers.own_folder('gs', request)
  config = dataclasses.replace(
    helpers.T5_1_1,
    vocab_size=64,
    emb_dim=64,
    num_heads=4,
    head_dim=16,
    mlp_dim=128,
    num_encoder_layers=4,
    num_decoder_layers=4,
  )
  params = helpers.random_params(l2s.build(config))
  weights = helpers.Arrays(config, params)
  converted.save(convert.Reading(weights, None), tmp_path)
  files.upload_folder(tmp_path, folder)
  total = sum(array.nbytes for array in weights.arrays.values())
  outputs = test_processes.run(LOAD, number, str(folder), str(tmp_path))
  shares = 1 / number, 1 / number + (1 - 1 / number) / number
  for output in outputs:
    for num_bytes, share in zip(output.split()[-2:], shares, strict=True):
      assert int(num_bytes) / total == pytest.approx(share, rel=0.05)


def wait_for_step(processes, run):
  deadline = time.monotonic() + 200
  while not saved_steps.steps(run):
    assert all(process.poll() is None for process in processes)
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.long
@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGTERM])
def test_they_train_in_a_bucket_as_one_does_in_a_local_folder(
  gcs, request, tmp_path, end
):
  """Two begin, one goes on and is ended, two come to the end."""
  tiny_runs.write_experiments(tmp_path)
  root = bucket_servers.own_folder('gs', request)
  llm = functools.partial(tiny_runs.train_arguments, tmp_path, 'llm_baseline')
  tiny_runs.l2s(*llm('llm', '--gin.TRAIN_STEPS=2'))
  tiny_runs.l2s(*llm(f'{root}/llm', '--gin.TRAIN_STEPS=2'))

  def train(run, llm):
    return tiny_runs.train_arguments(
      tmp_path,
      'llm_to_slm',
      run,
      f'--gin.LLM_PATH={llm}',
      '--gin.TRAIN_STEPS=9',
      '--gin.CHECKPOINT_PERIOD=2',
      '--gin.tiny_SLM/TransformerConfig.dropout_rate=0.0',
      "--gin.BEST_METRIC='loss'",
    )

  run = root / 'run'
  in_bucket = train(str(run), root / 'llm')
  of_two = (*in_bucket, *test_distributed.FSDP)
  pair = test_distributed.start(2, *of_two)
  wait_for_step(pair, run)
  pair[1].send_signal(end)
  if end == signal.SIGKILL:
    pair[0].kill()
  for process in pair:
    process.communicate(timeout=200)
  first = saved_steps.steps(run)[-1]
  alone = tiny_runs.start(*in_bucket)
  deadline = time.monotonic() + 200
  while saved_steps.steps(run)[-1] == first and alone.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  alone.send_signal(end)
  said, _ = alone.communicate(timeout=200)
  assert f'Resuming from step {first}' in said
  assert alone.returncode in (
    0,
    preemption.EXIT_CODE if end == signal.SIGTERM else -end,
  )
  test_distributed.finish(test_distributed.start(2, *of_two))
  tiny_runs.l2s(*train('alone', tmp_path / 'llm'))
  found, expected = (
    [r for r in metric_writer.read(place) if 'train/loss' in r]
    for place in (run, tmp_path / 'alone')
  )
  assert [r['step'] for r in found] == list(range(1, 10))
  for one, other in zip(found, expected, strict=True):
    test_distributed.assert_close(one, other, ('train/loss',), 1e-4)
  assert saved_steps.steps(run) == saved_steps.steps(tmp_path / 'alone')
  assert saved_steps.best_step(run) == saved_steps.best_step(tmp_path / 'alone')
  assert not (run / locks.NAME).exists()


@bucket_servers.short_in('s3')
@pytest.mark.parametrize(
  'num_shards', [1, pytest.param(2, marks=pytest.mark.long)]
)
def test_they_answer_into_a_bucket_as_one_does_into_a_local_folder(
  folder, tmp_path, num_shards
):
  """Two processes a shard."""
  system = helpers.system(helpers.MODULES['t5_1_1'])
  saved_runs.save(
    tmp_path / 'run', system, helpers.random_params(system.module)
  )
  lines = ''.join(f'{"ab" * (n % 7 + 1)}\n' for n in range(41))
  (tmp_path / 'in.txt').write_text(lines)
  (folder / 'in.txt').write_text(lines)

  def infer(source, target, shard):
    return (
      'infer',
      '--gin_file=gin_configs/runs/infer.gin',
      f'--gin.CHECKPOINT_PATH={tmp_path / "run"}',
      f'--gin.INPUT={source}',
      f'--gin.INFER_OUTPUT_DIR={target}',
      '--gin.PROMPT_LENGTH=10',
      '--gin.MAX_DECODE_LEN=6',
      '--gin.BATCH_SIZE=8',
      f'--shard={shard}',
      f'--num_shards={num_shards}',
    )

  for shard in range(num_shards):
    of_two = infer(folder / 'in.txt', folder / 'out', shard)
    test_distributed.finish(
      test_distributed.start(2, *of_two, *test_distributed.FSDP)
    )
    tiny_runs.l2s(*infer(tmp_path / 'in.txt', tmp_path / 'out', shard))
  found, expected = (
    {
      path.name: path.read_bytes()
      for path in (place / 'out').iterdir()
      if path.suffix == '.jsonl'
    }
    for place in (folder, tmp_path)
  )
  assert found == expected
  names = [predictions.Shard(n, num_shards) for n in range(num_shards)]
  assert found.keys() == {name.name('predictions', '.jsonl') for name in names}
