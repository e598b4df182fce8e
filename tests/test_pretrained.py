# SPDX-License-Identifier: Apache-2.0
"""A model that was really trained says what it is known to say.

stories260K (Karpathy's tinyllamas): a Llama with grouped queries that writes
children's stories, with the tokens and logits that it is known for.
"""

import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from l2s_jax.models import batch_keys, l2s
from l2s_jax.runtime import partitioning
from l2s_jax.weights import opening
from l2s_jax.weights import source as source_lib

NUM_TOKENS = 48


def read_llama2_c(path):
  """Returns config.json and tensors, by their names in transformers.

  The format: seven int32 (width, MLP, layers, heads, KV heads, vocabulary,
  length), then float32 tensors one after the other. RoPE turns neighbouring
  features, where that of transformers turns the two halves of a head.
  """
  content = path.read_bytes()
  d, f, num_layers, n, k, v, length = np.frombuffer(content, np.int32, 7)
  h = d // n
  floats = iter(np.frombuffer(content, np.float32, offset=28))

  def take(*shape):
    return np.fromiter(floats, np.float32, np.prod(shape)).reshape(shape)

  def halves(x):
    return x.reshape(-1, h // 2, 2, d).swapaxes(1, 2).reshape(-1, d)

  tensors = {'embed_tokens.weight': take(v, d)}
  for name, *shape in (
    ('input_layernorm', d),
    ('self_attn.q_proj', n * h, d),
    ('self_attn.k_proj', k * h, d),
    ('self_attn.v_proj', k * h, d),
    ('self_attn.o_proj', d, n * h),
    ('post_attention_layernorm', d),
    ('mlp.gate_proj', f, d),
    ('mlp.down_proj', d, f),
    ('mlp.up_proj', f, d),
  ):
    for layer, x in enumerate(take(num_layers, *shape)):
      is_turned = name.endswith(('q_proj', 'k_proj'))
      tensors[f'layers.{layer}.{name}.weight'] = halves(x) if is_turned else x
  tensors['norm.weight'] = take(d)
  config_json = {
    'model_type': 'llama',
    'vocab_size': v,
    'hidden_size': d,
    'intermediate_size': f,
    'num_hidden_layers': num_layers,
    'num_attention_heads': n,
    'num_key_value_heads': k,
    'max_position_embeddings': length,
    'rms_norm_eps': 1e-5,
    'hidden_act': 'silu',
    'tie_word_embeddings': True,
  }
  sizes = {x: int(y) for x, y in config_json.items() if isinstance(y, np.int32)}
  return config_json | sizes, tensors


@pytest.fixture(scope='module')
def stories(shared_data, tmp_path_factory):
  """Returns the model, its parameters, and what it is known to say."""
  source = shared_data / 'pretrained' / 'stories260k'
  config_json, tensors = read_llama2_c(source / 'stories260K.bin')
  folder = tmp_path_factory.mktemp('stories260k')
  (folder / 'config.json').write_text(json.dumps(config_json))
  safetensors.numpy.save_file(
    {key: np.ascontiguousarray(value) for key, value in tensors.items()},
    folder / 'model.safetensors',
  )
  model = l2s.build(opening.open_source(str(folder)).config)
  shapes, _ = partitioning.abstract_params(
    lambda key, batch: model.init(key, batch, deterministic=True),
    batch_keys.example_batch(1, 2, 2),
  )
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params, _ = source_lib.load(
    opening.open_source(str(folder)),
    shapes,
    jax.tree.map(lambda _: device, shapes),
  )
  expected = json.loads((source / 'expected.json').read_text())
  return model, params, expected


def prompts(rows):
  """Returns rows of unequal lengths as a padded batch."""
  length = max(map(len, rows))
  tokens = [np.pad(row, (0, length - len(row))) for row in rows]
  return {
    'encoder_input_tokens': jnp.array(tokens, jnp.int32),
    'encoder_segment_ids': jnp.array(
      helpers.segments([len(row) for row in rows], length)
    ),
  }


def test_a_story_begins_with_the_known_logits(stories):
  model, params, expected = stories
  ids = expected['input_ids_for_logits']
  answer = jnp.array([ids[4:]])
  batch = prompts([ids[:4]]) | {
    'decoder_input_tokens': answer,
    'decoder_segment_ids': jnp.ones_like(answer),
  }
  logits = helpers.logits(model, params, batch)
  # Known to four digits.
  np.testing.assert_allclose(
    logits[0, -1], expected['last_logits'], rtol=1e-5, atol=6e-5
  )


def test_a_story_goes_on_as_it_is_known_from_wherever_one_begins(stories):
  """Prompts of unequal lengths: the story up to each time a token comes."""
  model, params, expected = stories
  ids = expected['greedy_ids']
  start_id = ids[3]
  begun = [i for i, token in enumerate(ids[:-NUM_TOKENS]) if token == start_id]
  assert len(begun) > 2
  found = helpers.generate(
    model,
    params,
    prompts([ids[:i] for i in begun]),
    max_decode_len=NUM_TOKENS,
    start_id=start_id,
  )
  known = [ids[i + 1 : i + 1 + NUM_TOKENS] for i in begun]
  np.testing.assert_array_equal(found, known)
