# SPDX-License-Identifier: Apache-2.0
"""A folder's tokenizer is what AutoTokenizer of transformers makes of it.

Over 2,000 random strings of odd pieces: words, added tokens, special tokens,
scripts, spaces of all sorts. The tokenizers are real where there are data, and
made here otherwise; what they hold beside their pieces is made here.
"""

import json
import random
import shutil
from typing import Any

import helpers
import pytest
import tokenizers

from l2s_jax.vocabularies import loading

transformers = pytest.importorskip('transformers')

ODD = (
  'the cat¦12¦345¦{a}¦\n¦\t¦hello¦world¦é¦ñ¦日本¦😀¦ﬁ¦²¦ș¦</s>¦<pad>¦<s>¦'
  '<unk>¦<extra_id_0>¦<extra_id_7>¦<|endoftext|>¦<|im_end|>¦{¦}¦Foo Bar¦Zq¦'
  "zzz¦<x>¦▁¦▁▁¦\u00a0¦\u200b¦\ufeff¦\r\n¦Don't¦...¦[INST]¦<0x0A>¦İ¦ǅ¦"
  '\u0301¦\x00¦\x1f'
).split('¦')
ADDED = {'{': 32100, '}': 32101, '\n': 32102, 'Foo Bar': 32103}
FLAGS = {'lstrip': False, 'rstrip': False, 'normalized': False}


def random_texts(count, seed=0):
  draw = random.Random(seed)
  blocks = ((32, 126), (0, 0x2FF), (0x2000, 0x33FF), (0x1F300, 0x1F6FF))

  def piece():
    if draw.random() < 0.7:
      return draw.choice(ODD)
    return ''.join(
      chr(draw.randint(*draw.choice(blocks))) for _ in range(draw.randint(1, 5))
    )

  return [
    ''.join(piece() + draw.choice(['', ' ']) for _ in range(draw.randint(0, 9)))
    for _ in range(count)
  ]


TEXTS = random_texts(2000)
FEW = TEXTS[:200]


def token(content, **flags):
  return {'content': content, 'single_word': False, **FLAGS, **flags}


# By name: files of the shared data, and JSON files by their names.
FAMILIES: dict[str, tuple[list[str], dict[str, Any]]] = {
  't5 spiece': (['t5/spiece.model'], {'config': {'model_type': 't5'}}),
  't5 v1.1': (
    ['t5/spiece.model'],
    {
      'config': {'model_type': 't5'},
      'tokenizer_config': {'extra_ids': 0, 'additional_special_tokens': None},
      'special_tokens_map': {'eos_token': '</s>', 'pad_token': '<pad>'},
    },
  ),
  't5 json': (
    ['t5/tokenizer.json', 't5/tokenizer_config.json'],
    {'config': {'model_type': 't5'}},
  ),
  't5 both': (
    ['t5/tokenizer.json', 't5/tokenizer_config.json', 't5/spiece.model'],
    {'config': {'model_type': 't5'}},
  ),
  't5 added': (
    ['t5/spiece.model'],
    {'config': {'model_type': 't5'}, 'added_tokens': ADDED},
  ),
  't5 added with flags': (
    ['t5/spiece.model'],
    {
      'tokenizer_config': {
        'tokenizer_class': 'T5Tokenizer',
        'added_tokens_decoder': {
          '32100': token('Zq', lstrip=True, rstrip=True),
          '32101': token('zzz', single_word=True, normalized=True),
          '32102': token('ﬁ', normalized=True),
          '32103': token('<x>', special=True),
        },
      }
    },
  ),
  'mt5': (['mt5/spiece.model'], {'config': {'model_type': 'mt5'}}),
  'mistral': (
    ['mistral_v1/tokenizer.model'],
    {
      'config': {'model_type': 'mistral'},
      'tokenizer_config': {'tokenizer_class': 'LlamaTokenizer'},
    },
  ),
  'llama': (
    ['mistral_v1/tokenizer.model'],
    {
      'config': {'model_type': 'llama'},
      'tokenizer_config': {
        'tokenizer_class': 'LlamaTokenizer',
        'add_bos_token': True,
        'bos_token': {'__type': 'AddedToken', **token('<s>')},
        'legacy': True,
      },
      'added_tokens': {'Foo Bar': 32000},
    },
  ),
  'gpt2': (
    ['gpt2/vocab.json', 'gpt2/merges.txt'],
    {'config': {'model_type': 'gpt2'}},
  ),
  'gpt2 added': (
    ['gpt2/vocab.json', 'gpt2/merges.txt'],
    {
      'config': {'model_type': 'gpt2'},
      'added_tokens': {'<x>': 50257, 'hello': 50258},
      'special_tokens_map': {
        'pad_token': '<pad>',
        'additional_special_tokens': ['<x>'],
      },
    },
  ),
  'opt': (
    ['gpt2/vocab.json', 'gpt2/merges.txt'],
    {
      'config': {'model_type': 'opt'},
      'tokenizer_config': {
        'tokenizer_class': 'GPT2Tokenizer',
        'bos_token': {'__type': 'AddedToken', **token('</s>')},
        'pad_token': '<pad>',
        'add_prefix_space': True,
      },
    },
  ),
  'smollm2': (
    ['smollm2/tokenizer.json'],
    {
      'config': {'model_type': 'llama'},
      'tokenizer_config': {
        'tokenizer_class': 'GPT2Tokenizer',
        'eos_token': '<|im_end|>',
      },
    },
  ),
  'smollm2 as it is': (
    ['smollm2/tokenizer.json'],
    {
      'config': {'model_type': 'llama'},
      'tokenizer_config': {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': '<|im_end|>',
        'additional_special_tokens': ['<x>', '<|im_end|>'],
        'image_token': '<0x0A>',
      },
    },
  ),
  'qwen2': (
    ['smollm2/tokenizer.json'],
    {'tokenizer_config': {'tokenizer_class': 'Qwen2Tokenizer'}},
  ),
  'byt5': (
    [],
    {'tokenizer_config': {'tokenizer_class': 'ByT5Tokenizer'}},
  ),
  'byt5 with flags': (
    [],
    {
      'config': {'model_type': 't5'},
      'tokenizer_config': {
        'tokenizer_class': 'ByT5Tokenizer',
        'eos_token': {'__type': 'AddedToken', **token('</s>')},
        'extra_ids': 125,
      },
    },
  ),
  'pythia': (
    ['smollm2/tokenizer.json'],
    {
      'config': {'model_type': 'gpt_neox'},
      'tokenizer_config': {'tokenizer_class': 'GPTNeoXTokenizerFast'},
    },
  ),
}


