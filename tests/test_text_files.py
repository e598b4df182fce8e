# SPDX-License-Identifier: Apache-2.0
"""Laws of reading users' text files: every line is a row or is named."""

import csv
import gzip
import io
import json
import random
import re
import tracemalloc

import pytest
from etils import epath

from l2s_jax.data import text_files

SUFFIXES = ('', '.gz')


@pytest.fixture
def write(tmp_path):
  """Returns a function from name and content to the file's path."""

  def write(name, content):
    content = content.encode() if isinstance(content, str) else content
    path = epath.Path(tmp_path / name)
    path.write_bytes(
      gzip.compress(content) if name.endswith('.gz') else content
    )
    return path

  return write


def read(path, **kwargs):
  """Returns rows, and `(number, reason)` of bad lines, in order."""
  return [
    row[1:] if isinstance(row, text_files.BadLine) else row
    for row in text_files.read_rows(path, **kwargs)
  ]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_each_kind_gives_its_rows(write, suffix):
  rows = [
    {'source': 'a "b"', 'target': 'é\u2028'},
    {'source': ',', 'target': '|'},
  ]
  table = io.StringIO()
  writer = csv.DictWriter(table, ('source', 'target'))
  writer.writeheader()
  writer.writerows(rows)
  tsv = '\n'.join('\t'.join(row.values()) for row in rows)
  contents = {
    'x.jsonl': '\r\n'.join(map(json.dumps, rows)),
    'x.csv': table.getvalue(),
    'x.tsv': f'source\ttarget\n{tsv}',
  }
  for name, content in contents.items():
    for text in (content, f'\ufeff{content}'):
      path = write(name + suffix, text)
      assert read(path, columns=('source', 'target')) == rows, name
  path = write(f'y.tsv{suffix}', tsv)
  assert read(path, column_names=('source', 'target')) == rows
  path = write(f'x.en{suffix}', 'one\r\n\ntwo')
  assert read(path) == [{'source': line} for line in ('one', '', 'two')]
  assert read(path, columns=('t',), column_names=('t',)) == [
    {'t': 'one'},
    (2, 'is empty'),
    {'t': 'two'},
  ]
  assert list(text_files.read_lines(path)) == ['one', '', 'two']


# What is between the words of a line: none of it ends the line.
ODD = ('\r', '\x0b', '\x0c', '\x1c', '\x85', '\u2028', '\u2029', '\ufeff', '\t')


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('has_last_end', [True, False])
@pytest.mark.parametrize('mark', ['', '\ufeff'])
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_line_is_the_same_wherever_it_is_read(
  write, end, has_last_end, mark, suffix
):
  from l2s_jax.data import tasks
  from l2s_jax.inference import prompts

  def prompts_of(items):
    return [item['prompt'] for item in items]

  texts = ['first', ' lead and trail ', '\ufeffmarked', 'x\r', '\u3000y\u3000']
  texts += [f'a{odd}b{odd}{odd}c' for odd in ODD]
  if end == '\n':
    # The one \r before a line feed belongs to the end of the line.
    content = mark + ''.join(
      text + ('\r\n' if text.endswith('\r') else '\n') for text in texts
    )
  else:
    content = mark + ''.join(text + end for text in texts)
  content = content if has_last_end else content.removesuffix(end)
  path = write(f'x.txt{suffix}', content)
  template = prompts.parse_template('{prompt}')
  assert [row['source'] for row in read(path)] == texts
  assert list(text_files.read_lines(path)) == texts
  items = prompts.read_file(str(path), template)
  assert prompts_of(items) == texts
  stream = io.BytesIO(content.encode())
  items = prompts.read_stream(stream, template)
  assert prompts_of(items) == texts
  task = tasks.local_task(
    {'train': [(str(path), str(path))]}, template='{source}'
  )
  trained = task.source.get_dataset('train', shuffle=False)
  found = [row['source'].decode() for row in trained.as_numpy_iterator()]
  assert found == texts
  halves = content.encode()[:9], content.encode()[9:]
  members = epath.Path(path.parent / 'members.GZ')  # As `cat a.gz b.gz` makes.
  members.write_bytes(b''.join(map(gzip.compress, halves)))
  assert list(text_files.read_lines(members)) == texts
  task = tasks.local_task(
    {'train': [(str(members), str(path))]}, template='{source}'
  )
  trained = task.source.get_dataset('train', shuffle=False)
  found = [row['source'].decode() for row in trained.as_numpy_iterator()]
  assert found == texts
  rows = ''.join(json.dumps({'source': text}) + end for text in texts)
  assert [row['source'] for row in read(write('x.jsonl', rows))] == texts


def test_csv_is_what_python_writes(write):
  rng = random.Random(0)
  rows = [
    {
      column: 'x' + ''.join(rng.choices('ab,"\n\t\' ;é', k=rng.randrange(9)))
      for column in ('p', 'q')
    }
    for _ in range(300)
  ]
  table = io.StringIO()
  writer = csv.DictWriter(table, ('p', 'q'))
  writer.writeheader()
  writer.writerows(rows)
  assert read(write('x.csv', table.getvalue()), columns=('p', 'q')) == rows


