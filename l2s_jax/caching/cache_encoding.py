# SPDX-License-Identifier: Apache-2.0
"""Encodes texts into cache records, in several processes.

A worker process imports tokenizers but no TensorFlow, and exits with its
parent, even if that is killed.
"""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import process
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np

from l2s_jax.data.cached import cache_format
from l2s_jax.vocabularies import base

# Number of queued chunks per process; keeps all processes busy.
_AHEAD = 3


class Work(NamedTuple):
  """Consecutive examples to encode.

  Attributes:
    label: task and split, for messages.
    first: number of the first example.
    columns: column values, with `inputs` and `targets`.
  """

  label: str
  first: int
  columns: Mapping[str, list[Any]]


class Encoded(NamedTuple):
  """The encoded examples of a `Work`.

  Attributes:
    records: one record per example.
    entries: [n, 3] uint32 index entries.
  """

  records: list[bytes]
  entries: np.ndarray


class Encoder:
  """Picklable function from `Work` to `Encoded`.

  Attributes:
    vocabularies: prompt and answer vocabulary.
    dtype: dtype of the ids.
  """

  def __init__(
    self, prompt_vocabulary: base.Vocabulary, answer_vocabulary: base.Vocabulary
  ):
    self.vocabularies = (prompt_vocabulary, answer_vocabulary)
    self.dtype = cache_format.id_dtype(
      prompt_vocabulary.vocab_size, answer_vocabulary.vocab_size
    )

  def __call__(self, work: Work) -> Encoded:
    """Returns the records of examples.

    Raises:
      ValueError: naming the example, if a text is not UTF-8 or the model has
        no embedding for one of its tokens.
    """
    texts = {
      name: self._texts(work, name, values)
      for name, values in work.columns.items()
    }
    ids = {}
    for key, vocabulary in zip(
      ('inputs', 'targets'), self.vocabularies, strict=True
    ):
      values = texts.pop(key)
      if values and isinstance(values[0], str):
        texts[f'{key}_pretokenized'] = values
        values = vocabulary.encode_batch(values)
      ids[key] = values
      # As `features.batch_of_ids`: appends EOS only if it is missing.
      end = vocabulary.eos_id
      for row in values:
        if not row or row[-1] != end:
          row.append(end)
    records = cache_format.encode_all(
      ids['inputs'], ids['targets'], texts, self.dtype
    )
    entries = [
      [len(row) for row in ids['inputs']],
      [len(row) for row in ids['targets']],
      [cache_format.checksum(record) for record in records],
    ]
    return Encoded(records, np.array(entries, np.uint32).T.copy())

  def _texts(self, work: Work, name: str, values: list[Any]) -> list[Any]:
    """Decodes the bytes of a column."""
    if values and isinstance(values[0], bytes):
      with contextlib.suppress(UnicodeDecodeError):  # Named below.
        return [value.decode() for value in values]
    return [self._text(work, name, n, value) for n, value in enumerate(values)]

  def _text(self, work: Work, name: str, place: int, value: Any) -> Any:
    """Decodes the bytes of a value."""
    if isinstance(value, list):
      return [self._text(work, name, place, part) for part in value]
    if not isinstance(value, bytes):
      return value
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{work.label}: example {work.first + place} has bytes in {name!r} '
        f'that are not UTF-8 ({error.reason} at byte {error.start}). Correct '
        'or remove it.'
      ) from error


@contextlib.contextmanager
def encoding(
  encoder: Encoder, num_workers: int
) -> Iterator[Callable[[Iterable[Work]], Iterator[Encoded]]]:
  """Yields a function that encodes in order, with a short read-ahead.

  Args:
    encoder: the function each process runs.
    num_workers: number of processes; 1: this process alone.
  """
  if num_workers == 1:
    yield lambda works: map(encoder, works)
    return
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([__name__])
  with concurrent.futures.ProcessPoolExecutor(
    num_workers, context, initializer=_begin, initargs=(encoder,)
  ) as pool:

    def encode_all(works: Iterable[Work]) -> Iterator[Encoded]:
      pending: collections.deque[concurrent.futures.Future[Encoded]] = (
        collections.deque()
      )
      for work in works:
        pending.append(pool.submit(_encode, work))
        if len(pending) > _AHEAD * num_workers:
          yield _result(pending.popleft())
      while pending:
        yield _result(pending.popleft())

    try:
      yield encode_all
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _result(future: 'concurrent.futures.Future[Encoded]') -> Encoded:
  try:
    return future.result()
  except ValueError as error:
    raise ValueError(str(error)) from error
  except process.BrokenProcessPool as error:
    raise ValueError(
      'a tokenizing process was killed, possibly for lack of memory. Run '
      '`cache` again: complete shards are kept. Fewer processes '
      '(cache.num_workers) need less memory.'
    ) from error


_encoder: Encoder | None = None


def _begin(encoder: Encoder) -> None:
  """Sets up a worker process: one tokenizer thread, exit with its parent."""
  global _encoder
  _encoder = encoder
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  connection.wait([parent.sentinel])
  os._exit(1)


def _encode(work: Work) -> Encoded:
  assert _encoder is not None
  return _encoder(work)
