# SPDX-License-Identifier: Apache-2.0
"""The verb `export`: a run or a pretrained model as one self-contained folder.

The model is first written as a bundle, in a temporary folder, and other formats
are written from the bundle's memory-mapped tensors. The result is compared with
the source: tensor by tensor and, if there is enough memory, by greedy answers
to prompts. DESTINATION appears only after all of this has succeeded.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gin
import jax
import numpy as np
from etils import epath
from flax import traverse_util

from l2s_jax.data import text_files
from l2s_jax.inference import answerer
from l2s_jax.interop import destination as destination_lib
from l2s_jax.interop import t5x_state
from l2s_jax.interop.exports import bundling, comparing, model_card
from l2s_jax.models import int8, l2s, lora
from l2s_jax.runtime import extras, files, storage
from l2s_jax.systems import bundle, model_paths, parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import manifest, run_format, saved_steps

PyTree = Any


class Form(NamedTuple):
  """An export format other than the bundle.

  Attributes:
    module: name of the module in this package, with `check`, `write` and
      `compare`.
    packages: modules to import that are not among l2s_jax's core dependencies.
    how_to_run: example for the manifest.
    has_int8: whether the module has `quantize`, for --quantization=int8.
  """

  module: str
  packages: Sequence[str]
  how_to_run: str
  has_int8: bool = False


FORMS: Mapping[str, Form] = {
  'hf': Form(
    'hf_form',
    ('torch', 'transformers'),
    "transformers.AutoModelForSeq2SeqLM.from_pretrained('THIS_FOLDER', "
    'trust_remote_code=True); AutoModelForCausalLM for a decoder-only model',
  ),
  'stablehlo': Form(
    'stablehlo_form',
    (),
    "echo '[[37, 12, 1]]' | python THIS_FOLDER/run.py 32",
  ),
  'savedmodel': Form(
    'savedmodel_form',
    ('tensorflow', 'tensorflow_text'),
    'tensorflow_model_server --model_base_path=THIS_FOLDER --enable_batching '
    '--batching_parameters_file=THIS_FOLDER/batching_parameters.txt',
  ),
  'onnx': Form(
    'onnx_form',
    # `check` reports a missing jax2onnx.
    ('onnx', 'onnx_ir', 'onnxruntime'),
    "echo '[[37, 12, 1]]' | python THIS_FOLDER/run.py 32",
    has_int8=True,
  ),
  'gguf': Form('gguf_form', ('gguf',), 'llama-cli -m THIS_FOLDER/model.gguf'),
}
_HOW_TO_RUN = (
  'python -m l2s_jax infer --gin_file=gin_configs/runs/infer.gin '
  '--gin.CHECKPOINT_PATH=THIS_FOLDER --gin.INPUT=prompts.txt '
  '--gin.INFER_OUTPUT_DIR=answers'
)
T5X = 't5x'  # From the training state of a run, without a bundle.
# Prompts for the comparison if the run has no predictions.
PROMPTS = (
  'translate English to German: Two dogs are running through the snow.',
  'summarize: The committee met on Tuesday and agreed on a new budget, which '
  'will be published at the end of the month.',
  'What is the capital of Romania?',
)
_MAX_PROMPTS, _PROMPT_LENGTH, _ANSWER_LENGTH = 8, 128, 32


@gin.configurable(module='l2s_jax')
def export(
  source: str,
  destination: str,
  *,
  to: str,
  step: str | None = None,
  dtype: str | None = None,
  quantization: str | None = None,
  prompts: str | None = None,
  license: str | None = None,
  llm_path: str | None = None,
  vocabulary: str | None = None,
  extra_ids: int | None = None,
  dry_run: bool = False,
) -> None:
  """Exports a model as one folder and compares it with the source.

  Args:
    source: a run, a bundle, or a pretrained model; see CHECKPOINT_PATH of
      `infer`.
    destination: folder to write, local or in a bucket; it must not exist.
    to: format: 'bundle', 't5x' or a key of `FORMS`.
    step: checkpoint step of a run, a number or 'best'; None means the newest.
    dtype: dtype of the written tensors; None keeps that of the source.
    quantization: 'int8' stores kernels in int8: in a bundle those of the
      language models, in 'onnx' all, by ONNX Runtime's quantizer. None stores
      floats.
    prompts: text file with one prompt per line, for the comparison; None: the
      prompts of the run's evaluations, or three built-in ones.
    license: license of the weights, for the manifest.
    llm_path: new location of the run's LLM, if it has moved.
    vocabulary: tokenizer of a pretrained model without one.
    extra_ids: number of T5's sentinel ids behind its SentencePiece model.
    dry_run: whether to print the plan and stop.

  Raises:
    FileNotFoundError: if the model or the file of prompts does not exist.
    ValueError: if flags do not go together, the format cannot express the
      model, there is not enough disk space, or the exported model gives other
      answers.
  """
  start_secs = time.perf_counter()
  storage.check(source, 'SOURCE')
  folder = destination_lib.opened(destination)
  destination_lib.check(folder, 0)
  if to == T5X:
    given = {'dtype': dtype, 'quantization': quantization, 'prompts': prompts}
    given |= {'license': license, 'vocabulary': vocabulary}
    _export_state(source, folder, step, llm_path, given, dry_run)
    return
  texts = _prompts(source, prompts)
  form = None if to == manifest.BUNDLE else _form(to, quantization)
  parts = opened = None
  if bundle.is_bundle(source):
    of_run: dict[str, Any] = {'step': step, 'llm_path': llm_path}
    of_run |= {'vocabulary': vocabulary, 'extra_ids': extra_ids}
    rounding = {'dtype': dtype, 'quantization': quantization}
    _check_further(source, to, of_run, rounding)
  if bundle.is_bundle(source) and form is not None:
    opened = bundle.open_bundle(storage.local_folder(storage.of(source)))
    destination_lib.check(folder, opened.num_bytes)
    size = files.in_units(opened.num_bytes)
    print(f'{source}: a bundle, {size} of tensors')
  else:
    parts = bundling.open_parts(
      source,
      _step(step),
      dtype,
      quantization=quantization if form is None else None,
      llm_path=llm_path,
      vocabulary=vocabulary,
      extra_ids=extra_ids or 0,
    )
    destination_lib.check(folder, parts.num_bytes * (1 if form is None else 2))
    size = files.in_units(parts.num_bytes)
    print(f'{source}: {", ".join(parts.towers)}, {size} of tensors')
  if form is not None:
    form.check(opened or parts)
  if dry_run:
    return
  with destination_lib.writing(folder) as scratch:
    if opened is None:
      assert parts is not None
      path = scratch / manifest.BUNDLE
      opened = _bundle(parts, path, source, step, texts, dtype, license)
    if form is None:
      made = opened.folder
    else:
      made = scratch / to
      _write_form(form, to, opened, made, texts, license, quantization)
    written = sum(p.stat().st_size for p in made.rglob('*') if p.is_file())
    destination_lib.finish(made, folder)
  secs = time.perf_counter() - start_secs
  print(f'wrote {folder} ({to}): {files.in_units(written)} in {secs:.1f} s')


def _bundle(
  parts: bundling.Parts,
  path: pathlib.Path,
  source: str,
  step: str | None,
  prompts: Sequence[str],
  dtype: str | None,
  license: str | None,
) -> bundle.Bundle:
  """Writes a bundle, with the run's evaluation results, and compares it."""
  path.mkdir(parents=True)
  bundling.write(
    parts,
    path,
    dtype,
    license=license,
    how_to_run=_HOW_TO_RUN,
    results=model_card.measured(storage.of(source)),
  )
  opened = bundle.open_bundle(path)
  print(f'bundle: {bundling.compare(parts, opened, dtype)}')
  too_large = comparing.too_large(opened.num_params)
  said = too_large or _compare(source, parts, step, opened, prompts, dtype)
  print(f'bundle: {said}')
  return opened


