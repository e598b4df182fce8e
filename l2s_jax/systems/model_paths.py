# SPDX-License-Identifier: Apache-2.0
"""Opens CHECKPOINT_PATH: a run, a bundle, or a pretrained model.

A pretrained model is a language model with weights and tokenizer: a Hugging
Face folder, a converted folder, a T5X checkpoint, a GGUF file, or a repository
on the Hugging Face Hub. It replaces a run without training, and nothing is
written beside it.
"""

import dataclasses
import pathlib
from typing import Literal

from l2s_jax.runtime import files as files_lib
from l2s_jax.runtime import storage
from l2s_jax.systems import builders, bundle, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import hub, opening, run_format, saved_steps


def check_path(location: str) -> None:
  """Checks that CHECKPOINT_PATH can be opened.

  Raises:
    ValueError: if it is empty, or in a bucket of an unknown kind.
  """
  storage.check(location, 'CHECKPOINT_PATH')
  if storage.is_bucket(location) or not storage.of(location).is_file():
    files_lib.folder(location, 'CHECKPOINT_PATH')


def load(
  location: str,
  *,
  llm_path: str | None = None,
  vocabulary: str | None = None,
  extra_ids: int = 0,
) -> system_lib.System:
  """Returns the system of a run, a bundle, or a pretrained model.

  Args:
    location: CHECKPOINT_PATH.
    llm_path: location of a run's LLM, if it has moved.
    vocabulary: tokenizer of a pretrained model without one.
    extra_ids: T5's sentinel ids behind its SentencePiece model.

  Raises:
    FileNotFoundError: if `location` is none of these.
    ValueError: if it cannot be read, lacks a tokenizer, or already has a given
      setting.
  """
  if run_format.is_run(location):
    if vocabulary is not None or extra_ids:
      raise ValueError(
        f'CHECKPOINT_PATH={location} is a run, which has its own tokenizers. '
        'Leave VOCABULARY and EXTRA_IDS unset.'
      )
    return run_folder.load(location, llm_path=llm_path)
  if bundle.is_bundle(location):
    given = {'VOCABULARY': vocabulary, 'LLM_PATH': llm_path}
    for name, value in given.items():
      if value is not None:
        raise ValueError(
          f'CHECKPOINT_PATH={location} is a bundle, which has its own LLM and '
          f'tokenizers. Leave {name} unset.'
        )
    return bundle.open_bundle(location).system
  tower = system_lib.Tower(location, None, vocabulary, extra_ids)
  try:
    config = tower.load_config()
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f'CHECKPOINT_PATH={location} is neither a run (it has no '
      f'{run_folder.DESCRIPTION}) nor a pretrained model. Set it to the '
      'MODEL_DIR of a training run, a bundle, a Hugging Face or converted '
      f'folder, a T5X checkpoint or a GGUF file. {error}'
    ) from error
  if llm_path is not None:
    raise ValueError(
      f'CHECKPOINT_PATH={location} is a single pretrained model, but '
      f'LLM_PATH={llm_path} is set. LLM_PATH is the LLM of an LLM-to-SLM run. '
      'Leave it unset.'
    )
  system = builders.alone(tower, config, 'VOCABULARY')
  return dataclasses.replace(system, continues=not config.is_encoder_decoder)


def choose_step(
  location: str, step: int | Literal['best', 'all'] | None, setting: str
) -> int:
  """Returns the checkpoint step to read, or 0 without steps.

  Args:
    location: CHECKPOINT_PATH.
    step: None means the newest.
    setting: name of the setting for `step`, for the error.

  Raises:
    FileNotFoundError: if the step does not exist.
    ValueError: if a bundle or a pretrained model has no such step.
  """
  if run_format.is_run(location):
    assert step != 'all', step
    return saved_steps.params_folder(location, step)[1]
  if bundle.is_bundle(location):
    has = bundle.open_bundle(location).step or 0
    if step not in (None, 0, has):
      raise ValueError(
        f'{setting}={step!r}: CHECKPOINT_PATH={location} is a bundle, which '
        f'has step {has} only. Leave {setting} unset, or export the other step.'
      )
    return has
  if isinstance(step, str):
    raise ValueError(
      f'{setting}={step!r}: CHECKPOINT_PATH={location} is a pretrained model, '
      f'which has no checkpoints to choose from. Leave {setting} unset.'
    )
  return opening.open_source(location, step or None).step() or 0


def saved_nsecs(location: str, step: int) -> int:
  """Returns the time of the last save, in ns since the Unix epoch.

  For a run it is that of the checkpoint, otherwise the newest file's.
  """
  if run_format.is_run(location):
    params, _ = saved_steps.params_folder(location, step)
    return saved_steps.saved_nsecs(params)
  path = storage.of(location)
  if hub.is_name(location):
    path = hub.download(location)
  files = [path] if path.is_file() else path.iterdir()
  return max(file.stat().st_mtime_ns for file in files)


def output_dir(location: str, given: str | None, setting: str) -> pathlib.Path:
  """Returns the folder for results: the given one, or the run's.

  Args:
    location: CHECKPOINT_PATH.
    given: the folder in the settings, or None.
    setting: name of its setting, for the error.

  Raises:
    ValueError: if no folder is given for a model outside of a run.
  """
  if given is None and not run_format.is_run(location):
    raise ValueError(
      f'CHECKPOINT_PATH={location} is not a run: it has no '
      f'{run_folder.DESCRIPTION}. Correct it; or, for a pretrained model, set '
      f'{setting} to a folder for the results.'
    )
  if given is not None:
    storage.check(given, setting)
  return storage.of(given or location)
