# SPDX-License-Identifier: Apache-2.0
"""Laws of packed rows and length buckets: less padding, and nothing else.

The same examples, losses and gradients as one example a row, and a position in
the data that a run goes on from.
"""

import functools
import itertools
import json
import re
import signal
import time

import helpers
import jax
import numpy as np
import pytest
import tiny_runs

from l2s_jax.data import batching, packing, streams, tasks
from l2s_jax.data.cached import plans
from l2s_jax.data.features import seqio
from l2s_jax.evaluation import metric_writer
from l2s_jax.models import losses
from l2s_jax.systems import parameters
from l2s_jax.training import checkpoint, train_data
from l2s_jax.vocabularies import loading
from l2s_jax.weights import saved_steps

# --- rows ---


def test_an_example_goes_to_the_first_row_that_has_room():
  sizes = np.array([[3, 2], [3, 4], [2, 1], [1, 1]])
  assert packing.first_fit(sizes, (5, 6)).tolist() == [0, 1, 0, 1]


def test_no_row_is_too_full_and_none_had_room_for_a_later_example():
  generator = np.random.default_rng(0)
  sizes, room = generator.integers(1, 9, (200, 2)), (16, 12)
  rows = packing.first_fit(sizes, room)
  for example, row in enumerate(rows):
    before = sizes[:example]
    for earlier in range(row):
      filled = before[rows[:example] == earlier].sum(axis=0)
      assert (filled + sizes[example] > room).any()
  for row in range(rows.max() + 1):
    assert 0 < sizes[rows == row].sum(axis=0).max() <= 16
    assert sizes[rows == row].sum(axis=0)[1] <= 12


def test_windows_side_by_side_are_filled_as_one_by_one():
  sizes = np.random.default_rng(0).integers(1, 9, (7, 100, 2))
  for room in ((16, 12), (9, 200)):
    rows = packing.first_fit_of_windows(sizes, room)
    expected = [packing.first_fit(window, room) for window in sizes]
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize('num_examples', [None, 96, 100, 5])
def test_a_plan_does_not_depend_on_the_windows_planned_at_a_time(
  num_examples, monkeypatch
):
  monkeypatch.setattr(packing, 'WINDOW', 16)
  lengths = np.random.default_rng(0).integers(1, 9, (200, 2))

  def plan(position=None):
    found = plans.packed(
      lambda first, end: plans.Stretch(
        np.zeros(end - first, np.int64),
        np.arange(first, end),
        lengths[np.arange(first, end) % len(lengths)],
      ),
      (16, 12),
      3,
      position,
      num_examples,
    )
    for batch in itertools.islice(found, 25):
      examples = batch.stretch.examples.tolist()
      yield examples, batch.rows.tolist(), batch.position

  monkeypatch.setattr(plans, '_WINDOWS', 1)
  one_by_one = list(plan())
  assert len(one_by_one) > 10 or num_examples == 5
  monkeypatch.setattr(plans, '_WINDOWS', 4)
  assert list(plan()) == one_by_one
  for number, (*_, position) in enumerate(one_by_one, start=1):
    following = list(plan(position))[: len(one_by_one) - number]
    assert following == one_by_one[number:]


def test_an_example_that_no_row_has_room_for_is_named():
  with pytest.raises(ValueError, match=r'\[3, 9\] tokens .* row of \[8, 8\]'):
    packing.first_fit(np.array([[1, 1], [3, 9]]), (8, 8))


def test_rows_of_the_documented_example():
  tokens, segment_ids = packing.fill(
    [[5, 1], [6, 7, 1], [8, 1]], [0, 1, 0], length=5, pad_id=0
  )
  assert tokens.tolist() == [[5, 1, 8, 1, 0], [6, 7, 1, 0, 0]]
  assert segment_ids.tolist() == [[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]]


def test_a_row_without_room_is_named():
  with pytest.raises(ValueError, match='row 1 has 5 tokens, .* length is 4'):
    packing.fill([[5, 1], [6, 7, 1], [8, 1]], [0, 1, 1], length=4, pad_id=0)


# --- losses and gradients ---

NUM_EXAMPLES, ROOM = 12, (20, 16)
ENCODER_DECODERS = {
  name: helpers.MODULES[name]
  for name in (
    't5_1_0',
    't5_1_1',
    'umt5',
    't5gemma',
    'llm_to_t5_1_0-add-shared',
    'llm_to_t5_1_0-replace-foreign',
    'llm_to_t5_1_1-add-foreign',
    'llm_to_t5_1_1-replace-shared',
  )
} | {
  'llm_to_t5gemma-replace-shared': helpers.llm_to_slm(
    't5gemma', 'replace', 'shared'
  ),
  't5gemma_to_umt5-add-foreign': helpers.llm_to_slm(
    'umt5', 'add', 'foreign', helpers.T5GEMMA
  ),
}
BUCKETED = (
  'gpt2',
  'llama',
  'qwen2',
  'gemma3',
  'llm_to_gpt2-add-foreign',
  't5_1_1',
)


