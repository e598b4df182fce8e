# SPDX-License-Identifier: Apache-2.0
"""Loading the tokenizer stored with a model's weights, in any format."""

import functools
import pathlib
import tempfile

from l2s_jax.runtime import scratch, storage
from l2s_jax.vocabularies import base, loading, tokenizer_files
from l2s_jax.weights import hub, manifest, runs
from l2s_jax.weights.formats import gguf_file, t5x


def load(
  location: str, *, extra_ids: int = 0, setting: str = 'VOCABULARY'
) -> base.Vocabulary:
  """Returns the tokenizer stored beside weights, or inside them (GGUF).

  Args:
    location: location of the weights, see `opening.open_source`.
    extra_ids: see `loading.load`.
    setting: gin setting that can name a tokenizer instead, for the error.

  Raises:
    ValueError: if the weights have no tokenizer; names `setting`.
  """
  path = storage.of(location)
  if hub.is_name(location):
    path = hub.download(location)
  if (path / 'model.json').is_file():  # The answer tokenizer.
    return runs.load_vocabulary(path, runs.read_description(path), 'answer')
  if manifest.is_export(path, manifest.BUNDLE):
    path = path / runs.VOCABULARIES / 'answer'
  if gguf_file.is_file(path):
    path = _out_of_gguf(str(path.resolve()), setting)
  elif path.is_file() or (
    t5x.is_checkpoint(path) and not vocabularies_are_in(path)
  ):
    raise ValueError(_asks_for_one(location, setting))
  try:
    return loading.load(path, extra_ids=extra_ids)
  except FileNotFoundError as error:
    if not path.exists():
      raise
    raise ValueError(_asks_for_one(location, setting)) from error


def vocabularies_are_in(folder: pathlib.Path) -> bool:
  """Returns whether a folder holds a tokenizer file."""
  return any((folder / name).is_file() for name in tokenizer_files.ALL_FILES)


def _asks_for_one(location: str, setting: str) -> str:
  return (
    f'{location} has no supported tokenizer: set {setting} to the tokenizer of '
    'the model, a SentencePiece model, a tokenizer.json, or a folder with one '
    'of them.'
  )


@functools.cache
def _out_of_gguf(location: str, setting: str) -> pathlib.Path:
  """Extracts the tokenizer of a GGUF file into a temporary folder.

  The folder is removed when the process ends.
  """
  folder = scratch.folder()
  _KEPT.append(folder)
  path = pathlib.Path(folder.name)
  if not gguf_file.File(storage.of(location)).save_tokenizer(path):
    raise ValueError(_asks_for_one(location, setting))
  return path


# Keeps references, since garbage collection would remove the folders.
_KEPT: list[tempfile.TemporaryDirectory[str]] = []
