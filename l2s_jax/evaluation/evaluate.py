# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: metrics of a run's checkpoints on a SeqIO task.

Metrics, predictions and plots are written to `eval/`. `scoring.py` computes the
metrics.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gin

from l2s_jax.data import bound_tasks
from l2s_jax.evaluation import controls as controls_lib
from l2s_jax.evaluation import metric_writer, report, scoring
from l2s_jax.inference import generate, sampling
from l2s_jax.metrics import length_bins as length_bins_lib
from l2s_jax.models import l2s
from l2s_jax.runtime import (
  distributed,
  files,
  gin_config,
  integrity,
  locks,
  partitioning,
)
from l2s_jax.systems import model_paths, parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import run_format, saved_steps

# Keys of a metrics file that hold no numbers.
_NO_NUMBERS = ('settings', 'signatures', 'by_length')
_REMEDY = 'remove it, and evaluate its steps again.'


@gin.configurable(module='l2s_jax')
def evaluate(
  checkpoint_path: str = gin.REQUIRED,
  mixture_or_task_name: str = gin.REQUIRED,
  task_feature_lengths: Mapping[str, int] = gin.REQUIRED,
  batch_size: int = 32,
  steps: Any = None,
  split: str = 'validation',
  num_examples: int | None = None,
  controls: Sequence[str] = ('none',),
  length_bins: Sequence[int] = (),
  max_decode_len: int | None = None,
  num_bootstrap_samples: int = 1000,
  output_dir: str | None = None,
  llm_path: str | None = None,
  vocabulary: str | None = None,
  extra_ids: int = 0,
  mesh: partitioning.MeshConfig | None = None,
  decoding: sampling.Decoding | None = None,
  *,
  dry_run: bool = False,
) -> dict[int, dict[str, dict[str, float]]]:
  """Evaluates checkpoints of a run, or a pretrained model.

  Each result is added to `eval/metrics-<task>-<split>.json`. All results in
  that file are summarized in a printed table, in
  `eval/curves-<task>-<split>.png`, and as TensorBoard logs in
  `eval/tensorboard`. `eval/config-<task>-<split>.gin` is the operative config
  of the last evaluation.

  Args:
    checkpoint_path: a run's folder (MODEL_DIR of its training); or a Hugging
      Face or converted folder, a T5X checkpoint, a GGUF file, or the name of a
      model on the Hugging Face Hub.
    mixture_or_task_name: SeqIO task or mixture.
    task_feature_lengths: maximum tokens of 'inputs' and 'targets'.
    batch_size: global batch size.
    steps: a checkpoint step, a tuple of steps, 'all', 'best' (chosen in
      training by BEST_METRIC), or None for the newest.
    split: split of the task.
    num_examples: number of examples, from the start of the split; None takes
      all.
    controls: any of 'none', 'zero', 'other', 'untrained', 'layer_0': Z of the
      prompt, Z = 0, Z of another prompt, Z from an encoder with random weights,
      Z from the LLM's input embeddings.
    length_bins: upper bounds, in words of the reference, of all bins but the
      last, such as (10, 20, 40), for metrics by reference length; () for none.
    max_decode_len: maximum tokens of an answer; None takes the length of
      'targets'.
    num_bootstrap_samples: bootstrap samples for 95 % confidence intervals; 0
      for no intervals.
    output_dir: output folder of predictions and metrics; None takes the run's
      folder. Required for a pretrained model.
    llm_path: location of the LLM's weights, if they were moved.
    vocabulary: tokenizer of a pretrained model that has none.
    extra_ids: sentinel ids that T5 adds to its SentencePiece model.
    mesh: device mesh and axis rules.
    decoding: decoding strategy; None is greedy.
    dry_run: prints sizes and shardings, and stops.

  Returns:
    Metrics by step and control.
  """
  gin_config.check_lengths(task_feature_lengths)
  scored = _Scored(
    task_feature_lengths,
    split,
    batch_size=batch_size,
    num_examples=num_examples,
    max_decode_len=task_feature_lengths['targets']
    if max_decode_len is None
    else max_decode_len,
    decoding=decoding or sampling.Decoding(),
    num_bootstrap_samples=num_bootstrap_samples,
    length_bins=length_bins,
  )
  model_paths.check_path(checkpoint_path)
  folder = model_paths.output_dir(
    checkpoint_path, output_dir, 'EVAL_OUTPUT_DIR'
  )

  session = session_lib.start(
    lambda: session_lib.with_cached_states(
      model_paths.load(
        checkpoint_path,
        llm_path=llm_path,
        vocabulary=vocabulary,
        extra_ids=extra_ids,
      ),
      mixture_or_task_name,
    ),
    mesh,
    scored.lengths,
    batch_sizes={'BATCH_SIZE': batch_size},
  )
  task = session_lib.bind_task(session.system, mixture_or_task_name)
  if not dry_run:  # a dry run needs no data
    task.check_evaluable(split, scored.lengths)
  _check_controls(controls, session.system)
  # All processes use one choice: a running training may save at this moment.
  chosen = distributed.from_first(_choose_steps(checkpoint_path, steps))
  if dry_run:
    print(session.describe())
    return {}
  with session.entered(), distributed.watch_preemption() as watcher:
    results = _score_steps(
      session,
      scored.evaluator(session, task),
      checkpoint_path,
      chosen,
      controls,
      _Scores(folder, f'{task.name}-{split}', scored.settings()),
      watcher.exit_if_requested,
    )
    distributed.wait_for_all('evaluate')
  return results


