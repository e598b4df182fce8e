# SPDX-License-Identifier: Apache-2.0
"""Laws of the tasks: which text goes where, and what is said of bad files."""

import gzip
import json
import os
import subprocess
import sys

import data_files
import gin
import helpers
import numpy as np
import pytest

from l2s_jax.caching import cache_key
from l2s_jax.data import cldr, sources, streams, tasks, templates
from l2s_jax.data.features import seqio, tf
from l2s_jax.evaluation import seqio_evaluator
from l2s_jax.metrics import metric_fns
from l2s_jax.runtime import gin_config

LENGTHS = {'inputs': 64, 'targets': 64}


@pytest.fixture
def registered():
  """Returns a function that registers a provider until the test's end."""
  added = []

  def add(provider):
    registry = (
      seqio.MixtureRegistry
      if isinstance(provider, seqio.Mixture)
      else seqio.TaskRegistry
    )
    registry.add_provider(provider.name, provider)
    added.append((registry, provider.name))

  yield add
  for registry, name in added:
    registry.remove(name)


def read(task, split='train', lengths=None):
  return list(
    task.get_dataset(
      lengths or LENGTHS, split, shuffle=False
    ).as_numpy_iterator()
  )


def texts(task, split='train'):
  return [
    (
      example['inputs_pretokenized'].decode(),
      example['targets_pretokenized'].decode(),
    )
    for example in read(task, split)
  ]


def write(path, content):
  path.parent.mkdir(exist_ok=True)
  data = content.encode() if isinstance(content, str) else content
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path.name


def bind_local(vocabulary, tmp_path, files, **kwargs):
  settings = {'data_files': files, 'data_dir': str(tmp_path), **kwargs}
  return data_files.bind(
    vocabulary,
    'local',
    {f'local_task.{name}': value for name, value in settings.items()},
  )


@pytest.fixture
def small_cldr(monkeypatch):
  """Makes the CLDR task small: with all types checked it is slow to make."""
  monkeypatch.setitem(cldr.SIZES, 'validation', 50)
  sources._read_cldr.cache_clear()
  yield
  sources._read_cldr.cache_clear()


@pytest.mark.usefixtures('small_cldr')
def test_cldr_gives_its_text_and_ids(vocabulary):
  task = tasks.bind('cldr', vocabulary, vocabulary)
  expected = list(cldr.examples('validation'))
  for example, source in zip(read(task, 'validation'), expected, strict=True):
    assert example['inputs_pretokenized'].decode() == source['prompt']
    assert example['targets_pretokenized'].decode() == source['answer']
    assert example['targets'].tolist() == [
      *vocabulary.encode(source['answer']),
      vocabulary.eos_id,
    ]
    assert example['targets_length'] == len(example['targets'])


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_parallel_text_goes_line_by_line(vocabulary, tmp_path, suffix):
  pair = (
    write(tmp_path / f'a.en{suffix}', 'one {1}\r\ntwo\u2028half\n'),
    write(tmp_path / f'a.de{suffix}', 'eins\nzwei'),
  )
  task = bind_local(
    vocabulary,
    tmp_path,
    {'train': pair, 'test': [pair, pair]},
    template='{{to German}} {source}',
  )
  lines = [
    ('{to German} one {1}', 'eins'),
    ('{to German} two\u2028half', 'zwei'),
  ]
  assert texts(task) == lines
  assert texts(task, 'test') == lines * 2
  assert set(task.splits) == {'train', 'test'}


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_jsonl_fills_the_template_from_its_columns(
  vocabulary, tmp_path, suffix
):
  rows = [
    {'document': f'd{n}', 'summary': f's\n{n}', 'style': 'short', 'n': n}
    for n in range(3)
  ]
  name = write(tmp_path / f'x.jsonl{suffix}', '\n'.join(map(json.dumps, rows)))
  task = bind_local(
    vocabulary,
    tmp_path,
    {'train': name},
    source_column='document',
    target_column='summary',
    template='{style}: {source} {document}',
    metrics=('exact_match',),
  )
  assert texts(task) == [(f'short: d{n} d{n}', f's\n{n}') for n in range(3)]
  assert task.metric_fns == [metric_fns.exact_match]


