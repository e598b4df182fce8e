# SPDX-License-Identifier: Apache-2.0
"""Weights in T5X's checkpoints.

Three layouts: one msgpack file; msgpack beside a zarr array for each
parameter, layers apart (`t5x.examples.t5`) or stacked along axis 1
(`scalable_t5`, each layer of which has its own bias of relative positions, as
in umT5); and T5X's Orbax layout. Optimizer states are not read. The way out is
`interop/to_t5x.py`.
"""

import functools
import math
import pathlib
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore

from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import gin_internals, storage
from l2s_jax.weights import misfits, source
from l2s_jax.weights.families import name_table
from l2s_jax.weights.families.name_table import Row
from l2s_jax.weights.formats import tensor_files

FILE = 'checkpoint'  # The msgpack of T5X's own layout.
CONFIG = 'config.json'
_GIN = 'config.gin'
# T5Config's fields that say what the parameters mean.
FIELDS = (
  'vocab_size',
  'emb_dim',
  'num_heads',
  'num_encoder_layers',
  'num_decoder_layers',
  'head_dim',
  'mlp_dim',
  'mlp_activations',
  'dropout_rate',
  'logits_via_embedding',
)
# Those that say the size of an axis: v, d, n, h, f.
FIELDS_OF_SIZES = ('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim')
_DTYPES = tuple(tensor_files.DTYPES.values())
# No compressor makes weights so much smaller; of little nothing is asked.
_MOST_COMPRESSED = 5000
_SMALL = 2**26
# Exceptions of msgpack and Flax for malformed bytes.
_BROKEN = (
  msgpack.exceptions.UnpackException,
  ValueError,
  TypeError,
  LookupError,
  AttributeError,
  ArithmeticError,
  RecursionError,
  MemoryError,
  struct.error,
)

_ATTENTION = (
  # t5x.examples.t5 merges heads and kv, scalable_t5 does not.
  Row('query/kernel', 'query/kernel', 'd (n h) -> d n h'),
  Row('key/kernel', 'key/kernel', 'd (n h) -> d n h'),
  Row('value/kernel', 'value/kernel', 'd (n h) -> d n h'),
  Row('out/kernel', 'out/kernel', '(n h) d -> n h d'),
)
_MLP = (
  Row('wi/kernel', 'wi/kernel', 'd f -> d f'),
  Row('wi_0/kernel', 'wi_0/kernel', 'd f -> d f'),
  Row('wi_1/kernel', 'wi_1/kernel', 'd f -> d f'),
  Row('wo/kernel', 'wo/kernel', 'f d -> f d'),
)
_RELPOS = Row(
  'relpos_bias/rel_embedding', 'relpos_bias/rel_embedding', 'n r -> n r'
)


def _norm(ours: str, theirs: str) -> Row:
  return Row(f'{ours}/scale', f'{theirs}/scale', 'd -> d')


ROWS = (
  Row('token_embedder/embedding', 'token_embedder/embedding', 'v d -> v d'),
  Row('logits_dense/kernel', 'decoder/logits_dense/kernel', 'd v -> d v'),
  _norm('encoder/final_norm', 'encoder/encoder_norm'),
  _norm('decoder/final_norm', 'decoder/decoder_norm'),
  *name_table.under('encoder/', 'encoder/', (_RELPOS,)),
  *name_table.under('decoder/', 'decoder/', (_RELPOS,)),
  *name_table.under(
    'encoder/layers/',
    'encoder/layers_{layer}/',
    (
      _RELPOS,
      _norm('pre_self_attention_norm', 'pre_attention_layer_norm'),
      *name_table.under('self_attention/', 'attention/', _ATTENTION),
      _norm('pre_mlp_norm', 'pre_mlp_layer_norm'),
      *name_table.under('mlp/', 'mlp/', _MLP),
    ),
  ),
  *name_table.under(
    'decoder/layers/',
    'decoder/layers_{layer}/',
    (
      _RELPOS,
      _norm('pre_self_attention_norm', 'pre_self_attention_layer_norm'),
      *name_table.under('self_attention/', 'self_attention/', _ATTENTION),
      _norm('pre_cross_attention_norm', 'pre_cross_attention_layer_norm'),
      *name_table.under(
        'cross_attention/', 'encoder_decoder_attention/', _ATTENTION
      ),
      _norm('pre_mlp_norm', 'pre_mlp_layer_norm'),
      *name_table.under('mlp/', 'mlp/', _MLP),
    ),
  ),
)


