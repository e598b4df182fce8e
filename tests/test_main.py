# SPDX-License-Identifier: Apache-2.0
"""Laws of the command line: what it runs, refuses, and tells."""

import gc
import importlib
import os
import pathlib
import re
import subprocess
import sys

import gin
import pytest

import l2s_jax
from l2s_jax import __main__ as command_line
from l2s_jax.data import tasks  # noqa: F401, for its gin names
from l2s_jax.runtime import gin_config

calls: list[dict] = []


@gin.configurable(module='test_main')
def polish(model_dir, num_steps=3, fail_with=None, dry_run=False):
  """Polishes a model.

  Args:
    num_steps: strokes with the cloth.
  """
  calls.append(dict(model_dir=model_dir, num_steps=num_steps, dry_run=dry_run))
  if fail_with == 'a missing file':
    open(pathlib.Path(model_dir) / 'absent')
  elif fail_with == 'a wrong input':
    gin_config.parse_config(['no_such_file.gin'])
  elif fail_with == 'a bug':
    int('not a number')


@gin.configurable(module='test_main')
def trade(mine, yours, from_, count=1, haste=False, dry_run=False):
  """Trades a model."""
  calls.append(
    dict(mine=mine, yours=yours, from_=from_, count=count, haste=haste)
  )


VERBS = {
  'polish': command_line.Verb(
    __name__,
    'polish',
    'polishes a model',
    '--gin_file=runs/polish.gin --gin.MODEL_DIR=x',
    (command_line.Flag('num_steps', int, 'strokes'),),
  ),
  'trade': command_line.Verb(
    __name__,
    'trade',
    'trades one model for another',
    'mine yours --from=wood',
    (
      command_line.Flag('from', str, 'made of', ('wood', 'tin'), True),
      command_line.Flag('MINE', str, 'what you have'),
      command_line.Flag('YOURS', str, 'what you get'),
      command_line.Flag('count', int, 'how many'),
      command_line.Flag('haste', bool, 'whether it is urgent'),
    ),
  ),
}


@pytest.fixture(autouse=True)
def clear_calls():
  calls.clear()
  yield
  gin.clear_config()


def run(*argv: str) -> int:
  return command_line.main(argv, verbs=VERBS, configurable_modules=())


def python_m(*argv: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-X', 'importtime', '-m', 'l2s_jax', *argv],
    capture_output=True,
    text=True,
    cwd=gin_config.REPO_ROOT,
  )


def test_a_verb_is_called_with_what_files_and_flags_bind(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('sub').mkdir()
  pathlib.Path('sub/polish.gin').write_text(
    'polish.model_dir = %MODEL_DIR\npolish.num_steps = %TRAIN_STEPS\n'
    'TRAIN_STEPS = 1\n'
  )
  status = run(
    'polish',
    '--gin_file=polish.gin',
    '--gin_search_paths=other,sub',
    '--gin.MODEL_DIR=runs/x',
    '--gin.TRAIN_STEPS=7',
  )
  assert status == 0
  assert calls == [dict(model_dir='runs/x', num_steps=7, dry_run=False)]
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err == ''


def test_a_flag_of_a_verb_goes_over_what_gin_binds(capsys):
  bindings = ('--gin.polish.model_dir="x"', '--gin.polish.num_steps=5')
  assert run('polish', *bindings) == 0
  assert run('polish', *bindings, '--num_steps=7') == 0
  assert run('polish', bindings[0], '--num_steps=0') == 0
  assert [call['num_steps'] for call in calls] == [5, 7, 0]
  assert run('polish', '--help') == 0
  assert '--num_steps=N' in capsys.readouterr().out
  with pytest.raises(SystemExit):
    run('polish', *bindings, '--num_steps=many')
  assert 'invalid int value' in capsys.readouterr().err


def test_tfds_data_dir_is_over_what_gin_binds(capsys):
  status = run(
    'polish',
    '--tfds_data_dir=my/data',
    '--gin.polish.model_dir="x"',
    '--gin.tfds.data_dir="theirs"',
    '--dry_run',
  )
  assert status == 0
  assert "tfds.data_dir = 'my/data'" in capsys.readouterr().out


def test_dry_run_prints_the_config_and_passes_itself_on(capsys):
  status = run(
    'polish',
    '--gin.polish.model_dir="x"',
    '--gin.polish.num_steps=5',
    '--dry_run',
  )
  assert status == 0
  assert [call['dry_run'] for call in calls] == [True]
  assert 'polish.num_steps = 5' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (
      ['polihs'],
      "'polihs' is not a verb; did you mean polish? Verbs: polish, trade.",
    ),
    (
      ['polish', '--gin_flie=x'],
      '--gin_flie=x is not a flag; did you mean --gin_file?',
    ),
    (['polish', '--MODEL_DIR=x'], 'set by --gin.MODEL_DIR=VALUE.'),
    (['polish', '--gin.MODEL_DIR', 'x'], 'in one word: --gin.MODEL_DIR=x.'),
    (['polish', '--gin.MODEL_DIR='], 'is a variable of the shell unset?'),
    (['polish', '--output_dir=x'], 'settings are set by --gin.NAME=VALUE'),
    (
      ['polish', '--gin_file=a.gin', 'b.gin'],
      'each gin file has a flag of its own: --gin_file=b.gin.',
    ),
    (['polish', '--gin_file=tests'], 'tests is a folder; give a gin file.'),
    (['polish', '--gin.MODEL_DIR'], 'in one word: --gin.NAME=VALUE.'),
    (['polish', '--gin_file=absent.gin'], "no gin file 'absent.gin' in "),
    (['polish', '--gin.polish.nmu_steps=1'], 'did you mean num_steps?'),
    (['polish', '--gin.NUM_STEPS=1'], 'nothing reads NUM_STEPS'),
    (['polish'], '  polish.model_dir\n'),
  ],
)
def test_wrong_input_is_one_message_and_status_2(argv, message, capsys):
  try:
    status: object = run(*argv)
  except SystemExit as end:  # argparse's own way out
    status = end.code
  assert status == 2
  assert calls == []
  captured = capsys.readouterr()
  assert message in captured.err
  assert 'Traceback' not in captured.err
  assert captured.out == ''


