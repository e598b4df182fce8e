# SPDX-License-Identifier: Apache-2.0
"""The format `onnx`: two models for ONNX Runtime, and their weights.

    prefill.onnx, decode_step.onnx   the models, without weights
    model.safetensors                weights, memory-mapped by both models
    signature.json                   special ids, lengths
    run.py, verify.py                an example; a check of the files

`prefill` contains the LLM's encoder, the projector and the SLM's part for the
prompt. `decode_step` contains the SLM and decodes one token per row. Both
compute in float32, for any batch size and any lengths.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from l2s_jax.interop.exports import comparing, greedy_programs, onnx_lowering
from l2s_jax.models import cache as cache_lib
from l2s_jax.models import l2s, lora
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import extras, files
from l2s_jax.systems import system as system_lib
from l2s_jax.weights.formats import tensor_files

SIGNATURE = 'signature.json'
_RUN = 'run_onnx.py'
_MODELS = ('prefill', 'decode_step')
# Least share of the run's tokens that int8 models must choose, too.
_LEAST_SHARE = 0.8
# Prefixes of the cache arrays of a step: `past.key_00` in, `present.key_00`
# out.
_PAST, _PRESENT = 'past.', 'present.'

Shape = jax.ShapeDtypeStruct


def check(model: comparing.Described) -> None:
  """Checks that jax2onnx can convert the model, with zeros as weights.

  Raises:
    ValueError: if it cannot, with its error, or if it is not installed.
  """
  if extras.missing('jax2onnx'):
    raise ValueError(
      '--to=onnx needs jax2onnx, which is not installed: pip install --no-deps '
      'jax2onnx (without --no-deps, pip installs an older orbax-checkpoint).'
    )
  for _ in _converted(_programs(_OfShapes(model.system)), None):
    pass


def write(
  bundle: greedy_programs.SystemWithParams, folder: pathlib.Path
) -> None:
  """Writes models, weights, signature and example.

  Args:
    bundle: the opened bundle.
    folder: an empty folder.
  """
  import onnx

  programs = _programs(bundle)
  tensor_files.save_safetensors(
    folder,
    _params(programs),
    lambda name: [programs.params[name].astype(np.float32)],
  )
  for name, model in _converted(programs, folder):
    with files.whole(folder / f'{name}.onnx', 'wb') as file:
      file.write(model.SerializeToString())
    onnx.checker.check_model(folder / f'{name}.onnx')
  files.write_json(folder / SIGNATURE, programs.signature)
  greedy_programs.copy_along(folder, {_RUN: 'run.py'})


def _params(programs: greedy_programs.GreedyPrograms) -> dict[str, Shape]:
  """Returns the shapes of the parameters in float32."""
  return {
    name: Shape(x.shape, np.dtype(np.float32))
    for name, x in programs.params.items()
  }


def _converted(
  programs: greedy_programs.GreedyPrograms, folder: pathlib.Path | None
) -> Iterator[tuple[str, Any]]:
  """Yields the names and ONNX models; see `onnx_lowering.convert`."""
  system, params = programs.system, _params(programs)
  is_decoder_only = not l2s.writer(system.module)[0].config.is_encoder_decoder
  # Symbolic dimensions of prefill; those of a step are in `_of_a_step`.
  batch, prompt, answer = jax.export.symbolic_shape('batch, prompt, answer')
  inputs = {
    'prompt_tokens': Shape((batch, prompt), jnp.int32),
    'segment_ids': Shape((batch, prompt), jnp.int32),
    'answer': Shape((answer,), jnp.int32),
  }
  prefill = functools.partial(_prefill, programs, is_decoder_only)
  cache = jax.eval_shape(greedy_programs.traced(prefill), params, inputs)
  for name, function, read, arguments in (
    ('prefill', prefill, params, inputs),
    (
      'decode_step',
      functools.partial(_decode_step, programs),
      {name: params[name] for name in programs.writer_names},
      _of_a_step(cache),
    ),
  ):
    yield name, onnx_lowering.convert(function, read, arguments, folder)


@dataclasses.dataclass(frozen=True)
class _InFloat32:
  """A bundle with float32 activations; parameters keep their dtypes."""

  bundle: greedy_programs.SystemWithParams

  @property
  def system(self) -> system_lib.System:
    return comparing.in_float32(self.bundle.system)

  def params(self) -> Any:
    return self.bundle.params()


@dataclasses.dataclass(frozen=True)
class _OfShapes:
  """A bundle of zeros, broadcast from scalars to take no memory."""

  system: system_lib.System

  def params(self) -> Any:
    shapes = shapes_lib.of_module(self.system.module)
    return traverse_util.unflatten_dict(
      {
        path: np.broadcast_to(np.zeros((), shape.dtype), shape.shape)
        for path, shape in shapes.items()
        if not lora.is_learned(path[-1])  # Bundles have LoRA merged.
      }
    )


def _programs(
  bundle: greedy_programs.SystemWithParams,
) -> greedy_programs.GreedyPrograms:
  """Returns the programs in float32, with the LLM's layers unstacked."""
  # A scan over stacked layers would copy the weights of each layer.
  return greedy_programs.GreedyPrograms(_InFloat32(bundle), unstack_llm=True)