@dataclasses.dataclass(frozen=True)
class _Scored:
  """Settings of an evaluation that do not depend on the model.

  Attributes:
    task_feature_lengths: maximum tokens of 'inputs' and 'targets'.
    split: split of the task.
    batch_size: global batch size.
    num_examples: number of examples; None takes all.
    max_decode_len: maximum tokens of an answer.
    decoding: decoding strategy.
    num_bootstrap_samples: bootstrap samples; 0 for no confidence intervals.
    length_bins: upper bounds of all length bins but the last, in words.
  """

  task_feature_lengths: Mapping[str, int]
  split: str
  batch_size: int
  num_examples: int | None
  max_decode_len: int
  decoding: sampling.Decoding
  num_bootstrap_samples: int
  length_bins: Sequence[int]

  def __post_init__(self):
    """Validates the settings.

    Raises:
      ValueError: names the setting.
    """
    gin_config.check_positive(
      BATCH_SIZE=self.batch_size,
      num_examples=self.num_examples,
      max_decode_len=self.max_decode_len,
    )
    gin_config.check_between(
      0, gin_config.LARGEST, EVAL_BOOTSTRAP_SAMPLES=self.num_bootstrap_samples
    )
    length_bins_lib.check(self.length_bins)
    if self.decoding.stop:
      raise ValueError(
        f'Decoding.stop={self.decoding.stop!r}: stop texts are for infer only. '
        'An evaluation scores answers that the model ends itself; remove this '
        'setting.'
      )
    if self.decoding.draft_len:
      raise ValueError(
        f'Decoding.draft_len={self.decoding.draft_len}: speculative decoding '
        'returns the answers of the LLM, not those of the SLM. Evaluate the '
        'LLM, or set it to 0.'
      )
    generate.check(self.decoding, self.max_decode_len)

  @property
  def lengths(self) -> dict[str, int]:
    """Maximum tokens of 'inputs', and of references or answers."""
    longest = max(self.max_decode_len, self.task_feature_lengths['targets'])
    return {'inputs': self.task_feature_lengths['inputs'], 'targets': longest}

  def settings(self) -> dict[str, Any]:
    """Returns the settings under which metrics are comparable."""
    return {
      # As JSON, for comparison with settings read from a file.
      'decoding': _as_json(self.decoding),
      'num_examples': self.num_examples,
      'task_feature_lengths': dict(self.task_feature_lengths),
      'max_decode_len': self.max_decode_len,
    }

  def evaluator(
    self, session: session_lib.Session, task: bound_tasks.BoundTask
  ) -> scoring.Evaluator:
    """Returns the evaluator of the model's parameters."""
    return scoring.Evaluator(
      session.system,
      session.mesh,
      task,
      self.task_feature_lengths,
      split=self.split,
      batch_size=self.batch_size,
      num_examples=self.num_examples,
      max_decode_len=self.max_decode_len,
      decoding=self.decoding,
      num_bootstrap_samples=self.num_bootstrap_samples,
      length_bins=self.length_bins,
    )


def _as_json(decoding: sampling.Decoding) -> dict[str, Any]:
  """Returns decoding settings as JSON keeps them, with lists for tuples."""
  return json.loads(json.dumps(dataclasses.asdict(decoding)))