@pytest.mark.parametrize('cause', ['a missing file', 'a wrong input'])
def test_wrong_input_found_by_the_verb_is_a_message_too(cause, capsys):
  argv = [
    'polish',
    '--gin.polish.model_dir="x"',
    f'--gin.polish.fail_with={cause}',
  ]
  assert run(*argv) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('l2s_jax: error: ')
  assert 'In call to configurable' not in error
  with pytest.raises(FileNotFoundError):  # --verbose is for the traceback
    run(*argv, '--verbose')


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/caches')
  for given, expected in (
    (None, '/caches/l2s_jax/compiled'),
    ('/mine', '/mine'),
    ('', ''),
  ):
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    if given is not None:
      monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', given)
    assert run('polish', '--gin.polish.model_dir="x"') == 0
    assert os.environ['JAX_COMPILATION_CACHE_DIR'] == expected


def test_a_bug_keeps_its_traceback():
  with pytest.raises(ValueError, match='invalid literal for int'):
    run(
      'polish', '--gin.polish.model_dir="x"', '--gin.polish.fail_with="a bug"'
    )


def test_help_of_a_verb_shows_an_example_and_its_gin_names(capsys):
  assert run('polish', '--help') == 0
  text = capsys.readouterr().out
  assert 'python -m l2s_jax polish \\\n    --gin_file=runs/polish.gin' in text
  assert '--gin.polish.NAME=VALUE' in text
  assert re.search('^  num_steps=3$', text, re.MULTILINE)
  assert 'num_steps: strokes with the cloth.' in text
  assert 'dry_run=' not in text
  assert calls == []


def test_flags_of_a_verb_are_parameters_of_its_function(capsys):
  assert run('trade', 'a', '--from=tin', 'b', '--haste') == 0
  call = dict(mine='a', yours='b', from_='tin', count=1, haste=True)
  assert calls == [call]
  assert run('trade', 'a', 'b', '--from=wood', '--gin.trade.count=3') == 0
  assert calls[1] == call | dict(from_='wood', count=3, haste=False)
  assert run('trade', '--help') == 0
  text = capsys.readouterr().out
  assert 'trade --from=wood|tin MINE YOURS [--count=N] [--haste]' in text
  assert 'gin_file=FILE' not in text.split('\n\n')[0]


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['a', 'b'], 'required: --from'),
    (['a', '--from=tin'], 'required: YOURS'),
    (['a', 'b', '--from=gold'], "invalid choice: 'gold'"),
    (['a', 'b', 'c', '--from=tin'], 'c is not a flag'),
    (['a', 'b', '--frm=tin', '--from=tin'], 'did you mean --from'),
  ],
)
def test_wrong_flags_are_one_message_and_status_2(argv, message, capsys):
  with pytest.raises(SystemExit) as end:
    run('trade', *argv)
  assert end.value.code == 2
  assert calls == []
  assert message in capsys.readouterr().err


def test_the_version_is_told(capsys):
  assert run('--version') == 0
  assert capsys.readouterr().out == f'l2s_jax {l2s_jax.__version__}\n'


def test_help_is_quick_since_it_imports_nothing_heavy():
  result = python_m('--help')
  assert result.returncode == 0
  for verb in command_line.VERBS:
    assert re.search(f'^  {verb} ', result.stdout, re.MULTILINE)
  imported = set(re.findall(r'\| +(\w+)$', result.stderr, re.MULTILINE))
  assert 'gin' in imported
  assert not imported & {'jax', 'numpy', 'flax', 'tensorflow'}


def test_python_m_exits_with_the_status():
  result = python_m('trian')
  assert result.returncode == 2
  assert "l2s_jax: error: 'trian' is not a verb; did you mean train?" in (
    result.stderr
  )


@pytest.mark.parametrize('name', command_line.VERBS)
def test_the_example_of_a_verb_binds_all_that_it_needs(name):
  for module in command_line.CONFIGURABLE_MODULES:
    importlib.import_module(module)
  verb = command_line.VERBS[name]
  parser = command_line._parser(name, verb)
  args, bindings = command_line._parse_args(parser, verb.example.split())
  gin_config.parse_config(args.gin_file, bindings)
  given = [flag.parameter for flag in verb.flags]
  gin_config.check_required(verb.load(), given=('dry_run', *given))


def test_garbage_is_collected_once_all_is_imported():
  gc.disable()  # As `process` does.
  try:
    assert run('polish', '--gin.polish.model_dir=x') == 0
    assert gc.isenabled()
  finally:
    gc.enable()
