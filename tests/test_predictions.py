# SPDX-License-Identifier: Apache-2.0
"""Laws of the output: no line is lost, repeated, or taken for the whole."""

import json

import pytest

from l2s_jax.data import text_files
from l2s_jax.inference import predictions, prompts
from l2s_jax.metrics import metric_fns

RECORDS = [
  predictions.answered({'prompt': 'a', 'id': 1}, 'A ș', False),
  predictions.unanswered(text_files.BadLine('in.txt', 2, 'is empty')),
  predictions.answered({'prompt': 'c', 'prompt_truncated': True}, '', False),
  predictions.answered({'prompt': 'd'}, 'D\n', True),
]


def write(path):
  """Writes what is missing of `RECORDS`, one by one."""
  with predictions.GrowingFile(path) as file:
    for record in RECORDS[file.tally.num_lines :]:
      file.append([record])
    file.finish()
  return file.tally


def test_a_record_has_the_columns_and_the_answer():
  assert RECORDS == [
    {'prompt': 'a', 'id': 1, 'prediction': 'A ș'},
    {'line': 2, 'error': 'is empty', 'prediction': None},
    {'prompt': 'c', 'prediction': ''},
    {'prompt': 'd', 'prediction': 'D\n', 'prompt_truncated': True},
  ]


def test_a_record_has_what_else_was_asked_for_in_the_place_of_its_columns():
  row = {'prompt': 'a', 'score': 1, 'scores': 2}
  assert predictions.answered(row, 'A', True, score=-0.5) == {
    'prompt': 'a',
    'score': -0.5,
    'scores': 2,
    'prediction': 'A',
    'prompt_truncated': True,
  }


def test_a_file_cut_at_any_byte_is_completed_as_if_it_were_not(tmp_path):
  path = tmp_path / 'predictions.jsonl'
  partial = tmp_path / 'predictions.jsonl.partial'
  tally = write(path)
  whole = path.read_bytes()
  assert [json.loads(line) for line in whole.splitlines()] == RECORDS
  assert (tally.num_lines, tally.num_bad, tally.num_truncated) == (4, 1, 1)
  for end in range(len(whole) + 1):
    path.unlink()
    partial.write_bytes(whole[:end])
    with predictions.GrowingFile(path) as file:
      num_lines = file.tally.num_lines
    assert num_lines == whole[:end].count(b'\n')
    assert partial.stat().st_size == whole.rfind(b'\n', 0, end) + 1
    again = write(path)
    assert path.read_bytes() == whole
    assert vars(again) == vars(tally)
    assert not partial.exists()


@pytest.mark.parametrize(
  'torn', [b'\0' * 70, b'{"a": \n{}\n', b'[]\n', b'{}\n']
)
def test_what_a_crash_of_the_machine_leaves_is_cut_off(tmp_path, torn, capsys):
  path = tmp_path / 'predictions.jsonl'
  write(path)
  first, rest = path.read_bytes().split(b'\n', 1)
  path.unlink()
  for after in (b'', rest):
    partial = tmp_path / 'predictions.jsonl.partial'
    partial.write_bytes(first + b'\n' + torn + after)
    with predictions.GrowingFile(path) as file:
      assert file.tally.num_lines == 1
    assert partial.read_bytes() == first + b'\n'
    num_bytes = len(torn + after)
    assert f'removed the last {num_bytes} bytes' in capsys.readouterr().err


def test_a_file_has_its_name_when_it_is_whole_and_lines_at_once(tmp_path):
  path = tmp_path / 'predictions.jsonl'
  with predictions.GrowingFile(path) as file:
    for number in range(1, 4):
      file.append(RECORDS[:1])
      written = tmp_path / 'predictions.jsonl.partial'
      assert not path.exists()
      assert len(written.read_bytes().splitlines()) == number
    file.finish()
  assert {p.name for p in tmp_path.iterdir()} == {
    'predictions.jsonl',
    '.predictions.jsonl.digests',
  }
  assert list(predictions.read([path, path])) == RECORDS[:1] * 6


