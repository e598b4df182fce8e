# SPDX-License-Identifier: Apache-2.0
"""Tables, verdicts and logs."""

import json

import pytest

from l2s_jax import metric_writer, report


def test_table_aligns_numbers_and_leaves_missing_cells_empty():
  table = report.markdown_table(
    [{'name': 'one', 'size': 12345, 'score': 1.234}, {'name': 'second'}],
    {'name': 'system', 'size': 'parameters', 'score': 'BLEU'},
  )
  assert table == (
    '| system | parameters | BLEU |\n'
    '| ------ | ---------: | ---: |\n'
    '| one    |     12,345 | 1.23 |\n'
    '| second |            |      |\n'
  )


@pytest.mark.parametrize(
  'right,zero,other,used',
  [
    (30.0, 5.0, 4.0, True),
    (30.0, 29.5, 4.0, False),  # as good without the LLM
    (30.0, 5.0, 30.2, False),  # as good with the wrong prompt
  ],
)
def test_verdict_needs_both_controls_to_be_worse(right, zero, other, used):
  sentence = report.describe_controls(right, zero, other)
  assert sentence.startswith(
    'The SLM uses what the LLM read' if used else 'The SLM does not use'
  )
  assert f'{right:.1f}' in sentence and f'{other:.1f}' in sentence


def test_log_holds_each_step_once_after_a_restart(tmp_path):
  writer = metric_writer.MetricWriter(tmp_path)
  for step in range(1, 6):
    writer.write(step, {'loss': step})
  writer.close()
  # The last checkpoint was step 3; a write was torn when the process died.
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "lo')
  writer = metric_writer.MetricWriter(tmp_path, first_step=3)
  for step in (4, 5):
    writer.write(step, {'loss': 10 * step})
  writer.close()
  records = metric_writer.read(tmp_path)
  assert [r['step'] for r in records] == [1, 2, 3, 4, 5]
  assert [r['loss'] for r in records] == [1, 2, 3, 40, 50]
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert all(json.loads(line) for line in lines)
