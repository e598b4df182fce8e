# SPDX-License-Identifier: Apache-2.0
"""The files of a tokenizer: their names, and what JSON beside it says.

A folder may hold a tokenizer in one of several files (`SENTENCEPIECE_FILES`,
`TOKENIZER_FILE`, `GPT2_FILES`) and say more of it in others: which tokens are
special, which were added, where an answer starts and ends. All of it is text
that people edit and tools garble, so everything is checked where it is read.
What the files amount to is in `auto_tokenizer.py` and `loading.py`.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import tokenizers

# In the order in which a folder is searched.
SENTENCEPIECE_FILES = ('spiece.model', 'tokenizer.model', 'sentencepiece.model')
TOKENIZER_FILE = 'tokenizer.json'
GPT2_FILES = ('vocab.json', 'merges.txt')
CONFIG_FILE = 'tokenizer_config.json'
ADDED_FILE = 'added_tokens.json'
GENERATION_FILE = 'generation_config.json'
# Name the special tokens; where both do, the second wins, as in transformers.
SPECIAL_FILES = ('special_tokens_map.json', CONFIG_FILE)
MODEL_FILES = (*SENTENCEPIECE_FILES, TOKENIZER_FILE, *GPT2_FILES)
ALL_FILES = (*MODEL_FILES, *SPECIAL_FILES, ADDED_FILE, GENERATION_FILE)

_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
_IDS = (
  'decoder_start_token_id',
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
)


def read(path: pathlib.Path) -> bytes:
  """Returns the content of a file that must be there."""
  if not path.is_file():
    raise FileNotFoundError(
      f'{path} is missing: expected a tokenizer file there.'
    )
  return path.read_bytes()


def parse_json(content: bytes, path: pathlib.Path) -> dict[str, Any]:
  """Returns the object that a JSON file holds, or names the file."""
  try:
    value = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path} is not JSON: {error}. Copy or download it again.'
    ) from error
  if not isinstance(value, dict):
    raise ValueError(
      f'{path} holds a JSON {type(value).__name__}, expected an object.'
    )
  return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file; an empty one where there is none."""
  return parse_json(path.read_bytes(), path) if path.is_file() else {}


def refuse(
  path: str | pathlib.Path, key: str, found: Any, wanted: str
) -> NoReturn:
  """Raises what says that a file holds something else than it should."""
  text = repr(found)
  if len(text) > 80:
    text = f'{text[:77]}...'
  raise ValueError(
    f'{path}: {key} is {text}, expected {wanted}. Correct it, or copy the '
    'file again from where the tokenizer came.'
  )


def token_text(value: Any, path: pathlib.Path, key: str) -> str | None:
  """Returns the text of a token, which may be an object; None of null."""
  if isinstance(value, dict):
    value = value.get('content')
  if value is not None and not isinstance(value, str):
    refuse(path, key, value, 'the text of a token')
  if value is not None:
    _check_text(value, path, key)
  return value


def added_token(
  value: Any, path: pathlib.Path, key: str, **defaults: bool
) -> tokenizers.AddedToken:
  """Returns an added token as a file describes it.

  Args:
    value: its text, or an object of its `content` and how it is found.
    path: of the file, named in errors.
    key: where in the file.
    **defaults: what holds of it unless it says otherwise.
  """
  fields = value if isinstance(value, dict) else {'content': value}
  text = fields.get('content')
  if not isinstance(text, str):
    refuse(path, key, value, 'a token: its text, or an object with content')
  _check_text(text, path, key)
  flags = dict(defaults)
  for flag in _FLAGS:
    if flag in fields:
      if not isinstance(fields[flag], bool):
        refuse(path, f'{key}.{flag}', fields[flag], 'true or false')
      flags[flag] = fields[flag]
  return tokenizers.AddedToken(text, **flags)


def added_tokens(
  values: Any, path: pathlib.Path, key: str
) -> dict[int, tokenizers.AddedToken]:
  """Returns `added_tokens_decoder` of a tokenizer_config.json, by id."""
  if not isinstance(values, dict):
    refuse(path, key, values, 'an object of tokens by id')
  tokens = {}
  for number, value in values.items():
    if not (number.isascii() and number.isdigit() and len(number) < 10):
      refuse(path, key, number, 'ids for keys')
    tokens[int(number)] = added_token(value, path, f'{key}.{number}')
  return tokens


def added_ids(values: Mapping[str, Any], path: pathlib.Path) -> dict[str, int]:
  """Returns the ids by token of an `added_tokens.json`."""
  for token, number in values.items():
    if not is_id(number):
      refuse(path, token, number, 'an id')
    _check_text(token, path, token)
  return dict(values)


def is_id(value: Any) -> bool:
  """Returns whether a value of a JSON file can be a token's id."""
  return type(value) is int and 0 <= value < 2**31


def said_ids(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what a model's folder says of token ids, by config.json's keys.

  `generation_config.json` goes before `config.json`, or the `weights.json` of
  a converted folder. `eos_token_id` is a list, the others are numbers; a key
  that nobody mentions, or as null, is absent.
  """
  said: dict[str, Any] = {}
  for name in ('weights.json', 'config.json', GENERATION_FILE):
    path = folder / name
    values = read_json(path)
    if name == 'weights.json':
      values = values.get('special_ids') or {}
      if not isinstance(values, dict):
        refuse(path, 'special_ids', values, 'an object')
    # T5Gemma and models of several senses say it a level deeper.
    for part in ('text_config', 'decoder'):
      if isinstance(values.get(part), dict):
        values = {**values[part], **{k: values[k] for k in _IDS if k in values}}
    for key in _IDS:
      value = values.get(key)
      if value not in (None, -1):  # Some write -1 for none.
        said[key] = _ids(value, path, key)
  return said


def _ids(value: Any, path: pathlib.Path, key: str) -> int | list[int]:
  if key == 'eos_token_id':
    values = value if isinstance(value, list) else [value]
    if not all(map(is_id, values)):
      refuse(path, key, value, 'the id of a token, or a list of ids')
    return values
  if not is_id(value):
    refuse(path, key, value, 'the id of a token')
  return value


def _check_text(text: str, path: pathlib.Path, key: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError:
    refuse(path, key, text, 'text; a half of a surrogate pair is none')


def is_panic(error: BaseException) -> bool:
  """Returns whether an exception is a panic of Rust's."""
  return type(error).__module__ == 'pyo3_runtime'


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what the package tokenizers raises into one sentence.

  It panics where its authors foresaw nothing; what then comes out of Rust has
  a class of its own, which is no Exception and which nobody can import.
  """
  try:
    yield
  except BaseException as error:
    is_theirs = type(error) is Exception  # Its own errors are bare ones.
    if not (
      is_theirs or is_panic(error) or isinstance(error, TypeError | ValueError)
    ):
      raise
    # It quotes what it has found, unprintable or not.
    text = repr(' '.join(str(error).split()))[1:-1]
    raise ValueError(
      f'{path} is not a Hugging Face tokenizer: {text}. Copy or download it '
      'again.'
    ) from error


BYTE_TOKENIZER = 'ByT5Tokenizer'  # As that file names it; it has no other.
# They act through the ids alone.
WITHOUT_PIECES = (*SPECIAL_FILES, GENERATION_FILE)


def read_special_files(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns the files in a folder that name a tokenizer's special tokens."""
  return {
    name: read(folder / name)
    for name in SPECIAL_FILES
    if (folder / name).exists()
  }
