# SPDX-License-Identifier: Apache-2.0
"""The verb `convert`: weights from one form into another, checked.

Forms: `hf`, a Hugging Face folder or a model's name on the Hub; `t5x`, a
checkpoint of T5X; `gguf`, a file; `l2s`, a run of ours or what `--to=l2s` left.
Tensors go through memory layer by layer. A destination appears when it is
whole and has been read back.
"""

import contextlib
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from l2s_jax.interop import (
  parity,
  scale_folding,
  t5x_state,
  to_huggingface,
  to_t5x,
)
from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import extras, files, gin_config, integrity
from l2s_jax.vocabularies import base, export, loading, tokenizer_files
from l2s_jax.weights import converted, finite, hub, manifest, opening, runs
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import gguf_file, huggingface, t5x

# What is not --from=l2s.
_FORMS: dict[type, tuple[str, str]] = {
  gguf_file.File: ('a GGUF file', 'gguf'),
  huggingface.HuggingFaceFolder: ('a Hugging Face folder', 'hf'),
  t5x.Checkpoint: ('a checkpoint of T5X', 't5x'),
}
# Beside the tokenizer's own files, what transformers keeps with them.
_CARRIED = (*tokenizer_files.ALL_FILES, 'chat_template.jinja')


@gin.configurable(module='l2s_jax')
def convert(
  source: str,
  destination: str,
  *,
  from_: str,
  to: str,
  dtype: str | None = None,
  step: int | None = None,
  config: str | None = None,
  vocabulary: str | None = None,
  verify: bool = False,
  allow_non_finite: bool = False,
  run: str | None = None,
  dry_run: bool = False,
) -> None:
  """Converts weights and says what was checked.

  Every tensor must be there with the shape that the config gives it, and no
  other; the tokenizer must fit the embedding table. The result is read back
  and compared number by number. Of an LLM-to-SLM run, `--to=hf` writes the SLM
  (slm/), the projector and a config.json that says how they fit; other forms
  take the SLM alone.

  Raises:
    FileNotFoundError: if there are no weights of that form.
    ValueError: if the weights cannot be read, are not what their config says,
      cannot be said in the form asked for, do not fit on the disk, or come
      out other than they went in.
  """
  if run is not None or to == 'run':
    given: dict[str, Any] = {'from': from_, 'to': to, 'run': run}
    given |= {'dtype': dtype, 'config': config, 'vocabulary': vocabulary}
    given |= {'verify': verify, 'allow_non_finite': allow_non_finite}
    _begin_run(source, destination, given, step, dry_run=dry_run)
    return
  if verify:
    extras.require('--verify', 'torch', 'transformers')
    if 'hf' not in (from_, to):
      raise ValueError(
        '--verify compares with transformers: it needs a Hugging Face folder '
        f'at one end, and found --from={from_} --to={to}. Leave --verify out.'
      )
  opened = _open(source, from_, step, config)
  # An encoder may come without its decoder: an LLM needs no more.
  wanted = source_lib.demanded(opened.config, opened.shapes())
  source_lib.check_shapes(opened, wanted, allow_others=False)
  if verify and shapes_lib.is_encoder_alone(opened.shapes()):
    raise ValueError(
      f'--verify compares logits, and {opened.location} is an encoder alone: '
      'it computes none. Leave --verify out.'
    )
  reading = Reading(opened, dtype, folds_scale=to == 'hf')
  folder = pathlib.Path(destination)
  unfinished = folder.with_name(f'.{folder.name}.unfinished')
  shutil.rmtree(unfinished, ignore_errors=True)  # Left by one that was killed.
  check_destination(folder, reading.num_bytes)
  _check_form(reading, to)
  print(_describe(reading, from_))
  if dry_run:
    with tempfile.TemporaryDirectory() as scratch:
      _write_tokenizer(reading, pathlib.Path(scratch), vocabulary)
    return
  with unfinished_removed(folder, unfinished):
    _write(reading, unfinished, to, vocabulary)
    reading.check_source()
    reading.notes.check(allow_non_finite=allow_non_finite)
    checked = _check_written(reading, unfinished, to)
    if verify:
      theirs = unfinished if to == 'hf' else pathlib.Path(opened.location)
      if (theirs / to_huggingface.SLM).is_dir():
        theirs = theirs / to_huggingface.SLM
      checked += '; ' + _compare(theirs, huggingface.HuggingFaceFolder(theirs))
    unfinished.rename(folder)
  print(f'wrote {folder} ({to}); {checked}')