def test_two_processes_do_not_write_one_file(tmp_path):
  path = tmp_path / 'predictions.jsonl'
  with predictions.GrowingFile(path) as file:
    file.append(RECORDS[:1])
    with pytest.raises(ValueError, match=r'another process is writing .*jsonl'):
      with predictions.GrowingFile(path):
        pass
    file.append(RECORDS[1:2])
  with predictions.GrowingFile(path) as file:
    assert file.tally.num_lines == 2


@pytest.mark.parametrize('num_lines', [0, 1, 3, 10, 101])
@pytest.mark.parametrize('count', [1, 2, 3, 7])
def test_shards_make_up_the_whole(num_lines, count):
  shards = [predictions.Shard(index, count) for index in range(count)]
  parts = [shard.lines(num_lines) for shard in shards]
  assert [line for part in parts for line in part] == list(range(num_lines))
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
  names = [shard.name('predictions', '.jsonl') for shard in shards]
  assert names == sorted(set(names))


def test_names_of_shards():
  assert predictions.Shard().name('scores', '.json') == 'scores.json'
  assert predictions.Shard(1, 4).name('a', '.b') == 'a-00001-of-00004.b'


@pytest.mark.parametrize('index,count', [(-1, 2), (2, 2), (0, 0), (1, 1)])
def test_what_is_no_shard_is_refused(index, count):
  with pytest.raises(ValueError, match=f'shard={index} of num_shards={count}'):
    predictions.Shard(index, count).check()


def test_a_folder_keeps_to_one_job(tmp_path):
  settings = {'step': 4, 'input': 'a.txt', 'template': '{prompt}'}
  predictions.settle(tmp_path, settings)
  predictions.settle(tmp_path, {**settings, 'input': 'moved/a.txt'})
  with pytest.raises(ValueError) as refused:
    predictions.settle(tmp_path, {**settings, 'step': 8, 'num_shards': 2})
  message, *differences = str(refused.value).splitlines()
  assert message.startswith(f'INFER_OUTPUT_DIR={tmp_path} holds the answers of')
  assert [line.split(':')[0] for line in differences] == [
    '  num_shards',
    '  step',
  ]
  assert '4' in differences[1] and '8' in differences[1]


def test_answers_of_unknown_origin_are_refused(tmp_path):
  (tmp_path / 'predictions.jsonl').write_text('')
  with pytest.raises(
    ValueError, match=r'holds predictions\.jsonl without their settings\.json'
  ):
    predictions.settle(tmp_path, {})


def test_scores_are_of_answered_lines_with_a_target():
  records: list[predictions.Record] = [
    {'prediction': 'a b c d e', 'target': 'a b c d f'},
    {'prediction': 'g h', 'target': ['g h', 'x']},
    {'prediction': 'no target', 'target': None},
    {'prediction': None, 'line': 3, 'error': 'is empty', 'target': 'z'},
    {'prediction': 'cut', 'target': 'cut', 'prompt_truncated': True},
  ]
  targets = ['a b c d f', ['g h', 'x'], 'cut']
  answers = ['a b c d e', 'g h', 'cut']
  found = predictions.score(
    iter(records), [metric_fns.bleu, metric_fns.exact_match], 'target'
  )
  assert found == {
    'num_lines': 5,
    'num_bad': 1,
    'num_scored': 3,
    'num_truncated_prompts': 1,
    'scores': {
      **metric_fns.bleu(targets, answers),
      'exact_match': pytest.approx(200 / 3),
    },
    'signatures': {'bleu': metric_fns.bleu_signature(None)},
  }
  found = predictions.score(
    records[:1], [metric_fns.chrf, metric_fns.rouge], 'target'
  )
  assert found['signatures'] == metric_fns.signatures(
    [metric_fns.chrf, metric_fns.rouge], ['a b c d f']
  )
  assert {'chrf', 'rouge1'} <= found['scores'].keys()
  nothing = predictions.score([], [metric_fns.bleu], 'target')
  assert (nothing['num_scored'], nothing['scores']) == (0, {})


def test_a_tally_names_the_first_bad_lines_and_counts_all():
  tally = predictions.Tally()
  assert tally.describe(7) == ''
  for number in range(1, 9):
    bad = text_files.BadLine('in.txt', number, 'is empty')
    tally.add(predictions.unanswered(bad))
  tally.add(RECORDS[3])
  cut, total, first, *_, last = tally.describe(7).splitlines()
  assert cut.startswith('1 prompts were longer than 7 tokens and were cut')
  assert total == '8 of 9 lines could not be answered:'
  assert (first, last) == ('  line 1 is empty', '  and 3 more')


