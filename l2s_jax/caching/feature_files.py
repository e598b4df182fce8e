# SPDX-License-Identifier: Apache-2.0
"""What features are to be there, which of them are, and what names them all.

`features_plan.json` comes first: of which LLM and tokens they are. Shards are
written by `feature_writer.py`, and `features.json` when all are whole.
"""

import collections
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

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
  """Returns what `features.json` will hold but for what the shards say.

  Args:
    cache: of tokens.
    system: with the fingerprint of its LLM.
    dtype: of the states, one of `stored_states.DTYPES`.
    prompt_length: tokens to which prompts are cut.
  """
  assert isinstance(system.module, l2s.LlmToSlm)
  module = system.module
  layer = module.llm_layer
  # Of decoder-only LLMs; a key without them is that of an encoder's states.
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
  """Begins the plan of a folder, or goes on with the same.

  Raises:
    ValueError: if the one there is of something else, with the difference, or
      is damaged.
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
    want='now it is',
  )
  if lines:
    raise ValueError(
      f'CACHE_DIR={folder} holds features of something else:\n'
      + '\n'.join(lines)
      + f'\nSet these as they were; or, to make them anew, {_REMEDY}; or cache '
      'in another CACHE_DIR.'
    )


def missing_of(
  cache: cache_format.TokenCache, job: int = 0, num_jobs: int = 1
) -> list[cache_writer.CacheShard]:
  """Returns the shards of a job that have no features yet, for all processes.

  Args:
    cache: of tokens.
    job: which of `num_jobs` this is.
    num_jobs: which write the features together.
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
  """Returns what disk the features of shards take."""
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
  """Returns the tokens of the prompts of a shard, cut."""
  split = cache.split(shard.task, shard.split)
  lengths = split.lengths_of(range(shard.start, shard.stop))[:, 0]
  return np.minimum(lengths.astype(np.int64), prompt_length)


def finish(cache: cache_format.TokenCache, plan: Mapping[str, Any]) -> None:
  """Writes `features.json` over a cache whose shards all have features.

  Raises:
    ValueError: naming a shard that is not as it must be.
  """
  digests: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
  for shard in cache_writer.shards_of(cache.content):
    path, index_path = shard.files(cache.folder, feature_format.KIND)
    again = 'Remove it, and run `cache --features` again: the others are kept.'
    size = shard.stop - shard.start
    index = cache_format.load_index(str(index_path), size, 2, remedy=again)
    lengths = prompt_lengths(cache, shard, plan['prompt_length'])
    if (index[:, 0] != lengths).any():
      raise ValueError(f'{index_path} is of other prompts. {again}')
    reader = array_record_module.ArrayRecordReader(str(path), '')
    if not reader.ok() or reader.num_records() != size:
      raise ValueError(f'{path} is damaged: expected {size} records. {again}')
    reader.close()
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
  """Returns its tokens, before cutting."""
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
