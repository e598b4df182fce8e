# SPDX-License-Identifier: Apache-2.0
"""What a run's folder says of its system: `model.json` and `vocabularies/`.

With these a run can be evaluated, used or built upon with its path alone.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.runtime import distributed, files
from l2s_jax.systems import builders
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, loading
from l2s_jax.weights import run_format, runs

DESCRIPTION = run_format.RUN


def save(system: system_lib.System, run_dir: str | pathlib.Path) -> None:
  """Writes the description and the vocabularies into a run's folder.

  In a folder that already describes the same system, only how it is computed
  (dtypes, dropout, the form of the loop) and where the LLM is may change.

  Raises:
    ValueError: if it describes another; lists the differences.
  """
  folder = pathlib.Path(run_dir)
  path = folder / DESCRIPTION
  description = system.describe()
  if path.is_file():
    # A run may have moved with its LLM; the fingerprint tells it is the same.
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
        distributed.say(f'{error} It is written anew.')
        shutil.rmtree(place, ignore_errors=True)
    vocabulary.save(place)
  files.write_json(path, description)


def load(
  run_dir: str | pathlib.Path, *, llm_path: str | None = None
) -> system_lib.System:
  """Returns the system that a run's folder describes.

  Args:
    run_dir: the run.
    llm_path: where its LLM is now, if it has moved.

  Raises:
    FileNotFoundError: if the folder is not a run.
    ValueError: if a newer version of this project wrote it, or it lacks
      something.
  """
  folder = pathlib.Path(run_dir)
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
  """Returns the system that a description is of.

  Args:
    description: of `runs.check_description`.
    prompt: vocabulary of prompts.
    answer: vocabulary of answers.
    path: of the file that describes, for errors.
    llm_path: where the LLM is, if there is one.
    continues: of a language model, whether answers go on where prompts end.

  Raises:
    ValueError: if a vocabulary does not fit, or a config is none.
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
  """Returns the system with what a run began with.

  That is the LLM's checkpoint, whose own run may have gone on since, and the
  tokenizers and the LLM's prefix, where an older version of this project read
  a folder otherwise.
  """
  path = pathlib.Path(run_dir) / DESCRIPTION
  if not path.is_file():
    return system
  description = runs.read_description(pathlib.Path(run_dir))
  system = _with_older_vocabularies(system, pathlib.Path(run_dir), description)
  module = system.module
  if isinstance(module, l2s.LlmToSlm):
    # Of the tokenizer, not a setting: earlier versions put nothing in front.
    prefix_ids = tuple(description['llm_prefix_ids'])
    module = module.clone(llm_prefix_ids=prefix_ids)
    system = dataclasses.replace(system, module=module)
  if not system.frozen:
    return system
  return dataclasses.replace(system, llm_step=description.get('llm_step'))


def _with_older_vocabularies(
  system: system_lib.System, run_dir: pathlib.Path, description: dict[str, Any]
) -> system_lib.System:
  """Returns the system with a run's tokenizers if the folders are theirs."""
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
    f'{run_dir} goes on with the tokenizers that it began with; an older '
    "l2s_jax read the model's folder without its added tokens and special ids."
  )
  module = system.module
  if isinstance(module, l2s.LlmToSlm):
    module = module.clone(shared_vocabulary=description['shared_vocabulary'])
  return dataclasses.replace(system, module=module, **kept)
