# SPDX-License-Identifier: Apache-2.0
"""Tasks of examples in memory, such as lists of a notebook.

`named` gives such a task a name, which `tasks.bind` knows for as long as the
context is entered. Files are the business of `sources.py`.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from l2s_jax.data import record_files

# Pairs of prompt and answer; or two columns, 'inputs' and 'targets'.
Examples = Sequence[Sequence[str]] | Mapping[str, Sequence[str]] | np.ndarray

# What they hold, for messages.
_COLUMNS = {'inputs': 'a prompt', 'targets': 'an answer'}


class MemoryTask(NamedTuple):
  """Examples in memory and their metrics.

  Attributes:
    splits: the columns 'inputs' (prompts) and 'targets' (answers) by split.
    metrics: names, as `tasks.local_task` takes them.
    digest: of the texts of the split 'train', or of all if there is none.
  """

  splits: Mapping[str, Mapping[str, list[str]]]
  metrics: Sequence[str]
  digest: str


_NAMED: dict[str, MemoryTask] = {}


@contextlib.contextmanager
def named(
  splits: Mapping[str, Examples], metrics: Sequence[str]
) -> Iterator[str]:
  """Yields the name of a task, made of its examples' digest.

  Args:
    splits: the examples of each split.
    metrics: names, as `tasks.local_task` takes them.

  Raises:
    ValueError: if a split is empty or an example is not two texts.
  """
  columns = {
    split: _columns(examples, split) for split, examples in splits.items()
  }
  trained = columns.get('train', columns)
  digest = hashlib.sha256(json.dumps(trained).encode()).hexdigest()
  name = f'examples_{digest[:12]}'
  before = _NAMED.get(name)
  _NAMED[name] = MemoryTask(columns, metrics, digest)
  try:
    yield name
  finally:
    del _NAMED[name]
    if before is not None:
      _NAMED[name] = before


def find(name: str) -> MemoryTask | None:
  """Returns the task of a name, if there is one now."""
  return _NAMED.get(name)


def _columns(examples: Any, split: str) -> dict[str, list[str]]:
  """Returns the texts of prompts and answers, checked."""
  if isinstance(examples, str):
    raise ValueError(
      f'the examples of {split!r} are one text: expected a list of pairs '
      '(prompt, answer).'
    )
  if isinstance(examples, Mapping):
    columns = _of_columns(examples, split)
  else:
    columns = _of_pairs(examples, split)
  if not columns['inputs']:
    raise ValueError(f'the examples of {split!r} are none: give at least one.')
  for name, texts in columns.items():
    for number, text in enumerate(texts):
      if problem := text_problem(text):
        raise ValueError(
          f'example {number} of {split!r} has {_COLUMNS[name]} that {problem}: '
          'expected a text.'
        )
  return {name: [str(text) for text in columns[name]] for name in _COLUMNS}


def _of_columns(
  examples: Mapping[str, Any], split: str
) -> dict[str, list[Any]]:
  if missing := [name for name in _COLUMNS if name not in examples]:
    raise ValueError(
      f'the examples of {split!r} have the columns '
      f'{", ".join(map(str, examples)) or "none"}: expected inputs (prompts) '
      f'and targets (answers); {" and ".join(missing)} must be added.'
    )
  columns = {name: list(examples[name]) for name in _COLUMNS}
  sizes = [len(columns[name]) for name in _COLUMNS]
  if sizes[0] != sizes[1]:
    raise ValueError(
      f'the examples of {split!r} have {sizes[0]} inputs and {sizes[1]} '
      'targets: expected one answer for each prompt.'
    )
  return columns


def _of_pairs(examples: Any, split: str) -> dict[str, list[Any]]:
  pairs = list(examples)
  for number, pair in enumerate(pairs):
    is_row = isinstance(pair, Sequence | np.ndarray)
    if isinstance(pair, str | bytes) or not is_row or len(pair) != 2:
      raise ValueError(
        f'example {number} of {split!r} is {str(pair)[:60]!r}: expected a pair '
        '(prompt, answer).'
      )
  prompts, answers = zip(*pairs, strict=True) if pairs else ((), ())
  return {'inputs': list(prompts), 'targets': list(answers)}


def text_problem(text: Any) -> str | None:
  """Returns the fault of a prompt or an answer, as a predicate; None: none."""
  if not isinstance(text, str):
    return f'is of type {type(text).__name__}'
  if not text.strip():
    return 'is empty'
  if record_files.has_half_characters(text):
    return 'holds half a character (a lone surrogate)'
  return None
