# SPDX-License-Identifier: Apache-2.0
"""Laws of what is timed: it writes what its weights and prompts say."""

import dataclasses
import json
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_runs
from flax import traverse_util

from l2s_jax.inference import strategies
from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.performance import (
  bandwidth,
  benchmark,
  contenders,
  random_weights,
  speed_report,
)
from l2s_jax.runtime import files
from l2s_jax.systems import run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import opening
from l2s_jax.weights import source as source_lib

STEP, NUM_TOKENS = 3, 4
MODULE = helpers.llm_to_slm('t5_1_1', 'add', 'shared')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """An LLM-to-SLM run, its parameters, and those of its LLM."""
  folder = tmp_path_factory.mktemp('contenders')
  llm = helpers.random_params(l2s.build(MODULE.llm_config), seed=1)
  source = helpers.Arrays(MODULE.llm_config, llm)
  to_huggingface.save(source, folder / 'llm', helpers.vocabulary())
  params = helpers.random_params(MODULE)
  trained = {name: x for name, x in params.items() if name != 'llm'}
  params['llm'] = {name: llm[name] for name in params['llm']}
  system = dataclasses.replace(
    helpers.system(MODULE), sources={'llm': str(folder / 'llm')}
  )
  saved_runs.save(folder / 'run', system, trained, steps=(STEP,))
  return folder / 'run', params, llm


def test_a_run_is_timed_with_its_own_weights(run):
  folder, params, llm = run
  models, pair = contenders.find_models(
    None, None, str(folder), 'replace', 'float32', 0
  )
  prompts = np.random.default_rng(0).integers(3, 264, (2, 6), np.int32)
  found = {
    contender.system: contender.start(prompts, NUM_TOKENS)(NUM_TOKENS)
    for contender in contenders.ours(models, pair, 'float32', ('none',), 2)
  }
  batch = {
    'encoder_input_tokens': jnp.asarray(prompts),
    'encoder_segment_ids': jnp.ones(prompts.shape, jnp.int32),
  }
  for system, module, values in (
    ('LLM', l2s.build(MODULE.llm_config), llm),
    ('SLM', l2s.build(MODULE.slm_config), params['slm']),
    ('LLM-to-SLM', MODULE, params),
    ('speculative', l2s.build(MODULE.llm_config), llm),
  ):
    expected = helpers.generate(
      module,
      values,
      batch,
      max_decode_len=NUM_TOKENS,
      start_id=helpers.vocabulary().start_id,
    )
    np.testing.assert_array_equal(found.pop(system), expected, system)
  assert not found


def test_lines_of_the_right_length_and_scores_of_the_step_are_taken(
  run, tmp_path, monkeypatch
):
  folder, _, _ = run
  monkeypatch.setattr(bandwidth, 'BANDWIDTH_BYTES', 2**20)
  files.write_json(
    folder / 'eval' / 'metrics-greetings-test.json',
    {str(STEP): {'none': {'bleu': 31.5}}, '9': {'none': {'bleu': 99.0}}},
  )
  path = tmp_path / 'prompts.txt'
  path.write_text('hello\nhi\nworld\n')
  options = {
    'checkpoint_path': str(folder),
    'prompts_path': str(path),
    'output_lengths': NUM_TOKENS,
    'rounds': 1,
    'quality': 'greetings-test',
  }
  # Bytes, and EOS.
  benchmark.benchmark(str(tmp_path), **options, batch_sizes=2, prompt_lengths=6)
  rows = json.loads((tmp_path / speed_report.JSON).read_text())['rows']
  assert {row['system']: row['scores'] for row in rows} == {
    'LLM': {},
    'SLM': {},
    'LLM-to-SLM': {'bleu': 31.5},
  }
  with pytest.raises(ValueError, match='has 1 lines of 3 tokens.* have 3, 6 '):
    benchmark.benchmark(
      str(tmp_path), **options, batch_sizes=2, prompt_lengths=3
    )


def test_with_a_run_and_prompts_eos_ends_answers(run, monkeypatch, tmp_path):
  folder, _, _ = run
  monkeypatch.setattr(bandwidth, 'BANDWIDTH_BYTES', 2**20)
  path = tmp_path / 'prompts.txt'
  path.write_text('hello\nworld\n')
  benchmark.benchmark(
    str(tmp_path),
    checkpoint_path=str(folder),
    prompts_path=str(path),
    batch_sizes=2,
    prompt_lengths=6,
    output_lengths=NUM_TOKENS,
    rounds=1,
    draft_len=2,
  )
  rows = json.loads((tmp_path / speed_report.JSON).read_text())['rows']
  by_system = {row['system']: row for row in rows}
  assert by_system.keys() == {
    'LLM',
    'LLM, to EOS',
    'SLM',
    'LLM-to-SLM',
    'speculative, to EOS',
  }
  llm, drafts = by_system['LLM, to EOS'], by_system['speculative, to EOS']
  assert drafts['equal_tokens'] == 1
  assert drafts['num_written'] == llm['num_written'] <= NUM_TOKENS
  assert llm['ms_per_token'] == pytest.approx(
    llm['total_ms'] / llm['num_written']
  )


