# SPDX-License-Identifier: Apache-2.0
"""A run's folder describes its system, and is not overwritten by another."""

import dataclasses
import json

import helpers
import jax
import numpy as np
import pytest

from l2s_jax.data import cldr
from l2s_jax.models import l2s
from l2s_jax.runtime import files, partitioning
from l2s_jax.systems import builders, parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import loading, sentencepiece
from l2s_jax.weights import run_format


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp('systems') / 'tiny.model'
  texts = (e['prompt'] for e in cldr.examples('train', num_examples=300))
  sentencepiece.train(texts, path, vocab_size=120, hard_vocab_limit=False)
  return str(path)


@pytest.fixture
def config(vocabulary):
  size = loading.load(vocabulary).vocab_size
  return dataclasses.replace(helpers.T5_1_1, vocab_size=size)


@pytest.fixture
def system(config, vocabulary):
  return builders.language_model_system(
    system_lib.Tower(config=config, vocabulary=vocabulary)
  )


def test_a_saved_system_comes_back(system, tmp_path):
  run_folder.save(system, tmp_path)
  again = run_folder.load(tmp_path)
  assert again.module == system.module
  assert again.prompt_vocabulary == system.prompt_vocabulary
  assert again.describe() == system.describe()


def test_how_it_is_computed_may_change_and_what_it_is_may_not(
  system, config, vocabulary, tmp_path
):
  run_folder.save(system, tmp_path)
  other = dataclasses.replace(config, scan_layers=False, dtype='bfloat16')
  tower = system_lib.Tower(config=other, vocabulary=vocabulary)
  run_folder.save(builders.language_model_system(tower), tmp_path)
  assert run_folder.load(tmp_path).module.config == other

  other = dataclasses.replace(config, mlp_dim=config.mlp_dim + 1)
  tower = system_lib.Tower(config=other, vocabulary=vocabulary)
  with pytest.raises(ValueError, match=r'config\.mlp_dim: the run has'):
    run_folder.save(builders.language_model_system(tower), tmp_path)


def test_a_tokenizer_larger_than_the_table_is_refused(config, vocabulary):
  small = dataclasses.replace(config, vocab_size=7)
  with pytest.raises(ValueError, match='embedding table has 7 rows'):
    builders.language_model_system(
      system_lib.Tower(config=small, vocabulary=vocabulary)
    )


def test_a_config_without_its_percent_sign_is_named():
  with pytest.raises(ValueError, match='write %T5_1_1_SMALL and add'):
    system_lib.Tower(config='T5_1_1_SMALL').load_config()


def test_a_run_keeps_to_the_llm_checkpoint_it_began_with(system, tmp_path):
  l2s_system = dataclasses.replace(
    system,
    module=l2s.LlmToSlm(system.module.config, system.module.config),
    sources={'llm': str(tmp_path / 'llm')},
    frozen=('llm',),
    llm_step=40,
    llm_fingerprint='f' * 64,
  )
  run_folder.save(l2s_system, tmp_path / 'run')
  fresh = dataclasses.replace(l2s_system, llm_step=None)
  assert run_folder.pin_llm(fresh, tmp_path / 'run').llm_step == 40
  assert run_folder.pin_llm(fresh, tmp_path / 'new').llm_step is None


@pytest.mark.parametrize('path', ['gs://bucket/run', 's3://bucket/run'])
def test_buckets_are_refused_not_written_beside_us(path):
  with pytest.raises(ValueError, match='CACHE_DIR=.*mount the bucket'):
    files.local_folder(path, 'CACHE_DIR')


def test_summary_counts_frozen_and_trainable(system):
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, mesh_config)
  text = parameters.summary(system, layout, mesh)
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(layout.shapes))
  assert f'trainable parameters: {count:,}' in text
  assert 'frozen parameters: 0' in text
  assert f'bytes per device: parameters {4 * count:,}' in text


def test_description_is_json(system):
  assert (
    json.loads(json.dumps(system.describe()))['format_version']
    == run_format.FORMAT_VERSION
  )
