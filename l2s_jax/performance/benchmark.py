# SPDX-License-Identifier: Apache-2.0
"""The verb `benchmark`: generation speed of systems and other engines.

All contenders are loaded at once and timed in turn; `timing.py` defines the
measured times. Speed does not depend on the values of weights: without a
checkpoint they are random.
"""

import collections
import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from l2s_jax.data import text_files
from l2s_jax.evaluation import evaluate, report
from l2s_jax.evaluation.report import TableRow
from l2s_jax.models import config as config_lib
from l2s_jax.models import flops, l2s
from l2s_jax.performance import bandwidth as bandwidth_lib
from l2s_jax.performance import (
  contenders,
  data_benchmark,
  speed_report,
  timing,
  train_benchmark,
)
from l2s_jax.performance import data_input as data_input_lib
from l2s_jax.performance import peers as peers_lib
from l2s_jax.runtime import files, gin_config
from l2s_jax.systems import model_paths
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import runs

BYTES = {
  'float32': 4,
  'bfloat16': 2,
  'int8': 1,
  'int8_dynamic': 1,
  'int8_left': 1,
  'int8_unsigned': 1,
}
# Seconds to wait between contenders: threads of some engines keep spinning
# after their work.
_PAUSE_SECS = 0.3
_QUICK_ROUNDS = 3


