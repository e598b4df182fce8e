# SPDX-License-Identifier: Apache-2.0
"""Opening weights by location: a folder, a file, or a name on the Hub."""

import pathlib

from l2s_jax.models import config as config_lib
from l2s_jax.runtime import storage
from l2s_jax.weights import run_format
from l2s_jax.weights import source as source_lib

ADAPTER = 'adapter_config.json'  # written by the package peft
# Beside bundles, the forms of `export` that hold weights of one model.
_FORMS_READ = ('hf', 'gguf')


def open_source(
  location: str, step: int | None = None, *, may_lack_steps: bool = False
) -> source_lib.Source:
  """Opens weights of any supported format.

  Args:
    location: a run of this package, a bundle, a converted folder, a Hugging
      Face folder, a T5X checkpoint, a GGUF file, or the name of a model on the
      Hugging Face Hub if no such path exists.
    step: checkpoint step of a run or a T5X checkpoint; None selects the newest.
    may_lack_steps: whether to ignore `step` if the location holds a single
      model without steps, such as the conversion of a run.

  Raises:
    FileNotFoundError: if no weights of a known format are found.
    ValueError: if the weights are damaged or incomplete, or `step` is given for
      a location with a single model.
  """
  from l2s_jax.weights import converted, hub, manifest, runs
  from l2s_jax.weights.formats import (
    gguf_file,
    huggingface,
    t5x,
    tensor_files,
  )

  folder = storage.of(location)
  if hub.is_name(location):
    folder = hub.download(location)
  else:
    check_export(folder)
  if (folder / 'model.json').is_file():
    return runs.Run(folder, step)
  if manifest.is_export(folder, manifest.BUNDLE):
    has = manifest.read(folder, manifest.BUNDLE)['model'].get('step')
    if step not in (None, has) and not may_lack_steps:
      raise ValueError(
        f'{location} is a bundle, which has step {has} only, but step {step} '
        'was requested. Leave the step unset, or export the other step.'
      )
    # As for a run, the SLM of an LLM-to-SLM model.
    name = 'slm' if (folder / 'slm').is_dir() else 'model'
    return converted.ConvertedFolder(folder / name)
  # Some Hugging Face folders also have TensorFlow's file `checkpoint`.
  is_theirs = (folder / huggingface.CONFIG).is_file() and tensor_files.are_in(
    folder
  )
  if not is_theirs and t5x.is_checkpoint(folder):
    return t5x.Checkpoint(folder, step)
  if step is not None and not may_lack_steps and folder.exists():
    raise ValueError(
      f'{location} is a single model without steps, but step {step} was '
      'requested. Leave the step unset.'
    )
  if (folder / converted.DESCRIPTION).is_file():
    return converted.ConvertedFolder(folder)
  if gguf_file.is_file(folder):
    return gguf_file.File(folder)
  check_no_adapter(folder)
  if (folder / huggingface.CONFIG).is_file():
    return huggingface.HuggingFaceFolder(folder)
  raise FileNotFoundError(_what_it_is_not(folder))


def check_export(folder: pathlib.Path) -> None:
  """Refuses exported folders that are not models, or were changed.

  Args:
    folder: any; or a file, of which its folder is looked at. Bundles are left
      to whoever opens them.

  Raises:
    FileNotFoundError: if a file of the export is missing.
    ValueError: if it holds programs alone, or is not as it was written.
  """
  from l2s_jax.weights import manifest

  if folder.is_file():
    folder = folder.parent
  form = manifest.form_of(folder)
  if form is None or form == manifest.BUNDLE:
    return
  if form not in _FORMS_READ:
    raise ValueError(
      f'{folder} is an export of the form {config_lib.shorten(form)}, which '
      f'l2s_jax writes and does not read; it reads bundle, '
      f'{" and ".join(_FORMS_READ)}. Name the run, or export it as one of '
      'these.'
    )
  try:
    manifest.read(folder, form)
  except (ValueError, FileNotFoundError) as error:
    raise type(error)(
      f'{error} If the change was meant, remove {folder / manifest.FILE}.'
    ) from error


def check_no_adapter(folder: pathlib.Path) -> None:
  """Refuses a folder with LoRA adapter weights but no base model.

  Raises:
    ValueError: names the base model and the way to merge the adapter.
  """
  from l2s_jax.weights.formats import tensor_files

  path = folder / ADAPTER
  if not path.is_file() or tensor_files.are_in(folder):
    return
  content = tensor_files.read_json(path)
  kind, base = (
    config_lib.shorten(str(content.get(key)))
    for key in ('peft_type', 'base_model_name_or_path')
  )
  raise ValueError(
    f'{folder} is a {kind} adapter of {base}, not a model. Merge them and use '
    "the merged folder: peft's PeftModel.from_pretrained(model, "
    f"'{folder}').merge_and_unload().save_pretrained(FOLDER), and copy the "
    'tokenizer into it.'
  )


def _what_it_is_not(folder: pathlib.Path) -> str:
  from l2s_jax.weights import converted

  if not folder.exists():
    return (
      f'{folder} is missing: expected a folder of weights, a GGUF file or a '
      'T5X checkpoint. Correct LLM_PATH, SLM_PATH or the path that was given, '
      'or download the weights (docs/weights.md).'
    )
  if folder.is_file():
    return (
      f"{folder} is not a single weights file: expected GGUF, or T5X's "
      'msgpack. For safetensors and pytorch_model.bin, give the folder.'
    )
  files = sorted(path.name for path in folder.glob('*.gguf'))
  runs = [path for path in folder.parents[:2] if run_format.is_run(path)]
  return (
    f'{folder} is not a folder of weights: it has neither '
    f'{converted.DESCRIPTION} (a converted folder) nor model.json (a run of '
    'l2s_jax) nor config.json (a Hugging Face folder) nor checkpoint_STEP '
    '(T5X).'
    + (f' Give one of its files: {", ".join(files[:5])}.' if files else '')
    + (f' It is part of the run {runs[0]}: give that.' if runs else '')
  )