def _export_state(
  source: str,
  folder: pathlib.Path,
  step: str | None,
  llm_path: str | None,
  given: Mapping[str, str | None],
  dry_run: bool,
) -> None:
  """Writes a run's training state for T5X.

  Raises:
    FileNotFoundError: if `source` is not a run.
    ValueError: if a flag does not apply, or T5X cannot hold the state.
  """
  if not run_format.is_run(source):
    raise FileNotFoundError(
      f'{source} is not a run. --to=t5x writes the training state of a run; '
      'pass its MODEL_DIR.'
    )
  _refuse_given(
    given,
    '--to=t5x writes the training state of a run unchanged. Remove the flag.',
  )
  number = saved_steps.params_folder(source, _step(step))[1]
  print(f'{source}: step {number}')
  if dry_run:
    return
  with destination_lib.writing(folder) as scratch:
    said = t5x_state.write(source, scratch, number, llm_path)
    destination_lib.finish(scratch, folder)
  print(f'wrote {folder} ({T5X}): {said}')


def _write_form(
  form: Any,
  to: str,
  opened: bundle.Bundle,
  folder: pathlib.Path,
  prompts: Sequence[str],
  license: str | None,
  quantization: str | None,
) -> None:
  """Writes a format from a bundle into a new folder, and compares the two."""
  folder.mkdir(parents=True)
  form.write(opened, folder)
  seal = functools.partial(
    manifest.write,
    folder,
    to,
    opened.content['model'],
    license=license or opened.license,
    how_to_run=FORMS[to].how_to_run,
    parameters=opened.parameters(),
  )
  seal()
  too_large = comparing.too_large(opened.num_params)
  print(f'{to}: {too_large or form.compare(opened, folder, prompts)}')
  if quantization is not None:
    print(
      f'{to}: {form.quantize(opened, folder, () if too_large else prompts)}'
    )
    seal(quantization=quantization)


