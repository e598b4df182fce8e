# SPDX-License-Identifier: Apache-2.0
"""A cache in the place of a task: its splits, vocabularies and scores.

What the verb `cache` has written is bound to a system as a task is, by the name
`cached`. Training reads it without TensorFlow (`cache_batches.py`); scoring
makes a SeqIO task of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin
import numpy as np

from l2s_jax.data.cached import cache_format
from l2s_jax.data.cached import order as order_lib
from l2s_jax.metrics import scores
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# Of a task whose cache has none, as `local_task` has them.
_METRICS = ('bleu', 'chrf', 'exact_match')

MetricsOf = Callable[[str, Sequence[str]], Sequence[Any]]


@gin.configurable('cached', module='l2s_jax')
@dataclasses.dataclass(frozen=True)
class CachedData:
  """Which cache takes the place of a task.

  Attributes:
    cache_dir: CACHE_DIR, a folder that the verb `cache` has written.
    metrics: names of the scores, as `local_task.metrics` has them; None: those
      of the task that was cached.
  """

  cache_dir: str | None = None
  metrics: Sequence[str] | None = None

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
  """A cache with the vocabularies of a system, in the place of a bound task.

  Attributes:
    cache: the whole of it.
    prompt_vocabulary: whose ids the prompts are.
    answer_vocabulary: whose ids the answers are.
    metric_fns: of each task, by name.
  """

  cache: cache_format.TokenCache
  prompt_vocabulary: base.Vocabulary
  answer_vocabulary: base.Vocabulary
  metric_fns: Mapping[str, Sequence[Any]]

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

  def scored(self, split: str) -> list[str]:
    """Returns the tasks that can be scored on a split.

    Raises:
      ValueError: if there are none.
    """
    found = [name for name in self.names(split) if self.metric_fns[name]]
    if not found:
      raise ValueError(
        f'nothing to evaluate in split {split!r} of {self.cache.folder}: its '
        'tasks have no metrics; set cached.metrics.'
      )
    return found


def bind(
  name: str,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
  metrics_of: MetricsOf,
) -> CachedTask:
  """Returns the cache that gin names, with the vocabularies of a system.

  Args:
    name: 'cached', or with a gin scope before it, 'SCOPE/cached'.
    prompt_vocabulary: that the prompts must have been tokenized with.
    answer_vocabulary: the same for the answers.
    metrics_of: from a task's name, and the names of the metrics that it was
      cached with, to its metrics.

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
    {
      task: _metric_fns(cache, task, config, metrics_of) for task in cache.tasks
    },
  )


def data_settings(name: str) -> dict[str, Any]:
  """Returns what the order of a cache's examples depends on, as JSON has it.

  Args:
    name: as for `bind`.
  """
  cache = _config(name).open()
  return {
    'cache': dict(cache.key),
    'rates': dict(cache.rates),
    'num_examples': {
      task: {
        split: of_split['num_examples']
        for split, of_split in content['splits'].items()
      }
      for task, content in cache.tasks.items()
    },
  }


def is_cached(name: str) -> bool:
  """Returns whether a task's name stands for a cache."""
  return name.rpartition('/')[2] == 'cached'


