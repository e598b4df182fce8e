# SPDX-License-Identifier: Apache-2.0
"""The verb `export`: a run, or a model as it came, as one folder.

The model is made into a bundle first, beside DESTINATION where another form is
asked for, and each form is written from the mapped tensors of that. What is
written is loaded back and compared with the source on prompts. DESTINATION
appears when all of this is done, and not at all where it fails.
"""

import contextlib
import importlib
import json
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin

from l2s_jax.inference import answerer
from l2s_jax.interop import convert, t5x_state
from l2s_jax.interop.exports import bundling
from l2s_jax.models import l2s
from l2s_jax.systems import as_it_came, bundle, parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import manifest, saved_steps

T5X = 't5x'
# Forms beside the bundle, and the modules that write them.
FORMS: dict[str, str] = {}
# What models are compared on where there are no predictions of the run.
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
  prompts: str | None = None,
  license: str | None = None,
  llm_path: str | None = None,
  vocabulary: str | None = None,
  dry_run: bool = False,
) -> None:
  """Exports a model as one folder and says what was compared.

  Args:
    source: a run, a bundle, or a model as it came: see CHECKPOINT_PATH.
    destination: a folder that is not there yet.
    to: 'bundle', 't5x' or one of `FORMS`.
    step: of a run: a number, or 'best'; None is the newest.
    dtype: to store tensors in; None: as they are.
    prompts: a text file, a prompt a line, to compare answers on; None: those
      that the run was evaluated on, or a few of our own.
    license: of the weights, for the manifest.
    llm_path: where the LLM of a run is now, if it has moved.
    vocabulary: tokenizer of a model as it came that brings none.
    dry_run: says what would be written, and stops.

  Raises:
    FileNotFoundError: if there is no such model, or no file of prompts.
    ValueError: if the form cannot say the model, there is no room, or what was
      written does not answer as the source does.
  """
  start_secs = time.perf_counter()
  folder = pathlib.Path(destination)
  convert.check_destination(folder, 0)
  if to == T5X:
    left_out = {'dtype': dtype, 'prompts': prompts, 'license': license}
    _export_state(source, folder, step, llm_path, left_out, dry_run)
    return
  texts = _prompts(source, prompts)
  form = None if to == manifest.BUNDLE else _form(to)
  scratch = folder.with_name(f'.{folder.name}.unfinished')
  shutil.rmtree(scratch, ignore_errors=True)  # Left by one that was killed.
  with contextlib.ExitStack() as stack:
    if bundle.is_bundle(source):
      _check_further(source, to, step, dtype)
      opened = bundle.open_bundle(source)
      size = sum(entry['bytes'] for entry in opened.content['files'].values())
      convert.check_destination(folder, size)
      print(f'{source}: a bundle of {size / 1e9:,.3f} GB')
    else:
      parts = bundling.open_parts(
        source, _step(step), dtype, llm_path=llm_path, vocabulary=vocabulary
      )
      size = parts.num_bytes
      convert.check_destination(folder, size * (1 if form is None else 2))
      print(
        f'{source}: {", ".join(parts.towers)}, {size / 1e9:,.3f} GB of tensors'
      )
    if dry_run:
      return
    stack.enter_context(_cleaning(folder, scratch))
    if not bundle.is_bundle(source):
      path = scratch / manifest.BUNDLE
      path.mkdir(parents=True)
      bundling.write(parts, path, dtype, **_facts(manifest.BUNDLE, license))
      opened = bundle.open_bundle(path)
      said = _compare(source, step, llm_path, vocabulary, opened, texts, dtype)
      print(f'bundle: {said}')
    if form is None:
      made = opened.folder
    else:
      form.check(opened)
      made = scratch / to
      made.mkdir(parents=True)
      form.write(opened, made)
      manifest.write(made, to, opened.content['model'], **_facts(to, license))
      print(f'{to}: {form.compare(opened, made, texts)}')
    size = sum(p.stat().st_size for p in made.rglob('*') if p.is_file())
    made.rename(folder)
  secs = time.perf_counter() - start_secs
  print(f'wrote {folder} ({to}): {size / 1e9:,.3f} GB in {secs:.1f} s')


def _export_state(
  source: str,
  folder: pathlib.Path,
  step: str | None,
  llm_path: str | None,
  left_out: Mapping[str, str | None],
  dry_run: bool,
) -> None:
  """Writes a run's training state for T5X, which a bundle has not.

  Raises:
    ValueError: if something is asked for that it does not take.
  """
  for name, value in left_out.items():
    if value is not None:
      raise ValueError(
        f'--{name}={value}: --to=t5x writes the state of a run as it is. '
        'Leave it out.'
      )
  found = _step(step)
  if found == 'best':
    found = saved_steps.params_folder(source, 'best')[1]
  if dry_run:
    print(f'{source}: step {saved_steps.params_folder(source, found)[1]}')
    return
  print(f'wrote {t5x_state.write(source, folder, found, llm_path)}')


def _form(to: str) -> Any:
  """Returns the module of a form."""
  return importlib.import_module(FORMS[to])


def _step(step: str | None) -> Any:
  """Returns --step as `as_it_came.choose_step` takes it.

  Raises:
    ValueError: if it is neither a number nor 'best'.
  """
  if step is None or step == 'best':
    return step
  if not step.isdecimal():
    raise ValueError(f'--step={step}: expected a number of steps, or best.')
  return int(step)


