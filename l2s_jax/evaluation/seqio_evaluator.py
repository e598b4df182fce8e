# SPDX-License-Identifier: Apache-2.0
"""Metrics of a model's answers by SeqIO's Evaluator, on the raw text.

Given a function from batches to token ids, this module computes metrics, writes
predictions, counts truncations, and provides the batches for the loss. The
caller chooses the model and the decoding.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Int

from l2s_jax.data import batching, bound_tasks, features
from l2s_jax.data.features import seqio, tf
from l2s_jax.inference import length_buckets, predictions
from l2s_jax.metrics import length_bins as length_bins_lib
from l2s_jax.metrics import metric_fns
from l2s_jax.runtime import distributed, storage

# Temporary registry name under which SeqIO's Evaluator finds a bound task.
_REGISTERED_NAME = 'l2s_jax:bound'
# Fewer batches do not repay the compilation of several shapes.
_FEWEST_BATCHES_TO_SORT = 8

Predict = Callable[[batching.Batch], Int[np.ndarray, 'batch steps']]


class TaskEvaluator:
  """Evaluates a split of a task, tokenized once, any number of times.

  The tasks of a mixture are evaluated one by one, without those that lack the
  split or metrics.
  """

  def __init__(
    self,
    task: bound_tasks.BoundTask,
    *,
    task_feature_lengths: Mapping[str, int],
    split: str,
    batch_size: int,
    num_examples: int | None = None,
    num_bootstrap_samples: int = 0,
    length_bins: Sequence[int] = (),
  ):
    """Reads and tokenizes the split.

    Args:
      task: from `bound_tasks.bind`.
      task_feature_lengths: maximum tokens of `inputs` and `targets`. Longer
        prompts are truncated; references are not.
      split: `validation`, `test`, or another.
      batch_size: rows of a predicted batch.
      num_examples: number of examples of each task, from the start of the
        split; None takes all.
      num_bootstrap_samples: bootstrap samples for confidence intervals, see
        `corpus.with_intervals`; 0 for none.
      length_bins: upper bounds, in words of the reference, of all bins but the
        last, for metrics by length; () for none.

    Raises:
      ValueError: if the task is not bound, no task has the split and metrics, a
        task is empty, drops its raw answers, or has metrics that need more than
        predictions.
    """
    # Signatures of the last evaluation, by task and metric.
    self.signatures: dict[str, dict[str, str]] = {}
    # Metrics of the last evaluation by task and bin, if they are sums over
    # examples.
    self.by_length: dict[str, length_bins_lib.ScoresByBin] = {}
    self._length_bins = length_bins
    self._num_bootstrap_samples = num_bootstrap_samples
    self._task = task
    self._task_feature_lengths = task_feature_lengths
    self._split = split
    self._batch_size = batch_size
    scored = task.scored_tasks(split)
    if num_bootstrap_samples:
      scored = [_with_intervals(part, num_bootstrap_samples) for part in scored]
    mixture = seqio.Mixture(_REGISTERED_NAME, [(part, 1.0) for part in scored])
    seqio.MixtureRegistry.add_provider(_REGISTERED_NAME, mixture)
    try:
      with features.plain_errors():
        self._evaluator = seqio.Evaluator(
          _REGISTERED_NAME,
          features.make_converter(mixture),
          eval_split=split,
          sequence_length=task_feature_lengths,
          num_examples=num_examples,
          async_compute_metrics=False,
        )
    finally:
      seqio.MixtureRegistry.remove(_REGISTERED_NAME)
    for name, dataset in self._evaluator.cached_task_datasets.items():
      if not len(dataset):
        raise ValueError(f'task {name!r} has no examples in split {split!r}.')
      if 'targets_pretokenized' not in dataset.element_spec:
        raise ValueError(
          f'task {name!r} drops the raw answers, which are the references of '
          'metrics; set copy_pretokenized=True of '
          'seqio.preprocessors.tokenize.'
        )

  @property
  def tasks(self) -> Sequence[seqio.Task]:
    """The bound tasks that are evaluated."""
    return self._evaluator.eval_tasks

  def batches(
    self, task: seqio.Task, control: str = 'none'
  ) -> Iterator[batching.Batch]:
    """Yields the batches of a task's split as `evaluate` predicts them.

    Each example occurs once; the last batch is filled with copies. With many
    batches, examples are sorted by prompt length, longest first, and padded as
    little as necessary.

    Args:
      task: one of `tasks`.
      control: `other` adds `llm_input_tokens` and `llm_segment_ids` of another
        example; other controls change nothing.
    """
    dataset = self._evaluator.cached_model_datasets[task.name]
    for _, batch in self._batches(task.name, _stack(dataset)[1], control):
      yield batch

  def evaluate(
    self,
    predict: Predict,
    *,
    step: int,
    control: str = 'none',
    output_dir: str | os.PathLike[str] | None = None,
  ) -> dict[str, dict[str, float]]:
    """Returns the metrics of each task, with counts of its examples.

    The counts are `num_examples`; `num_truncated_prompts` and
    `num_truncated_targets`, which exceed their feature length (references are
    still scored in full); `num_without_eos`, answers without EOS; and, if
    `postprocess_fn` returns several references, the `min_references` and
    `max_references` per example.

    Args:
      predict: function from a batch of `batch_size` rows to token ids, [batch,
        steps]; the first EOS ends an answer. The batch has the keys of
        `batches`, and `row_ids` with the positions of the examples in the
        split. An exception of `predict` ends the evaluation before any file is
        written.
      step: step of the checkpoint, for the file name.
      control: see `batches`; also part of the file name.
      output_dir: output folder of `<task>-<split>-<step>[-<control>].jsonl`,
        with a line for each example: `prompt`, `prediction` and `target` as
        text, and all `references` if there are several. None writes no file, as
        on all processes but one.

    Raises:
      ValueError: if `predict` returns another shape than [batch, steps].
    """
    task_metrics, outputs = self._evaluator.evaluate(
      compute_metrics=True,
      step=step,
      predict_fn=functools.partial(self._predict, predict, control),
    )
    results = {}
    for task in self._evaluator.eval_tasks:
      (answers,) = outputs[task.name].values()
      examples = list(
        self._evaluator.cached_task_datasets[task.name].as_numpy_iterator()
      )
      vocabulary = task.output_features['targets'].vocabulary
      targets = [_target(task, example) for example in examples]
      self.signatures[task.name] = metric_fns.signatures(
        task.metric_fns, targets
      )
      references = [
        [text for text in target if isinstance(text, str)]
        if isinstance(target, list | tuple)
        else []
        for target in targets
      ]
      if self._length_bins:
        self.by_length[task.name] = self._scores_by_length(
          task, examples, targets, answers
        )
      num_references = [len(texts) for texts in references if texts]
      results[task.name] = {
        **_scalars(task_metrics.result()[task.name]),
        'num_examples': len(examples),
        'num_truncated_prompts': self._count_longer(examples, 'inputs'),
        'num_truncated_targets': self._count_longer(examples, 'targets'),
        'num_without_eos': sum(
          not set(vocabulary.eos_ids) & set(ids) for ids in answers
        ),
      }
      if num_references:
        results[task.name] |= {
          'min_references': min(num_references),
          'max_references': max(num_references),
        }
      if output_dir is not None:
        suffix = '' if control == 'none' else f'-{control}'
        _write_predictions(
          storage.of(output_dir)
          / (f'{task.name}-{self._split}-{step}{suffix}.jsonl'),
          examples,
          [vocabulary.decode(ids) for ids in answers],
          references,
        )
    return results

  def _scores_by_length(
    self,
    task: 'seqio.Task',
    examples: Sequence[Mapping[str, Any]],
    targets: Sequence[Any],
    predictions: Sequence[Int[np.ndarray, ' steps']],
  ) -> length_bins_lib.ScoresByBin:
    """Returns metrics by reference length."""
    vocabulary = task.output_features['targets'].vocabulary
    answers = [
      task.postprocess_fn(
        vocabulary.decode(ids), example=example, is_target=False
      )
      for ids, example in zip(predictions, examples, strict=True)
    ]
    return length_bins_lib.scores(
      task.metric_fns,
      targets,
      answers,
      self._length_bins,
      num_samples=self._num_bootstrap_samples,
    )

  def _predict(
    self, predict: Predict, control: str, dataset: tf.data.Dataset
  ) -> list[tuple[int, Int[np.ndarray, ' steps']]]:
    """Returns index and token ids of each example, as SeqIO expects."""
    (name,) = (
      name
      for name, own in self._evaluator.cached_model_datasets.items()
      if own is dataset
    )
    indices, examples = _stack(dataset)
    predictions: list[Any] = [None] * len(indices)
    for rows, batch in tqdm.tqdm(
      self._batches(name, examples, control),
      total=-(-len(indices) // self._batch_size),
      desc='decoding',
      unit='batch',
      leave=False,
      dynamic_ncols=True,
      disable=not distributed.is_first(),
    ):
      row_ids = np.resize(rows, self._batch_size).astype(np.int32)
      ids = np.asarray(predict(batch | {'row_ids': row_ids}))
      if ids.ndim != 2 or len(ids) != self._batch_size:
        raise ValueError(
          f'predict returned shape {ids.shape}, expected '
          f'({self._batch_size}, steps).'
        )
      for row, answer in zip(rows, ids, strict=False):  # without padding rows
        predictions[row] = answer
    return list(zip(indices.tolist(), predictions, strict=True))

  def _batches(
    self, name: str, examples: batching.Batch, control: str
  ) -> Iterator[tuple[Int[np.ndarray, ' rows'], batching.Batch]]:
    """Yields positions in the split, and the batch of these examples.

    Args:
      name: name of the task.
      examples: all examples of the split, in order.
      control: see `batches`.
    """
    # For each example, the index of the example whose prompt the LLM reads.
    read = np.arange(len(examples['encoder_segment_ids']))
    if control == 'other':
      read = np.array(_partners(examples))
      examples = examples | {
        f'llm_{key}': examples[f'encoder_{key}'][read]
        for key in ('input_tokens', 'segment_ids')
      }
    is_read = {key: not key.startswith('decoder') for key in examples}
    sizes = np.max(
      [
        (value > 0).sum(axis=1)
        for key, value in examples.items()
        if is_read[key] and key.endswith('segment_ids')
      ],
      axis=0,
    )
    longest = self._task_feature_lengths['inputs']
    lengths, order = [longest], np.arange(len(sizes))
    if len(sizes) >= _FEWEST_BATCHES_TO_SORT * self._batch_size:
      lengths = length_buckets.lengths(longest)
      order = np.argsort(-sizes, kind='stable')
    for start in range(0, len(order), self._batch_size):
      rows = order[start : start + self._batch_size]
      length = min(size for size in lengths if size >= sizes[rows].max())
      batch = {
        key: value[rows, :length] if is_read[key] else value[rows]
        for key, value in examples.items()
      }
      batch |= self._task.llm_states(
        name,
        self._split,
        read[rows],
        batch.get('llm_segment_ids', batch['encoder_segment_ids']),
      )
      yield rows, batching.pad_rows(batch, self._batch_size)

  def _count_longer(self, examples: list[dict[str, Any]], key: str) -> int:
    length = self._task_feature_lengths[key]
    return sum(int(example[f'{key}_length']) > length for example in examples)


def _with_intervals(task: seqio.Task, num_samples: int) -> seqio.Task:
  return task.replace(
    metric_fns=[
      metric_fns.with_intervals(metric_fn, num_samples=num_samples)
      for metric_fn in task.metric_fns
    ]
  )


def _stack(dataset: tf.data.Dataset) -> tuple[np.ndarray, batching.Batch]:
  """Returns the indices and all rows of a cached, enumerated dataset."""
  indices, examples = next(dataset.batch(len(dataset)).as_numpy_iterator())
  return indices, {
    key: value
    for key, value in examples.items()
    if not key.endswith('_truncated')
  }


def _partners(examples: batching.Batch) -> list[int]:
  """Returns for each example the index of one with another prompt."""
  return batching.control_partners(
    [
      row[segments > 0].tolist()
      for row, segments in zip(
        examples['encoder_input_tokens'],
        examples['encoder_segment_ids'],
        strict=True,
      )
    ]
  )


def _target(task: seqio.Task, example: Mapping[str, Any]) -> Any:
  """Returns the target of an example, as the task's metrics take it."""
  return task.postprocess_fn(
    example['targets_pretokenized'].decode(), example=example, is_target=True
  )


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
  """Returns the scalar metrics; texts and images are for SeqIO's loggers."""
  values = {
    name: value.value if isinstance(value, seqio.metrics.Scalar) else value
    for name, value in values.items()
  }
  return {
    name: float(value)
    for name, value in values.items()
    if not isinstance(value, seqio.metrics.MetricValue)
  }


def _write_predictions(
  path: pathlib.Path,
  examples: list[dict[str, Any]],
  answers: list[str],
  references: list[list[str]],
) -> None:
  """Writes predictions as JSONL, a line for each example."""
  lines = []
  for example, answer, texts in zip(examples, answers, references, strict=True):
    line = {
      'prompt': example['inputs_pretokenized'].decode(),
      'prediction': answer,
      'target': example['targets_pretokenized'].decode(),
    }
    lines.append(line | ({'references': texts} if texts else {}))
  predictions.write(path, lines)
