# SPDX-License-Identifier: Apache-2.0
"""Laws of goals: judged where both sides were measured, round by round."""

import pytest
import speed_goals as goals

PAIR = ('LLM-to-SLM', 'T5_LARGE -> T5_SMALL', 'l2s_jax')
LLM = ('LLM', 'T5_LARGE', 'l2s_jax')
THEIRS = ('LLM', 'T5_LARGE', 'ctranslate2')


def row(system, model, engine, total, step, batch_size=1, num_tokens=64):
  return {
    'system': system,
    'model': model,
    'engine': engine,
    'dtype': 'float32',
    'batch_size': batch_size,
    'prompt_length': 128,
    'num_tokens': num_tokens,
    'rounds': {'total_ms': total, 'ms_per_token': step},
  }


def judge(*rows):
  return {
    (found['ours'], found['theirs'], found['quantity']): found
    for found in goals.judge(rows)
  }


def test_nothing_is_judged_without_its_other_side():
  assert goals.judge([row(*PAIR, [1.0], [1.0])]) == []
  # Of other shapes, too.
  rows = [row(*PAIR, [1.0], [1.0]), row(*THEIRS, [9.0], [9.0], batch_size=2)]
  assert goals.judge(rows) == []


@pytest.mark.parametrize(
  'theirs,speedup,verdict',
  [([5.0, 12.0, 30.0], 6.0, 'met'), ([4.0, 12.0, 12.0], 4.0, 'missed')],
)
def test_rounds_are_compared_with_themselves(theirs, speedup, verdict):
  ours = [1.0, 2.0, 3.0]
  (found,) = goals.judge([row(*PAIR, ours, ours), row(*THEIRS, theirs, ours)])
  assert (found['goal'], found['speedup']) == (5.0, speedup)
  assert found['verdict'] == verdict


@pytest.mark.parametrize(
  'step,verdict', [([1.0], 'met'), ([3.0], 'does not count'), (None, None)]
)
def test_a_slow_llm_does_not_flatter_the_pair(step, verdict):
  rows = [row(*PAIR, [1.0], [1.0]), row(*LLM, [9.0], step or [1.0])]
  if step:
    rows.append(row(*THEIRS, [9.0], [2.0]))
  found = judge(*rows)
  name = ('T5_LARGE -> T5_SMALL, l2s_jax float32', 'T5_LARGE, l2s_jax float32')
  assert found[*name, 'total_ms']['verdict'].startswith(
    verdict or 'does not count'
  )


@pytest.mark.parametrize(
  'equal,verdict', [(1.0, 'met'), (0.99, 'does not count: other tokens')]
)
def test_other_tokens_are_no_speculative_decoding(equal, verdict):
  ours = row('speculative, to EOS', 'pair', 'l2s_jax', [1.0], [1.0])
  llm = row('LLM, to EOS', 'llm', 'l2s_jax', [2.0], [2.0])
  (found,) = goals.judge([ours | {'equal_tokens': equal}, llm])
  assert found['verdict'] == verdict


def test_speculative_decoding_of_random_text_is_not_judged():
  rows = [
    row(system, 'model', 'l2s_jax', [total], [total]) | {'equal_tokens': 1.0}
    for system, total in (('speculative', 1.0), ('LLM', 9.0))
  ]
  assert goals.judge(rows) == []
  assert goals.num_not_measured(rows) == len(goals.GOALS)


def test_compiled_transformers_is_another_engine():
  ours = row('SLM', 'T5_SMALL', 'l2s_jax', [1.0], [1.0])
  theirs = row('SLM', 'T5_SMALL', 'transformers compiled', [9.0], [9.0])
  assert goals.judge([ours, theirs]) == []


@pytest.mark.parametrize(
  'rates,verdict', [([10.0, 80.0, 9.0], 'met'), ([7.0, 20.0, 8.0], 'missed')]
)
def test_tokenizing_is_compared_round_by_round(rates, verdict):
  library = {
    'part': 'tokenizing',
    'from_to': 'text -> ids',
    'rounds': {'examples_per_sec': [10.0, 100.0, 10.0]},
  }
  ours = library | {
    'from_to': 'text -> records',
    'rounds': {'examples_per_sec': rates},
  }
  (found,) = goals.judge_data([library, ours])
  assert found['verdict'] == verdict


@pytest.mark.parametrize('rate,verdict', [(60_000.0, 'met'), (59e3, 'missed')])
def test_reading_back_is_judged_by_itself(rate, verdict):
  row = {
    'part': 'reading',
    'engine': 'l2s_jax',
    'prompt_length': 30,
    'num_tokens': 30,
    'rounds': {'examples_per_sec': [rate]},
  }
  found = goals.judge_data([row, row | {'engine': 'grain'}])
  assert [goal['verdict'] for goal in found] == [verdict]
