# SPDX-License-Identifier: Apache-2.0
"""Laws of `benchmark --train`: who takes part, and what is compared."""

import dataclasses
import json

import helpers
import numpy as np
import pytest
import speed_goals

from l2s_jax.models import flops
from l2s_jax.performance import benchmark, peers, train_benchmark, train_peers
from l2s_jax.systems import system

SHAPE = {'batch_sizes': 2, 'prompt_lengths': 6, 'output_lengths': 4}


def rows_of(folder):
  content = json.loads((folder / 'train.json').read_text())
  return {
    (row['system'], row['engine'], row['dtype']): row for row in content['rows']
  }


def test_llm_to_slm_is_compared_with_its_parts(tmp_path, capsys):
  benchmark.benchmark(
    str(tmp_path),
    llm=system.Tower(config=helpers.T5_1_0),
    slm=system.Tower(config=helpers.GPT2),
    rounds=2,
    train=True,
    peers=True,  # They take part with one model alone.
    **SHAPE,
  )
  rows = rows_of(tmp_path)
  assert {key[0] for key in rows} == {
    'LLM-to-SLM', 'SLM', train_benchmark.FROM_STATES, train_benchmark.READ,
    train_benchmark.BOTH,
  }  # fmt: skip
  of = {key[0]: row['rounds']['ms_per_step'] for key, row in rows.items()}
  np.testing.assert_allclose(
    of[train_benchmark.BOTH], np.add(of['SLM'], of[train_benchmark.READ])
  )
  judged = speed_goals.judge([*rows.values()], speed_goals.TRAINING_GOALS)
  goals = [goal['goal'] for goal in judged]
  assert goals == [pytest.approx(1 / 1.1), pytest.approx(1 / 1.15)]
  assert 'LLM reads + SLM' in capsys.readouterr().out


@pytest.mark.parametrize('config', [helpers.T5_1_0, helpers.GPT2])
def test_transformers_trains_the_same_model(config, tmp_path):
  """From the same weights, without dropout: the same losses."""
  pytest.importorskip('torch', reason='torch is not installed')
  pytest.importorskip('transformers', reason='transformers is not installed')
  benchmark.benchmark(
    str(tmp_path),
    slm=system.Tower(config=dataclasses.replace(config, dropout_rate=0.0)),
    rounds=1,
    train=True,
    peers=True,
    **SHAPE,
  )
  rows = rows_of(tmp_path)
  ours = rows['SLM', 'l2s_jax', 'float32']
  theirs = rows['SLM', 'transformers', 'float32']
  np.testing.assert_allclose(
    ours['first_losses'], theirs['first_losses'], rtol=1e-5
  )
  assert ours['first_losses'][0] > ours['first_losses'][1]
  assert ours['flops'] == theirs['flops'] > 0
  assert not (tmp_path / '.peers').exists()


def test_what_a_peer_lacks_is_said(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  for peer in train_peers.PEERS.values():
    assert f'package {peer.packages[0]}' in str(peers.why_missing(peer))


def test_settings_of_generation_are_refused(tmp_path):
  with pytest.raises(ValueError, match='--train times steps'):
    benchmark.benchmark(
      str(tmp_path),
      slm=system.Tower(config=helpers.T5_1_0),
      quantizations='int8',
      train=True,
    )


def test_a_frozen_llm_is_read_once_and_not_trained():
  """Forwards, backwards twice as much; of the LLM forwards alone."""
  pair = helpers.MODULES['llm_to_gpt2-add-shared']
  forward = flops.train_flops(pair.clone(), 8, 4)
  without = flops.reading_flops(pair.llm_config, 8)
  assert forward > without > 0
  doubled = flops.train_flops(pair, 8, 8) - forward
  assert 0 < doubled < forward
