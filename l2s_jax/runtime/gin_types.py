# SPDX-License-Identifier: Apache-2.0
"""Type checks of gin bindings against the annotations of configurables.

Gin binds values without checking types, so a wrong type would fail in the
middle of a run. Here a binding is compared with the annotation of its parameter
while the config is read. Values for unannotated parameters and for
configurables of other packages are accepted.
"""

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import gin

from l2s_jax.runtime import gin_internals

_PACKAGE = 'l2s_jax.'
_MACRO = 'gin.macro'
_UNIONS = (typing.Union, types.UnionType)
_SIMPLE = {
  bool: 'True or False',
  int: 'a whole number',
  float: 'a number',
  str: 'a string',
  types.NoneType: 'None',
}


class Bound(NamedTuple):
  """A gin binding.

  Attributes:
    name: name of the macro, or of the configurable and its parameter.
    value: the bound value; may hold gin references to macros and configurables.
    source: `FILE:LINE`, or the flag.
  """

  name: str
  value: Any
  source: str


def problems(bound: Mapping[tuple[str, str, str], Bound]) -> list[str]:
  """Returns a sentence for each binding of a wrong type.

  Args:
    bound: bindings by scope, full name of the configurable, and parameter. The
      bindings of macros have gin's configurable `macro`, with the macro's name
      as scope.
  """
  macros = {
    scope: entry
    for (scope, selector, _), entry in bound.items()
    if selector == _MACRO
  }
  found = []
  for (_, selector, parameter), entry in bound.items():
    expected = _annotation(selector, parameter)
    value = _Value(entry, macros)
    if expected is not inspect.Parameter.empty and not value.fits(expected):
      found.append(value.complaint(expected, entry.name))
  return list(dict.fromkeys(found))


def _annotation(selector: str, parameter: str) -> Any:
  """Returns the annotation of a parameter; `Parameter.empty` if none."""
  empty = inspect.Parameter.empty
  fn = gin_internals.configurable(selector)
  if not fn.__module__.startswith(_PACKAGE):
    return empty
  parameters = inspect.signature(fn).parameters
  return parameters[parameter].annotation if parameter in parameters else empty


class _Value:
  """A bound value with macros resolved."""

  def __init__(self, entry: Bound, macros: Mapping[str, Bound]):
    self._entry = entry
    self._macros = macros
    for _ in macros:  # This loop bounds the resolution of circular macros.
      name = _macro_name(self._entry.value)
      if name is None or name not in macros:
        break
      self._entry = macros[name]

  @property
  def _items(self) -> Iterator['_Value']:
    for item in self._entry.value:
      yield self._part(item)

  def _part(self, value: Any) -> '_Value':
    return _Value(self._entry._replace(value=value), self._macros)

  def complaint(self, expected: Any, parameter: str) -> str:
    name, value, source = self._entry
    via = '' if name == parameter else f' ({parameter})'
    flag = source.startswith('--gin.')
    place = source if flag else f'{source}: {name}'
    text = repr(value)
    if len(text) > 80:
      text = f'{text[:77]}...'
    expected = describe(expected)
    return f'{place}={text}{via}: expected {expected}{self._hint(expected)}.'

  def _hint(self, expected: str) -> str:
    value = self._entry.value
    if isinstance(value, str) and '@' in expected:
      names = [name for name, _ in gin_internals.registered()]
      if value in {name.rpartition('.')[2] for name in names}:
        return f'; write @{value}()'
    if _is_reference(value) and not value.evaluate:
      return f'; write {value!r}()'
    return ''

  def fits(self, expected: Any) -> bool:
    """Returns whether the value matches an annotated type."""
    value = self._entry.value
    if isinstance(expected, str | typing.TypeVar) or expected is Any:
      return True
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in _UNIONS:
      return any(self.fits(arg) for arg in args)
    if origin is typing.Annotated:
      return self.fits(args[0])
    if value is gin.REQUIRED or repr(value) == '%gin.REQUIRED':
      return True
    if _is_reference(value):
      return _reference_fits(value, expected)
    if origin is typing.Literal:
      return value in args
    if origin is collections.abc.Callable:
      return callable(value)
    if expected in (None, types.NoneType):
      return value is None
    if expected is int:
      return isinstance(value, int) and not isinstance(value, bool)
    if expected is float:
      return isinstance(value, int | float) and not isinstance(value, bool)
    kind = origin or expected
    if not isinstance(kind, type):
      return True
    if issubclass(kind, collections.abc.Mapping):
      return isinstance(value, dict) and (
        len(args) < 2
        or all(
          self._part(key).fits(args[0]) and self._part(item).fits(args[1])
          for key, item in value.items()
        )
      )
    if issubclass(kind, tuple | list) or kind is collections.abc.Sequence:
      if not isinstance(value, tuple | list):
        return False
      if kind is tuple and args and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(
          item.fits(arg) for item, arg in zip(self._items, args, strict=True)
        )
      return not args or all(item.fits(args[0]) for item in self._items)
    return isinstance(value, kind)


