# SPDX-License-Identifier: Apache-2.0
"""Laws of a step that learns from a teacher, on gold answers and on samples."""

import contextlib
import dataclasses
import functools
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2s_jax.data import batching
from l2s_jax.inference import generate, sampling, strategies
from l2s_jax.models import l2s
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters
from l2s_jax.systems import system as system_lib
from l2s_jax.training import (
  distillation,
  microbatches,
  optim,
  programs,
  teachers,
  train_step,
)
from l2s_jax.training import state as state_lib

SGD = optax.sgd(1.0)  # the update is the gradient
# Many ids end an answer, so that some samples end and some do not.
IDS = strategies.Ids(start=0, eos=(1, *range(200, 264)), pad=0)
SMALL: dict[str, Any] = {
  'num_decoder_layers': 1,
  'num_encoder_layers': 1,
  'scan_layers': False,
}
LLM = l2s.build(dataclasses.replace(helpers.LLM, **SMALL))
STUDENT = helpers.llm_to_slm('t5_1_1', 'add', 'shared', LLM.config, **SMALL)
GPT2 = helpers.MODULES['gpt2']
WEIGHT, TEMPERATURE = 0.3, 2.0


def teacher_of(module, **options):
  """Returns a teacher whose parameters are given, not read."""
  return teachers.Teacher(
    module, '', None, partitioning.DEFAULT_RULES, {}, {}, **options
  )


SHARED = teacher_of(LLM, is_llm=True, reads_states=True)


def lesson_of(teacher, is_on_policy, **settings):
  tower = system_lib.Tower('teacher')
  return distillation.Lesson(
    distillation.Distillation(tower, **settings), teacher, IDS, is_on_policy
  )


# By whether the step is on policy; None has no teacher.
LESSONS: dict[bool | None, distillation.Lesson | None] = {None: None} | {
  is_on_policy: lesson_of(
    SHARED, is_on_policy, weight=WEIGHT, temperature=TEMPERATURE
  )
  for is_on_policy in (False, True)
}


@functools.cache
def start():
  """Returns the LLM's encoder, its decoder, and the state."""
  llm = helpers.random_params(LLM, seed=1)
  encoder, decoder = parameters.split(llm, l2s.ENCODER)
  _, trainable = parameters.split(helpers.random_params(STUDENT), ('llm',))
  return {'llm': encoder}, decoder, state_lib.create(trainable, SGD, 0)


def step_of(lesson, module=STUDENT, **options):
  return jax.jit(
    functools.partial(
      train_step.train_step,
      module=module,
      optimizer=SGD,
      lesson=lesson,
      **options,
    )
  )


@functools.cache
def shared_step(is_on_policy):
  return step_of(LESSONS[is_on_policy])


def take(is_on_policy, batch, state=None):
  """Returns the gradient of a step of LLM-to-SLM, and its sums."""
  frozen, decoder, first = start()
  state = state or first
  after, sums = shared_step(is_on_policy)(state, frozen, batch, decoder)
  return jax.tree.map(jnp.subtract, state.trainable, after.trainable), sums


def assert_trees_close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    scale = max(np.abs(y).max(), 1e-2)
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale)


def assert_sums_close(a, b, names=None):
  for name in names or b:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-4)


# --- what is summed, and its gradient ---


def test_the_gradient_is_that_of_both_losses_by_their_weights():
  frozen, decoder, state = start()
  batch = helpers.random_batch()
  llm_logits = helpers.logits(LLM, frozen['llm'] | decoder, batch)
  teacher = jax.nn.softmax(llm_logits / TEMPERATURE)

  def mean_nats(trainable):
    logits = helpers.logits(STUDENT, frozen | trainable, batch)
    gold = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch['decoder_target_tokens'][..., None], -1
    )[..., 0]
    soft = jax.nn.log_softmax(logits / TEMPERATURE)
    nats = jnp.sum(teacher * (jnp.log(teacher) - soft), axis=-1)
    total = -(1 - WEIGHT) * gold + WEIGHT * TEMPERATURE**2 * nats
    # 6 + 2 + 4 + 1 target tokens.
    return jnp.sum(total * batch['decoder_segment_ids']) / 13, nats

  (_, nats), expected = jax.jit(jax.value_and_grad(mean_nats, has_aux=True))(
    state.trainable
  )
  found, sums = take(False, batch)
  assert_trees_close(found, expected)
  nats = (nats * batch['decoder_segment_ids']).sum()
  np.testing.assert_allclose(sums['distill_loss'], nats, rtol=1e-4)
  assert sums['distill_weight'] == sums['loss_weight'] == 13
  # What is logged of the gold answers is no other for it.
  _, plain = take(None, batch)
  assert_sums_close(sums, plain, ['loss', 'num_correct', 'loss_weight'])


