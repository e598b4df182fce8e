# SPDX-License-Identifier: Apache-2.0
"""Reading of caches for `benchmark --data`: whole, shared, and by Grain."""

import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from l2s_jax.caching import cache_encoding, cache_texts, cache_writer
from l2s_jax.data.cached import cache_format, cache_task
from l2s_jax.evaluation.report import TableRow
from l2s_jax.performance import contenders, data_input, data_peers, timing
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import tensorflow as tf

WHOLE, PARTS = 'reading', 'parts'


def make_cache(
  folder: pathlib.Path,
  vocabularies: tuple[base.Vocabulary, base.Vocabulary],
  streams_of_ids: Sequence[np.ndarray],
  lengths: tuple[int, int],
  num_examples: int,
) -> cache_task.CachedTask:
  """Writes a cache of examples of one length; returns it as a bound task.

  Args:
    folder: folder of the cache.
    vocabularies: vocabularies of prompts and answers.
    streams_of_ids: token ids from which prompts and answers are cut, repeated
      as necessary.
    lengths: length of each prompt and each answer, EOS included.
    num_examples: number of examples.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio, tf

  columns: dict[str, Any] = {}
  output_features = {}
  for name, vocabulary, ids, length in zip(
    ('inputs', 'targets'), vocabularies, streams_of_ids, lengths, strict=True
  ):
    rows = np.resize(ids, (num_examples, length - 1)).astype(np.int32)
    columns[name] = rows
    columns[f'{name}_pretokenized'] = [
      vocabulary.decode(row) for row in rows.tolist()
    ]
    output_features[name] = seqio.Feature(
      features.wrap_vocabulary(vocabulary), dtype=tf.int32
    )

  def read(
    split: str, shuffle_files: bool = False, seed: int | None = None
  ) -> 'tf.data.Dataset':
    del split, shuffle_files, seed  # the only split
    return tf.data.Dataset.from_tensor_slices(columns)

  task = seqio.Task(
    'rows',
    seqio.FunctionDataSource(read, splits=['train']),
    output_features=output_features,
    preprocessors=[features.tokenize_and_measure],
  )
  texts = {'rows': {'train': cache_texts.Texts(task, 'train', {})}}
  encoder = cache_encoding.Encoder(*vocabularies)
  key = {'rates': {'rows': 1.0}, 'tasks': {'rows': {'lengths': lengths}}}
  plan = cache_writer.make_plan(texts, key, encoder.dtype, {'rows': ()})
  cache_writer.write(
    folder, cache_writer.shards_of(plan), texts, encoder, num_workers=1
  )
  cache_writer.finish(folder, plan)
  return cache_task.CachedTask(
    cache_format.open_cache(folder), *vocabularies, {'rows': ()}
  )


def read(
  task: cache_task.CachedTask,
  lengths: tuple[int, int],
  batch_size: int,
  rows: np.ndarray,
  number: int,
) -> None:
  """Reads rows of the batches of an epoch's last examples.

  Args:
    task: the cache.
    lengths: prompt and answer length.
    batch_size: global batch size.
    rows: rows of each batch to read.
    number: number of examples in the batches.
  """
  batches = task.train_batches(
    task_feature_lengths=dict(zip(('inputs', 'targets'), lengths, strict=True)),
    batch_size=batch_size,
    seed=0,
    position={'examples': task.order('train', 0).sizes['rows'] - number},
    rows=rows,
    num_epochs=1,
  )
  for _ in batches:
    pass


def time_reading(
  opened: data_input.OpenedInput,
  lengths: tuple[int, int],
  scratch: pathlib.Path,
  rounds: int,
  has_grain: bool,
) -> list[TableRow]:
  """Times reading of a cache, in whole batches and in shares of processes.

  Args:
    opened: the input; its tokens fill the cache.
    lengths: prompt and answer length.
    scratch: folder for the cache.
    rounds: measured rounds; one more precedes them.
    has_grain: whether Grain takes part.

  Returns:
    Table rows.
  """
  given, size = opened.given, opened.size
  task = make_cache(
    scratch / 'x'.join(map(str, lengths)),
    opened.vocabularies,
    [np.concatenate(side) for side in opened.ids],
    lengths,
    size.all,
  )
  batch_size = given.batch_size
  counts = sorted({1, *given.process_counts})
  parts = {
    count: np.array_split(np.arange(batch_size), count) for count in counts
  }
  read_rows = functools.partial(read, task, lengths, batch_size)
  readers: list[Callable[[int], Any]] = [
    functools.partial(read_rows, rows)
    for count in counts
    for rows in parts[count]
  ]
  if has_grain:
    readers.append(data_peers.grain_reader(task, lengths, batch_size))
  found = iter(timing.seconds_between(readers, size, rounds, time.process_time))
  secs = {
    count: [max(x) for x in zip(*itertools.islice(found, count), strict=True)]
    for count in counts
  }
  whole = {contenders.OURS: secs[1]} | dict(zip(['grain'], found, strict=False))
  shape = {
    'prompt_length': lengths[0],
    'num_tokens': lengths[1],
    'batch_size': batch_size,
  }
  num_steps = size.between // batch_size
  return [
    *(
      {'part': WHOLE, 'engine': engine} | shape | timing.rates(size, of_engine)
      for engine, of_engine in whole.items()
    ),
    *(
      {'part': PARTS, 'engine': contenders.OURS, 'processes': count}
      | shape
      | {'rounds': {'ms_per_step': [1e3 * x / num_steps for x in of_count]}}
      for count, of_count in secs.items()
    ),
  ]
