# SPDX-License-Identifier: Apache-2.0
"""Weights in a Hugging Face folder: config.json beside files of tensors.

Reading goes through a family's table of names (`t5_names.py`,
`decoder_names.py`) one tensor at a time. Tokenizers are not here but in
`vocabularies.py`, the files themselves in `tensor_files.py`.
"""

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax import weights
from l2s_jax.models import config as config_lib
from l2s_jax.weights import (
  decoder_names,
  llama_names,
  rows,
  t5_names,
  tensor_files,
)
from l2s_jax.weights.rows import Family
from l2s_jax.weights.tensor_files import Tensor

CONFIG = 'config.json'
# In which T5Gemma says again what concerns one side.
SUB_CONFIGS = ('encoder', 'decoder')
_SPECIAL_IDS = (
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'decoder_start_token_id',
)

FAMILIES = t5_names.FAMILIES | decoder_names.FAMILIES | llama_names.FAMILIES


def config_json(
  model_type: str, config: config_lib.TransformerConfig
) -> dict[str, Any]:
  """Returns the config.json of a family that says what `config` says."""
  family = FAMILIES[model_type]
  return {
    'model_type': model_type,
    'architectures': [family.architecture],
    **family.unparse(config),
  }


def model_types(config: config_lib.TransformerConfig) -> list[str]:
  """Returns the families whose config.json can say what `config` says.

  The usual one comes first where several can: a T5 v1.1, then an mT5. How a
  model is run or was initialised is not asked.
  """
  unasked = dict.fromkeys(
    (*config_lib.RUNTIME_FIELDS, 'kernel_init_stddev', 'embedding_init_stddev')
  )

  def fits(model_type: str) -> bool:
    theirs = config_json(model_type, config)
    is_tied = config.logits_via_embedding
    try:
      again = FAMILIES[model_type].parse(theirs, is_tied)
    except ValueError:
      return False
    return config.to_json() | unasked == again.to_json() | unasked

  return [name for name in FAMILIES if fits(name)]


