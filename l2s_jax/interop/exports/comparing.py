# SPDX-License-Identifier: Apache-2.0
"""What all forms share: a bundle as they see it, and our answers to prompts.

A form is compared with what the run itself writes, in float32, so that neither
the dtype of the weights nor that of the activations explains a difference.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax.data import packing
from l2s_jax.inference import generate, sampling
from l2s_jax.models import l2s
from l2s_jax.systems import system as system_lib

PyTree = Any

# Tokens of a prompt, and of an answer, that are compared at most.
_MAX_PROMPT_LEN, _COMPARED_TOKENS = 256, 32


@runtime_checkable  # which beartype, in tests, has to ask
class Exportable(Protocol):
  """What a form reads of an opened bundle."""

  folder: pathlib.Path
  content: dict[str, Any]
  system: system_lib.System
  towers: Any

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


def lengths(system: system_lib.System, longest: int) -> tuple[int, int]:
  """Returns the most tokens of a prompt and of an answer to compare."""
  configs = [l2s.writer(system.module)[0].config]
  if isinstance(system.module, l2s.LlmToSlm):
    configs.append(system.module.llm_config)
  rows = [c.max_positions for c in configs if c.positions == 'learned']
  max_prompt_len = min(_MAX_PROMPT_LEN, longest, *(n // 2 for n in rows))
  room = min((n - max_prompt_len for n in rows), default=_COMPARED_TOKENS)
  return max_prompt_len, min(_COMPARED_TOKENS, room)


def answers(
  system: system_lib.System,
  params: PyTree,
  ids: Sequence[list[int]],
  num_tokens: int,
  num_beams: int,
) -> np.ndarray:
  """Returns our tokens, [prompt, token]."""
  system = dataclasses.replace(
    system, module=computed_in_float32(system.module)
  )
  generator = generate.generator(
    system, num_tokens, decoding=sampling.Decoding(num_beams=num_beams)
  )
  module = system.module
  starts = None
  if not isinstance(module, l2s.LlmToSlm) and (
    not module.config.is_encoder_decoder
  ):
    # The last token before the answer is read when it is written.
    starts = np.asarray([row[-1] for row in ids], np.int32)
    ids = [row[:-1] for row in ids]
  tokens, segment_ids = packing.fill(
    ids,
    range(len(ids)),
    length=max(map(len, ids)),
    pad_id=system.prompt_vocabulary.pad_id,
  )
  batch = {
    'encoder_input_tokens': jnp.asarray(tokens),
    'encoder_segment_ids': jnp.asarray(segment_ids),
  }
  if starts is not None:
    batch['first_tokens'] = jnp.asarray(starts)
  return np.asarray(generator(generator.prepare(params), batch))


def in_float32(params: PyTree) -> PyTree:
  """Returns arrays of numpy in float32."""
  return jax.tree.map(lambda x: np.asarray(x).astype(np.float32), params)


def computed_in_float32(module: Any) -> Any:
  """Returns a module whose activations are float32."""
  names = (
    ('llm_config', 'slm_config')
    if isinstance(module, l2s.LlmToSlm)
    else ('config',)
  )
  return module.clone(
    **{
      name: dataclasses.replace(getattr(module, name), dtype='float32')
      for name in names
    }
  )


def check_equal(
  system: system_lib.System,
  prompts: Sequence[str],
  ours: np.ndarray,
  theirs: Sequence[Sequence[int]],
  way: str,
  who: str,
  folder: pathlib.Path,
) -> None:
  """Refuses tokens that differ before an answer's end."""
  ends = system.answer_vocabulary.eos_ids
  for prompt, a, b in zip(prompts, ours.tolist(), theirs, strict=True):
    found, expected = until_end(b, ends), until_end(a, ends)
    if found != expected:
      raise ValueError(
        f'{who} writes other tokens from {folder} ({way}) to {prompt!r}:'
        f' {found}; the run writes {expected}. Nothing is kept; please report '
        'this with its config.json.'
      )


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
  """Returns the tokens up to the first that ends an answer, it included."""
  end = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
  return list(tokens[: end + 1])
