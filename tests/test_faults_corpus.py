# SPDX-License-Identifier: Apache-2.0
"""What the fuzzer has found stays mended; `faults/corpus.py` has the cases."""

import dataclasses
import io
import pathlib
import shutil

import pytest
from etils import epath
from faults import corpus, fuzz_files, fuzz_weights

from l2s_jax.data import text_files
from l2s_jax.interop import destination
from l2s_jax.vocabularies import loading
from l2s_jax.weights import saved_steps

KEPT_RUN = pathlib.Path(__file__).parent / 'kept_runs' / '1' / 'l2s'


def refusal(fn, *args):
  """Returns the sentence that a call ends in, which is one of ours."""
  with pytest.raises(ValueError) as found:
    fn(*args)
  assert fuzz_files.is_sentence(found.value), found.value
  return str(found.value)


@pytest.mark.parametrize('place', corpus.DESTINATIONS)
def test_a_destination_without_a_name_exists(place):
  assert 'exists' in refusal(destination.opened, place)


@pytest.mark.parametrize('batch', [False, True])
def test_a_tokenizer_that_fails_on_a_text_is_named(batch, tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_bytes(corpus.tokenizer_json())
  vocabulary = loading.load(tmp_path)
  assert vocabulary.encode('a')[:1] == [2]
  encode = vocabulary.encode_batch if batch else vocabulary.encode
  words = refusal(encode, ['z'] if batch else 'z')
  assert str(tmp_path) in words and "'z'" in words


def test_the_base_of_yarn_is_above_1():
  """As YaRN divides by its logarithm."""
  config = fuzz_weights.LLAMA
  assert config.rope_scaling_type == 'yarn'
  words = refusal(lambda: dataclasses.replace(config, rope_base=1.0))
  assert 'rope_base=1.0' in words


def test_a_parquet_file_with_column_names_of_other_bytes_is_damaged(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  table = pyarrow.table({'some': ['a'], 'other': ['b']})
  stream = io.BytesIO()
  parquet.write_table(table, stream, store_schema=False)
  path = tmp_path / 'x.parquet'
  path.write_bytes(stream.getvalue().replace(b'some', b'so\x9be'))
  words = refusal(list, text_files.read_rows(epath.Path(path)))
  assert str(path) in words and 'Parquet' in words


@pytest.mark.parametrize('name, content, rows', corpus.DATA)
def test_rows_are_those_of_the_file(name, content, rows, tmp_path):
  path = tmp_path / name
  path.write_bytes(content)
  found = text_files.read_rows(epath.Path(path))
  assert tuple(r if isinstance(r, dict) else None for r in found) == rows


@pytest.mark.parametrize('name', corpus.CHECKPOINT)
def test_a_checkpoint_with_such_metadata_is_damaged(name, tmp_path, capsys):
  run = shutil.copytree(KEPT_RUN, tmp_path / 'run')
  folder = run / 'checkpoints' / '400'
  path = folder / name
  old, new = corpus.CHECKPOINT[name]
  path.write_bytes(path.read_bytes().replace(old, new, 1))
  assert saved_steps.newest_good(run, saved_steps.ITEMS[:1])[0] == 200
  assert f'{folder} is damaged' in capsys.readouterr().err
