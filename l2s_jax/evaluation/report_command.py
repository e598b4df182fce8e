# SPDX-License-Identifier: Apache-2.0
"""The verb `report`: comparison of runs in tables and plots.

It reads the output of training, `evaluate` and `benchmark`, and computes model
sizes, FLOPs and the significance of differences. It loads no weights and runs
no model.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gin

from l2s_jax.evaluation import report as report_lib
from l2s_jax.evaluation import run_pairs, run_records
from l2s_jax.evaluation.report import TableRow
from l2s_jax.metrics import metric_fns
from l2s_jax.runtime import files

JSON, MARKDOWN = 'report.json', 'report.md'
_RUNS = {
  'run': 'run',
  'kind': 'kind',
  'trained_millions': 'M trained',
  'frozen_millions': 'M frozen',
  'gflops_per_answer': 'GFLOP/answer',
  'mflops_per_token': 'MFLOP/token',
  'ms_per_token': 'ms/token',
  'total_ms': 'ms/answer',
}
# Columns in other units: source column and factor.
_UNITS = {
  'trained_millions': ('trained_params', 1e-6),
  'frozen_millions': ('frozen_params', 1e-6),
  'gflops_per_answer': ('flops_per_answer', 1e-9),
  'mflops_per_token': ('flops_per_token', 1e-6),
}
_DIFFERENCES = {
  'one': 'one',
  'other': 'other',
  'score': 'score',
  'shown': 'one - other',
  'verdict': 'significant',
}
# Systems of a benchmark, with the kind of the runs they are shown for.
_TIMED = {
  'LLM': 'language model',
  'SLM': 'language model',
  'LLM-to-SLM': 'LLM-to-SLM',
}
_ENGINE = 'l2s_jax'
_SHAPE = ('batch_size', 'prompt_length', 'num_tokens')
_LOG_PNG = 'training.png'

Evaluations = Mapping[str, run_records.ShownEvaluation]


@gin.configurable(module='l2s_jax')
def report(
  run: Sequence[str],
  *,
  output: str,
  speed: str | None = None,
  dry_run: bool = False,
) -> None:
  """Writes a report on runs: report.md, report.json, and PNGs.

  Of each evaluation, the best step by BEST_METRIC is shown if it was evaluated,
  else the newest.

  Args:
    run: folders of runs, or of evaluations (EVAL_OUTPUT_DIR).
    output: the output folder.
    speed: benchmark.json of a `benchmark` of these systems. A row belongs to a
      run of the same kind with as many parameters. Of several shapes, the first
      with the smallest batch is used.
    dry_run: prints the contents of the report, and stops.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a folder is not a run or evaluation, or a file is damaged.
  """
  folder = files.local_folder(output, '--output')
  records = run_records.read_all(run)
  timed = [] if speed is None else _read_speeds(speed)
  if dry_run:
    for record in records:
      steps = {name: e.step for name, e in record.evaluations.items()}
      print(f'{record.label}: {record.folder}, evaluations by step: {steps}')
    return
  folder.mkdir(parents=True, exist_ok=True)
  rows, words = _describe_runs(records, timed)
  content: dict[str, Any] = {'runs': rows, 'evaluations': {}}
  shown = [_shown(row) for row in rows]
  parts = [
    '# Report\n',
    report_lib.markdown_table(shown, report_lib.columns_in(shown, _RUNS)),
    words,
  ]
  logs = {record.label: record.log for record in records if record.log}
  if logs:
    report_lib.plot_curves(logs, folder / _LOG_PNG, title='training')
    parts.append(f'![training]({_LOG_PNG})\n')
  speeds = {row['run']: row for row in rows if 'ms_per_token' in row}
  for name in sorted({n for record in records for n in record.evaluations}):
    found, text = _report_evaluation(
      name, [r for r in records if name in r.evaluations], speeds, folder
    )
    content['evaluations'][name] = found
    parts.append(text)
  files.write_json(folder / JSON, content)
  text = '\n'.join(parts)
  with files.whole(folder / MARKDOWN) as file:
    file.write(text)
  print(f'{text}\nSee {folder}')


def _describe_runs(
  records: Sequence[run_records.ReportedRun], timed: Sequence[TableRow]
) -> tuple[list[TableRow], str]:
  """Returns a table row for each run, and notes on the columns."""
  lengths = [
    evaluation.lengths
    for record in records
    for evaluation in record.evaluations.values()
    if evaluation.lengths is not None
  ]
  words = []
  prompt_length = num_tokens = 0
  if lengths:
    prompt_length, num_tokens = map(max, zip(*lengths, strict=True))
    words.append(
      'FLOPs of matrix products, by formula, for the longest prompt and answer '
      f'of the evaluations: {prompt_length} and {num_tokens} tokens.'
    )
  rows = []
  for record in records:
    row = {'run': record.label, 'folder': str(record.folder)} | record.sizes()
    if lengths:
      row |= record.costs(prompt_length, num_tokens)
    rows.append(row | _speed_of(row, timed))
  if timed:
    shape = dict(
      zip(_SHAPE, (timed[0].get(key) for key in _SHAPE), strict=True)
    )
    words.append(
      'Times of the benchmark: batch size {batch_size}, {prompt_length} prompt '
      'tokens, {num_tokens} answer tokens.'.format(**shape)
    )
  return rows, ' '.join(words) + '\n'


def _report_evaluation(
  name: str,
  records: Sequence[run_records.ReportedRun],
  speeds: Mapping[str, TableRow],
  folder: pathlib.Path,
) -> tuple[dict[str, Any], str]:
  """Returns the results of one evaluation as JSON content and Markdown."""
  evaluations = {r.label: r.evaluations[name] for r in records}
  parts = [f'## {name}\n', _scores_table(evaluations), *_notes(evaluations)]
  rows, notes = run_pairs.differences(name, list(records))
  if rows:
    parts.append(
      report_lib.markdown_table([_difference(r) for r in rows], _DIFFERENCES)
    )
    parts.append(
      'Differences with 95 % confidence intervals of the paired bootstrap.\n'
    )
  parts += [f'{note}\n' for note in notes]
  for label, evaluation in evaluations.items():
    if report_lib.allows_verdict(evaluation.by_control):
      verdict = report_lib.describe_controls(evaluation.by_control)
      parts.append(f'{label}: {verdict}\n')
  parts += _lengths(name, evaluations, folder)
  curves = {label: e.by_step for label, e in evaluations.items()}
  if any(len(by_step) > 1 for by_step in curves.values()):
    png = f'curves-{name}.png'
    report_lib.plot_curves(curves, folder / png, title=name)
    parts.append(f'![{name} by step]({png})\n')
  parts += _quality_against_speed(name, evaluations, speeds, folder)
  found = {
    'runs': {
      label: {
        'step': evaluation.step,
        'scores': evaluation.by_control,
        'by_length': evaluation.by_length,
        'settings': evaluation.settings,
        'signatures': evaluation.signatures,
      }
      for label, evaluation in evaluations.items()
    },
    'differences': rows,
  }
  return found, '\n'.join(parts)


def _scores_table(evaluations: Evaluations) -> str:
  rows = []
  names: dict[str, str] = {}
  for label, evaluation in evaluations.items():
    for control in report_lib.CONTROLS:
      if control not in evaluation.by_control:
        continue
      scores = evaluation.by_control[control]
      names |= {name: name for name in report_lib.score_names(scores)}
      rows.append(
        {
          'run': label,
          'control': report_lib.CONTROLS[control] if control != 'none' else '',
          'step': evaluation.step,
        }
        | {
          name: report_lib.with_interval(scores, name)
          for name in report_lib.score_names(scores)
        }
      )
  columns = {'run': 'run', 'control': 'Z of', 'step': 'step'}
  if not any(row['control'] for row in rows):
    del columns['control']
  return report_lib.markdown_table(rows, columns | names)


def _notes(evaluations: Evaluations) -> list[str]:
  """Returns the differences in settings that make runs incomparable."""
  first, *others = evaluations
  notes = []
  for label in others:
    for what in ('settings', 'signatures'):
      ours, theirs = (getattr(evaluations[x], what) for x in (first, label))
      lines = files.differences(
        ours, theirs, have=f'{first} has', want=f'{label} has'
      )
      if lines:
        notes.append(f'Different {what}:\n' + '\n'.join(lines) + '\n')
  return notes


def _lengths(
  name: str, evaluations: Evaluations, folder: pathlib.Path
) -> list[str]:
  """Returns tables and plots of scores by length, for each task."""
  by_task: dict[str, dict[str, Any]] = {}
  for label, evaluation in evaluations.items():
    for task, by_bin in evaluation.by_length.get('none', {}).items():
      by_task.setdefault(task, {})[label] = by_bin
  parts = []
  for task, by_run in by_task.items():
    parts += [
      f'{label}:\n\n{report_lib.lengths_table(by_bin, task)}'
      for label, by_bin in by_run.items()
    ]
    png = f'lengths-{name}-{task}.png'
    report_lib.plot_lengths(by_run, folder / png, title=f'{task} by length')
    parts.append(f'![{task} by length]({png})\n')
  return parts


def _quality_against_speed(
  name: str,
  evaluations: Evaluations,
  speeds: Mapping[str, TableRow],
  folder: pathlib.Path,
) -> list[str]:
  """Plots quality by speed for each task, for runs with measured speed."""
  there = {label: e for label, e in evaluations.items() if label in speeds}
  if not there:
    return []
  parts = []
  first = next(iter(there.values())).by_control['none']
  for prefix in report_lib.task_prefixes(first):
    score = report_lib.main_score(first, prefix)
    key = f'{prefix}{score}'
    rows = [
      {'system': label, 'ms_per_token': speeds[label]['ms_per_token']}
      | {
        f'quality{end}': scores[f'{key}{end}']
        for end in ('', '_low', '_high')
        if f'{key}{end}' in scores
      }
      for label, e in there.items()
      if key in (scores := e.by_control['none'])
    ]
    task = prefix.removesuffix('/')
    png = '-'.join(filter(None, ('speed', name, task))) + '.png'
    report_lib.plot_quality_against_speed(
      rows,
      folder / png,
      quality='quality',
      quality_label=report_lib.MAIN_SCORES[score],
      speed='ms_per_token',
      speed_label='ms per token',
      title=f'{name} {task}'.strip(),
      lower_is_better=metric_fns.lower_is_better(score),
    )
    parts.append(f'![quality against speed]({png})\n')
  return parts


def _read_speeds(path: str) -> list[TableRow]:
  """Reads a benchmark's rows of the first shape with the smallest batch.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not a benchmark.
  """
  remedy = 'set --speed to a benchmark.json written by `benchmark`.'
  rows = files.read_json(path, keys={'rows': list}, remedy=remedy)['rows']
  timed = []
  for number, row in enumerate(rows):
    place = f'{path}, row {number}'
    if not isinstance(row, dict):
      raise ValueError(f'{place} is {files.kind_of(row)}; {remedy}')
    keys: files.Keys = {
      **dict.fromkeys(('system', 'engine', 'dtype'), str),
      **dict.fromkeys((*_SHAPE, 'num_params'), int),
      **dict.fromkeys(('ms_per_token', 'total_ms'), float),
    }
    files.check_keys(row, place, keys=keys, remedy=remedy)
    if (
      row['engine'] == _ENGINE
      and row['system'] in _TIMED
      and not row['dtype'].startswith('int')
    ):
      timed.append(row)
  if not timed:
    raise ValueError(f'{path} has no times of {", ".join(_TIMED)}; {remedy}')
  first = min(timed, key=lambda row: row['batch_size'])
  return [r for r in timed if all(r[key] == first[key] for key in _SHAPE)]


def _speed_of(run: TableRow, timed: Sequence[TableRow]) -> dict[str, float]:
  """Returns the measured times of a run; {} if there are none."""
  for row in timed:
    if (
      _TIMED[row['system']] == run.get('kind')
      and row['num_params'] == run['trained_params'] + run['frozen_params']
    ):
      return {key: row[key] for key in ('ms_per_token', 'total_ms')}
  return {}


def _shown(row: TableRow) -> TableRow:
  """Returns a row with its values in the units of the table."""
  return row | {
    name: row[source] * factor
    for name, (source, factor) in _UNITS.items()
    if source in row
  }


def _difference(row: TableRow) -> TableRow:
  low, high = row['difference_low'], row['difference_high']
  score = row['score']
  if metric_fns.lower_is_better(score):
    score += ' (lower is better)'
  return row | {
    'score': score,
    'shown': f'{row["difference"]:+.1f} [{low:+.1f}, {high:+.1f}]',
    'verdict': 'yes' if row['significant'] else 'no',
  }
