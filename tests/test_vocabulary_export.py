# SPDX-License-Identifier: Apache-2.0
"""AutoTokenizer of transformers reads exported tokenizers as we do.

The families are those of `huggingface.FAMILIES`; the tokenizers are made here,
and real ones are read where there are data.
"""

import dataclasses
import gzip
import json
import shutil
from typing import Any

import helpers
import pytest

from l2s_jax.vocabularies import export, loading, sentencepiece
from l2s_jax.weights.formats import huggingface

WORDS = [f'the {n} small cats sat on a mat' for n in range(100, 400)]
TEXTS = (
  'the 123 small cats',
  '  sat  on a\tmat ',
  'ﬁve ² ș 日',
  '',
  'cats\n',
  'a    a',
)
BPE: dict[str, Any] = {
  'model_type': 'bpe',
  'bos_id': 2,
  'unk_id': 3,
  'vocab_size': 300,
}
TRAINED: dict[str, dict[str, Any]] = {
  'unigram': {'vocab_size': 45},
  'unigram-bytes': {'byte_fallback': True, 'vocab_size': 300},
  # As Llama and Gemma have it.
  'bpe': BPE
  | {
    'byte_fallback': True,
    'normalization_rule_name': 'identity',
    'remove_extra_whitespaces': False,
    'user_defined_symbols': ['<turn>', '▁▁'],
  },
  'bpe-without-prefix': BPE | {'add_dummy_prefix': False},
}
CONFIGS = {
  't5': helpers.T5_1_0,
  'umt5': helpers.UMT5,
  'gpt2': helpers.GPT2,
  'gpt_neox': helpers.PYTHIA,
  'llama': helpers.LLAMA,
  'mistral': helpers.MISTRAL,
  'olmo2': helpers.OLMO2,
  'smollm3': helpers.SMOLLM3,
  'qwen2': helpers.QWEN2,
  'qwen3': helpers.QWEN3,
  'gemma2': dataclasses.replace(
    helpers.GEMMA3, qk_norm=False, rope_local_base=None
  ),
  'gemma3_text': helpers.GEMMA3,
  't5gemma': helpers.T5GEMMA,
}


@pytest.fixture(scope='module', params=[*TRAINED, 'gpt2', 'json'])
def tokenizer(request, tmp_path_factory):
  """Returns a folder with one tokenizer and nothing else."""
  folder = tmp_path_factory.mktemp('tokenizer')
  if request.param == 'gpt2':
    helpers.vocabulary().save(folder)
  elif request.param == 'json':
    trained = sentencepiece.train(
      WORDS, folder / 'spiece.model', **TRAINED['bpe']
    )
    (content,) = trained._files.values()
    other = export.from_sentencepiece(content)
    (folder / 'spiece.model').unlink()
    other.save(str(folder / 'tokenizer.json'))
  else:
    sentencepiece.train(
      WORDS, folder / 'spiece.model', **TRAINED[request.param]
    )
  return folder


def load_auto(folder):
  _, transformers = helpers.import_reference()
  return transformers.AutoTokenizer.from_pretrained(folder)


def write_config(folder, model_type):
  config = dataclasses.replace(
    CONFIGS[model_type], num_heads=4, num_kv_heads=None, vocab_size=512
  )
  content = huggingface.config_json(model_type, config)
  (folder / 'config.json').write_text(json.dumps(content))


@pytest.mark.parametrize('model_type', CONFIGS)
def test_every_family_reads_every_tokenizer(tokenizer, model_type, tmp_path):
  has_two_files = (tokenizer / 'vocab.json').is_file()
  if model_type in ('umt5', 'mistral', 'olmo2') and has_two_files:
    pytest.skip('transformers reads a tokenizer.json alone beside these')
  if model_type == 'qwen2' and not has_two_files:
    pytest.skip('transformers reads bytes in pairs alone beside Qwen2')
  folder = tmp_path / 'exported'
  shutil.copytree(tokenizer, folder)
  ours = loading.load(folder)
  write_config(folder, model_type)
  export.complete(folder, ours)
  theirs = load_auto(folder)
  for text in TEXTS:
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False)['input_ids'] == ids
    decoded = theirs.decode(ids).replace(theirs.unk_token or '?', ' ⁇ ')
    if ours.unk_id not in ids or isinstance(
      ours, sentencepiece.SentencePieceVocabulary
    ):
      assert decoded == ours.decode(ids)
  found = {
    kind: getattr(theirs, f'{kind}_token_id') for kind in ours.special_ids
  }
  assert found == ours.special_ids
  again = loading.load(folder)
  assert loading.share_ids(again, ours)
  assert [again.encode(text) for text in TEXTS] == [
    ours.encode(text) for text in TEXTS
  ]