@pytest.mark.parametrize(
  'source, target, message',
  [
    ('a\nb\nc\n', 'x\ny\n', r'a\.en has 3 lines and .*a\.de has 2'),
    ('a\n \nc\n', 'x\ny\nz\n', r'a\.en:2 is empty'),
    ('a\nb\n', 'x\n\n', r'a\.de:2 is empty'),
    (b'a\nb\xff\n', 'x\ny\n', r'a\.en:2 is not UTF-8'),
  ],
)
def test_bad_parallel_text_is_named(
  vocabulary, tmp_path, source, target, message
):
  pair = (write(tmp_path / 'a.en', source), write(tmp_path / 'a.de', target))
  task = bind_local(vocabulary, tmp_path, {'train': pair})
  with pytest.raises(ValueError, match=message):
    read(task)


@pytest.mark.parametrize('suffix', ['', '.gz'])
@pytest.mark.parametrize('kind', ['tsv', 'csv'])
def test_tables_fill_the_template_from_their_columns(
  vocabulary, tmp_path, kind, suffix
):
  separator = {'tsv': '\t', 'csv': ','}[kind]
  lines = [separator.join((f'q{n}', 'note', f'a{n}')) for n in range(3)]
  named = separator.join(('question', 'remark', 'answer'))
  files = {
    'train': write(tmp_path / f'x.{kind}{suffix}', '\n'.join([named, *lines])),
    'test': write(tmp_path / f'y.{kind}{suffix}', '\n'.join(lines)),
  }
  settings = {
    'source_column': 'question',
    'target_column': 'answer',
    'template': '{remark}: {source}',
  }
  expected = [(f'note: q{n}', f'a{n}') for n in range(3)]
  task = bind_local(vocabulary, tmp_path, files, **settings)
  assert texts(task) == expected
  with pytest.raises(ValueError, match='no column .*COLUMN_NAMES'):
    read(task, 'test')
  task = bind_local(
    vocabulary,
    tmp_path,
    {'test': files['test']},
    column_names=('question', 'remark', 'answer'),
    **settings,
  )
  assert texts(task, 'test') == expected


def bad_files(tmp_path):
  """Returns three kinds of files, each with 4 bad of 9 lines, 2nd to 5th."""
  good = [f'{n}' for n in range(5)]
  rows = [{'source': n, 'target': f't{n}'} for n in good]
  jsonl = [json.dumps(row).encode() for row in rows]
  tsv = [f'{n}\tt{n}'.encode() for n in good]
  source, target = ([t + n.encode() for n in good] for t in (b'', b't'))
  for path, lines, bad in (
    ('x.jsonl', jsonl, (b'{', b'{"source": "a"}', b'\xff', b'')),
    ('x.tsv', tsv, (b'a', b'a\tb\tc', b'\xff\tb', b' \tb')),
    ('x.en', source, (b'', b'a', b'\xff', b' ')),
    ('x.de', target, (b'b', b' ', b'b', b'\xff')),
  ):
    write(tmp_path / path, b'\n'.join([lines[0], *bad, *lines[1:]]))
  return [(n, f't{n}') for n in good]


BAD_FILES = {'jsonl': 'x.jsonl', 'tsv': 'x.tsv', 'text': ('x.en', 'x.de')}


@pytest.mark.parametrize('kind', BAD_FILES)
def test_bad_lines_are_refused(vocabulary, tmp_path, kind):
  bad_files(tmp_path)
  settings = {} if kind != 'tsv' else {'column_names': ('source', 'target')}
  task = bind_local(
    vocabulary, tmp_path, {'train': BAD_FILES[kind]}, **settings
  )
  with pytest.raises(ValueError, match=r"x\.\w+:2 .*BAD_LINES='skip'"):
    helpers.streamed(task).check_data('train', LENGTHS)


