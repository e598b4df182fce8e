# SPDX-License-Identifier: Apache-2.0
"""Settings of training batches: lengths, packing, order."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from l2s_jax.data import batching, bound_tasks
from l2s_jax.models import l2s, language_model
from l2s_jax.runtime import gin_config, partitioning
from l2s_jax.training import hooks as hooks_lib
from l2s_jax.training import optim


@dataclasses.dataclass(frozen=True)
class TrainData:
  """Settings of training batches.

  Attributes:
    task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer).
    batch_size: rows per step, over all devices.
    seed: seed of the data order.
    pack: whether to pack several examples into a row.
    length_buckets: as in `batching.bucket_lengths`.
  """

  task_feature_lengths: Mapping[str, int]
  batch_size: int
  seed: int
  pack: bool
  length_buckets: batching.LengthBuckets

  def __post_init__(self):
    """Validates the settings.

    Raises:
      ValueError: names the setting.
    """
    gin_config.check_positive(BATCH_SIZE=self.batch_size)
    gin_config.check_lengths(self.task_feature_lengths)
    gin_config.check_between(0, gin_config.LARGEST, SEED=self.seed)
    batching.bucket_lengths(self.task_feature_lengths, self.length_buckets)
    if self.pack and self.length_buckets:
      raise ValueError(
        f'PACK=True and LENGTH_BUCKETS={self.length_buckets!r}: all packed '
        'rows have the same length. Set PACK=False or LENGTH_BUCKETS=().'
      )

  def check_model(
    self, module: l2s.LlmToSlm | language_model.LanguageModel
  ) -> None:
    """Checks that the model can read packed rows.

    Raises:
      ValueError: if a decoder-only model would read a packed row as one text.
    """
    if not self.pack:
      return
    if isinstance(module, l2s.LlmToSlm):
      configs = {'the LLM': module.llm_config, 'the SLM': module.slm_config}
    else:
      configs = {'the model': module.config}
    names = [
      name for name, config in configs.items() if not config.is_encoder_decoder
    ]
    if names:
      raise ValueError(
        'PACK=True, but a decoder-only model reads a row as one text: '
        f'{" and ".join(names)}. Set PACK=False; LENGTH_BUCKETS also reduces '
        'padding.'
      )

  def batch_shapes(self) -> list[tuple[int, int, int]]:
    """Returns all batch shapes: rows, prompt length, answer length."""
    buckets = batching.bucket_lengths(
      self.task_feature_lengths, self.length_buckets
    )
    return [(self.batch_size, *lengths) for lengths in buckets]

  def run_kind(
    self, name: str, task: bound_tasks.BoundTask, optimizer: optim.Optimizer
  ) -> dict[str, Any]:
    """Returns JSON-serialisable settings that must not change within a run.

    The position in the data and the optimizer's slots depend on them.

    Args:
      name: MIXTURE_OR_TASK_NAME.
      task: the task of that name.
      optimizer: of the run.
    """
    return {
      'task': name,
      'data': task.data_settings(),
      'seed': self.seed,
      'task_feature_lengths': dict(self.task_feature_lengths),
      'optimizer': optimizer.description,
      'pack': self.pack or None,
      # With buckets, batch boundaries in the data also depend on the batch
      # size.
      'length_buckets': {
        'lengths': [list(bucket) for bucket in self.length_buckets],
        'batch_size': self.batch_size,
      }
      if self.length_buckets
      else None,
    }

  def batches(
    self,
    task: bound_tasks.BoundTask,
    loop: hooks_lib.Loop,
    mesh: jax.sharding.Mesh,
  ) -> bound_tasks.TrainBatches:
    """Returns the training batches from the run's position on."""
    return task.train_batches(
      task_feature_lengths=self.task_feature_lengths,
      batch_size=self.batch_size,
      seed=self.seed,
      pack=self.pack,
      length_buckets=self.length_buckets,
      start_row=loop.num_rows,
      position=loop.position,
      rows=partitioning.own_rows(self.batch_size, mesh),
    )

  def say_what_was_cut(
    self, batches: bound_tasks.TrainBatches, loop: hooks_lib.Loop
  ) -> None:
    """Reports the number of truncated prompts and answers."""
    if batches.num_truncated_prompts or batches.num_truncated_answers:
      loop.say(
        f'Of {batches.num_examples} examples, '
        f'{batches.num_truncated_prompts} prompts and '
        f'{batches.num_truncated_answers} answers were longer than '
        f'{dict(self.task_feature_lengths)} tokens and were cut.'
      )
