# SPDX-License-Identifier: Apache-2.0
"""What this package uses of SeqIO that SeqIO does not document.

How tasks are cached, how mixtures are made, and what TFDS is asked for. Nothing
else uses it, and a test says in which version it was seen. SeqIO is imported
when it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import seqio


def cached_source(
  folder: str, split: str, file_shuffle_buffer_size: int | None
) -> 'seqio.DataSource':
  """Returns the source of a split that `seqio_cache_tasks` has written."""
  import seqio

  return seqio.dataset_providers._CachedDataSource(
    folder, split, file_shuffle_buffer_size=file_shuffle_buffer_size
  )


def cache_placeholder(task: 'seqio.Task') -> Any:
  """Returns the preprocessor that stands where a task is cached."""
  return task._cache_dataset_placerholder


def preprocessors_around_cache(
  task: 'seqio.Task',
) -> tuple[list[Any], list[Any]]:
  """Returns what a cached task does before its cache, and after it."""
  steps, index = task.preprocessors, task._cache_step_idx
  return [*steps[:index]], [*steps[index + 1 :]]


def parts_of_mixture(
  mixture: 'seqio.Mixture',
) -> list['seqio.Task | seqio.Mixture']:
  """Returns the tasks and mixtures that a mixture was made of."""
  return [*mixture._tasks, *mixture._sub_mixtures]


def sample_fn(mixture: 'seqio.Mixture') -> Any:
  """Returns what draws a mixture's examples."""
  return mixture._sample_fn


def has_builder_kwargs(loader: Any) -> bool:
  """Returns whether TFDS is given more than a name: no folder says of what."""
  return bool(loader._builder_kwargs)


def tfds_split(loader: Any, split: str) -> str:
  """Returns what TFDS calls a split of a task."""
  return loader._map_split(split)