@pytest.mark.parametrize('kind', BAD_FILES)
def test_bad_lines_are_skipped_and_counted(vocabulary, tmp_path, kind, capsys):
  expected = bad_files(tmp_path)
  settings = {} if kind != 'tsv' else {'column_names': ('source', 'target')}
  task = bind_local(
    vocabulary,
    tmp_path,
    {'train': [BAD_FILES[kind]] * 2},
    bad_lines='skip',
    **settings,
  )
  for _ in range(2):
    assert texts(task) == expected * 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(
    "local, split 'train': skipped 8 of 18 lines (BAD_LINES='skip'): "
  )
  assert 'is not UTF-8 (2)' in line
  assert line.count(f'{tmp_path}/x.') == 3 and ':2, ' in line


def test_nothing_but_bad_lines_is_refused(vocabulary, tmp_path):
  name = write(tmp_path / 'x.jsonl', '{"text": "a"}\n' * 3)
  task = bind_local(vocabulary, tmp_path, {'train': name}, bad_lines='skip')
  with pytest.raises(
    ValueError, match=r"no column 'source' \(3\).*No lines remain"
  ):
    read(task)


def test_other_broken_files_are_refused_though_bad_lines_are_skipped(
  vocabulary, tmp_path
):
  (tmp_path / 'a.en.gz').write_bytes(gzip.compress(b'a\n' * 9999)[:-9])
  write(tmp_path / 'a.de', 'x\n' * 9999)
  write(tmp_path / 'b.en', 'a\n')
  for files, message in (
    (('a.en.gz', 'a.de'), r'a\.en\.gz is not a complete gzip file'),
    (('b.en', 'a.de'), r'b\.en has 1 lines and .*a\.de has 9999'),
  ):
    task = bind_local(vocabulary, tmp_path, {'train': files}, bad_lines='skip')
    with pytest.raises(ValueError, match=message):
      read(task)


def test_fallback_template_is_for_rows_without_text(
  vocabulary, tmp_path, capsys
):
  rows = [
    {'instruction': 'add', 'input': '1 2', 'output': '3'},
    {'instruction': 'sing', 'input': ' ', 'output': 'la'},
    {'instruction': 'wait', 'output': 'yes'},
    {'instruction': 'go', 'input': None, 'output': 'no'},
  ]
  write(tmp_path / 'x.jsonl', '\n'.join(map(json.dumps, rows)))
  write(tmp_path / 'y.jsonl', json.dumps(rows[2]))
  settings = {
    'target_column': 'output',
    'template': '{instruction}: {input}',
    'fallback_template': '{instruction}!',
  }
  task = bind_local(
    vocabulary, tmp_path, {'train': 'x.jsonl', 'test': 'y.jsonl'}, **settings
  )
  assert texts(task) == [
    ('add: 1 2', '3'),
    ('sing!', 'la'),
    ('wait!', 'yes'),
    ('go!', 'no'),
  ]
  assert not capsys.readouterr().err
  assert texts(task, 'test') == [('wait!', 'yes')]
  assert "no line has text in column 'input'" in capsys.readouterr().err
  write(tmp_path / 'z.jsonl', '{"instruction": "a", "input": 3, "output": "b"}')
  task = bind_local(vocabulary, tmp_path, {'train': 'z.jsonl'}, **settings)
  with pytest.raises(ValueError, match=r'z\.jsonl:1 has a value other .*input'):
    read(task)


