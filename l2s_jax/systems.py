# SPDX-License-Identifier: Apache-2.0
"""Systems: a module, its vocabularies, and where its weights come from.

Three systems take part in every comparison: the LLM baseline and the SLM
baseline, each a language model alone, and LLM-to-SLM. A system describes
itself in its run's folder (`model.json`, `vocabularies/`), so that a run can
be evaluated, used or built upon with its path alone.
"""

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import gin

from l2s_jax import (
  distributed,
  files,
  partition,
  run_format,
  vocabularies,
  weights,
)
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s, language_model
from l2s_jax.weights import hub, own_tokenizer, runs

PyTree = Any

DESCRIPTION = run_format.RUN
VOCABULARIES = runs.VOCABULARIES


@dataclasses.dataclass(frozen=True)
class Tower:
  """One language model as a user names it: pretrained, fresh, or between.

  Attributes:
    path: its weights, see `weights.open_source`; None starts from random
      parameters.
    config: how it is built; None takes the one that came with `path`. Text
      is a name whose percent sign was forgotten, and refused.
    vocabulary: tokenizer file or folder; None takes the one in `path`.
    extra_ids: sentinels that T5 adds behind its SentencePiece model.
  """

  path: str | None = None
  config: config_lib.TransformerConfig | str | None = None
  vocabulary: str | None = None
  extra_ids: int = 0

  def load_config(self) -> config_lib.TransformerConfig:
    """Returns the config, from the weights unless it was given."""
    if isinstance(self.config, str):
      raise ValueError(
        f'LLM / SLM is the text {self.config!r}; a config is named with a '
        f'percent sign: %{self.config}, with its gin file beside it.'
      )
    if self.config is not None:
      return self.config
    if self.path is None:
      raise ValueError(
        'A model needs a config or weights: set LLM / SLM to a config (such '
        'as %T5_1_1_SMALL, with its gin file) or LLM_PATH / SLM_PATH to '
        'weights.'
      )
    return weights.open_source(self.path).config

  def load_vocabulary(
    self, setting: str = 'LLM_VOCABULARY / SLM_VOCABULARY'
  ) -> vocabularies.Vocabulary:
    """Returns the tokenizer, that of the weights unless another is given.

    Args:
      setting: what names a tokenizer, for errors.
    """
    if self.vocabulary is not None:
      return vocabularies.load(self.vocabulary, extra_ids=self.extra_ids)
    if self.path is None:
      raise ValueError(
        f'A model without weights needs a tokenizer: set {setting} to a '
        'SentencePiece model or a tokenizer.json.'
      )
    return own_tokenizer.load(
      self.path, extra_ids=self.extra_ids, setting=setting
    )


def _special_ids(vocabulary: vocabularies.Vocabulary) -> dict[str, Any]:
  """Returns the ids that the fingerprint covers, for people to read."""
  return {
    'start': vocabulary.start_id,
    'eos': list(vocabulary.eos_ids),
    'pad': vocabulary.pad_id,
    'bos': vocabulary.bos_id,
  }


gin.external_configurable(Tower, module='l2s_jax')


def _lasting(path: str) -> str:
  """Returns what names the same weights from any working directory."""
  return path if hub.is_name(path) else os.path.abspath(path)


@dataclasses.dataclass(frozen=True)
class System:
  """A module with its vocabularies and the sources of its parameters.

  Attributes:
    module: computes logits and prefills; see `models/language_model.py`.
    prompt_vocabulary: of what the system reads.
    answer_vocabulary: of what it writes.
    sources: path of weights by top-level parameter name; '' stands for all.
    frozen: top-level names of parameters that are not trained.
    frozen_dtype: how those are held.
    llm_step: the checkpoint of the LLM's run; None: the newest, or no run.
    llm_fingerprint: of the frozen weights; None until they were read.
    continues: whether answers go on where prompts end, as those of a
      decoder-only model as it came do; see `data.continuing`.
  """

  module: l2s.LlmToSlm | language_model.LanguageModel
  prompt_vocabulary: vocabularies.Vocabulary
  answer_vocabulary: vocabularies.Vocabulary
  sources: dict[str, str] = dataclasses.field(default_factory=dict)
  frozen: tuple[str, ...] = ()
  frozen_dtype: str = 'float32'
  llm_step: int | None = None
  llm_fingerprint: str | None = None
  continues: bool = False

  def describe(self) -> dict[str, Any]:
    """Returns what `model.json` holds."""
    description = run_format.stamp()
    if isinstance(self.module, l2s.LlmToSlm):
      description |= {
        'kind': 'llm_to_slm',
        'llm': self.module.llm_config.to_json(),
        'slm': self.module.slm_config.to_json(),
        'injection': self.module.injection,
        'shared_vocabulary': self.module.shared_vocabulary,
        'llm_path': _lasting(self.sources['llm']),
        'llm_step': self.llm_step,
        'llm_fingerprint': self.llm_fingerprint,
        'frozen_dtype': self.frozen_dtype,
      }
    else:
      description |= {
        'kind': 'language_model',
        'config': self.module.config.to_json(),
      }
    description['vocabularies'] = {
      'prompt': self.prompt_vocabulary.fingerprint(),
      'answer': self.answer_vocabulary.fingerprint(),
    }
    description['special_ids'] = {
      'prompt': _special_ids(self.prompt_vocabulary),
      'answer': _special_ids(self.answer_vocabulary),
    }
    return description


