# SPDX-License-Identifier: Apache-2.0
"""Tasks: definition, registration and binding of SeqIO tasks and mixtures.

A task maps a text prompt to a text answer, with metrics, and has no vocabulary.
`bind` gives any registered SeqIO task or mixture, including user-defined ones,
two vocabularies: (LLM, SLM) for LLM-to-SLM, (LLM, LLM) and (SLM, SLM) for the
baselines. The text columns come from `sources.py`; lengths, padding and batches
are in `features.py` and `streams.py`. Importing this module, which reading a
gin file does, does not import TensorFlow.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import gin

from l2s_jax.data import (
  distilled,
  memory,
  seqio_internals,
  sources,
  templates,
)
from l2s_jax.metrics import bleu, scores
from l2s_jax.metrics import metric_fns as metric_fns_lib
from l2s_jax.vocabularies import base

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

_TRANSLATION_METRICS = ('bleu', 'chrf', 'exact_match')


class _TfdsTask(NamedTuple):
  """A TFDS task, with T5's prefix in its template."""

  tfds_name: str
  template: str
  source_column: str
  target_column: str
  metric_fns: Sequence[metric_fns_lib.Metric]


def _translation(
  tfds_name: str, language: str, code: str, tokenizer: str = '13a'
) -> _TfdsTask:
  """Returns a task of translation from English, with its metrics."""
  template = f'translate English to {language}: {{source}}'
  scored = [
    bleu.Bleu('bleu', tokenizer),
    metric_fns_lib.chrf,
    metric_fns_lib.exact_match,
  ]
  return _TfdsTask(tfds_name, template, 'en', code, scored)


_TFDS_TASKS = {
  'wmt14_en_de': _translation('wmt14_translate/de-en:1.0.0', 'German', 'de'),
  'wmt14_en_fr': _translation('wmt14_translate/fr-en:1.0.0', 'French', 'fr'),
  'wmt16_en_de': _translation('wmt16_translate/de-en:1.0.0', 'German', 'de'),
  'wmt16_en_ro': _translation('wmt16_translate/ro-en:1.0.0', 'Romanian', 'ro'),
  'wmt19_en_zh': _translation(
    'wmt19_translate/zh-en:1.0.0', 'Chinese', 'zh', tokenizer='zh'
  ),
  'cnn_dailymail': _TfdsTask(
    'cnn_dailymail:3.4.0',
    'summarize: {source}',
    'article',
    'highlights',
    [metric_fns_lib.rouge],
  ),
}


def register() -> None:
  """Adds `cldr`, the WMT tasks and `cnn_dailymail` to SeqIO's registry, once.

  `seqio_cache_tasks` caches their text columns, so one cache serves all
  templates and vocabularies.
  """
  from l2s_jax.data.features import seqio

  if 'cldr' in seqio.TaskRegistry.names():
    return
  prompt = templates.Template('{prompt}')
  seqio.TaskRegistry.add_provider(
    'cldr',
    _make_task(
      'cldr',
      sources.cldr_source(),
      [
        seqio.CacheDatasetPlaceholder(),
        templates.text_to_text(prompt, prompt, 'answer'),
      ],
      [metric_fns_lib.METRICS[name] for name in _TRANSLATION_METRICS],
    ),
  )
  for name, task in _TFDS_TASKS.items():
    seqio.TaskRegistry.add_provider(
      name,
      _make_task(
        name,
        seqio.TfdsDataSource(task.tfds_name),
        _tfds_preprocessors(task, task.template),
        task.metric_fns,
      ),
    )


