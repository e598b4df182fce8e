# SPDX-License-Identifier: Apache-2.0
"""Laws of LoRA: it starts as the SLM, is all that is trained, and merges."""

import contextlib
import dataclasses
import json
import re
from typing import Any

import helpers
import jax
import numpy as np
import optax
import pytest
import saved_runs
from flax import traverse_util

from l2s_jax.models import l2s, lora
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters
from l2s_jax.training import checkpoint, optim, resuming, train_step
from l2s_jax.training import state as state_lib
from l2s_jax.weights import opening

ALPHA = 5.0
CHANGES: dict[str, Any] = {
  'lora_rank': 3,
  'lora_alpha': ALPHA,
  'lora_kernels': ('query', 'value', 'out', 'wo'),
}
PLAIN = helpers.llm_to_slm('t5_1_1', 'add', 'shared')


def with_lora(module):
  slm = dataclasses.replace(module.slm_config, **CHANGES)
  return module.clone(slm_config=slm)


def test_merged_is_unmerged():
  module = with_lora(PLAIN)
  params, batch = helpers.random_params(module), helpers.batch_for(module)
  merged = params | {'slm': lora.merge(params['slm'], ALPHA)}
  names = traverse_util.flatten_dict(merged, sep='/').keys()
  plain = helpers.param_shapes(PLAIN)
  assert names == traverse_util.flatten_dict(plain, sep='/').keys()
  expected = helpers.logits(module, params, batch)
  helpers.assert_close(helpers.logits(PLAIN, merged, batch), expected)
  # And so does generation have it.
  cache = helpers.prefill(module, params, batch, 2)
  tokens = batch['decoder_input_tokens'][:, :1]
  found, _ = helpers.extend(module, params, tokens, cache)
  helpers.assert_close(found[:, 0], expected[:, 0])


def test_a_run_trains_it_alone_and_is_read_merged(tmp_path):
  """From an SLM's weights, with which it gives the same logits at first."""
  module = with_lora(PLAIN)
  trained, batch = helpers.random_params(PLAIN), helpers.batch_for(PLAIN)
  system = helpers.system(module)
  config = partitioning.MeshConfig()
  mesh = partitioning.make_mesh(config, jax.devices()[:1])
  layout = parameters.layout(system, mesh, config)

  # A run of an SLM, whose weights the other starts from.
  slm = helpers.system(l2s.build(PLAIN.slm_config))
  saved_runs.save(tmp_path / 'slm', slm, trained['slm'])
  system = dataclasses.replace(
    system,
    sources={'slm': str(tmp_path / 'slm'), 'llm': str(tmp_path / 'llm')},
    llm_fingerprint='f' * 64,
  )
  optimizer = optim.adamw(0.1, weight_decay=0.1)
  _, axes = parameters.split(layout.axes, system.frozen)
  transform = optim.without(optimizer.make(axes), system.is_trained)
  with checkpointer(tmp_path / 'fresh') as fresh:
    state = resuming.restore_or_create(
      system, layout, transform, mesh, fresh, 0
    )
  frozen = {'llm': trained['llm']}
  expected = helpers.logits(
    PLAIN, {**state.trainable, 'slm': trained['slm']} | frozen, batch
  )
  found = helpers.logits(module, state.trainable | frozen, batch)
  np.testing.assert_array_equal(found, expected)

  before = jax.tree.map(np.array, state.trainable)
  step = train_step.StepSettings(1, 0.0, 0.0).make(
    module, transform, system.is_trained
  )
  step = jax.jit(step).lower(state, frozen, batch).compile()
  for _ in range(2):  # At first the second factor is 0.
    state, _ = step(state, frozen, batch)
  old, new = (
    traverse_util.flatten_dict(tree, sep='/')
    for tree in (before, state.trainable)
  )
  for path, array in new.items():
    moves = path.startswith('projector/') or lora.is_learned(path)
    assert np.array_equal(array, old[path]) != moves, path
  slots = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  }
  assert not any('/slm/' in path and 'lora_' not in path for path in slots)
  assert any('/slm/' in path for path in slots)

  saved_runs.save(tmp_path / 'run', system, state.trainable)
  run = opening.open_source(str(tmp_path / 'run'))
  assert run.config == PLAIN.slm_config
  merged = traverse_util.flatten_dict(lora.merge(state.trainable['slm'], ALPHA))
  assert run.shapes().keys() == merged.keys()
  for path, array in merged.items():
    np.testing.assert_allclose(run.read(path), array, rtol=1e-6, atol=1e-6)
  description = json.loads((tmp_path / 'run' / 'model.json').read_text())
  assert description['slm']['lora_rank'] == 3


def test_of_the_kernels_that_it_holds_no_gradient_is_computed():
  """In the compiled step, of those beside which LoRA stands and of others."""
  optimizer = optax.sgd(0.1)

  def products(module):
    system = helpers.system(module)
    frozen, trainable = parameters.split(
      helpers.random_params(module), ('llm',)
    )
    step = train_step.StepSettings(1, 0.0, 0.0).make(
      module, optimizer, system.is_trained
    )
    state = state_lib.create(trainable, optimizer, 0)
    batch = helpers.batch_for(module)
    compiled = jax.jit(step).lower(state, frozen, batch).compile()
    text = compiled.as_text() or ''
    return set(re.findall(r'= f32\[([\d,]*)\]\S* dot\(', text))

  of_kernels, of_lora = {'16,8', '8,16', '16,32', '32,16'}, {'16,3', '3,16'}
  plain, held = products(PLAIN), products(with_lora(PLAIN))
  assert of_kernels <= plain and of_lora.isdisjoint(plain)
  assert of_lora <= held and of_kernels.isdisjoint(held)


def checkpointer(folder):
  return contextlib.closing(checkpoint.Checkpointer(folder))


@pytest.mark.parametrize(
  'changes',
  [{'lora_rank': -1}, {'lora_kernels': ()}, {'lora_kernels': ('wi',)}],
)
def test_kernels_that_are_not_there_are_refused(changes):
  with pytest.raises(ValueError, match='lora_rank=.*, the projections of this'):
    dataclasses.replace(helpers.T5_1_1, **(CHANGES | changes))
