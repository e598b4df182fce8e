# SPDX-License-Identifier: Apache-2.0
"""Laws of the TFDS tasks, on data that TFDS's own builders have written."""

import functools
import re
import shutil
import time

import data_files
import helpers
import pytest

from l2s_jax.data import streams, tasks
from l2s_jax.data.features import seqio, tfds
from l2s_jax.metrics import metric_fns as metric_fns_lib

LENGTHS = {'inputs': 96, 'targets': 48}
NUM_EXAMPLES = 23
TRANSLATION = [
  metric_fns_lib.bleu,
  metric_fns_lib.chrf,
  metric_fns_lib.exact_match,
]

# task: data set, source column, target column, template, metrics
TASKS = {
  'wmt14_en_de': (
    'wmt14_translate/de-en:1.0.0',
    'en',
    'de',
    'translate English to German: {}',
    TRANSLATION,
  ),
  'wmt14_en_fr': (
    'wmt14_translate/fr-en:1.0.0',
    'en',
    'fr',
    'translate English to French: {}',
    TRANSLATION,
  ),
  'wmt16_en_de': (
    'wmt16_translate/de-en:1.0.0',
    'en',
    'de',
    'translate English to German: {}',
    TRANSLATION,
  ),
  'wmt16_en_ro': (
    'wmt16_translate/ro-en:1.0.0',
    'en',
    'ro',
    'translate English to Romanian: {}',
    TRANSLATION,
  ),
  'cnn_dailymail': (
    'cnn_dailymail:3.4.0',
    'article',
    'highlights',
    'summarize: {}',
    [metric_fns_lib.rouge],
  ),
}


