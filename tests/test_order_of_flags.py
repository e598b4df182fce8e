# SPDX-License-Identifier: Apache-2.0
"""The order of flags changes nothing, but where one overrides another."""

import pathlib
import random
import shutil

import gin
import numpy as np
import pytest

from l2s_jax import __main__ as command_line
from l2s_jax.weights import saved_steps

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'
# None of these files overrides another.
FILES = (
  'gin_configs/models/llm_baseline.gin',
  'gin_configs/tasks/parallel_text.gin',
  'gin_configs/runs/train.gin',
  'gin_configs/meshes/cpu.gin',
)
TOWER = """tiny/TransformerConfig:
  vocab_size = 128
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 24
  num_encoder_layers = 1
  num_decoder_layers = 1
  mlp_activations = ('gelu', 'linear')
"""


@pytest.fixture
def flags(tmp_path):
  """The flags of a training, of all kinds."""
  shutil.copytree(KEPT / 'data', tmp_path / 'data')
  (tmp_path / 'tower.gin').write_text(TOWER)
  return [
    *(f'--gin_file={name}' for name in FILES),
    '--gin_file=tower.gin',
    f'--gin_search_paths={tmp_path}',
    f'--gin.DATA_DIR={tmp_path / "data"}',
    "--gin.DATA_FILES={'train': ('train.en', 'train.de')}",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    '--gin.LLM=@tiny/TransformerConfig()',
    f'--gin.LLM_VOCABULARY={KEPT / "data" / "tiny.model"}',
    f'--gin.MODEL_DIR={tmp_path / "run"}',
    '--gin.tiny/TransformerConfig.dropout_rate=0.1',
    '--gin.adamw.b2=0.95',
    '--gin.BATCH_SIZE=8',
    '--gin.TRAIN_STEPS=1',
    '--gin.EVAL_PERIOD=None',
    '--gin.train.eval_split=None',
    '--gin.TRACKERS=()',
  ]


def run(verb, arguments):
  try:
    return command_line.main([verb, *arguments])
  finally:
    gin.clear_config()


def orders(flags):
  """Returns two orders: all files after all bindings, and a random one."""
  files_last = sorted(flags, key=lambda flag: not flag.startswith('--gin_file'))
  return [files_last[::-1], random.Random(0).sample(flags, len(flags))]


def test_a_training_is_configured_the_same_in_any_order(flags, capsys):
  def printed(order):
    assert run('train', order) == 0
    # In the order of the flags: which of them were taken as strings.
    lines = capsys.readouterr().out.splitlines()
    return sorted(lines, key=lambda x: x if 'taken as a string' in x else '~')

  flags.append('--dry_run')
  expected = printed(flags)
  assert 'adamw.b2 = 0.95' in expected
  for order in orders(flags):
    assert printed(order) == expected


@pytest.mark.long
def test_a_training_is_the_same_in_any_order(flags, tmp_path):
  def trained(order):
    folder = tmp_path / 'run'
    shutil.rmtree(folder, ignore_errors=True)
    assert run('train', order) == 0
    params, step = saved_steps.params_folder(folder)
    assert step == 1
    names = list(saved_steps.array_shapes(params))
    config = (folder / 'config.gin').read_text()
    return config, saved_steps.read_arrays(params, names)

  config, expected = trained(flags)
  for order in orders(flags):
    again, found = trained(order)
    assert again == config
    assert found.keys() == expected.keys()
    for name, array in expected.items():
      np.testing.assert_array_equal(found[name], array)


def test_of_two_values_the_last_one_counts_and_flags_count_over_files(
  flags, tmp_path, capsys
):
  (tmp_path / 'last.gin').write_text('BATCH_SIZE = 16\nadamw.b2 = 0.5\n')
  pair = ['--gin.SEED=3', '--gin.SEED=4']
  for before, after in (([], pair), (pair, []), ([pair[1]], [pair[0]])):
    last = [*before, *after][-1][-1]
    order = [*before, '--dry_run', *flags, *after, '--gin_file=last.gin']
    assert run('train', order) == 0
    printed = capsys.readouterr().out
    assert f'\nSEED = {last}\n' in printed
    assert '\nBATCH_SIZE = 8\n' in printed
    assert 'adamw.b2 = 0.95' in printed


def test_paths_may_stand_between_flags(tmp_path, capsys):
  source, out = str(KEPT / 'converted'), str(tmp_path / 'out')
  flags = ['--from=l2s', '--to=hf', '--dry_run']
  assert run('convert', [source, out, *flags]) == 0
  expected = capsys.readouterr().out
  assert source in expected
  for order in (
    [*flags, source, out],
    [flags[0], source, flags[1], out, flags[2]],
    [source, *flags, out],
    [flags[2], source, out, flags[1], flags[0]],
  ):
    assert run('convert', order) == 0
    assert capsys.readouterr().out == expected
