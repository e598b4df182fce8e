# SPDX-License-Identifier: Apache-2.0
"""SeqIO adapters: our vocabularies and the feature converter of our batch keys.

This is the only module that imports TensorFlow and SeqIO: silently, and with
all GPUs left to JAX. Other modules take both from here,
`from l2s_jax.data.features import seqio, tf`, so that no other import skips
this setup. Tasks are in `tasks.py`; batches without TensorFlow are in
`batching.py`.
"""

import contextlib
import functools
import itertools
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from l2s_jax.data import packing, seqio_internals
from l2s_jax.models import batch_keys
from l2s_jax.runtime import memory
from l2s_jax.vocabularies import base, sentencepiece


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Redirects file descriptor 2 to /dev/null inside the block.

  TensorFlow's C++ runtime prints to it before it reads any log level. A failing
  import still raises: Python prints the traceback after the block.
  """
  saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(nowhere)


def _is_worth_reading(record: logging.LogRecord) -> bool:
  """Filters out SeqIO and TFDS warnings that do not apply to our usage."""
  return record.levelno >= logging.ERROR or not any(
    f'{os.sep}{package}{os.sep}' in record.pathname
    for package in ('seqio', 'tensorflow_datasets')
  )


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
with _silence(), memory.uncollected():
  import seqio
  import tensorflow as tf
  import tensorflow_datasets as tfds  # noqa: F401, for sources.py
  import tensorflow_text
  from sentencepiece import sentencepiece_model_pb2

  tf.config.set_visible_devices([], 'GPU')
logging.getLogger('absl').addFilter(_is_worth_reading)

# AutoGraph rewrites the source of what a dataset maps, two seconds of a start.
# It is for Python's `if` and loops over tensors, which our functions do not
# have; a user's steps are converted as anywhere.
as_written = tf.autograph.experimental.do_not_convert

EOS_STEPS = (
  seqio.preprocessors.append_eos,
  seqio.preprocessors.append_eos_after_trim,
)
_MAPPED_AT_ONCE = 256  # examples
TOKENIZE_STEPS = (
  seqio.preprocessors.tokenize,
  seqio.preprocessors.tokenize_and_append_eos,
)


class SeqioVocabulary(seqio.Vocabulary):
  """Adapter from one of our vocabularies to the `seqio.Vocabulary` API."""

  def __init__(self, vocabulary: base.Vocabulary):
    super().__init__()
    self.vocabulary = vocabulary

  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, SeqioVocabulary) and self.vocabulary == other.vocabulary
    )

  def __hash__(self) -> int:
    return hash(self.vocabulary)

  @property
  def start_id(self) -> int:
    return self.vocabulary.start_id

  @property
  def eos_id(self) -> int:
    return self.vocabulary.eos_id

  @property
  def eos_ids(self) -> tuple[int, ...]:
    return self.vocabulary.eos_ids

  @property
  def pad_id(self) -> int:
    return self.vocabulary.pad_id

  @property
  def unk_id(self) -> int | None:
    return self.vocabulary.unk_id

  @property
  def _base_vocab_size(self) -> int:
    return self.vocabulary.vocab_size

  def _encode(self, s: str) -> list[int]:
    return self.vocabulary.encode(s)

  def decode(self, ids: Any) -> str:
    # Overrides `decode` as well: SeqIO's keeps the EOS, ours cuts before it.
    return self.vocabulary.decode(np.asarray(ids).tolist())

  def _decode(self, ids: Any) -> str:
    return self.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
    """Returns the ids of a scalar text, or ragged ids of a vector of texts."""
    texts = tf.reshape(s, [-1])

    def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
      rows = self.vocabulary.encode_batch([text.decode() for text in texts])
      lengths = np.fromiter(map(len, rows), np.int64, len(rows))
      ids = itertools.chain.from_iterable(rows)
      return np.fromiter(ids, np.int32, lengths.sum()), lengths

    ids, lengths = tf.numpy_function(
      encode, [texts], [tf.int32, tf.int64], stateful=False
    )
    ids = tf.ensure_shape(ids, [None])
    if s.shape.rank == 0:
      return ids
    return tf.RaggedTensor.from_row_lengths(
      ids, tf.ensure_shape(lengths, [None]), validate=False
    )

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(rows: np.ndarray) -> np.ndarray:
      texts = [
        self.decode(row).encode() for row in rows.reshape(-1, rows.shape[-1])
      ]
      return np.array(texts, object).reshape(rows.shape[:-1])

    texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(texts, ids.shape[:-1])

  def __str__(self) -> str:
    return f'SeqioVocabulary({self.vocabulary!r})'


class SeqioSentencePiece(SeqioVocabulary):
  """A SentencePiece vocabulary with TensorFlow Text's op as its encoder.

  No Python code runs in the input pipeline.
  """

  @functools.cached_property
  def model(self) -> bytes:
    """Serialized model with the extra ids, which `vocabulary.path` lacks."""
    vocabulary = self.vocabulary
    assert isinstance(vocabulary, sentencepiece.SentencePieceVocabulary)
    return vocabulary.model

  @functools.cached_property
  def _tokenizer(self) -> tensorflow_text.SentencepieceTokenizer:
    with tf.init_scope():
      return tensorflow_text.SentencepieceTokenizer(self.model)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
    return self._tokenizer.tokenize(s)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
  """Unwraps a ValueError of ours from TensorFlow's InvalidArgumentError."""
  try:
    yield
  except tf.errors.InvalidArgumentError as error:
    found = re.search(r'ValueError: (.+)\nTraceback', str(error))
    if found is None:
      raise
    raise ValueError(found[1]) from error


