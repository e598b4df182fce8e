# SPDX-License-Identifier: Apache-2.0
"""Data sources: the text columns of a task, before any template.

Reads local files (parallel text, records) into `tf.data`, and locates TFDS data
sets. Templates are applied in `tasks.py`; line parsing is in `text_files.py`.
Importing this module does not import TensorFlow.
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
from l2s_jax.runtime import storage

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# In lines. SeqIO's own buffer of 1,000 tokenized examples leaves a sorted
# corpus sorted. Text takes less memory and time: about 50 MB here.
_SHUFFLE_BUFFER_SIZE = 200_000
_NUM_NAMED_LINES = 3  # bad lines in the summary
# Here, too: importing `cldr` needs Babel, which the other tasks do not.
_CLDR_SPLITS = ('train', 'validation', 'test')

# A pair of parallel text files, a file of records, or a list of either.
DataFiles = str | tuple[str, str] | list[str | tuple[str, str]]


class Columns(NamedTuple):
  """Columns to read from each line.

  Attributes:
    required: columns that must have non-blank text.
    optional: columns with text that may be blank or missing.
    references: columns with a text or a list of texts, or missing.
    names: column names of TSV and CSV files without a header line.
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
  """Returns a SeqIO source of text columns, shuffled only for training."""
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
  """Returns the source of a task's local files; a split is read at first use.

  Examples have the columns as strings. With reference columns, `references` is
  a string vector of all reference texts.

  Args:
    data_files: see `tasks.local_task`; so are `data_dir` and `bad_lines`.
    columns: columns to read.
    pair: names of the two columns of parallel text.
    bad_lines: 'refuse' or 'skip'.
    name: name of the task, for messages.

  Raises:
    FileNotFoundError: if files are missing.
    ValueError: for an invalid setting; later, from the source, for invalid file
      content.
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
      f'COLUMN_NAMES={columns.names!r} applies to TSV and CSV files, but '
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


def memory_source(
  splits: Mapping[str, Mapping[str, Sequence[str]]],
) -> 'seqio.DataSource':
  """Returns the source of examples in memory, by split and column."""
  from l2s_jax.data.features import tf

  @functools.cache
  def read(split: str) -> 'tf.data.Dataset':
    return tf.data.Dataset.from_tensor_slices(
      {name: tf.constant(texts) for name, texts in splits[split].items()}
    )

  return _make_source(read, splits=tuple(splits))


def distilled_source(
  examples: Callable[[], Mapping[str, Sequence[str]]],
  read_gold: Callable[[str], 'tf.data.Dataset'],
  gold_splits: Sequence[str],
) -> 'seqio.DataSource':
  """Returns a source of `inputs` and `targets`; a split is read at first use.

  Args:
    examples: returns the examples of the distilled split.
    read_gold: returns the dataset of another split.
    gold_splits: names of the other splits.
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
  """Refuses a string as the value of a sequence setting.

  A string would be iterated letter by letter.

  Args:
    name: name of the setting.
    value: value of the setting.

  Raises:
    ValueError: with the correct form.
  """
  if isinstance(value, str):
    raise ValueError(
      f"{name}={value!r}: expected a tuple, such as ('{value}',)."
    )


