# SPDX-License-Identifier: Apache-2.0
"""Plan, progress and description of a cache's features.

`features_plan.json` is written first, with the LLM's fingerprint and the
tokens' digest. `feature_writer.py` writes the shards; `features.json` is
written when all are complete.
"""

import collections
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from l2s_jax.caching import cache_writer
from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.models import l2s
from l2s_jax.runtime import distributed, files, integrity
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import run_format

PLAN = 'features_plan.json'
_REMEDY = (
  f'remove {PLAN}, {feature_format.FILE} and all *{feature_format.KIND}.* '
  'files of the cache'
)


def make_plan(
  cache: cache_format.TokenCache,
  system: system_lib.System,
  dtype: str,
  prompt_length: int,
) -> dict[str, Any]:
  """Returns the content of `features.json`, without the entries of the shards.

  Args:
    cache: token cache.
    system: system with the fingerprint of its LLM.
    dtype: dtype of the states, one of `stored_states.DTYPES`.
    prompt_length: maximum prompt length, in tokens; longer prompts are cut.
  """
  assert isinstance(system.module, l2s.LlmToSlm)
  module = system.module
  layer = module.llm_layer
  # For decoder-only LLMs only; the key of an encoder's states lacks these.
  reading: dict[str, Any] = {}
  if module.llm_prefix_ids:
    reading['prefix_ids'] = list(module.llm_prefix_ids)
  if module.llm_config.bidirectional_prefix:
    reading['bidirectional'] = True
  return {
    **run_format.stamp(),
    'key': {
      'llm_fingerprint': system.llm_fingerprint,
      'llm_dtype': system.frozen_dtype,
      'layer': feature_format.LAST if layer is None else layer,
      'tokens': cache.digest,
      **reading,
    },
    'dtype': dtype,
    'width': system.module.llm_config.emb_dim,
    'prompt_length': prompt_length,
  }


def settle_plan(folder: pathlib.Path, plan: Mapping[str, Any]) -> None:
  """Writes the plan of a folder, or verifies the existing one.

  Raises:
    ValueError: if the existing plan differs, with the differences, or is
      damaged.
  """
  path = folder / PLAN
  if not path.exists() and distributed.is_first():
    files.write_json(path, integrity.seal(plan))
  distributed.wait_for_all('features plan')
  kept = feature_format.read_description(path, f'{_REMEDY}.')
  lines = files.differences(
    kept,
    plan,
    ignored=tuple(run_format.stamp()),
    have='the features have',
    want='now',
  )
  if lines:
    raise ValueError(
      f'CACHE_DIR={folder} has features with other settings:\n'
      + '\n'.join(lines)
      + f'\nRestore these settings; or, to compute the features again, '
      f'{_REMEDY}; or set another CACHE_DIR.'
    )


def missing_of(
  cache: cache_format.TokenCache, job: int = 0, num_jobs: int = 1
) -> list[cache_writer.CacheShard]:
  """Returns a job's shards without features, the same in all processes.

  Args:
    cache: token cache.
    job: number of this job, from 0.
    num_jobs: number of jobs that write the features.
  """
  shards = cache_writer.share(
    cache_writer.shards_of(cache.content), job, num_jobs
  )
  is_whole = distributed.from_first(
    [shard.is_whole(cache.folder, feature_format.KIND) for shard in shards]
  )
  return [
    shard for shard, done in zip(shards, is_whole, strict=True) if not done
  ]


def num_bytes(
  cache: cache_format.TokenCache,
  shards: Sequence[cache_writer.CacheShard],
  plan: Mapping[str, Any],
) -> float:
  """Returns the disk space of the features of shards, in bytes."""
  token_bytes = feature_format.token_bytes(plan['dtype'], plan['width'])
  total = 0.0
  for shard in shards:
    lengths = prompt_lengths(cache, shard, plan['prompt_length'])
    states = int(lengths.sum()) * token_bytes
    total += (
      states
      + states // feature_format.BLOCK_HEADERS
      + len(lengths) * feature_format.RECORD_BYTES
      + feature_format.SHARD_BYTES
    )
  return total


def prompt_lengths(
  cache: cache_format.TokenCache,
  shard: cache_writer.CacheShard,
  prompt_length: int,
) -> np.ndarray:
  """Returns the lengths of a shard's prompts after cutting, in tokens."""
  split = cache.split(shard.task, shard.split)
  lengths = split.lengths_of(range(shard.start, shard.stop))[:, 0]
  return np.minimum(lengths.astype(np.int64), prompt_length)


def finish(cache: cache_format.TokenCache, plan: Mapping[str, Any]) -> None:
  """Validates all feature shards of a cache and writes `features.json`.

  Raises:
    ValueError: naming a damaged shard, or one of other prompts.
  """
  digests: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
  for shard in cache_writer.shards_of(cache.content):
    path, index_path = shard.files(cache.folder, feature_format.KIND)
    again = 'Remove it, and run `cache --features` again: the others are kept.'
    size = shard.stop - shard.start
    index = cache_format.load_index(str(index_path), size, 2, remedy=again)
    lengths = prompt_lengths(cache, shard, plan['prompt_length'])
    if (index[:, 0] != lengths).any():
      raise ValueError(f'{index_path} belongs to other prompts. {again}')
    if cache_writer.num_records(path) != size:
      raise ValueError(f'{path} is damaged: expected {size} records. {again}')
    digests[shard.task, shard.split].append(cache_format.index_digest(index))
  content = {
    **plan,
    'tasks': {
      task: {
        'splits': {
          name: {
            'num_examples': split['num_examples'],
            'shards': split['shards'],
            'index_digests': digests[task, name],
            'longest_prompt': _longest_prompt(cache, task, name),
          }
          for name, split in of_task['splits'].items()
        }
      }
      for task, of_task in cache.tasks.items()
    },
  }
  files.write_json(cache.folder / feature_format.FILE, integrity.seal(content))


def _longest_prompt(
  cache: cache_format.TokenCache, task: str, split: str
) -> int:
  """Returns the maximum prompt length of a split before cutting, in tokens."""
  examples = cache.split(task, split)
  return max(
    (
      int(examples.lengths_of(range(start, stop))[:, 0].max())
      for start, stop in _blocks(examples.num_examples)
    ),
    default=0,
  )


def _blocks(total: int, size: int = 1 << 16) -> Iterator[tuple[int, int]]:
  return ((start, min(start + size, total)) for start in range(0, total, size))
