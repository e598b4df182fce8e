# SPDX-License-Identifier: Apache-2.0
"""Writes a cache's shards in an Apache Beam pipeline, on any Beam runner.

A pipeline element is a shard. A worker binds the task like the launching
process, tokenizes the shard's examples and writes them like the local writer.
It needs this package, and the data and the cache folder at the same paths. A
runner may process a shard on several workers, or several times: each attempt
writes under a name of its own, and the last one renames identical bytes.

A worker checks a split's local files once, and skips to a shard by reading the
examples before it.
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
  """Picklable job description for workers.

  Attributes:
    folder: folder of the cache.
    encoder: encoder with the model's vocabularies.
    mixture_or_task_name: name of the task or mixture to cache.
    task_feature_lengths: lengths of `inputs` and `targets`, in tokens.
    config: gin bindings, as text.
  """

  folder: pathlib.Path
  encoder: cache_encoding.Encoder
  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  config: str = dataclasses.field(default_factory=gin.config_str)


def check(pipeline_options: str) -> list[str]:
  """Parses and validates pipeline options.

  Args:
    pipeline_options: comma-separated options, such as
      '--runner=DataflowRunner,--project=mine'.

  Returns:
    The list of options.

  Raises:
    ValueError: if an option is malformed, or Beam is not installed.
  """
  options = [option.strip() for option in pipeline_options.split(',')]
  if not all(option.startswith('--') for option in options):
    raise ValueError(
      f'--beam_pipeline_options={pipeline_options}: expected options '
      'separated by commas, such as '
      '--beam_pipeline_options=--runner=DataflowRunner,--project=mine.'
    )
  extras.require('--beam_pipeline_options', 'apache_beam')
  return options


def write(
  job: Job, shards: Sequence[cache_writer.CacheShard], options: Sequence[str]
) -> None:
  """Writes the shards that are not complete yet.

  Args:
    job: description of the cache.
    shards: shards of the cache.
    options: options of the pipeline.

  Raises:
    ValueError: as `cache_writer.write`; for options that Beam refuses.
  """
  import apache_beam as beam
  from apache_beam.options import pipeline_options

  with cache_writer.held(job.folder):
    missing = [shard for shard in shards if not shard.is_whole(job.folder)]
    for left in job.folder.glob(f'{_JOB}*'):  # Left by a killed run.
      left.unlink()
    # A file, because vocabularies exceed the pipeline size limit of some
    # runners.
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
  """Writes a shard; runs on a worker.

  Args:
    shard: a `cache_writer.CacheShard`, as a tuple.
    job_path: path of a pickled `Job`.
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
  """Opens a split once per process; its threads share the result."""
  from l2s_jax.data.features import seqio

  job = _read_job(job_path)
  with _binding:
    if gin.config_str() != job.config:  # Skipped in the launching process.
      with gin.unlock_config():
        gin.parse_config(job.config, skip_unknown=True)
    bound = tasks.bind(job.mixture_or_task_name, *job.encoder.vocabularies)
    (part,) = (part for part in seqio.get_subtasks(bound) if part.name == task)
    return cache_texts.Texts(part, split, job.task_feature_lengths)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
  """Re-raises a worker's error without Beam's text and tracebacks."""
  try:
    yield
  except Exception as error:
    found = _ERROR.findall(str(error))
    if found:
      raise ValueError(_WHERE.sub('', found[-1])) from error
    if isinstance(error, ValueError | FileNotFoundError):
      raise type(error)(_WHERE.sub('', str(error))) from error
    raise