class Model:
  """The weights of one model by the names that transformers gives them.

  Attributes:
    special_ids: what config.json says of token ids, by its keys; a list of
      ids where several end an answer. T5Gemma's also has them a level deeper,
      as it does here.
    left_out: a clause on what of the model is not read; '' where all is.
  """

  def __init__(
    self,
    location: str,
    described_by: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
  ):
    """Finds our tensors among theirs and checks them.

    Args:
      location: named in errors.
      described_by: what `config` was read from, named in errors.
      config: as config.json has it.
      tensors: by the names in the file.

    Raises:
      ValueError: if the family is not supported, or the tensors are not those
        that the config describes; lists all of these.
    """
    self.location = location
    family = _family(described_by, config)
    self.model_type: str | None = config['model_type']
    self.special_ids = _special_ids(config)
    self._tensors = _by_name_of_table(tensors, family)
    try:
      self.config = family.parse(config, self._is_tied(config, family))
    except ValueError as error:
      raise ValueError(f'{described_by}: {error}.') from error
    self.left_out = family.left_out(config)
    self._sizes = rows.axis_sizes(self.config)
    self._names = {row.path: row.theirs for row in family.rows}
    found = {
      row.path
      for row in family.rows
      if any(name in self._tensors for name in row.names(self.config))
    }
    demanded = weights.demanded(self.config, found)
    self._rows = {row.path: row for row in family.rows if row.path in demanded}
    self._check(family, described_by)

  def step(self) -> int | None:
    return None

  def shapes(self) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    return {
      path: jax.ShapeDtypeStruct(
        row.our_shape(self.config, self._sizes), self._dtype(row)
      )
      for path, row in self._rows.items()
    }

  def _dtype(self, row: rows.Row) -> np.dtype:
    """Returns the dtype that holds all layers of a row as stored."""
    names = row.names(self.config)
    stored = {tensor_files.DTYPES[self._tensors[name].dtype] for name in names}
    return functools.reduce(jnp.promote_types, map(jnp.dtype, stored))

  def read(self, path: tuple[str, ...], layer: int | None = None) -> np.ndarray:
    row = self._rows[path]
    names = row.names(self.config)
    if row.is_stacked and layer is None:
      return np.stack([self.read(path, i) for i in range(len(names))])
    tensor = self._tensors[names[layer or 0]]
    array = tensor.read().astype(self._dtype(row), copy=False)
    return row.to_ours(array, self._sizes)

  def name(self, path: tuple[str, ...]) -> str:
    return self._names.get(path, '/'.join(path))

  def digest(self, path: tuple[str, ...]) -> str | None:
    del path
    return None

  def _is_tied(self, config: Mapping[str, Any], family: Family) -> bool:
    """Returns whether the output head is the embedding table.

    A head of its own has the last word: transformers 5 writes
    tie_word_embeddings as true into the config.json of every T5, tied or not.
    """
    names = {row.ours: row.theirs for row in family.rows}
    head, table = (
      names['logits_dense/kernel'],
      names.get(
        'decoder_token_embedder/embedding', names['token_embedder/embedding']
      ),
    )
    if not family.may_be_tied(config):
      return False
    if head not in self._tensors:
      return True
    return table in self._tensors and np.array_equal(
      self._tensors[head].read(), self._tensors[table].read()
    )

  def _check(self, family: Family, described_by: str) -> None:
    """Refuses tensors that are missing, unknown, or of another shape."""
    problems = []
    known = set()
    for row in self._rows.values():
      expected = row.shape(self._sizes)
      for name in row.names(self.config):
        known.add(name)
        if name not in self._tensors:
          problems.append(f'{name} ({row.ours}) {expected}: missing')
        elif self._tensors[name].shape != expected:
          problems.append(
            f'{name} ({row.ours}): expected {expected}, found '
            f'{self._tensors[name].shape}'
          )
        elif self._tensors[name].dtype not in tensor_files.DTYPES:
          problems.append(
            f'{name}: expected one of {", ".join(tensor_files.DTYPES)}, found '
            f'{self._tensors[name].dtype}; quantized weights are not supported'
          )
    ours = {n: row.ours for row in family.rows for n in row.names(self.config)}
    if self.config.logits_via_embedding:
      # A tied head that is stored all the same is the table again.
      known |= {n for n in ours if ours[n] == 'logits_dense/kernel'}
    ignored = family.ignored
    if not self.config.has_decoder:
      ignored += r'|(decoder|lm_head)\..*'
    problems += [
      f'{name}{f" ({ours[name]})" if name in ours else ""} {tensor.shape}: '
      'unknown'
      for name, tensor in self._tensors.items()
      if name not in known and not re.fullmatch(ignored, name)
    ]
    if problems:
      raise ValueError(
        f'The tensors in {self.location} are not those that {described_by} '
        'describes. Use the files as they were saved together:\n  '
        + '\n  '.join(sorted(set(problems)))
      )


class Folder(Model):
  """A folder as `save_pretrained` leaves it."""

  def __init__(self, folder: pathlib.Path):
    """Reads config.json and the headers of the weights.

    Raises:
      FileNotFoundError: if there are no weights, or some are missing.
      ValueError: if a file is broken, or as `Model`.
    """
    path = folder / CONFIG
    config = tensor_files.read_json(path)
    _family(str(path), config)  # Before a large file is opened.
    tensors = tensor_files.open_folder(folder)
    super().__init__(str(folder), str(path), config, tensors)


def _family(described_by: str, config: Mapping[str, Any]) -> Family:
  """Returns the family, after what it demands of config.json."""
  model_type = config.get('model_type')
  if model_type not in FAMILIES:
    raise ValueError(
      f'{described_by}: model_type is {model_type!r}; supported are '
      f'{", ".join(FAMILIES)}.'
    )
  family = FAMILIES[model_type]
  problems = [f'{key}: missing' for key in family.required if key not in config]
  problems += [
    f'{key}: only {value!r} is supported, found {config[key]!r}'
    for key, value in family.fixed.items()
    if config.get(key, value) != value
  ]
  if problems:
    raise ValueError(
      f'{described_by} does not describe a {model_type} that can be read:\n  '
      + '\n  '.join(problems)
    )
  return family


def _special_ids(config: Mapping[str, Any]) -> dict[str, Any]:
  ids = {key: config[key] for key in _SPECIAL_IDS if key in config}
  parts = ((name, config[name]) for name in SUB_CONFIGS if name in config)
  return ids | {name: _special_ids(part) for name, part in parts}


def _by_name_of_table(
  tensors: Mapping[str, Tensor], family: Family
) -> dict[str, Tensor]:
  """Returns all tensors by the names in the family's table."""
  named = {
    name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()
  }
  for name, aliases in family.aliases.items():
    for alias in aliases:
      if name not in named and alias in named:
        named[name] = named.pop(alias)
  return named
