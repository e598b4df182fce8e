# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and sentences of what an evaluation found.

A *score* is a number of an evaluation that has a better end; counts of examples
and the ends of confidence intervals, `<score>_low` and `<score>_high`, are not.
Scores of a mixture are named `<task>/<score>`.
"""

import contextlib
import itertools
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

# The numbers of an evaluation, counts among them, by name.
Numbers = Mapping[str, float | int]
# What a table shows, or a JSON file keeps: values by the column's key.
TableRow = dict[str, Any]

# The first of these that a task has is what it is judged by.
MAIN_SCORES = {
  'bleu': 'BLEU',
  'rougeLsum': 'ROUGE-Lsum',
  'token_f1': 'token F1',
  'chrf': 'chrF',
  'exact_match': 'exact match',
  'loss': 'loss',
}
# Where there is no interval: below this difference in points, test sets of a
# thousand short sentences do not tell two systems apart.
_NOISE_POINTS = 1.0
# The loss, of all answers' tokens and with the same references, wavers less.
_NOISE_NATS = 0.01
# What Z the SLM gets (`controls.py`), as tables and plots call it.
CONTROLS = {
  'none': 'the right prompt',
  'zero': 'Z = 0',
  'other': 'another prompt',
  'untrained': 'an untrained encoder',
  'layer_0': 'layer 0 of the LLM',
}
_OF_VERDICT = ('none', 'zero', 'other')
# Those below 1, of which the third digit tells.
_OF_TOKENS = ('loss', 'token_accuracy')
_UNITS = {'loss': 'nats per target token', 'token_accuracy': 'share of tokens'}
_COUNTS = ('num_', 'min_references', 'max_references')


def score_names(scores: Numbers) -> list[str]:
  """Returns which of an evaluation's numbers are scores."""
  return [
    name
    for name in scores
    if not name.rpartition('/')[2].startswith(_COUNTS)
    and not is_interval_end(name, scores)
  ]


def is_interval_end(name: str, scores: Numbers) -> bool:
  """Returns whether a number is an end of another one's interval."""
  return any(
    name.endswith(end) and name.removesuffix(end) in scores
    for end in ('_low', '_high')
  )


def best_step(by_step: Mapping[int, Numbers], name: str) -> int:
  """Returns the first step with the best score: the least loss, else the most.

  Args:
    by_step: scores by step.
    name: of a score that at least one step has.
  """
  sign = -1 if name.endswith('loss') else 1
  return max(
    (step for step in by_step if name in by_step[step]),
    key=lambda step: (sign * by_step[step][name], -step),
  )


def columns_in(
  rows: Sequence[TableRow], columns: Mapping[str, str]
) -> dict[str, str]:
  """Returns the columns of a table that a row has something in."""
  return {
    key: heading
    for key, heading in columns.items()
    if any(key in row for row in rows)
  }


