# SPDX-License-Identifier: Apache-2.0
"""`benchmark --data`: speed of tokenization, caching and reading.

The first examples of a task are tokenized: in memory, into files, and into
batches. Caches with fixed lengths, made of the task's own tokens, are read:
whole batches, and the shares of several processes. No model is run.

Contenders that start processes or build pipelines are called for few examples
and for all, and their speed is that of the examples in between:

    examples/s = (all - few) / (time of all - time of few)
"""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from l2s_jax.evaluation import report
from l2s_jax.evaluation.report import TableRow
from l2s_jax.performance import (
  data_input,
  data_peers,
  data_reading,
  data_tokenizing,
  peers,
  speed_report,
)
from l2s_jax.runtime import files

_JSON, _MARKDOWN = 'data.json', 'data.md'
IMPORTING = 'importing'
# Modules imported by training from a cache, and in addition without one.
IMPORTS = ('jax', 'l2s_jax.data.cached.cache_batches', 'l2s_jax.data.features')
_PACKAGES = (
  'array_record', 'tokenizers', 'sentencepiece', 'seqio', 'tensorflow'
)  # fmt: skip
_RATE = {
  'engine': 'engine',
  'examples_per_sec': 'examples/s',
  'spread': 'quartiles',
}
_SECTIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
  data_tokenizing.PART: (
    'Tokenizing',
    {'from_to': 'from -> to', 'processes': 'processes', **_RATE},
  ),
  data_reading.WHOLE: (
    'Reading back, on one core',
    {'prompt_length': 'in', 'num_tokens': 'out', **_RATE},
  ),
  data_reading.PARTS: (
    "A process's part of a batch",
    {
      'prompt_length': 'in',
      'num_tokens': 'out',
      'batch_size': 'batch',
      'processes': 'processes',
      'ms_per_step': 'ms/step',
      'spread': 'quartiles',
    },
  ),
  IMPORTING: ('Importing', {'engine': 'module', 'secs': 'CPU s'}),
}
_WORDS = """\
Times are medians over {rounds} rounds, with quartiles. The contenders take
turns. The startup of a contender is not included.

Tokenizing: the first {num_examples:,} examples of {task}, split {split!r},
{prompt_tokens:.1f} + {answer_tokens:.1f} tokens on average. `text -> ids` is
one call of the tokenizer library for many texts. `text -> records` is the work
of the verb `cache` on texts in memory: one thread, in CPU seconds. `task ->
cache` is the complete verb, with source, template and files. seqio is its
pipeline in one process, with TensorFlow's threads, into TFRecord files, as
written by `seqio_cache_tasks`. datasets reads the same texts, with the template
filled in, from a JSONL file, and maps them to Arrow files by the same tokenizer
call. `task -> batches` is training without a cache.

Reading back: each example is read once, shuffled, verified by its checksum
(except with Grain), and laid out in batches of {batch_size:,}. Times are CPU
seconds of all threads. A process's part: the time of the slowest process for
its own rows, if that many processes share the batch; each was timed alone.
"""


def run(
  folder: pathlib.Path,
  given: data_input.DataInput,
  *,
  rounds: int,
  has_peers: bool,
  dry_run: bool = False,
) -> None:
  """Runs all timings; writes data.json and data.md.

  Args:
    folder: output folder; also holds temporary caches.
    given: the input.
    rounds: measured rounds; one more precedes them.
    has_peers: whether SeqIO, Hugging Face `datasets` and Grain take part.
    dry_run: prints the input, and stops.

  Raises:
    ValueError: if a setting is invalid, or the task is not a single text task.
  """
  given.check()
  # Limits a process to one core: the library has threads of its own.
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  opened = data_input.open_input(given)
  num_examples = opened.size.all
  print(
    f'{opened.texts.label}: {num_examples:,} of '
    f'{opened.texts.num_examples:,} examples, {rounds} rounds',
    flush=True,
  )
  if dry_run:
    return
  scratch = folder / '.data'
  shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
  scratch.mkdir(parents=True)
  present = _present_peers() if has_peers else []
  has_grain = 'grain' in present
  try:
    rows = data_tokenizing.time_tokenizing(opened, scratch, present, rounds)
    for lengths in given.lengths:
      rows += data_reading.time_reading(
        opened, lengths, scratch, rounds, has_grain
      )
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  rows += _time_imports(rounds, has_grain)
  # Mean lengths with EOS.
  means = [1 + float(np.mean(list(map(len, side)))) for side in opened.ids]
  _write(
    folder,
    rows,
    _WORDS.format(
      rounds=rounds,
      num_examples=num_examples,
      task=opened.task.name,
      split=given.split,
      prompt_tokens=means[0],
      answer_tokens=means[1],
      batch_size=given.batch_size,
    ),
    dict.fromkeys((*_PACKAGES, *present)),
  )


def _present_peers() -> list[str]:
  """Returns the installed peers; prints the missing ones and the reasons."""
  present = []
  for name, peer in data_peers.PEERS.items():
    reason = peers.why_missing(peer)
    if reason is None:
      present.append(name)
    else:
      print(f'{name} is skipped: {reason}')
  return present


def _time_imports(rounds: int, has_grain: bool) -> list[TableRow]:
  """Times imports, in CPU seconds, each in a process of its own."""
  modules = [*IMPORTS, *['grain'] * has_grain]
  secs: dict[str, list[float]] = {module: [] for module in modules}
  for _ in range(rounds):
    for module in modules:
      found = subprocess.run(
        [
          sys.executable,
          '-c',
          'import time; start = time.process_time(); '
          f'import {module}; print(time.process_time() - start)',
        ],
        check=True,
        capture_output=True,
        text=True,
      )
      secs[module].append(float(found.stdout))
  return [
    {'part': IMPORTING, 'engine': module, 'rounds': {'secs': found}}
    for module, found in secs.items()
  ]


def _shown(row: TableRow) -> TableRow:
  """Returns a row with median and quartiles."""
  ((quantity, values),) = row['rounds'].items()
  low, middle, high = np.percentile(values, [25, 50, 75])
  digits = 0 if middle >= 100 else 2
  return row | {
    quantity: float(middle) if middle < 100 else round(middle),
    'spread': f'{low:,.{digits}f}-{high:,.{digits}f}',
  }


def _write(
  folder: pathlib.Path,
  rows: Sequence[TableRow],
  words: str,
  packages: Iterable[str],
) -> None:
  machine = speed_report.machine() | {
    name: importlib.metadata.version(name) for name in packages
  }
  load = os.getloadavg()
  machine['load_average'] = ', '.join(f'{x:.2f}' for x in load)
  files.write_json(folder / _JSON, {'rows': rows, 'machine': machine})
  parts = ['# Data\n']
  for part, (heading, columns) in _SECTIONS.items():
    shown = [_shown(row) for row in rows if row['part'] == part]
    parts += [f'## {heading}\n', report.markdown_table(shown, columns)]
  parts += [words, ''.join(f'- {name}: {x}\n' for name, x in machine.items())]
  text = '\n'.join(parts)
  with files.whole(folder / _MARKDOWN) as file:
    file.write(text)
  print(f'{text}\nSee {folder}')
