# SPDX-License-Identifier: Apache-2.0
"""Tasks: what the prompt is, what the answer is, and how answers are scored.

A task is text to text and knows no vocabulary. `bind` gives any registered
SeqIO task or mixture, a user's own included, the two vocabularies of a model:
(LLM, SLM) for LLM-to-SLM, (LLM, LLM) and (SLM, SLM) for the baselines. Lengths,
padding and batches are in `features.py` and `data.py`. Importing this module,
as reading a gin file does, does not import TensorFlow.
"""

import difflib
import functools
import gzip
import inspect
import itertools
import json
import string
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin
from etils import epath

from l2s_jax import cldr, vocabularies
from l2s_jax import metrics as metrics_lib

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# name: (TFDS name, prompt template over its languages, language of the answer)
_WMT_TASKS = {
  'wmt16_en_de': (
    'wmt16_translate/de-en:1.0.0',
    'translate English to German: {en}',
    'de',
  ),
}
_TRANSLATION_METRICS = ('bleu', 'chrf', 'exact_match')
# Lines. SeqIO shuffles tokenized examples, 1,000 at a time, which leaves a
# sorted corpus sorted; text takes less memory and time, about 50 MB here.
_SHUFFLE_BUFFER_SIZE = 200_000

# A pair of parallel text files, one JSONL file, or a list of either.
DataFiles = str | tuple[str, str] | list[str | tuple[str, str]]


def register() -> None:
  """Adds `cldr` and the WMT tasks to SeqIO's registry, once."""
  from l2s_jax.features import seqio

  if 'cldr' in seqio.TaskRegistry.names():
    return
  seqio.TaskRegistry.add_provider(
    'cldr',
    _make_task(
      'cldr',
      _make_source(_read_cldr, splits=tuple(cldr.SIZES)),
      _text_to_text('{prompt}', 'answer'),
      _TRANSLATION_METRICS,
    ),
  )
  for name, (tfds_name, template, target_column) in _WMT_TASKS.items():
    seqio.TaskRegistry.add_provider(
      name,
      _make_task(
        name,
        seqio.TfdsDataSource(tfds_name),
        _text_to_text(template, target_column),
        _TRANSLATION_METRICS,
      ),
    )


@gin.configurable(module='l2s_jax')
def local_task(
  data_files: Mapping[str, DataFiles],
  *,
  data_dir: str | None = None,
  template: str = '{source}',
  source_column: str = 'source',
  target_column: str = 'target',
  metrics: Sequence[str] = _TRANSLATION_METRICS,
  name: str = 'local',
) -> 'seqio.Task':
  """Makes a task out of the user's own files.

  `bind('local', ...)` calls it with what gin binds; to mix several, register
  each, under its name, with SeqIO.

  Parallel text is streamed, after one pass that checks it when its split is
  first used; JSONL is read into memory. File names that end in `.gz` are gzip.

  Args:
    data_files: for each split its files. A tuple of two is a pair of parallel
      text files, prompts then answers, line by line; a string is a JSONL file,
      `*.jsonl` or `*.jsonl.gz`; a list holds several of either.
    data_dir: where relative paths start; None: the working directory.
    template: the prompt. `{source}` stands for the column `source_column`, any
      other name in braces for the JSONL column of that name; braces meant
      literally are doubled.
    source_column: column of the prompt's text.
    target_column: column of the answer.
    metrics: names of functions in `metrics.py`.
    name: of the task.

  Raises:
    FileNotFoundError: if files are missing.
    ValueError: if a file's kind, the template or a metric is not understood;
      later, from the dataset, if what a file holds is not.
  """
  files = {
    split: _resolve_files(split, value, data_dir)
    for split, value in data_files.items()
  }
  template = _rename_source(template, source_column)
  columns = {*_columns_of(template), target_column}

  @functools.cache
  def read(split: str) -> 'tf.data.Dataset':
    datasets = [
      _read_jsonl(paths[0], columns)
      if len(paths) == 1
      else _read_parallel_text(paths, (source_column, target_column), columns)
      for paths in files[split]
    ]
    return functools.reduce(lambda one, two: one.concatenate(two), datasets)

  return _make_task(
    name,
    _make_source(read, splits=tuple(files)),
    _text_to_text(template, target_column),
    metrics,
  )