def rows(name, split):
  """Returns a split's rows, with all features of the real data set."""
  _, source, target, *_ = TASKS[name]
  rest = {'id': 'f00', 'publisher': 'CNN'} if name == 'cnn_dailymail' else {}
  return [
    {source: f'{name} {split} {n}', target: f'{n} and\n{n}', **rest}
    for n in range(NUM_EXAMPLES)
  ]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Returns the folder of all data sets."""
  folder = tmp_path_factory.mktemp('tensorflow_datasets')
  for name, (dataset, *_) in TASKS.items():
    data_files.prepare_tfds(dataset, folder, functools.partial(rows, name))
  return folder


def bind(vocabulary, name, data_dir, template=None):
  return data_files.bind(
    vocabulary,
    name,
    {'tfds.data_dir': str(data_dir), 'tfds.template': template},
  )


def expected_texts(name, split, template):
  _, source, target, *_ = TASKS[name]
  return sorted(
    (template.format(row[source]), row[target]) for row in rows(name, split)
  )


def raw_texts(task, split):
  return [
    tuple(
      example[f'{key}_pretokenized'].decode() for key in ('inputs', 'targets')
    )
    for example in task.get_dataset(
      LENGTHS, split, shuffle=False
    ).as_numpy_iterator()
  ]


@pytest.mark.parametrize('name', TASKS)
def test_task_reads_what_the_builder_wrote(prepared, vocabulary, name):
  *_, template, metric_fns = TASKS[name]
  task = bind(vocabulary, name, prepared)
  assert task.metric_fns == metric_fns
  assert set(task.splits) == set(data_files.SPLITS)
  for split in data_files.SPLITS:
    helpers.streamed(task).check_data(split, LENGTHS)
    texts = raw_texts(task, split)
    assert sorted(texts) == expected_texts(name, split, template)
    batches = list(
      helpers.eval_batches(
        task, task_feature_lengths=LENGTHS, batch_size=8, split=split
      )
    )
    prompts = [
      vocabulary.decode(row.tolist())
      for batch in batches
      for row in batch['encoder_input_tokens']
    ]
    assert prompts[:NUM_EXAMPLES] == [
      vocabulary.decode(vocabulary.encode(prompt)) for prompt, _ in texts
    ]


def test_any_other_template_by_gin(prepared, vocabulary):
  task = bind(vocabulary, 'wmt16_en_de', prepared, '{{{en}}} auf D:')
  assert sorted(raw_texts(task, 'test')) == expected_texts(
    'wmt16_en_de', 'test', '{{{}}} auf D:'
  )
  task = bind(vocabulary, 'cnn_dailymail', prepared, '{source} TL;DR:')
  assert sorted(raw_texts(task, 'test')) == expected_texts(
    'cnn_dailymail', 'test', '{} TL;DR:'
  )
  # In a mixture, each task has its own.
  mixture = data_files.bind(
    vocabulary,
    'mixture',
    {
      'tfds.data_dir': str(prepared),
      'mixture.tasks': {'wmt16_en_de': 'proportional', 'wmt16_en_ro': 46.0},
      'wmt16_en_ro/tfds.template': 'In Romanian: {source}',
    },
  )
  german, romanian = mixture.tasks
  assert mixture.get_rate(german) == NUM_EXAMPLES
  assert raw_texts(german, 'test')[0][0].startswith('translate English to Ger')
  assert raw_texts(romanian, 'test')[0][0].startswith('In Romanian: wmt16_en_r')
  task = bind(vocabulary, 'wmt16_en_de', prepared, '{article}')
  with pytest.raises(
    ValueError, match='names article, but the columns are de,'
  ):
    helpers.streamed(task).check_data('test', LENGTHS)


def test_missing_data_set_is_named_at_once(vocabulary, tmp_path):
  task = bind(vocabulary, 'wmt16_en_ro', tmp_path)
  start_secs = time.perf_counter()
  with pytest.raises(FileNotFoundError) as error:
    helpers.streamed(task).check_data('train', LENGTHS)
  assert time.perf_counter() - start_secs < 5
  message = str(error.value)
  assert f'no dataset wmt16_translate/ro-en:1.0.0 in {tmp_path}, ' in message
  assert 'DATA_DIR' in message and 'tfds.download=True' in message
  (command,) = re.findall(r'^  tfds build (.*)$', message, re.MULTILINE)
  assert command == f'wmt16_translate/ro-en:1.0.0 --data_dir={tmp_path}'
  # What the command is given names one builder, configuration and version.
  builder = tfds.builder(command.split()[0], data_dir=tmp_path)
  assert builder.info.full_name == 'wmt16_translate/ro-en/1.0.0'
  with pytest.raises(FileNotFoundError, match='no dataset wmt16_translate'):
    streams.train_batches(
      task, task_feature_lengths=LENGTHS, batch_size=2, seed=0
    )


def test_missing_shard_is_named(prepared, vocabulary, tmp_path):
  shutil.copytree(prepared / 'cnn_dailymail', tmp_path / 'cnn_dailymail')
  task = bind(vocabulary, 'cnn_dailymail', tmp_path)
  (shard,) = tmp_path.glob('**/*-test.tfrecord-00002-of-*')
  shard.unlink()
  helpers.streamed(task).check_data('train', LENGTHS)
  with pytest.raises(
    FileNotFoundError, match=f'1 files .* such as .*{shard.name}'
  ):
    helpers.streamed(task).check_data('test', LENGTHS)


def test_users_tfds_task_is_looked_for_too(vocabulary, tmp_path):
  tasks.register()
  source = seqio.TfdsDataSource('wmt16_translate/ro-en:1.0.0')
  task = seqio.TaskRegistry.get('wmt16_en_ro').replace(
    name='ro_mine', source=source
  )
  seqio.TaskRegistry.add_provider('ro_mine', task)
  try:
    bound = bind(vocabulary, 'ro_mine', tmp_path)
  finally:
    seqio.TaskRegistry.remove('ro_mine')
  with pytest.raises(FileNotFoundError, match="task 'ro_mine': no dataset"):
    helpers.streamed(bound).check_data('train', LENGTHS)
