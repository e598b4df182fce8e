# SPDX-License-Identifier: Apache-2.0
"""What CHECKPOINT_PATH names: a run of ours, a bundle, or a model as it came.

A model as it came is a language model alone, whose weights and tokenizer
somebody else has written: a Hugging Face folder, a converted one, a checkpoint
of T5X, a GGUF file, a name on the Hub. It is used as a run is, without a step
of training, and nothing is written beside it.
"""

import dataclasses
import pathlib
from typing import Literal

from l2s_jax.runtime import files as files_lib
from l2s_jax.systems import builders, bundle, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import hub, opening, saved_steps


def is_run(location: str | pathlib.Path) -> bool:
  return (pathlib.Path(location) / run_folder.DESCRIPTION).is_file()


def check_path(location: str) -> None:
  """Refuses a CHECKPOINT_PATH that cannot be read from here."""
  if not pathlib.Path(location).is_file():
    files_lib.local_folder(location, 'CHECKPOINT_PATH')


def load(
  location: str,
  *,
  llm_path: str | None = None,
  vocabulary: str | None = None,
  extra_ids: int = 0,
) -> system_lib.System:
  """Returns the system of a run, of a bundle, or of a model as it came.

  Args:
    location: CHECKPOINT_PATH.
    llm_path: where the LLM of a run is now, if it has moved.
    vocabulary: the tokenizer of a model that brings none.
    extra_ids: sentinels that T5 adds behind its SentencePiece model.

  Raises:
    FileNotFoundError: if there is neither.
    ValueError: if it cannot be read, brings no tokenizer, or brings what is
      given beside it.
  """
  if is_run(location):
    if vocabulary is not None or extra_ids:
      raise ValueError(
        f'CHECKPOINT_PATH={location} is a run, which has its tokenizers. Leave '
        'VOCABULARY and EXTRA_IDS unset.'
      )
    return run_folder.load(location, llm_path=llm_path)
  if bundle.is_bundle(location):
    given = {'VOCABULARY': vocabulary, 'LLM_PATH': llm_path}
    for name, value in given.items():
      if value is not None:
        raise ValueError(
          f'CHECKPOINT_PATH={location} is a bundle, which has its LLM and its '
          f'tokenizers. Leave {name} unset.'
        )
    return bundle.open_bundle(location).system
  tower = system_lib.Tower(location, None, vocabulary, extra_ids)
  try:
    config = tower.load_config()
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f'CHECKPOINT_PATH={location} is not a run: it has no '
      f'{run_folder.DESCRIPTION}; nor is it a model as it came. Set it to the '
      'MODEL_DIR of a training run, a bundle, a Hugging Face or converted '
      f'folder, a checkpoint of T5X or a GGUF file. {error}'
    ) from error
  if llm_path is not None:
    raise ValueError(
      f'CHECKPOINT_PATH={location} is a model as it came, alone; LLM_PATH='
      f'{llm_path} says where the LLM of an LLM-to-SLM run is. Leave it unset.'
    )
  system = builders.alone(tower, config, 'VOCABULARY')
  return dataclasses.replace(system, continues=not config.is_encoder_decoder)


def choose_step(
  location: str, step: int | Literal['best', 'all'] | None, setting: str
) -> int:
  """Returns the step to read: of what has none, 0.

  Args:
    location: CHECKPOINT_PATH.
    step: None is the newest.
    setting: that `step` came from, for the error.

  Raises:
    FileNotFoundError: if it is not there.
    ValueError: if `step` means nothing of a model as it came.
  """
  if is_run(location):
    assert step != 'all', step
    return saved_steps.params_folder(location, step)[1]
  if bundle.is_bundle(location):
    has = bundle.open_bundle(location).step or 0
    if step not in (None, 0, has):
      raise ValueError(
        f'{setting}={step!r}: CHECKPOINT_PATH={location} is a bundle of step '
        f'{has} alone. Leave it unset, or export the other step.'
      )
    return has
  if isinstance(step, str):
    raise ValueError(
      f'{setting}={step!r}: CHECKPOINT_PATH={location} is a model as it came, '
      'of which training has chosen nothing. Leave it unset.'
    )
  return opening.open_source(location, step or None).step() or 0


def saved_nsecs(location: str, step: int) -> int:
  """Returns when what is read was saved; of weights, when a file was last."""
  if is_run(location):
    params, _ = saved_steps.params_folder(location, step)
    return saved_steps.saved_nsecs(params)
  path = pathlib.Path(location)
  if hub.is_name(location):
    path = hub.download(location)
  files = [path] if path.is_file() else path.iterdir()
  return max(file.stat().st_mtime_ns for file in files)


def output_dir(location: str, given: str | None, setting: str) -> pathlib.Path:
  """Returns the folder for results: the run's, or the one that was given.

  Raises:
    ValueError: if there is none that is ours to write to.
  """
  if given is None and not is_run(location):
    raise ValueError(
      f'CHECKPOINT_PATH={location} is a model as it came, and nothing is '
      f'written beside it: set {setting} to a folder for the results.'
    )
  return pathlib.Path(given or location)