@gin.configurable(module='l2s_jax')
def local_task(
  data_files: Any,  # Validated by `sources`.
  *,
  data_dir: str | None = None,
  template: str = '{source}',
  fallback_template: str | None = None,
  source_column: str = 'source',
  target_column: str = 'target',
  reference_columns: Sequence[str] = (),
  column_names: Sequence[str] | None = None,
  bad_lines: str = 'refuse',
  metrics: Sequence[str] = _TRANSLATION_METRICS,
  name: str = 'local',
) -> 'seqio.Task':
  """Makes a task from local files.

  `bind('local', ...)` calls it with its gin bindings, and `bind('NAME/local')`
  with those of the gin scope NAME: `NAME/local_task.data_files = ...`.

  Parallel text is streamed, after one full check when its split is first used;
  record files are read into memory. File names with the ending .gz are gzip.

  Args:
    data_files: files of each split. A tuple of two is a pair of parallel text
      files, prompts then answers, line by line. A string is a file `*.jsonl`,
      `*.ndjson`, `*.json`, `*.tsv`, `*.csv`, `*.parquet` or `*.tfrecord`; see
      `text_files.py`. A list holds several of either.
    data_dir: base folder of relative paths; None: the working directory.
    template: prompt template. `{source}` stands for the column `source_column`,
      any other name in braces for the column of that name; literal braces are
      doubled.
    fallback_template: template for rows without text in a column of `template`
      that the fallback lacks, such as Alpaca's instructions without input.
      None: such rows are bad lines.
    source_column: column of the prompt's text. A nested column is written
      `translation.en`.
    target_column: column of the answer.
    reference_columns: columns with a text or a list of texts, if any: further
      references for scoring, equal to the answer.
    column_names: column names of TSV and CSV files without a header line.
    bad_lines: 'refuse' raises at a bad line; 'skip' drops bad lines and prints
      their number to standard error. A line is bad if it is not UTF-8, is not
      of the file's kind, or has no text in a required column.
    metrics: names of metrics in `metrics/metric_fns.py` or of
      `scores.functions`; `scores` has their settings.
    name: name of the task.

  Raises:
    FileNotFoundError: if files are missing.
    ValueError: for an unknown file kind or metric, or an invalid template;
      later, from the dataset, for invalid file content.
  """
  prompt = templates.Template(template, source_column)
  fallback = templates.Template(fallback_template or template, source_column)
  required = {*fallback.columns, target_column}
  source = sources.local_source(
    data_files,
    data_dir=data_dir,
    columns=sources.Columns(
      required=sorted(required),
      optional=sorted(set(prompt.columns) - required),
      references=reference_columns,
      names=column_names,
    ),
    pair=(source_column, target_column),
    bad_lines=bad_lines,
    name=name,
  )
  return _make_task(
    name,
    source,
    [templates.text_to_text(prompt, fallback, target_column)],
    scores.Scores().named(metrics, 'local_task.metrics'),
    postprocess_fn=templates.with_references if reference_columns else None,
  )


@gin.configurable(module='l2s_jax')
def distilled_task(
  distill_dir: str,
  *,
  answers: str = 'best',
  unended: str = 'drop',
  gold_splits: bool = True,
  name: str = 'distilled',
) -> 'seqio.Task':
  """Makes a task from a teacher's answers, the output of `distill`.

  `bind('distilled', ...)` calls it with its gin bindings, and
  `bind('NAME/distilled')` with those of the gin scope NAME. The gold task is
  the distilled task with its original answers; the folder's manifest names it.
  Its settings must equal those at distillation. The split 'train' pairs its
  prompts with the teacher's answers, and is read into memory. The other splits,
  the metrics and the postprocessing are the gold task's.

  Args:
    distill_dir: folder of distilled answers.
    answers: 'best', 'each' or 'drawn': selection among several answers to a
      prompt; see `distilled.examples`.
    unended: 'drop' or 'keep' answers cut by the teacher's token limit.
    gold_splits: whether the task has the gold task's other splits. False for a
      mixture with the gold task, whose splits would be scored twice.
    name: name of the task.

  Raises:
    FileNotFoundError: if the folder is missing or incomplete.
    ValueError: if it has answers to prompts other than the gold task's, or a
      setting is invalid.
  """
  folder = distilled.open_folder(distill_dir)
  folder.check_task(data_settings(folder.task))
  gold = _find(folder.task, f'DISTILL_DIR={distill_dir} of {folder.task!r}')
  return _make_task(
    name,
    sources.distilled_source(
      functools.partial(
        distilled.examples, folder, answers=answers, unended=unended, name=name
      ),
      functools.partial(_read_texts, gold),
      [split for split in gold.splits if gold_splits],
    ),
    [],
    _with_settings(gold).metric_fns,
    postprocess_fn=gold.postprocessor,
  )


