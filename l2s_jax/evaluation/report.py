# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and sentences about evaluation results.

A *score* is a metric with a better direction. Counts of examples, and the ends
of confidence intervals (`<score>_low`, `<score>_high`), are not scores. Scores
of a mixture are named `<task>/<score>`.
"""

import contextlib
import itertools
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from l2s_jax.metrics import metric_fns
from l2s_jax.runtime import files

# All numbers of an evaluation by name: scores, intervals and counts.
Numbers = Mapping[str, float | int]
# A row of a table or JSON file: values by column key.
TableRow = dict[str, Any]

# Heading by score. The main score of a task is the first of these it has.
MAIN_SCORES = {
  'bleu': 'BLEU',
  'rougeLsum': 'ROUGE-Lsum',
  'token_f1': 'token F1',
  'chrf': 'chrF',
  'ter': 'TER',
  'exact_match': 'exact match',
  'loss': 'loss',
}
# The difference, in points, that counts as noise without a confidence interval:
# typical for test sets of a thousand short sentences.
_NOISE_POINTS = 1.0
# The same for the loss, which varies less: it averages over all tokens.
_NOISE_NATS = 0.01
# Labels of the controls (`controls.py`) in tables and plots.
CONTROLS = {
  'none': 'the right prompt',
  'zero': 'Z = 0',
  'other': 'another prompt',
  'untrained': 'an untrained encoder',
  'layer_0': 'layer 0 of the LLM',
}
_OF_VERDICT = ('none', 'zero', 'other')
# Scores below 1, shown with three digits.
_OF_TOKENS = ('loss', 'token_accuracy')
_UNITS = {
  'loss': 'nats per target token',
  'token_accuracy': 'fraction of tokens',
  'ter': 'edits per 100 words',
}
_COUNTS = ('num_', 'min_references', 'max_references')


def score_names(scores: Numbers) -> list[str]:
  """Returns the names of an evaluation's scores."""
  return [
    name
    for name in scores
    if not name.rpartition('/')[2].startswith(_COUNTS)
    and not is_interval_end(name, scores)
  ]


def is_interval_end(name: str, scores: Numbers) -> bool:
  """Returns whether a number is an end of a score's confidence interval."""
  return any(
    name.endswith(end) and name.removesuffix(end) in scores
    for end in ('_low', '_high')
  )


def best_step(by_step: Mapping[int, Numbers], name: str) -> int:
  """Returns the first step with the best score, as `lower_is_better` says.

  Args:
    by_step: numbers by step.
    name: name of a score that at least one step has.
  """
  sign = -1 if metric_fns.lower_is_better(name) else 1
  return max(
    (step for step in by_step if name in by_step[step]),
    key=lambda step: (sign * by_step[step][name], -step),
  )


def columns_in(
  rows: Sequence[TableRow], columns: Mapping[str, str]
) -> dict[str, str]:
  """Returns the columns with a value in any row."""
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
    rows: values by column key; a missing value leaves its cell empty.
    columns: heading by key, in order. Numbers are right-aligned; floats have
      one decimal from 10 on, two below.
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
  """Returns a Markdown table of scores by step, the best ones in bold."""
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
  """Returns a Markdown table of scores by reference length.

  Args:
    by_bin: from `length_bins.scores`, in any order.
    task: name of the task, for the heading.
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
  """Sorts names of length bins by length.

  JSON's order of keys puts '11+' before '6-10'.

  Args:
    names: from `length_bins.names`.
  """
  return sorted(names, key=lambda name: int(re.split('[-+]', name)[0]))


def with_interval(scores: Numbers, name: str) -> str | None:
  """Formats a score: '23.5 [22.1, 24.8]', '23.5', or None if absent."""
  if name not in scores:
    return None
  digits = 3 if name.rpartition('/')[2] in _OF_TOKENS else 1
  text = f'{scores[name]:.{digits}f}'
  if f'{name}_low' in scores:
    low, high = scores[f'{name}_low'], scores[f'{name}_high']
    text += f' [{low:.{digits}f}, {high:.{digits}f}]'
  return text


def describe_controls(by_control: Mapping[str, Numbers]) -> str:
  """Describes the result of the controls, a sentence for each task.

  The main score of each task decides. A control is worse if its score lies
  beyond the worse end of the right prompt's confidence interval or, without
  intervals, is worse by more than noise. If both controls are worse, the SLM
  uses the LLM's states. If only another prompt is worse, the SLM reads the
  states but does not gain from them.

  Args:
    by_control: numbers by control: 'none', with the LLM's states of the right
      prompt; 'zero', with zeros instead; 'other', with the states of another
      prompt. For further controls the scores are reported. All have the loss of
      each task.
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
  noise = _NOISE_NATS if name == 'loss' else _NOISE_POINTS
  if metric_fns.lower_is_better(name):
    bound, sign = right.get(f'{key}_high', right[key] + noise), -1
  else:
    bound, sign = right.get(f'{key}_low', right[key] - noise), 1
  other_is_worse, zero_is_worse = (
    sign * by_control[control][key] < sign * bound
    for control in ('other', 'zero')
  )
  verdict = 'does not use the LLM'
  if other_is_worse and zero_is_worse:
    verdict = 'uses what the LLM read'
  elif other_is_worse:
    verdict = 'reads the states of the LLM but does not gain from them'

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
  """Returns whether the controls required by `describe_controls` exist."""
  return set(_OF_VERDICT) <= set(by_control)


