# SPDX-License-Identifier: Apache-2.0
"""The verb `convert`: weights in one format, written and verified in another.

Formats: `hf` is a Hugging Face folder or the name of a model on the Hub, `t5x`
a T5X checkpoint, `gguf` a GGUF file, and `l2s` a run of l2s_jax or a folder
that `--to=l2s` wrote. Tensors are read, cast and written layer by layer. The
destination appears only after all of it has been written and read back.
"""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from l2s_jax.interop import destination as destination_lib
from l2s_jax.interop import (
  parity,
  scale_folding,
  t5x_state,
  to_huggingface,
  to_t5x,
)
from l2s_jax.models import config as config_lib
from l2s_jax.models import int8
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.runtime import (
  extras,
  files,
  gin_config,
  integrity,
  scratch,
  storage,
)
from l2s_jax.training import checkpoint
from l2s_jax.vocabularies import base, export, loading, tokenizer_files
from l2s_jax.weights import converted, finite, hub, manifest, opening, runs
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import gguf_file, huggingface, t5x

# Formats other than --from=l2s: their names in errors, and values of --from.
_FORMS: dict[type, tuple[str, str]] = {
  gguf_file.File: ('a GGUF file', 'gguf'),
  huggingface.HuggingFaceFolder: ('a Hugging Face folder', 'hf'),
  t5x.Checkpoint: ('a T5X checkpoint', 't5x'),
}
# Tokenizer files to copy, with the chat template of transformers.
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
  """Converts weights to another format and verifies the result.

  The source must have exactly the tensors of its config, in their shapes, and
  the tokenizer must fit the embedding table. The written tensors are read back
  and their digests compared with those of the source after the cast. For an
  LLM-to-SLM run, `--to=hf` writes the SLM (slm/), the projector, and a
  config.json that describes how they fit together; other formats take the SLM
  only.

  Args:
    source: location of the weights: a folder, a file, or a name on the Hub.
    destination: folder to write, local or in a bucket; it must not exist.
    from_: format of the source: 'hf', 't5x', 'gguf' or 'l2s'.
    to: format of the destination: 'l2s', 'hf', 't5x' or 'run'. 'run' makes a
      run with optimizer state from a T5X checkpoint of LLM-to-SLM.
    dtype: dtype of the written tensors, 'float32' or 'bfloat16'; None keeps
      that of the source.
    step: checkpoint step of a run or of T5X; None means the newest.
    config: model config of a T5X checkpoint without config.json: a name in
      `gin_configs/models/` or a gin file.
    vocabulary: tokenizer to write, in place of that of the source.
    verify: whether to compare logits with those of transformers; one of the two
      formats must be 'hf'.
    allow_non_finite: whether to accept NaN and infinity in the weights.
    run: for `to='run'`, the run of the T5X model.
    dry_run: whether to print the plan and stop.

  Raises:
    FileNotFoundError: if the source does not exist in the given format.
    ValueError: if flags do not go together; if the weights are unreadable, do
      not match their config or cannot be expressed in the new format; if there
      is not enough disk space; or if the written tensors differ.
  """
  storage.check(source, 'SOURCE')
  folder = destination_lib.opened(destination)
  if run is not None or to == 'run':
    given: dict[str, Any] = {'from': from_, 'to': to, 'run': run}
    given |= {'dtype': dtype, 'config': config, 'vocabulary': vocabulary}
    given |= {'verify': verify, 'allow_non_finite': allow_non_finite}
    _begin_run(source, folder, given, step, dry_run=dry_run)
    return
  if verify:
    extras.require('--verify', 'torch', 'transformers')
    if 'hf' not in (from_, to):
      raise ValueError(
        '--verify compares logits with transformers and needs --from=hf or '
        f'--to=hf, but found --from={from_} --to={to}. Remove --verify.'
      )
  opened = _open(source, from_, step, config)
  # An LLM may be an encoder without its decoder.
  wanted = source_lib.demanded(opened.config, opened.shapes())
  source_lib.check_shapes(opened, wanted, allow_others=False)
  if verify and shapes_lib.is_encoder_alone(opened.shapes()):
    raise ValueError(
      f'--verify compares logits, but {opened.location} is an encoder without '
      'a decoder. Remove --verify.'
    )
  reading = Reading(opened, dtype, folds_scale=to == 'hf')
  destination_lib.check(folder, reading.num_bytes)
  _check_form(reading, to)
  print(_describe(reading, from_))
  if dry_run:
    with scratch.folder() as name:
      _write_tokenizer(reading, pathlib.Path(name), vocabulary)
    return
  with destination_lib.writing(folder) as unfinished:
    _write(reading, unfinished, to, vocabulary)
    reading.check_source()
    reading.notes.check(allow_non_finite=allow_non_finite)
    checked = _check_written(reading, unfinished, to)
    if verify:
      theirs = unfinished
      if to != 'hf':
        theirs = storage.local_folder(storage.of(opened.location))
      if (theirs / to_huggingface.SLM).is_dir():
        theirs = theirs / to_huggingface.SLM
      checked += '; ' + _compare(theirs, huggingface.HuggingFaceFolder(theirs))
    destination_lib.finish(unfinished, folder)
  print(f'wrote {folder} ({to}); {checked}')


