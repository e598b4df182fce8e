# SPDX-License-Identifier: Apache-2.0
"""Laws of programs and of what is read from them: loops count as they run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from l2s_jax.inference import generate
from l2s_jax.models import config as config_lib
from l2s_jax.models import flops
from l2s_jax.performance.pods import hlo_costs, programs
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters
from l2s_jax.training import optim

LENGTHS = {'inputs': 32, 'targets': 16}
BATCH_SIZE = 16

# Wide enough for products of matrices to be nearly all of the work; no two
# stacks are equally deep.
SLM = config_lib.TransformerConfig(
  vocab_size=512,
  emb_dim=64,
  num_heads=4,
  head_dim=16,
  mlp_dim=256,
  num_encoder_layers=2,
  num_decoder_layers=3,
  mlp_activations=('gelu', 'linear'),
  logits_via_embedding=False,
)
LLM = dataclasses.replace(SLM, emb_dim=96, num_encoder_layers=5)
LLAMA = config_lib.TransformerConfig(
  vocab_size=600,
  emb_dim=64,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  mlp_dim=256,
  num_decoder_layers=3,
  mlp_activations=('silu', 'linear'),
  positions='rotary',
  scale_attention=True,
)
MODELS = {
  't5_to_t5': programs.Models(LLM, SLM),
  't5_to_llama': programs.Models(LLM, LLAMA),
  't5': programs.Models(None, SLM),
}


def laid_out(models, mesh_config, remat='none'):
  mesh = partitioning.make_mesh(mesh_config)
  return programs.Programs(models.system(remat), mesh, mesh_config, LENGTHS)


@pytest.mark.parametrize(
  'name,mesh,num_microbatches',
  [
    ('t5_to_t5', (2, 2, 2), 2),
    ('t5_to_llama', (1, 8, 1), 1),
  ],
)
def test_train_step(name, mesh, num_microbatches):
  """Has the FLOPs of its layers, each as often as it runs; gives state up."""
  found = laid_out(MODELS[name], partitioning.MeshConfig(*mesh))
  program = found.train_step(optim.adamw(), BATCH_SIZE, num_microbatches)
  compiled = program.lowered.compile()
  read = hlo_costs.count(compiled.as_text())
  assert not read.open_loops
  assert read.flops * 8 == pytest.approx(program.model_flops, rel=0.05)
  state = [program.arguments[name] for name in ('trainable', 'optimizer')]
  num_bytes = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state)
  )
  assert compiled.memory_analysis().alias_size_in_bytes >= num_bytes


def test_remat_computes_layers_twice():
  found = laid_out(MODELS['t5'], partitioning.MeshConfig(), 'full')
  program = found.train_step(optim.adamw(), BATCH_SIZE)
  read = hlo_costs.count(program.lowered.compile().as_text())
  # All of a forward pass but the head, and what no gradient asks for.
  prompt, answer = LENGTHS['inputs'], LENGTHS['targets']
  module = MODELS['t5'].system().module
  forward = flops.prompt_flops(module, prompt) + answer * (
    flops.token_flops(SLM, prompt, answer) - 2 * SLM.vocab_size * SLM.emb_dim
  )
  more = (read.flops * 8 - program.model_flops) / BATCH_SIZE
  assert 0.75 * forward < more < forward


@pytest.mark.parametrize('name', ['t5_to_t5', 't5_to_llama'])
def test_generation(name):
  found = laid_out(MODELS[name], partitioning.MeshConfig(data=4, tensor=2))
  prefill, loop = found.generation(8, 'float32')
  compiled = prefill.lowered.compile()
  read = hlo_costs.count(compiled.as_text())
  assert read.flops * 8 == pytest.approx(prefill.model_flops, rel=0.05)
  decode = loop.lower(prefill, compiled)
  # The loop ends when the data say: a token is a turn of it.
  text = decode.lowered.compile().as_text()
  (token,) = hlo_costs.count(text).open_loops
  assert token.flops * 8 == pytest.approx(decode.model_flops, rel=0.05)


@pytest.mark.parametrize('shape', [(2, 4, 1), (2, 2, 2)])
def test_lookups_gather_no_table(shape):
  """Devices send one another what was looked up, and keep their features."""
  found = laid_out(MODELS['t5_to_t5'], partitioning.MeshConfig(*shape))
  prefill, _ = found.generation(BATCH_SIZE, 'float32')
  collectives = [
    x
    for x in hlo_costs.count(prefill.lowered.compile().as_text()).collectives
    if 'token_embedder' in x.op_name
  ]
  assert collectives
  assert not [x for x in collectives if SLM.vocab_size in x.shape]


def test_nothing_is_allocated():
  """Arguments are shapes, even of a model that no machine here could hold."""
  huge = dataclasses.replace(LLM, emb_dim=2**14, mlp_dim=2**16)
  found = laid_out(programs.Models(huge, SLM), partitioning.MeshConfig(fsdp=8))
  program = found.train_step(optim.adamw(), BATCH_SIZE)
  leaves = jax.tree.leaves(program.arguments)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) > 2**34


def test_parameters_for_generation_lie_where_they_were():
  """The shards are those that preparing real parameters leaves."""
  tied = dataclasses.replace(SLM, logits_via_embedding=True)
  config = partitioning.MeshConfig(data=2, fsdp=2, tensor=2)
  found = laid_out(programs.Models(LLM, tied), config)
  prefill, _ = found.generation(8, 'float32')
  layout = parameters.layout(found.system, found.mesh, config)
  params = jax.tree.map(
    lambda s, sharding: jax.device_put(jnp.zeros(s.shape), sharding),
    layout.shapes,
    layout.shardings,
  )
  prepared = generate.generator(found.system, 16).prepare(params)
  expected = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), prepared)
  shards = jax.tree.map(
    lambda x: x.sharding.shard_shape(x.shape), prefill.arguments['parameters']
  )
  assert shards == expected
