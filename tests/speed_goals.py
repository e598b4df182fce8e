# SPDX-License-Identifier: Apache-2.0
"""How fast this project means to be, as ratios within one run of `benchmark`.

A goal is judged where both of its sides were measured at its shape. Models are
named as their presets in `gin_configs/models`. Speculative decoding is judged
on answers to EOS alone, which only trained weights and real prompts have.

Judges the rows of a report, of generation, of training or of data:

    PYTHONPATH=. python tests/speed_goals.py BENCHMARK_DIR/benchmark.json
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from l2s_jax.evaluation import report
from l2s_jax.performance import (
  contenders,
  data_reading,
  data_tokenizing,
  train_benchmark,
)

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Goal:
  """One system at least so many times as fast as another.

  Attributes:
    ours: what a row has that is measured.
    theirs: what the row has that it is compared with.
    quantity: 'total_ms' or 'ms_per_token'; of training 'ms_per_step'.
    speedup: theirs over ours, at least.
    shape: what both rows have.
    condition: a goal without which this one does not count.
    needs_equal_tokens: whether all tokens must be those of the reference.
  """

  ours: Row
  theirs: Row
  quantity: str
  speedup: float
  shape: Row
  condition: 'Goal | None' = None
  needs_equal_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class DataGoal:
  """So many examples a second, or times as many as of another row.

  Attributes:
    ours: what the row has that is measured.
    least: examples a second; with `theirs`, times those.
    theirs: what the row has that it is compared with.
  """

  ours: Row
  least: float
  theirs: Row | None = None


def _shape(batch_size: int, num_tokens: int = 64) -> Row:
  return {
    'batch_size': batch_size,
    'prompt_length': 128,
    'num_tokens': num_tokens,
  }


_OURS = {'engine': 'l2s_jax', 'dtype': 'float32'}
_PAIR = {'model': 'T5_LARGE -> T5_SMALL', 'system': 'LLM-to-SLM', **_OURS}
_CTRANSLATE2 = {'engine': 'ctranslate2', 'dtype': 'float32'}
_TRANSFORMERS = {'engine': 'transformers', 'dtype': 'float32'}
_BFLOAT16 = {'engine': 'transformers', 'dtype': 'bfloat16'}
_LLM = {'model': 'T5_LARGE'}
_INT8 = {'engine': 'l2s_jax', 'dtype': 'int8'}
_CTRANSLATE2_INT8 = {'engine': 'ctranslate2', 'dtype': 'int8'}


def _against_ctranslate2(model: str, batch_size: int) -> Goal:
  return Goal(
    {'model': model, **_OURS},
    {'model': model, **_CTRANSLATE2},
    'ms_per_token',
    1.0,
    _shape(batch_size),
  )


def _against_our_llm(
  batch_size: int, speedup: float, num_tokens: int = 64
) -> Goal:
  # A slow LLM would flatter the pair.
  return Goal(
    _PAIR,
    {**_LLM, **_OURS},
    'total_ms',
    speedup,
    _shape(batch_size, num_tokens),
    _against_ctranslate2('T5_LARGE', batch_size),
  )


_MODELS = ('T5_SMALL', 'T5_BASE', 'T5_LARGE', 'GPT2')
GOALS = (
  Goal(_PAIR, {**_LLM, **_CTRANSLATE2}, 'total_ms', 5.0, _shape(1)),
  Goal(_PAIR, {**_LLM, **_CTRANSLATE2}, 'total_ms', 3.0, _shape(8)),
  Goal(_PAIR, {**_LLM, **_TRANSFORMERS}, 'total_ms', 12.0, _shape(1)),
  Goal(_PAIR, {**_LLM, **_BFLOAT16}, 'total_ms', 6.0, _shape(1)),
  _against_our_llm(1, 4.5),
  _against_our_llm(8, 2.75),
  _against_our_llm(1, 6.5, num_tokens=256),
  *(_against_ctranslate2(model, b) for model in _MODELS for b in (1, 8)),
  Goal(
    {**_PAIR, **_INT8},
    {**_LLM, **_CTRANSLATE2_INT8},
    'total_ms',
    5.0,
    _shape(1),
  ),
  *(
    Goal(
      {'model': model, **_INT8},
      {'model': model, **_CTRANSLATE2_INT8},
      'total_ms',
      1 / 1.15,
      _shape(batch_size),
    )
    for model in ('T5_SMALL', 'T5_BASE', 'T5_LARGE')
    for batch_size in (1, 8)
  ),
  *(
    Goal(
      {'model': model, **_OURS},
      {'model': model, **_TRANSFORMERS},
      'ms_per_token',
      1 / 0.35,
      _shape(batch_size),
    )
    for model in _MODELS
    for batch_size in (1, 8)
  ),
  Goal(
    {'system': 'speculative, to EOS', **_OURS},
    {'system': 'LLM, to EOS', **_OURS},
    'total_ms',
    1.5,
    {},
    needs_equal_tokens=True,
  ),
)
_TRAINING_SHAPE = {'batch_size': 16, 'prompt_length': 64, 'num_tokens': 64}
TRAINING_GOALS = (
  *(
    Goal(
      {'model': 'T5_SMALL', **_OURS},
      {'model': 'T5_SMALL', 'engine': engine, 'dtype': 'float32'},
      'ms_per_step',
      speedup,
      _TRAINING_SHAPE,
    )
    for engine, speedup in (('t5x', 1.3), ('transformers', 1.5))
  ),
  Goal(
    {'system': contenders.LLM_TO_SLM, **_OURS},
    {'system': train_benchmark.BOTH, **_OURS},
    'ms_per_step',
    1 / 1.1,
    {},
  ),
  Goal(
    {'system': train_benchmark.FROM_STATES, **_OURS},
    {'system': contenders.SLM, **_OURS},
    'ms_per_step',
    1 / 1.15,
    {},
  ),
)
_TOKENIZING = {'part': data_tokenizing.PART}
_READING = {'part': data_reading.WHOLE, 'engine': contenders.OURS}
DATA_GOALS = (
  DataGoal({**_READING, 'prompt_length': 30, 'num_tokens': 30}, 60_000),
  DataGoal({**_READING, 'prompt_length': 512, 'num_tokens': 128}, 15_000),
  DataGoal(
    {**_TOKENIZING, 'from_to': 'text -> records'},
    1 / 1.3,
    {**_TOKENIZING, 'from_to': 'text -> ids'},
  ),
)
_DATA_COLUMNS = {
  'ours': 'ours',
  'goal': 'goal',
  'found': 'found',
  'verdict': 'verdict',
}
_COLUMNS = {
  'ours': 'ours',
  'theirs': 'compared with',
  'quantity': 'quantity',
  'batch_size': 'batch',
  'prompt_length': 'in',
  'num_tokens': 'out',
  'goal': 'goal, times as fast',
  'speedup': 'found',
  'verdict': 'verdict',
}


def main(path: str) -> None:
  """Prints the goals that a report decides."""
  rows = json.loads(pathlib.Path(path).read_text())['rows']
  if any('part' in row for row in rows):
    print(report.markdown_table(judge_data(rows), _DATA_COLUMNS))
    return
  is_training = any('ms_per_step' in row['rounds'] for row in rows)
  goals = TRAINING_GOALS if is_training else GOALS
  judged = judge(rows, goals)
  if judged:
    print(report.markdown_table(judged, _COLUMNS))
  print(f'{num_not_measured(rows, goals)} goals were not measured in this run.')


def judge(
  rows: Sequence[Row], goals: Sequence[Goal] = GOALS
) -> list[dict[str, Any]]:
  """Returns a row for each goal both of whose sides were measured.

  The speed-up is the median over rounds, of what was measured in the same
  round.
  """
  judged = []
  for goal in goals:
    for ours, theirs in _pairs(rows, goal):
      verdict, speedups = _verdict(goal, ours, theirs)
      if verdict == 'met' and goal.condition is not None:
        needed = [
          _verdict(goal.condition, *pair)[0]
          for pair in _pairs(rows, goal.condition)
        ]
        if needed != ['met']:
          verdict = 'does not count: the LLM is slow, or was not compared'
      if goal.needs_equal_tokens and ours.get('equal_tokens') != 1:
        verdict = 'does not count: other tokens'
      judged.append(
        {
          'ours': _name(ours),
          'theirs': _name(theirs),
          'quantity': goal.quantity,
          'batch_size': ours['batch_size'],
          'prompt_length': ours['prompt_length'],
          'num_tokens': ours['num_tokens'],
          'goal': goal.speedup,
          'speedup': float(np.median(speedups)),
          'verdict': verdict,
        }
      )
  return judged


def judge_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Returns a row for each goal of data that was measured."""
  judged = []
  for goal in DATA_GOALS:
    for ours in _found(rows, goal.ours):
      rates = np.array(ours['rounds']['examples_per_sec'])
      for theirs in _found(rows, goal.theirs or goal.ours):
        if goal.theirs is not None:
          rates = rates / theirs['rounds']['examples_per_sec']
      found = float(np.median(rates))
      names = ('from_to', 'prompt_length', 'num_tokens')
      judged.append(
        {
          'ours': ', '.join(str(ours[name]) for name in names if name in ours),
          'goal': goal.least,
          'found': found,
          'verdict': 'met' if found >= goal.least else 'missed',
        }
      )
  return judged