class _Scores(NamedTuple):
  """Writes the metrics of one task and split, for fixed settings.

  Attributes:
    folder: the folder with `eval/`.
    name: name of task and split.
    settings: from `_Scored.settings`.
  """

  folder: pathlib.Path
  name: str
  settings: Mapping[str, Any]

  def add(
    self,
    step: int,
    control: str,
    scores: Mapping[str, float],
    scorer: scoring.Evaluator,
  ) -> None:
    """Prints metrics and adds them to the metrics file.

    Args:
      step: step of the checkpoint.
      control: one of `scoring.CONTROLS`.
      scores: the metrics computed by `scorer`.
      scorer: the evaluator, which has their signatures and the metrics by
        length.
    """
    signatures, by_length = scorer.signatures, scorer.by_length
    label = '' if control == 'none' else f' (Z: {control})'
    line = scoring.format_scores(scores, signatures)
    print(f'step {step}{label}: {line}', flush=True)
    for task, by_bin in by_length.items():
      print(f'\n{report.lengths_table(by_bin, task)}', flush=True)
    if distributed.is_first():
      _record(
        self.folder / 'eval' / f'metrics-{self.name}.json',
        step,
        control,
        {**scores, 'settings': self.settings, 'signatures': signatures}
        | ({'by_length': by_length} if by_length else {}),
      )
      gin_config.save_operative_config(
        self.folder / 'eval' / f'config-{self.name}.gin'
      )


def _score_steps(
  session: session_lib.Session,
  scorer: scoring.Evaluator,
  checkpoint_path: str,
  steps: Sequence[int],
  controls: Sequence[str],
  found: _Scores,
  stop: scoring.Stop,
) -> dict[int, dict[str, dict[str, float]]]:
  """Evaluates checkpoints; returns metrics by step and control."""
  results: dict[int, dict[str, dict[str, float]]] = {}
  _, frozen = parameters.load_frozen(session.system, session.layout)
  stop()
  with contextlib.ExitStack() as opened:
    if distributed.is_first():
      opened.enter_context(locks.held(found.folder / 'eval', 'EVAL_OUTPUT_DIR'))
    for step in steps:
      trained = parameters.load_trained(
        session.system, session.layout, checkpoint_path, step
      )
      params = parameters.merge(frozen, trained)
      results[step] = {}
      for control in controls:
        scores = scorer.evaluate(
          params, step=step, output_dir=found.folder, control=control, stop=stop
        )
        results[step][control] = scores
        found.add(step, control, scores, scorer)
      if report.allows_verdict(results[step]):
        print(report.describe_controls(results[step]), flush=True)
    if distributed.is_first():
      _write_curves(
        found.folder / 'eval', found.name, found.settings, scorer.signatures
      )
  return results


def _choose_steps(run_dir: str, steps: Any) -> list[int]:
  """Returns the existing steps to evaluate."""
  if steps == 'all':
    if not run_format.is_run(run_dir):
      return [model_paths.choose_step(run_dir, steps, 'EVAL_STEPS')]  # raises
    found = distributed.from_first(saved_steps.steps(run_dir))
    bad = {step: saved_steps.problem(run_dir, step) for step in found}
    for wrong in filter(None, bad.values()):
      distributed.say(f'{wrong}; skipping it.')
    if all(bad.values()):
      saved_steps.params_folder(run_dir)  # raises: all are damaged
    return [step for step in found if not bad[step]]
  wanted = steps if isinstance(steps, tuple | list) else [steps]
  if not all(s is None or s == 'best' or isinstance(s, int) for s in wanted):
    raise ValueError(
      f'EVAL_STEPS={steps!r}: expected a step, a tuple of steps such as '
      "(1000, 2000), 'all', 'best', or None for the newest."
    )
  return [
    model_paths.choose_step(run_dir, step, 'EVAL_STEPS') for step in wanted
  ]


def _check_controls(controls: Sequence[str], system: system_lib.System) -> None:
  """Refuses unknown controls, and controls the system does not support."""
  allowed = scoring.CONTROLS[
    : None if isinstance(system.module, l2s.LlmToSlm) else 1
  ]
  if isinstance(controls, str) or not set(controls) <= set(allowed):
    raise ValueError(
      f'EVAL_CONTROLS={controls!r}: expected a tuple of any of '
      f'{scoring.CONTROLS} for '
      "an LLM-to-SLM run, and ('none',) for a language model alone."
    )
  reading = set(controls) & set(controls_lib.READING)
  if reading and system.cached_states is not None:
    raise ValueError(
      f'EVAL_CONTROLS={controls!r}: {" and ".join(sorted(reading))} need the '
      'LLM, but cached states replace it. Set USE_FEATURES=False, or remove '
      'these controls.'
    )


