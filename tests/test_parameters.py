# SPDX-License-Identifier: Apache-2.0
"""A run's frozen LLM is the one that it was trained with, or it is refused."""

import dataclasses
import shutil

import helpers
import jax
import optax
import pytest
from flax import traverse_util

from l2s_jax.models import l2s
from l2s_jax.runtime import integrity, partitioning
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint, resuming
from l2s_jax.weights import converted, source

MODULE = helpers.MODULES['llm_to_t5_1_0-add-shared']


def write_llm(folder, seed):
  """Writes the LLM of a seed as a converted folder; returns its source."""
  folder.mkdir()
  config = MODULE.llm_config
  source = helpers.Arrays(
    config, helpers.random_params(l2s.build(config), seed)
  )
  converted.save(source, folder)
  return source


def load_frozen(system, **options):
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, mesh_config)
  return parameters.load_frozen(system, layout, **options)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Returns a folder with two LLMs, and a run that was begun with the first."""
  folder = tmp_path_factory.mktemp('parameters')
  write_llm(folder / 'first', 1)
  write_llm(folder / 'second', 2)
  system, _ = load_frozen(fresh(folder / 'first'))
  run_folder.save(system, folder / 'run')
  return folder


def fresh(llm_path):
  return dataclasses.replace(
    helpers.system(MODULE), sources={'llm': str(llm_path)}
  )


def change_a_byte(folder, source_path):
  """Flips the last bit of one tensor's last number in a converted folder."""
  (file,) = folder.glob('*.safetensors')
  content = file.read_bytes()
  tensor = converted.ConvertedFolder(folder).read(source_path).tobytes()
  assert content.count(tensor) == 1
  end = content.index(tensor) + len(tensor)
  changed = bytes([content[end - 1] ^ 1])
  file.write_bytes(content[: end - 1] + changed + content[end:])


def test_the_llm_of_the_run_is_taken_wherever_it_lies(folders, tmp_path):
  moved = tmp_path / 'moved'
  shutil.copytree(folders / 'first', moved)
  system, frozen = load_frozen(
    run_folder.load(folders / 'run', llm_path=str(moved))
  )
  again, expected = load_frozen(fresh(folders / 'first'))
  assert system.llm_fingerprint == again.llm_fingerprint
  helpers.assert_trees_equal(frozen, expected)


def test_evaluation_refuses_another_llm(folders):
  run = run_folder.load(folders / 'run', llm_path=str(folders / 'second'))
  other, _ = load_frozen(fresh(folders / 'second'))
  with pytest.raises(ValueError, match='is not the LLM of this run') as error:
    load_frozen(run)
  assert run.llm_fingerprint and other.llm_fingerprint
  assert run.llm_fingerprint != other.llm_fingerprint
  for text in (
    str(folders / 'second'),
    f'its fingerprint is {other.llm_fingerprint[:16]}',
    f'the run expects {run.llm_fingerprint[:16]}',
    'Set LLM_PATH',
  ):
    assert text in str(error.value)


def test_a_resumed_run_refuses_another_llm(folders):
  description = (folders / 'run' / run_folder.DESCRIPTION).read_bytes()
  run = run_folder.load(folders / 'run')
  system = run_folder.pin_llm(fresh(folders / 'second'), folders / 'run')
  other, _ = load_frozen(system)
  with pytest.raises(ValueError, match='holds another run') as error:
    run_folder.save(other, folders / 'run')
  assert run.llm_fingerprint and other.llm_fingerprint
  assert run.llm_fingerprint in str(error.value)
  assert other.llm_fingerprint in str(error.value)
  assert (folders / 'run' / run_folder.DESCRIPTION).read_bytes() == description

  same, _ = load_frozen(fresh(folders / 'first'))
  run_folder.save(same, folders / 'run')


def test_a_changed_byte_is_found_and_its_tensor_named(
  folders, tmp_path, monkeypatch
):
  copy = tmp_path / 'copy'
  shutil.copytree(folders / 'first', copy)
  run = run_folder.load(folders / 'run', llm_path=str(copy))
  load_frozen(run)
  path = ('encoder', 'layers', 'mlp', 'wi_0', 'kernel')
  change_a_byte(copy, path)
  with pytest.raises(ValueError, match='was changed after') as error:
    load_frozen(run)
  head, *names = str(error.value).splitlines()
  assert str(copy) in head
  assert names == [f'  {"/".join(path)}']
  # With VERIFY=False the digests beside the weights are believed.
  monkeypatch.setattr(integrity, 'verification', lambda: False)
  load_frozen(run)


def test_an_llm_that_is_not_there_is_asked_for(folders):
  run = run_folder.load(folders / 'run', llm_path=str(folders / 'third'))
  with pytest.raises(FileNotFoundError, match='third. Set LLM_PATH'):
    load_frozen(run)


