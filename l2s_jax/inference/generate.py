# SPDX-License-Identifier: Apache-2.0
"""Generation: prefill once, then decode in a compiled loop.

Prefill reads the prompts (LLM, projector, SLM encoder or prefix) and returns a
KV cache. The loop takes the decoding model and that cache alone, never the LLM.
The cache starts small and grows as answers need it: with a budget of 512
tokens, the third token does not attend to 512 slots.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from l2s_jax.inference import (
  beam,
  placement,
  quantization,
  sampling,
  speculative,
  strategies,
)
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import l2s, language_model
from l2s_jax.runtime import compilation, distributed, partitioning
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import loading

PyTree = Any

# Initial slots of the cache, and its growth factor. Each size compiles when an
# answer first needs it.
FIRST_SLOTS = 64
GROWTH = 2


class Generator:
  """Compiled generation for one system, one strategy and one `max_decode_len`.

  Prefill compiles once per prompt shape, the decode loop once per cache shape.
  A second call with the same shapes does not compile, nor does another seed.
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
    """Sets up generation; nothing compiles yet.

    Args:
      module: LLM-to-SLM or a language model.
      max_decode_len: maximum number of answer tokens, EOS included.
      ids: special token ids of the answer's vocabulary.
      decoding: decoding settings; None means greedy.
      unstack_llm: see `l2s.for_generation`; always on with an int8 LLM.
    """
    self.max_decode_len = max_decode_len
    self.decoding = decoding or sampling.Decoding()
    check(self.decoding, max_decode_len)
    self.announce = compilation.Announcer(is_silent=not distributed.is_first())
    llm_form = quantization.form(self.decoding.llm_quantization)
    module = l2s.for_generation(
      module,
      unstack_llm=unstack_llm or llm_form != 'none',
      llm_quantization=llm_form,
      quantization=quantization.form(self.decoding.quantization),
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
    self._is_whole = False
    self.prefill = jax.jit(self._prefill)
    self._begin = jax.jit(self._begin_rows)
    self.decode = jax.jit(self._decode, donate_argnames='state')
    self._grow = jax.jit(_grow, static_argnames='num_slots')
    self._answers = jax.jit(self.strategy.answers)

  def prepare(self, params: PyTree, *, consume: bool = False) -> PyTree:
    """Returns a system's parameters in the form for generation.

    Call it once. Unchanged arrays are not copied. The decoding model is placed
    where decoding is fastest; see `placement`.

    Args:
      params: as they were trained, layers stacked.
      consume: deletes each array after its copy is made, so that at most one is
        in memory twice.
    """
    prepared = l2s.params_for_generation(self._module, params, consume=consume)
    return self.place(prepared, consume=consume)

  def place(self, prepared: PyTree, *, consume: bool = False) -> PyTree:
    """Returns parameters from `prepare` with the decoding model placed.

    Args:
      prepared: arrays, or shapes with shardings.
      consume: as in `prepare`.
    """
    if self._writer_name is None:
      prepared = _placed(prepared, {}, consume)
      towers = [prepared]
    else:
      names = [self._writer_name]
      if isinstance(self._module, l2s.DraftAndVerify):
        names.append('llm')
      for name in names:
        beside = {other: x for other, x in prepared.items() if other != name}
        prepared = {**beside, name: _placed(prepared[name], beside, consume)}
      towers = [prepared[name] for name in names]
    self._is_whole = all(
      placement.is_whole(_without_encoder(tower)) for tower in towers
    )
    return prepared

  def writer_params(self, prepared: PyTree) -> PyTree:
    """Returns the parameters that the decode loop needs."""
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
    seed: int | None = None,
  ) -> 'Generation':
    """Prefills a batch of prompts and returns its generation.

    Args:
      prepared: parameters from `prepare`.
      batch: the encoder keys; with `first_tokens` (see `batching.continuing`)
        the answers continue their prompts.
      row_ids: index of each row in the input, folded into its PRNG key;
        defaults to the index in the batch.
      max_decode_lens: maximum number of answer tokens of each row; defaults to
        `max_decode_len`.
      seed: PRNG seed; defaults to `Decoding.seed`.

    Raises:
      ValueError: if the model lacks positions for prompt and answer.
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
        cache,
        segment_ids,
        row_ids,
        max_decode_lens,
        first_tokens,
        np.uint32(self.decoding.seed if seed is None else seed),
      )
    return Generation(self, self.writer_params(prepared), state, shape)

  @contextlib.contextmanager
  def _rules(self) -> Iterator[None]:
    """Enters the axis rules of the decoding model. Called within jit."""
    rules = placement.rules() if self._is_whole else None
    with partitioning.axis_rules(rules) if rules else contextlib.nullcontext():
      yield

  def _prefill(self, params: PyTree, batch: language_model.Batch) -> Any:
    with self._rules():
      return self._module.apply(
        {'params': params},
        batch,
        num_slots=self.first_slots,
        method='prefill',
      )

  def _begin_rows(
    self,
    cache: Any,
    segment_ids: Int[Array, 'batch prompt'],
    row_ids: Int[Array, 'batch'],
    max_decode_lens: Int[Array, 'batch'],
    first_tokens: Int[Array, 'batch'] | None,
    seed: UInt32[Array, ''],
  ) -> Any:
    """Returns the strategy's initial state. Called within jit.

    One program for all of it: an operation outside jit costs as much as a
    decode step of a small model.
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
        jax.random.key(seed), row_ids
      ),
      max_decode_lens=max_decode_lens,
    )
    return self.strategy.begin(cache, prompts, self.max_decode_len)

  def _decode(self, params: PyTree, state: Any, limit: Int[Array, '']) -> Any:
    """Runs decode steps until all rows are done or one has `limit` tokens."""
    with self._rules():
      return jax.lax.while_loop(
        lambda s: (s.step < limit) & ~jnp.all(s.done),
        functools.partial(self.strategy.step, params),
        state,
      )


