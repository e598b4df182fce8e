# SPDX-License-Identifier: Apache-2.0
"""`benchmark --train`: speed of training steps, compared with peers.

A single model is timed with its own fine-tuning step, and compared with peers.
For an LLM and an SLM there are four contenders: the step of LLM-to-SLM, the
same with cached LLM states, the step of the SLM, and the LLM's encoding of the
prompts. The first should cost little more than the last two together, the
second little more than the third. Rows have no padding, so that every token
counts.
"""

import dataclasses
import functools
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from l2s_jax.data import packing
from l2s_jax.evaluation import report
from l2s_jax.evaluation.report import TableRow
from l2s_jax.models import flops as flops_lib
from l2s_jax.models import l2s, language_model, stored_states
from l2s_jax.performance import contenders, speed_report, timing, train_peers
from l2s_jax.runtime import chips, files, partitioning
from l2s_jax.systems import parameters
from l2s_jax.training import optim, train_step
from l2s_jax.training import state as state_lib

PyTree = Any

READ, BOTH = 'LLM reads', 'LLM reads + SLM'
FROM_STATES = 'LLM-to-SLM, cached'
_JSON, _MARKDOWN = 'train.json', 'train.md'
_COLUMNS = {
  'system': 'system',
  'model': 'model',
  'engine': 'engine',
  'dtype': 'dtype',
  'ms_per_step': 'ms/step',
  'spread': 'quartiles',
  'tokens_per_sec': 'tokens/s',
  'gflops_per_sec': 'GFLOP/s',
  'mfu_percent': 'MFU %',
  'params_millions': 'M trained',
  'memory_mb': 'memory MB',
  'first_call_secs': 'first call s',
}
_WORDS = """\
Times are medians over {rounds} rounds, with quartiles. The contenders take
turns. A step is the forward pass, the backward pass and AdamW, with the
config's dropout, on a batch of full rows that is already on the device. Tokens
are those of prompts and answers. GFLOP/s counts the FLOPs of the formula
(`flops.train_flops`), not additional ones of an engine. MFU is the fraction of
the chip's peak, if it is known. `LLM reads + SLM` is the sum of two rows, round
by round. `LLM-to-SLM, cached` has the LLM's states in its batch, in bfloat16,
and no LLM. Memory is arguments and temporaries, as planned by XLA.
"""


@dataclasses.dataclass(frozen=True)
class Trainer(timing.Contender):
  """A timed training step.

  Attributes:
    system: as in `timing.Contender`; also 'LLM reads'.
    dtype: dtype of activations.
    flops: FLOPs of a step, without padding or recomputation.
    num_trained: number of trained parameters.
    step: runs a step, blocks until it is done, and returns its loss, if any.
    memory_bytes: returns the memory of the compiled step; None if unknown.
  """

  flops: flops_lib.Number
  num_trained: int
  step: Callable[[], float | None]
  memory_bytes: Callable[[], int | None] = lambda: None


def run(
  folder: pathlib.Path,
  models: Mapping[str, contenders.TimedModel],
  pair: contenders.Pair | None,
  shapes: Sequence[timing.Shape],
  *,
  rounds: int,
  seed: int,
  has_peers: bool,
) -> None:
  """Times training steps; writes train.json and train.md.

  Args:
    folder: output folder.
    models: models by role.
    pair: the pair, if there are LLM and SLM.
    shapes: shapes of batches.
    rounds: measured rounds; one more precedes them and compiles.
    seed: seed of weights and tokens.
    has_peers: whether other engines take part; they train single models.
  """
  rows: list[TableRow] = []
  for shape in shapes:
    entered = list(_ours(models, pair, shape, seed))
    if has_peers and pair is None:
      entered += _of_peers(models, shape, seed, folder / '.peers')
    print(
      f'batch {shape[0]}, {shape[1]} tokens in, {shape[2]} out: '
      f'{len(entered)} contenders, {rounds} rounds',
      flush=True,
    )
    rows += _with_sum(_measure(entered, shape, rounds))
  _write(folder, rows, rounds)


def _ours(
  models: Mapping[str, contenders.TimedModel],
  pair: contenders.Pair | None,
  shape: timing.Shape,
  seed: int,
) -> Iterator[Trainer]:
  """Yields the steps of this package."""
  if pair is None:
    for role, model in models.items():
      module = l2s.build(model.config)
      params = contenders.load_params(model)  # the same weights as the peers'
      yield _our_step(role, model.name, module, shape, seed, params)
    return
  yield _our_step(contenders.LLM_TO_SLM, pair.name, pair.module, shape, seed)
  yield _our_step(
    FROM_STATES, pair.name, pair.module, shape, seed, has_states=True
  )
  slm = l2s.build(pair.module.slm_config)
  yield _our_step(contenders.SLM, pair.slm.name, slm, shape, seed)
  yield _our_reading(models[contenders.LLM].name, pair.module, shape, seed)


