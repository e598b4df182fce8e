# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a system on a SeqIO task: loss, decoded metrics, controls."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np

from l2s_jax import (
  checkpoint,
  data,
  files,
  gin_utils,
  losses,
  metrics,
  parameters,
  partition,
  report,
  systems,
  tasks,
)
from l2s_jax import state as state_lib

PyTree = Any

# Which Z the SLM gets: that of the prompt, zero, or that of another prompt.
CONTROLS = ('none', 'zero', 'other')


def bind_task(system: systems.System, mixture_or_task_name: str) -> Any:
  """Returns a SeqIO task or mixture with a system's vocabularies."""
  # Imports TensorFlow where it is called; the core does without.
  return tasks.bind(
    mixture_or_task_name, system.prompt_vocabulary, system.answer_vocabulary
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
    """
    self.generator = systems.generator(
      system, max_decode_len or task_feature_lengths['targets']
    )
    self._mesh = mesh
    self._task = task
    self._reading: dict[str, Any] = {
      'task_feature_lengths': task_feature_lengths,
      'split': split,
      'batch_size': batch_size,
      'num_examples': num_examples,
    }

    def loss_sums(params, batch):
      logits = system.module.apply(
        {'params': params}, batch, deterministic=True
      )
      return losses.token_cross_entropy(
        logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
      )[1]

    self._loss_sums = jax.jit(loss_sums)

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
  ) -> dict[str, float]:
    """Returns the scores by name; of a mixture by 'task/name'.

    Without a control, 'loss' (nats per target token) and 'token_accuracy',
    both teacher-forced, are among them.

    Args:
      params: all of the system's parameters.
      step: of the checkpoint, for the names of files.
      output_dir: predictions go to `eval/` in it; None writes none.
      control: one of `CONTROLS`.
    """

    def predict(batch: Mapping[str, np.ndarray]) -> np.ndarray:
      batch = dict(batch)
      if control == 'zero':
        rows = batch['encoder_input_tokens'].shape[0]
        batch['llm_scale'] = np.zeros((rows,), np.float32)
      return np.asarray(
        self.generator(params, partition.put_batch(batch, self._mesh))
      )

    folder = None if output_dir is None else pathlib.Path(output_dir) / 'eval'
    by_task = self._by_seqio.evaluate(
      predict, control=control, step=step, output_dir=folder
    )
    if control == 'none':
      for task in self._by_seqio.tasks:
        by_task[task.name] |= self._loss(params, task)
    return {
      name if len(by_task) == 1 else f'{task}/{name}': value
      for task, scores in by_task.items()
      for name, value in scores.items()
    }

  def _loss(self, params: PyTree, task: Any) -> dict[str, float]:
    """Returns teacher-forced loss (nats per target token) and accuracy."""
    sums: dict[str, float] = {}
    for batch in data.eval_batches(task, **self._reading):
      step_sums = self._loss_sums(
        params, partition.put_batch(batch, self._mesh)
      )
      for name, value in step_sums.items():
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
  output_dir: str | None = None,
  llm_path: str | None = None,
  mesh: partition.MeshConfig | None = None,
  *,
  dry_run: bool = False,
) -> dict[int, dict[str, dict[str, float]]]:
  """Evaluates one checkpoint of a run, or all.

  Args:
    checkpoint_path: the run's folder (MODEL_DIR of its training).
    mixture_or_task_name: SeqIO task or mixture.
    task_feature_lengths: tokens of 'inputs' and 'targets'.
    batch_size: examples a batch, over all devices.
    steps: a checkpoint's step, 'all', or None for the newest.
    split: of the task.
    num_examples: the first so many; None takes all.
    controls: any of 'none', 'zero', 'other': Z of the prompt, Z = 0, Z of
      another prompt.
    max_decode_len: tokens an answer at most; None: that of 'targets'.
    output_dir: where predictions and metrics go; None: the run's folder.
    llm_path: where the LLM's weights are, if not where the run says.
    mesh: device mesh and axis rules.
    dry_run: prints sizes and shardings, and stops.

  Returns:
    Scores by step and control.
  """
  gin_utils.check_positive(
    BATCH_SIZE=batch_size,
    num_examples=num_examples,
    max_decode_len=max_decode_len,
  )
  systems.local_folder(checkpoint_path, 'CHECKPOINT_PATH')
  mesh_config = mesh or partition.MeshConfig()
  device_mesh = partition.make_mesh(mesh_config)
  partition.check_batch_size(batch_size, device_mesh)
  system = systems.with_rules(
    systems.load(checkpoint_path, llm_path=llm_path), mesh_config
  )
  _check_controls(controls, system)
  task = bind_task(system, mixture_or_task_name)
  check_splits(task, task_feature_lengths, evaluated=split)
  newest = checkpoint.params_folder(
    checkpoint_path, None if steps == 'all' else steps
  )[1]
  chosen = checkpoint.steps(checkpoint_path) if steps == 'all' else [newest]

  with (
    partition.use_mesh(device_mesh),
    partition.axis_rules(mesh_config.rules('slm')),
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
    )
    _, frozen = parameters.load_frozen(system, layout)
    results: dict[int, dict[str, dict[str, float]]] = {}
    folder = pathlib.Path(output_dir or checkpoint_path)
    for step in chosen:
      params = state_lib.merge(
        frozen, parameters.load_trained(system, layout, checkpoint_path, step)
      )
      results[step] = {}
      for control in controls:
        scores = evaluator.evaluate(
          params, step=step, output_dir=folder, control=control
        )
        results[step][control] = scores
        label = '' if control == 'none' else f' (Z: {control})'
        print(f'step {step}{label}: {format_scores(scores)}', flush=True)
        _record(
          folder / 'eval' / f'metrics-{mixture_or_task_name}-{split}.json',
          step,
          control,
          scores,
        )
      bleu = {
        name: row['bleu']
        for name, row in results[step].items()
        if 'bleu' in row
      }
      if set(bleu) == set(CONTROLS):
        print(report.describe_controls(**bleu))
  return results


def format_scores(scores: Mapping[str, float]) -> str:
  """Returns one line; BLEU with its signature, as others can repeat it."""
  text = ', '.join(f'{name} {value:.4g}' for name, value in scores.items())
  if any(name.split('/')[-1] == 'bleu' for name in scores):
    text += f' [{metrics.bleu_signature()}]'
  return text


def _check_controls(controls: Sequence[str], system: systems.System) -> None:
  allowed = CONTROLS if system.frozen else CONTROLS[:1]
  if isinstance(controls, str) or not set(controls) <= set(allowed):
    raise ValueError(
      f'EVAL_CONTROLS={controls!r}: expected a tuple of any of {CONTROLS} for '
      "an LLM-to-SLM run, and ('none',) for a language model alone."
    )


def _record(
  path: pathlib.Path, step: int, control: str, scores: Mapping[str, float]
) -> None:
  """Adds scores to a metrics file, by step and control."""
  found = json.loads(path.read_text()) if path.is_file() else {}
  found.setdefault(str(step), {})[control] = dict(scores)
  files.write_json(path, found)
