# SPDX-License-Identifier: Apache-2.0
"""A run learns from any teacher of its vocabulary, and refuses others."""

import dataclasses
import json
import pathlib
import shutil

import helpers
import jax
import numpy as np
import pytest
import test_distributed
import tiny_runs
from kept_runs import make

from l2s_jax.interop import to_huggingface
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.runtime import partitioning
from l2s_jax.systems import builders, parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.training import distillation, train_data
from l2s_jax.weights import saved_steps

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'
LENGTHS = {'inputs': 32, 'targets': 16}


def arguments(*bindings):
  return [
    *make.train_arguments(KEPT, 'l2s'),
    '--gin_file=gin_configs/runs/train_with_teacher.gin',
    '--gin.CHECKPOINT_PERIOD=2',
    '--gin.train.log_period=1',
    '--gin.train.num_eval_examples=2',
    *(f'--gin.{binding}' for binding in bindings),
  ]


def train(*bindings, check=True):
  return tiny_runs.l2s(*arguments(*bindings), check=check)


def trained(run, step):
  """Returns the trained parameters of a checkpoint, by path."""
  folder, _ = saved_steps.params_folder(run, step)
  paths = list(saved_steps.array_shapes(folder))
  return saved_steps.read_arrays(folder, paths)


def logged(run):
  records = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  return [record for record in records if 'train/loss' in record]


def hugging_face(folder, config, vocabulary, params=None):
  """Writes a model as others have it."""
  params = params or helpers.random_params(l2s.build(config))
  to_huggingface.save(helpers.Arrays(config, params), folder, None)
  if isinstance(vocabulary, pathlib.Path):
    shutil.copy(vocabulary, folder / 'spiece.model')
  else:
    vocabulary.save(folder)
  return folder


def test_a_run_that_was_broken_off_learns_what_an_unbroken_one_does(tmp_path):
  """From the LLM itself, on samples in every second step."""
  settings = [
    'TRAIN_STEPS=4',
    f'TEACHER_PATH={KEPT / "llm"}',
    'ON_POLICY=0.5',
    'DISTILL_DIVERGENCE=0.5',
    'KEEP_CHECKPOINTS=None',
  ]
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  train(f'MODEL_DIR={whole}', *settings)
  shutil.copytree(whole, broken)
  shutil.rmtree(broken / 'checkpoints' / '4')
  train(f'MODEL_DIR={broken}', *settings)
  expected = trained(whole, 4)
  assert {path[0] for path in expected} == {'projector', 'slm'}
  found = trained(broken, 4)
  assert found.keys() == expected.keys()
  before = trained(whole, 2)
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array)
  assert any((before[path] != array).any() for path, array in expected.items())
  names = ('train/loss', 'train/distill_loss', 'train/grad_norm')
  assert [[line[name] for name in names] for line in logged(broken)] == [
    [line[name] for name in names] for line in logged(whole)
  ]
  # The same run learns from no other.
  other = hugging_face(
    tmp_path / 'other', teacher_config(), KEPT / 'data' / 'tiny.model'
  )
  result = train(
    f'MODEL_DIR={broken}', *settings, f'TEACHER_PATH={other}', check=False
  )
  assert result.returncode == 2
  assert 'its teacher does not fit' in result.stderr
  assert 'teacher.fingerprint.writing: the run has' in result.stderr


@pytest.mark.long
def test_two_processes_learn_what_one_does(tmp_path):
  """With parameters of student and teacher over both, and samples of each."""
  settings = [
    'TRAIN_STEPS=4',
    'CHECKPOINT_PERIOD=10',
    'DROPOUT_RATE=0.0',
    f'TEACHER_PATH={KEPT / "llm"}',
    'ON_POLICY=0.5',
  ]
  one, two = tmp_path / 'one', tmp_path / 'two'
  train(f'MODEL_DIR={one}', *settings)
  settings += ['MeshConfig.data=1', 'MeshConfig.fsdp=2']
  test_distributed.finish(
    test_distributed.start(2, *arguments(f'MODEL_DIR={two}', *settings))
  )
  for name in ('train/loss', 'train/distill_loss', 'train/grad_norm'):
    found, expected = ([line[name] for line in logged(x)] for x in (two, one))
    assert len(found) == 4
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def teacher_config(**changes):
  """Returns a T5 with room for the tokenizer's ids and T5's 100 sentinels."""
  config = config_lib.TransformerConfig(**make.LLM)
  return dataclasses.replace(
    config, vocab_size=256, dropout_rate=0.1, **changes
  )


