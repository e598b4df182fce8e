# SPDX-License-Identifier: Apache-2.0
"""Answers prompts, with text on both sides.

Tokenizes, packs batches, runs generation and detokenizes. Stop texts
(`Decoding.stop`) are found in the decoded text, as they are not token ids.
For streaming, this module also finds the part of a text that is final.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from l2s_jax.data import batching
from l2s_jax.inference import generate, length_buckets, sampling, strategies
from l2s_jax.runtime import distributed, partitioning
from l2s_jax.systems import system as system_lib

PyTree = Any

# Tokens decoded between two searches for a stop text.
_STOP_PERIOD = 8
_NUM_DECIMALS = 5  # Of log-probabilities, within float32's precision.
_INCOMPLETE = '\ufffd'  # Decoded from the first bytes of a cut character.


class Prompt(NamedTuple):
  """A tokenized prompt.

  Attributes:
    ids: its tokens, EOS included unless it was truncated.
    was_cut: whether it was truncated.
    max_decode_len: maximum number of answer tokens, EOS included.
    row_id: index in the input, folded into the PRNG key of samples.
  """

  ids: list[int]
  was_cut: bool
  max_decode_len: int
  row_id: int


class Answer(NamedTuple):
  """An answer to a prompt.

  Attributes:
    text: the best answer.
    details: requested extras. `predictions`, the best first, and `scores`, with
      `Decoding.num_answers` > 1; `score`, `token_ids` and `token_log_probs` of
      the best, EOS included, with `Decoding.log_probs`; `ended`, with
      `says_ends`: for each answer, whether it reached EOS or a stop text within
      its token limit.
  """

  text: str
  details: dict[str, Any]


class Writing(NamedTuple):
  """A batch of prompts during generation."""

  prompts: Sequence[Prompt]
  generation: generate.Generation


class PromptAnswerer:
  """Answers prompts with a system and its parameters.

  Attributes:
    params: all parameters, in the form for generation.
    generator: the compiled generation.
    batch_size: full-length prompts per batch.
    num_tokens: number of tokens of all prompts started so far.
    num_slots: the same with padding.
  """

  def __init__(
    self,
    system: system_lib.System,
    params: PyTree,
    mesh: jax.sharding.Mesh,
    *,
    prompt_length: int,
    max_decode_len: int,
    batch_size: int,
    decoding: sampling.Decoding | None = None,
    says_ends: bool = False,
    consume: bool = False,
    are_prepared: bool = False,
  ):
    """Prepares inference; the first call compiles.

    Args:
      system: the system.
      params: all of its parameters.
      mesh: the device mesh.
      prompt_length: maximum number of prompt tokens; longer prompts are
        truncated.
      max_decode_len: maximum number of answer tokens.
      batch_size: full-length prompts per batch.
      decoding: decoding settings; None means greedy.
      says_ends: whether answers have `ended` in their details.
      consume: whether `params` may be deleted while they are converted.
      are_prepared: whether `params` are those of another answerer of the same
        system, with the same quantization.
    """
    self.generator = generate.generator(
      system, max_decode_len, decoding=decoding
    )
    self.batch_size = batch_size
    self.num_tokens = self.num_slots = 0
    prepare = self.generator.place if are_prepared else self.generator.prepare
    self.params = prepare(params, consume=consume)
    self._prompt_vocabulary = system.prompt_vocabulary
    self._vocabulary = system.answer_vocabulary
    # None unless the answers continue their prompts.
    self._prefix_ids = (
      system.prompt_vocabulary.prefix_ids if system.continues else None
    )
    self._mesh = mesh
    self._prompt_length = prompt_length
    self._says_ends = says_ends
    self._decoding = self.generator.decoding
    self._seed = self._decoding.seed
    self._stops = self._decoding.stop
    self._buckets = length_buckets.Buckets(
      prompt_length=prompt_length,
      answer_length=max_decode_len * self._decoding.num_beams,
      batch_size=batch_size,
      num_shards=mesh.shape['data'] * mesh.shape['fsdp'],
    )

  def with_seed(self, seed: int) -> 'PromptAnswerer':
    """Returns an answerer with another seed, and the same compiled programs."""
    other = copy.copy(self)
    other._seed = seed
    return other

  def __call__(self, texts: Sequence[str]) -> list[str]:
    """Returns the answer to each text."""
    prompts = [self.encode(text, row_id=row) for row, text in enumerate(texts)]
    answers: dict[int, Answer] = {}
    for batch in self.pack(prompts):
      found = self.finish(self.start([prompts[row] for row in batch]))
      answers.update(zip(batch, found, strict=True))
    return [answers[row].text for row in range(len(texts))]

  def encode(
    self, text: str, *, row_id: int, max_decode_len: int | None = None
  ) -> Prompt:
    """Tokenizes a prompt.

    Args:
      text: of the prompt.
      row_id: index in the input.
      max_decode_len: maximum number of answer tokens, at most the answerer's;
        None means the answerer's.
    """
    vocabulary = self._prompt_vocabulary
    ids = vocabulary.encode(text)
    if self._prefix_ids is None:
      ids = [*ids, vocabulary.eos_id]
    else:
      ids = [*self._prefix_ids, *ids]
    return Prompt(
      ids=ids[: self._prompt_length],
      was_cut=len(ids) > self._prompt_length,
      max_decode_len=max_decode_len or self.generator.max_decode_len,
      row_id=row_id,
    )

  def pack(self, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Returns batches for `start`, as indices into `prompts`."""
    return self._buckets.pack([(len(p.ids), p.max_decode_len) for p in prompts])

  def start(
    self, prompts: Sequence[Prompt], num_tokens: int | None = None
  ) -> Writing:
    """Starts generation for a batch, without waiting for the device.

    Args:
      prompts: one batch of `pack`.
      num_tokens: number of tokens to decode now; None decodes to the end, or to
        the first search for a stop text.
    """
    rows, length = self._buckets.shape([len(p.ids) for p in prompts])
    batch = batching.prompt_batch(
      [prompt.ids for prompt in prompts],
      length=length,
      pad_id=self._prompt_vocabulary.pad_id,
      batch_size=rows,
    )
    if self._prefix_ids is not None:
      batch = batching.continuing(batch, (), ())
    num_filling = rows - len(prompts)
    arrays = partitioning.put_batch(
      batch
      | {
        'row_ids': _column([p.row_id for p in prompts], num_filling),
        # Padded rows decode nothing.
        'max_decode_lens': _column(
          [p.max_decode_len for p in prompts], num_filling
        ),
      },
      self._mesh,
    )
    self.num_tokens += sum(len(prompt.ids) for prompt in prompts)
    self.num_slots += rows * length
    row_ids, max_decode_lens = (
      arrays.pop('row_ids'),
      arrays.pop('max_decode_lens'),
    )
    generation = self.generator.start(
      self.params, arrays, row_ids, max_decode_lens, self._seed
    )
    if num_tokens is None and self._looks_for_stops:
      num_tokens = _STOP_PERIOD
    generation.advance(num_tokens)
    return Writing(prompts, generation)

  def finish(self, writing: Writing) -> list[Answer]:
    """Waits for the answers to a batch, and returns them."""
    if self._looks_for_stops:
      for _ in self._settled(writing, _STOP_PERIOD):
        pass
    answers = distributed.fetch(writing.generation.finish())
    return [
      self._answer(prompt, answers, row)
      for row, prompt in enumerate(writing.prompts)
    ]

  def stream(self, prompt: Prompt, write: Callable[[str], Any]) -> Answer:
    """Streams an answer while its tokens are decoded, and returns it.

    Args:
      prompt: the prompt.
      write: receives pieces of text; they concatenate to the answer's text.
    """
    pieces = self.pieces(prompt)
    while True:
      try:
        write(next(pieces))
      except StopIteration as end:
        return end.value

  def pieces(self, prompt: Prompt) -> Generator[str, None, Answer]:
    """Yields pieces of an answer's text as its tokens come; returns the answer.

    The pieces concatenate to the answer's text.

    Args:
      prompt: the prompt.
    """
    writing = self.start([prompt], num_tokens=1)
    shown = ''
    for (text,) in self._settled(writing, 1):
      if len(text) > len(shown):
        yield text[len(shown) :]
        shown = text
    (answer,) = self.finish(writing)
    if len(answer.text) > len(shown):
      yield answer.text[len(shown) :]
    return answer

  @property
  def _looks_for_stops(self) -> bool:
    # The best beam is known only at the end; its text is cut then.
    return bool(self._stops) and self._decoding.num_beams == 1

  def _settled(self, writing: Writing, period: int) -> Iterator[list[str]]:
    """Yields the final part of each answer's text, every `period` tokens.

    It also ends rows with a stop text.
    """
    generation = writing.generation
    while not generation.is_over():
      answers = generation.answers()
      generation.advance(period)  # The device continues during detokenization.
      tokens, sizes = distributed.fetch(
        (answers.tokens[:, 0], answers.num_tokens)
      )
      texts = [
        self._vocabulary.decode(
          tokens[row, : min(sizes[row], prompt.max_decode_len)].tolist()
        )
        for row, prompt in enumerate(writing.prompts)
      ]
      yield [settled(text, self._stops) for text in texts]
      has_ended = np.zeros(len(tokens), bool)
      for row, text in enumerate(texts):
        has_ended[row] = find_stop(text, self._stops) is not None
      if has_ended.any():
        generation.stop(has_ended)

  def _answer(
    self, prompt: Prompt, answers: strategies.Answers, row: int
  ) -> Answer:
    """Detokenizes the answer of one row and collects its details."""
    candidates = answers.tokens[row, :, : prompt.max_decode_len].tolist()
    texts = [
      cut(self._vocabulary.decode(tokens), self._stops) for tokens in candidates
    ]
    details: dict[str, Any] = {}
    if len(texts) > 1:
      details['predictions'] = texts
      if answers.scores is not None:
        details['scores'] = _rounded(answers.scores[row])
    if self._says_ends:
      details['ended'] = [self._has_ended(tokens) for tokens in candidates]
    if answers.log_probs is not None and answers.scores is not None:
      size = self._num_written(candidates[0])
      log_probs = answers.log_probs[row, 0, :size]
      # A beam's score has a length penalty and includes the cut tokens.
      is_sum = self._decoding.num_beams == 1
      score = log_probs.sum() if is_sum else answers.scores[row, 0]
      details |= {
        'score': _rounded(score),
        'token_ids': candidates[0][:size],
        'token_log_probs': _rounded(log_probs),
      }
    return Answer(texts[0], details)

  def _has_ended(self, tokens: list[int]) -> bool:
    """Returns whether an answer reached EOS or a stop text."""
    if any(token in self._vocabulary.eos_ids for token in tokens):
      return True
    return find_stop(self._vocabulary.decode(tokens), self._stops) is not None

  def _num_written(self, tokens: list[int]) -> int:
    """Returns the number of tokens up to EOS or the end of a stop text."""
    eos_ids = self._vocabulary.eos_ids
    ends = (n for n, token in enumerate(tokens, 1) if token in eos_ids)
    most = next(ends, len(tokens))

    def has_stopped(size: int) -> bool:
      text = self._vocabulary.decode(tokens[:size])
      return find_stop(text, self._stops) is not None

    if not has_stopped(most):
      return most
    return next(size for size in range(1, most + 1) if has_stopped(size))


