# SPDX-License-Identifier: Apache-2.0
"""What the form `onnx` writes is run by ONNX Runtime, token for token."""

import dataclasses
import importlib.util
import pathlib
import re
from typing import Any

import bundles
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.interop.exports import (
  export_command,
  greedy_programs,
  onnx_form,
)
from l2s_jax.models import l2s
from l2s_jax.weights import manifest
from l2s_jax.weights.formats import tensor_files

PACKAGES = ('jax2onnx', 'onnxruntime')
REASON = 'the form onnx needs packages of its own: see docs/export_onnx.md'
PROMPTS = ['a', 'The cat', 'on']


# One of each kind: of writer, injection and vocabulary; an LLM's mix of layers.
NAMES = (
  'llm_to_t5_1_0-add-shared',
  'llm_to_gpt2-add-foreign',
  'llm_to_gemma3-add-foreign',
  'gemma3',
  't5_1_1',
)
SYSTEMS: dict[str, tuple[Any, dict[str, Any]]] = {
  name: (helpers.MODULES[name], {}) for name in NAMES
}
SYSTEMS['continuing gpt2'] = (helpers.MODULES['gpt2'], {'continues': True})
SYSTEMS['mix'] = (
  helpers.llm_to_slm('t5_1_1', 'replace', 'foreign').clone(llm_layer=l2s.MIX),
  {},
)
SYSTEMS['prefix'] = (
  helpers.llm_to_slm(
    'llama', 'add', 'shared', dataclasses.replace(helpers.LLAMA, emb_dim=24)
  ).clone(llm_prefix_ids=(5, 9)),
  {},
)
QUICK = ('llm_to_t5_1_0-add-shared', 'llm_to_gpt2-add-foreign')


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
    for name in SYSTEMS
  ],
)
def written(request, tmp_path_factory):
  """Returns a bundle and the folder that was written from it."""
  for package in PACKAGES:
    pytest.importorskip(package, reason=REASON)
  module, options = SYSTEMS[request.param]
  bundle = bundles.of(module, **options)
  folder = tmp_path_factory.mktemp('onnx')
  onnx_form.check(bundle)
  onnx_form.write(bundle, folder)
  manifest.write(folder, 'onnx', {})
  return bundle, folder


def test_onnx_runtime_writes_the_tokens_of_the_run(written):
  bundle, folder = written
  found = onnx_form.compare(bundle, folder, PROMPTS)
  assert 'same tokens for 3 prompts' in found


def test_both_models_map_the_weights_of_one_file(written):
  import onnx

  _, folder = written
  tensors = tensor_files.open_folder(folder)
  used = set()
  for name in ('prefill', 'decode_step'):
    path = folder / f'{name}.onnx'
    assert path.stat().st_size < 2**20
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
      if tensor.external_data:
        entries = {e.key: e.value for e in tensor.external_data}
        assert entries['location'] == 'model.safetensors'
        used.add(tensor.name)
      else:  # Constants: no weight is among them.
        assert np.prod(tensor.dims) < 64
    whole = onnx.load(path)
    for tensor in whole.graph.initializer:
      if tensor.name in tensors:
        found = onnx.numpy_helper.to_array(tensor)
        expected = tensors[tensor.name].read()
        # A kernel is a matrix: the same bytes in another shape.
        np.testing.assert_array_equal(found, expected.reshape(found.shape))
  assert used == set(tensors)


def test_lengths_are_symbols_and_caches_go_from_step_to_step(written):
  import onnxruntime

  _, folder = written
  sessions = [
    onnxruntime.InferenceSession(folder / f'{name}.onnx')
    for name in ('prefill', 'decode_step')
  ]
  prefill, step = (
    {x.name: x.shape for x in (*s.get_inputs(), *s.get_outputs())}
    for s in sessions
  )
  assert prefill['prompt_tokens'] == ['batch', 'prompt']
  assert step['logits'][0] == 'batch'
  given = {x.name for x in sessions[1].get_inputs()} - {'token'}
  made = {x.name.replace('present', 'past') for x in sessions[0].get_outputs()}
  assert given <= made
  for name in given:
    if name.startswith('past.'):
      assert step[name] == step[name.replace('past', 'present')]


def test_other_tokens_are_refused(written):
  """The weights of the bundle change behind the folder's back."""
  bundle, folder = written
  other = dataclasses.replace(
    bundle, arrays=jax.tree.map(lambda x: -x, bundle.arrays)
  )
  with pytest.raises(ValueError, match='generates .* but the run generates'):
    onnx_form.compare(other, folder, PROMPTS)


def test_a_model_in_bfloat16_computes_in_float32(tmp_path):
  for package in PACKAGES:
    pytest.importorskip(package, reason=REASON)
  bundle = bundles.of(
    l2s.build(dataclasses.replace(helpers.SLMS['gpt2'], dtype='bfloat16'))
  )
  bundle.arrays = jax.tree.map(
    lambda x: np.asarray(x, jnp.bfloat16), bundle.arrays
  )
  onnx_form.write(bundle, tmp_path)
  manifest.write(tmp_path, 'onnx', {})
  assert 'same tokens' in onnx_form.compare(bundle, tmp_path, PROMPTS)


def test_packages_that_are_missing_are_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install --no-deps jax2onnx'):
    onnx_form.check(bundles.of(helpers.MODULES['gpt2']))


@pytest.mark.long
def test_the_verb_writes_a_folder_that_is_verified(tmp_path):
  for package in PACKAGES:
    pytest.importorskip(package, reason=REASON)
  kept = pathlib.Path(__file__).parent / 'kept_runs' / '1'
  path = tmp_path / 'new'
  export_command.export(
    str(kept / 'l2s'), str(path), to='onnx', llm_path=str(kept / 'llm')
  )
  assert [p.name for p in tmp_path.iterdir()] == ['new']
  assert manifest.read(path, 'onnx')['form'] == 'onnx'
  with (path / 'decode_step.onnx').open('r+b') as file:
    file.seek(100)
    file.write(b'?')
  with pytest.raises(ValueError, match='decode_step.onnx was changed after'):
    manifest.read(path, 'onnx')


@pytest.mark.parametrize('name', QUICK)
def test_int8_models_choose_nearly_all_tokens_of_the_run(
  name, tmp_path, monkeypatch
):
  for package in PACKAGES:
    pytest.importorskip(package, reason=REASON)
  module, options = SYSTEMS[name]
  bundle = bundles.of(module, **options)
  onnx_form.write(bundle, tmp_path)
  sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
  said = onnx_form.quantize(bundle, tmp_path, PROMPTS)
  (share,) = re.findall(r'choose ([0-9.]+)%', said)
  assert float(share) >= 80
  manifest.write(tmp_path, 'onnx', {})
  programs = onnx_form._programs(bundle)
  rows = programs.prompt_rows(PROMPTS, 16)
  found = greedy_programs.run_program(tmp_path, rows, 4)
  assert len(found) == len(PROMPTS)
  left = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
  assert 'model.safetensors' not in left
  assert left['decode_step.int8.onnx.data'] < sizes['model.safetensors']

  onnx_form.write(bundle, tmp_path)
  monkeypatch.setattr(onnx_form, '_LEAST_SHARE', 1.01)
  with pytest.raises(ValueError, match='choose .* expected at least 101%'):
    onnx_form.quantize(bundle, tmp_path, PROMPTS)
