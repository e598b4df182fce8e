# SPDX-License-Identifier: Apache-2.0
"""Writes the tokens of a cache, divided over processes, hosts or Beam workers.

The plan of the shards comes first (`cache_writer.py`).
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from l2s_jax.caching import (
  cache_beam,
  cache_encoding,
  cache_key,
  cache_texts,
  cache_writer,
)
from l2s_jax.data import sources, tasks
from l2s_jax.data.cached import cache_format
from l2s_jax.runtime import distributed, files, gin_config

if TYPE_CHECKING:
  import seqio


@dataclasses.dataclass(frozen=True)
class Division:
  """Division of the work: this process does a part of it, or Beam does all.

  Attributes:
    shard: number of this part, from 0.
    num_shards: number of parts.
    num_workers: number of tokenizer processes; None: one per core.
    beam_pipeline_options: comma-separated options of Apache Beam; None: this
      host does the work.

  Raises:
    ValueError: for settings that contradict each other.
  """

  shard: int
  num_shards: int
  num_workers: int | None
  beam_pipeline_options: str | None

  def __post_init__(self):
    """Validates the settings."""
    gin_config.check_positive(
      num_shards=self.num_shards, num_workers=self.num_workers
    )
    if not 0 <= self.shard < self.num_shards:
      raise ValueError(
        f'shard={self.shard} of num_shards={self.num_shards}: expected 0 to '
        'num_shards - 1.'
      )
    if self.beam_pipeline_options is None:
      return
    cache_beam.check(self.beam_pipeline_options)
    if self.num_workers is not None or self.num_jobs > 1:
      raise ValueError(
        'cache: with --beam_pipeline_options a Beam runner divides the work; '
        'remove num_workers (CACHE_WORKERS), --shard and --num_shards, and '
        'start one process.'
      )

  @property
  def job(self) -> int:
    """Number of this process's job."""
    index, num_processes = distributed.place()
    return self.shard * num_processes + index

  @property
  def num_jobs(self) -> int:
    """Number of jobs; the processes of a multi-host launch divide a part."""
    return self.num_shards * distributed.place()[1]


@dataclasses.dataclass(frozen=True)
class TaskToCache:
  """A task to be cached.

  Attributes:
    name: name of the task or mixture.
    vocabularies: vocabularies under 'prompt' and 'answer'.
    lengths: TASK_FEATURE_LENGTHS, for preprocessors that take them.
    splits: splits to cache; None: all.
    examples_per_shard: maximum number of examples per file; None: a default by
      the number of examples.
  """

  name: str
  vocabularies: Mapping[str, Any]
  lengths: Mapping[str, int]
  splits: Sequence[str] | None
  examples_per_shard: int | None


def cache_tokens(
  folder: pathlib.Path,
  task: TaskToCache,
  division: Division,
  *,
  dry_run: bool,
) -> None:
  """Tokenizes a task into a cache, unless the cache is complete.

  Args:
    folder: folder of the cache.
    task: task to be cached.
    division: division of the work.
    dry_run: whether to print the amount of work and stop.

  Raises:
    FileNotFoundError: if data are missing.
    ValueError: if the folder holds another cache, or input is invalid.
  """
  encoder = cache_encoding.Encoder(*task.vocabularies.values())
  parts, rates = _parts(tasks.bind(task.name, *task.vocabularies.values()))
  texts = _open_texts(parts, task.splits, task.lengths)
  key = cache_key.describe(
    task.name,
    parts,
    texts,
    rates=rates,
    vocabularies=task.vocabularies,
    task_feature_lengths=task.lengths,
  )
  if (folder / cache_format.FILE).exists():
    found = cache_format.open_cache(folder)
    cache_key.check(found.key, key, str(folder))
    _say(f'{folder} is complete: {_size(found.tasks)}.')
    return
  plan = cache_writer.make_plan(
    texts,
    key,
    encoder.dtype,
    {part.name: tasks.metric_names(part) for part in parts},
    task.examples_per_shard,
  )
  if not dry_run:
    folder.mkdir(parents=True, exist_ok=True)
  if not dry_run or (folder / cache_writer.PLAN).exists():
    plan = cache_writer.settle_plan(folder, plan)
  _say(f'{folder}: {_size(plan["tasks"])}.')
  shards = cache_writer.share(
    cache_writer.shards_of(plan), division.job, division.num_jobs
  )
  _check_room(folder, shards, texts, encoder)
  if dry_run:
    return
  _write(folder, task, division, shards, texts, encoder)
  missing = cache_writer.num_missing(folder, plan)
  if missing:
    _say(
      f'{folder}: this part is complete; {missing} shards of other parts are '
      'missing.'
    )
    return
  cache_writer.finish(folder, plan)
  _say(f'{folder} is complete.')


