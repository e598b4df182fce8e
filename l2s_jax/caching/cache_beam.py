# SPDX-License-Identifier: Apache-2.0
"""Writes a cache's shards by an Apache Beam pipeline, on any of its runners.

A shard is an element. A worker binds the task as this process did, tokenizes
the shard's examples and writes them as the local writer does; it needs this
package, the data and the cache's folder under the same names. A runner may give
a shard to several workers, or to one several times: each writes under a name
of its own, and the last that is done renames the same bytes.

A worker checks a split's local files once, and reaches a shard by passing over
the examples before it.
"""

import contextlib
import dataclasses
import functools
import pathlib
import pickle
import re
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin

from l2s_jax.caching import cache_encoding, cache_texts, cache_writer
from l2s_jax.data import tasks
from l2s_jax.runtime import extras

_JOB = '.beam-job-'
_ERROR = re.compile(r'^(?:\w+\.)*(?:ValueError|FileNotFoundError): (.+)$', re.M)
_WHERE = re.compile(r" \[while running '.*$")
_binding = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Job:
  """What a worker needs to know; can be pickled.

  Attributes:
    folder: of the cache.
    encoder: of the model's vocabularies.
    mixture_or_task_name: what is cached.
    task_feature_lengths: `inputs` and `targets`, in tokens.
    config: what gin binds, as text.
  """

  folder: pathlib.Path
  encoder: cache_encoding.Encoder
  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  config: str = dataclasses.field(default_factory=gin.config_str)


def check(pipeline_options: str) -> list[str]:
  """Returns the options of a pipeline, one by one.

  Args:
    pipeline_options: with commas between them, such as
      '--runner=DataflowRunner,--project=mine'.

  Raises:
    ValueError: if one is no option, or Beam is not installed.
  """
  options = [option.strip() for option in pipeline_options.split(',')]
  if not all(option.startswith('--') for option in options):
    raise ValueError(
      f'--beam_pipeline_options={pipeline_options}: expected options with '
      'commas between them, such as '
      '--beam_pipeline_options=--runner=DataflowRunner,--project=mine.'
    )
  extras.require('--beam_pipeline_options', 'apache_beam')
  return options


def write(
  job: Job, shards: Sequence[cache_writer.CacheShard], options: Sequence[str]
) -> None:
  """Writes those of the shards that are not whole yet.

  Args:
    job: what is cached, and where.
    shards: of it.
    options: of the pipeline.

  Raises:
    ValueError: as `cache_writer.write`; for options that Beam does not take.
  """
  import apache_beam as beam
  from apache_beam.options import pipeline_options

  with cache_writer.held(job.folder):
    missing = [shard for shard in shards if not shard.is_whole(job.folder)]
    for left in job.folder.glob(f'{_JOB}*'):  # By a start that was killed.
      left.unlink()
    # In a file: a vocabulary is larger than some runners let a pipeline be.
    path = job.folder / f'{_JOB}{uuid.uuid4().hex}'
    path.write_bytes(pickle.dumps(job))
    try:
      with (
        _plain_errors(),
        beam.Pipeline(
          options=pipeline_options.PipelineOptions(list(options))
        ) as pipeline,
      ):
        _ = (
          pipeline
          | 'shards' >> beam.Create([tuple(shard) for shard in missing])
          | 'spread' >> beam.Reshuffle()
          | 'write' >> beam.Map(write_shard, str(path))
        )
    finally:
      path.unlink(missing_ok=True)


def write_shard(shard: Sequence[Any], job_path: str) -> None:
  """Writes a shard; what a worker does.

  Args:
    shard: a `cache_writer.CacheShard`, as a tuple.
    job_path: of a pickled `Job`.
  """
  job, own = _read_job(job_path), cache_writer.CacheShard(*shard)
  cache_writer.write_shard(
    job.folder, own, _texts(job_path, own.task, own.split), job.encoder
  )


@functools.lru_cache(maxsize=1)
def _read_job(path: str) -> Job:
  return pickle.loads(pathlib.Path(path).read_bytes())


@functools.cache
def _texts(job_path: str, task: str, split: str) -> cache_texts.Texts:
  """Opens a split once in a process, whose threads share it."""
  from l2s_jax.data.features import seqio

  job = _read_job(job_path)
  with _binding:
    if gin.config_str() != job.config:  # Unless this is the one that began.
      with gin.unlock_config():
        gin.parse_config(job.config, skip_unknown=True)
    bound = tasks.bind(job.mixture_or_task_name, *job.encoder.vocabularies)
    (part,) = (part for part in seqio.get_subtasks(bound) if part.name == task)
    return cache_texts.Texts(part, split, job.task_feature_lengths)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
  """Raises an error of a worker by itself, without Beam's words and traces."""
  try:
    yield
  except Exception as error:
    found = _ERROR.findall(str(error))
    if found:
      raise ValueError(_WHERE.sub('', found[-1])) from error
    if isinstance(error, ValueError | FileNotFoundError):
      raise type(error)(_WHERE.sub('', str(error))) from error
    raise