class _Array(NamedTuple):
  """An array of a checkpoint, not yet read."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class Checkpoint:
  """The parameters of a T5 that T5X has saved."""

  def __init__(
    self,
    location: pathlib.Path,
    step: int | None = None,
    config: config_lib.TransformerConfig | None = None,
  ):
    """Reads the names and shapes of a checkpoint.

    Args:
      location: a MODEL_DIR of T5X, one of its checkpoints, or a msgpack file.
      step: which checkpoint of a MODEL_DIR; None takes the newest.
      config: None follows config.json or config.gin beside the checkpoint, and
        what neither says, the shapes.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if it is broken, or its parameters are not those of a T5 or
        of the config; lists all of these.
    """
    self.location = str(location)
    # tensorstore takes no path that holds `..`.
    location = location.resolve()
    self.model_type: str | None = None
    self.special_ids: dict[str, Any] = {}
    path, self._step = _find(location, step)
    self._arrays = _open(path)
    if any(name.startswith('projector/') for name in self._arrays):
      raise ValueError(
        f'{self.location} is LLM-to-SLM, which T5X has trained from a run of '
        'ours, and not a T5. Make a run of it: convert --from=t5x --to=run '
        '--run=RUN, where RUN is that run.'
      )
    self._is_scanned = any(
      name.startswith('encoder/encoder/') for name in self._arrays
    )
    self.config = config or _config(path, self._arrays, self._is_scanned)
    causes = self._causes()
    self._sizes = name_table.axis_sizes(self.config)
    found = {
      row.path
      for row in ROWS
      if any(name in self._arrays for name in self._names(row))
    }
    demanded = source.demanded_paths(self.config, found)
    self._rows = {row.path: row for row in ROWS if row.path in demanded}
    self._held: tuple[str, np.ndarray] = ('', np.empty(0))
    self._check(causes)

  def _causes(self) -> list[str]:
    """Returns where the config has other sizes than the arrays.

    Raises:
      ValueError: if the config asks for more than could be listed.
    """
    config, keys = self.config, dict(zip('vdnhf', FIELDS_OF_SIZES, strict=True))
    if self._is_scanned:
      causes = [
        f'{stack} has {found} layers, num_{stack}_layers says {said}'
        for stack, said in (
          ('encoder', config.num_encoder_layers),
          ('decoder', config.num_decoder_layers),
        )
        if (found := _num_layers(self._arrays, stack, True)) not in (0, said)
      ]
      return causes
    causes = misfits.layers(ROWS, config, self._arrays, keys)
    if misfits.asks_for_too_much(config, len(self._arrays)):
      raise ValueError(self._misfit(causes))
    shapes = {name: array.shape for name, array in self._arrays.items()}
    return causes + misfits.widths(ROWS, config, shapes, keys)

  def _misfit(self, causes: Sequence[str], problems: Sequence[str] = ()) -> str:
    return misfits.refusal(
      f'The parameters in {self.location} are not those of the config',
      'Name the one that they were trained with by --config',
      problems,
      causes,
    )

  def step(self) -> int | None:
    return self._step

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    return {
      path: jax.ShapeDtypeStruct(
        row.our_shape(self.config, self._sizes), self._dtype(row)
      )
      for path, row in self._rows.items()
    }

  def _dtype(self, row: Row) -> np.dtype:
    """Returns the dtype that holds all layers of a row as stored."""
    stored = {self._arrays[name].dtype for name in self._names(row)}
    return functools.reduce(jnp.promote_types, stored)

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> np.ndarray:
    row = self._rows[path]
    if row.is_stacked and layer is None:
      count = len(row.names(self.config))
      return np.stack([self.read(path, i) for i in range(count)])
    names = self._names(row)
    if row.is_stacked and self._is_scanned:
      if self._held[0] != names[0]:  # A stack is asked for layer after layer.
        self._held = ('', np.empty(0))
        self._held = (names[0], self._arrays[names[0]].read())
      array = self._held[1][:, layer]
    else:
      array = self._arrays[names[layer or 0]].read()
    array = array.astype(self._dtype(row), copy=False)
    return row.to_ours(array, self._sizes)

  def name(self, path: shapes_lib.Path) -> str:
    names = {row.path: row.theirs for row in ROWS}
    name = names.get(path, '/'.join(path))
    return scanned(name) if self._is_scanned else name

  def digest(self, path: shapes_lib.Path) -> str | None:
    del path
    return None

  def _names(self, row: Row) -> list[str]:
    """Returns the arrays of a row: one, or one a layer."""
    if self._is_scanned and row.is_stacked:
      return [scanned(row.theirs)]
    return row.names(self.config)

  def _check(self, causes: Sequence[str]) -> None:
    """Refuses parameters that are missing, unknown, or of another shape."""
    expected = []
    for row in self._rows.values():
      shapes = [row.shape(self._sizes), unmerged(row, self._sizes)]
      if self._is_scanned:
        shapes.reverse()
        if row.is_stacked:
          count = len(row.names(self.config))
          shapes = [(shape[0], count, *shape[1:]) for shape in shapes]
      expected += [
        misfits.Expected(name, row.ours, shapes) for name in self._names(row)
      ]
    ours = {name: row.ours for row in ROWS for name in self._names(row)}
    problems = [
      *misfits.problems(expected, self._arrays, _DTYPES),
      *misfits.unknown(
        self._arrays.keys() - {tensor.name for tensor in expected},
        self._arrays,
        ours,
      ),
    ]
    if problems:
      raise ValueError(self._misfit(causes, problems))


def unmerged(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """Returns the shape of a tensor in scalable_t5, heads and kv apart."""
  return tuple(sizes[letter] for group in row.groups() for letter in group)


def scanned(name: str) -> str:
  return re.sub(r'^(\w+)/layers_{layer}/', r'\1/\1/', name)


def is_checkpoint(location: pathlib.Path) -> bool:
  """Returns whether T5X, and nobody else, leaves such a folder or file."""
  if location.is_file():
    if location.suffix not in ('', '.msgpack') and not re.fullmatch(
      r'checkpoint_\d+', location.name
    ):
      return False
    with location.open('rb') as file:
      first = file.read(1)
    return bool(first) and (first[0] >> 4 == 8 or first[0] in (0xDE, 0xDF))
  return (
    any(
      (location / name).is_file()
      for name in (FILE, '_METADATA', 'state/_METADATA')
    )
    or location.is_dir()
    and any(
      re.fullmatch(r'checkpoint_\d+', path.name) for path in location.iterdir()
    )
  )


def _find(
  location: pathlib.Path, step: int | None
) -> tuple[pathlib.Path, int | None]:
  """Returns the msgpack file or the Orbax folder, and its step if it says."""
  steps = {
    int(path.name.removeprefix('checkpoint_')): path
    for path in (location.iterdir() if location.is_dir() else ())
    if re.fullmatch(r'checkpoint_\d+', path.name)
  }
  if steps and (step is None or step in steps):
    step = max(steps) if step is None else step
    return _find(steps[step], None)[0], step
  if step is None:
    found = re.fullmatch(r'.*checkpoint_(\d+)', location.name)
    step = int(found[1]) if found else None
    for path in (location, location / FILE):
      if path.is_file():
        return path, step
    for path in (location, location / 'state'):
      if (path / '_METADATA').is_file():
        return path, step
  raise FileNotFoundError(
    f'{location} holds no checkpoint of T5X'
    + (f' of step {step}' if step is not None else '')
    + f'; it has the steps {sorted(steps)}. Name a MODEL_DIR of T5X, one of '
    'its checkpoint_STEP folders, or a msgpack file.'
  )


def open_part(
  location: pathlib.Path, step: int | None, part: Sequence[str]
) -> tuple[dict[str, Any], int | None]:
  """Opens a subtree of a T5X train state, of any model.

  Args:
    location: as in `Checkpoint`.
    step: as in `Checkpoint`.
    part: keys of the subtree: 'target' has the parameters, 'state' the step and
      the optimizer state.

  Returns:
    Arrays by name, with `shape`, `dtype` and `read()`; and the step, if
    the name of the checkpoint contains it.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    ValueError: if it is broken.
  """
  path, step = _find(location.resolve(), step)
  return dict(_open(path, tuple(part))), step


def _open(
  path: pathlib.Path, part: tuple[str, ...] = ('target',)
) -> dict[str, _Array]:
  if path.is_dir():
    return _open_orbax(path, part)
  try:
    content = flax.serialization.msgpack_restore(path.read_bytes())
  except _BROKEN as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is not a whole msgpack file: '
      f'{config_lib.shorten(str(error) or type(error).__name__)}. Copy the '
      'checkpoint again.'
    ) from error
  if isinstance(content, dict):
    content = content.get('optimizer', content)
  if not isinstance(content, dict) or not isinstance(
    content.get('target'), dict
  ):
    raise ValueError(f'{path} is not a checkpoint of T5X: it has no target.')
  arrays = {}
  tree = functools.reduce(lambda tree, key: tree.get(key, {}), part, content)
  for name, leaf in _leaves(tree):
    if isinstance(leaf, np.ndarray | np.generic):
      arrays[name] = _Array(leaf.shape, leaf.dtype, np.asarray(leaf).copy)
    else:
      kvstore = _kvstore(_place(path, name, leaf))
      arrays[name] = _open_array(name, path, 'zarr', kvstore)
  return arrays


def _place(path: pathlib.Path, name: str, leaf: Any) -> str:
  """Returns where the array of a tensorstore spec is, in the checkpoint."""
  found = None
  if isinstance(leaf, dict) and isinstance(leaf['kvstore'], dict):
    # Since tensorstore 0.1.14 the path is inside.
    found = leaf['kvstore'].get('path') or leaf.get('path')
  if not isinstance(found, str) or '\0' in found:
    raise ValueError(
      f'{path}: the parameter {config_lib.shorten(name)} is neither an array '
      'nor says where one is. Copy the checkpoint again.'
    )
  place = (path.parent / found).resolve()
  if not place.is_relative_to(path.parent):
    raise ValueError(
      f'{path}: the parameter {config_lib.shorten(name)} refers to '
      f'{config_lib.shorten(found)}, outside the checkpoint. Copy the whole '
      'checkpoint.'
    )
  return f'{place}/'


def _leaves(
  tree: Mapping[str, Any], name: str = ''
) -> Iterator[tuple[str, Any]]:
  """Yields the name and the array, or tensorstore spec, of every parameter."""
  for key, value in tree.items():
    full = f'{name}/{key}' if name else key
    if isinstance(value, dict) and not value.keys() >= {'driver', 'kvstore'}:
      yield from _leaves(value, full)
    else:
      yield full, value


def _open_orbax(
  folder: pathlib.Path, part: tuple[str, ...]
) -> dict[str, _Array]:
  path = folder / '_METADATA'
  metadata = tensor_files.read_json(path)
  driver = 'zarr3' if metadata.get('use_zarr3') else 'zarr'
  tree = metadata.get('tree_metadata')
  if not isinstance(tree, dict):
    raise ValueError(
      f'{path} is not what Orbax writes: it has no object tree_metadata. Copy '
      'the checkpoint again.'
    )
  arrays = {}
  for name, leaf in tree.items():
    keys = _keys(path, name, leaf)
    if tuple(keys[: len(part)]) != part:
      continue
    place = '.'.join(keys) + '/'
    if '..' in pathlib.PurePath(place).parts:
      raise ValueError(f'{path}: {config_lib.shorten(place)} leads out of it.')
    if (folder / 'manifest.ocdbt').is_file():
      base = _kvstore(f'{folder}/')
      kvstore: dict[str, Any] = {'driver': 'ocdbt', 'base': base, 'path': place}
    else:
      kvstore = _kvstore(f'{folder}/{place}')
    name = '/'.join(keys[len(part) :])
    arrays[name] = _open_array(name, folder, driver, kvstore)
  return arrays


def _kvstore(place: str) -> dict[str, Any]:
  """Returns TensorStore's key-value store of a folder or its prefix."""
  if storage.is_bucket(place):
    spec = storage.kvstore(storage.of(place))
    assert isinstance(spec, dict)
    return spec
  return {'driver': 'file', 'path': place}


