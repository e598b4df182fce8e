# SPDX-License-Identifier: Apache-2.0
"""Reads gin files and command-line bindings, and checks them as one whole.

Gin does the binding. This module finds the files, reads values as a shell
passes them, and refuses what gin lets through until the middle of a run (or
for good): a misspelt macro, a macro that nothing reads, a value the user must
set and did not. It registers no configurables; each module does so itself,
and must have been imported before. Two of gin's words are used throughout: a
*macro* is a name bound on its own (`TRAIN_STEPS = 10`) and read as
`%TRAIN_STEPS`; a *configurable* is a function or class whose parameters gin
binds (`train.train_steps = %TRAIN_STEPS`).
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import os
import pathlib
import re
import tokenize
import types
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, TextIO

import gin

from l2s_jax.runtime import files as files_lib
from l2s_jax.runtime import gin_internals, gin_types, t5x_names

# Has the folder `gin_configs`: the installed package, or else the clone.
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
REPO_ROOT = _PACKAGE if (_PACKAGE / 'gin_configs').is_dir() else _PACKAGE.parent

# Numbers of rows, tokens and steps are 32-bit integers on devices.
LARGEST = 2**31 - 1

_MACRO = 'gin.macro'
_REQUIRED = '%gin.REQUIRED'
# Names of macros and parameters whose texts are paths.
_OF_PATHS = re.compile('(path|dirs?|files?|input|vocabulary)$', re.IGNORECASE)

# Scope, full name of the configurable, parameter. A macro is a scope of gin's
# own configurable `gin.macro(value)`.
_Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class ParsedConfig:
  """Result of `parse_config`. The bindings are in gin's global state.

  Attributes:
    files: all gin files in reading order, including included ones.
    assumed_strings: strings of command-line bindings whose value gin cannot
      parse, by name.
    unread_macros: `FILE:LINE` of macros that are bound in files but not read,
      by name. Another verb may read them.
    required: `FILE:LINE` of macros and parameters bound to `%gin.REQUIRED`, by
      name. `check_required` refuses those that a call needs.
  """

  files: tuple[pathlib.Path, ...]
  assumed_strings: dict[str, str]
  unread_macros: dict[str, str]
  required: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Reference:
  """A `@name`, `@name()` or `%name` as written, not yet looked up."""

  name: str
  kind: str


class _Delegate(gin_internals.ParserDelegate):
  """Keeps references as written, so that looking up can name their line."""

  def configurable_reference(self, scoped_name, evaluate):
    return _Reference(scoped_name, '@()' if evaluate else '@')

  def macro(self, name):
    return _Reference(name, '%')


def parse_config(
  gin_files: Iterable[str] = (),
  bindings: Iterable[str] = (),
  search_paths: Sequence[str] = (),
) -> ParsedConfig:
  """Clears gin, binds files, then `bindings`, and locks the config.

  Args:
    gin_files: paths, absolute or looked up (as are the files they include) in
      the working directory, then `search_paths`, then `REPO_ROOT`.
    bindings: `NAME=VALUE`, for a macro or for a parameter
      (`scope/configurable.parameter`). A VALUE that is not a gin value is
      taken as a string, so that MODEL_DIR=runs/x needs no quotes.

  Raises:
    FileNotFoundError: if a file is in none of these places.
    ValueError: naming file and line (or flag) and near misses, if a line does
      not parse; a module cannot be imported; a configurable or parameter does
      not exist; a macro is read and not bound, or was bound in `bindings` and
      is not read; or the value of a parameter of this package does not
      match its annotation.
  """
  gin.clear_config()
  roots = [pathlib.Path.cwd(), *map(pathlib.Path, search_paths), REPO_ROOT]
  files: list[pathlib.Path] = []
  bound: dict[_Key, gin_types.Bound] = {}

  def bind(statement: Any, source: str) -> None:
    if isinstance(statement, gin_internals.ImportStatement):
      _import_module(statement, source)
    elif isinstance(statement, gin_internals.BindingStatement):
      key = _binding_key(statement, source)
      name = _display_name(key)
      value = _resolve(statement.value, source, bool(_OF_PATHS.search(name)))
      bound[key] = gin_types.Bound(name, value, source)

  for name in gin_files:
    for source, statement in _read_file(name, '--gin_file', roots, files):
      bind(statement, source)
  assumed_strings = {}
  for binding in bindings:
    statement, is_assumed = _parse_flag(binding)
    source = f'--gin.{binding.partition("=")[0]}'
    bind(statement, source)
    if is_assumed:
      assumed_strings[source.removeprefix('--gin.')] = statement.value

  unread_macros = _check_macros(bound)
  if problems := gin_types.problems(bound):
    raise ValueError('\n'.join(problems))
  required = {}
  for key, found in bound.items():
    value = found.value
    if _is_required(value):
      required[found.name] = found.source
      value = gin.REQUIRED  # Of a reference to it gin complains in any case.
    gin.bind_parameter(key, value)
  gin.finalize()
  return ParsedConfig(tuple(files), assumed_strings, unread_macros, required)


def check_required(
  fn: Callable[..., Any],
  given: Collection[str] = (),
  required: Mapping[str, str] = types.MappingProxyType({}),
  others: Iterable[Callable[..., Any]] = (),
) -> None:
  """Checks that a call of `fn` finds all its arguments, however deep.

  Args:
    fn: a configurable. Those it calls through bound `@name()` are checked too.
    given: parameters that the caller of `fn` passes.
    required: `ParsedConfig.required`.
    others: configurables that are not called; macros that only they read may be
      missing.

  Raises:
    ValueError: listing each parameter without default that nothing binds, and
      each macro that is left to the user; or if a call would need itself.
  """
  missing = list(dict.fromkeys(_missing_parameters(fn, [], given)))
  of_others = {name for fn in others for name in _missing_parameters(fn, [])}
  left = [
    f'{source}: {name} must be set: add --gin.{name}=VALUE.'
    for name, source in required.items()
    if name in missing or name not in of_others
  ]
  if left:
    raise ValueError('\n'.join(left))
  if missing:
    raise ValueError(
      'nothing binds these parameters, which have no default:\n'
      + '\n'.join(f'  {name}' for name in missing)
      + '\nAdd the gin file that does (--gin_file=...; a run also needs a '
      f'model, a task and a mesh), or --gin.{missing[0]}=VALUE.'
    )


def check_positive(**values: int | None) -> None:
  """Checks that numbers are positive integers, or None.

  Args:
    **values: by the name to complain about.

  Raises:
    ValueError: listing those that are not.
  """
  wrong = [
    f'{name}={value!r}'
    for name, value in values.items()
    if value is not None
    and (
      not isinstance(value, int)
      or isinstance(value, bool)
      or not 1 <= value <= LARGEST
    )
  ]
  if wrong:
    is_large = any(
      isinstance(value, int) and value > LARGEST for value in values.values()
    )
    most = f' up to {LARGEST}' if is_large else ''
    raise ValueError(f'{", ".join(wrong)}: expected a positive integer{most}.')


def check_between(
  low: int | float, high: int | float, **values: int | float
) -> None:
  """Checks that numbers are from `low` to `high`.

  Args:
    low: the least that is allowed.
    high: the most; infinity for no limit.
    **values: by the name to complain about.

  Raises:
    ValueError: listing those that are not.
  """
  wrong = [
    f'{name}={value!r}'
    for name, value in values.items()
    if not low <= value <= high
  ]
  if wrong:
    limits = f'from {low}' if high == math.inf else f'from {low} to {high}'
    raise ValueError(f'{", ".join(wrong)}: expected a number {limits}.')


def check_lengths(task_feature_lengths: Mapping[str, int]) -> None:
  """Checks the keys and values of TASK_FEATURE_LENGTHS.

  Raises:
    ValueError: if the length of prompts or answers is missing or not positive.
  """
  missing = [
    name for name in ('inputs', 'targets') if name not in task_feature_lengths
  ]
  if missing:
    raise ValueError(
      f'TASK_FEATURE_LENGTHS={dict(task_feature_lengths)} lacks '
      f'{" and ".join(map(repr, missing))}: expected tokens of prompt and '
      "answer, such as {'inputs': 128, 'targets': 128}."
    )
  check_positive(
    **{
      f'TASK_FEATURE_LENGTHS[{name!r}]': length
      for name, length in task_feature_lengths.items()
    }
  )


def config() -> str:
  """Returns all that is bound, as the text of a gin file."""
  return gin.config_str()


def operative_config() -> str:
  """Returns the operative config of all calls so far as the text of a gin file.

  Parsed again, it gives those calls the same arguments; those that gin cannot
  write down (arrays, functions without a gin name) are left out.
  """
  return gin.operative_config_str()


def save_operative_config(path: pathlib.Path) -> None:
  """Writes the operative config to a file, atomically."""
  with files_lib.whole(path) as file:
    file.write(operative_config())


def near_misses(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean A or B?`, or `.` where nothing known is near."""
  by_lower = {candidate.lower(): candidate for candidate in sorted(known)}
  close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
  if not close:
    return '.'
  return f'; did you mean {" or ".join(by_lower[name] for name in close)}?'


