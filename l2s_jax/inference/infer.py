# SPDX-License-Identifier: Apache-2.0
"""Inference: prompts in, JSON lines out, in input order.

Every input line has one output line; a line that cannot be answered gets the
reason in its place. `prompt_source.py` describes the input, `pipeline.py` and
`answerer.py` answer it, and `predictions.py` writes so that a stopped job
resumes. This module has the verb that joins them.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal

import gin
import jax

from l2s_jax.inference import (
  answer_settings,
  pipeline,
  predictions,
  prompt_source,
  prompts,
  sampling,
)
from l2s_jax.metrics import metric_fns
from l2s_jax.runtime import distributed, files, partitioning
from l2s_jax.systems import session as session_lib


@gin.configurable(module='l2s_jax')
def infer(
  checkpoint_path: str = gin.REQUIRED,
  input: str = gin.REQUIRED,
  output_dir: str | None = None,
  prompt_length: int = gin.REQUIRED,
  max_decode_len: int = gin.REQUIRED,
  batch_size: int = 32,
  step: int | Literal['best'] | None = None,
  prompt_column: str = 'prompt',
  template: str = '{prompt}',
  fallback_template: str | None = None,
  column_names: Sequence[str] | None = None,
  bad_lines: str = 'keep',
  split: str = 'test',
  metrics: Sequence[str] = (),
  target_column: str = 'target',
  shard: int = 0,
  num_shards: int = 1,
  llm_path: str | None = None,
  vocabulary: str | None = None,
  extra_ids: int = 0,
  mesh: partitioning.MeshConfig | None = None,
  decoding: sampling.Decoding | None = None,
  max_decode_len_column: str | None = None,
  stream: str | None = None,
  *,
  dry_run: bool = False,
) -> None:
  """Writes answers to prompts as JSON lines, one per input line, in order.

  A line has the columns of its input line, `prompt` and `prediction`. For an
  input line that cannot be answered, it has `line` (the line number), `error`,
  and null as `prediction`. With `Decoding.num_answers` it also has
  `predictions`, the best first, and their `scores`; with `Decoding.log_probs`
  the `score`, `token_ids` and `token_log_probs` of the best. Scores and
  log-probabilities may differ in the last digits between batch sizes. The same
  command resumes where it was stopped; `predictions.py` describes the output
  folder.

  Args:
    checkpoint_path: the run's folder (MODEL_DIR of its training); or a Hugging
      Face or converted folder, a T5X checkpoint, a GGUF file, or a name on the
      Hub.
    input: a file of text, .jsonl, .ndjson, .json, .tsv, .csv, .parquet or
      .tfrecord (each may be .gz), `task:NAME` for a SeqIO task, or `-` for
      standard input, answered line by line.
    output_dir: the folder of `predictions.jsonl`, local or in a bucket; None,
      or input `-`, writes to standard output.
    prompt_length: maximum number of prompt tokens; longer prompts are
      truncated, marked and counted.
    max_decode_len: maximum number of answer tokens.
    batch_size: prompts per batch at the full `prompt_length`; batches of
      shorter prompts have more rows in the same memory. Standard input is
      answered one line at a time.
    step: checkpoint step; None means the newest, 'best' the best by
      BEST_METRIC.
    prompt_column: the column for `{prompt}` in the template; a nested column is
      written `translation.en`.
    template: the prompt, with columns in braces, such as 'translate English to
      German: {prompt}'. A task has its own.
    fallback_template: template for lines without text in one of the columns
      that only `template` names; None makes such lines bad.
    column_names: column names of a TSV or CSV file without a header line.
    bad_lines: 'keep' writes an error in place of the answer and goes on;
      'refuse' stops before any computation.
    split: split of a task.
    metrics: names of metrics (`metrics/metric_fns.py` and `scores.functions`)
      to score the answers with; `scores` has their settings.
    target_column: the column to score against: text, or a list of references.
      A task's is `target`.
    shard: index of the part of the input to answer, out of `num_shards`
      contiguous parts. The concatenated files of all shards equal the file of
      an unsharded run.
    num_shards: number of shards.
    llm_path: location of the LLM's weights, if not the one saved in the run.
    vocabulary: tokenizer of a pretrained model without one.
    extra_ids: T5's sentinel ids behind its SentencePiece model.
    mesh: device mesh and axis rules.
    decoding: decoding settings; None means greedy. A sample depends only on the
      seed and on the index of its input line.
    max_decode_len_column: column of a file with the largest number of answer
      tokens for each line, at most `max_decode_len`.
    stream: for standard input: 'jsonl' writes lines {"delta": TEXT} as tokens
      are decoded, before the full line; 'text' writes only the text.
    dry_run: print sizes and shardings, then stop.
  """
  answering = answer_settings.Answering(
    checkpoint_path,
    step,
    llm_path=llm_path,
    vocabulary=vocabulary,
    extra_ids=extra_ids,
    prompt_length=prompt_length,
    max_decode_len=max_decode_len,
    batch_size=batch_size,
    decoding=decoding or sampling.Decoding(),
  )
  source = prompt_source.PromptSource(
    input,
    split=split,
    prompt_column=prompt_column,
    template=template,
    fallback_template=fallback_template,
    column_names=column_names,
    bad_lines=bad_lines,
    target_column=target_column,
    max_decode_len=max_decode_len,
    max_decode_len_column=max_decode_len_column,
  )
  part = predictions.Shard(shard, num_shards)
  source.check_shard(part)
  _check_stream(stream, source, answering.decoding)
  folder = _output_folder(output_dir)
  scored_by = _scored_by(metrics, source, folder)

  sizes = {'BATCH_SIZE': None if source.is_stdin else batch_size}
  session = session_lib.start(
    answering.load_system, mesh, answering.lengths, batch_sizes=sizes
  )
  read = source.reader(session.system, answering.lengths, has_data=not dry_run)
  if dry_run:
    print(session.describe())
    return

  with session.entered(), distributed.watch_preemption() as watcher:
    chosen = answering.choose_step()
    load = functools.partial(answering.load, session, chosen)
    if source.is_stdin:
      one_by_one = load(batch_size=session.num_shards)
      tally = pipeline.answer_each(one_by_one, read(), sys.stdout, stream)
    else:
      survey = prompts.survey(read(), target_column)
      source.check_survey(survey, is_scored=bool(metrics))
      settings = source.settings() | answering.settings(chosen)
      lengths = source.answer_lengths
      tally = pipeline.answer_lines(
        load, read, survey, part, folder, settings, lengths, watcher
      )
  if report := tally.describe(prompt_length):
    distributed.say(report)
  if metrics and folder is not None and distributed.is_first():
    _score(folder, part, scored_by, target_column)
  distributed.wait_for_all('infer')


def _output_folder(output_dir: str | None) -> pathlib.Path | None:
  """Returns the output folder; None means standard output."""
  if output_dir:
    return files.folder(output_dir, 'INFER_OUTPUT_DIR')
  if jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes cannot write to standard output: set '
      'INFER_OUTPUT_DIR, or start one process.'
    )
  return None


def _score(
  folder: pathlib.Path,
  part: predictions.Shard,
  scored_by: Sequence[metric_fns.Metric],
  target_column: str,
) -> None:
  """Writes the scores of a shard, or of all, and prints them."""
  scored = predictions.write_scores(folder, part, scored_by, target_column)
  for path, results in scored.items():
    print(f'{path}: {predictions.describe_scores(results)}')


def _check_stream(
  stream: str | None,
  source: prompt_source.PromptSource,
  decoding: sampling.Decoding,
) -> None:
  """Validates INFER_STREAM.

  Raises:
    ValueError: if the input or the decoding cannot be streamed.
  """
  if stream is None:
    return
  if stream not in pipeline.STREAMS:
    raise ValueError(
      f'INFER_STREAM={stream!r}: expected None or one of '
      f'{", ".join(pipeline.STREAMS)}.'
    )
  if not source.is_stdin:
    raise ValueError(
      f'INFER_STREAM={stream!r} needs standard input, which is answered line '
      f'by line; INPUT={source.input} is answered in batches. Set INPUT to -.'
    )
  if decoding.num_beams > 1:
    raise ValueError(
      f'INFER_STREAM={stream!r} with Decoding.num_beams={decoding.num_beams}: '
      'the best beam is known only at the end. Leave one of them unset.'
    )


def _scored_by(
  names: Sequence[str],
  source: prompt_source.PromptSource,
  folder: pathlib.Path | None,
) -> list[metric_fns.Metric]:
  """Returns the metrics to score with.

  Raises:
    ValueError: if the answers could not be scored at the end.
  """
  metrics = source.score_settings().named(names, 'INFER_METRICS')
  if not metrics:
    return metrics
  if folder is None or source.is_stdin:
    raise ValueError(
      'INFER_METRICS need a complete file: set INFER_OUTPUT_DIR, and INPUT to '
      'a file or a task.'
    )
  column = source.target_column
  if column in predictions.OWN_COLUMNS:
    raise ValueError(
      f'TARGET_COLUMN={column!r} is also a field of the output. Rename the '
      f'column of {source.input}.'
    )
  return metrics
