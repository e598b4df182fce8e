# SPDX-License-Identifier: Apache-2.0
"""What a table of names is made of, for any file format.

A row ties one of our tensors to the tensor of theirs that holds it, with the
axes of both; a family is the rows of one architecture and the way between its
config and ours. Both read in both directions. The tables are in `t5_names.py`
and `gpt_names.py`, reading and writing files is elsewhere.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from l2s_jax.models import config as config_lib

# What transformers puts on a model for another use than to write.
OTHER_HEADS = (
  r'(classification_head|classifier|score|qa_outputs|multiple_choice_head)\..*'
)

# As transformers names them, the usual name first.
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
  """One of our tensors, and the tensor of theirs in which it is stored.

  Attributes:
    ours: canonical name.
    theirs: name in the file; `{layer}` where each layer has one.
    axes: 'THEIRS -> OURS' of one layer, letters as in `models/layers.py`, and
      r relpos_buckets, p abspos_buckets, c the parts of a fused projection.
      Axes in parentheses are merged.
    part: which of `c` is ours.
  """

  ours: str
  theirs: str
  axes: str
  part: int = 0

  @property
  def path(self) -> tuple[str, ...]:
    return tuple(self.ours.split('/'))

  @property
  def is_stacked(self) -> bool:
    return '{layer}' in self.theirs

  def names(self, config: config_lib.TransformerConfig) -> list[str]:
    """Returns the names in the file, one a layer."""
    if not self.is_stacked:
      return [self.theirs]
    num_layers = (
      config.num_encoder_layers
      if self.path[0] == 'encoder'
      else config.num_decoder_layers
    )
    return [self.theirs.format(layer=layer) for layer in range(num_layers)]

  def groups(self) -> list[list[str]]:
    """Returns the axes of theirs, each as the letters merged in it."""
    theirs, _ = self.axes.split(' -> ')
    return [
      group.strip('()').split() for group in re.findall(r'\(.*?\)|\w', theirs)
    ]

  def letters(self) -> list[str]:
    """Returns the axes of ours."""
    return self.axes.split(' -> ')[1].split()

  def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of theirs."""
    return tuple(
      math.prod(sizes[letter] for letter in group) for group in self.groups()
    )

  def our_shape(
    self, config: config_lib.TransformerConfig, sizes: Mapping[str, int]
  ) -> tuple[int, ...]:
    """Returns the shape of ours, all layers of a stack."""
    layer = tuple(sizes[letter] for letter in self.letters())
    return (len(self.names(config)), *layer) if self.is_stacked else layer

  def to_ours(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns our tensor, of one layer, out of theirs."""
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
  """Returns their tensor, of one layer, out of ours.

  Args:
    rows: all that have this tensor: one, or a part each.
    arrays: our tensor of each row.
    sizes: of the axes, from `axis_sizes`.
  """
  letters = rows[0]._split()
  theirs = np.empty([sizes[letter] for letter in letters], arrays[0].dtype)
  for row, array in zip(rows, arrays, strict=True):
    order = [row.letters().index(axis) for axis in letters if axis != 'c']
    part = tuple(row.part if axis == 'c' else slice(None) for axis in letters)
    theirs[part] = array.transpose(order)
  return theirs.reshape(rows[0].shape(sizes))


def under(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
  """Returns the rows with both names prefixed."""
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
  """Returns whether config.json lets the head be the embedding table."""
  return config.get('tie_word_embeddings') is not False


def leave_nothing_out(config: Mapping[str, Any]) -> str:
  del config
  return ''


def is_said_to_be_tied(config: Mapping[str, Any]) -> bool:
  """Returns the same, of families that are not tied unless they say so."""
  return bool(config.get('tie_word_embeddings'))


@dataclasses.dataclass(frozen=True)
class Family:
  """What sets one `model_type` of transformers apart.

  Attributes:
    rows: the table of names.
    architecture: the class of transformers that reads such a folder.
    parse: from config.json, and whether the output head is the embedding
      table, to our config; its ValueError continues 'FILE: ...'.
    unparse: from our config to what of config.json `parse` reads.
    required: keys without which config.json says nothing.
    fixed: keys of which only this value, the default, is supported.
    prefix: in front of all names but the head's, in some files.
    aliases: other names of a tensor, for files that lack its own.
    ignored: matches names that may be present and mean nothing.
    may_be_tied: from config.json to whether the output head can be the
      embedding table; if not, it must be in the file.
    remark: from config.json, and whether the head is tied, to a sentence that
      the user should read; '' where there is none.
    sizes: keys of config.json by the letter of the axis whose size they say,
      and by 'encoder' and 'decoder' of how many layers there are; for errors.
    left_out: from config.json to a clause that says what of the model is not
      read, and why; '' where all is.
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
  """Returns the width of a head, where config.json has only that of all."""
  if config[width] % config[heads]:
    raise ValueError(
      f'{width}={config[width]} does not divide over {heads}={config[heads]}'
    )
  return config[width] // config[heads]


_CONTEXT = 'original_max_position_embeddings'
# What `TransformerConfig.rope_scaling` holds, in its order.
_ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
  'linear': ('factor',),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', _CONTEXT),
  'yarn': ('factor', 'beta_fast', 'beta_slow', _CONTEXT, 'attention_factor'),
}


def rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of our config that say what stretched the context."""
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
  """Returns what YaRN's authors recommend where config.json says nothing."""
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
  """Returns the same for config.json."""
  if not config.rope_scaling:
    return None
  kind = config.rope_scaling_type
  numbers = dict(zip(_ROPE_SCALINGS[kind], config.rope_scaling, strict=True))
  if _CONTEXT in numbers:
    numbers[_CONTEXT] = int(numbers[_CONTEXT])
  return {'rope_type': kind, **numbers}


def activation(name: str) -> str:
  """Returns our name of an activation of transformers."""
  if name not in _ACTIVATIONS:
    raise ValueError(
      f'its activation is {name!r}; supported are {", ".join(_ACTIVATIONS)}'
    )
  return _ACTIVATIONS[name]


def activation_of_theirs(name: str) -> str:
  """Returns the name in transformers of one of our activations."""
  names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  return names.get(name, name)