@gin.configurable(module='l2s_jax')
def language_model_system(
  tower: Tower,
  dropout_rate: float | None = None,
  dtype: str | None = None,
  remat: str | None = None,
) -> System:
  """Returns a language model alone: the LLM or the SLM baseline.

  Args:
    tower: the model.
    dropout_rate: in training; None keeps the config's.
    dtype: of activations, 'float32' or 'bfloat16'; None keeps the config's.
      Parameters are float32.
    remat: what is computed again backwards, see `TransformerConfig`; None
      keeps the config's.
  """
  config = _with_runtime(tower.load_config(), dropout_rate, dtype, remat)
  return alone(tower, config, 'LLM_VOCABULARY / SLM_VOCABULARY')


def alone(
  tower: Tower, config: config_lib.TransformerConfig, setting: str
) -> System:
  """Returns a language model as it is named, with its tokenizer.

  Args:
    tower: the model.
    config: how it is computed.
    setting: what else names a tokenizer, for errors.
  """
  vocabulary = tower.load_vocabulary(setting).for_table(config.vocab_size)
  module = l2s.build(config)
  return System(
    module=module,
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
    sources={} if tower.path is None else {'': tower.path},
  )


@gin.configurable(module='l2s_jax')
def llm_to_slm_system(
  llm: Tower,
  slm: Tower,
  injection: str = 'add',
  dropout_rate: float | None = None,
  dtype: str | None = None,
  llm_dtype: str = 'float32',
  remat: str | None = None,
) -> System:
  """Returns a frozen LLM's encoder, a projector, and the SLM that writes.

  Args:
    llm: the LLM; must have weights.
    slm: the SLM; the vocabulary counts as shared if both are the same.
    injection: 'add' or 'replace'.
    dropout_rate: of the SLM in training; None keeps the config's.
    dtype: of the SLM's activations, 'float32' or 'bfloat16'; None keeps the
      config's. Trained parameters are float32.
    llm_dtype: in which the LLM is held and run: 'float32' or 'bfloat16'.
    remat: what of the SLM is computed again backwards, see
      `TransformerConfig`; None keeps the config's.

  Raises:
    ValueError: if the LLM has no weights, or a vocabulary does not fit.
  """
  if llm.path is None:
    raise ValueError(
      'LLM-to-SLM needs a pretrained LLM: set LLM_PATH to a run of ours, a '
      'Hugging Face folder, a checkpoint of T5X or a GGUF file.'
    )
  if injection not in l2s.INJECTIONS:
    raise ValueError(f'INJECTION={injection!r} is not one of {l2s.INJECTIONS}.')
  llm_config = dataclasses.replace(llm.load_config(), dtype=llm_dtype)
  slm_config = _with_runtime(slm.load_config(), dropout_rate, dtype, remat)
  llm_vocabulary, slm_vocabulary = (
    llm.load_vocabulary().for_table(llm_config.vocab_size),
    slm.load_vocabulary().for_table(slm_config.vocab_size),
  )
  return _assemble(
    llm_config,
    slm_config,
    llm_vocabulary,
    slm_vocabulary,
    injection=injection,
    shared=vocabularies.share_ids(llm_vocabulary, slm_vocabulary),
    sources={'llm': llm.path} | ({'slm': slm.path} if slm.path else {}),
    llm_dtype=llm_dtype,
  )


