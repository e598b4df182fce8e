# SPDX-License-Identifier: Apache-2.0
"""Weights of a Hugging Face folder: config.json and tensor files.

Tensors are mapped by the name table of their model family (`weights/families`)
and read one at a time. Tokenizers are loaded by `vocabularies/loading.py`, the
files by `tensor_files.py`.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.runtime import distributed
from l2s_jax.weights import misfits, source
from l2s_jax.weights.families import config_json as config_json_lib
from l2s_jax.weights.families import (
  gpt_names,
  llama_names,
  name_table,
  t5_names,
  wrappers,
)
from l2s_jax.weights.families.name_table import Family
from l2s_jax.weights.formats import tensor_files
from l2s_jax.weights.formats.tensor_files import Tensor

CONFIG = 'config.json'
# Nested configs of T5Gemma, one for each side.
SUB_CONFIGS = ('encoder', 'decoder')
_SPECIAL_IDS = (
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'decoder_start_token_id',
)

FAMILIES = t5_names.FAMILIES | gpt_names.FAMILIES | llama_names.FAMILIES


def config_json(
  model_type: str, config: config_lib.TransformerConfig
) -> dict[str, Any]:
  """Returns config.json of a model family for `config`."""
  family = FAMILIES[model_type]
  return {
    'model_type': model_type,
    'architectures': [family.architecture],
    **family.unparse(config),
  }


def model_types(config: config_lib.TransformerConfig) -> list[str]:
  """Returns the model families whose config.json can express `config`.

  The usual family comes first: T5 for a T5 v1.1, before mT5. Runtime fields and
  initializers are ignored.
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
    return effective(config) | unasked == effective(again) | unasked

  return [name for name in FAMILIES if fits(name)]


def effective(config: config_lib.TransformerConfig) -> dict[str, Any]:
  """Returns a config as JSON, with fields without effect set to defaults."""
  fields = config.to_json()
  idle = {
    'scale_logits': not config.logits_via_embedding,
    'scale_untied_logits': config.logits_via_embedding,
    'query_pre_attn_scalar': not config.scale_attention,
    'rope_scaling_type': not config.rope_scaling,
    'rope_base': config.positions != 'rotary',
    'max_positions': config.positions == 'rotary',
  }
  defaults = {field.name: field.default for field in dataclasses.fields(config)}
  return fields | {name: defaults[name] for name in idle if idle[name]}