def test_an_slm_alone_learns_from_a_model_model_paths(tmp_path):
  teacher = hugging_face(
    tmp_path / 'teacher', teacher_config(), KEPT / 'data' / 'tiny.model'
  )
  before = {p: p.stat().st_mtime_ns for p in teacher.rglob('*')}
  settings = [
    'MODEL=@language_model_system()',
    'language_model_system.tower=@slm/Tower()',
    f'TEACHER_PATH={teacher}',
    'DISTILL_WEIGHT=1.0',
    'LEARNING_RATE=0.01',
    'WARMUP_STEPS=1',
    'TRAIN_STEPS=12',
  ]
  train(f'MODEL_DIR={tmp_path / "run"}', *settings)
  lines = logged(tmp_path / 'run')
  first, last = lines[0], lines[-1]
  assert last['train/distill_loss'] < 0.9 * first['train/distill_loss']
  assert {p: p.stat().st_mtime_ns for p in teacher.rglob('*')} == before
  assert {path[0] for path in trained(tmp_path / 'run', 12)} == {
    'token_embedder',
    'encoder',
    'decoder',
  }


# --- refusals ---


def session_of(system):
  return session_lib.start(
    lambda: system,
    partitioning.MeshConfig(data=jax.device_count()),
    LENGTHS,
    batch_sizes={'BATCH_SIZE': 8},
  )


def bind(tower, *, system=None, session=None, pack=False, **settings):
  """Returns the lesson of LLM-to-SLM, all of whose ids are of tiny.model."""
  session = session or session_of(system or student())
  data = train_data.TrainData(LENGTHS, 8, 0, pack, ())
  return distillation.Distillation(tower, **settings).bind(session, data)


def student(**options):
  vocabulary = str(KEPT / 'data' / 'tiny.model')
  return builders.llm_to_slm_system(
    system_lib.Tower(str(KEPT / 'llm')),
    system_lib.Tower(
      config=config_lib.TransformerConfig(**make.T5), vocabulary=vocabulary
    ),
    **options,
  )


def test_of_an_llm_that_teaches_the_decoder_alone_is_loaded():
  tower = system_lib.Tower(str(KEPT / 'llm'))
  teacher = bind(tower).teacher
  assert teacher.is_llm and teacher.reads_states
  assert set(teacher.shapes) == {'decoder'}
  # Where the SLM has another layer, the decoder needs the last all the same.
  teacher = bind(tower, system=student(llm_layer=1)).teacher
  assert teacher.is_llm and not teacher.reads_states
  assert set(teacher.shapes) == {'decoder'}
  # An LLM that is trained does not teach; its first weights do.
  apart = (
    bind(tower, system=student(train_llm=True)),
    bind(tower, teacher_dtype='bfloat16'),
    bind(tower, teacher_step=400),
  )
  for lesson in apart:
    assert not lesson.teacher.is_llm
    assert set(lesson.teacher.shapes) == {
      'token_embedder',
      'encoder',
      'decoder',
    }
  shape = apart[1].teacher.shapes['token_embedder']['embedding']
  assert shape.dtype == 'bfloat16'


def test_a_teacher_is_the_same_however_much_of_it_is_the_llm():
  """So that a run may change its dtype, and between reading and features."""
  tower = system_lib.Tower(str(KEPT / 'llm'))
  reading = student()
  whole = session_of(reading)
  first, _ = parameters.load_frozen(reading, whole.layout)
  assert first.llm_fingerprint is not None
  states = system_lib.CachedStates('cache', 'int8', first.llm_fingerprint)
  cached = session_of(dataclasses.replace(reading, cached_states=states))
  found = []
  for session, settings in (
    (whole, {}),
    (whole, {'teacher_dtype': 'bfloat16'}),
    (whole, {'teacher_step': 400}),
    (cached, {}),
  ):
    teacher = bind(tower, session=session, **settings).teacher
    system, _ = parameters.load_frozen(session.system, session.layout)
    params, remembered = teacher.load(system)
    assert params.keys() == teacher.shapes.keys()
    found.append(remembered)
  assert found == [found[0]] * 4
  assert found[0]['step'] == 400
  assert found[0]['fingerprint']['reading'] == first.llm_fingerprint


