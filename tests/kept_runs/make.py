# SPDX-License-Identifier: Apache-2.0
"""Makes small run folders, for later versions to go on with.

    PYTHONPATH=. python tests/kept_runs/make.py FOLDER

Trains, evaluates, infers and converts by the command line, as users do, and
writes what the version that runs it answers into `FOLDER/expected.json`. What
is in the folder is listed in `README.md`.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import tokenizers

from l2s_jax.data import cldr
from l2s_jax.evaluation import evaluate
from l2s_jax.vocabularies import sentencepiece

ROOT = pathlib.Path(__file__).parents[2]
GIN = """include 'gin_configs/models/{kind}.gin'
include 'gin_configs/tasks/parallel_text.gin'
include 'gin_configs/runs/train.gin'
include 'gin_configs/meshes/cpu.gin'
{tower} = @tiny/TransformerConfig()
tiny/TransformerConfig:
{config}
DATA_FILES = {{
  'train': ('train.en', 'train.de'),
  'validation': ('valid.en', 'valid.de'),
}}
TASK_FEATURE_LENGTHS = {{'inputs': 32, 'targets': 16}}
TRAIN_STEPS = 400
CHECKPOINT_PERIOD = 200
EVAL_PERIOD = None
KEEP_CHECKPOINTS = {keep}
BATCH_SIZE = 8
OPTIMIZER = @{optimizer}()
LEARNING_RATE = {rate}
LEARNING_RATE_FACTORS = 'constant * linear_warmup'
WARMUP_STEPS = 20
train.log_period = 100
"""
T5: dict[str, Any] = {
  'vocab_size': 128,
  'emb_dim': 16,
  'num_heads': 2,
  'head_dim': 8,
  'mlp_dim': 24,
  'num_encoder_layers': 1,
  'num_decoder_layers': 1,
  'mlp_activations': ('gelu', 'linear'),
  'dropout_rate': 0.1,
}
LLM = T5 | {'emb_dim': 24, 'num_encoder_layers': 2}
GPT: dict[str, Any] = {
  'vocab_size': 300,
  'emb_dim': 16,
  'num_heads': 2,
  'head_dim': 8,
  'mlp_dim': 24,
  'num_decoder_layers': 1,
  'mlp_activations': ('gelu',),
  'norm': 'layer',
  'norm_epsilon': 1e-5,
  'use_bias': True,
  'positions': 'learned',
  'max_positions': 64,
  'scale_attention': True,
  'scale_logits': False,
  'embedding_init_stddev': 0.02,
}
# Of each run its kind of system, the tower that it trains, its optimizer with
# the rate, and how many checkpoints are kept.
RUNS: dict[str, tuple[str, str, dict[str, Any], str, float, int]] = {
  'llm': ('llm_baseline', 'LLM', LLM, 'adafactor', 1e-2, 1),
  'l2s': ('llm_to_slm', 'SLM', T5, 'adamw', 1e-2, 2),
  'gpt': ('llm_to_slm', 'SLM', GPT, 'lion', 1e-3, 1),
}
# The steps that are kept, those of the run with two, and where it goes on to.
LAST_STEP, BOTH_STEPS, RESUMED_STEPS = 400, (200, 400), 403
RESUMING = (f'--gin.TRAIN_STEPS={RESUMED_STEPS}', '--gin.train.log_period=1')
NUM_TRAIN, NUM_VALID = 16, 8
# Logs and plots that are made again from other files.
LEFT_OUT = ('tensorboard', '*.png', '.lock')


def l2s(*arguments: Any) -> None:
  """Runs `python -m l2s_jax` in a process of its own, on one CPU device."""
  subprocess.run(
    [sys.executable, '-m', 'l2s_jax', *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    check=True,
  )


def train_arguments(folder: pathlib.Path, name: str) -> list[str]:
  """Returns the arguments that train a run of the folder, or go on with it."""
  tower = RUNS[name][1]
  data = folder / 'data'
  vocabulary = 'bpe' if name == 'gpt' else 'tiny.model'
  arguments = [
    'train',
    f'--gin_file={data / name}.gin',
    f'--gin.DATA_DIR={data}',
    f'--gin.{tower}_VOCABULARY={data / vocabulary}',
    f'--gin.MODEL_DIR={folder / name}',
  ]
  return arguments + (
    [] if name == 'llm' else [f'--gin.LLM_PATH={folder / "llm"}']
  )


def evaluate_arguments(folder: pathlib.Path, name: str) -> list[str]:
  """Returns the arguments that evaluate the checkpoints of a run."""
  steps = BOTH_STEPS if name == 'l2s' else LAST_STEP
  arguments = [
    'evaluate',
    '--gin_file=gin_configs/tasks/parallel_text.gin',
    '--gin_file=gin_configs/runs/evaluate.gin',
    f'--gin.DATA_DIR={folder / "data"}',
    "--gin.DATA_FILES={'validation': ('valid.en', 'valid.de')}",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    f'--gin.CHECKPOINT_PATH={folder / name}',
    f'--gin.EVAL_STEPS={steps}',
    '--gin.EVAL_BOOTSTRAP_SAMPLES=0',
    '--gin.BATCH_SIZE=8',
  ]
  if name == 'llm':
    return arguments
  return [
    *arguments,
    f'--gin.LLM_PATH={folder / "llm"}',
    "--gin.EVAL_CONTROLS=('none', 'zero')",
  ]


def infer_arguments(folder: pathlib.Path, name: str) -> list[str]:
  """Returns the arguments that answer the kept prompts by a run's last step."""
  arguments = [
    'infer',
    '--gin_file=gin_configs/runs/infer.gin',
    f'--gin.CHECKPOINT_PATH={folder / name}',
    f'--gin.INPUT={folder / "data" / "train.en"}',
    f'--gin.INFER_OUTPUT_DIR={folder / "answers" / name}',
    "--gin.TEMPLATE='translate English to German: {prompt}'",
    f'--gin.INFER_STEP={LAST_STEP}',
    '--gin.PROMPT_LENGTH=32',
    '--gin.MAX_DECODE_LEN=16',
    '--gin.BATCH_SIZE=8',
    '--gin.Decoding.log_probs=True',
  ]
  return arguments + (
    [] if name == 'llm' else [f'--gin.LLM_PATH={folder / "llm"}']
  )


