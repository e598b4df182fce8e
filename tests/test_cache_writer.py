# SPDX-License-Identifier: Apache-2.0
"""Laws of caches: they hold what streaming gives, whatever has befallen."""

import collections
import contextlib
import json
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from typing import Any

import forked
import gin
import pytest

from l2s_jax.caching import cache_command, cache_encoding, cache_writer
from l2s_jax.data import tasks
from l2s_jax.data.cached import cache_format
from l2s_jax.data.features import seqio, tf
from l2s_jax.runtime import os_errors
from l2s_jax.vocabularies import loading

LENGTHS = {'inputs': 12, 'targets': 6}
NUM_EXAMPLES = 103
FEW = 8  # examples a shard


@pytest.fixture(scope='module', autouse=True)
def server():
  """Starts the tests' server of processes before `cache` starts its own."""
  forked.start_server()


@pytest.fixture(scope='module')
def model(vocabulary):
  """Returns what `cache` reads of a system: two tokenizers."""
  return types.SimpleNamespace(
    prompt_vocabulary=vocabulary,
    answer_vocabulary=loading.load(
      vocabulary.path, start_id=5, pad_id=4, eos_id=3
    ),
  )


@pytest.fixture
def data(tmp_path):
  """Returns a folder with records, some long, some of which are bad lines."""
  folder = tmp_path / 'data'
  folder.mkdir()
  for split in ('train', 'validation'):
    rows = [
      {
        'source': f'{split} day {n} ' * (1 + n % 7),
        'target': f'{n} ü' * (1 + n % 5),
        'context': f'c{n}' if n % 3 else '',
        'also': [f'{n} o', f'{n} p'][: n % 3],
      }
      for n in range(NUM_EXAMPLES)
    ]
    lines = [json.dumps(row) for row in rows]
    lines[40:40] = ['', '{"source": 1}']
    (folder / f'{split}.jsonl').write_text('\n'.join(lines))
  return folder


def local(folder, **changes):
  """Returns what gin binds of the task `local`."""
  return {
    'local_task.data_files': {
      split: f'{split}.jsonl' for split in ('train', 'validation')
    },
    'local_task.data_dir': str(folder),
    'local_task.template': '{source} of {context}',
    'local_task.fallback_template': '{source}',
    'local_task.reference_columns': ('also',),
    'local_task.bad_lines': 'skip',
  } | {f'local_task.{key}': value for key, value in changes.items()}


@contextlib.contextmanager
def configured(bindings):
  with gin.unlock_config():
    gin.clear_config()
    for key, value in bindings.items():
      gin.bind_parameter(key, value)
  try:
    yield
  finally:
    with gin.unlock_config():
      gin.clear_config()


def write(folder, model, bindings, name='local', **settings):
  """Runs the verb in this process, shards being small."""
  settings = {'num_workers': 1, 'examples_per_shard': FEW} | settings
  with configured(bindings):
    cache_command.cache(
      str(folder),
      model,
      name,
      LENGTHS,
      **settings,
    )


def content(folder):
  """Returns the bytes of all files but those that begin with a dot."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file() and not path.name.startswith('.')
  }


def of_text(value):
  """Returns what JSON has in the place of a tensor's value."""
  value = value.tolist() if hasattr(value, 'tolist') else value
  if isinstance(value, list):
    return [of_text(part) for part in value]
  return value.decode() if isinstance(value, bytes) else value


def streamed(name, model, bindings, split, *, shuffle):
  """Returns ids and texts of the examples of each task, as trained on."""
  with configured(bindings):
    vocabularies = model.prompt_vocabulary, model.answer_vocabulary
    bound = tasks.bind(name, *vocabularies)
    examples = {}
    for task in seqio.get_subtasks(bound):
      dataset = task.get_dataset(
        LENGTHS, split, shuffle=shuffle, seed=1, trim_output_features=False
      )
      examples[task.name] = [
        {
          key: of_text(value)
          for key, value in example.items()
          if not key.endswith('_length')
        }
        for example in dataset.as_numpy_iterator()
      ]
    return examples


def cached(folder, split):
  """Returns the same of a cache."""
  found = cache_format.open_cache(folder)
  examples: dict[str, list[dict[str, Any]]] = {}
  for task in found.tasks:
    source = found.split(task, split)
    records = source.read(range(len(source)))
    lengths = source.lengths_of(range(len(source))).tolist()
    examples[task] = []
    for record, sizes in zip(records, lengths, strict=True):
      prompt, answer = cache_format.decode_ids(record, found.dtype)
      assert [len(prompt), len(answer)] == sizes
      ids = {'inputs': prompt.tolist(), 'targets': answer.tolist()}
      examples[task].append(
        ids | cache_format.decode_texts(record, found.dtype)
      )
  return examples


