# SPDX-License-Identifier: Apache-2.0
"""Laws of files that are not lines, and of files that are neither."""

import datetime
import gzip
import json
import random
import sys
from typing import Any

import pyarrow
import pytest
from etils import epath
from pyarrow import parquet

from l2s_jax.data import input_files, record_files, tasks, text_files
from l2s_jax.data.features import tf
from l2s_jax.inference import prompts

ROWS: list[dict[str, Any]] = [
  {'id': 1, 'translation': {'en': 'one, "two"', 'ro': 'unu\n\u2028doi'}},
  {'id': 2, 'translation': {'en': 'three\rș 😀', 'ro': 'trei'}},
  {'id': 3, 'translation': {'en': ' ', 'ro': 'patru'}},
]


def feature(value):
  values = value if isinstance(value, list) else [value]
  if isinstance(values[0], int):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
  if isinstance(values[0], float):
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))
  values = [v.encode() if isinstance(v, str) else v for v in values]
  return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))


def write_tfrecord(path, rows, options=None):
  with tf.io.TFRecordWriter(str(path), options) as writer:
    for row in rows:
      features = {name: feature(value) for name, value in row.items()}
      example = tf.train.Example(features=tf.train.Features(feature=features))
      writer.write(example.SerializeToString())


def write(path, rows=ROWS):
  """Writes rows as the name of the file wants them."""
  name = path.name.lower()
  if 'parquet' in name:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
  if 'tfrecord' in name:
    flat = [
      {'id': row['id']}
      | {f'translation.{k}': v for k, v in row['translation'].items()}
      for row in rows
    ]
    options = tf.io.TFRecordOptions(
      compression_type='GZIP' if name.endswith('.gz') else ''
    )
    write_tfrecord(path, flat, options)
    return path
  if '.json' in name and 'jsonl' not in name:
    text = json.dumps(rows, indent=1)
  else:
    text = '\n'.join(map(json.dumps, rows))
  content = text.encode()
  path.write_bytes(gzip.compress(content) if name.endswith('.gz') else content)
  return path


NAMES = (
  'x.jsonl x.JSONL.GZ x.ndjson x.NDJSON x.json x.json.gz X.JSON x.parquet '
  'X.PARQUET x.tfrecord x.TFRecord.gz x.tfrecord-00000-of-00001 x.tfrecords'
).split()


@pytest.mark.parametrize('name', NAMES)
def test_all_kinds_give_the_same_prompts(tmp_path, name):
  path = write(tmp_path / name)
  template = prompts.parse_template(
    'In {translation.ro}: {prompt}', 'translation.en'
  )
  first, second, bad = prompts.read_file(str(path), template)
  assert isinstance(first, dict) and isinstance(second, dict)
  assert first['prompt'] == 'In unu\n\u2028doi: one, "two"'
  assert second['prompt'] == 'In trei: three\rș 😀'
  assert (first['id'], second['id']) == (1, 2)
  assert prompts.reference(first, 'translation.ro') == 'unu\n\u2028doi'
  assert isinstance(bad, text_files.BadLine)
  assert bad[1:] == (3, "has an empty column 'translation.en'")
  json.dumps(first)


@pytest.mark.parametrize('name', NAMES)
def test_all_kinds_are_trained_on_alike(tmp_path, name):
  path = write(tmp_path / name, ROWS[:2])
  task = tasks.local_task(
    {'train': str(path)},
    template='{translation.ro} {source}',
    source_column='translation.en',
    target_column='translation.ro',
  )
  dataset = task.source.get_dataset('train', shuffle=False)
  for step in task.preprocessors:
    dataset = step(dataset)
  found = [
    {key: text.decode() for key, text in row.items()}
    for row in dataset.as_numpy_iterator()
  ]
  assert found == [
    {
      'inputs': '{ro} {en}'.format(**row['translation']),
      'targets': row['translation']['ro'],
    }
    for row in ROWS[:2]
  ]


def test_a_list_of_texts_is_prompts(tmp_path):
  path = tmp_path / 'x.json'
  path.write_text(json.dumps(['a\nb', 'ș', ' ', 3, {'prompt': 'c'}]))
  items = list(prompts.read_file(str(path), prompts.parse_template('{prompt}')))
  assert [item['prompt'] for item in items if isinstance(item, dict)] == [
    'a\nb',
    'ș',
    'c',
  ]
  bad = [item[1:] for item in items if isinstance(item, text_files.BadLine)]
  assert bad == [
    (3, "has an empty column 'prompt'"),
    (4, 'is a JSON int, expected an object'),
  ]


def test_a_column_within_a_column():
  row = {
    'a.b': 'literal',
    'a': {'b': 'inner', 'c.d': {'e': 1}},
    'l': [{'x': 2}],
  }
  assert text_files.value(row, 'a.b') == 'literal'
  assert text_files.value({'a': row['a']}, 'a.b') == 'inner'
  assert text_files.value(row, 'a.c.d.e') == 1
  assert text_files.value(row, 'l.0.x') == 2
  for name in ('b', 'a.x', 'a.b.x', 'l.1.x', 'l.x', 'l.-1.x', '.', 'a.', ''):
    assert text_files.value(row, name) is None


def test_parquet_without_its_package_names_it(tmp_path, monkeypatch):
  path = write(tmp_path / 'x.parquet')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ValueError, match=r'x\.parquet is .* needs pyarrow'):
    list(text_files.read_rows(epath.Path(path)))


