# SPDX-License-Identifier: Apache-2.0
"""Every gin file parses, and every experiment builds, under eval_shape."""

import dataclasses
import gzip
import importlib
import pathlib
import re

import gin
import helpers
import pytest

from l2s_jax import __main__
from l2s_jax.data import cldr
from l2s_jax.interop import to_huggingface
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.runtime import gin_config
from l2s_jax.systems import builders, run_folder, system
from l2s_jax.training import train
from l2s_jax.vocabularies import sentencepiece

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / 'gin_configs'
EXPERIMENTS = sorted((CONFIGS / 'experiments').glob('*.gin'))
MACRO = re.compile(r'^([A-Z0-9_]+) = (.*)', re.MULTILINE)

for module in __main__.CONFIGURABLE_MODULES:
  importlib.import_module(module)


@pytest.fixture(scope='module')
def values(tmp_path_factory):
  """What a user would set: a tokenizer, an LLM's run, HF folders."""
  folder = tmp_path_factory.mktemp('gin_configs')
  vocabulary = folder / 'tiny.model'
  examples = cldr.examples('train', num_examples=500)
  sentencepiece.train(
    (text for e in examples for text in (e['prompt'], e['answer'])),
    vocabulary,
    vocab_size=300,
    hard_vocab_limit=False,
  )
  config = config_lib.TransformerConfig(
    vocab_size=400,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
  )
  tower = system.Tower(config=config, vocabulary=str(vocabulary))
  run_folder.save(builders.language_model_system(tower), folder / 'llm')
  for split in ('train', 'val', 'test_2016_flickr'):
    for language in ('en', 'de'):
      with gzip.open(folder / f'{split}.{language}.gz', 'wt') as file:
        file.write('Two words.\n')
  for split in ('train', 'validation', 'test'):
    row = '{"prompt": "Two words.", "completion": "One."}\n'
    (folder / f'{split}.jsonl').write_text(row)
  hugging_face = folder / 't5'
  params = helpers.random_params(l2s.build(config))
  to_huggingface.save(helpers.Arrays(config, params), hugging_face, None)
  (hugging_face / 'spiece.model').write_bytes(vocabulary.read_bytes())
  return {
    'MODEL_DIR': folder / 'run',
    'LLM_VOCABULARY': vocabulary,
    'SLM_VOCABULARY': vocabulary,
    'LLM_PATH': folder / 'llm',
    'TEACHER_PATH': folder / 'llm',
    'SLM_PATH': hugging_face,
    'DATA_DIR': folder,
    'CHECKPOINT_PATH': folder / 'llm',
    'INPUT': '-',
    'CACHE_DIR': folder / 'cache',
    'DISTILL_DIR': folder / 'distilled',
    'DATA_FILES': "{'train': 'train.jsonl'}",
  }


def bindings_for(text, values):
  """Values for the macros that the text asks the user to set."""
  last = dict(MACRO.findall(text))  # a later line overrides
  names = {name for name, value in last.items() if value == '%gin.REQUIRED'}
  # A vocabulary is asked for by the model, once it has no weights to have it.
  for tower in ('LLM', 'SLM'):
    if re.search(rf'^{tower} = %[A-Z]', text, re.MULTILINE):
      names.add(f'{tower}_VOCABULARY')
  return [f'{name}={values[name]}' for name in sorted(names)]


def text_of(path):
  """The file with those it includes."""
  text = path.read_text(encoding='utf-8')
  for included in re.findall(r"^include '(.*)'", text, re.MULTILINE):
    text = text_of(ROOT / included) + text
  return text


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_build(path, values, capsys):
  gin_config.parse_config([str(path)], bindings_for(text_of(path), values))
  gin_config.check_required(train.train, given=('dry_run',))
  train.train(dry_run=True)
  printed = capsys.readouterr().out
  trainable = re.search(r'^trainable parameters: ([\d,]+)$', printed, re.M)
  assert trainable and int(trainable[1].replace(',', '')) > 0
  assert not values['MODEL_DIR'].exists()


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_say_how_they_are_run(path):
  header = path.read_text(encoding='utf-8')
  assert f'--gin_file=gin_configs/experiments/{path.name}' in header


@pytest.mark.parametrize(
  'path',
  [
    path
    for path in sorted(CONFIGS.rglob('*.gin'))
    if path.parent.name in ('tasks', 'meshes', 'runs')
  ],
  ids=lambda path: path.stem,
)
def test_parts_parse(path, values):
  # A run names macros that its neighbours bind.
  others = {
    'runs': ['MODEL=@language_model_system()', "MIXTURE_OR_TASK_NAME='cldr'"]
    + ["TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}"]
  }.get(path.parent.name, [])
  text = text_of(path)
  needed = [b for b in others if f'%{b.partition("=")[0]}' in text]
  gin_config.parse_config([str(path)], bindings_for(text, values) + needed)
  assert gin.config_str().strip()


def test_every_configurable_module_is_imported_without_tensorflow():
  for verb in __main__.VERBS.values():
    assert verb.module in __main__.CONFIGURABLE_MODULES


def test_defaults_live_in_the_dataclass():
  fields = {f.name for f in dataclasses.fields(config_lib.TransformerConfig)}
  for path in sorted((CONFIGS / 'models').glob('*.gin')):
    text = path.read_text(encoding='utf-8')
    block = re.findall(r'^  (\w+) = ', text, re.MULTILINE)
    assert set(block) <= fields, path
