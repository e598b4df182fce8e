# SPDX-License-Identifier: Apache-2.0
"""Who writes T5X's name of a setting is told ours."""

import pathlib
import re

import gin
import pytest

from l2s_jax import __main__ as command_line
from l2s_jax.runtime import t5x_names

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 't5x.md').read_text()
TRAIN = ('train', '--gin_file=gin_configs/runs/train.gin')
OF_OTHERS = ('DECODE_FN', 'USE_CACHED_TASKS')  # Read by other files.


@pytest.mark.parametrize(
  'name', sorted(t5x_names.MACROS.keys() - set(OF_OTHERS))
)
def test_a_macro_of_t5x_is_answered_by_ours(name, capsys):
  assert command_line.main([*TRAIN, f'--gin.{name}=1']) == 2
  gin.clear_config()
  said = capsys.readouterr().err
  assert t5x_names.answer(name, t5x_names.MACROS) in said


@pytest.mark.parametrize('name', sorted(t5x_names.FLAGS))
def test_a_flag_of_t5x_is_answered_by_ours(name, capsys):
  with pytest.raises(SystemExit):
    command_line.main([*TRAIN, f'--{name}=1'])
  said = capsys.readouterr().err
  assert t5x_names.answer(name, t5x_names.FLAGS) in said


@pytest.mark.parametrize('names', [t5x_names.MACROS, t5x_names.FLAGS])
def test_the_page_has_every_name(names):
  for name, ours in names.items():
    (row,) = re.findall(rf'^\| `(?:--)?{name}` \|.*$', PAGE, re.M)
    assert ours in row


def test_the_page_has_every_macro_and_flag_of_t5x():
  t5x = pytest.importorskip(
    't5x', reason='T5X is not importable: see requirements-t5x.txt'
  )
  folder = pathlib.Path(t5x.__file__).parent
  for run in ('pretrain', 'finetune', 'eval', 'infer', 'export'):
    text = (folder / 'configs' / 'runs' / f'{run}.gin').read_text()
    for name in re.findall(r'^([A-Z_]+) =', text, re.M):
      assert f'| `{name}` |' in PAGE, (run, name)
  for program in ('train', 'eval', 'infer', 'export'):
    text = (folder / f'{program}.py').read_text()
    for name in re.findall(r"DEFINE_\w+\(\s*'(\w+)'", text):
      assert f'| `--{name}` |' in PAGE, (program, name)
