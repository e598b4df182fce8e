# SPDX-License-Identifier: Apache-2.0
"""Laws of the SeqIO boundary: vocabularies, EOS, lengths and batch keys."""

import functools
import gzip
import subprocess
import sys

import numpy as np
import pytest

from l2s_jax.data import features, tasks
from l2s_jax.data.features import seqio, tf
from l2s_jax.vocabularies import loading

TEXTS = [
  'Two dogs run over the wet grass!',
  'Șase școli, țara și ştiinţa.',
  '  odd   spacing\t',
  '½ ﬁne ﬂuffy ﷺ',
  '',
  '!',
  '<extra_id_0> x </s>',
  '日本語',
]


def encode_in_tensorflow(vocabulary, texts):
  wrapped = features.wrap_vocabulary(vocabulary)
  dataset = tf.data.Dataset.from_tensor_slices(texts).map(wrapped.encode_tf)
  return [ids.tolist() for ids in dataset.as_numpy_iterator()]


@pytest.mark.parametrize(
  'path',
  [
    't5/spiece.model',
    'mt5/spiece.model',
    'mistral_v1/tokenizer.model',
    't5/tokenizer.json',
    'gpt2',
    'smollm2/tokenizer.json',
  ],
)
def test_tensorflow_encodes_as_the_vocabulary_does(shared_data, path):
  vocabulary = loading.load(shared_data / 'tokenizers' / path)
  texts = list(TEXTS)
  for language in ('de', 'fr', 'ro'):
    name = shared_data / 'flores' / f'flores-dev.{language}.gz'
    with gzip.open(name, 'rt', encoding='utf-8') as file:
      texts += file.read().splitlines()[:100]
  expected = [vocabulary.encode(text) for text in texts]
  assert encode_in_tensorflow(vocabulary, texts) == expected
  wrapped = features.wrap_vocabulary(vocabulary)
  for ids in expected:
    padded = [*ids, vocabulary.eos_id, 5, vocabulary.vocab_size + 7]
    assert wrapped.decode(np.array(padded)) == vocabulary.decode(ids)
  decoded = wrapped.decode_tf(tf.constant([expected[0], expected[0]]))
  text = vocabulary.decode(expected[0])
  assert decoded.numpy().tolist() == [text.encode()] * 2


def test_extra_ids_reach_tensorflow(vocabulary):
  extended = loading.load(vocabulary.path, extra_ids=3)
  text = 'a <extra_id_0> b <extra_id_2>'
  (ids,) = encode_in_tensorflow(extended, [text])
  assert ids == extended.encode(text)
  assert extended.vocab_size - 1 in ids


def convert(example, lengths, vocabulary):
  (row,) = convert_all([example], lengths, vocabulary)
  return row


def convert_all(examples, lengths, vocabulary, *, pack=False):
  wrapped = features.wrap_vocabulary(vocabulary)
  output_features = {
    key: seqio.Feature(wrapped) for key in ('inputs', 'targets')
  }
  datasets = [
    features.tokenize_and_measure(
      tf.data.Dataset.from_tensors(example), output_features
    )
    for example in examples
  ]
  dataset = functools.reduce(lambda one, two: one.concatenate(two), datasets)
  dataset = seqio.utils.trim_dataset(dataset, lengths, output_features)
  converter = features.L2SFeatureConverter(wrapped, wrapped, pack=pack)
  return list(converter(dataset, lengths).as_numpy_iterator())


def test_converter_makes_the_batch_keys(vocabulary):
  example = {'inputs': tf.constant([3, 0, 4]), 'targets': tf.constant([0, 5])}
  batch = convert(example, {'inputs': 6, 'targets': 4}, vocabulary)
  assert {key: value.tolist() for key, value in batch.items()} == {
    'encoder_input_tokens': [3, 0, 4, 1, 0, 0],
    'encoder_segment_ids': [1, 1, 1, 1, 0, 0],
    'decoder_input_tokens': [0, 0, 5, 0],
    'decoder_target_tokens': [0, 5, 1, 0],
    'decoder_segment_ids': [1, 1, 1, 0],
    'decoder_loss_weights': [1, 1, 1, 0],
    'encoder_truncated': 0,
    'decoder_truncated': 0,
  }
  assert batch['decoder_loss_weights'].dtype == np.float32
  assert batch['encoder_input_tokens'].dtype == np.int32


