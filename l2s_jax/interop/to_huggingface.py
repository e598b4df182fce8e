# SPDX-License-Identifier: Apache-2.0
"""Writes weights as a Hugging Face folder, and an LLM-to-SLM run as two.

Reading is in `weights/formats/huggingface.py`; both directions use the same
name tables.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import files
from l2s_jax.vocabularies import base
from l2s_jax.weights import runs
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.families import name_table
from l2s_jax.weights.formats import huggingface, tensor_files

SLM = 'slm'
PROJECTOR = 'projector'

# Names in a torch.nn.Sequential(Linear, ReLU, Linear), by parameter path.
# PyTorch's Linear stores kernels as [out, in].
_PROJECTOR = {
  ('projector', 'wi', 'kernel'): 'projector.0.weight',
  ('projector', 'wi', 'bias'): 'projector.0.bias',
  ('projector', 'wo', 'kernel'): 'projector.2.weight',
  ('projector', 'wo', 'bias'): 'projector.2.bias',
  ('prompt_embedder', 'kernel'): 'prompt_embedder.weight',
  ('prompt_embedder', 'bias'): 'prompt_embedder.bias',
  ('layer_mix', 'weights'): 'layer_mix.weights',
  ('layer_mix', 'scale'): 'layer_mix.scale',
}


def save(
  source: source_lib.Source,
  folder: pathlib.Path,
  vocabulary: base.Vocabulary | None,
  *,
  max_file_bytes: int = tensor_files.MAX_FILE_BYTES,
) -> None:
  """Writes config.json and safetensors files, tensor by tensor.

  Args:
    source: the weights.
    folder: destination, created if absent.
    vocabulary: tokenizer that defines the special ids in config.json if the
      source has no `model_type`; None: T5's ids for an encoder-decoder, else
      none.
    max_file_bytes: maximum size of a safetensors file; larger models are
      sharded.

  Raises:
    ValueError: if no model family of transformers has this architecture.
  """
  tensors = Tensors(source)
  tensor_files.save_safetensors(
    folder,
    tensors.shapes,
    lambda name: [tensors.read(name)],
    max_file_bytes=max_file_bytes,
  )
  content = describe(source, vocabulary)
  files.write_json(folder / huggingface.CONFIG, content)
  generation = folder / 'generation_config.json'
  if source.model_type is None or not generation.is_file():
    ids = special_ids(source, vocabulary)
    for name in huggingface.SUB_CONFIGS:
      ids |= ids.pop(name, {})
    if ids:
      files.write_json(generation, ids)


class Tensors:
  """A model's tensors under the names and in the shapes of transformers.

  Attributes:
    shapes: shapes and dtypes by name.
  """

  def __init__(
    self,
    source: source_lib.Source,
    *,
    is_reader: bool = False,
    prefix: str = '',
  ):
    """Maps names; reads no tensors.

    Args:
      source: the weights.
      is_reader: whether to take only the tensors that encode a prompt, under
        the names of the base model (`AutoModel`, without a head).
      prefix: prefix of all names.

    Raises:
      ValueError: if no model family of transformers has this architecture.
    """
    family = huggingface.FAMILIES[find_model_type(source)]
    config = source.config
    stored = source.shapes()
    is_reader |= shapes_lib.is_encoder_alone(stored)
    self._source, self._sizes = source, name_table.axis_sizes(config)
    self._parts: dict[str, list[tuple[name_table.Row, int | None]]] = {}
    for row in family.rows:
      if row.path not in stored:
        continue
      if is_reader and not is_of_reader(row.path, config):
        continue
      # save_pretrained prefixes all names but those of the head and of an
      # encoder alone.
      is_bare = is_reader or row.path[0] == 'logits_dense'
      before = prefix + ('' if is_bare else family.prefix)
      for layer, name in enumerate(row.names(config)):
        self._parts.setdefault(before + name, []).append(
          (row, layer if row.is_stacked else None)
        )
    self.shapes = {
      name: jax.ShapeDtypeStruct(row.shape(self._sizes), stored[row.path].dtype)
      for name, ((row, _), *_) in self._parts.items()
    }

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor by its name in transformers."""
    parts = self._parts[name]
    return name_table.to_theirs(
      [row for row, _ in parts],
      [self._source.read(row.path, layer) for row, layer in parts],
      self._sizes,
    )


def is_of_reader(
  path: shapes_lib.Path, config: config_lib.TransformerConfig
) -> bool:
  """Returns whether a tensor is used to encode a prompt."""
  if config.is_encoder_decoder:
    return path[0] in l2s.ENCODER
  return path[0] != 'logits_dense'


def describe(
  source: source_lib.Source,
  vocabulary: base.Vocabulary | None,
  *,
  is_reader: bool = False,
) -> dict[str, Any]:
  """Returns config.json with special token ids and dtype.

  Args:
    source: the model.
    vocabulary: see `save`.
    is_reader: see `Tensors`.

  Raises:
    ValueError: if no model family of transformers has this architecture.
  """
  content = huggingface.config_json(find_model_type(source), source.config)
  stored = source.shapes()
  if shapes_lib.is_encoder_alone(stored) or (
    is_reader and source.config.is_encoder_decoder
  ):
    content['is_encoder_decoder'] = False
    content['architectures'] = [
      name.replace('ForConditionalGeneration', 'EncoderModel')
      for name in content['architectures']
    ]
  dtype = stored[('token_embedder', 'embedding')].dtype.name
  ids = special_ids(source, vocabulary)
  for name in huggingface.SUB_CONFIGS:
    if name in content:
      content[name] |= ids.pop(name, ids)
  return content | ids | {'torch_dtype': dtype}