def _found(rows: Sequence[Row], wanted: Row) -> list[Row]:
  return [row for row in rows if wanted.items() <= row.items()]


def num_not_measured(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> int:
  """Returns how many goals have no two sides among the rows."""
  return sum(not _pairs(rows, goal) for goal in goals)


def _pairs(rows: Sequence[Row], goal: Goal) -> list[tuple[Row, Row]]:
  """Returns rows of one shape that are the two sides of a goal."""
  return [
    (ours, theirs)
    for ours in rows
    if _has(ours, {**goal.ours, **goal.shape})
    for theirs in rows
    if _has(theirs, goal.theirs)
    and all(ours[key] == theirs[key] for key in _shape(1))
  ]


def _verdict(goal: Goal, ours: Row, theirs: Row) -> tuple[str, np.ndarray]:
  speedups = np.divide(
    theirs['rounds'][goal.quantity], ours['rounds'][goal.quantity]
  )
  return 'met' if np.median(speedups) >= goal.speedup else 'missed', speedups


def _has(row: Row, wanted: Row) -> bool:
  return all(row[key] == value for key, value in wanted.items())


def _name(row: Row) -> str:
  return f'{row["model"]}, {row["engine"]} {row["dtype"]}'


if __name__ == '__main__':
  main(*sys.argv[1:])