def distilled_settings(name: str) -> dict[str, Any]:
  """Returns the settings that determine distilled training examples.

  Args:
    name: 'distilled', optionally with a gin scope before it.

  Raises:
    FileNotFoundError: if the folder is missing or incomplete.
  """
  bound = bound_settings(distilled_task, name)
  folder = distilled.open_folder(bound['distill_dir'])
  return {
    'gold_task': folder.task,
    'distilled': folder.digest,
    'answers': bound['answers'],
    'unended': bound['unended'],
  }


@gin.configurable(module='l2s_jax')
def mixture(
  tasks: Mapping[str, float | str], name: str = 'mixture'
) -> 'seqio.Mixture':
  """Makes a mixture of tasks by name.

  `bind('mixture', ...)` calls it with its gin bindings. Each example is sampled
  from a task with probability rate / (sum of all rates).

  Args:
    tasks: rate of each task: a number, or 'proportional' for its number of
      training examples. The names are those of `bind`: SeqIO tasks and
      mixtures, `local`, `distilled`, and these with a gin scope.
    name: name of the mixture.

  Raises:
    ValueError: if there are no tasks, two have the same name, or a rate is
      invalid.
  """
  from l2s_jax.data.features import seqio

  rates = dict(tasks)
  bad = {
    task: rate
    for task, rate in rates.items()
    if rate != 'proportional'
    and not (isinstance(rate, int | float) and 0 < rate < float('inf'))
  }
  if bad or not rates:
    raise ValueError(
      f"mixture.tasks={rates!r}: expected {{'task': rate, ...}}, each rate "
      "positive or 'proportional'."
    )
  parts = [
    (_find(task), _num_train_examples if rate == 'proportional' else rate)
    for task, rate in rates.items()
  ]
  names = [part.name for part, _ in parts]
  if len(set(names)) < len(names):
    raise ValueError(
      f'mixture.tasks={rates!r} are named {", ".join(names)}; expected unique '
      'names.'
    )
  return seqio.Mixture(name, parts)


@gin.configurable('tfds', module='l2s_jax')
@dataclasses.dataclass(frozen=True)
class TfdsConfig:
  """Configuration of TFDS tasks; in a gin scope, of the task with its name.

  Attributes:
    data_dir: folder of TFDS data sets; None: TFDS's default.
    template: prompt template of this module's TFDS tasks, with `{source}` or
      the data set's columns in braces; None: the task's own, with T5's prefix.
    download: whether to download and prepare a missing data set, which takes
      minutes to days. False refuses it.
  """

  data_dir: str | None = None
  template: str | None = None
  download: bool = False


@gin.configurable('cached_tasks', module='l2s_jax')
@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """Configuration of reading tasks from `seqio_cache_tasks` caches.

  Attributes:
    use: whether to read every task with a CacheDatasetPlaceholder from its
      cache.
    cache_dirs: folders of caches, searched before those registered by
      `seqio.add_global_cache_dirs`.
  """

  use: bool = False
  cache_dirs: Sequence[str] = ()


