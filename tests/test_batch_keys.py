# SPDX-License-Identifier: Apache-2.0
"""Laws of batches: whoever makes one gives it the same keys and types."""

import helpers
import seqio

from l2s_jax.data import features
from l2s_jax.models import batch_keys

LENGTHS = {'inputs': 5, 'targets': 4}


def described(batch):
  return {key: (value.shape, value.dtype) for key, value in batch.items()}


def test_a_batch_is_what_its_example_says():
  vocabulary = helpers.vocabulary()
  batch = helpers.pad_and_shift(
    [[7, 1], [8, 9, 1]],
    [[6, 1], [1]],
    task_feature_lengths=LENGTHS,
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
  )
  assert described(batch) == described(batch_keys.example_batch(2, 5, 4))


def test_the_converter_has_the_same_keys_and_types():
  found = {
    key: spec.dtype.as_numpy_dtype
    for key, spec in features.L2SFeatureConverter.MODEL_FEATURES.items()
    if key not in ('encoder_truncated', 'decoder_truncated')
  }
  assert found == {key: dtype for key, (_, dtype) in batch_keys.KEYS.items()}
  assert issubclass(features.L2SFeatureConverter, seqio.FeatureConverter)
