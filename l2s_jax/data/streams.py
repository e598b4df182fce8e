# SPDX-License-Identifier: Apache-2.0
"""Streams batches from a bound SeqIO task, in training and in evaluation."""

import functools
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from l2s_jax.data import batching, packing, seqio_internals, tasks
from l2s_jax.data.cached import cache_task

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

LengthBuckets = Sequence[Sequence[int]]

# Examples, where batches do not say.
_TOKENIZED_AT_ONCE = 256


class TaskBatches(Iterator[batching.Batch]):
  """Batches of a task, and what was cut in making them.

  TensorFlow makes batches ahead; the counts are of those returned so far, from
  `start_row` on.

  Attributes:
    num_examples: examples seen, copies that fill up a batch excluded.
    num_truncated_prompts: of these, how many had a longer prompt.
    num_truncated_targets: likewise for the answer.
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
    self.num_truncated_targets = 0

  def __next__(self) -> batching.Batch:
    if not self._iterator:
      raise StopIteration
    from l2s_jax.data import features

    with features.plain_errors():
      batch = dict(next(self._iterator[0]))
    prompts = batch.pop('encoder_truncated')
    targets = batch.pop('decoder_truncated')
    self.num_examples += int(batch['encoder_segment_ids'].max(axis=1).sum())
    self.num_truncated_prompts += int(prompts.sum())
    self.num_truncated_targets += int(targets.sum())
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
  length_buckets: LengthBuckets = (),
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
    length_buckets: as `bucket_lengths` takes them.
    start_row: how many rows to pass over: those that follow in an uninterrupted
      run come first, whatever the source and the tokenizer. The first batch
      waits until all of them have been read, shuffled and tokenized again: on
      two busy cores 7,000 short sentences a second with T5's SentencePiece
      model, 3,500 with GPT-2's tokenizer.
    num_epochs: None: without end.

  Raises:
    ValueError: if the split or a length is missing, or the task is not bound;
      for buckets that are none, or with a `start_row` within a batch.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import tf

  _check_settings(task, split, task_feature_lengths)
  buckets = bucket_lengths(task_feature_lengths, length_buckets)
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


def bucket_lengths(
  task_feature_lengths: Mapping[str, int], length_buckets: LengthBuckets
) -> list[tuple[int, int]]:
  """Returns the lengths, of prompt and answer, that batches may have.

  Args:
    task_feature_lengths: `inputs` and `targets`, in tokens: the last bucket.
    length_buckets: the others, such as `((16, 24), (32, 40))`. An example goes
      to the first that has room for both its prompt and its answer.

  Raises:
    ValueError: if they do not grow.
  """
  last = task_feature_lengths['inputs'], task_feature_lengths['targets']
  buckets = [*length_buckets, last]
  are_lengths = all(
    len(bucket) == 2
    and all(isinstance(length, int) and length > 0 for length in bucket)
    for bucket in buckets
  )
  if not are_lengths or any(
    shorter == longer or shorter[0] > longer[0] or shorter[1] > longer[1]
    for shorter, longer in itertools.pairwise(buckets)
  ):
    raise ValueError(
      f'LENGTH_BUCKETS={length_buckets!r}: expected pairs of lengths, in '
      'tokens of prompt and answer, none shorter than those before it and all '
      f'below TASK_FEATURE_LENGTHS, {last}; such as ((16, 24), (32, 40)).'
    )
  return [(prompt, answer) for prompt, answer in buckets]


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


def check_task(
  task: 'seqio.Task | seqio.Mixture | cache_task.CachedTask',
  split: str,
  task_feature_lengths: Mapping[str, int],
) -> None:
  """Refuses what could not be read, before anything is computed.

  The split's files are opened; local ones are read and checked to their end.

  Raises:
    FileNotFoundError: if a data set, a cache or a file is not there.
    ValueError: for a split that the task does not have, lengths that are off,
      or what a source or a preprocessor refuses.
  """
  if isinstance(task, cache_task.CachedTask):
    _check_lengths(task_feature_lengths)
    task.order(split, seed=0)
    return
  from l2s_jax.data.features import seqio

  _check_settings(task, split, task_feature_lengths)
  for part in seqio.get_subtasks(task):
    if split in part.splits:
      part.get_dataset(task_feature_lengths, split=split, shuffle=False)


def check_evaluable(
  task: 'seqio.Task | seqio.Mixture | cache_task.CachedTask', split: str
) -> list[Any]:
  """Returns the tasks that can be scored, before anything is computed.

  Of a cache they are names.

  Raises:
    ValueError: if no task has the split and metrics, or metrics are of
      something else than predictions.
  """
  if isinstance(task, cache_task.CachedTask):
    return task.scored(split)
  from l2s_jax.data.features import seqio

  parts = seqio.get_subtasks(task)
  scored = [part for part in parts if part.metric_objs and split in part.splits]
  if not scored:
    found = '; '.join(
      f'{part.name} has splits {", ".join(part.splits)} and '
      f'{len(part.metric_objs)} metrics'
      for part in parts
    )
    raise ValueError(
      f'nothing to evaluate in split {split!r} of {task.name!r}: {found}.'
    )
  for part in scored:
    kinds = {metric.model_output_type.name for metric in part.metric_objs}
    if kinds != {'PREDICTION'}:
      raise ValueError(
        f'task {part.name!r} has metrics of {", ".join(sorted(kinds))}; only '
        'those of (targets, predictions) can be evaluated.'
      )
  return scored


def metrics_of(
  task: 'seqio.Task | seqio.Mixture | cache_task.CachedTask', split: str
) -> dict[str, Sequence[Any]]:
  """Returns the metrics of each task that has any and the split, by name."""
  if isinstance(task, cache_task.CachedTask):
    return {name: task.metric_fns[name] for name in task.scored(split)}
  from l2s_jax.data.features import seqio

  return {
    part.name: part.predict_metric_fns
    for part in seqio.get_subtasks(task)
    if part.metric_objs and split in part.splits
  }


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
  _check_lengths(task_feature_lengths)


def _check_lengths(task_feature_lengths: Mapping[str, int]) -> None:
  """Refuses lengths that are off."""
  if set(task_feature_lengths) != {'inputs', 'targets'}:
    raise ValueError(
      f'TASK_FEATURE_LENGTHS has {", ".join(task_feature_lengths)}; expected '
      'inputs and targets, in tokens.'
    )
  for name, length in task_feature_lengths.items():
    if not isinstance(length, int) or length < 1:
      raise ValueError(
        f'TASK_FEATURE_LENGTHS has {name}={length!r}; expected a positive '
        'number of tokens.'
      )