def test_what_comes_from_weights_is_not_initialised_first(tmp_path):
  """The program that makes the rest has no room for it."""
  source = write_llm(tmp_path / 'slm', 3)
  module = l2s.LlmToSlm(MODULE.llm_config, MODULE.llm_config)
  system = dataclasses.replace(
    helpers.system(module), sources={'slm': str(tmp_path / 'slm')}
  )
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, mesh_config)
  loaded = parameters.load_pretrained(system, layout)
  assert loaded.keys() == {'slm'}
  helpers.assert_trees_equal(
    loaded['slm'], traverse_util.unflatten_dict(source.arrays)
  )

  def is_projectors(path):
    return path.startswith('projector/')

  def initialise(only):
    return jax.jit(
      lambda key: partitioning.unbox(parameters.init(system, key, only))[
        'params'
      ]
    )

  key = jax.random.key(0)
  memory = initialise(is_projectors).lower(key).compile().memory_analysis()
  size = memory.temp_size_in_bytes + memory.output_size_in_bytes
  assert 0 < size < sum(x.nbytes for x in source.arrays.values()) / 4
  # Alone, the projector begins as it does beside a fresh SLM.
  helpers.assert_trees_equal(
    initialise(is_projectors)(key)['projector'],
    initialise(None)(key)['projector'],
  )
  state = resuming.restore_or_create(
    system,
    layout,
    optax.identity(),
    mesh,
    checkpoint.Checkpointer(tmp_path / 'run'),
    seed=0,
  )
  assert state.trainable.keys() == {'slm', 'projector'}
  helpers.assert_trees_equal(state.trainable['slm'], loaded['slm'])
  helpers.assert_trees_equal(
    state.trainable['projector'], initialise(None)(key)['projector']
  )


def beside(system, fingerprint):
  """Returns a system whose LLM's states come from a cache."""
  states = system_lib.CachedStates('there', 'int8', fingerprint)
  return dataclasses.replace(system, cached_states=states)


def test_beside_cached_states_nothing_of_the_llm_is_held(folders, tmp_path):
  """Its fingerprint is that of its weights, with digests beside or without."""
  known, whole = load_frozen(fresh(folders / 'first'))
  assert known.llm_fingerprint is not None
  system, frozen = load_frozen(
    beside(fresh(folders / 'first'), known.llm_fingerprint)
  )
  assert not frozen
  assert system.llm_fingerprint == known.llm_fingerprint
  # Of a run it is known: the weights need not be there.
  gone = run_folder.load(folders / 'run', llm_path=str(tmp_path / 'gone'))
  system, frozen = load_frozen(beside(gone, known.llm_fingerprint))
  assert not frozen
  # A foreign vocabulary takes the embeddings.
  foreign = dataclasses.replace(
    fresh(folders / 'first'), module=MODULE.clone(shared_vocabulary=False)
  )
  _, frozen = load_frozen(beside(foreign, known.llm_fingerprint))
  embeddings = {'llm': {'token_embedder': whole['llm']['token_embedder']}}
  helpers.assert_trees_equal(frozen, embeddings)


def test_cached_states_of_another_llm_are_refused(folders):
  known, _ = load_frozen(fresh(folders / 'first'))
  assert known.llm_fingerprint is not None
  system = beside(fresh(folders / 'second'), known.llm_fingerprint)
  with pytest.raises(ValueError, match='there has the states of another LLM'):
    load_frozen(system)
  moved = run_folder.load(folders / 'run', llm_path=str(folders / 'first'))
  with pytest.raises(ValueError, match=f'fingerprint {"0" * 16}, LLM_PATH has'):
    load_frozen(beside(moved, '0' * 64))


def test_a_fingerprint_is_that_of_tensors_with_digests_or_without(monkeypatch):
  arrays = helpers.Arrays(
    MODULE.llm_config, helpers.random_params(l2s.build(MODULE.llm_config))
  )
  shapes = traverse_util.unflatten_dict(arrays.shapes())
  kept = source.read_fingerprint(arrays, shapes)
  monkeypatch.setattr(arrays, 'digest', lambda path: None)
  assert source.read_fingerprint(arrays, shapes) == kept


@pytest.mark.parametrize(
  'name',
  ['t5_1_0', 'llm_to_t5_1_0-add-shared', 'llm_to_gpt2-replace-foreign'],
)
def test_the_layout_is_of_the_parameters_that_are_initialised(name):
  system = helpers.system(helpers.MODULES[name])
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, mesh_config)
  shapes, axes = partitioning.abstract_params(
    lambda key: parameters.init(system, key)
  )
  assert layout.axes == axes
  assert jax.tree.map(lambda x: x.shape, layout.shapes) == jax.tree.map(
    lambda x: x.shape, shapes
  )
