# SPDX-License-Identifier: Apache-2.0
"""Laws of the verb `benchmark`: what it writes, and what it refuses."""

import contextlib
import dataclasses
import io
import json
import shutil

import helpers
import pytest

from l2s_jax.performance import bandwidth, benchmark, peers, speed_report
from l2s_jax.systems import system as system_lib

SIZES = {'batch_sizes': 2, 'prompt_lengths': 6, 'output_lengths': 4}
LLM = system_lib.Tower(config=helpers.T5_1_0)
SLM = system_lib.Tower(config=helpers.GPT2)


@pytest.fixture(scope='module', autouse=True)
def small_array():
  """What bandwidth is measured with need not be larger than caches here."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bandwidth, 'BANDWIDTH_BYTES', 2**20)
    yield


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """What a run of all contenders prints, and the folder that it leaves."""
  folder = tmp_path_factory.mktemp('benchmark') / 'here'
  names = [
    name for name in peers.DEFAULT if not peers.why_missing(peers.PEERS[name])
  ]
  with pytest.MonkeyPatch.context() as patch:
    absent = peers.Peer('absent', 'float32', ('no_such_package',))
    patch.setitem(peers.PEERS, 'absent', absent)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      benchmark.benchmark(
        str(folder),
        LLM,
        SLM,
        **SIZES,
        rounds=2,
        peer_names=(*names, 'absent'),
        peers=True,
      )
  return folder, printed.getvalue(), names


def test_files_hold_what_was_printed(found):
  folder, printed, _ = found
  assert (folder / speed_report.MARKDOWN).read_text() in printed
  assert (folder / speed_report.PNG).read_bytes().startswith(b'\x89PNG')
  assert sorted(path.name for path in folder.iterdir()) == [
    'benchmark.json',
    'benchmark.md',
    'benchmark.png',
  ]
  content = json.loads((folder / speed_report.JSON).read_text())
  assert content['machine']['jax'] in printed
  assert content['settings']['rounds'] == 2


def test_every_contender_has_a_row(found):
  folder, _, names = found
  rows = json.loads((folder / speed_report.JSON).read_text())['rows']
  ours = [
    (system, 'l2s_jax', 'float32') for system in ('LLM', 'SLM', 'LLM-to-SLM')
  ]
  theirs = [
    (system, peers.PEERS[name].engine, peers.PEERS[name].dtype)
    for system in ('LLM', 'SLM')
    for name in names
  ]
  assert [
    (row['system'], row['engine'], row['dtype']) for row in rows
  ] == ours + theirs
  for row in rows:
    assert len(row['rounds']['total_ms']) == 2
    assert row['total_ms_low'] <= row['total_ms'] <= row['total_ms_high']
    assert row['num_params'] > 0
    if row['engine'] == 'l2s_jax':
      assert row['memory_bytes'] > 0
    elif row['dtype'] == 'float32':
      assert row['equal_tokens'] == 1


def test_a_missing_peer_is_named_and_left_out(found):
  folder, printed, _ = found
  assert (
    'absent is skipped: the package no_such_package is not installed'
  ) in printed
  assert '"absent"' not in (folder / speed_report.JSON).read_text()


def test_all_combinations_of_lengths_are_timed(tmp_path, capsys):
  sizes = {'batch_sizes': (1, 2), 'prompt_lengths': 6, 'output_lengths': (2, 3)}
  benchmark.benchmark(
    str(tmp_path), slm=SLM, **sizes, rounds=1, quantizations=('none', 'int8')
  )
  rows = json.loads((tmp_path / speed_report.JSON).read_text())['rows']
  assert [
    (row['dtype'], row['batch_size'], row['num_tokens']) for row in rows
  ] == [
    (dtype, batch_size, num_tokens)
    for num_tokens in (2, 3)
    for batch_size in (1, 2)
    for dtype in ('float32', 'int8')
  ]
  # One model alone is compared with no other.
  assert {row['system'] for row in rows} == {'SLM'}
  assert '| x LLM |' not in capsys.readouterr().out


def test_a_quick_run_times_the_first_shape_in_three_rounds(tmp_path, capsys):
  benchmark.benchmark(
    str(tmp_path),
    LLM,
    batch_sizes=(2, 1),
    prompt_lengths=(8, 4),
    output_lengths=(3, 2),
    quick=True,
  )
  capsys.readouterr()
  found = json.loads((tmp_path / 'benchmark.json').read_text())
  (row,) = found['rows']
  shape = row['batch_size'], row['prompt_length'], row['num_tokens']
  assert shape == (2, 8, 3)
  assert len(row['rounds']['total_ms']) == 3


def test_drafts_write_what_the_llm_writes(tmp_path):
  slm = dataclasses.replace(helpers.T5_1_1, emb_dim=8)
  benchmark.benchmark(
    str(tmp_path),
    LLM,
    system_lib.Tower(config=slm),
    **SIZES,
    rounds=1,
    draft_len=2,
  )
  rows = json.loads((tmp_path / speed_report.JSON).read_text())['rows']
  (row,) = (row for row in rows if row['system'] == 'speculative')
  assert row['equal_tokens'] == 1
  assert 0 <= row['acceptance'] <= 1


def test_the_unquantized_llm_is_what_others_are_compared_with(tmp_path, capsys):
  benchmark.benchmark(
    str(tmp_path), LLM, **SIZES, rounds=1, quantizations=('int8', 'none')
  )
  lines = capsys.readouterr().out.splitlines()
  heading = next(line for line in lines if '| x LLM |' in line)
  place = heading.split('|').index(' x LLM ')
  (row,) = (
    cells
    for cells in (line.split('|') for line in lines)
    if len(cells) > place
    and cells[4].strip() == 'float32'
    and len(cells) == len(heading.split('|'))
  )
  assert float(row[place]) == 1


def test_one_quantization_needs_no_tuple(tmp_path):
  benchmark.benchmark(
    str(tmp_path), slm=SLM, **SIZES, rounds=1, quantizations='int8'
  )
  rows = json.loads((tmp_path / speed_report.JSON).read_text())['rows']
  assert [row['dtype'] for row in rows] == ['int8']


def test_an_encoder_alone_serves_the_pair(tmp_path, capsys):
  encoder = dataclasses.replace(helpers.T5_1_0, num_decoder_layers=0)
  options = {'rounds': 1, **SIZES}
  llm = system_lib.Tower(config=encoder)
  benchmark.benchmark(str(tmp_path), llm, SLM, **options)
  rows = json.loads((tmp_path / speed_report.JSON).read_text())['rows']
  assert [row['system'] for row in rows] == ['SLM', 'LLM-to-SLM']
  assert 'LLM is skipped: LLM is encoder-only' in capsys.readouterr().out
  for settings in ({'slm': SLM, 'draft_len': 2}, {'slm': None}):
    with pytest.raises(ValueError, match='encoder'):
      benchmark.benchmark(str(tmp_path), llm, **options, **settings)


def test_a_full_disk_is_refused_before_anything_is_built(tmp_path, monkeypatch):
  if peers.why_missing(peers.PEERS['transformers float32']):
    pytest.skip('transformers is not installed')
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(9, 9, 0)
  )
  with pytest.raises(OSError, match='0 bytes free, .* BENCHMARK_DIR, and need'):
    benchmark.benchmark(str(tmp_path / 'absent'), LLM, SLM, **SIZES, peers=True)


def test_a_dry_run_says_what_would_be_timed(tmp_path, capsys):
  benchmark.benchmark(str(tmp_path / 'absent'), LLM, SLM, **SIZES, dry_run=True)
  printed = capsys.readouterr().out
  assert 'LLM-to-SLM: LLM -> SLM, ' in printed
  assert 'parameters' in printed
  assert not (tmp_path / 'absent').exists()


@pytest.mark.parametrize(
  'settings,message',
  [
    ({'dtype': 'float16'}, "DTYPE: 'float16' is not one of"),
    ({'injection': 'multiply'}, "INJECTION: 'multiply' is not one of"),
    ({'quantizations': ('int4',)}, "QUANTIZATIONS: 'int4' is not one of"),
    ({'peer_names': ('vllm',)}, "BENCHMARK_PEERS: 'vllm' is not one of"),
    ({'peer_names': 'vllm'}, "BENCHMARK_PEERS: 'vllm' is not one of"),
    ({'batch_sizes': ()}, 'BATCH_SIZES, .* is empty'),
    ({'prompt_lengths': (6, 0)}, 'PROMPT_LENGTHS=0: expected a positive'),
    ({'output_lengths': (1, 4)}, 'OUTPUT_LENGTHS=1: .* 2 or more'),
    ({'rounds': 0}, 'BENCHMARK_ROUNDS=0: expected a positive'),
    ({'output_lengths': (64,)}, 'max_positions'),
    ({'draft_len': 2}, 'DRAFT_LEN=2: .* vocabulary of the SLM'),
    ({'prompts_path': 'x.txt'}, 'BENCHMARK_PROMPTS=x.txt .* CHECKPOINT_PATH'),
    ({'quality': 'cldr-test'}, 'BENCHMARK_QUALITY=cldr-test: .* `evaluate`'),
    ({'llm': None, 'slm': None}, 'Nothing to time. Set LLM and SLM'),
  ],
)
def test_wrong_settings_are_refused_before_anything_is_built(
  settings, message, tmp_path
):
  folder = tmp_path / 'absent'
  slm = system_lib.Tower(
    config=dataclasses.replace(helpers.GPT2, vocab_size=280)
  )
  with pytest.raises(ValueError, match=message):
    benchmark.benchmark(
      str(folder), **({'llm': LLM, 'slm': slm} | SIZES | settings)
    )
  assert not folder.exists()
