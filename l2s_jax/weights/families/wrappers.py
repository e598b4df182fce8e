# SPDX-License-Identifier: Apache-2.0
"""Name prefixes that wrappers such as `torch.compile` add to tensors.

`torch.compile` adds `_orig_mod.`, data parallelism `module.`, and Lightning the
name of the attribute. Nested wrappers add several prefixes.
"""

import os
import re
from collections.abc import Callable, Collection

from l2s_jax.weights.families.name_table import Family


def prefix(names: Collection[str], family: Family) -> str:
  """Returns the wrapper prefix common to all tensor names.

  Args:
    names: names of all tensors in the files.
    family: the expected model family.

  Returns:
    The prefix whose removal leaves the most names known to the family, the
    shortest of equal ones; '' if there is none.
  """
  is_known = _known(family)
  common = os.path.commonprefix(list(names))
  cuts = [i + 1 for i, letter in enumerate(common) if letter == '.']

  def score(cut: int) -> tuple[int, int]:
    # Prefers the shortest of equal ones.
    return sum(is_known(name[cut:]) for name in names), -cut

  return common[: max([0, *cuts], key=score)]


def _known(family: Family) -> Callable[[str], bool]:
  """Returns a predicate: whether the family has a tensor of a given name."""
  others = [alias for aliases in family.aliases.values() for alias in aliases]
  exact = [
    re.escape(name).replace(re.escape('{layer}'), r'\d+')
    for name in (*(row.theirs for row in family.rows), *others)
  ]
  pattern = re.compile('|'.join([*exact, f'(?:{family.ignored})']))

  def is_known(name: str) -> bool:
    return pattern.fullmatch(name.removeprefix(family.prefix)) is not None

  return is_known