ITEMS: list[prompts.Item] = [
  {'prompt': 'a', 'id': 1},
  text_files.BadLine('in.txt', 2, 'is empty'),
  {'prompt': 'c'},
  {'prompt': 'd'},
]


def partly(path, *parts):
  """Leaves a file that is not finished, as a process that was stopped does."""
  with predictions.GrowingFile(path, ITEMS) as file:
    for records in parts:
      file.append(records)
  return path.with_name(f'{path.name}.partial')


def test_lines_that_were_changed_are_answered_again(tmp_path, capsys):
  path = tmp_path / 'predictions.jsonl'
  partial = partly(path, RECORDS[:1], RECORDS[1:2], RECORDS[2:3])
  whole = partial.read_bytes()
  start = len(predictions.dump(RECORDS[:2]).encode())
  for changed in (
    whole[:-3] + b'x' + whole[-2:],
    whole + predictions.dump(RECORDS[2:3]).encode(),
    whole[: start // 2],
  ):
    partial.write_bytes(changed)
    with predictions.GrowingFile(path, ITEMS) as file:
      count = file.tally.num_lines
      assert count <= 3 and whole.startswith(partial.read_bytes())
      file.append(RECORDS[count:3])
    assert partial.read_bytes() == whole
    assert 'removed the last' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('records', 'words'),
  [
    ([*RECORDS[:1], *RECORDS[:1]], 'line 2'),  # once more
    ([RECORDS[2]], 'line 1'),  # another's
    ([*RECORDS, RECORDS[3]], 'the input has 4 lines only'),
    ([RECORDS[1]], 'line 1'),
  ],
)
def test_lines_that_do_not_answer_the_input_are_refused(
  tmp_path, records, words
):
  """Also where an earlier version has left no digests."""
  path = tmp_path / 'predictions.jsonl'
  path.with_name(f'{path.name}.partial').write_text(predictions.dump(records))
  with (
    pytest.raises(ValueError, match='does not match the input') as error,
    predictions.GrowingFile(path, ITEMS),
  ):
    pass
  assert words in str(error.value)
  path.write_text(predictions.dump(records))
  with pytest.raises(ValueError, match='does not match the input') as error:
    predictions.read_whole(path, ITEMS)
  assert words in str(error.value)


def test_a_whole_file_is_compared_with_its_input_and_its_digests(tmp_path):
  path = tmp_path / 'predictions.jsonl'
  write(path)
  assert predictions.read_whole(path, ITEMS).num_lines == len(ITEMS)
  whole = path.read_bytes()
  for changed in (b'', whole[:40], whole.replace(b'"A', b'"B'), whole[::-1]):
    path.write_bytes(changed)
    with pytest.raises(ValueError, match='was changed after it was written'):
      predictions.read_whole(path, ITEMS)
    with pytest.raises(ValueError, match='was changed after it was written'):
      list(predictions.read([path]))
  path.write_bytes(predictions.dump(RECORDS[:2]).encode())
  path.with_name(f'.{path.name}.digests').unlink()
  with pytest.raises(ValueError, match='holds 2 lines, but its input has 4'):
    predictions.read_whole(path, ITEMS)


@pytest.mark.parametrize('version, is_said', [(1, False), (2, True)])
def test_answers_that_have_lost_their_digests_are_said(
  tmp_path, capsys, version, is_said
):
  """But not those of an earlier version, which may have had none."""
  path = tmp_path / 'predictions.jsonl'
  predictions.settle(tmp_path, {})
  if version == 1:
    (tmp_path / predictions.SETTINGS).write_text('{"format_version": 1}')
  write(path)
  list(predictions.read([path]))
  assert not capsys.readouterr().err
  notes = predictions.notes_of(path)
  notes.unlink()
  words = f'{path} is read without verification: its digests, {notes.name} be'
  list(predictions.read([path]))
  assert (words in capsys.readouterr().err) is is_said
  path.rename(path.with_name(f'{path.name}.partial'))
  write(path)
  assert (words in capsys.readouterr().err) is is_said
  write(path)  # With digests again.
  assert not capsys.readouterr().err
