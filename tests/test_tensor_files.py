# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: those of other packages are read, and they read ours."""

import builtins
import json
import pathlib
import pickle
import re
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from l2s_jax.weights.formats import tensor_files

TENSORS: dict[str, np.ndarray] = {
  'wide': np.arange(6, dtype=np.float64).reshape(2, 3),
  'b': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
  'a': np.arange(5, dtype=np.float32),
  'half': np.arange(3, dtype=np.float16),
  'brain': np.arange(4).astype(ml_dtypes.bfloat16),
}


def save(folder, tensors, **options):
  shapes = {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype)
    for name, array in tensors.items()
  }
  tensor_files.save_safetensors(
    folder, shapes, lambda name: list(tensors[name]), **options
  )


def read(folder):
  opened = tensor_files.open_folder(folder)
  return {name: tensor.read() for name, tensor in opened.items()}


def assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)


def test_a_file_is_the_one_that_safetensors_writes(tmp_path):
  save(tmp_path / 'ours', TENSORS)
  safetensors.numpy.save_file(
    TENSORS, tmp_path / 'theirs.safetensors', metadata={'format': 'pt'}
  )
  ours = tmp_path / 'ours' / 'model.safetensors'
  assert ours.read_bytes() == (tmp_path / 'theirs.safetensors').read_bytes()
  assert_equal(read(tmp_path / 'ours'), TENSORS)


def test_a_file_that_would_be_too_large_becomes_several(tmp_path):
  save(tmp_path, TENSORS, max_file_bytes=100)
  assert_equal(read(tmp_path), TENSORS)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == 48 + 96 + 20 + 6 + 8
  files = sorted(set(index['weight_map'].values()))
  assert files == [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)]
  for file in files:
    whole = safetensors.numpy.load_file(tmp_path / file)
    assert sum(array.nbytes for array in whole.values()) <= 100
    assert {k for k, v in index['weight_map'].items() if v == file} == set(
      whole
    )


def test_a_tensor_stays_on_disk_until_its_part_is_used(tmp_path):
  save(tmp_path, TENSORS)
  array = tensor_files.open_folder(tmp_path)['b'].read()
  assert not array.flags.owndata and not array.flags.writeable


def test_one_piece_is_in_memory_while_a_file_is_written(tmp_path):
  shapes = {name: jax.ShapeDtypeStruct((4, 10**6), 'float32') for name in 'ab'}
  tracemalloc.start()  # NumPy tells it of every array.
  tensor_files.save_safetensors(
    tmp_path,
    shapes,
    lambda name: (np.ones(10**6, np.float32) for _ in range(4)),
  )
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert 4e6 < peak < 6e6


def test_a_folder_without_weights_says_what_it_has(tmp_path):
  (tmp_path / 'tf_model.h5').write_text('')
  with pytest.raises(FileNotFoundError) as error:
    tensor_files.open_folder(tmp_path)
  assert str(error.value) == (
    f'{tmp_path} has neither model.safetensors nor '
    'model.safetensors.index.json, nor pytorch_model.bin, only tf_model.h5. '
    'Download one of these.'
  )


# --- pickles ------------------------------------------------------------------


class Bomb:
  """Leaves a mark where it is unpickled."""

  def __init__(self, mark):
    self.mark = str(mark)

  def __reduce__(self):
    return builtins.open, (self.mark, 'w')


def import_torch():
  return pytest.importorskip('torch', reason='reads pytorch_model.bin')


@pytest.mark.parametrize('is_zip', [True, False])
def test_a_pytorch_file_is_read_as_stored(is_zip, tmp_path):
  torch = import_torch()
  tensors = {
    name: torch.nn.Parameter(
      torch.tensor(array.astype(np.float32)).to(
        getattr(torch, array.dtype.name)
      )
    )
    for name, array in TENSORS.items()
  }
  torch.save(
    tensors,
    tmp_path / 'pytorch_model.bin',
    _use_new_zipfile_serialization=is_zip,
  )
  assert_equal(read(tmp_path), TENSORS)


def test_a_pytorch_file_lets_go_of_what_was_read(tmp_path, monkeypatch):
  torch = import_torch()
  monkeypatch.setattr(tensor_files, '_MAX_MAPPED_BYTES', 3 * 2**20)
  file = tmp_path / 'pytorch_model.bin'
  names = [f'tensor_{i}' for i in range(12)]
  torch.save({name: torch.ones(2**18) for name in names}, file)
  opened = tensor_files.open_folder(tmp_path)
  for name in names:
    np.testing.assert_array_equal(opened[name].read(), 1)
    # The mappings of the file: at most the one that is read from now.
    maps = pathlib.Path('/proc/self/smaps').read_text().split('VmFlags')
    (mapped,) = [entry for entry in maps if str(file) in entry]
    (resident,) = re.findall(r'Rss: +(\d+) kB', mapped)
    assert 1000 < int(resident) < 4000
  first = opened[names[0]].read()
  for name in names:
    opened[name].read()
  np.testing.assert_array_equal(first, 1)  # whoever holds it keeps it


def test_code_in_a_pickle_does_not_run(tmp_path):
  torch = import_torch()
  mark = tmp_path / 'mark'
  pickle.loads(pickle.dumps(Bomb(mark))).close()  # It is a live one.
  mark.unlink()
  file = tmp_path / 'pytorch_model.bin'
  torch.save({'a': torch.zeros(3), 'b': Bomb(mark)}, file)
  with pytest.raises(ValueError, match='which are never unpickled'):
    tensor_files.open_folder(tmp_path)
  file.write_bytes(pickle.dumps(Bomb(mark)))
  with pytest.raises(ValueError, match='which are never unpickled'):
    tensor_files.open_folder(tmp_path)
  assert not mark.exists()


@pytest.mark.parametrize('is_zip', [True, False])
def test_a_pytorch_file_that_is_cut_short_is_named(is_zip, tmp_path):
  torch = import_torch()
  file = tmp_path / 'pytorch_model.bin'
  tensors = {'a': torch.zeros(300), 'b': torch.zeros(1000)}
  torch.save(tensors, file, _use_new_zipfile_serialization=is_zip)
  content = file.read_bytes()
  for size in (*range(0, len(content), len(content) // 40), len(content) - 50):
    file.write_bytes(content[:size])
    with pytest.raises(ValueError, match=f'{file} .* was not read: it is cut'):
      tensor_files.open_folder(tmp_path)


def test_a_pytorch_file_of_no_dict_is_named(tmp_path):
  torch = import_torch()
  file = tmp_path / 'pytorch_model.bin'
  torch.save([torch.zeros(3)], file)
  with pytest.raises(ValueError, match=f'{file} holds a list; expected a dict'):
    tensor_files.open_folder(tmp_path)


def test_without_torch_the_way_out_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps({}))
  with pytest.raises(ValueError, match='Or download model.safetensors instead'):
    tensor_files.open_folder(tmp_path)
