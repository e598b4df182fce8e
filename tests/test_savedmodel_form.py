# SPDX-License-Identifier: Apache-2.0
"""What the form `savedmodel` writes is run by TensorFlow alone, as text."""

import json
from typing import Any

import bundles
import helpers
import jax
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from l2s_jax.interop.exports import greedy_programs, savedmodel_form

PROMPTS = ['a b c', 'The cat sat', '', 'x ' * 40]
LENGTHS: Any = {'max_prompt_len': 18, 'max_decode_len': 6}


@pytest.fixture(scope='module')
def written(vocabulary, tmp_path_factory):
  """Returns a bundle whose tokenizers TensorFlow has, and its folder."""
  bundle = bundles.of(
    helpers.MODULES['llm_to_t5_1_1-add-foreign'],
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
  )
  folder = tmp_path_factory.mktemp('savedmodel')
  savedmodel_form.check(bundle)
  savedmodel_form.write(bundle, folder, **LENGTHS)
  return bundle, folder


def test_tensorflow_alone_writes_the_texts_of_the_run(written):
  bundle, folder = written
  found = savedmodel_form.compare(bundle, folder, PROMPTS)
  assert 'same texts for 4 prompts' in found


def test_weights_are_variables(written):
  """Constants of a graph end at 2 GB."""
  bundle, folder = written
  programs = greedy_programs.GreedyPrograms(bundle)
  num_bytes = sum(x.nbytes for x in programs.params.values())
  data = folder / savedmodel_form.VERSION / 'variables'
  stored = sum(path.stat().st_size for path in data.glob('*.data-*'))
  assert num_bytes <= stored < num_bytes + 2**15


def prediction_logs(path):
  """Yields each request for warm-up, read by the names of its fields."""
  import tensorflow as tf

  file = descriptor_pb2.FileDescriptorProto(name='serving.proto')
  optional, text = 1, 9
  messages: dict[str, Any] = {
    'Input': [('key', 1, text), ('value', 2, 12)],
    'ModelSpec': [('signature_name', 3, text)],
    'PredictRequest': [('model_spec', 1, 'ModelSpec'), ('inputs', 2, 'Input')],
    'PredictLog': [('request', 1, 'PredictRequest')],
    'PredictionLog': [('predict_log', 6, 'PredictLog')],
  }
  for name, fields in messages.items():
    message = file.message_type.add(name=name)
    for field, number, kind in fields:
      more = (
        {'type': 11, 'type_name': kind}
        if isinstance(kind, str)
        else {'type': kind}
      )
      message.field.add(name=field, number=number, label=optional, **more)
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  kind = message_factory.GetMessageClass(
    pool.FindMessageTypeByName('PredictionLog')
  )
  for record in tf.data.TFRecordDataset(str(path)):
    yield kind.FromString(record.numpy()).predict_log.request


def test_a_server_warms_up_with_each_shape(written):
  import tensorflow as tf
  from tensorflow.core.framework import tensor_pb2

  bundle, folder = written
  programs = greedy_programs.GreedyPrograms(bundle)
  shapes = []
  path = folder / savedmodel_form.VERSION / savedmodel_form.WARMUP
  for request in prediction_logs(path):
    assert request.model_spec.signature_name == 'serving_default'
    assert request.inputs.key == 'text'
    value = tensor_pb2.TensorProto.FromString(request.inputs.value)
    texts = [x.decode() for x in tf.make_ndarray(value)]
    rows = programs.prompt_rows(texts, 100)
    shapes.append((len(rows), min(x for x in (16, 18) if x >= len(rows[0]))))
  sizes = savedmodel_form.BATCH_SIZES
  assert shapes == [(size, length) for length in (16, 18) for size in sizes]
  batching = (folder / savedmodel_form.BATCHING).read_text()
  assert 'allowed_batch_sizes: 16' in batching


@pytest.mark.long
def test_other_weights_are_refused(written):
  bundle, folder = written
  other = bundles.Bundle(
    bundle.system, jax.tree.map(lambda x: -x, bundle.arrays)
  )
  with pytest.raises(ValueError, match='generates .* but the run generates'):
    savedmodel_form.compare(other, folder, PROMPTS[:1])


def test_a_tokenizer_that_tensorflow_lacks_leaves_token_ids(tmp_path):
  """And an answer may go on where its prompt ends."""
  bundle = bundles.of(helpers.MODULES['gpt2'], continues=True)
  savedmodel_form.write(bundle, tmp_path, **LENGTHS)
  found = savedmodel_form.compare(bundle, tmp_path, ['a', 'The cat'])
  assert 'same token ids for 2 prompts' in found
  said = json.loads((tmp_path / savedmodel_form.SIGNATURE).read_text())
  assert said['serving_default'] == 'token_ids'
  assert not (tmp_path / savedmodel_form.VERSION / 'assets.extra').exists()
