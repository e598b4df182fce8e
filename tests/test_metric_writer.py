# SPDX-License-Identifier: Apache-2.0
"""Logs: each step once, whatever happened in between."""

import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from l2s_jax.evaluation import metric_writer


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
  assert metric_writer.by_step(tmp_path, prefix='lo') == {
    record['step']: {'ss': record['loss']} for record in records
  }
  assert tensorboard_scalars(tmp_path) == [
    (r['step'], 'loss', r['loss']) for r in records
  ]


def write_log(run_dir):
  """Returns the lines of a log of steps 10 to 50."""
  writer = metric_writer.MetricWriter(run_dir, tensorboard=False)
  for step in range(1, 6):
    writer.write(10 * step, {'loss': float('nan') if step == 5 else 0.1 * step})
  writer.close()
  return (run_dir / 'metrics.jsonl').read_text().splitlines(keepends=True)


def read_log(run_dir, lines):
  """Returns the steps read from lines, and what was said."""
  (run_dir / 'metrics.jsonl').write_text(''.join(lines))
  said: list[str] = []
  return [r['step'] for r in metric_writer.read(run_dir, said.append)], said


@pytest.mark.parametrize(
  'old, new',
  [
    ('0.2', '0.1'),
    ('20', '21'),
    ('"line": 2', '"line": 3'),
    ('"digest"', '"digesu"'),
    ('"digest": "', '"digest": "0'),
  ],
)
def test_a_changed_line_is_named_and_skipped(tmp_path, old, new):
  lines = write_log(tmp_path)
  assert read_log(tmp_path, lines) == ([10, 20, 30, 40, 50], [])
  lines[1] = lines[1].replace(old, new, 1)
  steps, (words,) = read_log(tmp_path, lines)
  assert steps == [10, 30, 40, 50]
  assert f'{tmp_path / "metrics.jsonl"}, line 2: skipped it, because' in words


def test_removed_and_repeated_lines_are_said(tmp_path):
  lines = write_log(tmp_path)
  steps, (words,) = read_log(tmp_path, [*lines[:1], *lines[3:]])
  assert steps == [10, 40, 50]
  assert '2 lines before line 2 were removed' in words
  steps, said = read_log(tmp_path, [*lines[:3], *lines[1:]])
  assert steps == [10, 20, 30, 40, 50]
  assert [words.partition(':')[0][-6:] for words in said] == [
    'line 4',
    'line 5',
  ]


@pytest.mark.parametrize('num_left', [0, 2, 4])
def test_removed_last_lines_are_said(tmp_path, num_left):
  lines = write_log(tmp_path)
  steps, (words,) = read_log(tmp_path, lines[:num_left])
  assert steps == [10, 20, 30, 40, 50][:num_left]
  assert f'metrics.jsonl: {5 - num_left} lines at its end were rem' in words


def test_a_damaged_last_line_is_not_said_twice(tmp_path):
  lines = write_log(tmp_path)
  _, (words,) = read_log(tmp_path, [*lines[:4], lines[4][:30] + '\n'])
  assert 'line 5' in words
  _, said = read_log(tmp_path, [*lines[:1], *lines[2:3]])
  assert ['1 lines before' in said[1], '2 lines at' in said[0]] == [True] * 2


@pytest.mark.parametrize('content', [None, '', '{"line": 9, "digest": "0"}'])
def test_a_lost_number_of_lines_is_said(tmp_path, content):
  lines = write_log(tmp_path)
  end = tmp_path / '.metrics.jsonl.end'
  if content is None:
    end.unlink()
  else:
    end.write_text(content)
  steps, (words,) = read_log(tmp_path, lines)
  assert steps == [10, 20, 30, 40, 50]
  assert f'{end} is missing or damaged' in words
  # The next start makes it whole again.
  metric_writer.MetricWriter(tmp_path, first_step=30, tensorboard=False).close()
  said: list[str] = []
  assert len(metric_writer.read(tmp_path, said.append)) == 3 and not said


def test_a_kill_while_the_log_is_begun_again_is_no_loss(tmp_path):
  """The number is written first; the log then has more lines."""
  lines = write_log(tmp_path)
  metric_writer.MetricWriter(tmp_path, first_step=20, tensorboard=False).close()
  assert read_log(tmp_path, lines) == ([10, 20, 30, 40, 50], [])


def test_a_log_without_digests_is_read_and_gets_them(tmp_path):
  lines = [
    json.dumps({'step': step, 'time': 1.0, 'loss': step}) + '\n'
    for step in (1, 2)
  ]
  assert read_log(tmp_path, lines) == ([1, 2], [])
  metric_writer.MetricWriter(tmp_path, first_step=2, tensorboard=False).close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines(keepends=True)
  assert read_log(tmp_path, lines) == ([1, 2], [])
  changed = lines[0].replace('"loss": 1', '"loss": 2')
  assert read_log(tmp_path, [changed, lines[1]])[0] == [2]


def tensorboard_scalars(run_dir):
  """Returns every scalar of every event file, as it lies there."""
  found = []
  for path in sorted((run_dir / 'tensorboard').iterdir()):
    content, start = path.read_bytes(), 0
    while start < len(content):  # TFRecord: length, its CRC, record, its CRC
      (size,) = struct.unpack_from('<Q', content, start)
      event = event_pb2.Event.FromString(
        content[start + 12 : start + 12 + size]
      )
      start += size + 16
      found += [
        (event.step, v.tag, v.simple_value) for v in event.summary.value
      ]
  return found
