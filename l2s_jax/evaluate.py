# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a system on a SeqIO task: loss, decoded metrics, controls."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
import tqdm

from l2s_jax import (
  as_it_came,
  checkpoint,
  data,
  distributed,
  files,
  generate,
  gin_utils,
  locks,
  losses,
  metric_writer,
  parameters,
  partition,
  report,
  run_format,
  sampling,
  systems,
  tasks,
)
from l2s_jax import state as state_lib

PyTree = Any

# Which Z the SLM gets: that of the prompt, zero, or that of another prompt.
CONTROLS = ('none', 'zero', 'other')

Stop = Callable[[], None]


def bind_task(
  system: systems.System, mixture_or_task_name: str, label: str | None = None
) -> Any:
  """Returns a SeqIO task or mixture with a system's vocabularies.

  Args:
    system: that reads and writes its texts.
    mixture_or_task_name: as `tasks.bind` takes it.
    label: the setting that has the name, for messages.
  """
  # Imports TensorFlow where it is called; the core does without.
  return tasks.bind(
    mixture_or_task_name,
    system.prompt_vocabulary,
    system.answer_vocabulary,
    label=label,
  )


def check_splits(
  task: Any,
  task_feature_lengths: Mapping[str, int],
  *,
  read: Sequence[str] = (),
  evaluated: str | None = None,
) -> None:
  """Refuses what a task cannot give, before anything is computed.

  Args:
    task: from `bind_task`.
    task_feature_lengths: tokens of 'inputs' and 'targets'.
    read: splits that must be there.
    evaluated: a split that must be there, with metrics; None for none.

  Raises:
    ValueError: for a missing split, lengths that are off, or no metrics.
  """
  for split in read:
    data.check_task(task, split, task_feature_lengths)
  if evaluated is not None:
    from l2s_jax import evaluation

    data.check_task(task, evaluated, task_feature_lengths)
    evaluation.check_evaluable(task, evaluated)


def check_score(name: str, score: str | None, task: Any, split: str) -> None:
  """Refuses a score that no evaluation of a task will give.

  Args:
    name: of the setting, for the error.
    score: as evaluations name it; None is none.
    task: from `bind_task`.
    split: to be evaluated.

  Raises:
    ValueError: with those that there are.
  """
  from l2s_jax import evaluation

  if score is None:
    return
  known = evaluation.score_names(task, split)
  if known is not None and score not in known:
    raise ValueError(
      f'{name}={score!r} is not a score of this task; there are '
      f'{", ".join(known)}.'
    )


