# SPDX-License-Identifier: Apache-2.0
"""Writes data as `tfds build` and `seqio_cache_tasks` do."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gin

from l2s_jax.data import tasks
from l2s_jax.data.features import seqio, tf, tfds

SPLITS = ('train', 'validation', 'test')


def bind(vocabulary, name, bindings, answer_vocabulary=None):
  """Binds a task with nothing but these settings in gin."""
  with gin.unlock_config():
    gin.clear_config()
    for key, value in bindings.items():
      gin.bind_parameter(key, value)
    try:
      return tasks.bind(name, vocabulary, answer_vocabulary or vocabulary)
    finally:
      gin.clear_config()


def prepare_tfds(
  dataset: str,
  folder: pathlib.Path,
  rows: Callable[[str], Iterable[Mapping[str, Any]]],
  *,
  num_shards: int = 4,
) -> None:
  """Does what `tfds build` does, by the data set's own builder.

  Args:
    dataset: its name in TFDS.
    folder: of all data sets.
    rows: from a split to its examples, which are not downloaded.
    num_shards: files of a split.
  """
  builder = tfds.builder(dataset, data_dir=folder)
  builder._split_generators = lambda dl_manager: {
    split: list(enumerate(rows(split))) for split in SPLITS
  }
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      try_download_gcs=False, num_shards=num_shards
    )
  )


def write_cache(
  task: seqio.Task,
  folder: pathlib.Path,
  splits: Sequence[str] = ('train',),
  *,
  num_shards: int = 3,
) -> None:
  """Writes what `seqio_cache_tasks` would, which needs Apache Beam."""
  task_folder = pathlib.Path(
    folder, seqio.utils.get_task_dir_from_name(task.name)
  )
  task_folder.mkdir(parents=True)
  for split in splits:
    dataset = task.source.get_dataset(split, shuffle=False)
    examples = list(task.preprocess_precache(dataset))
    for shard in range(num_shards):
      path = f'{split}.tfrecord-{shard:05}-of-{num_shards:05}'
      with tf.io.TFRecordWriter(str(task_folder / path)) as writer:
        for example in examples[shard::num_shards]:
          record = seqio.dict_to_tfexample(
            {key: value.numpy() for key, value in example.items()}
          )
          writer.write(record.SerializeToString())
    info = {
      'features': {
        key: {
          'dtype': value.dtype.name,
          'shape': [None] * min(1, len(value.shape))
          + value.shape[1:].as_list(),
        }
        for key, value in examples[0].items()
      },
      'num_shards': num_shards,
      'seqio_version': seqio.__version__,
    }
    stats = {'examples': len(examples)}
    for name, content in (('info', info), ('stats', stats)):
      (task_folder / f'{name}.{split}.json').write_text(json.dumps(content))
  (task_folder / 'COMPLETED').touch()
