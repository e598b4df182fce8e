# SPDX-License-Identifier: Apache-2.0
"""T5's head: the embedding table or not, scaled or not, in and out."""

import dataclasses
import json

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from l2s_jax.interop import convert, to_t5x
from l2s_jax.models import l2s
from l2s_jax.weights.formats import huggingface, t5x

PROMPT = [5, 6, 7, 8, 9, 1]
ANSWER = [0, 7, 8, 9]
HEADS = pytest.mark.parametrize('tied', [True, False])
SCALES = pytest.mark.parametrize('scaled', [True, False])


def write(transformers, torch, folder, tied, scaled):
  """Has transformers write a T5 with such a head."""
  torch.manual_seed(1)
  model = transformers.T5ForConditionalGeneration(
    transformers.T5Config(
      vocab_size=97,
      d_model=32,
      d_kv=8,
      d_ff=64,
      num_layers=2,
      num_heads=4,
      decoder_start_token_id=0,
      feed_forward_proj='gated-gelu',
      tie_word_embeddings=scaled,  # For transformers it says this.
    )
  ).eval()
  if not tied:
    table = model.shared.weight
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(table))
  model.save_pretrained(folder)


def theirs(transformers, torch, folder):
  model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
  with torch.no_grad():
    return model(
      input_ids=torch.tensor([PROMPT]),
      decoder_input_ids=torch.tensor([ANSWER]),
    ).logits.numpy()


def ours(source):
  params = traverse_util.unflatten_dict(
    {path: jnp.asarray(source.read(path)) for path in source.shapes()}
  )
  batch = {
    'encoder_input_tokens': jnp.array([PROMPT]),
    'encoder_segment_ids': jnp.ones((1, len(PROMPT)), jnp.int32),
    'decoder_input_tokens': jnp.array([ANSWER]),
    'decoder_segment_ids': jnp.ones((1, len(ANSWER)), jnp.int32),
  }
  module = l2s.build(source.config)
  return module.apply({'params': params}, batch, deterministic=True)


@HEADS
@SCALES
def test_all_four_are_read_and_written_as_transformers_does(
  tied, scaled, tmp_path
):
  torch, transformers = helpers.import_reference()
  folder, out = tmp_path / 'in', tmp_path / 'out'
  write(transformers, torch, folder, tied, scaled)
  expected = theirs(transformers, torch, folder)
  source = huggingface.HuggingFaceFolder(folder)
  assert source.config.logits_via_embedding == tied
  np.testing.assert_allclose(ours(source), expected, atol=1e-4, rtol=1e-4)
  convert.convert(str(folder), str(out), from_='hf', to='hf')
  again = theirs(transformers, torch, out)
  np.testing.assert_array_equal(again, expected)
  assert huggingface.HuggingFaceFolder(out).config == source.config


@HEADS
@SCALES
def test_t5x_has_the_two_that_it_can_say(tied, scaled, tmp_path):
  torch, transformers = helpers.import_reference()
  write(transformers, torch, tmp_path / 'in', tied, scaled)
  source = huggingface.HuggingFaceFolder(tmp_path / 'in')
  if tied != scaled:
    with pytest.raises(ValueError, match='scale_(untied_)?logits: T5X has '):
      to_t5x.check(source)
    return
  to_t5x.save(source, tmp_path / 'out')
  found = t5x.Checkpoint(tmp_path / 'out')
  np.testing.assert_array_equal(ours(found), ours(source))


def test_a_head_that_versions_read_otherwise_is_said(tmp_path, capsys):
  torch, transformers = helpers.import_reference()
  write(transformers, torch, tmp_path, tied=False, scaled=True)
  path = tmp_path / 'config.json'
  content = json.loads(path.read_text())
  del content['scale_decoder_outputs']  # As transformers 4 has it.
  path.write_text(json.dumps(content))
  capsys.readouterr()
  source = huggingface.HuggingFaceFolder(tmp_path)
  assert 'transformers 4 would replace it' in capsys.readouterr().err
  expected = theirs(transformers, torch, tmp_path)
  np.testing.assert_allclose(ours(source), expected, atol=1e-4, rtol=1e-4)


def test_paths_may_hold_two_dots(tmp_path):
  config = dataclasses.replace(
    helpers.T5_1_1, relpos_buckets=32, relpos_max_distance=128
  )
  params = helpers.random_params(l2s.build(config))
  (tmp_path / 'a').mkdir()
  place = tmp_path / 'a' / '..' / 'out'
  to_t5x.save(helpers.Arrays(config, params), place)
  found = t5x.Checkpoint(place)
  np.testing.assert_array_equal(
    found.read(('token_embedder', 'embedding')),
    params['token_embedder']['embedding'],
  )
  assert found.shapes() == t5x.Checkpoint(tmp_path / 'out').shapes()
