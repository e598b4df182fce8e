# SPDX-License-Identifier: Apache-2.0
"""What a wrapper around a model has put in front of its tensors' names.

`torch.compile` adds `_orig_mod.`, data parallelism `module.`, Lightning the
name of the attribute; nested wrappers add all of theirs.
"""

import os
import re
from collections.abc import Callable, Collection

from l2s_jax.weights.families.name_table import Family


def prefix(names: Collection[str], family: Family) -> str:
  """Returns what to take off all names for them to be those of a family.

  Args:
    names: of all tensors of the files.
    family: whose names they should be.

  Returns:
    A prefix that all names have and without which more of them are known than
    with it; '' where there is none.
  """
  is_known = _known(family)
  common = os.path.commonprefix(list(names))
  cuts = [i + 1 for i, letter in enumerate(common) if letter == '.']

  def score(cut: int) -> tuple[int, int]:
    # Of equal ones the shortest.
    return sum(is_known(name[cut:]) for name in names), -cut

  return common[: max([0, *cuts], key=score)]


def _known(family: Family) -> Callable[[str], bool]:
  """Returns what says whether a family has a tensor of a name."""
  others = [alias for aliases in family.aliases.values() for alias in aliases]
  exact = [
    re.escape(name).replace(re.escape('{layer}'), r'\d+')
    for name in (*(row.theirs for row in family.rows), *others)
  ]
  pattern = re.compile('|'.join([*exact, f'(?:{family.ignored})']))

  def is_known(name: str) -> bool:
    return pattern.fullmatch(name.removeprefix(family.prefix)) is not None

  return is_known
