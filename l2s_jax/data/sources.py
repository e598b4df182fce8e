# SPDX-License-Identifier: Apache-2.0
"""Sources: the columns of text that tasks are made of, before any template.

Reads the user's own files (parallel text, records) into `tf.data`, and looks
for the data sets of TFDS. What becomes of the columns is in `tasks.py`, how a
line is read in `text_files.py`. Importing this module does not import
TensorFlow.
"""

import collections
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from l2s_jax.data import (
  distilled,
  input_files,
  seqio_internals,
  text_files,
)
from l2s_jax.data.record_files import Fields
from l2s_jax.data.text_files import BadLine

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# Lines. SeqIO shuffles tokenized examples, 1,000 at a time, which leaves a
# sorted corpus sorted; text takes less memory and time, about 50 MB here.
_SHUFFLE_BUFFER_SIZE = 200_000
_NUM_NAMED_LINES = 3  # of those left out
# Here too: importing `cldr` needs Babel, which the other tasks do not.
_CLDR_SPLITS = ('train', 'validation', 'test')

# A pair of parallel text files, a file of records, or a list of either.
DataFiles = str | tuple[str, str] | list[str | tuple[str, str]]


class Columns(NamedTuple):
  """What is read of each line.

  Attributes:
    required: columns with text that is not blank.
    optional: columns whose text may be blank or missing.
    references: columns with text or a list of texts, or missing.
    names: of TSV and CSV files whose first line does not name them.
  """

  required: Sequence[str]
  optional: Sequence[str] = ()
  references: Sequence[str] = ()
  names: Sequence[str] | None = None


def cldr_source() -> 'seqio.DataSource':
  """Returns the source of the task `cldr`, columns `prompt` and `answer`."""
  return _make_source(_read_cldr, splits=_CLDR_SPLITS)


@functools.cache
def _read_cldr(split: str) -> 'tf.data.Dataset':
  from l2s_jax.data import cldr
  from l2s_jax.data.features import tf

  examples = list(cldr.examples(split))
  return tf.data.Dataset.from_tensor_slices(
    {
      column: [example[column] for example in examples]
      for column in ('prompt', 'answer')
    }
  )


def _make_source(
  read: Callable[[str], 'tf.data.Dataset'], splits: Sequence[str]
) -> 'seqio.DataSource':
  """Returns a source of a split's columns of text, shuffled when training."""
  from l2s_jax.data.features import seqio

  def dataset_fn(
    split: str, shuffle_files: bool, seed: int | None = None
  ) -> 'tf.data.Dataset':
    dataset = read(split)
    if not shuffle_files:
      return dataset
    return dataset.shuffle(_SHUFFLE_BUFFER_SIZE, seed)

  return seqio.FunctionDataSource(dataset_fn, splits)


def local_source(
  data_files: Mapping[str, DataFiles],
  *,
  data_dir: str | None,
  columns: Columns,
  pair: tuple[str, str],
  bad_lines: str,
  name: str,
) -> 'seqio.DataSource':
  """Returns the source of a task's local files, each read when first used.

  Its examples have the columns as strings, and, where there are columns of
  references, all their texts as `references`, a vector of strings.

  Args:
    data_files: see `tasks.local_task`; so are `data_dir` and `bad_lines`.
    columns: what to read.
    pair: the names of the two columns of parallel text.
    bad_lines: 'refuse' or 'skip'.
    name: of the task, for messages.

  Raises:
    FileNotFoundError: if files are missing.
    ValueError: if a setting is not understood; later, from the source, if what
      a file holds is not.
  """
  if bad_lines not in ('refuse', 'skip'):
    raise ValueError(f"BAD_LINES={bad_lines!r}: expected 'refuse' or 'skip'.")
  if not isinstance(data_files, Mapping):
    raise ValueError(
      f'DATA_FILES={data_files!r}: expected the files of each split, such as '
      "{'train': 'train.jsonl', 'validation': 'val.jsonl'}."
    )
  check_sequence('COLUMN_NAMES', columns.names)
  check_sequence('local_task.reference_columns', columns.references)
  files = {
    split: _resolve_files(split, value, data_dir)
    for split, value in data_files.items()
  }
  kinds = {
    text_files.kind(path.name)
    for split in files.values()
    for paths in split
    for path in paths
  }
  if columns.names is not None and not kinds & {'tsv', 'csv'}:
    raise ValueError(
      f'COLUMN_NAMES={columns.names!r} is for TSV and CSV files, and '
      'DATA_FILES has none.'
    )

  @functools.cache
  def read(split: str) -> 'tf.data.Dataset':
    lines = _Lines(bad_lines, f'{name}, split {split!r}', columns)
    datasets = [
      _read_table(paths[0], columns, lines)
      if len(paths) == 1
      else _read_parallel_text(paths, columns, pair, lines)
      for paths in files[split]
    ]
    lines.report(is_scored=split != 'train')
    return functools.reduce(lambda one, two: one.concatenate(two), datasets)

  return _make_source(read, splits=tuple(files))


