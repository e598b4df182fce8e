# SPDX-License-Identifier: Apache-2.0
"""Loads tokenizers from files and folders, and compares their ids."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from l2s_jax.runtime import storage
from l2s_jax.vocabularies import (
  auto_tokenizer,
  base,
  huggingface,
  tokenizer_files,
)
from l2s_jax.vocabularies import sentencepiece as sentencepiece_lib

# Prefixes of tokenizer classes with add_bos_token=True by default.
_WITH_BOS = ('Llama', 'Gemma')


def load(
  path: str | os.PathLike[str],
  *,
  extra_ids: int = 0,
  start_id: int | None = None,
  eos_id: int | None = None,
  pad_id: int | None = None,
) -> base.Vocabulary:
  """Loads a vocabulary from a file or a folder.

  A file is read alone, like in SeqIO. A folder is read like in the
  AutoTokenizer of transformers: `tokenizer.json` before other files, with added
  tokens, and with the start and EOS ids of the model's config. Two kinds of
  folders are read differently. A `vocabularies` folder of a run is read as it
  is. A folder unknown to AutoTokenizer, such as one with just a SentencePiece
  model, is searched for `spiece.model`, `tokenizer.model`,
  `sentencepiece.model`, `tokenizer.json`, `vocab.json` with `merges.txt`, and a
  ByT5 `tokenizer_config.json`, in this order.

  Args:
    path: a SentencePiece `.model`, a Hugging Face `.json`, or a folder.
    extra_ids: see `SentencePieceVocabulary`. If set, only the SentencePiece
      model of a folder is read; other kinds of files have their own sentinels.
    start_id: overrides the files; so do `eos_id` and `pad_id`.

  Raises:
    FileNotFoundError: if the path is missing, or a folder without a known file.
    ValueError: if the file is of no known kind or broken.
  """
  folder = storage.of(path)
  overrides: dict[str, Any] = {
    'start_id': start_id,
    'eos_id': eos_id,
    'pad_id': pad_id,
  }
  if not folder.is_dir():
    return _load_one_file(folder, extra_ids=extra_ids, **overrides)
  said = tokenizer_files.said_ids(folder)
  vocabulary = None
  if not extra_ids and not _is_of_run(folder):
    vocabulary = _load_as_transformers(folder, said, overrides)
  if vocabulary is None:
    vocabulary = _load_one_file(
      folder, extra_ids=extra_ids, said_ids=said, **overrides
    )
  vocabulary.origin = folder
  return vocabulary


def fingerprint_before(vocabulary: base.Vocabulary) -> str:
  """Returns the fingerprint of a tokenizer folder in earlier versions.

  They read one file of a folder, preferably a SentencePiece model, and neither
  added tokens nor the ids of the model's config.
  """
  if vocabulary.origin is None or not vocabulary.origin.exists():
    return vocabulary.fingerprint()
  try:
    return _load_one_file(vocabulary.origin).fingerprint()
  except (ValueError, FileNotFoundError):  # Earlier versions read nothing.
    return vocabulary.fingerprint()


def share_ids(one: base.Vocabulary, other: base.Vocabulary) -> bool:
  """Returns whether equal ids of two vocabularies stand for equal pieces.

  True for equal vocabularies, and for a folder and the single file that earlier
  versions read from it, which differ in special tokens only.
  """
  if one == other:
    return True
  fingerprints = {one.fingerprint(), fingerprint_before(one)}
  return bool(fingerprints & {other.fingerprint(), fingerprint_before(other)})


def _is_of_run(folder: pathlib.Path) -> bool:
  """Returns whether a folder is one of a run's `vocabularies`.

  Its files are those of training and are read as they are.
  """
  above = folder.absolute().parent
  return above.name == 'vocabularies' and (
    (above.parent / 'model.json').exists()
  )


def _load_as_transformers(
  folder: pathlib.Path,
  said: Mapping[str, Any],
  overrides: Mapping[str, Any],
) -> base.Vocabulary | None:
  """Loads a folder like AutoTokenizer; returns None if AutoTokenizer cannot."""
  from l2s_jax.vocabularies import byte

  path = folder / tokenizer_files.CONFIG_FILE
  config = tokenizer_files.read_json(path)
  if config.get('tokenizer_class') == tokenizer_files.BYTE_TOKENIZER:
    in_text = None
    if byte.IN_TEXT not in config:
      arguments = auto_tokenizer.arguments(folder)
      in_text = byte.in_text_of(arguments)
    return byte.ByteVocabulary(
      path, said_ids=said, in_text=in_text, **overrides
    )
  if not _is_of_transformers(folder, config):
    return None
  resolved = auto_tokenizer.resolve(folder)
  if resolved is None:
    return None
  if resolved.note:
    print(resolved.note)
  if resolved.is_as_stored:
    path = folder / tokenizer_files.TOKENIZER_FILE
    if not path.is_file():
      path = folder
    stored = huggingface.HuggingFaceVocabulary(path, said_ids=said, **overrides)
    stored.is_resolved = True
    stored._says_bos = _says_bos(config)
    return stored
  says_bos = _says_bos(config)
  config = {f'{kind}_token': token for kind, token in resolved.tokens.items()}
  if config.get('unk_token') == config.get('eos_token'):
    config.pop('unk_token', None)  # GPT-2's unk_token is not an unknown token.
  config |= {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
  }
  made = huggingface.HuggingFaceVocabulary(
    folder / tokenizer_files.TOKENIZER_FILE,
    contents={
      tokenizer_files.TOKENIZER_FILE: resolved.content,
      tokenizer_files.CONFIG_FILE: (
        json.dumps(config, indent=2, sort_keys=True) + '\n'
      ).encode(),
    },
    said_ids=said,
    **overrides,
  )
  made._says_bos = says_bos
  return made


def _says_bos(config: Mapping[str, Any]) -> bool:
  """Returns whether a tokenizer_config.json requests BOS before a text."""
  by_class = str(config.get('tokenizer_class')).startswith(_WITH_BOS)
  return config.get('add_bos_token', by_class) is True


def _is_of_transformers(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> bool:
  """Returns whether AutoTokenizer reads a folder: by class, file or family."""
  if (
    'tokenizer_class' in config
    or (folder / tokenizer_files.TOKENIZER_FILE).is_file()
  ):
    return True
  return any(
    tokenizer_files.read_json(folder / name).get('model_type') is not None
    for name in ('config.json', 'weights.json')
  )


def _load_one_file(
  path: pathlib.Path,
  *,
  extra_ids: int = 0,
  said_ids: Mapping[str, Any] | None = None,
  start_id: int | None = None,
  eos_id: int | None = None,
  pad_id: int | None = None,
) -> base.Vocabulary:
  """Loads the vocabulary of a file, or of the first known file in a folder."""
  from l2s_jax.vocabularies import byte

  path = _find(path)
  overrides: dict[str, Any] = {
    'start_id': start_id,
    'eos_id': eos_id,
    'pad_id': pad_id,
    'said_ids': said_ids,
  }
  if path.suffix == '.model':
    return sentencepiece_lib.SentencePieceVocabulary(
      path, extra_ids=extra_ids, **overrides
    )
  if extra_ids:
    raise ValueError(
      f'extra_ids={extra_ids} applies to SentencePiece models, but {path} has '
      'its own special tokens. Set extra_ids=0.'
    )
  if path.name == tokenizer_files.CONFIG_FILE:
    return byte.ByteVocabulary(path, **overrides)
  if path.is_dir() or path.suffix == '.json':
    return huggingface.HuggingFaceVocabulary(path, **overrides)
  raise ValueError(
    f'{path} is not a tokenizer file: expected a SentencePiece model '
    '(*.model), a tokenizer.json, or a folder with one of them.'
  )


def _find(path: pathlib.Path) -> pathlib.Path:
  """Returns the tokenizer file, or the folder of GPT-2's files, at `path`.

  A ByT5 tokenizer is represented by its `tokenizer_config.json`.
  """
  if not path.exists():
    raise FileNotFoundError(f'{path} is missing: expected a tokenizer there.')
  if not path.is_dir():
    return path
  single_files = (
    *tokenizer_files.SENTENCEPIECE_FILES,
    tokenizer_files.TOKENIZER_FILE,
  )
  for name in single_files:
    if (path / name).exists():
      return path / name
  if all((path / name).exists() for name in tokenizer_files.GPT2_FILES):
    return path
  config_file = path / tokenizer_files.CONFIG_FILE
  if config_file.exists():
    config = tokenizer_files.parse_json(
      tokenizer_files.read(config_file), config_file
    )
    if config.get('tokenizer_class') == tokenizer_files.BYTE_TOKENIZER:
      return config_file
  raise FileNotFoundError(
    f'{path} has no tokenizer: looked for {", ".join(single_files)}, '
    f'{" with ".join(tokenizer_files.GPT2_FILES)} and {config_file.name} of a '
    f'{tokenizer_files.BYTE_TOKENIZER}.'
  )