class Evaluator:
  """Evaluates one system on one split, as often as asked.

  Functions are compiled once. Loss is teacher-forced; the decoded metrics are
  those of the task, by SeqIO's Evaluator, which tokenizes the split once.
  """

  def __init__(
    self,
    system: systems.System,
    mesh: jax.sharding.Mesh,
    task: Any,
    task_feature_lengths: Mapping[str, int],
    *,
    split: str,
    batch_size: int,
    num_examples: int | None = None,
    max_decode_len: int | None = None,
    decoding: sampling.Decoding | None = None,
    num_bootstrap_samples: int = 0,
  ):
    """Prepares the evaluation; nothing compiles and no data are read yet.

    Args:
      system: what to evaluate.
      mesh: the device mesh.
      task: from `bind_task`.
      task_feature_lengths: tokens of 'inputs' and 'targets'.
      split: of the task.
      batch_size: examples a batch, over all devices.
      num_examples: the first so many of each task; None takes all.
      max_decode_len: tokens an answer at most; None: that of 'targets'.
      decoding: how answers are written; None is greedy.
      num_bootstrap_samples: for confidence intervals; 0 for none.
    """
    self.generator = systems.generator(
      system,
      max_decode_len or task_feature_lengths['targets'],
      decoding=decoding,
      unstack_llm=False,  # It may be large, and training goes on beside this.
    )
    self._mesh = mesh
    # Of a system whose answers go on where its prompts end.
    self._prompt_vocabulary = (
      system.prompt_vocabulary if system.continues else None
    )
    self._task = task
    self._reading: dict[str, Any] = {
      'task_feature_lengths': task_feature_lengths,
      'split': split,
      'batch_size': batch_size,
      'num_examples': num_examples,
      'num_bootstrap_samples': num_bootstrap_samples,
    }

    def loss_sums(params, batch):
      logits = system.module.apply(
        {'params': params}, batch, deterministic=True
      )
      return losses.token_cross_entropy(
        logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
      )[1]

    self._loss_sums = jax.jit(loss_sums)

  @property
  def signatures(self) -> dict[str, str]:
    """What gave the last scores, by their names; of ROUGE's, by rougeLsum."""
    by_task = self._by_seqio.signatures
    return {
      name if len(by_task) == 1 else f'{task}/{name}': signature
      for task, signatures in by_task.items()
      for name, signature in signatures.items()
    }

  @functools.cached_property
  def _by_seqio(self) -> Any:
    from l2s_jax import evaluation

    return evaluation.TaskEvaluator(self._task, **self._reading)

  def evaluate(
    self,
    params: PyTree,
    *,
    step: int,
    output_dir: str | pathlib.Path | None = None,
    control: str = 'none',
    stop: Stop | None = None,
  ) -> dict[str, float]:
    """Returns the scores by name; of a mixture by 'task/name'.

    'loss' (nats per target token) and 'token_accuracy', both teacher-forced,
    are among them. A score of `metrics.py` comes with the ends of its
    confidence interval, if that was asked for.

    Args:
      params: all of the system's parameters.
      step: of the checkpoint, for the names of files.
      output_dir: predictions go to `eval/` in it; None writes none.
      control: one of `CONTROLS`.
      stop: called before each batch; raises to leave.
    """

    def put(batch: data.Batch) -> dict[str, jax.Array]:
      if stop:
        stop()
      if self._prompt_vocabulary is not None:
        batch = data.continuing(
          batch,
          self._prompt_vocabulary.prefix_ids,
          self._prompt_vocabulary.eos_ids,
        )
      if control == 'zero':
        rows = batch['encoder_input_tokens'].shape[0]
        batch = batch | {'llm_scale': np.zeros((rows,), np.float32)}
      return partition.put_batch(batch, self._mesh)

    def predict(batch: data.Batch) -> np.ndarray:
      row_ids = batch.pop('row_ids')
      return distributed.fetch(self.generator(prepared, put(batch), row_ids))

    prepared = self.generator.prepare(params)
    folder = None
    if output_dir is not None and distributed.is_first():
      folder = pathlib.Path(output_dir) / 'eval'
    by_task = self._by_seqio.evaluate(
      predict, control=control, step=step, output_dir=folder
    )
    for task in self._by_seqio.tasks:
      batches = self._by_seqio.batches(task, control)
      by_task[task.name] |= self._loss(params, map(put, batches))
    return {
      name if len(by_task) == 1 else f'{task}/{name}': value
      for task, scores in by_task.items()
      for name, value in scores.items()
    }

  def _loss(
    self, params: PyTree, batches: Iterable[dict[str, jax.Array]]
  ) -> dict[str, float]:
    """Returns teacher-forced loss (nats per target token) and accuracy."""
    sums: dict[str, float] = {}
    for batch in tqdm.tqdm(
      batches,
      desc='loss',
      unit='batch',
      leave=False,
      dynamic_ncols=True,
      disable=not distributed.is_first(),
    ):
      for name, value in self._loss_sums(params, batch).items():
        sums[name] = sums.get(name, 0.0) + float(value)
    tokens = max(sums['loss_weight'], 1.0)
    return {
      'loss': sums['loss'] / tokens,
      'token_accuracy': sums['num_correct'] / tokens,
    }


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
  max_decode_len: int | None = None,
  num_bootstrap_samples: int = 1000,
  output_dir: str | None = None,
  llm_path: str | None = None,
  vocabulary: str | None = None,
  extra_ids: int = 0,
  mesh: partition.MeshConfig | None = None,
  decoding: sampling.Decoding | None = None,
  *,
  dry_run: bool = False,
) -> dict[int, dict[str, dict[str, float]]]:
  """Evaluates one checkpoint of a run, or several, or a model as it came.

  Each evaluation is added to `eval/metrics-<task>-<split>.json` as it is done.
  From all that are there come a table, `eval/curves-<task>-<split>.png`, and
  TensorBoard's logs in `eval/tensorboard`.

  Args:
    checkpoint_path: the run's folder (MODEL_DIR of its training); or a Hugging
      Face or converted folder, a checkpoint of T5X, a GGUF file, or a name on
      the Hub.
    mixture_or_task_name: SeqIO task or mixture.
    task_feature_lengths: tokens of 'inputs' and 'targets'.
    batch_size: examples a batch, over all devices.
    steps: a checkpoint's step or a tuple of them, 'all', 'best' (the one that
      training chose by BEST_METRIC), or None for the newest.
    split: of the task.
    num_examples: the first so many; None takes all.
    controls: any of 'none', 'zero', 'other': Z of the prompt, Z = 0, Z of
      another prompt.
    max_decode_len: tokens an answer at most; None: that of 'targets'.
    num_bootstrap_samples: for 95 % confidence intervals; 0 for none.
    output_dir: where predictions and metrics go; None: the run's folder. A
      model as it came needs one.
    llm_path: where the LLM's weights are, if not where the run says.
    vocabulary: tokenizer of a model as it came that brings none.
    extra_ids: sentinels that T5 adds behind its SentencePiece model.
    mesh: device mesh and axis rules.
    decoding: how answers are written; None is greedy.
    dry_run: prints sizes and shardings, and stops.

  Returns:
    Scores by step and control.
  """
  gin_utils.check_positive(
    BATCH_SIZE=batch_size,
    num_examples=num_examples,
    max_decode_len=max_decode_len,
  )
  gin_utils.check_lengths(task_feature_lengths)
  gin_utils.check_between(
    0, gin_utils.LARGEST, EVAL_BOOTSTRAP_SAMPLES=num_bootstrap_samples
  )
  as_it_came.check_path(checkpoint_path)
  mesh_config = mesh or partition.MeshConfig()
  device_mesh = partition.make_mesh(mesh_config)
  partition.check_batch_size(batch_size, device_mesh)
  system = systems.with_rules(
    as_it_came.load(
      checkpoint_path,
      llm_path=llm_path,
      vocabulary=vocabulary,
      extra_ids=extra_ids,
    ),
    mesh_config,
  )
  folder = as_it_came.output_dir(checkpoint_path, output_dir, 'EVAL_OUTPUT_DIR')
  _check_controls(controls, system)
  decoding = decoding or sampling.Decoding()
  _check_decoding(decoding)
  generate.check(decoding, max_decode_len or task_feature_lengths['targets'])
  task = bind_task(system, mixture_or_task_name)
  if not dry_run:  # which needs no data
    check_splits(task, task_feature_lengths, evaluated=split)
  # The run may go on, and save, at this moment.
  chosen = distributed.from_first(_choose_steps(checkpoint_path, steps))

  with (
    partition.use_mesh(device_mesh),
    partition.axis_rules(mesh_config.rules('slm')),
    distributed.preemptible() as stop,
    contextlib.ExitStack() as opened,
  ):
    layout = parameters.layout(system, device_mesh, mesh_config)
    answer_length = max(max_decode_len or 0, task_feature_lengths['targets'])
    parameters.check_lengths(
      system,
      layout,
      {'inputs': task_feature_lengths['inputs'], 'targets': answer_length},
    )
    if dry_run:
      print(parameters.summary(system, layout, None, device_mesh))
      return {}
    evaluator = Evaluator(
      system,
      device_mesh,
      task,
      task_feature_lengths,
      split=split,
      batch_size=batch_size,
      num_examples=num_examples,
      max_decode_len=max_decode_len,
      decoding=decoding,
      num_bootstrap_samples=num_bootstrap_samples,
    )
    _, frozen = parameters.load_frozen(system, layout)
    stop()
    results: dict[int, dict[str, dict[str, float]]] = {}
    if distributed.is_first():
      opened.enter_context(locks.held(folder / 'eval', 'EVAL_OUTPUT_DIR'))
    name = f'{task.name}-{split}'
    # Scores are compared with those of the same settings alone.
    settings = {
      'decoding': _as_json(decoding),
      'num_examples': num_examples,
      'task_feature_lengths': dict(task_feature_lengths),
      'max_decode_len': max_decode_len or task_feature_lengths['targets'],
    }
    for step in chosen:
      params = state_lib.merge(
        frozen,
        parameters.load_trained(system, layout, checkpoint_path, step),
      )
      results[step] = {}
      for control in controls:
        scores = evaluator.evaluate(
          params, step=step, output_dir=folder, control=control, stop=stop
        )
        results[step][control] = scores
        label = '' if control == 'none' else f' (Z: {control})'
        signatures = evaluator.signatures
        line = format_scores(scores, signatures)
        print(f'step {step}{label}: {line}', flush=True)
        if distributed.is_first():
          _record(
            folder / 'eval' / f'metrics-{name}.json',
            step,
            control,
            scores | {'settings': settings, 'signatures': signatures},
          )
      if set(results[step]) == set(CONTROLS):
        print(report.describe_controls(results[step]), flush=True)
    if distributed.is_first():
      _write_curves(folder / 'eval', name, settings, evaluator.signatures)
    distributed.wait_for_all('evaluate')
  return results


