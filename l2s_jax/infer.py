# SPDX-License-Identifier: Apache-2.0
"""Inference: prompts in, JSON lines out, in the order they came.

One line for one, whatever happens: what cannot be answered leaves a line that
says why. `prompts.py` reads, `predictions.py` writes so that a job that was
stopped goes on where it was; here are the model between them, and the verb.
"""

import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal

import gin
import jax
import numpy as np
import tqdm

from l2s_jax import (
  checkpoint,
  data,
  evaluate,
  gin_utils,
  parameters,
  partition,
  predictions,
  prompts,
  systems,
  text_files,
)
from l2s_jax import metrics as metrics_lib

PyTree = Any

BAD_LINES = ('keep', 'refuse')
STDIN = '-'
TASK = 'task:'


class PromptAnswerer:
  """Writes answers to prompts with a system and its parameters."""

  def __init__(
    self,
    system: systems.System,
    params: PyTree,
    mesh: jax.sharding.Mesh,
    *,
    prompt_length: int,
    max_decode_len: int,
    batch_size: int,
  ):
    """Prepares inference; compiles at the first call.

    Args:
      system: the system.
      params: all of its parameters.
      mesh: the device mesh.
      prompt_length: tokens a prompt; longer ones are cut.
      max_decode_len: tokens an answer at most.
      batch_size: prompts a batch; fewer are filled up with padding.
    """
    self._system = system
    self._params = params
    self._mesh = mesh
    self._prompt_length = prompt_length
    self.batch_size = batch_size
    self._generator = systems.generator(system, max_decode_len)

  def __call__(self, texts: Sequence[str]) -> list[str]:
    """Returns an answer for each of at most `batch_size` prompts."""
    batch, _ = self.encode(texts)
    return self.decode(self.generate(batch))[: len(texts)]

  def encode(self, texts: Sequence[str]) -> tuple[data.Batch, list[bool]]:
    """Returns the prompts as a batch, and which of them were cut."""
    vocabulary = self._system.prompt_vocabulary
    ids = [vocabulary.encode(text) + [vocabulary.eos_id] for text in texts]
    batch = data.prompt_batch(
      ids,
      length=self._prompt_length,
      pad_id=vocabulary.pad_id,
      batch_size=self.batch_size,
    )
    return batch, [len(row) > self._prompt_length for row in ids]

  def generate(self, batch: data.Batch) -> jax.Array:
    """Starts generation; returns token ids [batch, steps] to be."""
    return self._generator(self._params, partition.put_batch(batch, self._mesh))

  def decode(self, tokens: jax.Array) -> list[str]:
    """Returns the text of each row, padding rows included."""
    vocabulary = self._system.answer_vocabulary
    return [vocabulary.decode(row.tolist()) for row in np.asarray(tokens)]


def answer(
  answerer: PromptAnswerer, items: Iterator[prompts.Item]
) -> Iterator[list[predictions.Record]]:
  """Yields the records of one batch of items after another.

  The device works on a batch while the host decodes the one before, hands it
  out, and tokenizes the one after.
  """
  running: Callable[[], list[predictions.Record]] | None = None
  while chunk := list(itertools.islice(items, answerer.batch_size)):
    following = _start(answerer, chunk)
    if running is not None:
      yield running()
    running = following
  if running is not None:
    yield running()


def _start(
  answerer: PromptAnswerer, chunk: list[prompts.Item]
) -> Callable[[], list[predictions.Record]]:
  """Starts a batch; returns a function that waits for its records."""
  texts = [item['prompt'] for item in chunk if isinstance(item, dict)]
  batch, were_cut = answerer.encode(texts) if texts else (None, [])
  tokens = None if batch is None else answerer.generate(batch)

  def finish() -> list[predictions.Record]:
    answers = [] if tokens is None else answerer.decode(tokens)
    pairs = zip(answers, were_cut, strict=False)  # Without those that fill up.
    return [
      predictions.unanswered(item)
      if isinstance(item, text_files.BadLine)
      else predictions.answered(item, *next(pairs))
      for item in chunk
    ]

  return finish


def answer_all(
  answerer: PromptAnswerer,
  items: Iterator[prompts.Item],
  *,
  total: int,
  done: int = 0,
) -> Iterator[list[predictions.Record]]:
  """Yields the records of one batch after another, with a progress bar.

  Args:
    answerer: has the batch size.
    items: what is left to do.
    total: how many there are, those included that are done.
    done: how many were answered before.
  """
  start, num_timed = 0.0, 0
  with tqdm.tqdm(
    total=total,
    initial=done,
    unit='prompt',
    desc='infer',
    file=sys.stderr,
    dynamic_ncols=True,
  ) as bar:
    for records in answer(answerer, items):
      if not start:
        start = time.perf_counter()  # The first batch has been compiling.
      else:
        num_timed += len(records)
      yield records
      bar.update(len(records))
  if num_timed:
    rate = num_timed / (time.perf_counter() - start)
    print(f'{rate:.4g} prompts/s after the first batch.', file=sys.stderr)