class HuggingFaceWeights:
  """Weights of one model by its names in transformers.

  Attributes:
    special_ids: special token ids by their keys in config.json; a list of ids
      if several ones end an answer. T5Gemma's also has nested ids for each
      side, as its config.json does.
    left_out: a clause that names the unread parts of the model; '' if all are
      read.
  """

  def __init__(
    self,
    location: str,
    described_by: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
  ):
    """Maps stored tensors to ours and validates them.

    Args:
      location: location of the weights, for errors.
      described_by: source of `config`, for errors.
      config: content of config.json.
      tensors: stored tensors by their names in the files.

    Raises:
      ValueError: if the model family is not supported, or the tensors do not
        match the config; lists all mismatches.
    """
    self.location = location
    family = _family(described_by, config)
    config = config_json_lib.Checked(config)
    self.model_type: str | None = config['model_type']
    wrapper = wrappers.prefix(tensors.keys(), family)
    if wrapper:
      distributed.say_once(
        f'{location}: all tensor names have the prefix {wrapper!r}, as saved '
        'by a wrapper of the model; it is removed.'
      )
    self._tensors, self._stored = _by_name_of_table(
      tensors, family, wrapper, location
    )
    try:
      self.special_ids = _special_ids(config)
      is_tied = self._is_tied(config, family)
      self.config = family.parse(config, is_tied)
      remark = family.remark(config, is_tied)
      self.left_out = family.left_out(config)
    except config_json_lib.MissingError as error:
      raise ValueError(f'{described_by} lacks {error.args[0]}.') from error
    except ValueError as error:
      raise ValueError(f'{described_by}: {error}.') from error
    if remark:
      distributed.say_once(f'{location}: {remark}.')
    causes = misfits.layers(
      family.rows, self.config, self._tensors, family.sizes
    )
    if causes and misfits.asks_for_too_much(self.config, len(self._tensors)):
      raise ValueError(self._misfit(described_by, causes, ()))
    self._sizes = name_table.axis_sizes(self.config)
    self._names = {row.path: self._name(row) for row in family.rows}
    found = {
      row.path
      for row in family.rows
      if any(name in self._tensors for name in row.names(self.config))
    }
    demanded = source.demanded_paths(self.config, found)
    self._rows = {row.path: row for row in family.rows if row.path in demanded}
    causes += misfits.widths(
      self._rows.values(),
      self.config,
      {name: tensor.shape for name, tensor in self._tensors.items()},
      family.sizes,
    )
    problems = self._problems(family)
    if problems:
      raise ValueError(self._misfit(described_by, causes, problems))

  def _name(self, row: name_table.Row) -> str:
    """Returns the stored name of a row, with `{layer}` for layer indices."""
    first = row.theirs.format(layer=0)
    stored = self._stored.get(first, '')
    if not stored.endswith(first):  # absent, or stored under an alias
      return stored or row.theirs
    return stored.removesuffix(first) + row.theirs

  def _misfit(
    self, described_by: str, causes: Sequence[str], problems: Sequence[str]
  ) -> str:
    return misfits.refusal(
      f'The tensors in {self.location} do not match {described_by}',
      'Use files that were saved together',
      problems,
      causes,
    )

  def step(self) -> int | None:
    return None

  def shapes(self) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    return {
      path: jax.ShapeDtypeStruct(
        row.our_shape(self.config, self._sizes), self._dtype(row)
      )
      for path, row in self._rows.items()
    }

  def _dtype(self, row: name_table.Row) -> np.dtype:
    """Returns the smallest dtype that holds all layers of a row."""
    names = row.names(self.config)
    stored = {tensor_files.DTYPES[self._tensors[name].dtype] for name in names}
    return functools.reduce(jnp.promote_types, map(jnp.dtype, stored))

  def read(self, path: tuple[str, ...], layer: int | None = None) -> np.ndarray:
    row = self._rows[path]
    names = row.names(self.config)
    if row.is_stacked and layer is None:
      return np.stack([self.read(path, i) for i in range(len(names))])
    tensor = self._tensors[names[layer or 0]]
    array = np.asarray(tensor.read()).astype(self._dtype(row), copy=False)
    return row.to_ours(array, self._sizes)

  def name(self, path: tuple[str, ...]) -> str:
    return self._names.get(path, '/'.join(path))

  def digest(self, path: tuple[str, ...]) -> str | None:
    del path
    return None

  def _is_tied(self, config: Mapping[str, Any], family: Family) -> bool:
    """Returns whether the output head is the embedding table.

    The tensors decide if the file holds a head: transformers 5 writes
    `tie_word_embeddings=true` into config.json of every T5.
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
    if table not in self._tensors:
      return False
    first, second = self._tensors[head], self._tensors[table]
    is_readable = {first.dtype, second.dtype} <= tensor_files.DTYPES.keys()
    return (
      is_readable
      and first.shape == second.shape
      and np.array_equal(first.read(), second.read())
    )

  def _problems(self, family: Family) -> list[str]:
    """Returns a line for each missing, unknown or misshapen tensor."""
    expected = [
      misfits.Expected(name, row.ours, [row.shape(self._sizes)])
      for row in self._rows.values()
      for name in row.names(self.config)
    ]
    known = {tensor.name for tensor in expected}
    ours = {n: row.ours for row in family.rows for n in row.names(self.config)}
    if self.config.logits_via_embedding:
      # A stored tied head repeats the embedding table.
      known |= {n for n in ours if ours[n] == 'logits_dense/kernel'}
    ignored = family.ignored
    if not self.config.has_decoder:
      ignored += r'|(decoder|lm_head)\..*'
    unknown = [
      name
      for name in self._tensors
      if name not in known and not re.fullmatch(ignored, name)
    ]
    return [
      *misfits.problems(expected, self._tensors, tensor_files.DTYPES),
      *misfits.unknown(unknown, self._tensors, ours),
    ]


class HuggingFaceFolder(HuggingFaceWeights):
  """A folder written by `save_pretrained` of transformers."""

  def __init__(self, folder: pathlib.Path):
    """Reads config.json and the headers of the tensor files.

    Raises:
      FileNotFoundError: if weights are missing.
      ValueError: if a file is damaged, or as `HuggingFaceWeights`.
    """
    path = folder / CONFIG
    config = tensor_files.read_json(path)
    _family(str(path), config)  # fails before a large file is opened
    tensors = tensor_files.open_folder(folder)
    super().__init__(str(folder), str(path), config, tensors)


def _family(described_by: str, config: Mapping[str, Any]) -> Family:
  """Returns the model family after checking its required and fixed keys."""
  model_type = config.get('model_type')
  if model_type == 'llm_to_slm':
    raise ValueError(
      f'{described_by} is of LLM-to-SLM, exported for transformers. l2s_jax '
      'reads a bundle: export the run with --to=bundle.'
    )
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise ValueError(
      f'{described_by}: model_type is {config_lib.shorten(repr(model_type))}; '
      f'supported are {", ".join(FAMILIES)}.'
    )
  family = FAMILIES[model_type]
  problems = [f'{key}: missing' for key in family.required if key not in config]
  problems += [
    f'{key}: only {value!r} is supported, found '
    f'{config_lib.shorten(repr(config[key]))}'
    for key, value in family.fixed.items()
    if config.get(key, value) != value
  ]
  if problems:
    raise ValueError(
      f'{described_by} describes an unsupported {model_type}:\n  '
      + '\n  '.join(problems)
    )
  return family


def _special_ids(config: Mapping[str, Any]) -> dict[str, Any]:
  ids = {key: config[key] for key in _SPECIAL_IDS if key in config}
  parts = ((name, config[name]) for name in SUB_CONFIGS if name in config)
  return ids | {name: _special_ids(part) for name, part in parts}


def _by_name_of_table(
  tensors: Mapping[str, Tensor], family: Family, wrapper: str, location: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Returns all tensors by their names in the name table.

  Returns:
    The tensors, and their stored names, both by name in the table.
  """
  stored: dict[str, str] = {}
  for name in tensors:
    inner = name.removeprefix(wrapper).removeprefix(family.prefix)
    if inner in stored:
      raise ValueError(
        f'{location} has both {stored[inner]} and {name}, which are the same '
        'tensor of the model. Remove the wrong one.'
      )
    stored[inner] = name
  for name, aliases in family.aliases.items():
    for alias in aliases:
      if name not in stored and alias in stored:
        stored[name] = stored.pop(alias)
  return {inner: tensors[name] for inner, name in stored.items()}, stored
