# SPDX-License-Identifier: Apache-2.0
"""Texts of a bound task, in its own order, for caching.

Source and preprocessors run as in streaming, without the tokenizer: the caller
tokenizes, because one call for many texts is faster. A task that tokenizes amid
its other steps gives ids.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from l2s_jax.data import tasks

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

CHUNK = 512  # examples
# Seed of random preprocessors, with the draws of training with this seed.
_SEED = 0
_KINDS = ('string', 'int', 'uint', 'float', 'bool')

# Values of consecutive examples, by column.
Chunk = dict[str, list[Any]]


class Texts:
  """The examples of a split.

  Attributes:
    label: task and split, for messages.
    columns: dtype and rank of each column, with `inputs` and `targets`.
    uses_lengths: whether a preprocessor takes TASK_FEATURE_LENGTHS.
  """

  def __init__(
    self,
    task: 'seqio.Task',
    split: str,
    task_feature_lengths: Mapping[str, int],
  ):
    """Opens the split; local files are read and validated completely.

    Args:
      task: task from `tasks.bind`.
      split: name of its split.
      task_feature_lengths: lengths of `inputs` and `targets`, in tokens.

    Raises:
      FileNotFoundError: if data are missing.
      ValueError: for an unknown split, or features other than text or ids.
    """
    tasks.check_data(task, split)
    if split not in task.splits:
      raise ValueError(
        f'cache.splits: task {task.name!r} has no split {split!r}; it has '
        f'{", ".join(sorted(task.splits))}.'
      )
    self.label = f'{task.name}, split {split!r}'
    self.uses_lengths = any(map(_takes_lengths, task.preprocessors))
    self._from = functools.partial(
      _text_dataset, task, split, task_feature_lengths
    )
    self._dataset = self._from(0)
    self.columns = {
      name: {'dtype': spec.dtype.name, 'rank': spec.shape.rank}
      for name, spec in self._dataset.element_spec.items()
      if spec.dtype.name.startswith(_KINDS) and spec.shape.rank is not None
    }
    for key in ('inputs', 'targets'):
      found = self.columns.get(key)
      is_text = found == {'dtype': 'string', 'rank': 0}
      is_ids = found and found['rank'] == 1 and 'int' in found['dtype']
      if not (is_text or is_ids):
        raise ValueError(
          f'{self.label}: {key} are {found}, expected text or token ids of '
          'rank 1.'
        )

  @functools.cached_property
  def num_examples(self) -> int:
    """Number of examples, by counting if the source does not know it.

    Raises:
      ValueError: for an infinite split.
    """
    number = int(self._dataset.cardinality())
    if number >= 0:
      return number
    if number == -1:
      raise ValueError(f'{self.label} is infinite; it cannot be cached.')
    from l2s_jax.data import features
    from l2s_jax.data.features import tf

    with features.plain_errors():
      return int(
        self._dataset.reduce(tf.constant(0, tf.int64), lambda n, _: n + 1)
      )

  def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """Yields the examples of a range, `CHUNK` at a time.

    Args:
      start: first example, from 0.
      stop: end of the range, exclusive; None: the end of the split.
    """
    from l2s_jax.data import features

    dataset = self._from(start)
    if stop is not None:
      dataset = dataset.take(stop - start)
    dataset = features.choose(dataset, list(self.columns))
    chunks = iter(dataset.ragged_batch(CHUNK).prefetch(4))
    while True:
      with features.plain_errors():
        chunk = next(chunks, None)
      if chunk is None:
        return
      yield {name: _to_list(values) for name, values in chunk.items()}

  def sample(self, num_examples: int) -> Chunk:
    """Returns the first `num_examples` examples."""
    parts = list(self.chunks(0, num_examples))
    return {
      name: list(itertools.chain.from_iterable(part[name] for part in parts))
      for name in self.columns
    }


def _to_list(values: Any) -> list[Any]:
  """Returns the values of a dense or ragged tensor as lists."""
  if hasattr(values, 'to_list'):
    return values.to_list()
  return values.numpy().tolist()


def _takes_lengths(step: Callable[..., Any]) -> bool:
  """Returns whether a preprocessor takes SeqIO's `sequence_length`."""
  if dataclasses.is_dataclass(step):
    names = {field.name for field in dataclasses.fields(step)}
  else:
    names = set(inspect.signature(step).parameters)
    if isinstance(step, functools.partial):
      names -= set(step.keywords)
  return 'sequence_length' in names


def _text_dataset(
  task: 'seqio.Task',
  split: str,
  task_feature_lengths: Mapping[str, int],
  start: int,
) -> 'tf.data.Dataset':
  """Returns a task's unshuffled examples before its tokenizer.

  Args:
    task: task from `tasks.bind`.
    split: name of its split.
    task_feature_lengths: lengths of `inputs` and `targets`, in tokens.
    start: number of examples to skip.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio

  # `cache_encoding` does the work of the dropped steps.
  steps = features.steps_before_ids(task)
  task = task.replace(preprocessors=steps)
  dataset = task.source.get_dataset(split=split, shuffle=False, seed=_SEED)
  if all(
    isinstance(step, seqio.CacheDatasetPlaceholder)
    or getattr(step, 'gives_one_for_one', False)
    for step in steps
  ):  # Skipped examples are not preprocessed.
    dataset, start = dataset.skip(start), 0
  dataset = task.preprocess_precache(dataset, seed=_SEED)
  return task.preprocess_postcache(
    dataset, sequence_length=task_feature_lengths, seed=_SEED
  ).skip(start)
