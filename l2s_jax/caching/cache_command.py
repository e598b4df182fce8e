# SPDX-License-Identifier: Apache-2.0
"""The verb `cache`: tokenizes a task once, so that training reads token ids.

Tokens are written first (`token_command.py`). With `--features`, the frozen
LLM's states of the prompts follow (`feature_command.py`).
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gin

from l2s_jax.caching import feature_command, token_command
from l2s_jax.data import bound_tasks
from l2s_jax.data.cached import cache_format
from l2s_jax.runtime import distributed, files, gin_config, partitioning

_MOST_IDS_SHOWN = 16


@gin.configurable(module='l2s_jax')
def cache(
  cache_dir: str = gin.REQUIRED,
  model: Any = None,
  mixture_or_task_name: str | None = None,
  task_feature_lengths: Mapping[str, int] | None = None,
  splits: Sequence[str] | None = None,
  shard: int = 0,
  num_shards: int = 1,
  num_workers: int | None = None,
  examples_per_shard: int | None = None,
  show: int | None = None,
  features: bool = False,
  features_dtype: str = 'bfloat16',
  features_batch_size: int = 32,
  mesh: partitioning.MeshConfig | None = None,
  beam_pipeline_options: str | None = None,
  *,
  dry_run: bool = False,
) -> None:
  """Tokenizes a task or mixture into files; resumes an interrupted run.

  Training and evaluation read the cache with gin_configs/tasks/cached.gin
  instead of the task's file. All tasks and splits are cached with their texts,
  uncut: TASK_FEATURE_LENGTHS, PACK and LENGTH_BUCKETS apply when the cache is
  read. Random preprocessors draw once, at caching.

  To divide the work over hosts with a shared folder, start one job per part
  with --shard=0 --num_shards=4 and so on, in any order. The processes of a
  multi-host launch divide a part further.

  With `features` the frozen LLM then reads all prompts, and its last states are
  stored beside the tokens. Training from them (USE_FEATURES) neither loads nor
  runs the LLM. They are valid for one LLM, and for prompts cut to
  TASK_FEATURE_LENGTHS.

  Args:
    cache_dir: the folder of the cache, local or in a bucket.
    model: the system with the tokenizers and the LLM.
    mixture_or_task_name: the task or mixture to cache. For an existing cache,
      None or 'cached' adds features without the task.
    task_feature_lengths: lengths of 'inputs' and 'targets' in tokens, for
      preprocessors that take them, and for `features`.
    splits: splits to cache; None: all.
    shard: the part of the work to do, from 0 to num_shards - 1.
    num_shards: number of parts.
    num_workers: number of tokenizer processes; None: one per core.
    examples_per_shard: maximum number of examples per file; None: 16,384, or
      more for more than 16 million examples.
    show: prints this many examples of each split of a complete cache and exits;
      needs no model or task.
    features: whether to store the LLM's last states.
    features_dtype: dtype of the states: 'bfloat16', with a relative error of at
      most 1/256; or 'int8', half the size, with an error of at most 1/254 of
      the largest value of the token.
    features_batch_size: number of prompts of maximum length per LLM batch, over
      all devices; batches of shorter prompts are larger.
    mesh: device mesh and axis rules, for `features`; None puts all devices
      along `data`.
    beam_pipeline_options: comma-separated options of Apache Beam, such as
      --runner=DataflowRunner,--project=mine. Beam's workers then do the work,
      shard by shard; they need this package, and the data and `cache_dir` at
      the same paths, in shared folders. None: this host does the work.
    dry_run: prints the number of examples and the required disk space, and
      exits.

  Raises:
    FileNotFoundError: if data are missing, or there is no cache to show.
    ValueError: if the folder holds another cache, with the differences; for
      invalid input, as in streaming.
  """
  # Beam's workers share a folder of the file system.
  is_beam = beam_pipeline_options is not None
  check_folder = files.local_folder if is_beam else files.folder
  folder = check_folder(cache_dir, 'CACHE_DIR')
  gin_config.check_positive(
    examples_per_shard=examples_per_shard,
    show=show,
    FEATURES_BATCH_SIZE=features_batch_size,
  )
  division = token_command.Division(
    shard, num_shards, num_workers, beam_pipeline_options
  )
  if show is not None:
    _show(cache_format.open_cache(folder), show)
    return
  has_task = not bound_tasks.is_cached(mixture_or_task_name or 'cached')
  if model is None or not (has_task or features):
    raise ValueError(
      'no task or no model to cache for. Add the gin files of a task and a '
      'model: --gin_file=gin_configs/tasks/... '
      '--gin_file=gin_configs/models/...'
    )
  lengths = task_feature_lengths or {}
  gin_config.check_lengths(lengths)
  if features:
    feature_command.check(model, lengths, features_dtype)
  if has_task:
    task = token_command.TaskToCache(
      str(mixture_or_task_name),
      {'prompt': model.prompt_vocabulary, 'answer': model.answer_vocabulary},
      lengths,
      splits,
      examples_per_shard,
    )
    token_command.cache_tokens(folder, task, division, dry_run=dry_run)
    if distributed.place()[1] > 1:
      distributed.wait_for_all('cache')
  if not features:
    return
  # Other jobs may have completed it in the meantime.
  if not (folder / cache_format.FILE).exists() and has_task:
    _say('Run `cache --features` again when the tokens of all parts exist.')
    return
  feature_command.cache_features(
    cache_format.open_cache(folder),
    model,
    mesh,
    lengths,
    dtype=features_dtype,
    batch_size=features_batch_size,
    job=shard,
    num_jobs=num_shards,
    dry_run=dry_run,
  )


def _show(found: cache_format.TokenCache, num_examples: int) -> None:
  """Prints the first examples of each split."""
  for task, content in found.tasks.items():
    for name in content['splits']:
      split = found.split(task, name)
      for number in range(min(num_examples, split.num_examples)):
        record = split[number]
        rows = cache_format.decode_ids(record, found.dtype)
        print(
          f'{task}, {name}, example {number:,} of {split.num_examples:,}: '
          f'{len(rows[0])} + {len(rows[1])} tokens'
        )
        for side, row in zip(('prompt', 'answer'), rows, strict=True):
          ids = ' '.join(map(str, row[:_MOST_IDS_SHOWN]))
          print(f'  {side}: {ids}{" ..." * (len(row) > _MOST_IDS_SHOWN)}')
        texts = cache_format.decode_texts(record, found.dtype)
        for column, text in texts.items():
          print(f'  {column}: {text}')


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
