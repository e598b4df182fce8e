# SPDX-License-Identifier: Apache-2.0
"""A pretrained model answers without a step of training, in any format."""

import dataclasses
import json
import shutil

import helpers
import numpy as np
import pytest
import test_gguf_file
import tokenizers

from l2s_jax.evaluation import evaluate
from l2s_jax.inference import infer
from l2s_jax.interop import convert, to_huggingface, to_t5x
from l2s_jax.models import l2s
from l2s_jax.performance import contenders
from l2s_jax.runtime import partitioning
from l2s_jax.systems import builders, model_paths, parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import opening

T5 = dataclasses.replace(test_gguf_file.T5_1_1, relpos_buckets=32)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Returns one T5 in all forms, a GPT-2, and the tokenizer of both."""
  root = tmp_path_factory.mktemp('came')
  vocabulary = helpers.vocabulary()
  vocabulary.save(root / 'tokenizer')
  source = helpers.Arrays(T5, helpers.random_params(l2s.build(T5)))
  to_huggingface.save(source, root / 'hf', vocabulary)
  vocabulary.save(root / 'hf')
  to_t5x.save(source, root / 't5x')
  convert.convert(str(root / 'hf'), str(root / 'l2s'), from_='hf', to='l2s')
  gpt2 = helpers.Arrays(
    helpers.GPT2, helpers.random_params(l2s.build(helpers.GPT2))
  )
  to_huggingface.save(gpt2, root / 'gpt2', vocabulary)
  vocabulary.save(root / 'gpt2')
  return root


def answers(location, tmp_path, **options):
  """Returns what `infer` writes for two prompts, and its token ids."""
  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('a red box\nthe cat\n')
  out = tmp_path / f'out-{location.name}'
  infer.infer(
    str(location),
    str(prompts),
    str(out),
    prompt_length=16,
    max_decode_len=4,
    batch_size=8,
    **options,
  )
  lines = (out / 'predictions.jsonl').read_text().splitlines()
  return [json.loads(line)['prediction'] for line in lines]


def test_all_forms_of_a_model_answer_alike(folders, tmp_path):
  given = {'vocabulary': str(folders / 'tokenizer')}
  before = {path: path.stat().st_mtime_ns for path in folders.rglob('*')}
  expected = answers(folders / 'hf', tmp_path)
  assert answers(folders / 'l2s', tmp_path) == expected
  assert answers(folders / 't5x', tmp_path, **given) == expected
  # Nothing is written beside what others have written.
  after = {path: path.stat().st_mtime_ns for path in folders.rglob('*')}
  assert after == before


def test_the_parameters_are_those_of_the_files(folders, tmp_path):
  gguf = tmp_path / 'model.gguf'
  flat = helpers.Arrays(T5, helpers.random_params(l2s.build(T5))).arrays
  test_gguf_file.CONFIGS['t5-as-it-came'] = T5
  test_gguf_file.write(gguf, 't5-as-it-came', flat)
  vocabulary = str(folders / 'tokenizer')
  mesh = partitioning.make_mesh(partitioning.MeshConfig())
  for path in (gguf, folders / 't5x', folders / 'gpt2'):
    system = model_paths.load(str(path), vocabulary=vocabulary)
    assert system.describe()['kind'] == 'language_model'
    with partitioning.use_mesh(mesh):
      layout = parameters.layout(system, mesh, partitioning.MeshConfig())
      found = parameters.load_params(system, layout, str(path))
    config = helpers.GPT2 if path.name == 'gpt2' else T5
    helpers.assert_trees_equal(found, helpers.random_params(l2s.build(config)))


def test_a_decoder_reads_the_prompt_in_its_own_words(folders, tmp_path):
  path = folders / 'gpt2'
  baseline = builders.language_model_system(system_lib.Tower(path=str(path)))
  system = model_paths.load(str(path))
  assert system.module == baseline.module
  assert system.prompt_vocabulary == system.answer_vocabulary
  assert len(answers(path, tmp_path)) == 2


def with_bos(folder, tmp_path):
  """Returns a copy of a model whose tokenizer puts BOS in front of a text."""
  path = tmp_path / 'with_bos'
  shutil.copytree(folder, path)
  ids = json.loads((path / 'vocab.json').read_text())
  for name in ('vocab.json', 'merges.txt'):
    (path / name).unlink()
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(['<|endoftext|>'])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='% $A', special_tokens=[('%', ids['%'])]
  )
  tokenizer.save(str(path / 'tokenizer.json'))
  return path


def test_a_decoder_only_llm_reads_bos_first_and_a_run_keeps_to_it(
  folders, tmp_path
):
  slm = system_lib.Tower(path=str(folders / 'hf'))

  def build(path, **given):
    return builders.llm_to_slm_system(
      system_lib.Tower(path=str(path)), slm, **given
    )

  path = with_bos(folders / 'gpt2', tmp_path)
  assert build(folders / 'hf').module.llm_prefix_ids == ()
  system = build(path)
  (percent,) = system.prompt_vocabulary.encode('%')
  assert system.module.llm_prefix_ids == (percent,)
  run_folder.save(system, tmp_path / 'run')
  loaded = run_folder.load(tmp_path / 'run').module
  assert loaded == system.module
  # An earlier version read no prefix: its runs go on without.
  description = tmp_path / 'run' / run_folder.DESCRIPTION
  content = json.loads(description.read_text())
  del content['llm_prefix_ids']
  description.write_text(json.dumps(content))
  pinned = run_folder.pin_llm(build(path), tmp_path / 'run')
  assert pinned.module.llm_prefix_ids == ()
  run_folder.save(pinned, tmp_path / 'run')


def test_a_decoder_only_llm_reads_both_ways_where_asked(folders):
  slm = system_lib.Tower(path=str(folders / 'hf'))
  llm = system_lib.Tower(path=str(folders / 'gpt2'))
  system = builders.llm_to_slm_system(llm, slm, llm_bidirectional=True)
  assert system.module.llm_config.bidirectional_prefix
  with pytest.raises(ValueError, match='LLM_BIDIRECTIONAL=True is for a deco'):
    builders.llm_to_slm_system(slm, slm, llm_bidirectional=True)


def test_a_model_without_a_tokenizer_asks_for_it_by_name(folders):
  with pytest.raises(ValueError, match='t5x has no supported .*set VOCABUL'):
    model_paths.load(str(folders / 't5x'))
  tower = system_lib.Tower(path=str(folders / 't5x'))
  with pytest.raises(ValueError, match='set LLM_VOCABULARY / SLM_VOCABULARY'):
    builders.language_model_system(tower)


def test_a_checkpoint_of_t5x_is_an_llm(folders):
  given = str(folders / 'tokenizer')
  system = builders.llm_to_slm_system(
    system_lib.Tower(path=str(folders / 't5x'), vocabulary=given),
    system_lib.Tower(path=str(folders / 'gpt2')),
  )
  assert system.module.llm_config.to_json() == (
    opening.open_source(str(folders / 't5x')).config.to_json()
  )
  mesh = partitioning.make_mesh(partitioning.MeshConfig())
  with partitioning.use_mesh(mesh):
    layout = parameters.layout(system, mesh, partitioning.MeshConfig())
    system, frozen = parameters.load_frozen(system, layout)
  assert system.llm_step == 1
  found = np.asarray(frozen['llm']['token_embedder']['embedding'])
  expected = helpers.random_params(l2s.build(T5))
  np.testing.assert_array_equal(found, expected['token_embedder']['embedding'])


def test_scores_of_a_model_model_paths_need_a_folder(folders):
  arguments = {
    'checkpoint_path': str(folders / 'hf'),
    'mixture_or_task_name': 'any',
    'task_feature_lengths': {'inputs': 8, 'targets': 8},
    'batch_size': 8,
  }
  with pytest.raises(ValueError, match='not a run.*pretrained.* EVAL_OUTPUT'):
    evaluate.evaluate(**arguments)


@pytest.mark.parametrize('step', ['best', 3])
def test_what_has_one_model_has_no_steps(folders, step):
  path = str(folders / 'hf')
  with pytest.raises(ValueError, match='Leave'):
    model_paths.choose_step(path, step, 'INFER_STEP')
  assert model_paths.choose_step(path, None, 'INFER_STEP') == 0
  assert model_paths.choose_step(str(folders / 't5x'), 1, 'INFER_STEP') == 1


def test_what_a_run_has_is_not_given_beside_it(tmp_path):
  run_folder.save(helpers.system(helpers.MODULES['t5_1_1']), tmp_path)
  with pytest.raises(ValueError, match='Leave VOCABULARY and EXTRA_IDS unset'):
    model_paths.load(str(tmp_path), vocabulary='spiece.model')


def test_a_model_alone_is_timed_as_the_llm(folders):
  path = str(folders / 'hf')
  models, pair = contenders.find_models(None, None, path, 'add', 'float32', 0)
  assert pair is None
  assert list(models) == [contenders.LLM]
  with pytest.raises(ValueError, match='Set both models as LLM_PATH'):
    contenders.find_models(
      None, system_lib.Tower(path=path), path, 'add', 'float32', 0
    )