def test_long_fields_are_read(write):
  long = 'x' * 300_000
  assert read(write('x.csv', f'a,b\n{long},y\n')) == [{'a': long, 'b': 'y'}]


@pytest.mark.parametrize(
  'line, reason',
  [
    ('{"source": "a", ', r'is not JSON: .* at character 17'),
    ('[' * 100_000, r'is not valid JSON'),
    ('["a"]', r'is a JSON list, expected an object'),
    ('', r'is empty'),
    (' ', r'is empty'),
    ('{"other": "a"}', r"has no column 'source'; it has other"),
    ('{"source": " "}', r"has an empty column 'source'"),
    ('{"source": 3}', r"has a JSON int in column 'source', expected text"),
    ('{"source": "\\ud800"}', r'has an unpaired surrogate'),
    (b'{"source": "\xff"}', r'is not UTF-8'),
  ],
)
def test_bad_jsonl_lines_are_named_and_passed_over(write, line, reason):
  line = line.encode() if isinstance(line, str) else line
  good = b'{"source": "\\ud83d\\ude00", "n": [1]}'
  path = write('x.jsonl', good + b'\n' + line + b'\n' + good)
  first, bad, last = text_files.read_rows(path, columns=('source',))
  assert first == last == {'source': '😀', 'n': [1]}
  assert isinstance(bad, text_files.BadLine)
  assert (bad.path, bad.number) == (str(path), 2)
  assert str(bad) == f'{path}:2 {bad.reason}. Correct or remove it.'
  assert re.match(reason, bad.reason)


@pytest.mark.parametrize(
  'name, line, reason',
  [
    ('x.tsv', b'one', 'has 1 columns, expected 2: source, target'),
    ('x.tsv', b'one\ttwo\tthree', 'has 3 columns, expected 2'),
    ('x.tsv', b'one\t ', "has an empty column 'target'"),
    ('x.tsv', b'', 'is empty'),
    ('x.tsv', b'one\t\xff', 'is not UTF-8'),
    ('x.csv', b'one', 'has 1 columns, expected 2: source, target'),
    ('x.csv', b'one,two,three', 'has 3 columns, expected 2'),
    ('x.csv', b',two', "has an empty column 'source'"),
    ('x.csv', b'', 'is empty'),
    ('x.csv', b'one,"a\n\xff\n"', 'is not UTF-8'),
    ('x.csv', b'one,"a\nb"c', 'is not CSV'),
    ('x.csv', b'a\rb,c', 'is not CSV'),
  ],
)
def test_bad_table_lines_are_named_and_passed_over(write, name, line, reason):
  separator = b'\t' if name == 'x.tsv' else b','
  header, good = separator.join((b'source', b'target')), b'a%sb' % separator
  path = write(name, b'\n'.join((header, good, line, good)))
  first, bad, last = text_files.read_rows(path, columns=('source', 'target'))
  assert first == last == {'source': 'a', 'target': 'b'}
  assert isinstance(bad, text_files.BadLine) and bad.number == 3
  assert bad.reason.startswith(reason)


def test_bad_text_lines_are_named_and_passed_over(write):
  path = write('x.txt', b'one\n\xff\ntwo')
  first, bad, last = text_files.read_rows(path)
  assert (first, last) == ({'source': 'one'}, {'source': 'two'})
  assert isinstance(bad, text_files.BadLine)
  assert (bad.number, bad.reason[:12]) == (2, 'is not UTF-8')
  with pytest.raises(ValueError, match=r'x\.txt:2 is not UTF-8'):
    list(text_files.read_lines(path))


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('x.tsv', '', r'x\.tsv:1 is empty; expected a header with the'),
    ('x.csv', b'\xff', r'x\.csv:1 is not UTF-8'),
    ('x.tsv', 'a\ta\n', r'x\.tsv has more than one column named a'),
    (
      'x.tsv',
      'a\tb\n',
      r'no column source; its first line has a, b\. .*COLUMN_',
    ),
    ('x.csv', 'source\na\n"b\nc\n', r'x\.csv:3 has an unclosed quote'),
  ],
)
def test_files_that_cannot_be_read_are_refused(write, name, content, message):
  path = write(name, content)
  with pytest.raises(ValueError, match=message):
    read(path, columns=('source',))


@pytest.mark.parametrize(
  'content', [gzip.compress(b'a\n' * 9999, mtime=0)[:-9], b'a\n', b'']
)
def test_broken_gzip_is_refused_after_its_whole_lines(tmp_path, content):
  path = epath.Path(tmp_path / 'x.txt.gz')
  path.write_bytes(content)
  if not content:
    assert read(path) == []
    return
  with pytest.raises(ValueError, match=r'x\.txt\.gz is not a complete gzip'):
    read(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no\.jsonl: no such file'):
    read(epath.Path(tmp_path / 'no.jsonl'))


def test_memory_is_for_one_record(write):
  path = write('x.tsv.gz', 'source\ttarget\n' + 'a' * 99 + '\tb\n' * 50_000)
  rows = text_files.read_rows(path)
  next(rows)
  tracemalloc.start()
  for _ in rows:
    pass
  peak_bytes = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak_bytes < 500_000