def markdown_table(
  rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> str:
  """Returns a Markdown table.

  Args:
    rows: values by key; a missing one leaves its cell empty.
    columns: heading by key, in order. Numbers are right-aligned; floats have
      one digit behind the point from 10 on, two below.
  """
  cells = [[_cell(row.get(key)) for key in columns] for row in rows]
  numeric = [
    any(isinstance(row.get(key), int | float) for row in rows)
    for key in columns
  ]
  headings = list(columns.values())
  widths = [
    max(map(len, (heading, *(line[i] for line in cells))))
    for i, heading in enumerate(headings)
  ]
  rule = [
    '-' * (width - 1) + ':' if right else '-' * width
    for width, right in zip(widths, numeric, strict=True)
  ]
  lines = [
    [
      cell.rjust(width) if right else cell.ljust(width)
      for cell, width, right in zip(line, widths, numeric, strict=True)
    ]
    for line in (headings, *cells)
  ]
  lines.insert(1, rule)
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def _cell(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, int):
    return f'{value:,}'
  if isinstance(value, float):
    return f'{value:.1f}' if abs(value) >= 10 else f'{value:.2f}'
  return str(value).replace('|', '\\|')


def steps_table(by_step: Mapping[int, Numbers]) -> str:
  """Returns a Markdown table, steps by scores, the best of each in bold."""
  names = dict.fromkeys(
    name for scores in by_step.values() for name in score_names(scores)
  )
  best = {name: best_step(by_step, name) for name in names}
  rows = [
    {'step': step}
    | {
      name: f'**{_cell(scores[name])}**' if best[name] == step else scores[name]
      for name in names
      if name in scores
    }
    for step, scores in sorted(by_step.items())
  ]
  return markdown_table(rows, {'step': 'step'} | {name: name for name in names})


def lengths_table(by_bin: Mapping[str, Numbers], task: str) -> str:
  """Returns a Markdown table, words of the reference by scores.

  Args:
    by_bin: from `length_bins.scores`, in any order.
    task: the heading of its bins.
  """
  names = dict.fromkeys(
    name for scores in by_bin.values() for name in score_names(scores)
  )
  rows = [
    {'bin': name, 'num_examples': int(by_bin[name]['num_examples'])}
    | {score: with_interval(by_bin[name], score) for score in names}
    for name in bins_in_order(by_bin)
  ]
  return markdown_table(
    rows,
    {'bin': f'{task}: words', 'num_examples': 'examples'}
    | {name: name for name in names},
  )


def bins_in_order(names: Iterable[str]) -> list[str]:
  """Returns names of bins, the shortest first; JSON sorts '11+' before '6-10'.

  Args:
    names: from `length_bins.names`.
  """
  return sorted(names, key=lambda name: int(re.split('[-+]', name)[0]))


def with_interval(scores: Numbers, name: str) -> str | None:
  """Returns a cell: '23.5 [22.1, 24.8]', the value alone, or None."""
  if name not in scores:
    return None
  digits = 3 if name.rpartition('/')[2] in _OF_TOKENS else 1
  text = f'{scores[name]:.{digits}f}'
  if f'{name}_low' in scores:
    low, high = scores[f'{name}_low'], scores[f'{name}_high']
    text += f' [{low:.{digits}f}, {high:.{digits}f}]'
  return text


def describe_controls(by_control: Mapping[str, Numbers]) -> str:
  """Returns what the controls allow to say, a sentence for each task.

  A task is judged by the first of `MAIN_SCORES` that it has. A control is worse
  if it is so by more than the right prompt's interval or, without intervals,
  by more than noise. The SLM uses the LLM if both are; if only another prompt's
  states are worse than the right ones, it does read them, to no gain.

  Args:
    by_control: the numbers of an evaluation by control: 'none', with the LLM's
      states of the right prompt; 'zero', with zeros in their place; 'other',
      with the states of another prompt; of other controls the figures are
      given. All have each task's loss.
  """
  return '\n'.join(
    (f'{task.removesuffix("/")}: ' if task else '')
    + _describe_task(task, by_control)
    for task in task_prefixes(by_control['none'])
  )


def _describe_task(prefix: str, by_control: Mapping[str, Numbers]) -> str:
  right = by_control['none']
  name = main_score(right, prefix)
  key = f'{prefix}{name}'
  if name == 'loss':
    bound, sign = right[key] + _NOISE_NATS, -1
  else:
    sign = 1
    bound = right.get(f'{key}_low', right[key] - _NOISE_POINTS)
  other_is_worse, zero_is_worse = (
    sign * by_control[control][key] < sign * bound
    for control in ('other', 'zero')
  )
  verdict = 'does not use the LLM'
  if other_is_worse and zero_is_worse:
    verdict = 'uses what the LLM read'
  elif other_is_worse:
    verdict = 'heeds what the LLM read, and does as well without'

  def figure(control: str) -> str | None:
    return with_interval(by_control[control], key)

  more = ''.join(
    f', {figure(control)} with {label}'
    for control, label in CONTROLS.items()
    if control in by_control and control not in _OF_VERDICT
  )
  return (
    f'The SLM {verdict}: {MAIN_SCORES[name]} {figure("none")} with the right '
    f'prompt read by the LLM, {figure("other")} with another prompt, '
    f'{figure("zero")} with zeros{more}.'
  )


def allows_verdict(by_control: Collection[str]) -> bool:
  """Returns whether `describe_controls` has what it needs."""
  return set(_OF_VERDICT) <= set(by_control)


def main_score(scores: Collection[str], prefix: str = '') -> str:
  """Returns what a task is judged by, of its scores; see `MAIN_SCORES`.

  Args:
    scores: of an evaluation.
    prefix: 'task/' of a mixture's task.
  """
  return next(name for name in MAIN_SCORES if f'{prefix}{name}' in scores)


def task_prefixes(scores: Iterable[str]) -> list[str]:
  """Returns '', or of a mixture 'task/' of each task: all have a loss."""
  return [
    name.removesuffix('loss')
    for name in scores
    if name == 'loss' or name.endswith('/loss')
  ]


def plot_curves(
  by_line: Mapping[str, Mapping[int, Numbers]],
  path: str | pathlib.Path,
  *,
  title: str,
) -> None:
  """Writes a PNG with a panel for each score against the step.

  Args:
    by_line: the numbers of each step's evaluation by the name of a line; it has
      its confidence intervals where there are any.
    path: of the PNG.
    title: above the panels.
  """
  scores = [
    scores for by_step in by_line.values() for scores in by_step.values()
  ]
  with _figure(_all_names(scores), path, title) as panels:
    for name, panel in panels.items():
      for (label, by_step), style in _styled(by_line):
        steps = sorted(step for step in by_step if name in by_step[step])
        _plot_line(
          panel, steps, [by_step[s] for s in steps], name, label, style
        )
      panel.set_xlabel('step')


def plot_lengths(
  by_line: Mapping[str, Mapping[str, Numbers]],
  path: str | pathlib.Path,
  *,
  title: str,
) -> None:
  """Writes a PNG with a panel for each score against the reference's length.

  Args:
    by_line: numbers by bin, see `length_bins.scores`, by the name of a line.
    path: of the PNG.
    title: above the panels.
  """
  bins = bins_in_order({name for by_bin in by_line.values() for name in by_bin})
  scores = [scores for by_bin in by_line.values() for scores in by_bin.values()]
  with _figure(_all_names(scores), path, title) as panels:
    for name, panel in panels.items():
      for (label, by_bin), style in _styled(by_line):
        there = [i for i, b in enumerate(bins) if name in by_bin.get(b, {})]
        _plot_line(
          panel, there, [by_bin[bins[i]] for i in there], name, label, style
        )
      panel.set_xticks(range(len(bins)), bins)
      panel.set_xlabel('words of the reference')


def _styles() -> Iterator[dict[str, Any]]:
  """Yields colours and markers without end, told apart by all eyes.

  The colours are those of Okabe and Ito, without yellow, which is faint.
  """
  colours = (
    '#0072B2',
    '#D55E00',
    '#009E73',
    '#CC79A7',
    '#000000',
    '#E69F00',
    '#56B4E9',
  )
  # Of other periods, so that no two lines of a plot look the same.
  for colour, marker in zip(
    itertools.cycle(colours), itertools.cycle('os^Dv'), strict=False
  ):
    yield {'color': colour, 'marker': marker}


def _styled(by_line: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
  return zip(by_line.items(), _styles(), strict=False)


def _all_names(evaluations: Iterable[Numbers]) -> list[str]:
  return list(
    dict.fromkeys(
      name for scores in evaluations for name in score_names(scores)
    )
  )


@contextlib.contextmanager
def _figure(
  names: Sequence[str], path: str | pathlib.Path, title: str
) -> Iterator[dict[str, Any]]:
  """Yields a panel for each score, by name, and writes the PNG at the end."""
  # Imported here: it takes a second, and only reports need it.
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot, ticker

  num_columns = min(3, len(names))
  num_rows = math.ceil(len(names) / num_columns)
  figure, panels = pyplot.subplots(
    num_rows,
    num_columns,
    figsize=(4 * num_columns, 3 * num_rows),
    layout='constrained',
    squeeze=False,
  )
  for panel in panels.flat[len(names) :]:
    panel.set_axis_off()
  for panel, name in zip(panels.flat, names, strict=False):
    panel.set_title(name)
    panel.set_ylabel(_UNITS.get(name.rpartition('/')[2], 'points of 100'))
    panel.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    panel.grid(alpha=0.3)
  yield dict(zip(names, panels.flat, strict=False))
  _, labels = panels[0, 0].get_legend_handles_labels()
  if len(labels) > 1:
    panels[0, 0].legend(fontsize='small')
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _plot_line(
  panel: Any,
  places: Sequence[int],
  scores: Sequence[Numbers],
  name: str,
  label: str,
  style: Mapping[str, str],
) -> None:
  """Draws a score and its intervals."""
  low, middle, high = (
    [found.get(f'{name}{end}', found[name]) for found in scores]
    for end in ('_low', '', '_high')
  )
  panel.plot(places, middle, markersize=3, label=label, **style)
  panel.fill_between(places, low, high, alpha=0.2, color=style['color'])


def plot_quality_against_speed(
  rows: Sequence[Mapping[str, Any]],
  path: str | pathlib.Path,
  *,
  quality: str,
  quality_label: str,
  speed: str,
  speed_label: str,
  title: str,
) -> None:
  """Writes a PNG with one point a system; up and to the left is better."""
  # Imported here: it takes a second, and only reports need it.
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for row, style in zip(rows, _styles(), strict=False):
    axes.scatter(row[speed], row[quality], s=60, zorder=3, **style)
    if f'{quality}_low' in row:
      low, high = row[f'{quality}_low'], row[f'{quality}_high']
      axes.vlines(row[speed], low, high, color=style['color'], alpha=0.5)
    axes.annotate(
      row['system'],
      (row[speed], row[quality]),
      textcoords='offset points',
      xytext=(8, -4),
    )
  axes.set_xlim(0, 1.35 * max(row[speed] for row in rows))
  axes.set_ylim(0, 1.15 * max(max(row[quality] for row in rows), 1))
  axes.set_xlabel(speed_label)
  axes.set_ylabel(quality_label)
  axes.set_title(title)
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)
