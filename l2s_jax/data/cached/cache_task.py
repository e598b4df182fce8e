# SPDX-License-Identifier: Apache-2.0
"""A cache in the place of a task: its splits, vocabularies and scores.

What the verb `cache` has written is bound to a system as a task is, by the name
`cached`. Training reads it without TensorFlow (`cache_batches.py`); scoring
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
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio

# Of a task whose cache has none, as `local_task` has them.
_METRICS = ('bleu', 'chrf', 'exact_match')


@gin.configurable('cached', module='l2s_jax')
@dataclasses.dataclass(frozen=True)
class CachedData:
  """Which cache takes the place of a task.

  Attributes:
    cache_dir: CACHE_DIR, a folder that the verb `cache` has written.
    metrics: names of the scores, as `local_task.metrics` has them; None: those
      of the task that was cached.
    features: USE_FEATURES, whether the LLM's last states are read, too, which
      `cache --features` has written; then no LLM is in memory.
  """

  cache_dir: str | None = None
  metrics: Sequence[str] | None = None
  features: bool = False

  def open(self) -> cache_format.TokenCache:
    """Returns the cache.

    Raises:
      FileNotFoundError: if there is none, or none that is complete.
      ValueError: if none is named, or it is damaged.
    """
    if not self.cache_dir:
      raise ValueError(
        "MIXTURE_OR_TASK_NAME='cached', but cached.cache_dir is not set; "
        'include gin_configs/tasks/cached.gin and set CACHE_DIR to the folder '
        'that the verb `cache` has written.'
      )
    return cache_format.open_cache(self.cache_dir)


@dataclasses.dataclass(frozen=True)
class CachedTask:
  """A cache with the vocabularies of a system, as a `bound_tasks.BoundTask`.

  Attributes:
    cache: the whole of it.
    prompt_vocabulary: whose ids the prompts are.
    answer_vocabulary: whose ids the answers are.
    metric_fns: of each task, by name.
    features: what the LLM makes of the prompts, if it is to be read.
  """

  cache: cache_format.TokenCache
  prompt_vocabulary: base.Vocabulary
  answer_vocabulary: base.Vocabulary
  metric_fns: Mapping[str, Sequence[Any]]
  features: feature_format.FeatureCache | None = None

  @property
  def name(self) -> str:
    """Of the task that was cached; of several, 'mixture'."""
    names = list(self.cache.tasks)
    return names[0] if len(names) == 1 else 'mixture'

  def names(self, split: str) -> list[str]:
    """Returns the tasks that have a split, in the order of `order.Order`.

    Raises:
      ValueError: if none has it.
    """
    found = sorted(
      name
      for name, content in self.cache.tasks.items()
      if split in content['splits']
    )
    if not found:
      raise ValueError(
        f'{self.cache.folder} has no split {split!r}; it has '
        f'{", ".join(self.cache.splits)}. Cache the task with it, or choose '
        'another.'
      )
    return found

  def order(self, split: str, seed: int) -> order_lib.Order:
    """Returns the order of the examples of a split."""
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
    """Opens the split's files.

    Raises:
      FileNotFoundError: if one is not there.
      ValueError: for a split that no task has, or lengths that are off, or at
        which the LLM has not cut the prompts.
    """
    batching.check_lengths(task_feature_lengths)
    self.order(split, seed=0)
    if self.features is not None:
      for name in self.names(split):
        self.features.check_length(name, split, task_feature_lengths['inputs'])

  def check_evaluable(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Refuses a split that cannot be read, or that no task with metrics has."""
    self.check_data(split, task_feature_lengths)
    self.metrics_of(split)

  def metrics_of(self, split: str) -> dict[str, Sequence[Any]]:
    """Returns the metrics of each task that has any and the split, by name.

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
    """Returns a SeqIO task that reads the cache; of a mixture, refuses.

    Args:
      label: the setting that names the task, for messages.

    Raises:
      ValueError: if there are several tasks.
    """
    if len(self.cache.tasks) > 1:
      raise ValueError(
        f'{label}: {self.cache.folder} holds a mixture of '
        f'{", ".join(self.cache.tasks)}; answer its tasks one by one, from '
        'their own files or from a cache of each.'
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
    """Returns the LLM's states of prompts; see `bound_tasks.BoundTask`."""
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
    """Returns what the order of the examples depends on, as JSON has it."""
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
    del start_row  # The position says more.
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
  """Returns the cache that gin names, with the vocabularies of a system.

  Args:
    name: 'cached', or with a gin scope before it, 'SCOPE/cached'.
    prompt_vocabulary: that the prompts must have been tokenized with.
    answer_vocabulary: the same for the answers.

  Raises:
    FileNotFoundError: if there is no whole cache.
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
  """Returns the features that gin asks for of a cache; None: of none.

  Args:
    name: as for `bind`.

  Raises:
    FileNotFoundError: if there is no whole cache, or there are no features.
    ValueError: if something of them is damaged.
  """
  config = _config(name)
  if not config.features:
    return None
  return feature_format.open_features(config.open())


def _config(name: str) -> CachedData:
  """Returns what gin has for a name, whose scope stands before it."""
  scope = name.rpartition('/')[0]
  with gin.config_scope(scope or None):
    return CachedData()


def _metric_fns(
  cache: cache_format.TokenCache, task: str, config: CachedData
) -> Sequence[Any]:
  """Returns the metrics of a task: gin's, or those that it was cached with.

  Raises:
    ValueError: for a metric that there is not.
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
  """Refuses a cache whose ids are of other vocabularies than a system's."""
  kept = cache.key.get('vocabularies', {})
  differing = [
    f'its {side}s are ids of another tokenizer than {vocabulary!r}'
    for side, vocabulary in (
      ('prompt', prompt_vocabulary),
      ('answer', answer_vocabulary),
    )
    if kept.get(side) != vocabulary.fingerprint()
  ]
  if differing:
    raise ValueError(
      f'CACHE_DIR={cache.folder} was made for another model: '
      f'{"; ".join(differing)}. Cache the task with the model that reads it, '
      'or name its cache.'
    )
