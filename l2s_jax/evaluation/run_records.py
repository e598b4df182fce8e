# SPDX-License-Identifier: Apache-2.0
"""Reading folders for `report`: the system, its evaluations and its log.

A folder is a run (with `model.json`) or an evaluation's output
(EVAL_OUTPUT_DIR), for which the system is unknown. Damaged files are refused by
name.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.evaluation import evaluate, metric_writer, report
from l2s_jax.models import flops, l2s
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import distributed, storage
from l2s_jax.systems import run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import run_format, saved_steps

Numbers = report.Numbers

_METRICS = 'metrics-'


@dataclasses.dataclass(frozen=True)
class ShownEvaluation:
  """The evaluation of the step shown in a report.

  Attributes:
    step: the best step by BEST_METRIC, if it was evaluated; else the newest.
    by_control: numbers by control.
    by_length: numbers by control, task and length bin; may be empty.
    settings: settings of the evaluation with the right prompt.
    signatures: metric signatures of that evaluation, by score.
    by_step: numbers by step, for evaluations with the right prompt and equal
      settings and signatures.
    has_digests: whether its predictions were written with digests; earlier
      versions wrote none.
  """

  step: int
  by_control: Mapping[str, Numbers]
  by_length: Mapping[str, Mapping[str, Mapping[str, Numbers]]]
  settings: Mapping[str, Any]
  signatures: Mapping[str, str]
  by_step: Mapping[int, Numbers]
  has_digests: bool = False

  @property
  def lengths(self) -> tuple[int, int] | None:
    """Maximum tokens of prompt and answer; None if the file lacks them."""
    lengths = self.settings.get('task_feature_lengths')
    if not isinstance(lengths, dict):
      return None
    found = lengths.get('inputs'), self.settings.get('max_decode_len')
    known = all(type(n) is int and n > 0 for n in found)
    return found if known else None  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class ReportedRun:
  """A folder in a report.

  Attributes:
    label: its name in tables.
    folder: its path.
    system: the system; None if unknown.
    evaluations: by task and split, such as `wmt16_en_de-test`.
    log: scalars of the training by step.
  """

  label: str
  folder: pathlib.Path
  system: system_lib.System | None
  evaluations: Mapping[str, ShownEvaluation]
  log: Mapping[int, Numbers]

  def sizes(self) -> dict[str, Any]:
    """Returns the kind of the system and its parameter counts."""
    if self.system is None:
      return {}
    sizes = {True: 0, False: 0}
    for path, shape in shapes_lib.of_module(self.system.module).items():
      is_trained = path[0] not in self.system.frozen
      sizes[is_trained and self.system.is_trained('/'.join(path))] += shape.size
    is_pair = isinstance(self.system.module, l2s.LlmToSlm)
    return {
      'kind': 'LLM-to-SLM' if is_pair else 'language model',
      'trained_params': sizes[True],
      'frozen_params': sizes[False],
    }

  def costs(
    self, prompt_length: int, num_tokens: int
  ) -> dict[str, flops.Number]:
    """Returns the FLOPs of prompt, token and answer, by formula.

    Args:
      prompt_length: tokens of the prompt.
      num_tokens: tokens of the answer.
    """
    if self.system is None:
      return {}
    of_prompt = flops.prompt_flops(self.system.module, prompt_length)
    of_token = flops.mean_token_flops(
      self.system.module, prompt_length, num_tokens
    )
    return {
      'flops_per_prompt': of_prompt,
      'flops_per_token': of_token,
      'flops_per_answer': of_prompt + num_tokens * of_token,
    }


def read_all(paths: Sequence[str]) -> list[ReportedRun]:
  """Reads folders and gives them short, unique labels.

  Raises:
    ValueError: if a folder is given twice or cannot be read.
  """
  folders = [storage.of(path).absolute() for path in paths]
  for folder in folders:
    if folders.count(folder) > 1:
      raise ValueError(f'{folder} is given twice; give each RUN once.')
  names = [folder.name for folder in folders]
  labels = [
    name if names.count(name) == 1 else str(folder)
    for name, folder in zip(names, folders, strict=True)
  ]
  return [_read(*pair) for pair in zip(labels, folders, strict=True)]


def _read(label: str, folder: pathlib.Path) -> ReportedRun:
  if not folder.is_dir():
    raise ValueError(
      f'{folder} is not a folder. RUN is the MODEL_DIR of a training, or the '
      'EVAL_OUTPUT_DIR of an evaluation.'
    )
  paths = sorted((folder / 'eval').glob(f'{_METRICS}*.json'))
  is_run = run_format.is_run(folder)
  if not (is_run or paths):
    raise ValueError(
      f'{folder} has neither the {run_folder.DESCRIPTION} of a run nor the '
      f'eval/{_METRICS}*.json of an evaluation. Give the MODEL_DIR of a '
      'training, or the EVAL_OUTPUT_DIR of an evaluation.'
    )
  for config in sorted((folder / 'eval').glob('config-*.gin')):
    scores = config.with_name(
      f'{_METRICS}{config.stem.removeprefix("config-")}.json'
    )
    if scores not in paths:
      distributed.say(
        f'{scores} is missing, though its evaluation has left {config.name}: '
        'its scores are not shown. Evaluate its steps again.'
      )
  best = saved_steps.best_step(folder)
  evaluations = {
    path.stem.removeprefix(_METRICS): _read_evaluation(path, best)
    for path in paths
  }
  return ReportedRun(
    label,
    folder,
    run_folder.load(folder) if is_run else None,
    {name: found for name, found in evaluations.items() if found is not None},
    _read_log(folder),
  )


def _read_evaluation(
  path: pathlib.Path, best: int | None
) -> ShownEvaluation | None:
  found = {int(s): scores for s, scores in evaluate.read_scores(path).items()}
  steps = [step for step, by_control in found.items() if 'none' in by_control]
  if not steps:
    distributed.say(
      f'Skipping {path}: it has controls only. Evaluate the right prompt, too '
      "(EVAL_CONTROLS=('none', ...))."
    )
    return None
  step = best if best in steps else max(steps)
  for control, scores in found[step].items():
    if not report.task_prefixes(scores):
      raise ValueError(
        f'{path}, step {step}, {control} has no loss; remove it, and evaluate '
        'its steps again.'
      )
  chosen = found[step]['none']
  return ShownEvaluation(
    step,
    {control: _numbers(scores) for control, scores in found[step].items()},
    {
      control: scores['by_length']
      for control, scores in found[step].items()
      if scores.get('by_length')
    },
    chosen.get('settings', {}),
    chosen.get('signatures', {}),
    {
      s: _numbers(found[s]['none'])
      for s in sorted(steps)
      if all(
        found[s]['none'].get(key) == chosen.get(key)
        for key in ('settings', 'signatures')
      )
    },
    evaluate.is_sealed(path),
  )


def _numbers(scores: Mapping[str, Any]) -> Numbers:
  return {k: x for k, x in scores.items() if not isinstance(x, dict)}


def _read_log(folder: pathlib.Path) -> dict[int, Numbers]:
  """Returns the losses and main scores of a training log by step."""
  path = folder / metric_writer.FILE
  records = metric_writer.read(folder, distributed.say)
  if not records and (folder / saved_steps.FOLDER).is_dir():
    state = 'has no intact line' if path.is_file() else 'is missing'
    distributed.say(f'{path} {state}: its losses and scores are not shown.')
  by_step: dict[int, dict[str, float]] = {}
  for record in records:
    by_step.setdefault(record['step'], {}).update(
      {
        name: value
        for name, value in record.items()
        if name.partition('/')[0] in ('train', 'eval')
        and name.rpartition('/')[2] in report.MAIN_SCORES
      }
    )
  return {step: scores for step, scores in by_step.items() if scores}
