# SPDX-License-Identifier: Apache-2.0
"""Of two programs in one folder, the second is refused and changes nothing."""

import json

import gin
import pytest
from faults import kills
from kept_runs import make

from l2s_jax import __main__ as command_line
from l2s_jax.runtime import locks

# The lock of each verb, beside what it writes.
LOCKS = {
  'train': 'of_train/.lock',
  'evaluate': 'l2s/eval/.lock',
  'infer': 'of_infer/.predictions.jsonl.lock',
  'distill': 'of_distill/.predictions.jsonl.lock',
  'cache': 'of_cache/.lock-0-of-1',
  'features': 'of_features/.lock-features-0-of-1-0',
  'convert': '.of_convert.lock',
  'export': '.of_export.lock',
}


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """The inputs of all verbs; those that read a cache have one."""
  folder = tmp_path_factory.mktemp('inputs')
  jobs = kills.jobs(folder)
  run(jobs['cache'].arguments)
  (folder / 'of_cache').rename(folder / 'of_features')
  return folder


def run(arguments):
  try:
    return command_line.main(list(arguments))
  finally:
    gin.clear_config()


def arguments_of(verb, folder):
  if verb == 'evaluate':
    return make.evaluate_arguments(folder, 'l2s')
  extra = {
    'train': ('--gin.USE_FEATURES=False',),
    'infer': ('--gin.BATCH_SIZE=8',),  # The tests have eight devices.
    'distill': ('--gin.BATCH_SIZE=8',),
  }
  return (*kills.jobs(folder)[verb].arguments, *extra.get(verb, ()))


def content(folder):
  return {
    (path.relative_to(folder), path.read_bytes())
    for path in folder.rglob('*')
    if path.is_file() and 'lock' not in path.name  # It is renewed.
  }


@pytest.mark.parametrize('verb', LOCKS)
def test_a_second_program_is_refused_with_who_the_first_is(
  verb, inputs, capsys
):
  arguments = arguments_of(verb, inputs)
  path = inputs / LOCKS[verb]
  # What the first one has written of a folder that appears when complete.
  part = inputs / f'.of_{verb}.unfinished' / 'part'
  part.parent.mkdir()
  part.write_text('half')
  with locks.held(path.parent, 'FOLDER', path.name):
    who = json.loads(path.read_text())
    before = content(inputs)
    capsys.readouterr()
    status = run(arguments)
    assert content(inputs) >= before
  words = ' '.join(capsys.readouterr().err.split())
  assert status == 2, words
  assert (
    f'is being written by process {who["pid"]} on {who["host"]}, started at '
    f'{who["start"]}. '
  ) in words
  assert str(path) in words  # What to remove, if it has died.
