# SPDX-License-Identifier: Apache-2.0
"""Accessors for undocumented SeqIO attributes.

They cover task caching, mixtures and TFDS loaders. No other module uses SeqIO
internals; `tests/test_internals.py` names the SeqIO version that has them.
SeqIO is imported inside functions.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import seqio


def cached_source(
  folder: str, split: str, file_shuffle_buffer_size: int | None
) -> 'seqio.DataSource':
  """Returns the source of a split in a `seqio_cache_tasks` cache."""
  import seqio

  return seqio.dataset_providers._CachedDataSource(
    folder, split, file_shuffle_buffer_size=file_shuffle_buffer_size
  )


def cache_placeholder(task: 'seqio.Task') -> Any:
  """Returns a task's CacheDatasetPlaceholder."""
  return task._cache_dataset_placerholder


def preprocessors_around_cache(
  task: 'seqio.Task',
) -> tuple[list[Any], list[Any]]:
  """Returns the preprocessors before a task's cache, and those after it."""
  steps, index = task.preprocessors, task._cache_step_idx
  return [*steps[:index]], [*steps[index + 1 :]]


def parts_of_mixture(
  mixture: 'seqio.Mixture',
) -> list['seqio.Task | seqio.Mixture']:
  """Returns the tasks and mixtures that form a mixture."""
  return [*mixture._tasks, *mixture._sub_mixtures]


def sample_fn(mixture: 'seqio.Mixture') -> Any:
  """Returns the sampling function of a mixture."""
  return mixture._sample_fn


def has_builder_kwargs(loader: Any) -> bool:
  """Returns whether a TFDS loader has builder arguments beside the name.

  The prepared folder of such a data set is unknown.
  """
  return bool(loader._builder_kwargs)


def tfds_split(loader: Any, split: str) -> str:
  """Returns the TFDS split name of a task's split."""
  return loader._map_split(split)
