# SPDX-License-Identifier: Apache-2.0
"""Bundles: a system with all of its weights and tokenizers in one folder.

    BUNDLE/
      manifest.json          files and their hashes; the system, as of a run
      vocabularies/prompt/   tokenizers
      vocabularies/answer/
      llm/                   the LLM's encoding part, a converted folder
      slm/                   the SLM, a converted folder, with LoRA merged
      beside/                projector, prompt embedder, layer mix: safetensors

The bundle of a single language model has `model/` in place of the last three.
Tensors are memory-mapped. `export` writes bundles; `infer`, `evaluate` and
`export` read them in place of a run.
"""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.runtime import storage
from l2s_jax.systems import run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import converted, manifest, runs
from l2s_jax.weights.formats import tensor_files

PyTree = Any

BESIDE = 'beside'
# Folder and key of a single language model.
MODEL = 'model'
_KEYS = {'system', 'continues', 'step', 'dtype', 'source'}
QUANTIZATIONS = ('int8',)
_REMEDY = 'Export again, or copy the whole folder again from the original.'


def is_bundle(location: str | pathlib.Path) -> bool:
  """Returns whether a folder is a bundle."""
  return manifest.is_export(location, manifest.BUNDLE)


def open_bundle(location: str | pathlib.Path) -> 'Bundle':
  """Opens a bundle; verifies its files unless they were verified before.

  A changed manifest makes it verify them again.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a file does not match its hash; names the file.
  """
  folder = storage.of(location).resolve()
  return _open(folder, (folder / manifest.FILE).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _open(folder: pathlib.Path, changed_nsecs: int) -> 'Bundle':
  del changed_nsecs
  return Bundle(folder)


class Bundle:
  """An opened bundle.

  Attributes:
    folder: path of the bundle.
    content: of its manifest.
    system: module, vocabularies, and the LLM's path in the bundle.
    towers: the language models: 'llm' and 'slm', or 'model'.
    step: checkpoint step of the exported run; None for a pretrained model.
    quantization: 'int8' for kernels and token embeddings in int8, which are
      read as float32.
  """

  def __init__(self, folder: pathlib.Path):
    """Verifies the files and opens them; see `open_bundle`."""
    self.folder = folder
    self.content = manifest.read(folder, manifest.BUNDLE)
    path = folder / manifest.FILE
    model = self.content['model']
    # Absent in bundles of floats.
    self.quantization: str | None = model.get('quantization')
    if (
      model.keys() - {'quantization'} != _KEYS
      or not isinstance(model['system'], dict)
      or self.quantization not in (None, *QUANTIZATIONS)
    ):
      raise ValueError(f'{path} does not describe its model. {_REMEDY}')
    self.step: int | None = model['step']
    description = runs.check_description(model['system'], path)
    is_pair = description['kind'] == 'llm_to_slm'
    self.towers = {
      name: converted.ConvertedFolder(folder / name)
      for name in (('llm', 'slm') if is_pair else (MODEL,))
    }
    self._beside = tensor_files.open_folder(folder / BESIDE) if is_pair else {}
    prompt, answer = (
      runs.load_vocabulary(folder, description, name)
      for name in ('prompt', 'answer')
    )
    self.system = run_folder.from_description(
      description,
      prompt,
      answer,
      path=path,
      llm_path=str(folder / 'llm'),
      continues=model['continues'],
    )

  @property
  def license(self) -> str | None:
    """The license in the manifest, or None."""
    found = self.content.get('facts', {}).get('license')
    return found if isinstance(found, str) else None

  @property
  def num_params(self) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(shape.shape) for shape in self.shapes().values())

  @property
  def num_bytes(self) -> int:
    """Size of all tensors as they are read; int8 as float32."""
    return size_of(self.shapes())

  def parameters(self) -> dict[str, dict[str, Any]]:
    """Returns JSON-serialisable dtype and shape of each tensor, by name."""
    return describe_shapes(self.shapes())

  def shapes(self) -> dict[str, Any]:
    """Returns the shape and dtype of each tensor, by name."""
    named: dict[str, Any] = {
      '/'.join(path): array for path, array in self.beside().items()
    }
    for name, tower in self.towers.items():
      prefix = '' if name == MODEL else f'{name}/'
      for path, shape in tower.shapes().items():
        named[prefix + '/'.join(path)] = shape
    return named

  def beside(self) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the tensors of projector, prompt embedder and layer mix."""
    return {
      tuple(name.split('/')): np.asarray(tensor.read())
      for name, tensor in self._beside.items()
    }

  def params(self) -> PyTree:
    """Returns all parameters, memory-mapped, in the tree of training."""
    flat = self.beside()
    for name, tower in self.towers.items():
      prefix = () if name == MODEL else (name,)
      flat |= {
        prefix + path: np.asarray(tower.read(path)) for path in tower.shapes()
      }
    return traverse_util.unflatten_dict(flat)


def size_of(arrays: Mapping[str, Any]) -> int:
  """Returns the number of bytes of arrays, given their shapes and dtypes."""
  return sum(
    math.prod(array.shape) * array.dtype.itemsize for array in arrays.values()
  )


def describe_shapes(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns JSON-serialisable dtype and shape of each array, by name."""
  return {
    name: {'dtype': array.dtype.name, 'shape': list(array.shape)}
    for name, array in sorted(arrays.items())
  }


def save_beside(
  folder: pathlib.Path, arrays: Mapping[tuple[str, ...], np.ndarray]
) -> None:
  """Writes the parameters of LLM-to-SLM outside of its language models.

  Args:
    folder: the bundle.
    arrays: by path.
  """
  named = {'/'.join(path): array for path, array in arrays.items()}
  shapes = {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype)
    for name, array in named.items()
  }
  tensor_files.save_safetensors(
    folder / BESIDE, shapes, lambda name: [named[name]]
  )


def describe(
  system: system_lib.System,
  configs: Mapping[str, config_lib.TransformerConfig],
  *,
  llm_fingerprint: str | None,
  step: int | None,
  dtype: str | None,
  quantization: str | None,
  source: str,
) -> dict[str, Any]:
  """Returns the manifest's description of a bundle's model.

  Args:
    system: the system in the bundle.
    configs: of the language models, LoRA merged.
    llm_fingerprint: of the LLM's weights in the bundle.
    step: checkpoint step of the run.
    dtype: of the tensors, if it was chosen.
    quantization: of kernels and token embeddings, 'int8' or None.
    source: name of the exported folder, for information.
  """
  description = system.describe()
  if isinstance(system.module, l2s.LlmToSlm):
    description |= {
      'slm': configs['slm'].to_json(),
      'llm_path': 'llm',
      'llm_step': None,
      'llm_fingerprint': llm_fingerprint,
      'train_llm': False,
    }
    if system.module.train_llm:  # Trained parameters are float32.
      description['frozen_dtype'] = 'float32'
    if dtype is not None:
      description['frozen_dtype'] = dtype
      description['llm'] = {**description['llm'], 'dtype': dtype}
  else:
    description['config'] = configs[MODEL].to_json()
  described = {
    'system': description,
    'continues': system.continues,
    'step': step,
    'dtype': dtype,
    'source': source,
  }
  return described | ({'quantization': quantization} if quantization else {})