def _keys(path: pathlib.Path, name: str, leaf: Any) -> list[str]:
  """Returns the keys that lead to a leaf of Orbax's tree."""
  keys = leaf.get('key_metadata') if isinstance(leaf, dict) else None
  if (
    not isinstance(keys, list)
    or not keys
    or not all(isinstance(key, dict) and 'key' in key for key in keys)
  ):
    raise ValueError(
      f'{path}: tree_metadata of {config_lib.shorten(name)} does not say where '
      'it is (key_metadata). Copy the checkpoint again.'
    )
  return [str(key['key']) for key in keys]


def _open_array(
  name: str, path: pathlib.Path, driver: str, kvstore: Mapping[str, Any]
) -> _Array:
  def broken(error: Exception) -> ValueError:
    return ValueError(
      f'{path}: the parameter {name} is not whole: '
      f'{config_lib.shorten(str(error), 200)}. Copy the checkpoint again.'
    )

  spec = {
    'driver': driver,
    'kvstore': kvstore,
    'fill_missing_data_reads': False,  # Missing chunks are errors, not zeros.
  }
  try:
    store = tensorstore.open(spec, open=True, read=True).result()
  except (*_BROKEN, OSError, NotImplementedError, RuntimeError) as error:
    raise broken(error) from error

  dtype = store.dtype.numpy_dtype
  size = math.prod(store.shape) * dtype.itemsize
  chunks = store.chunk_layout.read_chunk.shape or ()
  chunk = math.prod(length or 1 for length in chunks) * dtype.itemsize
  # tensorstore ends the process where it finds no memory.
  if max(size, chunk) > _SMALL and (
    max(size, chunk) > _MOST_COMPRESSED * (stored := _stored_bytes(kvstore))
    or chunk > 2 * size
  ):
    raise ValueError(
      f'{path}: the parameter {name} has the shape {store.shape} in chunks of '
      f'{chunks}, and {stored} bytes on the disk. '
      'Copy the checkpoint again.'
    )

  def read() -> np.ndarray:
    try:
      return store.read().result()
    except (*_BROKEN, OSError) as error:
      raise broken(error) from error

  return _Array(store.shape, dtype, read)