def map_batches(
  dataset: tf.data.Dataset, fn: Callable[..., Any]
) -> tf.data.Dataset:
  """Maps a vectorized function over the examples of a dataset.

  Examples are mapped in batches: one call per example takes twenty times as
  long as most functions.

  Args:
    dataset: dataset of examples.
    fn: function from batched columns [n, ...] to [n, ...]. It may drop examples
      if the dataset's cardinality is unknown. It has no Python `if` or loop
      over tensors.
  """
  mapped = dataset.ragged_batch(_MAPPED_AT_ONCE).map(as_written(fn)).unbatch()
  number = dataset.cardinality()
  if number < 0:
    return mapped
  return mapped.apply(tf.data.experimental.assert_cardinality(number))


def choose(dataset: tf.data.Dataset, names: Collection[str]) -> tf.data.Dataset:
  """Returns the dataset with the named columns alone."""
  return dataset.map(
    as_written(lambda example: {name: example[name] for name in names})
  )


def wrap_vocabulary(vocabulary: base.Vocabulary) -> SeqioVocabulary:
  """Returns a `seqio.Vocabulary` with the ids of `vocabulary`."""
  # TensorFlow's op does not refuse ids beyond the embedding table.
  is_model = isinstance(vocabulary, sentencepiece.SentencePieceVocabulary)
  if is_model and vocabulary.has_rows_for_all:
    return SeqioSentencePiece(vocabulary)
  return SeqioVocabulary(vocabulary)


def output_features(
  prompt_vocabulary: base.Vocabulary, answer_vocabulary: base.Vocabulary
) -> dict[str, seqio.Feature]:
  """Returns SeqIO output features, with EOS, for the given vocabularies."""
  return {
    key: seqio.Feature(
      vocabulary=wrap_vocabulary(vocabulary), add_eos=True, dtype=tf.int32
    )
    for key, vocabulary in (
      ('inputs', prompt_vocabulary),
      ('targets', answer_vocabulary),
    )
  }


def encodes_alike(vocabulary: seqio.Vocabulary, bound: SeqioVocabulary) -> bool:
  """Returns whether two vocabularies encode every text to the same ids.

  Returns False if this is unknown.

  Args:
    vocabulary: a task's own vocabulary.
    bound: one of our vocabularies.
  """
  if isinstance(vocabulary, SeqioVocabulary):
    return vocabulary.vocabulary == bound.vocabulary
  if not (
    isinstance(vocabulary, seqio.SentencePieceVocabulary)
    and isinstance(bound, SeqioSentencePiece)
  ):
    return False
  models = [
    sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    for model in (vocabulary.sp_model, bound.model)
  ]
  return vocabulary.eos_id == bound.eos_id and models[0] == models[1]


