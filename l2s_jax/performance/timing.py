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
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from l2s_jax.data import batching
from l2s_jax.evaluation.report import TableRow
from l2s_jax.inference import generate, speculative
from l2s_jax.systems import system as system_lib

PyTree = Any
# What has its prompts: from a number of tokens to tokens [batch, number].
Write = Callable[[int], np.ndarray]
# From prompts [batch, length] without padding, and the longest answer.
Start = Callable[[np.ndarray, int], Write]
Shape = tuple[int, int, int]  # rows, tokens of a prompt, of an answer


@dataclasses.dataclass(frozen=True)
class Contender:
  """Something that is timed.

  Attributes:
    system: 'LLM', 'SLM', 'LLM-to-SLM', or another of them that `contenders.py`
      or `train_benchmark.py` names.
    model: the name of its model, or of its pair.
    engine: 'l2s_jax' or a peer's.
    dtype: of what it computes with.
  """

  system: str
  model: str
  engine: str
  dtype: str

  def row(self, shape: Shape) -> TableRow:
    """Returns what tables say of it at one shape, before its times."""
    return {
      'system': self.system,
      'model': self.model,
      'engine': self.engine,
      'dtype': self.dtype,
      'batch_size': shape[0],
      'prompt_length': shape[1],
      'num_tokens': shape[2],
    }


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
    return speculative.acceptance(self._generation.state, draft_len)


def measure(
  contenders: Mapping[str, Write],
  *,
  num_tokens: int,
  rounds: int,
  pause_secs: float = 0.0,
  each_round: Callable[[], None] | None = None,
) -> dict[str, Times]:
  """Returns what each took, in turn, round by round.

  Args:
    contenders: by name.
    num_tokens: to write to each row, at least 2.
    rounds: that are measured; one more goes first and compiles.
    pause_secs: see `in_turns`.
    each_round: see `in_turns`.
  """
  times = {}
  for name, write in contenders.items():
    start = time.perf_counter()
    write(1)
    tokens = write(num_tokens)
    times[name] = Times(time.perf_counter() - start, [], [], tokens)
  found = in_turns(
    [
      (functools.partial(write, 1), functools.partial(write, num_tokens))
      for write in contenders.values()
    ],
    rounds=rounds,
    pause_secs=pause_secs,
    each_round=each_round,
  )
  for name, (one, whole) in zip(contenders, found, strict=True):
    times[name].one, times[name].all = one, whole
  return times


def in_turns(
  turns: Sequence[Sequence[Callable[[], Any]]],
  *,
  rounds: int,
  pause_secs: float = 0.0,
  each_round: Callable[[], None] | None = None,
  clock: Callable[[], float] = time.perf_counter,
) -> list[list[list[float]]]:
  """Returns the seconds that calls take, round by round.

  Taking turns lets a machine whose speed drifts slow all alike. The first call
  of a turn is made once more before it, and not timed: caches hold what another
  has left.

  Args:
    turns: the calls of each contender, which have compiled.
    rounds: that are measured.
    pause_secs: before each turn.
    each_round: called after each round; not timed.
    clock: tells seconds, such as `time.process_time` those of the CPU.

  Returns:
    By turn, then by call, a number a round.
  """
  secs: list[list[list[float]]] = [[[] for _ in turn] for turn in turns]
  for _ in tqdm.trange(rounds, desc='rounds', file=sys.stderr, leave=False):
    for calls, found in zip(turns, secs, strict=True):
      time.sleep(pause_secs)
      calls[0]()
      for call, times in zip(calls, found, strict=True):
        start = clock()
        call()
        times.append(clock() - start)
    if each_round is not None:
      each_round()
  return secs


class Size(NamedTuple):
  """How many examples a contender is called for.

  Attributes:
    few: whose time is that of starting, and of these.
    all: how many there are.
  """

  few: int
  all: int

  @property
  def between(self) -> int:
    """How many are timed."""
    return self.all - self.few


def seconds_between(
  calls: Sequence[Callable[[int], Any]],
  size: Size,
  rounds: int,
  clock: Callable[[], float],
) -> list[list[float]]:
  """Returns the seconds that each takes, a number a round, from few to all.

  Where few took longer than all, as on a busy machine happens, the seconds are
  those of all: nothing is made faster by it.

  Args:
    calls: of a number of examples.
    size: the two numbers.
    rounds: see `in_turns`.
    clock: see `in_turns`.
  """
  times = in_turns(
    [
      (functools.partial(call, size.few), functools.partial(call, size.all))
      for call in calls
    ],
    rounds=rounds,
    clock=clock,
  )
  return [
    [
      whole - start if start < whole else whole
      for start, whole in zip(*secs, strict=True)
    ]
    for secs in times
  ]


def rates(size: Size, secs: Sequence[float]) -> TableRow:
  """Returns examples per second, a number a round."""
  return {'rounds': {'examples_per_sec': [size.between / x for x in secs]}}


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
  cases: Mapping[str, tuple[system_lib.System, PyTree]],
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
    batch = batching.prompt_batch(
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
