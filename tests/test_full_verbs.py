# SPDX-License-Identifier: Apache-2.0
"""Whole verbs on a disk that is full, or may only be read.

They tell what they could not write; what was complete stays good; and the same
command goes on when there is room.
"""

import re
import shutil

import gin
import pytest
import tiny_disks
from faults import kills

from l2s_jax import __main__ as command_line
from l2s_jax.runtime import os_errors

VERBS = ('cache', 'infer')
# Room on the disk, in KiB: each verb fails at several places.
ROOMS = (0, 8, 24, 64, 160, 400)
DISK_KIB = 16 * 1024


def jobs(folder, disk):
  """Returns jobs whose outputs are on the disk."""
  found = kills.jobs(folder)
  for verb in VERBS:
    job = found[verb]
    target = disk / job.target.name
    moved = [a.replace(str(job.target), str(target)) for a in job.arguments]
    moved.append('--gin.BATCH_SIZE=8')  # The tests have eight devices.
    found[verb] = kills.Job(tuple(moved), target, job.last)
  return found


def call(job, capsys):
  """Returns the exit status, and the message of an error."""
  capsys.readouterr()
  try:
    status = command_line.main(job.arguments)
    words = capsys.readouterr().err if status else ''
  except Exception as error:  # As `os_errors` prints it.
    import traceback

    traceback.print_exc()
    words = os_errors.describe(error) or ''
    assert words, error
    status = 1
  finally:
    gin.clear_config()
  return status, words


class Verbs:
  """Jobs of all verbs, and what each leaves where there is room."""

  def __init__(self, folder, disk):
    self._jobs = jobs(folder, disk)
    self._unbroken = {}

  def begin(self, verb):
    """Removes what a verb has written; returns its job."""
    job = self._jobs[verb]
    shutil.rmtree(job.target, ignore_errors=True)
    return job

  def unbroken(self, verb, capsys):
    """Returns what a verb leaves."""
    if verb not in self._unbroken:
      job = self.begin(verb)
      assert call(job, capsys) == (0, '')
      self._unbroken[verb] = kills.content(job)
      shutil.rmtree(job.target)
    return self._unbroken[verb]


@pytest.fixture(scope='module')
def disk(tmp_path_factory):
  place = tmp_path_factory.mktemp('full') / 'disk'
  with tiny_disks.mounted(place, kib=DISK_KIB):
    yield place


@pytest.fixture(scope='module')
def verbs(disk):
  return Verbs(disk.parent, disk)


def some(short):
  """Marks verbs: all in the long run, some in the short one."""
  return pytest.mark.parametrize(
    'verb',
    [
      verb if verb in short else pytest.param(verb, marks=pytest.mark.long)
      for verb in VERBS
    ],
  )


@some(short=('infer',))
def test_a_full_disk_is_named_and_the_same_command_goes_on(
  verb, verbs, disk, capsys
):
  expected = verbs.unbroken(verb, capsys)
  job = verbs.begin(verb)
  failures = 0
  for kib in ROOMS:
    tiny_disks.fill(disk, kib)
    status, words = call(job, capsys)
    tiny_disks.make_room(disk)
    assert not kills.is_torn(job, expected)
    if status == 0:
      break
    failures += 1
    assert str(disk) in words
    # Caching computes beforehand what it needs.
    assert re.search(
      'No space left on device; free some|GB free; .*need', words
    )
  assert failures
  if status:
    assert call(job, capsys) == (0, '')
  assert kills.content(job) == expected


def test_a_read_only_disk_is_named(verbs, disk, capsys):
  verb = 'infer'
  expected = verbs.unbroken(verb, capsys)
  job = verbs.begin(verb)
  with tiny_disks.read_only(disk):
    status, words = call(job, capsys)
  assert status == 1
  assert str(disk) in words
  assert 'Read-only file system; choose another folder' in words
  assert call(job, capsys) == (0, '')
  assert kills.content(job) == expected


def test_a_run_that_may_only_be_read_is_answered_from(verbs, disk, capsys):
  """What reads needs to write nothing beside what it reads."""
  job = verbs.begin('infer')
  folder = disk.parent
  shutil.copytree(folder / 'l2s', disk / 'l2s')
  out = folder / 'answers_of_read_only'
  moved = [
    a.replace(str(folder / 'l2s'), str(disk / 'l2s')).replace(
      str(job.target), str(out)
    )
    for a in job.arguments
  ]
  with tiny_disks.read_only(disk):
    assert call(job._replace(arguments=tuple(moved)), capsys) == (0, '')
  expected = verbs.unbroken('infer', capsys)['predictions.jsonl']
  assert (out / 'predictions.jsonl').read_bytes() == expected