@gin.configurable('tfds', module='l2s_jax')
def _tfds_data_dir(data_dir: str | None = None) -> str | None:
  """Returns where TFDS finds and puts its data; None: its own default."""
  return data_dir


def bind(
  name: str,
  prompt_vocabulary: vocabularies.Vocabulary,
  answer_vocabulary: vocabularies.Vocabulary,
) -> 'seqio.Task | seqio.Mixture':
  """Returns a task or mixture that speaks the given vocabularies.

  Source, preprocessors, postprocessing and metrics are the registered task's.
  The result has its name and is not registered. EOS is appended before
  trimming, whatever the task did, so that a truncated sequence has none and can
  be counted; the raw answer stays beside the ids as `targets_pretokenized`.

  Args:
    name: of a SeqIO task or mixture, or `local`.
    prompt_vocabulary: for `inputs`.
    answer_vocabulary: for `targets`.

  Raises:
    ValueError: if there is no such name, or a task has no `inputs` or no
      `targets`.
  """
  from l2s_jax import features
  from l2s_jax.features import seqio, tf

  output_features = {
    key: seqio.Feature(
      vocabulary=features.wrap_vocabulary(vocabulary),
      add_eos=True,
      dtype=tf.int32,
    )
    for key, vocabulary in (
      ('inputs', prompt_vocabulary),
      ('targets', answer_vocabulary),
    )
  }
  eos_steps = (
    seqio.preprocessors.append_eos,
    seqio.preprocessors.append_eos_after_trim,
  )
  data_dir = _tfds_data_dir()

  @functools.cache  # Two mixtures may share a task, which must stay one task.
  def bind_provider(
    provider: 'seqio.Task | seqio.Mixture',
  ) -> 'seqio.Task | seqio.Mixture':
    if isinstance(provider, seqio.Mixture):
      parts = [*provider._tasks, *provider._sub_mixtures]
      return seqio.Mixture(
        provider.name,
        [
          (bind_provider(part), provider.rate_per_task_name[part.name])
          for part in parts
        ],
        sample_fn=provider._sample_fn,
      )
    missing = output_features.keys() - provider.output_features.keys()
    if missing:
      raise ValueError(
        f'task {provider.name!r} gives {", ".join(provider.output_features)} '
        f'and no {", ".join(sorted(missing))}; a prompt and an answer are '
        'needed: let a preprocessor make them.'
      )
    if data_dir and isinstance(provider.source, seqio.TfdsDataSource):
      provider.source.tfds_dataset.override_data_dir(data_dir)
    steps = [step for step in provider.preprocessors if step not in eos_steps]
    return provider.replace(
      output_features=output_features,
      preprocessors=[*steps, features.tokenize_and_measure],
    )

  return bind_provider(_find(name))


def _find(name: str) -> 'seqio.Task | seqio.Mixture':
  from l2s_jax.features import seqio

  register()
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name in registered:
    return seqio.get_mixture_or_task(name)
  if name == 'local':  # Not registered: its files come with the config.
    return local_task()
  names = sorted(registered | {'local'})
  near = difflib.get_close_matches(name, names)
  raise ValueError(
    f'MIXTURE_OR_TASK_NAME={name!r} is not registered with SeqIO'
    + (f'; did you mean {" or ".join(near)}?' if near else '.')
    + f' There are {", ".join(names)}. A task of your own is there once its '
    'module is imported: add `import my_tasks` to a gin file.'
  )


