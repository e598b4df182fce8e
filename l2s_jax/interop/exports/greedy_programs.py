# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding as functions of flat dicts of arrays, for export.

Other formats have no pytrees: parameters and the KV cache are dicts of arrays
by name, such as `slm/decoder/layers_0/...`. Parameters are arguments of the
functions, not constants.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from l2s_jax.data import batching
from l2s_jax.inference import sampling, strategies
from l2s_jax.interop.exports import comparing
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import l2s
from l2s_jax.systems import system as system_lib

PyTree = Any
_VERIFY = 'verify.py'
Flat = dict[str, jax.Array]


@runtime_checkable  # for the type checker of the tests
class SystemWithParams(Protocol):
  """An opened bundle, as the formats with programs use it."""

  @property
  def system(self) -> system_lib.System:
    """The module and its vocabularies."""

  def params(self) -> PyTree:
    """Returns all parameters as a pytree of memory-mapped arrays."""


class GreedyPrograms:
  """The functions of one system for tracing.

  Attributes:
    system: the module and its vocabularies.
    params: all parameters by name, in the layout of generation. Parameters with
      the same layout in the bundle are memory-mapped.
    writer_names: names of the parameters that `decode_step` reads.
    continues: whether an answer continues its prompt. The last prompt token is
      then the first input of the decode loop and not part of the prompt.
  """

  def __init__(self, bundle: SystemWithParams, *, unstack_llm: bool = False):
    """Arranges the parameters for generation.

    Args:
      bundle: the opened bundle.
      unstack_llm: whether to unstack the LLM's layers, too.
    """
    system = bundle.system
    self._module = l2s.for_generation(
      _without_kernels(system.module), unstack_llm=unstack_llm
    )
    params = l2s.params_for_generation(self._module, bundle.params())
    self.params: dict[str, np.ndarray] = {
      name: np.asarray(x)
      for name, x in traverse_util.flatten_dict(params, sep='/').items()
    }
    self._writer, self._writer_name = l2s.writer(self._module)
    prefix = '' if self._writer_name is None else f'{self._writer_name}/'
    self.writer_names = [n for n in self.params if n.startswith(prefix)]
    self.continues = system.continues
    self.system = system
    vocabulary = system.answer_vocabulary
    self._strategy = strategies.OneByOne(
      self._writer,
      sampling.Decoding(log_probs=True),
      strategies.Ids(
        vocabulary.start_id, vocabulary.eos_ids, vocabulary.pad_id
      ),
    )

  @property
  def constraints(self) -> list[str]:
    """Constraints on lengths for `jax.export.symbolic_shape`.

    The symbolic dimensions are `prompt` and `answer`, in tokens.
    """
    found = ['prompt >= 1', 'answer >= 1']
    most, together = comparing.positions(self.system)
    if together is not None:
      found.append(f'prompt + answer <= {together}')
      most = min(together - 1, most or together)
    if most is not None:
      found.append(f'prompt <= {most}')
    return found

  def prefill(
    self,
    params: Flat,
    prompt_tokens: Int[Array, 'batch prompt'],
    segment_ids: Int[Array, 'batch prompt'],
    answer: Int[Array, ' answer'],
  ) -> Flat:
    """Encodes prompts; returns a cache with slots for the answers.

    Args:
      params: all parameters by name.
      prompt_tokens: token ids of the prompts, padded.
      segment_ids: 1 for tokens, 0 for padding.
      answer: its length is the maximum number of answer tokens; its values are
        not read.

    Returns:
      The cache's arrays by name; see `flatten`.
    """
    return flatten(
      self.read_prompts(params, prompt_tokens, segment_ids, answer.shape[0])
    )

  def read_prompts(
    self, params: Flat, tokens: Array, segment_ids: Array, num_slots: Any
  ) -> cache_lib.Cache:
    """Returns the cache after prompts, with `num_slots` slots for answers."""
    batch = {
      'encoder_input_tokens': tokens,
      'encoder_segment_ids': segment_ids,
    }
    cache: cache_lib.Cache = self._module.apply(
      {'params': traverse_util.unflatten_dict(params, sep='/')},
      batch,
      num_slots=num_slots,
      method='prefill',
    )
    return cache

  def decode_step(
    self, params: Flat, token: Int[Array, ' batch'], cache: Flat
  ) -> tuple[Float[Array, 'batch vocab'], Flat]:
    """Decodes one token per row; returns the next token's logits and the cache.

    Args:
      params: the parameters of `writer_names`, by name.
      token: the last token of each answer, or its first input.
      cache: the cache of `prefill` or of the previous step.
    """
    logits, after = self._writer.apply(
      {'params': self._writer_params(params)},
      token[:, None],
      unflatten(cache),
      method='extend',
    )
    return logits[:, 0], flatten(after)

  def _writer_params(self, params: Flat) -> PyTree:
    """Returns the parameters of the decoding module as a pytree."""
    tree = traverse_util.unflatten_dict(params, sep='/')
    return l2s.writer_params(tree, self._writer_name)

  def generate(
    self,
    params: Flat,
    prompt_tokens: Int[Array, 'batch prompt'],
    segment_ids: Int[Array, 'batch prompt'],
    first_tokens: Int[Array, ' batch'],
    answer: Int[Array, ' answer'],
  ) -> Flat:
    """Generates answers: prefill and the whole decode loop.

    Args:
      params: all parameters by name.
      prompt_tokens: see `prefill`.
      segment_ids: see `prefill`; a row without tokens gets no answer.
      first_tokens: the start token or, if answers continue prompts, the last
        token of each prompt, and -1 for a row without a prompt.
      answer: see `prefill`.

    Returns:
      `tokens` [batch, answer], padded after EOS, and `scores` [batch], the sum
      of the tokens' log-probabilities in nats.
    """
    num_steps = answer.shape[0]
    cache = self.read_prompts(params, prompt_tokens, segment_ids, num_steps)
    has_prompt = (segment_ids > 0).any(1)
    if self.continues:
      has_prompt = first_tokens >= 0
    prompts = strategies.Prompts(
      has_prompt=has_prompt,
      # Greedy decoding uses no random numbers.
      row_keys=jax.vmap(jax.random.key)(jnp.zeros_like(first_tokens)),
      max_decode_lens=jnp.full_like(first_tokens, num_steps),
      first_tokens=first_tokens,
    )
    step = functools.partial(self._strategy.step, self._writer_params(params))
    state = jax.lax.while_loop(
      lambda s: (s.step < num_steps) & ~jnp.all(s.done),
      step,
      self._strategy.begin(cache, prompts, num_steps),
    )
    scores = self._strategy.answers(state).scores
    assert scores is not None
    return {'tokens': state.tokens, 'scores': scores[:, 0]}

  @property
  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special ids before and after the ids of a prompt's text."""
    vocabulary = self.system.prompt_vocabulary
    if self.continues:
      return vocabulary.prefix_ids, ()
    return (), (vocabulary.eos_id,)

  def prompt_rows(
    self, prompts: Sequence[str], max_prompt_len: int
  ) -> list[list[int]]:
    """Returns the ids of prompts as in `infer`, at most `max_prompt_len`."""
    vocabulary = self.system.prompt_vocabulary
    before, after = self.around
    rows = [[*before, *ids, *after] for ids in vocabulary.encode_batch(prompts)]
    return [row[:max_prompt_len] for row in rows]

  def inputs(
    self, rows: Sequence[Sequence[int]], max_decode_len: int
  ) -> dict[str, np.ndarray]:
    """Returns the arguments of `generate` after `params`, by name.

    Args:
      rows: ids from `prompt_rows`.
      max_decode_len: maximum number of answer tokens.
    """
    batch = batching.prompt_batch(
      rows,
      length=max(map(len, rows)),
      pad_id=self.system.prompt_vocabulary.pad_id,
    )
    start = self.system.answer_vocabulary.start_id
    first_tokens = np.full((len(rows),), start, np.int32)
    if self.continues:
      batch = batching.continuing(batch, (), ())
      first_tokens = batch['first_tokens']
    return {
      'prompt_tokens': batch['encoder_input_tokens'].astype(np.int32),
      'segment_ids': batch['encoder_segment_ids'].astype(np.int32),
      'first_tokens': first_tokens,
      'answer': np.zeros((max_decode_len,), np.int32),
    }

  @property
  def signature(self) -> dict[str, Any]:
    """Lengths and special ids for `signature.json`."""
    before, after = self.around
    answers = self.system.answer_vocabulary
    return {
      'lengths': self.constraints,
      'prompt': {
        'pad_id': self.system.prompt_vocabulary.pad_id,
        'before': list(before),
        'after': list(after),
      },
      'answer': {
        # None: the last token of the prompt, which is removed from the prompt.
        'first_token': None if self.continues else answers.start_id,
        'eos_ids': list(answers.eos_ids),
        'pad_id': answers.pad_id,
      },
    }


