# SPDX-License-Identifier: Apache-2.0
"""What all forms share: a bundle as they see it, and our answers to prompts.

A form is compared with what the run itself writes, in float32, so that neither
the dtype of the weights nor that of the activations explains a difference.
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
from l2s_jax.runtime import memory
from l2s_jax.systems import system as system_lib

PyTree = Any

# Tokens of a prompt, and of an answer, that are compared at most.
MAX_PROMPT_LEN, COMPARED_TOKENS = 256, 32


@runtime_checkable  # which beartype, in tests, has to ask
class Described(Protocol):
  """What a form asks before anything is written: of a run or of a bundle."""

  @property
  def system(self) -> system_lib.System:
    """The module and its vocabularies."""

  @property
  def towers(self) -> Mapping[str, Any]:
    """The language models as sources: 'llm' and 'slm', or 'model'."""


@runtime_checkable
class Exportable(Described, Protocol):
  """What a form reads of an opened bundle."""

  folder: pathlib.Path
  content: dict[str, Any]

  def params(self) -> PyTree:
    """Returns all parameters, mapped from the disk, as training has them."""


def around(system: system_lib.System) -> tuple[list[int], list[int]]:
  """Returns the ids before and behind a prompt.

  A decoder-only model alone that was trained on prompts and answers is told by
  its start token where the answer begins.
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
  before, after = around(system)
  return [
    [*before, *system.prompt_vocabulary.encode(prompt), *after]
    for prompt in prompts
  ]


def positions(system: system_lib.System) -> tuple[int | None, int | None]:
  """Returns the tokens that there are learned positions for.

  Those of a prompt, and those of a prompt and its answer together; None: of
  any number.
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
  """Returns tokens of a prompt and of an answer that a model has room for.

  Args:
    system: of the model.
    max_prompt_len: tokens of a prompt at most.
    max_decode_len: tokens of an answer at most.
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
  """Returns what the run writes to prompts in float32; see `tokens`.

  Args:
    system: of the run.
    params: all, of any dtype.
    ids: from `prompt_ids`.
    num_tokens: of an answer at most.
    num_beams: 1 is greedy.
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
    # The last token before the answer is read when it is written.
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
  """Returns what `infer`'s code writes to a batch, up to an end, it included.

  Args:
    system: computes in the dtype of its configs.
    params: all, as training has them.
    batch: prompts; `first_tokens` where answers do not begin with the start
      token.
    num_tokens: of an answer at most.
    num_beams: 1 is greedy.
  """
  generator = generate.generator(
    system,
    num_tokens,
    decoding=sampling.Decoding(num_beams=num_beams),
    unstack_llm=False,
  )
  # Mapped arrays are views of files: each call would read them again.
  params = jax.tree.map(jnp.asarray, generator.prepare(params))
  found = generator(params, jax.tree.map(jnp.asarray, dict(batch)))
  ends = system.answer_vocabulary.eos_ids
  return [until_end(row, ends) for row in np.asarray(found).tolist()]


def in_float32(system: system_lib.System) -> system_lib.System:
  """Returns a system whose activations are float32."""
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
  """Refuses tokens that differ from the run's before an answer's end.

  Args:
    system: of the run.
    prompts: for the message.
    expected: from `tokens` or `answers`.
    found: the same prompts' tokens, with what is behind an end.
    who: wrote them, and from where.

  Raises:
    ValueError: with the first prompt whose tokens differ.
  """
  ends = system.answer_vocabulary.eos_ids
  for prompt, ours, row in zip(prompts, expected, found, strict=True):
    theirs = until_end(row, ends)
    if list(ours) != theirs:
      raise ValueError(
        f'{who} to {prompt!r}: {theirs}; the run writes {list(ours)}. Nothing '
        'is kept; please report this.'
      )


def too_large(num_params: int) -> str | None:
  """Returns why a model is too large to answer here; None: it is not.

  Comparing holds it in float32 here and in another program.
  """
  needed = 4 * 4 * num_params
  free = memory.free_bytes()
  if free is None or needed <= free:
    return None
  return (
    f'answers are not compared: that takes up to {needed / 1e9:,.1f} GB of '
    f'memory, and {free / 1e9:,.1f} GB are free'
  )


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
  """Returns the tokens up to the first that ends an answer, it included."""
  end = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
  return list(tokens[: end + 1])
