# SPDX-License-Identifier: Apache-2.0
"""Laws of README.md, CONTRIBUTING.md and the pages of docs/.

`mkdocs build --strict` in launch/test.sh checks the links between pages, and
what docstrings say of arguments.
"""

import ast
import importlib
import pathlib
import re
import shlex

import gin
import pytest
import yaml

from l2s_jax import __main__ as command_line
from l2s_jax.runtime import gin_config

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = [
  *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')),
  *sorted((ROOT / '.github').rglob('*.md')),
  *sorted(DOCS.rglob('*.md')),
]
COMMAND = re.compile(r'(?:python -m )?l2s_jax ([a-z]+ .*)')

for module in command_line.CONFIGURABLE_MODULES:
  importlib.import_module(module)


def name(page):
  return page.relative_to(ROOT).as_posix()


def commands(page):
  """Yields the command lines of a page's indented blocks, without prompts."""
  text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
  for line in text.splitlines():
    found = COMMAND.search(line)
    is_whole = not re.search(r'\.\.\.|=TASK', line)
    if line.startswith('    ') and found and is_whole:
      yield shlex.split(found[1].rstrip(')'), comments=True)


COMMANDS = {
  f'{name(page)}-{argv[0]}-{number}': argv
  for page in PAGES
  for number, argv in enumerate(commands(page))
}


@pytest.fixture(autouse=True)
def clear_gin():
  yield
  gin.clear_config()


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_is_one_that_its_verb_takes(command):
  argv = COMMANDS[command]
  verb = command_line.VERBS[argv[0]]
  parser = command_line._parser(argv[0], verb)
  args, bindings = command_line._parse_args(parser, argv[1:])
  gin_config.parse_config(args.gin_file, bindings)


def test_commands_are_found():
  verbs = {argv[0] for argv in COMMANDS.values()}
  assert verbs == set(command_line.VERBS)


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_files_that_a_page_names_are_there(page):
  text = page.read_text(encoding='utf-8')
  links = re.findall(r'\]\(([\w./]+\.\w+)(?:#[\w-]+)?\)', text)
  missing = [link for link in links if not (page.parent / link).is_file()]
  named = re.findall(
    r'\b(?:gin_configs|l2s_jax|tests|launch)/[\w/]*\w\.(?:gin|py|sh|yaml)', text
  )
  missing += [
    path
    for path in named
    if '/NAME.' not in path and not (ROOT / path).is_file()
  ]
  assert not missing


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_lines_have_100_columns(page):
  lines = page.read_text(encoding='utf-8').splitlines()
  # A row of a table cannot be wrapped.
  assert not [x for x in lines if len(x) > 100 and not x.startswith('|')]


def test_every_page_is_in_the_navigation():
  def pages(entry):
    if isinstance(entry, str):
      yield entry
    else:
      for child in entry.values() if isinstance(entry, dict) else entry:
        yield from pages(child)

  text = (ROOT / 'mkdocs.yml').read_text(encoding='utf-8')
  found = list(pages(yaml.safe_load(text)['nav']))
  assert sorted(found) == sorted(
    page.relative_to(DOCS).as_posix() for page in DOCS.rglob('*.md')
  )


@pytest.mark.parametrize(
  'page',
  [p for p in sorted((DOCS / 'api').glob('*.md')) if p.stem != 'index'],
  ids=lambda page: page.stem,
)
def test_the_page_of_a_package_has_its_public_modules(page):
  root = ROOT / 'l2s_jax' / page.stem
  if not root.is_dir():  # The page of a module.
    assert root.with_suffix('.py').is_file()
    return
  expected = []
  for file in sorted(root.rglob('__init__.py')):
    package = '.'.join(file.parent.relative_to(ROOT).parts)
    (names,) = (
      ast.literal_eval(node.value)
      for node in ast.parse(file.read_text(encoding='utf-8')).body
      if isinstance(node, ast.Assign)
    )
    expected += [package, *(f'{package}.{name}' for name in names)]
  text = page.read_text(encoding='utf-8')
  assert sorted(re.findall('^::: (.*)', text, re.M)) == sorted(expected)


def test_every_package_has_a_page():
  packages = {p.parent.name for p in (ROOT / 'l2s_jax').glob('*/__init__.py')}
  assert packages <= {page.stem for page in (DOCS / 'api').glob('*.md')}
