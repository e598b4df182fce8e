# SPDX-License-Identifier: Apache-2.0
"""Name tables: the mapping between our tensors and those of other formats.

A row maps one of our tensors ("ours") to the stored tensor that holds it
("theirs"), with the axes of both. A family is the rows of one architecture and
the conversion between its config and ours. Both work in both directions. The
tables are in `t5_names.py`, `gpt_names.py` and `llama_names.py`; the file
formats are in `weights/formats` and `interop`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from l2s_jax.models import config as config_lib

# Heads of transformers for tasks other than generation.
OTHER_HEADS = (
  r'(classification_head|classifier|score|qa_outputs|multiple_choice_head)\..*'
)

# Our activation by its name in transformers; the usual name comes first.
_ACTIVATIONS = {
  'relu': 'relu',
  'gelu_new': 'gelu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu': 'gelu_exact',
  'silu': 'silu',
  'swish': 'silu',
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A pair of names: one of our tensors, and the foreign tensor that stores it.

  Attributes:
    ours: canonical name.
    theirs: name in the file; `{layer}` stands for the layer index.
    axes: 'THEIRS -> OURS' for one layer. The letters are those of
      `models/layers.py` and r relpos_buckets, p abspos_buckets, c the parts of
      a fused projection. Axes in parentheses are merged.
    part: index of our tensor along the axis `c`.
  """

  ours: str
  theirs: str
  axes: str
  part: int = 0

  @property
  def path(self) -> tuple[str, ...]:
    """Canonical name as a path in the parameter tree."""
    return tuple(self.ours.split('/'))

  @property
  def is_stacked(self) -> bool:
    """Whether each layer has its own tensor in the file."""
    return '{layer}' in self.theirs

  def names(self, config: config_lib.TransformerConfig) -> list[str]:
    """Returns the names in the file, one for each layer."""
    if not self.is_stacked:
      return [self.theirs]
    num_layers = (
      config.num_encoder_layers
      if self.path[0] == 'encoder'
      else config.num_decoder_layers
    )
    return [self.theirs.format(layer=layer) for layer in range(num_layers)]

  def groups(self) -> list[list[str]]:
    """Returns the axes of their tensor, each a list of merged letters."""
    theirs, _ = self.axes.split(' -> ')
    return [
      group.strip('()').split() for group in re.findall(r'\(.*?\)|\w', theirs)
    ]

  def letters(self) -> list[str]:
    """Returns the axes of our tensor."""
    return self.axes.split(' -> ')[1].split()

  def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of their tensor."""
    return tuple(
      math.prod(sizes[letter] for letter in group) for group in self.groups()
    )

  def our_shape(
    self, config: config_lib.TransformerConfig, sizes: Mapping[str, int]
  ) -> tuple[int, ...]:
    """Returns the shape of our tensor, with all layers of a stack."""
    layer = tuple(sizes[letter] for letter in self.letters())
    return (len(self.names(config)), *layer) if self.is_stacked else layer

  def to_ours(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Converts one layer of their tensor to ours.

    Args:
      array: their tensor.
      sizes: size of each axis, from `axis_sizes`.
    """
    letters = self._split()
    array = array.reshape([sizes[letter] for letter in letters])
    if 'c' in letters:
      array = array.take(self.part, axis=letters.index('c'))
      letters.remove('c')
    return array.transpose([letters.index(axis) for axis in self.letters()])

  def _split(self) -> list[str]:
    return [letter for group in self.groups() for letter in group]


def to_theirs(
  rows: Sequence[Row], arrays: Sequence[np.ndarray], sizes: Mapping[str, int]
) -> np.ndarray:
  """Converts one layer of our tensors to theirs.

  Args:
    rows: all rows of the tensor: one, or one for each part of it.
    arrays: our tensor for each row.
    sizes: size of each axis, from `axis_sizes`.
  """
  letters = rows[0]._split()
  theirs = np.empty([sizes[letter] for letter in letters], arrays[0].dtype)
  for row, array in zip(rows, arrays, strict=True):
    order = [row.letters().index(axis) for axis in letters if axis != 'c']
    part = tuple(row.part if axis == 'c' else slice(None) for axis in letters)
    theirs[part] = array.transpose(order)
  return theirs.reshape(rows[0].shape(sizes))


