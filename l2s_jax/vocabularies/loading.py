# SPDX-License-Identifier: Apache-2.0
"""Which tokenizer a file or a folder holds, and whether two give equal ids."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from l2s_jax.vocabularies import (
  auto_tokenizer,
  base,
  huggingface,
  tokenizer_files,
)
from l2s_jax.vocabularies import sentencepiece as sentencepiece_lib

# Classes of tokenizers that begin a text with BOS unless told otherwise.
_WITH_BOS = ('Llama', 'Gemma')


def load(
  path: str | os.PathLike[str],
  *,
  extra_ids: int = 0,
  start_id: int | None = None,
  eos_id: int | None = None,
  pad_id: int | None = None,
) -> base.Vocabulary:
  """Reads a vocabulary from a file or from a folder with a known one.

  A file is that file alone, as SeqIO reads it. A folder is what AutoTokenizer
  of transformers makes of it, `tokenizer.json` before others, with the tokens
  that were added and with what the model's config says of starts and ends. Two
  kinds of folders are not: one of a run of ours, whose files say all, and one
  of which AutoTokenizer knows nothing, such as one with a SentencePiece model
  and no more. There `spiece.model`, `tokenizer.model`, `sentencepiece.model`,
  `tokenizer.json`, `vocab.json` with `merges.txt`, and a
  `tokenizer_config.json` of ByT5 are looked for, in this order.

  Args:
    path: a SentencePiece `.model`, a Hugging Face `.json`, or a folder.
    extra_ids: see `SentencePieceVocabulary`, which a folder then must hold, and
      which is read alone; other kinds bring their own.
    start_id: overrides the files; so do `eos_id` and `pad_id`.

  Raises:
    FileNotFoundError: if the path is missing, or a folder without a known file.
    ValueError: if the file is of no known kind or broken.
  """
  folder = pathlib.Path(path)
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
  """Returns the fingerprint that earlier versions gave a tokenizer's folder.

  They took one file of a folder, a SentencePiece model before others, and
  neither added tokens nor what the model's folder says of ids.
  """
  if vocabulary.origin is None or not vocabulary.origin.exists():
    return vocabulary.fingerprint()
  try:
    return _load_one_file(vocabulary.origin).fingerprint()
  except (ValueError, FileNotFoundError):  # They read none.
    return vocabulary.fingerprint()


def share_ids(one: base.Vocabulary, other: base.Vocabulary) -> bool:
  """Returns whether equal ids of two vocabularies stand for equal pieces.

  That is so of equal ones, and of a folder and the one file of it that it was
  read from before, which differ in special tokens alone.
  """
  if one == other:
    return True
  fingerprints = {one.fingerprint(), fingerprint_before(one)}
  return bool(fingerprints & {other.fingerprint(), fingerprint_before(other)})


def _is_of_run(folder: pathlib.Path) -> bool:
  """Returns whether a folder is one of a run's `vocabularies`.

  Their files are what the run was trained with, read as they are.
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
  """Returns what AutoTokenizer makes of a folder; None where it does not."""
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
    config.pop('unk_token', None)  # GPT-2's stands for nothing unknown.
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
  """Returns whether a tokenizer_config.json asks for BOS before a text."""
  by_class = str(config.get('tokenizer_class')).startswith(_WITH_BOS)
  return config.get('add_bos_token', by_class) is True


def _is_of_transformers(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> bool:
  """Returns whether a folder says enough to AutoTokenizer: class or family."""
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
  """Returns the vocabulary of a file, or of the first known in a folder."""
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
      f'extra_ids={extra_ids} is for SentencePiece models; {path} has its '
      'own special tokens. Set extra_ids=0.'
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
  """Returns the file, or the GPT-2 folder, that `path` stands for.

  A `tokenizer_config.json` stands for ByT5's bytes.
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
    f'{path} holds no tokenizer: looked for {", ".join(single_files)}, '
    f'{" with ".join(tokenizer_files.GPT2_FILES)} and {config_file.name} of a '
    f'{tokenizer_files.BYTE_TOKENIZER}.'
  )
