# SPDX-License-Identifier: Apache-2.0
"""Laws of what a training run does beside its steps: hooks and evaluations."""

import json

import gin
import pytest
import tiny_runs

from l2s_jax import __main__ as command_line
from l2s_jax.evaluation import metric_writer
from l2s_jax.runtime import integrity
from l2s_jax.training import eval_plan
from l2s_jax.training import hooks as hooks_lib
from l2s_jax.weights import saved_steps

# By `every`: the step and what was logged at it, of each call.
seen: dict[int | None, list[tuple[int, set[str]]]] = {}
closed: list[int | None] = []


@gin.configurable(module='test_hooks')
class Tracker(hooks_lib.Hook):
  """Keeps what it sees."""

  def __init__(self, every=1):
    self.every = every

  def __call__(self, loop):
    assert int(loop.state.step) == loop.step
    assert loop.params().keys() == loop.state.trainable.keys()
    assert all(isinstance(x, float | int) for x in loop.metrics.values())
    seen.setdefault(self.every, []).append((loop.step, set(loop.metrics)))

  def close(self):
    closed.append(self.every)


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
  hooks = ('--gin.HOOKS=[@Tracker(), @rare/Tracker()]',)
  assert train(folder, 'tracked', *hooks, '--gin.rare/Tracker.every=3') == 0
  assert [step for step, _ in seen[1]] == [1, 2, 3, 4]
  # Multiples of its own, and the end.
  assert [step for step, _ in seen[3]] == [3, 4]
  logged = {
    record['step']: record.keys() - {'step', 'time'}
    for record in metric_writer.read(folder / 'tracked')
    if 'train/loss' in record
  }
  assert [names for _, names in seen[1][:3]] == [set(), set(), logged[3]]
  assert logged[4] | {'eval/loss', 'eval/bleu'} <= seen[1][3][1]
  assert len(closed) == 2 and set(closed) == {1, 3}


def test_what_is_no_hook_is_refused(folder, capsys):
  for value, message in (
    ('[@Stranger()]', 'expected an instance of a subclass of l2s_jax'),
    ("['Tracker']", "HOOKS[0]='Tracker': expected an instance"),
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
  assert saved_steps.steps(run) == [2, 4]
  chosen = json.loads((run / saved_steps.BEST).read_text())
  assert integrity.unseal(chosen) == {
    'metric': 'cldr-validation/loss',
    'score': min(there[step]['loss'] for step in there),
    'step': min(there, key=lambda step: there[step]['loss']),
  }
  before = metric_writer.read(run)  # Neither is made again.
  assert train(folder, 'two', *TWO, best) == 0
  assert metric_writer.read(run) == before


def test_scores_of_one_evaluation_are_not_taken_for_those_of_another(tmp_path):
  records = [
    {'eval/bleu': 1.0},
    {'eval/cldr/bleu': 2.0},  # Of a mixture, by its tasks.
    {'eval/cldr-validation/bleu': 3.0},
    {'eval/cldr-test/news/bleu': 4.0},
  ]
  writer = metric_writer.MetricWriter(tmp_path)
  for step, scores in enumerate(records):
    writer.write(step // 2, scores)
  writer.close()
  assert eval_plan.logged(tmp_path, '') == {0: {'bleu': 1.0, 'cldr/bleu': 2.0}}
  found = eval_plan.logged(tmp_path, 'cldr-validation/')
  assert found == {1: {'bleu': 3.0}}


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
      "EVALUATIONS has two evaluations of task 'local' and split 'validation'",
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
      'is not a score of this task. Its scores are cldr-validation/loss',
    ),
    (
      (
        *TWO,
        '--gin.there/Evaluation.split="test"',
        '--gin.BEST_METRIC="cldr-test/loss"',
      ),
      'select checkpoints on validation data only',
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