def test_references_stand_beside_the_target(vocabulary, tmp_path, capsys):
  rows = [
    {'source': 'a', 'target': 't', 'others': ['u', ' ', 'v'], 'last': 'w'},
    {'source': 'b', 'target': 't', 'others': 'u'},
    {'source': 'c', 'target': 't', 'others': None},
  ]
  write(tmp_path / 'x.jsonl', '\n'.join(map(json.dumps, rows)))
  write(tmp_path / 'y.jsonl', json.dumps(rows[2]))
  task = bind_local(
    vocabulary,
    tmp_path,
    {'train': 'y.jsonl', 'test': 'x.jsonl', 'validation': 'y.jsonl'},
    reference_columns=('others', 'last'),
  )
  expected = [['t', 'u', 'v', 'w'], ['t', 'u'], ['t']]
  for example, references in zip(read(task, 'test'), expected, strict=True):
    target = example['targets_pretokenized'].decode()
    kwargs = {'example': example, 'is_target': True}
    assert task.postprocess_fn(target, **kwargs) == references
    assert task.postprocess_fn('t', example=example, is_target=False) == 't'
  read(task)  # Its answers are not scored.
  assert not capsys.readouterr().err
  read(task, 'validation')
  assert 'no line has text in any of others, last' in capsys.readouterr().err


def test_metrics_get_the_references(vocabulary, tmp_path):
  rows = [{'source': 'a', 'target': 'b', 'others': ['c d']}]
  write(tmp_path / 'x.jsonl', json.dumps(rows[0]))
  task = bind_local(
    vocabulary,
    tmp_path,
    {'test': 'x.jsonl'},
    reference_columns=('others',),
    metrics=('exact_match',),
  )
  evaluator = seqio_evaluator.TaskEvaluator(
    helpers.streamed(task),
    task_feature_lengths=LENGTHS,
    split='test',
    batch_size=2,
  )
  for text, score in (('c d', 100), ('b', 100), ('c', 0)):
    ids = np.array([[*vocabulary.encode(text), vocabulary.eos_id]] * 2)

    def predict(batch, ids=ids):
      return ids

    scores = evaluator.evaluate(predict, step=0)
    assert scores['local']['exact_match'] == score


@pytest.mark.parametrize(
  'kwargs, error, message',
  [
    (
      {'files': {'train': ('no.en', 'no.de')}},
      FileNotFoundError,
      r"DATA_FILES\['train'\]: no file .*no\.en, .*no\.de.*DATA_DIR",
    ),
    (
      {'files': {'train': ['a.en', 'a.de']}},
      ValueError,
      r"DATA_FILES\['train'\] has 'a\.en'; expected a file of records",
    ),
    ({'files': {'train': ('a.jsonl', 'b.jsonl')}}, ValueError, 'expected a'),
    ({'template': '{source'}, ValueError, r"template='\{source'"),
    ({'template': '{source:>9}'}, ValueError, 'braces may only contain'),
    ({'template': 'source'}, ValueError, 'it has no column'),
    ({'bad_lines': 'keep'}, ValueError, "BAD_LINES='keep': expected 'refuse'"),
    ({'column_names': ('a', 'b')}, ValueError, 'COLUMN_NAMES=.* to TSV and'),
    ({'metrics': ('blue',)}, ValueError, r"\('blue',\): .* of bleu, chrf"),
  ],
)
def test_bad_bindings_are_named(vocabulary, tmp_path, kwargs, error, message):
  pair = (write(tmp_path / 'a.en', 'a'), write(tmp_path / 'a.de', 'b'))
  with pytest.raises(error, match=message):
    bind_local(vocabulary, tmp_path, **{'files': {'train': pair}, **kwargs})


def test_template_column_that_text_lacks_is_named(vocabulary, tmp_path):
  pair = (write(tmp_path / 'a.en', 'a'), write(tmp_path / 'a.de', 'b'))
  task = bind_local(vocabulary, tmp_path, {'train': pair}, template='{style}')
  with pytest.raises(ValueError, match='uses the columns style, but the par'):
    read(task)


def test_unknown_task_names_near_misses(vocabulary):
  with pytest.raises(ValueError, match='did you mean wmt16_en_de'):
    tasks.bind('wmt16_ende', vocabulary, vocabulary)