def answer_lines(
  load: Callable[[], PromptAnswerer],
  read: prompts.Reader,
  survey: prompts.Survey,
  part: predictions.Shard,
  folder: pathlib.Path | None,
  settings: Mapping[str, Any],
) -> predictions.Tally:
  """Answers what is missing of a shard; returns the counts of all of it.

  Args:
    load: makes the answerer, if there is anything to answer.
    read: starts reading the input, of which the shard is a part.
    survey: of the input.
    part: the shard.
    folder: of the predictions; None: standard output.
    settings: what the answers depend on beside the input.

  Raises:
    ValueError: if the folder holds answers with other settings.
  """
  lines = part.lines(survey.num_lines)
  if folder is None:
    items = itertools.islice(read(), lines.start, lines.stop)
    return write(answer_all(load(), items, total=len(lines)), sys.stdout)
  predictions.settle(
    folder,
    {
      **settings,
      'num_lines': survey.num_lines,
      'num_shards': part.count,
      'prompts_sha256': survey.sha256,
    },
  )
  path = folder / part.name('predictions', '.jsonl')
  if path.is_file():
    print(f'{path} is whole: nothing to answer.', file=sys.stderr)
    return predictions.count(predictions.read([path]))
  with predictions.GrowingFile(path) as file:
    done = file.tally.num_lines
    if done:
      print(
        f'{path}: {done} of {len(lines)} lines are there; passing over them.',
        file=sys.stderr,
      )
    if done < len(lines):
      items = itertools.islice(read(), lines.start + done, lines.stop)
      for records in answer_all(load(), items, total=len(lines), done=done):
        file.append(records)
    file.finish()
  return file.tally


def write(
  batches: Iterable[list[predictions.Record]], sink: IO[str]
) -> predictions.Tally:
  """Writes records as they come; ends quietly when nobody reads any more."""
  tally = predictions.Tally()
  try:
    for records in batches:
      sink.write(predictions.dump(records))
      sink.flush()
      for record in records:
        tally.add(record)
  except BrokenPipeError:
    # What is left in the buffer is flushed at the end, and would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sink.fileno())
  return tally


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
  mesh: partition.MeshConfig | None = None,
  verify_weights: bool = False,
  *,
  dry_run: bool = False,
) -> None:
  """Writes answers to prompts as JSON lines, in order, one line for one.

  A line has the columns of its input, `prompt` and `prediction`; that of a line
  which cannot be answered has `line` (its number), `error`, and `prediction`
  null. Started again, the same command goes on where it was stopped:
  `predictions.py` describes the output folder.

  Args:
    checkpoint_path: the run's folder (MODEL_DIR of its training).
    input: a text, .jsonl, .tsv or .csv file (each may be .gz), `task:NAME` for
      a SeqIO task, or `-`, standard input, answered line by line.
    output_dir: the folder of `predictions.jsonl`; None, or input `-`, writes
      to standard output.
    prompt_length: tokens a prompt; longer ones are cut, marked and counted.
    max_decode_len: tokens an answer at most.
    batch_size: prompts a batch; standard input is answered one by one.
    step: the checkpoint; None takes the newest, 'best' that of BEST_METRIC.
    prompt_column: which column `{prompt}` in the template stands for.
    template: the prompt, with columns in braces, such as 'translate English to
      German: {prompt}'. A task has its own.
    fallback_template: of lines that lack text in a column which `template`
      alone names; None: such a line is bad.
    column_names: of a TSV or CSV file whose first line does not name them.
    bad_lines: 'keep' leaves an error in the place of an answer and goes on,
      'refuse' stops before anything is computed.
    split: of a task.
    metrics: names of functions in `metrics.py` to score the answers with.
    target_column: what to score against: text, or a list of references. A
      task's is `target`.
    shard: which of `num_shards` contiguous parts of the input to answer; their
      files, one after another, make up that of the whole.
    num_shards: how many there are.
    llm_path: where the LLM's weights are, if not where the run says.
    mesh: device mesh and axis rules.
    verify_weights: compare the frozen LLM's weights with the digests that are
      kept beside them.
    dry_run: prints sizes and shardings, and stops.
  """
  gin_utils.check_positive(
    PROMPT_LENGTH=prompt_length,
    MAX_DECODE_LEN=max_decode_len,
    BATCH_SIZE=batch_size,
  )
  part = predictions.Shard(shard, num_shards)
  _check_input(input, bad_lines, part)
  folder = (
    systems.local_folder(output_dir, 'INFER_OUTPUT_DIR') if output_dir else None
  )
  _check_metrics(metrics, target_column, input, folder)
  is_task = input.startswith(TASK)
  if not is_task:
    read = _reader(
      input, template, fallback_template, prompt_column, column_names
    )
  systems.local_folder(checkpoint_path, 'CHECKPOINT_PATH')
  mesh_config = mesh or partition.MeshConfig()
  device_mesh = partition.make_mesh(mesh_config)
  if input == STDIN:
    batch_size = device_mesh.shape['data'] * device_mesh.shape['fsdp']
  partition.check_batch_size(batch_size, device_mesh)
  system = systems.with_rules(
    systems.load(checkpoint_path, llm_path=llm_path), mesh_config
  )
  lengths = {'inputs': prompt_length, 'targets': max_decode_len}
  if is_task:
    task = evaluate.bind_task(system, input.removeprefix(TASK))
    if not dry_run:  # which needs no data
      evaluate.check_splits(task, lengths, read=(split,))
    read = functools.partial(prompts.read_task, task, split)
  if bad_lines == 'refuse':
    read = prompts.refusing(read)

  with (
    partition.use_mesh(device_mesh),
    partition.axis_rules(mesh_config.rules('slm')),
  ):
    layout = parameters.layout(system, device_mesh, mesh_config)
    parameters.check_lengths(system, layout, lengths)
    if dry_run:
      print(parameters.summary(system, layout, None, device_mesh))
      return
    weights, step = checkpoint.params_folder(checkpoint_path, step)

    def load() -> PromptAnswerer:
      return PromptAnswerer(
        system,
        parameters.load_params(
          system, layout, checkpoint_path, step, verify=verify_weights
        ),
        device_mesh,
        prompt_length=prompt_length,
        max_decode_len=max_decode_len,
        batch_size=batch_size,
      )

    if input == STDIN:
      answerer = load()
      tally = write((_start(answerer, [item])() for item in read()), sys.stdout)
    else:
      survey = prompts.survey(read(), target_column)
      _check_survey(survey, input, target_column if metrics else None)
      settings = {
        'checkpoint_path': os.path.abspath(checkpoint_path),
        'checkpoint_saved_nsecs': checkpoint.saved_nsecs(weights),
        'input': input,
        'max_decode_len': max_decode_len,
        'prompt_length': prompt_length,
        'step': step,
        'template': None if is_task else template,
      }
      tally = answer_lines(load, read, survey, part, folder, settings)
  if report := tally.describe(prompt_length):
    print(report, file=sys.stderr)
  if metrics and folder is not None:
    scored = predictions.write_scores(folder, part, metrics, target_column)
    for path, results in scored.items():
      print(f'{path}: {predictions.describe_scores(results)}')


