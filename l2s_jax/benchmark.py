# SPDX-License-Identifier: Apache-2.0
"""Times generation: prefill and decoding apart, compilation excluded."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from l2s_jax import data, systems

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Timing:
  """Medians over rounds, at a stated batch and lengths.

  Attributes:
    batch_size: rows generated at once.
    prompt_length: tokens of each prompt, padding included.
    num_tokens: tokens written to each row.
    prefill_ms: reading the prompt, with the LLM where there is one.
    ms_per_token: of the decoding loop.
    total_ms: prefill and all tokens.
  """

  batch_size: int
  prompt_length: int
  num_tokens: int
  prefill_ms: float
  ms_per_token: float

  @property
  def total_ms(self) -> float:
    return self.prefill_ms + self.num_tokens * self.ms_per_token


def time_generation(
  cases: Mapping[str, tuple[systems.System, PyTree]],
  prompts: Sequence[str],
  *,
  prompt_length: int,
  num_tokens: int,
  rounds: int = 7,
) -> dict[str, Timing]:
  """Returns the timing of each system, measured in turn, round by round.

  Taking turns lets a machine whose speed drifts slow all systems alike.
  Every answer is exactly `num_tokens` long: EOS is not looked at.

  Args:
    cases: system and parameters by name.
    prompts: read at once, each system with its own tokenizer.
    prompt_length: tokens they are padded or cut to.
    num_tokens: to write to each row.
    rounds: measured; one more goes first and compiles.
  """
  prefills: dict[str, list[float]] = {name: [] for name in cases}
  decodes: dict[str, list[float]] = {name: [] for name in cases}
  timed = {
    name: _steps(*case, prompts, prompt_length, num_tokens)
    for name, case in cases.items()
  }
  for round_index in range(rounds + 1):
    for name, (prefill, decode_from) in timed.items():
      cache, prefill_secs = _timed(prefill)
      _, decode_secs = _timed(functools.partial(decode_from, cache))
      if round_index:
        prefills[name].append(prefill_secs)
        decodes[name].append(decode_secs)
  return {
    name: Timing(
      batch_size=len(prompts),
      prompt_length=prompt_length,
      num_tokens=num_tokens,
      prefill_ms=1e3 * statistics.median(prefills[name]),
      ms_per_token=1e3 * statistics.median(decodes[name]) / num_tokens,
    )
    for name in cases
  }


def _steps(
  system: systems.System,
  params: PyTree,
  prompts: Sequence[str],
  prompt_length: int,
  num_tokens: int,
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
  """Returns prefill, and decoding from its result."""
  generator = systems.generator(system, num_tokens, ends=False)
  vocabulary = system.prompt_vocabulary
  batch = jax.device_put(
    data.prompt_batch(
      [[*vocabulary.encode(prompt), vocabulary.eos_id] for prompt in prompts],
      length=prompt_length,
      pad_id=vocabulary.pad_id,
    )
  )
  has_prompt = np.ones((len(prompts),), bool)
  keys = jax.random.split(jax.random.key(0), len(prompts))
  writer_params = generator.writer_params(params)
  return (
    lambda: generator.prefill(params, batch),
    lambda cache: generator.decode(writer_params, cache, has_prompt, keys),
  )


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
  start = time.perf_counter()
  result = jax.block_until_ready(function())
  return result, time.perf_counter() - start