def _is_reference(value: Any) -> bool:
  return isinstance(value, gin_internals.ConfigurableReference)


def _macro_name(value: Any) -> str | None:
  is_macro = _is_reference(value) and value.configurable.selector == _MACRO
  return '/'.join(value.scopes) if is_macro else None


def _reference_fits(reference: Any, expected: Any) -> bool:
  """Returns whether `@name` or `@name()` matches an annotated type."""
  if _macro_name(reference) is not None:
    return True  # An unbound macro; reported elsewhere.
  kind = typing.get_origin(expected) or expected
  if not isinstance(kind, type):
    return True
  fn = reference.configurable.wrapped
  if not reference.evaluate:
    return kind is collections.abc.Callable or kind is type
  made = _made_by(fn)
  return made is None or issubclass(made, kind)


def _made_by(fn: Callable[..., Any]) -> type | None:
  """Returns the type a configurable returns; None if it is not annotated."""
  if isinstance(fn, type):
    return fn
  made = inspect.signature(fn).return_annotation
  made = typing.get_origin(made) or made
  if made is inspect.Signature.empty or not isinstance(made, type):
    return None
  return made


def describe(expected: Any) -> str:
  """Describes an annotated type in words."""
  origin, args = typing.get_origin(expected), typing.get_args(expected)
  if expected in _SIMPLE:
    return _SIMPLE[expected]
  if expected is None:
    return 'None'
  if origin in _UNIONS:
    words = [describe(arg) for arg in args]
    if 'None' in words:
      words = [*(word for word in words if word != 'None'), 'None']
    return ' or '.join(dict.fromkeys(words))
  if origin is typing.Literal:
    return ' or '.join(map(repr, args))
  kind = origin or expected
  if not isinstance(kind, type):
    return str(expected)
  if issubclass(kind, collections.abc.Mapping):
    example = {_example(args[0]): _example(args[1])} if args else {}
    return f'a dict such as {example}'
  if issubclass(kind, tuple | list) or kind is collections.abc.Sequence:
    if kind is tuple and args and args[-1] is not Ellipsis:
      return f'a tuple such as {tuple(map(_example, args))}'
    return f'a tuple such as {(_example(args[0]),) if args else ()}'
  makers = sorted(
    f'@{name.rpartition(".")[2]}()'
    for name, fn in gin_internals.registered()
    if name.startswith(_PACKAGE) and _made_by(fn) is kind
  )
  if not makers:
    return f'a {kind.__name__}'
  return ' or '.join(makers)


def _example(expected: Any) -> Any:
  """Returns an example value of an annotated type."""
  origin, args = typing.get_origin(expected), typing.get_args(expected)
  if origin in _UNIONS:
    return _example(args[0])
  if origin is not None and origin is not collections.abc.Mapping:
    if args[-1] is not Ellipsis and origin is tuple:
      return tuple(map(_example, args))
    return (_example(args[0]),)
  return {int: 8, float: 0.5, str: 'name', bool: True}.get(expected, '...')