def distilled_source(
  examples: Callable[[], Mapping[str, Sequence[str]]],
  read_gold: Callable[[str], 'tf.data.Dataset'],
  gold_splits: Sequence[str],
) -> 'seqio.DataSource':
  """Returns a source of `inputs` and `targets`, read split by split.

  Args:
    examples: returns those of the distilled split.
    read_gold: returns those of another split.
    gold_splits: the names of the other splits.
  """
  from l2s_jax.data.features import tf

  @functools.cache
  def read(split: str) -> 'tf.data.Dataset':
    if split != distilled.SPLIT:
      return read_gold(split)
    return tf.data.Dataset.from_tensor_slices(
      {name: tf.constant(texts) for name, texts in examples().items()}
    )

  return _make_source(
    read, splits=tuple(dict.fromkeys([distilled.SPLIT, *gold_splits]))
  )


def check_sequence(name: str, value: Any) -> None:
  """Refuses a text where several are meant; it would be taken by letters.

  Args:
    name: of the setting.
    value: what it is.

  Raises:
    ValueError: with how to write it.
  """
  if isinstance(value, str):
    raise ValueError(
      f'{name}={value!r}: expected a tuple, with a comma even for one: '
      f"('{value}',)."
    )


def fingerprint(
  data_files: DataFiles, data_dir: str | None, split: str = 'train'
) -> str:
  """Returns a hash of the contents of a split's files, in their order.

  Args:
    data_files: see `tasks.local_task`.
    data_dir: where relative names start.
    split: for messages.
  """
  digest = hashlib.sha256()
  for paths in _resolve_files(split, data_files, data_dir):
    for path in paths:
      with path.open('rb') as file:
        while block := file.read(1 << 20):
          digest.update(block)
      digest.update(b'end of file')
  return digest.hexdigest()


class _Lines:
  """Passes a split's good lines on, and refuses or counts the bad ones."""

  def __init__(self, bad_lines: str, label: str, columns: Columns):
    self._bad_lines = bad_lines
    self._label = label
    self._columns = columns
    self._num_lines = 0
    self._bad: list[BadLine] = []
    self._reasons: collections.Counter[str] = collections.Counter()
    self.num_with: collections.Counter[str] = collections.Counter()

  def add(self, row: Fields | BadLine) -> Fields | None:
    """Counts a line; returns it if it is good.

    Raises:
      ValueError: if it is bad, and bad lines are refused.
    """
    self._num_lines += 1
    if not isinstance(row, BadLine):
      return row
    if self._bad_lines == 'refuse':
      raise ValueError(
        f"{row} Or set BAD_LINES='skip', which leaves such lines out and "
        f'counts them. Text is needed in {", ".join(self._columns.required)}, '
        'by local_task.template, source_column and target_column.'
      )
    # What differs from line to line comes after the colon or semicolon.
    self._reasons[row.reason.partition(':')[0].partition(';')[0]] += 1
    if len(self._bad) < _NUM_NAMED_LINES:
      self._bad.append(row)
    return None

  def report(self, *, is_scored: bool) -> None:
    """Says on standard error what was left out, if anything.

    Raises:
      ValueError: if that is all.
    """
    num_bad = self._reasons.total()
    if num_bad:
      reasons = ', '.join(
        f'{reason} ({count:,})' for reason, count in self._reasons.most_common()
      )
      places = ', '.join(f'{bad.path}:{bad.number}' for bad in self._bad)
      summary = (
        f'{self._label}: {num_bad:,} of {self._num_lines:,} lines are left out '
        f"(BAD_LINES='skip'): {reasons}. The first: {places}."
      )
      if num_bad == self._num_lines:
        raise ValueError(f'{summary} None remains.')
      _say(summary)
    for column in self._columns.optional:
      if not self.num_with[column]:
        _say(f'{self._label}: no line has text in column {column!r}.')
    if self._columns.references and is_scored:
      if not any(self.num_with[column] for column in self._columns.references):
        _say(
          f'{self._label}: no line has text in any of '
          f'{", ".join(self._columns.references)}; answers are scored against '
          'their targets alone.'
        )


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _read_table(
  path: epath.Path, columns: Columns, lines: _Lines
) -> 'tf.data.Dataset':
  """Reads the columns of a file of records into memory.

  In memory because parsing it inside the pipeline would need Python there, and
  such an iterator can be neither saved nor relied on to let the process exit.
  """
  from l2s_jax.data.features import tf

  has_names = text_files.kind(path.name) in ('tsv', 'csv')
  rows = text_files.read_rows(
    path,
    columns=columns.required,
    column_names=columns.names if has_names else None,
  )
  texts: dict[str, list[str]] = {
    name: [] for name in (*columns.required, *columns.optional)
  }
  references: list[list[str]] = []
  for number, row in enumerate(rows, start=1):
    # TSV and CSV, where a row may be several lines, hold nothing but text.
    if isinstance(row, dict) and (reason := _wrong_type(row, columns)):
      row = BadLine(str(path), number, reason)
    good = lines.add(row)
    if good is None:
      continue
    for name, column in texts.items():
      text = text_files.value(good, name) or ''
      # Blank is what Python calls so; TensorFlow knows ASCII alone.
      column.append(text if text.strip() else '')
    references.append(
      [text for name in columns.references for text in _texts(good, name)]
    )
    lines.num_with.update(
      name
      for name in (*columns.optional, *columns.references)
      if _texts(good, name)
    )
  values: dict[str, tf.Tensor] = {
    name: tf.constant(column, tf.string) for name, column in texts.items()
  }
  if columns.references:
    values['references'] = tf.RaggedTensor.from_row_lengths(
      tf.constant(list(itertools.chain(*references)), tf.string),
      np.array([len(row) for row in references], np.int64),
    )
  return tf.data.Dataset.from_tensor_slices(values)


