# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a system's parameters, during and after training."""

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from l2s_jax.data import batching, bound_tasks
from l2s_jax.evaluation import controls, report
from l2s_jax.inference import generate, sampling
from l2s_jax.metrics import length_bins as length_bins_lib
from l2s_jax.metrics import metric_fns
from l2s_jax.models import losses
from l2s_jax.runtime import distributed, partitioning, storage
from l2s_jax.systems import system as system_lib

PyTree = Any

CONTROLS = controls.CONTROLS

Stop = Callable[[], None]


class Evaluator:
  """Evaluates a system on one split, any number of times.

  Programs are compiled once. The loss is teacher-forced. Metrics of decoded
  answers are those of the task, computed by SeqIO's Evaluator, which tokenizes
  the split once.
  """

  def __init__(
    self,
    system: system_lib.System,
    mesh: jax.sharding.Mesh,
    task: bound_tasks.BoundTask,
    task_feature_lengths: Mapping[str, int],
    *,
    split: str,
    batch_size: int,
    num_examples: int | None = None,
    max_decode_len: int | None = None,
    decoding: sampling.Decoding | None = None,
    num_bootstrap_samples: int = 0,
    length_bins: Sequence[int] = (),
    generator: generate.Generator | None = None,
  ):
    """Configures the evaluation, without compilation or reading of data.

    Args:
      system: the system to evaluate.
      mesh: the device mesh.
      task: from `session.bind_task`.
      task_feature_lengths: maximum tokens of 'inputs' and 'targets'.
      split: split of the task.
      batch_size: global batch size.
      num_examples: number of examples of each task, from the start of the
        split; None takes all.
      max_decode_len: maximum tokens of an answer; None takes the length of
        'targets'.
      decoding: decoding strategy; None is greedy.
      num_bootstrap_samples: bootstrap samples for confidence intervals; 0 for
        none.
      length_bins: upper bounds, in words of the reference, of all bins but the
        last, for metrics by length; () for none.
      generator: generator of another evaluator with the same system, settings
        and decode length, to share compiled programs; None creates one.
    """
    self.generator = generator or generate.generator(
      system,
      max_decode_len or task_feature_lengths['targets'],
      decoding=decoding,
      unstack_llm=False,  # A copy may not fit beside the training state.
    )
    self._mesh = mesh
    # For systems whose answers continue the prompt.
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
      'length_bins': length_bins,
    }

    def loss_sums(params, batch):
      logits = system.module.apply(
        {'params': params}, batch, deterministic=True
      )
      return losses.token_cross_entropy(
        logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
      )[1]

    self._loss_sums = jax.jit(loss_sums)
    self._states = controls.ControlStates(system)

  @property
  def signatures(self) -> dict[str, str]:
    """Signatures of the last metrics, by name; ROUGE's under rougeLsum."""
    by_task = self._by_seqio.signatures
    return {
      name if len(by_task) == 1 else f'{task}/{name}': signature
      for task, signatures in by_task.items()
      for name, signature in signatures.items()
    }

  @property
  def by_length(self) -> dict[str, length_bins_lib.ScoresByBin]:
    """The last metrics of decoded answers, by task and length bin."""
    return self._by_seqio.by_length

  @functools.cached_property
  def _by_seqio(self) -> Any:
    from l2s_jax.evaluation import seqio_evaluator

    return seqio_evaluator.TaskEvaluator(self._task, **self._reading)

  def evaluate(
    self,
    params: PyTree,
    *,
    step: int,
    output_dir: str | pathlib.Path | None = None,
    control: str = 'none',
    stop: Stop | None = None,
  ) -> dict[str, float]:
    """Returns metrics by name; for a mixture, by 'task/name'.

    They include 'loss' (nats per target token) and 'token_accuracy', both
    teacher-forced. Metrics of `metrics/metric_fns.py` have the ends of their
    confidence intervals, if requested. All processes must call it.

    Args:
      params: all parameters of the system.
      step: step of the checkpoint, for file names.
      output_dir: predictions are written to `eval/` in it; None writes none.
      control: one of `CONTROLS`.
      stop: called before each batch; may raise to stop the evaluation.
    """
    read = self._states.reader(params, control)

    def put(batch: batching.Batch) -> dict[str, jax.Array]:
      if stop:
        stop()
      if self._prompt_vocabulary is not None:
        batch = batching.continuing(
          batch,
          self._prompt_vocabulary.prefix_ids,
          self._prompt_vocabulary.eos_ids,
        )
      if control == 'zero':
        rows = batch['encoder_input_tokens'].shape[0]
        batch = batch | {'llm_scale': np.zeros((rows,), np.float32)}
      on_devices = partitioning.put_batch(batch, self._mesh)
      return on_devices if read is None else on_devices | read(on_devices)

    def predict(batch: batching.Batch) -> np.ndarray:
      row_ids = batch.pop('row_ids')
      return distributed.fetch(self.generator(prepared, put(batch), row_ids))

    prepared = self.generator.prepare(params)
    folder = None
    if output_dir is not None and distributed.is_first():
      folder = storage.of(output_dir) / 'eval'
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


def score_names(task: bound_tasks.BoundTask, split: str) -> list[str] | None:
  """Returns the names of the scores of an evaluation.

  Names of a mixture are 'task/score'. Returns None if a task has metrics other
  than those of `metrics/metric_fns.py`, whose names are unknown.

  Args:
    task: from `session.bind_task`.
    split: split of the task.
  """
  by_task = task.metrics_of(split)
  names = []
  for task_name, metrics in by_task.items():
    scores = ['loss', 'token_accuracy']
    for function in metrics:
      if not isinstance(function, metric_fns.Metric):
        return None
      scores += function.score_names
    prefix = f'{task_name}/' if len(by_task) > 1 else ''
    names += [prefix + score for score in scores]
  return names


def format_scores(
  scores: Mapping[str, float], signatures: Mapping[str, str]
) -> str:
  """Formats metrics in one line, with intervals and signatures.

  Args:
    scores: metrics by name.
    signatures: signatures by name, see `Evaluator.signatures`.
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
