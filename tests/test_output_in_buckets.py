# SPDX-License-Identifier: Apache-2.0
"""Laws of answers in buckets: the files are those of a local folder."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import time

import bucket_servers
import forked
import helpers
import pytest
import saved_runs
import test_distill
import test_predictions

from l2s_jax.data import distilled
from l2s_jax.evaluation import evaluate
from l2s_jax.inference import infer, output_parts, predictions
from l2s_jax.runtime import locks, preemption, storage

NUM_LINES = 41
NAME = 'predictions.jsonl'


gcs = bucket_servers.gcs_fixture
s3 = bucket_servers.s3_fixture
folder = bucket_servers.folder_fixture


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  system = helpers.system(helpers.MODULES['t5_1_1'])
  params = helpers.random_params(system.module)
  saved_runs.save(path, system, params, steps=(1, 2))
  return path


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """Lines of different lengths, one without a prompt."""
  path = tmp_path_factory.mktemp('input') / 'in.jsonl'
  lines = [
    json.dumps({'prompt': 'ab' * (n % 7 + 1), 'id': n, 'target': f'{n} ș'})
    for n in range(NUM_LINES)
  ]
  lines[3] = '{"prompt": " "}'
  path.write_text('\n'.join(lines))
  return path


def answer(run, source, output_dir, **changes):
  infer.infer(
    **{
      'checkpoint_path': str(run),
      'input': str(source),
      'output_dir': str(output_dir),
      'prompt_length': 10,
      'max_decode_len': 6,
      'batch_size': 8,
    }
    | changes
  )


def content_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def each(monkeypatch):
  """Each group of answers is a part."""
  monkeypatch.setattr(output_parts, 'PART_SECS', -1.0)


def test_a_file_stopped_anywhere_is_that_of_one_go(folder, tmp_path, each):
  test_predictions.write(tmp_path / NAME)
  expected = content_of(tmp_path)[NAME]
  path = folder / NAME
  records = test_predictions.RECORDS
  for num_first in range(len(records) + 1):
    killed = output_parts.growing_file(path)
    killed.__enter__()
    for record in records[:num_first]:
      killed.append([record])
    assert not path.exists()  # The object is the sign of a complete file.
    with output_parts.growing_file(path) as file:
      assert file.tally.num_lines == num_first
      for record in records[num_first:]:
        file.append([record])
      file.finish()
    assert path.read_bytes() == expected
    assert list(predictions.read([path])) == records
    names = {place.name for place, _ in folder.objects()}
    assert names == {NAME, '.predictions.jsonl.digests'}
    path.unlink()
    killed.__exit__(OSError, OSError(), None)


def test_a_job_that_leaves_writes_its_last_part(folder):
  path = folder / NAME
  with (
    pytest.raises(KeyboardInterrupt),
    output_parts.growing_file(path) as file,
  ):
    file.append(test_predictions.RECORDS[:2])
    file.append(test_predictions.RECORDS[2:3])
    raise KeyboardInterrupt
  assert len(list((folder / f'{NAME}.partial').iterdir())) == 1
  with output_parts.growing_file(path) as file:
    assert file.tally.num_lines == 3


@pytest.mark.parametrize('kind', ['changed', 'cut', 'gone', 'twice', 'foreign'])
def test_parts_that_do_not_go_on_are_removed(folder, kind, each, capsys):
  path = folder / NAME
  records = test_predictions.RECORDS
  with output_parts.growing_file(path) as file:
    for record in records:
      file.append([record])
  parts = sorted((folder / f'{NAME}.partial').iterdir())
  assert len(parts) == len(records)
  content = parts[2].read_bytes()
  num_left, num_removed = 2, 2
  if kind == 'changed':
    parts[2].write_bytes(content.replace(b'c', b'd'))
  elif kind == 'cut':
    parts[2].write_bytes(content[:-1])
  elif kind == 'gone':
    parts[2].unlink()
    num_removed = 1
  else:
    num_left, num_removed = 4, 1
    name = 'notes' if kind == 'foreign' else f'{parts[2].name[:32]}{"0" * 32}'
    (folder / f'{NAME}.partial' / name).write_bytes(content)
  with output_parts.growing_file(path) as file:
    assert file.tally.num_lines == num_left
    assert f'removed {num_removed} parts' in capsys.readouterr().err
    for record in records[num_left:]:
      file.append([record])
    file.finish()
  assert list(predictions.read([path])) == records


def test_of_overlapping_parts_the_longest_sequence_counts(
  folder, tmp_path, each
):
  """A process that lost its lock writes beside the next one."""
  path, records = folder / NAME, test_predictions.RECORDS
  test_predictions.write(tmp_path / NAME)
  other = predictions.answered({'prompt': 'c'}, 'another', False)
  with output_parts.growing_file(path) as lost:
    lost.append(records[:1])
    with output_parts.growing_file(path) as file:
      lost.append(records[1:2])
      file.append(records[1:3])
      lost.append([other])
      file.append(records[3:])
  with output_parts.growing_file(path) as file:
    assert file.tally.num_lines == len(records)
    file.finish()
  assert path.read_bytes() == (tmp_path / NAME).read_bytes()
  assert not path.with_name(f'{NAME}.partial').exists()


def test_the_first_error_is_raised(folder, monkeypatch, capsys):
  def fail(path, content):
    raise OSError(f'{path}: no')

  with pytest.raises(KeyboardInterrupt):
    with output_parts.growing_file(folder / NAME) as file:
      file.append(test_predictions.RECORDS[:1])
      monkeypatch.setattr(storage.BucketPath, 'write_bytes', fail)
      raise KeyboardInterrupt
  assert 'the last answers are not uploaded' in capsys.readouterr().err
  with pytest.raises(OSError, match='no'):
    with output_parts.growing_file(folder / NAME) as file:
      file.append(test_predictions.RECORDS[:1])


def test_a_refused_start_leaves_no_local_file(folder, each):
  path = folder / NAME
  with output_parts.growing_file(path) as file:
    file.append(test_predictions.RECORDS[:1])
  file = output_parts.growing_file(path, [{'prompt': 'b'}])
  with pytest.raises(ValueError, match='does not match the input'):
    file.__enter__()
  assert not file.path.parent.exists()


def test_a_changed_file_is_named(folder):
  path = folder / NAME
  with output_parts.growing_file(path) as file:
    file.append(test_predictions.RECORDS)
    file.finish()
  path.write_bytes(path.read_bytes().replace(b'c', b'd'))
  with pytest.raises(ValueError, match=f'{path} was changed after it was wri'):
    list(predictions.read([path]))


@bucket_servers.short_in('s3')
@pytest.mark.parametrize(
  'numbers', [(1,), pytest.param((1, 2), marks=pytest.mark.long)]
)
def test_answers_scores_and_shards_are_those_of_a_local_folder(
  run, source, folder, tmp_path, each, capsys, numbers
):
  for num_shards in numbers:
    places = folder / str(num_shards), tmp_path / str(num_shards)
    for shard in range(num_shards):
      for place in places:
        answer(
          run,
          source,
          place,
          shard=shard,
          num_shards=num_shards,
          metrics=('exact_match',),
        )
    in_bucket, local = map(content_of, places)
    assert in_bucket == local
    assert {'scores.json', predictions.SETTINGS} <= local.keys()
  # A kill after the complete file left a part.
  path = folder / '1' / NAME
  (folder / '1' / f'{NAME}.partial' / 'left').write_bytes(b'')
  lock = folder / '1' / f'.{NAME}.lock'
  owner = {'host': socket.gethostname(), 'pid': 1, 'start': '', 'birth': 'x'}
  lock.write_text(json.dumps({**owner, 'beat': 0, 'owner': 'dead'}))
  capsys.readouterr()
  answer(run, source, folder / '1')
  assert 'is complete: nothing to answer' in capsys.readouterr().err
  assert path.is_file() and not path.with_name(f'{NAME}.partial').exists()
  assert not lock.exists()
  with pytest.raises(ValueError, match='holds the answers of another job'):
    answer(run, source, folder / '1', max_decode_len=5)


def test_a_second_writer_is_refused_by_the_lock(run, source, folder):
  with locks.held(folder, 'INFER_OUTPUT_DIR', f'.{NAME}.lock'):
    with pytest.raises(
      ValueError, match='INFER_OUTPUT_DIR=.* is being written'
    ):
      answer(run, source, folder)
  assert not (folder / NAME).exists()


def start(run, *arguments, module='frequent_parts'):
  return forked.Popen(
    [
      sys.executable,
      '-m',
      module,
      'infer',
      '--gin_file=gin_configs/runs/infer.gin',
      f'--gin.CHECKPOINT_PATH={run}',
      '--gin.PROMPT_LENGTH=10',
      '--gin.MAX_DECODE_LEN=6',
      *arguments,
    ],
    stderr=subprocess.PIPE,
    text=True,
  )


def assert_second_is_refused(process, run, folder, name, arguments):
  process.send_signal(signal.SIGSTOP)
  who = json.loads((folder / f'.{name}.lock').read_text())
  second = start(run, *arguments)
  _, told = second.communicate()
  assert second.returncode and (
    f'INFER_OUTPUT_DIR={folder} is being written by process {process.pid} on '
    f'{who["host"]}, started at {who["start"]}.'
  ) in ' '.join(told.split())


@pytest.mark.parametrize(
  'signum',
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
)
def test_a_signal_loses_no_answer(run, gcs, request, tmp_path, signum):
  folder = bucket_servers.own_folder('gs', request)
  source = tmp_path / 'in.txt'
  source.write_text(''.join(f'{n}\n' for n in range(5_000)))
  process = start(
    run,
    f'--gin.INPUT={source}',
    f'--gin.INFER_OUTPUT_DIR={folder}',
    '--gin.BATCH_SIZE=8',
    module='l2s_jax',
  )
  told = ''
  while not re.search(r'\b[1-9]\d+/5000', told):
    assert (piece := process.stderr.read(20)), told
    told += piece
  assert not (folder / f'{NAME}.partial').exists()
  process.send_signal(signum)
  _, rest = process.communicate(timeout=60)
  status = {signal.SIGTERM: preemption.EXIT_CODE}
  assert process.returncode == status.get(signum, preemption.INTERRUPTED), rest
  assert f'{signum.name}: saving what is done, then exiting.' in rest
  assert not (folder / f'.{NAME}.lock').exists()
  with output_parts.growing_file(folder / NAME) as file:
    assert file.tally.num_lines >= int(re.findall(r'(\d+)/5000', told)[-1])


# Answers are there, and the main thread is busy.
BUSY = """
import os, signal, sys, time
from l2s_jax.inference import output_parts
from l2s_jax.runtime import preemption, storage
with preemption.Watcher(grace_secs=12) as watcher:
  path = storage.of(sys.argv[1])
  with output_parts.growing_file(path, watcher=watcher) as file:
    file.append([{'prompt': 'a', 'prediction': 'b'}])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@bucket_servers.short_in('s3')