@gin.configurable(module='l2s_jax')
def benchmark(
  output_dir: str,
  llm: system_lib.Tower | None = None,
  slm: system_lib.Tower | None = None,
  checkpoint_path: str | None = None,
  injection: str = 'add',
  draft_len: int = 0,
  dtype: str = 'float32',
  quantizations: Sequence[str] = ('none',),
  prompts_path: str | None = None,
  batch_sizes: int | Sequence[int] = (1, 8),
  prompt_lengths: int | Sequence[int] = (128,),
  output_lengths: int | Sequence[int] = (64,),
  rounds: int = 7,
  seed: int = 0,
  quality: str | None = None,
  peer_names: Sequence[str] = peers_lib.DEFAULT,
  peers: bool = False,
  train: bool = False,
  data_input: data_input_lib.DataInput | None = None,
  data: bool = False,
  quick: bool = False,
  dry_run: bool = False,
) -> None:
  """Times the LLM, the SLM and LLM-to-SLM, and writes a report at each shape.

  Prompts are random tokens, or lines of a file. All prompts of a shape have
  exactly the requested number of tokens.

  Args:
    output_dir: output folder of benchmark.json, benchmark.md and benchmark.png.
    llm: the LLM: weights, or a config for random ones. Without either, the SLM
      is timed alone.
    slm: the SLM: weights, or a config for random ones.
    checkpoint_path: an LLM-to-SLM run, with its LLM and SLM. Any other run or
      pretrained model is timed alone, as the LLM.
    injection: 'add' or 'replace', without a run.
    draft_len: tokens that LLM-to-SLM drafts for verification by the LLM; 0
      leaves speculative decoding out. The acceptance rate depends on the
      training and the prompts. With `prompts_path`, EOS ends the answers of
      speculative decoding and of an additional LLM contender.
    dtype: dtype of weights and activations, 'float32' or 'bfloat16'.
    quantizations: quantizations of the weights, one or several; each is a
      contender. See `TransformerConfig.quantization`.
    prompts_path: a text file; its lines with the requested number of tokens,
      EOS included, are the prompts. None uses random tokens.
    batch_sizes: prompts per batch, one number or several.
    prompt_lengths: tokens of a prompt, one number or several.
    output_lengths: tokens of an answer, one number or several, at least 2.
    rounds: measured rounds; one more precedes them and compiles.
    seed: seed of random weights and prompts.
    quality: a task and its split, such as 'multi30k-test': adds the scores that
      `evaluate` has stored in the runs' folders for the timed steps.
    peer_names: engines that --peers stands for, one or several.
    peers: whether other engines run the LLM and the SLM, too.
    train: whether to time training steps instead, with AdamW and random tokens;
      `output_lengths` are the target lengths. A single model is compared with
      peers; for an LLM and an SLM, LLM-to-SLM is compared with its parts.
    data_input: input of --data: a task, and the tokenizers of a model.
    data: whether to time the tokenization and reading of a task instead. Of the
      other settings only `output_dir`, `rounds`, `peers` and `data_input`
      apply.
    quick: times the first shape alone, the first of each of `batch_sizes`,
      `prompt_lengths` and `output_lengths`, in at most three rounds.
    dry_run: prints the models, and stops.

  Raises:
    ValueError: if a setting is invalid, before weights are loaded.
  """
  if quick:
    batch_sizes, prompt_lengths, output_lengths = (
      _as_tuple(values)[:1]
      for values in (batch_sizes, prompt_lengths, output_lengths)
    )
    rounds = min(rounds, _QUICK_ROUNDS)
  if data:
    _benchmark_data(output_dir, data_input, rounds, peers, dry_run)
    return
  settings = _Settings(
    dtype=dtype,
    injection=injection,
    quantizations=_as_tuple(quantizations),
    draft_len=draft_len,
    prompts_path=prompts_path,
    rounds=rounds,
    seed=seed,
    peer_names=_as_tuple(peer_names),
  )
  folder = files.local_folder(output_dir, 'BENCHMARK_DIR')
  shapes = _shapes(batch_sizes, prompt_lengths, output_lengths)
  models, pair = contenders.find_models(
    llm, slm, checkpoint_path, injection, dtype, seed
  )
  _check_positions(models, shapes)
  _check_drafts(models, pair, draft_len)
  if train:
    settings.check_training()
  prompts = _Prompts(seed, prompts_path, checkpoint_path)
  for batch_size, prompt_length, _ in shapes:
    prompts.check(batch_size, prompt_length)
  scores = {} if quality is None else _scores(models, pair, quality)
  if peers:
    contenders.check_disk(models, settings.peer_names, folder)
  print(_describe(models, pair))
  if dry_run:
    return
  if train:
    train_benchmark.run(
      folder, models, pair, shapes, rounds=rounds, seed=seed, has_peers=peers
    )
    return
  entered = settings.ours(models, pair)
  if peers:
    entered += _of_peers(models, settings.peer_names, folder)
  bandwidth = bandwidth_lib.Bandwidth()
  locations = {role: model.source.location for role, model in models.items()}
  described = settings.described() | {
    'weights': locations,
    'checkpoint': checkpoint_path,
  }
  rows: list[TableRow] = []
  for shape in shapes:
    rows += _time(entered, shape, rounds, prompts, bandwidth)
    _complete(rows, scores, bandwidth)
    measured = {'bandwidth_gb_per_sec': bandwidth.bytes_per_sec / 1e9}
    text = speed_report.write(
      folder, rows, speed_report.machine() | measured, described
    )
  print(f'{text}\nSee {folder}')


def _benchmark_data(
  output_dir: str,
  data_input: data_input_lib.DataInput | None,
  rounds: int,
  has_peers: bool,
  dry_run: bool,
) -> None:
  """Times the data pipeline, which needs no model."""
  if data_input is None:
    raise ValueError(
      '--data times a task with the tokenizers of a model: use '
      '--gin_file=gin_configs/runs/benchmark_data.gin instead of '
      'benchmark.gin, and add the gin files of a task and a model.'
    )
  gin_config.check_positive(BENCHMARK_ROUNDS=rounds)
  data_benchmark.run(
    files.local_folder(output_dir, 'BENCHMARK_DIR'),
    data_input,
    rounds=rounds,
    has_peers=has_peers,
    dry_run=dry_run,
  )


def _as_tuple(values: Any) -> tuple[Any, ...]:
  """Returns one value or several as a tuple."""
  return (values,) if isinstance(values, str | int) else tuple(values)


