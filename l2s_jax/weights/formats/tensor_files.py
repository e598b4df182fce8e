# SPDX-License-Identifier: Apache-2.0
"""Files of named tensors: safetensors and PyTorch checkpoints.

Headers are read first and tensors one at a time; files are written piece by
piece, so that no file is in memory as a whole. PyTorch files are read without
executing code. This module knows nothing of tensor names.
"""

import json
import pathlib
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from l2s_jax.models import config as config_lib
from l2s_jax.runtime import extras, os_errors, storage
from l2s_jax.runtime import files as files_lib
from l2s_jax.weights.formats import bucket_array

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
PICKLE = 'pytorch_model.bin'
PICKLE_INDEX = 'pytorch_model.bin.index.json'
# Default of `save_pretrained`.
MAX_FILE_BYTES = 5 * 10**9
# Bytes read from a mapped PyTorch file before it is mapped again.
_MAX_MAPPED_BYTES = 2**28
# Exceptions of PyTorch and pickle for damaged files.
_BROKEN = (
  RuntimeError,
  EOFError,
  OSError,
  ValueError,
  LookupError,
  TypeError,
  AttributeError,
  ArithmeticError,
  AssertionError,
  MemoryError,
  struct.error,
)

# NumPy dtype by its name in safetensors.
DTYPES = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'bfloat16',
}
# Dtypes of files of l2s_jax. In others, int8 needs scales of another format.
_STORED = DTYPES | {'I8': 'int8'}
_TAGS = {name: tag for tag, name in _STORED.items()}


class Tensor(NamedTuple):
  """Shape and dtype of a stored tensor, and a function that reads it.

  Attributes:
    shape: its shape.
    dtype: a key of `DTYPES`; for unsupported dtypes, their name in the file.
    read: returns the tensor as stored.
  """

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


def are_in(folder: pathlib.Path) -> bool:
  """Returns whether a folder holds weights that `open_folder` can open."""
  names = (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX)
  return any((folder / name).is_file() for name in names)


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a folder by their names in the files.

  Raises:
    FileNotFoundError: if weights or files listed in the index are missing.
    ValueError: if a file is damaged, or PyTorch is required but not installed.
  """
  for single, index, read in (
    (WEIGHTS, INDEX, open_safetensors),
    (PICKLE, PICKLE_INDEX, _open_pickle),
  ):
    if (folder / single).is_file():
      return read(folder / single)
    if (folder / index).is_file():
      return _open_shards(folder / index, read)
  found = sorted(
    path.name
    for path in folder.iterdir()
    if path.suffix in ('.h5', '.msgpack', '.pt', '.ckpt', '.gguf')
  )
  raise FileNotFoundError(
    f'{folder} has neither {WEIGHTS} nor {INDEX}, nor {PICKLE}'
    + (f', only {", ".join(found)}' if found else '')
    + '. Download one of these.'
  )


def _open_shards(
  index: pathlib.Path, read: Callable[[pathlib.Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
  """Returns the tensors of all files of an index."""
  weight_map = read_json(index).get('weight_map', {})
  if not isinstance(weight_map, dict):
    raise ValueError(
      f'{index}: weight_map is {config_lib.shorten(repr(weight_map))}; '
      'expected an object that maps tensor names to file names. Download it '
      'again.'
    )
  for name, file in weight_map.items():
    # No paths, which could lead out of the folder.
    if not isinstance(file, str) or not files_lib.is_file_name(file):
      raise ValueError(
        f'{index}: weight_map has {config_lib.shorten(repr(file))} for '
        f'{config_lib.shorten(repr(name))}; expected the name of a file in the '
        'same folder. Download it again.'
      )
  files = sorted(set(weight_map.values()))
  missing = [file for file in files if not (index.parent / file).is_file()]
  if missing or not files:
    raise FileNotFoundError(
      f'{index} lists {len(files)} files; missing: '
      f'{config_lib.shorten(", ".join(missing), 400) or "all"}. Download them '
      f'into {index.parent}.'
    )
  tensors: dict[str, Tensor] = {}
  for file in files:
    found = read(index.parent / file)
    tensors |= {
      name: tensor
      for name, tensor in found.items()
      if weight_map.get(name, file) == file
    }
  return tensors


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a safetensors file, memory-mapped.

  `Tensor.read` returns a view of the file, so that only used parts are loaded.

  Raises:
    ValueError: if the file is damaged; names it and its size.
  """
  if isinstance(path, storage.BucketPath):
    return _open_safetensors_object(path)
  try:
    with safetensors.safe_open(path, framework='np'):
      pass  # Compares the header with the file size.
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is not a complete safetensors '
      f'file: {config_lib.shorten(str(error))}. The download may have been cut '
      'short, or left a Git LFS pointer; download it again.'
    ) from error
  try:
    with path.open('rb') as file:
      length = int.from_bytes(file.read(8), 'little')
      header = json.loads(file.read(length))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) has a header that is not JSON: '
      f'{config_lib.shorten(str(error))}. Download it again.'
    ) from error
  header.pop('__metadata__', None)

  def tensor(entry: Mapping[str, Any]) -> Tensor:
    shape, dtype = tuple(entry['shape']), entry['dtype']
    offset = 8 + length + entry['data_offsets'][0]
    return Tensor(shape, dtype, lambda: _map(path, dtype, shape, offset))

  return {name: tensor(entry) for name, entry in header.items()}