def expand_home(text: str) -> str:
  """Returns a path that begins with `~/` with the home folder in its place.

  Shells leave `~` as it is within a flag.
  """
  return os.path.expanduser(text) if text.startswith('~/') else text


def _read_file(
  name: str,
  asked_by: str,
  roots: Sequence[pathlib.Path],
  files: list[pathlib.Path],
  including: tuple[pathlib.Path, ...] = (),
) -> Iterator[tuple[str, Any]]:
  """Yields the statements of a file and its includes, each with its source.

  Args:
    asked_by: the flag or line that names the file, for errors.
    files: receives the path of every file read.
    including: the files that are open around this one.
  """
  path = _find_file(name, asked_by, roots)
  if path in including:
    raise ValueError(f'{asked_by}: {name} includes itself; break the circle.')
  files.append(path)
  label = os.path.relpath(path) if path.is_relative_to(roots[0]) else str(path)
  with open(path, encoding='utf-8') as file:
    statements = _parse(file, label)
  for statement in statements:
    source = f'{label}:{statement.location.line_num}'
    if isinstance(statement, gin_internals.IncludeStatement):
      yield from _read_file(
        statement.filename, source, roots, files, (*including, path)
      )
    else:
      yield source, statement


def _find_file(
  name: str, asked_by: str, roots: Sequence[pathlib.Path]
) -> pathlib.Path:
  """Returns the first of the candidates for `name` that is a file."""
  for root in roots:
    path = root / name  # An absolute name stays as it is.
    if path.is_file():
      return path.resolve()
  known = {
    str(path) if os.path.isabs(name) else os.path.relpath(path, root)
    for root in roots
    for path in (
      *(root / name).parent.glob('*.gin'),
      *root.glob('gin_configs/**/*.gin'),
    )
  }
  same_file_name = sorted(path for path in known if path.endswith(f'/{name}'))
  hint = near_misses(name, known)
  if same_file_name:
    hint = f'; did you mean {" or ".join(same_file_name)}?'
  if any((root / name).is_dir() for root in roots):
    raise FileNotFoundError(f'{asked_by}: {name} is a folder; give a gin file.')
  places = ', '.join(dict.fromkeys(str(root) for root in roots))
  raise FileNotFoundError(f'{asked_by}: no gin file {name!r} in {places}{hint}')


