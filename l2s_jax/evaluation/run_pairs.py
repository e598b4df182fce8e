# SPDX-License-Identifier: Apache-2.0
"""Significance of score differences between the systems of a report.

Two systems are compared by the paired bootstrap, on the predictions written by
`evaluate` and the main score of each task. Each control of a run is compared
with the right prompt in the same way.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from l2s_jax.evaluation import report, run_records
from l2s_jax.inference import predictions
from l2s_jax.metrics import bleu, metric_fns
from l2s_jax.runtime import distributed

_NUM_SAMPLES = 1000
# Metric by main score, except BLEU. Predictions hold no losses.
_METRICS: Mapping[str, metric_fns.Metric] = {
  'rougeLsum': metric_fns.rouge,
  'token_f1': metric_fns.token_f1,
  'chrf': metric_fns.chrf,
  'ter': metric_fns.ter,
  'exact_match': metric_fns.exact_match,
}
# The references of each example, and the `corpus.Sums` of the score.
_Scored = tuple[list[list[str]], Any]
_REMEDY = 'Evaluate its step again.'


@dataclasses.dataclass(frozen=True)
class _System:
  """A compared system: a run, with or without a control."""

  record: run_records.ReportedRun
  control: str = 'none'

  @property
  def label(self) -> str:
    """Name in tables."""
    if self.control == 'none':
      return self.record.label
    return f'{self.record.label}, {report.CONTROLS[self.control]}'


def differences(
  name: str, records: list[run_records.ReportedRun]
) -> tuple[list[report.TableRow], list[str]]:
  """Compares all pairs of systems; returns rows and notes.

  Args:
    name: name of the evaluation: task or mixture, and split.
    records: the runs with this evaluation.

  Returns:
    A row for each pair and task, and notes on the pairs that could not be
    compared.

  Raises:
    ValueError: if predictions are damaged or incomplete.
  """
  pairs = [
    (_System(one), _System(other))
    for one, other in itertools.combinations(records, 2)
  ] + [
    (_System(record), _System(record, control))
    for record in records
    for control in record.evaluations[name].by_control
    if control != 'none'
  ]
  rows: list[report.TableRow] = []
  notes: dict[str, None] = {}
  compared = _Compared(name)
  for one, other in pairs:
    scores = one.record.evaluations[name].by_control[one.control]
    for prefix in report.task_prefixes(scores):
      try:
        rows.append(compared.row(one, other, prefix))
      except _NotComparable as error:
        notes[str(error)] = None
  return rows, list(notes)


class _NotComparable(Exception):
  """Two systems cannot be compared; the message gives the reason."""


class _Compared:
  """Compares systems of one evaluation; reads each file once."""

  def __init__(self, name: str):
    self._name = name
    self._found: dict[tuple[str, str, str], _Scored] = {}

  def row(self, one: _System, other: _System, prefix: str) -> report.TableRow:
    """Returns the row of a pair for a task's main score.

    Raises:
      _NotComparable: if the systems cannot be compared.
    """
    score = report.main_score(self._scores(one), prefix)
    references, sums = self._read(one, prefix, score)
    their_references, their_sums = self._read(other, prefix, score)
    if references != their_references:
      raise _NotComparable(
        f'{one.label} and {other.label} were scored on different examples and '
        'are not compared.'
      )
    difference, low, high = metric_fns.paired_difference(
      sums, their_sums, score, _NUM_SAMPLES
    )
    return {
      'one': one.label,
      'other': other.label,
      'score': f'{prefix}{score}',
      'difference': difference,
      'difference_low': low,
      'difference_high': high,
      'significant': low > 0 or high < 0,
    }

  def _read(self, system: _System, prefix: str, score: str) -> '_Scored':
    key = system.record.label, system.control, prefix
    if key not in self._found:
      self._found[key] = self._read_scored(system, prefix, score)
    return self._found[key]

  def _scores(self, system: _System) -> run_records.Numbers:
    return system.record.evaluations[self._name].by_control[system.control]

  def _read_scored(self, system: _System, prefix: str, score: str) -> '_Scored':
    """Reads references and predictions; returns them as `_Scored`."""
    evaluation = system.record.evaluations[self._name]
    own_name, _, split = self._name.rpartition('-')
    task = prefix.removesuffix('/') or own_name
    suffix = '' if system.control == 'none' else f'-{system.control}'
    path = (
      system.record.folder
      / 'eval'
      / f'{task}-{split}-{evaluation.step}{suffix}.jsonl'
    )
    if not path.is_file():
      raise _NotComparable(
        f'{path} is missing: {system.label} is not compared.'
      )
    if evaluation.has_digests and not predictions.notes_of(path).is_file():
      distributed.say(predictions.unverified(path))
    metric = _metric(score, evaluation.signatures.get(f'{prefix}{score}', ''))
    if metric is None:
      raise _NotComparable(
        f'{score} of {system.label} cannot be computed from its predictions; '
        'it is not compared.'
      )
    references, answers = [], []
    keys = {'prediction': str, 'target': str}
    for line in predictions.read([path], keys=keys, remedy=_REMEDY):
      texts = line.get('references') or [line['target']]
      references.append(texts)
      answers.append(line['prediction'])
    scores = self._scores(system)
    num_examples = scores.get(f'{prefix}num_examples')
    if num_examples != len(answers):
      raise ValueError(
        f'{path} has {len(answers)} answers, but {num_examples} were scored. '
        f'{_REMEDY}'
      )
    sums = metric.sums(references, answers)
    found = sums.of_corpus()[score]
    # They differ with another tokenizer, or if the task changes the texts.
    recorded = scores.get(f'{prefix}{score}', found)
    if abs(found - recorded) > 1e-6:
      raise _NotComparable(
        f'{path}: the {score} of its texts is {found:.2f}, but '
        f'{recorded:.2f} in the evaluation, with other settings or texts; '
        f'{system.label} is not compared.'
      )
    return references, sums


def _metric(score: str, signature: str) -> metric_fns.Metric | None:
  """Returns the metric of a score, with the settings of its signature."""
  if score == 'bleu':
    tokenizer = re.search(r'tok:([^|]+)', signature)
    return bleu.Bleu('bleu', tokenizer[1] if tokenizer else '13a')
  return _METRICS.get(score)
