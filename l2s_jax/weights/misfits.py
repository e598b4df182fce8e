# SPDX-License-Identifier: Apache-2.0
"""Why tensors are not those of their config, in as few words as it takes.

Sizes in a config are compared with the tensors that are there before anything
is made of them: a config may ask for more layers than memory holds.
"""

import collections
import math
import re
from collections.abc import (
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, NamedTuple, Protocol, runtime_checkable

from l2s_jax.models import config as config_lib
from l2s_jax.weights.families import name_table
from l2s_jax.weights.families.name_table import Row

_MOST_LINES = 10
_LAYERS = {'encoder': 'num_encoder_layers', 'decoder': 'num_decoder_layers'}


class Expected(NamedTuple):
  """A tensor that a model has.

  Attributes:
    name: of it, by which it is looked for.
    also: what it is called elsewhere; '' where it is the same.
    shapes: that it may have; the first is the usual one.
  """

  name: str
  also: str
  shapes: Sequence[tuple[int, ...]]


@runtime_checkable  # for the tests' type checker
class Stored(Protocol):
  """What is known of a tensor before it is read."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> Any: ...


def problems(
  expected: Iterable[Expected],
  found: Mapping[str, Stored],
  dtypes: Collection[str] | None = None,
) -> list[str]:
  """Returns which tensors are missing, misshapen or unreadable, a line each.

  Args:
    expected: those that the model has.
    found: all that are there.
    dtypes: the names of those that can be read; None: they are not asked.
  """
  lines = []
  for name, also, shapes in expected:
    title = _title(name, also)
    if name not in found:
      lines.append(f'{title} {shapes[0]}: missing')
    elif tuple(found[name].shape) not in shapes:
      lines.append(
        f'{title}: expected {shapes[0]}, found {tuple(found[name].shape)}'
      )
    elif dtypes is not None and str(found[name].dtype) not in dtypes:
      lines.append(
        f'{name}: expected one of {", ".join(dtypes)}, found '
        f'{found[name].dtype}; quantized weights are not supported'
      )
  return lines


def unknown(
  names: Iterable[str],
  found: Mapping[str, Stored],
  also: Mapping[str, str],
) -> list[str]:
  """Returns a line for each tensor that the model does not have.

  Args:
    names: theirs.
    found: all that are there.
    also: what some of them are called elsewhere.
  """
  return [
    f'{_title(name, also.get(name, ""))} {tuple(found[name].shape)}: unknown'
    for name in names
  ]


def _title(name: str, also: str) -> str:
  return f'{name} ({also})' if also else name


def refusal(
  finding: str,
  remedy: str,
  lines: Collection[str],
  causes: Sequence[str] = (),
) -> str:
  """Returns the error of weights that are not those of their config.

  Args:
    finding: a sentence on what does not fit what, without its full stop.
    remedy: one on what to do, likewise.
    lines: from `problems` and `unknown`.
    causes: from `layers` and `widths`.
  """
  because = f': {"; ".join(causes)}' if causes else ''
  below = f':\n{listed(lines)}' if lines else '.'
  return f'{finding}{because}. {remedy}{below}'


def asks_for_too_much(
  config: config_lib.TransformerConfig, num_tensors: int
) -> bool:
  """Returns whether a config has more layers than there are tensors."""
  most = max(config.num_encoder_layers, config.num_decoder_layers)
  return most > max(num_tensors, 100)


def listed(lines: Iterable[str]) -> str:
  """Returns lines of an error: ten at most, and how many more there are."""
  found = sorted(set(lines))
  shown = [f'  {config_lib.shorten(line, 240)}' for line in found[:_MOST_LINES]]
  if len(found) > len(shown):
    shown.append(f'  and {len(found) - len(shown)} more')
  return '\n'.join(shown)


def layers(
  table: Sequence[Row],
  config: config_lib.TransformerConfig,
  names: Iterable[str],
  keys: Mapping[str, str],
) -> list[str]:
  """Returns in which stacks the files have other layers than the config.

  Args:
    table: of names, of the family of the model.
    config: what its config says.
    names: of all tensors, as the table has them.
    keys: what the config's file calls a size, as `rows.Family.sizes`.
  """
  names = set(names)
  heads = {row.theirs for row in table if row.path[0] == 'logits_dense'}
  # An encoder may come without its decoder.
  may_lack_decoder = config.is_encoder_decoder and not heads & names
  causes = []
  for stack, field in _LAYERS.items():
    said = getattr(config, field)
    stems = {
      row.theirs.partition('{layer}')[0]
      for row in table
      if row.is_stacked and row.path[0] == stack
    }
    if not said or not stems:
      continue
    found = _count_layers(stems, names)
    is_left_out = stack == 'decoder' and may_lack_decoder and not found
    if found == said or is_left_out:
      continue
    key = keys.get(stack, field)
    causes.append(
      f'the files hold {found or "no"} {stack} layer'
      f'{"" if found == 1 else "s"}, {key} says {said}'
    )
  return causes


def _count_layers(stems: Iterable[str], names: Iterable[str]) -> int:
  """Returns how many layers there are, stray tensors of others left out."""
  sizes: collections.Counter[str] = collections.Counter()
  for stem in stems:
    pattern = re.compile(re.escape(stem) + r'(\d+)\.')
    found = (pattern.match(name) for name in names)
    sizes.update(match[1] for match in found if match)
  most = max(sizes.values(), default=0)
  return sum(2 * size >= most for size in sizes.values())


def widths(
  table: Iterable[Row],
  config: config_lib.TransformerConfig,
  shapes: Mapping[str, Sequence[int]],
  keys: Mapping[str, str],
) -> list[str]:
  """Returns which sizes the config and most of the tensors disagree on.

  Args:
    table: the rows that the model has.
    config: what its config says.
    shapes: of all tensors, by their names in the table.
    keys: what the config's file calls a size, as `rows.Family.sizes`.
  """
  sizes = name_table.axis_sizes(config)
  counts: dict[tuple[str, ...], collections.Counter[int]]
  counts = collections.defaultdict(collections.Counter)
  for row in table:
    for letters, found in _axes(row, config, shapes):
      counts[letters][found] += 1
  causes = []
  known = dict(sizes)
  for letters in sorted(counts, key=len):
    ((found, _),) = counts[letters].most_common(1)
    # Those that are known from other tensors explain a product of them.
    if found in (_product(letters, sizes), _product(letters, known)):
      continue
    if len(letters) == 1:
      known[letters[0]] = found
    named = [letter for letter in letters if letter != 'c']
    said = ' * '.join(keys.get(letter, letter) for letter in named)
    numbers = ' * '.join(str(sizes[letter]) for letter in named)
    if len(named) > 1:
      numbers += f' = {_product(named, sizes)}'
    if 'c' in letters:
      found //= sizes['c']
    causes.append(f'{said} says {numbers}, the tensors have {found}')
  return causes


def _axes(
  row: Row,
  config: config_lib.TransformerConfig,
  shapes: Mapping[str, Sequence[int]],
) -> Iterator[tuple[tuple[str, ...], int]]:
  """Yields the letters of each axis of a row's tensors, and its size."""
  groups = [tuple(group) for group in row.groups()]
  for name in row.names(config):
    shape = shapes.get(name, ())
    if len(shape) == len(groups):
      yield from zip(groups, shape, strict=True)


def _product(letters: Iterable[str], sizes: Mapping[str, int]) -> int:
  return math.prod(sizes[letter] for letter in letters)
