# SPDX-License-Identifier: Apache-2.0
"""Error messages for tensors that do not match their model config.

Sizes in a config are compared with the stored tensors before any array is
allocated: a damaged config may ask for more layers than memory holds.
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
  """A tensor required by the model.

  Attributes:
    name: lookup name of the tensor.
    also: its name in the other naming scheme, for messages; '' if the same.
    shapes: accepted shapes; the first is the usual one.
  """

  name: str
  also: str
  shapes: Sequence[tuple[int, ...]]


@runtime_checkable  # for jaxtyping's runtime checks in tests
class Stored(Protocol):
  """Shape and dtype of a stored tensor, before it is read."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> Any: ...


def problems(
  expected: Iterable[Expected],
  found: Mapping[str, Stored],
  dtypes: Collection[str] | None = None,
) -> list[str]:
  """Returns a line for each missing, misshapen or unreadable tensor.

  Args:
    expected: the tensors required by the model.
    found: all stored tensors by name.
    dtypes: names of the readable dtypes; None skips this check.
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
  """Returns a line for each stored tensor unknown to the model.

  Args:
    names: names of the unknown tensors.
    found: all stored tensors by name.
    also: names of some of them in the other naming scheme.
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
  """Returns the error message for tensors that do not match their config.

  Args:
    finding: a sentence that states the mismatch, without its full stop.
    remedy: a sentence that states the fix, without its full stop.
    lines: from `problems` and `unknown`.
    causes: from `layers` and `widths`.
  """
  because = f': {"; ".join(causes)}' if causes else ''
  below = f':\n{listed(lines)}' if lines else '.'
  return f'{finding}{because}. {remedy}{below}'


def asks_for_too_much(
  config: config_lib.TransformerConfig, num_tensors: int
) -> bool:
  """Returns whether a config has implausibly many layers for its tensors."""
  most = max(config.num_encoder_layers, config.num_decoder_layers)
  return most > max(num_tensors, 100)


def listed(lines: Iterable[str]) -> str:
  """Returns the first ten lines of an error and the number of other lines."""
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
  """Returns a line for each layer stack whose depth contradicts the config.

  Args:
    table: the name table of the model family.
    config: the parsed model config.
    names: the stored tensors, by their names in the table.
    keys: names of sizes in the config file, as `name_table.Family.sizes`.
  """
  names = set(names)
  heads = {row.theirs for row in table if row.path[0] == 'logits_dense'}
  # Encoder-only weights are complete for an LLM.
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
      f'the files hold {found or "no"} {stack} '
      f'layer{"" if found == 1 else "s"}, but {key} is {said}'
    )
  return causes


def _count_layers(stems: Iterable[str], names: Iterable[str]) -> int:
  """Returns the number of layers, ignoring indices with stray tensors only."""
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
  """Returns a line for each size in the config that most tensors contradict.

  Args:
    table: the rows of the model's tensors.
    config: the parsed model config.
    shapes: shapes of all stored tensors, by their names in the table.
    keys: names of sizes in the config file, as `name_table.Family.sizes`.
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
    # A size found in other tensors already explains this product.
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
    causes.append(f'{said} is {numbers}, but the tensors have {found}')
  return causes


def _axes(
  row: Row,
  config: config_lib.TransformerConfig,
  shapes: Mapping[str, Sequence[int]],
) -> Iterator[tuple[tuple[str, ...], int]]:
  """Yields the letters and the size of each axis of a row's tensors."""
  groups = [tuple(group) for group in row.groups()]
  for name in row.names(config):
    shape = shapes.get(name, ())
    if len(shape) == len(groups):
      yield from zip(groups, shape, strict=True)


def _product(letters: Iterable[str], sizes: Mapping[str, int]) -> int:
  return math.prod(sizes[letter] for letter in letters)