def _open_safetensors_object(path: storage.BucketPath) -> dict[str, Tensor]:
  """Returns the tensors of an object; the header is read, and no tensor.

  Tensors are `bucket_array.BucketArray`: indexing reads only the indexed rows.
  """
  size = path.stat().st_size
  damaged = (
    f'{path} ({size} bytes) is not a complete safetensors file. The upload may '
    'have been cut short; copy it again.'
  )
  length = int.from_bytes(path.read_range(0, min(8, size)), 'little')
  if size < 8 or length > size - 8:
    raise ValueError(damaged)
  try:
    header = json.loads(path.read_range(8, 8 + length))
    header.pop('__metadata__', None)
    ends = [entry['data_offsets'][1] for entry in header.values()]
    is_whole = max(ends, default=0) == size - 8 - length
  except (ValueError, RecursionError, LookupError, TypeError) as error:
    raise ValueError(damaged) from error
  if not is_whole:
    raise ValueError(damaged)

  def tensor(entry: Mapping[str, Any]) -> Tensor:
    shape, dtype = tuple(entry['shape']), entry['dtype']
    array = bucket_array.BucketArray(
      path,
      jnp.dtype(_STORED.get(dtype, 'uint8')),
      shape,
      8 + length + entry['data_offsets'][0],
    )
    return Tensor(shape, dtype, lambda: array)  # type: ignore[arg-type, return-value]

  return {name: tensor(entry) for name, entry in header.items()}


def _map(
  path: pathlib.Path, dtype: str, shape: tuple[int, ...], offset: int
) -> np.ndarray:
  return np.asarray(
    np.memmap(path, jnp.dtype(_STORED[dtype]), 'r', offset, shape)
  )


