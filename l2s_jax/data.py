# SPDX-License-Identifier: Apache-2.0
"""Batches: dicts of numpy arrays on the host, keyed as the models read them.

`encoder_input_tokens` and `encoder_segment_ids` are [batch, prompt length],
`decoder_input_tokens`, `decoder_target_tokens`, `decoder_segment_ids` and
`decoder_loss_weights` (float32, the others int32) [batch, answer length]. A
segment id of 0 is padding. A short batch is filled up with copies of its last
row at weight 0, never with empty rows: attention would have nothing to attend
to, and a decode loop would wait for rows that never write an EOS.

The first half makes batches of token ids and needs no TensorFlow. The second
streams them from a bound SeqIO task. Putting them on devices is not done here.
"""

import functools
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int32

from l2s_jax import tasks
from l2s_jax.vocabularies import Vocabulary

if TYPE_CHECKING:
  import seqio

Batch = dict[str, Int32[np.ndarray, '...'] | Float32[np.ndarray, '...']]


def prompt_batch(
  prompt_ids: Sequence[Sequence[int]],
  *,
  length: int,
  pad_id: int,
  batch_size: int | None = None,
) -> Batch:
  """Returns the encoder's half of a batch.

  Args:
    prompt_ids: EOS included; beyond `length` they are cut, which the caller
      counts if it matters.
    length: of every row, in tokens.
    pad_id: of the prompts' vocabulary.
    batch_size: rows to fill up to; None: as many as there are prompts.

  Raises:
    ValueError: if there are no prompts, more than `batch_size`, or an empty
      one.
  """
  tokens, segment_ids = _pad(prompt_ids, length, pad_id)
  return pad_rows(
    {'encoder_input_tokens': tokens, 'encoder_segment_ids': segment_ids},
    batch_size,
  )


def pad_and_shift(
  prompt_ids: Sequence[Sequence[int]],
  answer_ids: Sequence[Sequence[int]],
  *,
  task_feature_lengths: Mapping[str, int],
  prompt_vocabulary: Vocabulary,
  answer_vocabulary: Vocabulary,
  batch_size: int | None = None,
) -> Batch:
  """Returns a whole batch, the same as SeqIO's of the same ids.

  Args:
    prompt_ids: EOS included; beyond their length they are cut.
    answer_ids: one for each prompt, likewise.
    task_feature_lengths: `inputs` and `targets`, in tokens.
    prompt_vocabulary: for its pad id.
    answer_vocabulary: for its pad and start ids.
    batch_size: rows to fill up to; None: as many as there are prompts.

  Raises:
    ValueError: as `prompt_batch`, or if the numbers differ.
  """
  if len(prompt_ids) != len(answer_ids):
    raise ValueError(
      f'{len(prompt_ids)} prompts and {len(answer_ids)} answers; expected as '
      'many of one as of the other.'
    )
  prompts, prompt_segments = _pad(
    prompt_ids, task_feature_lengths['inputs'], prompt_vocabulary.pad_id
  )
  length, pad_id = task_feature_lengths['targets'], answer_vocabulary.pad_id
  targets, target_segments = _pad(answer_ids, length, pad_id)
  shifted, _ = _pad(
    [[answer_vocabulary.start_id, *ids[:length][:-1]] for ids in answer_ids],
    length,
    pad_id,
  )
  return pad_rows(
    {
      'encoder_input_tokens': prompts,
      'encoder_segment_ids': prompt_segments,
      'decoder_input_tokens': shifted,
      'decoder_target_tokens': targets,
      'decoder_segment_ids': target_segments,
      'decoder_loss_weights': target_segments.astype(np.float32),
    },
    batch_size,
  )


