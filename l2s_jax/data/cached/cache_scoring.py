# SPDX-License-Identifier: Apache-2.0
"""SeqIO tasks that read a cache, for evaluation; the package's TensorFlow code.

Their examples have ids, lengths before cutting, and text columns, like those of
`tasks.bind`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from l2s_jax.data import templates
from l2s_jax.data.cached import cache_format
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf


def task(
  cache: cache_format.TokenCache,
  name: str,
  split: str,
  *,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
  metric_fns: Sequence[Any],
) -> 'seqio.Task':
  """Returns a SeqIO task for one task of a cache.

  Args:
    cache: the token cache.
    name: name of the task.
    split: split to be scored.
    prompt_vocabulary: vocabulary of the prompt ids.
    answer_vocabulary: vocabulary of the answer ids.
    metric_fns: metrics of the task.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio

  return seqio.Task(
    name,
    seqio.FunctionDataSource(
      functools.partial(_dataset, cache, name),
      splits=sorted(cache.tasks[name]['splits']),
    ),
    output_features=features.output_features(
      prompt_vocabulary, answer_vocabulary
    ),
    preprocessors=[],
    postprocess_fn=_postprocess_fn(cache, name, split),
    metric_fns=list(metric_fns),
  )


def _dataset(
  cache: cache_format.TokenCache,
  name: str,
  split: str,
  shuffle_files: bool = False,
  seed: int | None = None,
) -> 'tf.data.Dataset':
  """Returns the examples of a split in the task's own order."""
  from l2s_jax.data.features import tf

  del shuffle_files, seed  # Evaluation does not shuffle.
  ids, number = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)
  specs = {
    'inputs': ids,
    'targets': ids,
    'inputs_length': number,
    'targets_length': number,
  }
  kinds = _text_columns(cache, name, split)
  for column, is_list in kinds.items():
    specs[column] = tf.TensorSpec([None] if is_list else [], tf.string)

  def generate() -> Iterator[dict[str, Any]]:
    for prompt, answer, texts in _examples(cache, name, split):
      yield {
        'inputs': prompt.astype(np.int32),
        'targets': answer.astype(np.int32),
        'inputs_length': np.int32(len(prompt)),
        'targets_length': np.int32(len(answer)),
        **{
          column: _as_bytes(texts[column], is_list)
          for column, is_list in kinds.items()
        },
      }

  return tf.data.Dataset.from_generator(generate, output_signature=specs)


def _as_bytes(text: str | Sequence[str], is_list: bool) -> Any:
  if is_list:
    return np.array([each.encode() for each in text], object)
  return str(text).encode()


def _text_columns(
  cache: cache_format.TokenCache, name: str, split: str
) -> dict[str, bool]:
  """Returns the text columns, and whether each holds a list of texts."""
  texts = next(_examples(cache, name, split, block=1))[2]
  return {
    column: isinstance(value, list)
    for column, value in texts.items()
    if isinstance(value, str | list)
  }


def _postprocess_fn(
  cache: cache_format.TokenCache, name: str, split: str
) -> Callable[..., Any] | None:
  """Returns the postprocessor of targets: the task's own, or references."""
  from l2s_jax.data.features import seqio

  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name).postprocessor
  if 'references' in _text_columns(cache, name, split):
    return templates.with_references
  return None


def _examples(
  cache: cache_format.TokenCache, name: str, split: str, block: int = 256
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
  """Yields uncut prompt ids, answer ids and texts, in the task's own order.

  Args:
    cache: the token cache.
    name: name of one of its tasks.
    split: split of this task.
    block: number of examples read at a time.
  """
  source = cache.split(name, split)
  for start in range(0, source.num_examples, block):
    stop = min(start + block, source.num_examples)
    for record in source.read(range(start, stop)):
      prompt, answer = cache_format.decode_ids(record, source.dtype)
      yield prompt, answer, cache_format.decode_texts(record, source.dtype)