def _make_task(
  name: str,
  source: 'seqio.DataSource',
  preprocessor: Callable[..., Any],
  metric_names: Sequence[str],
) -> 'seqio.Task':
  """Returns a task that stops at text; `bind` adds the tokens."""
  from l2s_jax.features import seqio, tf

  functions = inspect.getmembers(metrics_lib, inspect.isfunction)
  known = [
    metric
    for metric, function in functions
    if not metric.startswith('_')
    and 'predictions' in inspect.signature(function).parameters
  ]
  unknown = [metric for metric in metric_names if metric not in known]
  if unknown:
    raise ValueError(
      f'local_task.metrics names {", ".join(unknown)}; there are '
      f'{", ".join(known)}.'
    )
  text = seqio.Feature(
    seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0
  )
  return seqio.Task(
    name,
    source,
    output_features={'inputs': text, 'targets': text},
    preprocessors=[preprocessor],
    metric_fns=[getattr(metrics_lib, metric) for metric in metric_names],
  )


def _make_source(
  read: Callable[[str], 'tf.data.Dataset'], splits: Sequence[str]
) -> 'seqio.DataSource':
  """Returns a source of a split's columns of text, shuffled when training."""
  from l2s_jax.features import seqio

  def dataset_fn(
    split: str, shuffle_files: bool, seed: int | None = None
  ) -> 'tf.data.Dataset':
    dataset = read(split)
    if not shuffle_files:
      return dataset
    return dataset.shuffle(_SHUFFLE_BUFFER_SIZE, seed)

  return seqio.FunctionDataSource(dataset_fn, splits)


@functools.cache
def _read_cldr(split: str) -> 'tf.data.Dataset':
  from l2s_jax.features import tf

  examples = list(cldr.examples(split))
  return tf.data.Dataset.from_tensor_slices(
    {
      column: [example[column] for example in examples]
      for column in ('prompt', 'answer')
    }
  )


def _text_to_text(template: str, target_column: str) -> Callable[..., Any]:
  """Returns a SeqIO preprocessor from columns to `inputs` and `targets`."""
  parts = list(_parse_template(template))

  def fill(example: Mapping[str, 'tf.Tensor']) -> dict[str, 'tf.Tensor']:
    from l2s_jax.features import tf

    prompt = [
      piece
      for literal, column in parts
      for piece in (literal, example[column] if column else '')
    ]
    return {
      'inputs': tf.strings.join(prompt),
      'targets': example[target_column],
    }

  def fill_all(dataset: 'tf.data.Dataset') -> 'tf.data.Dataset':
    return dataset.map(fill)

  return fill_all


def _parse_template(template: str) -> Iterator[tuple[str, str | None]]:
  """Yields pairs of literal text and the column that follows it, if any.

  Raises:
    ValueError: if it is not literal text and plain names in braces.
  """
  try:
    for literal, column, spec, conversion in string.Formatter().parse(template):
      if column is not None and (spec or conversion or not column.strip()):
        raise ValueError('only a plain {name} may stand in braces')
      yield literal, column
  except ValueError as error:
    raise ValueError(
      f'local_task.template={template!r}: {error}. Write a column as '
      '{name} and a literal brace twice.'
    ) from error


def _columns_of(template: str) -> list[str]:
  return [column for _, column in _parse_template(template) if column]


def _rename_source(template: str, source_column: str) -> str:
  """Returns the template with `{source}` as the column it stands for."""

  def escape(text: str) -> str:
    return text.replace('{', '{{').replace('}', '}}')

  return ''.join(
    escape(literal)
    + (
      ''
      if column is None
      else '{%s}' % (source_column if column == 'source' else column)
    )
    for literal, column in _parse_template(template)
  )


