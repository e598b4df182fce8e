# SPDX-License-Identifier: Apache-2.0
"""Laws of the gin reader: what it accepts, and what each error tells."""

import dataclasses
import importlib
import pathlib
import re
import subprocess
import sys

import gin
import pytest

from l2s_jax import __main__ as command_line
from l2s_jax.runtime import gin_config

for module in command_line.CONFIGURABLE_MODULES:
  importlib.import_module(module)


@gin.configurable(module='test_gin_config')
@dataclasses.dataclass(frozen=True)
class Belfry:
  """A configurable class with parameters of both kinds."""

  emb_dim: int = gin.REQUIRED
  num_layers: int = 2


@gin.configurable(module='test_gin_config')
def fit(model_dir, num_steps=3, towers=(), lengths=None, dry_run=False):
  del dry_run
  return model_dir, num_steps, tuple(towers), lengths


@pytest.fixture(autouse=True)
def clear_gin():
  yield
  gin.clear_config()


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Returns a function that writes gin files where they are looked up."""
  monkeypatch.chdir(tmp_path)

  def write_file(name: str, text: str) -> str:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name

  return write_file


@gin.configurable(module='test_gin_config')
def ring(num_times=1):
  return num_times


TRAIN = ['gin_configs/runs/train.gin', 'gin_configs/meshes/cpu.gin']
TRAIN_BINDINGS = [
  'MODEL=@language_model_system()',
  'MIXTURE_OR_TASK_NAME=cldr',
  "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}",
]
RUN = """
MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 10
fit.model_dir = %MODEL_DIR
fit.num_steps = %TRAIN_STEPS
"""


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    ('runs/x', 'runs/x'),
    ('"runs/x"', 'runs/x'),
    ("'7'", '7'),
    ('7', 7),
    ('-1e-3', -1e-3),
    ('None', None),
    ('(1, 2)', (1, 2)),
    ("{'inputs': 64}", {'inputs': 64}),
    # Gin's own parser stops at the first token of these: 10, 2024 and 5.
    ('10k', '10k'),
    ('2024-05-01', '2024-05-01'),
    ('5 times', '5 times'),
    ('gs://bucket/run=1', 'gs://bucket/run=1'),
  ],
)
def test_a_flag_is_a_gin_value_or_else_a_string(value, expected):
  bindings = ['fit.model_dir=%MODEL_DIR', f'MODEL_DIR={value}']
  parsed = gin_config.parse_config(bindings=bindings)
  assert fit()[0] == expected
  is_quoted = value.startswith(('"', "'"))
  is_assumed = isinstance(expected, str) and not is_quoted
  assert parsed.assumed_strings == (
    {'MODEL_DIR': expected} if is_assumed else {}
  )


@pytest.mark.parametrize(
  ('binding', 'message'),
  [
    ('SHUFFLE=false', 'write False'),
    ('MODEL_DIR', 'in one word: --gin.NAME=VALUE'),
    ('MODEL_DIR=', '--gin.MODEL_DIR= has no value'),
    ('LENGTHS=(1, 2', 'bracket'),
    ('MODEL_DIR="runs', '--gin.MODEL_DIR'),
  ],
)
def test_a_flag_that_was_meant_as_a_value_is_not_taken_as_a_string(
  binding, message
):
  with pytest.raises(ValueError, match=re.escape(message)):
    gin_config.parse_config(bindings=[binding])


def test_a_path_below_the_home_folder_is_expanded(write, monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  run = write('run.gin', RUN + "fit.towers = %FILES\nFILES = ['~/a', 'b~/c']")
  gin_config.parse_config([run], ['MODEL_DIR=~/runs'])
  assert fit()[0] == '/home/me/runs'
  assert fit()[2] == ('/home/me/a', 'b~/c')
  # Only by the name of a path: a template may begin so.
  other = write('other.gin', RUN + "fit.towers = ['~/a']")
  gin_config.parse_config([other], ['MODEL_DIR=x'])
  assert fit()[2] == ('~/a',)


def test_a_gin_file_that_is_not_text_is_refused_by_name(write):
  pathlib.Path('f.gin').write_bytes('# f\xfcr\n'.encode('latin1'))
  with pytest.raises(ValueError, match='^f.gin is not UTF-8: '):
    gin_config.parse_config(['f.gin'])


def test_the_files_that_bind_a_macro_are_named(write):
  run = write('run.gin', RUN)
  for binding, words in (
    ('FSDP=4', 'FSDP. A setting of gin_configs/meshes/data_fsdp_tensor.gin. '),
    (
      'MODEL_DIR=%T5_SMALL',
      'the gin file that binds it: gin_configs/models/t5_small.gin.',
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(words)):
      gin_config.parse_config([run], [binding])


def test_later_files_and_then_flags_override(write):
  first = write('first.gin', RUN + 'MODEL_DIR = "first"')
  second = write('second.gin', 'MODEL_DIR = "second"\nTRAIN_STEPS = 20')
  gin_config.parse_config([first, second], ['TRAIN_STEPS=30'])
  assert fit()[:2] == ('second', 30)


def test_nothing_of_the_previous_config_is_left(write):
  run = write('run.gin', RUN)
  gin_config.parse_config([run], ['MODEL_DIR=one', 'TRAIN_STEPS=99'])
  gin_config.parse_config([run], ['MODEL_DIR=two'])
  assert fit()[:2] == ('two', 10)


def test_files_come_from_cwd_then_search_paths_then_repository(
  write, tmp_path, monkeypatch
):
  monkeypatch.setattr(gin_config, 'REPO_ROOT', tmp_path / 'repository')
  write('repository/run.gin', 'fit.model_dir = "repository"')
  write('here/run.gin', 'fit.model_dir = "cwd"')
  write('there/run.gin', 'fit.model_dir = "search path"')
  write('there/outer.gin', "include 'run.gin'")
  there = str(tmp_path / 'there')
  monkeypatch.chdir(tmp_path / 'here')
  parsed = gin_config.parse_config(['outer.gin'], search_paths=[there])
  assert fit()[0] == 'cwd'
  assert [path.parent.name for path in parsed.files] == ['there', 'here']
  pathlib.Path('run.gin').unlink()
  gin_config.parse_config(['run.gin'], search_paths=[there])
  assert fit()[0] == 'search path'
  gin_config.parse_config(['run.gin'])
  assert fit()[0] == 'repository'


@pytest.mark.parametrize('name', ['train.gin', 'gin_configs/run/train.gin'])
def test_a_missing_file_names_its_near_misses(write, name):
  write('gin_configs/runs/train.gin', RUN)
  with pytest.raises(FileNotFoundError) as error:
    gin_config.parse_config([name])
  assert str(error.value).startswith(f"--gin_file: no gin file '{name}' in ")
  assert 'did you mean gin_configs/runs/train.gin' in str(error.value)


def test_a_missing_include_names_the_line_that_asks_for_it(write):
  outer = write('outer.gin', "\ninclude 'inner.gin'\n")
  with pytest.raises(FileNotFoundError, match="^outer.gin:2: .*'inner.gin'"):
    gin_config.parse_config([outer])


def test_a_circle_of_includes_is_refused(write):
  write('a.gin', "include 'b.gin'")
  write('b.gin', "include 'a.gin'")
  with pytest.raises(ValueError, match='^b.gin:1: a.gin includes itself'):
    gin_config.parse_config(['a.gin'])


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (
      'fit.num_stpes = 3',
      "f.gin:2: fit has no parameter 'num_stpes'; did you mean num_steps? "
      'It has: model_dir, num_steps, towers, lengths, dry_run.',
    ),
    (
      'fti.num_steps = 3',
      "f.gin:2: no configurable is named 'fti'; did you mean fit?",
    ),
    (
      'fit.towers = [@Belfyr()]',
      "f.gin:2: no configurable is named 'Belfyr'; did you mean Belfry?",
    ),
    ('fit.model_dir = runs', "f.gin:2: Failed to parse token 'runs'"),
    ('fit.lengths = (1,', 'f.gin:'),
    ('fit num_steps', 'f.gin:2: '),
    ('import l2s_jax.no_such_module', 'f.gin:2: cannot import l2s_jax.no_such'),
    (
      'from __gin__ import dynamic_registration',
      "f.gin:2: 'from __gin__ import dynamic_registration' is not supported",
    ),
  ],
)
def test_a_wrong_line_is_named_with_its_near_misses(write, text, message):
  name = write('f.gin', f'# The second line is wrong.\n{text}\n')
  with pytest.raises(ValueError) as error:
    gin_config.parse_config([name])
  assert str(error.value).startswith(message)


def test_a_misspelt_macro_is_named_where_it_is_read(write):
  name = write('f.gin', 'MODEL_DIR = "x"\nfit.model_dir = %MODEL_DIRR\n')
  with pytest.raises(ValueError) as error:
    gin_config.parse_config([name])
  assert str(error.value) == (
    'f.gin:2: %MODEL_DIRR is bound nowhere; did you mean MODEL_DIR? '
    'Set it with --gin.MODEL_DIRR=VALUE, or add the gin file that binds it.'
  )


def test_a_flag_that_nothing_reads_is_an_error_and_says_what_is_read(write):
  run = write('run.gin', RUN)
  with pytest.raises(ValueError) as error:
    gin_config.parse_config([run], ['MODEL_DIR=x', 'TRAIN_STPES=10'])
  assert str(error.value) == (
    '--gin.TRAIN_STPES: nothing reads TRAIN_STPES; did you mean TRAIN_STEPS? '
    'These macros are read: MODEL_DIR, TRAIN_STEPS.'
  )


def test_a_macro_counts_as_read_only_if_its_reader_is_not_overridden(write):
  run = write('run.gin', RUN)
  bindings = ['MODEL_DIR=x', 'fit.num_steps=7', 'TRAIN_STEPS=10']
  with pytest.raises(ValueError, match='nothing reads TRAIN_STEPS'):
    gin_config.parse_config([run], bindings)


def test_a_macro_of_a_file_may_be_unread_and_is_reported(write):
  run = write('run.gin', RUN + 'EVAL_PERIOD = 5')
  parsed = gin_config.parse_config([run], ['MODEL_DIR=x'])
  assert parsed.unread_macros == {'EVAL_PERIOD': 'run.gin:6'}


def test_a_required_macro_names_the_flag_that_sets_it(write):
  run = write('run.gin', RUN)
  parsed = gin_config.parse_config([run])
  assert parsed.required == {'MODEL_DIR': 'run.gin:2'}
  with pytest.raises(ValueError) as error:
    gin_config.check_required(fit, (), parsed.required)
  assert str(error.value) == (
    'run.gin:2: MODEL_DIR must be set: add --gin.MODEL_DIR=VALUE.'
  )
  # Another verb does not read it; but something else may, which it calls.
  gin_config.check_required(ring, (), parsed.required, others=[fit])
  with pytest.raises(ValueError, match='MODEL_DIR must be set'):
    gin_config.check_required(ring, (), parsed.required)
  gin_config.parse_config([run], ['MODEL_DIR=x'])
  assert fit()[0] == 'x'


def test_check_required_lists_all_that_a_call_would_miss():
  gin_config.parse_config(
    bindings=['BELFRY=@slm/Belfry()', 'fit.towers=[@llm/Belfry(), %BELFRY]']
  )
  with pytest.raises(ValueError) as error:
    gin_config.check_required(fit, given=('dry_run',))
  missing = re.findall(r'^  (\S+)$', str(error.value), re.MULTILINE)
  assert missing == [
    'fit.model_dir',
    'llm/Belfry.emb_dim',
    'slm/Belfry.emb_dim',
  ]
  gin_config.parse_config(
    bindings=[
      'BELFRY=@slm/Belfry()',
      'fit.towers=[@llm/Belfry(), %BELFRY]',
      *(f'{name}=8' for name in missing),
    ]
  )
  gin_config.check_required(fit, given=('dry_run',))
  assert fit()[2] == (Belfry(8), Belfry(8))


def test_the_operative_config_gives_the_same_call_again(write):
  run = write('run.gin', RUN + 'fit.towers = [@llm/Belfry()]\n')
  bindings = [
    'MODEL_DIR=runs/x',
    'llm/Belfry.emb_dim=4',
    "fit.lengths={'inputs': 64, 'targets': 32}",
  ]
  gin_config.parse_config([run], bindings)
  first = fit()
  text = gin_config.operative_config()
  assert 'llm/Belfry.num_layers = 2' in text  # a default that was used
  gin_config.parse_config([write('config.gin', text)])
  assert fit() == first


def test_an_imported_module_registers_its_configurables(write, monkeypatch):
  folder = pathlib.Path(write('my_tasks_for_gin.py', '')).resolve().parent
  write(
    'my_tasks_for_gin.py',
    'import gin\n\n@gin.configurable\ndef my_task(size): return size\n',
  )
  monkeypatch.syspath_prepend(folder)
  name = write('f.gin', 'import my_tasks_for_gin\nmy_task.size = 3\n')
  gin_config.parse_config([name])
  assert sys.modules['my_tasks_for_gin'].my_task() == 3
  assert 'import my_tasks_for_gin' in gin_config.operative_config()


def test_gin_brings_neither_tensorflow_nor_jax():
  code = (
    'import sys; from l2s_jax.runtime import gin_config; '
    "print({'tensorflow', 'jax'} & set(sys.modules))"
  )
  output = subprocess.check_output(
    [sys.executable, '-c', code], text=True, cwd=gin_config.REPO_ROOT
  )
  assert output.strip() == 'set()'


# --- types, by the annotations of this package's configurables ---


@pytest.mark.parametrize(
  ('binding', 'complaint'),
  [
    ("BATCH_SIZE='8'", "='8' (train.batch_size): expected a whole number."),
    ('BATCH_SIZE=8.5', ': expected a whole number.'),
    ('BATCH_SIZE=True', ': expected a whole number.'),
    ('BATCH_SIZE=None', ': expected a whole number.'),
    ('BATCH_SIZE=@adamw()', ': expected a whole number.'),
    ('LEARNING_RATE=1e-3x', "='1e-3x' (learning_rate_schedule."),
    ('LEARNING_RATE=True', ': expected a number.'),
    ('PACK=1', ': expected True or False.'),
    ('OPTIMIZER=adamw', '@lion(); write @adamw().'),
    ('OPTIMIZER=@adamw', '@lion(); write @adamw().'),
    ('train.trackers=train', "expected a tuple such as ('name',)."),
    ('OPTIMIZER=@train()', ': expected @adafactor() or @adamw() or @lion().'),
    ('TASK_FEATURE_LENGTHS=[32, 32]', ': expected a dict such as {'),
    ("TASK_FEATURE_LENGTHS={'inputs': '8'}", ': expected a dict such as {'),
    ('LENGTH_BUCKETS=(8, 8)', ': expected a tuple such as ((8,),).'),
    ('PROFILE_STEPS=x', ': expected a tuple such as (8,) or None.'),
    ('MODEL_DIR=3', ': expected a string.'),
    ('KEEP_CHECKPOINTS=x', ': expected a whole number or None.'),
    ("MeshConfig.slm_rules={'embed': 3}", ': expected a dict such as {'),
    ('BATCH_SIZE=%BATCH_SIZE', 'is bound to itself'),
  ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(binding, complaint):
  with pytest.raises(ValueError) as error:
    gin_config.parse_config(TRAIN, [*TRAIN_BINDINGS, binding])
  message = str(error.value)
  assert message.startswith(f'--gin.{binding.partition("=")[0]}')
  assert complaint in message
  assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
  'binding',
  [
    'LEARNING_RATE=1',
    'LEARNING_RATE_BY_PATH=None',
    "LEARNING_RATE_BY_PATH={'x': 1, 'y': 0.5}",
    'LENGTH_BUCKETS=[(8, 8), [16, 16]]',
    'OPTIMIZER=@second/lion()',
    'KEEP_CHECKPOINTS=None',
    'adamw.learning_rate=0.5',
    "MeshConfig.slm_rules={'embed': None, 'batch': ('data', 'fsdp')}",
  ],
)
def test_a_value_of_any_type_that_is_allowed_is_taken(binding):
  gin_config.parse_config(TRAIN, [*TRAIN_BINDINGS, binding])


def test_macros_in_macros_are_seen_through_and_named_where_they_are_set(write):
  path = write('a.gin', "SIZE = 'big'\nBATCH_SIZE = %SIZE\n")
  with pytest.raises(ValueError, match="a.gin:1: SIZE='big' .train.batch_size"):
    gin_config.parse_config([*TRAIN, path], TRAIN_BINDINGS)


def test_lengths_and_numbers_out_of_range_are_refused_by_name():
  lengths = {'inputs': 8, 'targets': 8}
  gin_config.check_lengths(lengths)
  with pytest.raises(ValueError, match="lacks 'targets': expected tokens of"):
    gin_config.check_lengths({'inputs': 8})
  with pytest.raises(ValueError, match=r"TASK_FEATURE_LENGTHS\['inputs'\]=0"):
    gin_config.check_lengths(lengths | {'inputs': 0})
  with pytest.raises(ValueError, match='BATCH_SIZE=2147483648: .* integer up'):
    gin_config.check_positive(BATCH_SIZE=2**31)
  with pytest.raises(ValueError, match='Z_LOSS=-1: expected a number from 0.'):
    gin_config.check_between(0, float('inf'), Z_LOSS=-1)


def test_a_call_that_needs_itself_is_refused():
  gin_config.parse_config([], ['fit.model_dir=@fit()'])
  with pytest.raises(ValueError, match=r'bound within itself.* fit -> fit\.'):
    gin_config.check_required(fit)