def test_a_busy_process_uploads_its_answers_after_a_signal(folder):
  result = subprocess.run(
    [sys.executable, '-c', BUSY, str(folder / NAME)],
    capture_output=True,
    text=True,
  )
  assert result.returncode == preemption.EXIT_CODE, result.stderr
  with output_parts.growing_file(folder / NAME) as file:
    assert file.tally.num_lines == 1


@bucket_servers.short_in('gs')
@pytest.mark.parametrize(
  'num_kills', [1, pytest.param(4, marks=pytest.mark.long)]
)
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
  run, folder, tmp_path, num_kills
):
  rng = random.Random(num_kills)
  source = tmp_path / 'in.txt'
  num_lines = 600 * num_kills
  source.write_text(
    ''.join(f'{n}\n' * (n % 9 > 0) or '\n' for n in range(2 * num_lines))
  )
  name = 'predictions-00001-of-00002.jsonl'
  partial = folder / f'{name}.partial'
  arguments = (
    f'--gin.INPUT={source}',
    f'--gin.INFER_OUTPUT_DIR={folder}',
    '--gin.BATCH_SIZE=8',
    '--shard=1',
    '--num_shards=2',
  )
  num_parts = 0
  for _ in range(num_kills):
    process = start(run, *arguments)
    is_first = num_parts == 0
    num_parts += rng.randrange(5, 20)
    while process.poll() is None:
      if len(partial.objects()) > num_parts:
        time.sleep(rng.random() / 20)
        if is_first:
          assert_second_is_refused(process, run, folder, name, arguments)
        process.kill()
        break
      time.sleep(0.001)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    num_parts = len(partial.objects())
  process = start(run, *arguments)
  _, told = process.communicate()
  assert process.returncode == 0, told
  assert re.search(
    rf'\d of {num_lines} lines are answered; skipping them.', told
  )
  assert 'is taken over; that process has ended' in told
  unbroken = tmp_path / 'unbroken'
  answer(run, source, unbroken, batch_size=64, shard=1, num_shards=2)
  assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
  assert {path.name for path, _ in folder.objects()} == {
    path.name for path in unbroken.iterdir()
  }


