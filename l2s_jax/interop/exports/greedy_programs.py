# SPDX-License-Identifier: Apache-2.0
"""Generation as functions of flat arrays, for forms that hold programs.

Other formats have no trees: parameters and the cache are dicts of arrays by
name, `slm/decoder/layers_0/...`. Answers are greedy. Weights are arguments, not
constants of a program.
"""

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


@runtime_checkable  # which beartype, in tests, has to ask
class SystemWithParams(Protocol):
  """What a program's form reads of an opened bundle."""

  @property
  def system(self) -> system_lib.System:
    """The module and its vocabularies."""

  def params(self) -> PyTree:
    """Returns all parameters, mapped from the disk, as training has them."""


class GreedyPrograms:
  """The programs of one system, to be traced.

  Attributes:
    system: the module and its vocabularies.
    params: all parameters by name, in the layout of generation. What the
      layout does not change is a view of the bundle's files.
    writer_names: of those, the parameters that `decode_step` reads.
    continues: whether an answer goes on where its prompt ends. The last token
      of the prompt is then a first token, and not part of the prompt.
  """

  def __init__(self, bundle: SystemWithParams, *, unstack_llm: bool = False):
    """Lays the parameters out; the LLM's layers, which read once, if asked."""
    system = bundle.system
    self._module = l2s.for_generation(system.module, unstack_llm=unstack_llm)
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
    """What lengths have to be, for `jax.export.symbolic_shape`.

    Tokens of a prompt are called `prompt`, those of an answer `answer`.
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
    """Reads prompts; returns a cache with room for an answer.

    Args:
      params: all.
      prompt_tokens: of the prompts, padded.
      segment_ids: 1 for tokens, 0 for padding.
      answer: its length is the number of tokens that an answer may have; its
        values are not read.
    """
    return flatten(
      self.read_prompts(params, prompt_tokens, segment_ids, answer.shape[0])
    )

  def read_prompts(
    self, params: Flat, tokens: Array, segment_ids: Array, num_slots: Any
  ) -> cache_lib.Cache:
    """Returns the cache behind prompts, with so many slots for answers."""
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
    """Reads one token a row; returns the logits of the next, and the cache.

    Args:
      params: those of `writer_names`.
      token: the last token of each answer, or its first token.
      cache: from `prefill` or from the step before.
    """
    logits, after = self._writer.apply(
      {'params': self._writer_params(params)},
      token[:, None],
      unflatten(cache),
      method='extend',
    )
    return logits[:, 0], flatten(after)

  def _writer_params(self, params: Flat) -> PyTree:
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
    """Writes answers, from the first token to the last.

    Args:
      params: all.
      prompt_tokens: see `prefill`, as for `segment_ids` and `answer`.
      segment_ids: a row without tokens gets no answer.
      first_tokens: the start token; where answers continue prompts, the last
        token of each prompt, or -1 for a row without a prompt.
      answer: see `prefill`.

    Returns:
      `tokens` [batch, answer], padded behind the end, and `scores` [batch], the
      sums of the tokens' log-probabilities.
    """
    num_steps = answer.shape[0]
    cache = self.read_prompts(params, prompt_tokens, segment_ids, num_steps)
    has_prompt = (segment_ids > 0).any(1)
    if self.continues:
      has_prompt = first_tokens >= 0
    prompts = strategies.Prompts(
      has_prompt=has_prompt,
      # Greedy decoding draws nothing.
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
    """The ids that stand before and behind those of a prompt's text."""
    vocabulary = self.system.prompt_vocabulary
    if self.continues:
      return vocabulary.prefix_ids, ()
    return (), (vocabulary.eos_id,)

  def prompt_rows(
    self, prompts: Sequence[str], max_prompt_len: int
  ) -> list[list[int]]:
    """Returns the ids of prompts, as `infer` reads them."""
    vocabulary = self.system.prompt_vocabulary
    before, after = self.around
    rows = [[*before, *ids, *after] for ids in vocabulary.encode_batch(prompts)]
    return [row[:max_prompt_len] for row in rows]

  def inputs(
    self, rows: Sequence[Sequence[int]], max_decode_len: int
  ) -> dict[str, np.ndarray]:
    """Returns the arguments of `generate` behind the parameters."""
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
    """What programs cannot say themselves, as `signature.json` has it."""
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
        # None: the last token of the prompt, which is then not part of it.
        'first_token': None if self.continues else answers.start_id,
        'eos_ids': list(answers.eos_ids),
        'pad_id': answers.pad_id,
      },
    }


def copy_along(folder: pathlib.Path, programs: Mapping[str, str]) -> None:
  """Copies programs of this package, and the check of all files, to a folder.

  Args:
    folder: the export.
    programs: their names in the folder, by those in this package.
  """
  for ours, theirs in {**programs, _VERIFY: _VERIFY}.items():
    shutil.copyfile(pathlib.Path(__file__).with_name(ours), folder / theirs)


def run_program(
  folder: pathlib.Path, rows: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
  """Returns what `run.py` prints, in a fresh process without this package.

  Args:
    folder: the export, which has `run.py` and a manifest.
    rows: ids of prompts.
    num_tokens: tokens of an answer.

  Raises:
    ValueError: if it does not run, with its words.
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
      f'{folder / "run.py"} does not run; nothing is kept. Its words:\n'
      f'{done.stderr[-2000:]}'
    )
  found: list[list[int]] = json.loads(done.stdout)
  return found


def expected_tokens(
  bundle: SystemWithParams, inputs: Mapping[str, np.ndarray]
) -> list[list[int]]:
  """Returns the run's own answers, EOS included, by the code of `infer`.

  Args:
    bundle: has the run.
    inputs: from `GreedyPrograms.inputs`.
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
  """Returns the arrays of a cache by name."""
  found = {'valid': cache.valid, 'slot': cache.slot}
  if cache.cross_valid is not None:
    found['cross_valid'] = cache.cross_valid
  for prefix, layers in (('', cache.kv), ('cross_', cache.cross_kv or ())):
    for i, kv in enumerate(layers):
      found[f'{prefix}key_{i:02}'] = kv.key
      found[f'{prefix}value_{i:02}'] = kv.value
  return found


def unflatten(arrays: Flat) -> cache_lib.Cache:
  """Returns the cache that `flatten` has taken apart."""

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
  """Returns a function to be traced with symbolic shapes.

  Checkers of annotations take a symbolic length for no `int`.
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
