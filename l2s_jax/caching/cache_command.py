# SPDX-License-Identifier: Apache-2.0
"""The verb `cache`: tokenizes a task once, so that training reads ids.

What the files are is in `cache_format.py`, how they come to be in
`cache_writer.py`. On request the frozen LLM reads the prompts once, too
(`feature_command.py`).
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin

from l2s_jax.caching import (
  cache_beam,
  cache_encoding,
  cache_key,
  cache_texts,
  cache_writer,
  feature_command,
)
from l2s_jax.data import bound_tasks, sources, tasks
from l2s_jax.data.cached import cache_format
from l2s_jax.runtime import distributed, files, gin_config, partitioning

if TYPE_CHECKING:
  import seqio

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
    num_shards=num_shards,
    num_workers=num_workers,
    examples_per_shard=examples_per_shard,
    show=show,
    FEATURES_BATCH_SIZE=features_batch_size,
  )
  if not 0 <= shard < num_shards:
    raise ValueError(
      f'shard={shard} of num_shards={num_shards}: expected one of 0 to '
      'num_shards - 1.'
    )
  if show is not None:
    _show(cache_format.open_cache(folder), show)
    return
  index, num_processes = distributed.place()
  beam_options = None
  if beam_pipeline_options is not None:
    beam_options = cache_beam.check(beam_pipeline_options)
    if num_workers is not None or num_shards * num_processes > 1:
      raise ValueError(
        'cache: --beam_pipeline_options leaves it to a runner who does what; '
        'leave out num_workers (CACHE_WORKERS), --shard and --num_shards, and '
        'start one process.'
      )
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
    _cache_tokens(
      folder,
      model,
      str(mixture_or_task_name),
      lengths,
      splits,
      # Processes that run together are parts of a part.
      shard * num_processes + index,
      num_shards * num_processes,
      num_workers,
      examples_per_shard,
      beam_options,
      dry_run=dry_run,
    )
    if num_processes > 1:
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


def _cache_tokens(
  folder: pathlib.Path,
  model: Any,
  mixture_or_task_name: str,
  lengths: Mapping[str, int],
  splits: Sequence[str] | None,
  shard: int,
  num_shards: int,
  num_workers: int | None,
  examples_per_shard: int | None,
  beam_options: Any,
  *,
  dry_run: bool,
) -> None:
  """Tokenizes, unless that was done; the arguments are those of `cache`."""
  vocabularies = {
    'prompt': model.prompt_vocabulary,
    'answer': model.answer_vocabulary,
  }
  encoder = cache_encoding.Encoder(*vocabularies.values())
  bound = tasks.bind(mixture_or_task_name, *vocabularies.values())
  parts, rates = _parts(bound)
  texts = _open_texts(parts, splits, lengths)
  key = cache_key.describe(
    mixture_or_task_name,
    parts,
    texts,
    rates=rates,
    vocabularies=vocabularies,
    task_feature_lengths=lengths,
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
    examples_per_shard,
  )
  if not dry_run:
    folder.mkdir(parents=True, exist_ok=True)
  if not dry_run or (folder / cache_writer.PLAN).exists():
    plan = cache_writer.settle_plan(folder, plan)
  shards = cache_writer.share(cache_writer.shards_of(plan), shard, num_shards)
  _say(f'{folder}: {_size(plan["tasks"])}.')
  _check_room(folder, shards, texts, encoder)
  if dry_run:
    return
  if beam_options is not None:
    beam_job = cache_beam.Job(
      folder.resolve(), encoder, mixture_or_task_name, dict(lengths)
    )
    cache_beam.write(beam_job, shards, beam_options)
  else:
    cache_writer.write(
      folder,
      shards,
      texts,
      encoder,
      num_workers=num_workers or distributed.num_cores(),
      job=shard,
      num_jobs=num_shards,
    )
  missing = cache_writer.num_missing(folder, plan)
  if missing:
    _say(f'{folder}: done here; {missing} shards of other parts are missing.')
    return
  cache_writer.finish(folder, plan)
  _say(f'{folder} is complete.')


def _parts(
  bound: 'seqio.Task | seqio.Mixture',
) -> tuple[list['seqio.Task'], dict[str, float]]:
  """Returns the tasks, and the rate of each."""
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
  """Returns the examples of each task and split."""
  sources.check_sequence('cache.splits', splits)
  known = {split for part in parts for split in part.splits}
  for split in splits or ():
    if split not in known:
      raise ValueError(
        f'cache.splits={splits!r}: there is no split {split!r}; there are '
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
  """Says what disk is needed, and refuses where it is not there."""
  counts: dict[tuple[str, str], int] = {}
  for shard in shards:
    if not shard.is_whole(folder):
      name = shard.task, shard.split
      counts[name] = counts.get(name, 0) + shard.stop - shard.start
  num_bytes = sum(
    count * cache_writer.bytes_per_example(texts[task][split], encoder)
    for (task, split), count in counts.items()
  )
  _say(
    f'{sum(counts.values()):,} examples are to be cached here, which take '
    f'about {num_bytes / 1e9:,.3f} GB.'
  )
  cache_writer.check_room(folder, num_bytes)


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