def as_multiset(examples):
  return {
    task: collections.Counter(json.dumps(row, sort_keys=True) for row in rows)
    for task, rows in examples.items()
  }


@pytest.fixture
def own_task():
  """Registers a task of a user's own, that tokenizes and then goes on."""

  def read(split, shuffle_files, seed=None):
    numbers = tf.range(NUM_EXAMPLES)
    return tf.data.Dataset.from_tensor_slices(
      {
        'inputs': tf.strings.as_string(numbers),
        'targets': tf.strings.as_string(numbers * numbers),
        'number': numbers,
      }
    ).filter(lambda example: example['number'] % 3 > 0)

  def cut(dataset, sequence_length):
    length = sequence_length['targets']
    return dataset.map(
      lambda example: example | {'targets': example['targets'][:length]}
    )

  feature = seqio.Feature(seqio.ByteVocabulary())
  seqio.TaskRegistry.add(
    'own',
    seqio.FunctionDataSource(read, splits=['train']),
    preprocessors=[seqio.preprocessors.tokenize, cut],
    output_features={'inputs': feature, 'targets': feature},
  )
  yield 'own'
  seqio.TaskRegistry.remove('own')


@pytest.mark.parametrize('case', ['local', 'cldr', 'own', 'mixture'])
def test_a_cache_holds_what_streaming_gives_each_example_once(
  case, data, model, own_task, tmp_path
):
  bindings = local(data)
  if case == 'mixture':
    bindings = {f'news/{key}': value for key, value in bindings.items()}
    bindings['mixture.tasks'] = {'news/local': 2.0, 'own': 3.0}
  size = 5000 if case == 'cldr' else FEW
  folder = tmp_path / 'cache'
  splits = ('validation',) if case == 'cldr' else ('train',)
  write(folder, model, bindings, case, examples_per_shard=size, splits=splits)
  (split,) = splits
  found = cached(folder, split)
  epoch = streamed(case, model, bindings, split, shuffle=True)
  assert as_multiset(found) == as_multiset(epoch)
  assert found == streamed(case, model, bindings, split, shuffle=False)
  assert all(len(rows) > 60 for rows in found.values())
  if case == 'mixture':
    rates = cache_format.open_cache(folder).rates
    assert rates == {'news': 2.0, 'own': 3.0}


def test_jobs_in_any_order_and_processes_in_any_number_write_the_same(
  data, model, tmp_path
):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  write(whole, model, local(data))
  for job in (2, 0, 1):
    with pytest.raises(FileNotFoundError, match='cache.json'):
      cache_format.open_cache(parts)
    write(parts, model, local(data), shard=job, num_shards=3, num_workers=2)
  assert content(parts) == content(whole)
  assert len(content(whole)) == 2 * 2 * 13 + 2
  again = content(whole)
  write(whole, model, local(data))
  assert content(whole) == again


def command(data, folder, vocabulary):
  bindings = {
    'MODEL': '@language_model_system()',
    'language_model_system.tower': '@Tower()',
    'Tower.vocabulary': vocabulary.path,
    'Tower.config': '@TransformerConfig()',
    **{
      f'TransformerConfig.{name}': 200
      for name in ('vocab_size', 'emb_dim', 'mlp_dim', 'head_dim')
    },
    **{
      f'TransformerConfig.{name}': 1
      for name in ('num_heads', 'num_encoder_layers', 'num_decoder_layers')
    },
    'DATA_FILES': {'train': 'train.jsonl'},
    'DATA_DIR': data,
    'CACHE_DIR': folder,
    'CACHE_EXAMPLES_PER_SHARD': 25,
    'CACHE_WORKERS': 2,
  }
  return [
    sys.executable,
    '-m',
    'l2s_jax',
    'cache',
    '--gin_file=gin_configs/tasks/jsonl.gin',
    *(f'--gin.{key}={value}' for key, value in bindings.items()),
  ]