def random_examples(module):
  """Returns prompts and answers, 0 a token like others."""
  generator = np.random.default_rng(1)
  sizes = generator.integers(1, (13, 11), (NUM_EXAMPLES, 2))
  sizes[0] = 12, 10
  prompts, answers = (
    [generator.integers(num_ids, size=size).tolist() for size in column]
    for column, num_ids in zip(
      sizes.T, (helpers.prompt_ids(module), 264), strict=True
    )
  )
  prompts[1][0] = answers[1][0] = 0
  return prompts, answers, sizes


def lay_out(prompts, answers, rows, room):
  return packing.lay_out(
    prompts,
    answers,
    rows,
    task_feature_lengths={'inputs': room[0], 'targets': room[1]},
    prompt_pad_id=3,
    answer_pad_id=5,
    start_id=7,
  )


@functools.partial(jax.jit, static_argnames='module')
def sums_and_gradients(module, frozen, trainable, batch):
  """Returns the sums of a batch, and the gradient of its loss, undivided."""

  def loss_fn(trainable):
    logits = module.apply(
      {'params': parameters.merge(frozen, trainable)},
      batch,
      deterministic=False,
      rngs={'dropout': jax.random.key(0)},  # whose rate is 0
    )
    return losses.token_cross_entropy(
      logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
    )

  (_, sums), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
  return sums, gradients


def add_up(module, batches):
  """Returns sums and gradients of all batches."""
  frozen, trainable = parameters.split(helpers.random_params(module), ('llm',))
  found = [
    jax.device_get(sums_and_gradients(module, frozen, trainable, batch))
    for batch in batches
  ]
  return jax.tree.map(lambda *parts: sum(parts), *found)


def assert_all_close(found, expected, tolerance=1e-5):
  leaves = jax.tree.leaves_with_path(expected)
  for (path, leaf), other in zip(leaves, jax.tree.leaves(found), strict=True):
    # That of a bias of keys is 0 but for rounding.
    scale = np.abs(leaf).max(initial=1.0)
    assert np.abs(other - leaf).max() <= tolerance * scale, path


@pytest.mark.parametrize('name', helpers.cases(ENCODER_DECODERS))
def test_packed_rows_have_the_losses_and_gradients_of_single_ones(name):
  module = ENCODER_DECODERS[name]
  prompts, answers, sizes = random_examples(module)
  single = lay_out(prompts, answers, range(NUM_EXAMPLES), ROOM)
  packed = lay_out(prompts, answers, packing.first_fit(sizes, ROOM), ROOM)
  assert len(packed['encoder_input_tokens']) < 0.7 * NUM_EXAMPLES
  # Of one shape, to compile once.
  packed = batching.pad_rows(packed, NUM_EXAMPLES)
  expected = add_up(module, [single])
  assert expected[0]['loss_weight'] == sizes[:, 1].sum()
  # The angles of later slots round otherwise where positions are rotary.
  tolerance = 3e-5 if 't5gemma' in name else 1e-5
  assert_all_close(add_up(module, [packed]), expected, tolerance)

  one_text = {
    key: np.minimum(value, 1) if key.endswith('segment_ids') else value
    for key, value in packed.items()
  }
  (sums, _) = add_up(module, [one_text])
  assert abs(sums['loss'] / expected[0]['loss'] - 1) > 1e-3


@pytest.mark.parametrize('name', BUCKETED)
def test_shorter_batches_have_the_losses_and_gradients_of_long_ones(name):
  module = helpers.MODULES[name]
  prompts, answers, sizes = random_examples(module)
  is_short = (sizes <= (9, 8)).all(axis=1)
  assert 0.2 < is_short.mean() < 0.8

  def batch(chosen, room):
    some = np.flatnonzero(chosen)
    rows = lay_out(
      [prompts[i] for i in some],
      [answers[i] for i in some],
      range(len(some)),
      room,
    )
    return batching.pad_rows(rows, NUM_EXAMPLES)  # so that fewer shapes compile

  long, short = (12, 10), (9, 8)
  expected = add_up(module, [batch(is_short | True, long)])
  found = add_up(module, [batch(is_short, short), batch(~is_short, long)])
  assert_all_close(found, expected)


# --- batches of a task ---

LENGTHS = {'inputs': 24, 'targets': 12}
BUCKETS = ((10, 8), (16, 8))
OPTIONS = ({'pack': True}, {'length_buckets': BUCKETS})
NUM_ROWS = 41


