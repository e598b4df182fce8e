# SPDX-License-Identifier: Apache-2.0
"""INPUT and the settings that say how it is read: which prompts are answered.

A file, a SeqIO task or standard input; `prompts.py` reads each.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from l2s_jax.data import input_files, tasks, text_files
from l2s_jax.inference import predictions, prompts
from l2s_jax.metrics import scores
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib

BAD_LINES = ('keep', 'refuse')
STDIN = '-'
TASK = 'task:'


@dataclasses.dataclass(frozen=True)
class PromptSource:
  """Where prompts come from.

  Attributes:
    input: a file, `task:NAME` or `-`, standard input.
    split: of a task.
    prompt_column: which column `{prompt}` in the template stands for.
    template: the prompt, with columns in braces.
    fallback_template: of lines that lack text in a column which `template`
      alone names; None: such a line is bad.
    column_names: of a TSV or CSV file whose first line does not name them.
    bad_lines: one of `BAD_LINES`.
    target_column: what answers are scored against.
    max_decode_len: tokens an answer at most.
    max_decode_len_column: says how many each line's answer may have.
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
    """Refuses what cannot be read, before anything is loaded.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no text and no records, or a setting does not fit it.
    """
    if self.bad_lines not in BAD_LINES:
      raise ValueError(
        f'INFER_BAD_LINES={self.bad_lines!r}: expected one of '
        f'{", ".join(BAD_LINES)}.'
      )
    if self.is_stdin and jax.process_count() > 1:
      raise ValueError(
        f'INPUT={STDIN} with {jax.process_count()} processes: standard input '
        'is read by one. Give INPUT a file, or start one process.'
      )
    if not self.is_stdin and not self.is_task:
      if not pathlib.Path(self.input).is_file():
        raise FileNotFoundError(
          f'INPUT={self.input}: no such file. Give a file of text, '
          f'{input_files.ENDINGS} (each may be .gz), task:NAME, or - for '
          'standard input.'
        )
      with input_files.open_bytes(epath.Path(self.input)):
        pass  # Which refuses what is neither text nor records.
    if self.max_decode_len_column is not None and not self.has_columns:
      raise ValueError(
        f'MAX_DECODE_LEN_COLUMN={self.max_decode_len_column!r} is of a file of '
        f'records ({input_files.ENDINGS}); INPUT={self.input} has no columns.'
      )
    if not self.is_task:
      self._templates()

  @property
  def is_stdin(self) -> bool:
    """Whether it is standard input, whose end is not known."""
    return self.input == STDIN

  @property
  def is_task(self) -> bool:
    """Whether it is a task, which has a template of its own."""
    return self.input.startswith(TASK)

  @property
  def has_columns(self) -> bool:
    """Whether it is a file of records."""
    is_file = not self.is_stdin and not self.is_task
    return is_file and text_files.kind(self.input) != 'text'

  @property
  def answer_lengths(self) -> prompts.AnswerLengths | None:
    """What says how long each line's answer may be, if a column does."""
    if self.max_decode_len_column is None:
      return None
    return prompts.AnswerLengths(
      self.max_decode_len_column, self.max_decode_len
    )

  def settings(self) -> dict[str, Any]:
    """Returns what the prompts and their answers' lengths depend on."""
    return {
      'input': self.input,
      'max_decode_len': self.max_decode_len,
      'max_decode_len_column': self.max_decode_len_column,
      'template': None if self.is_task else self.template,
    }

  def score_settings(self) -> scores.Scores:
    """Returns how gin wants the answers to be scored."""
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
    """Returns what starts reading.

    Args:
      system: that answers; a task is bound to it.
      task_feature_lengths: of it.
      has_data: whether a task's data must be there.

    Raises:
      FileNotFoundError: if a task's data are not there.
      ValueError: if a task cannot be answered.
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
    """Refuses a part of what cannot be divided."""
    part.check()
    if self.is_stdin and part.count > 1:
      raise ValueError(
        f'num_shards={part.count}: standard input has no end that is known, '
        'and cannot be divided. Give INPUT a file.'
      )

  def check_survey(self, survey: prompts.Survey, *, is_scored: bool) -> None:
    """Refuses what would give no answer or, if that is asked for, no score."""
    first_bad = survey.first_bad
    if first_bad is not None and survey.num_bad == survey.num_lines:
      if first_bad.reason.startswith('is not UTF-8'):
        raise ValueError(
          f'INPUT={self.input} is no text: none of its {survey.num_lines} '
          f'lines is UTF-8; the first: {first_bad} Text in Latin-1 is made '
          'UTF-8 with `iconv -f LATIN1 -t UTF-8`.'
        )
      if self.has_columns:  # Then a setting is wrong, not the lines.
        raise ValueError(
          f'INPUT={self.input}: none of its {survey.num_lines} lines can be '
          f'answered; the first: {first_bad} PROMPT_COLUMN, TEMPLATE and '
          'COLUMN_NAMES say what is read.'
        )
    if is_scored and not survey.num_targets:
      raise ValueError(
        f'INFER_METRICS: no line of {self.input} has text, or a list of texts, '
        f'in column {self.target_column!r}. TARGET_COLUMN says what to score '
        'against.'
      )

  def _templates(self) -> tuple[prompts.Template, prompts.Template]:
    """Returns the template and the fallback.

    Raises:
      ValueError: if they name columns of lines that have none.
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
        f'TEMPLATE={self.template!r} names {", ".join(sorted(strangers))}, but '
        f'a line of INPUT={self.input} has no columns; {{prompt}} stands for '
        'the line.'
      )
    return template, fallback