def _prefill(
  programs: greedy_programs.GreedyPrograms,
  is_decoder_only: bool,
  params: greedy_programs.Flat,
  inputs: greedy_programs.Flat,
) -> greedy_programs.Flat:
  """Returns the cache of prompts with slots for answers, names prefixed."""
  num_slots = inputs['answer'].shape[0]
  cache = programs.read_prompts(
    params,
    inputs['prompt_tokens'],
    inputs['segment_ids'],
    0 if is_decoder_only else num_slots,
  )
  if is_decoder_only:
    cache = _append_room(cache, num_slots)
  return _named(greedy_programs.flatten(cache), _PRESENT)


def _append_room(cache: cache_lib.Cache, num_slots: Any) -> cache_lib.Cache:
  """Appends empty slots, like `cache.grow` without a symbolic pad.

  jax2onnx cannot convert a pad by a symbolic dimension.
  """

  def append(x: jax.Array, axis: int) -> jax.Array:
    shape = (*x.shape[:axis], num_slots, *x.shape[axis + 1 :])
    return jnp.concatenate([x, jnp.zeros(shape, x.dtype)], axis)

  return cache.replace(
    kv=jax.tree.map(lambda x: append(x, 2), cache.kv),
    valid=append(cache.valid, 1),
  )


def _decode_step(
  programs: greedy_programs.GreedyPrograms,
  params: greedy_programs.Flat,
  inputs: greedy_programs.Flat,
) -> greedy_programs.Flat:
  """Returns the logits of the next token, and the changed part of the cache."""
  cache = {n.removeprefix(_PAST): x for n, x in inputs.items() if n != 'token'}
  logits, after = programs.decode_step(params, inputs['token'], cache)
  changed = {n: x for n, x in after.items() if not _is_of_prompt(n)}
  return {'logits': logits, **_named(changed, _PRESENT)}


