# SPDX-License-Identifier: Apache-2.0
"""Laws of features: what the LLM makes of each prompt, on any mesh."""

import dataclasses
import functools
import pathlib
import re
import shutil
import types

import cache_files
import helpers
import jax
import numpy as np
import pytest

from l2s_jax.caching import feature_command, feature_files, feature_writer
from l2s_jax.data.cached import cache_format, feature_format
from l2s_jax.models import stored_states
from l2s_jax.runtime import partitioning
from l2s_jax.systems import session as session_lib

MODULE = helpers.MODULES['llm_to_t5_1_1-replace-shared']
LONGEST = 14  # Some prompts are cut.
SIZES = {'one': 70, 'other': 9}


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
  tasks = {
    name: {'train': cache_files.random_examples(size, seed=size)}
    for name, size in SIZES.items()
  }
  return cache_files.write(tmp_path_factory.mktemp('cache') / 'x', tasks)


@functools.cache
def params():
  return helpers.random_params(MODULE)


def write(
  folder, dtype='bfloat16', shape=(8, 1, 1), longest=LONGEST, **options
):
  """Writes the features of the shards that have none; returns the session."""
  system = dataclasses.replace(
    helpers.system(MODULE), llm_fingerprint=options.pop('fingerprint', 'f' * 64)
  )
  mesh = partitioning.MeshConfig(
    **dict(zip(partitioning.MESH_AXES, shape, strict=True))
  )
  session = session_lib.start(
    lambda: system, mesh, {'inputs': longest, 'targets': 8}, batch_sizes={}
  )
  cache = cache_format.open_cache(folder)
  plan = feature_files.make_plan(cache, session.system, dtype, longest)
  with session.entered():
    feature_files.settle_plan(folder, plan)
    frozen = jax.device_put(params()['llm'], session.layout.shardings['llm'])
    shards = feature_files.missing_of(cache, **options)
    times = feature_writer.write(
      session, {'llm': frozen}, cache, shards, plan, batch_size=8, **options
    )
  if not feature_files.missing_of(cache):
    feature_files.finish(cache, plan)
  return times, feature_files.num_bytes(cache, shards, plan)


def content(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob('*features*'))
    if not path.name.startswith('.')
  }


@pytest.fixture(scope='module')
def featured(tokens):
  folder = tokens.parent / 'featured'
  shutil.copytree(tokens, folder)
  write(folder)
  return folder


def fresh(cache, task):
  """Returns what the LLM makes of each prompt, read by itself."""
  split = cache.split(task, 'train')
  prompts = [
    cache_format.decode_ids(record, split.dtype)[0][:LONGEST]
    for record in split.read(range(len(split)))
  ]
  batch = {
    'encoder_input_tokens': np.zeros((len(prompts), LONGEST), np.int32),
    'encoder_segment_ids': helpers.segments(list(map(len, prompts)), LONGEST),
  }
  for row, prompt in enumerate(prompts):
    batch['encoder_input_tokens'][row, : len(prompt)] = prompt
  states, _ = jax.jit(
    lambda params, batch: MODULE.apply(
      {'params': params}, batch, method='read_prompt'
    )
  )(params(), batch)
  return [
    np.asarray(x[: len(prompt)])
    for x, prompt in zip(states, prompts, strict=True)
  ]


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize('dtype', stored_states.DTYPES)
def test_features_are_what_the_llm_makes_of_each_prompt(
  dtype, shape, tokens, tmp_path
):
  folder = tmp_path / 'cache'
  shutil.copytree(tokens, folder)
  times, num_bytes = write(folder, dtype, shape)
  cache = cache_format.open_cache(folder)
  features = feature_format.open_features(cache)
  assert features.width == MODULE.llm_config.emb_dim
  total = 0
  for task, size in SIZES.items():
    found = features.split(task, 'train').states(range(size))
    for states, expected in zip(found, fresh(cache, task), strict=True):
      assert states.rows.dtype == dtype
      assert states.rows.shape == expected.shape
      rows = states.rows.astype(np.float32)
      error = np.abs(expected) / 256
      if states.scales is not None:
        rows *= states.scales[:, None]
        error = np.abs(expected).max(axis=1, keepdims=True) / 254
      assert (np.abs(rows - expected) <= error + 1e-5).all()
      total += rows.size
  assert times.num_examples == sum(SIZES.values())
  per_token = features.width * (2 if dtype == 'bfloat16' else 1)
  extra = 4 * total // features.width if dtype == 'int8' else 0
  assert times.num_bytes == total * per_token // features.width + extra
  written = sum(map(len, content(folder).values()))
  assert written < num_bytes < written + 6 * feature_format.SHARD_BYTES
  assert re.search('bytes and .* ms per example', times.describe())


def test_jobs_write_what_one_does(tokens, featured, tmp_path):
  """In any order; and nothing is there before all of it is."""
  folder = tmp_path / 'cache'
  shutil.copytree(tokens, folder)
  for job in (1, 2, 0):
    with pytest.raises(FileNotFoundError, match='has no features'):
      feature_format.open_features(cache_format.open_cache(folder))
    write(folder, job=job, num_jobs=3)
  assert content(folder) == content(featured)
  assert len(content(folder)) == 2 + 2 * 2 * 3


def test_a_shard_that_is_lost_is_made_anew(featured, tmp_path):
  folder = tmp_path / 'cache'
  shutil.copytree(featured, folder)
  path = folder / 'one' / 'train' / '00001-of-00003.features.array_record'
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 100] ^= 255
  path.write_bytes(bytes(damaged))
  split = feature_format.open_features(cache_format.open_cache(folder)).split(
    'one', 'train'
  )
  with pytest.raises(ValueError, match=r'record \d+ of 23 \(shard 1, ') as told:
    split.states(range(len(split)))
  for text in (str(path), 'features.json, and run `cache --features` again'):
    assert text in str(told.value)
  path.unlink()
  (folder / feature_format.FILE).unlink()
  part = path.with_name(f'.{path.name}.part-features-0-of-1')
  part.write_bytes(b'half')
  write(folder)
  assert content(folder) == content(featured)
  assert not part.exists()


