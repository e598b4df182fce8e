# SPDX-License-Identifier: Apache-2.0
"""The cache key: a JSON description of everything that determines the content.

Code, such as user-defined preprocessors, enters the key by its source and by a
hash of the first examples. A change of either is detected.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin

from l2s_jax.caching import cache_texts
from l2s_jax.data import distilled, seqio_internals, sources, tasks
from l2s_jax.runtime import files
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio

# Packages whose versions may change tokens, parsing or rendering.
_PACKAGES = ('tokenizers', 'sentencepiece', 'tensorflow_datasets', 'seqio')
_CLDR_PACKAGES = ('babel', 'num2words')
NUM_SAMPLED = 256  # examples

# By task name, then split.
TextsBySplit = Mapping[str, Mapping[str, cache_texts.Texts]]


def describe(
  name: str,
  bound: Sequence['seqio.Task'],
  texts: TextsBySplit,
  *,
  rates: Mapping[str, float],
  vocabularies: Mapping[str, base.Vocabulary],
  task_feature_lengths: Mapping[str, int],
) -> dict[str, Any]:
  """Returns the cache key of a task or mixture.

  Args:
    name: name of the task or mixture, as for `tasks.bind`.
    bound: its tasks, from `tasks.bind`.
    texts: texts of the cached splits.
    rates: mixture rates by task name.
    vocabularies: vocabularies under 'prompt' and 'answer'.
    task_feature_lengths: lengths of `inputs` and `targets`, in tokens. They are
      part of the key if a preprocessor takes them. Cached examples are not cut.
  """
  local = dict(filter(None, map(_local_settings, _leaves(name))))
  described = {}
  for task in bound:
    splits = texts[task.name]
    described[task.name] = {
      'settings': _settings(task, local.get(task.name)),
      'preprocessors': [_code(step) for step in task.preprocessors[:-1]],
      'splits': {
        split: {
          'source': _source(task, split, local.get(task.name)),
          'first_examples': _sample(split_texts),
        }
        for split, split_texts in splits.items()
      },
    }
    if any(split_texts.uses_lengths for split_texts in splits.values()):
      described[task.name]['lengths'] = dict(task_feature_lengths)
  names = _PACKAGES + (_CLDR_PACKAGES if 'cldr' in texts else ())
  key = {
    'mixture_or_task': name,
    'rates': dict(rates),
    'tasks': described,
    'vocabularies': {
      side: vocabulary.fingerprint()
      for side, vocabulary in vocabularies.items()
    },
    'versions': {
      package: importlib.metadata.version(package) for package in names
    },
  }
  return json.loads(json.dumps(key, default=repr))


def check(
  found: Mapping[str, Any], wanted: Mapping[str, Any], folder: str
) -> None:
  """Refuses a cache with another key.

  Raises:
    ValueError: with a line for each difference.
  """
  lines = files.differences(found, wanted, have='the cache has', want='now')
  if lines:
    raise ValueError(
      f'CACHE_DIR={folder} has a cache with other settings or data:\n'
      + '\n'.join(lines)
      + '\nSet another CACHE_DIR, or remove this folder to cache again.'
    )


def _leaves(name: str) -> list[str]:
  """Returns the task names in a gin-configured mixture, recursively.

  Any other name is returned as it is.
  """
  scope, _, kind = name.rpartition('/')
  if kind != 'mixture':
    return [name]
  with gin.config_scope(scope or None):
    rates = gin.get_bindings(tasks.mixture).get('tasks', {})
  return [leaf for task in rates for leaf in _leaves(task)]


def _local_settings(name: str) -> tuple[str, dict[str, Any]] | None:
  """Returns name and settings, with defaults, of a local or distilled task.

  The settings of a distilled task are `tasks.distilled_settings`. Returns None
  for any other task.
  """
  scope, _, kind = name.rpartition('/')
  if kind == 'local':
    settings = tasks.bound_settings(tasks.local_task, name)
    for scoring in ('metrics', 'name'):
      settings.pop(scoring)
  elif kind == 'distilled':
    settings = tasks.distilled_settings(name)
  else:
    return None
  return scope.replace('/', '.') or kind, settings


def _settings(
  task: 'seqio.Task', local: Mapping[str, Any] | None
) -> dict[str, Any]:
  if local is None:
    return {'template': tasks.tfds_config(task.name).template}
  # The key represents files by a hash of their contents.
  return {
    key: value
    for key, value in local.items()
    if key not in ('data_files', 'data_dir')
  }


def _source(
  task: 'seqio.Task', split: str, local: dict[str, Any] | None
) -> Any:
  """Returns an identifier of a split's data."""
  from l2s_jax.data.features import seqio

  if local is not None and 'distilled' in local:
    if split == distilled.SPLIT:
      return local['distilled']
    return _gold_source(task, split, local['gold_task'])
  if local is not None:
    return sources.fingerprint(
      local['data_files'][split], local['data_dir'], split
    )
  if isinstance(task.source, seqio.TfdsDataSource):
    loader = task.source.tfds_dataset
    return {
      'tfds': loader.get_split_params(split)[0],
      'split': seqio_internals.tfds_split(loader, split),
      'num_examples': loader.size(split),
    }
  return {
    'kind': type(task.source).__name__,
    'num_examples': task.source.num_input_examples(split),
  }


def _gold_source(task: 'seqio.Task', split: str, gold_task: str) -> Any:
  """Returns an identifier of the data of a distilled task's gold split."""
  named = _local_settings(gold_task)
  if named is not None:
    return _source(task, split, named[1])
  return {'task': gold_task, 'split': split}


def _code(step: Callable[..., Any]) -> str:
  """Returns a preprocessor's name and a hash of its source."""
  fn: Any = step.func if isinstance(step, functools.partial) else step
  name = getattr(fn, '__qualname__', type(fn).__qualname__)
  place = f'{getattr(fn, "__module__", "")}.{name}'
  try:
    text = inspect.getsource(fn if hasattr(fn, '__qualname__') else type(fn))
  except (OSError, TypeError):
    text = ''
  return f'{place} {hashlib.sha256(text.encode()).hexdigest()[:16]}'


def _sample(texts: cache_texts.Texts) -> str:
  content = json.dumps(texts.sample(NUM_SAMPLED), default=repr, sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()