def test_a_step_on_samples_is_one_on_a_batch_that_has_them():
  """The divergence of samples, and the cross-entropy of gold answers."""
  frozen, _, state = start()
  batch = helpers.random_batch()
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  params = frozen | state.trainable
  lesson = LESSONS[True]
  assert lesson is not None
  given = jax.jit(lambda params: lesson.give(STUDENT, params, batch, key, 1))(
    params
  )
  samples = batch | given.sampled
  (gold, gold_sums), (gold_of_samples, _) = (
    take(None, answers) for answers in (batch, samples)
  )
  both_of_samples, sample_sums = take(False, samples)
  expected = jax.tree.map(
    lambda both, of_samples, of_gold: (
      both + (1 - WEIGHT) * (of_gold - of_samples)
    ),
    both_of_samples,
    gold_of_samples,
    gold,
  )
  found, sums = take(True, batch)
  assert_trees_close(found, expected)
  assert_sums_close(sums, sample_sums, ['distill_loss', 'distill_weight'])
  assert_sums_close(sums, gold_sums, ['loss', 'num_correct', 'loss_weight'])
  assert sums['distill_weight'] not in (13, 4 * helpers.ANSWER_LENGTH)


@pytest.mark.parametrize(
  'is_on_policy, divergence, temperature',
  [
    (False, 0.0, 2.5),
    (True, 0.5, 1.0),
    pytest.param(False, 0.3, 1.0, marks=pytest.mark.long),
    pytest.param(True, 1.0, 2.5, marks=pytest.mark.long),
  ],
)
def test_who_is_its_own_teacher_learns_nothing(
  is_on_policy, divergence, temperature
):
  params, other = (helpers.random_params(GPT2, seed) for seed in range(2))
  state = state_lib.create(params, SGD, 0)
  lesson = lesson_of(
    teacher_of(GPT2),
    is_on_policy,
    weight=1.0,
    divergence=divergence,
    temperature=temperature,
  )
  step = step_of(lesson, GPT2)
  batch = helpers.random_batch()
  _, sums = step(state, {}, batch, params)
  assert abs(sums['distill_loss']) < 1e-4 < sums['loss']
  assert sums['grad_norm'] < 1e-4
  _, sums = step(state, {}, batch, other)
  assert sums['distill_loss'] > 1 and sums['grad_norm'] > 0.1


@pytest.mark.parametrize('is_on_policy', [False, True])
def test_padding_and_rows_without_weight_teach_nothing(is_on_policy):
  batch, other = (helpers.random_batch(seed=seed) for seed in range(2))
  weights = batch['decoder_loss_weights'].at[3].set(0)
  batch |= {'decoder_loss_weights': weights}
  is_last = jnp.arange(4)[:, None] == 3
  changed = batch | {
    key: jnp.where(
      (batch[f'{key.partition("_")[0]}_segment_ids'] > 0) & ~is_last,
      batch[key],
      other[key],
    )
    for key in batch
    if key.endswith('_tokens')
  }
  expected, expected_sums = take(is_on_policy, batch)
  found, sums = take(is_on_policy, changed)
  assert_trees_close(found, expected)
  assert_sums_close(sums, expected_sums)
  assert sums['loss_weight'] == 12