class Generation:
  """A running generation of answers to one batch."""

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
    """Decodes `num_tokens` more tokens, at most as many as the cache can hold.

    Returns at once; the device runs asynchronously. None fills the cache.
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
    """Waits for the device; returns whether all rows are done."""
    if self.step >= self._generator.max_decode_len:
      return True
    done = self.state.done
    # NumPy, where this process has all rows: no program of its own.
    return bool((np.asarray(done) if done.is_fully_addressable else done).all())

  def stop(self, rows: Bool[np.ndarray, 'batch']) -> None:
    """Marks rows as done."""
    self.state = self.state.replace(done=self.state.done | rows)

  def answers(self) -> strategies.Answers:
    """Returns the answers decoded so far."""
    return self._generator._answers(self.state)

  def finish(self) -> strategies.Answers:
    """Decodes to the end and returns the answers."""
    while not self.is_over():
      self.advance()
    return self.answers()


def _placed(params: PyTree, beside: PyTree, consume: bool) -> PyTree:
  """Returns a model with the part that decodes placed, the rest as it is."""
  others = [params.get('encoder', {}), beside]
  return {
    **params,
    **placement.for_decoding(_without_encoder(params), others, consume=consume),
  }


def _without_encoder(params: PyTree) -> PyTree:
  return {name: x for name, x in params.items() if name != 'encoder'}


def check(decoding: sampling.Decoding, max_decode_len: int) -> None:
  """Validates the decoding settings that do not depend on the system.

  Raises:
    ValueError: if `min_decode_len` exceeds `max_decode_len`.
  """
  if decoding.min_decode_len > max_decode_len:
    raise ValueError(
      f'Decoding.min_decode_len={decoding.min_decode_len} is more than '
      f'MAX_DECODE_LEN={max_decode_len}.'
    )


def for_decoding(
  system: system_lib.System, decoding: sampling.Decoding
) -> system_lib.System:
  """Returns the system to decode with.

  With `Decoding.draft_len`, it is LLM-to-SLM with the LLM's decoder as
  verifier; otherwise, `system` itself.

  Raises:
    ValueError: if the LLM has no decoder, its vocabulary differs, or the
      settings do not allow drafts.
  """
  if not decoding.draft_len:
    return system
  speculative.check(decoding)
  drafts = f'Decoding.draft_len={decoding.draft_len}'
  module = system.module
  if not isinstance(module, l2s.LlmToSlm):
    raise ValueError(
      f'{drafts}: speculative decoding needs the LLM of an LLM-to-SLM run as '
      'verifier, but this run is a single language model. Set it to 0, or '
      'CHECKPOINT_PATH to an LLM-to-SLM run.'
    )
  if module.train_llm or module.llm_layer is not None:
    raise ValueError(
      f"{drafts}: the LLM's decoder verifies drafts and needs the last states "
      'of the pretrained LLM, but this run trained the LLM (TRAIN_LLM) or uses '
      'another layer (LLM_LAYER). Set it to 0.'
    )
  llm = module.llm_config
  if not (llm.is_encoder_decoder and llm.has_decoder):
    kind = 'encoder-only' if llm.is_encoder_decoder else 'decoder-only'
    raise ValueError(
      f"{drafts}: the LLM's decoder verifies drafts after its encoder, but the "
      f'LLM of this run is {kind} '
      f'(num_encoder_layers={llm.num_encoder_layers}, '
      f'num_decoder_layers={llm.num_decoder_layers}). Set it to 0.'
    )
  llm_vocabulary, slm_vocabulary = (
    system.prompt_vocabulary,
    system.answer_vocabulary,
  )
  if not loading.share_ids(llm_vocabulary, slm_vocabulary):
    raise ValueError(
      f'{drafts}: LLM and SLM must share a vocabulary, but the LLM has '
      f'{llm_vocabulary.path} ({llm_vocabulary.vocab_size} ids) and the SLM '
      f'has {slm_vocabulary.path} ({slm_vocabulary.vocab_size} ids). Set it to '
      '0, or train an SLM with the vocabulary of the LLM.'
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
  """Returns the compiled generation of a system.

  Args:
    system: the system.
    max_decode_len: maximum number of answer tokens, EOS included.
    decoding: decoding settings; None means greedy.
    ends: whether EOS ends an answer; if not, all have `max_decode_len` tokens.
    unstack_llm: see `l2s.for_generation`.
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
  """Returns the strategy for the decoding settings.

  Raises:
    ValueError: if a verifier and `Decoding.draft_len` do not go together.
  """
  if isinstance(module, l2s.DraftAndVerify) != (decoding.draft_len > 0):
    raise ValueError(
      f'Decoding.draft_len={decoding.draft_len} with {type(module).__name__}: '
      'drafts need a module with a verifier, and a module with a verifier '
      'needs drafts. Get the module from generate.for_decoding.'
    )
  if isinstance(module, l2s.DraftAndVerify):
    return speculative.Speculative(module, decoding, ids)
  writer, _ = l2s.writer(module)
  if decoding.num_beams > 1:
    return beam.BeamSearch(writer, decoding, ids)
  return strategies.OneByOne(writer, decoding, ids)


def _grow(state: Any, *, num_slots: int) -> Any:
  """Returns the state with `num_slots` more slots in every cache."""
  return state.replace(
    cache=jax.tree.map(
      lambda cache: cache_lib.grow(cache, num_slots),
      state.cache,
      is_leaf=lambda x: isinstance(x, cache_lib.Cache),
    )
  )