def _form(to: str, quantization: str | None) -> Any:
  """Returns the module of a format.

  Raises:
    ValueError: if l2s_jax has no such module, a package is not installed, or
      the format has no int8.
  """
  form = FORMS[to]
  if not form.has_int8:
    _refuse_given(
      {'quantization': quantization},
      f'--to={to} has floats. Export --to=bundle with this flag; --to={to} of '
      'the bundle then has its rounded weights.',
    )
  name = f'{__package__}.{form.module}'
  if importlib.util.find_spec(name) is None:
    raise ValueError(
      f'--to={to}: this version of l2s_jax has no {name}. Update l2s_jax.'
    )
  extras.require(f'--to={to}', *form.packages)
  return importlib.import_module(name)


def _step(step: str | None) -> Any:
  """Parses --step: a number, 'best', or None.

  Raises:
    ValueError: for other values.
  """
  if step is None or step == 'best':
    return step
  if not step.isdecimal():
    raise ValueError(f'--step={step}: expected a step number, or best.')
  return int(step)


def _check_further(
  source: str, to: str, of_run: Mapping[str, Any], rounding: Mapping[str, Any]
) -> None:
  """Checks the flags of an export whose source is a bundle.

  Args:
    source: the bundle.
    to: the format.
    of_run: flags that choose parts of a run.
    rounding: the flags --dtype and --quantization.

  Raises:
    ValueError: if a flag does not apply, or the bundle would be copied.
  """
  if to == manifest.BUNDLE and not any(rounding.values()):
    raise ValueError(
      f'{source} is already a bundle. Copy the folder, or set --dtype or '
      '--quantization.'
    )
  _refuse_given(
    of_run,
    f'{source} is a bundle with a fixed step, LLM and tokenizers. Remove the '
    'flag, or export the original run.',
  )
  if to != manifest.BUNDLE:
    _refuse_given(
      {'dtype': rounding['dtype']},
      f'{source} is a bundle with a fixed dtype. Export it --to=bundle with '
      f'this flag, and --to={to} from that.',
    )


def _refuse_given(given: Mapping[str, Any], reason: str) -> None:
  """Raises a ValueError for the first flag that is set."""
  for name, value in given.items():
    if value is not None:
      raise ValueError(f'--{name}={value}: {reason}')


def _prompts(source: str, path: str | None) -> list[str]:
  """Returns the prompts for the comparison.

  Raises:
    FileNotFoundError: if the file of --prompts does not exist.
    ValueError: if it has no prompts.
  """
  if path is not None:
    read = text_files.read_lines(epath.Path(path))
    lines = [line for line in read if line.strip()]
    if not lines:
      raise ValueError(
        f'--prompts={path} is empty; expected one prompt per line.'
      )
    return lines[:_MAX_PROMPTS]
  folder = storage.of(source) / 'eval'
  for file in sorted(folder.rglob('*.jsonl')) if folder.is_dir() else ():
    records = [
      record for _, record in files.read_records(file, keys={'prompt': str})
    ]
    if records:
      return [record['prompt'] for record in records[:_MAX_PROMPTS]]
  return list(PROMPTS)