def _wrong_type(row: Fields, columns: Columns) -> str | None:
  """Returns what is wrong with columns that may be missing, if anything."""
  for name in columns.optional:
    if not isinstance(text_files.value(row, name), str | None):
      return f'has something else than text in column {name!r}'
  for name in columns.references:
    value = text_files.value(row, name)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in values):
      return f'has something else than text, or a list of it, in {name!r}'
  return None


def _texts(row: Fields, name: str) -> list[str]:
  """Returns the texts of a column, those that are blank left out."""
  value = text_files.value(row, name)
  values = value if isinstance(value, list) else [value]
  return [text for text in values if text and text.strip()]


def _check_parallel_text(
  paths: Sequence[epath.Path], lines: _Lines
) -> tuple[list[bool], list[dict[int, str]]]:
  """Reads two files from end to end.

  Args:
    paths: of prompts and of answers.
    lines: counts the bad ones, or refuses them.

  Returns:
    Whether each pair of lines is used; for each file the lines, by number from
    0, that TensorFlow would read otherwise.

  Raises:
    ValueError: if one file has more lines than the other.
  """
  has_mark = [text_files.has_byte_order_mark(path) for path in paths]
  is_good: list[bool] = []
  num_lines = [0, 0]
  odd_lines: list[dict[int, str]] = [{}, {}]
  for rows in itertools.zip_longest(
    *(text_files.read_rows(path, columns=('source',)) for path in paths)
  ):
    for side, row in enumerate(rows):
      # TensorFlow drops every carriage return, and keeps a byte order mark.
      if isinstance(row, dict) and (
        '\r' in row['source'] or (has_mark[side] and not num_lines[side])
      ):
        odd_lines[side][num_lines[side]] = row['source']
      num_lines[side] += row is not None
    if None not in rows:
      bad = [row for row in rows if isinstance(row, BadLine)]
      is_good.append(lines.add(bad[0] if bad else rows[0]) is not None)
  if num_lines[0] != num_lines[1]:
    raise ValueError(
      f'{paths[0]} has {num_lines[0]} lines and {paths[1]} has {num_lines[1]}; '
      'parallel text needs as many in both, line by line.'
    )
  return is_good, odd_lines