def test_start_and_pad_ids_are_the_vocabularys(vocabulary):
  answers = loading.load(vocabulary.path, start_id=8, pad_id=7, eos_id=9)
  example = {
    'inputs': tf.constant([3]),
    'targets': tf.constant([0, 5], tf.int64),
  }
  batch = convert(example, {'inputs': 2, 'targets': 4}, answers)
  assert batch['decoder_input_tokens'].tolist() == [8, 0, 5, 7]
  assert batch['decoder_target_tokens'].tolist() == [0, 5, 9, 7]


@pytest.mark.parametrize(
  'length, tokens, truncated',
  [(4, [3, 4, 5, 1], 0), (3, [3, 4, 5], 1), (1, [3], 1)],
)
def test_truncation_is_longer_than_the_length_with_eos(
  vocabulary, length, tokens, truncated
):
  ids = tf.constant([3, 4, 5])
  batch = convert(
    {'inputs': ids, 'targets': ids},
    {'inputs': length, 'targets': 9},
    vocabulary,
  )
  assert batch['encoder_input_tokens'].tolist() == tokens
  assert batch['encoder_truncated'] == truncated
  assert batch['decoder_truncated'] == 0


def test_eos_is_there_once(vocabulary):
  ended, open_ended = tf.constant([3, 1]), tf.constant([3])
  for ids in (ended, open_ended):
    batch = convert(
      {'inputs': ids, 'targets': ids}, {'inputs': 4, 'targets': 4}, vocabulary
    )
    assert batch['encoder_segment_ids'].tolist() == [1, 1, 0, 0]


def test_packed_examples_keep_their_starts_numbers_and_zeros(vocabulary):
  """With the examples of the docstring, and two more."""
  vocabulary = loading.load(vocabulary.path, start_id=8, pad_id=7, eos_id=9)
  examples = [
    {'inputs': tf.constant(prompt), 'targets': tf.constant(answer)}
    for prompt, answer in (
      ([3, 4], [0, 5]),
      ([0, 0, 0, 0, 0, 0], [5]),  # longer than a row
      ([6], tf.zeros([0], tf.int32)),
      ([0], [0, 0, 0, 0]),  # likewise
    )
  ]
  lengths = {'inputs': 6, 'targets': 4}
  rows = convert_all(examples, lengths, vocabulary, pack=True)
  assert [{k: v.tolist() for k, v in row.items()} for row in rows] == [
    {
      'encoder_input_tokens': [3, 4, 9, 6, 9, 7],
      'encoder_segment_ids': [1, 1, 1, 2, 2, 0],
      'decoder_input_tokens': [8, 0, 5, 8],
      'decoder_target_tokens': [0, 5, 9, 9],
      'decoder_segment_ids': [1, 1, 1, 2],
      'decoder_loss_weights': [1, 1, 1, 1],
      'encoder_truncated': 0,
      'decoder_truncated': 0,
    },
    {
      'encoder_input_tokens': [0, 0, 0, 0, 0, 0],
      'encoder_segment_ids': [1, 1, 1, 1, 1, 1],
      'decoder_input_tokens': [8, 5, 7, 7],
      'decoder_target_tokens': [5, 9, 7, 7],
      'decoder_segment_ids': [1, 1, 0, 0],
      'decoder_loss_weights': [1, 1, 0, 0],
      'encoder_truncated': 1,
      'decoder_truncated': 0,
    },
    {
      'encoder_input_tokens': [0, 9, 7, 7, 7, 7],
      'encoder_segment_ids': [1, 1, 0, 0, 0, 0],
      'decoder_input_tokens': [8, 0, 0, 0],
      'decoder_target_tokens': [0, 0, 0, 0],
      'decoder_segment_ids': [1, 1, 1, 1],
      'decoder_loss_weights': [1, 1, 1, 1],
      'encoder_truncated': 0,
      'decoder_truncated': 1,
    },
  ]
  assert rows[0]['decoder_loss_weights'].dtype == np.float32
  assert rows[0]['encoder_truncated'].dtype == np.int32


def test_unbound_task_is_refused():
  tasks.register()
  with pytest.raises(ValueError, match='tasks.bind first'):
    features.make_converter(seqio.TaskRegistry.get('cldr'))


def test_importing_tensorflow_is_silent_and_leaves_the_gpu():
  process = subprocess.run(
    [
      sys.executable,
      '-c',
      'from l2s_jax.data.features import tf\n'
      'print(tf.config.get_visible_devices("GPU"))',
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  assert (process.stdout, process.stderr) == ('[]\n', '')
