# SPDX-License-Identifier: Apache-2.0
"""Laws of distillation: what a teacher answers is what a student trains on."""

import dataclasses
import itertools
import json
import math
import random

import cache_files
import data_files
import gin
import helpers
import numpy as np
import pytest
import saved_runs
import tiny_runs

from l2s_jax.caching import cache_command
from l2s_jax.data import bound_tasks, distilled, streams, tasks
from l2s_jax.inference import distill, infer, sampling
from l2s_jax.interop import to_huggingface
from l2s_jax.models import language_model
from l2s_jax.systems import run_folder

NUM_PROMPTS = 37
LENGTHS = {'inputs': 12, 'targets': 6}


def save(system, path, seed=0):
  """Saves a run whose model has random parameters and writes anything."""
  saved_runs.save(path, system, helpers.random_params(system.module, seed))
  return path


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  system = helpers.system(helpers.MODULES['t5_1_1'])
  return save(system, tmp_path_factory.mktemp('teacher'))


def write_task(folder, changed=''):
  """Writes the files of a task; returns what gin binds of it."""
  for split, count in (('train', NUM_PROMPTS), ('validation', 3)):
    with (folder / f'{split}.jsonl').open('w') as file:
      for number in range(count):
        row = {'source': f'{number}{changed}', 'target': f'gold {number}'}
        file.write(json.dumps(row) + '\n')
  return {
    'local_task.data_dir': str(folder),
    'local_task.data_files': {
      split: f'{split}.jsonl' for split in ('train', 'validation')
    },
  }


def gin_of(bindings):
  """Puts settings, and nothing else, into gin until the test ends."""
  gin.clear_config()
  for name, value in bindings.items():
    gin.bind_parameter(name, value)


@pytest.fixture(autouse=True)
def clear_gin():
  with gin.unlock_config():
    yield
    gin.clear_config()


# Many letters end an answer, so that some end and some do not.
STOPS = tuple('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01')
SAMPLED = sampling.Decoding(temperature=1.0, seed=3, stop=STOPS)
BEAMS = sampling.Decoding(num_beams=3, num_answers=3, stop=STOPS)


def write(teacher, folder, **options):
  distill.distill(
    **{
      'checkpoint_path': str(teacher),
      'mixture_or_task_name': 'local',
      'distill_dir': str(folder),
      'task_feature_lengths': LENGTHS,
      'batch_size': 8,
      'decoding': SAMPLED,
      **options,
    }
  )


def records_of(folder):
  return list(distilled.open_folder(str(folder)).records())


def texts_of(bindings, split, name='distilled'):
  """Returns prompt and answer of each example of a task."""
  task = data_files.bind(helpers.vocabulary(), name, bindings)
  dataset = task.get_dataset(None, split=split, shuffle=False, num_epochs=1)
  return [
    tuple(
      example[f'{key}_pretokenized'].decode() for key in ('inputs', 'targets')
    )
    for example in dataset.as_numpy_iterator()
  ]


def test_shards_that_were_cut_make_the_data_that_infer_would_have_written(
  teacher, tmp_path, capsys
):
  bindings = write_task(tmp_path)
  gin_of(bindings)
  infer.infer(
    str(teacher),
    'task:local',
    str(tmp_path / 'answers'),
    LENGTHS['inputs'],
    LENGTHS['targets'],
    batch_size=8,
    split='train',
    decoding=SAMPLED,
  )
  answers = (tmp_path / 'answers' / 'predictions.jsonl').read_text()
  expected = [json.loads(line) for line in answers.splitlines()]

  out = tmp_path / 'distilled'
  of_task = bindings | {'distilled_task.distill_dir': str(out)}
  write(teacher, out, shard=1, num_shards=2)
  with pytest.raises(FileNotFoundError, match='is not complete: it has no'):
    texts_of(of_task, 'train')
  gin_of(bindings)
  write(teacher, out, shard=0, num_shards=2)
  whole = out / 'predictions-00000-of-00002.jsonl'
  manifest = (out / distilled.FILE).read_bytes()
  content = whole.read_bytes()
  cut = random.Random(0).randrange(len(content))
  whole.with_name(f'{whole.name}.partial').write_bytes(content[:cut])
  whole.unlink()
  with pytest.raises(FileNotFoundError, match='00000-of-00002.jsonl is miss'):
    texts_of(of_task, 'train')
  gin_of(bindings)
  write(teacher, out, shard=0, num_shards=2)
  assert whole.read_bytes() == content
  assert (out / distilled.FILE).read_bytes() == manifest
  for number in range(2):
    config = (out / f'config-0000{number}-of-00002.gin').read_text()
    assert 'local_task.data_files = ' in config

  found = records_of(out)
  ended = [record.pop('ended', None) for record in found]
  assert found == expected
  assert len(found) == NUM_PROMPTS
  kept = [
    (record['prompt'], record['prediction'])
    for record, ends in zip(found, ended, strict=True)
    if ends == [True] and record['prediction'].strip()
  ]
  assert 3 < len(kept) < NUM_PROMPTS - 3
  capsys.readouterr()
  assert texts_of(of_task, 'train') == kept
  told = capsys.readouterr().err
  num_cut = ended.count([False])
  assert f'{num_cut} answers that did not end (UNENDED=' in told
  assert f'distilled: {len(kept)} examples from {NUM_PROMPTS} distilled' in told
  gold = [('0', 'gold 0'), ('1', 'gold 1'), ('2', 'gold 2')]
  assert texts_of(of_task, 'validation') == gold
  bound = data_files.bind(helpers.vocabulary(), 'distilled', of_task)
  assert tasks.metric_names(bound) == ['bleu', 'chrf', 'exact_match']
  (batch,) = itertools.islice(
    streams.train_batches(
      bound,
      task_feature_lengths={'inputs': 16, 'targets': 16},
      batch_size=2,
      seed=0,
      pack=True,
    ),
    1,
  )
  assert batch['encoder_segment_ids'].max() > 1