@contextlib.contextmanager
def unfinished_removed(
  folder: pathlib.Path, unfinished: pathlib.Path
) -> Iterator[None]:
  """Removes what is unfinished; where it fails, nothing is kept.

  Args:
    folder: the destination, which the block makes, last of all.
    unfinished: the folder beside it that the block writes to.

  Raises:
    ValueError: if the disk refuses something, with what it says.
  """
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
    shutil.rmtree(unfinished, ignore_errors=True)
    if not folder.exists():
      for parent in missing:
        with contextlib.suppress(OSError):  # It was not made, or is in use.
          parent.rmdir()


def _begin_run(
  source: str,
  destination: str,
  given: Mapping[str, Any],
  step: int | None,
  *,
  dry_run: bool,
) -> None:
  """Makes a run of ours from a checkpoint of T5X, with its optimizer state.

  Raises:
    ValueError: if it is not asked for as it must be.
  """
  others = {key: x for key, x in given.items() if x and key != 'run'}
  if others != {'from': 't5x', 'to': 'run'} or given['run'] is None:
    flags = ' '.join(f'--{key}={x}' for key, x in given.items() if x)
    raise ValueError(
      f'{flags}: a run is made by --from=t5x --to=run --run=RUN, where RUN is '
      "the run that T5X's model was made of, and --step at most beside these."
    )
  folder = pathlib.Path(destination)
  unfinished = folder.with_name(f'.{folder.name}.unfinished')
  shutil.rmtree(unfinished, ignore_errors=True)  # Left by one that was killed.
  check_destination(folder, 0)
  target, _ = t5x.open_part(pathlib.Path(source), step, ('target',))
  print(f'{source}: {len(target)} parameters')
  if dry_run:
    return
  with unfinished_removed(folder, unfinished):
    number = t5x_state.read(source, given['run'], unfinished, step)
    unfinished.rename(folder)
  print(f"wrote {folder} (run): step {number}, with Adafactor's state.")


def _open(
  source: str, form: str, step: int | None, config: str | None
) -> source_lib.Source:
  """Opens the weights as the form that they are said to have."""
  if config is not None and form != 't5x':
    raise ValueError(
      f'--config={config} is for --from=t5x; other forms bring their config.'
    )
  if step is not None and form in ('hf', 'gguf'):
    raise ValueError(
      f'--step={step} is for runs and T5X; --from={form} has one model.'
    )
  location = pathlib.Path(source)
  if form == 'hf' and hub.is_name(source):
    location = hub.download(source)
  if not location.exists():
    raise FileNotFoundError(f'{source} is missing: expected weights there.')
  if not hub.is_name(source):
    opening.check_export(location)
  if form == 't5x':
    preset = None if config is None else _preset(config)
    return t5x.Checkpoint(location, step, preset)
  if form == 'gguf':
    return gguf_file.File(location)
  if form == 'hf':
    opening.check_no_adapter(location)
    if not (location / huggingface.CONFIG).is_file():
      raise FileNotFoundError(
        f'{source} is not a Hugging Face folder: it has no '
        f'{huggingface.CONFIG}.'
      )
    return huggingface.HuggingFaceFolder(location)
  if step is not None and (location / converted.DESCRIPTION).is_file():
    raise ValueError(
      f'--step={step} is for runs and T5X; {source} is a converted folder, '
      'which has one model.'
    )
  opened = opening.open_source(source, step)
  if (location / 'slm').is_dir() and _bundle_of(opened) is not None:
    print(
      f'{source} is a bundle of LLM-to-SLM: its SLM alone is converted; '
      '`export` takes all of it'
    )
  for kind, theirs in _FORMS.items():
    if isinstance(opened, kind):
      raise ValueError(f'{source} is {theirs[0]}: say --from={theirs[1]}.')
  return opened


