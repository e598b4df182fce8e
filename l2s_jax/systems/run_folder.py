# SPDX-License-Identifier: Apache-2.0
"""The description of a system in a run's folder.

`model.json` and `vocabularies/` suffice to evaluate a run, to use it, or to
build on it, given only its path.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.runtime import distributed, files, storage
from l2s_jax.systems import builders
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, loading
from l2s_jax.weights import run_format, runs

DESCRIPTION = run_format.RUN


def save(system: system_lib.System, run_dir: str | pathlib.Path) -> None:
  """Writes `model.json` and the vocabularies into a run's folder.

  If the folder has a description, the system may differ from it only in runtime
  settings (dtypes, dropout, scan or unroll) and in the LLM's location.

  Raises:
    ValueError: if the folder describes another system; lists the differences.
  """
  folder = storage.of(run_dir)
  path = folder / DESCRIPTION
  description = system.describe()
  if path.is_file():
    # The LLM may have moved with its run; its fingerprint identifies it.
    found = runs.read_description(folder)
    found.setdefault('special_ids', description['special_ids'])  # Older runs.
    differences = runs.differences(found, description)
    if differences:
      raise ValueError(
        f'{folder} holds another run. Choose another MODEL_DIR, or remove it '
        'to start again:\n' + '\n'.join(differences)
      )
  if not distributed.is_first():
    return
  for name, vocabulary in (
    ('prompt', system.prompt_vocabulary),
    ('answer', system.answer_vocabulary),
  ):
    place = folder / runs.VOCABULARIES / name
    if path.is_file():
      try:
        runs.load_vocabulary(folder, description, name)
        continue
      except (ValueError, FileNotFoundError) as error:
        distributed.say(f'{error} It is written again.')
        files.remove_folder(place)
    vocabulary.save(place)
  files.write_json(path, description)


def load(
  run_dir: str | pathlib.Path, *, llm_path: str | None = None
) -> system_lib.System:
  """Returns the system in a run's folder.

  Args:
    run_dir: the run's folder.
    llm_path: location of its LLM, if it has moved.

  Raises:
    FileNotFoundError: if the folder is not a run.
    ValueError: if a newer version of this project wrote it, or something is
      missing.
  """
  folder = storage.of(run_dir)
  path = folder / DESCRIPTION
  if not path.is_file():
    raise FileNotFoundError(
      f'{folder} is not a run: it has no {DESCRIPTION}. Set CHECKPOINT_PATH to '
      'the MODEL_DIR of a training run.'
    )
  description = runs.read_description(folder)
  prompt, answer = (
    runs.load_vocabulary(folder, description, name)
    for name in ('prompt', 'answer')
  )
  return from_description(
    description,
    prompt,
    answer,
    path=path,
    llm_path=llm_path or description.get('llm_path'),
  )


def from_description(
  description: Mapping[str, Any],
  prompt: base.Vocabulary,
  answer: base.Vocabulary,
  *,
  path: pathlib.Path,
  llm_path: str | None,
  continues: bool = False,
) -> system_lib.System:
  """Returns the system of a description.

  Args:
    description: from `runs.check_description`.
    prompt: vocabulary of prompts.
    answer: vocabulary of answers.
    path: file of the description, for errors.
    llm_path: location of the LLM, if there is one.
    continues: whether a language model's answers continue their prompts.

  Raises:
    ValueError: if a vocabulary does not fit, or a config is invalid.
  """
  if description['kind'] == 'language_model':
    module = l2s.build(config_lib.from_json(description['config'], path))
    rows = module.config.vocab_size
    return system_lib.System(
      module,
      prompt.for_table(rows),
      answer.for_table(rows),
      continues=continues,
    )
  assert llm_path is not None
  llm_config = config_lib.from_json(description['llm'], path, 'llm')
  slm_config = config_lib.from_json(description['slm'], path, 'slm')
  return builders.assemble(
    llm_config,
    slm_config,
    prompt.for_table(llm_config.vocab_size),
    answer.for_table(slm_config.vocab_size),
    injection=description['injection'],
    shared=description['shared_vocabulary'],
    sources={'llm': llm_path},
    llm_dtype=description['frozen_dtype'],
    llm_step=description['llm_step'],
    llm_fingerprint=description['llm_fingerprint'],
    llm_layer=description['llm_layer'],
    train_llm=description['train_llm'],
    llm_prefix_ids=description['llm_prefix_ids'],
  )


def pin_llm(
  system: system_lib.System, run_dir: str | pathlib.Path
) -> system_lib.System:
  """Returns the system with the parts that a run keeps from its start.

  These are the checkpoint step of the LLM, whose own run may have gone on, and
  the tokenizers and the LLM's prefix ids, which older versions of this project
  may have read differently from the same folder.
  """
  path = storage.of(run_dir) / DESCRIPTION
  if not path.is_file():
    return system
  description = runs.read_description(storage.of(run_dir))
  system = _with_older_vocabularies(system, storage.of(run_dir), description)
  module = system.module
  if isinstance(module, l2s.LlmToSlm):
    # Kept from the run: earlier versions had no prefix ids.
    # A language model alone has none; `save` refuses it.
    prefix_ids = tuple(description.get('llm_prefix_ids', ()))
    module = module.clone(llm_prefix_ids=prefix_ids)
    system = dataclasses.replace(system, module=module)
  if not system.frozen:
    return system
  return dataclasses.replace(system, llm_step=description.get('llm_step'))


def _with_older_vocabularies(
  system: system_lib.System, run_dir: pathlib.Path, description: dict[str, Any]
) -> system_lib.System:
  """Returns the system with a run's tokenizers, if an older version read them.

  The system stays as it is if its tokenizers are the run's already, or are not
  from the same folders.
  """
  kept: dict[str, Any] = {}
  for name, now in (
    ('prompt', system.prompt_vocabulary),
    ('answer', system.answer_vocabulary),
  ):
    fingerprint = description.get('vocabularies', {}).get(name)
    if now.fingerprint() == fingerprint:
      continue
    if loading.fingerprint_before(now) != fingerprint:
      return system
    kept[f'{name}_vocabulary'] = loading.load(
      run_dir / runs.VOCABULARIES / name
    ).for_table(now.table_rows or now.vocab_size)
  if not kept:
    return system
  print(
    f'{run_dir} keeps the tokenizers of its first start; an older l2s_jax read '
    "the model's folder without its added tokens and special ids."
  )
  module = system.module
  if isinstance(module, l2s.LlmToSlm):
    module = module.clone(shared_vocabulary=description['shared_vocabulary'])
  return dataclasses.replace(system, module=module, **kept)