def under(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
  """Returns the rows with a prefix before both names."""
  return tuple(
    dataclasses.replace(row, ours=ours + row.ours, theirs=theirs + row.theirs)
    for row in rows
  )


def axis_sizes(config: config_lib.TransformerConfig) -> dict[str, int]:
  """Returns the size of each letter in `Row.axes`."""
  return {
    'd': config.emb_dim,
    'n': config.num_heads,
    'k': config.kv_heads,
    'h': config.head_dim,
    'f': config.mlp_dim,
    'v': config.vocab_size,
    'r': config.relpos_buckets,
    'p': config.position_offset + config.max_positions,
    'c': 3,  # query, key, value
  }


def may_be_tied(config: Mapping[str, Any]) -> bool:
  """Returns whether config.json allows a tied output head.

  This is the default of families with `tie_word_embeddings=True`.
  """
  return config.get('tie_word_embeddings') is not False


def leave_nothing_out(config: Mapping[str, Any]) -> str:
  """Returns '', for families whose models are read completely."""
  del config
  return ''


def is_said_to_be_tied(config: Mapping[str, Any]) -> bool:
  """Returns whether config.json declares a tied output head.

  This is the rule of families with `tie_word_embeddings=False` as default.
  """
  return bool(config.get('tie_word_embeddings'))


@dataclasses.dataclass(frozen=True)
class Family:
  """The properties of one `model_type` of transformers.

  Attributes:
    rows: the name table.
    architecture: the class of transformers that loads such a folder.
    parse: function (config.json, is_tied) -> our config, where `is_tied` says
      whether the output head is the embedding table. The message of its
      ValueError continues 'FILE: ...'.
    unparse: function from our config to the keys of config.json read by
      `parse`.
    required: required keys of config.json.
    fixed: keys with a single supported value, which is also their default.
    prefix: prefix of all names but the head's in some files.
    aliases: alternative names of a tensor in some files.
    ignored: pattern of names that may be present and are not read.
    may_be_tied: function from config.json to whether the output head may be the
      embedding table; otherwise the head must be in the file.
    remark: function (config.json, is_tied) to a sentence for the user; '' for
      none.
    sizes: for errors, the key of config.json that gives the size of an axis
      letter, and the number of layers for 'encoder' and 'decoder'.
    left_out: function from config.json to a clause that names the parts of the
      model that are not read, and the reason; '' if all are read.
  """

  rows: tuple[Row, ...]
  architecture: str
  parse: Callable[[Mapping[str, Any], bool], config_lib.TransformerConfig]
  unparse: Callable[[config_lib.TransformerConfig], dict[str, Any]]
  required: tuple[str, ...]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  prefix: str = ''
  aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  ignored: str = OTHER_HEADS
  may_be_tied: Callable[[Mapping[str, Any]], bool] = may_be_tied
  left_out: Callable[[Mapping[str, Any]], str] = leave_nothing_out
  remark: Callable[[Mapping[str, Any], bool], str] = lambda config, tied: ''
  sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def divide(config: Mapping[str, Any], width: str, heads: str) -> int:
  """Returns the width of one head from the width of all heads.

  Args:
    config: content of config.json.
    width: key of the width of all heads.
    heads: key of the number of heads.

  Raises:
    ValueError: if the width is not a multiple of the number of heads.
  """
  if config[width] % config[heads]:
    raise ValueError(
      f'{width}={config[width]} does not divide over {heads}={config[heads]}'
    )
  return config[width] // config[heads]


# max_position_embeddings of a rotary model without a maximum.
ROTARY_CONTEXT = 4096
_CONTEXT = 'original_max_position_embeddings'
# Keys of the values in `TransformerConfig.rope_scaling`, in order, by type.
_ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
  'linear': ('factor',),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', _CONTEXT),
  'yarn': ('factor', 'beta_fast', 'beta_slow', _CONTEXT, 'attention_factor'),
}


def rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
  """Returns our config fields for the context scaling of RoPE.

  Args:
    rope: RoPE parameters with the keys of config.json.

  Raises:
    ValueError: if the type of scaling is unsupported or a parameter missing.
  """
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return {}
  if kind not in _ROPE_SCALINGS:
    raise ValueError(
      f'its rope_type is {kind!r}; supported are default, '
      f'{", ".join(_ROPE_SCALINGS)}'
    )
  if kind == 'yarn':
    rope = _yarn(rope)
  missing = [key for key in _ROPE_SCALINGS[kind] if rope.get(key) is None]
  if missing:
    raise ValueError(f'its rope_type is {kind!r}, without {", ".join(missing)}')
  numbers = tuple(float(rope[key]) for key in _ROPE_SCALINGS[kind])
  return {'rope_scaling_type': kind, 'rope_scaling': numbers}


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
  """Fills in the recommended values of YaRN's paper for absent keys."""
  for key, value in {
    'mscale': None,
    'mscale_all_dim': None,
    'truncate': True,
  }.items():
    if rope.get(key, value) != value:
      raise ValueError(
        f'its rope_type is yarn with {key}={rope[key]}, which is not supported'
      )
  said = {key: value for key, value in rope.items() if value is not None}
  length = 1 + 0.1 * math.log(max(said.get('factor', 1.0), 1.0))
  return {'beta_fast': 32, 'beta_slow': 1, 'attention_factor': length} | said


def rope_scaling_of_theirs(
  config: config_lib.TransformerConfig,
) -> dict[str, Any] | None:
  """Returns the context scaling of RoPE for config.json; None without one."""
  if not config.rope_scaling:
    return None
  kind = config.rope_scaling_type
  numbers = dict(zip(_ROPE_SCALINGS[kind], config.rope_scaling, strict=True))
  if _CONTEXT in numbers:
    numbers[_CONTEXT] = int(numbers[_CONTEXT])
  return {'rope_type': kind, **numbers}


def activation(name: str) -> str:
  """Returns our name of an activation of transformers.

  Raises:
    ValueError: if the activation is not supported.
  """
  if name not in _ACTIVATIONS:
    raise ValueError(
      f'its activation is {name!r}; supported are {", ".join(_ACTIVATIONS)}'
    )
  return _ACTIVATIONS[name]


def activation_of_theirs(name: str) -> str:
  """Returns transformers' name of one of our activations."""
  names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  return names.get(name, name)