def _parse(text: str | TextIO, label: str) -> list[Any]:
  """Returns the statements of a file or string, as gin's parser has them."""
  try:
    return list(gin_internals.ConfigParser(text, _Delegate()))
  except SyntaxError as error:
    # Gin's message repeats Python's on a line of its own before its own.
    message = (error.msg or '').splitlines()[-1].strip()
    if message.startswith('Failed to parse token'):
      message += '; a string needs quotes, a macro %, a configurable @'
    line = (error.text or '').rstrip()
    raise ValueError(
      f'{label}:{error.lineno}: {message}\n    {line.lstrip()}'
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(f'{label} is not UTF-8: {error}; convert it.') from error
  except (TypeError, RecursionError, MemoryError) as error:
    raise ValueError(
      f'{label}: {error or type(error).__name__}; a value is nested too deep, '
      'or a list or dict is the key of a dict.'
    ) from error
  except tokenize.TokenError as error:
    message, (line_number, _) = error.args
    raise ValueError(
      f'{label}:{line_number}: {message}; is a bracket or quote open?'
    ) from error


def _parse_flag(binding: str) -> tuple[Any, bool]:
  """Returns the statement of `NAME=VALUE`, and whether VALUE became a str."""
  name, equals, value = binding.partition('=')
  flag = f'--gin.{name}'
  if not equals or not name:
    raise ValueError(f'{flag}: write it in one word: --gin.NAME=VALUE.')
  if not value:
    raise ValueError(
      f'{flag}= has no value; is a variable of the shell unset? An empty '
      f'string is {flag}="\'\'".'
    )
  python_spelling = {'true': 'True', 'false': 'False', 'none': 'None'}
  if value in python_spelling:
    raise ValueError(
      f'{flag}={value}: write {python_spelling[value]}, or, if it is meant as '
      f'a string, {flag}="\'{value}\'".'
    )
  try:
    statements = _parse(f'{name} = {value}', flag)
  except ValueError:
    if value.startswith(('"', "'", '(', '[', '{', '@', '%')):
      raise
    statements = []
  if len(statements) == 1:
    return statements[0], False
  (statement,) = _parse(f'{name} = {value!r}', flag)
  return statement, True


def _import_module(
  statement: gin_internals.ImportStatement, source: str
) -> None:
  if statement.module.startswith('__gin__.'):
    raise ValueError(
      f'{source}: {statement.format()!r} is not supported: import the module '
      'that registers the configurable (@gin.configurable), then use its name.'
    )
  try:
    importlib.import_module(statement.module)
  except ModuleNotFoundError as error:
    raise ValueError(
      f'{source}: cannot import {statement.module}: {error}. Install it, or '
      'put its folder on PYTHONPATH.'
    ) from error
  gin.parse_config(statement.format())  # The operative config repeats it.


def _lookup(selector: str, source: str) -> Callable[..., Any]:
  """Returns the configurable of that full or partial name."""
  try:
    return gin.get_configurable(selector)
  except KeyError as error:  # More than one matches.
    raise ValueError(f'{source}: {error.args[0]}') from error
  except ValueError as error:
    known = [
      gin_internals.minimal_name(name) for name, _ in gin_internals.registered()
    ]
    raise ValueError(
      f'{source}: no configurable is named {selector!r}'
      f'{near_misses(selector, known)} (If it is in a module of your own, '
      '`import` that module in the gin file.)'
    ) from error


def _binding_key(
  statement: gin_internals.BindingStatement, source: str
) -> _Key:
  """Returns the key that a statement binds, or says why there is none."""
  scope, selector, parameter = statement[:3]
  if not parameter:
    return f'{scope}/{selector}'.lstrip('/'), _MACRO, 'value'
  fn = _lookup(selector, source)
  try:
    key = gin_internals.ParsedBindingKey.parse((scope, selector, parameter))
  except ValueError as error:
    call = fn.__init__ if inspect.isclass(fn) else fn
    parameters = [n for n in inspect.signature(call).parameters if n != 'self']
    if parameter in parameters:
      raise ValueError(f'{source}: {error}') from error
    raise ValueError(
      f'{source}: {selector} has no parameter {parameter!r}'
      f'{near_misses(parameter, parameters)} It has: {", ".join(parameters)}.'
    ) from error
  return key.scope, key.complete_selector, parameter


def _display_name(key: _Key) -> str:
  """Returns the key as a gin file and `--gin.` write it."""
  scope, selector, parameter = key
  if selector == _MACRO:
    return scope
  selector = gin_internals.minimal_name(selector)
  return f'{scope}/{selector}.{parameter}'.lstrip('/')


def _resolve(value: Any, source: str, is_path: bool) -> Any:
  """Returns `value` with references as gin has them, and homes of paths."""
  if isinstance(value, dict):
    return {
      _resolve(key, source, False): _resolve(item, source, is_path)
      for key, item in value.items()
    }
  if isinstance(value, list | tuple):
    return type(value)(_resolve(item, source, is_path) for item in value)
  if isinstance(value, str) and is_path:
    return expand_home(value)
  if not isinstance(value, _Reference):
    return value
  delegate = gin_internals.ReferenceMaker()
  if value.kind == '%':
    return delegate.macro(value.name)
  _lookup(value.name.rpartition('/')[2], source)
  return delegate.configurable_reference(value.name, value.kind == '@()')


def _check_macros(bound: dict[_Key, gin_types.Bound]) -> dict[str, str]:
  """Raises on macros misspelt or left to the user; returns the unread ones."""
  macros = {
    binding.name: binding
    for (_, selector, _), binding in bound.items()
    if selector == _MACRO
  }
  read: dict[str, str] = {}
  for binding in bound.values():
    for reference in gin_internals.iterate_references([binding.value]):
      if reference.configurable.selector == _MACRO:
        read.setdefault('/'.join(reference.scopes), binding.source)

  problems = [
    f'{source}: %{name} is bound nowhere{near_misses(name, macros)} '
    f'Set it with --gin.{name}=VALUE, or add the gin file that binds it'
    f'{_files_that_bind(name, ": {}")}.'
    for name, source in read.items()
    if name not in macros
  ]
  problems += [
    f'{macros[name].source}: {name} is bound to itself: break the circle.'
    for name in macros
    if _is_circular(name, macros)
  ]
  unread = {name: macros[name].source for name in macros if name not in read}
  problems += [
    f'{source}: nothing reads {name}{near_misses(name, read)}'
    f'{t5x_names.answer(name, t5x_names.MACROS)}'
    f'{_files_that_bind(name, " A setting of {}.")} '
    f'These macros are read: {", ".join(sorted(read)) or "none"}.'
    for name, source in unread.items()
    if source.startswith('--gin.')
  ]
  if problems:
    raise ValueError('\n'.join(problems))
  return unread


def _files_that_bind(name: str, words: str) -> str:
  """Returns `words` with the gin files of this package that bind a macro."""
  line = re.compile(f'^{re.escape(name)} =', re.MULTILINE)
  found = sorted(
    str(path.relative_to(REPO_ROOT))
    for path in REPO_ROOT.glob('gin_configs/*/*.gin')
    if line.search(path.read_text(encoding='utf-8'))
  )
  return words.format(' or '.join(found[:3])) if found else ''


def _is_circular(name: str, macros: Mapping[str, gin_types.Bound]) -> bool:
  """Whether a macro's value holds, however deep, the macro."""
  seen: set[str] = set()
  left = [name]
  while left:
    for reference in gin_internals.iterate_references(
      [macros[left.pop()].value]
    ):
      found = '/'.join(reference.scopes)
      if reference.configurable.selector != _MACRO or found not in macros:
        continue
      if found == name:
        return True
      if found not in seen:
        seen.add(found)
        left.append(found)
  return False


def _is_required(value: Any) -> bool:
  references = gin_internals.iterate_references([value])
  return any(repr(reference) == _REQUIRED for reference in references)


def _missing_parameters(
  fn: Callable[..., Any],
  scope: list[str],
  given: Collection[str] = (),
  callers: tuple[str, ...] = (),
) -> Iterator[str]:
  """Yields `scope/configurable.parameter` of a call's missing parameters."""
  with gin.config_scope(scope):
    bindings = gin.get_bindings(fn, resolve_references=False)
  name = f'{"/".join(scope)}/{fn.__name__}'.lstrip('/')
  if name in callers:
    raise ValueError(
      f'@{name}() is bound within itself: break the circle '
      f'{" -> ".join((*callers[callers.index(name) :], name))}.'
    )
  for parameter in inspect.signature(fn).parameters.values():
    value = bindings.get(parameter.name, parameter.default)
    has_value = (
      parameter.name in given
      or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
      or all(value is not x for x in (parameter.empty, gin.REQUIRED))
    )
    if not has_value:
      is_macro = fn is gin_internals.macro
      yield '/'.join(scope) if is_macro else f'{name}.{parameter.name}'
  for reference in gin_internals.iterate_references(
    [value for key, value in bindings.items() if key not in given]
  ):
    if reference.evaluate:
      yield from _missing_parameters(
        reference.configurable.wrapped,
        reference.scopes or scope,
        callers=(*callers, name),
      )
