# SPDX-License-Identifier: Apache-2.0
"""What the form `onnx` writes is run by ONNX Runtime, token for token."""

import dataclasses
import importlib.util
from typing import Any

import helpers
import jax
import numpy as np
import pytest

from l2s_jax.interop.exports import onnx_form
from l2s_jax.systems import system as system_lib

PROMPTS = ['a', 'The cat', 'on']
NAMES = ('llm_to_t5_1_1-add-foreign', 'llm_to_gpt2-replace-shared', 'gemma3')


@dataclasses.dataclass
class Bundle:
  """What a form reads of an opened bundle."""

  system: system_lib.System
  arrays: dict[str, Any]

  def params(self):
    return self.arrays


def make(name, **options):
  """Returns a bundle of random parameters, none of which is quiet."""
  module = helpers.MODULES[name]
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  system = dataclasses.replace(helpers.system(module), **options)
  return Bundle(system, params)


@pytest.mark.parametrize(
  'name',
  [
    *(pytest.param(n, marks=pytest.mark.long) for n in NAMES),
    'continuing gpt2',
  ],
)
def test_onnx_runtime_writes_the_tokens_of_the_run(name, tmp_path):
  pytest.importorskip('jax2onnx')
  pytest.importorskip('onnxruntime')
  bundle = make(name.split()[-1], continues=name.startswith('continuing'))
  onnx_form.check(bundle)
  onnx_form.write(bundle, tmp_path)
  found = onnx_form.compare(bundle, tmp_path, PROMPTS)
  assert 'same tokens to 3 prompts' in found
  other = Bundle(bundle.system, jax.tree.map(lambda x: -x, bundle.arrays))
  with pytest.raises(ValueError, match='writes other tokens from .*the run'):
    onnx_form.compare(other, tmp_path, PROMPTS)


def test_packages_that_are_missing_are_named(monkeypatch):
  bundle = make('gpt2')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='jax2onnx, onnx, onnxruntime, not inst'):
    onnx_form.check(bundle)
