# SPDX-License-Identifier: Apache-2.0
"""Tokenization contenders of `benchmark --data`: this package and peers.

Tokenization in memory, into the files of a cache, and into training batches
without a cache.
"""

import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from l2s_jax.caching import cache_encoding, cache_texts, cache_writer
from l2s_jax.data import streams
from l2s_jax.evaluation.report import TableRow
from l2s_jax.performance import contenders, data_input, data_peers, timing
from l2s_jax.runtime import distributed
from l2s_jax.vocabularies import base

PART = 'tokenizing'


class TokenizingJob(NamedTuple):
  """A tokenization contender.

  Attributes:
    from_to: its input and output, for tables.
    engine: name of the engine.
    processes: number of its processes.
    run: tokenizes the given number of examples.
    is_alone: whether it runs in one thread, so that CPU time is measured.
  """

  from_to: str
  engine: str
  processes: int
  run: Callable[[int], Any]
  is_alone: bool = False


def time_tokenizing(
  opened: data_input.OpenedInput,
  scratch: pathlib.Path,
  present: Sequence[str],
  rounds: int,
) -> list[TableRow]:
  """Times all contenders in turn; returns a row for each.

  Args:
    opened: the input.
    scratch: folder for output files.
    present: names of the peers that take part.
    rounds: measured rounds; one more precedes them.
  """
  size = opened.size
  with _jobs(opened, scratch, present) as jobs:
    alone = [job for job in jobs if job.is_alone]
    others = [job for job in jobs if not job.is_alone]
    found = [
      secs
      for group, clock in (
        (alone, time.process_time),
        (others, time.perf_counter),
      )
      for secs in timing.seconds_between(
        [job.run for job in group], size, rounds, clock
      )
    ]
  return [
    {
      'part': PART,
      'from_to': job.from_to,
      'engine': job.engine,
      'processes': job.processes,
    }
    | timing.rates(size, secs)
    for job, secs in zip([*alone, *others], found, strict=True)
  ]


@contextlib.contextmanager
def _jobs(
  opened: data_input.OpenedInput, scratch: pathlib.Path, present: Sequence[str]
) -> Iterator[list[TokenizingJob]]:
  """Yields all contenders."""
  # One process, and one per core.
  counts = sorted({1, distributed.num_cores()})
  with contextlib.ExitStack() as stack:
    jobs = _our_jobs(stack, opened, scratch, counts)
    if 'seqio' in present:
      write = functools.partial(
        data_peers.write_seqio,
        opened.task,
        opened.given.split,
        scratch / 'seqio.tfrecord',
      )
      jobs.append(TokenizingJob('task -> TFRecord', 'seqio', 1, write))
    if 'datasets' in present:
      jobs += _datasets_jobs(stack, opened, scratch, counts)
    yield jobs


def _our_jobs(
  stack: contextlib.ExitStack,
  opened: data_input.OpenedInput,
  scratch: pathlib.Path,
  counts: Sequence[int],
) -> list[TokenizingJob]:
  """Returns the tokenizer libraries, and this package's uses of them."""
  given, task, texts = opened.given, opened.task, opened.texts
  vocabularies = opened.vocabularies
  encoder = cache_encoding.Encoder(*vocabularies)

  def to_ids(number: int) -> None:
    for key, vocabulary in zip(opened.decoded, vocabularies, strict=True):
      vocabulary.encode_batch(opened.decoded[key][:number])

  def to_records(number: int) -> None:
    for start in range(0, number, cache_texts.CHUNK):
      stop = min(start + cache_texts.CHUNK, number)
      columns = {
        key: column[start:stop] for key, column in opened.sample.items()
      }
      encoder(cache_encoding.Work(texts.label, start, columns))

  def to_cache(num_workers: int, number: int) -> None:
    # Shard 0 of 2: the writer of a split's last shard looks for more examples.
    shard = cache_writer.CacheShard(task.name, given.split, 0, 2, 0, number)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
      cache_writer.write(
        pathlib.Path(folder),
        [shard],
        {task.name: {given.split: texts}},
        encoder,
        num_workers=num_workers,
      )

  batches = streams.train_batches(
    task,
    task_feature_lengths=given.task_feature_lengths,
    batch_size=given.batch_size,
    seed=0,
    split=given.split,
  )
  stack.callback(batches.close)

  def to_batches(number: int) -> None:
    # Continues the same stream, since filling the shuffle buffer is startup.
    for _ in range(0, number, given.batch_size):
      next(batches)

  library, ours = _libraries(vocabularies), contenders.OURS
  return [
    TokenizingJob('text -> ids', library, 1, to_ids, is_alone=True),
    TokenizingJob('text -> records', ours, 1, to_records, is_alone=True),
    *(
      TokenizingJob(
        'task -> cache', ours, number, functools.partial(to_cache, number)
      )
      for number in counts
    ),
    TokenizingJob('task -> batches', ours, 1, to_batches),
  ]


def _datasets_jobs(
  stack: contextlib.ExitStack,
  opened: data_input.OpenedInput,
  scratch: pathlib.Path,
  counts: Sequence[int],
) -> list[TokenizingJob]:
  """Returns Hugging Face `datasets.map` on the same texts."""
  # `datasets` forks, which is unsafe in a process with threads.
  pool = stack.enter_context(
    concurrent.futures.ProcessPoolExecutor(
      1, multiprocessing.get_context('spawn')
    )
  )
  path = _write_json_lines(scratch / 'texts.jsonl', opened.decoded)

  def to_arrow(num_workers: int, number: int) -> None:
    pool.submit(
      data_peers.map_datasets, path, opened.vocabularies, number, num_workers
    ).result()

  return [
    TokenizingJob(
      'JSONL -> Arrow', 'datasets', number, functools.partial(to_arrow, number)
    )
    for number in counts
  ]


def _libraries(vocabularies: Sequence[base.Vocabulary]) -> str:
  return ', '.join(dict.fromkeys(map(data_peers.library, vocabularies)))


def _write_json_lines(
  path: pathlib.Path, columns: Mapping[str, Sequence[str]]
) -> pathlib.Path:
  with path.open('w', encoding='utf-8') as file:
    for row in zip(*columns.values(), strict=True):
      file.write(json.dumps(dict(zip(columns, row, strict=True))) + '\n')
  return path
