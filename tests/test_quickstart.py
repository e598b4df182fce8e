# SPDX-License-Identifier: Apache-2.0
"""The quickstart's path, cut to a few steps, and what it leaves behind."""

import json
import sys

import forked
import pytest


@pytest.mark.parametrize(
  'slm',
  [
    'shared_vocabulary',
    pytest.param('own_vocabulary', marks=pytest.mark.long),
  ],
)
def test_quickstart_leaves_its_report(slm, tmp_path):
  result = forked.run(
    [
      sys.executable,
      '-m',
      'l2s_jax.quickstart',
      f'--slm={slm}',
      '--train_steps=6',
      '--eval_examples=64',
      f'--output_dir={tmp_path / "quickstart"}',
    ],
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  suffix = '_own_vocabulary' if slm == 'own_vocabulary' else ''
  folder = tmp_path / f'quickstart{suffix}_64_phrases_6'
  results = json.loads((folder / 'results.json').read_text())
  rows = {row['system']: row for row in results['rows']}
  assert sorted(rows) == [
    'LLM baseline',
    'LLM-to-SLM',
    'LLM-to-SLM, Z = 0',
    'LLM-to-SLM, Z of another prompt',
    'SLM baseline',
  ]
  l2s, slm_row = rows['LLM-to-SLM'], rows['SLM baseline']
  assert l2s['num_examples'] == 64
  assert l2s['trained'] > slm_row['trained'] == slm_row['parameters']
  assert l2s['parameters'] > l2s['trained']
  assert 0 < l2s['total_ms'] < rows['LLM baseline']['total_ms']
  assert len(results['phrases']) == 5
  assert 'version:' in results['versions']['bleu']
  assert results['verdict'] in (folder / 'results.md').read_text()
  assert (folder / 'results.png').read_bytes().startswith(b'\x89PNG')
  for name in ('llm', 'slm', 'llm_to_slm'):
    assert list((folder / name / 'tensorboard').iterdir())
    assert (folder / name / 'checkpoints' / '6').is_dir()