def test_registering_twice_changes_nothing():
  tasks.register()
  before = dict(seqio.TaskRegistry._REGISTRY)
  tasks.register()
  assert before == seqio.TaskRegistry._REGISTRY


def users_task(name, *preprocessors, rank=1):
  def dataset_fn(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': [f'{name} one two'], 'targets': ['three four']}
    )

  feature = seqio.Feature(
    seqio.PassThroughVocabulary(size=0),
    rank=rank,
    dtype=tf.int32 if rank else tf.string,
  )
  return seqio.Task(
    name,
    seqio.FunctionDataSource(dataset_fn, splits=['train']),
    {'inputs': feature, 'targets': feature},
    preprocessors=preprocessors,
    metric_fns=[metric_fns.bleu],
    postprocess_fn=lambda text, **unused: text.upper(),
  )


TOKENIZE = seqio.preprocessors.tokenize


@pytest.mark.parametrize(
  'steps, rank',
  [
    ([], 0),
    ([TOKENIZE], 1),
    ([TOKENIZE, seqio.preprocessors.append_eos], 1),
    (
      [
        TOKENIZE,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
      ],
      1,
    ),
    ([seqio.preprocessors.tokenize_and_append_eos], 1),
  ],
)
def test_users_task_takes_our_vocabularies(vocabulary, registered, steps, rank):
  task = users_task('mine', *steps, rank=rank)
  registered(task)
  bound = tasks.bind('mine', vocabulary, vocabulary)
  whole = [*vocabulary.encode('mine one two'), vocabulary.eos_id]
  (example,) = read(bound)
  assert example['inputs'].tolist() == whole
  assert example['targets_pretokenized'] == b'three four'
  (example,) = read(bound, lengths={'inputs': 3, 'targets': 9})
  assert example['inputs'].tolist() == whole[:3]
  assert example['inputs_length'] == len(whole)
  assert bound.name == 'mine' and bound.source is task.source
  assert bound.postprocess_fn('x') == 'X'
  assert bound.metric_fns == [metric_fns.bleu]
  assert seqio.TaskRegistry.get('mine') is task


def test_steps_of_users_may_have_conditions_on_tensors(vocabulary, registered):
  """AutoGraph is off for our own functions alone."""

  @seqio.map_over_dataset
  def mark(example):
    text = example['inputs']
    if tf.strings.length(text) > 3:
      text = text + ' long'
    return {**example, 'inputs': text}

  registered(users_task('mine', mark, TOKENIZE))
  bound = tasks.bind('mine', vocabulary, vocabulary)
  whole = [*vocabulary.encode('mine one two long'), vocabulary.eos_id]
  (example,) = read(bound)
  assert example['inputs'].tolist() == whole
  batches = streams.train_batches(
    bound, task_feature_lengths=LENGTHS, batch_size=1, seed=0
  )
  tokens = next(batches)['encoder_input_tokens'][0]
  batches.close()
  assert tokens[: len(whole)].tolist() == whole


def test_the_step_of_our_tasks_is_that_of_earlier_caches():
  """With another source, a cache of an earlier version has other settings."""
  template = templates.Template('{source}')
  step = templates.text_to_text(template, template, 'target')
  assert cache_key._code(step) == (
    'l2s_jax.data.templates.text_to_text.<locals>.fill_all 63c9daba0d1ce850'
  )


