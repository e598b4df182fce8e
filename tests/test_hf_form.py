# SPDX-License-Identifier: Apache-2.0
"""What the form `hf` writes is run by transformers, token for token."""

import dataclasses
import functools
import pathlib
from typing import Any

import helpers
import jax
import numpy as np
import pytest

from l2s_jax.interop.exports import hf_form
from l2s_jax.models import l2s
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import sentencepiece

PROMPTS = ['a', 'The cat sat.', 'on the mat', 'x y z, and so on']
PREFIXED = dataclasses.replace(
  helpers.T5GEMMA, emb_dim=24, num_heads=4, num_kv_heads=2
)


@dataclasses.dataclass
class Bundle:
  """What a form reads of an opened bundle."""

  system: system_lib.System
  arrays: dict[str, Any]
  folder: pathlib.Path = pathlib.Path('bundle')
  results: tuple[dict[str, Any], ...] = ()

  @property
  def towers(self):
    module = self.system.module
    if not isinstance(module, l2s.LlmToSlm):
      return {'model': helpers.Arrays(module.config, self.arrays)}
    return {
      'llm': helpers.Arrays(module.llm_config, self.arrays['llm']),
      'slm': helpers.Arrays(module.slm_config, self.arrays['slm']),
    }

  def params(self):
    return self.arrays


@functools.cache
def prompt_vocabulary(folder):
  """Returns a SentencePiece model of fewer ids than the LLM's table has."""
  return sentencepiece.train(
    ['the cat sat on the mat', 'a dog and so on', *PROMPTS],
    folder / 'spiece.model',
    vocab_size=40,
    hard_vocab_limit=False,
    character_coverage=1.0,
  )


def make(module, folder, **options):
  """Returns a bundle of random parameters, none of which is quiet."""
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  system = helpers.system(module)
  if isinstance(module, l2s.LlmToSlm) and not module.shared_vocabulary:
    system = dataclasses.replace(
      system, prompt_vocabulary=prompt_vocabulary(folder)
    )
  return Bundle(dataclasses.replace(system, **options), params)


def answer(request):
  """Asks transformers in this process, which has imported it already."""
  from l2s_jax.interop.exports import hf_answers

  return hf_answers.answer(request)


def write(bundle, folder):
  hf_form.check(bundle)
  hf_form.write(bundle, folder)
  return folder


LLM_LAYERS: dict[str, Any] = {'first': 0, 'middle': 2, 'mix': 'mix'}
MODULES = {
  name: module
  for name, module in helpers.MODULES.items()
  if isinstance(module, l2s.LlmToSlm)
}
MODULES |= {
  'llm_to_gemma3-add-foreign': helpers.llm_to_slm(
    'gemma3', 'add', 'foreign', PREFIXED, num_heads=4
  ),
  'llm_to_t5gemma': helpers.llm_to_slm(
    't5gemma', 'add', 'shared', PREFIXED, num_heads=4
  ),
  'llm_to_umt5': helpers.llm_to_slm('umt5', 'add', 'foreign', helpers.UMT5),
  'llm_to_opt': helpers.llm_to_slm('opt', 'add', 'shared', PREFIXED),
  'llama_to_llama': helpers.llm_to_slm(
    'llama', 'add', 'shared', dataclasses.replace(helpers.LLAMA, emb_dim=24)
  ),
  'scaled': helpers.llm_to_slm(
    't5_1_1',
    'add',
    'shared',
    dataclasses.replace(helpers.LLM, scale_attention=True),
    scale_attention=True,
    head_dim=8,
  ),
} | {
  f'layer-{name}-{slm}': helpers.llm_to_slm(slm, 'add', 'shared', llm).clone(
    llm_layer=layer
  )
  for name, layer in LLM_LAYERS.items()
  for slm, llm in (('t5_1_0', helpers.LLM), ('gpt2', PREFIXED))
}


@pytest.mark.parametrize('name', helpers.cases(MODULES))
def test_transformers_writes_the_tokens_of_a_pair(name, tmp_path):
  helpers.import_reference()
  bundle = make(MODULES[name], tmp_path)
  folder = write(bundle, tmp_path / 'hf')
  found = hf_form.compare(bundle, folder, PROMPTS, answer)
  assert 'greedy and 4 beams' in found
