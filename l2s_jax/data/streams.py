# SPDX-License-Identifier: Apache-2.0
"""Streams batches from a SeqIO task or mixture that is bound to a system."""

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

# Examples, where batches do not say.
_TOKENIZED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class StreamedTask:
  """A SeqIO task or mixture as a `bound_tasks.BoundTask`.

  Attributes:
    provider: from `tasks.bind`.
    bound_as: the name that it was bound by.
  """

  provider: 'seqio.Task | seqio.Mixture'
  bound_as: str

  @property
  def name(self) -> str:
    """Of the task or mixture."""
    return self.provider.name

  def check_data(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Opens the split's files; reads and checks local ones to their end.

    Raises:
      FileNotFoundError: if a data set, a cache or a file is not there.
      ValueError: for a split that the task does not have, lengths that are off,
        or what a source or a preprocessor refuses.
    """
    from l2s_jax.data.features import seqio

    _check_settings(self.provider, split, task_feature_lengths)
    for part in seqio.get_subtasks(self.provider):
      if split in part.splits:
        part.get_dataset(task_feature_lengths, split=split, shuffle=False)

  def check_evaluable(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Refuses a split that cannot be read or scored."""
    self.check_data(split, task_feature_lengths)
    self.scored_tasks(split)

  def metrics_of(self, split: str) -> dict[str, Sequence[Any]]:
    """Returns the metrics of each task that has any and the split, by name."""
    return {
      part.name: part.predict_metric_fns for part in self._with_metrics(split)
    }

  def scored_tasks(self, split: str) -> 'list[seqio.Task]':
    """Returns the tasks that have the split and metrics.

    Raises:
      ValueError: if none has, or metrics are of something else than
        predictions.
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
          'those of (targets, predictions) can be evaluated.'
        )
    return scored

  def task_in_order(self, label: str) -> 'seqio.Task':
    """Returns the task; of a mixture, examples have no order of lines.

    Args:
      label: the setting that names the task, for messages.

    Raises:
      ValueError: if it is a mixture.
    """
    parts = getattr(self.provider, 'tasks', None)
    if parts is not None:
      raise ValueError(
        f'{label} is a mixture, which draws its examples at random; answer '
        'its tasks one by one: '
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
    """Returns nothing: the LLM reads what is streamed."""
    del name, split, numbers, segment_ids
    return {}

  def data_settings(self) -> dict[str, Any]:
    """Returns what the training examples depend on, as JSON has it."""
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
    """Returns whole batches, which every process makes; see `train_batches`."""
    del position, rows
    if jax.process_count() > 1:
      distributed.say_once(
        f'Each of the {jax.process_count()} processes reads and tokenizes all '
        f'{batch_size} rows of a batch, {jax.process_count()} times the work '
        'of one. The verb `cache` does it once, and each process then reads '
        'its own rows: see gin_configs/tasks/cached.gin.'
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
  """Returns what `tasks.bind` makes of a name, to be streamed."""
  return StreamedTask(
    tasks.bind(name, prompt_vocabulary, answer_vocabulary, label=label), name
  )


class TaskBatches(Iterator[batching.Batch]):
  """Batches of a task, and what was cut in making them.

  TensorFlow makes batches ahead; the counts are of those returned so far, from
  `start_row` on.

  Attributes:
    num_examples: examples seen, copies that fill up a batch excluded.
    num_truncated_prompts: of these, how many had a longer prompt.
    num_truncated_answers: likewise for the answer.
    close: a function that ends the threads behind the batches, and these.
  """

  def __init__(self, batches: Iterator[batching.Batch], batch_size: int):
    # With a Hugging Face tokenizer TensorFlow's threads run Python, and most
    # often hang the process if the interpreter ends first; so end them before.
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
    """Yields them as parts, with all rows in each."""
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
  """Returns shuffled batches, the same for the same arguments.

  Each epoch is a fresh order of the whole split (within the task's shuffle
  buffer); a mixture samples from its tasks instead. Batches cross the ends of
  epochs, and an incomplete last one is dropped. Randomness in the task's own
  preprocessors is the same in every epoch, unless it is in a mixture.

  Padding costs as much as what is trained on. There is less of it with `pack`,
  where a row holds as many examples as fit, or with `length_buckets`, where the
  examples of a batch are of like length; one that is rare waits until its batch
  is full.

  Args:
    task: from `tasks.bind`.
    task_feature_lengths: `inputs` and `targets`, in tokens; longer is cut.
    batch_size: rows, over all devices.
    seed: of the order.
    split: `train`, or another.
    pack: whether a row holds several examples, for encoder-decoders.
    length_buckets: as `batching.bucket_lengths` takes them.
    start_row: how many rows to pass over: those that follow in an uninterrupted
      run come first, whatever the source and the tokenizer. The first batch
      waits until all of them have been read and shuffled again, 100,000 short
      sentences a second on a busy core, and with `pack` or `length_buckets`
      until they have been tokenized, too.
    num_epochs: None: without end.

  Raises:
    ValueError: if the split or a length is missing, or the task is not bound;
      for buckets that are none, or with a `start_row` within a batch.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import tf

  _check_settings(task, split, task_feature_lengths)
  buckets = batching.bucket_lengths(task_feature_lengths, length_buckets)
  converter = features.make_converter(task, pack=pack)
  if length_buckets and start_row % batch_size:
    raise ValueError(
      f'start_row={start_row} is in the middle of a batch of {batch_size}; '
      'with length_buckets only whole batches can be passed over.'
    )

  def rows(texts: 'tf.data.Dataset', size: int) -> 'tf.data.Dataset':
    """Returns the rows of examples, of which so many are tokenized at once."""

    def convert(batch: dict[str, Any]) -> dict[str, 'tf.Tensor']:
      batch = features.batch_of_ids(
        batch, task.output_features, task_feature_lengths
      )
      return converter.convert(batch, task_feature_lengths)

    # Where rows are examples these are the batches: the last one is whole, too.
    are_batches = not (pack or length_buckets)
    return texts.ragged_batch(size, drop_remainder=are_batches).map(
      convert, num_parallel_calls=tf.data.AUTOTUNE
    )

  texts = _shuffled_texts(task, split, task_feature_lengths, seed, num_epochs)
  if length_buckets:
    dataset = rows(texts, _TOKENIZED_AT_ONCE).unbatch()
    dataset = _batch_by_length(dataset, buckets, batch_size)
    dataset = dataset.skip(start_row // batch_size)
  elif pack:
    dataset = rows(texts, packing.WINDOW).unbatch().skip(start_row)
    dataset = dataset.batch(batch_size, drop_remainder=True)
  else:  # What is passed over is not tokenized.
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
  """Returns `inputs` and `targets` in the order of training, not yet as ids.

  The order is that of SeqIO's `get_dataset`, whose shuffling does not look at
  what it shuffles. Where only some tasks of a mixture tokenize amid their other
  steps, all of them give ids.
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
    # SeqIO's num_epochs repeats before it shuffles, which mixes epochs.
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
  """Returns what some preprocessors make of a task's examples, shuffled."""
  task = task.replace(preprocessors=steps)
  dataset = task.source.get_dataset(split=split, shuffle=True, seed=seed)
  dataset = task.preprocess_precache(dataset, seed=seed).repeat(num_epochs)
  dataset = task.preprocess_postcache(
    dataset, sequence_length=task_feature_lengths, seed=seed
  ).map(lambda example: {key: example[key] for key in ('inputs', 'targets')})
  if task.shuffle_buffer_size is not None:
    return dataset.shuffle(task.shuffle_buffer_size, seed=seed)
  if not task.source.performs_internal_shuffling:
    raise ValueError(
      f'task {task.name!r} has shuffle_buffer_size=None, and its source does '
      'not shuffle; give it a size, such as 1000.'
    )
  return dataset


def _batch_by_length(
  rows: 'tf.data.Dataset', buckets: Sequence[tuple[int, int]], batch_size: int
) -> 'tf.data.Dataset':
  """Returns batches of rows that fit the same lengths, cut to these."""
  from l2s_jax.data.features import tf

  def bucket_of(row):
    size = [
      tf.reduce_sum(row[f'{half}_segment_ids'])
      for half in ('encoder', 'decoder')
    ]
    has_room = tf.reduce_all(tf.constant(buckets) >= size, axis=1)
    return tf.argmax(tf.cast(has_room, tf.int32))  # The first that has.

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
  """Refuses missing data, a missing split, and lengths that are off."""
  from l2s_jax.data.features import seqio

  for part in seqio.get_subtasks(task):
    tasks.check_data(part, split)
  if split not in task.splits:
    raise ValueError(
      f'task {task.name!r} has no split {split!r}; it has '
      f'{", ".join(sorted(task.splits))}.'
    )
  batching.check_lengths(task_feature_lengths)
