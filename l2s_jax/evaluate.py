# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a system on a SeqIO task: loss, decoded metrics, controls."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import gin
import jax
import numpy as np

from l2s_jax import (
  checkpoint,
  data,
  losses,
  parameters,
  partition,
  systems,
)

PyTree = Any

# Which Z the SLM gets: that of the prompt, zero, or that of another prompt.
CONTROLS = ('none', 'zero', 'other')


class Evaluator:
  """Evaluates one system on one split, as often as asked.

  Data are read and functions compiled once. Loss is teacher-forced; the
  decoded metrics are those of the task, by SeqIO's Evaluator.
  """

  def __init__(
    self,
    system: systems.System,
    mesh: jax.sharding.Mesh,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    *,
    split: str,
    batch_size: int,
    num_examples: int | None = None,
    max_decode_len: int | None = None,
  ):
    """Prepares the evaluation.

    Args:
      system: what to evaluate.
      mesh: the device mesh.
      mixture_or_task_name: SeqIO task or mixture.
      task_feature_lengths: tokens of 'inputs' and 'targets'.
      split: of the task.
      batch_size: examples a batch, over all devices.
      num_examples: the first so many; None takes all.
      max_decode_len: tokens an answer at most; None: that of 'targets'.
    """
    # These import TensorFlow, which the core does without.
    from l2s_jax import evaluation, tasks

    self.task = tasks.bind(
      mixture_or_task_name, system.prompt_vocabulary, system.answer_vocabulary
    )
    self.system = system
    self.mesh = mesh
    self.split = split
    self._lengths = task_feature_lengths
    self._batch_size = batch_size
    self._num_examples = num_examples
    self.generator = systems.generator(
      system, max_decode_len or task_feature_lengths['targets']
    )
    self._make_task_evaluator = lambda: evaluation.TaskEvaluator(
      self.task,
      task_feature_lengths=task_feature_lengths,
      split=split,
      batch_size=batch_size,
      num_examples=num_examples,
    )
    self._task_evaluator: Any = None
    self._loss_step = jax.jit(self._loss_sums)

  def evaluate(
    self,
    params: PyTree,
    *,
    step: int,
    output_dir: str | pathlib.Path | None = None,
    control: str = 'none',
    with_loss: bool = True,
  ) -> dict[str, float]:
    """Returns the scores by name; one task's are not prefixed by its name.

    Args:
      params: all of the system's parameters.
      step: of the checkpoint, for the names of files.
      output_dir: predictions go to `eval/` in it; None writes none.
      control: one of `CONTROLS`.
      with_loss: also compute the teacher-forced loss, 'loss', in nats per
        target token.
    """
    if self._task_evaluator is None:
      self._task_evaluator = self._make_task_evaluator()

    def predict(batch: Mapping[str, np.ndarray]) -> np.ndarray:
      batch = dict(batch)
      if control == 'zero':
        rows = batch['encoder_input_tokens'].shape[0]
        batch['llm_scale'] = np.zeros((rows,), np.float32)
      return np.asarray(
        self.generator(params, partition.put_batch(batch, self.mesh))
      )

    by_task = self._task_evaluator.evaluate(
      predict,
      control=control,
      step=step,
      output_dir=None
      if output_dir is None
      else pathlib.Path(output_dir) / 'eval',
    )
    scores = {
      name if len(by_task) == 1 else f'{task}/{name}': value
      for task, metrics in by_task.items()
      for name, value in metrics.items()
    }
    if with_loss and control == 'none':
      scores |= self.loss(params)
    return scores

  def loss(self, params: PyTree) -> dict[str, float]:
    """Returns teacher-forced loss (nats per target token) and accuracy."""
    sums: dict[str, float] = {}
    for batch in data.eval_batches(
      self.task,
      task_feature_lengths=self._lengths,
      batch_size=self._batch_size,
      split=self.split,
      num_examples=self._num_examples,
    ):
      step_sums = self._loss_step(params, partition.put_batch(batch, self.mesh))
      for name, value in step_sums.items():
        sums[name] = sums.get(name, 0.0) + float(value)
    tokens = max(sums['loss_weight'], 1.0)
    return {
      'loss': sums['loss'] / tokens,
      'token_accuracy': sums['num_correct'] / tokens,
    }

  def _loss_sums(self, params, batch):
    logits = self.system.module.apply(
      {'params': params}, batch, deterministic=True
    )
    return losses.token_cross_entropy(
      logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
    )[1]


@gin.configurable(module='l2s_jax')
def evaluate(
  checkpoint_path: str = gin.REQUIRED,
  mixture_or_task_name: str = gin.REQUIRED,
  task_feature_lengths: Mapping[str, int] = gin.REQUIRED,
  batch_size: int = 32,
  steps: Any = None,
  split: str = 'validation',
  num_examples: int | None = None,
  controls: tuple[str, ...] = ('none',),
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
  mesh_config = mesh or partition.MeshConfig()
  device_mesh = partition.make_mesh(mesh_config)
  partition.check_batch_size(batch_size, device_mesh)
  system = systems.with_rules(
    systems.load(checkpoint_path, llm_path=llm_path), mesh_config
  )
  for control in controls:
    if control not in CONTROLS or (control != 'none' and not system.frozen):
      raise ValueError(
        f'evaluate.controls has {control!r}; an LLM-to-SLM run takes any of '
        f"{CONTROLS}, a language model alone only 'none'."
      )
  if steps == 'all':
    chosen = checkpoint.steps(checkpoint_path)
  else:
    chosen = [checkpoint.params_folder(checkpoint_path, steps)[1]]

  with (
    partition.use_mesh(device_mesh),
    partition.axis_rules(mesh_config.rules('slm')),
  ):
    layout = parameters.layout(system, device_mesh, mesh_config)
    parameters.check_lengths(system, layout, task_feature_lengths)
    if dry_run:
      print(parameters.summary(system, layout, None, device_mesh))
      return {}
    evaluator = Evaluator(
      system,
      device_mesh,
      mixture_or_task_name,
      task_feature_lengths,
      split=split,
      batch_size=batch_size,
      num_examples=num_examples,
      max_decode_len=max_decode_len,
    )
    results: dict[int, dict[str, dict[str, float]]] = {}
    folder = pathlib.Path(output_dir or checkpoint_path)
    for step in chosen:
      params = parameters.load_params(system, layout, checkpoint_path, step)
      results[step] = {}
      for control in controls:
        scores = evaluator.evaluate(
          params, step=step, output_dir=folder, control=control
        )
        results[step][control] = scores
        label = '' if control == 'none' else f' (Z: {control})'
        print(
          f'step {step}{label}: '
          + ', '.join(f'{name} {value:.4g}' for name, value in scores.items())
        )
    print(f'BLEU signature: {_bleu_signature()}')
    (folder / 'eval').mkdir(parents=True, exist_ok=True)
    systems.write_json(
      folder / 'eval' / f'metrics-{mixture_or_task_name}-{split}.json',
      json.loads(json.dumps(results)),
    )
    return results


def _bleu_signature() -> str:
  from l2s_jax import metrics

  return metrics.bleu_signature()