def main_score(scores: Collection[str], prefix: str = '') -> str:
  """Returns the name of a task's main score; see `MAIN_SCORES`.

  Args:
    scores: numbers of an evaluation, or their names.
    prefix: 'task/' for a task of a mixture.
  """
  return next(name for name in MAIN_SCORES if f'{prefix}{name}' in scores)


def task_prefixes(scores: Iterable[str]) -> list[str]:
  """Returns [''], or for a mixture the prefix 'task/' of each task.

  Args:
    scores: names of an evaluation's numbers; every task has a loss.
  """
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
  """Writes a PNG with a panel for each score, plotted by step.

  Args:
    by_line: numbers by step, by name of the line; confidence intervals are
      drawn if present.
    path: the PNG file.
    title: title of the figure.
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
  """Writes a PNG with a panel for each score, plotted by reference length.

  Args:
    by_line: numbers by bin (see `length_bins.scores`), by name of the line.
    path: the PNG file.
    title: title of the figure.
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
      panel.set_xlabel('words in the reference')


def _styles() -> Iterator[dict[str, Any]]:
  """Yields colours and markers, distinguishable with colour blindness.

  The colours are those of Okabe and Ito without yellow, which is too light.
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
  # Colours and markers have coprime periods, so combinations repeat late.
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
  """Yields the panels of a figure by score, and writes the PNG at the end."""
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
    panel.set_ylabel(_UNITS.get(name.rpartition('/')[2], 'points (0 to 100)'))
    panel.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    panel.grid(alpha=0.3)
  yield dict(zip(names, panels.flat, strict=False))
  _, labels = panels[0, 0].get_legend_handles_labels()
  if len(labels) > 1:
    panels[0, 0].legend(fontsize='small')
  figure.suptitle(title)
  _save(figure, path, dpi=120)


def _plot_line(
  panel: Any,
  places: Sequence[int],
  scores: Sequence[Numbers],
  name: str,
  label: str,
  style: Mapping[str, str],
) -> None:
  """Plots a score with its confidence intervals."""
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
  lower_is_better: bool = False,
) -> None:
  """Writes a scatter plot, as PNG, of quality by speed of systems.

  Each row is a point; up and left is better.

  Args:
    rows: a row for each system, with its name under 'system'.
    path: the PNG file.
    quality: key of the quality; `<quality>_low` and `<quality>_high`, if
      present, are its confidence interval.
    quality_label: label of the vertical axis.
    speed: key of the time per unit.
    speed_label: label of the horizontal axis.
    title: title of the figure.
    lower_is_better: whether a lower quality is better; 0 is then at the top.
  """
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
  if lower_is_better:
    axes.invert_yaxis()
    axes.set_ylabel(f'{quality_label} (lower is better)')
  axes.set_title(title)
  axes.grid(alpha=0.3)
  _save(figure, path, dpi=150)


def _save(figure: Any, path: str | pathlib.Path, *, dpi: int) -> None:
  """Writes a figure as PNG, which may be in a bucket, and closes it."""
  from matplotlib import pyplot

  with files.whole(path, 'wb') as file:
    figure.savefig(file, dpi=dpi, format='png')
  pyplot.close(figure)