def test_mixture_is_bound_with_all_its_parts(vocabulary, registered):
  for name in ('mix_a', 'mix_b'):
    registered(users_task(name, TOKENIZE))
  registered(seqio.Mixture('inner', [('mix_a', 1), ('mix_b', 2)]))
  registered(
    seqio.Mixture('outer', [('inner', 3), ('mix_a', lambda task: 4.0)])
  )
  bound = tasks.bind('outer', vocabulary, vocabulary)
  registered_mixture = seqio.MixtureRegistry.get('outer')
  assert [task.name for task in bound.tasks] == ['mix_a', 'mix_b']
  for task, original in zip(bound.tasks, registered_mixture.tasks, strict=True):
    assert bound.get_rate(task) == registered_mixture.get_rate(original)
  example = next(bound.get_dataset(LENGTHS, shuffle=False).as_numpy_iterator())
  assert example['inputs'].tolist()[-1] == vocabulary.eos_id


def local_settings(tmp_path, name):
  write(
    tmp_path / f'{name}.jsonl', f'{{"source": "{name}", "target": "t"}}\n' * 3
  )
  return {f'{name}/local_task.data_files': {'train': f'{name}.jsonl'}}


def test_mixture_by_gin_alone(vocabulary, tmp_path, registered):
  registered(users_task('registered', TOKENIZE))
  task = data_files.bind(
    vocabulary,
    'mixture',
    {
      'mixture.tasks': {
        'one/local': 2.0,
        'two/local': 'proportional',
        'registered': 1,
      },
      'local_task.data_dir': str(tmp_path),
      'local_task.template': '{source} again',
      'two/local_task.template': '{source}',
      **local_settings(tmp_path, 'one'),
      **local_settings(tmp_path, 'two'),
    },
  )
  rates = {part.name: task.get_rate(part) for part in task.tasks}
  assert rates == {'one': 2, 'two': 3, 'registered': 1}
  prompts = {part.name: texts(part)[0][0] for part in task.tasks}
  assert prompts == {
    'one': 'one again',
    'two': 'two',
    'registered': 'registered one two',
  }
  dataset = task.get_dataset(LENGTHS, seed=0, num_epochs=None)
  drawn = [
    vocabulary.decode(example['inputs'].tolist())
    for example in dataset.take(600).as_numpy_iterator()
  ]
  for name, rate in rates.items():
    share = sum(text == prompts[name] for text in drawn) / len(drawn)
    assert abs(share - rate / 6) < 0.06, name


def test_mixture_of_the_users_files_by_gin_file(vocabulary, tmp_path):
  write(tmp_path / 'a.jsonl', '{"source": "a", "target": "b"}')
  write(tmp_path / 'x.en', 'one')
  write(tmp_path / 'x.de', 'eins')
  config = tmp_path / 'mine.gin'
  config.write_text(f"""
include 'gin_configs/tasks/mixture.gin'
MIXTURE = {{'news/local': 2.0, 'chat/local': 1, 'cldr': 0.5}}
local_task.data_dir = '{tmp_path}'
news/local_task.data_files = {{'train': 'a.jsonl'}}
chat/local_task.data_files = {{'train': ('x.en', 'x.de')}}
chat/local_task.template = 'to German: {{source}}'
""")
  gin_config.parse_config([str(config)])
  try:
    mixture = tasks.bind('mixture', vocabulary, vocabulary)
  finally:
    with gin.unlock_config():
      gin.clear_config()
  parts = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  assert parts == {'chat': 1, 'cldr': 0.5, 'news': 2}
  assert texts(mixture.tasks[0]) == [('to German: one', 'eins')]


