# SPDX-License-Identifier: Apache-2.0
"""A run's folder describes its system, and is not overwritten by another."""

import dataclasses
import json

import helpers
import jax
import numpy as np
import pytest

from l2s_jax import (
  cldr,
  parameters,
  partition,
  run_format,
  systems,
  vocabularies,
)
from l2s_jax.models import l2s


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp('systems') / 'tiny.model'
  texts = (e['prompt'] for e in cldr.examples('train', num_examples=300))
  vocabularies.train_sentencepiece(
    texts, path, vocab_size=120, hard_vocab_limit=False
  )
  return str(path)


@pytest.fixture
def config(vocabulary):
  size = vocabularies.load(vocabulary).vocab_size
  return dataclasses.replace(helpers.T5_1_1, vocab_size=size)


@pytest.fixture
def system(config, vocabulary):
  return systems.language_model_system(
    systems.Tower(config=config, vocabulary=vocabulary)
  )


def test_a_saved_system_comes_back(system, tmp_path):
  systems.save(system, tmp_path)
  again = systems.load(tmp_path)
  assert again.module == system.module
  assert again.prompt_vocabulary == system.prompt_vocabulary
  assert again.describe() == system.describe()


def test_how_it_is_computed_may_change_and_what_it_is_may_not(
  system, config, vocabulary, tmp_path
):
  systems.save(system, tmp_path)
  other = dataclasses.replace(config, scan_layers=False, dtype='bfloat16')
  tower = systems.Tower(config=other, vocabulary=vocabulary)
  systems.save(systems.language_model_system(tower), tmp_path)
  assert systems.load(tmp_path).module.config == other

  other = dataclasses.replace(config, mlp_dim=config.mlp_dim + 1)
  tower = systems.Tower(config=other, vocabulary=vocabulary)
  with pytest.raises(ValueError, match=r'config\.mlp_dim: the run has'):
    systems.save(systems.language_model_system(tower), tmp_path)


def test_a_tokenizer_larger_than_the_table_is_refused(config, vocabulary):
  small = dataclasses.replace(config, vocab_size=7)
  with pytest.raises(ValueError, match='embedding table has 7 rows'):
    systems.language_model_system(
      systems.Tower(config=small, vocabulary=vocabulary)
    )


def test_a_config_without_its_percent_sign_is_named():
  with pytest.raises(ValueError, match='percent sign: %T5_1_1_SMALL'):
    systems.Tower(config='T5_1_1_SMALL').load_config()


def test_a_run_keeps_to_the_llm_checkpoint_it_began_with(system, tmp_path):
  l2s_system = dataclasses.replace(
    system,
    module=l2s.LlmToSlm(system.module.config, system.module.config),
    sources={'llm': str(tmp_path / 'llm')},
    frozen=('llm',),
    llm_step=40,
    llm_fingerprint='f' * 64,
  )
  systems.save(l2s_system, tmp_path / 'run')
  fresh = dataclasses.replace(l2s_system, llm_step=None)
  assert systems.pin_llm(fresh, tmp_path / 'run').llm_step == 40
  assert systems.pin_llm(fresh, tmp_path / 'new').llm_step is None


@pytest.mark.parametrize('path', ['gs://bucket/run', 's3://bucket/run'])
def test_buckets_are_refused_not_written_beside_us(path):
  with pytest.raises(ValueError, match='MODEL_DIR=.*mount the bucket'):
    systems.local_folder(path, 'MODEL_DIR')


def test_summary_counts_frozen_and_trainable(system):
  mesh_config = partition.MeshConfig(data=1)
  mesh = partition.make_mesh(mesh_config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, mesh_config)
  text = parameters.summary(system, layout, mesh)
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(layout.shapes))
  assert f'trainable parameters: {count:,}' in text
  assert 'frozen parameters: 0' in text
  assert f'bytes per device: parameters {4 * count:,}' in text


def test_description_is_json(system):
  assert json.loads(json.dumps(system.describe()))['format_version'] == (
    run_format.FORMAT_VERSION
  )
