# SPDX-License-Identifier: Apache-2.0
"""A pretrained decoder-only model continues the prompt.

Its tokens and its loss are those of transformers, which knows of no EOS behind
a prompt and of no start token before an answer.
"""

import json

import helpers
import jax
import numpy as np
import pytest

from l2s_jax.data import batching
from l2s_jax.inference import infer
from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s, losses
from l2s_jax.runtime import partitioning
from l2s_jax.systems import model_paths, parameters

PROMPTS = ('a red box', 'x', 'the cat')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('gpt2')
  vocabulary = helpers.vocabulary()
  source = helpers.Arrays(
    helpers.GPT2, helpers.random_params(l2s.build(helpers.GPT2))
  )
  to_huggingface.save(source, path, vocabulary)
  vocabulary.save(path)
  return path


def reference(folder):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

  def log_probs(ids):
    with torch.no_grad():
      logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()

  return log_probs


@pytest.mark.parametrize('num_beams', [1, 3])
def test_answers_are_those_of_transformers(folder, tmp_path, num_beams):
  log_probs = reference(folder)
  source = tmp_path / 'in.txt'
  source.write_text('\n'.join(PROMPTS) + '\n')
  infer.infer(
    str(folder),
    str(source),
    str(tmp_path / 'out'),
    prompt_length=19,
    max_decode_len=5,
    batch_size=8,
    decoding=infer.sampling.Decoding(log_probs=True, num_beams=num_beams),
  )
  lines = (tmp_path / 'out' / 'predictions.jsonl').read_text().splitlines()
  vocabulary = helpers.vocabulary()
  for prompt, line in zip(PROMPTS, lines, strict=True):
    record = json.loads(line)
    ids = vocabulary.encode(prompt)
    greedy_sum = 0.0
    greedy = list(ids)
    for token, found in zip(
      record['token_ids'], record['token_log_probs'], strict=True
    ):
      np.testing.assert_allclose(found, log_probs(ids)[-1][token], atol=2e-5)
      ids.append(token)
      if num_beams == 1:
        assert token == log_probs(ids[:-1])[-1].argmax()
      best = log_probs(greedy)[-1]
      greedy.append(int(best.argmax()))
      greedy_sum += best.max()
    if vocabulary.eos_id not in (*ids, *greedy):
      assert sum(record['token_log_probs']) >= greedy_sum - 1e-4


def test_loss_is_that_of_the_answer_behind_the_prompt(folder):
  log_probs = reference(folder)
  system = model_paths.load(str(folder))
  assert system.continues
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, mesh_config)
  params = parameters.load_params(system, layout, str(folder))
  vocabulary = system.prompt_vocabulary
  prompts = [vocabulary.encode(prompt) for prompt in PROMPTS]
  answer = vocabulary.encode(' sits') + [vocabulary.eos_id]
  batch = batching.prompt_batch(
    [[*ids, vocabulary.eos_id] for ids in prompts], length=18, pad_id=0
  )
  rows = np.tile(np.array(answer, np.int32), (len(prompts), 1))
  batch |= {
    'decoder_target_tokens': rows,
    'decoder_input_tokens': np.concatenate(
      [np.full_like(rows[:, :1], vocabulary.start_id), rows[:, :-1]], axis=1
    ),
    'decoder_segment_ids': np.ones_like(rows),
    'decoder_loss_weights': np.ones(rows.shape, np.float32),
  }
  batch = batching.continuing(batch, vocabulary.prefix_ids, vocabulary.eos_ids)
  batch = jax.tree.map(jax.numpy.asarray, batch)
  logits = system.module.apply({'params': params}, batch, deterministic=True)
  _, sums = losses.token_cross_entropy(
    logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
  )
  expected = 0.0
  for ids in prompts:
    found = log_probs([*ids, *answer])[len(ids) - 1 : -1]
    expected -= found[np.arange(len(answer)), answer].sum()
  np.testing.assert_allclose(float(sums['loss']), expected, rtol=1e-5)


def test_the_docstring_of_continuing():
  batch = batching.prompt_batch([[7, 8, 1]], length=4, pad_id=0, batch_size=2)
  batch['encoder_segment_ids'][1] = 0  # A row without a prompt.
  found = batching.continuing(batch, (2,), (1,))
  np.testing.assert_array_equal(
    found['encoder_input_tokens'], [[2, 7, 0, 0], [0, 0, 0, 0]]
  )
  np.testing.assert_array_equal(found['first_tokens'], [8, -1])
