# SPDX-License-Identifier: Apache-2.0
"""Weights in T5X's checkpoints.

Three layouts: one msgpack file; msgpack beside a zarr array for each
parameter, layers apart (`t5x.examples.t5`) or stacked along axis 1
(`scalable_t5`, each layer of which has its own bias of relative positions, as
in umT5); and T5X's Orbax layout. Optimizer states are not read. The way out is
`to_t5x.py`.
"""

import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.serialization
import gin.config_parser
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore

from l2s_jax import weights
from l2s_jax.models import config as config_lib
from l2s_jax.weights import rows, tensor_files
from l2s_jax.weights.rows import Row

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
  *rows.under('encoder/', 'encoder/', (_RELPOS,)),
  *rows.under('decoder/', 'decoder/', (_RELPOS,)),
  *rows.under(
    'encoder/layers/',
    'encoder/layers_{layer}/',
    (
      _RELPOS,
      _norm('pre_self_attention_norm', 'pre_attention_layer_norm'),
      *rows.under('self_attention/', 'attention/', _ATTENTION),
      _norm('pre_mlp_norm', 'pre_mlp_layer_norm'),
      *rows.under('mlp/', 'mlp/', _MLP),
    ),
  ),
  *rows.under(
    'decoder/layers/',
    'decoder/layers_{layer}/',
    (
      _RELPOS,
      _norm('pre_self_attention_norm', 'pre_self_attention_layer_norm'),
      *rows.under('self_attention/', 'self_attention/', _ATTENTION),
      _norm('pre_cross_attention_norm', 'pre_cross_attention_layer_norm'),
      *rows.under('cross_attention/', 'encoder_decoder_attention/', _ATTENTION),
      _norm('pre_mlp_norm', 'pre_mlp_layer_norm'),
      *rows.under('mlp/', 'mlp/', _MLP),
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
    self.model_type: str | None = None
    self.special_ids: dict[str, Any] = {}
    path, self._step = _find(location, step)
    self._arrays = _open(path)
    self._is_scanned = any(
      name.startswith('encoder/encoder/') for name in self._arrays
    )
    self.config = config or _config(path, self._arrays, self._is_scanned)
    self._sizes = rows.axis_sizes(self.config)
    found = {
      row.path
      for row in ROWS
      if any(name in self._arrays for name in self._names(row))
    }
    demanded = weights.demanded(self.config, found)
    self._rows = {row.path: row for row in ROWS if row.path in demanded}
    self._held: tuple[str, np.ndarray] = ('', np.empty(0))
    self._check()

  def step(self) -> int | None:
    return self._step

  def shapes(self) -> dict[weights.Path, jax.ShapeDtypeStruct]:
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

  def read(self, path: weights.Path, layer: int | None = None) -> np.ndarray:
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

  def name(self, path: weights.Path) -> str:
    names = {row.path: row.theirs for row in ROWS}
    name = names.get(path, '/'.join(path))
    return scanned(name) if self._is_scanned else name

  def digest(self, path: weights.Path) -> str | None:
    del path
    return None

  def _names(self, row: Row) -> list[str]:
    """Returns the arrays of a row: one, or one a layer."""
    if self._is_scanned and row.is_stacked:
      return [scanned(row.theirs)]
    return row.names(self.config)

  def _check(self) -> None:
    """Refuses parameters that are missing, unknown, or of another shape."""
    problems = []
    known: set[str] = set()
    for row in self._rows.values():
      accepted = [row.shape(self._sizes), unmerged(row, self._sizes)]
      if self._is_scanned and row.is_stacked:
        count = len(row.names(self.config))
        accepted = [(shape[0], count, *shape[1:]) for shape in accepted]
      expected = accepted[self._is_scanned]
      for name in self._names(row):
        known.add(name)
        if name not in self._arrays:
          problems.append(f'{name} ({row.ours}) {expected}: missing')
        elif self._arrays[name].shape not in accepted:
          problems.append(
            f'{name} ({row.ours}): expected {expected}, found '
            f'{self._arrays[name].shape}'
          )
    ours = {name: row.ours for row in ROWS for name in self._names(row)}
    problems += [
      f'{name}{f" ({ours[name]})" if name in ours else ""} '
      f'{self._arrays[name].shape}: unknown'
      for name in self._arrays.keys() - known
    ]
    if problems:
      raise ValueError(
        f'The parameters in {self.location} are not those of the config. Name '
        'the one that they were trained with by --config:\n  '
        + '\n  '.join(sorted(problems))
      )


def unmerged(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """Returns the shape of theirs in scalable_t5, which keeps heads and kv."""
  return tuple(sizes[letter] for group in row.groups() for letter in group)


def scanned(name: str) -> str:
  return re.sub(r'^(\w+)/layers_{layer}/', r'\1/\1/', name)


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


def _open(path: pathlib.Path) -> dict[str, _Array]:
  if path.is_dir():
    return _open_orbax(path)
  try:
    content = flax.serialization.msgpack_restore(path.read_bytes())
  except (msgpack.exceptions.UnpackException, ValueError) as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is not a whole msgpack file: '
      f'{error or type(error).__name__}. Copy the checkpoint again.'
    ) from error
  if isinstance(content, dict):
    content = content.get('optimizer', content)
  if not isinstance(content, dict) or 'target' not in content:
    raise ValueError(f'{path} is not a checkpoint of T5X: it has no target.')
  arrays = {}
  for name, leaf in _leaves(content['target']):
    if isinstance(leaf, dict):
      # Since tensorstore 0.1.14 the path is inside.
      place = leaf['kvstore'].get('path') or leaf['path']
      kvstore = {'driver': 'file', 'path': str(path.parent / place)}
      arrays[name] = _open_array(name, path, 'zarr', kvstore)
    else:
      arrays[name] = _Array(leaf.shape, leaf.dtype, leaf.copy)
  return arrays


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


def _open_orbax(folder: pathlib.Path) -> dict[str, _Array]:
  metadata = tensor_files.read_json(folder / '_METADATA')
  driver = 'zarr3' if metadata.get('use_zarr3') else 'zarr'
  arrays = {}
  for leaf in metadata['tree_metadata'].values():
    first, *keys = [str(key['key']) for key in leaf['key_metadata']]
    if first != 'target':
      continue
    place = '.'.join((first, *keys)) + '/'
    if (folder / 'manifest.ocdbt').is_file():
      base = {'driver': 'file', 'path': f'{folder}/'}
      kvstore: dict[str, Any] = {'driver': 'ocdbt', 'base': base, 'path': place}
    else:
      kvstore = {'driver': 'file', 'path': f'{folder}/{place}'}
    name = '/'.join(keys)
    arrays[name] = _open_array(name, folder, driver, kvstore)
  return arrays


def _open_array(
  name: str, path: pathlib.Path, driver: str, kvstore: Mapping[str, Any]
) -> _Array:
  def broken(error: Exception) -> ValueError:
    return ValueError(
      f'{path}: the parameter {name} is not whole: {error}. Copy the '
      'checkpoint again.'
    )

  spec = {
    'driver': driver,
    'kvstore': kvstore,
    'fill_missing_data_reads': False,  # A chunk that is not there is no zeros.
  }
  try:
    store = tensorstore.open(spec, open=True, read=True).result()
  except (ValueError, FileNotFoundError) as error:
    raise broken(error) from error

  def read() -> np.ndarray:
    try:
      return store.read().result()
    except ValueError as error:
      raise broken(error) from error

  return _Array(store.shape, store.dtype.numpy_dtype, read)


def _config(
  path: pathlib.Path, arrays: Mapping[str, _Array], is_scanned: bool
) -> config_lib.TransformerConfig:
  """Returns the config: what the shapes say, then what a file beside says."""
  layer = 'encoder/encoder/' if is_scanned else 'encoder/layers_0/'
  shared = layer if is_scanned else 'encoder/'
  per_layer = f'{layer}relpos_bias/rel_embedding'
  try:
    vocab_size, emb_dim = arrays['token_embedder/embedding'].shape
    relpos = (
      arrays.get(per_layer) or arrays[f'{shared}relpos_bias/rel_embedding']
    )
    query = arrays[f'{layer}attention/query/kernel'].shape
    mlp_dim = arrays[f'{layer}mlp/wo/kernel'].shape[0]
  except KeyError as error:
    raise ValueError(
      f'{path} does not hold a T5: it has no parameter {error}. Its parameters '
      f'begin with {", ".join(sorted(arrays)[:3])}.'
    ) from error

  def num_layers(stack: str) -> int:
    if is_scanned:
      return arrays[f'{stack}/{stack}/mlp/wo/kernel'].shape[1]
    found = (re.match(rf'{stack}/layers_(\d+)/', name) for name in arrays)
    return 1 + max((int(m[1]) for m in found if m), default=-1)

  query_axes = [emb_dim, relpos.shape[0]]
  if is_scanned:
    query_axes.append(num_layers('encoder'))
  is_gated = f'{layer}mlp/wi_0/kernel' in arrays
  fields = {
    'vocab_size': vocab_size,
    'emb_dim': emb_dim,
    'num_heads': relpos.shape[0],
    'head_dim': math.prod(query) // math.prod(query_axes),
    'mlp_dim': mlp_dim,
    'num_encoder_layers': num_layers('encoder'),
    'num_decoder_layers': num_layers('decoder'),
    'mlp_activations': ('gelu', 'linear') if is_gated else ('relu',),
    'logits_via_embedding': 'decoder/logits_dense/kernel' not in arrays,
    'dropout_rate': 0.1,  # T5Config's default.
  } | _fields_beside(path)
  return config_lib.TransformerConfig(
    **fields,
    relpos_buckets=relpos.shape[-1],
    relpos_per_layer=per_layer in arrays,
    # T5X divides by sqrt(emb_dim) wherever the head is tied.
    scale_logits=fields['logits_via_embedding'],
  )


def _fields_beside(path: pathlib.Path) -> dict[str, Any]:
  """Returns T5Config's fields as a file near the checkpoint has them."""
  for folder in path.parents[:3]:
    if (folder / CONFIG).is_file():
      content = tensor_files.read_json(folder / CONFIG)
      found = content.get('config', content)
    elif (folder / _GIN).is_file():
      found = _read_gin((folder / _GIN).read_text())
    else:
      continue
    return {name: found[name] for name in FIELDS if name in found}
  return {}


class _Delegate(gin.config_parser.ParserDelegate):
  """Keeps references as text: T5X's functions are not here to be named."""

  def configurable_reference(self, scoped_name, evaluate):
    return f'@{scoped_name}'

  def macro(self, scoped_name):
    return f'%{scoped_name}'


def _read_gin(text: str) -> dict[str, Any]:
  """Returns the fields that T5X's config.gin binds of T5Config."""
  macros, fields = {}, {}
  parser = gin.config_parser.ConfigParser(text, _Delegate())
  for statement in parser:
    if not isinstance(statement, gin.config_parser.BindingStatement):
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
    if not (isinstance(value, str) and value[0] in '@%')
  }
