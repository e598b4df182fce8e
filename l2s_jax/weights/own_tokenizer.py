# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that came with weights, whatever form they have."""

import functools
import pathlib
import tempfile

from l2s_jax.vocabularies import base, loading, tokenizer_files
from l2s_jax.weights import hub, manifest, runs
from l2s_jax.weights.formats import gguf_file, t5x


def load(
  location: str, *, extra_ids: int = 0, setting: str = 'VOCABULARY'
) -> base.Vocabulary:
  """Returns the tokenizer beside weights, or in them.

  Args:
    location: what the weights are named by, see `opening.open_source`.
    extra_ids: see `loading.load`.
    setting: what else names a tokenizer, for the error.

  Raises:
    ValueError: if the weights bring none; says what to set.
  """
  path = pathlib.Path(location)
  if hub.is_name(location):
    path = hub.download(location)
  if (path / 'model.json').is_file():  # What it writes in, of a run.
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
  """Returns whether a folder has a file that a tokenizer may be read from."""
  return any((folder / name).is_file() for name in tokenizer_files.ALL_FILES)


def _asks_for_one(location: str, setting: str) -> str:
  return (
    f'{location} brings no tokenizer that is read here: set {setting} to the '
    'one that the model was trained with, a SentencePiece model, a '
    'tokenizer.json, or a folder that has one.'
  )


@functools.cache
def _out_of_gguf(location: str, setting: str) -> pathlib.Path:
  """Returns a folder with the tokenizer of a GGUF file, until the end."""
  folder = tempfile.TemporaryDirectory(prefix='l2s_jax-tokenizer-')
  _KEPT.append(folder)
  path = pathlib.Path(folder.name)
  if not gguf_file.File(pathlib.Path(location)).save_tokenizer(path):
    raise ValueError(_asks_for_one(location, setting))
  return path


# Removed when the process ends.
_KEPT: list[tempfile.TemporaryDirectory[str]] = []
