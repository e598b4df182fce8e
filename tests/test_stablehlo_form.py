# SPDX-License-Identifier: Apache-2.0
"""What the form `stablehlo` writes is run by JAX alone, token for token."""

import json
from typing import Any

import bundles
import helpers
import jax
import jax.export
import pytest

from l2s_jax.interop.exports import greedy_programs, stablehlo_form
from l2s_jax.models import l2s
from l2s_jax.weights import manifest

PROMPTS = ['a', 'The cat', 'on']


# One of each kind: of writer, injection and vocabulary; an LLM's mix of layers.
NAMES = ('llm_to_t5_1_0-add-shared', 'llm_to_gpt2-add-foreign', 'gemma3')
SYSTEMS: dict[str, Any] = {name: (helpers.MODULES[name], {}) for name in NAMES}
SYSTEMS['continuing gpt2'] = (helpers.MODULES['gpt2'], {'continues': True})
SYSTEMS['mix'] = (
  helpers.llm_to_slm('t5_1_1', 'replace', 'foreign').clone(llm_layer=l2s.MIX),
  {},
)


QUICK = ('llm_to_gpt2-add-foreign', 'continuing gpt2')


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
    for name in SYSTEMS
  ],
)
def written(request, tmp_path_factory):
  """Returns a bundle and the folder that was written from it."""
  module, options = SYSTEMS[request.param]
  bundle = bundles.of(module, **options)
  folder = tmp_path_factory.mktemp('stablehlo')
  stablehlo_form.check(bundle)
  stablehlo_form.write(bundle, folder)
  manifest.write(folder, 'stablehlo', {})
  return bundle, folder


def test_jax_alone_writes_the_tokens_of_the_run(written):
  bundle, folder = written
  found = stablehlo_form.compare(bundle, folder, PROMPTS)
  assert 'same tokens for 3 prompts' in found


def test_programs_hold_no_weights_and_no_calls_of_one_platform(written):
  bundle, folder = written
  for path in folder.glob('*.bin'):
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == stablehlo_form.PLATFORMS
    text = program.mlir_module()
    calls = {line.split('@')[1].split('(')[0] for line in text.splitlines()
             if 'custom_call @' in line}  # fmt: skip
    assert calls <= {'shape_assertion', 'stablehlo.dynamic_reduce_window'}
    # Weights as constants would be written out in full.
    assert 'dense_resource' not in text
    assert max(map(len, text.splitlines())) < 100_000


def test_the_signature_says_what_goes_in_and_what_comes_out(written):
  bundle, folder = written
  signature = json.loads((folder / stablehlo_form.SIGNATURE).read_text())
  inputs = signature['programs']['generate']['inputs']
  assert inputs['prompt_tokens'] == {
    'dtype': 'int32',
    'shape': ['batch', 'prompt'],
  }
  programs = greedy_programs.GreedyPrograms(bundle)
  assert set(inputs['params']) == set(programs.params)
  step = signature['programs']['decode_step']
  assert set(step['inputs']['params']) == set(programs.writer_names)
  assert step['inputs']['cache'] == step['outputs'][1]


def test_other_tokens_are_refused(tmp_path):
  """The weights of the folder are changed behind its back."""
  bundle = bundles.of(helpers.MODULES['gpt2'])
  stablehlo_form.write(bundle, tmp_path)
  manifest.write(tmp_path, 'stablehlo', {})
  bundle.arrays = jax.tree.map(lambda x: -x, bundle.arrays)
  with pytest.raises(ValueError, match='generates .* but the run generates'):
    stablehlo_form.compare(bundle, tmp_path, PROMPTS)


def test_a_length_without_positions_is_refused(tmp_path):
  bundle = bundles.of(helpers.MODULES['gpt2'])
  stablehlo_form.write(bundle, tmp_path)
  programs = greedy_programs.GreedyPrograms(bundle)
  inputs = programs.inputs([[5] * 20], 5)
  path = tmp_path / 'generate.bin'
  program = jax.export.deserialize(bytearray(path.read_bytes()))
  with pytest.raises(ValueError, match='shapes'):
    program.call(programs.params, *inputs.values())
