# SPDX-License-Identifier: Apache-2.0
"""A run that trains its LLM has all that it needs in its own checkpoints."""

import json
import pathlib
import shutil

import gin
import numpy as np
from kept_runs import make

from l2s_jax import __main__ as command_line
from l2s_jax.systems import run_folder
from l2s_jax.weights import opening, saved_steps

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'


def test_it_goes_on_and_answers_without_the_llm_that_it_began_with(tmp_path):
  folder = tmp_path / 'kept'
  shutil.copytree(KEPT, folder)
  llm = opening.open_source(str(folder / 'llm'))
  table = ('token_embedder', 'embedding')
  first = llm.read(table)
  new = f'--gin.MODEL_DIR={folder / "new"}'
  settings = [
    *make.train_arguments(folder, 'l2s'),
    new,
    '--gin.TRAIN_LLM=True',
    "--gin.LLM_LAYER='mix'",
    "--gin.LEARNING_RATE_BY_PATH={'llm/.*': 0.5}",
    '--gin.PROJECTOR_STEPS=1',
    '--gin.CHECKPOINT_PERIOD=1',
  ]

  def read(step):
    path, _ = saved_steps.params_folder(folder / 'new', step)
    whole = [('llm', *table), ('layer_mix', 'weights')]
    return list(saved_steps.read_arrays(path, whole).values())

  try:
    for steps in (1, 2):
      arguments = [*settings, f'--gin.TRAIN_STEPS={steps}']
      assert command_line.main(arguments) == 0
      gin.clear_config()
    (held, mix), (moved, _) = read(1), read(2)
    np.testing.assert_array_equal(held, first)
    assert np.any(mix) and not np.array_equal(moved, first)

    system = run_folder.load(folder / 'new')
    assert system.frozen == () and system.module.llm_layer == 'mix'
    shutil.rmtree(folder / 'llm')
    arguments = [
      argument
      for argument in make.infer_arguments(folder, 'l2s')
      if not argument.startswith(
        ('--gin.CHECKPOINT_PATH', '--gin.LLM_PATH', '--gin.INFER_')
      )
    ]
    arguments += [
      f'--gin.CHECKPOINT_PATH={folder / "new"}',
      f'--gin.INFER_OUTPUT_DIR={folder / "out"}',
    ]
    assert command_line.main(arguments) == 0
  finally:
    gin.clear_config()
  (path,) = (folder / 'out').glob('*.jsonl')
  lines = path.read_text().splitlines()
  assert lines and all('prediction' in json.loads(line) for line in lines)