def _our_step(
  system: str,
  model: str,
  module: flops_lib.Module,
  shape: timing.Shape,
  seed: int,
  params: PyTree | None = None,
  *,
  has_states: bool = False,
) -> Trainer:
  """Returns the training step of a system, as in `train`.

  Args:
    system: role of the system.
    model: name of the model.
    module: the module.
    shape: shape of batches.
    seed: seed of weights and tokens.
    params: initial parameters; None for random ones.
    has_states: whether the batch holds the LLM's states, as from a cache.
  """
  frozen_names = ('llm',) if isinstance(module, l2s.LlmToSlm) else ()
  batch = jax.device_put(_batch(module, shape, seed))
  if has_states:
    assert isinstance(module, l2s.LlmToSlm)
    size = (*shape[:2], module.llm_config.emb_dim)
    states = jax.random.normal(jax.random.key(seed), size)
    batch |= stored_states.store(states, 'bfloat16')
  init = functools.partial(module.init, deterministic=True)
  _, axes = partitioning.abstract_params(init, batch)
  if params is None:
    make = jax.jit(lambda key: partitioning.unbox(init(key, batch))['params'])
    params = make(jax.random.key(seed))
  frozen, trainable = parameters.split(params, frozen_names)
  optimizer = optim.adamw(train_peers.LEARNING_RATE).make(
    parameters.split(axes, frozen_names)[1]
  )
  state = state_lib.create(trainable, optimizer, seed)
  compiled = (
    jax.jit(
      functools.partial(
        train_step.train_step, module=module, optimizer=optimizer
      ),
      donate_argnums=0,
    )
    .lower(state, frozen, batch)
    .compile()
  )

  def step() -> float:
    nonlocal state
    state, sums = compiled(state, frozen, batch)
    return float(sums['loss'] / sums['loss_weight'])

  return Trainer(
    system,
    model,
    contenders.OURS,
    _config(module).dtype,
    shape[0]
    * flops_lib.train_flops(
      module, shape[1], shape[2], llm_reads=not has_states
    ),
    parameters.num_params(trainable),
    step,
    functools.partial(_memory_bytes, compiled),
  )


def _our_reading(
  model: str, module: l2s.LlmToSlm, shape: timing.Shape, seed: int
) -> Trainer:
  """Returns the encoding of prompts by the frozen LLM."""
  llm = l2s.build_reader(module.llm_config)
  batch = jax.device_put(_batch(module, shape, seed))

  def read(
    llm: language_model.LanguageModel, batch: language_model.Batch
  ) -> jax.Array:
    embeddings = llm.embed(batch['encoder_input_tokens'])
    return llm.encode(
      embeddings, batch['encoder_segment_ids'], deterministic=True
    )

  params = jax.jit(
    lambda key: partitioning.unbox(llm.init(key, batch, method=read))
  )(jax.random.key(seed))
  compiled = (
    jax.jit(lambda params, batch: llm.apply(params, batch, method=read))
    .lower(params, batch)
    .compile()
  )

  def step() -> None:
    jax.block_until_ready(compiled(params, batch))

  return Trainer(
    READ,
    model,
    contenders.OURS,
    module.llm_config.dtype,
    shape[0] * flops_lib.reading_flops(module.llm_config, shape[1]),
    0,
    step,
    functools.partial(_memory_bytes, compiled),
  )


def _of_peers(
  models: Mapping[str, contenders.TimedModel],
  shape: timing.Shape,
  seed: int,
  scratch: pathlib.Path,
) -> Iterator[Trainer]:
  """Yields the available peers; prints the missing ones and the reasons."""
  modules = {role: l2s.build(model.config) for role, model in models.items()}

  def load(
    name: str, folder: pathlib.Path, model: contenders.TimedModel
  ) -> train_peers.Step:
    batch = _batch(l2s.build(model.config), shape, seed)
    return train_peers.load(name, folder, model.config, batch)

  shutil.rmtree(scratch, ignore_errors=True)
  try:
    for role, peer, step in contenders.load_peers(
      models, train_peers.PEERS, scratch, load
    ):
      yield Trainer(
        role,
        models[role].name,
        peer.engine,
        peer.dtype,
        shape[0] * flops_lib.train_flops(modules[role], shape[1], shape[2]),
        models[role].num_params,
        step,
      )
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _batch(
  module: flops_lib.Module, shape: timing.Shape, seed: int
) -> dict[str, Any]:
  """Returns a batch of random tokens without padding."""
  batch_size, prompt_length, answer_length = shape
  generator = np.random.default_rng(seed)
  reader = (
    module.llm_config if isinstance(module, l2s.LlmToSlm) else module.config
  )

  def draw(vocab_size: int, length: int) -> np.ndarray:
    return generator.integers(3, vocab_size, (batch_size, length), np.int32)

  prompts = draw(reader.vocab_size, prompt_length)
  answers = draw(_config(module).vocab_size, answer_length)
  return packing.lay_out(
    list(prompts),
    list(answers),
    range(batch_size),
    task_feature_lengths={'inputs': prompt_length, 'targets': answer_length},
    prompt_pad_id=0,
    answer_pad_id=0,
    start_id=0,
  )


