# SPDX-License-Identifier: Apache-2.0
"""Holds our T5 to what T5X itself computes from the checkpoints it saved."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from flax import traverse_util

from l2s_jax import decode
from l2s_jax.models import config as config_lib
from l2s_jax.models import t5

# T5X's names where they are not ours.
RENAMED = {
  r'encoder\.encoder_norm': 'encoder.final_norm',
  r'decoder\.decoder_norm': 'decoder.final_norm',
  r'decoder\.logits_dense': 'logits_dense',
  r'encoder_decoder_attention': 'cross_attention',
  r'\.attention\.': '.self_attention.',
  r'pre_attention_layer_norm': 'pre_self_attention_norm',
  r'_layer_norm': '_norm',
}


def read_params(folder, config):
  """Returns our parameters from a T5X checkpoint whose layers are apart."""
  flat: dict[tuple[str, ...], np.ndarray] = {}
  layers: dict[tuple[str, ...], list[np.ndarray]] = {}
  for array in sorted(folder.glob('target.*')):
    name = array.name.removeprefix('target.')
    for pattern, ours in RENAMED.items():
      name = re.sub(pattern, ours, name)
    driver = {'driver': 'file', 'path': str(array)}
    store = tensorstore.open({'driver': 'zarr', 'kvstore': driver}).result()
    value = store.read().result()
    if '_attention.out.' in name:
      value = value.reshape(config.num_heads, config.head_dim, -1)
    elif '_attention.' in name:  # T5X merges heads and kv.
      value = value.reshape(-1, config.num_heads, config.head_dim)
    stacked, is_in_layer = re.subn(r'layers_\d+', 'layers', name)
    if is_in_layer:
      layers.setdefault(tuple(stacked.split('.')), []).append(value)
    else:
      flat[tuple(name.split('.'))] = value
  assert config.num_decoder_layers < 10  # sorted as text
  flat |= {path: np.stack(values) for path, values in layers.items()}
  return traverse_util.unflatten_dict(flat)


@pytest.fixture(params=['t5_1_0_tiny', 't5_1_1_tiny'])
def golden(request, shared_data):
  """Returns model, parameters, batch and what T5X made of them."""
  folder = shared_data / 't5x_golden' / request.param
  fields = json.loads((folder / 'config.json').read_text())['config']
  fields['mlp_activations'] = tuple(fields['mlp_activations'])
  config = config_lib.TransformerConfig(**fields)
  expected = dict(np.load(folder / 'expected.npz'))
  # T5X takes token 0 for padding, and so do these arrays.
  batch = {
    'encoder_input_tokens': expected['encoder_input_tokens'],
    'encoder_segment_ids': np.int32(expected['encoder_input_tokens'] != 0),
    'decoder_input_tokens': expected['decoder_input_tokens'],
    'decoder_segment_ids': np.int32(expected['decoder_target_tokens'] != 0),
  }
  batch = {name: jnp.asarray(array) for name, array in batch.items()}
  params = read_params(folder / 'checkpoint_1234', config)
  return t5.EncoderDecoder(config), params, batch, expected


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
  generator = decode.Generator(
    model, model, None, max_decode_len=16, start_id=0, eos_id=1, pad_id=0
  )
  np.testing.assert_array_equal(
    generator(params, batch), expected['greedy_tokens']
  )
