# SPDX-License-Identifier: Apache-2.0
"""Batches from a cache: each process reads its own rows of each of them.

What the verb `cache` has written takes the place of a task. The order of the
examples (`order.py`) and their rows (`plans.py`) follow from the seed and the
index of lengths; threads read and lay out the rows of this process ahead. No
TensorFlow: scoring alone has it, and `features.cached_task` makes the task that
it needs.
"""

import collections
import concurrent.futures
import copy
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from jaxtyping import Int64

from l2s_jax.data import batching, cache_format, packing, plans
from l2s_jax.data import order as order_lib
from l2s_jax.metrics import scores
from l2s_jax.vocabularies import base

# Threads that read; each waits for the disk most of the time.
_NUM_READERS = 4
# Batches that they make before they are asked for.
_NUM_AHEAD = 8


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

  def open(self) -> cache_format.Cache:
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

  cache: cache_format.Cache
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
  registered: Callable[[str], Sequence[Any] | None],
) -> CachedTask:
  """Returns the cache that gin names, with the vocabularies of a system.

  Args:
    name: 'cached', or with a gin scope before it, 'SCOPE/cached'.
    prompt_vocabulary: that the prompts must have been tokenized with.
    answer_vocabulary: the same for the answers.
    registered: from a task's name to its metrics, or None.

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
    {task: _metric_fns(cache, task, config, registered) for task in cache.tasks},
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


def train_batches(
  task: CachedTask,
  *,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  seed: int,
  split: str = 'train',
  pack: bool = False,
  length_buckets: Sequence[tuple[int, int]] = (),
  position: plans.Position | None = None,
  rows: Int64[np.ndarray, ' rows'] | None = None,
  num_epochs: int | None = None,
) -> 'CachedBatches':
  """Returns shuffled batches, the same for the same arguments.

  Each epoch is an order of its own of the whole split; batches cross its end. A
  mixture has its tasks by their rates, each of them by epochs of its own.

  Args:
    task: from `bind`.
    task_feature_lengths: `inputs` and `targets`, in tokens; longer is cut.
    batch_size: rows, over all devices.
    seed: of the order.
    split: `train`, or another.
    pack: whether a row holds several examples, for encoder-decoders.
    length_buckets: all lengths that batches may have, `inputs` and `targets`
      being the last; none: these alone.
    position: where an earlier start has come to; None: the beginning.
    rows: of each batch, those that this process reads; None: all.
    num_epochs: None: without end. A mixture has no other.

  Raises:
    ValueError: if the split is missing.
  """
  order = task.order(split, seed)
  splits = [task.cache.split(name, split) for name in order.names]
  num_examples = None
  if num_epochs is not None:
    (size,) = order.sizes.values()
    num_examples = num_epochs * size
  room = task_feature_lengths['inputs'], task_feature_lengths['targets']
  plan: Any = plans.packed if pack else plans.one_by_one
  lengths: Any = room
  if len(length_buckets) > 1:
    plan, lengths = plans.by_length, length_buckets
  return CachedBatches(
    task,
    splits,
    plan(
      functools.partial(_look, order, splits),
      lengths,
      batch_size,
      position,
      num_examples,
    ),
    room,
    np.arange(batch_size) if rows is None else rows,
    batch_size,
  )


class CachedBatches(Iterator[batching.Part]):
  """Parts of batches, read ahead, and what was cut in making them.

  The counts are of all processes' rows in those returned so far.

  Attributes:
    num_examples: examples seen.
    num_truncated_prompts: of these, how many had a longer prompt.
    num_truncated_targets: likewise for the answer.
    close: a function that ends the threads.
  """

  def __init__(
    self,
    task: CachedTask,
    splits: Sequence[cache_format.Split],
    planned: Iterator[plans.BatchPlan],
    room: tuple[int, int],
    rows: Int64[np.ndarray, ' rows'],
    batch_size: int,
  ):
    """Starts the threads.

    Args:
      task: has the vocabularies.
      splits: of the tasks, as plans number them.
      planned: the batches.
      room: longest prompt and answer, in tokens.
      rows: of each batch, those to be made.
      batch_size: rows over all processes.
    """
    self.num_examples = 0
    self.num_truncated_prompts = 0
    self.num_truncated_targets = 0
    self._room = room
    self._planned = planned
    self._maker = _Maker(task, splits, rows, batch_size)
    # Plans are made one after another, in one thread.
    self._planner = concurrent.futures.ThreadPoolExecutor(1)
    self._readers = concurrent.futures.ThreadPoolExecutor(_NUM_READERS)
    self._ahead: collections.deque[Any] = collections.deque()
    self.close = weakref.finalize(
      self, _shut, self._ahead, self._planner, self._readers
    )

  def __next__(self) -> batching.Part:
    if not self.close.alive:
      raise StopIteration
    while len(self._ahead) < _NUM_AHEAD:
      plan = self._planner.submit(next, self._planned, None)
      self._ahead.append(
        (plan, self._readers.submit(_when_planned, self._maker, plan))
      )
    plan, made = self._ahead.popleft()
    part = made.result()
    if part is None:
      self.close()
      raise StopIteration
    cut = plan.result().stretch.lengths > self._room
    self.num_examples += part.num_examples
    self.num_truncated_prompts += int(cut[:, 0].sum())
    self.num_truncated_targets += int(cut[:, 1].sum())
    return part

  def parts(self) -> Iterator[batching.Part]:
    """Returns itself; other batches have parts as well."""
    return self


class _Maker:
  """Reads and lays out the rows of a process."""

  def __init__(
    self,
    task: CachedTask,
    splits: Sequence[cache_format.Split],
    rows: Int64[np.ndarray, ' rows'],
    batch_size: int,
  ):
    self._rows = rows
    self._batch_size = batch_size
    self._splits = splits
    self._own = threading.local()
    self._ids = {
      'prompt_pad_id': task.prompt_vocabulary.pad_id,
      'answer_pad_id': task.answer_vocabulary.pad_id,
      'start_id': task.answer_vocabulary.start_id,
    }

  def make(self, plan: plans.BatchPlan) -> batching.Part:
    """Returns the part of a planned batch."""
    cut = np.minimum(plan.stretch.lengths, plan.lengths)
    own = np.searchsorted(self._rows, plan.rows)
    own = np.minimum(own, len(self._rows) - 1)
    is_own = self._rows[own] == plan.rows
    ids = self._read(plan.stretch.take(is_own))
    batch = packing.lay_out(
      [prompt[: plan.lengths[0]] for prompt, _ in ids],
      [answer[: plan.lengths[1]] for _, answer in ids],
      own[is_own],
      task_feature_lengths=dict(
        zip(('inputs', 'targets'), plan.lengths, strict=True)
      ),
      **self._ids,
    )
    return batching.Part(
      batch,
      self._rows,
      self._batch_size,
      num_examples=len(cut),
      num_prompt_tokens=int(cut[:, 0].sum()),
      position=plan.position,
    )

  def _read(self, stretch: plans.Stretch) -> list[Any]:
    """Returns the ids of prompt and answer of each example."""
    if not hasattr(self._own, 'splits'):  # A reader has one place in a file.
      self._own.splits = [copy.copy(split) for split in self._splits]
    found: list[Any] = [None] * len(stretch.tasks)
    for number, split in enumerate(self._own.splits):
      places = np.flatnonzero(stretch.tasks == number)
      records = split.read(stretch.examples[places].tolist())
      for place, record in zip(places.tolist(), records, strict=True):
        found[place] = cache_format.decode_ids(record, split.dtype)
    return found


def _when_planned(
  maker: _Maker, plan: 'concurrent.futures.Future[plans.BatchPlan | None]'
) -> batching.Part | None:
  planned = plan.result()
  return None if planned is None else maker.make(planned)


def _shut(
  ahead: collections.deque[Any],
  *pools: concurrent.futures.ThreadPoolExecutor,
) -> None:
  for pool in pools:
    pool.shutdown(wait=False, cancel_futures=True)
  ahead.clear()


def _look(
  order: order_lib.Order,
  splits: Sequence[cache_format.Split],
  start: int,
  stop: int,
) -> plans.Stretch:
  """Returns the examples at places of an order, with their lengths."""
  tasks, examples = order.at(start, stop)
  lengths = np.zeros((len(tasks), 2), np.int64)
  for number, split in enumerate(splits):
    own = np.flatnonzero(tasks == number)
    lengths[own] = split.lengths_of(examples[own])
  return plans.Stretch(tasks, examples, lengths)


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
  cache: cache_format.Cache,
  task: str,
  config: CachedData,
  registered: Callable[[str], Sequence[Any] | None],
) -> Sequence[Any]:
  """Returns the metrics of a task: gin's, the registered ones, or the cache's.

  Raises:
    ValueError: for a metric that there is not.
  """
  if config.metrics is not None:
    return scores.Scores().named(config.metrics, 'cached.metrics')
  found = registered(task)
  if found is not None:
    return found
  names = cache.tasks[task].get('metrics') or ()
  return scores.Scores().named(tuple(names), f"{cache.folder}: 'metrics'")


def _check_vocabularies(
  cache: cache_format.Cache,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
) -> None:
  """Refuses a cache whose ids are of other vocabularies than a system's."""