def test_settings_are_those_that_examples_depend_on(tmp_path):
  for folder, lines in (('here', 'a\nb'), ('same', 'a\nb'), ('other', 'b\na')):
    for name in ('x.en', 'x.de', 'x2.en'):
      write(tmp_path / folder / name, lines)
    write(tmp_path / folder / 'y.jsonl', '{"source": "a", "target": "b"}')
  base = {
    'local_task.data_files': {'train': ('x.en', 'x.de')},
    'local_task.data_dir': str(tmp_path / 'here'),
    'mixture.tasks': {'a/local': 1.0, 'wmt16_en_de': 2},
    'tfds.data_dir': 'here',
  }

  def settings(name, **changes):
    with gin.unlock_config():
      gin.clear_config()
      for key, value in (base | changes).items():
        gin.bind_parameter(key, value)
      try:
        return tasks.data_settings(name)
      finally:
        gin.clear_config()

  for key, value, changed in (
    ('local_task.data_dir', str(tmp_path / 'same'), set()),
    ('local_task.data_dir', str(tmp_path / 'other'), {'local', 'mixture'}),
    ('local_task.data_files', {'train': ('x2.en', 'x.de'), 'test': 1}, set()),
    ('tfds.data_dir', 'there', set()),
    ('local_task.metrics', ('rouge',), set()),
    ('local_task.data_files', {'train': 'y.jsonl'}, {'local', 'mixture'}),
    ('a/local_task.template', 'in {source}', {'mixture'}),
    ('mixture.tasks', {'cldr': 1.0}, {'mixture'}),
    ('tfds.template', '{en}', {'wmt16_en_de', 'mixture'}),
    ('cached_tasks.use', True, {'local', 'mixture', 'wmt16_en_de'}),
  ):
    for name in ('local', 'mixture', 'wmt16_en_de'):
      is_same = settings(name) == settings(name, **{key: value})
      assert is_same == (name not in changed), (key, name)
  saved = json.loads(json.dumps(settings('mixture')))
  assert saved == settings('mixture')


@pytest.mark.parametrize(
  'rates, message',
  [
    ({}, "expected {'task': rate"),
    ({'cldr': 0.0}, 'each rate positive'),
    ({'cldr': 'equal'}, "or 'proportional'"),
    ({'cldr': 1.0, 'cldr/local': 1.0}, 'are named cldr, cldr; expected unique'),
    ({'no_task': 1.0}, "'no_task' is not registered"),
  ],
)
def test_bad_mixtures_are_named(vocabulary, tmp_path, rates, message):
  settings = local_settings(tmp_path, 'cldr')
  settings['local_task.data_dir'] = str(tmp_path)
  with pytest.raises(ValueError, match=message):
    data_files.bind(vocabulary, 'mixture', {'mixture.tasks': rates, **settings})


def test_task_without_prompt_is_refused(vocabulary, registered):
  registered(
    seqio.Task(
      'no_prompt',
      users_task('x').source,
      {'targets': seqio.Feature(seqio.PassThroughVocabulary(size=0))},
    )
  )
  with pytest.raises(
    ValueError, match="'no_prompt' has the features targets and no"
  ):
    tasks.bind('no_prompt', vocabulary, vocabulary)


