# SPDX-License-Identifier: Apache-2.0
"""Tables, verdicts and plots."""

from typing import Any

import pytest

from l2s_jax.evaluation import report


def test_table_aligns_numbers_and_leaves_missing_cells_empty():
  table = report.markdown_table(
    [{'name': 'one', 'size': 12345, 'score': 1.234}, {'name': 'second'}],
    {'name': 'system', 'size': 'parameters', 'score': 'BLEU'},
  )
  assert table == (
    '| system | parameters | BLEU |\n'
    '| ------ | ---------: | ---: |\n'
    '| one    |     12,345 | 1.23 |\n'
    '| second |            |      |\n'
  )


def controls(right, zero, other, name='bleu', task='', **more):
  """Returns what an evaluation found, by control; `more` with the right."""
  values = {'none': right, 'zero': zero, 'other': other}
  return {
    control: {f'{task}{name}': value, f'{task}loss': 3.0}
    | (
      {f'{task}{key}': number for key, number in more.items()}
      if control == 'none'
      else {}
    )
    for control, value in values.items()
  }


@pytest.mark.parametrize(
  'right,zero,other,verdict',
  [
    (30.0, 5.0, 4.0, 'uses what the LLM read'),
    (
      30.0,
      29.5,
      4.0,
      'reads the states of the LLM but does not gain from them',
    ),
    (30.0, 5.0, 30.2, 'does not use the LLM'),
    (30.0, 29.5, 30.2, 'does not use the LLM'),
  ],
)
@pytest.mark.parametrize('name', ['bleu', 'rougeLsum', 'token_f1'])
def test_verdict_needs_both_controls_to_be_worse(
  right, zero, other, verdict, name
):
  sentence = report.describe_controls(controls(right, zero, other, name))
  assert sentence.startswith(f'The SLM {verdict}: ')
  assert report.MAIN_SCORES[name] in sentence
  assert f'{right:.1f}' in sentence and f'{other:.1f}' in sentence


@pytest.mark.parametrize(
  'zero,other,verdict',
  [
    (95.0, 96.0, 'uses what the LLM read'),
    (40.5, 96.0, 'reads the states of the LLM but does not gain from them'),
    (95.0, 39.0, 'does not use the LLM'),
    (5.0, 4.0, 'does not use the LLM'),
  ],
)
def test_verdict_by_an_error_rate_goes_the_other_way(zero, other, verdict):
  for interval in ({}, {'ter_low': 39.0, 'ter_high': 41.0}):
    found = controls(40.0, zero, other, 'ter', **interval)
    sentence = report.describe_controls(found)
    assert sentence.startswith(f'The SLM {verdict}: TER 40.0')


def test_figures_of_other_controls_are_given_beside_the_verdict():
  by_control = controls(30.0, 5.0, 4.0) | {'layer_0': {'bleu': 7.0}}
  assert report.describe_controls(by_control).endswith(
    '5.0 with zeros, 7.0 with layer 0 of the LLM.'
  )
  assert report.allows_verdict(by_control)
  assert not report.allows_verdict(('none', 'zero', 'layer_0'))


@pytest.mark.parametrize('low,used', [(28.0, True), (27.0, False)])
def test_verdict_goes_by_the_interval_where_there_is_one(low, used):
  sentence = report.describe_controls(
    controls(30.0, 5.0, 27.5, bleu_low=low, bleu_high=32.0)
  )
  assert sentence.startswith('The SLM uses') == used
  assert f'BLEU 30.0 [{low:.1f}, 32.0] with the right prompt' in sentence


@pytest.mark.parametrize('other,used', [(1.5, True), (1.2, False)])
def test_verdict_of_unknown_metrics_goes_by_the_loss(other, used):
  by_control = {
    control: {'my_metric': 0.5, 'loss': loss}
    for control, loss in {'none': 1.2, 'zero': 4.0, 'other': other}.items()
  }
  sentence = report.describe_controls(by_control)
  assert sentence.startswith('The SLM uses') == used
  assert 'loss 1.200 with the right prompt' in sentence


def test_each_task_of_a_mixture_has_its_verdict():
  one = controls(30.0, 5.0, 4.0, task='one/')
  two = controls(20.0, 20.0, 20.0, 'rougeLsum', task='two/')
  sentences = report.describe_controls(
    {control: one[control] | two[control] for control in one}
  ).splitlines()
  assert sentences[0].startswith('one: The SLM uses what the LLM read: BLEU')
  assert sentences[1].startswith('two: The SLM does not use the LLM: ROUGE')
  assert len(sentences) == 2


NUMBERS = {
  'bleu': 12.0,
  'bleu_low': 11.0,
  'bleu_high': 13.0,
  'task/min_references': 2,
  'num_examples': 100,
  'loss': 1.5,
  'price_low': 3.0,
}


def test_counts_and_ends_of_intervals_are_no_scores():
  assert report.score_names(NUMBERS) == ['bleu', 'loss', 'price_low']


def test_the_first_of_equally_good_steps_is_the_best():
  by_step = {8: {'loss': 1.0}, 4: {'loss': 1.0}, 2: {'loss': 2.0}, 1: {}}
  assert report.best_step(by_step, 'loss') == 4
  by_step = {8: {'bleu': 1.0}, 4: {'bleu': 3.0}, 2: {'bleu': 3.0}}
  assert report.best_step(by_step, 'bleu') == 2
  by_step = {8: {'a/ter': 60.0}, 4: {'a/ter': 40.0}, 2: {'a/ter': 40.0}}
  assert report.best_step(by_step, 'a/ter') == 2


def test_table_of_steps_marks_the_best():
  by_step = {
    10: {'bleu': 12.0, 'loss': 1.5, 'num_examples': 100},
    5: {'bleu': 13.0, 'bleu_low': 12.5, 'loss': 1.75},
  }
  assert report.steps_table(by_step) == (
    '| step |     bleu |     loss |\n'
    '| ---: | -------: | -------: |\n'
    '|    5 | **13.0** |     1.75 |\n'
    '|   10 |     12.0 | **1.50** |\n'
  )


def test_curves_are_drawn_also_where_a_step_lacks_a_score(tmp_path):
  path = tmp_path / 'curves.png'
  by_control = {
    'none': {4: NUMBERS, 8: {'bleu': 14.0}},
    'zero': {8: {'bleu': 2.0, 'loss': 5.0}},
  }
  report.plot_curves(by_control, path, title='a task')
  assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('lower_is_better', [False, True])
def test_up_is_better_in_the_plot_of_quality(
  lower_is_better, tmp_path, monkeypatch
):
  figures: list[Any] = []
  monkeypatch.setattr('matplotlib.pyplot.close', figures.append)
  report.plot_quality_against_speed(
    [
      {'system': 'one', 'ms': 1.0, 'quality': 40.0},
      {'system': 'other', 'ms': 2.0, 'quality': 60.0},
    ],
    tmp_path / 'speed.png',
    quality='quality',
    quality_label='TER',
    speed='ms',
    speed_label='ms per token',
    title='news',
    lower_is_better=lower_is_better,
  )
  (axes,) = figures.pop().axes
  bottom, top = axes.get_ylim()
  assert (bottom > top) == lower_is_better
  assert ('lower is better' in axes.get_ylabel()) == lower_is_better