def copy_along(folder: pathlib.Path, programs: Mapping[str, str]) -> None:
  """Copies programs of this package, and `verify.py`, into an export.

  Args:
    folder: the export.
    programs: names in the export, by names in this package.
  """
  for ours, theirs in {**programs, _VERIFY: _VERIFY}.items():
    shutil.copyfile(pathlib.Path(__file__).with_name(ours), folder / theirs)


def run_program(
  folder: pathlib.Path, rows: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
  """Runs the export's `run.py` without l2s_jax in a separate process.

  Args:
    folder: the export, with `run.py` and a manifest.
    rows: ids of prompts.
    num_tokens: maximum number of answer tokens.

  Returns:
    Token ids of the answers, [prompt][token].

  Raises:
    ValueError: if the program fails; with its standard error.
  """
  done = subprocess.run(
    [sys.executable, '-P', 'run.py', str(num_tokens)],
    input=json.dumps(rows),
    capture_output=True,
    text=True,
    cwd=folder,
    env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'},
  )
  if done.returncode:
    raise ValueError(
      f'{folder / "run.py"} failed. The output was deleted. The error is:\n'
      f'{done.stderr[-2000:]}'
    )
  found: list[list[int]] = json.loads(done.stdout)
  return found


def expected_tokens(
  bundle: SystemWithParams, inputs: Mapping[str, np.ndarray]
) -> list[list[int]]:
  """Returns the run's answers by `infer`'s decode loop, up to EOS, inclusive.

  Args:
    bundle: the bundle of the run.
    inputs: arguments from `GreedyPrograms.inputs`.
  """
  batch = {
    'encoder_input_tokens': inputs['prompt_tokens'],
    'encoder_segment_ids': inputs['segment_ids'],
  }
  if bundle.system.continues:
    batch['first_tokens'] = inputs['first_tokens']
  return comparing.tokens(
    bundle.system, bundle.params(), batch, len(inputs['answer'])
  )


def flatten(cache: cache_lib.Cache) -> Flat:
  """Returns the arrays of a cache by name: `valid`, `slot`, `key_00`, ..."""
  found = {'valid': cache.valid, 'slot': cache.slot}
  if cache.cross_valid is not None:
    found['cross_valid'] = cache.cross_valid
  for prefix, layers in (('', cache.kv), ('cross_', cache.cross_kv or ())):
    for i, kv in enumerate(layers):
      found[f'{prefix}key_{i:02}'] = kv.key
      found[f'{prefix}value_{i:02}'] = kv.value
  return found


def unflatten(arrays: Flat) -> cache_lib.Cache:
  """Inverts `flatten`."""

  def layers(prefix: str) -> tuple[cache_lib.KeyValues, ...]:
    numbers = sorted(
      name.removeprefix(f'{prefix}key_')
      for name in arrays
      if name.startswith(f'{prefix}key_')
    )
    return tuple(
      cache_lib.KeyValues(
        arrays[f'{prefix}key_{n}'], arrays[f'{prefix}value_{n}']
      )
      for n in numbers
    )

  return cache_lib.Cache(
    kv=layers(''),
    valid=arrays['valid'],
    slot=arrays['slot'],
    cross_kv=layers('cross_') or None,
    cross_valid=arrays.get('cross_valid'),
  )


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a function for tracing with symbolic shapes.

  jaxtyping's checks are off during the call: they reject a symbolic dimension
  as an `int`.
  """

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update('jaxtyping_disable', True)
    try:
      return function(*args)
    finally:
      jaxtyping.config.update('jaxtyping_disable', before)

  return call


def _without_kernels(module: Any) -> Any:
  """Returns the module with plain attention, for programs of all platforms."""
  names = (
    ('config',)
    if hasattr(module, 'config')
    else (
      'llm_config',
      'slm_config',
    )
  )
  return module.clone(
    **{
      name: dataclasses.replace(getattr(module, name), attention='plain')
      for name in names
    }
  )
