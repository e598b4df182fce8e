# SPDX-License-Identifier: Apache-2.0
"""Readers of prompts.

Files (see `data/text_files.py`), a SeqIO task and standard input give the same
items: for each line, in order, its columns with the filled-in `prompt`, or a
`BadLine` with the reason. The caller decides how to handle bad lines. No
TensorFlow.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from l2s_jax.data import bound_tasks, text_files
from l2s_jax.data.templates import Template
from l2s_jax.data.text_files import BadLine

Item = dict[str, Any] | BadLine
Reader = Callable[[], Iterator[Item]]  # Each call starts at the first item.


class AnswerLengths(NamedTuple):
  """A column with the maximum number of answer tokens for each line.

  Attributes:
    column: its values are integers, in JSON or as text.
    max_decode_len: upper bound of the values.
  """

  column: str
  max_decode_len: int

  def __call__(self, row: Mapping[str, Any]) -> int | None:
    """Returns the limit of a row, or None if it is missing or invalid."""
    value = text_files.value(dict(row), self.column)
    if isinstance(value, str) and value.isascii() and value.isdigit():
      value = int(value)
    # bool is a subclass of int, but not a length.
    is_length = type(value) is int and 1 <= value <= self.max_decode_len
    return value if is_length else None

  def problem(self, row: Mapping[str, Any]) -> str | None:
    """Returns the reason why a row has no valid limit, or None if it has."""
    if self(row) is not None:
      return None
    return (
      f'has no integer from 1 to MAX_DECODE_LEN={self.max_decode_len} in '
      f'column {self.column!r}'
    )


def parse_template(text: str, prompt_column: str = 'prompt') -> Template:
  """Returns a template with `{prompt}` as a name for the prompt column.

  Raises:
    ValueError: as `Template`.
  """
  return Template(text, prompt_column, placeholder='prompt')


def read_file(
  path: str,
  template: Template,
  *,
  fallback: Template | None = None,
  column_names: Sequence[str] | None = None,
  lengths: AnswerLengths | None = None,
) -> Iterator[Item]:
  """Yields an item for each line of a file in a format of `text_files`.

  Args:
    path: of the file.
    template: prompt template; a line of plain text has the column `prompt`.
    fallback: template for lines without text in one of the columns that only
      `template` names; None makes such lines bad.
    column_names: column names of a TSV or CSV file without a header line.
    lengths: makes lines without a valid answer length bad.

  Raises:
    ValueError: as `text_files.read_rows`.
  """
  if text_files.kind(path) in ('text', 'json'):
    column_names = ('prompt',)  # For a text line, and for a JSON list of texts.
  fallback = fallback or template
  rows = text_files.read_rows(
    epath.Path(path),
    columns=fallback.columns,
    column_names=column_names,
    problem=lengths.problem if lengths else lambda row: None,
  )
  for row in rows:
    if isinstance(row, BadLine):
      yield row
      continue
    texts = {
      column: text_files.value(row, column)
      for column in (*template.columns, *fallback.columns)
    }
    has_all = all(
      isinstance(texts[column], str) and texts[column].strip()
      for column in template.columns
    )
    chosen = template if has_all else fallback
    yield row | {'prompt': chosen.fill_text(texts)}


def task_reader(
  bound: bound_tasks.BoundTask,
  split: str,
  label: str,
  check_lengths: Mapping[str, int] | None,
) -> Reader:
  """Returns a reader of a task's split.

  Args:
    bound: the task, bound to the system's vocabularies.
    split: of the task.
    label: the setting that names the task, for messages.
    check_lengths: as in `BoundTask.check_data`; None skips all checks of the
      data.

  Raises:
    FileNotFoundError: if the data do not exist.
    ValueError: if it is a mixture, or its prompts are token ids without text.
  """
  task = bound.task_in_order(label)
  if check_lengths is not None:
    bound.check_data(split, check_lengths)
    _check_has_texts(task, split, label)
  return functools.partial(read_task, task, split)


def _check_has_texts(task: Any, split: str, label: str) -> None:
  """Checks that the task keeps the text of prompts and answers.

  Raises:
    ValueError: names the missing features.
  """
  spec = task.get_dataset(
    None, split=split, shuffle=False, num_epochs=1
  ).element_spec
  lacking = [
    key
    for key in ('inputs_pretokenized', 'targets_pretokenized')
    if key not in spec
  ]
  if lacking:
    raise ValueError(
      f'{label}: the task is already tokenized and has no '
      f'{" and no ".join(lacking)}, the text of its prompts and answers. Set '
      'copy_pretokenized=True in its seqio.preprocessors.tokenize, or answer a '
      'file of the prompts (INPUT of infer).'
    )


def read_task(task: Any, split: str) -> Iterator[Item]:
  """Yields {'prompt': ..., 'target': ...} for a bound SeqIO task's split.

  The target is a list if the task has several references.
  """
  dataset = task.get_dataset(None, split=split, shuffle=False, num_epochs=1)
  for number, example in enumerate(dataset.as_numpy_iterator(), start=1):
    try:
      prompt = example['inputs_pretokenized'].decode()
      answer = example['targets_pretokenized'].decode()
      references = [text.decode() for text in example.get('references', ())]
    except UnicodeDecodeError as error:
      yield BadLine(f'{task.name}:{split}', number, f'is not UTF-8: {error}')
      continue
    if prompt.strip():
      target = [answer, *references] if references else answer
      yield {'prompt': prompt, 'target': target}
    else:
      yield BadLine(f'{task.name}:{split}', number, 'is empty')


def read_stream(stream: Iterable[bytes], template: Template) -> Iterator[Item]:
  """Yields an item for each line of a text stream, as it arrives."""
  for number, line in enumerate(stream, start=1):
    text, reason = text_files.decode_line(line, number)
    if not reason and not text.strip():
      reason = 'is empty'
    if reason:
      yield BadLine('standard input', number, reason)
    else:
      yield {'prompt': template.fill_text({'prompt': text})}


class Survey(NamedTuple):
  """Statistics of one pass over the items, before any computation.

  Attributes:
    num_lines: number of lines, bad ones included.
    num_bad: number of bad lines.
    first_bad: the first bad line.
    num_targets: number of lines with a reference to score against.
    sha256: hex digest of all items.
  """

  num_lines: int
  num_bad: int
  first_bad: BadLine | None
  num_targets: int
  sha256: str


def survey(items: Iterable[Item], target_column: str) -> Survey:
  """Reads all items once and returns their statistics."""
  num_lines = num_bad = num_targets = 0
  first_bad = None
  digest = hashlib.sha256()
  for item in items:
    num_lines += 1
    if isinstance(item, BadLine):
      num_bad += 1
      first_bad = first_bad or item
      digest.update(f'bad {item.number} {item.reason}\n'.encode())
    else:
      num_targets += reference(item, target_column) is not None
      digest.update(json.dumps(item).encode() + b'\n')
  return Survey(num_lines, num_bad, first_bad, num_targets, digest.hexdigest())


def refusing(read: Reader) -> Reader:
  """Returns a reader that raises ValueError at the first bad line."""

  def read_good() -> Iterator[Item]:
    for item in read():
      if isinstance(item, BadLine):
        raise ValueError(
          f"{item} Set INFER_BAD_LINES='keep' to write an error in its place."
        )
      yield item

  return read_good


def reference(row: Mapping[str, Any], column: str) -> str | list[str] | None:
  """Returns the reference or the list of references of a row, or None.

  References in a list are alternatives of equal rank.
  """
  value = text_files.value(dict(row), column)
  references = value if isinstance(value, list) else [value]
  if references and all(isinstance(text, str) for text in references):
    return value
  return None
