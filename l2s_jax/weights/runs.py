# SPDX-License-Identifier: Apache-2.0
"""Weights and description of a training run of this package."""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.models import lora
from l2s_jax.runtime import files, integrity
from l2s_jax.vocabularies import base, loading
from l2s_jax.weights import run_format, saved_steps

VOCABULARIES = 'vocabularies'
# Fields that may change between starts of one run: the location of its LLM, and
# runtime options without effect on the parameters.
MAY_CHANGE = ('llm_path', 'frozen_dtype', *config_lib.RUNTIME_FIELDS)
# Fields about the file itself.
_OF_THE_FILE = ('format_version', 'written_by')
_REMEDY = 'copy it again from the original run.'
# Required keys of `model.json`, by kind of system.
_KEYS = {
  'language_model': {*_OF_THE_FILE, 'config', 'vocabularies'},
  'llm_to_slm': {
    *_OF_THE_FILE,
    'llm',
    'slm',
    'injection',
    'shared_vocabulary',
    'llm_path',
    'llm_step',
    'llm_fingerprint',
    'frozen_dtype',
    'vocabularies',
  },
}
# Fields added in later versions, with their defaults.
_LATER: dict[str, dict[str, Any]] = {
  'language_model': {},
  'llm_to_slm': {
    'llm_layer': None,
    'train_llm': False,
    'llm_prefix_ids': [],
  },
}
# Keys with a TransformerConfig as value.
_CONFIGS = ('config', 'llm', 'slm')
_IDS = dict.fromkeys(('start', 'eos', 'pad', 'bos'))


def check_description(
  description: Mapping[str, Any], path: pathlib.Path
) -> dict[str, Any]:
  """Validates the content of `model.json` and migrates it.

  Args:
    description: the content of `model.json`.
    path: the file, for errors.

  Returns:
    The description in the current format version, with all its fields.

  Raises:
    ValueError: if a field is missing or unknown, or a newer version wrote the
      file.
  """
  description = run_format.migrate(
    run_format.RUN, description, path, remedy=_REMEDY
  )
  kind = description.get('kind')
  if not isinstance(kind, str) or kind not in _KEYS:
    raise ValueError(
      f'{path}: kind is {config_lib.shorten(repr(kind))}; expected one of '
      f'{", ".join(_KEYS)}. Copy it again from the original run, or update '
      'l2s_jax.'
    )
  missing = sorted(_KEYS[kind] - description.keys())
  if missing:
    raise ValueError(
      f'{path} lacks {", ".join(missing)}. {_REMEDY.capitalize()}'
    )
  description = _LATER[kind] | description
  configs = [key for key in _CONFIGS if key in _KEYS[kind]]
  known: dict[str, Any] = dict.fromkeys(_KEYS[kind])
  known |= dict.fromkeys(configs, dict.fromkeys(config_lib.field_names()))
  known |= {
    'kind': None,
    **dict.fromkeys(_LATER[kind]),
    'vocabularies': dict.fromkeys(('prompt', 'answer')),
    'special_ids': {'prompt': _IDS, 'answer': _IDS},
  }
  run_format.refuse_unknown(description, known, path, remedy=_REMEDY)
  for key in configs:
    config = config_lib.from_json(description[key], path, key)
    description[key] = config.to_json()
  return description


def differences(
  found: Mapping[str, Any], wanted: Mapping[str, Any], **words: str
) -> list[str]:
  """Returns a line for each field in which two run descriptions differ.

  Fields that may change between starts of one run are ignored.

  Args:
    found: a description.
    wanted: the description to compare it with.
    **words: wording of the lines, see `files.differences`.
  """
  ignored = (*MAY_CHANGE, *_OF_THE_FILE)
  return files.differences(found, wanted, ignored=ignored, **words)


def read_description(folder: pathlib.Path) -> dict[str, Any]:
  """Reads `model.json` of a run, in the current format version.

  Config fields added after the file was written take their defaults. With
  `integrity.verification` on, the description is compared with the one stored
  in the checkpoints.

  Args:
    folder: the run.

  Raises:
    ValueError: if the file is damaged, has missing or unknown fields, or
      differs from the description in the checkpoints.
  """
  path = folder / 'model.json'
  description = check_description(files.read_json(path, remedy=_REMEDY), path)
  saved = saved_steps.description(folder)
  if saved is not None and integrity.verification():
    different = differences(
      check_description(saved, folder / saved_steps.FOLDER),
      description,
      have='the checkpoints have',
      want=f'{path.name} says',
    )
    if different:
      raise ValueError(
        f"{path} differs from the description in the run's checkpoints. Copy "
        'it again from the original run, or undo these changes:\n'
        + '\n'.join(different)
      )
  return description