def _as_json(decoding: sampling.Decoding) -> dict[str, Any]:
  """Returns what JSON keeps of settings; it knows no tuples."""
  return json.loads(json.dumps(dataclasses.asdict(decoding)))


def format_scores(
  scores: Mapping[str, float], signatures: Mapping[str, str]
) -> str:
  """Returns one line; scores with their signatures, for others to repeat them.

  Args:
    scores: by name.
    signatures: by name of a score, see `Evaluator.signatures`.
  """
  parts = []
  for name, value in scores.items():
    if report.is_interval_end(name, scores):
      continue
    text = (
      f'{name} {value}' if isinstance(value, int) else f'{name} {value:.4g}'
    )
    if f'{name}_low' in scores:
      text += f' [{scores[f"{name}_low"]:.4g}, {scores[f"{name}_high"]:.4g}]'
    if name in signatures:
      text += f' ({signatures[name]})'
    parts.append(text)
  return ', '.join(parts)


def _choose_steps(run_dir: str, steps: Any) -> list[int]:
  """Returns the steps to evaluate, all of which are there."""
  if steps == 'all':
    if not as_it_came.is_run(run_dir):
      return [as_it_came.choose_step(run_dir, steps, 'EVAL_STEPS')]  # raises
    found = distributed.from_first(checkpoint.steps(run_dir))
    bad = {step: checkpoint.problem(run_dir, step) for step in found}
    for wrong in filter(None, bad.values()):
      distributed.say(f'{wrong}: it is left out.')
    if all(bad.values()):
      checkpoint.params_folder(run_dir)  # raises: there is no good one
    return [step for step in found if not bad[step]]
  wanted = steps if isinstance(steps, tuple | list) else [steps]
  if not all(s is None or s == 'best' or isinstance(s, int) for s in wanted):
    raise ValueError(
      f'EVAL_STEPS={steps!r}: expected a step, a tuple of steps such as '
      "(1000, 2000), 'all', 'best', or None for the newest."
    )
  return [
    as_it_came.choose_step(run_dir, step, 'EVAL_STEPS') for step in wanted
  ]


