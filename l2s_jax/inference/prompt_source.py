# SPDX-License-Identifier: Apache-2.0
"""The input of `infer`: a file, a SeqIO task or standard input.

This module has the settings and their validation; `prompts.py` reads.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from l2s_jax.data import input_files, tasks, text_files
from l2s_jax.inference import predictions, prompts
from l2s_jax.metrics import scores
from l2s_jax.runtime import distributed, storage
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib

BAD_LINES = ('keep', 'refuse')
STDIN = '-'
TASK = 'task:'


@dataclasses.dataclass(frozen=True)
class PromptSource:
  """Settings of the input of `infer`.

  Attributes:
    input: a file, `task:NAME` or `-`, standard input.
    split: split of a task.
    prompt_column: the column for `{prompt}` in the template.
    template: the prompt, with columns in braces.
    fallback_template: template for lines without text in one of the columns
      that only `template` names; None makes such lines bad.
    column_names: column names of a TSV or CSV file without a header line.
    bad_lines: one of `BAD_LINES`.
    target_column: the column of references for scoring.
    max_decode_len: maximum number of answer tokens.
    max_decode_len_column: column with the `max_decode_len` of each line.
  """

  input: str
  split: str
  prompt_column: str
  template: str
  fallback_template: str | None
  column_names: Sequence[str] | None
  bad_lines: str
  target_column: str
  max_decode_len: int
  max_decode_len_column: str | None

  def __post_init__(self):
    """Validates the settings and the file's format, before anything is loaded.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file has neither text nor records, or a setting does
        not apply to this kind of input.
    """
    if self.bad_lines not in BAD_LINES:
      raise ValueError(
        f'INFER_BAD_LINES={self.bad_lines!r}: expected one of '
        f'{", ".join(BAD_LINES)}.'
      )
    if self.is_stdin and jax.process_count() > 1:
      raise ValueError(
        f'INPUT={STDIN} with {jax.process_count()} processes: only one process '
        'can read standard input. Set INPUT to a file, or start one process.'
      )
    if not self.is_stdin and not self.is_task:
      if not (place := storage.of(self.input)).is_file():
        wrong = 'is a folder' if place.is_dir() else 'no such file'
        raise FileNotFoundError(
          f'INPUT={self.input}: {wrong}. Set INPUT to a text file, '
          f'{input_files.ENDINGS} (each may be .gz), task:NAME, or - for '
          'standard input.'
        )
      with input_files.open_bytes(epath.Path(self.input)):
        pass  # Opening raises if the file has neither text nor records.
    if self.max_decode_len_column is not None and not self.has_columns:
      raise ValueError(
        f'MAX_DECODE_LEN_COLUMN={self.max_decode_len_column!r} needs a file '
        f'with columns ({input_files.ENDINGS}); INPUT={self.input} has no '
        'columns.'
      )
    if not self.is_task:
      self._templates()

  @property
  def is_stdin(self) -> bool:
    """Whether the input is standard input, of unknown length."""
    return self.input == STDIN

  @property
  def is_task(self) -> bool:
    """Whether the input is a task, with its own prompt template."""
    return self.input.startswith(TASK)

  @property
  def has_columns(self) -> bool:
    """Whether the input is a file of records with columns."""
    is_file = not self.is_stdin and not self.is_task
    return is_file and text_files.kind(self.input) != 'text'

  @property
  def answer_lengths(self) -> prompts.AnswerLengths | None:
    """The column of per-line answer lengths, or None."""
    if self.max_decode_len_column is None:
      return None
    return prompts.AnswerLengths(
      self.max_decode_len_column, self.max_decode_len
    )

  def settings(self) -> dict[str, Any]:
    """Returns settings that determine the prompts and the answers' lengths."""
    return {
      'input': self.input,
      'max_decode_len': self.max_decode_len,
      'max_decode_len_column': self.max_decode_len_column,
      'template': None if self.is_task else self.template,
    }

  def score_settings(self) -> scores.Scores:
    """Returns the scoring settings that are bound in gin."""
    if self.is_task:
      return tasks.score_settings(self.input.removeprefix(TASK))
    return scores.Scores()

  def reader(
    self,
    system: system_lib.System,
    task_feature_lengths: Mapping[str, int],
    *,
    has_data: bool = True,
  ) -> prompts.Reader:
    """Returns a reader of the input.

    Args:
      system: the model; a task is bound to its vocabularies.
      task_feature_lengths: lengths of a task's features, in tokens.
      has_data: whether a task's data must exist already.

    Raises:
      FileNotFoundError: if a task's data do not exist.
      ValueError: if the task cannot be used as input.
    """
    read: prompts.Reader
    if self.is_task:
      label = f'INPUT={self.input}'
      bound = session_lib.bind_task(
        system, self.input.removeprefix(TASK), label
      )
      read = prompts.task_reader(
        bound, self.split, label, task_feature_lengths if has_data else None
      )
    else:
      template, fallback = self._templates()
      if self.is_stdin:
        read = functools.partial(
          prompts.read_stream, sys.stdin.buffer, template
        )
      else:
        read = functools.partial(
          prompts.read_file,
          self.input,
          template,
          fallback=fallback,
          column_names=self.column_names,
          lengths=self.answer_lengths,
        )
    return prompts.refusing(read) if self.bad_lines == 'refuse' else read

  def check_shard(self, part: predictions.Shard) -> None:
    """Validates the shard; standard input cannot be sharded.

    Raises:
      ValueError: names the setting.
    """
    part.check()
    if self.is_stdin and part.count > 1:
      raise ValueError(
        f'num_shards={part.count}: standard input cannot be divided into '
        'shards. Set INPUT to a file.'
      )

  def check_survey(self, survey: prompts.Survey, *, is_scored: bool) -> None:
    """Checks that the input has good lines and, for scoring, references.

    Raises:
      ValueError: with the first bad line, or the missing column.
    """
    if not survey.num_lines:
      distributed.say(f'INPUT={self.input} has no lines.')
    first_bad = survey.first_bad
    if first_bad is not None and survey.num_bad == survey.num_lines:
      if first_bad.reason.startswith('is not UTF-8'):
        raise ValueError(
          f'INPUT={self.input} is not text: none of its {survey.num_lines} '
          f'lines is UTF-8; the first: {first_bad} Convert Latin-1 to UTF-8 '
          'with `iconv -f LATIN1 -t UTF-8`.'
        )
      if self.has_columns:  # The settings are wrong, not the lines.
        raise ValueError(
          f'INPUT={self.input}: none of its {survey.num_lines} lines can be '
          f'answered; the first: {first_bad} Check PROMPT_COLUMN, TEMPLATE and '
          'COLUMN_NAMES.'
        )
    if is_scored and not survey.num_targets:
      raise ValueError(
        f'INFER_METRICS: no line of {self.input} has a string, or a list of '
        f'strings, in column {self.target_column!r}. Set TARGET_COLUMN to the '
        'column of the references.'
      )

  def _templates(self) -> tuple[prompts.Template, prompts.Template]:
    """Returns the template and the fallback template.

    Raises:
      ValueError: if they name columns of an input without columns.
    """
    template, fallback = (
      prompts.parse_template(
        text, self.prompt_column if self.has_columns else 'prompt'
      )
      for text in (self.template, self.fallback_template or self.template)
    )
    strangers = {*template.columns, *fallback.columns} - {'prompt'}
    if strangers and not self.has_columns:
      raise ValueError(
        f'TEMPLATE={self.template!r} uses {", ".join(sorted(strangers))}, but '
        f'the lines of INPUT={self.input} have no columns. Use {{prompt}} for '
        'the line.'
      )
    return template, fallback