@bucket_servers.short_in('s3')
def test_killed_in_the_upload_of_a_part_it_ends_as_if_it_had_not_been(
  request, run, folder, tmp_path
):
  source = tmp_path / 'in.txt'
  source.write_text(''.join(f'{n}\n' for n in range(300)))
  arguments = (
    f'--gin.INPUT={source}',
    f'--gin.INFER_OUTPUT_DIR={folder}',
    '--gin.BATCH_SIZE=8',
  )
  upstream = request.getfixturevalue('gcs' if folder.scheme == 'gs' else 's3')
  # After the lock, the settings, the config and two parts.
  with bucket_servers.killing(upstream, folder.scheme, 5) as killing:
    process = start(run, *arguments)
    told = killing.wait(process)
  assert process.returncode == -signal.SIGKILL, told
  assert len(list((folder / f'{NAME}.partial').iterdir())) == 2
  process = start(run, *arguments)
  _, told = process.communicate()
  assert process.returncode == 0, told
  assert re.search(r'[1-9]\d* of 300 lines are answered; skipping', told)
  answer(run, source, tmp_path / 'unbroken')
  found, expected = content_of(folder), content_of(tmp_path / 'unbroken')
  assert found[NAME] == expected[NAME]
  assert found.keys() == expected.keys()