def _preset(name: str) -> config_lib.TransformerConfig:
  """Returns the config in `gin_configs/models/NAME.gin`, or in a gin file."""
  file = name if name.endswith('.gin') else f'gin_configs/models/{name}.gin'
  gin_config.parse_config([file])
  macro = pathlib.Path(file).stem.upper()
  try:
    value = gin.query_parameter(f'{macro}/gin.macro.value')
  except ValueError as error:
    raise ValueError(f'{file} does not name a config {macro}.') from error
  return value.scoped_configurable_fn()


class Reading:
  """A source that takes notes: a cast, the digests, how far it has come."""

  def __init__(
    self,
    source: source_lib.Source,
    dtype: str | None,
    *,
    folds_scale: bool = False,
  ):
    self.source = source
    self.config, self._query_factor = source.config, 1.0
    if folds_scale:
      self.config, self._query_factor = scale_folding.fold(source.config)
    self.location = source.location
    self.model_type = source.model_type
    self.special_ids = source.special_ids
    self._shapes = {
      path: jax.ShapeDtypeStruct(shape.shape, jnp.dtype(dtype or shape.dtype))
      for path, shape in source.shapes().items()
    }
    if self._query_factor != 1:
      for path in filter(scale_folding.is_query, self._shapes):
        stored = source.shapes()[path].dtype
        written = self._shapes[path].dtype
        scale_folding.check(
          self._query_factor, stored, written, source.location
        )
    self._layers: dict[tuple[shapes_lib.Path, int], bytes] = {}
    self._stored: dict[tuple[shapes_lib.Path, int], bytes] = {}
    self.num_bytes = sum(
      shape.size * shape.dtype.itemsize for shape in self._shapes.values()
    )
    self.progress: Any = None
    self.notes = finite.Notes(source)
    # Whether the digests of all that is read are kept, before the cast.
    self.keeps_stored = False

  def step(self) -> int | None:
    return self.source.step()

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    return self._shapes

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> np.ndarray:
    stored = self.source.read(path, layer)
    if self.keeps_stored or self.source.digest(path) is not None:
      self._stored[path, layer or 0] = source_lib.digest_layer(stored)
    dtype = self._shapes[path].dtype
    if self._query_factor != 1 and scale_folding.is_query(path):
      array = scale_folding.scale(stored, self._query_factor, dtype)
    else:
      array = stored.astype(dtype, copy=False)
    self.notes.look(array, path, layer)
    self._layers[path, layer or 0] = source_lib.digest_layer(array)
    if self.progress is not None:
      self.progress.update(array.nbytes)
    return array

  def name(self, path: shapes_lib.Path) -> str:
    return self.source.name(path)

  def digest(self, path: shapes_lib.Path) -> str:
    return self._whole(path, self._layers)

  def source_fingerprint(self) -> str:
    """Returns the fingerprint of the source, all of which has been read."""
    return source_lib.fingerprint(
      {path: self._whole(path, self._stored) for path in self._shapes}
    )

  def check_source(self) -> None:
    """Refuses what was read if it is not what the source's digests say.

    Raises:
      ValueError: names the tensors.
    """
    if integrity.verification():
      paths = {path for path, _ in self._stored}
      source_lib.check_digests(
        self.source, {path: self._whole(path, self._stored) for path in paths}
      )

  def _whole(
    self,
    path: shapes_lib.Path,
    layers: Mapping[tuple[shapes_lib.Path, int], bytes],
  ) -> str:
    count = len(list(source_lib.layers(path, self._shapes[path].shape)))
    return source_lib.digest(layers[path, i] for i in range(count))


def progress_bar(num_bytes: int, what: str) -> Any:
  return tqdm.tqdm(
    total=num_bytes,
    desc=what,
    unit='B',
    unit_scale=True,
    file=sys.stderr,
    disable=None,  # Where nobody looks on.
    leave=False,
  )