def _check_controls(controls: Sequence[str], system: systems.System) -> None:
  allowed = CONTROLS if system.frozen else CONTROLS[:1]
  if isinstance(controls, str) or not set(controls) <= set(allowed):
    raise ValueError(
      f'EVAL_CONTROLS={controls!r}: expected a tuple of any of {CONTROLS} for '
      "an LLM-to-SLM run, and ('none',) for a language model alone."
    )


def _check_decoding(decoding: sampling.Decoding) -> None:
  if decoding.stop:
    raise ValueError(
      f'Decoding.stop={decoding.stop!r}: texts that end an answer are for '
      'infer. An evaluation scores what the model ends by itself; leave it '
      'out.'
    )
  if decoding.draft_len:
    raise ValueError(
      f'Decoding.draft_len={decoding.draft_len}: answers would be those of the '
      'LLM, whatever the SLM drafts. Evaluate the LLM, or set it to 0.'
    )


def _record(
  path: pathlib.Path, step: int, control: str, scores: Mapping[str, Any]
) -> None:
  """Adds scores to a metrics file, by step and control."""
  found = read_scores(path) if path.is_file() else {}
  found.setdefault(str(step), {})[control] = dict(scores)
  files.write_json(path, found)


def read_scores(path: pathlib.Path) -> dict[str, dict[str, dict[str, Any]]]:
  """Returns what a metrics file holds: scores by step and control.

  Raises:
    ValueError: if it is broken, naming the key.
  """
  remedy = 'remove it, and evaluate its steps again.'
  found = files.read_json(path, remedy=remedy, finite=False)
  for step, by_control in found.items():
    if not step.isdecimal():
      raise ValueError(f'{path}: key {step!r} is no step; {remedy}')
    files.check_keys(found, path, keys={step: dict}, remedy=remedy)
    for control, scores in by_control.items():
      place = f'{path}, step {step}'
      files.check_keys(by_control, place, keys={control: dict}, remedy=remedy)
      kinds = {
        k: dict if k in ('settings', 'signatures') else float for k in scores
      }
      place = f'{place}, {control}'
      files.check_keys(scores, place, keys=kinds, remedy=remedy)
  return found


def _write_curves(
  folder: pathlib.Path,
  name: str,
  settings: Mapping[str, Any],
  signatures: Mapping[str, str],
) -> None:
  """Makes a table, a plot and TensorBoard's logs of a metrics file.

  Evaluations with other settings, or scores with other signatures, stay in the
  file alone.
  """
  found = read_scores(folder / f'metrics-{name}.json')
  defaults = {'decoding': _as_json(sampling.Decoding())}
  by_control: dict[str, dict[int, dict[str, float]]] = {}
  for step in sorted(found, key=int):
    for control, scores in found[step].items():
      # Earlier versions kept no signatures, and had these.
      signed = scores.pop('signatures', signatures)
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
    report.plot_curves(by_control, path, title=name)
    print(f'See {path}')