def _record(
  path: pathlib.Path, step: int, control: str, scores: Mapping[str, Any]
) -> None:
  """Adds metrics to a metrics file, by step and control."""
  found = read_scores(path) if path.is_file() else {}
  found.setdefault(str(step), {})[control] = dict(scores)
  files.write_json(path, integrity.seal(found))


def read_scores(path: pathlib.Path) -> dict[str, dict[str, dict[str, Any]]]:
  """Reads a metrics file: metrics by step and control.

  Raises:
    ValueError: if the file is damaged, with the key, or was changed after it
      was written.
  """
  remedy = _REMEDY
  found = files.read_json(path, remedy=remedy, finite=False)
  if integrity.is_sealed(found):
    found = integrity.unsealed(found, path, remedy)
  for step, by_control in found.items():
    if not step.isdecimal():
      raise ValueError(f'{path}: key {step!r} is not a step; {remedy}')
    files.check_keys(found, path, keys={step: dict}, remedy=remedy)
    for control, scores in by_control.items():
      place = f'{path}, step {step}'
      files.check_keys(by_control, place, keys={control: dict}, remedy=remedy)
      kinds = {k: dict if k in _NO_NUMBERS else float for k in scores}
      place = f'{place}, {control}'
      if control not in report.CONTROLS:
        raise ValueError(
          f'{place}: unknown control; update l2s_jax, or {remedy}'
        )
      files.check_keys(scores, place, keys=kinds, remedy=remedy)
      for task, by_bin in scores.get('by_length', {}).items():
        if not files.is_file_name(task):  # The report has a plot of this name.
          raise ValueError(f'{place}: {task[:200]!r} is not a task; {remedy}')
        _check_bins(by_bin, f'{place}, by_length, {task}', remedy)
  return found


def is_sealed(path: pathlib.Path) -> bool:
  """Returns whether a metrics file has a digest.

  If so, the predictions of its evaluations were written with digests.
  """
  found = files.read_json(path, remedy=_REMEDY, finite=False)
  return integrity.is_sealed(found)


def _check_bins(by_bin: Any, place: str, remedy: str) -> None:
  """Validates the metrics by length bin: numbers by name, for each bin."""
  if not isinstance(by_bin, dict):
    raise ValueError(f'{place} is {files.kind_of(by_bin)}; {remedy}')
  for name, scores in by_bin.items():
    if not re.fullmatch(r'\d+(-\d+|\+)', name):
      raise ValueError(f'{place}: key {name!r} is not a bin; {remedy}')
    files.check_keys(by_bin, place, keys={name: dict}, remedy=remedy)
    keys = {'num_examples': float} | dict.fromkeys(scores, float)
    files.check_keys(scores, f'{place}, {name}', keys=keys, remedy=remedy)


def _write_curves(
  folder: pathlib.Path,
  name: str,
  settings: Mapping[str, Any],
  signatures: Mapping[str, str],
) -> None:
  """Writes a table, a plot and TensorBoard logs of a metrics file.

  Results with other settings or signatures are left out.
  """
  found = read_scores(folder / f'metrics-{name}.json')
  defaults = {'decoding': _as_json(sampling.Decoding())}
  by_control: dict[str, dict[int, dict[str, float]]] = {}
  for step in sorted(found, key=int):
    for control, scores in found[step].items():
      # Earlier versions stored no signatures, and used these.
      signed = scores.pop('signatures', signatures)
      scores.pop('by_length', None)
      theirs = run_format.with_defaults(scores.pop('settings', {}), defaults)
      if theirs == settings and signed == signatures:
        by_control.setdefault(control, {})[int(step)] = scores
  for control, by_step in by_control.items():
    label = name if control == 'none' else f'{name}-{control}'
    logs = folder / 'tensorboard' / label
    with contextlib.closing(metric_writer.EventFile(logs)) as writer:
      for number, scores in by_step.items():
        for score in report.score_names(scores):
          writer.add(f'eval/{score}', scores[score], number, time.time())
      writer.replace_others()
  if max(map(len, by_control.values())) > 1:
    if 'none' in by_control:
      print(f'\n{report.steps_table(by_control["none"])}')
    path = folder / f'curves-{name}.png'
    by_line = {report.CONTROLS[c]: found for c, found in by_control.items()}
    report.plot_curves(by_line, path, title=name)
    print(f'See {path}')
