# SPDX-License-Identifier: Apache-2.0
"""The form `onnx`: prefill and a decode step for ONNX Runtime.

    prefill.onnx, decode_step.onnx   for any number and length of prompts
    signature.json                   special ids, and what the cache is
    run.py                           an example

The models are in float32, whatever the bundle is in: ONNX Runtime has few
operations in bfloat16 for CPUs. Each holds the weights that it reads.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax.interop.exports import greedy_programs
from l2s_jax.models import l2s
from l2s_jax.runtime import files
from l2s_jax.systems import system as system_lib

SIGNATURE = 'signature.json'
_RUN = 'run_onnx.py'
_PACKAGES = ('jax2onnx', 'onnx', 'onnxruntime')
# Of the comparison.
_MAX_PROMPT_LEN, _COMPARED_TOKENS = 256, 32
# A model beyond 2 GB is none: weights go into a file beside it.
_WEIGHTS_INSIDE = 2**20


@dataclasses.dataclass(frozen=True)
class _InFloat32:
  """A bundle whose computation is in float32."""

  system: system_lib.System
  arrays: Any

  def params(self) -> Any:
    return self.arrays


def check(bundle: greedy_programs.SystemWithParams) -> None:
  """Refuses where the packages are missing.

  Raises:
    ValueError: with how to install them.
  """
  module = bundle.system.module
  if isinstance(module, l2s.LlmToSlm) and module.llm_prefix_ids:
    raise ValueError(
      '--to=onnx: this decoder-only LLM reads '
      f'{len(module.llm_prefix_ids)} tokens in front of each prompt, and '
      'jax2onnx has no lengths that are sums. Take --to=stablehlo.'
    )
  missing = [
    name for name in _PACKAGES if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise ValueError(
      f'--to=onnx needs {", ".join(missing)}, not installed here: pip install '
      'onnx onnx-ir onnxruntime, and pip install --no-deps jax2onnx (its '
      'other requirements ask for an older orbax-checkpoint).'
    )


def write(
  bundle: greedy_programs.SystemWithParams, folder: pathlib.Path
) -> None:
  """Writes the two models, the signature and the example."""
  bundle = _in_float32(bundle)
  programs = greedy_programs.GreedyPrograms(bundle)
  params = {name: jnp.asarray(x) for name, x in programs.params.items()}
  # Of an encoder-decoder nothing but the read prompt is worth a model's work.
  is_decoder_only = not _writer_config(bundle.system).is_encoder_decoder

  def prefill(tokens: Any, segment_ids: Any) -> Any:
    answer = jnp.zeros((0,), jnp.int32)
    cache = programs.prefill(params, tokens, segment_ids, answer)
    return {
      name: x
      for name, x in cache.items()
      if is_decoder_only or name.startswith('cross_')
    }

  tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
  answer = jax.ShapeDtypeStruct((1,), jnp.int32)
  cache = jax.eval_shape(
    greedy_programs.traced(programs.prefill), params, tokens, tokens, answer
  )
  names = sorted(cache)
  _save(
    prefill,
    {
      name: (('batch', 'prompt'), jnp.int32)
      for name in ('prompt_tokens', 'segment_ids')
    },
    [n for n in names if is_decoder_only or n.startswith('cross_')],
    folder / 'prefill.onnx',
  )
  changed = [name for name in names if not name.startswith('cross_')]

  def step(token: Any, *arrays: Any) -> Any:
    logits, after = programs.decode_step(
      {name: params[name] for name in programs.writer_names},
      token,
      dict(zip(names, arrays, strict=True)),
    )
    return [logits, *(after[name] for name in changed)]

  _save(
    step,
    {
      'token': (('batch',), jnp.int32),
      **{name: (_axes(name, cache[name]), cache[name].dtype) for name in names},
    },
    ['logits', *(f'new_{name}' for name in changed)],
    folder / 'decode_step.onnx',
  )
  files.write_json(folder / SIGNATURE, _signature(bundle.system, programs))
  shutil.copyfile(pathlib.Path(__file__).with_name(_RUN), folder / 'run.py')


def _writer_config(system: system_lib.System) -> Any:
  return l2s.writer(system.module)[0].config


def _in_float32(bundle: greedy_programs.SystemWithParams) -> _InFloat32:
  module = bundle.system.module
  names = (
    ('llm_config', 'slm_config')
    if isinstance(module, l2s.LlmToSlm)
    else ('config',)
  )
  module = module.clone(
    **{
      name: dataclasses.replace(getattr(module, name), dtype='float32')
      for name in names
    }
  )
  return _InFloat32(
    dataclasses.replace(bundle.system, module=module),
    jax.tree.map(lambda x: np.asarray(x, np.float32), bundle.params()),
  )


def _axes(name: str, x: jax.ShapeDtypeStruct) -> tuple[Any, ...]:
  """Returns the shape of a cache's array, lengths by name."""
  if name in ('slot', 'valid', 'cross_valid'):
    return {
      'slot': (),
      'valid': ('batch', 'slots'),
      'cross_valid': ('batch', 'prompt'),
    }[name]
  length = 'prompt' if name.startswith('cross_') else 'slots'
  return ('batch', x.shape[1], length, x.shape[3])