@pytest.mark.parametrize(
  'num_kills', [3, pytest.param(10, marks=pytest.mark.long)]
)
def test_killed_at_several_moments_it_ends_as_if_it_had_not_been(
  num_kills, tmp_path, vocabulary
):
  rows = [
    {'source': f'prompt {n} ' * 20, 'target': f'{n} ' * 10}
    for n in range(2_000)
  ]
  (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  cache, unbroken = tmp_path / 'cache', tmp_path / 'unbroken'
  for number in range(num_kills):
    process = forked.Popen(
      command(tmp_path, cache, vocabulary), stderr=subprocess.PIPE, text=True
    )
    # Once so many files are there, whole ones and others.
    files = 120 * (number + 1) // num_kills
    while process.poll() is None:
      if len(list(cache.glob('local/train/*'))) >= files:
        process.kill()
        break
      time.sleep(0.002 + 0.0005 * number)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert not (cache / 'cache.json').exists()
  for folder in (cache, unbroken):
    process = forked.Popen(
      command(tmp_path, folder, vocabulary), stderr=subprocess.PIPE, text=True
    )
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert 'is complete' in told
  assert content(cache) == content(unbroken)
  assert not list(cache.rglob('.*.part-*'))


@pytest.mark.parametrize(
  'changes,difference',
  [
    ({'template': '{source} in {context}'}, 'settings.template: the cache has'),
    ({'bad_lines': 'refuse'}, None),
    ({'data_files': {'train': 'validation.jsonl'}}, 'train.source: the cache'),
    ('vocabulary', 'vocabularies.answer: the cache has'),
  ],
)
@pytest.mark.parametrize('is_complete', [True, False])
def test_a_cache_of_something_else_is_refused_with_the_difference(
  changes, difference, is_complete, data, model, tmp_path
):
  folder = tmp_path / 'cache'
  write(folder, model, local(data))
  if not is_complete:
    (folder / 'cache.json').unlink()
  before = content(folder)
  if changes == 'vocabulary':
    model = types.SimpleNamespace(
      prompt_vocabulary=model.prompt_vocabulary,
      answer_vocabulary=model.prompt_vocabulary,
    )
    changes = {}
  message = difference or r'train.jsonl:41 is empty'
  with pytest.raises(ValueError, match=re.escape(message)):
    write(folder, model, local(data, **changes))
  assert content(folder) == before


def test_a_folder_of_other_files_is_left_alone(data, model, tmp_path):
  folder = tmp_path / 'photos'
  folder.mkdir()
  (folder / 'x.jpg').write_bytes(b'x')
  with pytest.raises(ValueError, match='has x.jpg and no plan.json'):
    write(folder, model, local(data))


def test_a_bad_line_is_named_before_anything_is_written(data, model, tmp_path):
  folder = tmp_path / 'cache'
  with pytest.raises(ValueError, match=r'train.jsonl:41 is empty'):
    write(folder, model, local(data, bad_lines='refuse'))
  assert not folder.exists()


def test_a_text_that_cannot_be_encoded_is_named_by_another_process(
  data, model, tmp_path
):
  encoder = cache_encoding.Encoder(
    model.prompt_vocabulary, model.answer_vocabulary
  )
  columns = {'inputs': [b'a', b'\xff'], 'targets': [b'b', b'c']}
  work = cache_encoding.Work('t, split', 10, columns)
  for num_workers in (1, 2):
    with cache_encoding.encoding(encoder, num_workers) as encode:
      with pytest.raises(ValueError, match='t, split: example 11 has bytes in'):
        list(encode([work]))


def test_a_full_disk_is_a_sentence_and_the_next_start_goes_on(
  data, model, tmp_path
):
  folder, unbroken = tmp_path / 'cache', tmp_path / 'unbroken'
  write(unbroken, model, local(data), examples_per_shard=60)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  # A file of records has at least a block of 64 KiB.
  resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
  try:
    with pytest.raises((OSError, RuntimeError)) as error:
      write(folder, model, local(data), examples_per_shard=60)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  told = os_errors.describe(error.value)
  assert told is not None and 'File too large' in told and str(folder) in told
  with pytest.raises(FileNotFoundError, match='is not complete'):
    cache_format.open_cache(folder)
  write(folder, model, local(data), examples_per_shard=60)
  assert content(folder) == content(unbroken)


def test_too_little_room_is_refused_before_anything_is_written(
  data, model, tmp_path, monkeypatch, capsys
):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(OSError, match='1.0 kB free, but the remaining shards'):
    write(tmp_path / 'cache', model, local(data))
  assert 'Examples to cache: 206, about' in capsys.readouterr().err


def test_a_damaged_record_is_named_and_its_shard_can_be_made_anew(
  data, model, tmp_path
):
  folder = tmp_path / 'cache'
  write(folder, model, local(data))
  before = content(folder)
  path = folder / 'local' / 'train' / '00002-of-00013.array_record'
  # Records begin behind the header of a block.
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 128] ^= 255
  path.write_bytes(bytes(damaged))
  source = cache_format.open_cache(folder).split('local', 'train')
  bad = []
  for number in range(len(source)):
    try:
      source.read([number])
    except ValueError as error:
      bad.append(number)
      shard, place = divmod(number, FEW)
      assert f'record {place} of {FEW} (shard {shard}, ' in str(error)
      assert str(path) in str(error)
  assert bad and all(2 * FEW <= number < 3 * FEW for number in bad)
  with pytest.raises(ValueError, match='is damaged: record'):
    source.read(range(len(source)))
  path.unlink()
  with pytest.raises(FileNotFoundError, match='no such file, but cache.json'):
    cache_format.open_cache(folder).split('local', 'train').read([2 * FEW])
  (folder / 'cache.json').unlink()
  write(folder, model, local(data))
  assert content(folder) == before


