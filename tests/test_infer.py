# SPDX-License-Identifier: Apache-2.0
"""Reading prompts, and what is refused before a model is loaded."""

import gzip
import json

import pytest

from l2s_jax import infer

TEMPLATE = 'translate: {prompt}'


def read(path, column='prompt'):
  return list(infer.read_prompts(str(path), column=column, template=TEMPLATE))


def test_text_and_jsonl_plain_and_gzip_give_the_same_prompts(tmp_path):
  texts = ['one', '', 'three {prompt} ș']
  jsonl = ''.join(json.dumps({'prompt': t, 'id': 7}) + '\n' for t in texts)
  plain = '\n'.join(texts) + '\n'
  for name, content in (('a.txt', plain), ('a.jsonl', jsonl)):
    (tmp_path / name).write_text(content, encoding='utf-8')
    with gzip.open(tmp_path / f'{name}.gz', 'wt', encoding='utf-8') as file:
      file.write(content)
    expected = [f'translate: {text}' for text in texts]
    for path in (tmp_path / name, tmp_path / f'{name}.gz'):
      records = read(path)
      assert [record['prompt'] for record in records] == expected
      if name == 'a.jsonl':
        assert {record['id'] for record in records} == {7}


@pytest.mark.parametrize(
  'name,content,message',
  [
    ('a.jsonl', b'{"prompt": "x"}\n{"prompt"\n', r'a\.jsonl:2 is not JSON'),
    ('a.jsonl', b'{"text": "x"}\n', r"a\.jsonl:1: .* text in 'prompt'"),
    ('a.jsonl', b'{"prompt": null}\n', r"a\.jsonl:1: .* text in 'prompt'"),
    ('a.txt', b'fine\n\xff\n', r'a\.txt:2 is not UTF-8'),
    ('a.txt.gz', b'not gzip', r'a\.txt\.gz is not a whole gzip file'),
  ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read(tmp_path / name)


@pytest.mark.parametrize(
  'changes,error,message',
  [
    ({'input': 'absent.txt'}, FileNotFoundError, 'INPUT=absent.txt: no such'),
    ({'template': 'translate {source}'}, ValueError, r'has no \{prompt\}'),
    ({'batch_size': 0}, ValueError, 'BATCH_SIZE=0: expected a positive'),
    ({}, FileNotFoundError, 'is not a run: it has no model.json'),
    (
      {'checkpoint_path': 'gs://bucket/run'},
      ValueError,
      'CHECKPOINT_PATH=gs://bucket/run: only paths of the file system',
    ),
  ],
)
def test_refused_before_a_model_is_loaded(tmp_path, changes, error, message):
  arguments = {
    'checkpoint_path': str(tmp_path),
    'input': '-',
    'prompt_length': 8,
    'max_decode_len': 8,
  }
  with pytest.raises(error, match=message):
    infer.infer(**arguments | changes)
