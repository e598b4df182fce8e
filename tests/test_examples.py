# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are: a notebook and a script."""

import importlib.util
import io
import json
import os
import pathlib
import runpy
import sys

import forked
import helpers
import pytest
import saved_runs

import l2s_jax

EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'


def run_cells(path):
  """Runs a notebook's cells; returns the value of each, by Jupyter or here."""
  notebook = json.loads(path.read_text(encoding='utf-8'))
  cells = [
    ''.join(cell['source'])
    for cell in notebook['cells']
    if cell['cell_type'] == 'code'
  ]
  if all(map(importlib.util.find_spec, ('nbclient', 'ipykernel'))):
    import nbclient
    import nbformat

    found = nbformat.read(path, as_version=4)
    places = [
      str(EXAMPLES.parent),
      *filter(None, [os.environ.get('PYTHONPATH')]),
    ]
    nbclient.NotebookClient(found, timeout=600).execute(
      cwd=str(path.parent),
      env=forked.environment() | {'PYTHONPATH': os.pathsep.join(places)},
    )
    return
  names: dict[str, object] = {'__name__': '__main__'}
  for cell in cells:
    exec(cell, names)


def test_the_notebook_runs_and_holds_no_outputs():
  path = EXAMPLES / 'llm_to_slm.ipynb'
  notebook = json.loads(path.read_text(encoding='utf-8'))
  for cell in notebook['cells']:
    assert not cell.get('outputs') and cell.get('execution_count') is None
  run_cells(path)


def test_the_script_answers_a_line_for_a_line(tmp_path, monkeypatch, capsys):
  system = helpers.system(helpers.MODULES['t5_1_1'])
  saved_runs.save(
    tmp_path / 'run', system, helpers.random_params(system.module)
  )
  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('a red box\nthe cat\n')
  script = runpy.run_path(str(EXAMPLES / 'answer.py'))
  arguments = ['--max_decode_len=4', '--batch_size=8']
  script['main']([str(tmp_path / 'run'), str(prompts), *arguments])
  model = l2s_jax.load(tmp_path / 'run', max_decode_len=4, batch_size=8)
  expected = model.answer(['a red box', 'the cat'])
  told = capsys.readouterr().out
  assert told == ''.join(f'{answer}\n' for answer in expected)
  monkeypatch.setattr(sys, 'stdin', io.StringIO(prompts.read_text()))
  script['main']([str(tmp_path / 'run'), '--stream', *arguments])
  assert capsys.readouterr().out == told


def test_the_script_refuses_in_a_sentence(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'argv', ['answer.py', str(tmp_path / 'absent')])
  with pytest.raises(SystemExit) as end:
    runpy.run_path(str(EXAMPLES / 'answer.py'), run_name='__main__')
  assert str(end.value.code).startswith('answer.py: CHECKPOINT_PATH=')
