# SPDX-License-Identifier: Apache-2.0
"""Writes a run or a pretrained model as a bundle, tensor by tensor."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from l2s_jax.interop import convert
from l2s_jax.models import l2s
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import storage
from l2s_jax.systems import bundle, model_paths, parameters
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import converted, manifest, opening, runs
from l2s_jax.weights import source as source_lib

# Bytes per comparison.
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Parts:
  """The contents of a bundle.

  Attributes:
    system: the system of the run or the model.
    towers: the language models: 'llm' and 'slm', or 'model'.
    beside: the other parameters of LLM-to-SLM, by path, as they are written.
    step: checkpoint step of a run.
    name: name of the source folder, for people.
    quantization: of kernels and token embeddings, 'int8' or None.
  """

  system: system_lib.System
  towers: dict[str, convert.Reading]
  beside: Mapping[shapes_lib.Path, np.ndarray]
  step: int | None
  name: str
  quantization: str | None = None

  @property
  def num_bytes(self) -> int:
    """Size of all tensors in the bundle."""
    return bundle.size_of(self.stored_shapes())

  @property
  def with_int8(self) -> bool:
    """Whether kernels and token embeddings are stored in int8."""
    return self.quantization is not None

  def stored_shapes(self) -> dict[str, jax.ShapeDtypeStruct | np.ndarray]:
    """Returns shapes and dtypes of all tensors in the bundle, by name."""
    named: dict[str, Any] = {
      '/'.join(path): array for path, array in self.beside.items()
    }
    for name, tower in self.towers.items():
      prefix = '' if name == bundle.MODEL else f'{name}/'
      stored = converted.stored_shapes(tower.shapes(), with_int8=self.with_int8)
      named |= {prefix + key: shape for key, shape in stored.items()}
    return named


class _Encoder:
  """The tensors of a source that encode prompts."""

  def __init__(
    self, source: source_lib.Source, paths: set[shapes_lib.Path]
  ) -> None:
    self._source, self._paths = source, paths
    self.location, self.config = source.location, source.config
    self.model_type = source.model_type
    self.special_ids = source.special_ids

  def step(self) -> int | None:
    return self._source.step()

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    shapes = self._source.shapes()
    return {path: shapes[path] for path in shapes if path in self._paths}

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> np.ndarray:
    return self._source.read(path, layer)

  def name(self, path: shapes_lib.Path) -> str:
    return self._source.name(path)

  def digest(self, path: shapes_lib.Path) -> str | None:
    return self._source.digest(path)


def open_parts(
  location: str,
  step: int | Literal['best'] | None,
  dtype: str | None,
  *,
  quantization: str | None = None,
  llm_path: str | None = None,
  vocabulary: str | None = None,
  extra_ids: int = 0,
) -> Parts:
  """Opens a run, a pretrained model or a bundle for `write`.

  Args:
    location: location of the source, as CHECKPOINT_PATH.
    step: checkpoint step of a run; None means the newest.
    dtype: dtype of the written tensors; None keeps that of the source.
    quantization: 'int8' rounds kernels and token embeddings, see
      `int8`; None keeps them.
    llm_path: new location of the run's LLM, if it has moved.
    vocabulary: tokenizer of a pretrained model without one.
    extra_ids: number of T5's sentinel ids behind its SentencePiece model.

  Raises:
    FileNotFoundError: if the model does not exist.
    ValueError: if it cannot be read.
  """
  make = functools.partial(_parts, dtype=dtype, quantization=quantization)
  if bundle.is_bundle(location):
    opened = bundle.open_bundle(location)
    sources: dict[str, source_lib.Source] = dict(opened.towers)
    beside = opened.beside()
    return make(opened.system, opened.step, opened.folder.name, sources, beside)
  system = model_paths.load(
    location, llm_path=llm_path, vocabulary=vocabulary, extra_ids=extra_ids
  )
  chosen = model_paths.choose_step(location, step, '--step')
  source = opening.open_source(location, chosen or None, may_lack_steps=True)
  name = storage.of(location).resolve().name
  if not isinstance(system.module, l2s.LlmToSlm):
    return make(system, source.step(), name, {bundle.MODEL: source}, {})
  assert isinstance(source, runs.Run)  # Only runs are LLM-to-SLM.
  beside = source.read_others(but=('llm', 'slm'))
  wanted = {
    path[1:]: shape
    for path, shape in shapes_lib.of_module(system.module).items()
    if path[0] == 'llm'
  }
  if 'llm' in system.frozen:
    llm: source_lib.Source = parameters.open_llm(
      system.sources['llm'], system.llm_step
    )
  else:
    llm = runs.Run(storage.of(location), source.step(), 'llm')
  encoder = _Encoder(llm, set(wanted))
  source_lib.check_shapes(encoder, wanted)
  sources = {'llm': encoder, 'slm': source}
  return make(system, source.step(), name, sources, beside)


def _parts(
  system: system_lib.System,
  step: int | None,
  name: str,
  sources: Mapping[str, source_lib.Source],
  beside: Mapping[shapes_lib.Path, np.ndarray],
  *,
  dtype: str | None,
  quantization: str | None,
) -> Parts:
  """Returns `Parts` of sources before rounding; see `open_parts`."""
  towers = {
    key: convert.Reading(source, dtype, with_int8=quantization is not None)
    for key, source in sources.items()
  }
  if 'llm' in towers:
    towers['llm'].keeps_stored = True
  rounded = {
    path: array.astype(np.dtype(dtype or array.dtype))
    for path, array in beside.items()
  }
  return Parts(system, towers, rounded, step, name, quantization)


def write(
  parts: Parts, folder: pathlib.Path, dtype: str | None, **facts: Any
) -> None:
  """Writes a bundle into an empty folder.

  Args:
    parts: contents from `open_parts`.
    folder: destination.
    dtype: the dtype of `open_parts`.
    **facts: information for people, for the manifest.

  Raises:
    ValueError: if tensors do not match their digests or are not finite, or the
      LLM is not the one of the run's training.
  """
  system = parts.system
  for name, tower in parts.towers.items():
    with convert.progress_bar(tower.num_bytes, name) as tower.progress:
      converted.save(tower, _made(folder / name), with_int8=parts.with_int8)
    tower.check_source()
    tower.notes.check()
  _check_llm(parts)
  if parts.beside:
    bundle.save_beside(folder, parts.beside)
  for name, vocabulary in (
    ('prompt', system.prompt_vocabulary),
    ('answer', system.answer_vocabulary),
  ):
    vocabulary.save(folder / runs.VOCABULARIES / name)
  fingerprint = None
  if 'llm' in parts.towers:
    llm = parts.towers['llm']
    fingerprint = source_lib.fingerprint(
      {path: llm.digest(path) for path in llm.shapes()}
    )
  model = bundle.describe(
    system,
    {name: tower.config for name, tower in parts.towers.items()},
    llm_fingerprint=fingerprint,
    step=parts.step,
    dtype=dtype,
    quantization=parts.quantization,
    source=parts.name,
  )
  described = bundle.describe_shapes(parts.stored_shapes())
  manifest.write(folder, manifest.BUNDLE, model, parameters=described, **facts)


def compare(
  parts: Parts, opened: bundle.Bundle, dtype: str | None = None
) -> str:
  """Compares a bundle's tensors bit by bit with those of its source.

  Args:
    parts: contents of the bundle; tensors are read again, layer by layer.
    opened: the bundle.
    dtype: the dtype of `open_parts`, for the summary.

  Returns:
    A summary.

  Raises:
    ValueError: lists the tensors that differ or are missing.
  """
  differing, count = [], 0
  for name, tower in parts.towers.items():
    found, wanted = opened.towers[name], tower.shapes()
    prefix = '' if name == bundle.MODEL else f'{name}/'
    with convert.progress_bar(tower.num_bytes, f'checking {name}') as progress:
      for path in sorted(wanted.keys() | found.shapes().keys()):
        count += 1
        shape = found.shapes().get(path)
        if path not in wanted or shape != wanted[path]:
          differing.append(prefix + '/'.join(path))
          continue
        for layer in source_lib.layers(path, shape.shape):
          expected = tower.read_again(path, layer)
          progress.update(expected.nbytes)
          if not _same_bytes(expected, found.read(path, layer)):
            differing.append(prefix + '/'.join(path))
            break
  beside = opened.beside()
  for path in sorted(parts.beside.keys() | beside.keys()):
    count += 1
    array = parts.beside.get(path)
    if (
      array is None
      or path not in beside
      or not _same_bytes(array, beside[path])
    ):
      differing.append('/'.join(path))
  if differing:
    raise ValueError(
      f'{len(differing)} of {count} tensors of the bundle differ from those of '
      f'{parts.name}. The output was deleted. The disk may be failing. '
      'Differing tensors:\n  ' + '\n  '.join(differing[:20])
    )
  kinds = [kind for kind in (dtype, parts.quantization) if kind is not None]
  rounded = f', rounded to {" and ".join(kinds)},' if kinds else ''
  return f'all {count} tensors equal those of {parts.name}{rounded} bit by bit'


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
  """Returns whether arrays are equal in shape, dtype and every bit."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  x, y = (np.ascontiguousarray(c).reshape(-1).view(np.uint8) for c in (a, b))
  return all(
    np.array_equal(x[i : i + _BLOCK], y[i : i + _BLOCK])
    for i in range(0, x.size, _BLOCK)
  )


def _made(folder: pathlib.Path) -> pathlib.Path:
  """Creates a folder and returns it."""
  folder.mkdir(parents=True)
  return folder


def _check_llm(parts: Parts) -> None:
  """Checks that the LLM equals that of the run's training.

  Raises:
    ValueError: if its fingerprint differs.
  """
  expected = parts.system.llm_fingerprint
  if expected is None or 'llm' not in parts.system.frozen:
    return
  found = parts.towers['llm'].source_fingerprint()
  if found != expected:
    raise ValueError(
      f'The LLM in {parts.system.sources["llm"]} is not the LLM of this run: '
      f'its fingerprint is {found[:16]}, expected {expected[:16]}. Set '
      '--llm_path to the original weights.'
    )
