# SPDX-License-Identifier: Apache-2.0
"""Whole verbs on a disk that is full, or may only be read.

They tell what they could not write; what was complete stays good; and the same
command goes on when there is room.
"""

import gc
import re
import shutil

import gin
import pytest
import tiny_disks
from faults import kills
from kept_runs import make

from l2s_jax import __main__ as command_line
from l2s_jax.runtime import os_errors

VERBS = (*kills.VERBS, 'evaluate', 'export hf')
# Room on the disk, in KiB: each verb fails at several places.
ROOMS = (0, 8, 24, 64, 160, 400, 1000, 2500)
DISK_KIB = 16 * 1024
PACKAGES = {'export hf': ('torch', 'transformers')}
# The tests have eight devices.
EIGHT = {
  'infer': ('--gin.BATCH_SIZE=8',),
  'distill': ('--gin.BATCH_SIZE=8',),
}


def jobs(folder, disk):
  """Returns jobs whose outputs are on the disk."""
  found = kills.jobs(folder)
  for verb, job in found.items():
    target = disk / job.target.name
    moved = [a.replace(str(job.target), str(target)) for a in job.arguments]
    moved += EIGHT.get(verb, ())
    found[verb] = kills.Job(tuple(moved), target, job.last)
  bundle = found['export']
  hf = [a.replace('=bundle', '=hf') for a in bundle.arguments]
  found['export hf'] = bundle._replace(arguments=tuple(hf))
  evaluate = [
    a.replace(str(folder / 'llm'), str(disk / 'llm'))
    for a in make.evaluate_arguments(folder, 'llm')
  ]
  found['evaluate'] = kills.Job(
    tuple(evaluate), disk / 'llm', 'eval/metrics-local-validation.json'
  )
  return found


def call(job, capsys):
  """Returns the exit status, and the message of an error."""
  capsys.readouterr()
  try:
    status = command_line.main(job.arguments)
    words = capsys.readouterr().err if status else ''
  except Exception as error:  # As `os_errors` prints it.
    words = os_errors.describe(error) or ''
    assert words, error
    status = 1
  finally:
    gin.clear_config()
  return status, words


def content(job):
  """Returns what a job has left, without files that carry their time."""
  found = kills.content(job)
  if isinstance(found, dict):
    found = {k: v for k, v in found.items() if 'events.out' not in k}
  return found


class Verbs:
  """Jobs of all verbs, and what each leaves where there is room."""

  def __init__(self, folder, disk):
    self._folder = folder
    self._jobs = jobs(folder, disk)
    self._unbroken = {}

  def begin(self, verb, capsys):
    """Removes what a verb has written; returns its job.

    A verb that writes into a folder with inputs finds them there.
    """
    job = self._jobs[verb]
    shutil.rmtree(job.target, ignore_errors=True)
    if verb == 'evaluate':
      shutil.copytree(self._folder / 'llm', job.target)
      shutil.rmtree(job.target / 'eval')
    elif verb == 'features':
      shutil.copytree(self._output('cache', capsys), job.target)
    elif verb == 'train':
      source = self._output('features', capsys)
      moved = [
        a.replace(str(self._folder / 'of_features'), str(source))
        for a in job.arguments
      ]
      job = job._replace(arguments=tuple(moved))
    return job

  def unbroken(self, verb, capsys):
    """Returns what a verb leaves."""
    if verb not in self._unbroken:
      job = self.begin(verb, capsys)
      assert call(job, capsys) == (0, '')
      self._unbroken[verb] = content(job)
      kept = self._folder / 'kept' / verb
      shutil.copytree(job.target, kept)
      shutil.rmtree(job.target)
    return self._unbroken[verb]

  def _output(self, verb, capsys):
    """Returns what a verb leaves, as a folder on another disk."""
    self.unbroken(verb, capsys)
    return self._folder / 'kept' / verb


@pytest.fixture(scope='module')
def disk(tmp_path_factory):
  place = tmp_path_factory.mktemp('full') / 'disk'
  with tiny_disks.mounted(place, kib=DISK_KIB):
    yield place


@pytest.fixture(scope='module')
def verbs(disk):
  return Verbs(disk.parent, disk)


def check_packages(verb):
  for name in PACKAGES.get(verb, ()):
    pytest.importorskip(name)


def some(short):
  """Marks verbs: all in the long run, some in the short one."""
  return pytest.mark.parametrize(
    'verb',
    [
      verb if verb in short else pytest.param(verb, marks=pytest.mark.long)
      for verb in VERBS
    ],
  )


@some(short=('infer', 'convert', 'export'))
def test_a_read_only_disk_is_named(verb, verbs, disk, capsys):
  check_packages(verb)
  expected = verbs.unbroken(verb, capsys)
  job = verbs.begin(verb, capsys)
  gc.collect()  # A file that is open for writing keeps the disk writable.
  with tiny_disks.read_only(disk):
    status, words = call(job, capsys)
  assert status == 1
  assert str(disk) in words
  assert 'Read-only file system; choose another folder' in words
  assert call(job, capsys) == (0, '')
  assert content(job) == expected


def test_a_run_that_may_only_be_read_is_answered_from(verbs, disk, capsys):
  """What reads needs to write nothing beside what it reads."""
  job = verbs.begin('infer', capsys)
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


@some(short=('infer', 'convert'))
def test_a_full_disk_is_named_and_the_same_command_goes_on(
  verb, verbs, disk, capsys
):
  check_packages(verb)
  expected = verbs.unbroken(verb, capsys)
  job = verbs.begin(verb, capsys)
  failures = 0
  for kib in ROOMS:
    tiny_disks.fill(disk, kib)
    status, words = call(job, capsys)
    tiny_disks.make_room(disk)
    assert not kills.is_torn(job, expected)
    if status == 0:
      break
    failures += 1
    assert status == 1, words
    assert str(disk) in words
    # Some compute beforehand what they need.
    assert re.search(
      '(No space left on device|(B|bytes) free, but .* need.*); free some',
      words,
    ), words
  assert failures
  if status:
    assert call(job, capsys) == (0, '')
  assert content(job) == expected