@pytest.fixture(scope='module', params=['letters', 'gpt2', 'smollm2'])
def task(request, tmp_path_factory, vocabulary):
  """Returns a bound task whose answers have id 0, some too long."""
  answers = helpers.vocabulary()
  if request.param != 'letters':
    shared_data = request.getfixturevalue('shared_data')
    name = {'gpt2': 'gpt2', 'smollm2': 'smollm2/tokenizer.json'}[request.param]
    answers = loading.load(shared_data / 'tokenizers' / name)
  zero = answers.decode([0]) or '!'
  folder = tmp_path_factory.mktemp(request.param)
  rows = [
    {'source': f'day {n} ' * (1 + n % 5), 'target': f'{zero} {n}' * (1 + n % 7)}
    for n in range(NUM_ROWS)
  ]
  (folder / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  local = tasks.local_task(
    {'train': 'train.jsonl'}, data_dir=str(folder), name='numbered'
  )
  seqio.TaskRegistry.add_provider('numbered', local)
  yield tasks.bind('numbered', vocabulary, answers)
  seqio.TaskRegistry.remove('numbered')


def batches_of(task, batch_size=4, **options):
  return streams.train_batches(
    task,
    task_feature_lengths=LENGTHS,
    batch_size=batch_size,
    seed=3,
    **options,
  )


def examples_of(batches):
  """Yields prompts, inputs and targets, of all examples of all rows."""
  for batch in batches:
    for row in range(len(batch['encoder_segment_ids'])):
      prompt_ids = batch['encoder_segment_ids'][row]
      answer_ids = batch['decoder_segment_ids'][row]
      weights = batch['decoder_loss_weights'][row]
      assert prompt_ids.max() == answer_ids.max() > 0
      np.testing.assert_array_equal(weights, answer_ids > 0)
      for number in range(1, prompt_ids.max() + 1):
        yield (
          batch['encoder_input_tokens'][row][prompt_ids == number].tolist(),
          batch['decoder_input_tokens'][row][answer_ids == number].tolist(),
          batch['decoder_target_tokens'][row][answer_ids == number].tolist(),
        )


@pytest.mark.parametrize('options', OPTIONS)
def test_no_example_and_no_token_is_lost(task, options):
  single = batches_of(task, batch_size=1, num_epochs=2)
  expected = sorted(examples_of(single))
  found = batches_of(task, batch_size=1, num_epochs=2, **options)
  assert sorted(examples_of(found)) == expected
  assert any(0 in targets for _, _, targets in expected)
  assert found.num_examples == single.num_examples == 2 * NUM_ROWS
  assert found.num_truncated_prompts == single.num_truncated_prompts > 0
  assert found.num_truncated_answers == single.num_truncated_answers > 0


@pytest.mark.parametrize('options', OPTIONS)
def test_what_follows_is_what_would_have_followed(task, options):
  """Across epochs, and with what was cut."""

  def counts(batches):
    return np.array(
      [
        batches.num_examples,
        batches.num_truncated_prompts,
        batches.num_truncated_answers,
      ]
    )

  batches = batches_of(task, **options)
  whole = []
  for batch in itertools.islice(batches, 40):
    whole.append((batch, counts(batches)))
  assert whole[-1][1][0] > 2 * NUM_ROWS
  for start in (1, 17):
    resumed = batches_of(task, start_row=4 * start, **options)
    for batch, so_far in whole[start:]:
      found = next(resumed)
      assert found.keys() == batch.keys()
      for key, value in batch.items():
        np.testing.assert_array_equal(found[key], value, key)
      np.testing.assert_array_equal(
        counts(resumed) + whole[start - 1][1], so_far
      )


def test_packed_rows_go_on_at_another_batch_size(task):
  def rows(batches, number):
    tokens = (batch['encoder_input_tokens'] for batch in batches)
    return np.concatenate(list(itertools.islice(tokens, number)))

  whole = rows(batches_of(task, pack=True), 9)
  resumed = batches_of(task, batch_size=6, pack=True, start_row=12)
  np.testing.assert_array_equal(rows(resumed, 4), whole[12:])


def test_a_batch_has_the_least_lengths_that_fit_each_of_its_rows(task):
  seen = set()
  lengths = [*BUCKETS, tuple(LENGTHS.values())]
  batches = batches_of(task, length_buckets=BUCKETS)
  for batch in itertools.islice(batches, 40):
    bucket = lengths.index(batching.lengths(batch))
    seen.add(bucket)
    for value in batch.values():
      assert len(value) == 4
    sizes = np.stack(
      [
        (batch[f'{tower}_segment_ids'] > 0).sum(axis=1)
        for tower in ('encoder', 'decoder')
      ],
      axis=1,
    )
    assert (sizes <= lengths[bucket]).all()
    if bucket:
      assert (sizes > lengths[bucket - 1]).any(axis=1).all()
  assert seen == {0, 1, 2}


# --- settings that do not fit ---


@pytest.mark.parametrize(
  'buckets',
  [
    ((8, 4), (6, 6)),
    ((8, 4), (8, 4)),
    ((24, 12),),
    ((8, 13),),
    ((0, 4),),
    ((8,),),
  ],
)
def test_buckets_that_do_not_grow_are_refused(buckets):
  with pytest.raises(
    ValueError, match=r'LENGTH_BUCKETS=.*TASK_FEATURE_LENGTHS, \(24, 12\)'
  ):
    batching.bucket_lengths(LENGTHS, buckets)


def test_buckets_may_grow_in_one_length_alone():
  assert batching.bucket_lengths(LENGTHS, [[8, 12], [16, 12]]) == [
    (8, 12),
    (16, 12),
    (24, 12),
  ]


def data(length_buckets):
  """Returns settings of packed rows."""
  return train_data.TrainData(
    LENGTHS, 8, seed=0, pack=True, length_buckets=length_buckets
  )


def test_a_place_within_a_batch_of_a_bucket_is_refused(task):
  with pytest.raises(ValueError, match='start_row=6 is in the middle'):
    batches_of(task, length_buckets=BUCKETS, start_row=6)


@pytest.mark.parametrize(
  'module, named',
  [
    (helpers.MODULES['gpt2'], 'the model'),
    (helpers.MODULES['llm_to_gpt2-add-shared'], 'the SLM'),
    (
      helpers.llm_to_slm('t5_1_0', 'add', 'foreign', helpers.GPT2),
      'the LLM',
    ),
    (
      helpers.llm_to_slm('gpt2', 'add', 'foreign', helpers.GPT2),
      'the LLM and the SLM',
    ),
  ],
)
def test_what_reads_a_row_as_one_text_is_not_packed(module, named):
  with pytest.raises(
    ValueError, match=rf'decoder-only.*: {named}\..*LENGTH_BUCKETS'
  ):
    data(()).check_model(module)


def test_packed_rows_have_one_length():
  data(()).check_model(helpers.MODULES['t5_1_0'])
  with pytest.raises(ValueError, match='Set PACK=False or LENGTH_BUCKETS='):
    data(BUCKETS)


# --- whole runs ---

STEPS = 100
BINDINGS = {
  'pack': ('--gin.PACK=True',),
  'buckets': ('--gin.LENGTH_BUCKETS=((30, 16),)',),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('packing')
  tiny_runs.write_experiments(path)
  return path


def start(folder, run, *bindings):
  return tiny_runs.start(
    *tiny_runs.train_arguments(
      folder,
      'slm_baseline',
      run,
      f'--gin.TRAIN_STEPS={STEPS}',
      '--gin.CHECKPOINT_PERIOD=10',
      *bindings,
    )
  )


def finish(process):
  try:
    output, _ = process.communicate(timeout=240)
  finally:
    process.kill()  # if it is still there
  return process.returncode, output


def trained(run_dir):
  """Returns losses by step, what was saved last, and its place in the data."""
  folder, _ = saved_steps.params_folder(run_dir, STEPS)
  place = checkpoint.Checkpointer(run_dir).restore_data() or {}
  names = sorted(saved_steps.array_shapes(folder))
  return (
    {
      step: scores['loss']
      for step, scores in metric_writer.by_step(
        run_dir, prefix='train/'
      ).items()
    },
    saved_steps.read_arrays(folder, names),
    place['num_rows'],
  )


@pytest.mark.parametrize(
  'name', ['pack', pytest.param('buckets', marks=pytest.mark.long)]
)
def test_a_killed_run_equals_its_unbroken_twin(folder, name):
  code, output = finish(start(folder, f'{name}-unbroken', *BINDINGS[name]))
  assert code == 0, output

  run = folder / f'{name}-killed'
  process = start(folder, run.name, *BINDINGS[name])
  while not saved_steps.steps(run) and process.poll() is None:
    time.sleep(0.01)
  process.kill()
  assert finish(process)[0] == -signal.SIGKILL
  code, output = finish(start(folder, run.name, *BINDINGS[name]))
  assert code == 0 and re.search(r'step \d+; skipped [\d,]+ rows', output)

  found, expected = trained(run), trained(folder / f'{name}-unbroken')
  assert found[0] == expected[0] and len(found[0]) == STEPS
  for one, other in zip(found[1], expected[1], strict=True):
    np.testing.assert_array_equal(one, other)
  assert found[2] == expected[2] == 8 * STEPS

  # The place in other rows would be another place in the data.
  code, output = finish(start(folder, run.name))
  setting = {'pack': 'pack', 'buckets': 'length_buckets'}[name]
  assert code != 0
  assert re.search(f'{setting}: the run has .*, the config says noth', output)
