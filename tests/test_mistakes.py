# SPDX-License-Identifier: Apache-2.0
"""The likely mistakes of new users: each message alone is enough to mend it.

`docs/mistakes.md` lists the mistakes with the messages. Each is made here by
the command line, and its message is compared with that page.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import cache_files
import gin
import pytest
import tiny_disks
import tiny_runs

from l2s_jax import __main__ as command_line
from l2s_jax.runtime import locks

ROOT = pathlib.Path(__file__).parent.parent
KEPT = ROOT / 'tests' / 'kept_runs' / '1'
PAGE = ROOT / 'docs' / 'mistakes.md'
# What stands in the page in place of the user's own paths and numbers.
ELLIPSIS = '…'


@pytest.fixture
def folder(tmp_path):
  """A copy of runs and data, as a user has them."""
  shutil.copytree(KEPT, tmp_path / 'kept')
  yield tmp_path / 'kept'
  gin.clear_config()


def train(folder, name, run, *flags):
  """Returns the arguments that train a system of `kept_runs`."""
  data = folder / 'data'
  tower = 'LLM' if name == 'llm' else 'SLM'
  return [
    'train',
    f'--gin_file={data / name}.gin',
    f'--gin.DATA_DIR={data}',
    f'--gin.{tower}_VOCABULARY={data / "tiny.model"}',
    *([f'--gin.MODEL_DIR={folder / run}'] if run else []),
    *flags,
  ]


def infer(folder, source, *flags):
  """Returns the arguments that answer the prompts of a file."""
  return [
    'infer',
    '--gin_file=gin_configs/runs/infer.gin',
    f'--gin.CHECKPOINT_PATH={folder / "llm"}',
    f'--gin.INPUT={source}',
    f'--gin.INFER_OUTPUT_DIR={folder / "out"}',
    *flags,
  ]


def write(path, content):
  path.write_text(content)
  return path


def from_cache(folder, cache):
  return train(
    folder,
    'llm',
    'new',
    '--gin_file=gin_configs/tasks/cached.gin',
    f'--gin.CACHE_DIR={cache}',
  )


def no_text(folder):
  return write(folder / 'x.jsonl', json.dumps({'question': 'a'}) + '\n')


MISTAKES = {
  'missing weights': lambda f: train(
    f, 'l2s', 'new', f'--gin.LLM_PATH={f / "t5-large"}'
  ),
  'no LLM_PATH': lambda f: train(f, 'l2s', 'new'),
  'no MODEL_DIR': lambda f: train(f, 'llm', None),
  'misspelt gin name': lambda f: train(f, 'llm', 'new', '--gin.BATCHSIZE=4'),
  'misspelt gin file': lambda f: [*infer(f, 'x')[:1], '--gin_file=infer.gin'],
  'wrong vocabulary': lambda f: train(
    f, 'llm', 'new', '--gin.tiny/TransformerConfig.vocab_size=100'
  ),
  'wrong column': lambda f: infer(f, no_text(f)),
  'batch not divisible': lambda f: train(f, 'llm', 'new', '--gin.BATCH_SIZE=6'),
  'checkpoint of another model': lambda f: train(
    f, 'llm', 'llm', '--gin.tiny/TransformerConfig.emb_dim=32'
  ),
  'stale cache': lambda f: from_cache(
    f,
    cache_files.write(
      f / 'cache', {'one': {'train': cache_files.random_examples(5)}}
    ),
  ),
  'incomplete cache': lambda f: from_cache(f, f / 'cache'),
  'a .gz that is none': lambda f: infer(f, write(f / 'x.txt.gz', 'a b\n')),
  'a file that is missing': lambda f: infer(f, f / 'prompts.txt'),
}


# Further mistakes, with a part of their messages.
OTHERS = {
  'a run as the folder of answers': (
    lambda f: infer(
      f, write(f / 'x.txt', 'a\n'), f'--gin.INFER_OUTPUT_DIR={f / "llm"}'
    ),
    'llm is a run: it has model.json. Choose another folder.',
  ),
  'weights as the folder of a run': (
    lambda f: train(f, 'llm', 'converted'),
    'converted is a converted folder: it has weights.json.',
  ),
  "the LLM's folder as that of the run": (
    lambda f: train(f, 'l2s', 'llm', f'--gin.LLM_PATH={f / "llm"}'),
    'llm holds another run. Choose another MODEL_DIR',
  ),
  'a folder in a file': (
    lambda f: train(f, 'llm', 'data/tiny.model/new'),
    'tiny.model is a file; give a folder.',
  ),
  'a checkpoint in place of its run': (
    lambda f: train(f, 'l2s', 'new', f'--gin.LLM_PATH={f}/llm/checkpoints/400'),
    'llm: give that.',
  ),
  'a folder as input': (lambda f: infer(f, f), ': is a folder. Set INPUT to'),
  'a misspelt run': (
    lambda f: [
      'evaluate',
      '--gin_file=gin_configs/tasks/cldr.gin',
      '--gin_file=gin_configs/runs/evaluate.gin',
      f'--gin.CHECKPOINT_PATH={f / "lm"}',
    ],
    'lm is not a run: it has no model.json. Correct it; or',
  ),
  'a step that is not there': (
    lambda f: infer(f, write(f / 'x.txt', 'a\n'), '--gin.INFER_STEP=7'),
    'the checkpoint 7; it has steps [400]. Choose one of these steps.',
  ),
  'no SLM': (
    lambda f: train(
      f, 'l2s', 'new', f'--gin.LLM_PATH={f}/llm', '--gin.SLM=None'
    ),
    'LLM-to-SLM needs an SLM: set SLM_PATH to its weights, or SLM to a config',
  ),
  'an LLM-to-SLM run as LLM': (
    lambda f: train(f, 'l2s', 'new', f'--gin.LLM_PATH={f}/l2s'),
    'is an LLM-to-SLM run, whose SLM needs the states of its own LLM. Set ',
  ),
  "Hugging Face's name": (
    lambda f: infer(f, 'x', '--gin.Decoding.max_new_tokens=4'),
    "no parameter 'max_new_tokens'. It has: temperature, top_k,",
  ),
  'a list named .jsonl': (
    lambda f: infer(f, write(f / 'x.jsonl', '[\n {"prompt": "a"},\n]\n')),
    'name a file that is one JSON list *.json',
  ),
  'a CSV with semicolons': (
    lambda f: infer(f, write(f / 'x.csv', 'id;prompt\n1;a\n')),
    'Columns of CSV are separated by commas',
  ),
}


def said(arguments, capsys):
  """Returns the exit status, and what was said."""
  try:
    status = command_line.main(arguments)
  finally:
    gin.clear_config()
  return status, capsys.readouterr().err


def listed():
  """Returns the messages of the page, by mistake."""
  return dict(re.findall(r'^\| ([^|]+) \| ([^|]+) \|$', PAGE.read_text(), re.M))


def message_of(name):
  """Returns the pattern of a message, from the page."""
  return '.*'.join(map(re.escape, listed()[name].split(ELLIPSIS)))


def check(name, words):
  flat = ' '.join(words.split())
  assert re.search(message_of(name), flat), flat
  assert 'Traceback' not in words


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_has_the_message_of_the_page(name, folder, capsys):
  arguments = MISTAKES[name](folder)
  before = sorted(folder.rglob('*'))
  status, words = said(arguments, capsys)
  assert status == 2
  check(name, words)
  assert sorted(folder.rglob('*')) == before


@pytest.mark.parametrize('name', OTHERS)
def test_other_mistakes_are_named_before_anything_is_written(
  name, folder, capsys
):
  make, message = OTHERS[name]
  arguments = make(folder)
  before = sorted(folder.rglob('*'))
  status, words = said(arguments, capsys)
  assert status == 2
  assert message in words
  assert 'Traceback' not in words
  assert sorted(folder.rglob('*')) == before


def test_an_empty_input_is_told(folder, capsys):
  source = write(folder / 'x.txt', '')
  status, words = said(infer(folder, source), capsys)
  assert status == 0
  assert words == f'INPUT={source} has no lines.\n'


def test_two_runs_in_one_folder(folder, capsys):
  with locks.held(folder / 'new', 'MODEL_DIR'):
    status, words = said(train(folder, 'llm', 'new'), capsys)
  assert status == 2
  check('two runs in one folder', words)


def test_a_run_outside_the_clone(folder, capsys, monkeypatch):
  monkeypatch.chdir(folder)
  status, words = said(['train', '--gin_file=data/mine.gin'], capsys)
  assert status == 2
  check('run outside the clone', words)


def test_a_prompt_that_is_longer_than_the_limit(folder, capsys):
  source = write(folder / 'x.txt', 'a b c d e f g h i j k l m n o p\n')
  status, words = said(
    infer(folder, source, '--gin.PROMPT_LENGTH=4', '--gin.MAX_DECODE_LEN=2'),
    capsys,
  )
  assert status == 0
  check('prompt longer than the limit', words)


def test_a_full_disk(folder):
  with tiny_disks.mounted(folder / 'disk'):
    tiny_disks.fill(folder / 'disk')
    arguments = train(folder, 'llm', 'disk/new')
    result = tiny_runs.l2s(*arguments, check=False, from_nothing=True)
  assert result.returncode == 1
  check('full disk', result.stderr)


def test_a_gpu_that_is_absent(folder):
  result = subprocess.run(
    [sys.executable, '-m', 'l2s_jax', *train(folder, 'llm', 'new')],
    env=os.environ | {'JAX_PLATFORMS': 'cuda'},
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 2
  check('GPU that is absent', result.stderr)


def test_a_wrong_python(tmp_path):
  for name in ('python3', 'python3.11', 'python3.12', 'python'):
    write(tmp_path / name, '#!/bin/sh\nexit 1\n').chmod(0o755)
  result = subprocess.run(
    ['bash', '-c', 'source launch/setup.sh; find_python'],
    env={'PATH': f'{tmp_path}:/usr/bin:/bin'},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode
  check('wrong Python', result.stderr)


def test_the_page_lists_what_is_tried():
  names = listed().keys() - {'mistake', '---'}
  here = pathlib.Path(__file__).read_text()
  assert len(names) >= 15
  assert all(f"'{name}'" in here for name in names)
  assert names >= MISTAKES.keys()
