# SPDX-License-Identifier: Apache-2.0
"""What older versions wrote is brought up to date; what newer ones is refused.

Folders that older versions wrote are in `test_kept_runs.py`.
"""

import contextlib
import dataclasses
import json

import cache_files
import helpers
import jax
import pytest

import l2s_jax
from l2s_jax.data.cached import cache_format
from l2s_jax.inference import predictions, sampling
from l2s_jax.models import l2s
from l2s_jax.runtime import files, integrity
from l2s_jax.systems import run_folder
from l2s_jax.training import checkpoint
from l2s_jax.training import state as state_lib
from l2s_jax.weights import converted, run_format, runs

MODULE = helpers.MODULES['llm_to_gpt2-add-shared']


@pytest.fixture
def system(tmp_path):
  system = helpers.system(MODULE)
  return dataclasses.replace(system, sources={'llm': str(tmp_path / 'llm')})


@pytest.fixture
def run(system, tmp_path):
  """A run of one checkpoint, which keeps a copy of the description."""
  folder = tmp_path / 'run'
  run_folder.save(system, folder)
  state = state_lib.TrainState(
    step=jax.numpy.int32(1),
    trainable={'slm': {'bias': jax.numpy.zeros(2)}},
    opt_state=(),
    key=jax.random.key_data(jax.random.key(0)),
  )
  with contextlib.closing(checkpoint.Checkpointer(folder)) as checkpointer:
    checkpointer.save(state, {}, system.describe())
  return folder


def change(path, *keys, **values):
  """Puts values into an object of a JSON file."""
  content = json.loads(path.read_text())
  inner = content
  for key in keys:
    inner = inner[key]
  inner.update(values)
  path.write_text(json.dumps(content))


def refusals(system, run):
  """Returns what each reader of a run says against it."""
  said = []
  for read in (
    lambda: run_folder.load(run),
    lambda: run_folder.save(system, run),
    lambda: run_folder.pin_llm(system, run),
    lambda: runs.Run(run),
  ):
    with pytest.raises(ValueError) as error:
      read()
    said.append(str(error.value))
  return said


@pytest.mark.parametrize(
  'keys', [(), ('slm',), ('llm',), ('vocabularies',), ('special_ids', 'prompt')]
)
def test_unknown_fields_are_refused_with_the_version_that_wrote_them(
  keys, system, run
):
  path = run / run_folder.DESCRIPTION
  change(path, *keys, depth=3)
  change(path, written_by='7.8.9')
  name = '.'.join((*keys, 'depth'))
  for said in refusals(system, run):
    assert said == (
      f'{path} has {name}, which this l2s_jax ({l2s_jax.__version__}) does not '
      'know; l2s_jax 7.8.9 wrote it. Update l2s_jax, or copy it again from '
      'the original run.'
    )


def test_a_newer_format_is_refused(system, run):
  path = run / run_folder.DESCRIPTION
  newer = run_format.FORMAT_VERSION + 1
  change(path, written_by='7.8.9', format_version=newer)
  for said in refusals(system, run):
    assert said == (
      f'{path} has format version {newer}, written by l2s_jax 7.8.9; this '
      f'l2s_jax ({l2s_jax.__version__}) reads up to {newer - 1}. Update '
      'l2s_jax.'
    )


@pytest.mark.parametrize('version', [0, -1, True, None, '1', 1.0, [1]])
def test_what_is_no_version_is_refused(version, system, run):
  path = run / run_folder.DESCRIPTION
  change(path, format_version=version)
  for said in refusals(system, run):
    assert said.startswith(f'{path}: format_version is ')
    assert 'expected a whole number from 1 to' in said


def test_absent_fields_of_a_config_have_their_defaults(system, run):
  path = run / run_folder.DESCRIPTION
  content = json.loads(path.read_text())
  for key in ('slm', 'llm'):
    for name in ('scale_untied_logits', 'rope_scaling_type', 'quantization'):
      del content[key][name]
  for name in ('llm_layer', 'train_llm', 'llm_prefix_ids'):
    del content[name]
  path.write_text(json.dumps(content))
  assert run_folder.load(run).module == system.module
  run_folder.save(system, run)
  assert json.loads(path.read_text()) == json.loads(
    json.dumps(system.describe())
  )


def test_another_value_than_the_default_is_another_run(system, run):
  path = run / run_folder.DESCRIPTION
  content = json.loads(path.read_text())
  del content['slm']['scale_embeddings']
  path.write_text(json.dumps(content))
  module = system.module
  slm = dataclasses.replace(module.slm_config, scale_embeddings=True)
  other = dataclasses.replace(
    system, module=l2s.LlmToSlm(module.llm_config, slm, 'add', True)
  )
  with pytest.raises(ValueError, match='holds another run') as error:
    run_folder.save(other, run)
  assert 'slm.scale_embeddings: the run has False, the config says True' in (
    str(error.value)
  )