@pytest.mark.parametrize('name', ['t5_1_1', 'gpt2'])
def test_a_model_model_paths_teaches(teacher, tmp_path, name):
  """A T5 as a run of it does; a decoder-only model as it answers elsewhere."""
  module = helpers.MODULES[name]
  assert isinstance(module, language_model.LanguageModel)
  source = helpers.Arrays(module.config, helpers.random_params(module))
  folder, out = tmp_path / 'came', tmp_path / 'distilled'
  to_huggingface.save(source, folder, helpers.vocabulary())
  helpers.vocabulary().save(folder)
  before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
  gin_of(bindings := write_task(tmp_path))
  write(folder, out)
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  found = records_of(out)
  answers = [record['prediction'] for record in found]
  assert len(found) == NUM_PROMPTS and len(set(answers)) > NUM_PROMPTS / 2
  gin_of(bindings)
  if name == 't5_1_1':
    write(teacher, tmp_path / 'of_run')
    assert found == records_of(tmp_path / 'of_run')
    return
  infer.infer(
    str(folder),
    'task:local',
    str(tmp_path / 'answers'),
    LENGTHS['inputs'],
    LENGTHS['targets'],
    batch_size=8,
    split='train',
    decoding=SAMPLED,
  )
  lines = (tmp_path / 'answers' / 'predictions.jsonl').read_text().splitlines()
  assert answers == [json.loads(line)['prediction'] for line in lines]


@pytest.fixture(scope='module')
def n_best(teacher, tmp_path_factory):
  """A folder of three answers to each prompt, and what gin binds of it."""
  folder = tmp_path_factory.mktemp('n_best')
  with gin.unlock_config():
    gin_of(bindings := write_task(folder))
    write(teacher, folder / 'out', decoding=BEAMS)
    gin.clear_config()
  return folder / 'out', bindings | {
    'distilled_task.distill_dir': str(folder / 'out'),
    'distilled_task.unended': 'keep',
  }


def test_several_answers_are_examples_one_each_or_by_probability(n_best):
  folder, bindings = n_best
  records = records_of(folder)
  kept = [
    [
      (text, score)
      for text, score in zip(r['predictions'], r['scores'], strict=True)
      if text.strip()
    ]
    for r in records
  ]
  each = [
    (r['prompt'], text)
    for r, answers in zip(records, kept, strict=True)
    for text in dict.fromkeys(text for text, _ in answers)
  ]
  assert len(each) > 1.5 * len(records)

  def of(answers):
    return texts_of(bindings | {'distilled_task.answers': answers}, 'train')

  assert of('each') == each
  first: dict[str, str] = {}
  for prompt, text in each:
    first.setdefault(prompt, text)
  assert of('best') == list(first.items())
  drawn = of('drawn')
  assert drawn == of('drawn')
  assert set(drawn) <= set(each) and drawn != of('best')
  with pytest.raises(ValueError, match="ANSWERS='all': expected one of best"):
    of('all')


def test_answers_are_drawn_with_their_probabilities():
  scores = np.log([0.7, 0.2, 0.1]) - 40.0
  kept = list(zip('abc', scores.tolist(), strict=True))
  drawn = [distilled._choose(kept, 'drawn', n)[0] for n in range(3000)]
  for letter, probability in zip('abc', (0.7, 0.2, 0.1), strict=True):
    sigma = math.sqrt(probability * (1 - probability) / len(drawn))
    share = drawn.count(letter) / len(drawn)
    assert abs(share - probability) < 4 * sigma


def test_a_mixture_of_distilled_and_gold_answers(n_best):
  _, bindings = n_best
  bindings = bindings | {
    'mixture.tasks': {'distilled': 3.0, 'local': 1.0},
    'distilled_task.gold_splits': False,
  }
  bound = data_files.bind(helpers.vocabulary(), 'mixture', bindings)
  assert [bound.get_rate(task) for task in bound.tasks] == [3.0, 1.0]
  streamed = helpers.streamed(bound)
  assert list(streamed.metrics_of('validation')) == ['local']
  assert set(streamed.metrics_of('train')) == {'distilled', 'local'}