def find_model_type(source: source_lib.Source) -> str:
  """Returns the `model_type` to write: the source's if possible.

  Raises:
    ValueError: if no model family of transformers has this architecture.
  """
  fitting = huggingface.model_types(source.config)
  if source.model_type in fitting:
    return source.model_type
  if not fitting:
    raise ValueError(
      'No model family of transformers has the architecture of '
      f'{source.location}. Use `convert --to=l2s` or `export --to=bundle`. Its '
      'differences from T5 v1.0:\n  ' + '\n  '.join(_unusual(source.config))
    )
  return fitting[0]


def _unusual(config: config_lib.TransformerConfig) -> list[str]:
  """Returns the config fields with other values than their defaults."""
  return [
    f'{field.name}={getattr(config, field.name)!r}'
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != field.default
  ]


def special_ids(
  source: source_lib.Source,
  vocabulary: base.Vocabulary | None,
) -> dict[str, Any]:
  """Returns the special ids of the source, or else of the tokenizer.

  Returns:
    Ids by their keys in config.json, such as 'eos_token_id'.
  """
  if source.model_type is not None:
    return dict(source.special_ids)
  is_encoder_decoder = source.config.is_encoder_decoder
  start = 'decoder_start_token_id' if is_encoder_decoder else 'bos_token_id'
  if vocabulary is not None:
    ends = vocabulary.eos_ids
    ids = {
      'eos_token_id': ends[0] if len(ends) == 1 else list(ends),
      start: vocabulary.start_id,
    }
    # Attention would mask an invented id: 0 is GPT-2's '!'.
    if vocabulary.has_pad:
      ids['pad_token_id'] = vocabulary.pad_id
    return ids
  if is_encoder_decoder:
    return {'pad_token_id': 0, 'eos_token_id': 1, start: 0}
  return {}


def save_run(
  source: source_lib.Source, run: runs.Run, folder: pathlib.Path
) -> None:
  """Writes the projector of an LLM-to-SLM run, and a config.json.

  Args:
    source: the SLM; `save` writes it into the folder `slm`.
    run: the run.
    folder: destination of `projector.safetensors` and of the config.json, which
      describes how LLM, projector and SLM fit together.

  Raises:
    ValueError: if the run trained its LLM.
  """
  if run.description['train_llm']:
    raise ValueError(
      f'{run.location} has a trained LLM (TRAIN_LLM), but `convert --to=hf` '
      'writes only the projector and the SLM. Use `export` for the whole '
      'model, or set SLM_PATH to the run to use its SLM.'
    )
  tensors = others(traverse_util.unflatten_dict(run.read_others()))
  shapes = {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype)
    for name, array in tensors.items()
  }
  tensor_files.save_safetensors(
    folder, shapes, lambda name: [tensors[name]], stem=PROJECTOR
  )
  files.write_json(folder / huggingface.CONFIG, _how_it_fits(source, run))


def others(params: Any) -> dict[str, np.ndarray]:
  """Returns the parameters between LLM and SLM, with torch.nn.Linear's names.

  Args:
    params: parameters of LLM-to-SLM; those of LLM and SLM may be absent.
  """
  flat = traverse_util.flatten_dict(
    {name: x for name, x in params.items() if name not in ('llm', 'slm')}
  )
  return {
    _PROJECTOR[path]: array.T if path[-1] == 'kernel' else array
    for path, array in flat.items()
  }


def _what_is_read(layer: int | str | None) -> str:
  """Returns the definition of the projector's input H, for config.json."""
  if layer is None:
    return "H, the last hidden states of the LLM's encoder"
  norm = "after the LLM's final norm"
  if layer == l2s.MIX:
    return (
      'H, layer_mix.scale times the mean of the embeddings and the hidden '
      f'states of all layers of the LLM, each {norm}, with the weights '
      'softmax(layer_mix.weights)'
    )
  return f'H, the hidden states after layer {layer} of the LLM, {norm}'


def _how_it_fits(source: source_lib.Source, run: runs.Run) -> dict[str, Any]:
  """Returns the config.json of `save_run`."""
  description = run.description
  is_own = description['shared_vocabulary']
  if description['injection'] == 'replace':
    embeddings = 'Z'
  elif is_own:
    embeddings = "Z + the SLM's embeddings of the prompt"
  else:
    embeddings = "Z + prompt_embedder(the LLM's embeddings of the prompt)"
  return {
    'model_type': 'llm_to_slm',
    'llm': {
      'path': description['llm_path'],
      'fingerprint': description['llm_fingerprint'],
      'model_types': huggingface.model_types(
        config_lib.from_json(description['llm'], run.location, 'llm')
      ),
      'emb_dim': description['llm']['emb_dim'],
      'dtype': description['frozen_dtype'],
    },
    'projector': {
      'file': f'{PROJECTOR}.safetensors',
      'layers': ['Linear', 'ReLU', 'Linear'],
      'reads': _what_is_read(description['llm_layer']),
      'gives': 'Z',
    },
    'slm': {
      'path': SLM,
      'emb_dim': source.config.emb_dim,
      'inputs_embeds': embeddings,
    },
    'injection': description['injection'],
    'shared_vocabulary': is_own,
    'step': run.step(),
  }
