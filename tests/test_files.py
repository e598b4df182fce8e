# SPDX-License-Identifier: Apache-2.0
"""A file is there whole or not at all."""

import json

import pytest

from l2s_jax.runtime import files


def test_a_broken_off_write_leaves_what_stood_there(tmp_path):
  path = tmp_path / 'made' / 'file.txt'
  with files.whole(path) as file:
    file.write('ș old')
  with pytest.raises(KeyboardInterrupt):
    with files.whole(path) as file:
      file.write('half')
      file.flush()
      assert path.read_text(encoding='utf-8') == 'ș old'
      raise KeyboardInterrupt
  assert path.read_text(encoding='utf-8') == 'ș old'
  assert [entry.name for entry in path.parent.iterdir()] == ['file.txt']


def test_bytes_and_json_come_back(tmp_path):
  with files.whole(tmp_path / 'bytes', 'wb') as file:
    file.write(b'\x00\xff')
  assert (tmp_path / 'bytes').read_bytes() == b'\x00\xff'
  files.write_json(tmp_path / 'a.json', {'b': 1, 'a': [2]})
  assert json.loads((tmp_path / 'a.json').read_text()) == {'b': 1, 'a': [2]}


REMEDY = 'start again.'


@pytest.mark.parametrize(
  ('content', 'complaint'),
  [
    (b'', 'is empty'),
    (b' \n', 'is empty'),
    (b'{"a": 1', "is not JSON (Expecting ',' delimiter: line 1 column 8"),
    (b'{"a": 1}}', 'is not JSON (Extra data: line 1 column 9'),
    (b'\xef\xbb\xbf{}', 'is not JSON (a byte order mark: line 1 column 1'),
    (b'{"a": "\xff"}', 'is not JSON (byte 7 is not UTF-8)'),
    (b'{"a": "\\ud800"}', 'half of a surrogate pair'),
    (b'{"a": NaN}', '(NaN is not a JSON number)'),
    (b'{"a": [-Infinity]}', '(-Infinity is not a JSON number)'),
    (b'{"a": 1e999}', '(1e999 is outside'),
    (b'{"a": ' + b'9' * 5000 + b'}', '(a number of 5000 digits)'),
    (b'{"b": {"a": 1, "a": 2}}', "(duplicate key 'a')"),
    (b'{"a":' * 500 + b'1' + b'}' * 500, 'too many nested brackets'),
    (b'[' * 100_000, 'too many nested brackets'),
    (b'[1]', 'holds list, expected a JSON object'),
    (b'3', 'holds int 3, expected a JSON object'),
    (b'null', 'holds null, expected a JSON object'),
    (b'{"a": 1}', "key 'step' is missing, expected int"),
    (b'{"step": true}', "key 'step' is bool True, expected int"),
    (b'{"step": "7"}', "key 'step' is str '7', expected int"),
    (b'{"step": 7.5}', "key 'step' is float 7.5, expected int"),
    (b'{"step": 7, "best": "x"}', "key 'best' is str 'x', expected float"),
  ],
)
def test_json_that_is_not_what_it_should_be_is_one_sentence(
  tmp_path, content, complaint
):
  path = tmp_path / 'a.json'
  path.write_bytes(content)
  with pytest.raises(ValueError) as error:
    files.read_json(
      path, keys={'step': int, 'best': (float, type(None))}, remedy=REMEDY
    )
  message = str(error.value)
  assert message.startswith(str(path)) and complaint in message
  assert message.endswith(f'; {REMEDY}') and '\n' not in message


def test_json_that_is_what_it_should_be_is_read(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('{"step": 7, "best": 3, "\\ud83d\\ude00": 1e30}')
  keys: files.Keys = {'step': int, 'best': (float, type(None))}
  found = files.read_json(path, keys=keys, remedy=REMEDY)
  assert found == {'step': 7, 'best': 3, '😀': 1e30}
  path.write_text(f'{{"step": {10**30}}}')
  assert files.read_json(path, keys=keys, remedy='')['step'] == 10**30
  with pytest.raises(FileNotFoundError, match=r'absent\.json'):
    files.read_json(tmp_path / 'absent.json', remedy=REMEDY)
  with pytest.raises(ValueError, match='is a folder, expected a JSON file'):
    files.read_json(tmp_path, remedy=REMEDY)
