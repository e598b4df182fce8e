# SPDX-License-Identifier: Apache-2.0
"""Holds our T5 to what T5X itself computes from the checkpoints it saved."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from l2s_jax.models import encoder_decoder
from l2s_jax.weights.formats import t5x

GOLDEN = (
  't5_1_0_tiny',
  't5_1_1_tiny',
  't5_1_1_tiny_scanned',
  't5_1_1_tiny_orbax',
)


@pytest.fixture(params=GOLDEN)
def golden(request, shared_data):
  """Returns model, parameters, batch and what T5X made of them."""
  folder = shared_data / 't5x_golden' / request.param
  source = t5x.Checkpoint(folder)
  assert source.step() == 1234
  expected = dict(np.load(folder / 'expected.npz'))
  # T5X takes token 0 for padding, and so do these arrays.
  batch = {
    'encoder_input_tokens': expected['encoder_input_tokens'],
    'encoder_segment_ids': np.int32(expected['encoder_input_tokens'] != 0),
    'decoder_input_tokens': expected['decoder_input_tokens'],
    'decoder_segment_ids': np.int32(expected['decoder_target_tokens'] != 0),
  }
  batch = {name: jnp.asarray(array) for name, array in batch.items()}
  params = traverse_util.unflatten_dict(
    {path: source.read(path) for path in source.shapes()}
  )
  return encoder_decoder.EncoderDecoder(source.config), params, batch, expected


def test_encoder_states_and_logits_are_those_of_t5x(golden):
  model, params, batch, expected = golden

  def encode(model, batch):
    embeddings = model.embed(batch['encoder_input_tokens'])
    segment_ids = batch['encoder_segment_ids']
    return model.encode(embeddings, segment_ids, deterministic=True)

  encoded = model.apply({'params': params}, batch, method=encode)
  logits = model.apply({'params': params}, batch, deterministic=True)

  real = batch['encoder_segment_ids'] > 0
  np.testing.assert_allclose(
    encoded[real], expected['encoded'][real], rtol=1e-5, atol=1e-5
  )
  real = batch['decoder_segment_ids'] > 0
  np.testing.assert_allclose(
    logits[real], expected['logits'][real], rtol=1e-5, atol=1e-5
  )
  targets = expected['decoder_target_tokens']
  log_probs = jnp.take_along_axis(
    jax.nn.log_softmax(logits), targets[..., None], axis=-1
  )[..., 0]
  np.testing.assert_allclose(
    (log_probs * expected['decoder_loss_weights']).sum(1),
    expected['sequence_log_prob'],
    rtol=1e-5,
  )


def test_greedy_tokens_are_those_of_t5x(golden):
  model, params, batch, expected = golden
  np.testing.assert_array_equal(
    helpers.generate(model, params, batch, max_decode_len=16, eos_id=1),
    expected['greedy_tokens'],
  )
