# SPDX-License-Identifier: Apache-2.0
"""Shared by all formats: interfaces of a bundle, and answers by l2s_jax.

Exports are compared with answers that l2s_jax computes in the same dtypes. A
difference therefore cannot come from rounding weights or activations.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax.data import batching
from l2s_jax.inference import generate, sampling
from l2s_jax.models import l2s
from l2s_jax.runtime import files, memory
from l2s_jax.systems import system as system_lib

PyTree = Any

# Maximum numbers of prompt and answer tokens in comparisons.
MAX_PROMPT_LEN, COMPARED_TOKENS = 256, 32


@runtime_checkable  # for the type checker of the tests
class Described(Protocol):
  """Interface of a model for `check`: `bundling.Parts` or a bundle."""

  @property
  def system(self) -> system_lib.System:
    """The module and its vocabularies."""

  @property
  def towers(self) -> Mapping[str, Any]:
    """The language models as sources: 'llm' and 'slm', or 'model'."""


@runtime_checkable
class Exportable(Described, Protocol):
  """Interface of an opened bundle for `write` and `compare`.

  Attributes:
    folder: folder of the bundle.
    content: content of its manifest.
  """

  folder: pathlib.Path
  content: dict[str, Any]

  def params(self) -> PyTree:
    """Returns all parameters as a pytree of memory-mapped arrays."""


def around(system: system_lib.System) -> tuple[list[int], list[int]]:
  """Returns the ids before and after the ids of a prompt's text.

  A single decoder-only model trained on pairs of prompt and answer needs the
  start token after the prompt.
  """
  vocabulary = system.prompt_vocabulary
  if system.continues:
    return list(vocabulary.prefix_ids), []
  after = [vocabulary.eos_id]
  if not isinstance(system.module, l2s.LlmToSlm) and (
    not system.module.config.is_encoder_decoder
  ):
    after.append(system.answer_vocabulary.start_id)
  return [], after


def prompt_ids(
  system: system_lib.System, prompts: Sequence[str]
) -> list[list[int]]:
  """Returns the ids of prompts with special ids, [prompt][token]."""
  before, after = around(system)
  return [
    [*before, *system.prompt_vocabulary.encode(prompt), *after]
    for prompt in prompts
  ]


def positions(system: system_lib.System) -> tuple[int | None, int | None]:
  """Returns the numbers of learned positions; None for no limit.

  Returns:
    The limit in tokens of a prompt, and of a prompt with its answer.
  """
  together, rows = None, []
  config = l2s.writer(system.module)[0].config
  if config.positions == 'learned':
    together = config.max_positions
    rows.append(together)
  if isinstance(system.module, l2s.LlmToSlm):
    llm = system.module.llm_config
    if llm.positions == 'learned':
      rows.append(llm.max_positions - len(system.module.llm_prefix_ids))
  return min(rows, default=None), together


def lengths(
  system: system_lib.System,
  max_prompt_len: int = MAX_PROMPT_LEN,
  max_decode_len: int = COMPARED_TOKENS,
) -> tuple[int, int]:
  """Returns numbers of prompt and answer tokens that fit the model's positions.

  Args:
    system: the system of the model.
    max_prompt_len: maximum number of prompt tokens.
    max_decode_len: maximum number of answer tokens.
  """
  most, together = positions(system)
  if most is not None:
    max_prompt_len = min(max_prompt_len, most)
  if together is not None:
    max_decode_len = min(max_decode_len, together // 2)
    max_prompt_len = min(max_prompt_len, together - max_decode_len)
  return max_prompt_len, max_decode_len


def answers(
  system: system_lib.System,
  params: PyTree,
  ids: Sequence[list[int]],
  num_tokens: int,
  num_beams: int = 1,
) -> list[list[int]]:
  """Returns the run's answers to prompts, computed in float32; see `tokens`.

  Args:
    system: the system of the run.
    params: all parameters, of any dtype.
    ids: ids from `prompt_ids`.
    num_tokens: maximum number of answer tokens.
    num_beams: number of beams; 1 is greedy.
  """
  batch = batching.prompt_batch(
    ids,
    length=max(map(len, ids)),
    pad_id=system.prompt_vocabulary.pad_id,
  )
  module = system.module
  if not isinstance(module, l2s.LlmToSlm) and (
    not module.config.is_encoder_decoder
  ):
    # The decode loop reads the last prompt token as its first input.
    batch = batching.continuing(batch, (), ())
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  return tokens(in_float32(system), params, batch, num_tokens, num_beams)


def tokens(
  system: system_lib.System,
  params: PyTree,
  batch: Mapping[str, np.ndarray],
  num_tokens: int,
  num_beams: int = 1,
) -> list[list[int]]:
  """Returns answers of `infer`'s decode loop, up to the first EOS, inclusive.

  Args:
    system: the system; it computes in the dtypes of its configs.
    params: all parameters, in the structure of training.
    batch: prompts, and `first_tokens` if answers do not begin with the start
      token.
    num_tokens: maximum number of answer tokens.
    num_beams: number of beams; 1 is greedy.

  Returns:
    Token ids, [prompt][token].
  """
  generator = generate.generator(
    system,
    num_tokens,
    decoding=sampling.Decoding(num_beams=num_beams),
    unstack_llm=False,
  )
  # Without copies each call would read the memory-mapped files again.
  params = jax.tree.map(jnp.asarray, generator.prepare(params))
  found = generator(params, jax.tree.map(jnp.asarray, dict(batch)))
  ends = system.answer_vocabulary.eos_ids
  return [until_end(row, ends) for row in np.asarray(found).tolist()]


def in_float32(system: system_lib.System) -> system_lib.System:
  """Returns a system with float32 activations."""
  module = system.module
  names = (
    ('llm_config', 'slm_config')
    if isinstance(module, l2s.LlmToSlm)
    else ('config',)
  )
  configs = {
    name: dataclasses.replace(getattr(module, name), dtype='float32')
    for name in names
  }
  return dataclasses.replace(system, module=module.clone(**configs))


def check_equal(
  system: system_lib.System,
  prompts: Sequence[str],
  expected: Sequence[Sequence[int]],
  found: Sequence[Sequence[int]],
  who: str,
) -> None:
  """Checks that tokens equal those of the run, up to the first EOS.

  Args:
    system: the system of the run.
    prompts: prompts, for the error.
    expected: tokens from `tokens` or `answers`.
    found: tokens of the export, with any tokens after EOS.
    who: the beginning of the error: the program and the folder.

  Raises:
    ValueError: with the first prompt whose tokens differ.
  """
  ends = system.answer_vocabulary.eos_ids
  for prompt, ours, row in zip(prompts, expected, found, strict=True):
    theirs = until_end(row, ends)
    if list(ours) != theirs:
      raise ValueError(
        f'{who} generates {theirs} for the prompt {prompt!r}, but the run '
        f'generates {list(ours)}. The output was deleted. Please report this.'
      )


def too_large(num_params: int) -> str | None:
  """Returns a message if the memory is too small for a comparison, else None.

  A comparison holds the model in float32 here and in another program.
  """
  needed = 4 * 4 * num_params
  free = memory.free_bytes()
  if free is None or needed <= free:
    return None
  return (
    f'answers are not compared, which would need up to {files.in_units(needed)}'
    f' of memory; {files.in_units(free)} are free'
  )


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
  """Returns the tokens up to the first EOS, inclusive."""
  end = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
  return list(tokens[: end + 1])