def _check_further(
  source: str, to: str, step: str | None, dtype: str | None
) -> None:
  """Refuses what cannot be asked of a bundle."""
  if to == manifest.BUNDLE:
    raise ValueError(
      f'{source} is a bundle already. Copy the folder, or export the run that '
      'it was made of.'
    )
  given = {'step': step, 'dtype': dtype}
  for name, value in given.items():
    if value is not None:
      raise ValueError(
        f'--{name}={value}: {source} is a bundle, which has one model in one '
        f'dtype. Leave it out, or export the run.'
      )


@contextlib.contextmanager
def _cleaning(folder: pathlib.Path, scratch: pathlib.Path) -> Iterator[None]:
  """Removes what is unfinished; of a failed export nothing is kept."""
  missing = [path for path in folder.absolute().parents if not path.exists()]
  try:
    yield
  except OSError as error:
    if error.errno is None:  # In words already.
      raise
    raise ValueError(
      f'{folder} could not be written: {error}. Nothing of it is kept.'
    ) from error
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
    if not folder.exists():
      for parent in missing:
        with contextlib.suppress(OSError):  # It was not made, or is in use.
          parent.rmdir()


def _facts(to: str, license: str | None) -> dict[str, Any]:
  """Returns what the manifest tells people."""
  how = {
    manifest.BUNDLE: 'python -m l2s_jax infer --gin_file=gin_configs/runs/'
    'infer.gin --gin.CHECKPOINT_PATH=THIS_FOLDER --gin.INPUT=prompts.txt '
    '--gin.INFER_OUTPUT_DIR=answers',
    'hf': "transformers.AutoModelForSeq2SeqLM.from_pretrained('THIS_FOLDER', "
    'trust_remote_code=True); AutoModelForCausalLM for a decoder-only model',
    'gguf': 'llama-cli -m THIS_FOLDER/model.gguf',
  }
  return {'license': license, 'how_to_run': how.get(to, '')}


def _prompts(source: str, path: str | None) -> list[str]:
  """Returns the prompts that models are compared on.

  Raises:
    FileNotFoundError: if a file that was named is missing.
    ValueError: if it has no prompts.
  """
  if path is not None:
    text = pathlib.Path(path).read_text(encoding='utf-8')
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
      raise ValueError(f'--prompts={path} is empty; expected a prompt a line.')
    return lines[:_MAX_PROMPTS]
  folder = pathlib.Path(source) / 'eval'
  for file in sorted(folder.rglob('*.jsonl')) if folder.is_dir() else ():
    found = list(_prompts_of(file))
    if found:
      return found[:_MAX_PROMPTS]
  return list(PROMPTS)


def _prompts_of(file: pathlib.Path) -> Iterator[str]:
  with file.open(encoding='utf-8') as lines:
    for line, _ in zip(lines, range(_MAX_PROMPTS), strict=False):
      with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get('prompt'), str):
          yield record['prompt']


def _compare(
  source: str,
  step: str | None,
  llm_path: str | None,
  vocabulary: str | None,
  opened: bundle.Bundle,
  prompts: Sequence[str],
  dtype: str | None,
) -> str:
  """Returns how the answers of a bundle compare with those of its source.

  Raises:
    ValueError: if they differ where the tensors are the same.
  """
  expected = _answers(source, step, llm_path, vocabulary, prompts)
  found = _answers(str(opened.folder), None, None, None, prompts)
  equal = sum(a == b for a, b in zip(expected, found, strict=True))
  if equal < len(prompts) and dtype is None:
    index = next(i for i, a in enumerate(expected) if a != found[i])
    raise ValueError(
      f'The bundle answers {prompts[index][:80]!r} by {found[index][:80]!r}, '
      f'and {source} by {expected[index][:80]!r}. Nothing is kept; please '
      'report this.'
    )
  return f'{equal} of {len(prompts)} greedy answers are those of {source}'


def _answers(
  location: str,
  step: str | None,
  llm_path: str | None,
  vocabulary: str | None,
  prompts: Sequence[str],
) -> list[str]:
  """Returns greedy answers, at most so long as the model has positions for."""
  system = as_it_came.load(location, llm_path=llm_path, vocabulary=vocabulary)
  lengths = _lengths(system)
  session = session_lib.start(lambda: system, None, lengths, batch_sizes={})
  chosen = as_it_came.choose_step(location, _step(step), '--step')
  with session.entered():
    params = parameters.load_params(
      session.system, session.layout, location, chosen
    )
    return answerer.PromptAnswerer(
      session.system,
      params,
      session.mesh,
      prompt_length=lengths['inputs'],
      max_decode_len=lengths['targets'],
      batch_size=-(-len(prompts) // session.mesh.size) * session.mesh.size,
      consume=True,
    )(prompts)


def _lengths(system: system_lib.System) -> dict[str, int]:
  """Returns lengths of prompts and answers, where there are few positions."""
  module = system.module
  configs = (
    (module.llm_config, module.slm_config)
    if isinstance(module, l2s.LlmToSlm)
    else (module.config,)
  )
  places = min(
    (c.max_positions for c in configs if c.positions == 'learned'),
    default=_PROMPT_LENGTH + _ANSWER_LENGTH,
  )
  answer = min(_ANSWER_LENGTH, max(places // 4, 1))
  return {'inputs': min(_PROMPT_LENGTH, places - answer), 'targets': answer}
