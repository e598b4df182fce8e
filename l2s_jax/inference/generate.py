# SPDX-License-Identifier: Apache-2.0
"""Generation: prefill once, then one step after another.

Prefill reads the prompts with whatever the system has (LLM, projector, SLM
encoder or prefix) and returns a cache; the loop sees the writing model and that
cache alone, never the LLM. The cache has as many slots as the answer has needed
so far, and grows: a budget of 512 tokens does not cost 512 tokens of attention
at the third.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from l2s_jax.inference import beam, sampling, speculative, strategies
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import l2s, language_model
from l2s_jax.runtime import compilation, distributed, extras
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import loading

PyTree = Any

# Slots that a cache begins with, and by which factor it grows. Each size is
# compiled when an answer first needs it.
FIRST_SLOTS = 64
GROWTH = 2


class Generator:
  """Compiled generation for one system, one strategy and one longest answer.

  Prefill compiles once for each prompt shape, the loop once for each cache
  shape that answers come to need; a second call with the same shapes compiles
  nothing.
  """

  def __init__(
    self,
    module: Any,
    *,
    max_decode_len: int,
    ids: strategies.Ids,
    decoding: sampling.Decoding | None = None,
    unstack_llm: bool = True,
  ):
    """Prepares generation; nothing compiles yet.

    Args:
      module: the system's: LLM-to-SLM, or a language model.
      max_decode_len: tokens a row at most, EOS included.
      ids: of the answer's vocabulary.
      decoding: how tokens are chosen; None is greedy.
      unstack_llm: see `l2s.for_generation`; int8 does so in any case.
    """
    self.max_decode_len = max_decode_len
    self.decoding = decoding or sampling.Decoding()
    check(self.decoding, max_decode_len)
    self.announce = compilation.Announcer(is_silent=not distributed.is_first())
    module = l2s.for_generation(
      module,
      unstack_llm=unstack_llm or self.decoding.llm_quantization != 'none',
      llm_quantization=self.decoding.llm_quantization,
      quantization=self.decoding.quantization,
    )
    self._module = module
    self._ids = ids
    writer, self._writer_name = l2s.writer(module)
    self._check_lengths = functools.partial(
      writer.check_lengths, answer_length=max_decode_len
    )
    self.strategy = _strategy(module, self.decoding, ids)
    self.first_slots = (
      min(max_decode_len, FIRST_SLOTS) + self.strategy.num_ahead - 1
    )
    self.prefill = jax.jit(
      lambda params, batch: module.apply(
        {'params': params},
        batch,
        num_slots=self.first_slots,
        method='prefill',
      )
    )
    self._begin = jax.jit(self._begin_rows)
    self.decode = jax.jit(self._decode, donate_argnames='state')
    self._grow = jax.jit(_grow, static_argnames='num_slots')

  def prepare(self, params: PyTree, *, consume: bool = False) -> PyTree:
    """Returns a system's parameters in the form generation reads.

    Done once for many calls. Only what changes is copied.

    Args:
      params: as they were trained.
      consume: whether to delete each array that has been copied, so that only
        one of them is in memory twice.
    """
    return l2s.params_for_generation(self._module, params, consume=consume)

  def writer_params(self, prepared: PyTree) -> PyTree:
    """Returns those of the model that writes, or of the two that do."""
    if isinstance(self._module, l2s.DraftAndVerify):
      return l2s.decoder_params(prepared)
    return l2s.writer_params(prepared, self._writer_name)

  def __call__(
    self,
    prepared: PyTree,
    batch: language_model.Batch,
    row_ids: Int[np.ndarray | Array, 'batch'] | None = None,
  ) -> Int[Array, 'batch steps']:
    """Returns the tokens of the best answer to each prompt; see `start`."""
    return self.start(prepared, batch, row_ids).finish().tokens[:, 0]

  def start(
    self,
    prepared: PyTree,
    batch: language_model.Batch,
    row_ids: Int[np.ndarray | Array, 'batch'] | None = None,
    max_decode_lens: Int[np.ndarray | Array, 'batch'] | None = None,
  ) -> 'Generation':
    """Starts to write the answers to a batch of prompts.

    Args:
      prepared: what `prepare` returned.
      batch: the encoder keys; with `first_tokens`, see `batching.continuing`,
        the answers go on where the prompts end.
      row_ids: each row's index in the input, from which its samples are
        drawn; by default its place in the batch.
      max_decode_lens: tokens that each row may write; by default
        `max_decode_len`.

    Raises:
      ValueError: if the model has no positions for prompt and answer.
    """
    batch = dict(batch)
    first_tokens = batch.pop('first_tokens', None)
    segment_ids = batch['encoder_segment_ids']
    num_rows, prompt_length = segment_ids.shape
    self._check_lengths(prompt_length)
    shape = f'{num_rows} prompts of {prompt_length} tokens'
    if row_ids is None:
      row_ids = np.arange(num_rows)
    if max_decode_lens is None:
      max_decode_lens = np.full((num_rows,), self.max_decode_len, np.int32)
    with self.announce(f'prefill for {shape}'):
      cache = self.prefill(prepared, batch)
      state = self._begin(
        cache, segment_ids, row_ids, max_decode_lens, first_tokens
      )
    return Generation(self, self.writer_params(prepared), state, shape)

  def _begin_rows(
    self,
    cache: Any,
    segment_ids: Int[Array, 'batch prompt'],
    row_ids: Int[Array, 'batch'],
    max_decode_lens: Int[Array, 'batch'],
    first_tokens: Int[Array, 'batch'] | None,
  ) -> Any:
    """Returns the state before the first token. To be called in jit.

    In one program: each operation outside of one costs as much as a token of a
    small model.
    """
    has_prompt = (segment_ids > 0).any(1)
    if first_tokens is None:
      first_tokens = strategies.full_of_rows(self._ids.start, has_prompt.shape)
    else:
      has_prompt = first_tokens >= 0
    prompts = strategies.Prompts(
      has_prompt=has_prompt,
      first_tokens=first_tokens,
      row_keys=jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(self.decoding.seed), row_ids
      ),
      max_decode_lens=max_decode_lens,
    )
    return self.strategy.begin(cache, prompts, self.max_decode_len)

  def _decode(self, params: PyTree, state: Any, limit: Int[Array, '']) -> Any:
    """Steps until all rows have ended or one has `limit` tokens."""
    return jax.lax.while_loop(
      lambda s: (s.step < limit) & ~jnp.all(s.done),
      functools.partial(self.strategy.step, params),
      state,
    )


class Generation:
  """Answers that are being written."""

  def __init__(
    self, generator: Generator, writer_params: PyTree, state: Any, shape: str
  ):
    self._generator = generator
    self._shape = shape
    self._params = writer_params
    self._num_slots = min(FIRST_SLOTS, generator.max_decode_len)
    self.state = state
    self.step = 0

  def advance(self, num_tokens: int | None = None) -> None:
    """Writes more: as many tokens, or all that the cache has room for.

    Returns at once; the device goes on.
    """
    most = self._generator.max_decode_len
    if self.step >= self._num_slots:
      more = min(self._num_slots * GROWTH, most) - self._num_slots
      self.state = self._generator._grow(self.state, num_slots=more)
      self._num_slots += more
    limit = self._num_slots
    if num_tokens is not None:
      limit = min(limit, self.step + num_tokens)
    program = f'decoding for {self._shape}, {self._num_slots} tokens an answer'
    with self._generator.announce(program):
      self.state = self._generator.decode(self._params, self.state, limit)
    self.step = limit

  def is_over(self) -> bool:
    """Waits for what has been started; returns whether there is more."""
    return self.step >= self._generator.max_decode_len or bool(
      self.state.done.all()
    )

  def stop(self, rows: Bool[np.ndarray, 'batch']) -> None:
    """Ends some rows where they are."""
    self.state = self.state.replace(done=self.state.done | rows)

  def answers(self) -> strategies.Answers:
    """Returns what has been written so far."""
    return self._generator.strategy.answers(self.state)

  def finish(self) -> strategies.Answers:
    """Writes to the end and returns all of it."""
    while not self.is_over():
      self.advance()
    return self.answers()


def check(decoding: sampling.Decoding, max_decode_len: int) -> None:
  """Refuses settings that no system can follow here.

  Raises:
    ValueError: if answers are to be longer than they may be, or int8 is asked
      for without its package.
  """
  if decoding.min_decode_len > max_decode_len:
    raise ValueError(
      f'Decoding.min_decode_len={decoding.min_decode_len} is more than the '
      f'{max_decode_len} tokens that an answer may have (MAX_DECODE_LEN).'
    )
  for name in ('quantization', 'llm_quantization'):
    kind = getattr(decoding, name)
    if kind != 'none':
      extras.require(f'Decoding.{name}={kind!r}', 'qwix')


def for_decoding(
  system: system_lib.System, decoding: sampling.Decoding
) -> system_lib.System:
  """Returns the system that answers are written with.

  It is the same unless LLM-to-SLM is to draft (`Decoding.draft_len`) what the
  LLM verifies: then the LLM's decoder belongs to it.

  Raises:
    ValueError: if there is none, it has another vocabulary, or the settings do
      not go with drafts.
  """
  if not decoding.draft_len:
    return system
  speculative.check(decoding)
  drafts = f'Decoding.draft_len={decoding.draft_len}'
  module = system.module
  if not isinstance(module, l2s.LlmToSlm):
    raise ValueError(
      f'{drafts}: LLM-to-SLM drafts what its LLM verifies, and this run is of '
      'a language model alone. Set it to 0, or CHECKPOINT_PATH to an '
      'LLM-to-SLM run.'
    )
  if module.train_llm or module.llm_layer is not None:
    raise ValueError(
      f"{drafts}: the LLM's decoder, which verifies drafts, reads its last "
      'states as they came, and this run has trained the LLM (TRAIN_LLM) or '
      'takes another layer (LLM_LAYER). Set it to 0.'
    )
  llm = module.llm_config
  if not (llm.is_encoder_decoder and llm.has_decoder):
    kind = 'an encoder alone' if llm.is_encoder_decoder else 'decoder-only'
    raise ValueError(
      f"{drafts}: drafts are verified by the decoder behind the LLM's encoder, "
      f'and the LLM of this run is {kind} (num_encoder_layers='
      f'{llm.num_encoder_layers}, num_decoder_layers='
      f'{llm.num_decoder_layers}). Set it to 0.'
    )
  llm_vocabulary, slm_vocabulary = (
    system.prompt_vocabulary,
    system.answer_vocabulary,
  )
  if not loading.share_ids(llm_vocabulary, slm_vocabulary):
    raise ValueError(
      f'{drafts}: the LLM can verify drafts in its own vocabulary alone, '
      f'{llm_vocabulary.path} ({llm_vocabulary.vocab_size} ids), and the SLM '
      f'writes in {slm_vocabulary.path} ({slm_vocabulary.vocab_size} ids). Set '
      'it to 0, or train an SLM that shares the vocabulary of the LLM.'
    )
  return dataclasses.replace(system, module=l2s.with_verifier(module))


def generator(
  system: system_lib.System,
  max_decode_len: int,
  *,
  decoding: sampling.Decoding | None = None,
  ends: bool = True,
  unstack_llm: bool = True,
) -> Generator:
  """Returns generation for a system.

  Args:
    system: the system.
    max_decode_len: tokens an answer at most.
    decoding: how tokens are chosen; None is greedy.
    ends: whether EOS ends an answer; if not, all have `max_decode_len` tokens.
    unstack_llm: see `l2s.params_for_generation`.
  """
  vocabulary = system.answer_vocabulary
  return Generator(
    system.module,
    max_decode_len=max_decode_len,
    ids=strategies.Ids(
      vocabulary.start_id,
      vocabulary.eos_ids if ends else -1,
      vocabulary.pad_id,
    ),
    decoding=decoding,
    unstack_llm=unstack_llm,
  )


def _strategy(
  module: Any, decoding: sampling.Decoding, ids: strategies.Ids
) -> strategies.Strategy:
  if isinstance(module, l2s.DraftAndVerify) != (decoding.draft_len > 0):
    raise ValueError(
      f'Decoding.draft_len={decoding.draft_len} with {type(module).__name__}: '
      'drafts are for a system that has a verifier, and it needs them; '
      'generate.for_decoding gives the one that fits.'
    )
  if isinstance(module, l2s.DraftAndVerify):
    return speculative.Speculative(module, decoding, ids)
  writer, _ = l2s.writer(module)
  if decoding.num_beams > 1:
    return beam.BeamSearch(writer, decoding, ids)
  return strategies.OneByOne(writer, decoding, ids)


def _grow(state: Any, *, num_slots: int) -> Any:
  return state.replace(
    cache=jax.tree.map(
      lambda cache: cache_lib.grow(cache, num_slots),
      state.cache,
      is_leaf=lambda x: isinstance(x, cache_lib.Cache),
    )
  )
