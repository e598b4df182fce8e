# SPDX-License-Identifier: Apache-2.0
"""The format `savedmodel`: text in, text out, for TensorFlow Serving.

    1/                        the SavedModel; the number is its version
    1/assets.extra/           warm-up requests
    batching_parameters.txt   for --batching_parameters_file
    signature.json            inputs, outputs and lengths
    verify.py                 a check of the files

Tokenization, generation and detokenization are one graph. TensorFlow has
operations for SentencePiece models only; with other tokenizers, inputs and
outputs are token ids.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jax import numpy as jnp

from l2s_jax.interop.exports import comparing, greedy_programs
from l2s_jax.runtime import files, scratch
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import sentencepiece

SIGNATURE = 'signature.json'
VERSION = '1'
BATCHING = 'batching_parameters.txt'
WARMUP = 'assets.extra/tf_serving_warmup_requests'
MAX_PROMPT_LEN, MAX_DECODE_LEN = 512, 128
# Each shape is compiled separately. Prompts are therefore padded to one of a
# few lengths, and servers fill batches up to one of a few sizes.
_SHORTEST = 16
BATCH_SIZES = (1, 4, 16)
_PLATFORMS = ('cpu', 'cuda', 'tpu')
_ANSWERS = 'savedmodel_answers.py'


def check(model: comparing.Described) -> None:
  """Checks that tensorflow and tensorflow-text can be imported.

  Raises:
    ValueError: if they cannot; with the command to install them.
  """
  try:
    import tensorflow_text
  except ImportError as error:
    raise ValueError(
      '--to=savedmodel needs tensorflow and tensorflow-text of the same minor '
      "version: pip install 'l2s_jax[tasks]'. The import failed: "
      f'{error}'
    ) from error
  assert tensorflow_text


def reads_text(system: system_lib.System) -> bool:
  """Returns whether TensorFlow has operations for both tokenizers."""
  return all(
    isinstance(x, sentencepiece.SentencePieceVocabulary)
    for x in (system.prompt_vocabulary, system.answer_vocabulary)
  )


def buckets(max_prompt_len: int) -> list[int]:
  """Returns the padded lengths of prompts: powers of two, then the maximum."""
  powers = (_SHORTEST << i for i in itertools.count())
  shorter = itertools.takewhile(lambda n: n < max_prompt_len, powers)
  return [*shorter, max_prompt_len]


def write(
  bundle: greedy_programs.SystemWithParams,
  folder: pathlib.Path,
  *,
  max_prompt_len: int = MAX_PROMPT_LEN,
  max_decode_len: int = MAX_DECODE_LEN,
) -> None:
  """Writes the SavedModel and the server's files.

  Args:
    bundle: the opened bundle.
    folder: an empty folder.
    max_prompt_len: maximum number of prompt tokens; longer prompts are
      truncated.
    max_decode_len: maximum number of answer tokens.
  """
  import tensorflow as tf

  system = bundle.system
  programs = greedy_programs.GreedyPrograms(bundle)
  max_prompt_len, max_decode_len = comparing.lengths(
    system, max_prompt_len, max_decode_len
  )
  model = _build(system, programs, max_prompt_len, max_decode_len)
  signatures = {'token_ids': model.answer_ids}
  default = 'token_ids'
  if reads_text(system):
    default = 'text'
    signatures['text'] = model.answer_text
  signatures['serving_default'] = signatures[default]
  tf.saved_model.save(model, str(folder / VERSION), signatures=signatures)
  described = _signature(programs, max_prompt_len, max_decode_len)
  files.write_json(
    folder / SIGNATURE, {**described, 'serving_default': default}
  )
  with files.whole(folder / BATCHING) as file:
    file.write(_batching())
  greedy_programs.copy_along(folder, {})
  if default == 'text':
    _write_warmup(folder / VERSION / WARMUP, programs, max_prompt_len)


def _build(
  system: system_lib.System,
  programs: greedy_programs.GreedyPrograms,
  max_prompt_len: int,
  max_decode_len: int,
) -> Any:
  """Returns a `tf.Module` with a function for each signature."""
  import tensorflow as tf

  generate = _converted(programs, max_prompt_len, max_decode_len)
  model = tf.Module()
  # Variables have their own files; a graph with constants is limited to 2 GB.
  model.weights = [
    tf.Variable(x, trainable=False, name=f'w{i}')
    for i, x in enumerate(programs.params.values())
  ]
  names = list(programs.params)
  limits = tf.constant(buckets(max_prompt_len), tf.int32)
  pad_id = system.prompt_vocabulary.pad_id
  start_id = system.answer_vocabulary.start_id

  def answer(rows: Any) -> dict[str, Any]:
    rows = rows[:, :max_prompt_len]
    first = tf.fill([rows.nrows(out_type=tf.int32)], start_id)
    if programs.continues:
      last = rows[:, -1:].to_tensor(default_value=-1, shape=[None, 1])
      rows, first = rows[:, :-1], last[:, 0]
    longest = tf.cast(tf.reduce_max(rows.row_lengths()), tf.int32)
    length = tf.reduce_min(tf.where(limits >= longest, limits, max_prompt_len))
    shape = tf.stack([-1, length])
    tokens = rows.to_tensor(default_value=pad_id, shape=shape)
    segment_ids = tf.ones_like(rows).to_tensor(shape=shape)
    params = dict(zip(names, model.weights, strict=True))
    found = generate(params, tokens, segment_ids, first)
    return {'token_ids': found['tokens'], 'scores': found['scores']}

  ids = tf.TensorSpec([None, None], tf.int32)

  @tf.function(input_signature=[ids, ids], autograph=False)
  def answer_ids(prompt_tokens, segment_ids):
    rows = tf.ragged.boolean_mask(prompt_tokens, segment_ids > 0)
    return answer(rows)

  model.answer_ids = answer_ids
  if reads_text(system):
    texts = tf.TensorSpec([None], tf.string)
    encode, decode = _tokenizers(model, system, programs)

    @tf.function(input_signature=[texts], autograph=False)
    def answer_text(text):
      found = answer(encode(text))
      return {'text': decode(found['token_ids']), **found}

    model.answer_text = answer_text
  return model


def _converted(
  programs: greedy_programs.GreedyPrograms,
  max_prompt_len: int,
  max_decode_len: int,
) -> Any:
  """Returns `GreedyPrograms.generate` as a TensorFlow function."""
  from jax.experimental import jax2tf

  def generate(
    params: Any, tokens: Any, segment_ids: Any, first_tokens: Any
  ) -> Any:
    room = jnp.zeros((max_decode_len,), jnp.int32)
    return programs.generate(params, tokens, segment_ids, first_tokens, room)

  return jax2tf.convert(
    greedy_programs.traced(generate),
    polymorphic_shapes=[None, 'batch, prompt', 'batch, prompt', 'batch'],
    polymorphic_constraints=['prompt >= 1', f'prompt <= {max_prompt_len}'],
    with_gradient=False,
    native_serialization_platforms=_PLATFORMS,
  )


def _tokenizers(
  model: Any,
  system: system_lib.System,
  programs: greedy_programs.GreedyPrograms,
) -> tuple[Any, Any]:
  """Returns functions from text to ragged ids, and from ids to text."""
  import tensorflow as tf
  import tensorflow_text

  prompts, answers = system.prompt_vocabulary, system.answer_vocabulary
  assert isinstance(prompts, sentencepiece.SentencePieceVocabulary)
  assert isinstance(answers, sentencepiece.SentencePieceVocabulary)
  # Attributes of the module, because objects that only a function holds are not
  # saved.
  model.reader, model.writer = (
    tensorflow_text.SentencepieceTokenizer(model=vocabulary.model)
    for vocabulary in (prompts, answers)
  )
  before, after = programs.around

  def encode(text: Any) -> Any:
    rows = model.reader.tokenize(text)
    parts = [rows]
    for ids, is_before in ((before, True), (after, False)):
      if ids:
        some = tf.tile(tf.constant([ids], tf.int32), [rows.nrows(), 1])
        some = tf.RaggedTensor.from_tensor(some)
        parts = [some, *parts] if is_before else [*parts, some]
    return tf.concat(parts, axis=1)

  def decode(tokens: Any) -> Any:
    ends = tf.reduce_any(
      tokens[..., None] == tf.constant(answers.eos_ids, tf.int32), axis=-1
    )
    kept = tf.cumsum(tf.cast(ends, tf.int32), axis=1) == 0
    is_known = tokens < answers.vocab_size
    if answers.unk_id is None:
      kept &= is_known
    else:
      tokens = tf.where(is_known, tokens, answers.unk_id)
    return model.writer.detokenize(tf.ragged.boolean_mask(tokens, kept))

  return encode, decode


def _signature(
  programs: greedy_programs.GreedyPrograms,
  max_prompt_len: int,
  max_decode_len: int,
) -> dict[str, Any]:
  """Returns the content of `signature.json`."""
  before, after = programs.around
  outputs = {
    'token_ids': ['int32', ['batch', max_decode_len]],
    'scores': ['float32', ['batch']],
  }
  ids = ['int32', ['batch', 'prompt']]
  return {
    'signatures': {
      'text': {
        'inputs': {'text': ['string', ['batch']]},
        'outputs': {'text': ['string', ['batch']], **outputs},
      },
      'token_ids': {
        'inputs': {'prompt_tokens': ids, 'segment_ids': ids},
        'outputs': outputs,
      },
    },
    'max_prompt_len': max_prompt_len,
    'max_decode_len': max_decode_len,
    'prompt_ids_before': list(before),
    'prompt_ids_after': list(after),
  }


def _batching() -> str:
  """Returns the content of `batching_parameters.txt`."""
  sizes = '\n'.join(f'allowed_batch_sizes: {size}' for size in BATCH_SIZES)
  return (
    f'max_batch_size {{ value: {BATCH_SIZES[-1]} }}\n'
    'batch_timeout_micros { value: 5000 }\n'
    'max_enqueued_batches { value: 64 }\n'
    'num_batch_threads { value: 1 }\n'
    f'{sizes}\n'
  )


def _write_warmup(
  path: pathlib.Path,
  programs: greedy_programs.GreedyPrograms,
  max_prompt_len: int,
) -> None:
  """Writes one warm-up request for each shape that a server compiles."""
  import tensorflow as tf

  path.parent.mkdir()
  with tf.io.TFRecordWriter(str(path)) as writer:
    for length in buckets(max_prompt_len):
      text = _text_of(programs, length)
      for size in BATCH_SIZES:
        tensor = tf.make_tensor_proto([text.encode()] * size)
        writer.write(_prediction_log(tensor.SerializeToString()))


def _text_of(programs: greedy_programs.GreedyPrograms, length: int) -> str:
  """Returns a text of `length` tokens, or a few less."""
  num_words = length
  while True:
    text = ' '.join(['a'] * num_words)
    (row,) = programs.prompt_rows([text], 2 * length)
    if len(row) <= length or num_words == 1:
      return text
    num_words -= -(-(len(row) - length) // 2)


def _prediction_log(tensor: bytes) -> bytes:
  """Returns a serialized `tensorflow.serving.PredictionLog` of a text request.

  The package with these messages needs its own TensorFlow. The fields and their
  numbers are:

      PredictionLog    6 predict_log
      PredictLog       1 request
      PredictRequest   1 model_spec, 2 inputs (a map: 1 key, 2 value)
      ModelSpec        3 signature_name
  """
  inputs = _field(1, b'text') + _field(2, tensor)
  spec = _field(3, b'serving_default')
  request = _field(1, spec) + _field(2, inputs)
  return _field(6, _field(1, request))


def _field(number: int, content: bytes) -> bytes:
  """Returns a serialized bytes field of a protocol buffer."""
  size, length = len(content), bytearray()
  while size > 0x7F:
    length.append(size & 0x7F | 0x80)
    size >>= 7
  length.append(size)
  return bytes([number << 3 | 2]) + bytes(length) + content


def compare(
  bundle: greedy_programs.SystemWithParams,
  folder: pathlib.Path,
  prompts: Sequence[str],
) -> str:
  """Compares answers of `infer`'s decode loop and of the SavedModel.

  TensorFlow runs in a separate process without JAX.

  Args:
    bundle: the bundle that `folder` was written from.
    folder: folder from `write`.
    prompts: at least one prompt.

  Returns:
    A summary.

  Raises:
    ValueError: if the SavedModel does not run, or generates other tokens or
      texts.
  """
  system = bundle.system
  programs = greedy_programs.GreedyPrograms(bundle)
  said = json.loads((folder / SIGNATURE).read_text())
  rows = programs.prompt_rows(prompts, said['max_prompt_len'])
  batch = programs.inputs(rows, said['max_decode_len'])
  expected = greedy_programs.expected_tokens(bundle, batch)
  texts = [system.answer_vocabulary.decode(tokens) for tokens in expected]
  is_text = said['serving_default'] == 'text'
  inputs: dict[str, Any] = {'text': list(prompts)}
  if not is_text:
    inputs = _padded(rows)
  reply = ask(folder, 'serving_default', inputs)
  comparing.check_equal(
    system,
    prompts,
    expected,
    reply['token_ids'],
    f'TensorFlow with {folder}',
  )
  if is_text and reply['text'] != texts:
    row = next(i for i, x in enumerate(reply['text']) if x != texts[i])
    raise ValueError(
      f'TensorFlow with {folder} decodes the answer to {prompts[row]!r} as '
      f'{reply["text"][row]!r}, but the run as {texts[row]!r}. The output was '
      'deleted. Please report this with the tokenizer.'
    )
  what = 'texts' if is_text else 'token ids'
  return (
    f'TensorFlow generates the same {what} for {len(prompts)} prompts as the '
    f'run (greedy, up to {said["max_decode_len"]} tokens)'
  )


def _padded(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
  """Returns the inputs of the signature `token_ids`."""
  length = max(map(len, rows))
  return {
    'prompt_tokens': [[*row, *[0] * (length - len(row))] for row in rows],
    'segment_ids': [
      [*[1] * len(row), *[0] * (length - len(row))] for row in rows
    ],
  }


def ask(
  folder: pathlib.Path, signature: str, inputs: Mapping[str, Any]
) -> dict[str, Any]:
  """Runs a signature of the SavedModel without JAX in a separate process.

  Args:
    folder: the export.
    signature: name of the signature.
    inputs: lists by input name, JSON-serializable.

  Returns:
    Lists by output name.

  Raises:
    ValueError: if the process fails; with its standard error.
  """
  program = pathlib.Path(__file__).with_name(_ANSWERS)
  request = {
    'folder': str((folder / VERSION).absolute()),
    'signature': signature,
    'inputs': inputs,
  }
  with scratch.folder() as name:
    reply = pathlib.Path(name) / 'reply.json'
    done = subprocess.run(
      [sys.executable, '-P', str(program), str(reply)],
      input=json.dumps(request),
      capture_output=True,
      text=True,
      cwd=name,
      env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    )
    if done.returncode:
      raise ValueError(
        f'TensorFlow cannot run {folder}. The output was deleted. The error '
        f'is:\n{done.stderr[-2000:]}'
      )
    found: dict[str, Any] = json.loads(reply.read_text(encoding='utf-8'))
  return found