def find_stop(text: str, stops: Sequence[str]) -> int | None:
  """Returns the start of the stop text that is complete first, or None."""
  ends_and_starts = [
    (start + len(stop), start)
    for stop in stops
    if (start := text.find(stop)) >= 0
  ]
  return min(ends_and_starts)[1] if ends_and_starts else None


def cut(text: str, stops: Sequence[str]) -> str:
  """Returns the text before the stop text that is complete first."""
  return text[: find_stop(text, stops)]


def settled(text: str, stops: Sequence[str]) -> str:
  """Returns the part of a partial answer that further tokens cannot change.

  Incomplete characters and possible beginnings of a stop text are held back.
  """
  position = find_stop(text, stops)
  if position is not None:
    return text[:position]
  text = text.rstrip(_INCOMPLETE)
  starts = range(max(len(text) - max(map(len, stops), default=0), 0), len(text))
  return text[
    : next(
      (n for n in starts if any(s.startswith(text[n:]) for s in stops)), None
    )
  ]


def _column(values: Sequence[int], num_filling: int) -> np.ndarray:
  return np.array([*values, *[0] * num_filling], np.int32)


def _rounded(values: Any) -> Any:
  """Returns JSON-serialisable floats with `_NUM_DECIMALS` decimals."""
  return np.round(np.asarray(values, np.float64), _NUM_DECIMALS).tolist()