def check_destination(folder: pathlib.Path, num_bytes: int) -> None:
  if folder.exists():
    raise ValueError(
      f'{folder} is there already. Name another DESTINATION, or remove it.'
    )
  parent = files.nearest_existing(folder)
  if not parent.is_dir():
    raise ValueError(
      f'{parent} is a file: no folder can be made in it. Name another '
      'DESTINATION.'
    )
  free = shutil.disk_usage(parent).free
  if free < num_bytes:
    raise ValueError(
      f'{parent} has {free / 1e9:,.1f} GB free; the weights take '
      f'{num_bytes / 1e9:,.1f} GB. Make room, name another DESTINATION, or '
      'halve it by --dtype=bfloat16.'
    )


def _check_form(source: 'Reading', to: str) -> None:
  """Refuses a model that the form asked for cannot say."""
  if to == 'hf':
    to_huggingface.find_model_type(source)
  elif to == 't5x':
    to_t5x.check(source)


def _describe(reading: Reading, form: str) -> str:
  shapes = reading.shapes().values()
  dtypes = sorted({shape.dtype.name for shape in shapes})
  family = reading.model_type or (
    'encoder-decoder' if reading.config.is_encoder_decoder else 'decoder-only'
  )
  if shapes_lib.is_encoder_alone(reading.shapes()):
    family += ', the encoder alone'
    if (
      isinstance(reading.source, huggingface.HuggingFaceWeights)
      and reading.source.left_out
    ):
      family += f' ({reading.source.left_out})'
  at = f', step {reading.step()}' if reading.step() is not None else ''
  folded = (
    '; the scale of its attention logits goes into the query kernels'
    if reading.config != reading.source.config
    else ''
  )
  return (
    f'{reading.location} ({form}{at}): {family}, '
    f'{sum(shape.size for shape in shapes):,} parameters in {len(shapes)} '
    f'tensors; to be stored as {", ".join(dtypes)}, '
    f'{reading.num_bytes / 1e9:,.3f} GB{folded}'
  )


def _write(
  reading: Reading,
  folder: pathlib.Path,
  to: str,
  vocabulary_path: str | None,
) -> None:
  """Writes the whole destination into an empty folder."""
  folder.mkdir(parents=True)
  model_folder = folder
  source = reading.source
  if (
    to == 'hf'
    and isinstance(source, runs.Run)
    and source.description['kind'] == 'llm_to_slm'
  ):
    model_folder = folder / to_huggingface.SLM
    to_huggingface.save_run(reading, source, folder)
    _vocabulary(source, 'prompt').save(folder)
    prompt = loading.load(folder)
    export.complete(folder, prompt, adds_eos=True)
  vocabulary = _write_tokenizer(reading, model_folder, vocabulary_path)
  is_carried = vocabulary_path is None and reading.model_type is not None
  if vocabulary is not None and (
    isinstance(source, gguf_file.File) or (to == 'hf' and not is_carried)
  ):
    is_t5 = 'relative' in reading.config.positions
    export.complete(
      model_folder,
      vocabulary,
      adds_eos=reading.config.is_encoder_decoder,
      sentinels_below=reading.config.vocab_size if is_t5 else 0,
    )
  with progress_bar(reading.num_bytes, 'converting') as reading.progress:
    if to == 'hf':
      to_huggingface.save(reading, model_folder, vocabulary)
      if vocabulary is not None and not is_carried:
        export.check(model_folder, to_huggingface.find_model_type(reading))
    elif to == 't5x':
      to_t5x.save(reading, folder)
    else:
      if not reading.special_ids and vocabulary is not None:
        reading.special_ids = to_huggingface.special_ids(reading, vocabulary)
      converted.save(reading, folder)