def make_folder(folder, shared_data, name):
  names, contents = FAMILIES[name]
  folder.mkdir()
  for file in names:
    shutil.copyfile(
      shared_data / 'tokenizers' / file, folder / file.split('/')[1]
    )
  for stem, content in contents.items():
    (folder / f'{stem}.json').write_text(json.dumps(content))
  return folder


def auto_ids(folder, texts=TEXTS):
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  return theirs(texts, add_special_tokens=False)['input_ids']


def our_ids(vocabulary, texts=TEXTS):
  return [vocabulary.encode(text) for text in texts]


@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_has_the_ids_of_transformers(shared_data, tmp_path, name):
  folder = make_folder(tmp_path / 'model', shared_data, name)
  ours = loading.load(folder)
  ids = auto_ids(folder)
  assert our_ids(ours) == ids

  # What a run saves of it says the same, to us and to transformers.
  run = tmp_path / 'vocabularies' / 'answer'
  ours.save(run)
  (tmp_path / 'model.json').write_text('{}')
  assert loading.load(run) == ours
  assert our_ids(loading.load(run), FEW) == ids[: len(FEW)]
  if (run / 'tokenizer.json').is_file():
    assert auto_ids(run, FEW) == ids[: len(FEW)]


def gemma(folder, extra=('<image_soft_token>',)):
  """Writes a tokenizer of Gemma's kind; returns the rows that it needs."""
  vocab = {'<pad>': 0, '<eos>': 1, '<bos>': 2, '<unk>': 3, '<mask>': 4}
  for piece in [chr(i) for i in range(33, 127)] + ['▁', 'he', 'll', '▁w']:
    vocab.setdefault(piece, len(vocab))
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab, [('h', 'e'), ('l', 'l'), ('▁', 'w')], unk_token='<unk>'
    )
  )
  made.add_special_tokens(list(vocab)[:5])
  rows = made.get_vocab_size()
  made.add_special_tokens(list(extra))
  folder.mkdir(exist_ok=True)
  made.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'GemmaTokenizerFast'})
  )
  return rows


def test_gemma_has_the_ids_of_transformers(tmp_path):
  gemma(tmp_path)
  assert our_ids(loading.load(tmp_path)) == auto_ids(tmp_path)


def test_a_file_named_alone_is_that_file_alone(shared_data, tmp_path):
  folder = make_folder(tmp_path / 'model', shared_data, 't5 added')
  alone = loading.load(folder / 'spiece.model')
  data = loading.load(shared_data / 'tokenizers/t5/spiece.model')
  assert alone == data and alone.vocab_size == 32000
  assert loading.load(folder).encode('{') == [32100]
  # Sentinels asked for by number are those of SeqIO, of the model alone.
  counted = loading.load(folder, extra_ids=100)
  assert counted == loading.load(alone.path, extra_ids=100)
  assert loading.share_ids(loading.load(folder), alone)
  assert not loading.share_ids(alone, helpers.vocabulary())


