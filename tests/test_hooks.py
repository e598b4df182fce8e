# SPDX-License-Identifier: Apache-2.0
"""Laws of what a training run does beside its steps: hooks and evaluations."""

import json

import gin
import pytest
import tiny_runs

from l2s_jax import __main__ as command_line
from l2s_jax import checkpoint, eval_plan, hooks, metric_writer

# (step, names of what was logged, 'closed') in the order of calls.
seen: list[tuple[int, set[str]]] = []
closed: list[int] = []


@gin.configurable(module='test_hooks')
class Tracker(hooks.Hook):
  """Keeps what it sees."""

  def __init__(self, every=1):
    self.every = every

  def __call__(self, loop):
    assert int(loop.state.step) == loop.step
    assert loop.params().keys() == loop.state.trainable.keys()
    assert all(isinstance(x, float | int) for x in loop.metrics.values())
    seen.append((loop.step, set(loop.metrics)))

  def close(self):
    closed.append(len(seen))


@gin.configurable(module='test_hooks')
class Stranger:
  """Is no hook."""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('hooks')
  tiny_runs.write_experiments(path)
  return path


@pytest.fixture(autouse=True)
def forget():
  seen.clear()
  closed.clear()
  yield
  gin.clear_config()


TWO = (
  '--gin.EVALUATIONS=(@here/Evaluation(), @there/Evaluation())',
  '--gin.there/Evaluation.task="cldr"',
  '--gin.there/Evaluation.num_examples=6',
  '--gin.there/Evaluation.period=2',
)


def train(folder, run, *bindings):
  """Trains an SLM baseline in this process; returns its exit status."""
  return command_line.main(
    tiny_runs.train_arguments(
      folder,
      'slm_baseline',
      run,
      '--gin.TRAIN_STEPS=4',
      '--gin.train.log_period=3',
      *bindings,
    )
  )


def test_a_hook_of_the_user_sees_steps_and_metrics(folder):
  hook = '--gin.HOOKS=[@Tracker()]'
  assert train(folder, 'tracked', hook) == 0
  assert [step for step, _ in seen] == [1, 2, 3, 4]
  logged = {
    record['step']: record.keys() - {'step', 'time'}
    for record in metric_writer.read(folder / 'tracked')
    if 'train/loss' in record
  }
  assert [names for _, names in seen[:3]] == [set(), set(), logged[3]]
  assert logged[4] | {'eval/loss', 'eval/bleu'} <= seen[3][1]
  assert closed == [4]

  seen.clear()  # At the end, and at multiples of its own.
  every = '--gin.Tracker.every=4'
  assert train(folder, 'tracked', hook, every, '--gin.TRAIN_STEPS=9') == 0
  assert [step for step, _ in seen] == [8, 9]


def test_what_is_no_hook_is_refused(folder, capsys):
  for value, message in (
    ('[@Stranger()]', 'expected an object of a subclass of l2s_jax'),
    ("['Tracker']", "HOOKS[0]='Tracker': expected an object"),
    ('[@Tracker]', 'write @NAME()'),
  ):
    assert train(folder, 'refused', f'--gin.HOOKS={value}') == 2
    assert message in capsys.readouterr().err
  hook = '--gin.HOOKS=[@Tracker()]'
  assert train(folder, 'refused', hook, '--gin.Tracker.every=0') == 2
  assert 'HOOKS[0].every=0: expected a positive' in capsys.readouterr().err
  assert not (folder / 'refused').exists()


def test_several_evaluations_have_scores_and_periods_of_their_own(folder):
  best = '--gin.BEST_METRIC="cldr-validation/loss"'
  assert train(folder, 'two', *TWO, best) == 0
  run = folder / 'two'
  here, there = (
    metric_writer.by_step(run, prefix=f'eval/{name}/')
    for name in ('local-validation', 'cldr-validation')
  )
  assert list(here) == [4] and list(there) == [2, 4]
  assert here[4]['num_examples'] == 10 and there[4]['num_examples'] == 6
  assert checkpoint.steps(run) == [2, 4]
  chosen = json.loads((run / checkpoint.BEST).read_text())
  assert chosen == {
    'metric': 'cldr-validation/loss',
    'score': min(there[step]['loss'] for step in there),
    'step': min(there, key=lambda step: there[step]['loss']),
  }
  # Neither is made again, nor taken for the one evaluation of other runs.
  before = metric_writer.read(run)
  assert train(folder, 'two', *TWO, best) == 0
  assert metric_writer.read(run) == before
  assert train(folder, 'two') == 0
  assert 'loss' in metric_writer.by_step(run, prefix='eval/')[4]


def test_an_evaluation_is_the_same_alone_and_among_others(folder):
  assert train(folder, 'alone', '--gin.TRAIN_STEPS=0') == 0
  assert train(folder, 'among', '--gin.TRAIN_STEPS=0', *TWO) == 0
  alone = metric_writer.by_step(folder / 'alone', prefix='eval/')[0]
  among = metric_writer.by_step(
    folder / 'among', prefix='eval/local-validation/'
  )[0]
  assert alone == among


@pytest.mark.parametrize(
  'bindings, message',
  [
    (
      ('--gin.EVALUATIONS=(@Evaluation(), @Evaluation())',),
      "EVALUATIONS has two of task 'local' and split 'validation'",
    ),
    (
      (*TWO, '--gin.here/Evaluation.split="dev"'),
      "has no split 'dev'; it has train, validation",
    ),
    (
      (*TWO, '--gin.there/Evaluation.task="cldx"'),
      'EVALUATIONS cldx-validation',
    ),
    (
      (*TWO, '--gin.there/Evaluation.period=0'),
      'EVALUATIONS[1].period=0: expected a positive integer.',
    ),
    (
      (*TWO, '--gin.BEST_METRIC=loss'),
      'EVALUATIONS has local-validation, cldr-validation.',
    ),
    (
      (*TWO, '--gin.BEST_METRIC="cldr-validation/blue"'),
      'is not a score of this task; there are cldr-validation/loss',
    ),
    (
      (
        *TWO,
        '--gin.there/Evaluation.split="test"',
        '--gin.BEST_METRIC="cldr-test/loss"',
      ),
      'a checkpoint is chosen on validation data only',
    ),
  ],
)
def test_evaluations_that_cannot_be_are_refused_before_anything_is_computed(
  folder, capsys, bindings, message
):
  assert train(folder, 'refused', *bindings) == 2
  assert message in capsys.readouterr().err
  assert not (folder / 'refused').exists()


LENGTHS = {'inputs': 8, 'targets': 8}


def test_what_an_evaluation_leaves_out_is_as_the_run_has_it():
  run = eval_plan.Planned('a', 'validation', 5, None, LENGTHS)
  plan = eval_plan.make([eval_plan.Evaluation('b')], run, 'b-validation/bleu')
  other = eval_plan.Planned('b', 'validation', 5, None, LENGTHS)
  assert plan.by_prefix == {'b-validation/': other}
  assert plan.best == ('b-validation/', 'bleu')
  assert eval_plan.make([], run, 'bleu').by_prefix == {'': run}
