# SPDX-License-Identifier: Apache-2.0
"""Laws of inference: a line for a line, in order, however often it stops."""

import gzip
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import forked
import helpers
import pytest
import saved_runs

from l2s_jax.inference import infer, predictions, sampling
from l2s_jax.metrics import metric_fns

ROOT = pathlib.Path(__file__).parent.parent
NUM_LINES = 41
# Between good lines; a column beside the prompt goes along.
BAD = {3: '{"prompt": "x"', 4: '', 11: '{"id": 11}', 40: '{"prompt": " "}'}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of a tiny model with random parameters, which writes anything."""
  path = tmp_path_factory.mktemp('run')
  system = helpers.system(helpers.MODULES['t5_1_1'])
  params = helpers.random_params(system.module)
  saved_runs.save(path, system, params, steps=(1, 2))
  return path


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A JSONL file with bad lines in it, some prompts longer than others."""
  path = tmp_path_factory.mktemp('input') / 'in.jsonl.gz'
  lines = [
    json.dumps({'prompt': 'ab' * (n % 7 + 1), 'id': n, 'target': f'{n} ș'})
    for n in range(NUM_LINES)
  ]
  for number, line in BAD.items():
    lines[number] = line
  path.write_bytes(gzip.compress('\n'.join(lines).encode()))
  return path


def answer(run, source, output_dir, **changes):
  """Runs `infer` and returns the bytes of its predictions."""
  arguments = {
    'checkpoint_path': str(run),
    'input': str(source),
    'output_dir': str(output_dir),
    'prompt_length': 10,
    'max_decode_len': 6,
    'batch_size': 16,
  }
  infer.infer(**arguments | changes)
  shard = predictions.Shard(
    changes.get('shard', 0), changes.get('num_shards', 1)
  )
  name = shard.name('predictions', '.jsonl')
  return (pathlib.Path(output_dir) / name).read_bytes()


@pytest.fixture(scope='module')
def whole(run, source, tmp_path_factory):
  """The predictions of the file in one go."""
  return answer(run, source, tmp_path_factory.mktemp('whole'))


def test_a_line_for_a_line_in_order_with_its_columns(whole):
  records = [json.loads(line) for line in whole.splitlines()]
  assert len(records) == NUM_LINES
  for number, record in enumerate(records):
    if number in BAD:
      assert record.keys() == {'line', 'error', 'prediction'}
      assert record['line'] == number + 1
      assert record['error'] and record['prediction'] is None
      continue
    expected = {
      'id': number,
      'target': f'{number} ș',
      'prompt': 'ab' * (number % 7 + 1),
      'prediction': record['prediction'],
    }
    if number % 7 + 1 >= 5:  # Ten bytes and the EOS do not fit.
      expected['prompt_truncated'] = True
    assert record == expected
  assert len({record['prediction'] for record in records}) > 5


def test_what_was_cut_anywhere_goes_on_as_if_it_were_not(
  run, source, whole, tmp_path, capsys
):
  rng = random.Random(0)
  answer(run, source, tmp_path)
  for batch_size in (8, 24):
    end = rng.randrange(len(whole))
    (tmp_path / 'predictions.jsonl').unlink()
    (tmp_path / 'predictions.jsonl.partial').write_bytes(whole[:end])
    # With the digests, what is behind the last of them would be cut off too.
    (tmp_path / '.predictions.jsonl.digests').unlink()
    capsys.readouterr()
    assert answer(run, source, tmp_path, batch_size=batch_size) == whole
    told = capsys.readouterr().err
    num_done = whole[:end].count(b'\n')
    assert (
      f'{num_done} of {NUM_LINES} lines are answered' in told or not num_done
    )
    # The counts are of the whole file, not of what this start has done.
    assert f'{len(BAD)} of {NUM_LINES} lines could not be answered:' in told
    num_cut = whole.count(b'"prompt_truncated": true')
    assert f'{num_cut} prompts were longer than 10 tokens' in told