def test_an_eos_is_put_behind_where_the_model_wants_one(tokenizer, tmp_path):
  folder = tmp_path / 'exported'
  shutil.copytree(tokenizer, folder)
  ours = loading.load(folder)
  write_config(folder, 't5')
  if (folder / 'tokenizer.json').is_file():
    pytest.skip('a tokenizer.json has its own way')
  export.complete(folder, ours, adds_eos=True)
  expected = [*ours.encode('the cats'), ours.eos_id]
  assert load_auto(folder)('the cats')['input_ids'] == expected


def test_sentinels_of_t5_are_added_where_they_fit(tmp_path):
  path = tmp_path / 'spiece.model'
  sentencepiece.train(WORDS, path, vocab_size=45)
  content = path.read_bytes()
  sentinel = '<extra_id_0>'
  for rows, expected in ((145, 144), (144, None), (0, None)):
    made = export.from_sentencepiece(content, rows)
    assert made.token_to_id(sentinel) == expected
  # Those that are there stay where they are.
  vocabulary = loading.load(path, extra_ids=100)
  vocabulary.save(tmp_path)
  made = export.from_sentencepiece(path.read_bytes(), 1000)
  assert made.token_to_id(sentinel) is None
  ids = made.encode('the <extra_id_3> cats').ids
  assert ids == vocabulary.encode('the <extra_id_3> cats')
  assert 45 + 100 - 1 - 3 in ids


@pytest.mark.parametrize(
  'option, value',
  [('model_type', 'word'), ('treat_whitespace_as_suffix', True)],
)
def test_a_model_without_an_equal_gets_no_tokenizer_json(
  option, value, tmp_path, capsys
):
  vocabulary = sentencepiece.train(
    WORDS, tmp_path / 'spiece.model', vocab_size=45, **{option: value}
  )
  before = {path.name for path in tmp_path.iterdir()}
  export.complete(tmp_path, vocabulary)
  assert {path.name for path in tmp_path.iterdir()} == before
  said = capsys.readouterr().out
  assert 'spiece.model is exported without a tokenizer.json' in said
  assert option in said


def test_single_characters_encode_the_same(tmp_path):
  vocabulary = sentencepiece.train(
    WORDS, tmp_path / 'spiece.model', model_type='char', vocab_size=24
  )
  content = (tmp_path / 'spiece.model').read_bytes()
  made = export.from_sentencepiece(content)
  for text in TEXTS:
    assert made.encode(text).ids == vocabulary.encode(text)


def test_a_config_that_names_its_class_is_left_alone(tmp_path):
  helpers.vocabulary().save(tmp_path)
  file = tmp_path / 'tokenizer_config.json'
  file.write_text('{"tokenizer_class": "Special"}')
  export.complete(tmp_path, loading.load(tmp_path))
  assert file.read_text() == '{"tokenizer_class": "Special"}'


@pytest.mark.parametrize(
  'name', ['t5/spiece.model', 'mt5/spiece.model', 'mistral_v1/tokenizer.model']
)
def test_real_models_encode_the_same(shared_data, name):
  path = shared_data / 'tokenizers' / name
  ours = loading.load(path)
  theirs = export.from_sentencepiece(path.read_bytes())
  for language in ('en', 'de', 'fr'):
    file = shared_data / 'multi30k' / f'val.{language}.gz'
    with gzip.open(file, 'rt', encoding='utf-8') as lines:
      for text in lines.read().splitlines()[:300]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