@pytest.mark.long  # Clients wait before they ask again.
def test_a_flaky_store_gets_each_line_once(request, run, source, folder):
  kinds = ('busy', 'cut')

  def trouble(number, _):
    return '' if number % 5 else kinds[number // 5 % len(kinds)]

  upstream = request.getfixturevalue('gcs' if folder.scheme == 'gs' else 's3')
  with bucket_servers.proxy(upstream, trouble) as proxy:
    variables = {'AWS_ENDPOINT_URL': proxy.url} if folder.scheme == 's3' else {}
    with bucket_servers.environment(**variables):
      process = start(
        run,
        f'--gin.INPUT={source}',
        f'--gin.INFER_OUTPUT_DIR={folder}',
        '--gin.BATCH_SIZE=8',
      )
      _, told = process.communicate(timeout=200)
  assert process.returncode == 0, told
  assert len(proxy.methods) > 20
  records = list(predictions.read([folder / NAME]))
  assert [record.get('id') for record in records if 'id' in record] == [
    number for number in range(NUM_LINES) if number != 3
  ]
  answer(run, source, folder)  # Compares the file with its input.


@bucket_servers.short_in('gs')
def test_distilled_answers_are_those_of_a_local_folder(run, folder, tmp_path):
  bindings = test_distill.write_task(tmp_path)
  found = []
  for place in (folder, tmp_path / 'local'):
    for shard in (1, 0):
      test_distill.gin_of(bindings)
      test_distill.write(run, place, shard=shard, num_shards=2)
    opened = distilled.open_folder(str(place))
    of_task = bindings | {'distilled_task.distill_dir': str(place)}
    texts = test_distill.texts_of(of_task, 'train')
    assert len(texts) > 3
    found.append((opened.digest, list(opened.records()), texts))
  assert found[0] == found[1]
  path = folder / 'predictions-00000-of-00002.jsonl'
  path.write_bytes(path.read_bytes()[:-1] + b' ')
  with pytest.raises(ValueError, match=f'{path} is damaged'):
    list(distilled.open_folder(str(folder)).records())


@bucket_servers.short_in('s3')
def test_an_evaluation_is_that_in_a_local_folder(run, folder, tmp_path):
  bindings = test_distill.write_task(tmp_path)
  places = folder, tmp_path / 'local'
  for place in places:
    test_distill.gin_of(bindings)
    evaluate.evaluate(
      str(run),
      'local',
      test_distill.LENGTHS,
      steps='all',
      batch_size=8,
      num_bootstrap_samples=10,
      output_dir=str(place),
    )
  found = [place / 'eval' for place in places]
  names = [{path.name for path in place.iterdir()} for place in found]
  assert names[0] == names[1]
  assert any(name.startswith('curves') for name in names[0])
  texts = [name for name in names[0] if name.endswith(('.json', '.jsonl'))]
  assert len(texts) == 3
  for name in texts:
    assert (found[0] / name).read_text() == (found[1] / name).read_text()
  (events,) = [
    path for path, _ in found[0].objects() if 'tensorboard' in path.parts
  ]
  assert events.stat().st_size