def _assemble(
  llm_config: config_lib.TransformerConfig,
  slm_config: config_lib.TransformerConfig,
  llm_vocabulary: vocabularies.Vocabulary,
  slm_vocabulary: vocabularies.Vocabulary,
  *,
  injection: str,
  shared: bool,
  sources: dict[str, str],
  llm_dtype: str,
  llm_step: int | None = None,
  llm_fingerprint: str | None = None,
) -> System:
  l2s.build(slm_config)  # Refuses an SLM that cannot write.
  if shared:  # The SLM looks the prompt up too.
    llm_vocabulary = llm_vocabulary.for_table(slm_config.vocab_size)
  return System(
    module=l2s.LlmToSlm(llm_config, slm_config, injection, shared),
    prompt_vocabulary=llm_vocabulary,
    answer_vocabulary=slm_vocabulary,
    sources=sources,
    frozen=('llm',),
    frozen_dtype=llm_dtype,
    llm_step=llm_step,
    llm_fingerprint=llm_fingerprint,
  )


def _with_runtime(
  config: config_lib.TransformerConfig,
  dropout_rate: float | None,
  dtype: str | None,
  remat: str | None,
) -> config_lib.TransformerConfig:
  given: dict[str, Any] = {
    'dropout_rate': dropout_rate,
    'dtype': dtype,
    'remat': remat,
  }
  return dataclasses.replace(
    config, **{name: x for name, x in given.items() if x is not None}
  )


def local_folder(path: str, name: str) -> pathlib.Path:
  """Returns a folder that the user named, which need not exist yet.

  Args:
    path: as given.
    name: of the setting it came from, for the error.

  Raises:
    ValueError: if it is empty, a bucket's address or a file.
  """
  if not str(path):
    raise ValueError(f'{name} is empty; give a folder.')
  if '://' in str(path):
    raise ValueError(
      f'{name}={path}: only paths of the file system are supported; mount the '
      'bucket (such as with gcsfuse) and give the path there.'
    )
  folder = pathlib.Path(path)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'{name}={path} is a file; give a folder.')
  return folder


def save(system: System, run_dir: str | pathlib.Path) -> None:
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
    place = folder / VOCABULARIES / name
    if path.is_file():
      try:
        runs.load_vocabulary(folder, description, name)
        continue
      except (ValueError, FileNotFoundError) as error:
        distributed.say(f'{error} It is written anew.')
        shutil.rmtree(place, ignore_errors=True)
    vocabulary.save(place)
  files.write_json(path, description)


def load(run_dir: str | pathlib.Path, *, llm_path: str | None = None) -> System:
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
  if description['kind'] == 'language_model':
    module = l2s.build(config_lib.from_json(description['config'], path))
    rows = module.config.vocab_size
    return System(module, prompt.for_table(rows), answer.for_table(rows))
  llm_config = config_lib.from_json(description['llm'], path, 'llm')
  slm_config = config_lib.from_json(description['slm'], path, 'slm')
  return _assemble(
    llm_config,
    slm_config,
    prompt.for_table(llm_config.vocab_size),
    answer.for_table(slm_config.vocab_size),
    injection=description['injection'],
    shared=description['shared_vocabulary'],
    sources={'llm': llm_path or description['llm_path']},
    llm_dtype=description['frozen_dtype'],
    llm_step=description['llm_step'],
    llm_fingerprint=description['llm_fingerprint'],
  )


def pin_llm(system: System, run_dir: str | pathlib.Path) -> System:
  """Returns the system with what a run began with.

  That is the LLM's checkpoint, whose own run may have gone on since, and the
  tokenizers, where an older version of this project read a folder otherwise.
  """
  path = pathlib.Path(run_dir) / DESCRIPTION
  if not path.is_file():
    return system
  description = runs.read_description(pathlib.Path(run_dir))
  system = _with_older_vocabularies(system, pathlib.Path(run_dir), description)
  if not system.frozen:
    return system
  return dataclasses.replace(system, llm_step=description.get('llm_step'))


def _with_older_vocabularies(
  system: System, run_dir: pathlib.Path, description: dict[str, Any]
) -> System:
  """Returns the system with a run's tokenizers if the folders are theirs."""
  kept: dict[str, Any] = {}
  for name, now in (
    ('prompt', system.prompt_vocabulary),
    ('answer', system.answer_vocabulary),
  ):
    fingerprint = description.get('vocabularies', {}).get(name)
    if now.fingerprint() == fingerprint:
      continue
    if vocabularies.fingerprint_before(now) != fingerprint:
      return system
    kept[f'{name}_vocabulary'] = vocabularies.load(
      run_dir / VOCABULARIES / name
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


def with_rules(system: System, mesh_config: partition.MeshConfig) -> System:
  """Returns the system with the LLM's axis rules in its module."""
  if not isinstance(system.module, l2s.LlmToSlm):
    return system
  module = system.module.clone(llm_rules=mesh_config.rules('llm'))
  return dataclasses.replace(system, module=module)