def test_a_version_may_differ_from_the_one_that_wrote_a_run(
  system, run, monkeypatch
):
  monkeypatch.setattr(l2s_jax, '__version__', '7.8.9')
  run_folder.load(run)
  run_folder.save(system, run)
  content = json.loads((run / run_folder.DESCRIPTION).read_text())
  assert content['written_by'] == '7.8.9'
  run_folder.load(run)  # Beside a checkpoint of the version before.


def test_a_migration_reaches_all_readers(system, run, monkeypatch):
  assert set(run_format.MIGRATIONS) == set(range(1, run_format.FORMAT_VERSION))
  now = run_format.FORMAT_VERSION
  seen = []

  def migration(kind, description):
    seen.append(kind)
    assert description['format_version'] == now
    return description | {'frozen_dtype': 'bfloat16', 'injection': 'replace'}

  monkeypatch.setattr(run_format, 'FORMAT_VERSION', now + 1)
  monkeypatch.setitem(run_format.MIGRATIONS, now, migration)
  module = run_folder.load(run).module
  assert isinstance(module, l2s.LlmToSlm) and module.injection == 'replace'
  assert seen == [run_format.RUN] * 2  # The copy in the checkpoint, too.
  with pytest.raises(ValueError, match="injection: the run has 'replace'"):
    run_folder.save(system, run)
  assert runs.Run(run).description['injection'] == 'replace'


def test_a_converted_folder_names_its_writer(tmp_path):
  params = helpers.random_params(l2s.build(helpers.T5_1_1))
  converted.save(helpers.Arrays(helpers.T5_1_1, params), tmp_path)
  path = tmp_path / converted.DESCRIPTION
  assert json.loads(path.read_text()).items() >= run_format.stamp().items()
  content = json.loads(path.read_text())
  del content['digest']  # Which says that the rest is as it was written.
  content['config']['depth'] = 3
  content['written_by'] = '7.8.9'
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError) as error:
    converted.ConvertedFolder(tmp_path)
  assert f'{path} has config.depth, which this l2s_jax' in str(error.value)
  assert 'l2s_jax 7.8.9 wrote it. Update l2s_jax, or' in str(error.value)
  change(path, format_version=run_format.FORMAT_VERSION + 1)
  with pytest.raises(ValueError, match='written by l2s_jax 7.8.9; .* Update'):
    converted.ConvertedFolder(tmp_path)


def test_answers_of_an_older_version_go_on(tmp_path):
  now = dataclasses.asdict(sampling.Decoding())
  older = {key: now[key] for key in now if key != 'repetition_penalty'}
  path = tmp_path / predictions.SETTINGS
  path.write_text(json.dumps({'format_version': 1, 'decoding': older}))
  predictions.settle(tmp_path, {'decoding': now}, {'decoding': now})
  other = now | {'repetition_penalty': 1.5}
  with pytest.raises(ValueError, match='decoding.repetition_penalty: the run'):
    predictions.settle(tmp_path, {'decoding': other}, {'decoding': now})
  change(path, 'decoding', depth=3)
  with pytest.raises(ValueError, match='has decoding.depth, which this l2s'):
    predictions.settle(tmp_path, {'decoding': now}, {'decoding': now})


def test_a_cache_names_its_writer_and_older_ones_are_read(tmp_path):
  examples: list[cache_files.Example] = [([3, 1], [4, 1], {})] * 3
  folder = cache_files.write(tmp_path / 'cache', {'local': {'train': examples}})
  path = folder / cache_format.FILE
  content = dict(cache_format.open_cache(folder).content)
  assert content.items() >= run_format.stamp().items()

  def rewrite(changed):
    files.write_json(path, integrity.seal(changed))

  older = content | {'format_version': 1}
  del older['written_by']
  rewrite(older)
  found = cache_format.open_cache(folder)
  assert found.content == content | {'written_by': None}
  assert len(found.split('local', 'train').read([0, 1, 2])) == 3
  theirs = content | {'written_by': '7.8.9'}
  rewrite(theirs | {'format_version': run_format.FORMAT_VERSION + 1})
  with pytest.raises(ValueError, match='written by l2s_jax 7.8.9; .* Update'):
    cache_format.open_cache(folder)
  theirs['tasks']['local']['splits']['train']['depth'] = 3
  rewrite(theirs)
  with pytest.raises(ValueError) as error:
    cache_format.open_cache(folder)
  said = str(error.value)
  assert f'{path} has tasks.local.splits.train.depth, which this' in said
  assert 'l2s_jax 7.8.9 wrote it. Update l2s_jax, or copy' in said
