# SPDX-License-Identifier: Apache-2.0
"""`cache --features`: runs the frozen LLM once over the prompts of a cache.

`feature_format.py` defines the files; `feature_writer.py` writes them.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from l2s_jax.caching import cache_writer, feature_files, feature_writer
from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.models import l2s, stored_states
from l2s_jax.runtime import distributed, files, partitioning
from l2s_jax.systems import parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib


def check(model: Any, lengths: Mapping[str, int], dtype: str) -> None:
  """Validates the system and the settings of `cache --features`.

  The LLM states must be constant in training.

  Args:
    model: the system.
    lengths: lengths of 'inputs' and 'targets', in tokens.
    dtype: dtype of the states.

  Raises:
    ValueError: if the system has no frozen LLM, or a setting is invalid.
  """
  if dtype not in stored_states.DTYPES:
    raise ValueError(
      f'FEATURES_DTYPE={dtype!r} is not one of {stored_states.DTYPES}.'
    )
  if not isinstance(getattr(model, 'module', None), l2s.LlmToSlm):
    raise ValueError(
      '--features: the model is a language model alone, without a frozen LLM. '
      'Add --gin_file=gin_configs/models/llm_to_slm.gin and LLM_PATH, or '
      'remove --features.'
    )
  if model.module.train_llm or model.module.llm_layer == l2s.MIX:
    raise ValueError(
      '--features: states that change in training cannot be cached: those of '
      "a trained LLM (TRAIN_LLM) or a mix of layers (LLM_LAYER='mix'). Set "
      'TRAIN_LLM=False and LLM_LAYER to one layer, or remove --features.'
    )
  if 'inputs' not in lengths:
    raise ValueError(
      "--features: TASK_FEATURE_LENGTHS has no 'inputs', the maximum length of "
      'prompts in tokens; set it to the value for training.'
    )


def cache_features(
  cache: cache_format.TokenCache,
  model: system_lib.System,
  mesh: partitioning.MeshConfig | None,
  lengths: Mapping[str, int],
  *,
  dtype: str,
  batch_size: int,
  job: int,
  num_jobs: int,
  dry_run: bool,
) -> None:
  """Writes the features of a cache, or one job's part of them.

  Args:
    cache: token cache.
    model: system with the LLM.
    mesh: device mesh; None puts all devices along `data`.
    lengths: lengths of 'inputs' and 'targets', in tokens. Prompts are cut to
      the former.
    dtype: dtype of the states, one of `stored_states.DTYPES`.
    batch_size: number of prompts of maximum length per batch.
    job: number of this job, from 0.
    num_jobs: number of jobs that write the features.
    dry_run: whether to stop before loading the LLM.

  Raises:
    ValueError: for a cache of other tokenizers, existing features of another
      LLM or layer, or insufficient disk space.
  """
  vocabulary = model.prompt_vocabulary
  if cache.key.get('vocabularies', {}).get('prompt') != (
    vocabulary.fingerprint()
  ):
    raise ValueError(
      f'CACHE_DIR={cache.folder} was made for another model: the ids of its '
      f'prompts are not those of {vocabulary!r}. Set CACHE_DIR to the cache of '
      'this model, or cache the task for this model.'
    )
  session = session_lib.start(
    lambda: model,
    mesh,
    {'targets': 1} | dict(lengths),
    batch_sizes={'FEATURES_BATCH_SIZE': batch_size},
  )
  shards = feature_files.missing_of(cache, job, num_jobs)
  plan = feature_files.make_plan(
    cache, session.system, dtype, lengths['inputs']
  )
  num_bytes = feature_files.num_bytes(cache, shards, plan)
  num_examples = sum(shard.stop - shard.start for shard in shards)
  distributed.say(
    f'Features to compute: {num_examples:,} examples, about '
    f'{files.in_units(num_bytes)}.'
  )
  each = [feature_files.num_bytes(cache, [shard], plan) for shard in shards]
  _check_room(cache.folder, num_bytes, max(each, default=0))
  if dry_run:
    return
  with session.entered():
    system, frozen = parameters.load_frozen(session.system, session.layout)
    plan = feature_files.make_plan(cache, system, dtype, lengths['inputs'])
    feature_files.settle_plan(cache.folder, plan)
    times = feature_writer.write(
      session,
      frozen,
      cache,
      shards,
      plan,
      batch_size=batch_size,
      job=job,
      num_jobs=num_jobs,
    )
  missing = feature_files.missing_of(cache)
  if times.num_examples:
    distributed.say(times.describe())
  if missing:
    distributed.say(
      f'{cache.folder}: this part is complete; the features of {len(missing)} '
      'shards of other parts are missing.'
    )
    return
  if distributed.is_first():
    if not (cache.folder / feature_format.FILE).exists():
      feature_files.finish(cache, plan)
    feature_format.open_features(cache)
  distributed.say(f'The features of {cache.folder} are complete.')


def _check_room(
  folder: pathlib.Path, num_bytes: int | float, shard_bytes: int | float
) -> None:
  """Refuses to start in all processes if one host lacks room."""
  lacking: list[tuple[Any, ...]] = []
  try:
    cache_writer.check_room(folder, num_bytes, shard_bytes)
  except OSError as error:
    lacking.append((error.errno, error.strerror, error.filename))
  if lacking := distributed.gather(lacking):
    raise OSError(*lacking[0])
