# SPDX-License-Identifier: Apache-2.0
"""Timing of generation: contenders in turn, compilation excluded.

A contender generates one token for a batch of prompts, then n tokens. Both
times include prefill. For each round:

    ms per token = (time of n tokens - time of one) / (n - 1)
    prefill      = time of one token - ms per token

These figures are defined equally for all engines. Answers have n tokens; EOS
does not end them. If EOS ends answers, or drafts are verified, a call may
generate more or fewer tokens than requested; then ms per token is the total
time divided by the number of tokens per row.
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
# A contender with its prompts: from the number of tokens to generated tokens,
# [batch, number].
Write = Callable[[int], np.ndarray]
# From unpadded prompts, [batch, length], and the longest answer.
Start = Callable[[np.ndarray, int], Write]
Shape = tuple[int, int, int]  # batch size, prompt length, answer length


@dataclasses.dataclass(frozen=True)
class Contender:
  """A timed system.

  Attributes:
    system: 'LLM', 'SLM', 'LLM-to-SLM', or another name defined in
      `contenders.py` or `train_benchmark.py`.
    model: name of the model or pair.
    engine: 'l2s_jax' or a peer's name.
    dtype: dtype of the computation.
  """

  system: str
  model: str
  engine: str
  dtype: str

  def row(self, shape: Shape) -> TableRow:
    """Returns the table row for a shape, without times."""
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
  """Times of one contender, in seconds, by round.

  Attributes:
    first_call: time of the first calls, with compilation.
    one: time of prefill and one token, by round.
    all: time of prefill and all tokens, by round.
    tokens: the generated tokens, [batch, number].
  """

  first_call: float
  one: list[float]
  all: list[float]
  tokens: np.ndarray

  def lengths(self, eos: int | tuple[int, ...]) -> np.ndarray:
    """Returns the length of each answer with its EOS.

    Args:
      eos: id, or tuple of ids, that ends an answer; -1 if none does.

    Returns:
      [batch] integers.
    """
    is_eos = np.isin(self.tokens, eos)
    length = self.tokens.shape[1]
    return np.where(is_eos.any(1), is_eos.argmax(1) + 1, length)

  def rounds_to_eos(self, eos: int | tuple[int, ...]) -> dict[str, list[float]]:
    """Returns the figures of `rounds`, except prefill, for answers with EOS."""
    total = [1e3 * whole for whole in self.all]
    length = float(self.lengths(eos).mean())
    return {
      'ms_per_token': [whole / length for whole in total],
      'first_token_ms': [1e3 * one for one in self.one],
      'total_ms': total,
    }

  def rounds(self) -> dict[str, list[float]]:
    """Returns the figures of each round in ms, by name."""
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
    """Transfers the prompts; compiles nothing.

    Args:
      generator: a generator for the longest answer.
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
    # Cut on the host: on device this would take as long as a token of a small
    # model.
    return np.asarray(answers.tokens)[:, 0, :num_tokens]

  def memory_bytes(self) -> int | None:
    """Returns the peak device memory of the last call, in bytes.

    The sum of parameters, KV cache and temporaries as planned by XLA, for
    prefill or decoding, whichever needs more. None if the device does not
    report it.
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
    """Returns the fraction of accepted draft tokens; None without drafts."""
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
  """Times all contenders in turn, round by round.

  Args:
    contenders: contenders by name.
    num_tokens: tokens per row, at least 2.
    rounds: measured rounds; one more precedes them and compiles.
    pause_secs: see `in_turns`.
    each_round: see `in_turns`.

  Returns:
    Times by name.
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
  """Times calls round by round, taking turns.

  With turns, a change of the machine's speed affects all contenders alike. The
  first call of a turn is repeated once before it, untimed, to warm caches.

  Args:
    turns: the calls of each contender, already compiled.
    rounds: number of rounds.
    pause_secs: seconds to wait before each turn.
    each_round: called after each round, untimed.
    clock: returns seconds; `time.process_time` measures CPU time.

  Returns:
    Seconds by turn, call and round.
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
  """Number of examples of each call of a contender.

  Attributes:
    few: number of examples of the call that measures startup.
    all: number of examples of the full call.
  """

  few: int
  all: int

  @property
  def between(self) -> int:
    """Number of timed examples."""
    return self.all - self.few


def seconds_between(
  calls: Sequence[Callable[[int], Any]],
  size: Size,
  rounds: int,
  clock: Callable[[], float],
) -> list[list[float]]:
  """Returns the seconds for the examples between few and all, by round.

  If few examples took longer than all, as may happen on a busy machine, the
  time of all is used: an upper bound.

  Args:
    calls: contenders, as functions of a number of examples.
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
  """Returns examples per second by round."""
  return {'rounds': {'examples_per_sec': [size.between / x for x in secs]}}


@dataclasses.dataclass(frozen=True)
class Timing:
  """Median times of one system at one shape.

  Attributes:
    prefill_ms: time of prefill, including the LLM.
    ms_per_token: time of one step of the decoding loop.
    total_ms: time of prefill and all tokens.
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
  """Times systems on text prompts.

  Args:
    cases: system and parameters by name.
    prompts: one batch of prompts, encoded by each system's tokenizer.
    prompt_length: length, in tokens, to which prompts are padded or cut.
    num_tokens: tokens per row.
    rounds: see `measure`.

  Returns:
    Times by name.
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
