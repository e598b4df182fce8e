# SPDX-License-Identifier: Apache-2.0
"""Laws of trackers: each number arrives once, whatever was stopped."""

import importlib.util
import json
import pathlib
import struct
import time

import pytest

from l2s_jax.evaluation import metric_writer
from l2s_jax.runtime import files
from l2s_jax.training import trackers


def train(run_dir, name, steps, *, first_step=0, first_time=True):
  """Logs a loss at some steps, and an evaluation at the even ones."""
  writer = metric_writer.MetricWriter(run_dir, first_step=first_step)
  (tracker,) = trackers.hooks(['tensorboard', name], run_dir)
  for step in steps:
    loss = float(step if first_time else 10 * step)
    writer.write(step, {'train/loss': loss})
    metrics = {'train/loss': loss}
    if step % 2 == 0:
      writer.write(step, {'eval/bleu': loss + 1})
      metrics['eval/bleu'] = loss + 1
    tracker.send(step, metrics)
  writer.close()
  tracker.close()


def wandb_records(path):
  """Yields the records of a `.wandb` file, which is a log as LevelDB's.

  After a header of seven bytes come blocks of 32 KiB, and in them pieces of
  records: a checksum, a size, a kind (1 whole, 2 first, 3 middle, 4 last).
  """
  proto = importlib.import_module('wandb.proto.wandb_internal_pb2')

  content, start, whole = path.read_bytes(), 7, b''
  while start + 7 <= len(content):
    if 2**15 - start % 2**15 < 7:  # The rest of a block holds no header.
      start += 2**15 - start % 2**15
      continue
    _, size, kind = struct.unpack_from('<IHB', content, start)
    if start + 7 + size > len(content):
      return  # Still being written.
    whole += content[start + 7 : start + 7 + size]
    start += 7 + size
    if kind in (1, 4):
      yield proto.Record.FromString(whole)
      whole = b''


def of_wandb(run_dir):
  """Returns the rows of all offline runs, in order, and the runs' ids."""
  # `finish` returns before the service has written the file of the last run.
  *_, last = sorted(run_dir.glob('wandb/offline-run-*/run-*.wandb'))
  for _ in range(300):
    if any(record.HasField('exit') for record in wandb_records(last)):
      break
    time.sleep(0.1)
  rows, ids = [], []
  for path in sorted(run_dir.glob('wandb/offline-run-*/run-*.wandb')):
    for record in wandb_records(path):
      if record.HasField('run'):
        ids.append(record.run.run_id)
      if record.HasField('history'):
        row = {
          item.key or '.'.join(item.nested_key): json.loads(item.value_json)
          for item in record.history.item
        }
        rows.append({k: v for k, v in row.items() if not k.startswith('_')})
  return rows, set(ids)


def of_trackio(run_dir):
  from trackio.sqlite_storage import SQLiteStorage

  runs = [
    run
    for run in SQLiteStorage.get_runs(trackers.PROJECT)
    if run.startswith(run_dir.name)
  ]
  rows = [
    {name: row[name] for name in row if name != 'timestamp'}
    for run in runs
    for row in SQLiteStorage.get_logs(trackers.PROJECT, run)
  ]
  return rows, set(runs)


READ = {'wandb': of_wandb, 'trackio': of_trackio}


@pytest.fixture(scope='module')
def database(tmp_path_factory):
  """The folder of Trackio, which reads its place as it is imported."""
  folder = tmp_path_factory.mktemp('trackio')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TRACKIO_DIR', str(folder))
    patch.setenv('WANDB_MODE', 'offline')
    yield folder


@pytest.mark.parametrize('name', READ)
def test_a_number_arrives_once_whatever_was_stopped(name, tmp_path, database):
  pytest.importorskip(name, reason=f'{name} is not installed (optional)')
  train(tmp_path, name, [1, 2, 3])
  # Killed; the newest checkpoint is step 2, and step 3 is done again. Step 4
  # was logged, and the kill came before it was sent.
  train(tmp_path, name, [3], first_step=2, first_time=False)
  writer = metric_writer.MetricWriter(tmp_path, first_step=3)
  writer.write(4, {'train/loss': 4.0})
  writer.close()
  train(tmp_path, name, [4, 5], first_step=4)
  rows, runs = READ[name](tmp_path)
  found: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    for metric in row.keys() - {'step'}:
      found.setdefault(metric, []).append((row['step'], row[metric]))
  assert found == {
    'train/loss': [(step, float(step)) for step in range(1, 6)],
    'eval/bleu': [(2, 3.0), (4, 5.0)],
  }
  assert len(runs) == 1


def test_trackers_that_cannot_be_are_refused_by_name():
  for names, message in (
    ('wandb', "TRACKERS='wandb': expected a tuple of any of tensorboard"),
    (('wandb', 'mlflow'), "TRACKERS=('wandb', 'mlflow'): expected a tuple"),
  ):
    with pytest.raises(ValueError) as error:
      trackers.check(names)
    assert message in str(error.value)
  absent = [n for n in READ if importlib.util.find_spec(n) is None]
  for name in absent:
    with pytest.raises(
      ValueError, match=f'needs {name}, which is not installed'
    ):
      trackers.check([name])


def test_a_broken_record_of_what_was_sent_is_refused(tmp_path):
  path = tmp_path / trackers.FILE
  of_text = {'wandb': {'id': 'a', 'sent': {'x': 'y'}}}
  contents: list[dict[str, object]] = [{'wandb': []}, {**of_text}]
  for content in contents:
    files.write_json(path, content)
    with pytest.raises(ValueError) as error:
      trackers.Tracker('wandb', tmp_path)
    assert str(path) in str(error.value) and 'remove it' in str(error.value)


def test_tensorboard_is_one_of_them(tmp_path):
  for name, tensorboard in (('with', True), ('without', False)):
    folder = tmp_path / name
    folder.mkdir()
    writer = metric_writer.MetricWriter(folder, tensorboard=tensorboard)
    writer.write(1, {'loss': 1.0})
    writer.close()
    assert (pathlib.Path(folder) / 'tensorboard').exists() == tensorboard
    assert metric_writer.read(folder)[0]['loss'] == 1.0
