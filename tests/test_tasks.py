# SPDX-License-Identifier: Apache-2.0
"""Laws of the tasks: which text goes where, and what is said of bad files."""

import gzip
import json
import os
import subprocess
import sys

import gin
import pytest

from l2s_jax import cldr, metrics, tasks
from l2s_jax.features import seqio, tf

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
  data = content.encode() if isinstance(content, str) else content
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path.name


def bind_local(vocabulary, tmp_path, files, **kwargs):
  with gin.unlock_config():
    gin.clear_config()
    for name, value in {
      'data_files': files,
      'data_dir': str(tmp_path),
      **kwargs,
    }.items():
      gin.bind_parameter(f'local_task.{name}', value)
    try:
      return tasks.bind('local', vocabulary, vocabulary)
    finally:
      gin.clear_config()


@pytest.fixture
def small_cldr(monkeypatch):
  """Makes the CLDR task small: with all types checked it is slow to make."""
  monkeypatch.setitem(cldr.SIZES, 'validation', 50)
  tasks._read_cldr.cache_clear()
  yield
  tasks._read_cldr.cache_clear()


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


def test_wmt16_reads_tfds_format(vocabulary, tmp_path):
  import tensorflow_datasets as tfds

  folder = tmp_path / 'wmt16_translate' / 'de-en' / '1.0.0'
  folder.mkdir(parents=True)
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name='wmt16_translate',
      config_name='de-en',
      module_name='',
      version=tfds.core.Version('1.0.0'),
      data_dir=str(folder),
    ),
    features=tfds.features.Translation(languages=('de', 'en')),
  )
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2)
  splits = ('train', 'validation', 'test')
  writer.initialize_splits(splits)
  for split in splits:
    writer.add_examples(
      {
        split: [
          {'de': f'{split} Haus {n}', 'en': f'{split} house {n}'}
          for n in range(3)
        ]
      }
    )
  writer.close_all()
  with gin.unlock_config():
    gin.bind_parameter('tfds.data_dir', str(tmp_path))
    try:
      task = tasks.bind('wmt16_en_de', vocabulary, vocabulary)
    finally:
      gin.clear_config()
  for split in splits:
    assert texts(task, split) == [
      (f'translate English to German: {split} house {n}', f'{split} Haus {n}')
      for n in range(3)
    ]
  assert task.metric_fns == [metrics.bleu, metrics.chrf, metrics.exact_match]


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
  assert task.metric_fns == [metrics.exact_match]


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


def test_broken_gzip_is_named(vocabulary, tmp_path):
  (tmp_path / 'a.en.gz').write_bytes(gzip.compress(b'a\n' * 9999)[:-9])
  pair = ('a.en.gz', write(tmp_path / 'a.de', 'x\n' * 9999))
  task = bind_local(vocabulary, tmp_path, {'train': pair})
  with pytest.raises(ValueError, match=r'a\.en\.gz is not a whole gzip file'):
    read(task)


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"source": "a", "target": ', r'x\.jsonl:2 is not JSON'),
    ('["a", "b"]', r'x\.jsonl:2 holds a JSON list, expected an object'),
    ('{"source": "a"}', r"x\.jsonl:2: column 'target' is missing.*has source"),
    ('{"source": " ", "target": "b"}', r"x\.jsonl:2: column 'source' is ' '"),
    ('{"source": "a", "target": 3}', r"x\.jsonl:2: column 'target' is 3"),
  ],
)
def test_bad_jsonl_is_named(vocabulary, tmp_path, line, message):
  good = json.dumps({'source': 'a', 'target': 'b'})
  name = write(tmp_path / 'x.jsonl', f'{good}\n{line}\n')
  task = bind_local(vocabulary, tmp_path, {'train': name})
  with pytest.raises(ValueError, match=message):
    read(task)


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
      r"DATA_FILES\['train'\] has 'a\.en'; expected a JSONL file",
    ),
    ({'files': {'train': ('a.jsonl', 'b.jsonl')}}, ValueError, 'expected a'),
    ({'template': '{source'}, ValueError, r"template='\{source'"),
    ({'template': '{source:>9}'}, ValueError, r'only a plain \{name\}'),
    ({'metrics': ('blue',)}, ValueError, r'names blue; there are bleu, chrf'),
  ],
)
def test_bad_bindings_are_named(vocabulary, tmp_path, kwargs, error, message):
  pair = (write(tmp_path / 'a.en', 'a'), write(tmp_path / 'a.de', 'b'))
  with pytest.raises(error, match=message):
    bind_local(vocabulary, tmp_path, **{'files': {'train': pair}, **kwargs})


def test_template_column_that_text_lacks_is_named(vocabulary, tmp_path):
  pair = (write(tmp_path / 'a.en', 'a'), write(tmp_path / 'a.de', 'b'))
  task = bind_local(vocabulary, tmp_path, {'train': pair}, template='{style}')
  with pytest.raises(ValueError, match='names style, but the parallel text'):
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
    metric_fns=[metrics.bleu],
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
  assert bound.metric_fns == [metrics.bleu]
  assert seqio.TaskRegistry.get('mine') is task


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


def test_task_without_prompt_is_refused(vocabulary, registered):
  registered(
    seqio.Task(
      'no_prompt',
      users_task('x').source,
      {'targets': seqio.Feature(seqio.PassThroughVocabulary(size=0))},
    )
  )
  with pytest.raises(ValueError, match="'no_prompt' gives targets and no inp"):
    tasks.bind('no_prompt', vocabulary, vocabulary)


def test_reading_a_config_does_not_import_tensorflow():
  code = (
    'import sys, gin\n'
    'from l2s_jax import data, tasks\n'
    'for name in ("cldr", "wmt16_en_de", "parallel_text", "jsonl"):\n'
    '  gin.clear_config()\n'
    '  gin.parse_config_file(f"gin_configs/tasks/{name}.gin")\n'
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