def _save(
  function: Callable[..., Any],
  inputs: dict[str, tuple[tuple[Any, ...], Any]],
  output_names: Sequence[str],
  path: pathlib.Path,
) -> None:
  """Converts a function and writes the model, its weights beside it."""
  import jax2onnx
  import onnx

  try:
    model = jax2onnx.to_onnx(
      _with(_functions(), greedy_programs.traced(function)),
      inputs=[jax.ShapeDtypeStruct(*spec) for spec in inputs.values()],
      input_names=list(inputs),
      output_names=list(output_names),
    )
  except (
    NotImplementedError,
    jax.errors.InconclusiveDimensionOperation,
  ) as error:
    said = (str(error).splitlines() or [''])[0]
    raise ValueError(
      f'--to=onnx: jax2onnx cannot convert this model ({path.stem}): {said}. '
      'Take --to=stablehlo, which has every model.'
    ) from error
  _replace_where_of_bools(model)
  onnx.save(
    model,
    str(path),
    save_as_external_data=True,
    location=f'{path.name}.data',
    size_threshold=_WEIGHTS_INSIDE,
  )


_MODULES = (jnp, jax.lax, jax.nn)
_Functions = list[tuple[types.ModuleType, dict[str, Any]]]


def _functions() -> _Functions:
  found = [(module, dict(vars(module))) for module in _MODULES]
  found[0][1]['split'] = _split  # That of jax2onnx wants constant sizes.
  return found


def _split(x: jax.Array, indices: Sequence[Any], axis: int) -> list[jax.Array]:
  """Does what `jnp.split` does, by slices."""
  ends = [0, *indices, x.shape[axis]]
  return [
    jax.lax.slice_in_dim(x, start, end, axis=axis)
    for start, end in itertools.pairwise(ends)
  ]


def _with(
  functions: _Functions, function: Callable[..., Any]
) -> Callable[..., Any]:
  """Returns a function that runs with JAX's own functions.

  While it traces, jax2onnx has put others in their places, which know fewer
  symbolic lengths (0.17.1: `arange`, `where`). The primitives are enough.
  """

  @contextlib.contextmanager
  def restored() -> Iterator[None]:
    replaced = [
      (module, name, vars(module)[name], x)
      for module, originals in functions
      for name, x in originals.items()
      if vars(module)[name] is not x
    ]
    for module, name, _, x in replaced:
      setattr(module, name, x)
    try:
      yield
    finally:
      for module, name, x, _ in replaced:
        setattr(module, name, x)

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    with restored():
      return function(*args)

  return call


def _replace_where_of_bools(model: Any) -> None:
  """Says `Where` in logic where it chooses between bools.

  ONNX Runtime (1.32) has no such `Where`.
  """
  import onnx

  inferred = onnx.shape_inference.infer_shapes(model).graph
  kinds = {x.name: x.data_type for x in inferred.initializer}
  for value in (*inferred.input, *inferred.value_info, *inferred.output):
    kinds[value.name] = value.type.tensor_type.elem_type
  nodes = []
  for node in model.graph.node:
    is_of_bools = node.op_type == 'Where' and (
      onnx.TensorProto.BOOL in [kinds.get(name) for name in node.input[1:]]
    )
    if not is_of_bools:
      nodes.append(node)
      continue
    condition, then, otherwise = node.input
    name = node.output[0]
    for kind, operands, result in (
      ('Not', [condition], f'{name}_not'),
      ('And', [condition, then], f'{name}_then'),
      ('And', [f'{name}_not', otherwise], f'{name}_else'),
      ('Or', [f'{name}_then', f'{name}_else'], name),
    ):
      nodes.append(onnx.helper.make_node(kind, operands, [result]))
  del model.graph.node[:]
  model.graph.node.extend(nodes)


def _signature(
  system: system_lib.System, programs: greedy_programs.GreedyPrograms
) -> dict[str, Any]:
  """Returns what `signature.json` holds, beside what the models say."""
  before, after = programs.around
  answers = system.answer_vocabulary
  return {
    'lengths': programs.constraints,
    'prompt': {
      'pad_id': system.prompt_vocabulary.pad_id,
      'before': list(before),
      'after': list(after),
    },
    'answer': {
      # None: the last token of the prompt, which is then not part of it.
      'first_token': None if programs.continues else answers.start_id,
      'eos_ids': list(answers.eos_ids),
      'pad_id': answers.pad_id,
    },
  }


def compare(
  bundle: greedy_programs.SystemWithParams,
  folder: pathlib.Path,
  prompts: Sequence[str],
) -> str:
  """Answers prompts here and in ONNX Runtime, both in float32.

  Args:
    bundle: what the folder was written from.
    folder: as `write` left it.
    prompts: at least one.

  Returns:
    What was found equal.

  Raises:
    ValueError: if a model does not run, or gives other tokens.
  """
  bundle = _in_float32(bundle)
  programs = greedy_programs.GreedyPrograms(bundle)
  rows, num_tokens = programs.rows_to_compare(
    prompts, _MAX_PROMPT_LEN, _COMPARED_TOKENS
  )
  expected = greedy_programs.expected_tokens(
    bundle, programs, programs.inputs(rows, num_tokens)
  )
  done = subprocess.run(
    [sys.executable, '-P', 'run.py', str(num_tokens)],
    input=json.dumps(rows),
    capture_output=True,
    text=True,
    cwd=folder,
    env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'},
  )
  if done.returncode:
    raise ValueError(
      f'{folder / "run.py"} does not run; nothing is kept. Its words:\n'
      f'{done.stderr[-2000:]}'
    )
  found = [programs.until_end(row) for row in json.loads(done.stdout)]
  for prompt, ours, theirs in zip(prompts, expected, found, strict=True):
    if ours != theirs:
      raise ValueError(
        f'ONNX Runtime writes other tokens from {folder} to {prompt!r}: '
        f'{theirs}; the run writes {ours}. Nothing is kept; please report this.'
      )
  return (
    f'ONNX Runtime writes the same tokens to {len(prompts)} prompts as the run '
    f'does in float32 (greedy, up to {num_tokens} tokens)'
  )
