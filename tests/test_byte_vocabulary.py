# SPDX-License-Identifier: Apache-2.0
"""ByT5's tokenizer: bytes plus three, and every text comes back."""

import copy
import dataclasses
import json
import pickle

import gin
import helpers
import numpy as np
import pytest

from l2s_jax import __main__ as command_line
from l2s_jax.data import features
from l2s_jax.data.features import seqio, tf
from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s
from l2s_jax.systems import builders, system
from l2s_jax.vocabularies import byte, loading

# Ids by hand: the bytes of UTF-8, each plus 3.
GOLDEN = {
  'Hi!': [0x48 + 3, 0x69 + 3, 0x21 + 3],
  'é': [0xC3 + 3, 0xA9 + 3],
  'ș ț': [0xC8 + 3, 0x99 + 3, 0x20 + 3, 0xC8 + 3, 0x9B + 3],
  '日': [0xE6 + 3, 0x97 + 3, 0xA5 + 3],
  '\0\n': [3, 13],
  '': [],
}
SENTENCES = [
  'Two dogs run over the wet grass!',
  'Über den Fluß führt eine schmale Brücke.',
  'Șase școli, țara și știința.',
  '六つの学校がある。',
  '  odd   spacing\t\n',
  'a <extra_id_0> b<extra_id_12><extra_id_124> <extra_id_125>',
]
AWKWARD = ['</s> <pad>', '\ufeffx\0', '👩‍🚀', 'e\u0301', '\U0010ffff']
CONFIG = {'tokenizer_class': 'ByT5Tokenizer'}


@pytest.fixture
def vocabulary():
  return byte.ByteVocabulary()


def write(folder, **config):
  folder.mkdir(exist_ok=True)
  path = folder / 'tokenizer_config.json'
  path.write_text(json.dumps(config))
  return path


def listed(*ids):
  return {str(i): {'content': f'<extra_id_{i - 259}>'} for i in ids}


def test_ids_are_bytes_plus_three(vocabulary):
  for text, ids in GOLDEN.items():
    assert vocabulary.encode(text) == ids
  assert (vocabulary.start_id, vocabulary.eos_id, vocabulary.pad_id) == (
    0,
    1,
    0,
  )
  assert (vocabulary.unk_id, vocabulary.vocab_size) == (2, 384)


def test_every_text_comes_back(vocabulary):
  for text in [*GOLDEN, *SENTENCES, *AWKWARD]:
    ids = vocabulary.encode(text)
    assert all(3 <= token < 384 for token in ids)
    assert vocabulary.decode([0, *ids, 1, 70]) == text


def test_sentinels_follow_the_bytes(vocabulary):
  assert vocabulary.encode('<extra_id_0> <extra_id_124>') == [259, 35, 383]
  assert vocabulary.encode('<extra_id_125>') == [
    b + 3 for b in b'<extra_id_125>'
  ]


def test_what_is_no_text_decodes_as_unknown_or_nothing(vocabulary):
  assert vocabulary.decode([2, 384, -1]) == '<unk>' * 3
  assert vocabulary.decode([0xC3 + 3, 0x48 + 3]) == 'H'  # Half an é.


def test_ids_are_those_of_transformers(vocabulary, tmp_path):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.ByT5Tokenizer()
  assert len(theirs) == vocabulary.vocab_size
  for text in SENTENCES:
    ids = theirs(text, add_special_tokens=False).input_ids
    assert vocabulary.encode(text) == ids
  # In a folder special tokens are tokens; else all but sentinels is bytes.
  theirs.save_pretrained(tmp_path)
  saved = loading.load(tmp_path)
  for text in [*SENTENCES, *AWKWARD, 'a  </s> b <pad><unk>\n']:
    ids = theirs(text, add_special_tokens=False).input_ids
    assert saved.encode(text) == ids
  assert saved != vocabulary and loading.share_ids(saved, vocabulary)
  file = tmp_path / 'tokenizer_config.json'
  assert loading.load(file) == vocabulary


def test_ids_are_those_of_seqio(vocabulary):
  theirs = seqio.ByteVocabulary()
  for text in [*GOLDEN, *SENTENCES[:-1], *AWKWARD]:
    assert vocabulary.encode(text) == list(theirs.encode(text))


