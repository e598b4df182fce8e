# SPDX-License-Identifier: Apache-2.0
"""Tiny bundles, as the forms of `export` read them, in memory."""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import helpers
import jax
import numpy as np
import tokenizers

from l2s_jax.models import l2s
from l2s_jax.runtime import files
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, loading, sentencepiece

PROMPTS = ['a', 'The cat sat.', 'on the mat', 'x y z, and so on']


@dataclasses.dataclass
class Bundle:
  """What a form reads of an opened bundle."""

  system: system_lib.System
  arrays: dict[str, Any]
  folder: pathlib.Path = pathlib.Path('bundle')
  content: dict[str, Any] = dataclasses.field(default_factory=dict)

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


@functools.cache
def byte_pairs() -> base.Vocabulary:
  """Returns GPT-2's bytes and EOS, as `helpers.vocabulary`, and two merges."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  pieces = [*alphabet, 'th', 'the', '<|endoftext|>']
  ids = {piece: i for i, piece in enumerate(pieces)}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    files.write_json(folder / 'vocab.json', ids)
    (folder / 'merges.txt').write_text('#version: 0.2\nt h\nth e\n')
    return loading.load(str(folder))


def of(module, **options):
  """Returns a bundle of random parameters, none of which is quiet."""
  params = jax.tree.map(np.asarray, helpers.random_params(module))
  system = dataclasses.replace(helpers.system(module), **options)
  return Bundle(system, params)


def make(module, folder, **options):
  """Returns the same; foreign prompts have a vocabulary of their own."""
  if isinstance(module, l2s.LlmToSlm) and not module.shared_vocabulary:
    options = {'prompt_vocabulary': prompt_vocabulary(folder)} | options
  return of(module, **options)
