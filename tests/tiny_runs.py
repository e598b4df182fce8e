# SPDX-License-Identifier: Apache-2.0
"""Tiny runs by the command line, in processes of their own, as a user has.

They are forked with their modules imported and share compiled programs, but
where a test says `from_nothing`: then they are as a user's first.
"""

import gzip
import os
import pathlib
import subprocess
import sys

import forked

from l2s_jax.data import cldr
from l2s_jax.vocabularies import sentencepiece

ROOT = pathlib.Path(__file__).parent.parent
TINY = """
TINY_{name} = @tiny_{name}/TransformerConfig()
tiny_{name}/TransformerConfig:
  vocab_size = 300
  emb_dim = {emb_dim}
  num_heads = 2
  head_dim = 8
  mlp_dim = 32
  num_encoder_layers = 1
  num_decoder_layers = 1
  mlp_activations = ('gelu', 'linear')
  dropout_rate = 0.1
  scan_layers = False
"""
RUN = """
include 'gin_configs/models/{kind}.gin'
include 'gin_configs/tasks/parallel_text.gin'
include 'gin_configs/runs/train.gin'
include 'gin_configs/meshes/cpu.gin'
{model}
DATA_FILES = {{
  'train': ('train.en.gz', 'train.de.gz'),
  'validation': ('valid.en', 'valid.de'),
}}
TASK_FEATURE_LENGTHS = {{'inputs': 48, 'targets': 32}}
TRAIN_STEPS = 8
BATCH_SIZE = 8
WARMUP_STEPS = 2
EVAL_PERIOD = None
CHECKPOINT_PERIOD = 4
train.log_period = 1
train.num_eval_examples = 10
"""


def l2s(*arguments, stdin=None, check=True, from_nothing=False):
  """Runs `python -m l2s_jax` in a process of its own."""
  argv, environment = command(*arguments, from_nothing=from_nothing)
  options = {'cwd': ROOT, 'env': environment, 'text': True, 'timeout': 300}
  if from_nothing:
    result = subprocess.run(argv, input=stdin, capture_output=True, **options)
  else:
    result = forked.run(argv, input=stdin, **options)
  if check and result.returncode:
    raise AssertionError(result.stdout + result.stderr)
  return result


def command(*arguments, from_nothing=False):
  """Returns the command line and environment of `python -m l2s_jax`."""
  return (
    [sys.executable, '-m', 'l2s_jax', *map(str, arguments)],
    os.environ | forked.COMPILE_FAST if from_nothing else forked.environment(),
  )


def start(*arguments, from_nothing=False):
  """Starts `python -m l2s_jax`; what it says comes out of one pipe."""
  argv, environment = command(*arguments, from_nothing=from_nothing)
  popen = subprocess.Popen if from_nothing else forked.Popen
  return popen(
    argv,
    env=environment,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def write_experiments(path):
  """Writes data, a vocabulary and a gin file for each system to a folder."""
  german = [
    example
    for example in cldr.examples('train', num_examples=1200)
    if example['language'] == 'de'
  ]
  for split, examples in (('train', german[:300]), ('valid', german[300:])):
    opener, suffix = (gzip.open, '.gz') if split == 'train' else (open, '')
    for language, key in (('en', 'source'), ('de', 'answer')):
      with opener(path / f'{split}.{language}{suffix}', 'wt') as file:
        file.writelines(example[key] + '\n' for example in examples)
  sentencepiece.train(
    (text for e in german for text in (e['prompt'], e['answer'])),
    path / 'tiny.model',
    vocab_size=300,
    character_coverage=1.0,
    hard_vocab_limit=False,
  )
  models = TINY.format(name='LLM', emb_dim=24)
  models += TINY.format(name='SLM', emb_dim=16)
  for kind, model in (
    ('llm_baseline', 'LLM = %TINY_LLM'),
    ('slm_baseline', 'SLM = %TINY_SLM'),
    ('llm_to_slm', 'SLM = %TINY_SLM'),
  ):
    (path / f'{kind}.gin').write_text(
      models + RUN.format(kind=kind, model=model)
    )


def train_arguments(folder, kind, run, *bindings):
  """Returns the arguments that train a system of `write_experiments`.

  `run` is the name of a folder beside the data, or a URL.
  """
  tower = 'LLM' if kind == 'llm_baseline' else 'SLM'
  return (
    'train',
    f'--gin_file={folder / kind}.gin',
    f'--gin.DATA_DIR={folder}',
    f'--gin.{tower}_VOCABULARY={folder / "tiny.model"}',
    f'--gin.MODEL_DIR={run if "://" in run else folder / run}',
    *bindings,
  )