def _stored_bytes(kvstore: Mapping[str, Any]) -> int:
  """Returns how large the files of an array are, or of all that share them."""
  base = kvstore.get('base', kvstore)
  if 'bucket' in base:
    scheme = 's3' if base['driver'] == 's3' else 'gs'
    folder = storage.of(f'{scheme}://{base["bucket"]}/{base["path"]}')
  else:
    folder = pathlib.Path(base['path'])
  files = (path for path in folder.rglob('*') if path.is_file())
  return sum(file.stat().st_size for file in files)


def _config(
  path: pathlib.Path, arrays: Mapping[str, _Array], is_scanned: bool
) -> config_lib.TransformerConfig:
  """Returns the config, from shapes and a config file beside the weights."""
  layer = 'encoder/encoder/' if is_scanned else 'encoder/layers_0/'
  shared = layer if is_scanned else 'encoder/'
  per_layer = f'{layer}relpos_bias/rel_embedding'
  ranks = {
    'token_embedder/embedding': (2,),
    f'{layer}attention/query/kernel': (3, 4) if is_scanned else (2, 3),
    f'{layer}mlp/wo/kernel': (3,) if is_scanned else (2,),
  }
  relpos_name = per_layer
  if per_layer not in arrays:
    relpos_name = f'{shared}relpos_bias/rel_embedding'
  ranks[relpos_name] = (3,) if is_scanned else (2,)
  for name, allowed in ranks.items():
    if name not in arrays:
      raise ValueError(
        f'{path} does not hold a T5: it has no parameter {name!r}. Its '
        f'parameters begin with '
        f'{config_lib.shorten(", ".join(sorted(arrays)[:3]), 200)}.'
      )
    if len(arrays[name].shape) not in allowed or 0 in arrays[name].shape:
      raise ValueError(
        f'{path} does not hold a T5: its parameter {name!r} has the shape '
        f'{arrays[name].shape}.'
      )
  vocab_size, emb_dim = arrays['token_embedder/embedding'].shape
  relpos = arrays[relpos_name]
  query = arrays[f'{layer}attention/query/kernel'].shape
  mlp_dim = arrays[f'{layer}mlp/wo/kernel'].shape[0]

  query_axes = [emb_dim, relpos.shape[0]]
  if is_scanned:
    query_axes.append(_num_layers(arrays, 'encoder', True))
  is_gated = f'{layer}mlp/wi_0/kernel' in arrays
  fields: dict[str, Any] = {
    'vocab_size': vocab_size,
    'emb_dim': emb_dim,
    'num_heads': relpos.shape[0],
    'head_dim': math.prod(query) // math.prod(query_axes),
    'mlp_dim': mlp_dim,
    'num_encoder_layers': _num_layers(arrays, 'encoder', is_scanned),
    'num_decoder_layers': _num_layers(arrays, 'decoder', is_scanned),
    'mlp_activations': ('gelu', 'linear') if is_gated else ('relu',),
    'logits_via_embedding': 'decoder/logits_dense/kernel' not in arrays,
    'dropout_rate': 0.1,  # T5Config's default.
  }
  beside, fields_beside = _fields_beside(path)
  fields |= fields_beside
  fields |= {
    'relpos_buckets': relpos.shape[-1],
    'relpos_per_layer': per_layer in arrays,
    # T5X divides by sqrt(emb_dim) wherever the head is tied.
    'scale_logits': fields['logits_via_embedding'] is True,
  }
  return config_lib.from_json(fields, beside, 'T5Config')