def _read_parallel_text(
  paths: Sequence[epath.Path],
  columns: Columns,
  pair: tuple[str, str],
  lines: _Lines,
) -> 'tf.data.Dataset':
  """Streams the columns of two files, checked from end to end first."""
  from l2s_jax.data import features
  from l2s_jax.data.features import tf

  source, target = paths
  names = {*columns.required, *columns.optional}
  unknown = {*names, *columns.references} - set(pair)
  if unknown:
    raise ValueError(
      f'local_task names {", ".join(sorted(unknown))}, but the parallel text '
      f'{source} and {target} has no column but {" and ".join(pair)}.'
    )
  is_good, odd_lines = _check_parallel_text(paths, lines)
  dataset = tf.data.Dataset.zip(
    {
      name: tf.data.TextLineDataset(
        str(path), 'GZIP' if input_files.is_gzip(path.name) else None
      )
      for name, path in zip(pair, paths, strict=True)
      if name in names
    }
  )
  mended = {
    name: (tf.constant(list(odd), tf.int64), tf.constant(list(odd.values())))
    for name, odd in zip(pair, odd_lines, strict=True)
    if name in names and odd
  }
  if mended or not all(is_good):
    are_good = tf.constant(is_good)

    def mend(numbers: 'tf.Tensor', texts: dict[str, 'tf.Tensor']) -> Any:
      for name, (odd, as_read) in mended.items():
        places = tf.minimum(tf.searchsorted(odd, numbers), len(odd) - 1)
        is_odd = tf.gather(odd, places) == numbers
        texts[name] = tf.where(is_odd, tf.gather(as_read, places), texts[name])
      is_kept = tf.gather(are_good, numbers)
      return {name: column[is_kept] for name, column in texts.items()}

    dataset = features.map_batches(dataset.enumerate(), mend)
  return dataset.apply(tf.data.experimental.assert_cardinality(sum(is_good)))


def _resolve_files(
  split: str, value: DataFiles, data_dir: str | None
) -> list[list[epath.Path]]:
  """Returns one path for each table, two for each parallel text.

  Raises:
    FileNotFoundError: naming the gin key and every missing path.
    ValueError: if the value is of another form.
  """
  folder = epath.Path(data_dir or '')
  resolved = []
  for item in value if isinstance(value, list) else [value]:
    is_table = isinstance(item, str)
    names = (item,) if isinstance(item, str) else item
    if len(names) != (1 if is_table else 2) or any(
      (text_files.kind(name) != 'text') != is_table for name in names
    ):
      raise ValueError(
        f'DATA_FILES[{split!r}] has {item!r}; expected a file of records, '
        f'{input_files.ENDINGS}, or a pair of parallel text files in '
        "parentheses, ('x.en', 'x.de'), any of them with .gz; or a list, in "
        'brackets, of several of these.'
      )
    paths = [folder / name for name in names]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
      raise FileNotFoundError(
        f'DATA_FILES[{split!r}]: no file {", ".join(missing)}. Relative '
        f'names start at DATA_DIR, which is {data_dir!r}.'
      )
    resolved.append(paths)
  return resolved


def check_tfds(
  source: 'seqio.TfdsDataSource', split: str, task_name: str
) -> None:
  """Refuses a data set that TFDS has not prepared, without any network.

  Data sets that cannot be told from their files alone (of a community, or
  with arguments to their builder) are left to TFDS.

  Args:
    source: of a task; its data directory is where to look.
    split: whose files must be there.
    task_name: for the message.

  Raises:
    FileNotFoundError: naming the data set, the folder and the command that
      prepares it.
  """
  from l2s_jax.data.features import tfds

  loader = source.tfds_dataset
  if loader.tfds_splits and split not in loader.tfds_splits:
    return  # Each split is a data set of its own.
  name, data_dir = loader.get_split_params(split)
  if name is None or seqio_internals.has_builder_kwargs(loader):
    return
  if tfds.core.naming.parse_builder_name_kwargs(name)[0].namespace:
    return
  folder = data_dir or tfds.core.constants.DATA_DIR
  command = (
    f'Prepare it with\n  tfds build {name} --data_dir={folder}\non a host '
    'with network, and set DATA_DIR to where it is then. Or set '
    'tfds.download=True to have it prepared by this process.'
  )
  try:
    builder = tfds.core.read_only_builder.builder_from_files(
      name, data_dir=data_dir
    )
  except tfds.core.DatasetNotFoundError as error:
    raise FileNotFoundError(
      f'task {task_name!r}: no data set {name} in {folder}, which is '
      + ('DATA_DIR' if data_dir else "TFDS's own default, as DATA_DIR is None")
      + f'. {command}'
    ) from error
  tfds_split = seqio_internals.tfds_split(loader, split)
  if tfds_split not in builder.info.splits:
    return
  missing = [
    file.filename
    for file in builder.info.splits[tfds_split].file_instructions
    if not epath.Path(file.filename).exists()
  ]
  if missing:
    raise FileNotFoundError(
      f'task {task_name!r}: {len(missing)} files of data set {name}, split '
      f'{tfds_split}, are missing, such as {missing[0]}. {command}'
    )