def test_nothing_is_written_after_eos(run):
  folder, _, llm = run
  models, pair = contenders.find_models(
    None, None, str(folder), 'add', 'float32', 0
  )
  prompts = np.random.default_rng(0).integers(3, 264, (2, 6), np.int32)
  batch = {
    'encoder_input_tokens': jnp.asarray(prompts),
    'encoder_segment_ids': jnp.ones(prompts.shape, jnp.int32),
  }
  start_id = helpers.vocabulary().start_id
  expected = np.array(
    helpers.generate(
      l2s.build(MODULE.llm_config),
      llm,
      batch,
      max_decode_len=NUM_TOKENS,
      start_id=start_id,
    )
  )
  ids = strategies.Ids(start_id, eos=int(expected[0, 1]), pad=0)
  ends = expected == ids.eos
  expected[np.cumsum(ends, axis=1) - ends > 0] = ids.pad
  models[contenders.LLM] = dataclasses.replace(models[contenders.LLM], ids=ids)
  found = {
    contender.system: contender.start(prompts, NUM_TOKENS)(NUM_TOKENS)
    for contender in contenders.ours(
      models, pair, 'float32', ('none',), 2, to_eos=True
    )
    if contender.eos == ids.eos
  }
  assert found.keys() == {'LLM, to EOS', 'speculative, to EOS'}
  for system, tokens in found.items():
    np.testing.assert_array_equal(tokens, expected, system)


def _with_fingerprint(run_dir, folder, fingerprint):
  """Copies a run, of whose LLM something else is known."""
  shutil.copytree(run_dir, folder)
  path = folder / run_folder.DESCRIPTION
  description = json.loads(path.read_text())
  files.write_json(path, description | {'llm_fingerprint': fingerprint})
  return str(folder)


def test_an_llm_that_has_moved_is_the_one_of_the_run(run, tmp_path):
  folder, _, llm = run
  moved = tmp_path / 'moved'
  shutil.copytree(folder.parent / 'llm', moved)
  shapes = shapes_lib.of_model(MODULE.llm_config)
  encodes = {p: s for p, s in shapes.items() if p[0] in l2s.ENCODER}
  _, fingerprint = source_lib.load(
    opening.open_source(str(moved)),
    traverse_util.unflatten_dict(encodes),
    traverse_util.unflatten_dict(
      dict.fromkeys(
        encodes, jax.sharding.SingleDeviceSharding(jax.devices()[0])
      )
    ),
  )

  def load(fingerprint, name, tower):
    copy = _with_fingerprint(folder, tmp_path / name, fingerprint)
    models, pair = contenders.find_models(
      tower, None, copy, 'add', 'float32', 0
    )
    return list(contenders.ours(models, pair, 'float32', ('none',), 0))

  there = system_lib.Tower(path=str(moved))
  assert len(load(fingerprint, 'known', there)) == 3
  with pytest.raises(ValueError, match='LLM_PATH=.*moved .*CHECKPOINT_PATH='):
    load('0' * 64, 'other', there)
  with pytest.raises(ValueError, match='LLM is set, but CHECKPOINT_PATH='):
    load(None, 'fresh', system_lib.Tower(config=helpers.T5_1_0))
  to_huggingface.save(
    random_weights.RandomWeights(helpers.T5_1_0, 0), tmp_path / 'small', None
  )
  with pytest.raises(ValueError, match='LLM_PATH=.*small and CHECKPOINT_PATH='):
    load(None, 'wrong', system_lib.Tower(path=str(tmp_path / 'small')))


def test_a_run_of_one_model_is_no_pair(tmp_path):
  system = helpers.system(helpers.MODULES['t5_1_1'])
  run_folder.save(system, tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  slm = system_lib.Tower(config=helpers.T5_1_0)
  with pytest.raises(ValueError, match='is a single language model, but SLM'):
    contenders.find_models(None, slm, str(tmp_path), 'add', 'float32', 0)


def test_random_weights_do_not_depend_on_the_other_model():
  slm = system_lib.Tower(config=helpers.T5_1_0)
  llm = system_lib.Tower(config=helpers.T5_1_1)
  path = ('token_embedder', 'embedding')
  alone, beside = (
    contenders.find_models(other, slm, None, 'add', 'float32', 0)[0]
    for other in (None, llm)
  )
  np.testing.assert_array_equal(
    alone[contenders.SLM].source.read(path),
    beside[contenders.SLM].source.read(path),
  )
