# SPDX-License-Identifier: Apache-2.0
"""Bound tasks: a task with a system's vocabularies, the data API of all verbs.

A task is streamed from a SeqIO task or mixture (`streams.py`) or read from a
token cache (`cached/`). Training and evaluation use the protocol `BoundTask`
for both. This module does not import TensorFlow; binding a streamed task does,
and so does scoring a cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from l2s_jax.data import batching, streams
from l2s_jax.data.cached import cache_task, feature_format
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio


@runtime_checkable
class TrainBatches(Protocol):
  """Shuffled batches, with counts over the batches returned so far."""

  num_examples: int
  num_truncated_prompts: int
  num_truncated_answers: int

  @property
  def close(self) -> Callable[[], Any]:
    """Function that stops the background threads and ends the iteration."""

  def parts(self) -> Iterator[batching.Part]:
    """Yields this process's part of each batch."""


@runtime_checkable
class BoundTask(Protocol):
  """A task with the vocabularies of a system."""

  @property
  def name(self) -> str:
    """Name of the task or mixture."""

  def check_data(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Validates split, lengths and data before any computation.

    Raises:
      FileNotFoundError: if data are missing.
      ValueError: for a missing split, invalid lengths, or unusable data.
    """

  def check_evaluable(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Validates split, lengths, data and metrics before any computation.

    Raises:
      FileNotFoundError: as `check_data`.
      ValueError: as `check_data`; if no task has both the split and metrics; or
        if a metric does not take predictions.
    """

  def metrics_of(self, split: str) -> dict[str, Sequence[Any]]:
    """Returns the metrics of each task with the split, by task name.

    Tasks without metrics are left out.
    """

  def scored_tasks(self, split: str) -> Sequence['seqio.Task']:
    """Returns the SeqIO tasks that are scored on a split.

    Their examples have ids, lengths before cutting, and text columns.

    Raises:
      ValueError: if there are none.
    """

  def task_in_order(self, label: str) -> 'seqio.Task':
    """Returns the single SeqIO task, with examples in source order.

    Args:
      label: the setting that names the task, for error messages.

    Raises:
      ValueError: for a mixture, which has no source order.
    """

  def llm_states(
    self,
    name: str,
    split: str,
    numbers: Int64[np.ndarray, ' rows'],
    segment_ids: Int32[np.ndarray, 'rows length'],
  ) -> dict[str, np.ndarray]:
    """Returns the cached LLM states of prompts, or an empty dict.

    Args:
      name: name of a scored task.
      split: split of this task.
      numbers: index of each row's example in the split.
      segment_ids: 1 for the tokens of each prompt, 0 for padding.

    Returns:
      The batch keys of `models/stored_states.py`.
    """

  def data_settings(self) -> dict[str, Any]:
    """Returns the settings that determine the order of training examples.

    The result is JSON-serializable. Two runs with equal settings, seed and
    lengths see the same examples in the same order.
    """

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
  ) -> TrainBatches:
    """Returns shuffled batches; equal arguments give equal batches.

    Args:
      task_feature_lengths: lengths of `inputs` and `targets`, in tokens. Longer
        sequences are cut.
      batch_size: number of rows over all devices.
      seed: seed of the shuffle order.
      pack: whether a row holds several examples; for encoder-decoders.
      length_buckets: see `batching.bucket_lengths`.
      start_row: number of rows that the run has already trained on.
      position: `position` of the last trained part. None: the run has none, or
        starts from the beginning.
      rows: indices of this process's rows in each batch.

    Raises:
      ValueError: for settings that contradict each other.
    """


def bind(
  name: str,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
  *,
  label: str | None = None,
) -> BoundTask:
  """Binds a task, a mixture or a cache to the vocabularies of a system.

  Args:
    name: name for `tasks.bind`, or `cached`, optionally with a gin scope, such
      as `news/cached`.
    prompt_vocabulary: vocabulary of the prompts. A cache must hold its ids.
    answer_vocabulary: the same for the answers.
    label: the setting that holds the name, for error messages. None:
      MIXTURE_OR_TASK_NAME.

  Raises:
    FileNotFoundError: if the cache is missing or incomplete.
    ValueError: if there is no such task, or the cache has other tokenizers.
  """
  if is_cached(name):
    return cache_task.bind(name, prompt_vocabulary, answer_vocabulary)
  # This call imports TensorFlow; the module does not.
  return streams.bind(name, prompt_vocabulary, answer_vocabulary, label=label)


def is_cached(name: str) -> bool:
  """Returns whether a task name refers to a cache."""
  return name.rpartition('/')[2] == 'cached'


def features_of(name: str) -> feature_format.FeatureCache | None:
  """Returns the LLM features that gin requests for a task, or None.

  Args:
    name: as for `bind`.

  Raises:
    FileNotFoundError: if the cache is incomplete or missing, or has no
      features.
    ValueError: if the cache or its features are damaged.
  """
  return cache_task.features_of(name) if is_cached(name) else None