def _named(cache: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """Adds a prefix to the names of the arrays that change in each step."""
  return {
    name if _is_of_prompt(name) else f'{prefix}{name}': x
    for name, x in cache.items()
  }


def _is_of_prompt(name: str) -> bool:
  """Returns whether a cache array is of cross-attention: steps keep it."""
  return name.startswith('cross_')


def _of_a_step(cache: Mapping[str, Shape]) -> dict[str, Shape]:
  """Returns the input shapes of a step, with its own symbolic dimensions."""
  batch, slots, prompt = jax.export.symbolic_shape('batch, slots, prompt')
  found = {'token': Shape((batch,), jnp.int32)}
  for name, x in cache.items():
    shape = list(x.shape)
    if shape:
      shape[0] = batch
      shape[1 if len(shape) == 2 else 2] = (
        prompt if _is_of_prompt(name) else slots
      )
    found[name.replace(_PRESENT, _PAST)] = Shape(tuple(shape), x.dtype)
  return found


def compare(
  bundle: greedy_programs.SystemWithParams,
  folder: pathlib.Path,
  prompts: Sequence[str],
) -> str:
  """Compares answers of `infer`'s decode loop and of the export's `run.py`.

  Args:
    bundle: the bundle that `folder` was written from.
    folder: folder from `write`.
    prompts: at least one prompt.

  Returns:
    A summary.

  Raises:
    ValueError: if a model does not run, or generates other tokens.
  """
  programs = _programs(bundle)
  max_prompt_len, num_tokens = comparing.lengths(bundle.system)
  rows = programs.prompt_rows(prompts, max_prompt_len)
  expected = greedy_programs.expected_tokens(
    _InFloat32(bundle), programs.inputs(rows, num_tokens)
  )
  comparing.check_equal(
    bundle.system,
    prompts,
    expected,
    greedy_programs.run_program(folder, rows, num_tokens),
    f'ONNX Runtime with {folder}',
  )
  return (
    f'ONNX Runtime generates the same tokens for {len(prompts)} prompts as the '
    f'run (greedy, up to {num_tokens} tokens)'
  )


def quantize(
  bundle: greedy_programs.SystemWithParams,
  folder: pathlib.Path,
  prompts: Sequence[str],
) -> str:
  """Quantizes a folder from `write` to int8 by ONNX Runtime's quantizer.

  Weights of matrix products become integers of seven bits, one scale per
  output. Activations are quantized in each product, one scale per tensor. The
  quantizer holds all weights in memory. The int8 models are compared with the
  run: after each token of the run's answers, they must choose the next one.

  Args:
    bundle: the bundle that `folder` was written from.
    folder: folder from `write`, compared with the run.
    prompts: prompts for the comparison; none for no comparison.

  Returns:
    A summary.

  Raises:
    ValueError: if the int8 models choose too few of the run's tokens.
  """
  from onnxruntime import quantization

  mode = (folder / SIGNATURE).stat().st_mode
  logging.disable(logging.WARNING)  # Of an optional preparation.
  try:
    for name in _MODELS:
      quantization.quantize_dynamic(
        folder / f'{name}.onnx',
        folder / f'{name}.int8.onnx',
        op_types_to_quantize=['MatMul'],
        per_channel=True,
        # Processors without VNNI or AMX add pairs of products in 16 bits, which
        # overflow with weights of eight bits.
        reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
      )
  finally:
    logging.disable(logging.NOTSET)
  (folder / 'model.safetensors').unlink()
  for name in _MODELS:
    (folder / f'{name}.int8.onnx').replace(folder / f'{name}.onnx')
    # Weights; the model names this file.
    (folder / f'{name}.int8.onnx.data').chmod(mode)
  if not prompts:
    return 'the int8 models are not compared with the run'
  programs = _programs(bundle)
  max_prompt_len, num_tokens = comparing.lengths(bundle.system)
  inputs = programs.inputs(
    programs.prompt_rows(prompts, max_prompt_len), num_tokens
  )
  expected = greedy_programs.expected_tokens(_InFloat32(bundle), inputs)
  found = _next_tokens(folder, inputs, expected)
  wanted = np.concatenate([np.asarray(row) for row in expected])
  share = float(np.mean(found == wanted))
  if share < _LEAST_SHARE:
    raise ValueError(
      f'--quantization=int8: the int8 models choose {share:.1%} of the '
      f"{wanted.size} tokens of the run's answers; expected at least "
      f'{_LEAST_SHARE:.0%}. The output was deleted. Export without '
      '--quantization, or try other --prompts.'
    )
  return (
    f'the int8 models choose {share:.1%} of the {wanted.size} tokens of the '
    "run's answers, each after the run's tokens before it"
  )


def _next_tokens(
  folder: pathlib.Path,
  inputs: Mapping[str, np.ndarray],
  answers: Sequence[Sequence[int]],
) -> np.ndarray:
  """Returns the tokens that the models choose after each part of an answer.

  Args:
    folder: folder with the models.
    inputs: from `GreedyPrograms.inputs`.
    answers: token ids, [prompt][token].

  Returns:
    One token for each of the answers, [all tokens], answer by answer.
  """
  import onnxruntime

  def run(name: str, arrays: Mapping[str, np.ndarray]) -> Any:
    session = sessions[name]
    given = {x.name: arrays[x.name] for x in session.get_inputs()}
    names = [x.name.replace(_PRESENT, _PAST) for x in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # Errors only.
  sessions = {
    name: onnxruntime.InferenceSession(folder / f'{name}.onnx', options)
    for name in _MODELS
  }
  arrays = run('prefill', inputs)
  token, chosen = inputs['first_tokens'], []
  for i in range(max(map(len, answers))):
    arrays |= run('decode_step', {**arrays, 'token': token})
    chosen.append(arrays['logits'].argmax(-1))
    token = np.asarray(
      [row[i] if i < len(row) else 0 for row in answers], np.int32
    )
  table = np.stack(chosen, axis=1)  # [prompt, token]
  return np.concatenate(
    [row[: len(answer)] for row, answer in zip(table, answers, strict=True)]
  )
