# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files: names, and validated reading of their JSON.

The tokenizer of a folder is one of several files (`SENTENCEPIECE_FILES`,
`TOKENIZER_FILE`, `GPT2_FILES`). Other files name special tokens, added tokens,
and start and EOS ids. They may be edited or damaged, so every value is
validated where it is read. `auto_tokenizer.py` and `loading.py` combine them.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import tokenizers

# In search order.
SENTENCEPIECE_FILES = ('spiece.model', 'tokenizer.model', 'sentencepiece.model')
TOKENIZER_FILE = 'tokenizer.json'
GPT2_FILES = ('vocab.json', 'merges.txt')
CONFIG_FILE = 'tokenizer_config.json'
ADDED_FILE = 'added_tokens.json'
GENERATION_FILE = 'generation_config.json'
# Files that name special tokens. The second takes precedence, as in
# transformers.
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
  """Returns the content of a required file.

  Raises:
    FileNotFoundError: if there is no such file.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f'{path} is missing: expected a tokenizer file there.'
    )
  return path.read_bytes()


def parse_json(content: bytes, path: pathlib.Path) -> dict[str, Any]:
  """Parses a JSON object.

  Raises:
    ValueError: naming the file, if it is not a JSON object.
  """
  try:
    value = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path} is not JSON: {error}. Copy or download it again.'
    ) from error
  if not isinstance(value, dict):
    raise ValueError(
      f'{path} is a JSON {type(value).__name__}, expected an object.'
    )
  return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file, or an empty one without a file."""
  return parse_json(path.read_bytes(), path) if path.is_file() else {}


def without_code(content: bytes, path: pathlib.Path) -> bytes:
  """Returns a tokenizer_config.json without `auto_map`.

  That key names Python code, on the Hub or beside the file, which transformers
  executes where it is allowed to.
  """
  config = parse_json(content, path)
  if 'auto_map' not in config:
    return content
  del config['auto_map']
  return (json.dumps(config, indent=2) + '\n').encode()


def refuse(
  path: str | pathlib.Path, key: str, found: Any, wanted: str
) -> NoReturn:
  """Raises a ValueError for an invalid value in a file.

  Args:
    path: path of the file.
    key: place of the value in the file.
    found: the invalid value.
    wanted: the expected kind of value.
  """
  text = repr(found)
  if len(text) > 80:
    text = f'{text[:77]}...'
  raise ValueError(
    f'{path}: {key} is {text}, expected {wanted}. Correct it, or download the '
    'file again.'
  )


def token_text(value: Any, path: pathlib.Path, key: str) -> str | None:
  """Returns the text of a token, given as text or object; None for null.

  Raises:
    ValueError: if the value is neither.
  """
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
  """Parses an added token.

  Args:
    value: text of the token, or an object with `content` and matching flags.
    path: path of the file, for error messages.
    key: place in the file, for error messages.
    **defaults: flags used where the value has none.

  Raises:
    ValueError: if the value is invalid.
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
  """Parses `added_tokens_decoder` of a tokenizer_config.json: tokens by id."""
  if not isinstance(values, dict):
    refuse(path, key, values, 'an object of tokens by id')
  tokens = {}
  for number, value in values.items():
    if not (number.isascii() and number.isdigit() and len(number) < 10):
      refuse(path, key, number, 'ids for keys')
    tokens[int(number)] = added_token(value, path, f'{key}.{number}')
  return tokens


def added_ids(values: Mapping[str, Any], path: pathlib.Path) -> dict[str, int]:
  """Validates the content of `added_tokens.json`: ids by token."""
  for token, number in values.items():
    if not is_id(number):
      refuse(path, token, number, 'an id')
    _check_text(token, path, token)
  return dict(values)


def is_id(value: Any) -> bool:
  """Returns whether a JSON value is a valid token id."""
  return type(value) is int and 0 <= value < 2**31


def said_ids(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the token ids in a model's folder, by the keys of config.json.

  `generation_config.json` takes precedence over `config.json`, and that over
  the `weights.json` of a converted folder. `eos_token_id` is a list, the others
  are numbers; missing and null keys are left out.
  """
  said: dict[str, Any] = {}
  for name in ('weights.json', 'config.json', GENERATION_FILE):
    path = folder / name
    values = read_json(path)
    if name == 'weights.json':
      values = values.get('special_ids') or {}
      if not isinstance(values, dict):
        refuse(path, 'special_ids', values, 'an object')
    # T5Gemma and multimodal models nest these keys.
    for part in ('text_config', 'decoder'):
      if isinstance(values.get(part), dict):
        values = {**values[part], **{k: values[k] for k in _IDS if k in values}}
    for key in _IDS:
      value = values.get(key)
      if value not in (None, -1):  # Some files have -1 for none.
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
    refuse(path, key, text, 'text without unpaired surrogates')


def is_of_package(error: BaseException) -> bool:
  """Returns whether the package tokenizers raised an exception.

  It raises bare Exceptions. The class of a Rust panic is no `Exception` and
  cannot be imported.
  """
  return type(error) is Exception or type(error).__module__ == 'pyo3_runtime'


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Converts errors of the package tokenizers to a ValueError of a sentence."""
  try:
    yield
  except BaseException as error:
    if not (is_of_package(error) or isinstance(error, TypeError | ValueError)):
      raise
    # The message may quote unprintable characters.
    text = repr(' '.join(str(error).split()))[1:-1]
    raise ValueError(
      f'{path} is not a Hugging Face tokenizer: {text}. Copy or download it '
      'again.'
    ) from error


BYTE_TOKENIZER = 'ByT5Tokenizer'  # Class name in tokenizer_config.json.
# Files that enter a fingerprint by their ids only.
WITHOUT_PIECES = (*SPECIAL_FILES, GENERATION_FILE)


def read_special_files(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns the contents of a folder's files that name special tokens."""
  return {
    name: read(folder / name)
    for name in SPECIAL_FILES
    if (folder / name).exists()
  }
