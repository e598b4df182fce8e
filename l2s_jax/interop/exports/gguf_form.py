# SPDX-License-Identifier: Apache-2.0
"""The format `gguf`: a decoder-only model as one file for llama.cpp.

The package gguf writes the file and has llama.cpp's tensor names. This module
changes tensors like llama.cpp's converter, one tensor at a time.
`weights/formats/gguf_file.py` reads the file back.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from l2s_jax.interop import to_huggingface
from l2s_jax.interop.exports import comparing, gguf_vocabulary, model_card
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s, positions
from l2s_jax.runtime import files, scratch
from l2s_jax.vocabularies import loading
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import gguf_file, huggingface

FILE = 'model.gguf'

# llama.cpp's architecture by transformers' `model_type`.
_ARCHITECTURES = {
  'llama': 'llama',
  'mistral': 'llama',  # without a window, which llama.cpp would ignore
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'gemma2': 'gemma2',
  'gemma3_text': 'gemma3',
  'gpt2': 'gpt2',
  'gpt_neox': 'gptneox',
}
# Config fields that a file need not have.
_UNSAID = (
  *config_lib.RUNTIME_FIELDS,
  'kernel_init_stddev',
  'embedding_init_stddev',
  'lora_alpha',
  'lora_kernels',
)
# Llama 3.1's low and high frequency factors and original context length.
_LLAMA_3 = (1.0, 4.0, 8192.0)
_CONTEXT = 4096  # For models without a maximum.
_FLOAT32_NAMES = ('position_embd',)  # And all norms and biases.


def check(model: comparing.Described) -> None:
  """Checks that llama.cpp supports the model, and that it can be read back.

  Raises:
    ValueError: names the unsupported property.
  """
  if isinstance(model.system.module, l2s.LlmToSlm):
    raise ValueError(
      'The model is LLM-to-SLM: its SLM reads embeddings from the projector, '
      'but a GGUF file holds one model that reads tokens. llama.cpp would need '
      'the LLM as a separate file (t5encoder), the projector, and the SLM with '
      'the prompt in `llama_batch.embd` before the start token. Use --to=hf.'
    )
  source = _source(model)
  _check_said(source, _architecture(source))
  gguf_vocabulary.metadata(model.system, source.config.vocab_size)


def _source(bundle: comparing.Described) -> source_lib.Source:
  """Returns the language model of a bundle with one."""
  (source,) = bundle.towers.values()
  checked: source_lib.Source = source
  return checked


def _architecture(source: source_lib.Source) -> str:
  """Returns llama.cpp's name of the model family.

  Raises:
    ValueError: if llama.cpp or this module does not support the family.
  """
  if source.config.is_encoder_decoder:
    raise ValueError(
      f'{source.location} is an encoder-decoder; --to=gguf supports only '
      'decoder-only models. Use --to=hf.'
    )
  to_huggingface.find_model_type(source)
  fitting = [
    name
    for name in huggingface.model_types(source.config)
    if name in _ARCHITECTURES
  ]
  if source.model_type in fitting:
    return _ARCHITECTURES[source.model_type]
  if not fitting:
    raise ValueError(
      f'{source.location} is of the family '
      f'{to_huggingface.find_model_type(source)}; --to=gguf supports only '
      f'{", ".join(_ARCHITECTURES)}. Use --to=hf.'
    )
  return _ARCHITECTURES[fitting[0]]


def _check_said(source: source_lib.Source, arch: str) -> None:
  """Checks that the config is equal after a round trip through the metadata.

  Raises:
    ValueError: lists the config fields that differ.
  """
  config = source.config
  is_llama_3 = config.rope_scaling_type == 'llama3' and config.rope_scaling
  if is_llama_3:
    if arch != 'llama' or config.rope_scaling[1:] != _LLAMA_3:
      raise ValueError(
        f'{source.location} has rope_scaling={config.rope_scaling}; --to=gguf '
        f'supports only that of Llama 3.1: (factor, '
        f'{", ".join(map(str, _LLAMA_3))}). Use --to=hf.'
      )
    config = dataclasses.replace(config, rope_scaling=())
  metadata: dict[str, Any] = {'general.architecture': arch} | {
    f'{arch}.{key}': float(np.float32(x)) if isinstance(x, float) else x
    for key, x in _metadata(config, arch).items()
  }
  names = [] if config.logits_via_embedding else ['output.weight']
  again = gguf_file.config_of(metadata, names, config.vocab_size)
  expected, found = map(huggingface.effective, (config, again))
  unsaid = set(_UNSAID) | ({'max_positions'} - {_positions_key(config)})
  differing = [
    f'  {name}={expected[name]!r} (read back as {found[name]!r})'
    for name in expected
    if name not in unsaid and expected[name] != found[name]
  ]
  if differing:
    raise ValueError(
      f'{source.location} has config values that a GGUF file of the '
      f'architecture {arch} cannot express. Use --to=hf.\n'
      + '\n'.join(differing)
    )


def _positions_key(config: config_lib.TransformerConfig) -> str:
  """Returns 'max_positions' if the model has a maximum, else ''."""
  return 'max_positions' if config.max_positions else ''


def _metadata(
  config: config_lib.TransformerConfig, arch: str
) -> dict[str, Any]:
  """Returns the metadata of an architecture, without its prefix '{arch}.'."""
  found: dict[str, Any] = {
    'vocab_size': config.vocab_size,
    'context_length': config.max_positions or _CONTEXT,
    'embedding_length': config.emb_dim,
    'feed_forward_length': config.mlp_dim,
    'block_count': config.num_decoder_layers,
    'attention.head_count': config.num_heads,
  }
  if config.positions == 'rotary':
    found |= {
      'rope.freq_base': config.rope_base,
      'rope.dimension_count': config.rotary_dim,
    }
  if config.norm == 'layer':
    found['attention.layer_norm_epsilon'] = config.norm_epsilon
    if arch == 'gptneox':
      found['use_parallel_residual'] = config.parallel_residual
  else:
    found |= {
      'attention.layer_norm_rms_epsilon': config.norm_epsilon,
      'attention.head_count_kv': config.kv_heads,
      'attention.key_length': config.head_dim,
      'attention.value_length': config.head_dim,
    }
  if config.sliding_window and arch.startswith('gemma'):
    found['attention.sliding_window'] = config.sliding_window
  if config.attention_softcap:
    found['attn_logit_softcapping'] = config.attention_softcap
  if config.logits_softcap:
    found['final_logit_softcapping'] = config.logits_softcap
  if config.rope_scaling and config.rope_scaling_type != 'llama3':
    found |= {
      'rope.scaling.type': config.rope_scaling_type,
      'rope.scaling.factor': config.rope_scaling[0],
    }
    if config.rope_scaling_type == 'yarn':
      _, fast, slow, context, _ = config.rope_scaling
      found |= {
        'rope.scaling.original_context_length': int(context),
        'rope.scaling.yarn_beta_fast': fast,
        'rope.scaling.yarn_beta_slow': slow,
      }
  return found


def write(bundle: comparing.Exportable, folder: pathlib.Path) -> None:
  """Writes the GGUF file and a model card.

  Args:
    bundle: the opened bundle.
    folder: destination, created if absent.
  """
  import gguf

  source, system = _source(bundle), bundle.system
  arch = _architecture(source)
  folder.mkdir(parents=True, exist_ok=True)
  writer = gguf.GGUFWriter(folder / FILE, arch)
  for key, value in _metadata(source.config, arch).items():
    writer.add_key_value(f'{arch}.{key}', value, _kind(value))
  vocabulary = gguf_vocabulary.metadata(system, source.config.vocab_size)
  for key, value in vocabulary.items():
    if isinstance(value, list | bytes):
      writer.add_array(key, value)
    else:
      writer.add_key_value(key, value, _kind(value))
  tensors = _Tensors(source, arch)
  for name, shape in tensors.shapes.items():
    is_bfloat16 = shape.dtype.name == 'bfloat16'
    writer.add_tensor_info(
      name,
      shape.shape,
      np.dtype(np.uint16) if is_bfloat16 else np.dtype(shape.dtype),
      shape.size * shape.dtype.itemsize,
      gguf.GGMLQuantizationType.BF16 if is_bfloat16 else None,
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for name in tensors.shapes:
    array = np.ascontiguousarray(tensors.read(name))
    if array.dtype.name == 'bfloat16':
      array = array.view(np.uint16)
    writer.write_tensor_data(array)
  writer.close()
  card = model_card.text(
    bundle, examples=[_example(system)], library='llama.cpp'
  )
  with files.whole(folder / 'README.md') as file:
    file.write(card)


def _kind(value: Any) -> Any:
  """Returns the GGUF type of a Python value."""
  import gguf

  kinds = gguf.GGUFValueType
  by_type = {
    bool: kinds.BOOL,
    int: kinds.UINT32,
    float: kinds.FLOAT32,
    str: kinds.STRING,
  }
  return by_type[type(value)]


def _example(system: Any) -> str:
  """Returns the Python example of the model card."""
  before, after = comparing.around(system)
  return '\n'.join(
    [
      'import llama_cpp  # the package llama-cpp-python',
      '',
      f"model = llama_cpp.Llama('{FILE}')",
      "ids = model.tokenize(b'a prompt', add_bos=False)",
      f'ids = {before} + ids + {after}  # special ids, as in training',
      'answer = []',
      'for token in model.generate(ids, temp=0.0):',
      f'  if token in {list(system.answer_vocabulary.eos_ids)}:',
      '    break',
      '  answer.append(token)',
      'print(model.detokenize(answer).decode())',
    ]
  )


class _Tensors:
  """The tensors of a model under llama.cpp's names, in its order."""

  def __init__(self, source: source_lib.Source, arch: str):
    import gguf

    self._config, self._arch = source.config, arch
    self._tensors = to_huggingface.Tensors(source)
    (kind,) = (k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    table = gguf.get_tensor_name_map(kind, source.config.num_decoder_layers)
    self._theirs: dict[str, str] = {}
    for theirs in self._tensors.shapes:
      ours = table.get_name(theirs, try_suffixes=('.weight', '.bias'))
      assert ours is not None, theirs
      self._theirs[ours] = theirs
    self._factors: np.ndarray | None = None
    if source.config.rope_scaling_type == 'llama3':
      self._factors = _factors(source.config)
    self.shapes = {
      ours: self._shape(ours, self._tensors.shapes[theirs])
      for ours, theirs in self._theirs.items()
    }
    if self._factors is not None:
      shape = jax.ShapeDtypeStruct(self._factors.shape, self._factors.dtype)
      self.shapes = {'rope_freqs.weight': shape, **self.shapes}

  def _shape(
    self, name: str, shape: jax.ShapeDtypeStruct
  ) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a tensor in llama.cpp."""
    is_float32 = len(shape.shape) == 1 or name.startswith(_FLOAT32_NAMES)
    dtype = np.dtype(np.float32) if is_float32 else shape.dtype
    swaps = self._is_transposed(name) and len(shape.shape) == 2
    return jax.ShapeDtypeStruct(
      shape.shape[::-1] if swaps else shape.shape, dtype
    )

  def _is_transposed(self, name: str) -> bool:
    """Returns whether transformers stores a kernel transposed, as in GPT-2."""
    return self._arch == 'gpt2' and name.startswith('blk.')

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor in the form of llama.cpp's converter."""
    if name == 'rope_freqs.weight':
      assert self._factors is not None
      return self._factors
    array = self._tensors.read(self._theirs[name])
    array = array.astype(self.shapes[name].dtype, copy=False)
    if self._is_transposed(name) and array.ndim == 2:
      array = array.T
    if self._arch == 'llama' and ('.attn_q.' in name or '.attn_k.' in name):
      # llama.cpp rotates pairs of adjacent features, transformers pairs across
      # the two halves.
      heads = self._config.num_heads if '_q.' in name else self._config.kv_heads
      halves = array.reshape(heads, 2, -1, *array.shape[1:])
      array = halves.swapaxes(1, 2).reshape(array.shape)
    if self._arch == 'gptneox' and '.attn_qkv.' in name:
      # From [head, query/key/value] to [query/key/value, head].
      parts = array.reshape(self._config.num_heads, 3, -1, *array.shape[1:])
      array = parts.swapaxes(0, 1).reshape(array.shape)
    if self._config.norm_unit_offset and name.endswith('norm.weight'):
      array = array + np.float32(1)
    return array


def _factors(
  config: config_lib.TransformerConfig,
) -> np.ndarray | None:
  """Returns Llama 3.1's divisors of the rotary frequencies, or None."""
  if not config.rope_scaling:
    return None
  plain = dataclasses.replace(config, rope_scaling=())
  slowed = positions.frequencies(plain) / positions.frequencies(config)
  return slowed.astype(np.float32)


def compare(
  bundle: comparing.Exportable, folder: pathlib.Path, prompts: Sequence[str]
) -> str:
  """Reads the file back and compares tensors, tokenizer and greedy answers.

  Args:
    bundle: the bundle that the file was written from.
    folder: folder from `write`.
    prompts: at least one prompt.

  Returns:
    A summary.

  Raises:
    ValueError: if one of them differs.
  """
  source, system = _source(bundle), bundle.system
  file = gguf_file.File(folder / FILE)
  # Adding 1 to a norm's scale and subtracting it again rounds.
  atol = 2**-22 if source.config.norm_unit_offset else 0.0
  differing = [
    '/'.join(path)
    for path, shape in source.shapes().items()
    for layer in source_lib.layers(path, shape.shape)
    if not _is_near(source, file, path, layer, atol)
  ]
  if differing or file.shapes().keys() != source.shapes().keys():
    raise ValueError(
      f'{folder / FILE} reads back with other tensors than were written. The '
      'output was deleted. Differing tensors:\n  '
      + '\n  '.join(sorted(set(differing)))
    )
  ids = comparing.prompt_ids(system, prompts)
  _check_tokenizer(system, file, prompts, folder)
  max_prompt_len, num_tokens = comparing.lengths(system)
  ids = [row[:max_prompt_len] for row in ids]
  theirs = {path: file.read(path) for path in file.shapes()}
  module = l2s.build(file.config)
  ours, found = (
    comparing.answers(one, params, ids, num_tokens)
    for one, params in (
      (system, bundle.params()),
      (
        dataclasses.replace(system, module=module),
        traverse_util.unflatten_dict(theirs),
      ),
    )
  )
  comparing.check_equal(system, prompts, ours, found, f'{folder / FILE}')
  return (
    f'{len(theirs)} tensors, the tokenizer and greedy answers to '
    f'{len(prompts)} prompts (up to {num_tokens} tokens) are equal after the '
    'file is read back'
  )


def _is_near(
  a: source_lib.Source,
  b: source_lib.Source,
  path: tuple[str, ...],
  layer: int | None,
  atol: float,
) -> bool:
  """Returns whether a tensor is equal in both sources.

  Norm scales may differ by `atol`, relative to values above 1.
  """
  if path not in b.shapes() or a.shapes()[path].shape != b.shapes()[path].shape:
    return False
  x, y = (np.asarray(s.read(path, layer)).astype(np.float32) for s in (a, b))
  if path[-1] != 'scale' or not atol:
    return np.array_equal(x, y)
  return bool(np.all(np.abs(x - y) <= atol * np.maximum(1, np.abs(x))))


def _check_tokenizer(
  system: Any,
  file: gguf_file.File,
  prompts: Sequence[str],
  folder: pathlib.Path,
) -> None:
  """Checks that the file's tokenizer gives the same ids.

  Raises:
    ValueError: with the first prompt whose ids differ.
  """
  expected = system.prompt_vocabulary
  with scratch.folder() as name:
    file.save_tokenizer(pathlib.Path(name))
    found = loading.load(name)
  for prompt in prompts:
    if found.encode(prompt) != expected.encode(prompt):
      raise ValueError(
        f'The tokenizer in {folder / FILE} encodes {prompt!r} as '
        f'{found.encode(prompt)}, but the run as {expected.encode(prompt)}. '
        'The output was deleted.'
      )
