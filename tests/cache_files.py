# SPDX-License-Identifier: Apache-2.0
"""Writes caches of any examples, as the verb `cache` does of a task's."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from l2s_jax.data.cached import cache_format, cache_task
from l2s_jax.runtime import files, integrity
from l2s_jax.weights import run_format

# Ids of prompt and answer, and texts.
Example = tuple[Sequence[int], Sequence[int], Mapping[str, Any]]


def write(
  folder: pathlib.Path,
  tasks: Mapping[str, Mapping[str, Sequence[Example]]],
  *,
  rates: Mapping[str, float] | None = None,
  key: Mapping[str, Any] | None = None,
  dtype: str = 'uint16',
  num_shards: int = 3,
) -> pathlib.Path:
  """Writes a whole cache of examples by task and split.

  Args:
    folder: of the cache.
    tasks: examples by task and split.
    rates: of the tasks; None: 1 each.
    key: that stands in it.
    dtype: of ids.
    num_shards: of each split.
  """
  content: dict[str, Any] = {}
  for task, splits in tasks.items():
    content[task] = {'splits': {}, 'columns': {}, 'metrics': ['exact_match']}
    for split, examples in splits.items():
      place = (
        folder
        / cache_format.folder_name(task)
        / cache_format.folder_name(split)
      )
      place.mkdir(parents=True)
      parts = [
        [examples[number] for number in numbers]
        for numbers in np.array_split(np.arange(len(examples)), num_shards)
      ]
      content[task]['splits'][split] = {
        'num_examples': len(examples),
        'shards': [len(part) for part in parts],
        'index_digests': [
          _write_shard(
            cache_format.shard_path(place, number, num_shards), part, dtype
          )
          for number, part in enumerate(parts)
        ],
      }
  files.write_json(
    folder / cache_format.FILE,
    integrity.seal(
      {
        **run_format.stamp(),
        'key': dict(key or {}),
        'dtype': dtype,
        'tasks': content,
        'rates': dict(rates or dict.fromkeys(tasks, 1.0)),
      }
    ),
  )
  return folder


def _write_shard(path: str, examples: Sequence[Example], dtype: str) -> str:
  writer = array_record_module.ArrayRecordWriter(
    f'{path}.array_record', cache_format.WRITER_OPTIONS
  )
  index = np.zeros((len(examples), 3), np.uint32)
  for row, (prompt, answer, texts) in enumerate(examples):
    record = cache_format.encode(prompt, answer, texts, dtype)
    writer.write(record)
    index[row] = len(prompt), len(answer), cache_format.checksum(record)
  writer.close()
  np.save(f'{path}.index.npy', index)
  return cache_format.index_digest(index)


def random_examples(
  num_examples: int,
  *,
  longest: tuple[int, int] = (12, 9),
  vocab_size: int = 90,
  seed: int = 0,
) -> list[Example]:
  """Returns examples whose prompts begin with their numbers, and so differ."""
  generator = np.random.default_rng(seed)
  examples: list[Example] = []
  for number in range(num_examples):
    prompt, answer = (
      generator.integers(3, vocab_size, generator.integers(0, size)).tolist()
      for size in longest
    )
    digits = [3 + int(digit) for digit in f'{number:05d}']
    examples.append(
      (
        [*digits, *prompt, 1],
        [*answer, 1],
        {'inputs_pretokenized': f'p{number}', 'targets_pretokenized': 't'},
      )
    )
  return examples


def task(
  folder: pathlib.Path, vocabulary: Any, metrics: Sequence[Any] = ()
) -> cache_task.CachedTask:
  """Returns a cache with a vocabulary, whatever its ids are of."""
  cache = cache_format.open_cache(folder)
  return cache_task.CachedTask(
    cache, vocabulary, vocabulary, dict.fromkeys(cache.tasks, metrics)
  )