@dataclasses.dataclass(frozen=True)
class _Settings:
  """Settings of generation benchmarks; see `benchmark`."""

  dtype: str
  injection: str
  quantizations: tuple[str, ...]
  draft_len: int
  prompts_path: str | None
  rounds: int
  seed: int
  peer_names: tuple[str, ...]

  def __post_init__(self):
    """Validates the settings.

    Raises:
      ValueError: names the setting and its valid values.
    """
    for name, values, known in (
      ('DTYPE', (self.dtype,), ('float32', 'bfloat16')),
      ('INJECTION', (self.injection,), l2s.INJECTIONS),
      ('QUANTIZATIONS', self.quantizations, config_lib.QUANTIZATIONS),
      ('BENCHMARK_PEERS', self.peer_names, tuple(peers_lib.PEERS)),
    ):
      for value in values:
        if value not in known:
          raise ValueError(f'{name}: {value!r} is not one of {known}.')
    gin_config.check_positive(BENCHMARK_ROUNDS=self.rounds)

  def check_training(self) -> None:
    """Refuses settings that do not apply to training steps."""
    if self.quantizations != ('none',) or self.draft_len or self.prompts_path:
      raise ValueError(
        '--train times steps on random tokens: leave QUANTIZATIONS, DRAFT_LEN '
        'and BENCHMARK_PROMPTS unset.'
      )

  def ours(
    self,
    models: Mapping[str, contenders.TimedModel],
    pair: contenders.Pair | None,
  ) -> list[contenders.Writer]:
    """Returns the contenders of this package."""
    return list(
      contenders.ours(
        models,
        pair,
        self.dtype,
        self.quantizations,
        self.draft_len,
        to_eos=self.prompts_path is not None,
      )
    )

  def described(self) -> dict[str, Any]:
    """Returns the settings as shown in the report."""
    return {
      'dtype': self.dtype,
      'injection': self.injection,
      'draft_len': self.draft_len,
      'prompts': self.prompts_path or 'random tokens',
      'rounds': self.rounds,
      'seed': self.seed,
    }


def _of_peers(
  models: Mapping[str, contenders.TimedModel],
  peer_names: Sequence[str],
  folder: pathlib.Path,
) -> list[contenders.Writer]:
  """Returns the contenders of other engines, loaded from a scratch folder."""
  # In the output folder, since /tmp may be in memory.
  scratch = folder / '.peers'
  shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
  try:
    return list(contenders.of_peers(models, peer_names, scratch))
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _complete(
  rows: Sequence[TableRow],
  scores: Mapping[str, dict[str, float]],
  bandwidth: bandwidth_lib.Bandwidth,
) -> None:
  """Adds scores, and the fraction of the bandwidth, to the rows."""
  for row in rows:
    if row['engine'] == contenders.OURS and not row['dtype'].startswith('int'):
      row['scores'] = scores.get(row['system'], {})
    if row['bytes_per_step'] is not None and 'prefill_ms' in row:
      bytes_per_sec = 1e3 * row['bytes_per_step'] / row['ms_per_token']
      row['bandwidth_fraction'] = bytes_per_sec / bandwidth.bytes_per_sec


def _shapes(
  batch_sizes: int | Sequence[int],
  prompt_lengths: int | Sequence[int],
  output_lengths: int | Sequence[int],
) -> list[timing.Shape]:
  """Returns all combinations of batch size, prompt and output length."""
  batch_sizes, prompt_lengths, output_lengths = map(
    _as_tuple, (batch_sizes, prompt_lengths, output_lengths)
  )
  shapes = [
    (batch_size, prompt_length, num_tokens)
    for prompt_length in prompt_lengths
    for num_tokens in output_lengths
    for batch_size in batch_sizes
  ]
  if not shapes:
    raise ValueError(
      'Nothing to time: BATCH_SIZES, PROMPT_LENGTHS or OUTPUT_LENGTHS is empty.'
    )
  for batch_size, prompt_length, num_tokens in shapes:
    gin_config.check_positive(
      BATCH_SIZES=batch_size, PROMPT_LENGTHS=prompt_length
    )
    if num_tokens < 2:
      raise ValueError(
        f'OUTPUT_LENGTHS={num_tokens}: the time per token is measured from all '
        'tokens after the first; expected 2 or more.'
      )
  return shapes


