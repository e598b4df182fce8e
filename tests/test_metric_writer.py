# SPDX-License-Identifier: Apache-2.0
"""Logs: each step once, whatever happened in between."""

import json
import struct

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
