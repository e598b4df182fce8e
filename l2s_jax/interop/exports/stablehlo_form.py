# SPDX-License-Identifier: Apache-2.0
"""The format `stablehlo`: programs that need only JAX, and their weights.

    prefill.bin, decode_step.bin, generate.bin   programs of `jax.export`
    model.safetensors                            their parameters
    signature.json                               their inputs and outputs
    run.py, verify.py                            an example; a check of files

The programs run on CPU, CUDA and TPU, for any batch size and any lengths of
prompts and answers. They contain no weights.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from l2s_jax.interop.exports import comparing, greedy_programs
from l2s_jax.runtime import files
from l2s_jax.weights.formats import tensor_files

PLATFORMS = ('cpu', 'cuda', 'tpu')
SIGNATURE = 'signature.json'
_RUN = 'run_stablehlo.py'


def check(model: comparing.Described) -> None:
  """Accepts every model: the programs can express all of them."""


def write(
  bundle: greedy_programs.SystemWithParams, folder: pathlib.Path
) -> None:
  """Writes programs, parameters, signature and example.

  Args:
    bundle: the opened bundle.
    folder: an empty folder.
  """
  programs = greedy_programs.GreedyPrograms(bundle)
  shapes = {n: _shape(x) for n, x in programs.params.items()}
  tensor_files.save_safetensors(
    folder, shapes, lambda name: [programs.params[name]]
  )
  exported = _export(programs, shapes)
  for name, program in exported.items():
    with files.whole(folder / f'{name}.bin', 'wb') as file:
      file.write(program.serialize())
  files.write_json(folder / SIGNATURE, _signature(programs, exported))
  greedy_programs.copy_along(folder, {_RUN: 'run.py'})


def _export(
  programs: greedy_programs.GreedyPrograms,
  params: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.export.Exported]:
  """Exports the three programs with symbolic dimensions."""
  batch, prompt, answer = jax.export.symbolic_shape(
    'batch, prompt, answer', constraints=programs.constraints
  )
  tokens = _ints(batch, prompt)
  first, room = _ints(batch), _ints(answer)

  def export(function: Any, *args: Any) -> jax.export.Exported:
    return jax.export.export(
      jax.jit(greedy_programs.traced(function)), platforms=PLATFORMS
    )(*args)

  prefill = export(programs.prefill, params, tokens, tokens, room)
  cache = jax.tree.unflatten(prefill.out_tree, prefill.out_avals)
  return {
    'prefill': prefill,
    'decode_step': export(
      programs.decode_step,
      {name: params[name] for name in programs.writer_names},
      *_of_a_step(cache),
    ),
    'generate': export(programs.generate, params, tokens, tokens, first, room),
  }


def _of_a_step(
  cache: Mapping[str, Any],
) -> tuple[jax.ShapeDtypeStruct, dict[str, jax.ShapeDtypeStruct]]:
  """Returns the input shapes of a step, with its own symbolic dimensions.

  `slots` is the number of slots in the cache, for prompt and answer together if
  the SLM is decoder-only.
  """
  batch, slots, prompt = jax.export.symbolic_shape('batch, slots, prompt')
  axes = {'valid': (batch, slots), 'slot': (), 'cross_valid': (batch, prompt)}
  found = {}
  for name, x in cache.items():
    shape = axes.get(name)
    if shape is None:
      length = prompt if name.startswith('cross_') else slots
      shape = (batch, x.shape[1], length, x.shape[3])
    found[name] = jax.ShapeDtypeStruct(shape, x.dtype)
  return _ints(batch), found


def _ints(*shape: Any) -> jax.ShapeDtypeStruct:
  """Returns the shape of an int32 array."""
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _shape(x: np.ndarray) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of an array."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _signature(
  programs: greedy_programs.GreedyPrograms,
  exported: Mapping[str, jax.export.Exported],
) -> dict[str, Any]:
  """Returns the content of `signature.json`."""
  arguments = {
    'prefill': ('params', 'prompt_tokens', 'segment_ids', 'answer'),
    'decode_step': ('params', 'token', 'cache'),
    'generate': (
      'params',
      'prompt_tokens',
      'segment_ids',
      'first_tokens',
      'answer',
    ),
  }
  return {
    'programs': {
      name: {
        'inputs': dict(zip(arguments[name], _described(program), strict=True)),
        'outputs': _words(
          jax.tree.unflatten(program.out_tree, program.out_avals)
        ),
      }
      for name, program in exported.items()
    },
    'platforms': list(PLATFORMS),
    'jax': jax.__version__,
    'calling_convention_version': (
      exported['generate'].calling_convention_version
    ),
    **programs.signature,
  }


def _described(program: jax.export.Exported) -> Sequence[Any]:
  """Returns dtypes and shapes of a program's arguments, in their order."""
  args, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
  return [_words(x) for x in args]


def _words(tree: Any) -> Any:
  """Returns a pytree with the dtype and shape of each array as text."""
  return jax.tree.map(
    lambda x: {'dtype': str(x.dtype), 'shape': [str(n) for n in x.shape]}, tree
  )


def compare(
  bundle: greedy_programs.SystemWithParams,
  folder: pathlib.Path,
  prompts: Sequence[str],
) -> str:
  """Compares answers of `infer`'s decode loop and of the exported programs.

  `generate` runs in a separate process, in `run.py`; `prefill` and
  `decode_step` run in this process.

  Args:
    bundle: the bundle that `folder` was written from.
    folder: folder from `write`.
    prompts: at least one prompt.

  Returns:
    A summary.

  Raises:
    ValueError: if a program does not run, or generates other tokens.
  """
  programs = greedy_programs.GreedyPrograms(bundle)
  max_prompt_len, num_tokens = comparing.lengths(bundle.system)
  rows = programs.prompt_rows(prompts, max_prompt_len)
  inputs = programs.inputs(rows, num_tokens)
  expected = greedy_programs.expected_tokens(bundle, inputs)
  whole = greedy_programs.run_program(folder, rows, num_tokens)
  for name, found in (
    ('generate.bin', whole),
    ('decode_step.bin', _step_by_step(folder, programs, inputs)),
  ):
    who = f'{folder / name}'
    comparing.check_equal(bundle.system, prompts, expected, found, who)
  return (
    f'JAX generates the same tokens for {len(prompts)} prompts as the run, '
    'with generate.bin and with decode_step.bin (greedy, up to '
    f'{num_tokens} tokens)'
  )


def _step_by_step(
  folder: pathlib.Path,
  programs: greedy_programs.GreedyPrograms,
  inputs: Mapping[str, np.ndarray],
) -> list[list[int]]:
  """Returns tokens from `prefill` and `decode_step`, not cut at EOS."""
  prefill, step = (
    jax.jit(
      jax.export.deserialize(
        bytearray((folder / f'{name}.bin').read_bytes())
      ).call
    )
    for name in ('prefill', 'decode_step')
  )
  tensors = tensor_files.open_folder(folder)
  params = {name: tensor.read() for name, tensor in tensors.items()}
  names = ('prompt_tokens', 'segment_ids', 'answer')
  cache = prefill(params, *(inputs[name] for name in names))
  writer = {name: params[name] for name in programs.writer_names}
  token, found = inputs['first_tokens'], []
  for _ in inputs['answer']:
    logits, cache = step(writer, token, cache)
    token = logits.argmax(-1).astype(np.int32)
    found.append(np.asarray(token))
  tokens: list[list[int]] = np.stack(found, axis=1).tolist()
  return tokens
