# SPDX-License-Identifier: Apache-2.0
"""Laws of memory, read off the compiled train step and decode loop."""

import dataclasses
import re
from typing import Any

import helpers
import jax
import pytest

from l2s_jax.models import l2s
from l2s_jax.performance.pods import programs
from l2s_jax.runtime import partitioning
from l2s_jax.systems import system as system_lib
from l2s_jax.training import optim

# What nothing else has: shapes of the LLM are known by them.
LLM = dataclasses.replace(
  helpers.LLM,
  vocab_size=264,
  emb_dim=72,
  num_heads=8,
  head_dim=9,
  mlp_dim=200,
)
ONE = partitioning.MeshConfig(data=1)
FSDP = partitioning.MeshConfig(fsdp=8)
LENGTHS = {'inputs': 16, 'targets': 16}
BATCH_SIZE = 16


@pytest.fixture(autouse=True, scope='module')
def optimized():
  """Lets the compiler do what it does for users."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


def llm_to_slm(
  num_llm_layers: int, dtype: str = 'float32'
) -> system_lib.System:
  """Returns a system whose LLM is frozen and has so many layers."""
  llm = dataclasses.replace(LLM, num_encoder_layers=num_llm_layers, dtype=dtype)
  module = helpers.llm_to_slm('t5_1_1', 'add', 'shared', llm, num_heads=8)
  return dataclasses.replace(helpers.system(module), frozen_dtype=dtype)


def programs_of(
  system: system_lib.System, mesh_config: partitioning.MeshConfig
) -> programs.Programs:
  devices = jax.devices()[:1] if mesh_config is ONE else jax.devices()
  mesh = partitioning.make_mesh(mesh_config, devices)
  return programs.Programs(system, mesh, mesh_config, LENGTHS)


def compile_step(
  system: system_lib.System, mesh_config: partitioning.MeshConfig = ONE
) -> tuple[programs.Program, Any]:
  program = programs_of(system, mesh_config).train_step(
    optim.adamw(), BATCH_SIZE
  )
  return program, program.lowered.compile()


def num_bytes(program: programs.Program, *names: str) -> int:
  """Returns the bytes that one device holds of some arguments."""
  trees = [program.arguments[name] for name in names]
  return partitioning.bytes_per_device(
    trees, jax.tree.map(lambda x: x.sharding, trees)
  )


@pytest.mark.parametrize('mesh_config', [ONE, FSDP], ids=['one', 'fsdp'])
def test_a_deeper_llm_takes_its_weights_and_nothing_else(mesh_config):
  """No gradients, no slots, and nothing saved for a backward pass."""
  (shallow, small), (deep, large) = (
    compile_step(llm_to_slm(num_layers), mesh_config) for num_layers in (2, 6)
  )
  small, large = small.memory_analysis(), large.memory_analysis()
  assert large.temp_size_in_bytes == small.temp_size_in_bytes
  assert large.output_size_in_bytes == small.output_size_in_bytes
  weights = num_bytes(deep, 'frozen') - num_bytes(shallow, 'frozen')
  assert weights > 0
  assert large.argument_size_in_bytes - small.argument_size_in_bytes == weights


def test_a_deeper_model_that_is_trained_takes_more():
  """So that the law above can fail."""
  temps = []
  for num_layers in (2, 6):
    config = dataclasses.replace(LLM, num_encoder_layers=num_layers)
    _, compiled = compile_step(helpers.system(l2s.build(config)))
    temps.append(compiled.memory_analysis().temp_size_in_bytes)
  assert temps[1] > 1.2 * temps[0]


def test_the_state_is_donated_and_the_llm_held_in_bfloat16():
  program, compiled = compile_step(llm_to_slm(3, 'bfloat16'), FSDP)
  llm = jax.tree.leaves(program.arguments['frozen'])
  assert {x.dtype.name for x in llm} == {'bfloat16'}
  memory = compiled.memory_analysis()
  step_and_key = 4 + 8
  state = num_bytes(program, 'trainable', 'optimizer') + step_and_key
  assert memory.alias_size_in_bytes == state
  assert memory.argument_size_in_bytes == state + num_bytes(
    program, 'frozen', 'batch'
  )
  # Beside the state, sums alone come out.
  _, sums = program.lowered.out_info
  assert {x.shape for x in jax.tree.leaves(sums)} == {()}


def all_gathers(text: str) -> list[tuple[int, str]]:
  """Returns how many numbers each makes, and the computation it is in."""
  found, name = [], ''
  for line in text.splitlines():
    if begin := re.match(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$', line):
      name = begin[1]
    elif gather := re.search(r'= \w+\[([\d,]*)\]\S* all-gather\(', line):
      sizes = [int(size) for size in gather[1].split(',')]
      found.append((int(jax.numpy.prod(jax.numpy.array(sizes))), name))
  return found


def test_one_layer_of_the_llm_is_gathered_at_a_time():
  _, compiled = compile_step(llm_to_slm(6), FSDP)
  text = compiled.as_text()
  bodies = set(re.findall(r'body=%?([\w.-]+)', text))
  kernel = LLM.emb_dim * LLM.mlp_dim
  gathers = all_gathers(text)
  assert max(size for size, _ in gathers) == kernel  # of one layer
  places = {name for size, name in gathers if size == kernel}
  assert places and places <= bodies


def test_an_slm_that_is_sharded_is_not_gathered_for_every_token():
  """It is placed whole before decoding, where it fits."""

  def decode_loop(placed):
    laid_out = programs_of(llm_to_slm(2), FSDP)
    prefill, loop = laid_out.generation(BATCH_SIZE, 'float32')
    if not placed:
      shards = laid_out._layout.shardings
      sharded = programs._place_prepared(loop.prepared, shards)
      loop = dataclasses.replace(loop, prepared=sharded)
    program = loop.lower(prefill, prefill.lowered.compile())
    return program.lowered.compile().as_text()

  assert not all_gathers(decode_loop(placed=True))
  assert all_gathers(decode_loop(placed=False))


def compile_with(remat: str, num_layers: int, *, scan_layers: bool) -> Any:
  config = dataclasses.replace(
    helpers.GPT2,
    num_decoder_layers=num_layers,
    max_positions=32,
    dropout_rate=0.1,
    remat=remat,
    scan_layers=scan_layers,
  )
  return compile_step(helpers.system(l2s.build(config)))[1]


def test_remat_takes_less_memory_the_more_it_computes_again():
  none, minimal, full = (
    compile_with(remat, 4, scan_layers=True)
    .memory_analysis()
    .temp_size_in_bytes
    for remat in ('none', 'minimal', 'full')
  )
  assert none > 1.5 * minimal > 1.5 * full


def test_remat_computes_again_where_layers_are_unrolled_too():
  """There the compiler could take the second time for the first."""
  none, minimal, full = (
    compile_with(remat, 2, scan_layers=False).cost_analysis()['flops']
    for remat in ('none', 'minimal', 'full')
  )
  assert none < minimal < full