def test_reading_a_config_does_not_import_tensorflow():
  code = (
    'import glob, sys, gin\n'
    'from l2s_jax.data import batching, bound_tasks, streams\n'
    'for name in glob.glob("gin_configs/tasks/*.gin"):\n'
    '  gin.clear_config()\n'
    '  gin.parse_config_file(name)\n'
    'print({"tensorflow", "seqio"} & set(sys.modules))'
  )
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  process = subprocess.run(
    [sys.executable, '-c', code],
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  assert process.stdout == 'set()\n'


def test_real_parallel_text(vocabulary, shared_data):
  pair = tuple(
    f'multi30k/test_2016_flickr.{language}.gz' for language in ('en', 'de')
  )
  task = bind_local(vocabulary, shared_data, {'test': pair})
  english, german = (
    gzip.decompress((shared_data / name).read_bytes()).decode().splitlines()
    for name in pair
  )
  assert texts(task, 'test') == list(zip(english, german, strict=True))


def bind_config(vocabulary, folder, config, bindings):
  """Binds the task of a gin file, as the command line does."""
  gin_config.parse_config(
    [f'gin_configs/tasks/{config}.gin'], [f'DATA_DIR={folder}', *bindings]
  )
  try:
    return tasks.bind('local', vocabulary, vocabulary)
  finally:
    with gin.unlock_config():
      gin.clear_config()


def rows_of(path):
  content = path.read_bytes()
  content = gzip.decompress(content) if path.suffix == '.gz' else content
  return [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize(
  'name', ['alpaca_en_demo', 'alpaca_eval_davinci003', 'gsm8k_alpaca_format']
)
def test_real_instructions(vocabulary, shared_data, name):
  file = f'instructions/{name}.jsonl.gz'
  task = bind_config(
    vocabulary,
    shared_data,
    'instructions',
    [f'DATA_FILES={{"train": "{file}"}}'],
  )
  for row, (prompt, answer) in zip(
    rows_of(shared_data / file), texts(task), strict=True
  ):
    has_input = bool(row.get('input', '').strip())
    assert prompt.startswith('Below is an instruction that describes a task')
    assert ('paired with an input' in prompt) == has_input
    assert f'\n\n### Instruction:\n{row["instruction"]}\n\n### ' in prompt
    if has_input:
      assert f'### Input:\n{row["input"]}\n\n### Response:' in prompt
    assert prompt.endswith('\n\n### Response:')
    assert answer == row['output']


def test_real_prompts_and_completions(vocabulary, shared_data, capsys):
  file = 'instructions/t0_prompt_mix.jsonl.gz'
  task = bind_config(
    vocabulary,
    shared_data,
    'prompt_completion',
    [f'DATA_FILES={{"train": "{file}"}}', 'BAD_LINES=skip'],
  )
  rows = rows_of(shared_data / file)
  good = [row for row in rows if row['completion'].strip()]
  assert texts(task) == [(row['prompt'], row['completion']) for row in good]
  summary = capsys.readouterr().err
  assert f'{len(rows) - len(good)} of {len(rows):,} lines' in summary
  assert "has an empty column 'completion'" in summary


def test_real_summaries_and_references(vocabulary, shared_data):
  for file, references in (
    ('news_dialogue_summ/cnn_dailymail.jsonl.gz', ()),
    ('aeslc/dev.jsonl.gz', ('annotations',)),
  ):
    task = bind_config(
      vocabulary,
      shared_data,
      'summarization_jsonl',
      [
        f'DATA_FILES={{"test": "{file}"}}',
        f'local_task.reference_columns={references}',
      ],
    )
    rows = rows_of(shared_data / file)
    # Not by `assert ==`, which would print private letters.
    if texts(task, 'test') != [
      (f'summarize: {row["document"]}', row['summary']) for row in rows
    ]:
      pytest.fail(f'{file}: other texts than in the file')
    if not references:
      continue
    for row, example in zip(rows, read(task, 'test'), strict=True):
      found = task.postprocess_fn('x', example=example, is_target=True)
      if found != ['x', *row['annotations']]:
        pytest.fail(f'{file}: other references than in the file')


def test_real_table(vocabulary, shared_data):
  file = 'tatoeba_en_ro/test.tsv.gz'
  task = bind_config(
    vocabulary,
    shared_data,
    'table',
    [
      f'DATA_FILES={{"test": "{file}"}}',
      "COLUMN_NAMES=('source', 'target', 'attribution')",
    ],
  )
  lines = gzip.decompress((shared_data / file).read_bytes()).decode()
  assert texts(task, 'test') == [
    tuple(line.split('\t')[:2]) for line in lines.splitlines()
  ]


@pytest.mark.parametrize(
  'settings, message',
  [
    (
      {'reference_columns': 'notes'},
      r"reference_columns='notes'.*\('notes',\)",
    ),
    ({'metrics': 'bleu'}, r"metrics='bleu'.*\('bleu',\)"),
  ],
)
def test_text_is_not_taken_letter_by_letter(
  vocabulary, tmp_path, settings, message
):
  files = {
    'train': write(tmp_path / 'x.jsonl', '{"source": "a", "target": "b"}')
  }
  with pytest.raises(ValueError, match=message):
    bind_local(vocabulary, tmp_path, files, **settings)