@pytest.mark.parametrize(
  'changes,difference',
  [
    ({'fingerprint': '0' * 64}, 'key.llm_fingerprint: the features have'),
    ({'dtype': 'int8'}, 'dtype: the features have'),
  ],
)
def test_features_of_something_else_are_refused(changes, difference, featured):
  before = content(featured)
  with pytest.raises(ValueError, match=re.escape(difference)):
    write(featured, **changes)
  assert content(featured) == before


def test_features_of_other_tokens_are_refused(featured, tmp_path):
  examples = cache_files.random_examples(20, seed=4)
  folder = cache_files.write(tmp_path / 'c', {'one': {'train': examples}})
  for name in (feature_format.FILE, feature_files.PLAN):
    shutil.copy(featured / name, folder / name)
  cache = cache_format.open_cache(folder)
  with pytest.raises(ValueError, match='features of other tokens .* digest'):
    feature_format.open_features(cache)
  with pytest.raises(ValueError, match=r'key\.tokens: the features have'):
    write(folder)
  path = folder / feature_format.FILE
  path.write_text(path.read_text().replace('bfloat16', 'int8'))
  with pytest.raises(ValueError, match='was changed after it was written'):
    feature_format.open_features(cache)


def test_a_length_at_which_the_llm_has_not_cut_is_refused(featured):
  features = feature_format.open_features(cache_format.open_cache(featured))
  features.check_length('one', 'train', LONGEST)
  for length in (LONGEST - 1, LONGEST + 1, 512):
    with pytest.raises(
      ValueError, match=f"'inputs': {length}, .* truncated to 14"
    ):
      features.check_length('one', 'train', length)


def test_what_no_features_can_be_made_of_is_refused(vocabulary):
  alone = types.SimpleNamespace(module=helpers.MODULES['gpt2'])
  with pytest.raises(ValueError, match='a language model alone'):
    feature_command.check(alone, {'inputs': 8}, 'int8')
  model = types.SimpleNamespace(module=MODULE)
  with pytest.raises(ValueError, match="FEATURES_DTYPE='int4'"):
    feature_command.check(model, {'inputs': 8}, 'int4')
  with pytest.raises(ValueError, match="has no 'inputs'"):
    feature_command.check(model, {}, 'int8')


def test_rows_hold_the_states_of_their_examples_in_order():
  """Two examples in row 1; the third is in row 0."""
  one, two, three = (
    feature_format.States(np.full((n, 2), n, np.int8), np.full(n, n / 2))
    for n in (1, 2, 3)
  )
  segment_ids = np.array([[1, 1, 1, 0], [1, 2, 2, 0]], np.int32)
  like = feature_format.FeatureCache(
    pathlib.Path('x'), {'dtype': 'int8', 'width': 2}
  )
  batch = feature_format.lay_out(
    [one, two, three], segment_ids, [1, 1, 0], like=like
  )
  assert batch['llm_states'][..., 1].tolist() == [[3, 3, 3, 0], [1, 2, 2, 0]]
  assert batch['llm_state_scales'].tolist() == [
    [1.5, 1.5, 1.5, 0],
    [0.5, 1, 1, 0],
  ]
  with pytest.raises(ValueError, match='row 0 has 3 prompt tokens, .* of 2'):
    feature_format.lay_out([one, two, two], segment_ids, [1, 1, 0], like=like)


@pytest.fixture(scope='module')
def uncut(tokens):
  folder = tokens.parent / 'uncut'
  shutil.copytree(tokens, folder)
  write(folder, longest=40)
  return folder


@pytest.mark.parametrize(
  'options',
  [{}, {'pack': True}, {'length_buckets': ((12, 6), (16, 12))}],
  ids=['padded', 'packed', 'by length'],
)
def test_states_stand_where_their_tokens_do(uncut, vocabulary, options):
  """Whatever shares a row, in the rows of one process or of two."""
  cache = cache_format.open_cache(uncut)
  features = feature_format.open_features(cache)
  task = dataclasses.replace(
    cache_files.task(uncut, vocabulary), features=features
  )
  lengths = {'inputs': 40, 'targets': 30}
  task.check_data('train', lengths)
  parts = []
  for rows in (np.arange(8), np.arange(0, 8, 2)):
    batches = task.train_batches(
      task_feature_lengths=lengths, batch_size=8, seed=1, rows=rows, **options
    )
    parts.append([next(batches) for _ in range(10)])
    batches.close()
  states_of = {}
  for name, size in SIZES.items():
    split = cache.split(name, 'train')
    for record, states in zip(
      split.read(range(size)),
      features.split(name, 'train').states(range(size)),
      strict=True,
    ):
      prompt, _ = cache_format.decode_ids(record, split.dtype)
      states_of[tuple(prompt.tolist())] = states.rows
  for whole, own in zip(*parts, strict=True):
    batch = whole.batch
    np.testing.assert_array_equal(
      batch['llm_states'][::2], own.batch['llm_states']
    )
    for ids, segment_ids, states in zip(
      batch['encoder_input_tokens'],
      batch['encoder_segment_ids'],
      batch['llm_states'],
      strict=True,
    ):
      assert not states[segment_ids == 0].any()
      for number in range(1, segment_ids.max() + 1):
        where = segment_ids == number
        expected = states_of[tuple(ids[where].tolist())]
        np.testing.assert_array_equal(states[where], expected)