def _begin_run(
  source: str,
  folder: pathlib.Path,
  given: Mapping[str, Any],
  step: int | None,
  *,
  dry_run: bool,
) -> None:
  """Makes a run from a T5X checkpoint with optimizer state.

  Raises:
    ValueError: if the flags are not those of such a conversion.
  """
  others = {key: x for key, x in given.items() if x and key != 'run'}
  if others != {'from': 't5x', 'to': 'run'} or given['run'] is None:
    flags = ' '.join(f'--{key}={x}' for key, x in given.items() if x)
    raise ValueError(
      f'{flags}: expected --from=t5x --to=run --run=RUN, with RUN the run of '
      'the T5X model. The only other flag is --step.'
    )
  if storage.is_bucket(folder):
    checkpoint.check_folder(str(folder))
  destination_lib.check(folder, 0)
  target, _ = t5x.open_part(storage.of(source), step, ('target',))
  print(f'{source}: {len(target)} parameters')
  if dry_run:
    return
  with destination_lib.writing(folder) as unfinished:
    number = t5x_state.read(source, given['run'], unfinished, step)
    destination_lib.finish(unfinished, folder)
  print(f"wrote {folder} (run): step {number}, with Adafactor's state.")


def _open(
  source: str, form: str, step: int | None, config: str | None
) -> source_lib.Source:
  """Opens weights in the format `form`, a value of --from.

  Raises:
    FileNotFoundError: if there are no weights of this format.
    ValueError: if a flag does not apply, or the weights have another format.
  """
  if config is not None and form != 't5x':
    raise ValueError(
      f'--config={config} applies only to --from=t5x; other formats contain '
      'their config. Remove --config.'
    )
  if step is not None and form in ('hf', 'gguf'):
    raise ValueError(
      f'--step={step} applies only to runs and T5X checkpoints; '
      f'--from={form} has no steps. Remove --step.'
    )
  location = storage.of(source)
  if form == 'hf' and hub.is_name(source):
    location = hub.download(source)
  if not location.exists():
    raise FileNotFoundError(
      f'SOURCE={source} does not exist; expected a folder, a file, or a name '
      'on the Hub.'
    )
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
        f'{source} is not a Hugging Face folder: {huggingface.CONFIG} is '
        'missing. Set --from to the format of SOURCE.'
      )
    return huggingface.HuggingFaceFolder(location)
  if step is not None and (location / converted.DESCRIPTION).is_file():
    raise ValueError(
      f'--step={step} applies only to runs and T5X checkpoints; {source} is a '
      'converted folder without steps. Remove --step.'
    )
  opened = opening.open_source(source, step)
  if (location / 'slm').is_dir() and _bundle_of(opened) is not None:
    print(
      f'{source} is a bundle of LLM-to-SLM: only its SLM is converted. Use '
      '`export` for the whole model.'
    )
  for kind, theirs in _FORMS.items():
    if isinstance(opened, kind):
      raise ValueError(f'{source} is {theirs[0]}. Use --from={theirs[1]}.')
  return opened


def _preset(name: str) -> config_lib.TransformerConfig:
  """Returns the config of `gin_configs/models/NAME.gin`, or of a gin file."""
  file = name if name.endswith('.gin') else f'gin_configs/models/{name}.gin'
  gin_config.parse_config([file])
  macro = pathlib.Path(file).stem.upper()
  try:
    value = gin.query_parameter(f'{macro}/gin.macro.value')
  except ValueError as error:
    raise ValueError(
      f'{file} does not bind the macro {macro}; expected a model config.'
    ) from error
  return value.scoped_configurable_fn()


