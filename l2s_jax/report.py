# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of a comparison: quality against speed."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

# Below this difference in BLEU, test sets of a thousand short sentences do
# not tell two systems apart.
_NOISE_BLEU = 1.0


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
    max(len(heading), *(len(line[i]) for line in cells))
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


def describe_controls(none: float, zero: float, other: float) -> str:
  """Returns the sentence that the controls allow.

  Args:
    none: BLEU with the LLM's states of the right prompt.
    zero: with zeros in their place.
    other: with the states of another prompt.
  """
  figures = (
    f'BLEU {none:.1f} with the right prompt read by the LLM, {other:.1f} with '
    f'another prompt, {zero:.1f} with zeros'
  )
  if max(other, zero) > none - _NOISE_BLEU:
    return f'The SLM does not use the LLM: {figures}.'
  return f'The SLM uses what the LLM read: {figures}.'


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