def _open_pickle(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a PyTorch file without executing pickled code."""
  extras.require(
    f'{path} is a pickle, and reading it without running code that may be in '
    'it',
    'torch',
    instead=f'Or download {WEIGHTS} instead.',
  )
  import torch

  pickled = _Pickle(path)

  def tensor(name: str, value: Any) -> Tensor:
    dtype = str(value.dtype).removeprefix('torch.')

    def read() -> np.ndarray:
      found = pickled.read(name)
      if dtype != 'bfloat16':  # NumPy has no bfloat16.
        return found.numpy()
      return found.view(torch.uint16).numpy().view(jnp.bfloat16)

    return Tensor(tuple(value.shape), _TAGS.get(dtype, dtype), read)

  return {
    name: tensor(name, value)
    for name, value in pickled.tensors.items()
    if isinstance(name, str) and isinstance(value, torch.Tensor)
  }


class _Pickle:
  """A PyTorch file, mapped again after every `_MAX_MAPPED_BYTES` read.

  Pages read from a mapping stay in memory as long as the mapping, which lives
  as long as any of its tensors. Files from before PyTorch 1.6 cannot be mapped
  and are loaded as a whole.

  Attributes:
    tensors: tensors by name.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._file = storage.local_copy(path)
    self._is_mapped = zipfile.is_zipfile(self._file)
    self._num_bytes_read = 0
    self.tensors = self._load()

  def read(self, name: str) -> Any:
    """Returns a tensor, detached from its Parameter."""
    size = self.tensors[name].nbytes
    if self._is_mapped and self._num_bytes_read + size > _MAX_MAPPED_BYTES:
      self._num_bytes_read = 0
      self.tensors = self._load()
    self._num_bytes_read += size
    return self.tensors[name].detach()

  def _load(self) -> dict[str, Any]:
    import pickle

    import torch

    path = self._path
    try:
      stored = torch.load(
        self._file,
        map_location='cpu',
        weights_only=True,
        mmap=self._is_mapped,
      )
    except pickle.UnpicklingError as error:
      # PyTorch's own message advises to allow code execution.
      code = re.search(r'GLOBAL (\S+)', str(error))
      what = f' ({config_lib.shorten(code[1])})' if code else ''
      raise ValueError(
        f'{path} ({path.stat().st_size} bytes) was not read: it is cut short, '
        f'or contains objects other than tensors{what}, which are never '
        f'unpickled. Use {WEIGHTS} instead, or save only tensors.'
      ) from error
    except _BROKEN as error:
      raise ValueError(
        f'{path} ({path.stat().st_size} bytes) was not read: it is cut short '
        f'or damaged. Download it again, or download {WEIGHTS} instead.'
      ) from error
    if not isinstance(stored, dict):
      raise ValueError(
        f'{path} holds a {type(stored).__name__}; expected a dict from names '
        f'to tensors. Download {WEIGHTS} instead.'
      )
    return stored


def save_safetensors(
  folder: pathlib.Path,
  tensors: Mapping[str, jax.ShapeDtypeStruct],
  pieces: Callable[[str], Iterable[np.ndarray]],
  *,
  stem: str = 'model',
  max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
  """Writes tensors to one safetensors file, or several with an index.

  Args:
    folder: output directory; created if absent.
    tensors: shape and dtype of each tensor.
    pieces: function from a tensor's name to its consecutive parts in memory
      order.
    stem: file name without suffix.
    max_file_bytes: maximum size of a file; a larger tensor gets a file of its
      own.
  """
  files: list[list[str]] = [[]]
  sizes = {
    name: tensor.size * tensor.dtype.itemsize
    for name, tensor in tensors.items()
  }
  for name in sorted(tensors):
    filled = sum(sizes[other] for other in files[-1])
    if files[-1] and filled + sizes[name] > max_file_bytes:
      files.append([])
    files[-1].append(name)
  folder.mkdir(parents=True, exist_ok=True)
  if len(files) == 1:
    _save_file(folder / f'{stem}.safetensors', tensors, pieces)
    return
  weight_map: dict[str, str] = {}
  for i, names in enumerate(files):
    file = f'{stem}-{i + 1:05}-of-{len(files):05}.safetensors'
    _save_file(folder / file, {name: tensors[name] for name in names}, pieces)
    weight_map |= dict.fromkeys(names, file)
  index = {
    'metadata': {'total_size': sum(sizes.values())},
    'weight_map': dict(sorted(weight_map.items())),
  }
  path = folder / f'{stem}.safetensors.index.json'
  with os_errors.naming(path):
    path.write_text(json.dumps(index, indent=2) + '\n')


def _save_file(
  path: pathlib.Path,
  tensors: Mapping[str, jax.ShapeDtypeStruct],
  pieces: Callable[[str], Iterable[np.ndarray]],
) -> None:
  """Writes one file, byte-identical to that of the package safetensors."""
  # Wide dtypes come first, so that all tensors are aligned.
  names = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
  # transformers requires this entry.
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name in names:
    tensor = tensors[name]
    start, end = end, end + tensor.size * tensor.dtype.itemsize
    header[name] = {
      'dtype': _TAGS[tensor.dtype.name],
      'shape': list(tensor.shape),
      'data_offsets': [start, end],
    }
  encoded = json.dumps(
    header, separators=(',', ':'), ensure_ascii=False
  ).encode()
  encoded += b' ' * (-len(encoded) % 8)
  with os_errors.naming(path), path.open('wb') as file:
    file.write(len(encoded).to_bytes(8, 'little'))
    file.write(encoded)
    for name in names:
      for piece in pieces(name):
        file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        del piece  # avoids two pieces in memory at once


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object from a file.

  Raises:
    ValueError: if the file is not a JSON object; names the file.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path} is not JSON: {config_lib.shorten(str(error))}. Download it '
      'again.'
    ) from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} is not a JSON object. Download it again.')
  return content