def bind(
  name: str,
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
  *,
  label: str | None = None,
) -> 'seqio.Task | seqio.Mixture':
  """Binds a task or mixture to the given vocabularies.

  Source, preprocessors, postprocessing and metrics are the registered task's;
  for a cached task, source and preprocessors are those after the cache. The
  result has the task's name and is not registered. EOS is appended before
  trimming, whatever the task did, so a truncated sequence has none and can be
  counted; the raw answer is kept as `targets_pretokenized`.

  No data are read; `StreamedTask.check_data` checks for them.

  Args:
    name: a SeqIO task or mixture, `local`, `distilled`, `mixture`, or one of
      these with a gin scope before it, such as `news/local`.
    prompt_vocabulary: vocabulary of `inputs`.
    answer_vocabulary: vocabulary of `targets`.
    label: the setting that holds the name, for error messages. None:
      MIXTURE_OR_TASK_NAME.

  Raises:
    ValueError: if the name is unknown, a task lacks `inputs` or `targets`, or a
      task requires a cache that is not enabled.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio

  output_features = features.output_features(
    prompt_vocabulary, answer_vocabulary
  )

  @functools.cache  # Mixtures may share a task, which must stay one object.
  def bind_provider(
    provider: 'seqio.Task | seqio.Mixture',
  ) -> 'seqio.Task | seqio.Mixture':
    if isinstance(provider, seqio.Mixture):
      parts = seqio_internals.parts_of_mixture(provider)
      return seqio.Mixture(
        provider.name,
        [
          (bind_provider(part), provider.rate_per_task_name[part.name])
          for part in parts
        ],
        sample_fn=seqio_internals.sample_fn(provider),
      )
    return _bind_task(provider, output_features)

  return bind_provider(_find(name, label))


def _bind_task(
  task: 'seqio.Task', output_features: Mapping[str, 'seqio.Feature']
) -> 'seqio.Task':
  """Returns the task with ids of the given vocabularies as its last step."""
  from l2s_jax.data import features

  missing = output_features.keys() - task.output_features.keys()
  if missing:
    raise ValueError(
      f'task {task.name!r} has the features {", ".join(task.output_features)} '
      f'and no {", ".join(sorted(missing))}; expected a prompt (inputs) and an '
      'answer (targets). Add a preprocessor that returns them.'
    )
  task = _read_from_cache(_set_up_tfds(_with_settings(task)), CacheConfig())
  steps = [
    step for step in task.preprocessors if step not in features.EOS_STEPS
  ]
  return task.replace(
    output_features=output_features,
    preprocessors=[*steps, features.tokenize_and_measure],
  )


def _with_settings(task: 'seqio.Task') -> 'seqio.Task':
  """Returns the task with gin's settings for its metrics."""
  from l2s_jax.data.features import seqio

  if task.name not in seqio.TaskRegistry.names():
    return task  # Made by this config, with its settings.
  settings = score_settings(task.name)
  return task.replace(metric_fns=settings.of_task(task.metric_fns))


