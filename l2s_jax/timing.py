# SPDX-License-Identifier: Apache-2.0
"""Times generation: systems in turn, compilation apart.

A contender writes one token to a batch of prompts, then n tokens; both times
include reading the prompts. From them, in each round:

    ms per token = (time of n tokens - time of one) / (n - 1)
    prefill      = time of one token - ms per token

which can be said of any engine, and of all in the same way. Answers have n
tokens: EOS ends none. Where it does, and where drafts are verified, one call
may write more or fewer tokens than it is asked for: then ms per token is all of
the time over the tokens that were written to a row.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from l2s_jax import data, generate, speculative, systems

PyTree = Any
# What has its prompts: from a number of tokens to tokens [batch, number].
Run = Callable[[int], np.ndarray]


@dataclasses.dataclass
class Times:
  """What one contender took, in seconds, a number a round.

  Attributes:
    first_call: the first calls, which compile.
    one: reading the prompts and writing one token.
    all: reading the prompts and writing all tokens.
    tokens: what was written.
  """

  first_call: float
  one: list[float]
  all: list[float]
  tokens: np.ndarray

  def lengths(self, eos: int | tuple[int, ...]) -> np.ndarray:
    """Returns the tokens of each row, EOS included; -1: nothing ends one."""
    is_eos = np.isin(self.tokens, eos)
    length = self.tokens.shape[1]
    return np.where(is_eos.any(1), is_eos.argmax(1) + 1, length)

  def rounds_to_eos(self, eos: int | tuple[int, ...]) -> dict[str, list[float]]:
    """Returns what `rounds` does of answers that end, but for prefill."""
    total = [1e3 * whole for whole in self.all]
    length = float(self.lengths(eos).mean())
    return {
      'ms_per_token': [whole / length for whole in total],
      'first_token_ms': [1e3 * one for one in self.one],
      'total_ms': total,
    }

  def rounds(self) -> dict[str, list[float]]:
    """Returns what follows from them, in ms, a number a round."""
    num_tokens = self.tokens.shape[1]
    step = [
      1e3 * (whole - one) / (num_tokens - 1)
      for one, whole in zip(self.one, self.all, strict=True)
    ]
    first = [1e3 * one for one in self.one]
    return {
      'prefill_ms': [a - b for a, b in zip(first, step, strict=True)],
      'ms_per_token': step,
      'first_token_ms': first,
      'total_ms': [1e3 * whole for whole in self.all],
    }


class OurRun:
  """Generation by this package."""

  def __init__(
    self,
    generator: generate.Generator,
    prepared: PyTree,
    batch: Mapping[str, np.ndarray],
  ):
    """Compiles nothing yet.

    Args:
      generator: for the longest answer that will be asked for.
      prepared: its parameters.
      batch: the prompts.
    """
    self._generator = generator
    self._prepared = prepared
    self._batch = jax.device_put(batch)
    self._generation: generate.Generation | None = None

  def __call__(self, num_tokens: int) -> np.ndarray:
    generation = self._generator.start(self._prepared, self._batch)
    if num_tokens < self._generator.max_decode_len:
      generation.advance(num_tokens)
      answers = generation.answers()
    else:
      answers = generation.finish()
    self._generation = generation
    # Cut here: on the device it would take as long as a small model's token.
    return np.asarray(answers.tokens)[:, 0, :num_tokens]

  def memory_bytes(self) -> int | None:
    """Returns what the last call held at most: weights, cache and scratch.

    As XLA planned it, for the prefill or the loop, whichever needs more; None
    on a device for which it does not say.
    """
    assert self._generation is not None
    generator, state = self._generator, self._generation.state
    writer_params = generator.writer_params(self._prepared)
    prefill = generator.prefill.lower(self._prepared, self._batch)
    loop = generator.decode.lower(writer_params, state, self._generation.step)
    reading = prefill.compile().memory_analysis()
    writing = loop.compile().memory_analysis()
    if reading is None or writing is None:
      return None
    return _num_bytes(self._prepared) + max(
      reading.output_size_in_bytes + reading.temp_size_in_bytes,
      _num_bytes(state)
      + writing.output_size_in_bytes
      - writing.alias_size_in_bytes
      + writing.temp_size_in_bytes,
    )

  def acceptance(self) -> float | None:
    """Returns the part of all drafts that stayed; None: there are none."""
    assert self._generation is not None
    draft_len = self._generator.decoding.draft_len
    if not draft_len:
      return None
    return speculative.acceptance(self._generation.state, draft_len).rate


def measure(
  contenders: Mapping[str, Run],
  *,
  num_tokens: int,
  rounds: int,
  pause_secs: float = 0.0,
  each_round: Callable[[], None] | None = None,
) -> dict[str, Times]:
  """Returns what each took, in turn, round by round.

  Taking turns lets a machine whose speed drifts slow all alike.

  Args:
    contenders: by name.
    num_tokens: to write to each row, at least 2.
    rounds: that are measured; one more goes first and compiles.
    pause_secs: before each turn.
    each_round: called after each round; not timed.
  """
  times = {}
  for name, run in contenders.items():
    start = time.perf_counter()
    run(1)
    tokens = run(num_tokens)
    times[name] = Times(time.perf_counter() - start, [], [], tokens)
  for _ in tqdm.trange(rounds, desc='rounds', file=sys.stderr, leave=False):
    for name, run in contenders.items():
      time.sleep(pause_secs)
      run(1)  # Not timed: caches hold what another has left.
      for secs, number in (
        (times[name].one, 1),
        (times[name].all, num_tokens),
      ):
        start = time.perf_counter()
        run(number)
        secs.append(time.perf_counter() - start)
    if each_round is not None:
      each_round()
  return times


@dataclasses.dataclass(frozen=True)
class Timing:
  """Medians over rounds of one system at one shape.

  Attributes:
    prefill_ms: reading the prompts, with the LLM where there is one.
    ms_per_token: of the decoding loop.
    total_ms: prefill and all tokens.
  """

  prefill_ms: float
  ms_per_token: float
  total_ms: float


def time_generation(
  cases: Mapping[str, tuple[systems.System, PyTree]],
  prompts: Sequence[str],
  *,
  prompt_length: int,
  num_tokens: int,
  rounds: int = 7,
) -> dict[str, Timing]:
  """Returns the timing of each system with prompts in words.

  Args:
    cases: system and parameters by name.
    prompts: read at once, each system with its own tokenizer.
    prompt_length: tokens they are padded or cut to.
    num_tokens: to write to each row.
    rounds: see `measure`.
  """
  contenders = {}
  for name, (system, params) in cases.items():
    generator = generate.generator(system, num_tokens, ends=False)
    vocabulary = system.prompt_vocabulary
    batch = data.prompt_batch(
      [[*vocabulary.encode(prompt), vocabulary.eos_id] for prompt in prompts],
      length=prompt_length,
      pad_id=vocabulary.pad_id,
    )
    contenders[name] = OurRun(generator, generator.prepare(params), batch)
  measured = measure(contenders, num_tokens=num_tokens, rounds=rounds)
  return {
    name: Timing(
      **{
        field.name: statistics.median(times.rounds()[field.name])
        for field in dataclasses.fields(Timing)
      }
    )
    for name, times in measured.items()
  }


def _num_bytes(tree: PyTree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