def fingerprint(
  data_files: DataFiles, data_dir: str | None, split: str = 'train'
) -> str:
  """Returns a hash of the contents of a split's files, in their order.

  Args:
    data_files: see `tasks.local_task`.
    data_dir: base folder of relative names.
    split: name of the split, for messages.
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
  """Filter of a split's lines: refuses bad lines, or counts and drops them."""

  def __init__(self, bad_lines: str, label: str, columns: Columns):
    self._bad_lines = bad_lines
    self._label = label
    self._columns = columns
    self._num_lines = 0
    self._bad: list[BadLine] = []
    self._reasons: collections.Counter[str] = collections.Counter()
    self.num_with: collections.Counter[str] = collections.Counter()

  def add(self, row: Fields | BadLine) -> Fields | None:
    """Counts a line; returns a good one, and None for a bad one.

    Raises:
      ValueError: if the line is bad and bad lines are refused.
    """
    self._num_lines += 1
    if not isinstance(row, BadLine):
      return row
    if self._bad_lines == 'refuse':
      raise ValueError(
        f"{row} Or set BAD_LINES='skip' to skip and count such lines. "
        'local_task.template, source_column and target_column require text in '
        f'{", ".join(self._columns.required)}.'
      )
    # The part after a colon or semicolon differs from line to line.
    self._reasons[row.reason.partition(':')[0].partition(';')[0]] += 1
    if len(self._bad) < _NUM_NAMED_LINES:
      self._bad.append(row)
    return None

  def report(self, *, is_scored: bool) -> None:
    """Prints a summary of bad lines and of missing texts to standard error.

    Raises:
      ValueError: if all lines are bad.
    """
    num_bad = self._reasons.total()
    if num_bad:
      reasons = ', '.join(
        f'{reason} ({count:,})' for reason, count in self._reasons.most_common()
      )
      places = ', '.join(f'{bad.path}:{bad.number}' for bad in self._bad)
      summary = (
        f'{self._label}: skipped {num_bad:,} of {self._num_lines:,} lines '
        f"(BAD_LINES='skip'): {reasons}. The first: {places}."
      )
      if num_bad == self._num_lines:
        raise ValueError(f'{summary} No lines remain.')
      _say(summary)
    for column in self._columns.optional:
      if not self.num_with[column]:
        _say(f'{self._label}: no line has text in column {column!r}.')
    if self._columns.references and is_scored:
      if not any(self.num_with[column] for column in self._columns.references):
        _say(
          f'{self._label}: no line has text in any of '
          f'{", ".join(self._columns.references)}; answers are scored against '
          'their targets only.'
        )


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _read_table(
  path: epath.Path, columns: Columns, lines: _Lines
) -> 'tf.data.Dataset':
  """Reads the columns of a record file into memory.

  Parsing inside the tf.data pipeline would need Python there. Such an iterator
  cannot be saved, and may keep the process from exiting.
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
    # `number` is the line number: only CSV and TSV rows may span lines, and
    # their values are all text.
    if isinstance(row, dict) and (reason := _wrong_type(row, columns)):
      row = BadLine(str(path), number, reason)
    good = lines.add(row)
    if good is None:
      continue
    for name, column in texts.items():
      text = text_files.value(good, name) or ''
      # Python's definition of blank; TensorFlow's covers ASCII only.
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
  """Returns the reason an optional or reference column is invalid, or None."""
  for name in columns.optional:
    if not isinstance(text_files.value(row, name), str | None):
      return f'has a value other than text in column {name!r}'
  for name in columns.references:
    value = text_files.value(row, name)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in values):
      return f'has a value other than text or a list of texts in {name!r}'
  return None


def _texts(row: Fields, name: str) -> list[str]:
  """Returns the non-blank texts of a column."""
  value = text_files.value(row, name)
  values = value if isinstance(value, list) else [value]
  return [text for text in values if text and text.strip()]


def _check_parallel_text(
  paths: Sequence[epath.Path], lines: _Lines
) -> tuple[list[bool], list[dict[int, str]]]:
  """Reads two parallel files from end to end.

  Args:
    paths: path of the prompts, path of the answers.
    lines: filter that refuses or counts bad lines.

  Returns:
    Whether each pair of lines is used; for each file a dict from line numbers,
    from 0, to the lines that TensorFlow would read differently.

  Raises:
    ValueError: if the files differ in their number of lines.
  """
  has_mark = [text_files.has_byte_order_mark(path) for path in paths]
  is_good: list[bool] = []
  num_lines = [0, 0]
  odd_lines: list[dict[int, str]] = [{}, {}]
  for rows in itertools.zip_longest(
    *(text_files.read_rows(path, columns=('source',)) for path in paths)
  ):
    for side, row in enumerate(rows):
      # TensorFlow drops all carriage returns and keeps a byte order mark.
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
      'parallel text files need the same number of lines.'
    )
  return is_good, odd_lines


def _read_parallel_text(
  paths: Sequence[epath.Path],
  columns: Columns,
  pair: tuple[str, str],
  lines: _Lines,
) -> 'tf.data.Dataset':
  """Streams the columns of two parallel files, after a full check of both."""
  from l2s_jax.data import features
  from l2s_jax.data.features import tf

  source, target = paths
  names = {*columns.required, *columns.optional}
  unknown = {*names, *columns.references} - set(pair)
  if unknown:
    raise ValueError(
      f'local_task uses the columns {", ".join(sorted(unknown))}, but the '
      f'parallel text {source} and {target} only has the columns '
      f'{" and ".join(pair)}.'
    )
  is_good, odd_lines = _check_parallel_text(paths, lines)
  dataset = tf.data.Dataset.zip(
    {
      name: tf.data.TextLineDataset(
        # TensorFlow has no s3://, and credentials of its own for gs://.
        storage.local_copy(path),
        'GZIP' if input_files.is_gzip(path.name) else None,
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
    ValueError: if the value is malformed.
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
        f'DATA_FILES[{split!r}] has {item!r}; expected a file of records '
        f'({input_files.ENDINGS}), a tuple of two parallel text files, such as '
        "('x.en', 'x.de'), or a list of these. Any file may be compressed "
        '(.gz).'
      )
    paths = [folder / name for name in names]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
      raise FileNotFoundError(
        f'DATA_FILES[{split!r}]: no file {", ".join(missing)}. Relative paths '
        f'are relative to DATA_DIR, which is {data_dir!r}.'
      )
    resolved.append(paths)
  return resolved


def check_tfds(
  source: 'seqio.TfdsDataSource', split: str, task_name: str
) -> None:
  """Refuses a data set that TFDS has not prepared; uses no network.

  Data sets that cannot be identified by their files alone (community data sets,
  builders with arguments) are left to TFDS.

  Args:
    source: source of a task, with its data directory.
    split: split whose files must exist.
    task_name: name of the task, for the message.

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
    'with network access, and set DATA_DIR to its folder. Or set '
    'tfds.download=True to prepare it in this process.'
  )
  try:
    builder = tfds.core.read_only_builder.builder_from_files(
      name, data_dir=data_dir
    )
  except tfds.core.DatasetNotFoundError as error:
    raise FileNotFoundError(
      f'task {task_name!r}: no dataset {name} in {folder}, which is '
      + ('DATA_DIR' if data_dir else "TFDS's default, because DATA_DIR is None")
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
      f'task {task_name!r}: {len(missing)} files of dataset {name}, split '
      f'{tfds_split}, are missing, such as {missing[0]}. {command}'
    )