def test_shards_in_order_make_up_the_whole_and_start_alone(
  run, source, whole, tmp_path
):
  shards = [2, 0, 1]
  parts = {
    shard: answer(run, source, tmp_path, shard=shard, num_shards=3)
    for shard in shards
  }
  assert b''.join(parts[shard] for shard in sorted(shards)) == whole
  assert {path.name for path in tmp_path.glob('config*')} == {
    f'config-0000{shard}-of-00003.gin' for shard in shards
  }
  middle = tmp_path / 'predictions-00001-of-00003.jsonl'
  middle.rename(f'{middle}.partial')
  with open(f'{middle}.partial', 'r+b') as file:
    file.truncate(len(parts[1]) // 2)
  others = {
    path: path.stat().st_mtime_ns for path in tmp_path.glob('*-of-*.jsonl')
  }
  assert len(others) == 2
  again = answer(run, source, tmp_path, shard=1, num_shards=3, batch_size=8)
  assert again == parts[1]
  for path, mtime in others.items():
    assert path.stat().st_mtime_ns == mtime


def test_a_finished_job_is_only_scored(run, source, whole, tmp_path, capsys):
  answer(run, source, tmp_path)
  names = 'predictions.jsonl', 'config.gin'
  before = [(tmp_path / name).stat() for name in names]
  capsys.readouterr()
  answer(run, source, tmp_path, metrics=('chrf', 'exact_match'))
  captured = capsys.readouterr()
  assert 'predictions.jsonl is complete: nothing to answer' in captured.err
  assert 'prompts/s' not in captured.err
  for name, old in zip(names, before, strict=True):
    new = (tmp_path / name).stat()
    assert (new.st_mtime_ns, new.st_ino) == (old.st_mtime_ns, old.st_ino), name
  scores = json.loads((tmp_path / 'scores.json').read_text())
  pairs = [
    (record['target'], record['prediction'])
    for record in map(json.loads, whole.splitlines())
    if record['prediction'] is not None
  ]
  assert scores['scores'] == {
    **metric_fns.chrf(*zip(*pairs, strict=True)),
    'exact_match': 0,
  }
  assert scores['num_scored'] == len(pairs) == NUM_LINES - len(BAD)
  assert scores['num_bad'] == len(BAD)
  assert f'{len(pairs)} of {NUM_LINES} lines scored, {len(BAD)} bad' in (
    captured.out
  )


def test_shards_are_scored_alone_and_the_last_scores_all(run, source, tmp_path):
  scores = []
  for shard in (1, 0):
    assert not (tmp_path / 'scores.json').exists()
    answer(
      run, source, tmp_path, shard=shard, num_shards=2, metrics=('exact_match',)
    )
    path = tmp_path / f'scores-0000{shard}-of-00002.json'
    scores.append(json.loads(path.read_text()))
  together = json.loads((tmp_path / 'scores.json').read_text())
  assert together['num_lines'] == NUM_LINES
  for count in ('num_lines', 'num_bad', 'num_scored', 'num_truncated_prompts'):
    assert together[count] == sum(score[count] for score in scores)


def test_other_settings_are_refused_and_batches_and_places_are_not(
  run, source, whole, tmp_path
):
  out = tmp_path / 'out'
  answer(run, source, out)
  moved = tmp_path / 'moved.jsonl'
  moved.write_bytes(gzip.decompress(source.read_bytes()))
  assert answer(run, moved, out, batch_size=8) == whole
  for changes, names in (
    ({'step': 1}, ['checkpoint_saved_nsecs', 'step']),
    ({'template': '{prompt}!'}, ['prompts_sha256', 'template']),
    ({'max_decode_len': 7, 'prompt_length': 9}, ['max_dec', 'prompt_length']),
    ({'num_shards': 2, 'shard': 1}, ['num_shards']),
    (
      {'decoding': sampling.Decoding(top_k=2, stop=['a'])},
      ['decoding.stop', 'decoding.top_k'],
    ),
  ):
    with pytest.raises(ValueError, match='the answers of another job') as error:
      answer(run, source, out, **changes)
    differences = str(error.value).splitlines()[1:-1]  # The last is gin's.
    assert len(differences) == len(names)
    for name, difference in zip(names, differences, strict=True):
      assert difference.startswith(f'  {name}')
  moved.write_text(moved.read_text() + '\n{"prompt": "new"}')
  with pytest.raises(ValueError, match='num_lines: the run has 41, .* 42'):
    answer(run, moved, out)


def test_samples_are_those_of_their_lines(run, source, tmp_path):
  """Whatever the batches, the shards, and the starts."""
  decoding = {'decoding': sampling.Decoding(temperature=1.0, seed=3)}
  whole = answer(run, source, tmp_path / 'whole', **decoding)
  halves = [
    answer(
      run,
      source,
      tmp_path / 'halves',
      shard=shard,
      num_shards=2,
      batch_size=8,
      **decoding,
    )
    for shard in (0, 1)
  ]
  assert b''.join(halves) == whole
  path = tmp_path / 'whole' / 'predictions.jsonl'
  path.unlink()
  path.with_suffix('.jsonl.partial').write_bytes(whole[: len(whole) // 3])
  assert answer(run, source, tmp_path / 'whole', **decoding) == whole
  # A prompt that comes again has another sample.
  texts = [json.loads(line).get('prediction') for line in whole.splitlines()]
  assert texts[0] != texts[7]


def test_a_column_says_how_long_answers_may_be(run, tmp_path):
  path = tmp_path / 'in.jsonl'
  values = (2, '5', 6, 7, 0, True, 2.0, None)
  path.write_text(
    ''.join(json.dumps({'prompt': 'abc', 'n': n}) + '\n' for n in values)
  )
  found = answer(
    run,
    path,
    tmp_path / 'out',
    max_decode_len_column='n',
    decoding=sampling.Decoding(log_probs=True),
  )
  records = [json.loads(line) for line in found.splitlines()]
  longest = records[2]['token_ids']
  assert len(longest) == 6  # None of these has written its EOS.
  for record, length in zip(records[:2], (2, 5), strict=True):
    assert record['token_ids'] == longest[:length]
    assert len(record['token_log_probs']) == length
    assert record['score'] == pytest.approx(
      sum(record['token_log_probs']), abs=1e-4
    )
  for record in records[3:]:
    assert record['error'] == (
      "has no integer from 1 to MAX_DECODE_LEN=6 in column 'n'"
    )


def test_a_text_file_of_bad_lines_alone_has_a_line_for_each(run, tmp_path):
  (tmp_path / 'in.txt').write_bytes(b'\n\xff\n \n')
  lines = answer(run, tmp_path / 'in.txt', tmp_path / 'out').splitlines()
  assert [json.loads(line)['line'] for line in lines] == [1, 2, 3]
  (tmp_path / 'empty.txt').touch()
  assert answer(run, tmp_path / 'empty.txt', tmp_path / 'none') == b''


def test_a_task_is_answered_with_its_targets(run, tmp_path):
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio, tf

  def dataset(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': [f'{n} a' for n in range(20)], 'targets': ['b'] * 20}
    )

  feature = seqio.Feature(features.wrap_vocabulary(helpers.vocabulary()))
  seqio.TaskRegistry.add(
    'task_to_infer',
    source=seqio.FunctionDataSource(dataset, splits=('test',)),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={'inputs': feature, 'targets': feature},
  )
  lines = [
    line
    for shard in (0, 1)
    for line in answer(
      run,
      'task:task_to_infer',
      tmp_path,
      shard=shard,
      num_shards=2,
      metrics=('exact_match',),
    ).splitlines()
  ]
  seqio.TaskRegistry.remove('task_to_infer')
  records = [json.loads(line) for line in lines]
  assert [record['prompt'] for record in records] == [
    f'{n} a' for n in range(20)
  ]
  assert all(record['target'] == 'b' for record in records)
  assert json.loads((tmp_path / 'scores.json').read_text())['num_scored'] == 20


def start(run, *arguments, **options):
  """Starts `python -m l2s_jax infer` in a process of its own."""
  return forked.Popen(
    [
      sys.executable,
      '-m',
      'l2s_jax',
      'infer',
      '--gin_file=gin_configs/runs/infer.gin',
      f'--gin.CHECKPOINT_PATH={run}',
      '--gin.PROMPT_LENGTH=10',
      '--gin.MAX_DECODE_LEN=6',
      *arguments,
    ],
    cwd=ROOT,
    **options,
  )


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(run, tmp_path):
  rng = random.Random(0)
  num_lines = 8_000
  source = tmp_path / 'in.txt'
  source.write_text(
    ''.join(f'{n}\n' * (n % 9 > 0) or '\n' for n in range(num_lines))
  )
  out = tmp_path / 'out'
  partial = out / 'predictions-00001-of-00002.jsonl.partial'
  arguments = (
    f'--gin.INPUT={source}',
    f'--gin.INFER_OUTPUT_DIR={out}',
    '--gin.BATCH_SIZE=8',
    '--shard=1',
    '--num_shards=2',
  )
  num_kills = num_bytes = 0
  while num_kills < 3:
    process = start(run, *arguments, stderr=subprocess.PIPE, text=True)
    # At some moment of its writing, and not when it has just begun.
    num_bytes += rng.randrange(10_000, 50_000)
    while process.poll() is None:
      if partial.exists() and partial.stat().st_size > num_bytes:
        process.kill()
        break
      time.sleep(0.001)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    num_bytes = partial.stat().st_size
    num_kills += 1
  process = start(run, *arguments, stderr=subprocess.PIPE, text=True)
  _, told = process.communicate()
  assert process.returncode == 0, told
  assert 'of 4000 lines are answered; skipping them.' in told
  unbroken = answer(
    run, source, tmp_path / 'unbroken', batch_size=64, shard=1, num_shards=2
  )
  assert not partial.exists()
  assert (out / 'predictions-00001-of-00002.jsonl').read_bytes() == unbroken


def test_standard_input_is_answered_line_by_line(run):
  pipe = subprocess.PIPE
  process = start(
    run, '--gin.INPUT=-', stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0
  )
  lines = [b'one', b'', b'\xff', b'two']
  records = []
  for line in lines:
    process.stdin.write(line + b'\n')
    records.append(json.loads(process.stdout.readline()))
  assert [record.get('prompt') for record in records] == [
    'one',
    None,
    None,
    'two',
  ]
  assert records[1] == {'line': 2, 'error': 'is empty', 'prediction': None}
  assert records[2]['line'] == 3
  assert isinstance(records[3]['prediction'], str)
  process.stdin.write(b'three\n')
  process.stdout.close()  # Nobody reads any more.
  process.stdin.close()
  told = process.stderr.read().decode()
  assert process.wait() == 0, told
  assert 'Error' not in told
  assert '2 of 4 lines could not be answered:' in told


def test_standard_input_streams_what_it_would_have_written(run):
  lines = b'one\n\ntwo\n'
  found = {}
  for stream in ('None', 'jsonl', 'text'):
    process = start(
      run,
      '--gin.INPUT=-',
      f'--gin.INFER_STREAM={stream}',
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    found[stream], _ = process.communicate(lines)
    assert process.returncode == 0
  records = [json.loads(line) for line in found['None'].splitlines()]
  texts = [record['prediction'] for record in records]
  assert found['text'].decode() == ''.join(f'{t or ""}\n' for t in texts)
  streamed = [json.loads(line) for line in found['jsonl'].splitlines()]
  assert [x for x in streamed if 'delta' not in x] == records
  assert len(streamed) > len(records) + 2
  deltas = ''.join(x.get('delta', '\n') for x in streamed)
  assert deltas == found['text'].decode()


def test_tasks_that_have_no_lines_of_text_are_refused(run, tmp_path):
  from l2s_jax.data import features, tasks
  from l2s_jax.data.features import seqio, tf

  def dataset(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': tf.constant([[5, 6]]), 'targets': tf.constant([[7]])}
    )

  feature = seqio.Feature(features.wrap_vocabulary(helpers.vocabulary()))
  seqio.TaskRegistry.add(
    'already_ids',
    source=seqio.FunctionDataSource(dataset, splits=('test',)),
    preprocessors=[],
    output_features={'inputs': feature, 'targets': feature},
  )
  tasks.register()
  seqio.MixtureRegistry.add('several', [('already_ids', 1), ('cldr', 1)])
  try:
    for name, message in {
      'several': 'is a mixture, .* one by one: task:already_ids, task:cldr',
      'absent': 'is not registered with SeqIO',
      'already_ids': 'already tokenized and has no inputs_pretokenized',
    }.items():
      with pytest.raises(ValueError, match=f'INPUT=task:{name}.*{message}'):
        answer(run, f'task:{name}', tmp_path / 'out')
  finally:
    seqio.MixtureRegistry.remove('several')
    seqio.TaskRegistry.remove('already_ids')
  assert not (tmp_path / 'out').exists()


def test_rows_within_rows_are_answered_and_scored(run, tmp_path):
  rows = [
    {'t': {'en': text, 'zh': target}}
    for text, target in [('ab', '今天'), ('abab', '很好')]
  ]
  tables = {
    'in.JSON': json.dumps(rows),
    'in.NDJSON': '\n'.join(map(json.dumps, rows)),
  }
  found = []
  for name, content in tables.items():
    (tmp_path / name).write_text(content)
    folder = tmp_path / f'out-{name}'
    found.append(
      answer(
        run,
        tmp_path / name,
        folder,
        prompt_column='t.en',
        target_column='t.zh',
        metrics=('bleu', 'rouge'),
      )
    )
    scored = json.loads((folder / 'scores.json').read_text())
    assert scored['num_scored'] == 2
    assert '|tok:13a|' in scored['signatures']['bleu']
    assert '|tok:words|' in scored['signatures']['rougeLsum']
  assert found[0] == found[1]
  for line, row in zip(found[0].splitlines(), rows, strict=True):
    record = json.loads(line)
    assert record['t'] == row['t'] and record['prompt'] == row['t']['en']


@pytest.mark.parametrize(
  'changes,error,message',
  [
    ({'input': 'absent.txt'}, FileNotFoundError, 'INPUT=absent.txt: no such'),
    ({'template': 'translate'}, ValueError, r'has no column|has no \{prompt'),
    (
      {'template': '{en}'},
      ValueError,
      r'uses en, but the lines of INPUT=-',
    ),
    ({'batch_size': 0}, ValueError, 'BATCH_SIZE=0: expected a positive'),
    (
      {'bad_lines': 'skip'},
      ValueError,
      "INFER_BAD_LINES='skip': expected .* refuse",
    ),
    ({'shard': 2, 'num_shards': 2}, ValueError, 'shard=2 of num_shards=2'),
    ({'num_shards': 2}, ValueError, 'standard input cannot be divided'),
    ({'metrics': ('blue',)}, ValueError, r"\('blue',\): .* of bleu, chrf"),
    ({'metrics': 'bleu'}, ValueError, "INFER_METRICS='bleu': expected a tuple"),
    ({'metrics': ('bleu',)}, ValueError, 'set INFER_OUTPUT_DIR, and INPUT'),
    ({'stream': 'sse'}, ValueError, "INFER_STREAM='sse': .* jsonl, text"),
    (
      {'stream': 'text', 'input': __file__},
      ValueError,
      "INFER_STREAM='text' needs standard input",
    ),
    (
      {'stream': 'text', 'decoding': sampling.Decoding(num_beams=2)},
      ValueError,
      'Decoding.num_beams=2: the best beam',
    ),
    (
      {'max_decode_len_column': 'n'},
      ValueError,
      "MAX_DECODE_LEN_COLUMN='n' needs .* INPUT=- has no columns",
    ),
    ({}, FileNotFoundError, r'is neither a run \(it has no model.json\) nor a'),
    (
      {'checkpoint_path': 'hdfs://bucket/run'},
      ValueError,
      'CHECKPOINT_PATH=hdfs://bucket/run: hdfs:// is not supported',
    ),
  ],
)
def test_refused_before_a_model_is_loaded(tmp_path, changes, error, message):
  arguments = {
    'checkpoint_path': str(tmp_path),
    'input': '-',
    'prompt_length': 8,
    'max_decode_len': 8,
  }
  with pytest.raises(error, match=message):
    infer.infer(**arguments | changes)


@pytest.mark.parametrize(
  'name,content,changes,message',
  [
    (
      'a.jsonl',
      '{"text": "a"}\n[]',
      {},
      r"none of its 2 lines can .*a\.jsonl:1 has no column 'prompt'; it",
    ),
    (
      'a.tsv',
      'a\tb\n',
      {'column_names': ('prompt',)},
      r'none of its 1 lines .*a\.tsv:1 has 2 columns, expected 1: prompt',
    ),
    (
      'a.tsv',
      'text\na\n',
      {},
      r'a\.tsv has no column prompt; its first line has text',
    ),
    ('a.txt.gz', 'a', {}, r'a\.txt\.gz is not a complete gzip file'),
    (
      'a.txt',
      'a\n\n',
      {'bad_lines': 'refuse'},
      r"a\.txt:2 is .* INFER_BAD_LINES='k",
    ),
    ('a.txt', 'a', {'metrics': ('bleu',)}, "no line of .* in column 'target'"),
    (
      'a.jsonl',
      '{"prompt": "a", "prediction": "b"}',
      {'metrics': ('bleu',), 'target_column': 'prediction'},
      "TARGET_COLUMN='prediction' is also a field of the output",
    ),
    ('a.npz', 'a', {}, r'a\.npz: \*\.npz files are not text'),
    ('a.txt', 'PK\x03\x04\0', {}, r'a\.txt is not text: .* zip archive'),
    ('a.txt', b'\xe9\n\xe8', {}, r'a\.txt is not text: none of its 2 lines is'),
    ('a.parquet', 'PAR1', {}, r'a\.parquet is not a complete Parquet file'),
    ('a.tfrecord', 'text' * 9, {}, r'a\.tfrecord is not a TFRecord file'),
  ],
)
def test_refused_before_anything_is_computed(
  run, tmp_path, name, content, changes, message
):
  content = content.encode() if isinstance(content, str) else content
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    answer(run, tmp_path / name, tmp_path / 'out', **changes)
  assert not (tmp_path / 'out').exists()
