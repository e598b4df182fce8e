# SPDX-License-Identifier: Apache-2.0
"""Laws of SeqIO's caches: the model's own ids come out, or an error does."""

import functools

import data_files
import helpers
import numpy as np
import pytest

from l2s_jax.data import features, streams, tasks
from l2s_jax.data.features import seqio, tf
from l2s_jax.vocabularies import loading, sentencepiece

LENGTHS = {'inputs': 32, 'targets': 32}
NUM_EXAMPLES = 11
TOKENIZE = seqio.preprocessors.tokenize


@pytest.fixture(scope='module')
def other_vocabulary(tmp_path_factory):
  """Returns a vocabulary with other ids for the same letters."""
  path = tmp_path_factory.mktemp('other') / 'spiece.model'
  texts = ['zyx wvu tsr qpo nml kji hgf edc ba 9876543210'] * 9
  return sentencepiece.train(texts, path, vocab_size=40)


def seqio_vocabulary(vocabulary, extra_ids=0):
  return seqio.SentencePieceVocabulary(str(vocabulary.path), extra_ids)


@pytest.fixture
def cached(tmp_path):
  """Returns a function that registers a task and caches it."""
  names = []

  def cache(own_vocabulary, steps, *, rank=1, write=True, name='my:task'):
    def read(split, shuffle_files, seed=None):
      numbers = [str(n) for n in range(NUM_EXAMPLES)]
      return tf.data.Dataset.from_tensor_slices(
        {
          'inputs': [f'{split} {n}' for n in numbers],
          'targets': [f'is {n}' for n in numbers],
        }
      )

    feature = seqio.Feature(
      own_vocabulary, rank=rank, dtype=tf.int32 if rank else tf.string
    )
    task = seqio.Task(
      name,
      seqio.FunctionDataSource(read, splits=['train', 'test']),
      {'inputs': feature, 'targets': feature},
      preprocessors=steps,
    )
    seqio.TaskRegistry.add_provider(name, task)
    names.append(name)
    if write:
      data_files.write_cache(task, tmp_path, ['train', 'test'])
    return task

  yield cache
  for name in names:
    seqio.TaskRegistry.remove(name)


def bind(vocabulary, folder, name='my:task', **settings):
  settings = {'use': True, 'cache_dirs': (str(folder),), **settings}
  return data_files.bind(
    vocabulary,
    name,
    {f'cached_tasks.{key}': value for key, value in settings.items()},
  )


def ids(task, split='test'):
  helpers.streamed(task).check_data(split, LENGTHS)
  dataset = task.get_dataset(LENGTHS, split, shuffle=False)
  return sorted(
    (example['inputs'].tolist(), example['targets'].tolist())
    for example in dataset.as_numpy_iterator()
  )


def expected_ids(vocabulary, split='test'):
  return sorted(
    tuple(
      [*vocabulary.encode(text), vocabulary.eos_id]
      for text in (f'{split} {n}', f'is {n}')
    )
    for n in range(NUM_EXAMPLES)
  )


def steps_with(*before, after=()):
  return [*before, seqio.CacheDatasetPlaceholder(), *after]


def forbid(dataset):
  raise AssertionError('a cached task ran a step before its cache')


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('extra_ids', [0, 3])
def test_a_cache_gives_the_models_own_ids(
  cached, vocabulary, other_vocabulary, tmp_path, rank, extra_ids
):
  """Text, own ids and foreign ids with their text beside them."""
  if rank:
    own = seqio_vocabulary(vocabulary, extra_ids)
    before = [TOKENIZE, seqio.preprocessors.append_eos]
  else:
    own, before = seqio.PassThroughVocabulary(0), []
  cached(own, steps_with(*before), rank=rank)
  for bound in (
    vocabulary,
    loading.load(vocabulary.path, extra_ids=3),
    loading.load(vocabulary.path, eos_id=7),
    other_vocabulary,
  ):
    task = bind(bound, tmp_path)
    assert set(task.splits) == {'train', 'test'}
    for split in task.splits:
      assert ids(task, split) == expected_ids(bound, split)


def test_the_cache_is_read_and_not_the_source(cached, vocabulary, tmp_path):
  task = cached(seqio_vocabulary(vocabulary), steps_with(TOKENIZE))
  seqio.TaskRegistry.remove('my:task')
  seqio.TaskRegistry.add_provider(
    'my:task', task.replace(preprocessors=steps_with(forbid, TOKENIZE))
  )
  assert ids(bind(vocabulary, tmp_path)) == expected_ids(vocabulary)
  with pytest.raises(AssertionError, match='ran a step before its cache'):
    ids(bind(vocabulary, tmp_path, use=False))


def test_steps_after_the_cache_see_the_models_ids(
  cached, vocabulary, other_vocabulary, tmp_path
):
  def double(dataset):
    return dataset.map(lambda x: {**x, 'targets': tf.tile(x['targets'], [2])})

  cached(seqio_vocabulary(vocabulary), steps_with(TOKENIZE, after=[double]))
  expected = [
    (prompt, [*answer[:-1] * 2, other_vocabulary.eos_id])
    for prompt, answer in expected_ids(other_vocabulary)
  ]
  assert ids(bind(other_vocabulary, tmp_path)) == expected


def reverse(dataset):
  return dataset.map(lambda x: {**x, 'inputs': x['inputs'][::-1]})


