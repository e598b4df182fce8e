# SPDX-License-Identifier: Apache-2.0
"""The law of resuming: what follows is what would have followed.

Bit for bit, for every kind of source and of tokenizer, across epochs.
"""

import csv
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import data_files
import numpy as np
import pytest
import tokenizers

from l2s_jax.data import cldr, features, sources, streams, tasks
from l2s_jax.data.features import seqio, tf
from l2s_jax.vocabularies import loading

LENGTHS = {'inputs': 48, 'targets': 12}  # Some are longer.
NUM_EXAMPLES = 70
BATCH_SIZE = 20
NUM_BATCHES = 9  # Two and a half epochs.
SOURCES = (
  'parallel_text',
  'jsonl',
  'tsv',
  'csv',
  'cldr',
  'tfds',
  'cached',
  'mixture',
)
TFDS_NAME = 'wmt16_translate/ro-en:1.0.0'
PAIRS = [
  (f'house {n} ' * (1 + n % 3), f'{n} ' * (1 + n % 7))
  for n in range(NUM_EXAMPLES)
]


@pytest.fixture(scope='module', params=['sentencepiece', 'tokenizer.json'])
def any_vocabulary(request, vocabulary, tmp_path_factory):
  if request.param == 'sentencepiece':
    return vocabulary
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['</s>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(
    [text for pair in PAIRS for text in pair], trainer
  )
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  tokenizer.save(str(path))
  return loading.load(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns a folder with the same pairs in all kinds of files."""
  folder = tmp_path_factory.mktemp('data')
  for side, name in enumerate(('x.en', 'x.de')):
    lines = [pair[side] for pair in PAIRS]
    (folder / name).write_text('\n'.join(lines))
  rows = [dict(zip(('source', 'target'), pair, strict=True)) for pair in PAIRS]
  (folder / 'x.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  for name, dialect in (('x.csv', 'excel'), ('x.tsv', 'excel-tab')):
    with (folder / name).open('w', newline='') as file:
      csv.writer(file, dialect).writerows([('source', 'target'), *PAIRS])
  data_files.prepare_tfds(
    TFDS_NAME,
    folder,
    lambda split: [{'en': source, 'ro': target} for source, target in PAIRS],
  )
  tasks.register()
  task = seqio.TaskRegistry.get('wmt16_en_ro')
  task.source.tfds_dataset.override_data_dir(str(folder))
  data_files.write_cache(task, folder)
  return folder


@pytest.fixture(autouse=True)
def small_cldr(monkeypatch):
  monkeypatch.setitem(cldr.SIZES, 'train', NUM_EXAMPLES)
  sources._read_cldr.cache_clear()
  yield
  sources._read_cldr.cache_clear()


def settings_of(source, folder):
  """Returns the task's name and what gin binds for it."""
  settings: dict[str, Any] = {
    'tfds.data_dir': str(folder),
    'local_task.data_dir': str(folder),
  }
  if source == 'cldr':
    return 'cldr', settings
  if source == 'tfds':
    return 'wmt16_en_ro', settings
  if source == 'cached':
    settings |= {'cached_tasks.use': True}
    settings |= {'cached_tasks.cache_dirs': (str(folder),)}
    return 'wmt16_en_ro', settings
  if source == 'mixture':
    settings['local_task.data_files'] = {'train': 'x.jsonl'}
    settings['mixture.tasks'] = {'wmt16_en_ro': 1.0, 'local': 0.5, 'cldr': 0.3}
    return 'mixture', settings
  files = ('x.en', 'x.de') if source == 'parallel_text' else f'x.{source}'
  settings['local_task.data_files'] = {'train': files}
  return 'local', settings


def bind(vocabulary, source, folder):
  return data_files.bind(vocabulary, *settings_of(source, folder))


def train(task, start_batch=0, seed=1):
  """Yields batches with the counts so far of what was cut."""
  batches = streams.train_batches(
    task,
    task_feature_lengths=LENGTHS,
    batch_size=BATCH_SIZE,
    seed=seed,
    start_row=start_batch * BATCH_SIZE,
  )
  for batch in batches:
    yield batch, (batches.num_truncated_prompts, batches.num_truncated_answers)


def equal(batch, other):
  assert batch.keys() == other.keys()
  for key in batch:
    np.testing.assert_array_equal(batch[key], other[key], key)


@pytest.mark.parametrize('source', SOURCES)
def test_what_follows_is_what_would_have_followed(
  any_vocabulary, folder, source
):
  task = bind(any_vocabulary, source, folder)
  whole = list(itertools.islice(train(task), NUM_BATCHES))
  for start in (2, 5):  # In the first epoch, and in the second.
    # Bound anew, as by another process.
    resumed = train(bind(any_vocabulary, source, folder), start)
    cut_before = whole[start - 1][1]
    for (batch, cut), (expected, cut_in_all) in zip(
      itertools.islice(resumed, NUM_BATCHES - start), whole[start:], strict=True
    ):
      equal(batch, expected)
      assert np.add(cut_before, cut).tolist() == list(cut_in_all)


@pytest.fixture
def own_task():
  """Registers a task that tokenizes, and then goes on."""
  feature = seqio.Feature(seqio.ByteVocabulary())
  texts = [source for source, _ in PAIRS]
  seqio.TaskRegistry.add(
    'own',
    seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: (
        tf.data.Dataset.from_tensor_slices({'inputs': texts, 'targets': texts})
      ),
      splits=['train'],
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      lambda dataset: dataset.map(
        lambda example: example | {'targets': example['targets'][:5]}
      ),
    ],
    output_features={'inputs': feature, 'targets': feature},
  )
  yield 'own'
  seqio.TaskRegistry.remove('own')


