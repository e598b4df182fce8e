# SPDX-License-Identifier: Apache-2.0
"""The verb `cache`: tokenizes a task once, so that training reads ids.

Tokens come first (`token_command.py`). On request the frozen LLM reads the
prompts once, too (`feature_command.py`).
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
  """Tokenizes a task or mixture into files; goes on where it was stopped.

  Training and evaluation read them with gin_configs/tasks/cached.gin in the
  place of the task's file. All tasks and splits are cached, uncut, with their
  texts. What TASK_FEATURE_LENGTHS, PACK and LENGTH_BUCKETS say is up to whoever
  reads. Random preprocessors are drawn once.

  To divide the work over hosts that share the folder, start it once for each
  part with --shard=0 --num_shards=4 and so on; which one ends last does not
  matter. Processes that run it together, as they train, divide a part further.

  With `features` the frozen LLM then reads all prompts, and its last states are
  kept beside the tokens. Training from them (USE_FEATURES) has no LLM in memory
  and does not wait for it. They are of one LLM, and of prompts that are cut to
  TASK_FEATURE_LENGTHS.

  Args:
    cache_dir: the folder.
    model: the system whose tokenizers are used, and whose LLM reads.
    mixture_or_task_name: what to cache; of tokens that are there, None or
      'cached' adds features without the task.
    task_feature_lengths: tokens of 'inputs' and 'targets', for preprocessors
      that ask for them, and for `features`.
    splits: to cache; None: all.
    shard: which of `num_shards` parts of the work to do, from 0.
    num_shards: how many there are.
    num_workers: processes that tokenize; None: one for each core.
    examples_per_shard: of a file, at most; None: 16,384, or more for more than
      16 million examples.
    show: prints the first so many examples of each split of a cache that is
      complete; nothing else is done, and no model or task is needed.
    features: whether to keep the LLM's last states, too.
    features_dtype: of these: 'bfloat16', each off by 1/256 of itself at most;
      or 'int8', half of the disk, each off by 1/254 of the largest of its
      token.
    features_batch_size: prompts of the greatest length that the LLM reads at
      once, over all devices; of shorter ones it reads more.
    mesh: device mesh and axis rules, for `features`; None puts all devices
      along `data`.
    beam_pipeline_options: of Apache Beam, with commas between them, such as
      --runner=DataflowRunner,--project=mine. Its workers then do the work,
      shard by shard; they need this package, and data and `cache_dir` under
      the same names, so in folders that all of them share. None: this host.
    dry_run: prints the examples and the disk they need, and stops.

  Raises:
    FileNotFoundError: if data are missing, or there is no cache to show.
    ValueError: if the folder holds a cache of something else, with the
      difference; for input that cannot be used, as in streaming.
  """
  folder = files.local_folder(cache_dir, 'CACHE_DIR')
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
      'what is to be cached, for which tokenizers? Add the gin files of a '
      'task and a model: --gin_file=gin_configs/tasks/... '
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
  # The others may have completed it since.
  if not (folder / cache_format.FILE).exists() and has_task:
    _say('Features come when the tokens of all parts are there: start again.')
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