def test_saved_and_loaded_is_the_same(vocabulary, tmp_path):
  vocabulary.save(tmp_path)
  vocabulary.save(tmp_path)  # Over itself.
  for path in (tmp_path, tmp_path / 'tokenizer_config.json'):
    assert loading.load(path) == vocabulary
  given = loading.load(tmp_path, start_id=5)
  assert given.start_id == 5 and given != vocabulary


def test_a_copy_or_pickle_is_equal_and_works(vocabulary):
  for text in SENTENCES:
    ids = vocabulary.encode(text)
    for twin in (
      copy.deepcopy(vocabulary),
      pickle.loads(pickle.dumps(vocabulary)),
    ):
      assert twin == vocabulary
      assert twin.encode(text) == ids


def test_the_sentinels_are_those_of_the_file(vocabulary, tmp_path):
  counted = loading.load(write(tmp_path, extra_ids=3, **CONFIG))
  assert counted.vocab_size == 262
  assert counted != vocabulary
  tokens = listed(261, 259, 260) | {'0': {'content': '<pad>'}}
  config = CONFIG | {'extra_ids': 0, 'added_tokens_decoder': tokens}
  again = loading.load(write(tmp_path, **config))
  assert (again.vocab_size, again.encode('<extra_id_2>')) == (262, [261])
  assert again == counted
  none = loading.load(write(tmp_path, extra_ids=0, **CONFIG))
  assert none.vocab_size == 259
  assert none.decode(none.encode('<extra_id_0>')) == '<extra_id_0>'


@pytest.mark.parametrize(
  'config, message',
  [
    (
      {'tokenizer_class': 'T5Tokenizer'},
      "tokenizer_class='T5Tokenizer', expected 'ByT5Tokenizer'",
    ),
    (
      CONFIG | {'added_tokens_decoder': listed(259, 261)},
      r'\[259, 261\].*expected 259 to 260 without gaps',
    ),
    (CONFIG | {'extra_ids': 'many'}, "extra_ids='many'.*expected a number"),
  ],
)
def test_another_file_is_refused(tmp_path, config, message):
  path = write(tmp_path, **config)
  with pytest.raises(ValueError, match=f'tokenizer_config.json.*{message}'):
    loading.load(path)


def test_extra_ids_are_refused_and_a_missing_file_is_named(tmp_path):
  write(tmp_path, **CONFIG)
  with pytest.raises(ValueError, match='extra_ids=100 .*has its own'):
    loading.load(tmp_path, extra_ids=100)
  with pytest.raises(FileNotFoundError, match='none/tokenizer_config.json is'):
    byte.ByteVocabulary(tmp_path / 'none' / 'tokenizer_config.json')


def test_a_folder_of_another_tokenizer_is_not_taken_for_bytes(tmp_path):
  write(tmp_path, tokenizer_class='GPT2Tokenizer')
  with pytest.raises(FileNotFoundError, match='has no tokenizer'):
    loading.load(tmp_path)


def test_tensorflow_encodes_as_the_vocabulary_does(vocabulary):
  wrapped = features.wrap_vocabulary(vocabulary)
  texts = [*GOLDEN, *SENTENCES, *AWKWARD]
  dataset = tf.data.Dataset.from_tensor_slices(texts).map(wrapped.encode_tf)
  for text, ids in zip(texts, dataset.as_numpy_iterator(), strict=True):
    assert ids.tolist() == vocabulary.encode(text)
    assert wrapped.decode(np.array([*ids, 1, 7])) == text
    rows = tf.constant([[*ids, 1, 7]] * 2)
    assert wrapped.decode_tf(rows).numpy().tolist() == [text.encode()] * 2


def test_conversion_carries_it(vocabulary, tmp_path):
  config = dataclasses.replace(helpers.T5_1_1, vocab_size=384)
  params = helpers.random_params(l2s.build(config))
  source, destination = tmp_path / 'source', tmp_path / 'destination'
  to_huggingface.save(helpers.Arrays(config, params), source, vocabulary)
  vocabulary.save(source)
  arguments = ['--from=hf', '--to=l2s', str(source), str(destination)]
  assert not command_line.main(['convert', *arguments])
  gin.clear_config()
  tower = system.Tower(path=str(destination))
  assert tower.load_vocabulary() == vocabulary
  assert builders.language_model_system(tower).answer_vocabulary == vocabulary