def _read_texts(task: 'seqio.Task', split: str) -> 'tf.data.Dataset':
  """Returns a split of an unbound task as text, in source order.

  Raises:
    FileNotFoundError: if its data are missing.
    ValueError: if the task gives ids, not text.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import tf

  task = _read_from_cache(_set_up_tfds(task), CacheConfig())
  check_data(task, split)
  task = task.replace(preprocessors=features.text_steps(task.preprocessors))
  dataset = task.source.get_dataset(split=split, shuffle=False)
  dataset = task.preprocess_postcache(
    task.preprocess_precache(dataset), sequence_length=None
  )
  spec = dataset.element_spec
  if not spec['inputs'].dtype == spec['targets'].dtype == tf.string:
    raise ValueError(
      f'task {task.name!r} has other preprocessors after its tokenizer; to '
      'distill it, make seqio.preprocessors.tokenize its last preprocessor.'
    )
  return dataset


def data_settings(name: str) -> dict[str, Any]:
  """Returns the settings that determine a task's training examples, for JSON.

  Local files are represented by a hash of their contents, not by name. Scoring
  settings are left out. Two runs with equal settings, seed and lengths see the
  same examples in the same order.

  Args:
    name: as for `bind`.
  """
  scope, _, kind = name.rpartition('/')
  if kind == 'mixture':
    with gin.config_scope(scope or None):
      rates = gin.get_bindings(mixture).get('tasks', {})
    settings: dict[str, Any] = {'tasks': dict(rates)}
    for task in rates:
      settings |= data_settings(task)
  elif kind == 'local':
    with gin.config_scope(scope or None):
      bound = gin.get_bindings(local_task)
    data_files = bound.pop('data_files', {}).get('train')
    data_dir = bound.pop('data_dir', None)
    for scoring in ('metrics', 'reference_columns'):
      bound.pop(scoring, None)
    if data_files is not None:
      bound['train_files'] = sources.fingerprint(data_files, data_dir)
    settings = {name: bound}
  elif kind == 'distilled':
    settings = {name: distilled_settings(name)}
  elif (in_memory := memory.find(name)) is not None:
    settings = {name: {'examples': in_memory.digest}}
  else:
    settings = {name: {'template': tfds_config(name).template}}
  settings['cached'] = CacheConfig().use
  return json.loads(json.dumps(settings))


def check_data(task: 'seqio.Task', split: str) -> None:
  """Refuses a TFDS task with missing data; uses no network.

  Raises:
    FileNotFoundError: naming the data set, the folder and the command that
      prepares it.
  """
  from l2s_jax.data.features import seqio

  if isinstance(task.source, seqio.TfdsDataSource):
    if not tfds_config(task.name).download:
      sources.check_tfds(task.source, split, task.name)


def score_settings(name: str) -> scores.Scores:
  """Returns gin's scoring settings for a task.

  Args:
    name: name of the task, used as a gin scope where it is a valid one.
  """
  scope = name.replace('/', '_').replace('.', '_').isidentifier()
  with gin.config_scope(name if scope else None):
    return scores.Scores()


def metric_names(task: 'seqio.Task') -> list[str]:
  """Returns the names of a task's metrics, for metrics with a name."""
  return [
    function.name
    for function in task.metric_fns
    if isinstance(function, metric_fns_lib.Metric)
  ]


def metrics_of_cached(
  name: str, names: Sequence[str]
) -> list[metric_fns_lib.MetricFn]:
  """Returns the metrics of a cached task, with gin's settings.

  A registered task has its own metrics. User-defined tasks are registered by
  modules that import SeqIO; the registry is searched only if SeqIO is imported.

  Args:
    name: name of the task.
    names: metric names stored in the cache.
  """
  settings = score_settings(name)
  if name in _TFDS_TASKS:
    return settings.of_task(_TFDS_TASKS[name].metric_fns)
  if name != 'cldr' and 'seqio' in sys.modules:
    from l2s_jax.data.features import seqio

    if name in seqio.TaskRegistry.names():
      return settings.of_task(seqio.TaskRegistry.get(name).metric_fns)
  return settings.of_task(
    settings.named(tuple(names), f'metrics in the cache of {name!r}')
  )


def bound_settings(
  configurable: Callable[..., Any], name: str
) -> dict[str, Any]:
  """Returns the arguments of a task's constructor, defaults included.

  Args:
    configurable: constructor such as `local_task`.
    name: name of the task, such as 'news/local'.
  """
  with gin.config_scope(name.rpartition('/')[0] or None):
    bound = gin.get_bindings(configurable)
  parameters = inspect.signature(configurable).parameters.values()
  return {p.name: bound.get(p.name, p.default) for p in parameters}


def tfds_config(task_name: str) -> TfdsConfig:
  """Returns the TFDS configuration of a task."""
  with gin.config_scope(task_name):
    return TfdsConfig()


def _set_up_tfds(task: 'seqio.Task') -> 'seqio.Task':
  """Returns the task with gin's data folder and template for it."""
  from l2s_jax.data.features import seqio

  if not isinstance(task.source, seqio.TfdsDataSource):
    return task
  config = tfds_config(task.name)
  data_dir = config.data_dir
  task.source.tfds_dataset.override_data_dir(
    data_dir and os.path.expanduser(data_dir)
  )
  if config.template is None or task.name not in _TFDS_TASKS:
    return task
  return task.replace(
    preprocessors=_tfds_preprocessors(_TFDS_TASKS[task.name], config.template)
  )