@pytest.mark.parametrize('case', ['parallel_text', 'mixture', 'ids', 'both'])
def test_the_order_is_that_of_seqio_example_by_example(
  vocabulary, folder, own_task, case
):
  name, settings = settings_of('mixture', folder)
  if case in ('ids', 'both'):
    name = {'ids': own_task, 'both': name}[case]
    settings['mixture.tasks'] = {'local': 1.0, own_task: 0.5}
  elif case == 'parallel_text':
    name, settings = settings_of(case, folder)
  task = data_files.bind(vocabulary, name, settings)
  options: dict[str, Any] = {'shuffle': True, 'seed': 1}
  options |= {'split': 'train', 'try_in_mem_cache': False}
  if isinstance(task, seqio.Mixture):
    options['passthrough_features'] = ['inputs_length', 'targets_length']
    dataset = task.get_dataset(LENGTHS, **options)
  else:
    dataset = task.get_dataset(LENGTHS, num_epochs=1, **options).repeat()
  rows = features.make_converter(task)(dataset, LENGTHS)
  expected = rows.batch(BATCH_SIZE).take(NUM_BATCHES).as_numpy_iterator()
  for (batch, _), other in zip(train(task), expected, strict=False):
    assert batch.keys() <= other.keys()
    equal(batch, {key: other[key] for key in batch})


@pytest.mark.parametrize('source', SOURCES)
def test_every_epoch_has_each_example_in_another_order(
  vocabulary, folder, source
):
  if source == 'mixture':
    pytest.skip('a mixture samples')
  task = bind(vocabulary, source, folder)
  batches = streams.train_batches(
    task, task_feature_lengths=LENGTHS, batch_size=1, seed=1, num_epochs=3
  )
  rows = [batch['encoder_input_tokens'].tobytes() for batch in batches]
  epochs = [rows[n : n + NUM_EXAMPLES] for n in range(0, 210, NUM_EXAMPLES)]
  assert len(rows) == 3 * NUM_EXAMPLES
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  other_seed = next(train(task, seed=2))[0]
  assert [row.tobytes() for row in other_seed['encoder_input_tokens']] != (
    rows[:BATCH_SIZE]
  )


DIGEST = """
import json, sys
sys.path.insert(0, 'tests')
import data_files, test_data_order
from l2s_jax.vocabularies import loading
path, settings, start = json.load(sys.stdin)
vocabulary = loading.load(path)
task = data_files.bind(vocabulary, 'mixture', settings)
print(test_data_order.digest(task, start))
"""


def digest(task, start_batch):
  """Returns what identifies a batch."""
  batch, _ = next(train(task, start_batch))
  content = b''.join(batch[key].tobytes() for key in sorted(batch))
  return hashlib.sha256(content).hexdigest()


def test_another_process_goes_on_in_the_same_order(vocabulary, folder):
  settings = {
    'tfds.data_dir': str(folder),
    'mixture.tasks': {'wmt16_en_ro': 1.0, 'local': 0.5},
    'local_task.data_dir': str(folder),
    'local_task.data_files': {'train': 'x.jsonl'},
  }
  process = subprocess.run(
    [sys.executable, '-c', DIGEST],
    cwd=pathlib.Path(__file__).parent.parent,
    input=json.dumps([str(vocabulary.path), settings, 4]),
    env=os.environ | {'PYTHONHASHSEED': '7'},
    capture_output=True,
    text=True,
    check=True,
  )
  here = data_files.bind(vocabulary, 'mixture', settings)
  assert process.stdout.strip() == digest(here, 4) != digest(here, 3)
