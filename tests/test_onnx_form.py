# SPDX-License-Identifier: Apache-2.0
"""What the form `onnx` writes is run by ONNX Runtime, token for token."""

import dataclasses
import json
from typing import Any

import helpers
import jax
import numpy as np
import pytest

from l2s_jax.interop.exports import onnx_form
from l2s_jax.models import l2s
from l2s_jax.systems import system as system_lib

PROMPTS = ['a', 'The cat', 'on']


@dataclasses.dataclass
class Bundle:
  """What a form reads of an opened bundle."""

  system: system_lib.System
  arrays: dict[str, Any]

  def params(self):
    return self.arrays


def make(module, **options):
  """Returns a bundle of random parameters, none of which is quiet."""
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  system = dataclasses.replace(helpers.system(module), **options)
  return Bundle(system, params)


# One of each kind: of writer, injection and vocabulary; an LLM's mix of layers.
NAMES = (
  'llm_to_t5_1_0-add-shared',
  'llm_to_gpt2-add-foreign',
  'llm_to_gemma3-add-foreign',
  'gemma3',
  't5_1_1',
)
SYSTEMS = {name: (helpers.MODULES[name], {}) for name in NAMES}
SYSTEMS['continuing gpt2'] = (helpers.MODULES['gpt2'], {'continues': True})
SYSTEMS['mix'] = (
  helpers.llm_to_slm('t5_1_1', 'replace', 'foreign').clone(llm_layer=l2s.MIX),
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
  for package in ('jax2onnx', 'onnxruntime'):
    pytest.importorskip(package, reason='the form onnx is an extra')
  module, options = SYSTEMS[request.param]
  bundle = make(module, **options)
  folder = tmp_path_factory.mktemp('onnx')
  onnx_form.check(bundle)
  onnx_form.write(bundle, folder)
  return bundle, folder


def test_onnx_runtime_writes_the_tokens_of_the_run(written):
  bundle, folder = written
  found = onnx_form.compare(bundle, folder, PROMPTS)
  assert 'same tokens to 3 prompts' in found