@as_written
def tokenize_and_measure(
  dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
  """Tokenizes text, appends EOS, and records lengths before any trimming.

  A SeqIO preprocessor, the last one of every bound task. Features that are
  already tokenized get an EOS if they lack one. The added scalar features
  `inputs_length` and `targets_length` are in tokens, EOS included.
  """
  if dataset.element_spec['inputs'].dtype == tf.string:
    dataset = seqio.preprocessors.tokenize(dataset, output_features)

  def measure(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    measured = dict(example)
    for key, feature in output_features.items():
      ids = tf.cast(example[key], tf.int32)
      eos_id = feature.vocabulary.eos_id
      ends = tf.reduce_any(tf.equal(ids[-1:], eos_id))
      ids = tf.concat([ids, tf.fill([1 - tf.cast(ends, tf.int32)], eos_id)], 0)
      measured |= {key: ids, f'{key}_length': tf.size(ids)}
    return measured

  return dataset.map(measure, num_parallel_calls=tf.data.AUTOTUNE)


def steps_before_ids(task: seqio.Task) -> list[Callable[..., Any]]:
  """Returns the text preprocessors of a bound task.

  `batch_of_ids` replaces the remaining preprocessors, for many texts at once. A
  task with a tokenizer amid its other steps gives ids.
  """
  *steps, last = task.preprocessors
  assert last is tokenize_and_measure
  return text_steps(steps)


def text_steps(steps: Sequence[Callable[..., Any]]) -> list[Callable[..., Any]]:
  """Drops EOS steps, and a tokenizer in last place, from preprocessors."""
  kept = [step for step in steps if step not in EOS_STEPS]
  if kept and kept[-1] in TOKENIZE_STEPS:
    kept.pop()
  return kept


def batch_of_ids(
  batch: Mapping[str, tf.Tensor | tf.RaggedTensor],
  output_features: Mapping[str, seqio.Feature],
  task_feature_lengths: Mapping[str, int],
) -> dict[str, tf.Tensor]:
  """Tokenizes several examples, for `L2SFeatureConverter.convert`.

  Equals `tokenize_and_measure` of each example.

  Args:
    batch: `inputs` and `targets`: [n] texts, or [n, None] ids.
    output_features: output features of a bound task.
    task_feature_lengths: lengths of `inputs` and `targets`, in tokens.
  """
  made: dict[str, tf.Tensor] = {}
  for key, length in task_feature_lengths.items():
    vocabulary, ids = output_features[key].vocabulary, batch[key]
    if ids.dtype == tf.string:
      ids = vocabulary.encode_tf(ids)
    if isinstance(ids, tf.Tensor):
      ids = tf.RaggedTensor.from_tensor(ids)
    ids = tf.cast(ids, tf.int32)
    before = tf.concat([[vocabulary.eos_id], ids.values], axis=0)
    last = tf.gather(before, ids.row_splits[1:])
    sizes = tf.cast(ids.row_lengths(), tf.int32)
    ends = (sizes > 0) & (last == vocabulary.eos_id)
    made[key] = ids.to_tensor(vocabulary.eos_id, shape=[None, length])
    made[f'{key}_length'] = tf.where(ends, sizes, sizes + 1)
  return made


class CachedSource(seqio.DataSource):
  """SeqIO source of a `seqio_cache_tasks` cache, located at first use.

  A cache is a folder named after the task. It holds a file COMPLETED and, for
  each split, `info.SPLIT.json`, `stats.SPLIT.json` and TFRecord files.
  """

  supports_arbitrary_sharding = False

  def __init__(self, task: seqio.Task, cache_dirs: Sequence[str]):
    """Stores the search path.

    Args:
      task: the cached task. The cache holds its output at its
        CacheDatasetPlaceholder.
      cache_dirs: folders of caches. The first one with a cache of the task is
        read.
    """
    super().__init__(splits=())
    self._task = task
    self._folders = [
      os.path.join(folder, seqio.utils.get_task_dir_from_name(task.name))
      for folder in cache_dirs
    ]

  @functools.cached_property
  def folder(self) -> str:
    """Folder of the cache.

    Raises:
      FileNotFoundError: if there is none, with the command that makes it.
    """
    for folder in self._folders:
      if tf.io.gfile.exists(os.path.join(folder, 'COMPLETED')):
        return folder
    raise FileNotFoundError(
      f'USE_CACHED_TASKS: task {self._task.name!r} has no complete cache; '
      'looked in TASK_CACHE_DIRS for a file COMPLETED in '
      f'{" and ".join(self._folders) or "no folder"}. Create a cache with\n'
      f'  seqio_cache_tasks --tasks={self._task.name} '
      '--output_cache_dir=FOLDER --module_import=YOUR_TASKS\n'
      'and add FOLDER to TASK_CACHE_DIRS, or set USE_CACHED_TASKS=False.'
    )

  @functools.cached_property
  def splits(self) -> Sequence[str]:
    names = (
      re.fullmatch(r'info\.(.+)\.json', name)
      for name in tf.io.gfile.listdir(self.folder)
    )
    return sorted(name[1] for name in names if name)

  def list_shards(self, split: str) -> Sequence[str]:
    return self._open(split).list_shards(split)

  def num_input_examples(self, split: str) -> int:
    return self._open(split).num_input_examples(split)

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: Any,
  ) -> tf.data.Dataset:
    return self._open(split).get_dataset(
      split=split, shuffle=shuffle, seed=seed, shard_info=shard_info
    )

  def _open(self, split: str) -> seqio.DataSource:
    placeholder = seqio_internals.cache_placeholder(self._task)
    return seqio_internals.cached_source(
      self.folder, split, placeholder.file_shuffle_buffer_size
    )


def translate_cached_ids(task: seqio.Task) -> Callable[..., tf.data.Dataset]:
  """Returns a preprocessor that re-encodes cached ids for bound vocabularies.

  It is the first step after the cache. Cached text is unchanged, and so are ids
  of a vocabulary that encodes like the bound one. Other ids are replaced: their
  text, cached by SeqIO's `tokenize` as `*_pretokenized`, is tokenized again.

  Args:
    task: the task before binding, with its own vocabularies.
  """
  steps = [
    step.func if isinstance(step, functools.partial) else step
    for step in seqio_internals.preprocessors_around_cache(task)[0]
  ]
  tokenizers = [n for n, step in enumerate(steps) if step in TOKENIZE_STEPS]
  # Ids changed by a later step no longer match the text.
  are_of_text = bool(tokenizers) and all(
    step in EOS_STEPS for step in steps[tokenizers[0] + 1 :]
  )

  def translate(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
  ) -> tf.data.Dataset:
    spec = dataset.element_spec
    foreign = [
      key
      for key, feature in output_features.items()
      if key in spec
      and spec[key].dtype != tf.string
      and not encodes_alike(
        task.output_features[key].vocabulary, feature.vocabulary
      )
    ]
    for key in foreign:
      has_text = f'{key}_pretokenized' in spec
      if not (are_of_text and has_text):
        raise ValueError(
          f'the cache of task {task.name!r} holds {key!r} as ids of '
          f'{task.output_features[key].vocabulary}, which mean nothing to the '
          f"model's {output_features[key].vocabulary}; and "
          + (
            'steps after the tokenizer have changed them'
            if has_text
            else f'no text to encode anew, {key}_pretokenized'
          )
          + '. Cache the task as text, with CacheDatasetPlaceholder before '
          'its tokenizer, or set USE_CACHED_TASKS=False.'
        )
    if not foreign:
      return dataset

    def encode(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
      ids = {
        key: output_features[key].vocabulary.encode_tf(
          example[f'{key}_pretokenized']
        )
        for key in foreign
      }
      return {**example, **ids}

    return dataset.map(as_written(encode), num_parallel_calls=tf.data.AUTOTUNE)

  return translate


class L2SFeatureConverter(seqio.FeatureConverter):
  """Converts a bound task's features to batch keys, with two vocabularies.

  With lengths 5 and 4, EOS 1 and pad 0 in the prompt vocabulary, and EOS 9,
  start 8 and pad 7 in the answer vocabulary:

      {'inputs': [3, 4, 1], 'targets': [0, 5, 9],
       'inputs_length': 3, 'targets_length': 3}

  becomes

      encoder_input_tokens:  [3, 4, 1, 0, 0]
      encoder_segment_ids:   [1, 1, 1, 0, 0]
      decoder_input_tokens:  [8, 0, 5, 7]
      decoder_target_tokens: [0, 5, 9, 7]
      decoder_segment_ids:   [1, 1, 1, 0]
      decoder_loss_weights:  [1., 1., 1., 0.]
      encoder_truncated: 0, decoder_truncated: 0

  Masks come from lengths, so an answer may hold id 0. `*_truncated` is the
  number of truncated sequences in the row.

  With `pack`, a row holds as many examples as fit. The example above and

      {'inputs': [6, 1], 'targets': [9],
       'inputs_length': 2, 'targets_length': 1}

  share a row. Each keeps its start token and its segment id:

      encoder_input_tokens:  [3, 4, 1, 6, 1]
      encoder_segment_ids:   [1, 1, 1, 2, 2]
      decoder_input_tokens:  [8, 0, 5, 8]
      decoder_target_tokens: [0, 5, 9, 9]
      decoder_segment_ids:   [1, 1, 1, 2]
      decoder_loss_weights:  [1., 1., 1., 1.]

  Packing is first-fit within windows of `packing.WINDOW` examples.
  """

  TASK_FEATURES = {
    'inputs': seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    'targets': seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
  }
  MODEL_FEATURES = {
    **{
      key: seqio.FeatureConverter.FeatureSpec(dtype=tf.as_dtype(dtype))
      for key, (_, dtype) in batch_keys.KEYS.items()
    },
    **{
      key: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=0)
      for key in ('encoder_truncated', 'decoder_truncated')
    },
  }
  PACKING_FEATURE_DTYPES: Mapping[str, tf.DType] = {}

  def __init__(
    self,
    prompt_vocabulary: SeqioVocabulary,
    answer_vocabulary: SeqioVocabulary,
    *,
    pack: bool = False,
  ):
    """Stores the pad and start ids, and whether to pack."""
    # SeqIO's packing treats id 0 as padding and cuts sequences there.
    super().__init__(
      pack=False, apply_length_check=False, bos_id=answer_vocabulary.start_id
    )
    self._shares_rows = pack
    self._prompt_pad_id = prompt_vocabulary.pad_id
    self._answer_pad_id = answer_vocabulary.pad_id

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    def convert(batch: dict[str, Any]) -> dict[str, tf.Tensor]:
      rows = {
        key: batch[key].to_tensor(shape=[None, length])
        for key, length in task_feature_lengths.items()
      }
      return self.convert({**batch, **rows}, task_feature_lengths)

    ds = choose(ds, ('inputs', 'targets', 'inputs_length', 'targets_length'))
    if not self._shares_rows:
      return map_batches(ds, convert)
    windows = ds.ragged_batch(packing.WINDOW)
    return windows.map(
      as_written(convert), num_parallel_calls=tf.data.AUTOTUNE
    ).unbatch()

  def convert(
    self,
    batch: Mapping[str, tf.Tensor],
    task_feature_lengths: Mapping[str, int],
  ) -> dict[str, tf.Tensor]:
    """Returns the rows of a batch of examples: n rows, or fewer with `pack`.

    Args:
      batch: `inputs` and `targets` as [n, length] ids; `inputs_length` and
        `targets_length` as [n] sizes before cutting. Ids beyond the size are
        ignored; longer examples are cut.
      task_feature_lengths: lengths of `inputs` and `targets`, in tokens.
    """
    convert = self._pack_rows if self._shares_rows else self._pad_rows
    rows = convert(
      batch, task_feature_lengths['inputs'], task_feature_lengths['targets']
    )
    shapes = self.get_model_feature_lengths(task_feature_lengths)
    return {
      key: tf.ensure_shape(rows[key], [None, shapes[key]][: 1 + spec.rank])
      for key, spec in self.MODEL_FEATURES.items()
    }

  def _pad_rows(
    self,
    batch: Mapping[str, tf.Tensor],
    prompt_length: int,
    answer_length: int,
  ) -> dict[str, tf.Tensor]:
    prompts, targets = batch['inputs'], batch['targets']
    prompt_mask = tf.sequence_mask(batch['inputs_length'], prompt_length)
    answer_mask = tf.sequence_mask(batch['targets_length'], answer_length)
    starts = tf.fill([tf.shape(targets)[0], 1], self.bos_id)
    inputs = tf.concat([starts, targets[:, :-1]], axis=1)
    return {
      'encoder_input_tokens': tf.where(
        prompt_mask, prompts, self._prompt_pad_id
      ),
      'encoder_segment_ids': tf.cast(prompt_mask, tf.int32),
      'decoder_input_tokens': tf.where(
        answer_mask, inputs, self._answer_pad_id
      ),
      'decoder_target_tokens': tf.where(
        answer_mask, targets, self._answer_pad_id
      ),
      'decoder_segment_ids': tf.cast(answer_mask, tf.int32),
      'decoder_loss_weights': tf.cast(answer_mask, tf.float32),
      'encoder_truncated': tf.cast(
        batch['inputs_length'] > prompt_length, tf.int32
      ),
      'decoder_truncated': tf.cast(
        batch['targets_length'] > answer_length, tf.int32
      ),
    }

  def _pack_rows(
    self,
    batch: Mapping[str, tf.Tensor],
    prompt_length: int,
    answer_length: int,
  ) -> dict[str, tf.Tensor]:
    room = (prompt_length, answer_length)

    def pack(
      prompts: np.ndarray,
      answers: np.ndarray,
      prompt_sizes: np.ndarray,
      answer_sizes: np.ndarray,
    ) -> list[np.ndarray]:
      uncut = np.stack([prompt_sizes, answer_sizes], axis=1)
      sizes = np.minimum(uncut, room)
      rows = packing.first_fit(sizes, room)
      prompt_rows, answer_rows = (
        [ids[:size] for ids, size in zip(tokens, own, strict=True)]
        for tokens, own in zip((prompts, answers), sizes.T, strict=True)
      )
      packed = packing.lay_out(
        prompt_rows,
        answer_rows,
        rows,
        task_feature_lengths={'inputs': room[0], 'targets': room[1]},
        prompt_pad_id=self._prompt_pad_id,
        answer_pad_id=self._answer_pad_id,
        start_id=self.bos_id,
      )
      is_cut = (uncut > room).T
      for key, cut in zip(('encoder', 'decoder'), is_cut, strict=True):
        packed[f'{key}_truncated'] = np.bincount(rows, cut).astype(np.int32)
      return [packed[key] for key in self.MODEL_FEATURES]

    keys = ('inputs', 'targets', 'inputs_length', 'targets_length')
    arrays = tf.numpy_function(
      pack,
      [batch[key] for key in keys],
      [spec.dtype for spec in self.MODEL_FEATURES.values()],
      stateful=False,
    )
    return dict(zip(self.MODEL_FEATURES, arrays, strict=True))

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    lengths = {
      'encoder': task_feature_lengths['inputs'],
      'decoder': task_feature_lengths['targets'],
    }
    return {
      key: lengths[key.split('_')[0]] if spec.rank else 0
      for key, spec in self.MODEL_FEATURES.items()
    }


def make_converter(
  task: seqio.Task | seqio.Mixture, *, pack: bool = False
) -> L2SFeatureConverter:
  """Returns the feature converter for a task's bound vocabularies.

  Args:
    task: task from `tasks.bind`.
    pack: whether rows hold several examples.

  Raises:
    ValueError: if the task was not bound.
  """
  bound = [
    feature.vocabulary
    for key, feature in task.output_features.items()
    if key in L2SFeatureConverter.TASK_FEATURES
  ]
  if not all(isinstance(vocabulary, SeqioVocabulary) for vocabulary in bound):
    raise ValueError(
      f'task {task.name!r} has its own vocabularies, '
      f'{", ".join(map(str, bound))}; bind it with tasks.bind first.'
    )
  return L2SFeatureConverter(
    task.output_features['inputs'].vocabulary,
    task.output_features['targets'].vocabulary,
    pack=pack,
  )
