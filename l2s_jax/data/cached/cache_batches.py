# SPDX-License-Identifier: Apache-2.0
"""Batches from a cache: each process reads its own rows of each batch.

The order of examples (`order.py`) and their rows (`plans.py`) are functions of
the seed and the length index. Threads read and lay out the rows of this process
ahead of training. No TensorFlow is needed.
"""

import collections
import concurrent.futures
import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from l2s_jax.data import batching, packing
from l2s_jax.data.cached import cache_format, feature_format, plans
from l2s_jax.data.cached import order as order_lib
from l2s_jax.vocabularies import base

# Number of reader threads, which mostly wait for the disk.
_NUM_READERS = 4
# Number of prefetched batches.
_NUM_AHEAD = 8


def train_batches(
  order: order_lib.Order,
  splits: Sequence[cache_format.Split],
  *,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  pack: bool = False,
  length_buckets: batching.LengthBuckets = (),
  position: plans.Position | None = None,
  rows: Int64[np.ndarray, ' rows'] | None = None,
  num_epochs: int | None = None,
  features: Sequence[feature_format.Features] = (),
) -> 'CachedBatches':
  """Returns shuffled batches; equal arguments give equal batches.

  Each epoch is a new permutation of the whole split; batches cross epoch
  boundaries. A mixture interleaves its tasks by their rates, each with its own
  epochs.

  Args:
    order: order of the examples.
    splits: splits of the order's tasks, in its numbering.
    prompt_vocabulary: vocabulary of the prompt ids.
    answer_vocabulary: vocabulary of the answer ids.
    task_feature_lengths: lengths of `inputs` and `targets`, in tokens. Longer
      sequences are cut.
    batch_size: number of rows over all devices.
    pack: whether a row holds several examples; for encoder-decoders.
    length_buckets: see `batching.bucket_lengths`.
    position: position to resume from; None: the beginning.
    rows: indices of this process's rows in each batch; None: all.
    num_epochs: number of epochs; None: unlimited, as for all mixtures.
    features: LLM features to add to the batches, one per split; or none.

  Raises:
    ValueError: for invalid buckets.
  """
  num_examples = None
  if num_epochs is not None:
    (size,) = order.sizes.values()
    num_examples = num_epochs * size
  room = task_feature_lengths['inputs'], task_feature_lengths['targets']
  plan: Any = plans.packed if pack else plans.one_by_one
  lengths: Any = room
  if length_buckets:
    plan = plans.by_length
    lengths = batching.bucket_lengths(task_feature_lengths, length_buckets)
  return CachedBatches(
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
    prompt_vocabulary,
    answer_vocabulary,
    features,
  )


class CachedBatches(Iterator[batching.Part]):
  """Iterator over prefetched parts of batches, with counts of truncations.

  The counts cover the rows of all processes in the batches returned so far.

  Attributes:
    num_examples: number of examples.
    num_truncated_prompts: number of these with a truncated prompt.
    num_truncated_answers: number of these with a truncated answer.
    close: function that stops the threads.
  """

  def __init__(
    self,
    splits: Sequence[cache_format.Split],
    planned: Iterator[plans.BatchPlan],
    room: tuple[int, int],
    rows: Int64[np.ndarray, ' rows'],
    batch_size: int,
    prompt_vocabulary: base.Vocabulary,
    answer_vocabulary: base.Vocabulary,
    features: Sequence[feature_format.Features] = (),
  ):
    """Starts the threads.

    Args:
      splits: splits of the tasks, in the plans' numbering.
      planned: plans of the batches.
      room: maximum lengths of prompt and answer, in tokens.
      rows: indices of this process's rows in each batch.
      batch_size: number of rows over all processes.
      prompt_vocabulary: vocabulary of the prompt ids.
      answer_vocabulary: vocabulary of the answer ids.
      features: features of the splits, or none.
    """
    self.num_examples = 0
    self.num_truncated_prompts = 0
    self.num_truncated_answers = 0
    self._room = room
    self._planned = planned
    self._maker = _Maker(
      splits,
      features,
      rows,
      batch_size,
      prompt_pad_id=prompt_vocabulary.pad_id,
      answer_pad_id=answer_vocabulary.pad_id,
      start_id=answer_vocabulary.start_id,
    )
    # The planner is sequential: one thread.
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
    with contextlib.ExitStack() as failed:  # Damaged batches are not skipped.
      failed.callback(self.close)
      part = made.result()
      failed.pop_all()
    if part is None:
      self.close()
      raise StopIteration
    cut = plan.result().stretch.lengths > self._room
    self.num_examples += part.num_examples
    self.num_truncated_prompts += int(cut[:, 0].sum())
    self.num_truncated_answers += int(cut[:, 1].sum())
    return part

  def parts(self) -> Iterator[batching.Part]:
    """Returns itself: its items are parts."""
    return self