@pytest.mark.parametrize(
  'is_on_policy', [pytest.param(False, marks=pytest.mark.long), True]
)
def test_microbatches_teach_what_the_whole_batch_does(is_on_policy):
  """Gold and sampled tokens are not equally many in each of them."""
  frozen, decoder, state = start()
  batch = helpers.random_batch()
  expected, expected_sums = take(is_on_policy, batch)
  after, sums = step_of(LESSONS[is_on_policy], num_microbatches=2)(
    state, frozen, batch, decoder
  )
  found = jax.tree.map(jnp.subtract, state.trainable, after.trainable)
  assert_sums_close(sums, expected_sums)
  assert_trees_close(found, expected)


def test_rows_of_microbatches_are_joined_in_their_order():
  batch = {'x': jnp.arange(12).reshape(6, 2)}
  joined = microbatches.join(lambda part: part['x'] * 2, batch, 3)
  np.testing.assert_array_equal(joined, batch['x'] * 2)


def test_a_teacher_keeps_its_bits_and_is_no_part_of_the_state():
  frozen, decoder, state = start()
  before = jax.tree.map(np.array, (frozen, decoder))
  for is_on_policy in (False, True):
    state, _ = shared_step(is_on_policy)(
      state, frozen, helpers.random_batch(), decoder
    )
  helpers.assert_trees_equal((frozen, decoder), before)
  assert state.step == 2 and set(state.trainable) == {'projector', 'slm'}
  slots = optim.adamw(0.01).make({}).init(state.trainable)
  count = sum(x.size for x in jax.tree.leaves(slots) if x.ndim)
  assert count == 2 * parameters.num_params(state.trainable)


@pytest.mark.parametrize(
  'changes, name',
  [({'llm_layer': l2s.MIX}, 'layer_mix'), ({'train_llm': True}, 'llm')],
)
def test_what_is_trained_of_the_llm_learns_on_samples_too(changes, name):
  """No states are read for them outside of the gradient."""
  module = STUDENT.clone(**changes)
  params = helpers.random_params(module)
  frozen, trainable = parameters.split(
    params, () if module.train_llm else ('llm',)
  )
  lesson = lesson_of(teacher_of(LLM), True, weight=1.0)
  after, _ = step_of(lesson, module)(
    state_lib.create(trainable, SGD, 0),
    frozen,
    helpers.random_batch(),
    helpers.random_params(LLM, seed=1),
  )
  for before, now in zip(
    jax.tree.leaves(trainable[name]),
    jax.tree.leaves(after.trainable[name]),
    strict=True,
  ):
    assert not np.array_equal(before, now)


# --- samples ---


@pytest.mark.parametrize('module', [STUDENT, GPT2], ids=['l2s', 'gpt2'])
def test_samples_are_what_the_model_writes_at_temperature_one(module):
  params = helpers.random_params(module)
  batch = helpers.batch_for(module)
  generator = generate.Generator(
    module,
    max_decode_len=helpers.ANSWER_LENGTH,
    ids=IDS,
    decoding=sampling.Decoding(temperature=1.0, seed=3),
  )
  written = np.asarray(generator(generator.prepare(params), batch))
  row_keys = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(3), jnp.arange(4)
  )
  sampled = jax.jit(
    lambda params: distillation.sample(module, params, batch, row_keys, IDS)
  )(params)
  targets = np.asarray(sampled['decoder_target_tokens'])
  is_eos = np.isin(written, IDS.eos)
  lengths = np.where(is_eos.any(1), is_eos.argmax(1) + 1, written.shape[1])
  assert len(set(lengths.tolist())) > 1
  is_token = np.arange(written.shape[1]) < lengths[:, None]
  np.testing.assert_array_equal(targets[is_token], written[is_token])
  np.testing.assert_array_equal(sampled['decoder_segment_ids'], is_token)
  np.testing.assert_array_equal(sampled['decoder_loss_weights'], is_token)
  inputs = np.asarray(sampled['decoder_input_tokens'])
  assert (inputs[:, 0] == IDS.start).all()
  np.testing.assert_array_equal(
    inputs[:, 1:][is_token[:, 1:]], targets[:, :-1][is_token[:, 1:]]
  )