def pad_rows(batch: Batch, batch_size: int | None) -> Batch:
  """Fills a batch up to `batch_size` with its last row, at loss weight 0.

  Raises:
    ValueError: if it has no rows, or more than `batch_size`.
  """
  num_rows = len(next(iter(batch.values())))
  if num_rows == batch_size or batch_size is None:
    return batch
  if not 0 < num_rows < batch_size:
    raise ValueError(
      f'{num_rows} rows do not make a batch of {batch_size}; give at least '
      'one and at most batch_size.'
    )
  rows = np.minimum(np.arange(batch_size), num_rows - 1)
  padded = {key: value[rows] for key, value in batch.items()}
  if 'decoder_loss_weights' in padded:
    padded['decoder_loss_weights'][num_rows:] = 0
  return padded


def _pad(
  sequences: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and segment ids, both [row, length] and int32."""
  tokens = np.full((len(sequences), length), pad_id, np.int32)
  segment_ids = np.zeros_like(tokens)
  for row, ids in enumerate(sequences):
    if not len(ids):
      raise ValueError(
        f'sequence {row} is empty; append the EOS before batching.'
      )
    size = min(len(ids), length)
    tokens[row, :size] = ids[:size]
    segment_ids[row, :size] = 1
  if not len(sequences):
    raise ValueError('no sequences to make a batch of.')
  return tokens, segment_ids


def control_partners(prompts: Sequence[Sequence[int]]) -> list[int]:
  """Returns for each prompt the index of another whose tokens differ.

  Prompts are sorted by length, then index; each takes the next that differs,
  and the last ones wrap around. For prompts `[[5, 1], [7, 8, 1], [6, 1],
  [5, 1]]` the order is 0, 2, 3, 1 and the partners are `[2, 0, 3, 1]`. Computed
  over a whole split, so that batch size and number of hosts change nothing.

  Raises:
    ValueError: if no two prompts differ.
  """
  texts = [tuple(map(int, prompt)) for prompt in prompts]
  if len(set(texts)) < 2:
    raise ValueError(
      f"the control 'other' needs two different prompts; all "
      f'{len(texts)} are the same.'
    )
  order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
  partners = [-1] * len(texts)
  # Backwards, and around twice: whoever comes after an equal prompt has
  # already found the partner of both.
  following = order[0]
  for index in itertools.chain(reversed(order), reversed(order)):
    same = texts[following] == texts[index]
    partners[index] = partners[following] if same else following
    following = index
  return partners


class TaskBatches(Iterator[Batch]):
  """Batches of a task, and what was cut in making them.

  TensorFlow makes batches ahead; the counts are of those returned so far, from
  `start_example` on.

  Attributes:
    num_examples: examples seen, copies that fill up a batch excluded.
    num_truncated_prompts: of these, how many had a longer prompt.
    num_truncated_targets: likewise for the answer.
    close: a function that ends the threads behind the batches, and these.
  """

  def __init__(self, batches: Iterator[Batch], batch_size: int):
    # With a Hugging Face tokenizer TensorFlow's threads run Python, and most
    # often hang the process if the interpreter ends first; so end them before.
    self._iterator = [batches]
    self.close = weakref.finalize(self, self._iterator.clear)
    self._batch_size = batch_size
    self.num_examples = 0
    self.num_truncated_prompts = 0
    self.num_truncated_targets = 0

  def __next__(self) -> Batch:
    if not self._iterator:
      raise StopIteration
    batch = dict(next(self._iterator[0]))
    prompts = batch.pop('encoder_truncated')
    targets = batch.pop('decoder_truncated')
    self.num_examples += len(prompts)
    self.num_truncated_prompts += int(prompts.sum())
    self.num_truncated_targets += int(targets.sum())
    return pad_rows(batch, self._batch_size)


def train_batches(
  task: 'seqio.Task | seqio.Mixture',
  *,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  seed: int,
  split: str = 'train',
  start_example: int = 0,
  num_epochs: int | None = None,
) -> TaskBatches:
  """Returns shuffled batches, the same for the same arguments.

  Each epoch is a fresh order of the whole split (within the task's shuffle
  buffer); a mixture samples from its tasks instead. Batches cross the ends of
  epochs, and an incomplete last one is dropped. Randomness in the task's own
  preprocessors is the same in every epoch, unless it is in a mixture.

  Args:
    task: from `tasks.bind`.
    task_feature_lengths: `inputs` and `targets`, in tokens; longer is cut.
    batch_size: over all devices.
    seed: of the order.
    start_example: how many examples to pass over: those that follow in an
      uninterrupted run come first, whatever the source and the tokenizer. The
      first batch waits until all of them have been read, shuffled and tokenized
      again: on two busy cores 7,000 short sentences a second with T5's
      SentencePiece model, 3,500 with GPT-2's tokenizer.
    num_epochs: None: without end.

  Raises:
    ValueError: if the split or a length is missing, or the task is not bound.
  """
  from l2s_jax import features
  from l2s_jax.features import seqio, tf

  _check_settings(task, split, task_feature_lengths)
  options = {
    'sequence_length': task_feature_lengths,
    'split': split,
    'shuffle': True,
    'seed': seed,
    # SeqIO's cache would keep the order of the first epoch.
    'try_in_mem_cache': False,
  }
  if isinstance(task, seqio.Mixture):
    dataset = task.get_dataset(
      num_epochs=num_epochs,
      passthrough_features=['inputs_length', 'targets_length'],
      **options,
    )
  else:
    # Not SeqIO's num_epochs: it repeats before it shuffles, and mixes epochs.
    dataset = task.get_dataset(num_epochs=1, **options).repeat(num_epochs)
  converter = features.make_converter(task)
  dataset = converter(dataset.skip(start_example), task_feature_lengths)
  dataset = dataset.batch(batch_size, drop_remainder=True)
  return TaskBatches(
    dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator(), batch_size
  )


def eval_batches(
  task: 'seqio.Task | seqio.Mixture',
  *,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  split: str = 'validation',
  num_examples: int | None = None,
) -> TaskBatches:
  """Returns one pass over a split in its own order, task after task.

  Every example is there once, at its weight; the last batch is filled up.

  Args:
    task: from `tasks.bind`; of a mixture, the tasks that have the split.
    task_feature_lengths: `inputs` and `targets`, in tokens; longer is cut.
    batch_size: over all devices.
    split: `validation`, `test`, or another.
    num_examples: the first so many of each task; None: all.

  Raises:
    ValueError: as `train_batches`.
  """
  from l2s_jax import features
  from l2s_jax.features import seqio, tf

  _check_settings(task, split, task_feature_lengths)
  converter = features.make_converter(task)
  datasets = [
    converter(
      part.get_dataset(
        task_feature_lengths, split=split, shuffle=False, num_epochs=1
      ).take(-1 if num_examples is None else num_examples),
      task_feature_lengths,
    )
    for part in seqio.get_subtasks(task)
    if split in part.splits
  ]
  dataset = functools.reduce(lambda one, two: one.concatenate(two), datasets)
  dataset = dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE)
  return TaskBatches(dataset.as_numpy_iterator(), batch_size)


def check_task(
  task: 'seqio.Task | seqio.Mixture',
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
  from l2s_jax.features import seqio

  _check_settings(task, split, task_feature_lengths)
  for part in seqio.get_subtasks(task):
    if split in part.splits:
      part.get_dataset(task_feature_lengths, split=split, shuffle=False)


def _check_settings(
  task: 'seqio.Task | seqio.Mixture',
  split: str,
  task_feature_lengths: Mapping[str, int],
) -> None:
  """Refuses missing data, a missing split, and lengths that are off."""
  from l2s_jax.features import seqio

  for part in seqio.get_subtasks(task):
    tasks.check_data(part, split)
  if split not in task.splits:
    raise ValueError(
      f'task {task.name!r} has no split {split!r}; it has '
      f'{", ".join(sorted(task.splits))}.'
    )
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
