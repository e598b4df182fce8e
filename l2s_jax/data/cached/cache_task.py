# SPDX-License-Identifier: Apache-2.0
"""A cache as a task: its splits, vocabularies and metrics.

The output of the verb `cache` is bound to a system under the task name
`cached`. Training reads it without TensorFlow (`cache_batches.py`); evaluation
makes SeqIO tasks of it (`cache_scoring.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin
import numpy as np
from jaxtyping import Int32, Int64

from l2s_jax.data import batching, tasks
from l2s_jax.data.cached import (
  cache_batches,
  cache_format,
  cache_scoring,
  feature_format,
  plans,
)
from l2s_jax.data.cached import order as order_lib
from l2s_jax.metrics import scores
from l2s_jax.runtime import console
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio

# Default metrics of a cache without metrics, those of `local_task`.
_METRICS = ('bleu', 'chrf', 'exact_match')


@gin.configurable('cached', module='l2s_jax')
@dataclasses.dataclass(frozen=True)
class CachedData:
  """Configuration of the task `cached`.

  Attributes:
    cache_dir: CACHE_DIR, a folder written by the verb `cache`, local or in a
      bucket.
    metrics: metric names, as for `local_task.metrics`; None: the metrics of the
      cached task.
    features: USE_FEATURES, whether to read the LLM states written by
      `cache --features`. The LLM is then not loaded.
  """

  cache_dir: str | None = None
  metrics: Sequence[str] | None = None
  features: bool = False

  def open(self) -> cache_format.TokenCache:
    """Opens the cache.

    Raises:
      FileNotFoundError: if it is missing or incomplete.
      ValueError: if `cache_dir` is not set, or the cache is damaged.
    """
    if not self.cache_dir:
      raise ValueError(
        "MIXTURE_OR_TASK_NAME='cached', but cached.cache_dir is not set; "
        'include gin_configs/tasks/cached.gin and set CACHE_DIR to a folder '
        f'written by `{console.name()} cache`.'
      )
    return cache_format.open_cache(self.cache_dir)


@dataclasses.dataclass(frozen=True)
class CachedTask:
  """A cache bound to a system's vocabularies: a `bound_tasks.BoundTask`.

  Attributes:
    cache: the token cache.
    prompt_vocabulary: vocabulary of the prompt ids.
    answer_vocabulary: vocabulary of the answer ids.
    metric_fns: metrics by task name.
    features: cached LLM states to read, or None.
  """

  cache: cache_format.TokenCache
  prompt_vocabulary: base.Vocabulary
  answer_vocabulary: base.Vocabulary
  metric_fns: Mapping[str, Sequence[Any]]
  features: feature_format.FeatureCache | None = None

  @property
  def name(self) -> str:
    """Name of the cached task; 'mixture' for several tasks."""
    names = list(self.cache.tasks)
    return names[0] if len(names) == 1 else 'mixture'

  def names(self, split: str) -> list[str]:
    """Returns the tasks with a split, in the order of `order.Order`.

    Raises:
      ValueError: if there are none.
    """
    found = sorted(
      name
      for name, content in self.cache.tasks.items()
      if split in content['splits']
    )
    if not found:
      raise ValueError(
        f'{self.cache.folder} has no split {split!r}; it has '
        f'{", ".join(self.cache.splits)}. Cache the task with this split, or '
        'choose another split.'
      )
    return found

  def order(self, split: str, seed: int) -> order_lib.Order:
    """Returns the shuffle order of a split's examples."""
    names = self.names(split)
    return order_lib.Order(
      {name: self.cache.split(name, split).num_examples for name in names},
      {name: float(self.cache.rates[name]) for name in names}
      if len(names) > 1
      else None,
      seed,
    )

  def check_data(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Opens the split's files and validates the lengths.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for an unknown split, or for invalid lengths, or lengths other
        than those of the cached LLM states.
    """
    batching.check_lengths(task_feature_lengths)
    self.order(split, seed=0)
    if self.features is not None:
      for name in self.names(split):
        self.features.check_length(name, split, task_feature_lengths['inputs'])

  def check_evaluable(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Refuses a split without readable data or without metrics."""
    self.check_data(split, task_feature_lengths)
    self.metrics_of(split)

  def metrics_of(self, split: str) -> dict[str, Sequence[Any]]:
    """Returns the metrics of each task with the split, by task name.

    Tasks without metrics are left out.

    Raises:
      ValueError: if there are none.
    """
    found = {
      name: self.metric_fns[name]
      for name in self.names(split)
      if self.metric_fns[name]
    }
    if not found:
      raise ValueError(
        f'nothing to evaluate in split {split!r} of {self.cache.folder}: its '
        'tasks have no metrics; set cached.metrics.'
      )
    return found

  def scored_tasks(self, split: str) -> 'list[seqio.Task]':
    """Returns SeqIO tasks that read the cache, to be scored on a split.

    Raises:
      ValueError: if there are none.
    """
    return [
      cache_scoring.task(
        self.cache,
        name,
        split,
        prompt_vocabulary=self.prompt_vocabulary,
        answer_vocabulary=self.answer_vocabulary,
        metric_fns=metric_fns,
      )
      for name, metric_fns in self.metrics_of(split).items()
    ]

  def task_in_order(self, label: str) -> 'seqio.Task':
    """Returns a SeqIO task that reads the cache; refuses a mixture.

    Args:
      label: the setting that names the task, for error messages.

    Raises:
      ValueError: for a mixture.
    """
    if len(self.cache.tasks) > 1:
      raise ValueError(
        f'{label}: {self.cache.folder} contains a mixture of '
        f'{", ".join(self.cache.tasks)}; answer its tasks one by one, from '
        'their own files or from a cache of each task.'
      )
    return cache_scoring.task(
      self.cache,
      self.name,
      self.cache.splits[0],
      prompt_vocabulary=self.prompt_vocabulary,
      answer_vocabulary=self.answer_vocabulary,
      metric_fns=(),
    )

  def llm_states(
    self,
    name: str,
    split: str,
    numbers: Int64[np.ndarray, ' rows'],
    segment_ids: Int32[np.ndarray, 'rows length'],
  ) -> dict[str, np.ndarray]:
    """Returns the cached LLM states of prompts; see `bound_tasks.BoundTask`."""
    if self.features is None:
      return {}
    states = self.features.split(name, split).states(numbers)
    return feature_format.lay_out(
      [each.cut(segment_ids.shape[1]) for each in states],
      segment_ids,
      range(len(numbers)),
      like=self.features,
    )

  def data_settings(self) -> dict[str, Any]:
    """Returns the settings that determine the order of examples, for JSON."""
    return {
      'cache': dict(self.cache.key),
      'rates': dict(self.cache.rates),
      'num_examples': {
        task: {
          split: of_split['num_examples']
          for split, of_split in content['splits'].items()
        }
        for task, content in self.cache.tasks.items()
      },
    }

  def train_batches(
    self,
    *,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    split: str = 'train',
    pack: bool = False,
    length_buckets: batching.LengthBuckets = (),
    start_row: int = 0,
    position: plans.Position | None = None,
    rows: Int64[np.ndarray, ' rows'] | None = None,
    num_epochs: int | None = None,
  ) -> cache_batches.CachedBatches:
    """Returns the rows of one process; see `cache_batches.train_batches`."""
    del start_row  # `position` replaces it.
    order = self.order(split, seed)
    return cache_batches.train_batches(
      order,
      [self.cache.split(name, split) for name in order.names],
      prompt_vocabulary=self.prompt_vocabulary,
      answer_vocabulary=self.answer_vocabulary,
      task_feature_lengths=task_feature_lengths,
      batch_size=batch_size,
      pack=pack,
      length_buckets=length_buckets,
      position=position,
      rows=rows,
      num_epochs=num_epochs,
      features=[]
      if self.features is None
      else [self.features.split(name, split) for name in order.names],
    )


def bind(
  name: str,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
) -> CachedTask:
  """Binds the cache named by gin to the vocabularies of a system.

  Args:
    name: 'cached', optionally with a gin scope: 'SCOPE/cached'.
    prompt_vocabulary: vocabulary of the prompts; must equal the cache's.
    answer_vocabulary: the same for the answers.

  Raises:
    FileNotFoundError: if the cache is missing or incomplete.
    ValueError: if it was made with other tokenizers.
  """
  config = _config(name)
  cache = config.open()
  _check_vocabularies(cache, prompt_vocabulary, answer_vocabulary)
  return CachedTask(
    cache,
    prompt_vocabulary,
    answer_vocabulary,
    {task: _metric_fns(cache, task, config) for task in cache.tasks},
    feature_format.open_features(cache) if config.features else None,
  )


def features_of(name: str) -> feature_format.FeatureCache | None:
  """Returns the features that gin requests for a cache, or None.

  Args:
    name: as for `bind`.

  Raises:
    FileNotFoundError: if the cache or its features are missing or incomplete.
    ValueError: if the cache or its features are damaged.
  """
  config = _config(name)
  if not config.features:
    return None
  return feature_format.open_features(config.open())


def _config(name: str) -> CachedData:
  """Returns gin's configuration for a name, with its scope."""
  scope = name.rpartition('/')[0]
  with gin.config_scope(scope or None):
    return CachedData()


def _metric_fns(
  cache: cache_format.TokenCache, task: str, config: CachedData
) -> Sequence[Any]:
  """Returns the metrics of a task: gin's, or those stored in the cache.

  Raises:
    ValueError: for an unknown metric.
  """
  if config.metrics is not None:
    return scores.Scores().named(config.metrics, 'cached.metrics')
  names = cache.tasks[task].get('metrics', _METRICS)
  return tasks.metrics_of_cached(task, names)


def _check_vocabularies(
  cache: cache_format.TokenCache,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
) -> None:
  """Refuses a cache with ids of other vocabularies."""
  kept = cache.key.get('vocabularies', {})
  differing = [
    f'the ids of its {side}s are not those of {vocabulary!r}'
    for side, vocabulary in (
      ('prompt', prompt_vocabulary),
      ('answer', answer_vocabulary),
    )
    if kept.get(side) != vocabulary.fingerprint()
  ]
  if differing:
    raise ValueError(
      f'CACHE_DIR={cache.folder} was made for another model: '
      f'{"; ".join(differing)}. Cache the task for this model, or set '
      'CACHE_DIR to the cache of this model.'
    )
