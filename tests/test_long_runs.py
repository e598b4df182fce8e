# SPDX-License-Identifier: Apache-2.0
"""Long runs grow in nothing; and what would grow is seen.

The long form is `faults/long_runs.py`.
"""

import pytest
from faults import long_runs, watched


def records(mib_of):
  """Returns the log of a run of 1,000 lines, of 20 steps each."""
  return [
    {
      'progress': line,
      'bytes': int(mib_of(line) * 2**20),
      'compiled': 3 + (line > 100),
      'threads': 30,
      'open_files': 9,
    }
    for line in range(0, 1001, 10)
  ]


@pytest.mark.parametrize('growth', [0.0, 0.05, 3.0])
def test_growth_is_that_after_the_first_quarter(growth):
  found = long_runs.summary(
    records(lambda line: 100 + min(line, 200) + growth * line * 20 / 1000),
    20_000,
    60.0,
  )
  assert found.mib_per_1000 == pytest.approx(growth, abs=1e-3)
  assert found.total == 20_000
  assert found.mib[1] == pytest.approx(300 + growth * 20)
  assert found.compiled == (4, 0)


def test_a_program_that_is_compiled_late_is_counted():
  late = records(lambda line: 100)
  for record in late[60:]:
    record['compiled'] += 2
  assert long_runs.summary(late, 20_000, 60.0).compiled == (4, 2)


def test_a_run_that_ended_at_once_is_no_measurement():
  with pytest.raises(RuntimeError, match='too short'):
    long_runs.summary(records(lambda line: 100)[:1], 20, 1.0)


def test_lines_are_counted_when_the_file_gets_another_name(tmp_path):
  path = tmp_path / 'x.partial'
  lines = watched.Lines(str(path))
  assert lines.count() == 0
  with path.open('w') as file:
    file.write('a\nb\n')
    file.flush()
    assert lines.count() == 2
    path.rename(tmp_path / 'x')
    file.write('c\n')
  assert lines.count() == 3


@pytest.mark.long
def test_a_run_takes_no_more_at_its_end_than_at_a_quarter(tmp_path):
  found, _ = long_runs.run(tmp_path, steps=400, lines=10_000)
  for each in found.values():
    assert each.mib[1] < each.mib[0] + 64
    assert each.threads[1] < each.threads[0] + 16
    assert each.open_files[1] < each.open_files[0] + 8
