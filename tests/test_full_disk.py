# SPDX-License-Identifier: Apache-2.0
"""A full disk: the message names the file, earlier files stay good.

With room again, the same call goes on. `test_mistakes.py` has a whole program
on a full disk.
"""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_disks

from l2s_jax.evaluation import evaluate, metric_writer
from l2s_jax.inference import predictions
from l2s_jax.models import l2s
from l2s_jax.runtime import files, integrity, os_errors
from l2s_jax.training import checkpoint
from l2s_jax.training import state as state_lib
from l2s_jax.weights import converted, saved_steps


@pytest.fixture
def disk(tmp_path):
  with tiny_disks.mounted(tmp_path / 'disk', kib=512):
    yield tmp_path / 'disk'


def refuses(disk, write, name):
  """Calls a function on the full disk, and makes room."""
  tiny_disks.fill(disk)
  with pytest.raises(Exception) as caught:  # Orbax has exceptions of its own.
    write()
  words = os_errors.describe(caught.value)
  assert words is not None, caught.value
  assert 'No space left on device; free some space' in words
  assert name in words
  tiny_disks.make_room(disk)


def test_a_whole_file_keeps_its_earlier_content(disk):
  path = disk / 'scores.json'
  files.write_json(path, integrity.seal({'4': {}}))
  more = integrity.seal({'4': {}, '8': {'none': {'loss': 1.0}}})
  refuses(disk, lambda: files.write_json(path, more), str(path))
  assert evaluate.read_scores(path) == {'4': {}}
  assert [p.name for p in disk.iterdir()] == ['scores.json']
  files.write_json(path, more)
  assert '8' in evaluate.read_scores(path)


def test_a_log_goes_on(disk):
  writer = metric_writer.MetricWriter(disk, tensorboard=False)
  writer.write(1, {'loss': 1.0})

  def write():
    for step in range(2, 100):
      writer.write(step, {'loss': 1.0})

  refuses(disk, write, metric_writer.FILE)  # Or that of its end.
  writer.close()
  kept = len(metric_writer.read(disk))
  assert kept >= 1
  writer = metric_writer.MetricWriter(disk, first_step=1, tensorboard=False)
  writer.write(2, {'loss': 2.0})
  writer.close()
  said: list[str] = []
  records = metric_writer.read(disk, said.append)
  assert [record['step'] for record in records] == [1, 2] and not said


def test_a_log_is_named_when_it_is_closed_as_well(disk):
  """Closing writes again what could not be written."""
  writer = metric_writer.MetricWriter(disk, tensorboard=False)
  tiny_disks.fill(disk)
  for write in (lambda: writer.write(1, {'loss': 1.0}), writer.close):
    with pytest.raises(OSError, match='No space left') as caught:
      write()
    assert str(caught.value.filename).startswith(str(disk))
  tiny_disks.make_room(disk)


def test_an_event_file_is_named(disk):
  events = metric_writer.EventFile(disk / 'tensorboard')
  tiny_disks.fill(disk)
  with pytest.raises(OSError, match='No space left') as caught:
    for step in range(1000):
      events.add('x' * 100, 1.0, step, 0.0)
      events.flush()
  assert caught.value.filename == str(disk / 'tensorboard')
  tiny_disks.make_room(disk)


def test_answers_go_on(disk):
  records = [{'prompt': f'p{n}', 'prediction': 'a' * 500} for n in range(40)]
  path = disk / 'predictions.jsonl'
  with predictions.GrowingFile(path) as file:
    file.append(records[:1])

    def write():
      for record in records[1:]:
        file.append([record])

    refuses(disk, write, 'predictions.jsonl.partial')
  with predictions.GrowingFile(path) as file:
    done = file.tally.num_lines
    assert 1 <= done < len(records)
    file.append(records[done:])
    file.finish()
  assert list(predictions.read([path])) == records


def test_answers_that_cannot_begin_are_named(disk):
  tiny_disks.fill(disk)
  with (
    pytest.raises(OSError, match='No space left') as caught,
    predictions.GrowingFile(disk / 'predictions.jsonl'),
  ):
    pass
  assert str(disk / '.predictions.jsonl') in str(caught.value.filename)
  tiny_disks.make_room(disk)


def test_checkpoints_before_stay_good_and_the_save_is_made_again(disk):
  def state(step):
    return state_lib.TrainState(
      step=jnp.int32(step),
      trainable={'a': jnp.full((64,), step, jnp.float32)},
      opt_state=(),
      key=jax.random.key_data(jax.random.key(0)),
    )

  def save(step):
    checkpointer = checkpoint.Checkpointer(disk / 'run')
    try:
      checkpointer.save(state(step), {})
      checkpointer.wait()
    finally:
      checkpointer.close()

  save(1)
  refuses(disk, lambda: save(2), str(disk / 'run'))
  assert saved_steps.params_folder(disk / 'run')[1] == 1
  save(2)
  folder, step = saved_steps.params_folder(disk / 'run')
  assert step == 2
  found = saved_steps.read_arrays(folder, [('a',)])
  np.testing.assert_array_equal(next(iter(found.values())), [2.0] * 64)


def test_converted_weights_are_written_again(disk):
  config = helpers.MODULES['llm_to_t5_1_0-add-shared'].llm_config
  source = helpers.Arrays(config, helpers.random_params(l2s.build(config), 1))
  out = disk / 'llm'
  out.mkdir()
  refuses(disk, lambda: converted.save(source, out), str(out))
  converted.save(source, out)
  assert converted.ConvertedFolder(out).shapes() == source.shapes()