def convert_arguments(
  source: pathlib.Path, destination: pathlib.Path, to: str
) -> list[str]:
  """Returns the arguments that convert a run or a converted folder."""
  return ['convert', '--from=l2s', f'--to={to}', str(source), str(destination)]


def write_data(data: pathlib.Path) -> None:
  """Writes a few lines of text, two tokenizers, and a gin file for each run."""
  data.mkdir(parents=True)
  german = [
    example
    for example in cldr.examples('train', num_examples=1200)
    if example['language'] == 'de' and len(example['source']) < 12
  ][: NUM_TRAIN + NUM_VALID]
  for split, part in (
    ('train', german[:NUM_TRAIN]),
    ('valid', german[NUM_TRAIN:]),
  ):
    for language, key in (('en', 'source'), ('de', 'answer')):
      text = ''.join(example[key] + '\n' for example in part)
      (data / f'{split}.{language}').write_text(text)
  texts = [text for e in german for text in (e['prompt'], e['answer'])]
  sentencepiece.train(
    texts,
    data / 'tiny.model',
    vocab_size=T5['vocab_size'],
    character_coverage=1.0,
    hard_vocab_limit=False,
    normalization_rule_name='identity',
  )
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator(
    texts,
    vocab_size=GPT['vocab_size'],
    special_tokens=['<|endoftext|>'],
    show_progress=False,
  )
  (data / 'bpe').mkdir()
  bpe.save_model(str(data / 'bpe'))
  for name, (kind, tower, config, optimizer, rate, keep) in RUNS.items():
    fields = ''.join(f'  {key} = {value!r}\n' for key, value in config.items())
    (data / f'{name}.gin').write_text(
      '# SPDX-License-Identifier: Apache-2.0\n'
      + GIN.format(
        kind=kind,
        tower=tower,
        config=fields.rstrip('\n'),
        optimizer=optimizer,
        rate=rate,
        keep=keep,
      )
    )


def losses(run: pathlib.Path) -> dict[str, float]:
  """Returns the losses of the steps after the kept ones."""
  records = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  return {
    str(record['step']): record['train/loss']
    for record in records
    if 'train/loss' in record and record['step'] > LAST_STEP
  }


def scores(run: pathlib.Path) -> dict[str, Any]:
  """Returns the scores of an evaluation, by step and control."""
  path = run / 'eval' / 'metrics-local-validation.json'
  return {
    step: {
      control: {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not name.endswith('_per_sec')
      }
      for control, values in controls.items()
    }
    for step, controls in evaluate.read_scores(path).items()
  }


def answers(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records that an inference has written."""
  lines = (folder / 'predictions.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def make(folder: pathlib.Path) -> None:
  """Makes the runs, and goes on with a copy to know what comes of them."""
  write_data(folder / 'data')
  for name in RUNS:
    l2s(*train_arguments(folder, name))
    l2s(*evaluate_arguments(folder, name))
    l2s(*infer_arguments(folder, name))
  l2s(*convert_arguments(folder / 'llm', folder / 'converted', 'l2s'))
  expected = {}
  for name in RUNS:
    shutil.copytree(folder / name, folder / 'kept')
    l2s(*train_arguments(folder, name), *RESUMING)
    expected[name] = {
      'losses': losses(folder / name),
      'scores': scores(folder / 'kept'),
      'answers': answers(folder / 'answers' / name),
    }
    shutil.rmtree(folder / name)
    (folder / 'kept').rename(folder / name)
  text = json.dumps(expected, indent=1, ensure_ascii=False)
  (folder / 'expected.json').write_text(text + '\n')
  for pattern in LEFT_OUT:
    for path in list(folder.rglob(pattern)):
      shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('folder', type=pathlib.Path, help='is made')
  make(parser.parse_args().folder.absolute())