def test_a_damaged_cache_json_or_index_is_refused(data, model, tmp_path):
  folder = tmp_path / 'cache'
  write(folder, model, local(data))
  index = folder / 'local' / 'train' / '00000-of-00013.index.npy'
  damaged = bytearray(index.read_bytes())
  damaged[-1] ^= 1
  index.write_bytes(bytes(damaged))
  source = cache_format.open_cache(folder).split('local', 'train')
  with pytest.raises(ValueError, match=f'{index} is damaged'):
    source.lengths_of(range(len(source)))
  path = folder / 'cache.json'
  path.write_text(path.read_text().replace('"uint16"', '"uint32"'))
  with pytest.raises(ValueError, match='cache.json was changed after'):
    cache_format.open_cache(folder)


def test_show_prints_what_a_cache_holds(data, model, tmp_path, capsys):
  with pytest.raises(FileNotFoundError, match='is not a cache'):
    cache_command.cache(str(tmp_path / 'none'), show=1)
  folder = tmp_path / 'cache'
  write(folder, model, local(data))
  capsys.readouterr()
  cache_command.cache(str(folder), show=2)
  printed = capsys.readouterr().out
  assert 'local, train, example 1 of 103: ' in printed
  assert "references: ['1 o']" in printed
  assert 'inputs_pretokenized: train day 1 train day 1  of c1' in printed


def test_a_dry_run_writes_nothing(data, model, tmp_path, capsys):
  write(tmp_path / 'cache', model, local(data), dry_run=True)
  assert not (tmp_path / 'cache').exists()
  assert '103 train in 13 shards' in capsys.readouterr().err


@pytest.mark.parametrize(
  'settings,message',
  [
    ({'shard': 3, 'num_shards': 3}, 'shard=3 of num_shards=3: expected'),
    ({'num_workers': 0}, 'num_workers=0: expected a positive'),
    ({'splits': ('dev',)}, "no split 'dev'; the splits are train"),
    ({'splits': 'train'}, 'expected a tuple'),
  ],
)
def test_wrong_settings_are_one_sentence(
  settings, message, data, model, tmp_path
):
  with pytest.raises(ValueError, match=re.escape(message)):
    write(tmp_path / 'cache', model, local(data), **settings)


def test_what_reads_and_encodes_imports_no_tensorflow():
  program = (
    'import sys; from l2s_jax.caching import cache_encoding;'
    'from l2s_jax.data.cached import cache_format;'
    'print([x for x in ("tensorflow", "seqio") if x in sys.modules])'
  )
  result = subprocess.run(
    [sys.executable, '-c', program],
    cwd=pathlib.Path(__file__).parent.parent,
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout == '[]\n'


def test_ids_beyond_16_bits_and_any_text_come_back():
  assert cache_format.id_dtype(65_536, 300) == 'uint16'
  assert cache_format.id_dtype(300, 65_537) == 'uint32'
  texts = {'a': 'ü\u2028\0', 'b': ['x', ''], 'c': 1.5}
  record = cache_format.encode([1, 70_000], [], texts, 'uint32')
  prompt, answer = cache_format.decode_ids(record, 'uint32')
  assert prompt.tolist() == [1, 70_000] and answer.tolist() == []
  assert cache_format.decode_texts(record, 'uint32') == texts


def test_names_of_tasks_are_names_of_folders():
  names = ['a:b', 'a/b', 'a_b', '..', 'ü', 'a%3Ab', 'train[:10]']
  folders = [cache_format.folder_name(name) for name in names]
  assert len(set(folders)) == len(names)
  assert not any('/' in folder or folder == '..' for folder in folders)


@pytest.mark.parametrize('content', [b'', bytes(200_000)])
def test_damaged_shard_has_no_number_of_records(tmp_path, content):
  path = tmp_path / 'x.array_record'
  path.write_bytes(content)
  assert cache_writer.num_records(path) is None
