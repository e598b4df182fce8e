# SPDX-License-Identifier: Apache-2.0
"""Inference: prompts in, JSON lines out, in the order they came.

One line for one, whatever happens: what cannot be answered leaves a line that
says why. `prompts.py` reads, `pipeline.py` and `answerer.py` answer, and
`predictions.py` writes so that a job that was stopped goes on where it was;
here is the verb that brings them together.
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import gin
import jax
from etils import epath

from l2s_jax.data import input_files, tasks, text_files
from l2s_jax.inference import (
  answerer,
  generate,
  pipeline,
  predictions,
  prompts,
  sampling,
)
from l2s_jax.metrics import metric_fns, scores
from l2s_jax.runtime import distributed, files, gin_config, partitioning
from l2s_jax.systems import as_it_came, parameters
from l2s_jax.systems import session as session_lib

BAD_LINES = ('keep', 'refuse')
STDIN = '-'
TASK = 'task:'


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
  """Writes answers to prompts as JSON lines, in order, one line for one.

  A line has the columns of its input, `prompt` and `prediction`; that of a line
  which cannot be answered has `line` (its number), `error`, and `prediction`
  null. Started again, the same command goes on where it was stopped:
  `predictions.py` describes the output folder. With `Decoding.num_answers`
  there are `predictions`, the best first, and their `scores`; with
  `Decoding.log_probs` the `score`, `token_ids` and `token_log_probs` of the
  best. These may differ in the last digits from one batch size to another.

  Args:
    checkpoint_path: the run's folder (MODEL_DIR of its training); or a Hugging
      Face or converted folder, a checkpoint of T5X, a GGUF file, or a name on
      the Hub.
    input: a file of text, .jsonl, .ndjson, .json, .tsv, .csv, .parquet or
      .tfrecord (each may be .gz), `task:NAME` for a SeqIO task, or `-`,
      standard input, answered line by line.
    output_dir: the folder of `predictions.jsonl`; None, or input `-`, writes
      to standard output.
    prompt_length: tokens a prompt; longer ones are cut, marked and counted.
    max_decode_len: tokens an answer at most.
    batch_size: prompts a batch if they have `prompt_length` tokens; of shorter
      ones a batch has as many as take the same memory. Standard input is
      answered one by one.
    step: the checkpoint; None takes the newest, 'best' that of BEST_METRIC.
    prompt_column: which column `{prompt}` in the template stands for; that of
      a column within a column is written `translation.en`.
    template: the prompt, with columns in braces, such as 'translate English to
      German: {prompt}'. A task has its own.
    fallback_template: of lines that lack text in a column which `template`
      alone names; None: such a line is bad.
    column_names: of a TSV or CSV file whose first line does not name them.
    bad_lines: 'keep' leaves an error in the place of an answer and goes on,
      'refuse' stops before anything is computed.
    split: of a task.
    metrics: names of metrics (`metrics/metric_fns.py` and `scores.functions`)
      to score the answers with; `scores` has their settings.
    target_column: what to score against: text, or a list of references. A
      task's is `target`.
    shard: which of `num_shards` contiguous parts of the input to answer; their
      files, one after another, make up that of the whole.
    num_shards: how many there are.
    llm_path: where the LLM's weights are, if not where the run says.
    vocabulary: tokenizer of a model as it came that brings none.
    extra_ids: sentinels that T5 adds behind its SentencePiece model.
    mesh: device mesh and axis rules.
    decoding: how answers are written; None is greedy. A sample depends on the
      seed and on which line of the input it answers, and on nothing else.
    max_decode_len_column: of a file: says how many tokens each line's answer
      may have, up to `max_decode_len`.
    stream: of standard input: 'jsonl' writes lines {"delta": TEXT} as tokens
      come, before the line that has all; 'text' writes the text alone.
    dry_run: prints sizes and shardings, and stops.
  """
  gin_config.check_positive(
    PROMPT_LENGTH=prompt_length,
    MAX_DECODE_LEN=max_decode_len,
    BATCH_SIZE=batch_size,
  )
  part = predictions.Shard(shard, num_shards)
  decoding = decoding or sampling.Decoding()
  generate.check(decoding, max_decode_len)
  _check_input(input, bad_lines, part)
  _check_stream(stream, input, decoding)
  folder = _output_folder(output_dir)
  scored_by = _scored_by(metrics, target_column, input, folder)
  answer_lengths = _answer_lengths(max_decode_len_column, max_decode_len, input)
  is_task = input.startswith(TASK)
  if not is_task:
    read = _reader(
      input,
      template,
      fallback_template,
      prompt_column,
      column_names,
      answer_lengths,
    )
  as_it_came.check_path(checkpoint_path)
  lengths = {'inputs': prompt_length, 'targets': max_decode_len}

  session = session_lib.start(
    lambda: generate.for_decoding(
      as_it_came.load(
        checkpoint_path,
        llm_path=llm_path,
        vocabulary=vocabulary,
        extra_ids=extra_ids,
      ),
      decoding,
    ),
    mesh,
    lengths,
    batch_sizes={'BATCH_SIZE': None if input == STDIN else batch_size},
  )
  if input == STDIN:
    batch_size = session.num_shards
  if is_task:
    label = f'INPUT={input}'
    bound = session_lib.bind_task(
      session.system, input.removeprefix(TASK), label
    )
    task = bound.task_in_order(label)
    if not dry_run:  # Which needs no data.
      bound.check_data(split, lengths)
      prompts.check_task(task, split)
    read = functools.partial(prompts.read_task, task, split)
  if bad_lines == 'refuse':
    read = prompts.refusing(read)
  if dry_run:
    print(session.describe())
    return

  with session.entered(), distributed.preemptible() as stop:
    # The run may go on, and save, at this moment.
    chosen: int = distributed.from_first(
      as_it_came.choose_step(checkpoint_path, step, 'INFER_STEP')
    )
    load = functools.partial(
      _load_answerer,
      session,
      checkpoint_path,
      chosen,
      prompt_length=prompt_length,
      max_decode_len=max_decode_len,
      batch_size=batch_size,
      decoding=decoding,
      consume=True,
    )
    if input == STDIN:
      tally = pipeline.answer_each(load(), read(), sys.stdout, stream)
    else:
      survey = prompts.survey(read(), target_column)
      _check_survey(survey, input, target_column if metrics else None)
      settings = {
        'checkpoint_path': os.path.abspath(checkpoint_path),
        'checkpoint_saved_nsecs': as_it_came.saved_nsecs(
          checkpoint_path, chosen
        ),
        'decoding': dataclasses.asdict(decoding),
        'input': input,
        'max_decode_len': max_decode_len,
        'max_decode_len_column': max_decode_len_column,
        'prompt_length': prompt_length,
        'step': chosen,
        'template': None if is_task else template,
      }
      tally = pipeline.answer_lines(
        load, read, survey, part, folder, settings, answer_lengths, stop
      )
  if report := tally.describe(prompt_length):
    distributed.say(report)
  if metrics and folder is not None and distributed.is_first():
    scored = predictions.write_scores(folder, part, scored_by, target_column)
    for path, results in scored.items():
      print(f'{path}: {predictions.describe_scores(results)}')
  distributed.wait_for_all('infer')


def _load_answerer(
  session: session_lib.Session, checkpoint_path: str, step: int, **options: Any
) -> answerer.PromptAnswerer:
  """Returns what answers, with the weights of a checkpoint.

  Args:
    session: the system on its mesh.
    checkpoint_path: CHECKPOINT_PATH.
    step: of the checkpoint.
    **options: of `answerer.PromptAnswerer`.
  """
  params = parameters.load_params(
    session.system, session.layout, checkpoint_path, step
  )
  return answerer.PromptAnswerer(
    session.system, params, session.mesh, **options
  )


def _output_folder(output_dir: str | None) -> pathlib.Path | None:
  """Returns where answers go; None is standard output."""
  if output_dir:
    return files.local_folder(output_dir, 'INFER_OUTPUT_DIR')
  if jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes write to a folder: set '
      'INFER_OUTPUT_DIR, or start one process.'
    )
  return None


def _check_input(input: str, bad_lines: str, part: predictions.Shard) -> None:
  """Refuses what cannot be read, before anything is loaded."""
  part.check()
  if bad_lines not in BAD_LINES:
    raise ValueError(
      f'INFER_BAD_LINES={bad_lines!r}: expected one of {", ".join(BAD_LINES)}.'
    )
  if input == STDIN:
    if jax.process_count() > 1:
      raise ValueError(
        f'INPUT={STDIN} with {jax.process_count()} processes: standard input '
        'is read by one. Give INPUT a file, or start one process.'
      )
    if part.count > 1:
      raise ValueError(
        f'num_shards={part.count}: standard input has no end that is known, '
        'and cannot be divided. Give INPUT a file.'
      )
  elif not input.startswith(TASK):
    if not pathlib.Path(input).is_file():
      raise FileNotFoundError(
        f'INPUT={input}: no such file. Give a file of text, '
        f'{input_files.ENDINGS} (each may be .gz), task:NAME, or - for '
        'standard input.'
      )
    with input_files.open_bytes(epath.Path(input)):
      pass  # Which refuses what is neither text nor records.


def _check_stream(
  stream: str | None, input: str, decoding: sampling.Decoding
) -> None:
  """Refuses to show answers on the way that cannot be."""
  if stream is None:
    return
  if stream not in pipeline.STREAMS:
    raise ValueError(
      f'INFER_STREAM={stream!r}: expected None or one of '
      f'{", ".join(pipeline.STREAMS)}.'
    )
  if input != STDIN:
    raise ValueError(
      f'INFER_STREAM={stream!r} is of standard input, which is answered line '
      f'by line; INPUT={input} is answered in batches. Set INPUT to -.'
    )
  if decoding.num_beams > 1:
    raise ValueError(
      f'INFER_STREAM={stream!r} with Decoding.num_beams={decoding.num_beams}: '
      'which beam is the best is known at the end alone. Leave out one of the '
      'two.'
    )


def _answer_lengths(
  column: str | None, most: int, input: str
) -> prompts.AnswerLengths | None:
  """Returns which column says how long answers may be, if one does."""
  if column is None:
    return None
  if not _has_columns(input):
    raise ValueError(
      f'MAX_DECODE_LEN_COLUMN={column!r} is of a file of records '
      f'({input_files.ENDINGS}); INPUT={input} has no columns.'
    )
  return prompts.AnswerLengths(column, most)


def _scored_by(
  names: Sequence[str],
  target_column: str,
  input: str,
  folder: pathlib.Path | None,
) -> list[metric_fns.Metric]:
  """Returns the metrics; refuses scores that could not be given in the end."""
  if input.startswith(TASK):
    settings = tasks.score_settings(input.removeprefix(TASK))
  else:
    settings = scores.Scores()
  metrics = settings.named(names, 'INFER_METRICS')
  if not metrics:
    return metrics
  if folder is None or input == STDIN:
    raise ValueError(
      'INFER_METRICS are of a whole file: set INFER_OUTPUT_DIR, and INPUT to a '
      'file or a task.'
    )
  if target_column in predictions.OWN_COLUMNS:
    raise ValueError(
      f'TARGET_COLUMN={target_column!r} is where the output has its own '
      f'{target_column}; rename the column of {input}.'
    )
  return metrics


def _has_columns(input: str) -> bool:
  is_file = input != STDIN and not input.startswith(TASK)
  return is_file and text_files.kind(input) != 'text'


def _reader(
  input: str,
  template: str,
  fallback_template: str | None,
  prompt_column: str,
  column_names: Sequence[str] | None,
  answer_lengths: prompts.AnswerLengths | None,
) -> prompts.Reader:
  """Returns what starts reading a file or standard input."""
  if not _has_columns(input):
    prompt_column = 'prompt'
  filled, fallback = (
    prompts.parse_template(text, prompt_column)
    for text in (template, fallback_template or template)
  )
  strangers = {*filled.columns, *fallback.columns} - {'prompt'}
  if strangers and not _has_columns(input):
    raise ValueError(
      f'TEMPLATE={template!r} names {", ".join(sorted(strangers))}, but a line '
      f'of INPUT={input} has no columns; {{prompt}} stands for the line.'
    )
  if input == STDIN:
    return functools.partial(prompts.read_stream, sys.stdin.buffer, filled)
  return functools.partial(
    prompts.read_file,
    input,
    filled,
    fallback=fallback,
    column_names=column_names,
    lengths=answer_lengths,
  )


def _check_survey(
  survey: prompts.Survey,
  input: str,
  target_column: str | None,
) -> None:
  """Refuses what would give no answer or, with a target column, no score."""
  first_bad = survey.first_bad
  if first_bad is not None and survey.num_bad == survey.num_lines:
    if first_bad.reason.startswith('is not UTF-8'):
      raise ValueError(
        f'INPUT={input} is no text: none of its {survey.num_lines} lines is '
        f'UTF-8; the first: {first_bad} Text in Latin-1 is made UTF-8 with '
        '`iconv -f LATIN1 -t UTF-8`.'
      )
    if _has_columns(input):  # Then a setting is wrong, not the lines.
      raise ValueError(
        f'INPUT={input}: none of its {survey.num_lines} lines can be answered; '
        f'the first: {first_bad} PROMPT_COLUMN, TEMPLATE and COLUMN_NAMES say '
        'what is read.'
      )
  if target_column is not None and not survey.num_targets:
    raise ValueError(
      f'INFER_METRICS: no line of {input} has text, or a list of texts, in '
      f'column {target_column!r}. TARGET_COLUMN says what to score against.'
    )
