# SPDX-License-Identifier: Apache-2.0
"""Laws of reading prompts: a prompt or a bad line for each line, in order."""

import gzip
import io
import json

import helpers
import pytest

from l2s_jax.data import text_files
from l2s_jax.inference import prompts

TEXTS = ['one', 'two {prompt} {id} ș', 'three "quoted", {}']


def read(path, template='translate: {prompt}', column='prompt', **options):
  return list(
    prompts.read_file(
      str(path), prompts.parse_template(template, column), **options
    )
  )


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_all_kinds_of_files_give_the_same_prompts(tmp_path, suffix):
  contents = {
    'a.txt': '\n'.join(TEXTS),
    'a.jsonl': ''.join(
      json.dumps({'prompt': text, 'id': ['7']}) + '\n' for text in TEXTS
    ),
    'a.tsv': 'id\tprompt\n' + ''.join(f'7\t{text}\n' for text in TEXTS),
    'a.csv': 'id,prompt\n'
    + ''.join('7,"{}"\n'.format(text.replace('"', '""')) for text in TEXTS),
  }
  for name, content in contents.items():
    path = tmp_path / (name + suffix)
    with (gzip.open if suffix else open)(path, 'wt', encoding='utf-8') as file:
      file.write(content)
    items = read(path)
    assert [item['prompt'] for item in items] == [
      f'translate: {text}' for text in TEXTS
    ]
    ids = {'a.txt': None, 'a.jsonl': ['7']}.get(name, '7')
    assert all(item.get('id') == ids for item in items), name


def test_a_template_names_columns_and_prompt_stands_for_one(tmp_path):
  (tmp_path / 'a.tsv').write_text('x\ten\nde\tHi\n')
  (row,) = read(tmp_path / 'a.tsv', '{{to}} {x}: {prompt}{en}.', column='en')
  assert row == {'x': 'de', 'en': 'Hi', 'prompt': '{to} de: HiHi.'}
  (tmp_path / 'b.tsv').write_text('de\tHi\n')
  (row,) = read(tmp_path / 'b.tsv', '{q}', column_names=('p', 'q'))
  assert row == {'p': 'de', 'q': 'Hi', 'prompt': 'Hi'}


@pytest.mark.parametrize('text', ['translate', '{{prompt}}', '{prompt', '{}'])
def test_a_template_that_is_none_is_refused(text):
  with pytest.raises(ValueError, match='template='):
    prompts.parse_template(text)


def test_a_fallback_is_for_lines_without_some_of_the_columns(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(
    '{"do": "Add", "input": "1 2"}\n{"do": "Rhyme", "input": " "}\n'
    '{"do": "Sing"}\n{"do": "", "input": "3"}\n'
  )
  template, fallback = map(prompts.parse_template, ('{do}: {input}', '{do}!'))
  *good, bad = prompts.read_file(str(path), template, fallback=fallback)
  found = [item['prompt'] for item in good if isinstance(item, dict)]
  assert found == ['Add: 1 2', 'Rhyme!', 'Sing!']
  assert isinstance(bad, text_files.BadLine) and bad.number == 4


def test_bad_lines_stand_where_they_were(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(
    b'{"prompt": "a"}\n{"prompt"\n\n{"text": "x"}\n{"prompt": " "}\n'
    b'{"prompt": "\xff"}\n{"prompt": 3}\n{"prompt": "b"}'
  )
  first, *bad, last = read(path)
  assert (first['prompt'], last['prompt']) == ('translate: a', 'translate: b')
  assert all(isinstance(item, text_files.BadLine) for item in bad)
  assert [item.number for item in bad] == [2, 3, 4, 5, 6, 7]
  with pytest.raises(ValueError, match=r"a\.jsonl:2 .*INFER_BAD_LINES='keep'"):
    list(prompts.refusing(lambda: iter([first, *bad]))())


def test_a_column_of_lengths_is_numbers_in_json_and_in_text(tmp_path):
  lengths = prompts.AnswerLengths('n', 9)
  (tmp_path / 'a.tsv').write_text('prompt\tn\na\t9\nb\t10\nc\t\nd\t٣\n')
  first, *bad = read(tmp_path / 'a.tsv', lengths=lengths)
  assert lengths(first) == 9
  assert [item.number for item in bad] == [3, 4, 5]
  assert bad[0].reason == (
    "has no integer from 1 to MAX_DECODE_LEN=9 in column 'n'"
  )
  (tmp_path / 'a.jsonl').write_text(
    '{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 1.5}\n{"prompt": "a"}\n'
  )
  first, *bad = read(tmp_path / 'a.jsonl', lengths=lengths)
  assert lengths(first) == 1
  assert [item.number for item in bad] == [2, 3]


def test_standard_input_is_read_as_it_comes():
  stream = io.BytesIO(b'one\r\n \n\xff\ntwo')
  items = prompts.read_stream(stream, prompts.parse_template('to: {prompt}'))
  assert next(items) == {'prompt': 'to: one'}
  assert stream.tell() == len(b'one\r\n')
  for number in (2, 3):
    bad = next(items)
    assert isinstance(bad, text_files.BadLine) and bad.number == number
  assert list(items) == [{'prompt': 'to: two'}]


def test_a_survey_counts_and_knows_the_input_again(tmp_path):
  lines = [
    '{"prompt": "a", "target": "x"}',
    '{"prompt": "b", "target": ["x", "y"]}',
    '{"prompt": "c", "target": []}',
    '{"prompt": "d", "target": 3}',
    '{"prompt": "d", "target": ["x", 3]}',
    '{"prompt": "d"}',
    'broken',
  ]

  def survey(name, lines):
    path = tmp_path / name
    content = '\n'.join(lines).encode()
    path.write_bytes(gzip.compress(content) if name[-1] == 'z' else content)
    return prompts.survey(iter(read(path)), 'target')

  found = survey('a.jsonl', lines)
  assert (found.num_lines, found.num_bad, found.num_targets) == (7, 1, 2)
  assert found.first_bad is not None and found.first_bad.number == 7
  assert survey('b.jsonl.gz', lines).sha256 == found.sha256
  for changed in (lines[1:], [*lines[1:], lines[0]], [lines[0], *lines]):
    assert survey('c.jsonl', changed).sha256 != found.sha256
  changed = [lines[0].replace('x', 'z'), *lines[1:]]
  assert survey('c.jsonl', changed).sha256 != found.sha256
  assert prompts.survey(iter(()), 'target')[:4] == (0, 0, None, 0)


def test_a_task_gives_prompts_and_targets():
  from l2s_jax.data import features, tasks
  from l2s_jax.data.features import seqio, tf

  def dataset(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices(
      {
        'inputs': ['a', ' ', 'c'],
        'targets': ['x', 'y', 'z ș'],
        'references': tf.ragged.constant([[], [], ['w', 'v']]),
      }
    )

  feature = seqio.Feature(features.wrap_vocabulary(helpers.vocabulary()))
  seqio.TaskRegistry.add(
    'prompts_of_a_task',
    source=seqio.FunctionDataSource(dataset, splits=('test',)),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={'inputs': feature, 'targets': feature},
  )
  task = tasks.bind(
    'prompts_of_a_task', helpers.vocabulary(), helpers.vocabulary()
  )
  assert list(prompts.read_task(task, 'test')) == [
    {'prompt': 'a', 'target': 'x'},
    text_files.BadLine('prompts_of_a_task:test', 2, 'is empty'),
    {'prompt': 'c', 'target': ['z ș', 'w', 'v']},
  ]
  seqio.TaskRegistry.remove('prompts_of_a_task')
