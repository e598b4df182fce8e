# SPDX-License-Identifier: Apache-2.0
"""Where answers start and end, from a model's folder to runs and exports."""

import dataclasses
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_runs

from l2s_jax import __main__ as command_line
from l2s_jax.data import batching
from l2s_jax.inference import generate, sampling, strategies
from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s
from l2s_jax.performance import random_weights
from l2s_jax.systems import builders, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import loading, sentencepiece
from l2s_jax.weights.formats import huggingface

WORDS = [f'red {n} blue green box lamp door cat' for n in range(100, 400)]


@pytest.fixture
def madlad(tmp_path):
  """Returns a T5 of MADLAD's kind: starts with 0, padded by 1, ends by 2."""
  folder = tmp_path / 'madlad'
  vocabulary = sentencepiece.train(
    WORDS,
    folder / 'spiece.model',
    vocab_size=40,
    pad_id=-1,
    bos_id=1,
    eos_id=2,
    unk_id=0,
  )
  config = dataclasses.replace(
    helpers.T5_1_1, vocab_size=vocabulary.vocab_size + 5
  )
  ids = {'decoder_start_token_id': 0, 'eos_token_id': 2, 'pad_token_id': 1}
  source = random_weights.RandomWeights(config, seed=0)
  source.model_type, source.special_ids = 't5', ids
  to_huggingface.save(source, folder, None)
  (folder / 'generation_config.json').write_text(
    json.dumps(ids | {'eos_token_id': [2, 7], 'max_length': 9})
  )
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(
      {'tokenizer_class': 'T5Tokenizer', 'pad_token': '<s>', 'extra_ids': 0}
    )
  )
  (folder / 'added_tokens.json').write_text(json.dumps({'{': 40, '\n': 41}))
  return folder


def ids_of(vocabulary):
  return vocabulary.start_id, vocabulary.eos_ids, vocabulary.pad_id


def test_a_tokenizer_that_ends_texts_otherwise_is_told(
  madlad, tmp_path, capsys
):
  other = tmp_path / 'other.model'
  sentencepiece.train(WORDS, other, vocab_size=40)
  for path, words in (
    (madlad / 'spiece.model', ''),
    (other, f'{other} ends texts with the ids [1], the model {madlad} with [2'),
  ):
    system_lib.Tower(str(madlad), vocabulary=str(path)).load_vocabulary()
    said = capsys.readouterr().err
    assert words in said and bool(words) == bool(said)


def test_a_folder_a_run_and_exports_have_the_same_ids(madlad, tmp_path):
  transformers = pytest.importorskip('transformers')
  system = builders.language_model_system(system_lib.Tower(path=str(madlad)))
  first = system.answer_vocabulary
  assert ids_of(first) == (0, (2, 7), 1)
  text = 'red {\ncat</s> blue'
  ids = first.encode(text)
  assert {40, 41, 2} <= set(ids)

  run_folder.save(system, tmp_path / 'run')
  described = json.loads((tmp_path / 'run' / 'model.json').read_text())
  assert described['special_ids']['answer'] == {
    'start': 0,
    'eos': [2, 7],
    'pad': 1,
    'bos': None,
  }
  again = run_folder.load(tmp_path / 'run').answer_vocabulary
  assert again == first and ids_of(again) == ids_of(first)
  assert again.encode(text) == ids

  out = {}
  for form in ('hf', 'l2s'):
    out[form] = tmp_path / form
    arguments = ['--from=hf', f'--to={form}', str(madlad), str(out[form])]
    assert not command_line.main(['convert', *arguments])
    exported = system_lib.Tower(path=str(out[form])).load_vocabulary()
    assert exported == first and exported.encode(text) == ids
  theirs = transformers.AutoTokenizer.from_pretrained(out['hf'])
  assert theirs(text, add_special_tokens=False).input_ids == ids
  config = json.loads((out['hf'] / 'config.json').read_text())
  assert config['decoder_start_token_id'] == 0
  assert config['pad_token_id'] == 1


