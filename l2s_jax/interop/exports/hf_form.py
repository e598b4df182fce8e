# SPDX-License-Identifier: Apache-2.0
"""The format `hf`: a folder for the package transformers.

LLM-to-SLM is exported with transformers' classes of LLM and SLM, composed by
`modeling_llm_to_slm.py`, which is copied into the folder. A single language
model is exported in the format of its own family.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from l2s_jax.interop import scale_folding, to_huggingface
from l2s_jax.interop.exports import comparing, model_card
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import files, scratch
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, export
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import huggingface, tensor_files

PyTree = Any

MODELING = 'modeling_llm_to_slm.py'
_ANSWERS = 'hf_answers.py'
_CLASS = 'LlmToSlmForConditionalGeneration'
_ANSWER_TOKENIZER = 'answer_tokenizer'
# Default of max_new_tokens in generation_config.json.
_MAX_NEW_TOKENS = 256
# Number of beams in the comparison.
_NUM_BEAMS = 4


class _Tower:
  """A language model in a form that transformers can express.

  The scale of attention logits is folded into the query kernels if needed, and
  layers above `llm_layer` are dropped with `_up_to`.
  """

  def __init__(
    self, source: source_lib.Source, config: config_lib.TransformerConfig
  ):
    self._source = source
    self.location, self.model_type = source.location, source.model_type
    self.special_ids = source.special_ids
    self.config, self._factor = scale_folding.fold(config)
    if self._factor != 1:
      for path, shape in source.shapes().items():
        if scale_folding.is_query(path):
          scale_folding.check(
            self._factor, shape.dtype, shape.dtype, self.location
          )

  def step(self) -> int | None:
    return self._source.step()

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    return self._source.shapes()

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> np.ndarray:
    array = self._source.read(path, layer)
    if self._factor == 1 or not scale_folding.is_query(path):
      return array
    return scale_folding.scale(array, self._factor, array.dtype)

  def name(self, path: shapes_lib.Path) -> str:
    return self._source.name(path)

  def digest(self, path: shapes_lib.Path) -> str | None:
    return None if self._factor != 1 else self._source.digest(path)


def check(model: comparing.Described) -> None:
  """Checks that transformers has classes for the model.

  Raises:
    ValueError: if it has none; lists the config fields.
  """
  for tower in _towers(model).values():
    to_huggingface.find_model_type(tower)


def _towers(bundle: comparing.Described) -> dict[str, _Tower]:
  """Returns the language models: 'llm' and 'slm', or 'model'."""
  module = bundle.system.module
  towers = {}
  for name, source in bundle.towers.items():
    config = source.config
    if name == 'llm':
      assert isinstance(module, l2s.LlmToSlm)
      config = _up_to(config, module.llm_layer)
    towers[name] = _Tower(source, config)
  return towers


def _up_to(
  config: config_lib.TransformerConfig, layer: int | str | None
) -> config_lib.TransformerConfig:
  """Returns the config of an LLM without the layers above `layer`."""
  if not isinstance(layer, int):
    return config
  field = (
    'num_encoder_layers' if config.is_encoder_decoder else 'num_decoder_layers'
  )
  # At least one, and enough to express the pattern of sliding windows.
  for count in range(max(layer, 1), l2s.num_reading_layers(config)):
    changed: dict[str, Any] = {field: count}
    shorter = dataclasses.replace(config, **changed)
    if huggingface.model_types(scale_folding.fold(shorter)[0]):
      return shorter
  return config


def write(bundle: comparing.Exportable, folder: pathlib.Path) -> None:
  """Writes weights, configs, tokenizers, code and model card.

  Args:
    bundle: the opened bundle.
    folder: an empty folder.
  """
  system = bundle.system
  if isinstance(system.module, l2s.LlmToSlm):
    _write_pair(bundle, system.module, folder)
  else:
    _write_model(bundle, folder)
  card = model_card.text(bundle, examples=[_example(system)])
  with files.whole(folder / 'README.md') as file:
    file.write(card)


def _write_model(bundle: comparing.Exportable, folder: pathlib.Path) -> None:
  """Writes a single language model."""
  (tower,) = _towers(bundle).values()
  system = bundle.system
  vocabulary = system.prompt_vocabulary
  to_huggingface.save(tower, folder, vocabulary)
  _save_prompt_tokenizer(system, folder, tower.config)
  generation = folder / 'generation_config.json'
  files.write_json(generation, _generation(vocabulary))


def _write_pair(
  bundle: comparing.Exportable, module: l2s.LlmToSlm, folder: pathlib.Path
) -> None:
  """Writes LLM, projector and SLM as one model."""
  towers = _towers(bundle)
  system = bundle.system
  parts = {
    'llm.': to_huggingface.Tensors(
      towers['llm'], is_reader=True, prefix='llm.'
    ),
    'slm.': to_huggingface.Tensors(towers['slm'], prefix='slm.'),
  }
  others = to_huggingface.others(bundle.params())
  shapes = {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype)
    for name, array in others.items()
  }
  for part in parts.values():
    shapes |= part.shapes

  def pieces(name: str) -> list[np.ndarray]:
    if name in others:
      return [others[name]]
    return [parts[name[:4]].read(name)]

  tensor_files.save_safetensors(folder, shapes, pieces)
  shutil.copyfile(pathlib.Path(__file__).with_name(MODELING), folder / MODELING)
  answers = system.answer_vocabulary
  _save_prompt_tokenizer(system, folder, towers['llm'].config)
  if not module.shared_vocabulary:
    export.save(
      folder / _ANSWER_TOKENIZER,
      answers,
      after=[answers.eos_id],
      sentinels_below=_sentinels_below(towers['slm'].config),
    )
  files.write_json(folder / huggingface.CONFIG, _pair_json(system, towers))
  files.write_json(folder / 'generation_config.json', _generation(answers))


def _pair_json(
  system: system_lib.System, towers: dict[str, _Tower]
) -> dict[str, Any]:
  """Returns the config.json of LLM-to-SLM."""
  module = system.module
  assert isinstance(module, l2s.LlmToSlm)
  prompts, answers = system.prompt_vocabulary, system.answer_vocabulary
  slm = to_huggingface.describe(towers['slm'], answers)
  ids = _generation(answers)
  is_last = module.llm_layer == l2s.num_reading_layers(towers['llm'].config)
  return {
    'model_type': 'llm_to_slm',
    'architectures': [_CLASS],
    'auto_map': {
      'AutoConfig': f'{MODELING[:-3]}.LlmToSlmConfig',
      'AutoModelForSeq2SeqLM': f'{MODELING[:-3]}.{_CLASS}',
    },
    'llm': to_huggingface.describe(towers['llm'], prompts, is_reader=True),
    'slm': slm,
    'slm_is_tied': towers['slm'].config.logits_via_embedding,
    'injection': module.injection,
    'shared_vocabulary': module.shared_vocabulary,
    # Layers above `llm_layer` may be absent.
    'llm_layer': None if is_last else module.llm_layer,
    'llm_prefix_ids': list(module.llm_prefix_ids),
    'is_encoder_decoder': True,
    'torch_dtype': slm['torch_dtype'],
    **{key: ids[key] for key in ids if key.endswith('token_id')},
  }


def _generation(vocabulary: base.Vocabulary) -> dict[str, Any]:
  """Returns generation_config.json: greedy decoding by default.

  With `num_beams` it is the beam search of `Decoding`'s defaults.
  """
  return {
    'decoder_start_token_id': vocabulary.start_id,
    'eos_token_id': list(vocabulary.eos_ids),
    'pad_token_id': (
      vocabulary.pad_id if vocabulary.has_pad else vocabulary.eos_id
    ),
    'max_new_tokens': _MAX_NEW_TOKENS,
    'do_sample': False,
    'num_beams': 1,
    'length_penalty': 1.0,
    'early_stopping': False,
  }


def _save_prompt_tokenizer(
  system: system_lib.System,
  folder: pathlib.Path,
  config: config_lib.TransformerConfig,
) -> None:
  """Writes a tokenizer that adds the special ids around a prompt."""
  before, after = comparing.around(system)
  writer = l2s.writer(system.module)[0].config
  is_continued = not isinstance(system.module, l2s.LlmToSlm) and (
    not writer.is_encoder_decoder
  )
  export.save(
    folder,
    system.prompt_vocabulary,
    before=before,
    after=after,
    padding_side='left' if is_continued else 'right',
    sentinels_below=_sentinels_below(config),
  )


def _sentinels_below(config: config_lib.TransformerConfig) -> int:
  """Returns the size of the vocabulary for T5, 0 for other models."""
  return config.vocab_size if 'relative' in config.positions else 0


def _example(system: system_lib.System) -> str:
  """Returns the Python example of the model card."""
  module = system.module
  is_pair = isinstance(module, l2s.LlmToSlm)
  is_continued = not (
    is_pair or l2s.writer(module)[0].config.is_encoder_decoder
  )
  kind = 'CausalLM' if is_continued else 'Seq2SeqLM'
  trust = ', trust_remote_code=True' if is_pair else ''
  reader = 'tokenizer'
  lines = [
    'from transformers import AutoModelFor' + kind + ', AutoTokenizer',
    '',
    "folder = '.'  # this folder",
    # Reading config.json needs the folder's code.
    f'tokenizer = AutoTokenizer.from_pretrained(folder{trust})',
  ]
  if isinstance(module, l2s.LlmToSlm) and not module.shared_vocabulary:
    reader = 'answer_tokenizer'
    lines += [
      'answer_tokenizer = AutoTokenizer.from_pretrained(',
      f"    folder, subfolder='{_ANSWER_TOKENIZER}')",
    ]
  start = "[:, batch['input_ids'].shape[1]:]" if is_continued else ''
  return '\n'.join(
    [
      *lines,
      f'model = AutoModelFor{kind}.from_pretrained(folder{trust})',
      "batch = tokenizer(['a prompt', 'another one'], padding=True,",
      "                  return_tensors='pt', return_token_type_ids=False)",
      f'tokens = model.generate(**batch){start}',
      f'print({reader}.batch_decode(tokens, skip_special_tokens=True))',
    ]
  )


def compare(
  bundle: comparing.Exportable,
  folder: pathlib.Path,
  prompts: Sequence[str],
  ask: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> str:
  """Compares answers of l2s_jax and of transformers, both in float32.

  Decoding is greedy, and by beam search unless transformers scales the logits
  of the family differently. Prompts are padded on the left; for all models but
  decoder-only ones, on the right as well.

  Args:
    bundle: the bundle that `folder` was written from.
    folder: folder from `write`.
    prompts: at least one prompt.
    ask: function of a request for `hf_answers.answer` that returns its reply;
      None runs it in a separate process.

  Returns:
    A summary.

  Raises:
    ValueError: if transformers cannot run the folder, or generates other
      tokens.
  """
  system = bundle.system
  writer = l2s.writer(system.module)[0].config
  is_pair = isinstance(system.module, l2s.LlmToSlm)
  is_continued = not (is_pair or writer.is_encoder_decoder)
  ids = comparing.prompt_ids(system, prompts)
  max_prompt_len, num_tokens = comparing.lengths(system)
  ids = [row[:max_prompt_len] for row in ids]
  ways: dict[str, dict[str, Any]] = {
    'greedy': {'num_beams': 1, 'padding_side': 'left'},
  }
  if not is_continued:  # Decoder-only models need left padding.
    ways['greedy, padded on the right'] = {
      'num_beams': 1,
      'padding_side': 'right',
    }
  has_beams = is_pair or not _scales_for_itself(folder)
  if has_beams:
    ways['beams'] = {'num_beams': _NUM_BEAMS, 'padding_side': 'left'}
  reply = (ask or _ask_transformers)(
    {
      'folder': str(folder.absolute()),
      'prompts': list(prompts),
      'max_prompt_len': max_prompt_len,
      'max_new_tokens': num_tokens,
      'ways': ways,
    }
  )
  if reply['ids'] != ids:
    row = next(i for i, x in enumerate(reply['ids']) if x != ids[i])
    raise ValueError(
      f'The tokenizer in {folder} encodes {prompts[row]!r} as '
      f'{reply["ids"][row]}, but the run as {ids[row]}. The output was deleted.'
    )
  params = bundle.params()
  for num_beams in {way['num_beams'] for way in ways.values()}:
    ours = comparing.answers(system, params, ids, num_tokens, num_beams)
    for name, way in ways.items():
      if way['num_beams'] == num_beams:
        who = f'transformers with {folder} ({name})'
        comparing.check_equal(system, prompts, ours, reply['tokens'][name], who)
  beams = f'greedy and {_NUM_BEAMS} beams' if has_beams else 'greedy'
  return (
    f'transformers generates the same tokens for {len(prompts)} prompts as the '
    f'run in float32 ({beams}, up to {num_tokens} tokens)'
  )


def _scales_for_itself(folder: pathlib.Path) -> bool:
  """Returns whether transformers scales logits that the model does not scale.

  transformers 5 does for umT5. Greedy tokens are the same, beams are not.
  """
  return (
    json.loads((folder / huggingface.CONFIG).read_text()).get('model_type')
    == 'umt5'
  )


def _ask_transformers(request: dict[str, Any]) -> dict[str, Any]:
  """Runs `hf_answers.py` in a separate process and returns its reply.

  Raises:
    ValueError: if the process fails.
  """
  program = pathlib.Path(__file__).with_name(_ANSWERS)
  with scratch.folder() as name:
    done = subprocess.run(
      [sys.executable, str(program)],
      input=json.dumps(request),
      capture_output=True,
      text=True,
      cwd=name,
      env={
        **os.environ,
        'CUDA_VISIBLE_DEVICES': '',
        'HF_HUB_OFFLINE': '1',
        'HF_MODULES_CACHE': name,
        'TRANSFORMERS_VERBOSITY': 'error',
      },
    )
  if done.returncode:
    raise ValueError(
      f'transformers cannot run {request["folder"]}. The output was deleted. '
      f'The error is:\n{done.stderr[-2000:]}'
    )
  reply: dict[str, Any] = json.loads(done.stdout)
  return reply