def _resolve_files(
  split: str, value: DataFiles, data_dir: str | None
) -> list[list[epath.Path]]:
  """Returns one path for each JSONL file, two for each parallel text.

  Raises:
    FileNotFoundError: naming the gin key and every missing path.
    ValueError: if the value is of another form.
  """
  folder = epath.Path(data_dir or '')
  resolved = []
  for item in value if isinstance(value, list) else [value]:
    is_jsonl = isinstance(item, str)
    names = (item,) if isinstance(item, str) else item
    if len(names) != (1 if is_jsonl else 2) or any(
      name.endswith(('.jsonl', '.jsonl.gz')) != is_jsonl for name in names
    ):
      raise ValueError(
        f'DATA_FILES[{split!r}] has {item!r}; expected a JSONL file, '
        "'x.jsonl' or 'x.jsonl.gz', or a pair of parallel text files in "
        "parentheses, ('x.en', 'x.de'); or a list, in brackets, of "
        'several of them.'
      )
    paths = [folder / name for name in names]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
      raise FileNotFoundError(
        f'DATA_FILES[{split!r}]: no file {", ".join(missing)}. Relative '
        f'names start at DATA_DIR, which is {data_dir!r}.'
      )
    resolved.append(paths)
  return resolved


def read_lines(path: epath.Path) -> Iterator[str]:
  """Yields the lines of a text file, plain or .gz.

  Lines end where those of `tf.data.TextLineDataset` do.

  Raises:
    ValueError: naming file and line, if it is not UTF-8 or not gzip.
  """
  number = 0
  with path.open('rb') as raw:
    lines = gzip.open(raw) if path.name.endswith('.gz') else raw
    try:
      for line in lines:
        number += 1
        yield line.rstrip(b'\r\n').decode()
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{path}:{number} is not UTF-8: {error}. Convert the file, or remove '
        'the line.'
      ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise ValueError(
        f'{path} is not a whole gzip file (after line {number}): {error}. '
        'Fetch it again, or drop .gz from its name.'
      ) from error


def _read_parallel_text(
  paths: Sequence[epath.Path], names: tuple[str, str], columns: set[str]
) -> 'tf.data.Dataset':
  """Streams the columns of two files, checked from end to end first."""
  from l2s_jax.features import tf

  source, target = paths
  unknown = columns - set(names)
  if unknown:
    raise ValueError(
      f'local_task.template names {", ".join(sorted(unknown))}, but the '
      f'parallel text {source} and {target} has no column but source.'
    )
  pairs = itertools.zip_longest(read_lines(source), read_lines(target))
  counts = [0, 0]
  for number, pair in enumerate(pairs, start=1):
    for side, line in enumerate(pair):
      counts[side] += line is not None
      if line is not None and not line.strip():
        raise ValueError(
          f'{paths[side]}:{number} is empty; an example needs a '
          'prompt and an answer. Remove the line from both files.'
        )
  if counts[0] != counts[1]:
    raise ValueError(
      f'{source} has {counts[0]} lines and {target} has {counts[1]}; '
      'parallel text needs as many in both, line by line.'
    )

  def stream(path: epath.Path) -> 'tf.data.Dataset':
    return tf.data.TextLineDataset(
      str(path), 'GZIP' if path.name.endswith('.gz') else None
    )

  path_of = dict(zip(names, paths, strict=True))
  return tf.data.Dataset.zip(
    {column: stream(path_of[column]) for column in columns}
  )


def _read_jsonl(path: epath.Path, columns: set[str]) -> 'tf.data.Dataset':
  """Reads the named columns of a JSONL file into memory.

  In memory because parsing it inside the pipeline would need Python there, and
  such an iterator can be neither saved nor relied on to let the process exit.
  """
  from l2s_jax.features import tf

  values: dict[str, list[str]] = {column: [] for column in sorted(columns)}
  for number, line in enumerate(read_lines(path), start=1):
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}:{number} is not JSON: {error}.') from error
    if not isinstance(row, dict):
      raise ValueError(
        f'{path}:{number} holds a JSON {type(row).__name__}, expected an '
        'object.'
      )
    for column, texts in values.items():
      text = row.get(column)
      if not isinstance(text, str) or not text.strip():
        found = f'is {text!r}' if column in row else 'is missing'
        raise ValueError(
          f'{path}:{number}: column {column!r} {found}, expected text that '
          f'is not empty. The line has {", ".join(row)}; '
          'local_task.source_column, target_column and template say which '
          'are read.'
        )
      texts.append(text)
  return tf.data.Dataset.from_tensor_slices(values)
