# SPDX-License-Identifier: Apache-2.0
"""Laws of the wheel, its requirements, and packages that may be missing."""

import functools
import importlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile

import forked
import gin
import pytest
import tiny_runs
from packaging import requirements

import l2s_jax
from l2s_jax import __main__ as command_line
from l2s_jax.runtime import extras

ROOT = tiny_runs.ROOT
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
# Modules of packages that have another name.
DISTRIBUTIONS = {
  'apache_beam': 'apache-beam',
  'onnx_ir': 'onnx-ir',
  'rouge_score': 'rouge-score',
  'tensorflow_datasets': 'tensorflow-datasets',
  'tensorflow_text': 'tensorflow-text',
}


def extra(name):
  """Returns the requirements of an extra, those of extras in it too."""
  found: dict[str, requirements.Requirement] = {}
  for line in PROJECT['optional-dependencies'][name]:
    requirement = requirements.Requirement(line)
    if requirement.name == 'l2s_jax':
      for inner in requirement.extras:
        found |= extra(inner)
    else:
      found[requirement.name] = requirement
  return found


def core():
  found = map(requirements.Requirement, PROJECT['dependencies'])
  return {requirement.name: requirement for requirement in found}


def read(name):
  """Returns the requirements of a file, those of files in it too."""
  found: dict[str, requirements.Requirement] = {}
  for line in (ROOT / name).read_text().splitlines():
    text = line.partition('#')[0].strip()
    if text.startswith('-r '):
      found |= read(text.removeprefix('-r '))
    elif text:
      requirement = requirements.Requirement(text)
      found[requirement.name] = requirement
  return found


@pytest.mark.parametrize(
  ('file', 'expected'),
  [
    ('requirements.txt', core() | extra('quickstart')),
    (
      'requirements-tpu.txt',
      core() | extra('quickstart') | extra('tpu') | extra('gcs'),
    ),
    ('requirements-beam.txt', extra('beam')),
    ('requirements-dev.txt', core() | extra('dev')),
  ],
)
def test_requirements_and_extras_agree(file, expected):
  found = read(file)
  assert found.keys() == expected.keys()
  for name, requirement in found.items():
    pins = re.findall(r'==([\d.]+)$', str(requirement.specifier))
    if pins and requirement.specifier != expected[name].specifier:
      assert pins[0] in expected[name].specifier, name  # One build of it.
    else:
      assert str(requirement) == str(expected[name])


@pytest.mark.parametrize('module', extras.EXTRAS)
def test_the_extra_of_a_module_has_its_package(module):
  name = DISTRIBUTIONS.get(module, module)
  assert name in extra(extras.EXTRAS[module])
  assert name not in core()


def test_a_module_is_hidden_unless_it_was_imported_before():
  sys.modules.pop('colorsys', None)
  with extras.hidden('colorsys'), pytest.raises(ImportError):
    importlib.import_module('colorsys')
  module = importlib.import_module('colorsys')
  with extras.hidden('colorsys'):
    assert importlib.import_module('colorsys') is module
  assert sys.modules['colorsys'] is module


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
  extras.require('x', 'seqio')
  monkeypatch.setitem(sys.modules, 'gguf', None)
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError) as error:
    extras.require('x', 'torch', 'seqio', 'gguf', instead='Or do without.')
  assert str(error.value) == (
    "x needs torch and gguf, which are not installed: pip install 'l2s_jax"
    "[gguf,hf]' (in a clone: pip install '.[gguf,hf]'). Or do without."
  )


@gin.configurable(module='test_packaging')
def import_it(name, dry_run=False):
  """A verb that imports a module."""
  importlib.import_module(name)


@pytest.mark.parametrize(
  ('module', 'message'),
  [
    ('sacrebleu.metrics', 'try needs sacrebleu, which is not installed: pip'),
    ('no_such_module', None),  # A bug keeps its traceback.
  ],
)
def test_a_verb_names_the_package_that_it_lacks(
  module, message, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, module, None)
  monkeypatch.setitem(sys.modules, module.partition('.')[0], None)
  verbs = {'try': command_line.Verb(__name__, 'import_it', '', '')}
  run = functools.partial(
    command_line.main,
    ['try', f'--gin.import_it.name={module}'],
    verbs=verbs,
    configurable_modules=(),
  )
  if message is None:
    with pytest.raises(ModuleNotFoundError):
      run()
  else:
    assert run() == 2
    assert message in capsys.readouterr().err


