# SPDX-License-Identifier: Apache-2.0
"""Laws of costs: XLA counts the same, and reads as many bytes."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import pytest

from l2s_jax.models import config as config_lib
from l2s_jax.models import flops, l2s

BATCH_SIZE, PROMPT_LENGTH, NUM_SLOTS = 2, 32, 16

# Wide enough for products of matrices to be nearly all of the work.
T5 = config_lib.TransformerConfig(
  vocab_size=1000,
  emb_dim=128,
  num_heads=4,
  head_dim=32,
  mlp_dim=512,
  num_encoder_layers=2,
  num_decoder_layers=3,
)
GPT2 = dataclasses.replace(
  helpers.GPT2,
  vocab_size=1000,
  emb_dim=128,
  num_heads=4,
  head_dim=32,
  mlp_dim=512,
  num_decoder_layers=3,
  max_positions=64,
)
LLAMA = dataclasses.replace(
  GPT2,
  num_kv_heads=2,
  mlp_activations=('silu', 'linear'),
  norm='rms',
  use_bias=False,
  positions='rotary',
  logits_via_embedding=False,
)
LLM = dataclasses.replace(T5, emb_dim=96, num_encoder_layers=4)
WRITERS = {
  't5_1_0': T5,
  't5_1_1': dataclasses.replace(
    T5, mlp_activations=('gelu', 'linear'), logits_via_embedding=False
  ),
  'gpt2': GPT2,
  'llama': LLAMA,
}
MODULES = {name: l2s.build(config) for name, config in WRITERS.items()} | {
  'llm_to_t5': l2s.LlmToSlm(LLM, T5),
  'llm_to_gpt2': l2s.LlmToSlm(
    dataclasses.replace(LLM, vocab_size=1200), GPT2, shared_vocabulary=False
  ),
  'gpt2_to_llama': l2s.LlmToSlm(GPT2, LLAMA, 'replace'),
  'speculative': l2s.with_verifier(l2s.LlmToSlm(LLM, T5)),
}


def prepared(module):
  """Returns the module that generates, and the shapes of its parameters."""
  generating = l2s.for_generation(module)
  return generating, jax.eval_shape(
    lambda: l2s.params_for_generation(generating, helpers.random_params(module))
  )


def lowered(module, params, *args, method, **options):
  def call(params, *args):
    return module.apply({'params': params}, *args, method=method, **options)

  return jax.jit(call).lower(params, *args), jax.eval_shape(call, params, *args)


def lowered_prefill(module, params):
  tokens = jax.ShapeDtypeStruct((BATCH_SIZE, PROMPT_LENGTH), jnp.int32)
  batch = {'encoder_input_tokens': tokens, 'encoder_segment_ids': tokens}
  return lowered(module, params, batch, method='prefill', num_slots=NUM_SLOTS)


def lowered_step(module, params):
  token = jax.ShapeDtypeStruct((BATCH_SIZE, 1), jnp.int32)
  _, cache = lowered_prefill(module, params)
  return lowered(module, params, token, cache, method='extend')[0]


@pytest.mark.parametrize('name', MODULES)
def test_flops_of_a_prompt_are_those_that_xla_counts(name):
  module = MODULES[name]
  found = BATCH_SIZE * flops.prompt_flops(module, PROMPT_LENGTH)
  prefill, _ = lowered_prefill(*prepared(module))
  assert 0.96 < found / prefill.cost_analysis()['flops'] <= 1


@pytest.mark.parametrize('name', WRITERS)
def test_flops_of_a_token_are_those_that_xla_counts(name):
  config = WRITERS[name]
  found = BATCH_SIZE * flops.token_flops(config, PROMPT_LENGTH, NUM_SLOTS + 1)
  step = lowered_step(*prepared(l2s.build(config)))
  assert 0.96 < found / step.cost_analysis()['flops'] <= 1


@pytest.mark.parametrize('name', WRITERS)
def test_bytes_of_a_step_are_the_arguments_that_xla_reads(name):
  config = WRITERS[name]
  found = flops.step_bytes(
    config,
    batch_size=BATCH_SIZE,
    prompt_length=PROMPT_LENGTH,
    num_keys=NUM_SLOTS,
    weight_bytes=4,
    cache_bytes=4,
  )
  tables = [config.vocab_size]
  if config.positions == 'learned':
    tables.append(config.max_positions)
  # Of an argument that is looked up, a step reads a row for each token.
  for num_rows in tables:
    found += 4 * (num_rows - BATCH_SIZE) * config.emb_dim
  memory = (
    lowered_step(*prepared(l2s.build(config))).compile().memory_analysis()
  )
  # Beside floats there are tokens, and which slots are valid.
  assert found <= memory.argument_size_in_bytes <= found + 4 * 64


@pytest.mark.parametrize('name', MODULES)
def test_parameters_are_all_that_a_module_has(name):
  module = MODULES[name]
  params = helpers.random_params(module)
  assert flops.num_params(module) == sum(
    x.size for x in jax.tree.leaves(params)
  )


def test_smaller_numbers_are_fewer_bytes():
  def count(weight_bytes, cache_bytes):
    return flops.step_bytes(
      T5,
      batch_size=3,
      prompt_length=5,
      num_keys=2.5,
      weight_bytes=weight_bytes,
      cache_bytes=cache_bytes,
    )

  whole, half, int8 = count(4, 4), count(2, 2), count(1, 4)
  assert whole == 2 * half
  assert whole / 4 < int8 < half


def test_an_answer_costs_the_mean_of_its_tokens():
  module = MODULES['gpt2']
  options = {'batch_size': 1, 'prompt_length': 7}
  costs_of = [
    flops.count(
      module, **options, num_tokens=n, weight_bytes=4, cache_bytes=4
    ).flops_per_token
    for n in range(1, 6)
  ]
  tokens = [flops.token_flops(GPT2, 7, n) for n in range(1, 6)]
  for n, found in enumerate(costs_of, start=1):
    assert found == sum(tokens[:n]) / n


def test_costs_of_drafts_are_those_of_reading_alone():
  found = flops.count(
    MODULES['speculative'],
    batch_size=1,
    prompt_length=7,
    num_tokens=5,
    weight_bytes=4,
    cache_bytes=4,
  )
  assert found.flops_per_prompt > flops.prompt_flops(MODULES['llm_to_t5'], 7)
  assert found.flops_per_token is None
  assert found.bytes_per_step is None