def _check_positions(
  models: Mapping[str, contenders.TimedModel], shapes: Sequence[timing.Shape]
) -> None:
  """Refuses lengths beyond a model's maximum number of positions."""
  for model in models.values():
    module = l2s.build_reader(model.config)
    for _, prompt_length, num_tokens in shapes:
      module.check_lengths(prompt_length, num_tokens)


def _check_drafts(
  models: Mapping[str, contenders.TimedModel],
  pair: contenders.Pair | None,
  draft_len: int,
) -> None:
  """Refuses speculative decoding if the LLM cannot verify drafts."""
  if not draft_len:
    return
  gin_config.check_positive(DRAFT_LEN=draft_len)
  if (
    pair is None
    or not pair.module.shared_vocabulary
    or not pair.module.llm_config.is_encoder_decoder
    or not models[contenders.LLM].writes
  ):
    raise ValueError(
      f'DRAFT_LEN={draft_len}: drafts need LLM-to-SLM with an encoder-decoder '
      'LLM that has the vocabulary of the SLM. Set DRAFT_LEN=0.'
    )


def _scores(
  models: Mapping[str, contenders.TimedModel],
  pair: contenders.Pair | None,
  name: str,
) -> dict[str, dict[str, float]]:
  """Returns the main scores of each system, evaluated at the timed step.

  Raises:
    ValueError: if no system was evaluated.
  """
  sources = {role: model.source for role, model in models.items()}
  if pair is not None:
    sources[contenders.LLM_TO_SLM] = pair.slm.source
    if pair.slm is models[contenders.SLM]:
      del sources[contenders.SLM]  # the run's scores are LLM-to-SLM's
  found = {}
  for system, source in sources.items():
    path = pathlib.Path(source.location) / 'eval' / f'metrics-{name}.json'
    if not isinstance(source, runs.Run) or not path.is_file():
      continue
    by_control = evaluate.read_scores(path).get(str(source.step()), {})
    scores = by_control.get('none', {})
    found[system] = {k: scores[k] for k in report.MAIN_SCORES if k in scores}
  if not any(found.values()):
    raise ValueError(
      f'BENCHMARK_QUALITY={name}: no timed run was evaluated on it at its '
      f'step: eval/metrics-{name}.json is missing, or has other steps. Run '
      '`evaluate` first.'
    )
  if contenders.LLM in found:  # Speculative decoding writes the LLM's answers.
    found[contenders.SPECULATIVE] = found[contenders.LLM]
    found[contenders.SPECULATIVE_TO_EOS] = found[contenders.LLM]
    found[contenders.LLM_TO_EOS] = found[contenders.LLM]
  return found


class _Prompts:
  """Prompts of one length, the same for equal vocabulary sizes."""

  def __init__(self, seed: int, path: str | None, checkpoint_path: str | None):
    """Reads the file of prompts, if there is one.

    Raises:
      ValueError: if the file needs the tokenizer of a run and none is given.
    """
    self._seed = seed
    self._path = path
    self._rows: list[list[int]] = []
    self._vocab_size = 0
    if path is None:
      return
    if checkpoint_path is None:
      raise ValueError(
        f'BENCHMARK_PROMPTS={path} needs the tokenizer of a run: set '
        'CHECKPOINT_PATH.'
      )
    system = model_paths.load(checkpoint_path)
    vocabulary = system.prompt_vocabulary
    module = system.module
    reader = (
      module.llm_config if isinstance(module, l2s.LlmToSlm) else module.config
    )
    self._vocab_size = reader.vocab_size
    self._rows = [
      [*vocabulary.encode(line), vocabulary.eos_id]
      for line in text_files.read_lines(epath.Path(path))
    ]

  def check(self, batch_size: int, length: int) -> None:
    """Refuses a shape for which the file has too few lines."""
    counts = collections.Counter(map(len, self._rows))
    if self._path is not None and counts[length] < batch_size:
      common = sorted(length for length, _ in counts.most_common(8))
      raise ValueError(
        f'{self._path} has {counts[length]} lines of {length} tokens (with '
        f'EOS), but the batch has {batch_size}. Most lines have '
        f'{", ".join(map(str, common))} tokens: set PROMPT_LENGTHS to some of '
        'these.'
      )

  def __call__(
    self, vocab_size: int, batch_size: int, length: int
  ) -> np.ndarray:
    """Returns token ids below `vocab_size`, [batch_size, length]."""
    if vocab_size == self._vocab_size:
      rows = [row for row in self._rows if len(row) == length]
      return np.array(rows[:batch_size], np.int32)
    generator = np.random.default_rng(self._seed)
    return generator.integers(3, vocab_size, (batch_size, length), np.int32)