class Reading:
  """A source with a cast that records digests, progress and non-finite values.

  It implements `source.Source` for the tensors after the cast.

  Attributes:
    source: the source before the cast.
    config: the model config; with `folds_scale`, the one without a scale.
    num_bytes: size of all tensors after the cast.
    progress: progress bar of `read`, in bytes; None for none.
    notes: record of non-finite tensors.
    keeps_stored: whether to record the digests of all tensors before the cast,
      too; otherwise only of those with stored digests.
  """

  def __init__(
    self,
    source: source_lib.Source,
    dtype: str | None,
    *,
    folds_scale: bool = False,
    with_int8: bool = False,
  ):
    """Opens nothing; computes shapes and sizes.

    Args:
      source: the source.
      dtype: dtype of the cast; None keeps the stored dtypes.
      folds_scale: whether to fold the scale of attention logits into the query
        kernels, for a model family without such a scale; see `scale_folding`.
      with_int8: whether to round kernels and token embeddings to int8; they
        are read as float32.

    Raises:
      ValueError: if the cast would round the folded kernels twice.
    """
    self._with_int8 = with_int8
    self.source = source
    self.config, self._query_factor = source.config, 1.0
    if folds_scale:
      self.config, self._query_factor = scale_folding.fold(source.config)
    self.location = source.location
    self.model_type = source.model_type
    self.special_ids = source.special_ids
    self._shapes = {
      path: jax.ShapeDtypeStruct(
        shape.shape,
        jnp.dtype('float32' if self._is_int8(path) else (dtype or shape.dtype)),
      )
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
    self.keeps_stored = False

  def _is_int8(self, path: shapes_lib.Path) -> bool:
    return self._with_int8 and bool(int8.contracted_axes(path))

  def step(self) -> int | None:
    return self.source.step()

  def shapes(self) -> dict[shapes_lib.Path, jax.ShapeDtypeStruct]:
    """Returns the shapes, with the dtypes after the cast."""
    return self._shapes

  def read(self, path: shapes_lib.Path, layer: int | None = None) -> np.ndarray:
    """Reads a tensor or one layer of it, casts it and records its digest."""
    stored = np.asarray(self.source.read(path, layer))
    if self.keeps_stored or self.source.digest(path) is not None:
      self._stored[path, layer or 0] = source_lib.digest_layer(stored)
    array = self._cast(stored, path)
    self.notes.look(array, path, layer)  # int8 has no NaN.
    array = self._rounded(array, path, layer)
    self._layers[path, layer or 0] = source_lib.digest_layer(array)
    if self.progress is not None:
      self.progress.update(array.nbytes)
    return array

  def read_again(self, path: shapes_lib.Path, layer: int | None) -> np.ndarray:
    """Returns what `read` has returned, without records."""
    array = self._cast(np.asarray(self.source.read(path, layer)), path)
    return self._rounded(array, path, layer)

  def _cast(self, stored: np.ndarray, path: shapes_lib.Path) -> np.ndarray:
    """Returns a tensor in its new dtype, with the folded scale."""
    dtype = self._shapes[path].dtype
    if self._query_factor != 1 and scale_folding.is_query(path):
      return scale_folding.scale(stored, self._query_factor, dtype)
    return stored.astype(dtype, copy=False)

  def _rounded(
    self, array: np.ndarray, path: shapes_lib.Path, layer: int | None
  ) -> np.ndarray:
    """Returns a kernel rounded to int8, if asked for; else the tensor."""
    if not self._is_int8(path):
      return array
    is_stacked = layer is None and 'layers' in path
    axes = int8.contracted_axes(path, is_stacked=is_stacked)
    rounded: np.ndarray = int8.round_kernel(array, axes)
    return rounded

  def name(self, path: shapes_lib.Path) -> str:
    return self.source.name(path)

  def digest(self, path: shapes_lib.Path) -> str:
    """Returns a tensor's digest after the cast; all its layers must be read."""
    return self._whole(path, self._layers)

  def source_fingerprint(self) -> str:
    """Returns the fingerprint of the source before the cast.

    All tensors must have been read, with `keeps_stored`.
    """
    return source_lib.fingerprint(
      {path: self._whole(path, self._stored) for path in self._shapes}
    )

  def check_source(self) -> None:
    """Checks the tensors read so far against the digests stored in the source.

    Raises:
      ValueError: lists the tensors that differ.
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
    """Returns the digest of a tensor from those of its layers."""
    count = len(list(source_lib.layers(path, self._shapes[path].shape)))
    return source_lib.digest(layers[path, i] for i in range(count))


def progress_bar(num_bytes: int, what: str) -> Any:
  """Returns a progress bar on standard error; silent unless that is a terminal.

  Args:
    num_bytes: total size.
    what: label of the bar.
  """
  return tqdm.tqdm(
    total=num_bytes,
    desc=what,
    unit='B',
    unit_scale=True,
    file=sys.stderr,
    disable=None,  # Without a terminal.
    leave=False,
  )


def _check_form(source: 'Reading', to: str) -> None:
  """Checks that a format can express the model.

  Raises:
    ValueError: lists the differences.
  """
  if to == 'hf':
    to_huggingface.find_model_type(source)
  elif to == 't5x':
    to_t5x.check(source)


def _describe(reading: Reading, form: str) -> str:
  """Returns a summary: format, model family, number of parameters, size."""
  shapes = reading.shapes().values()
  dtypes = sorted({shape.dtype.name for shape in shapes})
  family = reading.model_type or (
    'encoder-decoder' if reading.config.is_encoder_decoder else 'decoder-only'
  )
  if shapes_lib.is_encoder_alone(reading.shapes()):
    family += ', encoder only'
    if (
      isinstance(reading.source, huggingface.HuggingFaceWeights)
      and reading.source.left_out
    ):
      family += f' ({reading.source.left_out})'
  at = f', step {reading.step()}' if reading.step() is not None else ''
  folded = (
    '; the scale of attention logits is folded into the query kernels'
    if reading.config != reading.source.config
    else ''
  )
  return (
    f'{reading.location} ({form}{at}): {family}, '
    f'{sum(shape.size for shape in shapes):,} parameters in {len(shapes)} '
    f'tensors; written as {", ".join(dtypes)}, '
    f'{files.in_units(reading.num_bytes)}{folded}'
  )


def _write(
  reading: Reading,
  folder: pathlib.Path,
  to: str,
  vocabulary_path: str | None,
) -> None:
  """Writes weights and tokenizer into a new folder."""
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
  """Writes the tokenizer beside the weights; returns None without a usable one.

  Raises:
    ValueError: if the tokenizer has more ids than the embedding table has rows,
      or another EOS id than config.json.
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
    _copy_tokenizer(storage.of(source.location), folder)
  is_copied = (
    path is None
    and isinstance(
      source, huggingface.HuggingFaceFolder | converted.ConvertedFolder
    )
    and _bundle_of(source) is None
  )
  try:
    # The type of tokenizer also depends on `model_type`; `folder` has none yet.
    vocabulary = loading.load(source.location if is_copied else folder)
  except FileNotFoundError:
    print(
      f'{source.location} has no tokenizer in a known format. Pass one with '
      '--vocabulary=FILE, or later with LLM_VOCABULARY or SLM_VOCABULARY.'
    )
    return None
  except ValueError as error:  # transformers may accept it.
    print(f'The tokenizer is copied, but l2s_jax cannot use it: {error}')
    return None
  vocabulary.for_table(reading.config.vocab_size)
  ids = reading.special_ids
  said = ids.get('eos_token_id', ids.get('decoder', {}).get('eos_token_id'))
  eos_ids = [said] if isinstance(said, int) else said
  if eos_ids and vocabulary.eos_id not in eos_ids:
    raise ValueError(
      f'The tokenizer has eos_id={vocabulary.eos_id}, but the config.json of '
      f'{source.location} has eos_token_id={said}. Set --vocabulary to the '
      "tokenizer of the model's training, or correct config.json."
    )
  return vocabulary


def _bundle_of(source: source_lib.Source) -> pathlib.Path | None:
  """Returns the bundle that contains a converted folder; None without one."""
  folder = storage.of(source.location).parent
  is_in_one = isinstance(
    source, converted.ConvertedFolder
  ) and manifest.is_export(folder, manifest.BUNDLE)
  return folder if is_in_one else None


def _vocabulary(run: runs.Run, name: str) -> base.Vocabulary:
  """Returns a vocabulary of a run, 'prompt' or 'answer'."""
  return runs.load_vocabulary(storage.of(run.location), run.description, name)


def _copy_tokenizer(source: pathlib.Path, destination: pathlib.Path) -> None:
  """Copies the tokenizer files of a folder."""
  destination.mkdir(parents=True, exist_ok=True)
  for name in _CARRIED:
    if (source / name).is_file():
      content = (source / name).read_bytes()
      if name == tokenizer_files.CONFIG_FILE:
        content = tokenizer_files.without_code(content, source / name)
      (destination / name).write_bytes(content)


def _check_written(reading: Reading, folder: pathlib.Path, to: str) -> str:
  """Reads the written tensors back; returns a summary of the comparison.

  Raises:
    ValueError: lists the tensors whose digests differ.
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
      f'{folder}: tensors read back with other values than were written. The '
      'disk may be failing. Differing tensors:\n  ' + '\n  '.join(differing)
    )
  return (
    f'{len(found)} tensors read back with equal names, shapes and values; '
    f'fingerprint {source_lib.fingerprint(found)}'
  )


def _compare(folder: pathlib.Path, source: source_lib.Source) -> str:
  """Compares logits with those of transformers; returns a summary.

  Raises:
    ValueError: if they differ by more than float32 rounding.
  """
  difference = parity.compare(folder, source)
  if not difference < 1e-5:
    raise ValueError(
      f'The logits of {folder} differ from those of transformers by '
      f'{difference:.1e} of the largest logit, expected less than 1e-5. The '
      'output was deleted. Please report this with config.json.'
    )
  return (
    f'logits equal those of transformers to within {difference:.1e} of the '
    'largest logit'
  )