class _Maker:
  """Maker of a process's rows: reads records and lays them out."""

  def __init__(
    self,
    splits: Sequence[cache_format.Split],
    features: Sequence[feature_format.Features],
    rows: Int64[np.ndarray, ' rows'],
    batch_size: int,
    **ids: int,
  ):
    self._rows = rows
    self._batch_size = batch_size
    self._splits = splits
    self._features = features
    self._own = threading.local()
    self._ids = ids

  def make(self, plan: plans.BatchPlan) -> batching.Part:
    """Returns this process's part of a planned batch."""
    cut = np.minimum(plan.stretch.lengths, plan.lengths)
    own = np.searchsorted(self._rows, plan.rows)
    own = np.minimum(own, len(self._rows) - 1)
    is_own = self._rows[own] == plan.rows
    stretch = plan.stretch.take(is_own)
    ids = [
      cache_format.decode_ids(record, self._splits[number].dtype)
      for number, record in zip(
        stretch.tasks, self._read('tokens', stretch), strict=True
      )
    ]
    batch = packing.lay_out(
      [prompt[: plan.lengths[0]] for prompt, _ in ids],
      [answer[: plan.lengths[1]] for _, answer in ids],
      own[is_own],
      task_feature_lengths=dict(
        zip(('inputs', 'targets'), plan.lengths, strict=True)
      ),
      **self._ids,
    )
    if self._features:
      batch |= feature_format.lay_out(
        [
          self._features[number].decode(record).cut(plan.lengths[0])
          for number, record in zip(
            stretch.tasks, self._read('features', stretch), strict=True
          )
        ],
        batch['encoder_segment_ids'],
        own[is_own],
        like=self._features[0],
      )
    return batching.Part(
      batch,
      self._rows,
      self._batch_size,
      num_examples=len(cut),
      num_prompt_tokens=int(cut[:, 0].sum()),
      position=plan.position,
    )

  def _read(self, kind: str, stretch: plans.Stretch) -> list[bytes]:
    """Returns the record of each example; `kind` is 'tokens' or 'features'."""
    if not hasattr(self._own, 'splits'):  # A reader has a file position.
      self._own.splits = {
        'tokens': [split.reopened() for split in self._splits],
        'features': [split.reopened() for split in self._features],
      }
    found = [b''] * len(stretch.tasks)
    for number, split in enumerate(self._own.splits[kind]):
      places = np.flatnonzero(stretch.tasks == number)
      records = split.read(stretch.examples[places].tolist())
      for place, record in zip(places.tolist(), records, strict=True):
        found[place] = record
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
  """Returns the examples in a range of an order, with their lengths."""
  tasks, examples = order.at(start, stop)
  lengths = np.zeros((len(tasks), 2), np.int64)
  for number, split in enumerate(splits):
    own = np.flatnonzero(tasks == number)
    lengths[own] = split.lengths_of(examples[own])
  return plans.Stretch(tasks, examples, lengths)