def _config(module: flops_lib.Module) -> Any:
  return l2s.writer(module)[0].config


def _memory_bytes(compiled: jax.stages.Compiled) -> int | None:
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def _measure(
  entered: Sequence[Trainer], shape: timing.Shape, rounds: int
) -> list[TableRow]:
  """Times contenders in turn; returns a row for each."""
  losses: list[list[float | None]] = []
  first: list[float] = []
  for contender in entered:
    start = time.perf_counter()
    losses.append([contender.step(), contender.step()])
    first.append(time.perf_counter() - start)
  times = timing.in_turns([(x.step,) for x in entered], rounds=rounds)
  return [
    contender.row(shape)
    | {
      'rounds': {'ms_per_step': [1e3 * x for x in secs]},
      'first_call_secs': first_secs,
      'flops': contender.flops,
      'num_trained': contender.num_trained,
      'memory_bytes': contender.memory_bytes(),
      'first_losses': first_losses,
    }
    for contender, (secs,), first_secs, first_losses in zip(
      entered, times, first, losses, strict=True
    )
  ]


def _with_sum(rows: list[TableRow]) -> list[TableRow]:
  """Adds a row with the sum of SLM step and LLM encoding, if both exist."""
  parts = {
    row['system']: row for row in rows if row['engine'] == contenders.OURS
  }
  if not {READ, contenders.SLM} <= parts.keys():
    return rows
  read, slm = parts[READ], parts[contenders.SLM]
  in_all = np.add(*(row['rounds']['ms_per_step'] for row in (read, slm)))
  return [
    *rows,
    slm
    | {
      'system': BOTH,
      'model': f'{read["model"]}, {slm["model"]}',
      'rounds': {'ms_per_step': in_all.tolist()},
      'flops': read['flops'] + slm['flops'],
      'first_call_secs': read['first_call_secs'] + slm['first_call_secs'],
      'memory_bytes': None,
    },
  ]


def _shown(row: TableRow) -> TableRow:
  """Returns a row with its values in the units of the table."""
  low, middle, high = np.percentile(row['rounds']['ms_per_step'], [25, 50, 75])
  num_tokens = row['batch_size'] * (row['prompt_length'] + row['num_tokens'])
  flops_per_sec = 1e3 * row['flops'] / middle
  shown = row | {
    'ms_per_step': middle,
    'spread': f'{low:.1f}-{high:.1f}',
    'tokens_per_sec': 1e3 * num_tokens / middle,
    'gflops_per_sec': flops_per_sec / 1e9,
    'params_millions': row['num_trained'] / 1e6,
  }
  chip = chips.of_device(jax.devices()[0].device_kind)
  if chip is not None:
    shown['mfu_percent'] = 100 * flops_per_sec / chip.flops_per_sec
  if row['memory_bytes'] is not None:
    shown['memory_mb'] = row['memory_bytes'] / 1e6
  return shown


def _write(folder: pathlib.Path, rows: Sequence[TableRow], rounds: int) -> None:
  machine = speed_report.machine()
  files.write_json(folder / _JSON, {'rows': rows, 'machine': machine})
  parts = ['# Training\n']
  for shape, group in speed_report.by_shape(rows).items():
    shown = [_shown(dict(row)) for row in group]
    columns = {
      key: heading
      for key, heading in _COLUMNS.items()
      if any(key in row for row in shown)
    }
    parts += [
      f'## Batch {shape[0]}, {shape[1]} tokens in, {shape[2]} out\n',
      report.markdown_table(shown, columns),
    ]
  parts += [
    _WORDS.format(rounds=rounds),
    ''.join(f'- {name}: {x}\n' for name, x in machine.items()),
  ]
  text = '\n'.join(parts)
  with files.whole(folder / _MARKDOWN) as file:
    file.write(text)
  print(f'{text}\nSee {folder}')
