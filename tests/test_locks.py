# SPDX-License-Identifier: Apache-2.0
"""A folder has one writer: the living are left alone, the dead taken over."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from l2s_jax.runtime import locks

HOLDER = """
import pathlib, sys
from l2s_jax.runtime import locks
with locks.held(pathlib.Path(sys.argv[1]), 'MODEL_DIR'):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds `tmp_path / 'run'`."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(tmp_path / 'run')],
    cwd=pathlib.Path(__file__).parent.parent,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout and process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


def test_a_second_writer_is_refused_with_who_the_first_is(holder, tmp_path):
  folder = tmp_path / 'run'
  with (
    pytest.raises(ValueError) as error,
    locks.held(folder, 'MODEL_DIR'),
  ):
    pass
  who = json.loads((folder / locks.NAME).read_text())
  for words in (
    f'MODEL_DIR={folder}',
    f'process {holder.pid} on {who["host"]}, started at {who["start"]}',
  ):
    assert words in str(error.value)


def test_a_killed_writer_leaves_a_lock_that_is_taken_over(
  holder, tmp_path, capsys
):
  holder.kill()
  holder.wait()
  folder = tmp_path / 'run'
  assert (folder / locks.NAME).exists()
  with locks.held(folder, 'MODEL_DIR'):
    said = capsys.readouterr().err
    assert f'process {holder.pid} on' in said
    assert 'that process has ended' in said
    who = json.loads((folder / locks.NAME).read_text())
    assert who['pid'] == os.getpid()
  assert not list(folder.iterdir())


def test_a_process_of_the_same_number_is_not_the_one_that_died(
  tmp_path, capsys
):
  with locks.held(tmp_path, 'MODEL_DIR'):
    content = json.loads((tmp_path / locks.NAME).read_text())
  content['birth'] = 'an earlier boot 1'
  (tmp_path / locks.NAME).write_text(json.dumps(content))
  with locks.held(tmp_path, 'MODEL_DIR'):
    assert 'is taken over' in capsys.readouterr().err


def another_host(folder, beat=0):
  content = {
    'host': 'elsewhere',
    'pid': 1,
    'start': '2026-01-01 00:00:00 +0000',
    'birth': 'x 1',
    'owner': 'another',
    'beat': beat,
  }
  temporary = folder / 'new'
  temporary.write_text(json.dumps(content))
  temporary.replace(folder / locks.NAME)


def test_another_host_that_renews_its_lease_is_left_alone(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(locks, 'LEASE_SECS', 5.0)
  another_host(tmp_path)
  renewal = threading.Timer(0.5, another_host, (tmp_path, 1))
  renewal.start()
  with (
    pytest.raises(ValueError, match='process 1 on elsewhere, started at 2026'),
    locks.held(tmp_path, 'MODEL_DIR'),
  ):
    pass
  renewal.join()


def test_another_host_that_does_not_is_taken_over(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(locks, 'LEASE_SECS', 0.3)
  another_host(tmp_path)
  with locks.held(tmp_path, 'MODEL_DIR'):
    assert 'process 1 on elsewhere' in capsys.readouterr().err


def test_a_lock_is_renewed_and_a_torn_one_taken_over(tmp_path, monkeypatch):
  monkeypatch.setattr(locks, 'RENEWAL_SECS', 0.02)
  (tmp_path / locks.NAME).write_text('{"host": "x')
  with locks.held(tmp_path, 'MODEL_DIR'):
    deadline = threading.Event()
    for _ in range(500):
      if json.loads((tmp_path / locks.NAME).read_text())['beat'] > 2:
        break
      deadline.wait(0.02)
    else:
      raise AssertionError('not renewed')


def test_of_many_that_come_at_once_one_holds(tmp_path):
  another_host(tmp_path)
  content = (tmp_path / locks.NAME).read_bytes()
  # All have found the same dead one; the first to remove it may go on.
  assert locks._remove(tmp_path / locks.NAME, content)
  with locks.held(tmp_path, 'MODEL_DIR'):
    held = (tmp_path / locks.NAME).read_bytes()
    assert not locks._remove(tmp_path / locks.NAME, content)
    assert (tmp_path / locks.NAME).read_bytes() == held
