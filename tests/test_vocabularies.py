# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: golden ids of real tokenizers, and laws that all obey."""

import copy
import gzip
import itertools
import json
import pickle
import re
import subprocess
import sys

import pytest

from l2s_jax.vocabularies import byte, loading, sentencepiece

# The special ids that each real tokenizer must be read to have:
# (vocab_size, start_id, eos_id, pad_id, unk_id).
REAL = {
  't5/spiece.model': (32000, 0, 1, 0, 2),
  'mt5/spiece.model': (250100, 0, 1, 0, 2),
  'mistral_v1/tokenizer.model': (32000, 1, 2, 0, 0),
  't5/tokenizer.json': (32100, 0, 1, 0, 2),
  'gpt2': (50257, 50256, 50256, 0, None),
  'smollm2/tokenizer.json': (49152, 0, 0, 0, None),
}
TEXTS = [
  f'{a}{b} {b}{c} {c}{a}'
  for a, b, c in itertools.product(
    ['ta', 'ki', 'mo', 'run', 'ship', 'one'], repeat=3
  )
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Returns a small SentencePiece vocabulary."""
  return sentencepiece.train(
    TEXTS, tmp_path_factory.mktemp('trained') / 'spiece.model', vocab_size=40
  )


@pytest.fixture
def small_json(tmp_path):
  """Returns a `tokenizer.json` of whole words that truncates and pads."""
  path = tmp_path / 'small' / 'tokenizer.json'
  write_json(
    path,
    {
      'truncation': {
        'max_length': 2,
        'strategy': 'LongestFirst',
        'stride': 0,
        'direction': 'Right',
      },
      'padding': {
        'strategy': {'Fixed': 8},
        'direction': 'Right',
        'pad_to_multiple_of': None,
        'pad_id': 0,
        'pad_type_id': 0,
        'pad_token': '<pad>',
      },
      'added_tokens': [
        {
          'id': i,
          'content': content,
          'special': True,
          'single_word': False,
          'lstrip': False,
          'rstrip': False,
          'normalized': False,
        }
        for i, content in enumerate(['<pad>', '</s>', '<unk>', '<go>'])
      ],
      'pre_tokenizer': {'type': 'WhitespaceSplit'},
      'model': {
        'type': 'WordLevel',
        'unk_token': '<unk>',
        'vocab': {
          '<pad>': 0,
          '</s>': 1,
          '<unk>': 2,
          '<go>': 3,
          'one': 4,
          'two': 5,
          'three': 6,
        },
      },
    },
  )
  return path


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def write_gpt2(folder, vocab, merges):
  write_json(folder / 'vocab.json', vocab)
  (folder / 'merges.txt').write_text(merges)


def test_golden_encodings(shared_data):
  golden = json.loads(
    (shared_data / 'tokenizers/expected_encodings.json').read_text()
  )
  assert golden.keys() == REAL.keys()
  for name, expected in golden.items():
    vocabulary = loading.load(shared_data / 'tokenizers' / name)
    assert vocabulary.vocab_size == expected['pieces'], name
    for example in expected['encodings']:
      assert vocabulary.encode(example['text']) == example['ids'], name


@pytest.mark.parametrize('name', REAL)
def test_special_ids_are_read_from_the_files(shared_data, name):
  vocabulary = loading.load(shared_data / 'tokenizers' / name)
  assert (
    vocabulary.vocab_size,
    vocabulary.start_id,
    vocabulary.eos_id,
    vocabulary.pad_id,
    vocabulary.unk_id,
  ) == REAL[name]


@pytest.mark.parametrize('name', REAL)
def test_text_survives_a_round_trip(shared_data, name):
  vocabulary = loading.load(shared_data / 'tokenizers' / name)
  with gzip.open(shared_data / 'flores/flores-dev.en.gz', 'rt') as file:
    lines = file.read().splitlines()[:100]
  exact = 0
  for line in lines:
    ids = vocabulary.encode(line)
    text = vocabulary.decode(ids)
    # nmt_nfkc (T5, mT5) rewrites some letters, but only once.
    assert vocabulary.encode(text) == ids or vocabulary.unk_id in ids
    exact += text == line
  lossy = name.startswith(('t5', 'mt5'))
  assert exact >= (90 if lossy else 100), name


@pytest.mark.parametrize('name', REAL)
def test_saved_and_loaded_is_the_same(shared_data, tmp_path, name):
  vocabulary = loading.load(shared_data / 'tokenizers' / name)
  vocabulary.save(tmp_path / 'saved')
  vocabulary.save(tmp_path / 'saved')  # Over itself.
  loaded = loading.load(tmp_path / 'saved')
  assert loaded.fingerprint() == vocabulary.fingerprint()
  assert loaded == vocabulary and hash(loaded) == hash(vocabulary)
  assert loaded.encode('a <pad> b </s>') == vocabulary.encode('a <pad> b </s>')
  assert not list((tmp_path / 'saved').glob('.*'))  # No temporary file stays.


def test_vocabularies_of_different_content_differ(shared_data):
  loaded = [loading.load(shared_data / 'tokenizers' / name) for name in REAL]
  loaded.append(
    loading.load(shared_data / 'tokenizers/t5/spiece.model', extra_ids=100)
  )
  loaded.append(
    loading.load(shared_data / 'tokenizers/t5/spiece.model', start_id=1)
  )
  assert len(set(loaded)) == len(REAL) + 2


def test_id_0_of_gpt2_is_text(shared_data):
  vocabulary = loading.load(shared_data / 'tokenizers/gpt2')
  assert vocabulary.encode('!') == [0]
  assert vocabulary.decode([0, 0, 50256, 0]) == '!!'
  assert vocabulary.decode([0, 50257, -1, 0]) == '!!'  # Nothing is unknown.


def test_extra_ids_are_those_of_seqio(shared_data, tmp_path):
  path = shared_data / 'tokenizers/t5/spiece.model'
  vocabulary = loading.load(path, extra_ids=100)
  assert vocabulary.vocab_size == 32100
  # Ids of seqio.SentencePieceVocabulary(path, extra_ids=100), seqio 0.0.20.
  assert vocabulary.encode('<extra_id_0> <pad> </s> x < 3') == [
    32099,
    3,
    2,
    5612,
    3155,
    3,
    2,
    87,
    7,
    3155,
    3,
    226,
    3,
    2,
    220,
  ]
  assert vocabulary.encode('a <extra_id_99>') == [3, 9, 32000]
  assert vocabulary.decode([32099, 5, 32000]) == '<extra_id_0>. <extra_id_99>'
  vocabulary.save(tmp_path)
  assert loading.load(tmp_path) == vocabulary
  assert loading.load(tmp_path, extra_ids=100) == vocabulary


def test_mt5_already_has_its_extra_ids(shared_data):
  path = shared_data / 'tokenizers/mt5'
  assert loading.load(path, extra_ids=100) == loading.load(path)


def test_a_copy_or_pickle_is_equal_and_works(trained, small_json):
  for vocabulary in (trained, loading.load(small_json)):
    ids = vocabulary.encode('one red cat')
    for twin in (
      copy.deepcopy(vocabulary),
      pickle.loads(pickle.dumps(vocabulary)),
    ):
      assert twin == vocabulary
      assert twin.encode('one red cat') == ids


def test_a_batch_is_encoded_as_each_of_its_texts(trained, small_json):
  texts = ['a b', '', 'ü</s> <unk>', ' two  blanks ', '\u2028', 'a' * 500]
  for vocabulary in (trained, loading.load(small_json), byte.ByteVocabulary()):
    found = vocabulary.encode_batch(texts)
    assert found == [vocabulary.encode(text) for text in texts]
    assert vocabulary.encode_batch([]) == []


def test_decoding_cuts_at_the_first_eos(trained, small_json):
  for vocabulary in (trained, loading.load(small_json)):
    a, b = vocabulary.vocab_size - 1, vocabulary.vocab_size - 2
    assert vocabulary.decode([a, vocabulary.eos_id, b]) == vocabulary.decode(
      [a]
    )
    assert vocabulary.decode([vocabulary.eos_id, a]) == ''
    assert vocabulary.decode([]) == ''


def test_ids_outside_the_vocabulary_decode_as_unknown(trained, small_json):
  for vocabulary in (trained, loading.load(small_json)):
    assert vocabulary.unk_id is not None
    unknown = vocabulary.decode([vocabulary.unk_id])
    assert unknown
    assert vocabulary.decode([vocabulary.vocab_size]) == unknown
    assert vocabulary.decode([-1]) == unknown


def test_pad_tokens_leave_no_text(trained, small_json):
  for vocabulary in (trained, loading.load(small_json)):
    ids = vocabulary.encode('one')
    pad = vocabulary.pad_id
    assert vocabulary.decode([pad, *ids, pad]) == vocabulary.decode(ids)


def test_a_tokenizer_neither_truncates_nor_pads(small_json):
  assert loading.load(small_json).encode('one two three') == [4, 5, 6]


def test_files_beside_a_tokenizer_name_its_special_tokens(small_json, tmp_path):
  plain = loading.load(small_json)
  assert (plain.start_id, plain.eos_id, plain.pad_id) == (0, 1, 0)
  write_json(
    small_json.with_name('special_tokens_map.json'),
    {'eos_token': '</s>', 'unk_token': '<unk>'},
  )
  write_json(
    small_json.with_name('tokenizer_config.json'),
    {'eos_token': {'content': 'three'}, 'bos_token': '<go>', 'pad_token': None},
  )
  named = loading.load(small_json)
  assert (named.start_id, named.eos_id, named.pad_id) == (3, 6, 0)
  assert named.unk_id == 2
  assert named != plain
  # AutoTokenizer would make an added token of `three`; a run keeps its own.
  folder = tmp_path / 'run' / 'vocabularies' / 'answer'
  named.save(folder)
  (tmp_path / 'run' / 'model.json').write_text('{}')
  assert loading.load(folder) == named


def test_a_named_special_token_must_exist(small_json):
  write_json(
    small_json.with_name('tokenizer_config.json'),
    {'eos_token': '<end>', 'bos_token': '<go>'},
  )
  with pytest.raises(
    ValueError,
    match="eos_token '<end>': set in tokenizer_config.json of .*small",
  ):
    loading.load(small_json)


def test_ids_can_be_given(trained):
  path = trained.path
  given = loading.load(path, start_id=1, eos_id=5, pad_id=2)
  assert (given.start_id, given.eos_id, given.pad_id) == (1, 5, 2)
  assert given != trained
  with pytest.raises(ValueError, match=r'start_id=40 .*spiece.model.* 0 to 39'):
    loading.load(path, start_id=40)


def test_training_reproduces_the_same_bytes(trained, tmp_path):
  twin = sentencepiece.train(
    iter(TEXTS), tmp_path / 'twin.model', vocab_size=40
  )
  with open(trained.path, 'rb') as file:
    assert (tmp_path / 'twin.model').read_bytes() == file.read()
  assert twin == trained
  assert [path.name for path in tmp_path.iterdir()] == ['twin.model']


def test_a_trained_model_is_like_t5(trained):
  assert trained.vocab_size == 40
  assert (trained.start_id, trained.eos_id, trained.pad_id, trained.unk_id) == (
    0,
    1,
    0,
    2,
  )
  for text in TEXTS:
    assert trained.decode(trained.encode(text)) == text
  assert trained.unk_id in trained.encode('Ω')


def test_byte_fallback_leaves_nothing_unknown(tmp_path):
  vocabulary = sentencepiece.train(
    TEXTS, tmp_path / 'bytes.model', vocab_size=290, byte_fallback=True
  )
  assert vocabulary.decode(vocabulary.encode('Ω ship')) == 'Ω ship'


def test_long_lines_take_part_in_training(tmp_path):
  # SentencePiece by itself drops lines over 4192 bytes, without a word.
  vocabulary = sentencepiece.train(
    ['xyz ' * 2000, *TEXTS], tmp_path / 'long.model', vocab_size=40
  )
  assert vocabulary.unk_id not in vocabulary.encode('xyz')


@pytest.mark.parametrize(
  'texts, options, message',
  [
    ([], {'vocab_size': 40}, 'sentences'),
    (TEXTS, {'vocab_size': 5000}, 'vocab_size=5000.*too high'),
    (TEXTS, {'vocab_size': 5}, 'vocab_size=5.*smaller'),
    (TEXTS, {'vocab_size': 40, 'vocabsize': 1}, 'unknown field.*vocabsize'),
  ],
)
def test_training_that_fails_writes_nothing(tmp_path, texts, options, message):
  with pytest.raises(ValueError, match=f'model.model with .*{message}'):
    sentencepiece.train(texts, tmp_path / 'model.model', **options)
  assert not list(tmp_path.iterdir())


def test_training_prints_nothing(capfd, tmp_path):
  sentencepiece.train(TEXTS, tmp_path / 'quiet.model', vocab_size=40)
  assert capfd.readouterr() == ('', '')


def test_a_missing_path_is_named(tmp_path):
  for name in ('none', 'none.model', 'tokenizer.json'):
    with pytest.raises(
      FileNotFoundError, match=re.escape(f'{tmp_path / name} is missing')
    ):
      loading.load(tmp_path / name)


def test_a_folder_without_tokenizer_lists_what_was_looked_for(tmp_path):
  (tmp_path / 'vocab.json').write_text('{}')  # No merges.txt.
  with pytest.raises(
    FileNotFoundError,
    match=re.escape(
      f'{tmp_path} has no tokenizer: looked for spiece.model, '
      'tokenizer.model, sentencepiece.model, tokenizer.json, vocab.json '
      'with merges.txt and tokenizer_config.json of a ByT5Tokenizer.'
    ),
  ):
    loading.load(tmp_path)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.model', b'not a model', 'is not a SentencePiece model'),
    ('a.model', b'', 'is not a SentencePiece model'),
    ('tokenizer.json', b'{"model"', 'is not JSON'),
    ('tokenizer.json', b'{}', 'model is None, expected an object'),
    ('a.txt', b'', r'expected a SentencePiece model \(\*.model\)'),
  ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'{re.escape(str(path))}:? .*{message}'):
    loading.load(path)


@pytest.mark.parametrize(
  'content, message',
  [
    ('{', 'tokenizer_config.json is not JSON'),
    ('[]', 'tokenizer_config.json is a JSON list, expected an object'),
  ],
)
def test_a_broken_file_beside_is_named(small_json, content, message):
  small_json.with_name('tokenizer_config.json').write_text(content)
  with pytest.raises(ValueError, match=message):
    loading.load(small_json)


@pytest.mark.parametrize(
  'vocab, merges, message',
  [
    ({'a': 0}, '', r'vocab.json has no <\|endoftext\|>'),
    ({'a': 0, 'b': 1, '<|endoftext|>': 2}, 'a b', r"merges.txt.*'a', 'b'"),
    ({'a': 0, 'b': 1, '<|endoftext|>': 2}, 'ab', r"merges.txt merges \['ab'\]"),
  ],
)
def test_files_that_are_not_gpt2s_are_refused(tmp_path, vocab, merges, message):
  write_gpt2(tmp_path, vocab, merges)
  with pytest.raises(ValueError, match=message):
    loading.load(tmp_path)


def test_a_tokenizer_without_eos_asks_for_one(tmp_path):
  path = tmp_path / 'tokenizer.json'
  write_json(
    path,
    {
      'model': {
        'type': 'WordLevel',
        'unk_token': 'a',
        'vocab': {'a': 0, 'b': 1},
      }
    },
  )
  with pytest.raises(ValueError, match='tokenizer.json has no end.*eos_id='):
    loading.load(path)
  assert loading.load(path, eos_id=1).start_id == 1


def test_extra_ids_of_a_hugging_face_tokenizer_are_refused(small_json):
  with pytest.raises(ValueError, match='extra_ids=100 .*tokenizer.json'):
    loading.load(small_json, extra_ids=100)


def test_saving_beside_another_tokenizer_is_refused(trained, small_json):
  with pytest.raises(
    ValueError, match='small has tokenizer.json of another tokenizer'
  ):
    trained.save(small_json.parent)


def test_the_module_imports_no_tensorflow():
  program = (
    'import sys, l2s_jax.vocabularies.loading, l2s_jax.metrics.metric_fns; '
    'sys.exit(any(m in sys.modules for m in '
    '("tensorflow", "seqio", "transformers")))'
  )
  subprocess.run([sys.executable, '-c', program], check=True)