def test_a_token_beyond_the_table_is_refused_where_a_text_holds_it(tmp_path):
  rows = gemma(tmp_path)
  whole = loading.load(tmp_path)
  bound = whole.for_table(rows)
  assert whole.vocab_size == rows + 1 and whole == bound
  assert bound.encode('hello world') == whole.encode('hello world')
  assert whole.encode('<image_soft_token>') == [rows]
  with pytest.raises(
    ValueError, match=f"'<image_soft_token>', id {rows} of .*{rows} rows"
  ):
    bound.encode('see <image_soft_token>')
  with pytest.raises(ValueError, match=f'embedding table has {rows - 1} rows'):
    whole.for_table(rows - 1)  # An ordinary piece has none.


def write_ids(folder, **files):
  for name, content in files.items():
    (folder / f'{name}.json').write_text(json.dumps(content))


def test_starts_and_ends_are_those_that_the_model_says(tmp_path):
  gemma(tmp_path)
  plain = loading.load(tmp_path)
  assert (plain.start_id, plain.eos_ids, plain.pad_id) == (2, (1,), 0)
  write_ids(
    tmp_path,
    config={'decoder_start_token_id': 5, 'eos_token_id': [1, 9]},
    generation_config={'eos_token_id': [1, 7, 8], 'pad_token_id': 6},
  )
  said = loading.load(tmp_path)
  assert (said.start_id, said.eos_id, said.eos_ids) == (5, 1, (1, 7, 8))
  assert said.pad_id == 0  # The tokenizer's own word goes first.
  assert said.bos_id == 2
  assert said != plain and loading.share_ids(said, plain)
  assert said.decode([20, 21, 7, 22]) == said.decode([20, 21])
  said.save(tmp_path / 'saved')
  again = loading.load(tmp_path / 'saved')
  assert again == said and again.eos_ids == said.eos_ids


def test_a_refused_text_is_named_in_training_too(tmp_path):
  from l2s_jax.data import features

  rows = gemma(tmp_path)
  bound = features.wrap_vocabulary(loading.load(tmp_path).for_table(rows))
  texts = ['hello', 'see <image_soft_token>']
  dataset = features.tf.data.Dataset.from_tensor_slices(texts)
  ids = dataset.map(bound.encode_tf).as_numpy_iterator()
  assert next(ids).tolist() == bound.encode('hello')
  with (
    pytest.raises(ValueError, match=f"^the text 'see .* id {rows} of"),
    features.plain_errors(),
  ):
    next(ids)


SPOILT = {
  'tokenizer.json': [
    b'{"model": []}',
    b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
    b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
    b'{"model": {"type": "Unigram", "vocab": [["a", "x"]], "unk_id": 0}}',
    b'{"model": {"type": "Unigram", "vocab": [["a", 0]], "unk_id": 7}}',
    b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, '
    b'"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}',
    b'{"added_tokens": [{"id": 0, "content": 5}], '
    b'"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
  ],
  'tokenizer_config.json': [
    b'{"tokenizer_class": 5}',
    b'{"eos_token": ["</s>"]}',
    b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
    b'{"added_tokens_decoder": {"5": {"content": "a", "lstrip": "yes"}}}',
    b'[]',
  ],
  'special_tokens_map.json': [b'{"eos_token": {"content": 1}}', b'{', b'\xff'],
  'added_tokens.json': [b'{"a": "b"}', b'{"a": -2}', b'[1]'],
  'generation_config.json': [
    b'{"eos_token_id": "1"}',
    b'{"eos_token_id": [1, null]}',
    b'{"decoder_start_token_id": 1.5}',
  ],
}


@pytest.mark.parametrize(
  'name, content',
  [
    (name, content) for name, contents in SPOILT.items() for content in contents
  ],
)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, capfd, name, content):
  gemma(tmp_path)
  (tmp_path / 'tokenizer_config.json').unlink()
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError) as refused:
    loading.load(tmp_path)
  message = str(refused.value)
  assert str(tmp_path / name) in message and '\n' not in message
  assert capfd.readouterr() == ('', '')  # Rust's panics write there.


def test_bytes_of_a_tokenizer_that_flip_end_in_one_sentence(tmp_path, capfd):
  gemma(tmp_path)
  file = tmp_path / 'tokenizer.json'
  whole = file.read_bytes()
  draw = random.Random(0)
  refused = 0
  for _ in range(200):
    content = bytearray(whole)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content[: draw.choice([None, None, draw.randrange(999)])])
    try:
      loading.load(tmp_path).encode('hello world')
    except ValueError as error:
      refused += 1
      assert str(tmp_path) in str(error) and '\n' not in str(error)
  assert 20 < refused < 200
  assert 'panicked' not in capfd.readouterr().err