def _write(
  folder: pathlib.Path,
  task: TaskToCache,
  division: Division,
  shards: Sequence[cache_writer.CacheShard],
  texts: cache_key.TextsBySplit,
  encoder: cache_encoding.Encoder,
) -> None:
  """Writes the missing shards, here or with Beam."""
  if division.beam_pipeline_options is None:
    cache_writer.write(
      folder,
      shards,
      texts,
      encoder,
      num_workers=division.num_workers or distributed.num_cores(),
      job=division.job,
      num_jobs=division.num_jobs,
    )
    return
  cache_beam.write(
    cache_beam.Job(folder.resolve(), encoder, task.name, dict(task.lengths)),
    shards,
    cache_beam.check(division.beam_pipeline_options),
  )


def _parts(
  bound: 'seqio.Task | seqio.Mixture',
) -> tuple[list['seqio.Task'], dict[str, float]]:
  """Returns the tasks, and their rates by name."""
  from l2s_jax.data.features import seqio

  parts = list(seqio.get_subtasks(bound))
  if isinstance(bound, seqio.Mixture):
    return parts, {part.name: float(bound.get_rate(part)) for part in parts}
  return parts, {part.name: 1.0 for part in parts}


def _open_texts(
  parts: Sequence['seqio.Task'],
  splits: Sequence[str] | None,
  task_feature_lengths: Mapping[str, int],
) -> dict[str, dict[str, cache_texts.Texts]]:
  """Opens the texts of each task and split."""
  sources.check_sequence('cache.splits', splits)
  known = {split for part in parts for split in part.splits}
  for split in splits or ():
    if split not in known:
      raise ValueError(
        f'cache.splits={splits!r}: no split {split!r}; the splits are '
        f'{", ".join(sorted(known))}.'
      )
  return {
    part.name: {
      split: cache_texts.Texts(part, split, task_feature_lengths)
      for split in part.splits
      if splits is None or split in splits
    }
    for part in parts
  }


def _check_room(
  folder: pathlib.Path,
  shards: Sequence[cache_writer.CacheShard],
  texts: cache_key.TextsBySplit,
  encoder: cache_encoding.Encoder,
) -> None:
  """Prints the required disk space; refuses if it is not free."""
  sizes: dict[tuple[str, str], list[int]] = {}
  for shard in shards:
    if not shard.is_whole(folder):
      name = shard.task, shard.split
      sizes.setdefault(name, []).append(shard.stop - shard.start)
  num_bytes = shard_bytes = 0.0
  for (task, split), counts in sizes.items():
    each = cache_writer.bytes_per_example(texts[task][split], encoder)
    num_bytes += each * sum(counts)
    shard_bytes = max(shard_bytes, each * max(counts))
  num_examples = sum(map(sum, sizes.values()))
  size = files.in_units(num_bytes)
  _say(f'Examples to cache: {num_examples:,}, about {size}.')
  cache_writer.check_room(folder, num_bytes, shard_bytes)


def _size(contents: Mapping[str, Any]) -> str:
  return '; '.join(
    f'{task}: '
    + ', '.join(
      f'{content["num_examples"]:,} {split} in {len(content["shards"])} '
      f'shard{"s" * (len(content["shards"]) > 1)}'
      for split, content in task_content['splits'].items()
    )
    for task, task_content in contents.items()
  )


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