def _describe(
  models: Mapping[str, contenders.TimedModel], pair: contenders.Pair | None
) -> str:
  lines = [
    f'{role}: {model.name}, {model.source.location}, '
    f'{model.num_params:,} parameters'
    for role, model in models.items()
  ]
  if pair is not None:
    number = flops.num_params(pair.module)
    lines.append(f'{contenders.LLM_TO_SLM}: {pair.name}, {number:,} parameters')
  return '\n'.join(lines)


def _time(
  entered: Sequence[contenders.Writer],
  shape: timing.Shape,
  rounds: int,
  prompts: _Prompts,
  bandwidth: bandwidth_lib.Bandwidth,
) -> list[TableRow]:
  """Times all contenders at one shape; returns a row for each."""
  batch_size, prompt_length, num_tokens = shape
  print(
    f'batch {batch_size}, {prompt_length} tokens in, {num_tokens} out: '
    f'{len(entered)} contenders, {rounds} rounds',
    flush=True,
  )
  started = {
    contender.name: contender.start(
      prompts(contender.vocab_size, batch_size, prompt_length), num_tokens
    )
    for contender in entered
  }
  has_peers = any(contender.engine != contenders.OURS for contender in entered)
  measured = timing.measure(
    started,
    num_tokens=num_tokens,
    rounds=rounds,
    pause_secs=_PAUSE_SECS if has_peers else 0.0,
    each_round=bandwidth.measure,
  )
  rows = []
  for contender in entered:
    times = measured[contender.name]
    row = _row(contender, shape, times)
    run = started[contender.name]
    if isinstance(run, timing.OurRun):
      row['memory_bytes'] = run.memory_bytes()
      row['acceptance'] = run.acceptance()
    reference = measured.get(contender.reference)
    if reference is not None and contender.reference != contender.name:
      row['equal_tokens'] = _equal(times, reference, contender.eos)
    rows.append(row)
  return rows


def _equal(
  times: timing.Times, reference: timing.Times, eos: int | tuple[int, ...]
) -> float:
  """Returns the fraction of equal tokens, up to the longer answer's end."""
  length = np.maximum(times.lengths(eos), reference.lengths(eos))
  is_token = np.arange(times.tokens.shape[1]) < length[:, None]
  return float(np.mean((times.tokens == reference.tokens)[is_token]))


def _row(
  contender: contenders.Writer, shape: timing.Shape, times: timing.Times
) -> TableRow:
  batch_size, prompt_length, _ = shape
  ends = contender.eos != -1
  in_rounds = times.rounds_to_eos(contender.eos) if ends else times.rounds()
  num_written = float(times.lengths(contender.eos).mean())
  row = contender.row(shape) | {
    'first_call_secs': times.first_call,
    'rounds': in_rounds,
  }
  for name, values in in_rounds.items():
    low, row[name], high = map(float, np.percentile(values, [25, 50, 75]))
    row |= {f'{name}_low': low, f'{name}_high': high}
  row['tokens_per_sec'] = 1e3 * batch_size * num_written / row['total_ms']
  if ends:
    row['num_written'] = num_written
  row |= dataclasses.asdict(
    flops.count(
      contender.module,
      batch_size=batch_size,
      prompt_length=prompt_length,
      num_tokens=round(num_written),
      weight_bytes=BYTES[contender.dtype],
      cache_bytes=BYTES[contender.cache_dtype],
    )
  )
  return row