def _read_from_cache(task: 'seqio.Task', config: CacheConfig) -> 'seqio.Task':
  """Returns the task with its cache as source, if caches are enabled.

  Raises:
    ValueError: if caches are disabled and the task requires one.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio

  if not config.use:
    if task.requires_caching:
      raise ValueError(
        f'task {task.name!r} requires a cache: set USE_CACHED_TASKS=True, and '
        'TASK_CACHE_DIRS to the folders of caches.'
      )
    return task
  if not task.supports_caching:
    print(
      f'task {task.name!r} has no CacheDatasetPlaceholder; it is read without '
      'a cache.',
      file=sys.stderr,
    )
    return task
  sources.check_sequence('TASK_CACHE_DIRS', config.cache_dirs)
  cache_dirs = [*config.cache_dirs, *seqio.get_global_cache_dirs()]
  return task.replace(
    source=features.CachedSource(task, cache_dirs),
    preprocessors=[
      features.translate_cached_ids(task),
      *seqio_internals.preprocessors_around_cache(task)[1],
    ],
  )


def _num_train_examples(task: 'seqio.Task') -> float:
  """Returns the number of training examples, a proportional mixture rate."""
  check_data(task, 'train')
  number = task.num_input_examples('train')
  if number is None:
    number = int(task.source.get_dataset('train', shuffle=False).cardinality())
  if number <= 0:
    raise ValueError(
      f"mixture.tasks: the rate 'proportional' needs the number of examples "
      f'of task {task.name!r}, but its source does not have it; set a number.'
    )
  return float(number)


def _find(name: str, label: str | None = None) -> 'seqio.Task | seqio.Mixture':
  from l2s_jax.data.features import seqio

  register()
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name in registered:
    return seqio.get_mixture_or_task(name)
  if (in_memory := memory.find(name)) is not None:
    return _make_task(
      name,
      sources.memory_source(in_memory.splits),
      [],
      scores.Scores().named(in_memory.metrics, 'metrics'),
    )
  # These are made from the config and not registered.
  made = {
    'local': local_task,
    'distilled': distilled_task,
    'mixture': mixture,
  }
  scope, _, kind = name.rpartition('/')
  if kind in made:
    with gin.config_scope(scope or None):
      return made[kind](name=scope.replace('/', '.') or kind)
  if kind == 'cached':
    raise ValueError(
      f'{label or f"MIXTURE_OR_TASK_NAME={name!r}"}: a cache cannot be '
      'tokenized again or be part of a mixture. Use the gin file of the cached '
      'task instead of cached.gin.'
    )
  names = sorted(registered | made.keys() | {'cached'})
  near = difflib.get_close_matches(name, names)
  raise ValueError(
    f'{label or f"MIXTURE_OR_TASK_NAME={name!r}"} is not registered with SeqIO'
    + (f'; did you mean {" or ".join(near)}?' if near else '.')
    + f' There are {", ".join(names)}. To register your own task, import its '
    'module: add `import my_tasks` to a gin file.'
  )


def _make_task(
  name: str,
  source: 'seqio.DataSource',
  preprocessors: Sequence[Callable[..., Any]],
  metric_fns: Sequence[metric_fns_lib.Metric],
  *,
  postprocess_fn: Callable[..., Any] | None = None,
) -> 'seqio.Task':
  """Returns a text-to-text task; `bind` adds tokenization."""
  from l2s_jax.data.features import seqio, tf

  text = seqio.Feature(
    seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0
  )
  return seqio.Task(
    name,
    source,
    output_features={'inputs': text, 'targets': text},
    preprocessors=preprocessors,
    postprocess_fn=postprocess_fn,
    metric_fns=list(metric_fns),
  )


def _tfds_preprocessors(
  task: _TfdsTask, template: str
) -> list[Callable[..., Any]]:
  from l2s_jax.data.features import seqio

  prompt = templates.Template(template, task.source_column)
  # The template comes after the cache, so one cache serves all templates.
  return [
    seqio.CacheDatasetPlaceholder(),
    templates.text_to_text(prompt, prompt, task.target_column),
  ]
