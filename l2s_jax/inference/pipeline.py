# SPDX-License-Identifier: Apache-2.0
"""The pipeline of inference: input lines to output records, in order.

Lines are read in windows, so that batches have similar lengths and memory is
bounded. The device does not wait for the host. `prompts.py` reads the lines,
`predictions.py` writes the records.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import tqdm

from l2s_jax.data import text_files
from l2s_jax.inference import output_parts, predictions, prompts, sampling
from l2s_jax.inference.answerer import Prompt, PromptAnswerer
from l2s_jax.runtime import distributed, gin_config, locks, preemption

# Number of full-length batches in a window, whose lines are sorted by length
# together. Two windows are in memory.
WINDOW_BATCHES = 8
STREAMS = ('jsonl', 'text')


class _Window:
  """A window of lines, whose batches may finish in any order.

  Attributes:
    batches: lists of prompts' places in the window; one empty batch if no line
      has a prompt.
  """

  def __init__(
    self,
    answerer: PromptAnswerer,
    items: Sequence[prompts.Item],
    first_line: int,
    lengths: prompts.AnswerLengths | None,
  ):
    self._answerer = answerer
    self._rows: dict[int, Mapping[str, Any]] = {}
    self._prompts: dict[int, Prompt] = {}
    self._records: list[predictions.Record | None] = []
    self._num_handed_out = 0
    for place, item in enumerate(items):
      if isinstance(item, text_files.BadLine):
        self._records.append(predictions.unanswered(item))
        continue
      self._records.append(None)
      self._rows[place] = item
      self._prompts[place] = answerer.encode(
        item['prompt'],
        row_id=first_line + place,
        max_decode_len=lengths(item) if lengths else None,
      )
    places = list(self._prompts)
    packed = answerer.pack(list(self._prompts.values()))
    self.batches = [[places[i] for i in batch] for batch in packed] or [[]]

  def start(
    self, batch: Sequence[int]
  ) -> Callable[[], list[predictions.Record]]:
    """Starts a batch; returns a function that waits for its answers.

    The function returns the next records in input order, up to the first one
    that is still missing.
    """
    chosen = [self._prompts[place] for place in batch]
    writing = self._answerer.start(chosen) if chosen else None

    def finish() -> list[predictions.Record]:
      answers = self._answerer.finish(writing) if writing else []
      for place, prompt, found in zip(batch, chosen, answers, strict=True):
        self._records[place] = predictions.answered(
          self._rows[place], found.text, prompt.was_cut, **found.details
        )
      whole = []
      for record in self._records[self._num_handed_out :]:
        if record is None:
          break
        whole.append(record)
      self._num_handed_out += len(whole)
      return whole

    return finish


def answer(
  answerer: PromptAnswerer,
  items: Iterable[prompts.Item],
  *,
  first_line: int = 0,
  lengths: prompts.AnswerLengths | None = None,
  stop: Callable[[], None] = lambda: None,
) -> Iterator[list[predictions.Record]]:
  """Yields lists of records in the order of the items.

  While the device decodes a batch, the host detokenizes and yields the batch
  before, and tokenizes the next.

  Args:
    answerer: has the batch size.
    items: to be answered.
    first_line: index of the first item in the input, from 0.
    lengths: column with the answer length of each line; None means the
      answerer's `max_decode_len`.
    stop: called before each batch; raises an exception to stop.
  """
  items = iter(items)
  running: Callable[[], list[predictions.Record]] | None = None
  size = WINDOW_BATCHES * answerer.batch_size
  while chunk := list(itertools.islice(items, size)):
    window = _Window(answerer, chunk, first_line, lengths)
    first_line += len(chunk)
    for batch in window.batches:
      stop()
      following = window.start(batch)
      if running is not None and (records := running()):
        yield records
      running = following
  if running is not None:
    yield running()


def answer_each(
  answerer: PromptAnswerer,
  items: Iterable[prompts.Item],
  sink: IO[str],
  stream: str | None = None,
) -> predictions.Tally:
  """Answers items one by one as they arrive; returns their counts.

  Args:
    answerer: of any batch size.
    items: to be answered.
    sink: receives one JSON line per item.
    stream: 'jsonl' also writes lines {"delta": TEXT} as tokens are decoded;
      'text' writes only the text as it is decoded, and a newline.
  """

  def write_piece(text: str) -> None:
    if stream == 'jsonl':
      text = json.dumps({'delta': text}, ensure_ascii=False) + '\n'
    sink.write(text)
    sink.flush()

  def records() -> Iterator[list[predictions.Record]]:
    for row_id, item in enumerate(items):
      if isinstance(item, text_files.BadLine):
        yield [predictions.unanswered(item)]
        continue
      prompt = answerer.encode(item['prompt'], row_id=row_id)
      if stream is None:
        (found,) = answerer.finish(answerer.start([prompt]))
      else:
        found = answerer.stream(prompt, write_piece)
      yield [
        predictions.answered(item, found.text, prompt.was_cut, **found.details)
      ]

  if stream == 'text':
    return write(records(), sink, dump=lambda _: '\n')
  return write(records(), sink)


def answer_all(
  answerer: PromptAnswerer,
  items: Iterable[prompts.Item],
  *,
  total: int,
  done: int = 0,
  **options: Any,
) -> Iterator[list[predictions.Record]]:
  """Yields the records of `answer`, with a progress bar and a rate at the end.

  Args:
    answerer: has the batch size.
    items: items left to answer.
    total: number of items, answered ones included.
    done: number of items answered by earlier starts.
    **options: of `answer`.
  """
  start = time.perf_counter()
  with tqdm.tqdm(
    total=total,
    initial=done,
    unit='prompt',
    desc='answers',
    file=sys.stderr,
    dynamic_ncols=True,
    disable=not distributed.is_first(),
  ) as bar:
    for records in answer(answerer, items, **options):
      yield records
      bar.update(len(records))
  if total > done:
    compiling = answerer.generator.announce.total_secs
    rate = (total - done) / (time.perf_counter() - start - compiling)
    padding = 1 - answerer.num_tokens / max(answerer.num_slots, 1)
    distributed.say(
      f'{rate:.4g} prompts/s without the {compiling:.3g} s of compilation; '
      f'{padding:.0%} of the prompt tokens were padding.'
    )


def answer_lines(
  load: Callable[[], PromptAnswerer],
  read: prompts.Reader,
  survey: prompts.Survey,
  part: predictions.Shard,
  folder: pathlib.Path | None,
  settings: Mapping[str, Any],
  lengths: prompts.AnswerLengths | None = None,
  watcher: preemption.Watcher | None = None,
  *,
  named_by: str = 'INFER_OUTPUT_DIR',
) -> predictions.Tally:
  """Answers the missing lines of a shard; returns the counts of all its lines.

  The operative config is written beside them, before the first that this call
  answers; a call that answers none leaves it as it is.

  Args:
    load: returns the answerer; not called if no line is missing.
    read: reader of the whole input.
    survey: statistics of the whole input.
    part: the shard.
    folder: output folder; None means standard output.
    settings: settings that affect the answers.
    lengths: column with the answer length of each line; None means the
      answerer's `max_decode_len`.
    watcher: of signals, after which the program ends before the next batch.
    named_by: the setting that names the folder, for messages.

  Raises:
    ValueError: if the folder holds answers with other settings.
  """
  lines = part.lines(survey.num_lines)

  def items() -> Iterator[prompts.Item]:
    return itertools.islice(read(), lines.start, lines.stop)

  def answers(done: int) -> Iterator[list[predictions.Record]]:
    return answer_all(
      load(),
      itertools.islice(read(), lines.start + done, lines.stop),
      total=len(lines),
      done=done,
      first_line=lines.start + done,
      lengths=lengths,
      **({'stop': watcher.exit_if_requested} if watcher else {}),
    )

  if folder is None:
    return write(answers(0), sys.stdout)
  predictions.settle(
    folder,
    {
      **settings,
      'num_lines': survey.num_lines,
      'num_shards': part.count,
      'prompts_sha256': survey.sha256,
    },
    defaults={'decoding': dataclasses.asdict(sampling.Decoding())},
    named_by=named_by,
  )
  path = folder / part.name('predictions', '.jsonl')
  lock = f'.{path.name}.lock'
  if distributed.from_first(path.is_file()):
    tally = predictions.read_whole(path, items())
    if distributed.is_first():
      _remove_lock(folder, named_by, lock)
      output_parts.remove(path)
    distributed.say(f'{path} is complete: nothing to answer.')
    return tally
  if not distributed.is_first():  # The first host writes; all compute.
    done = distributed.from_first(None)
    tally = predictions.Tally()
    for records in answers(done) if done < len(lines) else ():
      for record in records:
        tally.add(record)
    return tally
  with (
    locks.held(folder, named_by, lock),
    output_parts.growing_file(path, items(), watcher) as file,
  ):
    done = distributed.from_first(file.tally.num_lines)
    if done:
      print(
        f'{path}: {done} of {len(lines)} lines are answered; skipping them.',
        file=sys.stderr,
      )
    new = answers(done) if done < len(lines) else iter(())
    for records in _with_config(new, folder / part.name('config', '.gin')):
      file.append(records)
    file.finish()
  return file.tally


def _with_config(
  batches: Iterator[list[predictions.Record]], path: pathlib.Path
) -> Iterator[list[predictions.Record]]:
  """Yields answers; writes the operative config before the first of them.

  By then all settings were used. Without new answers, a config that is there
  is better than that of this call.
  """
  first = next(batches, None)
  if first is not None or not path.exists():
    gin_config.save_operative_config(path)
  if first is not None:
    yield first
  yield from batches


def _remove_lock(folder: pathlib.Path, named_by: str, lock: str) -> None:
  """Removes the lock that a kill after the last line left."""
  if (folder / lock).exists():
    with contextlib.suppress(ValueError):  # Its owner still runs.
      with locks.held(folder, named_by, lock):
        pass


def write(
  batches: Iterable[list[predictions.Record]],
  sink: IO[str],
  dump: Callable[[list[predictions.Record]], str] = predictions.dump,
) -> predictions.Tally:
  """Writes records as they arrive; stops quietly if the reader closes the pipe.

  Args:
    batches: lists of records.
    sink: receives the lines and is flushed after each list.
    dump: formats a list of records.

  Returns:
    The counts of the written records.
  """
  tally = predictions.Tally()
  try:
    for records in batches:
      sink.write(dump(records))
      sink.flush()
      for record in records:
        tally.add(record)
  except BrokenPipeError:
    # Python flushes the buffer at exit, which would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sink.fileno())
  return tally
