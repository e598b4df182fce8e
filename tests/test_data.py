# SPDX-License-Identifier: Apache-2.0
"""Laws of batches: masks from lengths, exact order, exact resume, controls."""

import itertools
import json
import random
import subprocess
import sys

import helpers
import numpy as np
import pytest

from l2s_jax.data import batching, streams, tasks
from l2s_jax.data.features import seqio
from l2s_jax.vocabularies import loading

LENGTHS = {'inputs': 24, 'targets': 12}
NUM_EXAMPLES = 37


@pytest.fixture(scope='module')
def answer_vocabulary(vocabulary):
  """Returns the same pieces with other special ids."""
  return loading.load(vocabulary.path, start_id=5, pad_id=4, eos_id=3)


@pytest.fixture(scope='module')
def task(tmp_path_factory, vocabulary, answer_vocabulary):
  """Returns a bound task of numbered JSONL examples, some of them long."""
  folder = tmp_path_factory.mktemp('jsonl')
  rows = [
    {'source': f'day {n} ' * (1 + n % 7), 'target': f'{n} ' * (1 + n % 5)}
    for n in range(NUM_EXAMPLES)
  ]
  for split in ('train', 'validation'):
    (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  local = tasks.local_task(
    {split: f'{split}.jsonl' for split in ('train', 'validation')},
    data_dir=str(folder),
    name='numbered',
  )
  seqio.TaskRegistry.add_provider('numbered', local)
  yield tasks.bind('numbered', vocabulary, answer_vocabulary)
  seqio.TaskRegistry.remove('numbered')


def equal(batch, other):
  assert batch.keys() == other.keys()
  for key in batch:
    np.testing.assert_array_equal(batch[key], other[key], key)


def rows_of(batches):
  return [
    row.tobytes()
    for batch in batches
    for row in np.concatenate(
      [batch['encoder_input_tokens'], batch['decoder_target_tokens']], axis=1
    )
  ]


def train(task, **kwargs):
  return streams.train_batches(
    task,
    **{'task_feature_lengths': LENGTHS, 'batch_size': 8, 'seed': 3, **kwargs},
  )


def test_prompt_batch_masks_by_length():
  batch = batching.prompt_batch([[5, 0, 1], [0]], length=4, pad_id=0)
  assert batch['encoder_input_tokens'].tolist() == [[5, 0, 1, 0], [0, 0, 0, 0]]
  assert batch['encoder_segment_ids'].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_short_batch_repeats_its_last_row_at_no_weight(vocabulary):
  batch = helpers.pad_and_shift(
    [[5, 1], [6, 7, 1]],
    [[8, 1], [1]],
    task_feature_lengths=LENGTHS,
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
    batch_size=4,
  )
  for key, value in batch.items():
    assert len(value) == 4
    if key != 'decoder_loss_weights':
      np.testing.assert_array_equal(value[2:], value[[1, 1]])
  assert batch['decoder_loss_weights'].sum(axis=1).tolist() == [2, 1, 0, 0]
  assert batch['encoder_segment_ids'].any(axis=1).all()


@pytest.mark.parametrize(
  'prompts, message',
  [
    ([], 'no sequences'),
    ([[1], []], 'sequence 1 is empty'),
    ([[1]] * 3, '3 rows do not fit into a batch of 2'),
  ],
)
def test_impossible_batches_are_refused(prompts, message):
  with pytest.raises(ValueError, match=message):
    batching.prompt_batch(prompts, length=4, pad_id=0, batch_size=2)


def test_batches_without_tensorflow_equal_seqios(
  task, vocabulary, answer_vocabulary
):
  examples = list(
    task.get_dataset(None, 'validation', shuffle=False).as_numpy_iterator()
  )
  batches = helpers.eval_batches(
    task, task_feature_lengths=LENGTHS, batch_size=8
  )
  for number, batch in enumerate(batches):
    rows = examples[8 * number : 8 * (number + 1)]
    equal(
      batch,
      helpers.pad_and_shift(
        [row['inputs'].tolist() for row in rows],
        [row['targets'].tolist() for row in rows],
        task_feature_lengths=LENGTHS,
        prompt_vocabulary=vocabulary,
        answer_vocabulary=answer_vocabulary,
        batch_size=8,
      ),
    )
  assert batches.num_examples == len(examples)


def test_without_tensorflow_installed():
  code = (
    'import sys\n'
    'for name in ("tensorflow", "seqio", "tensorflow_datasets"):\n'
    '  sys.modules[name] = None\n'
    'from l2s_jax.data import batching\n'
    'batch = batching.prompt_batch([[1]], length=2, pad_id=0)\n'
    'print(batch["encoder_segment_ids"])'
  )
  process = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert process.stdout == '[[1 0]]\n'


def test_partners_of_the_documented_example():
  prompts = [[5, 1], [7, 8, 1], [6, 1], [5, 1]]
  assert batching.control_partners(prompts) == [2, 0, 3, 1]


def test_partner_is_the_next_prompt_that_differs():
  for seed in range(200):
    rng = random.Random(seed)
    prompts = [
      [rng.randrange(2)] * rng.randrange(1, 4)
      for _ in range(rng.randrange(2, 12))
    ]
    if len(set(map(tuple, prompts))) < 2:
      with pytest.raises(ValueError, match='needs two different prompts'):
        batching.control_partners(prompts)
      continue
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for place, index in enumerate(order):
      following = order[place + 1 :] + order[:place]
      expected = next(i for i in following if prompts[i] != prompts[index])
      assert batching.control_partners(prompts)[index] == expected


def test_an_epoch_has_every_example_once_in_a_fresh_order(task):
  per_epoch = rows_of(
    helpers.eval_batches(task, task_feature_lengths=LENGTHS, batch_size=1)
  )
  rows = rows_of(train(task, batch_size=1, num_epochs=3))
  epochs = [rows[i * NUM_EXAMPLES : (i + 1) * NUM_EXAMPLES] for i in range(3)]
  assert len(rows) == 3 * NUM_EXAMPLES
  for epoch in epochs:
    assert sorted(epoch) == sorted(per_epoch)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_are_the_same_for_the_same_seed(task):
  first, again, other = (
    rows_of(itertools.islice(train(task, seed=seed), 6)) for seed in (3, 3, 4)
  )
  assert first == again
  assert first != other


@pytest.mark.parametrize('start', [0, 1, 4, 11])
def test_resumed_batches_equal_uninterrupted_ones(task, start):
  whole = list(itertools.islice(train(task), 14))
  resumed = list(itertools.islice(train(task, start_row=8 * start), 14 - start))
  for batch, expected in zip(resumed, whole[start:], strict=True):
    equal(batch, expected)


def test_mixture_resumes_too(task):
  mixture = seqio.Mixture(
    'mixture', [(task, 1), (task.replace(name='again'), 2)]
  )
  whole = list(itertools.islice(train(mixture), 9))
  resumed = itertools.islice(train(mixture, start_row=8 * 5), 4)
  for batch, expected in zip(resumed, whole[5:], strict=True):
    equal(batch, expected)


def test_truncations_are_counted(task):
  examples = list(
    task.get_dataset(None, 'validation', shuffle=False).as_numpy_iterator()
  )
  lengths = {'inputs': 9, 'targets': 5}
  batches = helpers.eval_batches(
    task, task_feature_lengths=lengths, batch_size=8
  )
  for batch in batches:
    assert not any(key.endswith('truncated') for key in batch)
  prompts, targets = (
    sum(len(row[key]) > lengths[key] for row in examples) for key in lengths
  )
  assert 0 < prompts < NUM_EXAMPLES and 0 < targets < NUM_EXAMPLES
  assert batches.num_examples == NUM_EXAMPLES
  assert batches.num_truncated_prompts == prompts
  assert batches.num_truncated_answers == targets


def test_evaluation_takes_the_first_examples_at_full_batches(task):
  every = rows_of(
    helpers.eval_batches(task, task_feature_lengths=LENGTHS, batch_size=1)
  )
  batches = list(
    helpers.eval_batches(
      task, task_feature_lengths=LENGTHS, batch_size=4, num_examples=10
    )
  )
  assert [len(batch['encoder_input_tokens']) for batch in batches] == [4] * 3
  weights = batches[-1]['decoder_loss_weights'].sum(axis=1)
  assert (weights > 0).tolist() == [True, True, False, False]
  assert rows_of(batches)[:10] == every[:10]


def test_missing_splits_and_lengths_are_named(task):
  with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
    train(task, split='test')
  with pytest.raises(ValueError, match='TASK_FEATURE_LENGTHS has input;'):
    train(task, task_feature_lengths={'input': 3})


def test_process_ends_with_python_in_its_pipeline(shared_data):
  code = (
    'from l2s_jax.data import streams, tasks\n'
    'from l2s_jax.vocabularies import loading\n'
    f'gpt2 = loading.load({str(shared_data / "tokenizers/gpt2")!r})\n'
    'batches = streams.train_batches(\n'
    '    tasks.bind("cldr", gpt2, gpt2), batch_size=4, seed=0,\n'
    '    task_feature_lengths={"inputs": 32, "targets": 32})\n'
    'print(next(batches)["encoder_input_tokens"].shape)'
  )
  process = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  )
  assert process.stdout == '(4, 32)\n'