def test_values_become_what_json_holds(tmp_path):
  day = datetime.datetime(2024, 2, 29, 12, 30)
  path = tmp_path / 'x.parquet'
  row = {
    't': day,
    'b': b'\xff',
    's': b'text',
    'n': None,
    'l': [{'d': day.date()}],
  }
  parquet.write_table(pyarrow.Table.from_pylist([row]), path)
  ((number, found),) = record_files.parquet(epath.Path(path))
  assert (number, found) == (
    1,
    {
      't': '2024-02-29T12:30:00',
      'b': {'base64': '/w=='},
      's': 'text',
      'n': None,
      'l': [{'d': '2024-02-29'}],
    },
  )


def test_examples_are_those_of_tensorflow(tmp_path):
  rng = random.Random(0)
  rows = [
    {
      'text': ''.join(rng.choices('aș😀\n', k=rng.randrange(300))),
      'several': ['a', 'b'],
      'n': rng.randrange(-(2**63), 2**63),
      'f': 0.5,
      'fs': [1.0, 2.0],
      'bytes': b'\xff',
    }
    for _ in range(50)
  ]
  path = tmp_path / 'x.tfrecord'
  write_tfrecord(path, rows)
  found = [row for _, row in record_files.tfrecord(epath.Path(path))]
  assert found == [row | {'bytes': {'base64': '/w=='}} for row in rows]


@pytest.mark.parametrize('name', ['x.parquet', 'x.tfrecord', 'x.json'])
def test_damage_is_named(tmp_path, name):
  rows = [
    {'id': i, 'translation': {'en': f'en {i}' * 9, 'ro': 'ro'}}
    for i in range(30)
  ]
  path = write(tmp_path / name, rows)
  content = path.read_bytes()
  rng = random.Random(0)
  damaged = [content[: len(content) * i // 7] for i in range(1, 7)]
  if name == 'x.tfrecord':
    for _ in range(40):
      place = rng.randrange(len(content))
      flipped = content[place] ^ (1 << rng.randrange(8))
      damaged.append(content[:place] + bytes([flipped]) + content[place + 1 :])
  for broken in damaged:
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=rf'{name} (is|holds)') as error:
      list(text_files.read_rows(epath.Path(path)))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'content, message',
  [
    (b'{"a": 1}\n{"a": 2}\n', r'Extra data at line 2.*rename it to \*\.jsonl'),
    (b'{"data": [], "v": 1}', r"one JSON dict with the keys 'data', 'v'; exp"),
    (b'3', 'one JSON int; expected a list'),
    (b'[' * 100_000, 'x.json is not valid JSON'),
    (b'["\xff"]', 'is not UTF-8: .* at byte 2'),
    (b'', 'is not a JSON list'),
  ],
)
def test_json_that_is_no_list_is_refused(tmp_path, content, message):
  path = epath.Path(tmp_path / 'x.json')
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(text_files.read_rows(path))


def parquet_bytes(tmp_path):
  return write(tmp_path / 'made.parquet').read_bytes()


@pytest.mark.parametrize('name', ['x.txt', 'x.jsonl', 'x.csv', 'x.json', 'x'])
@pytest.mark.parametrize(
  'content, what',
  [
    (parquet_bytes, 'Parquet'),
    (lambda _: gzip.compress(b'text'), r'gzip file; rename it to \*\.gz'),
    (lambda _: b'PK\x03\x04' + b'x' * 9, 'zip'),
    (lambda _: 'text'.encode('utf-16'), 'iconv -f UTF-16'),
    (lambda _: 'text'.encode('utf-16-be'), 'NUL at byte 0'),
    (lambda _: b'a\nb\0c', 'NUL at byte 3'),
    (lambda _: b'%PDF-1.4', 'PDF'),
  ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, content, what):
  path = epath.Path(tmp_path / name)
  path.write_bytes(content(tmp_path))
  with pytest.raises(ValueError, match=rf'{name} is not text: .*{what}'):
    list(text_files.read_rows(path))


@pytest.mark.parametrize(
  'name', ['x.npz', 'X.PDF', 'x.docx', 'x.tar.gz', 'x.PT']
)
def test_an_ending_that_is_no_text_is_refused(tmp_path, name):
  path = epath.Path(tmp_path / name)
  path.write_bytes(b'text')
  with pytest.raises(ValueError, match='are not text; expected a text file'):
    list(text_files.read_rows(path))


def test_a_nul_after_the_start_is_a_bad_line(tmp_path):
  for name in ('x.txt', 'x.tsv', 'x.csv', 'x.jsonl'):
    path = epath.Path(tmp_path / name)
    good = b'{"a": "b"}' if name == 'x.jsonl' else b'a'
    path.write_bytes((good + b'\n') * 3000 + b'a\0b\n' + good)
    rows = list(text_files.read_rows(path))
    (bad,) = [row for row in rows if isinstance(row, text_files.BadLine)]
    assert bad.number == 3001 and 'NUL' in bad.reason


def test_text_may_begin_as_a_binary_file_does(tmp_path):
  for text in ('ORC and goblin', 'BZh', 'PAR1 is text'):
    path = epath.Path(tmp_path / 'x.txt')
    path.write_text(text)
    assert list(text_files.read_rows(path)) == [{'source': text}]


def test_kinds_follow_the_name():
  assert input_files.kind('a/b.json/c') == 'text'
  for name in ('x', 'x.en', 'x.txt', 'x.TXT.GZ', 'json', 'x.md'):
    assert input_files.kind(name) == ('json' if name == 'json' else 'text')
