# SPDX-License-Identifier: Apache-2.0
"""Binds a task to a system's vocabularies: what every verb asks of its data.

A task is streamed from a SeqIO task or mixture (`streams.py`) or read from a
cache (`cached/`). Who trains or evaluates sees `BoundTask` and does not ask
which. Nothing here imports TensorFlow; a streamed task does when it is bound, a
cache when it is scored.
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
  """Shuffled batches, and what was cut in making those returned so far."""

  num_examples: int
  num_truncated_prompts: int
  num_truncated_answers: int

  @property
  def close(self) -> Callable[[], Any]:
    """Ends the threads behind the batches, and these."""

  def parts(self) -> Iterator[batching.Part]:
    """Yields this process's part of each batch."""


@runtime_checkable
class BoundTask(Protocol):
  """A task with the vocabularies of a system."""

  @property
  def name(self) -> str:
    """Of the task or mixture."""

  def check_data(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Refuses what could not be read, before anything is computed.

    Raises:
      FileNotFoundError: if data are not there.
      ValueError: for a missing split, lengths that are off, or data that
        cannot be used.
    """

  def check_evaluable(
    self, split: str, task_feature_lengths: Mapping[str, int]
  ) -> None:
    """Refuses what could not be read or scored, before anything is computed.

    Raises:
      FileNotFoundError: as `check_data`.
      ValueError: as `check_data`, and if no task has the split and metrics, or
        metrics are of something else than predictions.
    """

  def metrics_of(self, split: str) -> dict[str, Sequence[Any]]:
    """Returns the metrics of each task that has any and the split, by name."""

  def scored_tasks(self, split: str) -> Sequence['seqio.Task']:
    """Returns the SeqIO tasks that are scored on a split.

    Their examples have ids, lengths before cutting, and columns of text.

    Raises:
      ValueError: if there are none.
    """

  def task_in_order(self, label: str) -> 'seqio.Task':
    """Returns the SeqIO task whose examples are lines of a source, in order.

    Args:
      label: the setting that names the task, for messages.

    Raises:
      ValueError: if there is no such one.
    """

  def llm_states(
    self,
    name: str,
    split: str,
    numbers: Int64[np.ndarray, ' rows'],
    segment_ids: Int32[np.ndarray, 'rows length'],
  ) -> dict[str, np.ndarray]:
    """Returns the LLM's states of prompts where they are cached, or nothing.

    Args:
      name: of one of the tasks that are scored.
      split: of it.
      numbers: of its examples, one a row.
      segment_ids: 1 for the tokens of each prompt, 0 for padding.

    Returns:
      The batch keys that `models/stored_states.py` defines.
    """

  def data_settings(self) -> dict[str, Any]:
    """Returns what the order of training examples depends on, as JSON has it.

    Two runs with the same, and with the same seed and lengths, see the same
    examples in the same order.
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
    """Returns shuffled batches, the same for the same arguments.

    Args:
      task_feature_lengths: `inputs` and `targets`, in tokens; longer is cut.
      batch_size: rows, over all devices.
      seed: of the order.
      pack: whether a row holds several examples, for encoder-decoders.
      length_buckets: as `batching.bucket_lengths` takes them.
      start_row: how many rows an earlier start has trained on.
      position: that of the last part trained on; None: it has none, or this is
        the beginning.
      rows: of each batch, those that this process's devices hold.

    Raises:
      ValueError: for settings that do not fit each other.
    """


def bind(
  name: str,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
  *,
  label: str | None = None,
) -> BoundTask:
  """Returns a task, a mixture or a cache with the vocabularies of a system.

  Args:
    name: as `tasks.bind` takes it, or `cached`, with or without a gin scope
      before it, such as `news/cached`.
    prompt_vocabulary: of the prompts; those of a cache have its ids already.
    answer_vocabulary: the same for the answers.
    label: the setting that has the name, for messages; None:
      MIXTURE_OR_TASK_NAME.

  Raises:
    FileNotFoundError: if there is no whole cache.
    ValueError: if there is no such task, or a cache is of other tokenizers.
  """
  if is_cached(name):
    return cache_task.bind(name, prompt_vocabulary, answer_vocabulary)
  # Imports TensorFlow where it is called; the core does without.
  return streams.bind(name, prompt_vocabulary, answer_vocabulary, label=label)


def is_cached(name: str) -> bool:
  """Returns whether a task's name stands for a cache."""
  return name.rpartition('/')[2] == 'cached'


def features_of(name: str) -> feature_format.FeatureCache | None:
  """Returns the features that gin asks for of a task; None: of none.

  Args:
    name: as for `bind`.

  Raises:
    FileNotFoundError: if there is no whole cache, or there are no features.
    ValueError: if something of them is damaged.
  """
  return cache_task.features_of(name) if is_cached(name) else None
