# SPDX-License-Identifier: Apache-2.0
"""Examples of a bound task as text, in the task's own order, for a cache.

The source and the preprocessors run as they do in streaming, but for the
tokenizer, which is the caller's affair: it is faster in one call for many
texts. Of a task that tokenizes amid its other steps, ids come out.
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
# Of preprocessors that draw at random, as in training with this seed.
_SEED = 0
_KINDS = ('string', 'int', 'uint', 'float', 'bool')

# Column by column, the values of consecutive examples.
Chunk = dict[str, list[Any]]


class Texts:
  """The examples of a split.

  Attributes:
    columns: dtype and rank of each column, `inputs` and `targets` included.
    uses_lengths: whether a preprocessor is told TASK_FEATURE_LENGTHS.
  """

  def __init__(
    self,
    task: 'seqio.Task',
    split: str,
    task_feature_lengths: Mapping[str, int],
  ):
    """Opens the split; local files are read and checked to their end.

    Args:
      task: from `tasks.bind`.
      split: one of its.
      task_feature_lengths: `inputs` and `targets`, in tokens.

    Raises:
      FileNotFoundError: if data are missing.
      ValueError: for a split that is not there, or what is no text or ids.
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
          f'{self.label}: {key} are {found}, expected text or a row of ids.'
        )

  @functools.cached_property
  def num_examples(self) -> int:
    """Their number; counted if no source knows it."""
    number = int(self._dataset.cardinality())
    if number >= 0:
      return number
    if number == -1:
      raise ValueError(f'{self.label} has no end; it cannot be cached.')
    from l2s_jax.data import features
    from l2s_jax.data.features import tf

    with features.plain_errors():
      return int(
        self._dataset.reduce(tf.constant(0, tf.int64), lambda n, _: n + 1)
      )

  def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """Yields the examples from one number to another, `CHUNK` at a time.

    Args:
      start: number of the first, from 0.
      stop: one more than that of the last; None: to the end.
    """
    from l2s_jax.data import features

    dataset = self._from(start)
    if stop is not None:
      dataset = dataset.take(stop - start)
    names = list(self.columns)
    dataset = dataset.map(lambda example: {key: example[key] for key in names})
    chunks = iter(dataset.ragged_batch(CHUNK).prefetch(4))
    while True:
      with features.plain_errors():
        chunk = next(chunks, None)
      if chunk is None:
        return
      yield {name: _to_list(values) for name, values in chunk.items()}

  def sample(self, num_examples: int) -> Chunk:
    """Returns the first examples."""
    parts = list(self.chunks(0, num_examples))
    return {
      name: list(itertools.chain.from_iterable(part[name] for part in parts))
      for name in self.columns
    }


def _to_list(values: Any) -> list[Any]:
  """Returns the values of a tensor, ragged or not."""
  if hasattr(values, 'to_list'):
    return values.to_list()
  return values.numpy().tolist()


def _takes_lengths(step: Callable[..., Any]) -> bool:
  """Returns whether SeqIO tells a preprocessor the lengths."""
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
  """Returns what a task gives before its tokenizer, not shuffled.

  Args:
    task: from `tasks.bind`.
    split: one of its.
    task_feature_lengths: `inputs` and `targets`, in tokens.
    start: how many examples to pass over.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio

  # What is left out adds to the text what `cache_encoding` adds.
  steps = features.steps_before_ids(task)
  task = task.replace(preprocessors=steps)
  dataset = task.source.get_dataset(split=split, shuffle=False, seed=_SEED)
  if all(
    isinstance(step, seqio.CacheDatasetPlaceholder)
    or getattr(step, 'gives_one_for_one', False)
    for step in steps
  ):  # Then what is passed over need only be read.
    dataset, start = dataset.skip(start), 0
  dataset = task.preprocess_precache(dataset, seed=_SEED)
  return task.preprocess_postcache(
    dataset, sequence_length=task_feature_lengths, seed=_SEED
  ).skip(start)