def test_a_cache_of_it_has_its_examples_and_is_of_no_other_answers(
  teacher, n_best, tmp_path
):
  folder, bindings = n_best
  system = helpers.system(helpers.MODULES['t5_1_1'])

  def cache():
    cache_command.cache(
      str(tmp_path / 'cache'), system, 'distilled', LENGTHS, num_workers=1
    )

  gin_of(bindings)
  cache()
  cached = cache_files.task(tmp_path / 'cache', helpers.vocabulary())
  task = cached.task_in_order('it')
  for split in ('train', 'validation'):
    dataset = task.get_dataset(None, split=split, shuffle=False, num_epochs=1)
    assert [
      (e['inputs_pretokenized'].decode(), e['targets_pretokenized'].decode())
      for e in dataset.as_numpy_iterator()
    ] == texts_of(bindings, split)
  gin_of(bindings)
  cache()  # It is complete.
  settings = bound_tasks.bind(
    'distilled', helpers.vocabulary(), helpers.vocabulary()
  ).data_settings()
  gin.bind_parameter('distilled_task.answers', 'each')
  with pytest.raises(
    ValueError, match='with other settings or data:\n.*answers'
  ):
    cache()
  assert settings != tasks.data_settings('distilled')


def test_what_is_stale_foreign_or_damaged_is_refused(teacher, n_best, tmp_path):
  folder, bindings = n_best
  # The task's data have changed since.
  changed = bindings | write_task(tmp_path, changed='!')
  nothing = {'distilled_task.distill_dir': str(folder)}
  with pytest.raises(ValueError, match='Put the gin file of that task before'):
    texts_of(nothing, 'train')
  with pytest.raises(ValueError, match='with other settings:\n.*train'):
    texts_of(changed, 'train')
  gin_of(changed)
  with pytest.raises(ValueError, match='DISTILL_DIR=.* answers of another job'):
    write(teacher, folder, decoding=BEAMS)
  # Another teacher of the same shape, and another decoding.
  other = save(
    helpers.system(helpers.MODULES['t5_1_1']), tmp_path / 'other', seed=1
  )
  gin_of(bindings)
  for options, key in (
    ({'checkpoint_path': str(other), 'decoding': BEAMS}, 'teacher.fingerprint'),
    ({'decoding': SAMPLED}, 'decoding.seed'),
  ):
    with pytest.raises(ValueError, match=key):
      write(teacher, folder, **options)
  write(teacher, folder, decoding=BEAMS)  # Its own: nothing to answer.
  path = folder / 'predictions.jsonl'
  content = path.read_bytes()
  try:
    path.write_bytes(content.replace(b'gold 7', b'gild 7'))
    with pytest.raises(ValueError, match='predictions.jsonl is damaged'):
      texts_of(bindings, 'train')
  finally:
    path.write_bytes(content)


def test_who_cannot_teach_is_refused(teacher, tmp_path):
  gin_of(write_task(tmp_path))
  student = tmp_path / 'student'
  name = 'llm_to_t5_1_1-add-shared'
  system = helpers.system(helpers.MODULES[name])
  system = dataclasses.replace(system, sources={'llm': str(teacher)})
  run_folder.save(system, student)
  for options, message in (
    ({'checkpoint_path': str(student)}, 'is an LLM-to-SLM run, which is the'),
    ({'mixture_or_task_name': 'cached'}, 'Give the task that was cached'),
    (
      {'decoding': sampling.Decoding(draft_len=2)},
      'draft_len=2 needs LLM-to-SLM',
    ),
    ({'task_feature_lengths': {'inputs': 4}}, "lacks 'targets'"),
  ):
    with pytest.raises(ValueError, match=message):
      write(teacher, tmp_path / 'never', **options)
  assert not (tmp_path / 'never').exists()


def test_by_the_command_line_a_folder_is_made_and_found_whole(
  teacher, tmp_path
):
  write_task(tmp_path)
  arguments = (
    '--gin_file=gin_configs/tasks/jsonl.gin',
    f'--gin.DATA_DIR={tmp_path}',
    "--gin.DATA_FILES={'train': 'train.jsonl'}",
    f'--gin.TASK_FEATURE_LENGTHS={LENGTHS}',
    f'--gin.DISTILL_DIR={tmp_path / "out"}',
  )
  for told in (' answers to 37 prompts; ', 'is complete: nothing to answer.'):
    result = tiny_runs.l2s(
      'distill',
      *arguments,
      '--gin_file=gin_configs/runs/distill.gin',
      f'--gin.CHECKPOINT_PATH={teacher}',
      '--gin.BATCH_SIZE=16',
    )
    assert told in result.stdout + result.stderr
  lines = (tmp_path / 'out' / 'predictions.jsonl').read_text().splitlines()
  assert len(lines) == NUM_PROMPTS