def test_importing_the_package_imports_nothing_heavy():
  code = (
    'import sys, time; start = time.process_time(); import l2s_jax\n'
    'print(time.process_time() - start, *sys.modules)'
  )
  output = subprocess.check_output(
    [sys.executable, '-c', code], text=True, cwd=ROOT
  )
  secs, *modules = output.split()
  assert float(secs) < 0.2
  assert not {'jax', 'numpy', 'gin', 'flax'} & set(modules)


def test_verbs_import_no_optional_package_before_they_need_it():
  code = (
    'import importlib, sys\n'
    'from l2s_jax import __main__ as command_line\n'
    'for name in command_line.CONFIGURABLE_MODULES:\n'
    '  importlib.import_module(name)\n'
    'from l2s_jax.runtime import extras\n'
    'print(*(name for name in extras.EXTRAS if name in sys.modules))'
  )
  output = subprocess.check_output(
    [sys.executable, '-c', code], text=True, cwd=ROOT
  )
  assert not output.split()


# --- the wheel ---


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Returns the wheel, built from a copy of what git knows."""
  folder = tmp_path_factory.mktemp('dist')
  subprocess.run(
    [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-build-isolation']
    + ['--no-deps', '--no-index', '--disable-pip-version-check']
    + ['--wheel-dir', str(folder), str(ROOT)],
    check=True,
  )
  (path,) = folder.glob('*.whl')
  return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """Returns the folder that the wheel was installed into."""
  folder = tmp_path_factory.mktemp('installed')
  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index']
    + ['--disable-pip-version-check', '--no-compile']
    + ['--target', str(folder), str(wheel)],
    check=True,
  )
  return folder


def test_the_wheel_has_all_modules_and_gin_files(wheel):
  expected = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'l2s_jax').rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  } | {
    f'l2s_jax/{path.relative_to(ROOT).as_posix()}'
    for path in (ROOT / 'gin_configs').rglob('*.gin')
  }
  names = set(zipfile.ZipFile(wheel).namelist())
  assert 'l2s_jax/py.typed' in names
  assert {name for name in names if '.dist-info/' not in name} == expected
  assert wheel.name.startswith(f'l2s_jax-{l2s_jax.__version__}-')


def test_the_console_command_infers_outside_the_clone(installed, tmp_path):
  kept = ROOT / 'tests' / 'kept_runs' / '1'
  (tmp_path / 'mine.gin').write_text("include 'gin_configs/runs/infer.gin'\n")
  (tmp_path / 'prompts.txt').write_text('one\ntwo\n')
  result = subprocess.run(
    [installed / 'bin' / 'l2s_jax', 'infer', '--gin_file=mine.gin']
    + ['--gin.INPUT=prompts.txt', '--gin.INFER_OUTPUT_DIR=answers']
    + [f'--gin.CHECKPOINT_PATH={kept / "llm"}', '--gin.MAX_DECODE_LEN=4'],
    cwd=tmp_path,
    env=forked.environment() | {'PYTHONPATH': str(installed)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  lines = (tmp_path / 'answers' / 'predictions.jsonl').read_text().splitlines()
  assert [json.loads(line)['prompt'] for line in lines] == ['one', 'two']


@pytest.mark.parametrize('name', ['l2s_jax', 'python -m l2s_jax'])
def test_usage_lines_and_hints_name_the_command(name, installed, tmp_path):
  module = [sys.executable, '-m', 'l2s_jax']
  argv = [str(installed / 'bin' / name)] if name == 'l2s_jax' else module
  run = functools.partial(
    subprocess.run,
    cwd=tmp_path,
    env=forked.environment() | {'PYTHONPATH': str(installed)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  overview = run([*argv, '--help']).stdout
  assert overview.startswith(f'usage: {name} VERB ')
  assert f'\n{name} VERB --help: ' in overview
  usage = run([*argv, 'report', '--help']).stdout
  assert usage.startswith(f'usage: {name} report RUN ')
  assert f'example:\n  {name} report runs/llm ' in usage
  mistaken = run([*argv, 'report', 'runs/llm', '--outptu=x']).stderr
  assert mistaken.startswith(f'usage: {name} report RUN ')
  hint = run([*argv, 'cache', '--show=1', '--gin.CACHE_DIR=missing'])
  assert hint.returncode == 2
  assert f'Run `{name} cache` with this CACHE_DIR' in hint.stderr
