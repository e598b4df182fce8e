# SPDX-License-Identifier: Apache-2.0
"""A file is there whole or not at all."""

import json

import pytest

from l2s_jax import files


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