def _check_input(input: str, bad_lines: str, part: predictions.Shard) -> None:
  """Refuses what cannot be read, before anything is loaded."""
  part.check()
  if bad_lines not in BAD_LINES:
    raise ValueError(
      f'INFER_BAD_LINES={bad_lines!r}: expected one of {", ".join(BAD_LINES)}.'
    )
  if input == STDIN:
    if part.count > 1:
      raise ValueError(
        f'num_shards={part.count}: standard input has no end that is known, '
        'and cannot be divided. Give INPUT a file.'
      )
  elif not input.startswith(TASK) and not pathlib.Path(input).is_file():
    raise FileNotFoundError(
      f'INPUT={input}: no such file. Give a text, .jsonl, .tsv or .csv file '
      '(each may be .gz), task:NAME, or - for standard input.'
    )


def _check_metrics(
  names: Sequence[str],
  target_column: str,
  input: str,
  folder: pathlib.Path | None,
) -> None:
  """Refuses scores that could not be given in the end."""
  known = metrics_lib.METRICS
  if isinstance(names, str) or not set(names) <= known.keys():
    raise ValueError(
      f"INFER_METRICS={names!r}: expected a tuple, such as ('bleu',), of any "
      f'of {", ".join(known)}.'
    )
  if not names:
    return
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


def _has_columns(input: str) -> bool:
  is_file = input != STDIN and not input.startswith(TASK)
  return is_file and text_files.kind(input) != 'text'


def _reader(
  input: str,
  template: str,
  fallback_template: str | None,
  prompt_column: str,
  column_names: Sequence[str] | None,
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
  )


def _check_survey(
  survey: prompts.Survey,
  input: str,
  target_column: str | None,
) -> None:
  """Refuses what would give no answer or, with a target column, no score."""
  all_bad = survey.first_bad is not None and survey.num_bad == survey.num_lines
  if all_bad and _has_columns(input):  # Then a setting is wrong, not the lines.
    raise ValueError(
      f'INPUT={input}: none of its {survey.num_lines} lines can be answered; '
      f'the first: {survey.first_bad} PROMPT_COLUMN, TEMPLATE and COLUMN_NAMES '
      'say what is read.'
    )
  if target_column is not None and not survey.num_targets:
    raise ValueError(
      f'INFER_METRICS: no line of {input} has text, or a list of texts, in '
      f'column {target_column!r}. TARGET_COLUMN says what to score against.'
    )
