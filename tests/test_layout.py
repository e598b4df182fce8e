# SPDX-License-Identifier: Apache-2.0
"""Laws of the source tree, beside the contracts of pyproject.toml."""

import ast
import pathlib
import re

import pytest

import l2s_jax

PACKAGE = pathlib.Path(l2s_jax.__file__).parent
MODULES = sorted(
  path for path in PACKAGE.rglob('*.py') if path.parent != PACKAGE
)

MAY_IMPORT_LINEN = ('models/', 'runtime/partitioning.py', 'interop/t5x.py')
TENSORFLOW = ('tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio')
# These import TensorFlow; the rest imports them inside functions.
WITH_TENSORFLOW = (
  'data/features.py',
  'evaluation/seqio_evaluator.py',
  'interop/t5x.py',
)


def place(path):
  return path.relative_to(PACKAGE).as_posix()


def imports(path, *, top_level_only=False):
  """Yields what a module imports, as dotted names."""
  tree = ast.parse(path.read_text(encoding='utf-8'))
  for node in tree.body if top_level_only else ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def public_modules(package):
  """Returns the names in a package's `__all__`."""
  tree = ast.parse((package / '__init__.py').read_text(encoding='utf-8'))
  (names,) = (
    ast.literal_eval(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign)
    and ast.unparse(node.targets[0]) == '__all__'
  )
  return names


PACKAGES = sorted({path.parent for path in MODULES})


@pytest.mark.parametrize('package', PACKAGES, ids=place)
def test_a_package_says_what_is_in_it(package):
  tree = ast.parse((package / '__init__.py').read_text(encoding='utf-8'))
  assert len(ast.get_docstring(tree) or '') > 50
  for name in public_modules(package):
    assert (package / f'{name}.py').is_file(), name


@pytest.mark.parametrize('path', MODULES, ids=place)
def test_imports_cross_packages_by_their_public_modules(path):
  for imported in imports(path):
    parts = imported.split('.')
    if parts[0] != 'l2s_jax':
      continue
    package = PACKAGE
    for name in parts[1:]:
      if (package / name).is_dir():
        package = package / name
        continue
      if path.parent != package and (package / f'{name}.py').is_file():
        assert name in public_modules(package), imported
      break


@pytest.mark.parametrize('path', MODULES, ids=place)
def test_linen_is_imported_by_models_alone(path):
  if place(path).startswith(MAY_IMPORT_LINEN):
    return
  for imported in imports(path):
    assert not imported.startswith('flax.linen'), place(path)


@pytest.mark.parametrize('path', MODULES, ids=place)
def test_tensorflow_is_imported_when_it_is_needed(path):
  if place(path) in WITH_TENSORFLOW:
    return
  late = tuple(
    'l2s_jax.' + name.removesuffix('py').replace('/', '.')
    for name in WITH_TENSORFLOW
  )
  for imported in imports(path, top_level_only=True):
    assert imported.split('.')[0] not in TENSORFLOW, imported
    assert not f'{imported}.'.startswith(late), imported


def test_no_two_public_classes_share_a_name():
  """Nor does a type alias, but for `Metric = corpus.Metric`."""
  places: dict[str, list[str]] = {}
  classes = set()
  for path in MODULES:
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
        classes.add(node.name)
        places.setdefault(node.name, []).append(place(path))
      elif isinstance(node, ast.Assign):
        imported = getattr(node.value, 'attr', None)
        for target in node.targets:
          if isinstance(target, ast.Name) and target.id != imported:
            places.setdefault(target.id, []).append(place(path))
  shared = {name: places[name] for name in classes if len(places[name]) > 1}
  assert not shared


def test_no_two_modules_of_a_package_differ_by_an_ending():
  for package in PACKAGES:
    stems: dict[str, str] = {}
    for path in package.glob('*.py'):
      stem = re.sub(r'(ation|ing|er|or|ed|es?|s)$', '', path.stem)
      assert stem not in stems, (place(path), stems[stem])
      stems[stem] = place(path)


@pytest.mark.parametrize('path', MODULES, ids=place)
def test_a_function_is_read_in_one_look(path):
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.FunctionDef):
      body = node.body[ast.get_docstring(node) is not None :] or node.body
      num_lines = 1 + (body[-1].end_lineno or 0) - body[0].lineno
      assert num_lines <= 60, node.name