def for_seqio(task: CachedTask, split: str) -> 'seqio.Mixture':
  """Returns a mixture of SeqIO tasks that read the cache, to be scored.

  Their examples have ids, lengths before cutting, and the columns of text, as
  those of `tasks.bind` do.

  Args:
    task: from `bind`.
    split: the tasks are those that can be scored on it.

  Raises:
    ValueError: if there are none.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio, tf

  output_features = {
    key: seqio.Feature(
      vocabulary=features.wrap_vocabulary(vocabulary),
      add_eos=True,
      dtype=tf.int32,
    )
    for key, vocabulary in (
      ('inputs', task.prompt_vocabulary),
      ('targets', task.answer_vocabulary),
    )
  }
  parts = [
    seqio.Task(
      name,
      seqio.FunctionDataSource(
        functools.partial(_dataset, task, name),
        splits=sorted(task.cache.tasks[name]['splits']),
      ),
      output_features=output_features,
      preprocessors=[],
      postprocess_fn=_postprocess_fn(task, name, split),
      metric_fns=list(task.metric_fns[name]),
    )
    for name in task.scored(split)
  ]
  return seqio.Mixture(task.name, [(part, 1.0) for part in parts])


def _dataset(
  task: CachedTask,
  name: str,
  split: str,
  shuffle_files: bool = False,
  seed: int | None = None,
) -> 'tf.data.Dataset':
  """Returns the examples of a split in their own order."""
  from l2s_jax.data.features import tf

  del shuffle_files, seed  # It is not for training.
  ids, number = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)
  specs = {
    'inputs': ids,
    'targets': ids,
    'inputs_length': number,
    'targets_length': number,
  }
  kinds = _text_columns(task, name, split)
  for column, is_list in kinds.items():
    specs[column] = tf.TensorSpec([None] if is_list else [], tf.string)

  def generate() -> Iterator[dict[str, Any]]:
    for prompt, answer, texts in examples(task, name, split):
      yield {
        'inputs': prompt.astype(np.int32),
        'targets': answer.astype(np.int32),
        'inputs_length': np.int32(len(prompt)),
        'targets_length': np.int32(len(answer)),
        **{
          column: _as_bytes(texts[column], is_list)
          for column, is_list in kinds.items()
        },
      }

  return tf.data.Dataset.from_generator(generate, output_signature=specs)


def _as_bytes(text: str | Sequence[str], is_list: bool) -> Any:
  if is_list:
    return np.array([each.encode() for each in text], object)
  return str(text).encode()


def _text_columns(task: CachedTask, name: str, split: str) -> dict[str, bool]:
  """Returns the columns of text, and whether each holds several texts."""
  texts = next(examples(task, name, split, block=1))[2]
  return {
    column: isinstance(value, list)
    for column, value in texts.items()
    if isinstance(value, str | list)
  }


def _postprocess_fn(
  task: CachedTask, name: str, split: str
) -> Callable[..., Any] | None:
  """Returns what makes targets of an example, with all its references."""
  from l2s_jax.data.features import seqio

  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name).postprocessor
  if 'references' in _text_columns(task, name, split):
    return with_references
  return None


def with_references(
  text: str,
  *,
  example: Mapping[str, Any] | None = None,
  is_target: bool = False,
) -> str | list[str]:
  """Returns a target with the references beside it; a prediction as it is.

  A SeqIO `postprocess_fn`.
  """
  if not is_target or example is None:
    return text
  return [text, *(reference.decode() for reference in example['references'])]


def examples(
  task: CachedTask, name: str, split: str, block: int = 256
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
  """Yields ids of prompt and answer, uncut, and texts, in the task's order.

  Args:
    task: from `bind`.
    name: of one of the tasks in it.
    split: of that.
    block: examples read at a time.
  """
  source = task.cache.split(name, split)
  for start in range(0, source.num_examples, block):
    stop = min(start + block, source.num_examples)
    for record in source.read(range(start, stop)):
      prompt, answer = cache_format.decode_ids(record, source.dtype)
      yield prompt, answer, cache_format.decode_texts(record, source.dtype)


def _config(name: str) -> CachedData:
  """Returns what gin has for a name, whose scope stands before it."""
  scope = name.rpartition('/')[0]
  with gin.config_scope(scope or None):
    return CachedData()


def _metric_fns(
  cache: cache_format.TokenCache,
  task: str,
  config: CachedData,
  metrics_of: MetricsOf,
) -> Sequence[Any]:
  """Returns the metrics of a task: gin's, or those that it was cached with.

  Raises:
    ValueError: for a metric that there is not.
  """
  if config.metrics is not None:
    return scores.Scores().named(config.metrics, 'cached.metrics')
  return metrics_of(task, cache.tasks[task].get('metrics', _METRICS))


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