def test_each_row_has_a_sample_of_its_own():
  frozen, _, state = start()
  params = frozen | state.trainable
  lesson = LESSONS[True]
  assert lesson is not None
  batch = {
    key: jnp.repeat(value[:1], 4, axis=0)
    for key, value in helpers.random_batch().items()
  }
  given = jax.jit(
    lambda params: lesson.give(STUDENT, params, batch, jax.random.key(0), 1)
  )(params)
  tokens = np.asarray(given.sampled['decoder_target_tokens'])
  assert len({tuple(row) for row in tokens.tolist()}) == 4


def test_samples_are_of_the_step_and_the_key_and_of_nothing_else():
  _, _, state = start()

  def nats(state):
    return float(take(True, helpers.random_batch(), state)[1]['distill_loss'])

  later = state.replace(step=state.step + 1)
  other = state.replace(key=jax.random.key_data(jax.random.key(1)))
  assert nats(state) == nats(state)
  assert len({nats(state), nats(later), nats(other)}) == 3


@pytest.mark.parametrize('share', [0.0, 0.1, 0.5, 0.7, 1.0])
def test_steps_on_policy_are_a_part_of_all_spread_evenly(share):
  settings = distillation.Distillation(system_lib.Tower('x'), on_policy=share)
  found = [settings.is_on_policy(step) for step in range(100)]
  for first in range(0, 100, 10):
    assert abs(sum(found[first : first + 10]) - 10 * share) <= 1
  assert abs(sum(found) - 100 * share) <= 1
  assert set(found) == set(settings.kinds())


# --- how a teacher reads ---


@pytest.mark.parametrize('layer', [None, 0])
def test_an_llm_that_teaches_writes_as_it_does_alone(layer):
  """With its decoder alone beside the encoder, whatever layer the SLM has."""
  frozen, decoder, _ = start()
  batch = helpers.random_batch()
  teacher = teacher_of(LLM, is_llm=True, reads_states=layer is None)

  @jax.jit
  def logits(frozen, decoder):
    student = STUDENT.clone(llm_layer=layer)
    read = distillation.with_states(student, frozen, batch)
    return teacher.logits(decoder, frozen, read)

  is_token = np.asarray(batch['decoder_segment_ids']) > 0
  helpers.assert_close(
    logits(frozen, decoder)[is_token],
    helpers.logits(LLM, frozen['llm'] | decoder, batch)[is_token],
  )


@pytest.mark.parametrize('prefix_ids', [(), (5,), (5, 6)])
def test_a_teacher_that_continues_reads_what_infer_would_have_it_read(
  prefix_ids,
):
  lengths = (3, 7, 1, 5, 7, 1)
  batch = helpers.random_batch(
    prompt_lengths=lengths, answer_lengths=(6, 2, 4, 1, 3, 2)
  )
  tokens = batch['encoder_input_tokens']
  for row, eos_id in ((0, 9), (1, 9), (2, 9), (3, 8)):
    tokens = tokens.at[row, lengths[row] - 1].set(eos_id)
  batch['encoder_input_tokens'] = tokens
  expected = batching.continuing(
    {key: np.asarray(value) for key, value in batch.items()},
    prefix_ids,
    (9, 8),
  )
  expected.pop('first_tokens')
  found = teachers.continue_prompts(batch, prefix_ids, (9, 8))
  is_real = expected['encoder_segment_ids'] > 0
  for key, value in expected.items():
    here = np.asarray(found[key])
    if key == 'encoder_input_tokens':
      here, value = here[is_real], value[is_real]
    np.testing.assert_array_equal(here, value)