def _write_tokenizer(
  reading: Reading, folder: pathlib.Path, path: str | None
) -> base.Vocabulary | None:
  """Writes the tokenizer beside the weights; None where there is none.

  Raises:
    ValueError: if it has more ids than the embedding table has rows, or ends
      text by another id than config.json says.
  """
  source = reading.source
  if path is not None:
    loading.load(path).save(folder)
  elif isinstance(source, gguf_file.File):
    source.save_tokenizer(folder)
  elif isinstance(source, runs.Run):
    _vocabulary(source, 'answer').save(folder)
  elif (bundle := _bundle_of(source)) is not None:
    loading.load(bundle / runs.VOCABULARIES / 'answer').save(folder)
  elif not isinstance(source, t5x.Checkpoint):
    _copy_tokenizer(pathlib.Path(source.location), folder)
  is_copied = (
    path is None
    and isinstance(
      source, huggingface.HuggingFaceFolder | converted.ConvertedFolder
    )
    and _bundle_of(source) is None
  )
  try:
    # What it is depends on the family too, which `folder` does not say yet.
    vocabulary = loading.load(source.location if is_copied else folder)
  except FileNotFoundError:
    print(
      f'{source.location} brings no tokenizer that is known. Give one by '
      '--vocabulary=FILE, or by LLM_VOCABULARY / SLM_VOCABULARY at use'
    )
    return None
  except ValueError as error:  # Kept all the same: transformers may read it.
    print(f'the tokenizer is copied, and cannot be used here: {error}')
    return None
  vocabulary.for_table(reading.config.vocab_size)
  ids = reading.special_ids
  said = ids.get('eos_token_id', ids.get('decoder', {}).get('eos_token_id'))
  eos_ids = [said] if isinstance(said, int) else said
  if eos_ids and vocabulary.eos_id not in eos_ids:
    raise ValueError(
      f'The tokenizer ends text by eos_id={vocabulary.eos_id}, and the '
      f'config.json of {source.location} says eos_token_id={said}. Give the '
      'tokenizer that the model was trained with (--vocabulary), or correct '
      'the wrong one of them.'
    )
  return vocabulary


def _bundle_of(source: source_lib.Source) -> pathlib.Path | None:
  """Returns the bundle that a converted folder is in, if it is in one."""
  folder = pathlib.Path(source.location).parent
  is_in_one = isinstance(
    source, converted.ConvertedFolder
  ) and manifest.is_export(folder, manifest.BUNDLE)
  return folder if is_in_one else None


def _vocabulary(run: runs.Run, name: str) -> base.Vocabulary:
  return runs.load_vocabulary(pathlib.Path(run.location), run.description, name)


def _copy_tokenizer(source: pathlib.Path, destination: pathlib.Path) -> None:
  destination.mkdir(parents=True, exist_ok=True)
  for name in _CARRIED:
    if (source / name).is_file():
      shutil.copyfile(source / name, destination / name)


def _check_written(reading: Reading, folder: pathlib.Path, to: str) -> str:
  """Reads back what was written; returns what was found equal.

  Raises:
    ValueError: lists the tensors that are not what was read before.
  """
  if (folder / to_huggingface.SLM).is_dir():
    folder = folder / to_huggingface.SLM
  again = Reading(_open(str(folder), to, None, None), None)
  with progress_bar(again.num_bytes, 'checking') as again.progress:
    for path, shape in again.shapes().items():
      for layer in source_lib.layers(path, shape.shape):
        again.read(path, layer)
  written = {path: reading.digest(path) for path in reading.shapes()}
  found = {path: again.digest(path) for path in again.shapes()}
  if written != found:
    differing = [
      '/'.join(path)
      for path in sorted(written.keys() | found.keys())
      if written.get(path) != found.get(path)
    ]
    raise ValueError(
      f'What was written to {folder} does not read back as it was. The disk '
      'may be failing; these tensors differ:\n  ' + '\n  '.join(differing)
    )
  return (
    f'read back, {len(found)} tensors are equal in name, shape and content; '
    f'fingerprint {source_lib.fingerprint(found)}'
  )


def _compare(folder: pathlib.Path, source: source_lib.Source) -> str:
  """Returns how near our logits are to those of transformers.

  Raises:
    ValueError: if they differ by more than float32 explains.
  """
  difference = parity.compare(folder, source)
  if not difference < 1e-5:
    raise ValueError(
      f'transformers computes other logits from {folder}: they differ by '
      f'{difference:.1e} of the largest. Nothing is kept; please report this '
      'with its config.json.'
    )
  return f'logits are those of transformers to {difference:.1e} of the largest'
