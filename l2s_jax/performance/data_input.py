# SPDX-License-Identifier: Apache-2.0
"""Input of `benchmark --data`: the first examples of a task, set by gin."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import gin

from l2s_jax.caching import cache_texts
from l2s_jax.data import tasks
from l2s_jax.performance import timing
from l2s_jax.runtime import gin_config
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio

# The fraction 1 / _FEW of all batches counts as few.
_FEW = 8


@gin.configurable('DataInput', module='l2s_jax')
@dataclasses.dataclass(frozen=True)
class DataInput:
  """Input of `benchmark --data`.

  Attributes:
    model: the system whose tokenizers are used.
    mixture_or_task_name: a task; for a mixture, one of its tasks.
    task_feature_lengths: maximum tokens of 'inputs' and 'targets' for batches
      made without a cache.
    split: split of the task.
    num_examples: number of tokenized examples, or all if there are fewer. As
      many are read from the caches.
    batch_size: global batch size.
    lengths: prompt and answer length, in tokens, of each cache to read.
    process_counts: numbers of processes that share a batch.
  """

  model: system_lib.System
  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  split: str = 'train'
  num_examples: int = 16_384
  batch_size: int = 1024
  lengths: Sequence[tuple[int, int]] = ((30, 30), (128, 128), (512, 128))
  process_counts: Sequence[int] = (1, 2, 4)

  def check(self) -> None:
    """Validates the settings.

    Raises:
      ValueError: names the setting.
    """
    gin_config.check_positive(
      DATA_EXAMPLES=self.num_examples, BATCH_SIZE=self.batch_size
    )
    for number in self.process_counts:
      gin_config.check_positive(DATA_PROCESSES=number)
      if number > self.batch_size:
        raise ValueError(
          f'DATA_PROCESSES={number}: each process needs at least one of the '
          f'BATCH_SIZE={self.batch_size} rows.'
        )
    for pair in self.lengths:
      if len(pair) != 2 or min(pair) < 2:
        raise ValueError(
          f'DATA_LENGTHS={self.lengths!r}: expected pairs of prompt length and '
          'answer length, at least 2 tokens each, such as ((30, 30), (128, '
          '128)).'
        )


@dataclasses.dataclass(frozen=True)
class OpenedInput:
  """An opened task, and the number of examples to time.

  Attributes:
    given: the settings.
    task: the task, bound to the vocabularies.
    texts: its examples.
    vocabularies: vocabularies of prompts and answers.
    size: number of timed examples, in whole batches.
  """

  given: DataInput
  task: 'seqio.Task'
  texts: cache_texts.Texts
  vocabularies: tuple[base.Vocabulary, base.Vocabulary]
  size: timing.Size

  @functools.cached_property
  def sample(self) -> cache_texts.Chunk:
    """The timed examples, as the task yields them."""
    return self.texts.sample(self.size.all)

  @functools.cached_property
  def decoded(self) -> dict[str, list[str]]:
    """Their texts, by 'inputs' and 'targets'."""
    return {
      key: [text.decode() for text in self.sample[key]]
      for key in ('inputs', 'targets')
    }

  @functools.cached_property
  def ids(self) -> list[list[list[int]]]:
    """Their token ids without EOS: of prompts, and of answers."""
    return [
      vocabulary.encode_batch(texts)
      for vocabulary, texts in zip(
        self.vocabularies, self.decoded.values(), strict=True
      )
    ]


def open_input(given: DataInput) -> OpenedInput:
  """Opens the task without reading examples.

  Raises:
    FileNotFoundError: if its data are missing.
    ValueError: if it is a mixture or a cache, has preprocessors that tokenize,
      or has fewer than two batches.
  """
  from l2s_jax.data.features import seqio

  name = given.mixture_or_task_name
  vocabularies = given.model.prompt_vocabulary, given.model.answer_vocabulary
  task = tasks.bind(name, *vocabularies)
  if isinstance(task, seqio.Mixture):
    parts = ', '.join(part.name for part in seqio.get_subtasks(task))
    raise ValueError(
      f'--data times one task, but {name!r} is a mixture. Set '
      f'MIXTURE_OR_TASK_NAME to one of its tasks: {parts}.'
    )
  texts = cache_texts.Texts(task, given.split, given.task_feature_lengths)
  for key in ('inputs', 'targets'):
    if texts.columns[key]['dtype'] != 'string':
      raise ValueError(
        f"{texts.label}: the task's own preprocessors tokenize {key}, so there "
        'is nothing to time. Give a task of text.'
      )
  num_batches = min(given.num_examples, texts.num_examples) // given.batch_size
  if num_batches < 2:
    raise ValueError(
      f'{texts.label} has {texts.num_examples:,} examples, of which '
      f'DATA_EXAMPLES={given.num_examples} are read; timing needs two batches: '
      f'set BATCH_SIZE={given.batch_size} lower.'
    )
  few = max(1, num_batches // _FEW) * given.batch_size
  size = timing.Size(few, num_batches * given.batch_size)
  return OpenedInput(given, task, texts, vocabularies, size)