@pytest.mark.parametrize(
  'is_on_policy', [pytest.param(False, marks=pytest.mark.long), True]
)
def test_states_of_a_cache_teach_what_the_llm_does_that_reads(is_on_policy):
  """Without an encoder anywhere; the decoder brings its table."""
  frozen, decoder, state = start()
  batch = helpers.random_batch()
  states, _ = STUDENT.apply(
    {'params': frozen | state.trainable}, batch, method='read_prompt'
  )
  teacher_params = {
    **decoder,
    'token_embedder': frozen['llm']['token_embedder'],
  }
  after, sums = shared_step(is_on_policy)(
    state, {}, batch | {'llm_states': states}, teacher_params
  )
  expected, expected_sums = take(is_on_policy, batch)
  assert_sums_close(sums, expected_sums)
  found = jax.tree.map(jnp.subtract, state.trainable, after.trainable)
  assert_trees_close(found, expected)


def test_tables_of_one_vocabulary_need_not_be_equally_large():
  smaller = l2s.build(dataclasses.replace(helpers.GPT2, vocab_size=250))
  batch = helpers.random_batch(num_prompt_ids=250)
  logits = jax.jit(teacher_of(smaller).logits)(
    helpers.random_params(smaller), {}, batch
  )
  assert logits.shape[-1] == 250 and np.isfinite(logits).all()


# --- on a mesh ---


@pytest.mark.parametrize(
  'is_on_policy', [pytest.param(False, marks=pytest.mark.long), True]
)
def test_eight_devices_learn_what_one_does(is_on_policy):
  batch = helpers.random_batch()
  config = partitioning.MeshConfig(2, 2, 2)
  mesh = partitioning.make_mesh(config)
  frozen, decoder, state = start()

  def place(init, params):
    shapes, axes = partitioning.abstract_params(
      functools.partial(init, deterministic=True), batch
    )
    if 'llm' not in shapes:
      shapes, axes = {'llm': shapes}, {'llm': axes}
    shardings = partitioning.param_shardings(shapes, axes, mesh, config)
    return {
      name: jax.device_put(tree, {part: shardings[name][part] for part in tree})
      for name, tree in params.items()
    }

  with contextlib.ExitStack() as stack:
    stack.enter_context(partitioning.use_mesh(mesh))
    stack.enter_context(partitioning.axis_rules(config.rules('slm')))
    placed = place(STUDENT.init, frozen | state.trainable)
    of_llm, trainable = parameters.split(placed, ('llm',))
    rows = partitioning.put_batch(
      {key: np.asarray(value) for key, value in batch.items()}, mesh
    )
    after, sums = step_of(LESSONS[is_on_policy])(
      state.replace(trainable=trainable),
      of_llm,
      rows,
      place(LLM.init, {'llm': decoder})['llm'],
    )
  after = jax.device_get(after)
  expected, expected_sums = take(is_on_policy, batch)
  assert_sums_close(sums, expected_sums)
  found = jax.tree.map(jnp.subtract, state.trainable, after.trainable)
  assert_trees_close(found, expected)


# --- settings ---


def test_settings_of_a_loss_that_has_no_weight_are_refused():
  def steps(weight, label_smoothing, z_loss):
    settings = train_step.StepSettings(1, label_smoothing, z_loss)
    lesson = lesson_of(SHARED, False, weight=weight)
    return programs.Steps(settings, optim.adamw(), SGD, lesson)

  steps(1.0, 0.0, 0.0)
  steps(0.9, 0.1, 1e-4)
  for label_smoothing, z_loss, name in (
    (0.1, 0.0, 'LABEL_SMOOTHING=0.1'),
    (0.0, 1e-4, 'Z_LOSS=0.0001'),
  ):
    with pytest.raises(ValueError, match=f'DISTILL_WEIGHT=1.0 .*{name} '):
      steps(1.0, label_smoothing, z_loss)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'weight': 1.5}, 'DISTILL_WEIGHT=1.5: expected a number from 0 to 1'),
    ({'temperature': 0.0}, 'DISTILL_TEMPERATURE=0.0: expected .* above 0'),
    ({'divergence': -0.1}, 'DISTILL_DIVERGENCE=-0.1'),
    ({'on_policy': 2.0}, 'ON_POLICY=2.0'),
    ({'teacher_dtype': 'int8'}, "TEACHER_DTYPE='int8': expected 'float32'"),
  ],
)
def test_settings_out_of_their_ranges_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    distillation.Distillation(system_lib.Tower('teacher'), **changes)