def test_what_a_run_exports_says_where_answers_start_and_end(madlad, tmp_path):
  transformers = pytest.importorskip('transformers')
  system = builders.language_model_system(system_lib.Tower(path=str(madlad)))
  run, out = tmp_path / 'run', tmp_path / 'out'
  saved_runs.save(run, system, helpers.random_params(system.module))
  arguments = ['--from=l2s', '--to=hf', str(run), str(out)]
  assert not command_line.main(['convert', *arguments])
  for name in ('config.json', 'generation_config.json'):
    said = json.loads((out / name).read_text())
    assert said['decoder_start_token_id'] == 0, name
    assert said['eos_token_id'] == [2, 7], name
    assert said['pad_token_id'] == 1, name
  text = 'red {\ncat</s> blue'
  ids = system.answer_vocabulary.encode(text)
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  assert theirs(text, add_special_tokens=False).input_ids == ids
  again = system_lib.Tower(path=str(out)).load_vocabulary()
  assert again.encode(text) == ids
  assert ids_of(again) == ids_of(system.answer_vocabulary)
  assert (
    huggingface.HuggingFaceFolder(out).special_ids['decoder_start_token_id']
    == 0
  )

  l2s_folder = tmp_path / 'l2s'
  arguments = ['--from=l2s', '--to=l2s', str(run), str(l2s_folder)]
  assert not command_line.main(['convert', *arguments])
  said = json.loads((l2s_folder / 'weights.json').read_text())['special_ids']
  assert said['decoder_start_token_id'] == 0 and said['eos_token_id'] == [2, 7]


def test_training_starts_answers_where_inference_does(madlad):
  vocabulary = loading.load(madlad)
  batch = helpers.pad_and_shift(
    [[5, 2]],
    [[6, 7, 2]],
    task_feature_lengths={'inputs': 4, 'targets': 4},
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
  )
  assert batch['decoder_input_tokens'].tolist() == [[0, 6, 7, 1]]
  system = builders.language_model_system(system_lib.Tower(path=str(madlad)))
  ids = vars(generate.generator(system, 3).strategy)['_ids']
  assert (ids.start, ids.eos, ids.pad) == (0, (2, 7), 1)


def test_an_answer_ends_at_any_of_several_ends():
  config = dataclasses.replace(helpers.GPT2, num_decoder_layers=1)
  module = l2s.build(config)
  params = helpers.random_params(module)
  batch = jax.tree.map(
    jnp.asarray,
    batching.prompt_batch([[5, 6, 7]], length=3, pad_id=0, batch_size=1),
  )
  free = np.asarray(
    helpers.generate(module, params, batch, max_decode_len=8, eos_id=-1)
  )[0].tolist()
  end = free[3]
  place = free.index(end) + 1
  cut = np.asarray(
    helpers.generate(
      module, params, batch, max_decode_len=8, eos_id=(config.vocab_size, end)
    )
  )[0].tolist()
  assert cut == free[:place] + [0] * (8 - place)


def test_no_end_of_several_comes_too_early():
  ids = strategies.Ids(0, (3, 5), 0)
  assert ids.end(jnp.arange(7)).tolist() == [n in (3, 5) for n in range(7)]
  logits = sampling.penalize(
    jnp.zeros(7),
    jnp.zeros(4, jnp.int32),
    step=jnp.int32(1),
    decoding=sampling.Decoding(min_decode_len=2),
    eos_id=(3, 5),
  )
  assert np.isneginf(logits).tolist() == [n in (3, 5) for n in range(7)]


def test_a_run_of_an_older_version_keeps_its_vocabulary(
  madlad, tmp_path, capsys
):
  """Versions before read the model file alone: without `{`, start and ends."""
  config = system_lib.Tower(path=str(madlad)).load_config()
  alone = loading.load(madlad / 'spiece.model')
  older = builders.language_model_system(
    system_lib.Tower(config=config, vocabulary=alone.path)
  )
  run_folder.save(older, tmp_path / 'run')
  file = tmp_path / 'run' / 'model.json'
  described = json.loads(file.read_text())
  del described['special_ids']
  file.write_text(json.dumps(described))
  assert ids_of(run_folder.load(tmp_path / 'run').answer_vocabulary) == (
    ids_of(alone)
  )

  now = builders.language_model_system(system_lib.Tower(path=str(madlad)))
  assert now.answer_vocabulary != alone
  kept = run_folder.pin_llm(now, tmp_path / 'run')
  assert kept.answer_vocabulary == alone == kept.prompt_vocabulary
  assert 'keeps the tokenizers of its first start' in capsys.readouterr().out
  run_folder.save(kept, tmp_path / 'run')
  with pytest.raises(ValueError, match='holds another run'):
    run_folder.save(now, tmp_path / 'run')
  # Another tokenizer is not taken for an older reading of this one.
  other = dataclasses.replace(
    now, prompt_vocabulary=helpers.vocabulary(), answer_vocabulary=alone
  )
  assert run_folder.pin_llm(other, tmp_path / 'run') is other