def test_a_decoder_only_llm_that_teaches_has_nothing_of_its_own(tmp_path):
  """Its head is its table, so that the LLM has it all."""
  folder = hugging_face(tmp_path / 'llm', helpers.LLAMA, helpers.vocabulary())
  tower = system_lib.Tower(str(folder))
  system = builders.llm_to_slm_system(
    tower,
    system_lib.Tower(config=helpers.T5_1_1, vocabulary=str(folder)),
    llm_bidirectional=True,
  )
  session = session_of(system)
  teacher = bind(tower, session=session).teacher
  assert teacher.is_llm and not teacher.reads_states
  # It reads as it was pretrained, however it reads for the SLM.
  assert isinstance(system.module, l2s.LlmToSlm)
  assert system.module.llm_config.bidirectional_prefix
  assert teacher.module.config == helpers.LLAMA
  assert teacher.continues is not None
  assert teacher.shapes == {}
  system, _ = parameters.load_frozen(session.system, session.layout)
  params, found = teacher.load(system)
  assert params == {}
  assert found['fingerprint']['reading'] == system.llm_fingerprint
  assert '0 frozen parameters beside those of the LLM' in teacher.describe()


def test_at_a_weight_of_zero_there_is_no_teacher():
  assert bind(system_lib.Tower('nowhere'), weight=0.0) is None


def test_teachers_that_do_not_fit_are_refused(tmp_path):
  foreign = hugging_face(
    tmp_path / 'foreign', helpers.T5_1_1, helpers.vocabulary()
  )
  vocabulary = str(KEPT / 'data' / 'tiny.model')
  encoder = dataclasses.replace(teacher_config(), num_decoder_layers=0)

  def came(name, config):
    folder = hugging_face(tmp_path / name, config, helpers.vocabulary())
    return system_lib.Tower(str(folder), vocabulary=vocabulary)

  for tower, options, message in (
    (system_lib.Tower(), {}, 'set TEACHER_PATH to a run'),
    (
      system_lib.Tower(str(KEPT / 'l2s')),
      {},
      'is an LLM-to-SLM run, which is a student',
    ),
    (
      system_lib.Tower(str(foreign)),
      {},
      r'TEACHER_PATH=.*foreign: the teacher has the tokenizer .*\(257 ids\), '
      r'but the answers of the student have .*101 ids\).*verb distill',
    ),
    (  # Though it is the LLM.
      system_lib.Tower(str(KEPT / 'llm'), vocabulary=str(foreign)),
      {},
      'foreign has 257 ids, but the model.s embedding table has 128 rows',
    ),
    (
      system_lib.Tower(str(KEPT / 'llm'), config=encoder),
      {},
      'TEACHER_PATH=.*llm has the weights of an encoder only',
    ),
    (
      system_lib.Tower(str(KEPT / 'llm')),
      {'pack': True, 'on_policy': 0.5},
      'ON_POLICY=0.5 with PACK=True',
    ),
    (came('gpt2', helpers.GPT2), {}, 'TEACHER_PATH=.*gpt2: A prompt of 32'),
    (
      came('llama', helpers.LLAMA),
      {'pack': True},
      'PACK=True, but the teacher .*llama is decoder-only',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      bind(tower, **options)


def test_the_weights_of_an_encoder_alone_are_refused(tmp_path):
  config = teacher_config()
  whole = helpers.random_params(l2s.build(config))
  folder = hugging_face(
    tmp_path / 'encoder',
    config,
    KEPT / 'data' / 'tiny.model',
    {name: whole[name] for name in l2s.ENCODER},
  )
  with pytest.raises(ValueError, match='TEACHER_PATH=.*an encoder only'):
    system = student()
    bind(system_lib.Tower(str(folder)), system=system).teacher.load(system)
