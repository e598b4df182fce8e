# SPDX-License-Identifier: Apache-2.0
"""Laws of peers: the same tokens as ours, and none that is not there."""

import dataclasses

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s
from l2s_jax.performance import peers, random_weights

CONFIGS = {
  't5_1_0': helpers.T5_1_0,
  't5_1_1': helpers.T5_1_1,
  'gpt2': helpers.GPT2,
  # Which masks a first token that is padding. A window shorter than prompts
  # transformers would cut cross-attention to, too.
  't5gemma': dataclasses.replace(
    helpers.T5GEMMA, emb_dim=24, num_kv_heads=3, sliding_window=24
  ),
}
NUM_TOKENS = 6


@pytest.fixture(scope='module', params=CONFIGS)
def model(request, tmp_path_factory):
  """A config, prompts, our tokens, and the weights for others."""
  config = CONFIGS[request.param]
  module = l2s.build(config)
  source = random_weights.RandomWeights(config, seed=1)
  params = traverse_util.unflatten_dict(
    {path: jnp.asarray(source.read(path)) for path in source.shapes()}
  )
  folder = tmp_path_factory.mktemp(request.param) / 'model'
  to_huggingface.save(source, folder, None)
  prompts = np.random.default_rng(0).integers(
    3, config.vocab_size, (3, 7), np.int32
  )
  tokens = helpers.generate(
    module,
    params,
    {
      'encoder_input_tokens': jnp.asarray(prompts),
      'encoder_segment_ids': jnp.ones(prompts.shape, jnp.int32),
    },
    max_decode_len=NUM_TOKENS,
    start_id=peers.START_ID,
  )
  return config, prompts, np.asarray(tokens), folder


@pytest.mark.parametrize(
  'name', ['transformers float32', 'ctranslate2 float32']
)
def test_tokens_are_ours_in_float32(name, model):
  config, prompts, tokens, folder = model
  reason = peers.why_missing(peers.PEERS[name])
  if reason:
    pytest.skip(reason)
  run = peers.load(name, folder, config)(prompts, NUM_TOKENS)
  assert len({*tokens.flat}) > 1
  np.testing.assert_array_equal(run(NUM_TOKENS), tokens)
  np.testing.assert_array_equal(run(1), tokens[:, :1])


@pytest.mark.parametrize('name', ['transformers bfloat16', 'ctranslate2 int8'])
def test_rounder_weights_write_as_many_tokens(name, model):
  config, prompts, tokens, folder = model
  reason = peers.why_missing(peers.PEERS[name])
  if reason:
    pytest.skip(reason)
  run = peers.load(name, folder, config)(prompts, NUM_TOKENS)
  assert run(NUM_TOKENS).shape == tokens.shape


def test_what_is_missing_is_named(monkeypatch):
  absent = peers.Peer('absent', 'float32', ('no_such_package',))
  assert peers.why_missing(absent) == (
    'the package no_such_package is not installed'
  )
  monkeypatch.setenv('PATH', '')
  compiled = absent._replace(packages=(), is_compiled=True)
  assert peers.why_missing(compiled) == (
    'torch.compile needs a C++ compiler (c++, g++ or clang++)'
  )


def test_a_model_that_an_engine_does_not_know_is_refused(tmp_path):
  reason = peers.why_missing(peers.PEERS['ctranslate2 float32'])
  if reason:
    pytest.skip(reason)
  config = dataclasses.replace(
    helpers.LLAMA,
    rope_scaling=(8.0, 32.0, 1.0, 12.0, 1.0),
    rope_scaling_type='yarn',
  )
  params = helpers.random_params(l2s.build(config))
  to_huggingface.save(helpers.Arrays(config, params), tmp_path, None)
  with pytest.raises(peers.UnsupportedError, match='yarn'):
    peers.load('ctranslate2 float32', tmp_path, config)


@pytest.mark.parametrize(
  'name', ['transformers float32', 'ctranslate2 float32']
)
def test_what_an_engine_cannot_read_is_refused_and_named(name, tmp_path):
  reason = peers.why_missing(peers.PEERS[name])
  if reason:
    pytest.skip(reason)
  (tmp_path / 'config.json').write_text('{"model_type": "no_such_model"}')
  with pytest.raises(peers.UnsupportedError) as caught:
    peers.load(name, tmp_path, helpers.T5_1_1)
  for word in (name, str(tmp_path), 'no_such_model'):
    assert word in str(caught.value)


def test_a_shorter_answer_has_a_shorter_compiled_cache(monkeypatch, tmp_path):
  name = 'transformers compiled'
  reason = peers.why_missing(peers.PEERS[name])
  if reason:
    pytest.skip(reason)
  torch, _ = helpers.import_reference()
  # Compilation itself takes minutes; what is compiled is the same.
  compiled = []

  def compile_nothing(forward, **_):
    compiled.append(forward)
    return forward

  monkeypatch.setattr(torch, 'compile', compile_nothing)
  source = random_weights.RandomWeights(helpers.T5_1_1, seed=1)
  to_huggingface.save(source, tmp_path, None)
  start = peers.load(name, tmp_path, helpers.T5_1_1)
  prompts = np.full((2, 5), 7, np.int32)
  (forward,) = compiled
  lengths = []
  for num_tokens in (9, 4):
    start(prompts, num_tokens)(num_tokens)
    lengths.append(forward.__self__._previous_max_cache_length)
  assert lengths[1] < lengths[0]
