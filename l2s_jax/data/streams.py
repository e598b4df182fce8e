# SPDX-License-Identifier: Apache-2.0
"""Streams batches from a bound SeqIO task or mixture."""

import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int32, Int64

from l2s_jax.data import batching, packing, seqio_internals, tasks
from l2s_jax.runtime import distributed
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# Number of examples, where it does not follow from the batch size.
_TOKENIZED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class StreamedTask:
  """A SeqIO task or mixture as a `bound_tasks.BoundTask`.

  Attributes:
    provider: task or mixture from `tasks.bind`.
    bound_as: name passed to `tasks.bind`.
  """

  provider: 'seqio.Task | seqio.Mixture'
  bound_as: str

  @property
  def name(self) -> str:
    """Name of the task or mixture."""
    return self.provider.name

  def check_data(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Opens the split's files; reads and validates local ones completely.

    Raises:
      FileNotFoundError: if a data set, a cache or a file is missing.
      ValueError: for an unknown split, invalid lengths, or an error of a source
        or a preprocessor.
    """
    from l2s_jax.data.features import seqio

    _check_settings(self.provider, split, task_feature_lengths)
    for part in seqio.get_subtasks(self.provider):
      if split in part.splits:
        part.get_dataset(task_feature_lengths, split=split, shuffle=False)

  def check_evaluable(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Refuses a split without readable data or without metrics."""
    self.check_data(split, task_feature_lengths)
    self.scored_tasks(split)

  def metrics_of(self, split: str) -> dict[str, Sequence[Any]]:
    """Returns the metrics of each task with the split, by task name.

    Tasks without metrics are left out.
    """
    return {
      part.name: part.predict_metric_fns for part in self._with_metrics(split)
    }

  def scored_tasks(self, split: str) -> 'list[seqio.Task]':
    """Returns the tasks with both the split and metrics.

    Raises:
      ValueError: if there are none, or a metric does not take predictions.
    """
    from l2s_jax.data.features import seqio

    scored = self._with_metrics(split)
    if not scored:
      found = '; '.join(
        f'{part.name} has splits {", ".join(part.splits)} and '
        f'{len(part.metric_objs)} metrics'
        for part in seqio.get_subtasks(self.provider)
      )
      raise ValueError(
        f'nothing to evaluate in split {split!r} of {self.name!r}: {found}.'
      )
    for part in scored:
      kinds = {metric.model_output_type.name for metric in part.metric_objs}
      if kinds != {'PREDICTION'}:
        raise ValueError(
          f'task {part.name!r} has metrics of {", ".join(sorted(kinds))}; only '
          'metrics of (targets, predictions) are supported.'
        )
    return scored

  def task_in_order(self, label: str) -> 'seqio.Task':
    """Returns the task; refuses a mixture, whose examples have no line order.

    Args:
      label: the setting that names the task, for error messages.

    Raises:
      ValueError: for a mixture.
    """
    parts = getattr(self.provider, 'tasks', None)
    if parts is not None:
      raise ValueError(
        f'{label} is a mixture, and a mixture samples its examples at random; '
        'answer its tasks one by one: '
        + ', '.join(f'task:{part.name}' for part in parts)
        + '.'
      )
    return self.provider

  def llm_states(
    self,
    name: str,
    split: str,
    numbers: Int64[np.ndarray, ' rows'],
    segment_ids: Int32[np.ndarray, 'rows length'],
  ) -> dict[str, np.ndarray]:
    """Returns an empty dict: the LLM reads streamed prompts itself."""
    del name, split, numbers, segment_ids
    return {}

  def data_settings(self) -> dict[str, Any]:
    """Returns the settings that determine the training examples, for JSON."""
    return tasks.data_settings(self.bound_as)

  def train_batches(
    self,
    *,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    pack: bool,
    length_buckets: batching.LengthBuckets,
    start_row: int,
    position: Mapping[str, Any] | None,
    rows: Int64[np.ndarray, ' rows'],
  ) -> 'TaskBatches':
    """Returns whole batches, made by every process; see `train_batches`."""
    del position, rows
    if jax.process_count() > 1:
      distributed.say_once(
        f'Each of the {jax.process_count()} processes reads and tokenizes all '
        f'{batch_size} rows of a batch, {jax.process_count()} times the work '
        'of one process. With a cache the task is tokenized once, and each '
        'process reads only its own rows: see gin_configs/tasks/cached.gin.'
      )
    return train_batches(
      self.provider,
      task_feature_lengths=task_feature_lengths,
      batch_size=batch_size,
      seed=seed,
      pack=pack,
      length_buckets=length_buckets,
      start_row=start_row,
    )

  def _with_metrics(self, split: str) -> 'list[seqio.Task]':
    from l2s_jax.data.features import seqio

    return [
      part
      for part in seqio.get_subtasks(self.provider)
      if part.metric_objs and split in part.splits
    ]


def bind(
  name: str,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
  *,
  label: str | None = None,
) -> StreamedTask:
  """Binds a task by name with `tasks.bind`, for streaming."""
  return StreamedTask(
    tasks.bind(name, prompt_vocabulary, answer_vocabulary, label=label), name
  )


class TaskBatches(Iterator[batching.Batch]):
  """Iterator over a task's batches, with counts of truncated sequences.

  TensorFlow prefetches batches; the counts cover the batches returned so far,
  from `start_row` on.

  Attributes:
    num_examples: number of examples, without the copies that pad a batch.
    num_truncated_prompts: number of these with a truncated prompt.
    num_truncated_answers: number of these with a truncated answer.
    close: function that stops the background threads and ends the iteration.
  """

  def __init__(self, batches: Iterator[batching.Batch], batch_size: int):
    # With a Hugging Face tokenizer TensorFlow's threads run Python. They
    # usually hang the process if the interpreter ends first, so `close` ends
    # them before.
    self._iterator = [batches]
    self.close = weakref.finalize(self, self._iterator.clear)
    self._batch_size = batch_size
    self.num_examples = 0
    self.num_truncated_prompts = 0
    self.num_truncated_answers = 0

  def __next__(self) -> batching.Batch:
    if not self._iterator:
      raise StopIteration
    from l2s_jax.data import features

    with features.plain_errors():
      batch = dict(next(self._iterator[0]))
    prompts = batch.pop('encoder_truncated')
    answers = batch.pop('decoder_truncated')
    self.num_examples += int(batch['encoder_segment_ids'].max(axis=1).sum())
    self.num_truncated_prompts += int(prompts.sum())
    self.num_truncated_answers += int(answers.sum())
    return batching.pad_rows(batch, self._batch_size)

  def parts(self) -> Iterator[batching.Part]:
    """Yields the batches as parts with all rows."""
    return map(batching.whole, self)


def train_batches(
  task: 'seqio.Task | seqio.Mixture',
  *,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  seed: int,
  split: str = 'train',
  pack: bool = False,
  length_buckets: batching.LengthBuckets = (),
  start_row: int = 0,
  num_epochs: int | None = None,
) -> TaskBatches:
  """Returns shuffled batches; equal arguments give equal batches.

  Each epoch is a new order of the whole split (within the task's shuffle
  buffer); a mixture samples from its tasks instead. Batches cross epoch
  boundaries; an incomplete last batch is dropped. Random preprocessors of a
  task repeat their draws in every epoch, except in a mixture.

  Padding costs as much compute as tokens. Two options reduce it. With `pack`, a
  row holds as many examples as fit. With `length_buckets`, the examples of a
  batch have similar lengths; examples of a rare length wait until their batch
  is full.

  Args:
    task: task or mixture from `tasks.bind`.
    task_feature_lengths: lengths of `inputs` and `targets`, in tokens. Longer
      sequences are cut.
    batch_size: number of rows over all devices.
    seed: seed of the shuffle order.
    split: name of the split.
    pack: whether a row holds several examples; for encoder-decoders.
    length_buckets: see `batching.bucket_lengths`.
    start_row: number of rows to skip. The iterator continues exactly as in an
      uninterrupted run, for any source and tokenizer. Skipped rows are read and
      shuffled again before the first batch, 100,000 short sentences per second
      on a busy core; `pack` and `length_buckets` also tokenize them again.
    num_epochs: number of epochs. None: unlimited.

  Raises:
    ValueError: if the split or a length is missing, or the task is not bound;
      for invalid buckets, or buckets with a `start_row` within a batch.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import tf

  _check_settings(task, split, task_feature_lengths)
  buckets = batching.bucket_lengths(task_feature_lengths, length_buckets)
  converter = features.make_converter(task, pack=pack)
  if length_buckets and start_row % batch_size:
    raise ValueError(
      f'start_row={start_row} is in the middle of a batch of {batch_size}; '
      'with length_buckets only whole batches can be skipped.'
    )

  def rows(texts: 'tf.data.Dataset', size: int) -> 'tf.data.Dataset':
    """Returns the rows of examples, tokenized `size` examples at a time."""

    def convert(batch: dict[str, Any]) -> dict[str, 'tf.Tensor']:
      batch = features.batch_of_ids(
        batch, task.output_features, task_feature_lengths
      )
      return converter.convert(batch, task_feature_lengths)

    # With one example per row these are the final batches, all of full size.
    are_batches = not (pack or length_buckets)
    return texts.ragged_batch(size, drop_remainder=are_batches).map(
      features.as_written(convert), num_parallel_calls=tf.data.AUTOTUNE
    )

  texts = _shuffled_texts(task, split, task_feature_lengths, seed, num_epochs)
  if length_buckets:
    dataset = rows(texts, _TOKENIZED_AT_ONCE).unbatch()
    dataset = _batch_by_length(dataset, buckets, batch_size)
    dataset = dataset.skip(start_row // batch_size)
  elif pack:
    dataset = rows(texts, packing.WINDOW).unbatch().skip(start_row)
    dataset = dataset.batch(batch_size, drop_remainder=True)
  else:  # Skipped examples are not tokenized.
    dataset = rows(texts.skip(start_row), batch_size)
  return TaskBatches(
    dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator(), batch_size
  )


def _shuffled_texts(
  task: 'seqio.Task | seqio.Mixture',
  split: str,
  task_feature_lengths: Mapping[str, int],
  seed: int,
  num_epochs: int | None,
) -> 'tf.data.Dataset':
  """Returns `inputs` and `targets` in training order, before tokenization.

  The order equals that of SeqIO's `get_dataset`, whose shuffling is independent
  of the content. If only some tasks of a mixture tokenize amid their other
  steps, all tasks give ids.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio

  read = functools.partial(
    _shuffled,
    split=split,
    task_feature_lengths=task_feature_lengths,
    seed=seed,
  )
  if not isinstance(task, seqio.Mixture):
    # SeqIO's num_epochs repeats before shuffling, which mixes epochs.
    steps = features.steps_before_ids(task)
    return read(task, steps, num_epochs=1).repeat(num_epochs)
  parts = [part for part in task.tasks if split in part.splits]
  datasets = [
    read(part, features.steps_before_ids(part), num_epochs=num_epochs)
    for part in parts
  ]
  if any(each.element_spec != datasets[0].element_spec for each in datasets):
    datasets = [
      read(part, part.preprocessors, num_epochs=num_epochs) for part in parts
    ]
  sample = seqio_internals.sample_fn(task)
  return sample(datasets, [task.get_rate(part) for part in parts], seed)


def _shuffled(
  task: 'seqio.Task',
  steps: Sequence[Any],
  *,
  split: str,
  task_feature_lengths: Mapping[str, int],
  seed: int,
  num_epochs: int | None,
) -> 'tf.data.Dataset':
  """Returns a task's shuffled examples after the given preprocessors."""
  from l2s_jax.data import features

  task = task.replace(preprocessors=steps)
  dataset = task.source.get_dataset(split=split, shuffle=True, seed=seed)
  dataset = task.preprocess_precache(dataset, seed=seed).repeat(num_epochs)
  dataset = task.preprocess_postcache(
    dataset, sequence_length=task_feature_lengths, seed=seed
  )
  dataset = features.choose(dataset, ('inputs', 'targets'))
  if task.shuffle_buffer_size is not None:
    return dataset.shuffle(task.shuffle_buffer_size, seed=seed)
  if not task.source.performs_internal_shuffling:
    raise ValueError(
      f'task {task.name!r} has shuffle_buffer_size=None, and its source does '
      'not shuffle; set a size, such as 1000.'
    )
  return dataset


def _batch_by_length(
  rows: 'tf.data.Dataset', buckets: Sequence[tuple[int, int]], batch_size: int
) -> 'tf.data.Dataset':
  """Returns batches of rows from one length bucket, cut to its lengths."""
  from l2s_jax.data.features import tf

  def bucket_of(row):
    size = [
      tf.reduce_sum(row[f'{half}_segment_ids'])
      for half in ('encoder', 'decoder')
    ]
    has_room = tf.reduce_all(tf.constant(buckets) >= size, axis=1)
    return tf.argmax(tf.cast(has_room, tf.int32))  # The first bucket with room.

  def make_batch(bucket, rows):
    lengths = dict(
      zip(
        ('encoder', 'decoder'),
        tf.unstack(tf.constant(buckets)[bucket]),
        strict=True,
      )
    )

    def cut(batch):
      return {
        key: value[:, : lengths[key.split('_')[0]]]
        if len(value.shape) == 2
        else value
        for key, value in batch.items()
      }

    return rows.batch(batch_size, drop_remainder=True).map(cut)

  return rows.group_by_window(bucket_of, make_batch, window_size=batch_size)


def _check_settings(
  task: 'seqio.Task | seqio.Mixture',
  split: str,
  task_feature_lengths: Mapping[str, int],
) -> None:
  """Refuses missing data, an unknown split, and invalid lengths."""
  from l2s_jax.data.features import seqio

  for part in seqio.get_subtasks(task):
    tasks.check_data(part, split)
  if split not in task.splits:
    raise ValueError(
      f'task {task.name!r} has no split {split!r}; it has '
      f'{", ".join(sorted(task.splits))}.'
    )
  batching.check_lengths(task_feature_lengths)
