# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and sentences of what an evaluation found.

A *score* is a number of an evaluation that has a better end; counts of examples
and the ends of confidence intervals, `<score>_low` and `<score>_high`, are not.
Scores of a mixture are named `<task>/<score>`.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

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
_CONTROLS = {
  'none': 'the right prompt',
  'other': 'another prompt',
  'zero': 'Z = 0',
}
_COUNTS = ('num_', 'min_references', 'max_references')


def score_names(scores: Mapping[str, float]) -> list[str]:
  """Returns which of an evaluation's numbers are scores."""
  return [
    name
    for name in scores
    if not name.rpartition('/')[2].startswith(_COUNTS)
    and not is_interval_end(name, scores)
  ]


def is_interval_end(name: str, scores: Mapping[str, float]) -> bool:
  """Returns whether a number is an end of another one's interval."""
  return any(
    name.endswith(end) and name.removesuffix(end) in scores
    for end in ('_low', '_high')
  )


def best_step(by_step: Mapping[int, Mapping[str, float]], name: str) -> int:
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


def steps_table(by_step: Mapping[int, Mapping[str, float]]) -> str:
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


def describe_controls(by_control: Mapping[str, Mapping[str, float]]) -> str:
  """Returns what the controls allow to say, a sentence for each task.

  A task is judged by the first of `MAIN_SCORES` that it has. A control is worse
  if it is so by more than the right prompt's interval or, without intervals,
  by more than noise. The SLM uses the LLM if both are; if only another prompt's
  states are worse than the right ones, it does read them, to no gain.

  Args:
    by_control: the numbers of an evaluation by control: 'none', with the LLM's
      states of the right prompt; 'zero', with zeros in their place; 'other',
      with the states of another prompt. All have each task's loss.
  """
  tasks = [
    name.removesuffix('loss')
    for name in by_control['none']
    if name == 'loss' or name.endswith('/loss')
  ]
  return '\n'.join(
    (f'{task.removesuffix("/")}: ' if task else '')
    + _describe_task(task, by_control)
    for task in tasks
  )


def _describe_task(
  prefix: str, by_control: Mapping[str, Mapping[str, float]]
) -> str:
  right = by_control['none']
  name = next(name for name in MAIN_SCORES if f'{prefix}{name}' in right)
  key = f'{prefix}{name}'
  if name == 'loss':
    digits, bound, sign = 3, right[key] + _NOISE_NATS, -1
  else:
    digits, sign = 1, 1
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

  def figure(control: str) -> str:
    scores = by_control[control]
    text = f'{scores[key]:.{digits}f}'
    if f'{key}_low' in scores:
      low, high = scores[f'{key}_low'], scores[f'{key}_high']
      text += f' [{low:.{digits}f}, {high:.{digits}f}]'
    return text

  return (
    f'The SLM {verdict}: {MAIN_SCORES[name]} {figure("none")} with the right '
    f'prompt read by the LLM, {figure("other")} with another prompt, '
    f'{figure("zero")} with zeros.'
  )


def plot_curves(
  by_control: Mapping[str, Mapping[int, Mapping[str, float]]],
  path: str | pathlib.Path,
  *,
  title: str,
) -> None:
  """Writes a PNG with a panel for each score against the step.

  Args:
    by_control: a line each, with its confidence intervals where there are any:
      the numbers of each step's evaluation.
    path: of the PNG.
    title: above the panels.
  """
  # Imported here: it takes a second, and only reports need it.
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot, ticker

  names = dict.fromkeys(
    name
    for by_step in by_control.values()
    for scores in by_step.values()
    for name in score_names(scores)
  )
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
    for control, by_step in by_control.items():
      steps = sorted(step for step in by_step if name in by_step[step])
      if not steps:
        continue
      low, middle, high = (
        [by_step[s].get(f'{name}{end}', by_step[s][name]) for s in steps]
        for end in ('_low', '', '_high')
      )
      (line,) = panel.plot(
        steps, middle, marker='o', markersize=3, label=_CONTROLS[control]
      )
      panel.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    panel.set_title(name)
    panel.set_xlabel('step')
    panel.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    panel.grid(alpha=0.3)
  if len(by_control) > 1:
    panels[0, 0].legend()
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


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
  for row in rows:
    axes.scatter(row[speed], row[quality], s=60, zorder=3)
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