def _compare(
  source: str,
  parts: bundling.Parts,
  step: str | None,
  opened: bundle.Bundle,
  prompts: Sequence[str],
  dtype: str | None,
) -> str:
  """Compares greedy answers of a bundle and its source; returns a summary.

  If answers differ, the source answers again with LoRA merged and with its
  tensors rounded as the bundle's. These answers must be equal.

  Raises:
    ValueError: if they are not.
  """
  chosen = model_paths.choose_step(source, _step(step), '--step')
  system = parts.system
  expected = _answers(system, _load(system, source, chosen), prompts)
  found = _answers(
    opened.system,
    _load(opened.system, str(opened.folder), opened.step or 0),
    prompts,
  )
  equal = sum(a == b for a, b in zip(expected, found, strict=True))
  said = f'{equal} of {len(prompts)} greedy answers equal those of {source}'
  if equal == len(prompts):
    return said
  params = _folded(parts, source, chosen, dtype, opened.system.frozen_dtype)
  expected = _answers(opened.system, params, prompts)
  for prompt, theirs, ours in zip(prompts, expected, found, strict=True):
    if theirs != ours:
      raise ValueError(
        f'The bundle answers {prompt[:80]!r} with {ours[:80]!r}, but {source} '
        f'with {theirs[:80]!r}. The output was deleted. Please report this.'
      )
  return (
    f'{said}; all are equal after its tensors are rounded as those of the '
    'bundle'
  )


def _folded(
  parts: bundling.Parts,
  source: str,
  step: int,
  dtype: str | None,
  frozen_dtype: Any,
) -> PyTree:
  """Returns the source's parameters, rounded as those of the bundle.

  Args:
    parts: contents of the bundle.
    source: the run or the pretrained model.
    step: its checkpoint step.
    dtype: the dtype of `open_parts`.
    frozen_dtype: dtype of the bundle's LLM.
  """
  system = dataclasses.replace(
    parts.system,
    # int8 rounds the stored LLM, before it is cast.
    frozen_dtype='float32' if parts.quantization else frozen_dtype,
  )
  params = jax.tree.map(np.asarray, _load(system, source, step))
  writer, name = l2s.writer(system.module)
  if writer.config.lora_rank:
    alpha = writer.config.lora_alpha
    if name is None:
      params = lora.merge(params, alpha)
    else:
      params = {**params, name: lora.merge(params[name], alpha)}
  flat = traverse_util.flatten_dict(params)
  for path, array in flat.items():
    axes: tuple[int, ...] = ()
    if parts.quantization and (name is None or path[0] in parts.towers):
      axes = int8.contracted_axes(path, is_stacked='layers' in path)
    if axes:
      flat[path] = int8.round_kernel(array, axes)
    elif dtype is not None:
      flat[path] = array.astype(jax.numpy.dtype(dtype))
  params = traverse_util.unflatten_dict(flat)
  for frozen in system.frozen:
    params[frozen] = jax.tree.map(
      lambda x: x.astype(frozen_dtype), params[frozen]
    )
  return params


def _load(system: system_lib.System, location: str, step: int) -> PyTree:
  """Returns the parameters of a run, a bundle or a pretrained model."""
  session = session_lib.start(
    lambda: system, None, _lengths(system), batch_sizes={}
  )
  with session.entered():
    return parameters.load_params(
      session.system, session.layout, location, step
    )


def _answers(
  system: system_lib.System, params: PyTree, prompts: Sequence[str]
) -> list[str]:
  """Returns greedy answers of at most `_ANSWER_LENGTH` tokens."""
  lengths = _lengths(system)
  session = session_lib.start(lambda: system, None, lengths, batch_sizes={})
  num_devices = session.mesh.size
  with session.entered():
    params = jax.tree.map(
      lambda x, shape, sharding: jax.device_put(
        x.astype(shape.dtype), sharding
      ),
      params,
      session.layout.shapes,
      session.layout.shardings,
    )
    return answerer.PromptAnswerer(
      session.system,
      params,
      session.mesh,
      prompt_length=lengths['inputs'],
      max_decode_len=lengths['targets'],
      batch_size=-(-len(prompts) // num_devices) * num_devices,
      consume=True,
    )(prompts)


def _lengths(system: system_lib.System) -> dict[str, int]:
  """Returns lengths of prompts and answers that fit the model's positions."""
  prompt, answer = comparing.lengths(system, _PROMPT_LENGTH, _ANSWER_LENGTH)
  return {'inputs': prompt, 'targets': answer}
