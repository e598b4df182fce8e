# SPDX-License-Identifier: Apache-2.0
"""The fastest form of int8 on this machine, by measurement.

On CPU the speed of integer products depends on the processor and on the library
that XLA has for it: with VNNI or AMX they are faster than float products, on
other processors they may be slower. A few products are timed at the first start
on a machine, and the times are kept in the folder of the compilation cache.
"""

import functools
import importlib.metadata
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.models import int8
from l2s_jax.runtime import chips, distributed, files, storage

AUTO = 'auto'
KINDS = (*config_lib.QUANTIZATIONS, AUTO)
# Forms of products of integers, whose results are equal.
_OF_INTEGERS = ('int8_dynamic', 'int8_left', 'int8_unsigned')
_CANDIDATES = {
  'int8': ('int8', *_OF_INTEGERS),
  'int8_dynamic': _OF_INTEGERS,
  AUTO: ('none', *_OF_INTEGERS),
}

# Milliseconds of a product by form, for each number of rows in `_ROWS`.
Milliseconds = Mapping[str, Sequence[float]]

_INPUTS, _OUTPUTS = 1024, 4096
# Rows of a product, and the number of such products in an answer: 128 tokens of
# a prompt at once, then 64 tokens one by one.
_ROWS = {128: 1, 1: 64}
_REPEATS = 20


def form(kind: str) -> str:
  """Returns the form of weights and products, see `TransformerConfig`.

  Args:
    kind: a form, or 'auto'. On CPU the fastest of several forms is taken: for
      'int8' one of all forms of int8, for 'int8_dynamic' one of those that
      round activations, for 'auto' one of these or 'none'. On other devices
      'auto' is 'none'.
  """
  if jax.default_backend() != 'cpu':
    return 'none' if kind == AUTO else kind
  return fastest(times(), _CANDIDATES[kind]) if kind in _CANDIDATES else kind


def chosen(kinds: Mapping[str, str]) -> dict[str, str]:
  """Returns the measured choices that change answers, by setting.

  Args:
    kinds: `quantization` and `llm_quantization`. Fixed forms are left out; the
      integer forms have equal results, and one name.
  """
  found = {}
  for name, kind in kinds.items():
    if kind in ('int8', AUTO):
      exact = form(kind)
      found[name] = 'int8_dynamic' if exact in _OF_INTEGERS else exact
  return found


def fastest(measured: Milliseconds, candidates: Sequence[str]) -> str:
  """Returns the form in which an answer takes the least time.

  Args:
    measured: from `times`.
    candidates: the forms to choose from.
  """

  def total(name: str) -> float:
    pairs = zip(_ROWS.values(), measured[name], strict=True)
    return sum(count * ms for count, ms in pairs)

  return min(candidates, key=total)


@functools.cache
def times() -> Milliseconds:
  """Returns the times of products on this machine, measured once."""
  found: dict[str, list[float]] | None = None
  if distributed.is_first():
    path = _path()
    found = None if path is None else _read(path)
    if found is None:
      found = measure()
      if path is not None:
        _write(path, found)
  result: dict[str, list[float]] = distributed.from_first(found)
  return result


def measure() -> dict[str, list[float]]:
  """Times a product in each form, in turns; returns the shortest of each."""
  kernel = np.sin(np.arange(_INPUTS * _OUTPUTS, dtype=np.float32))
  kernel = kernel.reshape(_INPUTS, _OUTPUTS)
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    packed = jax.jit(int8.pack, static_argnums=1)(kernel, (0,))
    operands = dict.fromkeys(config_lib.QUANTIZATIONS, packed)
    operands['none'] = jax.device_put(kernel)
    found: dict[str, list[float]] = {name: [] for name in operands}
    for rows in _ROWS:
      x = jax.device_put(kernel[:1, :_INPUTS].repeat(rows, 0)[None])
      calls = {
        name: functools.partial(_product(name), x, operand)
        for name, operand in operands.items()
      }
      for name, ms in _shortest(calls).items():
        found[name].append(ms)
  return found


def _product(name: str) -> Callable[[Any, Any], Any]:
  """Returns the compiled product of states and a kernel in a form."""
  if name == 'none':
    return jax.jit(lambda x, kernel: x @ kernel)
  return jax.jit(
    functools.partial(int8.multiply, dtype='float32', quantization=name)
  )


def _shortest(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
  """Returns the shortest time of each call in milliseconds, in turns."""
  for call in calls.values():
    jax.block_until_ready(call())
  shortest = dict.fromkeys(calls, float('inf'))
  for _ in range(_REPEATS):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      secs = time.perf_counter() - start
      shortest[name] = min(shortest[name], 1e3 * secs)
  return shortest


def _key() -> str:
  """Describes all that the times depend on."""
  return ', '.join(
    [
      chips.cpu(),
      f'{distributed.num_cores()} cores',
      f'jaxlib {importlib.metadata.version("jaxlib")}',
      os.environ.get('XLA_FLAGS', ''),
    ]
  )


def _path() -> pathlib.Path | None:
  """Returns the file with the times; None without a compilation cache."""
  config: Any = jax.config
  folder = config.jax_compilation_cache_dir
  is_local = bool(folder) and storage.scheme(folder) is None
  if not is_local or not config.jax_enable_compilation_cache:
    return None
  return pathlib.Path(folder) / 'l2s_jax_int8.json'


def _read(path: pathlib.Path) -> dict[str, list[float]] | None:
  """Returns the stored times of this machine; None if there are none."""
  try:
    content = files.read_json(path, remedy='delete it')
  except (OSError, ValueError):
    return None
  found = content.get(_key())
  names = set(config_lib.QUANTIZATIONS)
  if not isinstance(found, dict) or found.keys() != names:
    return None
  for ms in found.values():
    if not isinstance(ms, list) or len(ms) != len(_ROWS):
      return None
    if not all(isinstance(x, float) for x in ms):
      return None
  return found


def _write(path: pathlib.Path, found: Mapping[str, list[float]]) -> None:
  """Stores the times of this machine beside those of others."""
  try:
    others = files.read_json(path, remedy='delete it')
  except (OSError, ValueError):
    others = {}
  try:
    files.write_json(path, others | {_key(): found})
  except OSError:
    pass  # A cache that cannot be written: the next start measures again.