def _num_layers(
  arrays: Mapping[str, _Array], stack: str, is_scanned: bool
) -> int:
  """Returns how many layers a stack has, by its arrays."""
  if is_scanned:
    wo = arrays.get(f'{stack}/{stack}/mlp/wo/kernel')
    return 0 if wo is None or len(wo.shape) < 2 else wo.shape[1]
  found = (re.match(rf'{stack}/layers_(\d+)/', name) for name in arrays)
  return len({match[1] for match in found if match})


def _fields_beside(path: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
  """Returns T5Config's fields as a file near the checkpoint has them."""
  for folder in path.parents[:3]:
    file = folder / CONFIG
    if file.is_file():
      content = tensor_files.read_json(file)
      found = content.get('config', content)
      if not isinstance(found, dict):
        raise ValueError(
          f'{file}: config is {config_lib.shorten(repr(found))}; expected an '
          'object. Copy the checkpoint again.'
        )
    elif (folder / _GIN).is_file():
      file = folder / _GIN
      try:
        found = _read_gin(file.read_text(encoding='utf-8'))
      except (SyntaxError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
          f'{file} cannot be read: {config_lib.shorten(str(error), 200)}. Copy '
          'the checkpoint again.'
        ) from error
    else:
      continue
    return file, {name: found[name] for name in FIELDS if name in found}
  return path, {}


class _Delegate(gin_internals.ParserDelegate):
  """Keeps references as text: T5X's functions are not here to be named."""

  def configurable_reference(self, scoped_name, evaluate):
    return f'@{scoped_name}'

  def macro(self, scoped_name):
    return f'%{scoped_name}'


def _read_gin(text: str) -> dict[str, Any]:
  """Returns the fields that T5X's config.gin binds of T5Config."""
  macros, fields = {}, {}
  parser = gin_internals.ConfigParser(text, _Delegate())
  for statement in parser:
    if not isinstance(statement, gin_internals.BindingStatement):
      continue
    if not statement.arg_name:
      macros[f'%{statement.selector}'] = statement.value
    elif statement.selector.split('.')[-1] == 'T5Config':
      fields[statement.arg_name] = statement.value
  values = {
    name: macros.get(value, value) if isinstance(value, str) else value
    for name, value in fields.items()
  }
  # What another package would compute, the shapes may say.
  return {
    name: value
    for name, value in values.items()
    if not (isinstance(value, str) and value[:1] in ('@', '%'))
  }