@pytest.mark.parametrize(
  'steps, message',
  [
    (
      [functools.partial(TOKENIZE, copy_pretokenized=False)],
      "'inputs' as ids of .* no text to encode anew, inputs_pretokenized",
    ),
    ([TOKENIZE, reverse], 'steps after the tokenizer have changed them'),
  ],
)
def test_foreign_ids_are_refused(
  cached, vocabulary, other_vocabulary, tmp_path, steps, message
):
  cached(seqio_vocabulary(vocabulary), steps_with(*steps))
  ids(bind(vocabulary, tmp_path))  # They mean something to their own.
  for bound in (other_vocabulary, loading.load(vocabulary.path, eos_id=7)):
    with pytest.raises(ValueError, match=message):
      helpers.streamed(bind(bound, tmp_path)).check_data('test', LENGTHS)


def test_what_encodes_alike(vocabulary, other_vocabulary):
  with_extra = loading.load(vocabulary.path, extra_ids=3)
  wrapped = features.wrap_vocabulary
  for own, bound, alike in (
    (seqio_vocabulary(vocabulary), vocabulary, True),
    (seqio_vocabulary(vocabulary, 3), with_extra, True),
    (seqio_vocabulary(vocabulary), with_extra, False),
    (seqio_vocabulary(vocabulary), other_vocabulary, False),
    (wrapped(vocabulary), vocabulary, True),
    (wrapped(vocabulary), with_extra, False),
    (seqio.ByteVocabulary(), vocabulary, False),
    (seqio.PassThroughVocabulary(100), vocabulary, False),
  ):
    assert features.encodes_alike(own, wrapped(bound)) == alike


def test_a_missing_cache_is_named(cached, vocabulary, tmp_path):
  cached(seqio_vocabulary(vocabulary), steps_with(TOKENIZE), write=False)
  task = bind(vocabulary, tmp_path)
  (tmp_path / 'my' / 'task').mkdir(parents=True)  # Of a job that was stopped.
  with pytest.raises(FileNotFoundError) as error:
    helpers.streamed(task).check_data('train', LENGTHS)
  message = str(error.value)
  assert f'file COMPLETED in {tmp_path}/my/task. Create' in message
  assert '  seqio_cache_tasks --tasks=my:task --output_cache_dir=' in message


def test_caches_are_looked_for_where_seqio_does(cached, vocabulary, tmp_path):
  cached(seqio_vocabulary(vocabulary), steps_with(TOKENIZE))
  seqio.set_global_cache_dirs([str(tmp_path)])
  try:
    task = bind(vocabulary, tmp_path, cache_dirs=())
    assert ids(task) == expected_ids(vocabulary)
  finally:
    seqio.set_global_cache_dirs([])


def test_a_task_that_must_be_cached_says_so(cached, vocabulary, tmp_path):
  placeholder = seqio.CacheDatasetPlaceholder(required=True)
  cached(seqio_vocabulary(vocabulary), [TOKENIZE, placeholder])
  assert ids(bind(vocabulary, tmp_path)) == expected_ids(vocabulary)
  with pytest.raises(ValueError, match='set USE_CACHED_TASKS=True'):
    bind(vocabulary, tmp_path, use=False)


def test_a_task_without_a_place_for_a_cache_says_so(
  cached, vocabulary, tmp_path, capsys
):
  cached(seqio_vocabulary(vocabulary), [TOKENIZE], write=False)
  assert ids(bind(vocabulary, tmp_path)) == expected_ids(vocabulary)
  assert "'my:task' has no CacheDatasetPlaceholder" in capsys.readouterr().err


def test_a_mixture_of_caches(cached, vocabulary, other_vocabulary, tmp_path):
  for name in ('one', 'two'):
    own = seqio_vocabulary(vocabulary)
    cached(own, steps_with(TOKENIZE), name=name)
  mixture = data_files.bind(
    other_vocabulary,
    'mixture',
    {
      'cached_tasks.use': True,
      'cached_tasks.cache_dirs': (str(tmp_path),),
      'mixture.tasks': {'one': 'proportional', 'two': 1.0},
    },
  )
  assert [mixture.get_rate(task) for task in mixture.tasks] == [NUM_EXAMPLES, 1]
  batches = streams.train_batches(
    mixture, task_feature_lengths=LENGTHS, batch_size=50, seed=0
  )
  prompts = {tuple(row) for row in next(batches)['encoder_input_tokens']}
  expected = {
    tuple(np.pad(prompt, (0, 32 - len(prompt))))
    for prompt, _ in expected_ids(other_vocabulary, 'train')
  }
  assert prompts == expected


def test_our_tasks_are_cached_before_their_template(vocabulary, tmp_path):
  rows = [{'en': f'house {n}', 'ro': f'casa {n}'} for n in range(5)]
  folder = tmp_path / 'tensorflow_datasets'
  data_files.prepare_tfds(
    'wmt16_translate/ro-en:1.0.0', folder, lambda split: rows
  )
  tasks.register()
  task = seqio.TaskRegistry.get('wmt16_en_ro')
  task.source.tfds_dataset.override_data_dir(str(folder))
  data_files.write_cache(task, tmp_path, ['train'])
  bound = data_files.bind(
    vocabulary,
    'wmt16_en_ro',
    {
      'cached_tasks.use': True,
      'cached_tasks.cache_dirs': (str(tmp_path),),
      'tfds.data_dir': str(tmp_path / 'none'),
      'tfds.template': 'ro {source}',
    },
  )
  helpers.streamed(bound).check_data('train', LENGTHS)
  dataset = bound.get_dataset(LENGTHS, 'train', shuffle=False)
  assert sorted(
    example['inputs_pretokenized'].decode()
    for example in dataset.as_numpy_iterator()
  ) == [f'ro house {n}' for n in range(5)]
