# SPDX-License-Identifier: Apache-2.0
"""Data pipelines of other engines, for `benchmark --data --peers`.

SeqIO writes TFRecord files, as `seqio_cache_tasks` does; Hugging Face
`datasets` maps JSONL to Arrow files; Grain reads our ArrayRecord files.
`datasets` and `grain` are optional. TensorFlow is imported inside functions
only, since the processes of `datasets` import this module.
"""

import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from l2s_jax.data import batching, packing
from l2s_jax.data.cached import cache_format, cache_task
from l2s_jax.performance import peers
from l2s_jax.vocabularies import base, byte, sentencepiece

if TYPE_CHECKING:
  import seqio

PEERS = {
  'seqio': peers.Peer('seqio', '', ('seqio',)),
  'datasets': peers.Peer('datasets', '', ('datasets',)),
  'grain': peers.Peer('grain', '', ('grain',)),
}
# The fastest setting on two cores; Grain's default is 16.
_GRAIN_THREADS = 1

Vocabularies = tuple[base.Vocabulary, base.Vocabulary]


def library(vocabulary: base.Vocabulary) -> str:
  """Returns the name of the library that implements a tokenizer."""
  if isinstance(vocabulary, sentencepiece.SentencePieceVocabulary):
    return 'sentencepiece'
  is_ours = isinstance(vocabulary, byte.ByteVocabulary)
  return 'l2s_jax' if is_ours else 'tokenizers'


def write_seqio(
  task: 'seqio.Task', split: str, path: pathlib.Path, num_examples: int
) -> None:
  """Writes the first examples of a bound task to a TFRecord file.

  Args:
    task: the task.
    split: its split.
    path: the file.
    num_examples: number of examples.
  """
  from l2s_jax.data.features import seqio, tf

  dataset = task.get_dataset(None, split=split, shuffle=False)
  with tf.io.TFRecordWriter(str(path)) as writer:
    for example in dataset.take(num_examples).as_numpy_iterator():
      writer.write(seqio.dict_to_tfexample(example).SerializeToString())


def map_datasets(
  path: pathlib.Path,
  vocabularies: Vocabularies,
  num_examples: int,
  num_processes: int,
) -> int:
  """Tokenizes the first lines of a JSONL file into Arrow files.

  Call it in a process of its own, since it forks.

  Args:
    path: file of lines with `inputs` and `targets`.
    vocabularies: vocabularies of the two.
    num_examples: number of lines.
    num_processes: tokenizing processes; 1 is this process.

  Returns:
    The number of tokens.
  """
  import datasets

  datasets.disable_progress_bars()
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    lines = pathlib.Path(folder, 'lines.jsonl')
    with path.open() as source, lines.open('w') as file:
      file.writelines(next(source) for _ in range(num_examples))
    read = datasets.Dataset.from_json(str(lines), cache_dir=folder)
    mapped = read.map(
      _Tokenize(vocabularies),
      batched=True,
      num_proc=num_processes if num_processes > 1 else None,
      cache_file_name=str(pathlib.Path(folder, 'mapped.arrow')),
    )
    return sum(mapped['num_tokens'][:])


class _Tokenize:
  """Maps texts to token ids with EOS, and counts tokens per example."""

  def __init__(self, vocabularies: Vocabularies):
    self._vocabularies = vocabularies

  def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    ids = {
      f'{key}_ids': [
        [*row, vocabulary.eos_id]
        for row in vocabulary.encode_batch(list(batch[key]))
      ]
      for key, vocabulary in zip(
        ('inputs', 'targets'), self._vocabularies, strict=True
      )
    }
    counts = [sum(map(len, rows)) for rows in zip(*ids.values(), strict=True)]
    return {**ids, 'num_tokens': counts}


def grain_reader(
  task: cache_task.CachedTask, lengths: tuple[int, int], batch_size: int
) -> Callable[[int], None]:
  """Returns a function that reads shuffled examples in batches by Grain.

  Args:
    task: a cache of one task, with split 'train'.
    lengths: prompt and answer length of rows.
    batch_size: rows of a batch.

  Returns:
    A function of the number of examples.
  """
  import grain

  paths = sorted(map(str, task.cache.folder.rglob('*.array_record')))
  source = grain.sources.ArrayRecordDataSource(paths)

  def decode(record: bytes) -> Any:
    return cache_format.decode_ids(record, task.cache.dtype)

  def lay_out(rows: Sequence[Any]) -> batching.Batch:
    return packing.lay_out(
      [prompt[: lengths[0]] for prompt, _ in rows],
      [answer[: lengths[1]] for _, answer in rows],
      range(len(rows)),
      task_feature_lengths={'inputs': lengths[0], 'targets': lengths[1]},
      prompt_pad_id=task.prompt_vocabulary.pad_id,
      answer_pad_id=task.answer_vocabulary.pad_id,
      start_id=task.answer_vocabulary.start_id,
    )

  shuffled = grain.MapDataset.source(source).shuffle(seed=0).map(decode)
  options = grain.ReadOptions(num_threads=_GRAIN_THREADS)

  def read(num_examples: int) -> None:
    batches = shuffled[len(source) - num_examples :].batch(
      batch_size, drop_remainder=True, batch_fn=lay_out
    )
    for _ in batches.to_iter_dataset(options):
      pass

  return read