def load_vocabulary(
  folder: pathlib.Path, description: Mapping[str, Any], name: str
) -> base.Vocabulary:
  """Loads a tokenizer of a run and compares its fingerprint.

  Args:
    folder: the run.
    description: the content of its `model.json`.
    name: 'prompt' or 'answer'.

  Raises:
    FileNotFoundError: if the tokenizer is missing.
    ValueError: if it is damaged, or is not the tokenizer of the training.
  """
  place = folder / VOCABULARIES / name
  vocabulary = loading.load(place)
  expected = description['vocabularies'].get(name)
  if vocabulary.fingerprint() != expected:
    raise ValueError(
      f"{place} is not the tokenizer of the run's training: its fingerprint is "
      f'{vocabulary.fingerprint()[:16]}, model.json has {str(expected)[:16]}. '
      'Copy it again from the original run.'
    )
  return vocabulary


class Run:
  """A checkpoint of a run, as a `source.Source`.

  Of an LLM-to-SLM run, the source holds the SLM. LoRA weights are merged into
  their kernels.
  """

  def __init__(
    self, folder: pathlib.Path, step: int | None = None, tower: str = 'slm'
  ):
    """Opens a run's folder.

    Args:
      folder: the folder with `model.json`.
      step: checkpoint step; None selects the newest.
      tower: of an LLM-to-SLM run: 'slm', or 'llm' if it was trained.

    Raises:
      ValueError: if `model.json` is damaged or incomplete.
    """
    self.location = str(folder)
    self.model_type: str | None = None
    self.special_ids: dict[str, Any] = {}
    self._folder = folder
    self._step = step
    self.description = read_description(folder)
    self._held: tuple[tuple[str, ...], np.ndarray] = ((), np.empty(0))
    self._prefix: tuple[str, ...] = ()
    path = folder / 'model.json'
    if self.description['kind'] == 'llm_to_slm':
      self._prefix = (tower,)
      self.config = config_lib.from_json(self.description[tower], path, tower)
    else:
      self.config = config_lib.from_json(self.description['config'], path)
    # Readers of a run get kernels with LoRA merged.
    self._alpha = self.config.lora_alpha if self.config.lora_rank else None
    if self._alpha is not None:
      defaults = config_lib.TransformerConfig
      self.config = dataclasses.replace(
        self.config,
        lora_rank=0,
        lora_alpha=defaults.lora_alpha,
        lora_kernels=defaults.lora_kernels,
      )

  def step(self) -> int | None:
    return self._found[1]

  @property
  def _params(self) -> pathlib.Path:
    return self._found[0]

  @functools.cached_property
  def _found(self) -> tuple[pathlib.Path, int]:
    return saved_steps.params_folder(self._folder, self._step)

  def shapes(self) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    depth = len(self._prefix)
    return {
      path[depth:]: array
      for path, array in saved_steps.array_shapes(self._params).items()
      if path[:depth] == self._prefix and not lora.is_learned(path[-1])
    }

  def read(self, path: tuple[str, ...], layer: int | None = None) -> np.ndarray:
    full = self._prefix + path
    if self._held[0] != full:  # Stacked tensors are read layer by layer.
      array = self._merged(full)
      self._held = (full, array)
    array = self._held[1]
    return array if layer is None else array[layer]

  def _merged(self, path: tuple[str, ...]) -> np.ndarray:
    """Returns a tensor, with its LoRA factors merged if there are any."""
    beside = [path[:-1] + (name,) for name in lora.NAMES]
    if (
      self._alpha is None
      or path[-1] != 'kernel'
      or not (set(beside) <= saved_steps.array_shapes(self._params).keys())
    ):
      return saved_steps.read_arrays(self._params, [path])[path]
    arrays = saved_steps.read_arrays(self._params, [path, *beside])
    kernel, down, up = (arrays[name] for name in (path, *beside))
    return lora.add(kernel, down, up, self._alpha, is_stacked='layers' in path)

  def name(self, path: tuple[str, ...]) -> str:
    return '/'.join(path)

  def digest(self, path: tuple[str, ...]) -> str | None:
    del path
    return None

  def read_others(
    self, but: Collection[str] = ('slm',)
  ) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the trained parameters of an LLM-to-SLM run except some towers'.

    These are the projector and any other trained parts, by path. The result is
    empty for a baseline run.

    Args:
      but: the towers to leave out. A trained LLM is large.
    """
    if not self._prefix:
      return {}
    paths = [
      path
      for path in saved_steps.array_shapes(self._params)
      if path[0] not in but
    ]
    return saved_steps.read_arrays(self._params, paths)
